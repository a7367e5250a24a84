"""README.md shows only metrics, commands and rules that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dtrace_exporter import families
from dtrace_exporter.collector import Collector
from dtrace_exporter.listeners import Capabilities, Owner, SessionId
from dtrace_exporter.sockets import Queues
from dtrace_exporter.state import SessionStatus, State, WebStatus
from dtrace_exporter.watched import named
from host_tools import require
from markdown_page import blocks, languages

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def exported() -> dict[str, set[str]]:
    """Return the labels of each sample of a state that has everything, by the sample's name."""
    state = State(web=WebStatus(certificate_end=2e9))
    session = SessionId("", "port-7200")
    reasons = ("q_full", "q0_full", "q_full_ack", "other")
    capabilities = Capabilities(reasons=reasons, sampled=True)
    state.table.watch(session, named({7200: "web"}), capabilities)
    listener = state.table.listener(session, "", "127.0.0.1", 7200)
    listener.sockets[1] = Queues(0, 2, 7, 3, 3)
    state.owners = {listener.identity: Owner("web", "web.service")}
    state.sessions[session] = SessionStatus(
        up=True,
        last_record=1.0,
        features=dict.fromkeys(families.parts(), True),
        unattributed={"drops": 1},
    )
    state.last_reload_success = 1.0
    return {
        sample.name: {*sample.labels}
        for family in Collector(state).collect()
        for sample in family.samples
    }


def test_blocks() -> None:
    """Each code block has a language that is checked here."""
    assert languages(README) == {"", "sh", "yaml"}


def test_sample_lines() -> None:
    """Each line of the samples has a name and labels that are exported."""
    known = exported()
    without, with_dtrace = (
        [sample for family in text_string_to_metric_families(block) for sample in family.samples]
        for block in blocks(README, "")
    )
    assert (len(without), len(with_dtrace)) == (5, 8)
    for sample in without + with_dtrace:
        assert {*sample.labels} == known[sample.name]


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_metric_names(name: str) -> None:
    """Every metric that a page or README names is exported."""
    text = README + (ROOT / "docs" / name).read_text(encoding="utf-8")
    known = {re.sub(r"_(bucket|count|sum)$", "", sample) for sample in exported()} | {*exported()}
    named = set(re.findall(r"(?<![\w:])dtrace_(?:tcp|session|exporter)_\w+\b(?!\()", text))
    # Names of files, and variables of rc.conf(5).
    script = (ROOT / "freebsd/files/dtrace_exporter.in").read_text(encoding="utf-8")
    others = {word for word in named if (ROOT / "config" / f"{word}.yml").exists()}
    assert named - known == others | {word for word in named if f"# {word} (" in script}


@pytest.mark.parametrize("target", ["run", "dist", "test"])
def test_make_targets(target: str) -> None:
    """The make targets that README names exist."""
    assert f"make {target}" in README
    made = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_alert(tmp_path: Path) -> None:
    """The alert is a rule that Prometheus accepts, and it fires only for a nearly full queue."""
    promtool = require("promtool", "prometheus")
    (rules,) = blocks(README, "yaml")
    (tmp_path / "rules.yml").write_text(rules, encoding="utf-8")
    labels = {"port": "7200", "instance": "web1:9748", "job": "dtrace"}
    of = ",".join(f'{name}="{value}"' for name, value in labels.items())
    empty = of.replace("7200", "7300")
    firing: dict[str, Any] = {
        "exp_labels": {**labels, "severity": "warning", "alertname": "TcpListenQueueNearLimit"},
        "exp_annotations": {
            "summary": "Port 7200 on web1:9748: the accept queue is at 90% of what it "
            "holds; when it is full, SYNs are dropped."
        },
    }
    at = {"alertname": "TcpListenQueueNearLimit"}
    tests = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [
                    {"series": f"dtrace_tcp_listen_q_capacity{{{of}}}", "values": "10x80"},
                    # A backlog of 0 with no connection waiting is fine.
                    {"series": f"dtrace_tcp_listen_q_capacity{{{empty}}}", "values": "1x80"},
                    {"series": f"dtrace_tcp_listen_q_length{{{empty}}}", "values": "0x80"},
                    # Just below the threshold for five minutes, above it for five, then empty.
                    {"series": f"dtrace_tcp_listen_q_length{{{of}}}", "values": "8x19 9x19 0x40"},
                ],
                "alert_rule_test": [
                    {**at, "eval_time": "4m", "exp_alerts": []},
                    {**at, "eval_time": "6m", "exp_alerts": []},
                    {**at, "eval_time": "8m", "exp_alerts": [firing]},
                    {**at, "eval_time": "12m", "exp_alerts": []},
                ],
            }
        ],
    }
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(tests), encoding="utf-8")
    for command in (["check", "rules", "rules.yml"], ["test", "rules", "tests.yml"]):
        done = subprocess.run([promtool, *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    known = exported()
    for name in re.findall(r"dtrace_\w+", rules):
        assert "port" in known[name]
