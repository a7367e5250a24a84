"""Solaris' trace programs print the right line for each event, once."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
from hypothesis import given, settings

from dtrace_exporter.trace import HEADER
from sun.events import Script, fixed_profile, scripts
from sun.faulty import Faulty
from sun.fixed import KINDS
from sun.library import SOLARIS, why_not
from sun.printing import nothing_wrong, only_its_port, per_action, printed, short, started
from sun.watching import SECOND, Host

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

each_generation = pytest.mark.parametrize("generation", SOLARIS)
ACTIONS = ("syn", "drop:q_full", "drop:q0_full", "drop:q0_evicted", "established", "accept")
ALL = (
    "q0max 0 2",
    "listen L zone 0 address * port 22 backlog 1",
    "syn L from 172.16.170.1 port 40001 options 8",
    "ack L",
    "syn L from 172.16.170.1 port 40002",
    "accept L",
    "syn L from 2001:db8::5 port 7",
    "syn L from 2001:db8::6 port 8 extension 264",
    "syn L from 192.0.2.7 port 9 options 40",
    "syn L from 192.0.2.7 port 10",
    "timeout L",
    "syn L from 192.0.2.8 port 11",
    "ack L",
    "accept L",
)
LINES = [
    "syn,172.16.170.1,40001,22,0,0,1",
    "established,172.16.170.1,40001,22,0,1,1",
    "syn,172.16.170.1,40002,22,0,1,1",
    "drop:q_full,172.16.170.1,40002,22,0,1,1",
    "accept,172.16.170.1,40001,22,0,1,1",
    "syn,2001:db8::5,7,22,0,0,1",
    "syn,2001:db8::6,8,22,1,0,1",
    "syn,192.0.2.7,9,22,2,0,1",
    "syn,192.0.2.7,10,22,3,0,1",
    "drop:q0_full,192.0.2.7,10,22,3,0,1",
    "syn,192.0.2.8,11,22,3,0,1",
    "drop:q0_evicted,192.0.2.8,11,22,3,0,1",
    "established,2001:db8::6,8,22,2,1,1",
    "accept,2001:db8::6,8,22,2,1,1",
]
BURST = ("syn L count 3", "ack L count 3", "accept L", "abort L q", "accept L count 2")


@each_generation
def test_every_action(generation: str) -> None:
    """Each action is a line with the right source, ports and queues."""
    expected = list(LINES)
    if generation == "solaris10":
        # The port after extension headers is not searched for.
        expected[6] = expected[6].replace(",8,", ",0,")
    with Host(generation) as host:
        session = started(host)
        host.run(*ALL)
        lines = printed(session)
        assert lines[0] == HEADER
        assert short(lines[1:]) == expected
        assert session.errors == []


@each_generation
def test_columns(generation: str) -> None:
    """The columns are a time, a date, an action, addresses and queues."""
    with Host(generation) as host:
        session = started(host)
        host.library.run("listen L zone 0 address * port 22 backlog 3")
        host.advance(5 * SECOND)
        at = host.engine.time
        host.library.run("syn L from 172.16.170.1 port 33333")
        [line] = printed(session)[1:]
    time, date, *rest = line.split(",")
    assert at < int(time) < at + 1000
    assert date == "2023 Nov 14 22:13:25"
    assert rest == ["syn", "172.16.170.1", "33333", "22", "0", "0", "3"]


@each_generation
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(generation: str, kind: str) -> None:
    """A deferred connection is established once, when an accept lets it into Q."""
    with Host(generation) as host:
        session = started(host)
        host.run(f"listen L zone 0 address * port 22 backlog 1 {kind}")
        host.play(*BURST)
        totals = host.library.totals("L")
        found = Counter(line.split(",")[2] for line in printed(session)[1:])
    assert found == {name: totals[f"{name}s"] for name in ("syn", "accept")} | {
        "established": totals["established"]
    }


@each_generation
@pytest.mark.parametrize("kind", KINDS)
def test_quick(generation: str, kind: str) -> None:
    """Each connection is established once, even if its accept comes very early."""
    for seed in range(12):
        with Host(generation, cpus=3, seed=seed) as host:
            session = started(host)
            host.run(f"listen L zone 0 address * port 22 backlog 1 {kind}", "syn L count 5")
            others = ["accept L"] * 6, ["accept L", "abort L deferred"] * 3
            host.concurrently(["ack L"] * 4, *others, seed=seed)
            totals = host.library.totals("L")
            found = Counter(line.split(",")[2] for line in printed(session)[1:])
            assert found["established"] == totals["established"]
            assert found["accept"] == totals["accepts"]


@each_generation
def test_port(generation: str) -> None:
    """A session of one port prints only lines of that port, whatever its threads did before."""
    only_its_port(generation, ALL)


@each_generation
def test_any_script(generation: str) -> None:
    """In any script, each port has as many lines of each action as it had events."""

    @settings(fixed_profile, max_examples=50)
    @given(scripts(generation))
    def run(script: Script) -> None:
        with Host(generation, seed=script.seed) as host:
            session = started(host)
            host.play_script(script)
            host.advance(SECOND)
            found = per_action(session)
            expected: Counter[tuple[str, str]] = Counter()
            for totals in host.library.all_totals():
                # A SYN for a listener that has just closed is printed too.
                counts = (
                    totals["syns"] + totals["not_listening"],
                    *(totals[name] for name in ("q_full", "q0_full", "q0_evicted")),
                    *(totals["established"], totals["accepts"]),
                )
                for action, count in zip(ACTIONS, counts, strict=True):
                    expected[str(totals["port"]), action] += count
            assert found == +expected
            assert session.errors == []

    run()


def with_faults(generation: str, failing: frozenset[int]) -> tuple[int, Counter[str]]:
    """Return the number of loads and the printed lines, if some loads fail."""
    memory = Faulty()
    with Host(generation, load=memory) as host:
        session = started(host)
        memory.host, memory.failing = host, failing
        host.run(*ALL)
        for kind in KINDS[1:]:
            host.run(f"listen M zone 0 address * port 80 backlog 1 {kind}")
            host.play(*[line.replace(" L", " M") for line in BURST], "close M")
        memory.host = None
        host.advance(SECOND)
        return memory.count, Counter(printed(session)[1:])


@each_generation
def test_any_fault(generation: str) -> None:
    """If a load fails, no wrong line is printed, and no line is printed twice."""
    nothing_wrong(partial(with_faults, generation))
