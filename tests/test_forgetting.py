"""Listeners that were closed long ago are forgotten, and no others."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import socket
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest
from lab.waiting import eventually

from dtrace_exporter import service, sock_diag
from dtrace_exporter.collector import Collector
from dtrace_exporter.config import load
from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.limits import Limits
from dtrace_exporter.listeners import Identity, Listener, ListenerTable, SessionId
from dtrace_exporter.service import Service
from dtrace_exporter.sock_diag import Reading, SockDiagSource
from dtrace_exporter.state import State
from dtrace_exporter.tracing.audit import Audits
from dtrace_exporter.tracing.tally import Tally
from dtrace_exporter.watched import Watched, named
from linux_rows import ESTABLISHED, Q_FULL, address, counted, told

SESSION = SessionId("", "all")
CALLS = SessionId("", "calls")
READY = "ready 5 1"


class Host:
    """A Linux host with DTrace, which prints rows of all its listeners."""

    def __init__(self, ports: dict[int, str] | None = None) -> None:
        self.table = ListenerTable()
        self.table.watch(SESSION, Watched() if ports is None else named(ports))
        self.table.watch(CALLS, Watched(()))
        self.begin()

    def begin(self) -> None:
        """Start a new run of both sessions."""
        self.tally, self.calls = (
            Tally(self.table, SESSION),
            Tally(self.table, CALLS, sees_closes=True),
        )
        self.calls.feed(READY)
        self.feed(READY, "tick 1", "set 1")

    def feed(self, *lines: str) -> None:
        """Give lines to the first session."""
        for line in lines:
            self.tally.feed(line)

    def close(self, port: int, *, place: int = 1, time: int = 9) -> None:
        """Report that a socket has closed."""
        self.calls.feed(f"closed {address(port, place):x} {time}")

    def forget(self, before: float = math.inf) -> set[int]:
        """Forget the listeners that closed before a time, and return the ports that are left."""
        list(self.table.forget_closed(before))
        return {one.identity.port for one in self.table}


def test_closed_ones_only() -> None:
    """A listener is forgotten only if it has closed, and only after the given time."""
    host = Host()
    host.feed(told(80), told(81), counted(80, 5), counted(81, 5))
    before = monotonic()
    host.close(80)
    assert host.forget(before) == {80, 81}
    assert host.forget() == {81}


def test_one_that_comes_again() -> None:
    """A forgotten listener starts at 0 when it comes back; an earlier one goes on counting."""
    host = Host()
    host.feed(told(80), told(81), counted(80, 5), counted(81, 5))
    host.close(80)
    host.close(81)
    host.feed(told(81, generation=1, time=10))
    assert host.forget() == {81}
    host.feed(told(80, generation=1, time=10), counted(80, 2, generation=1))
    host.feed(counted(81, 2, generation=1))
    assert {one.identity.port: one.syns for one in host.table} == {80: 2, 81: 7}


def test_configured_ones() -> None:
    """A configured port of the host's own place is kept for ever, but not one of another place."""
    host = Host({80: "web"})
    host.feed(told(80), told(80, place=2, cookie=7), counted(80, 5))
    host.close(80)
    host.close(80, place=2)
    assert len([*host.table]) == 2
    host.forget()
    (left,) = host.table
    assert (left.identity.place, left.syns) == ("", 5)


def test_nobody_knows() -> None:
    """A listener that was open when its session ended may still be open, so it is kept."""
    host = Host()
    host.feed(told(80), told(81), counted(80, 5), counted(81, 5))
    host.close(81)
    host.table.clear_queues(SESSION)
    assert host.forget() == {80}
    host.begin()
    assert host.forget() == {80}
    host.feed(told(80, time=20), counted(80, 2))
    assert host.forget() == {80}
    (left,) = host.table
    assert left.syns == 7


def test_closed_while_nobody_looked() -> None:
    """A listener has closed if the kernel no longer has it, or reports another TCP state."""
    host = Host()
    host.feed(told(80), told(81))
    host.table.clear_queues(SESSION)
    host.begin()
    kept = Identity("", "", "*", 81)
    list(host.tally.seed({kept: [ListeningSocket("*", 81, 0, 8, 0, 5)]}, 30))
    assert host.forget() == {81}
    host.feed(told(82, state=7))
    assert host.forget() == {81}


def test_no_room_for_its_socket() -> None:
    """A listener whose open socket has no room in the table does not count as closed."""
    host = Host()
    host.feed(told(80))
    host.close(80)
    host.table.limit("", Limits(sockets=0))
    with pytest.raises(ValueError, match="sockets"):
        host.feed(told(80, generation=1, time=10))
    assert host.forget() == {80}


def test_small_steps() -> None:
    """Forgetting goes step by step over listeners, over a session's IDs and over sockets' drops."""
    host = Host()
    host.feed(*(told(port) for port in range(1, 501)))
    assert sum(1 for _ in host.table.forget_closed(0)) == 500
    assert sum(1 for _ in host.tally.forget()) == 500
    table, source = ListenerTable(), SockDiagSource()
    table.watch(SESSION, Watched(), sock_diag.CAPABILITIES)
    list(source.update(table, SESSION, reading(*map(at, range(500)))))
    assert sum(1 for _ in source.forget(table)) == 500


