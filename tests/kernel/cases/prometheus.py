"""Prometheus itself, and its tool, on what the exporter says."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lab.exporter import Exporter, free_port
from lab.traffic import Clients, Listener
from lab.waiting import until

PORT = 7000


@pytest.fixture(scope="module")
def watched() -> Iterator[Exporter]:
    """Return an exporter of one listener with some traffic: a page that is soon read."""
    made = Exporter({"source": "dtrace", "listeners": [{"port": PORT, "name": "web"}]})
    listener, clients = Listener(PORT, 20), Clients()
    try:
        made.wait_ready()
        clients.connect(3, PORT)
        listener.accept(1)
        made.settle()
        yield made
    finally:
        clients.close()
        listener.close()
        made.stop()


def test_promtool(watched: Exporter) -> None:
    """The tool promtool has nothing to say against any metric of ours."""
    _, text = watched.get("/metrics")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True
    )
    complaints = (done.stdout + done.stderr).splitlines()
    assert [line for line in complaints if line.startswith("dtrace_")] == []
    assert done.returncode in (0, 3), complaints


@pytest.fixture
def server(watched: Exporter, tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """Run a Prometheus server that scrapes the exporter; return a function that queries it."""
    port = free_port()
    scrape = {
        "job_name": "dtrace",
        "scrape_interval": "1s",
        "static_configs": [{"targets": [f"127.0.0.1:{watched.port}"]}],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scrape]}))
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=log,
        stderr=log,
    )

    def query(text: str) -> Any:
        address = f"http://127.0.0.1:{port}/api/v1/query?"
        try:
            with urllib.request.urlopen(
                address + urllib.parse.urlencode({"query": text})
            ) as answer:
                return json.load(answer)["data"]["result"]
        except OSError:
            assert process.poll() is None, (tmp_path / "log").read_text()
            return []

    yield query
    process.terminate()
    process.wait()
    log.close()


def test_server(watched: Exporter, server: Callable[[str], Any]) -> None:
    """A Prometheus server scrapes the exporter and answers for each metric, with its value."""
    until(lambda: server('up{job="dtrace"} == 1'), "the scrape works", 90)
    ours = {name for name in watched.metrics().names() if name.startswith("dtrace_")}
    assert {"dtrace_tcp_listen_syns_total", "dtrace_session_up"} <= ours
    for name in sorted(ours):
        assert until(partial(server, name), f"{name} is there", 30)
    for name, value in (("syns_total", "3"), ("q_length", "2"), ("accepts_total", "1")):
        (series,) = server(f"dtrace_tcp_listen_{name}")
        assert series["value"][1] == value, name
        assert series["metric"]["listener"] == "web"
