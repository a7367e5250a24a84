"""The senders programs count each SYN once, whoever sends it, with a bounded number of rows."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings

from dtrace_exporter.senders import OTHERS, Senders
from dtrace_exporter.trace import csv
from dtrace_exporter.tracing import program, rendering
from sun.engine import Session
from sun.events import Script, fixed_profile, scripts
from sun.faulty import Faulty
from sun.library import BUILDS, GENERATIONS, SOLARIS, why_not
from sun.watching import SECOND, Host, text

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

each_generation = pytest.mark.parametrize("generation", GENERATIONS)
each_that_drops = pytest.mark.parametrize("generation", SOLARIS)
"""FreeBSD drops no SYNs."""
SLOTS = 1024
Counted = Counter[tuple[str, str]]
"""Counts by sender and reason of a drop; the reason is empty for a SYN."""


def started(host: Host, port: int = 0, networks: int = 0, without: tuple[str, ...] = ()) -> Session:
    """Start the program that counts by sender."""
    found = program.load_senders(BUILDS[host.generation].family)
    window = rendering.window(1.0)
    return host.engine.start(rendering.render(found, window, port, {"NETS": networks}, without))


def counted(session: Session, *, networks: bool = False) -> Counted:
    """End a session, and return all of its counts."""
    session.stop()
    assert session.errors == []
    read = Senders(networks=networks)
    for line in session.output.splitlines():
        read.read(line)
    assert read.bad_rows == 0
    return Counter(
        {
            (sender, reason): count
            for sender, counts in read.totals.items()
            for reason, count in counts.items()
        }
    )


def traced(session: Session) -> Counted:
    """End a session of the trace program; return the SYNs and drops by sender."""
    session.stop()
    found: Counted = Counter()
    for line in session.output.splitlines()[1:]:
        if not line:
            continue
        _, _, action, sender, *_ = csv(line).split(",")
        if action in ("syn", "drop:q_full", "drop:q0_full"):
            found[sender, action.partition(":")[2]] += 1
    return found


@each_generation
def test_any_script(generation: str) -> None:
    """In any script, each sender has as many SYNs and drops as the trace program prints."""

    @settings(fixed_profile, max_examples=40)
    @given(scripts(generation))
    def run(script: Script) -> None:
        with Host(generation, seed=script.seed) as host:
            counting = started(host)
            printing = host.engine.start(text(generation, trace=True))
            host.play_script(script)
            host.advance(SECOND)
            assert counted(counting) == traced(printing)

    run()


@each_generation
def test_networks(generation: str) -> None:
    """By network, senders in the same /24 or /48 are one, and others are separate."""
    senders = ["192.0.2.1", "192.0.2.255", "192.0.3.1", "2001:db8:1:2::3", "2001:db8:1::", "::2"]
    with Host(generation) as host:
        session = started(host, networks=1)
        host.run("listen L zone 0 address * port 22 backlog 9")
        host.run(*(f"syn L from {sender} port 7" for sender in senders))
        host.advance(SECOND)
        assert counted(session, networks=True) == {
            ("192.0.2.0/24", ""): 2,
            ("192.0.3.0/24", ""): 1,
            ("2001:db8:1::/48", ""): 2,
            ("::/48", ""): 1,
        }


@each_generation
def test_port(generation: str) -> None:
    """A session of one port counts only the SYNs of that port."""
    with Host(generation) as host:
        session = started(host, 81)
        host.run("listen L zone 0 address * port 22 backlog 1")
        host.run("listen M zone 0 address * port 81 backlog 1")
        host.run("syn L from 192.0.2.1 port 7", "syn M from 192.0.2.2 port 7")
        host.advance(SECOND)
        assert counted(session) == {("192.0.2.2", ""): 1}


@each_generation
def test_more_than_have_room(generation: str) -> None:
    """Each SYN of a flood is counted once, for its sender or for others."""
    many = [f"syn L from 198.18.{at // 250}.{at % 250} port 7" for at in range(3000)]
    with Host(generation) as host:
        session = started(host)
        host.play("q0max 0 2", "listen L zone 0 address * port 22 backlog 1")
        host.play(*many)
        host.advance(3 * SECOND)
        host.play("syn L from 192.0.2.1 port 7 count 5")
        host.advance(SECOND)
        found = counted(session)
        drops = host.library.totals("L")
    syns = {sender: count for (sender, reason), count in found.items() if not reason}
    assert sum(syns.values()) == 3005
    assert syns[OTHERS] > 0
    # A slot is free again after a second.
    assert syns["192.0.2.1"] == 5
    seconds = host.engine.time // SECOND
    assert len(syns) <= SLOTS * seconds
    lost = sum(count for (_, reason), count in found.items() if reason == "q0_full")
    assert lost == drops.get("q0_full", 0)


@each_that_drops
def test_without_drops(generation: str) -> None:
    """If the kernel does not report drops, SYNs are still counted."""
    with Host(generation) as host:
        session = started(host, without=("syn_drops",))
        host.run("q0max 0 0", "listen L zone 0 address * port 22 backlog 1")
        host.run("syn L from 192.0.2.1 port 7", "syn L from 192.0.2.1 port 8")
        host.advance(SECOND)
        assert counted(session) == {("192.0.2.1", ""): 2}


@each_generation
def test_any_fault(generation: str) -> None:
    """If a load fails, nothing is counted that did not happen, and nothing for a wrong sender."""

    def run(failing: frozenset[int]) -> tuple[int, Counted]:
        memory = Faulty()
        with Host(generation, load=memory) as host:
            session = started(host)
            memory.host, memory.failing = host, failing
            host.play("q0max 0 2", "listen L zone 0 address * port 22 backlog 1")
            for sender in ("192.0.2.1", "2001:db8::1", "192.0.2.2", "192.0.2.1", "2001:db8::2"):
                host.run(f"syn L from {sender} port 7")
            memory.host = None
            host.advance(SECOND)
            session.stop()
            read = Senders()
            for line in session.output.splitlines():
                read.read(line)
        found: Counted = Counter()
        for sender, counts in read.totals.items():
            found.update({(sender, reason): count for reason, count in counts.items()})
        return memory.count, found

    loads, whole = run(frozenset())
    assert sum(whole.values()) >= 5
    for at in range(1, loads + 1):
        _, left = run(frozenset([at]))
        assert not left - whole, at
