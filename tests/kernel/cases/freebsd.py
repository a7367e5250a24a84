"""The programs for FreeBSD, on a model of its kernels 13 and 14.

The model counts by itself what it decides; every case compares all that is exported of a listener
with that. The programs are as far from what FreeBSD's engine runs as ../model/dtrace says; on a
simulator of that engine they run as they are, see ../../sun.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lab.exporter import Exporter
from lab.freebsd import FreeBSD
from lab.model import DTRACE, FREEBSD, Model
from lab.solaris import fresh_names, listening
from lab.tracing import rows_of, tracing
from lab.waiting import until

Open = Callable[..., str]
Ports = Callable[[int], list[int]]
BUCKET = 1000
"""How many half-open connections a stack has room for, unless a case says otherwise."""
TRACE = {"dtrace": {"command": [DTRACE], "program": "freebsd"}}

# What does not differ on 13, and takes long.
on_14 = pytest.mark.parametrize("bsd", ["freebsd14"], indirect=True)


@pytest.fixture(scope="module", params=FREEBSD)
def bsd(request: pytest.FixtureRequest) -> Iterator[FreeBSD]:
    """Return a model of one release, watched by an exporter."""
    with Model(request.param) as model:
        model.run("zone 3 www", "zone 5 db exclusive", f"bucketlimit 0 {BUCKET}")
        settings = {"command": [DTRACE], "program": "freebsd", "interval": "200ms"}
        exporter = Exporter({"source": "dtrace", "dtrace": settings})
        try:
            exporter.wait_ready()
            yield FreeBSD(model, exporter)
        finally:
            exporter.stop()


@pytest.fixture
def listen(bsd: FreeBSD, port: int) -> Iterator[Open]:
    """Return a function that opens a listener of the model and gives its name."""
    with listening(bsd, port, "timeout") as start:
        yield start
    bsd.model.run(f"bucketlimit 0 {BUCKET}")


def test_the_parts_of_a_release(bsd: FreeBSD) -> None:
    """Every optional part is enabled, but for that of the other release."""
    found = bsd.exporter.metrics().select("dtrace_session_feature_enabled", session="all")
    off = {labels["feature"] for labels, value in found if value == 0}
    assert off == ({"enqueue"} if bsd.model.generation == "freebsd13" else {"newconn"})
    assert {"established", "accepts", "ack_drops", "evictions", "open_close"} <= {
        labels["feature"] for labels, _ in found
    }


def test_a_connection(bsd: FreeBSD, listen: Open) -> None:
    """A SYN, its completion and its accept are each counted once, and each moves the queue."""
    name = listen()
    bsd.agrees(name)
    for line in (f"syn {name}", f"ack {name}", f"accept {name}"):
        bsd.model.run(line)
        bsd.agrees(name)
    bsd.nothing_lost()


def test_capacity(bsd: FreeBSD, listen: Open, ports: Ports) -> None:
    """Q takes final ACKs up to exactly its capacity; each further one is dropped as q_full_ack."""
    names = {}
    for backlog in (0, 1, 2, 5, 128):
        name = names[backlog] = listen(backlog=backlog, at=ports(1)[0])
        most = 3 * backlog // 2 + 1
        bsd.model.run(f"syn {name} count {most + 3}", f"ack {name} count {most}")
    for backlog, name in names.items():
        metrics, labels = bsd.agrees(name), bsd.labels(name)
        q = [metrics.value(f"dtrace_tcp_listen_q_{it}", **labels) for it in ("length", "capacity")]
        assert q == [3 * backlog // 2 + 1] * 2
        assert not metrics.drops(**labels)
        bsd.model.run(f"ack {name}", f"accept {name}", f"ack {name} count 2")
    for name in names.values():
        assert bsd.agrees(name).drops(**bsd.labels(name)) == {"q_full_ack": 2.0}
    bsd.nothing_lost()


def test_saturation(bsd: FreeBSD, listen: Open) -> None:
    """The histogram has the Q/Qmax that each SYN found, also beyond 1."""
    name = listen()
    for _ in range(14):
        bsd.model.run(f"syn {name}", f"ack {name}")
    metrics = bsd.agrees(name)
    found = metrics.value("dtrace_tcp_listen_q_saturation_ratio_sum", **bsd.labels(name))
    assert found == bsd.model.totals(name)["q_sum"] / 8
    assert metrics.drops(**bsd.labels(name)) == {"q_full_ack": 1.0}


def test_no_memory(bsd: FreeBSD, listen: Open) -> None:
    """A final ACK that gets no socket is `other`; a SYN for which there is no memory is no drop."""
    name = listen()
    bsd.model.run(f"syn {name} count 3", "alloc_fail 1", f"ack {name}", f"ack {name}")
    assert bsd.agrees(name).drops(**bsd.labels(name)) == {"other": 1.0}
    bsd.model.run("alloc_fail 2", f"syn {name}")
    assert bsd.model.totals(name)["zone_fail"] == 1
    bsd.agrees(name)


def test_no_memory_in_a_full_q(bsd: FreeBSD, listen: Open) -> None:
    """With one place left and no memory a final ACK is `other`, with none left q_full_ack."""
    name = listen(backlog=1)
    bsd.model.run(f"syn {name} count 4", f"ack {name}", "alloc_fail 1", f"ack {name}")
    bsd.model.run(f"ack {name} count 2")
    found = bsd.agrees(name).drops(**bsd.labels(name))
    assert found == {"other": 1.0, "q_full_ack": 1.0}


def test_evictions(bsd: FreeBSD, listen: Open, ports: Ports) -> None:
    """A SYN that finds the syncache full evicts the oldest connection, of whichever listener."""
    kinds = ("", "family 4", "v6only", "address 192.0.2.1", "address 192.0.2.1 family 6")
    names = [listen(kind, at=port) for kind, port in zip(kinds, ports(len(kinds)), strict=True)]
    other = listen("address 2001:db8::7", zone=3)
    bsd.model.run("bucketlimit 0 3")
    for name in (*names, other, *names):
        bsd.model.run(f"syn {name} count 2")
    for name in names:
        bsd.model.refuses(f"syn {name} from 2001:db8::5")
        bsd.model.refuses(f"syn {name} from 192.0.2.7")
    totals = [bsd.model.totals(name)["q0_evicted"] for name in (*names, other)]
    assert all(totals), totals
    for name in (*names, other):
        bsd.agrees(name)
    bsd.nothing_lost()


def test_two_of_one_port(bsd: FreeBSD, listen: Open, ports: Ports) -> None:
    """Evicted connections of two listeners of one port are told apart by the address."""
    here, all6 = listen("address 192.0.2.1"), listen("v6only")
    away = listen(at=ports(1)[0])
    bsd.model.run("bucketlimit 0 4", f"syn {here} count 3", f"syn {all6} count 3")
    bsd.model.run(f"syn {away} count 3")
    for name in (here, all6, away):
        bsd.agrees(name)
    # Of those whose listener has closed no evictions are counted.
    bsd.model.run(f"close {here}", f"syn {all6} count 5", f"close {all6}", f"syn {away} count 5")
    for name in (here, all6, away):
        bsd.agrees(name)
    bsd.nothing_lost()


def test_accept_filter(bsd: FreeBSD, listen: Open) -> None:
    """Behind a filter a connection is established with its data, or evicted for another one."""
    name = listen("filter", backlog=2)
    bsd.model.run(f"syn {name} count 7", f"ack {name} count 2")
    bsd.agrees(name)
    bsd.model.run(f"data {name}")
    bsd.agrees(name)
    bsd.model.run(f"ack {name} count 5")
    assert bsd.model.totals(name)["overflown"] == 3
    bsd.agrees(name)
    bsd.model.run(f"data {name} count 3", f"accept {name} count 3")
    bsd.agrees(name)
    bsd.nothing_lost()


def test_again(bsd: FreeBSD, listen: Open) -> None:
    """A SYN that is sent again is counted; a cookie's ACK establishes a connection without one."""
    name = listen(backlog=2)
    bsd.model.run(f"syn {name}", f"again {name} count 3", f"cookie {name} count 5")
    assert bsd.agrees(name).drops(**bsd.labels(name)) == {"q_full_ack": 1.0}
    bsd.model.run(f"accept {name} count 4", f"ack {name}")
    bsd.agrees(name)


