"""docs/metrics.md, docs/prometheus.md and docs/runbooks.md describe what exists."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dtrace_exporter import families, sock_diag, untraced
from dtrace_exporter.collector import Collector
from dtrace_exporter.listeners import (
    SYN_BUCKETS,
    WAIT_BUCKETS,
    Capabilities,
    Identity,
    Owner,
    SessionId,
)
from dtrace_exporter.scripts.metrics import ScriptMetrics
from dtrace_exporter.sockets import Queues
from dtrace_exporter.state import LOST_KINDS, SessionStatus, State, UnixQueues, WebStatus
from dtrace_exporter.tracing import program
from dtrace_exporter.watched import Watched, named

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGE = (DOCS / "metrics.md").read_text(encoding="utf-8")
MINE = ("metrics.md", "prometheus.md", "runbooks.md")


def tables(text: str) -> list[list[list[str]]]:
    """Return the rows of every table of a page, without rules and without back quotes."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [
        [
            [re.sub(r"^`([^`]*)`$", r"\1", cell.strip()) for cell in line.strip("|").split("|")]
            for line in table.splitlines()
            if not line.startswith("|---")
        ]
        for table in found
    ]


def column(head: str, column_: str = "") -> dict[str, str]:
    """Return the first column of tables with this head, and another column, as a dict."""
    result: dict[str, str] = {}
    for first, *rest in tables(PAGE):
        if first[0] == head and (not column_ or column_ in first):
            at = first.index(column_) if column_ else 0
            for row in rest:
                assert row[0] not in result or not column_, f"{row[0]} twice"
                result[row[0]] = row[at]
    return result


def exported(place_label: str, host: str) -> list[Any]:
    """Return the families of a state that has everything."""
    state = State()
    session = SessionId(host, "all")
    features = dict.fromkeys(families.parts(), True)
    reasons = ("q_full", "q0_full", "q0_evicted", "q_full_ack", "other")
    capabilities = Capabilities(place_label=place_label, reasons=reasons, sampled=True)
    state.table.watch(session, Watched(), capabilities)
    listener = state.table.listener(session, "place", "*", 80)
    listener.sockets[1] = Queues(1, 1, 8, 8, 8)
    name = "blue" if place_label == "netns" else ""
    state.owners = {listener.identity: Owner("web", "web.service", "c", "svc:/web", name)}
    state.sessions[session] = SessionStatus(
        up=True, last_record=1.0, features=features, unattributed={"drops": 1}
    )
    script = SessionId(host, "script-x")
    state.sessions[script] = SessionStatus()
    state.scripts[script] = ScriptMetrics("/x.d", (), 1)
    state.last_reload_success = 1.0
    state.web = WebStatus(certificate_end=2e9)
    state.unix = UnixQueues({("place", "/run/a"): (1, 8)}, {"place": 1}, 0)
    return [*Collector(state).collect()]


def name_of(family: Any) -> str:
    """Return a family's name in queries; that of a histogram has no suffix."""
    suffix = "_total" if family.type == "counter" else ""
    return f"{family.name}{suffix}"


def test_metrics() -> None:
    """The page lists exactly the exported metrics, with their types."""
    known = {name_of(family): family.type for family in Collector(State()).describe()}
    assert column("metric", "type") == known
    assert {*column("metric", "needs")} == {name for name in known if "_tcp_listen_" in name}
    assert {name_of(family) for family in exported("zone", "h")} == {*known}


def test_labels() -> None:
    """Every label is explained for each metric that has it."""
    labels: dict[str, set[str]] = {}
    for place_label in ("netns", "zone", "jail"):
        for family in exported(place_label, "far"):
            for sample in family.samples:
                labels.setdefault(name_of(family), set()).update(sample.labels)
    common = {*column("label")}
    assert common == {"port", "address", "listener", "netns", "zone", "jail", "host"}
    meanings = column("metric", "meaning")
    for name, have in labels.items():
        if "_tcp_listen_" in name:
            own = have - common - {"le"}
            assert common <= have
        elif re.search("_unix_listen_(q_|drops)", name):
            assert "have the labels `path` and `netns`" in PAGE
            own = have - {"path", "netns"}
        elif "_session_" in name:
            assert "The label `session`" in PAGE
            own = have - {"session", "host"}
        elif "_script_" in name:
            own = have - {"host"}
        else:
            own = have
        named = set(re.findall(r"`(\w+)`", meanings[name])) - {"dtrace", "sock_diag", "netstat"}
        assert named == own, name


def test_reasons() -> None:
    """The reasons of drops are those of the programs and of sock_diag."""
    for head, names in (
        ("Linux", ["linux"]),
        ("Solaris, illumos", ["illumos", "solaris10"]),
        ("FreeBSD", ["freebsd"]),
    ):
        said = {reason for reason, cell in column("reason", head).items() if cell == "yes"}
        for name in names:
            one = program.load(name)
            parts = dict.fromkeys(one.parts, True)
            assert {*program.capabilities(one, parts).reasons} == said
    said = {reason for reason, cell in column("reason", "sock_diag").items() if cell == "yes"}
    assert said == {*sock_diag.CAPABILITIES.reasons}


