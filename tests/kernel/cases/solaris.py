"""The programs for Solaris and illumos, on a model of each generation of their kernel.

The model counts by itself what it decides; every case compares all that is exported of a listener
with that. The programs are as far from what Sun's engine runs as ../model/dtrace says; on a
simulator of that engine they run as they are, see ../../sun.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lab.exporter import Exporter
from lab.model import DTRACE, SOLARIS, Model
from lab.solaris import Sun, fresh_names, listening
from lab.tracing import rows_of, tracing
from lab.waiting import until

Ports = Callable[[int], list[int]]


@pytest.fixture(scope="module", params=SOLARIS)
def sun(request: pytest.FixtureRequest) -> Iterator[Sun]:
    """Return a model of one generation, watched by an exporter."""
    with Model(request.param) as model:
        model.run("zone 3 www", "zone 5 db exclusive")
        config = {
            "source": "dtrace",
            "dtrace": {"command": [DTRACE], "program": request.param, "interval": "200ms"},
        }
        exporter = Exporter(config)
        try:
            exporter.wait_ready()
            yield Sun(model, exporter)
        finally:
            exporter.stop()


@pytest.fixture
def listen(sun: Sun, port: int) -> Iterator[Callable[..., str]]:
    """Return a function that opens a listener of the model and gives its name."""
    with listening(sun, port) as start:
        yield start


def test_the_programs_of_a_generation(sun: Sun) -> None:
    """Every optional part of a generation's program is enabled."""
    metrics = sun.exporter.metrics()
    found = metrics.select("dtrace_session_feature_enabled", session="all")
    assert found
    assert all(value == 1 for _, value in found), sun.exporter.log()


def test_a_connection(sun: Sun, listen: Callable[..., str]) -> None:
    """A SYN, its completion and its accept are each counted once, and each moves the queues."""
    name = listen()
    sun.agrees(name)
    for line in (f"syn {name}", f"ack {name}", f"accept {name}"):
        sun.model.run(line)
        sun.agrees(name)
    sun.nothing_lost()


def test_q_full(sun: Sun, listen: Callable[..., str]) -> None:
    """With Q at Qmax every further SYN is dropped as q_full, and the histogram has each Q/Qmax."""
    name = listen()
    for _ in range(8):
        sun.model.run(f"syn {name}", f"ack {name}")
    sun.model.run(f"syn {name} count 5")
    metrics = sun.agrees(name)
    assert metrics.drops(**sun.labels(name)) == {"q_full": 5.0}
    sum_name = "dtrace_tcp_listen_q_saturation_ratio_sum"
    expected = sun.model.totals(name)["q_sum"] / 8
    assert metrics.value(sum_name, **sun.labels(name)) == expected
    sun.model.run(f"accept {name} count 8", f"syn {name}")
    sun.agrees(name)


def test_q0_full(sun: Sun, listen: Callable[..., str]) -> None:
    """With Q0 at its limit a SYN is dropped as q0_full, or another is thrown out as q0_evicted."""
    sun.model.run("q0max 0 5")
    try:
        name = listen(backlog=3)
        sun.model.run(f"syn {name} count 11")
        assert sun.agrees(name).drops(**sun.labels(name)) == {"q0_full": 3.0}
        sun.model.run(f"timeout {name} count 2", f"syn {name} count 4")
        found = sun.agrees(name).drops(**sun.labels(name))
        assert found == {"q0_full": 5.0, "q0_evicted": 2.0}
    finally:
        sun.model.run("q0max 0 1024")


def test_q0_limit_follows_its_tunable(sun: Sun, listen: Callable[..., str]) -> None:
    """A new limit of half-open connections shows when a listener is told again, in a second."""
    name = listen()
    sun.model.run(f"syn {name}")
    sun.agrees(name)

    def told() -> bool:
        sun.model.run(f"syn {name}")
        return sun.exporter.value("dtrace_tcp_listen_q0_limit", **sun.labels(name)) == 108

    sun.model.run("q0max 0 100")
    try:
        until(told, "the new limit is told", every=0.5)
        sun.agrees(name)
    finally:
        sun.model.run("q0max 0 1024")


def test_segments_that_are_no_syns(sun: Sun, listen: Callable[..., str]) -> None:
    """A segment without the SYN bit that reaches a listener is not counted."""
    name = listen()
    sun.model.run(f"syn {name}")
    if sun.model.generation == "illumos":
        sun.model.run(*(f"segment {name} {flags}" for flags in ("a", "r", "ra", "f", "pa", "u")))
        sun.model.run(f"segment {name} sa")
        assert sun.model.totals(name)["segments"] == 6
    else:
        # IP of that generation keeps them away.
        sun.model.run(f"segment {name} a")
    sun.agrees(name)
    sun.nothing_lost()