def test_aborts(bsd: FreeBSD, listen: Open) -> None:
    """Half-open connections that are reset count for nothing, and those in Q stay for accept()."""
    name = listen()
    bsd.model.run(f"syn {name} count 6", f"ack {name} count 3", f"abort {name} q0 count 2")
    bsd.model.run(f"abort {name} q count 2", f"timeout {name}")
    bsd.agrees(name)
    bsd.model.run(f"accept {name} count 3", f"poll {name}")
    bsd.agrees(name)


def test_addresses(bsd: FreeBSD, listen: Open, ports: Ports) -> None:
    """The bound address is told: wildcards, IPv4, IPv6, and several sockets of one port."""
    names = [
        listen(f"address {address}")
        for address in ("192.0.2.1", "192.0.2.2", "2001:db8::7", "255.0.254.1")
    ]
    names += [listen("family 4"), listen("v6only", at=ports(1)[0])]
    for number, name in enumerate(names, 1):
        # What comes to the first of these addresses comes to its listener, not to the wildcard's.
        to = "to 192.0.2.9" if name == names[4] else ""
        bsd.model.run(f"syn {name} count {number} {to}")
    for name in names:
        bsd.agrees(name)
    addresses = {bsd.labels(name)["address"] for name in names}
    assert addresses == {"192.0.2.1", "192.0.2.2", "2001:db8::7", "255.0.254.1", "*"}