def test_nothing_is_missing() -> None:
    """The audit still counts the events of forgotten listeners, so nothing is missing."""
    host = Host()
    audits = Audits()
    looks = iter(range(1, 100))

    def missing() -> dict[str, int]:
        for _ in range(5):
            totals = {"drops": 4, "established": 3}
            work = audits.look(host.table, SESSION, {}, totals, next(looks))
            while True:
                try:
                    next(work)
                except StopIteration as end:
                    found: dict[str, int] = end.value
                    break
            if any(found.values()):
                break
        return found

    host.feed(told(80), counted(80, 4, Q_FULL, part=11), counted(80, 3, ESTABLISHED))
    assert missing() == {"drops": 0, "established": 0}
    host.close(80)
    assert host.forget() == set()
    assert missing() == {"drops": 0, "established": 0}


def listeners_in_memory() -> int:
    """Return the number of Listener objects in this process."""
    gc.collect()
    return sum(isinstance(one, Listener) for one in gc.get_objects())


def samples(collector: Collector) -> int:
    """Return the number of samples in a scrape."""
    return sum(len(family.samples) for family in collector.collect())


def test_memory_of_a_session() -> None:
    """Of 6,000 short-lived listeners nothing stays in the table, the scrape or the session."""
    host = Host()
    collector = Collector(State(table=host.table))
    host.feed(told(80))
    first, begun = samples(collector), listeners_in_memory()
    for port in range(1000, 7000):
        host.feed(told(port))
    assert samples(collector) > 6000
    for port in range(1000, 7000):
        host.close(port)
    assert host.forget() == {80}
    list(host.tally.forget())
    assert samples(collector) == first
    assert listeners_in_memory() == begun


def at(port: int, drops: int = 1) -> ListeningSocket:
    """Return a made-up socket whose number is its port."""
    return ListeningSocket("*", port, 0, 8, drops, port)


def reading(*sockets: ListeningSocket) -> list[Reading]:
    """Return a reading of sock_diag with these sockets."""
    return [Reading([*sockets], Counter())]


def test_memory_of_sock_diag() -> None:
    """Of 6,000 short-lived listeners nothing stays in the table, the scrape or the source."""
    table, source = ListenerTable(), SockDiagSource()
    table.watch(SESSION, Watched(), sock_diag.CAPABILITIES)
    collector = Collector(State(table=table))

    def read(*sockets: ListeningSocket) -> None:
        list(source.update(table, SESSION, reading(*sockets)))

    read(at(80))
    first, begun = samples(collector), listeners_in_memory()
    for start in range(1000, 7000, 100):
        read(at(80), *map(at, range(start, start + 100)))
    read(at(80, 3))
    assert samples(collector) > 6000
    list(table.forget_closed(math.inf))
    list(source.forget(table))
    assert samples(collector) == first
    assert listeners_in_memory() == begun
    assert [*source._counted] == [("", None, 80)]
    read(at(80, 4), at(1000, 2)._replace(socket=100_000))
    assert {one.identity.port: one.drops["unknown"] for one in table} == {80: 4, 1000: 2}


def test_open_ones_of_sock_diag() -> None:
    """A listener that the kernel reports counts as open, however often it was absent before."""
    table, source = ListenerTable(), SockDiagSource()
    table.watch(SESSION, Watched(), sock_diag.CAPABILITIES)
    for most in (1, 0):
        # Its socket may exceed the limit; the listener is open anyway.
        table.limit("", Limits(sockets=1))
        for sockets in ([at(80)], []):
            list(source.update(table, SESSION, reading(*sockets)))
        table.limit("", Limits(sockets=most))
        list(source.update(table, SESSION, reading(at(80))))
        list(table.forget_closed(math.inf))
        assert {one.identity.port for one in table} == {80}


@pytest.mark.skipif(sys.platform != "linux", reason="sock_diag is an interface of Linux")
async def test_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service forgets listeners by itself, after the time in its newest configuration."""
    monkeypatch.setattr(service, "_FORGET_SECONDS", 0.01)
    file = tmp_path / "c.yml"
    file.write_text(json.dumps({"source": "sock_diag"}), encoding="utf-8")
    one = Service(file, load(file))
    await one.start()

    def known(ports: Iterable[int]) -> bool:
        return {found.identity.port for found in one.state.table} >= set(ports)

    with socket.create_server(("127.0.0.1", 0)) as kept:
        with socket.create_server(("127.0.0.1", 0)) as server:
            ports = [each.getsockname()[1] for each in (kept, server)]
            await one.state.refresh()
            assert known(ports)
        await one.state.refresh()
        await asyncio.sleep(0.05)
        assert known(ports)
        # Shorter than a file may configure, so that the test need not wait.
        one._config = replace(one._config, forget_closed_after=0.0)
        await eventually(lambda: not known(ports[1:]))
        assert known(ports[:1])
        counted = one.this_host._sock_diag._counted
        get = one.state.table.get
        await eventually(lambda: all(get(who.identity) is who for who, *_ in [*counted.values()]))
    await one.stop()
