"""The dashboards in config/grafana: Grafana's schema, and each of their queries in Prometheus."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from lab.exporter import Exporter, free_port
from lab.prometheus import Prometheus, hasten
from lab.waiting import until

import grafana_schema
import host_tools
import zone_rows
from dtrace_exporter import namespaces
from linux_rows import (
    ACCEPTED,
    ACK_Q_FULL,
    ESTABLISHED,
    MEASURED,
    OTHER,
    Q0_FULL,
    Q_FULL,
    TAKEN,
    address,
    counted,
    told,
)

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "config/grafana"
RULES = ROOT / "config/prometheus"
_spec = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
assert _spec is not None
assert _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)

DASHBOARDS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")
}
NAMES = sorted(DASHBOARDS)
BUILT_IN = {"__rate_interval", "__range", "__url_time_range", "__data"}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a dashboard's panels that have queries."""
    return [panel for panel in board["panels"] if panel.get("targets")]


def variables(board: dict[str, Any]) -> list[str]:
    """Return the names of a dashboard's variables."""
    return [variable["name"] for variable in board["templating"]["list"]]


def test_generated() -> None:
    """The files are exactly those that generate.py writes."""
    assert {f"{name}.json" for name in NAMES} == {*generate.DASHBOARDS}
    for name in generate.DASHBOARDS:
        assert (FOLDER / name).read_text(encoding="utf-8") == generate.render(name)


@pytest.mark.parametrize("name", NAMES)
def test_schema(name: str) -> None:
    """A dashboard has everything that Grafana's schema requires, and nothing beyond the schema."""
    found = grafana_schema.faults(DASHBOARDS[name], grafana_schema.Dashboard)
    assert list(found) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["panels", 0, "options", "graphMode"], "lines"),
        (["panels", 0, "options", "colour"], "red"),
        (["panels", 0, "type"], "graph"),
        (["panels", 0, "gridPos", "w"], "12"),
        (["panels", 0, "targets", 0, "expression"], "up"),
        (["panels", 0, "fieldConfig", "defaults", "thresholds", "mode"], "relative"),
        (["templating", "list", 1, "sort"], 17),
        (["refreshes"], "10s"),
        (["title"], 3),
        (["panels", 7, "fieldConfig", "overrides", 0, "properties", 0, "id"], "units"),
    ],
)
def test_schema_catches(path: list[Any], value: Any) -> None:
    """The check by the schema finds each kind of mistake."""
    board = copy.deepcopy(DASHBOARDS["fleet"])
    place: Any = board
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert list(grafana_schema.faults(board, grafana_schema.Dashboard))


@pytest.mark.parametrize("name", NAMES)
def test_least_version(name: str) -> None:
    """A dashboard and the guide name the oldest Grafana that works."""
    words = f"Grafana {generate.LEAST_VERSION} or newer"
    assert words in DASHBOARDS[name]["description"]
    assert words in (ROOT / "docs/prometheus.md").read_text(encoding="utf-8")


def test_full_is_by_capacity() -> None:
    """Every query for the fullness of Q divides by q_capacity, and has no definition of its own."""
    for board in DASHBOARDS.values():
        for panel in panels(board):
            for target in panel["targets"]:
                query = target["expr"]
                assert not re.search(r"q_length\{[^}]*\} / (?!dtrace_tcp_listen_q_capacity)", query)
                assert not re.search(r"q_limit\{[^}]*\} \+ 1", query)


@pytest.mark.parametrize("name", NAMES)
def test_layout(name: str) -> None:
    """Panels have different numbers, lie within the grid and do not overlap."""
    board = DASHBOARDS[name]
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(numbers) == len({*numbers})
    cells: Counter[tuple[int, int]] = Counter()
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] >= 0
        assert at["x"] + at["w"] <= 24
        cells.update(
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        )
    assert {*cells.values()} == {1}


@pytest.mark.parametrize("name", NAMES)
def test_panels(name: str) -> None:
    """Panels have titles, units that Grafana knows, and queries to the selected data source."""
    board = DASHBOARDS[name]
    for panel in panels(board):
        title = panel["title"]
        assert title
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len({*refs}), title
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, title
        fields = panel["fieldConfig"]
        properties = [each for one in fields["overrides"] for each in one["properties"]]
        units = [each["value"] for each in properties if each["id"] == "unit"]
        assert {fields["defaults"]["unit"], *units} <= grafana_schema.UNITS, title
        for transformation in panel.get("transformations", []):
            for ref in re.findall(r"Value #([A-Z])", json.dumps(transformation)):
                assert ref in refs, title


WITHOUT_DTRACE = re.compile(
    r"dtrace_tcp_listen_(drops|info|q0?_(length|limit))|dtrace_exporter_|ALERTS|scrape_|vector\(0\)"
)
"""The series in a query that also exist with sock_diag."""