def test_jails(bsd: FreeBSD, listen: Open) -> None:
    """The same port in several jails is a series in each, with a stack of its own or the host's."""
    names = [listen(zone=zone) for zone in (0, 3, 5)]
    for number, name in enumerate(names, 1):
        bsd.model.run(f"syn {name} count {number}")
    for name in names:
        bsd.agrees(name)
    assert [bsd.labels(name)["jail"] for name in names] == ["", "www", "db"]


def test_unix_sockets(bsd: FreeBSD, listen: Open) -> None:
    """UNIX sockets, whose connections go the same way, are not counted."""
    name = listen()
    bsd.model.run(f"syn {name}", "local 5", f"ack {name}", "local 3")
    before = bsd.agrees(name)
    syns = before.select("dtrace_tcp_listen_syns_total")
    bsd.model.run("local 5", f"accept {name}")
    after = bsd.agrees(name)
    assert after.select("dtrace_tcp_listen_syns_total") == syns
    bsd.nothing_lost()


def test_a_wait(bsd: FreeBSD, listen: Open) -> None:
    """The sum of the times in Q is what the model measured, but for the time probes take."""
    name = listen()
    bsd.model.run(f"syn {name} count 3", f"ack {name} count 3")
    bsd.agrees(name)
    bsd.model.run(f"accept {name} count 3")
    metrics = bsd.agrees(name)
    found = metrics.value("dtrace_tcp_listen_accept_wait_seconds_sum", **bsd.labels(name))
    expected = bsd.model.totals(name)["wait_ns"] / 1e9
    assert found is not None
    assert abs(found - expected) < 0.01
    assert expected > 0.1


@on_14
def test_before_the_session(bsd: FreeBSD, listen: Open) -> None:
    """A connection that came into Q before the session has an unknown wait."""
    name = listen()
    bsd.model.run(f"syn {name} count 2", f"ack {name} count 2")
    bsd.agrees(name)
    late = Exporter({"source": "sock_diag", "hosts": [{"name": "bsd", **TRACE}]})
    try:
        late.wait_ready()
        labels = {**bsd.labels(name), "host": "bsd"}
        bsd.model.run(f"accept {name} count 2")
        late.wait("dtrace_tcp_listen_accepts_total", 2, **labels)
        assert late.value("dtrace_tcp_listen_accept_wait_seconds_count", **labels) == 0
        assert late.value("dtrace_tcp_listen_q_length", **labels) == 0
    finally:
        late.stop()
    bsd.agrees(name)


def test_close_and_reopen(bsd: FreeBSD, listen: Open) -> None:
    """A listener that closes takes its gauges along; its counters go on when the port is back."""
    first = listen()
    bsd.model.run(f"syn {first} count 5", f"ack {first} count 2", f"close {first}")
    bsd.agrees(first)
    second = listen()
    bsd.model.run(f"syn {second} count 3", f"ack {second}")
    labels = bsd.labels(second)
    bsd.exporter.wait("dtrace_tcp_listen_syns_total", 8, **labels)
    bsd.exporter.wait("dtrace_tcp_listen_established_total", 3, **labels)
    bsd.exporter.wait("dtrace_tcp_listen_q_length", 1, **labels)


