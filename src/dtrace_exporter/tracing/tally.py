"""From the records of one run of a session to the listener table."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Generator, Iterator, Mapping
from typing import Any, NamedTuple

from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.limits import LimitError
from dtrace_exporter.listeners import Identity, Listener, ListenerTable, SessionId, syn_bucket
from dtrace_exporter.tracing.accounts import Accounts
from dtrace_exporter.tracing.rows import (
    Accepts,
    Closed,
    Counts,
    Drops,
    Established,
    Found,
    Left,
    Limit,
    Listening,
    Opened,
    Queue,
    Reader,
    Ready,
    RowError,
    Syns,
    Tick,
)

_MOST_WAITING = 10_000
_FORGET_TICKS = 60
"""So many ticks after a listener was told under another ID, no row has the old one any more."""
_PATIENCE_TICKS = 600
"""A listener of which there are rows is told within so many ticks, or its own row has been lost."""


class _Who(NamedTuple):
    """Whose an ID is; no listener where nobody asked for its port."""

    socket: int
    listener: Listener | None
    qmax: int
    told: bool


class Tally:
    """What one run of a session tells.

    ``own_place`` is the place of the host itself, as the program names it; ``ticks`` is the number
    of heartbeats.

    Args:
        table: where the listeners are.
        session: whose run it is; the table has to have a watch of it.
    """

    def __init__(self, table: ListenerTable, session: SessionId) -> None:
        self._table = table
        self._session = session
        self._most = table.limits(session.host).rows
        self._sockets = table.sockets(session.host)
        self._reader = Reader(self._most)
        self._accounts = Accounts(self._sockets, self._most)
        self.own_place = ""
        # By ID: in the order in which they were last told; and in that of the first row of each.
        self._listeners = OrderedDict[int, _Who]()
        # By socket; however long ago it was told, the next event may be counted under it.
        self._newest: dict[int, int] = {}
        self._old = deque[tuple[int, int]]()
        self._waiting = OrderedDict[int, tuple[int, list[Counts]]]()
        self._waiting_rows = 0
        self.ticks = 0

    def feed(self, line: str) -> Ready | Tick | None:
        """Take a line; return it if the session has to know. Behind a Tick comes settle().

        Raises:
            RowError: it is no row.
            LimitError: there is no room for what it tells.
        """
        record = self._reader.read(line)
        match record:
            case Ready():
                if self.own_place:
                    raise RowError("ready once more")
                self.own_place = record.own_place
                return record
            case Tick():
                self.ticks += 1
                return record
            case Listening():
                self._listening(record)
            case Queue():
                if record.id in self._listeners:
                    socket = self._listeners[record.id].socket
                    self._sockets.saw(socket, record.time, record.q0, record.q, record.qmax)
            case Limit():
                self._sockets.saw(record.socket, record.time, qmax=record.qmax)
            case Closed():
                self._close(record.socket, record.time)
            case None:
                return None
            case _:
                self._count(record)
        return None

    def settle(self, tick: Tick) -> Iterator[str]:
        """Do what a heartbeat is the time for, in many small steps.

        Yields:
            What has come to light that cannot be; an empty text at most steps.
        """
        while self._old and self._old[0][0] + _FORGET_TICKS < self.ticks:
            self._forget_old()
            yield ""
        while self._waiting:
            id_, (began, _) = next(iter(self._waiting.items()))
            if began + _PATIENCE_TICKS >= self.ticks:
                break
            lost = self._awaited(id_)
            yield f"no row has told who {id_:x} is, which has {len(lost)} rows of counts"
        counted = self._table.session_capabilities(self._session)
        q = counted.established and counted.departures
        yield from self._accounts.settle(tick.time, q and counted.opened, q)

    def drain(self) -> Generator[None, None, None]:
        """Let go of everything when the run is over: of so much at once takes a tenth of a second.

        Yields:
            After each piece.
        """
        whole: list[dict[Any, Any]] = [self._listeners, self._waiting, self._newest]
        whole += [*self._reader.held, self._accounts.held]
        for held in whole:
            while held:
                held.popitem()
                yield
        while self._old:
            self._old.pop()
            yield

    def _forget_old(self) -> None:
        _, old = self._old.popleft()
        # Its number may have come round, and be in use again.
        if old in self._listeners and self._newest.get(self._listeners[old].socket) != old:
            del self._listeners[old]

    def _replace(self, socket: int) -> None:
        """Note that no event is counted any more under a socket's newest ID."""
        if (newest := self._newest.pop(socket, None)) is not None:
            self._old.append((self.ticks, newest))
            if len(self._old) > self._most:
                self._forget_old()

    def _close(self, socket: int, time: int) -> None:
        self._replace(socket)
        self._accounts.close(socket, time)
        self._sockets.closed(socket, time)

    def lose(self) -> None:
        """Note that the kernel has lost rows or counts of this run."""
        self._accounts.lose()

    def seed(
        self, found: Mapping[Identity, list[ListeningSocket]], time: int
    ) -> Generator[None, None, set[str]]:
        """Take what the kernel tells, at a time, of the listeners of the host's own place.

        The kernel's address of a socket is not in it, so it is taken where a listener has only one;
        and where none has been seen yet, under a number that no address can be.

        Args:
            found: what inet_diag.listeners() gives, by listener.
            time: in nanoseconds of the monotonic clock, before they were read.

        Yields:
            Before each listener. It ends at once where the session has ended meanwhile.

        Returns:
            The limits that left no room for some of them.
        """
        own_place = self._table.own_place(self._session)
        refused = set[str]()
        for identity, those in found.items():
            yield
            if not self._table.is_watched(self._session):
                return refused
            if not self._table.watches(self._session, identity.port):
                continue
            try:
                listener = self._table.listener(self._session, *identity[1:])
                self._seed(listener, those, time)
            except LimitError as error:
                refused.add(error.limit)
        for listener in self._table.seen(self._session):
            # One that is not among them had closed before they were read.
            if listener.identity.place == own_place and listener.identity not in found:
                for socket in [*listener.sockets]:
                    self._sockets.closed(socket, time)
            yield
        return refused

    def _seed(self, listener: Listener, samples: list[ListeningSocket], time: int) -> None:
        if not listener.sockets:
            for sample in samples:
                self._sockets.listening(-sample.socket, time, listener)
                self._sockets.saw(-sample.socket, time, q=sample.q, qmax=sample.qmax)
        elif len(listener.sockets) == len(samples) == 1:
            (socket,) = listener.sockets
            self._sockets.saw(socket, time, q=samples[0].q, qmax=samples[0].qmax)

    def _listening(self, record: Listening) -> None:
        waiting = self._awaited(record.id)
        self._listeners.pop(record.id, None)
        if len(self._listeners) >= self._most:
            first, gone = self._listeners.popitem(last=False)
            if self._newest.get(gone.socket) == first:
                del self._newest[gone.socket]
        if record.told and self._newest.get(record.socket) != record.id:
            self._replace(record.socket)
        self._newest[record.socket] = record.id
        # Nobody's where nobody asked for its port, or there is no room for it.
        who = _Who(record.socket, None, record.qmax, record.told)
        self._listeners[record.id] = who
        if not self._table.watches(self._session, record.port):
            return
        is_own = record.place in (self.own_place, "")
        place = self._table.own_place(self._session) if is_own else record.place
        listener = self._table.listener(
            self._session, place, record.address, record.port, record.cookie
        )
        self._listeners[record.id] = who._replace(listener=listener)
        try:
            self._see(record, listener)
        finally:
            if record.syn:
                self._count(Found(record.id, record.q, 1))
            for each in waiting:
                self._count(each)
            if record.told and not record.open:
                self._close(record.socket, record.time)

    def _see(self, record: Listening, listener: Listener) -> None:
        if record.told:
            if self._sockets.listening(record.socket, record.time, listener):
                self._accounts.tell(record, listener)
        elif record.open:
            # Those that seed() has found are the first ones.
            while (number := next(iter(listener.sockets), 0)) < 0:
                self._sockets.forget(number)
            self._sockets.listening(record.socket, record.time, listener)
            self._sockets.saw(record.socket, record.time, record.q0, record.q, record.qmax)

    def _awaited(self, id: int) -> list[Counts]:  # noqa: A002
        """Take what waits until an ID is told."""
        _, rows = self._waiting.pop(id, (0, []))
        self._waiting_rows -= len(rows)
        return rows

    def _count(self, record: Counts) -> None:
        who = self._listeners.get(record.id)
        if who is None:
            if self._waiting_rows >= _MOST_WAITING:
                raise RowError(f"no row has told whose {_MOST_WAITING} rows of counts are")
            self._waiting.setdefault(record.id, (self.ticks, []))[1].append(record)
            self._waiting_rows += 1
            return
        listener = who.listener
        if listener is None:
            return
        match record:
            case Syns():
                listener.count_syns(record.bucket, record.qmax, record.events, record.total)
                listener.drop(record.reason, record.events)
            case Found():
                bucket = syn_bucket(record.q, who.qmax)
                listener.count_syns(bucket, who.qmax, record.events, record.q * record.events)
            case Drops():
                listener.drop(record.reason, record.events)
            case Opened():
                self._accounts.move(who.socket, record.id, record.events, 0)
            case Established():
                listener.established += record.events
                if who.told:
                    self._accounts.move(who.socket, record.id, -record.events, record.events)
            case Accepts():
                listener.count_accepts(record.bucket, record.events, record.nanoseconds)
                if who.told:
                    self._accounts.move(who.socket, record.id, 0, -record.events)
            case Left():
                q0, q = (record.events, 0) if record.half_open else (0, record.events)
                self._accounts.move(who.socket, record.id, -q0, -q)