@pytest.mark.parametrize("name", NAMES)
def test_panels_that_need_dtrace(name: str) -> None:
    """Only panels whose series need DTrace say so when they are empty."""
    said = 0
    for panel in panels(DASHBOARDS[name]):
        needs = not any(WITHOUT_DTRACE.search(target["expr"]) for target in panel["targets"])
        text = panel["fieldConfig"]["defaults"].get("noValue")
        if "verdict" in panel["targets"][0]["expr"]:
            assert text == generate.NO_VERDICT
            continue
        assert text == (generate.NO_DTRACE if needs else None), panel["title"]
        said += needs
    assert said > 5
    assert "Source" in generate.NO_DTRACE
    assert "Source" in [panel["title"] for panel in panels(DASHBOARDS[name])]


@pytest.mark.parametrize("name", NAMES)
def test_variables(name: str) -> None:
    """Every variable in use is defined, before any use by another one, and none is unused."""
    board = DASHBOARDS[name]
    names = variables(board)
    asked = json.dumps([board["panels"], board["annotations"]])
    used = set(re.findall(r"\$\{?(\w+)", asked)) - BUILT_IN
    assert used <= {*names}
    for number, variable in enumerate(board["templating"]["list"]):
        inside = set(re.findall(r"\$(\w+)", json.dumps(variable["query"])))
        assert inside <= {*names[:number]}
        used |= inside
    assert used == {*names}


def test_links() -> None:
    """The dashboards link to each other, with variables that the other one has."""
    by_uid = {board["uid"]: board for board in DASHBOARDS.values()}
    targets = set()
    for name, board in DASHBOARDS.items():
        for url in re.findall(r"\"(/d/[^\"]*)\"", json.dumps(board)):
            path, _, query = url.partition("?")
            target = by_uid[path.removeprefix("/d/")]
            targets.add((name, target["uid"]))
            given = re.findall(r"var-(\w+)=", query) + re.findall(r"\$\{(\w+):queryparam", query)
            assert {*given} <= {*variables(target)}
        assert all(link["includeVars"] and link["keepTime"] for link in board["links"])
    fleet, listener = DASHBOARDS["fleet"]["uid"], DASHBOARDS["listener"]["uid"]
    assert targets == {("fleet", listener), ("listener", fleet)}


# Real data: the service with fake dtrace(1)s whose counts grow.

PORT = 443
CONTAINER = 4026532999
OWN_PORT = free_port()
STEPS = 400
LATER = 1 << 61
"""Later than the time at which the close of listeners was first seen."""
HALF_OPEN, WAITING, QMAX, Q0MAX = 90, 120, 120, 1024


# The backlogs that listen() requested for the same two listeners.
_LISTENS = [
    {"ready": namespaces.own()},
    {"tick": 2},
    {"print": [f"limit {address(port, CONTAINER):x} {LATER} {QMAX} 4096" for port in (22, PORT)]},
    {"tick": True},
]


# The programs that accept there, on Solaris.
_ACCEPTS: list[dict[str, Any]] = [
    {"ready": "global"},
    {
        "rows": [
            f"{row} {zone_rows.address(port):x} {{now}} {name}"
            for port in (22, PORT)
            for row, name in (("program", "httpd"), ("fmri", "svc:/network/http:apache24"))
        ]
    },
    {"tick": True},
]


