"""How many series a listener has, as docs/metrics.md says, and what reduces them."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

import host_tools
from dtrace_exporter import netstat, sock_diag
from dtrace_exporter.collector import Collector
from dtrace_exporter.listeners import Capabilities, Owner, SessionId
from dtrace_exporter.sockets import Queues
from dtrace_exporter.state import State
from dtrace_exporter.tracing import program
from dtrace_exporter.watched import Wanted, Watched
from dtrace_exporter.web.exposition import Texts
from markdown_page import blocks

PAGE = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
SESSION = SessionId("", "all")


def capabilities(source: str) -> Capabilities:
    """Return what a source in the page's table fills, with all of its parts."""
    if source.startswith("sock_diag"):
        return replace(sock_diag.CAPABILITIES, sampled="sample_interval" in source)
    if source == "netstat":
        return netstat.CAPABILITIES
    one = program.load(source.partition(".d")[0])
    parts = {part: part != "handshake" or "handshake" in source for part in one.parts}
    return program.capabilities(one, parts)


def series(source: str, *, histograms: bool) -> list[str]:
    """Return the lines of a scrape for an open listener."""
    state = State()
    wanted = Wanted((range(80, 81),), histograms=histograms)
    state.table.watch(SESSION, Watched([wanted]), capabilities(source))
    q0_limit = 9 if source in ("illumos.d", "solaris10.d") else None
    q0 = None if source in ("freebsd.d", "netstat") else 1
    listener = state.table.listener(SESSION, "", "*", 80)
    listener.sockets[1] = Queues(
        q0, 1, q0_limit, 8, 8 if source.startswith(("linux.d", "freebsd.d")) else None
    )
    if source.startswith(("linux.d", "sock_diag")):
        state.owners = {listener.identity: Owner("nginx")}
    text = b"".join(Texts().render(Collector(state).read(), CollectorRegistry(), generate_latest))
    return [line for line in text.decode().splitlines() if line.startswith("dtrace_tcp_listen_")]


def told() -> dict[str, list[str]]:
    """Return the rows of the page's table."""
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \| ([\d,]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 8
    return {source.replace("`", ""): numbers for source, *numbers in rows}


def relabelling() -> list[dict[str, Any]]:
    """Return the page's example."""
    (example,) = blocks(PAGE, "yaml")
    rules: list[dict[str, Any]] = yaml.safe_load(example)["metric_relabel_configs"]
    return rules


@pytest.mark.parametrize("source", told())
def test_series(source: str) -> None:
    """The table gives the right number of series of a listener, with and without histograms."""
    with_, without, of_many = told()[source]
    assert len(series(source, histograms=True)) == int(with_)
    assert len(series(source, histograms=False)) == int(without)
    assert int(of_many.replace(",", "")) == 1000 * int(with_)


@pytest.mark.parametrize("source", told())
def test_relabelling(source: str) -> None:
    """The example drops exactly the series that a listener without histograms does not have."""
    (rule,) = relabelling()
    assert (rule["source_labels"], rule["action"]) == (["__name__"], "drop")
    left = [
        line
        for line in series(source, histograms=True)
        if not re.fullmatch(rule["regex"], line.partition("{")[0])
    ]
    assert left == series(source, histograms=False)


def test_relabelling_is_prometheus_own(tmp_path: Path) -> None:
    """The tool promtool accepts the example."""
    job = {"job_name": "dtrace", "metric_relabel_configs": relabelling()}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": [job]}))
    promtool = host_tools.require("promtool", "prometheus")
    argv = [promtool, "check", "config", "prometheus.yml"]
    done = subprocess.run(argv, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