def test_addresses(sun: Sun, listen: Callable[..., str], ports: Ports) -> None:
    """The bound address is told: wildcards, IPv4, IPv6, and several sockets of one port."""
    names = [
        listen(f"address {address}")
        for address in ("192.0.2.1", "192.0.2.2", "2001:db8::7", "255.0.254.1")
    ] + [listen("family 4"), listen("address * family 6", at=ports(1)[0])]
    for number, name in enumerate(names, 1):
        sun.model.run(f"syn {name} count {number}")
    for name in names:
        sun.agrees(name)
    addresses = {sun.labels(name)["address"] for name in names}
    assert addresses == {"192.0.2.1", "192.0.2.2", "2001:db8::7", "255.0.254.1", "*"}
    sun.nothing_lost()


def test_packets(sun: Sun, listen: Callable[..., str]) -> None:
    """A SYN is one behind IP options and extension headers as well."""
    name = listen()
    for options in (
        "options 4",
        "options 40",
        "from 2001:db8::5",
        "from 2001:db8::5 extension 8",
        "from 2001:db8::5 extension 264",
    ):
        sun.model.run(f"syn {name} {options}")
    sun.agrees(name)
    assert sun.model.totals(name)["syns"] == 5
    sun.nothing_lost()


def test_zones(sun: Sun, listen: Callable[..., str]) -> None:
    """The same port in several zones is a series in each, with a shared IP stack or one's own."""
    names = [listen(zone=zone) for zone in (0, 3, 5)]
    for number, name in enumerate(names, 1):
        sun.model.run(f"syn {name} count {number}")
    for name in names:
        sun.agrees(name)
    assert [sun.labels(name)["zone"] for name in names] == ["global", "www", "db"]


def test_streams(sun: Sun, listen: Callable[..., str]) -> None:
    """With a STREAMS listener a connection complete while Q is full waits in Q0 for an accept."""
    name = listen("streams", backlog=2)
    sun.model.run(f"syn {name} count 4", f"ack {name} count 4")
    assert sun.model.totals(name)["deferred"] == 2
    sun.agrees(name)
    for _ in range(4):
        sun.model.run(f"accept {name}")
        sun.agrees(name)
    sun.nothing_lost()


def test_tli(sun: Sun, listen: Callable[..., str]) -> None:
    """The same with a TLI listener, whose accepts go another way."""
    name = listen("tli", backlog=2)
    sun.model.run(f"syn {name} count 4", f"ack {name} count 4")
    sun.agrees(name)
    for _ in range(4):
        sun.model.run(f"accept {name}")
        sun.agrees(name)
    sun.nothing_lost()


def test_deferred_aborts(sun: Sun, listen: Callable[..., str]) -> None:
    """A connection that waits in Q0 for room in Q, and is reset, was never established."""
    name = listen("streams", backlog=1)
    sun.model.run(f"syn {name} count 3", f"ack {name} count 3", f"abort {name} deferred")
    sun.agrees(name)
    sun.model.run(f"accept {name} count 2")
    sun.agrees(name)


def test_q_beyond_qmax(sun: Sun, listen: Callable[..., str]) -> None:
    """On illumos half-open connections that complete while Q is full make Q exceed Qmax."""
    name = listen(backlog=2)
    sun.model.run(f"syn {name} count 5", f"ack {name} count 5", f"syn {name}")
    metrics = sun.agrees(name)
    q = metrics.value("dtrace_tcp_listen_q_length", **sun.labels(name))
    assert q == (5 if sun.model.generation == "illumos" else 2)


def test_refused_above(sun: Sun, listen: Callable[..., str]) -> None:
    """On illumos a connection that the socket layer refuses has been in Q, and is in it no more."""
    if sun.model.generation != "illumos":
        return
    name = listen()
    sun.model.run(f"syn {name} count 3", f"ack {name}", f"ack {name} refused", f"accept {name}")
    sun.agrees(name)
    assert sun.model.totals(name)["refused"] == 1


def test_aborts(sun: Sun, listen: Callable[..., str]) -> None:
    """Connections that are reset leave Q0 at once, and Q with their accept."""
    name = listen()
    sun.model.run(f"syn {name} count 6", f"ack {name} count 3", f"abort {name} q0 count 2")
    sun.agrees(name)
    sun.model.run(f"abort {name} q count 2")
    sun.agrees(name)
    sun.model.run(f"accept {name} count 3")
    sun.agrees(name)