@pytest.mark.parametrize("name", families.families())
def test_features(name: str) -> None:
    """Each program's column has its optional parts, in the words of the check command."""
    said = {part for part, cell in column("feature", name).items() if cell == "yes"}
    assert said == {*families.families()[name].parts}
    words = {name: part.what for name, part in families.parts().items()}
    assert column("feature", "what it is for") == words


def test_needs() -> None:
    """Without a part that a metric needs exactly the listed metrics are missing."""
    one = program.load("linux")
    every = dict.fromkeys(one.parts, True)
    needs = column("metric", "needs")
    for part in ("established", "handshake", "accepts", "accept_wait", "synack_retransmits"):
        missing = {name for name, cell in needs.items() if re.search(rf"\b{part}\b", cell)}
        state = State()
        session = SessionId("", "port-80")
        state.table.watch(
            session, named({80: ""}), program.capabilities(one, {**every, part: False})
        )
        state.table.listener(session, "", "*", 80).sockets[1] = Queues(1, 1, 8, 8, 8)
        state.owners = {Identity("", "", "*", 80): Owner()}
        have = {name_of(family) for family in Collector(state).collect()}
        of_sock_diag = {"dtrace_tcp_listen_q_sampled_ratio"}
        assert {name for name in needs if name not in have} == missing | of_sock_diag


@pytest.mark.parametrize(("name", "q0"), [("sock_diag", 0), ("netstat", None)])
def test_without_dtrace(name: str, q0: int | None) -> None:
    """The table lists exactly what a source other than DTrace fills."""
    state = State()
    session = SessionId("", "all")
    source = untraced.SOURCES[name]
    capabilities = replace(source.capabilities, sampled=source.queues is not None)
    state.table.watch(session, Watched(), capabilities)
    state.table.listener(session, "", "*", 80).sockets[1] = Queues(q0, 1, None, 8)
    if name == "sock_diag":
        state.owners = {Identity("", "", "*", 80): Owner()}
    have = {name_of(family) for family in Collector(state).collect()}
    said = {metric for metric, cell in column("metric", name).items() if cell == "yes"}
    assert {name for name in have if "_tcp_listen_" in name} == said


def test_kinds_and_bounds() -> None:
    """The kinds of loss and the bounds of histograms are those of the code."""
    assert {*column("kind")} == {*LOST_KINDS}
    assert SYN_BUCKETS == 12
    assert "bounds 0, 0.1, 0.2, ... 1." in PAGE
    assert WAIT_BUCKETS == 14
    bounds = [4**n / 1e9 for n in range(5, 18)]
    assert f"{bounds[0] * 1e6:g} us, {bounds[1] * 1e6:g} us, ..." in PAGE
    assert f"{bounds[-3]:.3g} s, {bounds[-2]:.3g} s, {bounds[-1]:.3g} s" in PAGE


def test_alerts() -> None:
    """The table of alerts has all alerts in their order."""
    text = (ROOT / "config/prometheus/dtrace_exporter.alerts.yml").read_text(encoding="utf-8")
    names = [rule["alert"] for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    (rows,) = (
        table[1:]
        for table in tables((DOCS / "prometheus.md").read_text(encoding="utf-8"))
        if table[0][0] == "alert"
    )
    assert [row[0] for row in rows] == names


def test_recorded() -> None:
    """The table of recorded series has all of them in their order."""
    text = (ROOT / "config/prometheus/dtrace_exporter.rules.yml").read_text(encoding="utf-8")
    groups = yaml.safe_load(text)["groups"]
    recorded = dict.fromkeys(rule["record"] for group in groups for rule in group["rules"])
    assert [*column("series")] == [*recorded]


def test_provisioning() -> None:
    """The example for Grafana is a valid file for the provisioning of dashboards."""
    page = (DOCS / "prometheus.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    given = yaml.safe_load(example)
    assert given["apiVersion"] == 1
    (provider,) = given["providers"]
    assert provider["type"] == "file"
    assert Path(provider["options"]["path"]).is_absolute()


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and GitLab make them."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", MINE)
def test_links(name: str) -> None:
    """Every relative link leads to an existing file and heading."""
    text = (DOCS / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://)([^)]+)\)", text)
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        target = (DOCS / file).resolve() if file else DOCS / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("name", MINE)
def test_files(name: str) -> None:
    """Every file of the project that the pages name exists."""
    text = (DOCS / name).read_text(encoding="utf-8")
    named = re.findall(r"\b((?:config|docs|src)/[\w./*-]*\w)", text)
    assert [path for path in named if not [*ROOT.glob(path)]] == []
