"""What README.md shows is what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dtrace_exporter import check, config, program, trace
from dtrace_exporter.collector import Collector
from dtrace_exporter.listeners import Exports, Queues, SessionId
from dtrace_exporter.state import SessionStatus, State

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, number: int = 0) -> str:
    """Return the text of a fenced block."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[number]


def exported() -> dict[str, tuple[str, set[str]]]:
    """Return the types and labels of all families of a state that has everything."""
    state = State()
    session = SessionId("", "port-7200")
    reasons = ("q_full", "q0_full", "q_full_ack", "other")
    state.table.watch(session, {7200: "web"}, Exports(reasons=reasons))
    listener = state.table.listener(session, "", "127.0.0.1", 7200)
    listener.sockets[1] = Queues(0, 2, 7, 3)
    state.sessions[session] = SessionStatus(
        up=True, last_record=1.0, features=dict.fromkeys(check.FEATURES, True)
    )
    state.last_reload_success = 1.0
    return {
        sample.name: (family.type, {*sample.labels})
        for family in Collector(state).collect()
        for sample in family.samples
    }


def test_sample_lines() -> None:
    """Each line of the sample has a name and labels that are exported."""
    known = exported()
    families = list(text_string_to_metric_families(block("")))
    samples = [sample for family in families for sample in family.samples]
    assert len(samples) == 8
    for sample in samples:
        assert {*sample.labels} == known[sample.name][1]


def test_metric_names() -> None:
    """Every metric that the text names is exported, and every one exported is named."""
    prefixes = ("dtrace_session", "dtrace_exporter")
    named = set(re.findall(r"`(dtrace_(?:tcp|session|exporter)_\w+)`", README))
    rest = set(re.findall(r"`(_\w+)`", README))
    known = {
        re.sub(r"_(bucket|count|sum)$", "", name) if kind == "histogram" else name
        for name, (kind, _) in exported().items()
    }
    known_rest = {name.removeprefix(prefix) for name in known for prefix in prefixes}
    assert {name for name in named if name not in known} == set()
    assert {name for name in rest if name not in known_rest} == set()
    missing = {
        name
        for name in known - named
        if not any(name == prefix + tail for prefix in prefixes for tail in rest)
    }
    assert missing == set()


def test_configuration(tmp_path: Path) -> None:
    """The configuration example is one, and names every key but those for other kernels."""
    file = tmp_path / "example.yml"
    file.write_text(block("yaml"), encoding="utf-8")
    loaded = config.load(file)
    assert [(one.port, one.name) for one in loaded.local.listeners] == [(22, "ssh"), (443, "web")]
    assert loaded.local.dtrace.options == {"aggsize": "16m"}


def test_check_output() -> None:
    """The output of check shows every optional part of the program in its words."""
    shown = dict(re.findall(r"^ok      (\w+) +(.+)$", block("console"), re.MULTILINE))
    assert shown == {part: check.FEATURES[part] for part in program.load("linux").parts}


def test_trace_output() -> None:
    """The output of trace has the columns of the trace command."""
    header, *lines = block("console", 1).splitlines()[1:]
    assert header == trace.HEADER
    assert {len(line.split(",")) for line in lines} == {9}


@pytest.mark.parametrize("target", ["run", "test"])
def test_make_targets(target: str) -> None:
    """The make targets of the text exist."""
    assert f"make {target}" in block("sh")
    made = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_subcommands() -> None:
    """Every command line of the text is one that the command line takes."""
    for command in re.findall(r"dtrace-exporter (check|trace|program)\b", README):
        done = subprocess.run(
            [sys.executable, "-m", "dtrace_exporter", command, "--help"], capture_output=True
        )
        assert done.returncode == 0


def test_links() -> None:
    """Every relative link leads to a file."""
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