def test_silent_drops(sun: Sun, listen: Callable[..., str]) -> None:
    """What the kernel refuses in silence is a SYN, no drop, and never in Q0."""
    name = listen("limit 3" if sun.model.generation == "illumos" else "")
    sun.model.run(f"syn {name} count 2", "alloc_fail 1", f"syn {name}")
    if sun.model.generation == "illumos":
        sun.model.run(f"syn {name} count 4", "reclaim 0 1", f"syn {name} count 2", "reclaim 0 0")
        totals = sun.model.totals(name)
        assert (totals["limit"], totals["reclaim"]) == (3, 2)
    assert sun.model.totals(name)["alloc"] == 1
    sun.model.run(f"ack {name}")
    sun.agrees(name)


def test_a_wait(sun: Sun, listen: Callable[..., str]) -> None:
    """The sum of the times in Q is what the model measured, but for the time probes take."""
    name = listen()
    sun.model.run(f"syn {name} count 3", f"ack {name} count 3")
    sun.agrees(name)
    sun.model.run(f"accept {name} count 3")
    metrics = sun.agrees(name)
    found = metrics.value("dtrace_tcp_listen_accept_wait_seconds_sum", **sun.labels(name))
    expected = sun.model.totals(name)["wait_ns"] / 1e9
    assert found is not None
    assert abs(found - expected) < 0.01
    assert expected > 0.1


def test_before_the_session(sun: Sun, listen: Callable[..., str]) -> None:
    """A session asks which program fits; what came into Q before it has an unknown wait."""
    name = listen()
    sun.model.run(f"syn {name} count 2", f"ack {name} count 2")
    sun.agrees(name)
    late = Exporter(
        {"source": "sock_diag", "hosts": [{"name": "sun", "dtrace": {"command": [DTRACE]}}]}
    )
    try:
        late.wait_ready()
        labels = {**sun.labels(name), "host": "sun"}
        sun.model.run(f"accept {name} count 2")
        late.wait("dtrace_tcp_listen_accepts_total", 2, **labels)
        assert late.value("dtrace_tcp_listen_accept_wait_seconds_count", **labels) == 0
    finally:
        late.stop()
    sun.agrees(name)


def test_close_and_reopen(sun: Sun, listen: Callable[..., str]) -> None:
    """A listener that closes takes its gauges along; its counters go on when the port is back."""
    first = listen()
    sun.model.run(f"syn {first} count 5", f"ack {first} count 2", f"close {first}")
    sun.agrees(first)
    second = listen()
    sun.model.run(f"syn {second} count 3")
    labels = sun.labels(second)
    sun.exporter.wait("dtrace_tcp_listen_syns_total", 8, **labels)
    sun.exporter.wait("dtrace_tcp_listen_q0_length", 3, **labels)
    sun.exporter.wait("dtrace_tcp_listen_q_length", 0, **labels)


def test_unlisten(sun: Sun, listen: Callable[..., str]) -> None:
    """A listener that is unbound takes its gauges along."""
    name = listen()
    sun.model.run(f"syn {name} count 5", f"ack {name} count 2")
    sun.agrees(name)
    sun.model.run(f"unlisten {name}")
    sun.agrees(name)


def test_new_backlog(sun: Sun, listen: Callable[..., str]) -> None:
    """listen() with another backlog shows at once, and each SYN counts by the Qmax of its time."""
    name = listen(backlog=4)
    sun.model.run(f"syn {name} count 2", f"ack {name} count 2", f"syn {name}")
    sun.agrees(name)
    if not sun.model.refuses(f"backlog {name} 10"):
        sun.agrees(name)
        sun.model.run(f"syn {name}")
        sun.agrees(name)


def test_scan(sun: Sun, listen: Callable[..., str], ports: Ports) -> None:
    """Listeners that come, get a SYN and go are each counted exactly."""
    names = [listen(at=port) for port in ports(40)]
    for name in names:
        sun.model.run(f"syn {name}", f"close {name}")
    metrics = sun.agrees(names[-1])
    for name in names:
        assert sun.exported(metrics, name) == sun.counted(name)
    sun.nothing_lost()


def test_a_million(sun: Sun, listen: Callable[..., str], ports: Ports) -> None:
    """A million SYNs in bursts on both CPUs at once are counted exactly, and nothing is lost."""
    name = listen(backlog=128)
    other = listen(backlog=2, at=ports(1)[0])
    for _ in range(5):
        sun.model.run_on_both(f"syn {name} count 50000", f"syn {other} count 50000")
    totals = sun.model.totals(name)
    assert totals["syns"] + sun.model.totals(other)["syns"] == 1_000_000
    sun.agrees(name, 60)
    sun.agrees(other, 60)
    sun.nothing_lost()