def _linux_rows(step: int) -> list[str]:
    """Return the rows of two listeners of a container at a step: their state and counts."""
    kinds = [
        *((TAKEN, bucket, 3 * step, bucket * 12 * 3 * step) for bucket in range(11)),
        (Q_FULL, 11, 2 * step, 0),
        *((what, 0, 2 * step, 0) for what in (Q0_FULL, OTHER, ACK_Q_FULL)),
        (ESTABLISHED, 0, 2 * step, 0),
        *((MEASURED, bucket, 2 * step, step * 4 ** (bucket + 5) // 1000) for bucket in range(14)),
        *((ACCEPTED, bucket, step, step * 4 ** (bucket + 5) // 1000) for bucket in range(14)),
    ]
    return [
        "0 " + row
        for port in (22, PORT)
        for row in (
            told(port, place=CONTAINER, time=LATER + step, q0=HALF_OPEN, q=WAITING, qmax=QMAX),
            *(
                counted(port, n, what, place=CONTAINER, qmax=QMAX, part=part, value=value)
                for what, part, n, value in kinds
            ),
        )
    ]


def _solaris_rows(step: int) -> list[str]:
    """Return the rows of two listeners at a step: SYNs at every fullness, waits of every length."""
    telling = step % 65_535 + 1
    return [
        row
        for port in (22, PORT)
        for row in (
            zone_rows.told(
                port,
                telling,
                time="{now}",
                zone="db",
                q0=HALF_OPEN,
                q=WAITING,
                qmax=QMAX,
                q0max=Q0MAX,
            ),
            *(zone_rows.syns(port, 3, 12 * tenth, telling) for tenth in range(11)),
            *(zone_rows.drops(port, 2, reason, telling) for reason in (1, 2, 3)),
            *(zone_rows.opened(port, 30, telling), zone_rows.established(port, 30, telling)),
            *(
                zone_rows.left(port, 1, bucket, telling, us=4 ** (bucket + 5) // 1000)
                for bucket in range(14)
            ),
            zone_rows.left(port, 16, zone_rows.LEFT_Q, telling),
        )
    ]


def _freebsd_rows(step: int) -> list[str]:
    """Return the rows of a jail's listeners at a step: Solaris' rows without those of Q0."""
    rows = [row for row in _solaris_rows(step) if not row.startswith(("opened", "drop"))]
    # FreeBSD has no Q0, and no limit of it.
    rows = [re.sub(rf"db (.*) {HALF_OPEN} (.*) {Q0MAX}$", r"www \1 - \2", row) for row in rows]
    telling = step % 65_535 + 1
    return [
        row
        for row in rows + [zone_rows.drops(22, 2, reason, telling) for reason in (3, 4, 5)]
        if row != zone_rows.left(22, 16, zone_rows.LEFT_Q, telling)
        and row != zone_rows.left(PORT, 16, zone_rows.LEFT_Q, telling)
    ]


def _script(
    rows: Callable[[int], list[str]], *before: dict[str, Any], losses: int = 1
) -> list[Any]:
    """Return the steps of a fake dtrace(1) that also reports a loss every so many steps."""
    steps: list[Any] = [*before]
    for step in range(1, STEPS + 1):
        steps.append({"rows": rows(step)})
        if step % losses == 0:
            steps.append({"stderr": f"dtrace: {step} aggregation drops on CPU 0"})
        steps.append({"tick": 4})
    return [*steps, {"tick": True}]


@pytest.fixture(scope="module")
def make_dtrace(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[Any]], list[str]]:
    """Return a function that makes the command of a fake dtrace(1) from its steps."""
    folder = tmp_path_factory.mktemp("dtrace")

    def command(steps: list[Any]) -> list[str]:
        file = folder / f"{len(list(folder.iterdir()))}.json"
        file.write_text(json.dumps(steps), encoding="utf-8")
        fake = Path(__file__).with_name("fake_dtrace.py")
        return ["/usr/bin/env", f"FAKE_DTRACE={file}", sys.executable, "-I", "-S", str(fake)]

    return command


@pytest.fixture(scope="module")
def exporter(make_dtrace: Callable[[list[Any]], list[str]]) -> Iterator[Exporter]:
    """Run the service on Linux with a container, and with remote hosts with zones and jails.

    The Linux host also has a real listener, so that one listener has a known owner.
    """
    linux = _script(_linux_rows, {"ready": namespaces.own()}, {"calls": _LISTENS})
    solaris = _script(_solaris_rows, {"ready": "global"}, {"calls": _ACCEPTS}, losses=4)
    freebsd = _script(_freebsd_rows, {"ready": "0"}, losses=4)
    listeners = [{"port": PORT, "name": "web"}, {"port": 22, "name": "ssh"}]
    common = {"interval": "250ms"}
    config = {
        "source": "dtrace",
        "dtrace": {
            "command": make_dtrace(linux),
            "program": "linux",
            "handshake": True,
            **common,
        },
        "listeners": [*listeners, {"port": OWN_PORT, "name": "own"}],
        "hosts": [
            {
                "name": "sol11",
                "dtrace": {"command": make_dtrace(solaris), "program": "illumos", **common},
                "listeners": listeners,
            },
            {
                "name": "bsd14",
                "dtrace": {"command": make_dtrace(freebsd), "program": "freebsd", **common},
                "listeners": listeners,
            },
        ],
    }
    with socket.create_server(("", OWN_PORT)), Exporter(config) as made:
        made.wait_ready()
        yield made


@pytest.fixture(scope="module")
def prometheus(exporter: Exporter) -> Iterator[Prometheus]:
    """Run Prometheus with the shipped rules sped up, until alerts fire and rates exist."""
    command = host_tools.require("prometheus", "prometheus")
    config = yaml.safe_load((RULES / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (scrape,) = config["scrape_configs"]
    scrape["static_configs"] = [{"targets": [f"127.0.0.1:{exporter.port}"]}]
    files = {
        name: hasten((RULES / name).read_text(encoding="utf-8"), 120)
        for name in config["rule_files"]
    }
    with ExitStack() as stack:
        made = Prometheus(config, command, files)
        stack.callback(made.stop)
        for name in ("TcpListenQueueNearLimit", "DTraceDataLost"):
            query = f'ALERTS{{alertname="{name}", alertstate="firing"}}'
            until(partial(made.query, query), f"{name} fires", 120)
        yield made


CHOSEN = {
    "linux": {
        "port": str(PORT),
        "address": r"\\*",
        "netns": "4026532999",
        "host": "",
        "zone": "",
        "jail": "",
    },
    "solaris": {
        "port": "22",
        "listener": "ssh",
        "zone": "db",
        "host": "sol11",
        "netns": "",
        "jail": "",
    },
    "own": {"port": str(OWN_PORT), "host": "", "zone": "", "netns": "", "jail": ""},
    "all": {},
}
"""Possible selections of a user; all other variables are at All."""


def filled_in(text: str, chosen: dict[str, str]) -> str:
    """Return a query as Grafana would send it."""
    text = text.replace("$__rate_interval", "8s").replace("$__range", "1m")
    return re.sub(r"\$(\w+)", lambda found: chosen.get(found[1], ".*"), text)


def values(prometheus: Prometheus, query: str, *, instant: bool) -> list[float]:
    """Return the numbers that a query gives."""
    if instant:
        return [float(series["value"][1]) for series in prometheus.query(query)]
    now = time.time()
    series = prometheus.query_range(query, now - 4, now, 1)
    return [value for _, samples in series for _, value in samples]


def cases() -> Iterator[Any]:
    """Yield every query of every panel with each selection that is possible for its dashboard.

    The queries for verdicts, which take ten minutes, are in tests/test_verdicts.py.
    """
    for name in NAMES:
        for panel in panels(DASHBOARDS[name]):
            for target in panel["targets"]:
                if "verdict" in target["expr"]:
                    continue
                for choice in ("all",) if name == "fleet" else _choices(target["expr"]):
                    words = (name, panel["title"], target["refId"], choice)
                    yield pytest.param(target, CHOSEN[choice], id="-".join(words))


def _choices(query: str) -> tuple[str, ...]:
    """Return the selections for which a query about one listener gives something."""
    if "dtrace_tcp_listen_info{" in query:
        return ("own", "solaris")
    only_linux = re.search(r"_backlog_requested{|_handshake_", query)
    return ("linux",) if only_linux else ("linux", "solaris")


@pytest.mark.parametrize(("target", "chosen"), [*cases()])
def test_query(prometheus: Prometheus, target: dict[str, Any], chosen: dict[str, str]) -> None:
    """A query gives numbers, and not only zeroes if something happens."""
    query = filled_in(target["expr"], chosen)

    def numbers() -> list[float]:
        found = values(prometheus, query, instant=target["instant"])
        return [value for value in found if not math.isnan(value)]

    found = until(numbers, f"{query} gives a number", 30)
    still = re.search(r"session_up|probe_errors|bad_rows|restarts|refused", query)
    assert any(found) or still, query


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        (name, variable)
        for name in NAMES
        for variable in DASHBOARDS[name]["templating"]["list"]
        if variable["type"] == "query"
    ],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_variable(prometheus: Prometheus, name: str, variable: dict[str, Any]) -> None:
    """A variable offers the values that exist."""
    assert name in NAMES
    (found,) = re.findall(r"^label_values\((.*), (\w+)\)$", variable["definition"])
    assert variable["query"]["query"] == variable["definition"]
    selector, label = filled_in(found[0], {}), found[1]
    offered = prometheus.ask(f"label/{label}/values", [("match[]", selector)])
    expected = {
        "host": ["bsd14", "sol11"],
        "zone": ["db"],
        "jail": ["www"],
        "netns": ["4026532999"],
        "port": sorted(["22", "443", str(OWN_PORT)]),
        "address": ["*"],
        "listener": ["own", "ssh", "web"],
        "job": ["dtrace"],
    }
    assert offered == expected.get(label, offered)
    assert offered


@pytest.mark.parametrize("name", NAMES)
def test_annotations(prometheus: Prometheus, name: str) -> None:
    """The annotations' query finds the alerts that fire."""
    (annotation,) = DASHBOARDS[name]["annotations"]["list"]
    assert prometheus.query(filled_in(annotation["expr"], {}))


METRICS_PAGE = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "query", re.findall(r"^```promql\n(.*?)^```", METRICS_PAGE, re.DOTALL | re.MULTILINE)
)
def test_documented_queries(prometheus: Prometheus, query: str) -> None:
    """The queries of docs/metrics.md give numbers, except one for samples of sock_diag."""
    found = [value for value in values(prometheus, query, instant=True) if value > 0]
    assert bool(found) == ("_q_sampled_ratio" not in query)