def test_memory_that_is_used_again(bsd: FreeBSD, listen: Open, ports: Ports) -> None:
    """Listeners and connections that come and go in the same memory are each counted exactly."""
    names = [listen(at=port) for port in ports(20)]
    for name in names:
        bsd.model.run(f"syn {name} count 2", f"ack {name}", f"accept {name}", f"close {name}")
    for port in ports(20):
        names.append(listen(at=port))
        bsd.model.run(f"syn {names[-1]} count 2", f"ack {names[-1]} count 2")
        bsd.model.run(f"accept {names[-1]}", f"close {names[-1]}")
    metrics = bsd.agrees(names[-1])
    for name in names:
        assert bsd.exported(metrics, name) == bsd.counted(name)
    bsd.nothing_lost()


def test_new_backlog(bsd: FreeBSD, listen: Open) -> None:
    """listen() with another backlog shows at once what was asked for and what was granted."""
    name = listen(backlog=4)
    bsd.model.run(f"syn {name} count 2", f"ack {name} count 2", f"syn {name}")
    for backlog in (10, 500, -1, 1):
        bsd.model.run(f"backlog {name} {backlog}")
        bsd.agrees(name)
        bsd.model.run(f"syn {name}")
        bsd.agrees(name)


def test_a_flood(bsd: FreeBSD, listen: Open, ports: Ports) -> None:
    """SYNs in bursts on both CPUs, nearly each of which evicts another, are counted exactly."""
    name, other = listen(backlog=128), listen(backlog=2, at=ports(1)[0])
    bsd.model.run("bucketlimit 0 30")
    for _ in range(5):
        bsd.model.run_on_both(f"syn {name} count 10000", f"syn {other} count 10000")
    both = [bsd.model.totals(each) for each in (name, other)]
    assert sum(totals["syns"] for totals in both) == 200_000
    # At first those of listeners that have closed are evicted.
    assert sum(totals["q0_evicted"] for totals in both) >= 200_000 - BUCKET
    bsd.agrees(name, 60)
    bsd.agrees(other, 60)
    bsd.nothing_lost()


def test_a_flood_of_acks(bsd: FreeBSD, listen: Open) -> None:
    """Final ACKs on both CPUs while Q is full are each counted as a drop."""
    name = listen(backlog=1)
    bsd.model.run_on_both(f"cookie {name} count 10000")
    assert bsd.model.totals(name)["q_full_ack"] == 19_998
    bsd.agrees(name, 60)
    bsd.nothing_lost()


def test_both_cpus(bsd: FreeBSD, listen: Open, ports: Ports) -> None:
    """Connections in all of their states on both CPUs at once leave exact counts and queues."""
    names = [listen(backlog=64), listen("filter", backlog=8, at=ports(1)[0])]
    lines: list[str] = []
    for name in names:
        lines += [f"syn {name} count 40", f"ack {name} count 20", f"cookie {name} count 5"]
        lines += [f"data {name} count 3"] * (name == names[1]) + [f"accept {name} count 3"] * 2
    for _ in range(3):
        # One side may find nothing left to accept.
        with contextlib.suppress(OSError):
            bsd.model.run_on_both(*lines)
    for name in names:
        assert bsd.model.totals(name)["accepts"]
        bsd.agrees(name, races=True)
    bsd.nothing_lost()


EVENTS = st.sampled_from(
    (
        *("syn {}", "syn {} count 3", "syn {} from 2001:db8::9", "again {}", "cookie {}"),
        *("ack {}", "ack {} count 2", "accept {}", "data {}", "poll {}", "timeout {}"),
        *("abort {} q0", "abort {} q", "backlog {} 3", "alloc_fail 1", "local 3", "close {}"),
    )
)