def test_both_cpus(sun: Sun, listen: Callable[..., str], ports: Ports) -> None:
    """Connections in all of their states on both CPUs at once leave exact counts and queues."""
    names = [listen(backlog=64), listen("streams", backlog=8, at=ports(1)[0])]
    lines: list[Any] = []
    for name in names:
        lines += [f"syn {name} count 40", f"ack {name} count 20", f"accept {name} count 5"]
    for _ in range(3):
        # One side may find nothing left to accept.
        with contextlib.suppress(OSError):
            sun.model.run_on_both(*lines)
    for name in names:
        sun.agrees(name, races=True)
    sun.nothing_lost()


KINDS = st.sampled_from(["", "streams", "tli"])
EVENTS = st.sampled_from(
    (
        *("syn {}", "syn {} count 3", "syn {} from 2001:db8::9", "segment {} ra"),
        *("ack {}", "ack {} count 2", "accept {}", "timeout {} count 2"),
        *("abort {} q0", "abort {} q", "abort {} deferred", "backlog {} 3"),
        *("close {}", "unlisten {}"),
    )
)


def test_any_script(sun: Sun, ports: Ports) -> None:
    """Whatever happens to a listener, and in whatever order, all of it is counted."""

    @settings(
        max_examples=25, deadline=None, database=None, derandomize=True, phases=[Phase.generate]
    )
    @given(KINDS, st.integers(1, 4), st.integers(0, 3), st.lists(EVENTS, min_size=5, max_size=25))
    def run(kind: str, backlog: int, room: int, events: list[str]) -> None:
        name = next(fresh_names)
        sun.model.run(f"q0max 0 {room}")
        port = ports(1)[0]
        sun.model.run(f"listen {name} zone 0 address * port {port} backlog {backlog} {kind}")
        for number, event in enumerate(events):
            # One that cannot be does nothing.
            sun.model.refuses(event.format(name))
            if number % 5 == 4:
                sun.agrees(name)

    sun.begin()
    try:
        run()
    finally:
        sun.model.run("q0max 0 1024")
    sun.nothing_lost()


def test_trace_of_the_first_script(sun: Sun, listen: Callable[..., str], tmp_path: Path) -> None:
    """The example that the first D script got wrong has its source address and port."""
    name = listen("address 172.16.170.133", at=22)
    config = {"dtrace": {"command": [DTRACE], "program": sun.model.generation}}
    with tracing(22, tmp_path, config) as output:
        sun.model.run(f"syn {name} from 172.16.170.1 port 51022", f"ack {name}", f"accept {name}")
        until(lambda: "accept" in output.read_text(), "the accept is printed")
    found = [[*row.values()][2:] for row in rows_of(output)]
    client = ["172.16.170.1", "51022", "22"]
    assert found == [
        ["syn", *client, "0", "0", "8"],
        ["established", *client, "0", "1", "8"],
        ["accept", *client, "0", "1", "8"],
    ]


def test_trace(sun: Sun, listen: Callable[..., str], port: int, tmp_path: Path) -> None:
    """Every packet's source is read right, and every drop has its reason."""
    name = listen(backlog=2)
    config = {"dtrace": {"command": [DTRACE], "program": sun.model.generation}}
    sources = [
        ("192.0.2.200", "1025", ""),
        ("198.51.100.1", "65535", "options 40"),
        ("2001:db8:1:2:3:4:5:6", "443", ""),
        ("2001:db8::ff", "2049", "extension 24"),
    ]
    with tracing(port, tmp_path, config) as output:
        for address, source, rest in sources:
            sun.model.run(f"syn {name} from {address} port {source} {rest}")
        sun.model.run(f"ack {name} count 2", f"syn {name} from 192.0.2.201 port 7")
        sun.model.run("q0max 0 0", f"accept {name}", f"syn {name} from 192.0.2.202 port 8")
        sun.model.run(f"timeout {name}", f"syn {name} from 192.0.2.203 port 9", "q0max 0 1024")
        until(lambda: "drop:q0_evicted" in output.read_text(), "the last drop is printed")
    rows = rows_of(output)
    syns = [(row["Source IP"], row["Source Port"]) for row in rows if row["Action"] == "syn"]
    expected = [(address, source) for address, source, _ in sources]
    if sun.model.generation == "solaris10":
        # There the length of extension headers is not known.
        expected[3] = (expected[3][0], "0")
    later = [("192.0.2.201", "7"), ("192.0.2.202", "8"), ("192.0.2.203", "9")]
    assert syns == expected + later
    drops = [(row["Action"], row["Source IP"]) for row in rows if row["Action"].startswith("drop")]
    assert drops == [
        ("drop:q_full", "192.0.2.201"),
        ("drop:q0_full", "192.0.2.202"),
        ("drop:q0_evicted", "192.0.2.203"),
    ]
