"""FreeBSD's trace program prints the right line for each event, once."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
from hypothesis import given, settings

from dtrace_exporter.trace import HEADER
from sun.events import Script, fixed_profile, scripts
from sun.faulty import Faulty
from sun.freebsd_fixed import KINDS
from sun.library import FREEBSD, why_not
from sun.printing import nothing_wrong, only_its_port, per_action, printed, short, started
from sun.watching import SECOND, Host

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

each_generation = pytest.mark.parametrize("generation", FREEBSD)
ACTIONS = {
    "syn": "syns",
    "drop:q_full_ack": "q_full_ack",
    "drop:other": "no_memory",
    "established": "established",
    "accept": "accepts",
}
ALL = (
    "bucketlimit 0 2",
    "listen L zone 0 address * port 22 backlog 0",
    "syn L from 172.16.170.1 port 40001",
    "ack L",
    "syn L from 172.16.170.1 port 40002",
    "ack L",
    "accept L",
    "poll L",
    "syn L from 2001:db8::5 port 7",
    "syn L from 192.0.2.7 port 9",
    "syn L from 192.0.2.7 port 10",
    "alloc_fail 1",
    "ack L",
    "local 3",
    "ack L",
    "accept L",
)
LINES = [
    "syn,172.16.170.1,40001,22,-,0,0",
    "established,172.16.170.1,40001,22,-,1,0",
    "syn,172.16.170.1,40002,22,-,1,0",
    "drop:q_full_ack,172.16.170.1,40002,22,-,1,0",
    "accept,172.16.170.1,40001,22,-,1,0",
    "syn,2001:db8::5,7,22,-,0,0",
    "syn,192.0.2.7,9,22,-,0,0",
    "syn,192.0.2.7,10,22,-,0,0",
    "drop:q0_evicted,2001:db8::5,7,22,-,-,-",
    "drop:other,192.0.2.7,9,22,-,0,0",
    "established,192.0.2.7,10,22,-,1,0",
    "accept,192.0.2.7,10,22,-,1,0",
]


@each_generation
def test_every_action(generation: str) -> None:
    """Each action is a line with the right source, ports and queue, except for UNIX sockets."""
    with Host(generation) as host:
        session = started(host)
        host.run(*ALL)
        lines = printed(session)
        assert lines[0] == HEADER
        assert short(lines[1:]) == LINES
        assert session.errors == []


@each_generation
@pytest.mark.parametrize("kind", KINDS)
def test_quick(generation: str, kind: str) -> None:
    """Each connection is established once, even if its accept comes very early."""
    for seed in range(12):
        with Host(generation, cpus=3, seed=seed) as host:
            session = started(host)
            host.run("bucketlimit 0 100", f"listen L zone 0 address * port 22 backlog 1 {kind}")
            host.run("syn L count 6")
            others = ["accept L"] * 6, ["data L", "accept L"] * 5
            host.concurrently(["ack L"] * 6, *others, seed=seed)
            totals = host.library.totals("L")
            found = Counter(line.split(",")[2] for line in printed(session)[1:])
            assert found["established"] == totals["established"]
            assert found["accept"] == totals["accepts"]


@each_generation
def test_port(generation: str) -> None:
    """A session of one port prints only lines of that port."""
    only_its_port(generation, ALL)


@each_generation
def test_any_script(generation: str) -> None:
    """In any script, each port has as many lines of each action as it had events."""

    @settings(fixed_profile, max_examples=40)
    @given(scripts(generation))
    def run(script: Script) -> None:
        with Host(generation, seed=script.seed) as host:
            session = started(host)
            host.play_script(script)
            host.advance(SECOND)
            found = per_action(session)
            expected: Counter[tuple[str, str]] = Counter()
            for totals in host.library.all_totals():
                for action, name in ACTIONS.items():
                    expected[str(totals["port"]), action] += totals[name]
                # Lines of closed listeners are printed too.
                evicted = str(totals["port"]), "drop:q0_evicted"
                expected[evicted] = max(expected[evicted], found[evicted])
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
        for kind in KINDS:
            host.run(f"listen M zone 0 address * port 80 backlog 1 {kind}")
            host.play("syn M count 2", "ack M count 2", "data M", "accept M", "close M")
        memory.host = None
        host.advance(SECOND)
        return memory.count, Counter(printed(session)[1:])


@each_generation
def test_any_fault(generation: str) -> None:
    """If a load fails, no wrong line is printed, and no line is printed twice."""
    nothing_wrong(partial(with_faults, generation))