def test_any_script(bsd: FreeBSD, ports: Ports) -> None:
    """Whatever happens to a listener, and in whatever order, all of it is counted."""

    @settings(
        max_examples=10,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.sampled_from(["", "filter"]),
        st.integers(0, 3),
        st.integers(1, 4),
        st.lists(EVENTS, min_size=10, max_size=25),
    )
    def run(kind: str, backlog: int, room: int, events: list[str]) -> None:
        name = next(fresh_names)
        bsd.model.run(f"bucketlimit 0 {room}", "alloc_fail 0")
        port = ports(1)[0]
        bsd.model.run(f"listen {name} zone 0 address * port {port} backlog {backlog} {kind}")
        for number, event in enumerate(events):
            # One that cannot be does nothing.
            bsd.model.refuses(event.format(name))
            if number % 8 == 7:
                bsd.agrees(name)
        bsd.agrees(name)

    bsd.begin()
    try:
        run()
    finally:
        bsd.model.run(f"bucketlimit 0 {BUCKET}", "alloc_fail 0")
    bsd.nothing_lost()


def test_trace(bsd: FreeBSD, listen: Open, port: int, ports: Ports, tmp_path: Path) -> None:
    """Every packet's source is read right, and every action is a line with the Q that it found."""
    # Nobody else has half-open connections in that stack.
    name, other = listen(backlog=0, zone=5), listen(zone=5, at=ports(1)[0])
    model = bsd.model
    with tracing(port, tmp_path, TRACE) as output:
        model.run("bucketlimit 5 2", f"syn {name} from 172.16.170.1 port 51022", f"ack {name}")
        model.run(f"syn {name} from 2001:db8::5 port 7", f"ack {name}", f"accept {name}", "local 2")
        model.run(f"syn {name} from 192.0.2.7 port 9", "alloc_fail 1", f"ack {name}")
        model.run(f"syn {name} from 192.0.2.7 port 65535", f"syn {other} count 2")
        model.run(f"cookie {name} from 198.51.100.1 port 443", f"accept {name}")
        last = "198.51.100.1,443"
        until(lambda: output.read_text().count(last) == 2, "the last accept is printed")
    v4, v6, memory = ["172.16.170.1", "51022"], ["2001:db8::5", "7"], ["192.0.2.7", "9"]
    cookie = ["198.51.100.1", "443"]
    assert [[*row.values()][2:] for row in rows_of(output)] == [
        ["syn", *v4, str(port), "-", "0", "0"],
        ["established", *v4, str(port), "-", "1", "0"],
        ["syn", *v6, str(port), "-", "1", "0"],
        ["drop:q_full_ack", *v6, str(port), "-", "1", "0"],
        ["accept", *v4, str(port), "-", "1", "0"],
        ["syn", *memory, str(port), "-", "0", "0"],
        ["drop:other", *memory, str(port), "-", "0", "0"],
        ["syn", "192.0.2.7", "65535", str(port), "-", "0", "0"],
        ["drop:q0_evicted", "192.0.2.7", "65535", str(port), "-", "-", "-"],
        ["established", *cookie, str(port), "-", "1", "0"],
        ["accept", *cookie, str(port), "-", "1", "0"],
    ]


@on_14
def test_senders(bsd: FreeBSD, listen: Open, port: int, ports: Ports, tmp_path: Path) -> None:
    """Each sender has as many SYNs as it sent, and those of a crowd are all counted."""
    name, other = listen(backlog=128), listen(at=ports(1)[0])
    sent = {"192.0.2.200": 300, "2001:db8:1:2:3:4:5:6": 40, "198.51.100.1": 1}
    with tracing(port, tmp_path, TRACE, "--top", header="Date,Source") as output:
        for address, count in sent.items():
            bsd.model.run(f"syn {name} from {address} count {count}")
        bsd.model.run(f"syn {other} count 500", f"syn {name} count 2000")

        def counted() -> Counter[str]:
            found: Counter[str] = Counter()
            for row in rows_of(output):
                # The last line may be only half there.
                if row["other"]:
                    found[row["Source"]] += int(row["SYNs"])
            return found

        until(lambda: counted().total() == sum(sent.values()) + 2000, "every SYN is counted")
    found: Any = counted()
    assert {address: found[address] for address in sent} == sent
    crowd = {sender: n for sender, n in found.items() if sender.startswith("198.18.")}
    assert {*crowd.values()} == {1}
    assert len(crowd) + found["others"] == 2000
