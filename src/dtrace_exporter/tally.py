"""From the records of one run of a session to the listener table."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from dtrace_exporter.accounts import Accounts
from dtrace_exporter.inet_diag import Sample
from dtrace_exporter.listeners import Identity, Listener, ListenerTable, SessionId, syn_bucket
from dtrace_exporter.rows import (
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
_FORGET_TICKS = 30
"""So many ticks after a listener was told under another ID, no row has the old one any more."""


class _Who(NamedTuple):
    """Whose an ID is; no listener where nobody asked for its port."""

    socket: int
    listener: Listener | None
    qmax: int
    told: bool


class Tally:
    """What one run of a session tells.

    ``home`` is the place of the host itself, as the program names it; ``ticks`` is the number of
    heartbeats.

    Args:
        table: where the listeners are.
        session: whose run it is; the table has to have a watch of it.
    """

    def __init__(self, table: ListenerTable, session: SessionId) -> None:
        self._table = table
        self._session = session
        self._sockets = table.sockets(session.host)
        self._reader = Reader()
        self._accounts = Accounts(self._sockets)
        self.home = ""
        self._listeners: dict[int, _Who] = {}
        self._waiting: dict[int, list[Counts]] = {}
        self._newest: dict[int, int] = {}
        self._old: deque[tuple[int, int]] = deque()
        self.ticks = 0
        self.wrong: list[str] = []
        """What accounts have come to that cannot be, until somebody takes it away."""

    def feed(self, line: str) -> Ready | Tick | None:
        """Take a line; return it if the session has to know.

        Raises:
            RowError: it is no row.
        """
        record = self._reader.read(line)
        match record:
            case Ready():
                self.home = record.home
                return record
            case Tick():
                self._tick(record)
                return record
            case Listening():
                self._listening(record)
            case Queue():
                if record.id in self._listeners:
                    socket = self._listeners[record.id].socket
                    self._sockets.saw(socket, record.time, record.q0, record.q, record.qmax)
            case Limit():
                self._sockets.limit(record.socket, record.time, record.qmax)
            case Closed():
                self._close(record.socket, record.time)
            case None:
                return None
            case _:
                self._count(record)
        return None

    def _close(self, socket: int, time: int) -> None:
        if (newest := self._newest.pop(socket, None)) is not None:
            self._old.append((self.ticks, newest))
        self._accounts.close(socket, time)
        self._sockets.closed(socket, time)

    def lose(self) -> None:
        """Note that the kernel has lost rows or counts of this run."""
        self._accounts.lose()

    def know(self, found: Mapping[Identity, list[Sample]], time: int) -> None:
        """Take what the kernel tells, at a time, of the listeners of the host's own place.

        The kernel's address of a socket is not in it, so it is taken where a listener has only one;
        and where none has been seen yet, under a number that no address can be.

        Args:
            found: what inet_diag.listeners() gives, by listener; all that the session watches.
            time: in nanoseconds of the monotonic clock, before they were read.
        """
        home = self._table.home(self._session)
        for identity, those in found.items():
            listener = self._table.listener(self._session, *identity[1:])
            if not listener.sockets:
                for sample in those:
                    self._sockets.listening(-sample.socket, time, listener)
                    self._sockets.saw(-sample.socket, time, q=sample.q, qmax=sample.qmax)
            elif len(listener.sockets) == len(those) == 1:
                (socket,) = listener.sockets
                self._sockets.saw(socket, time, q=those[0].q, qmax=those[0].qmax)
        for listener in self._table.seen(self._session):
            # One that is not among them had closed before they were read.
            if listener.identity.place == home and listener.identity not in found:
                for socket in [*listener.sockets]:
                    self._sockets.closed(socket, time)

    def _tick(self, tick: Tick) -> None:
        self.ticks += 1
        while self._old and self._old[0][0] < self.ticks - _FORGET_TICKS:
            _, old = self._old.popleft()
            # Its number may have come round, and be in use again.
            who = self._listeners.get(old)
            if who is not None and self._newest.get(who.socket) != old:
                del self._listeners[old]
        counted = self._table.session_exports(self._session)
        q = counted.established and counted.departures
        self.wrong += self._accounts.settle(tick.time, q and counted.opened, q)

    def _listening(self, record: Listening) -> None:
        if record.told and self._newest.get(record.socket) in self._listeners:
            self._old.append((self.ticks, self._newest[record.socket]))
        self._newest[record.socket] = record.id
        if not self._table.watches(self._session, record.port):
            self._listeners[record.id] = _Who(record.socket, None, record.qmax, record.told)
            self._waiting.pop(record.id, None)
            return
        home = record.place in (self.home, "")
        place = self._table.home(self._session) if home else record.place
        self._table.live(self._session.host, place, record.cookie)
        listener = self._table.listener(self._session, place, record.address, record.port)
        self._listeners[record.id] = _Who(record.socket, listener, record.qmax, record.told)
        if record.told:
            self._sockets.listening(record.socket, record.time, listener)
            self._accounts.tell(record, listener)
            if record.syn:
                self._count(Found(record.id, record.q, 1))
            if not record.open:
                self._close(record.socket, record.time)
        for each in self._waiting.pop(record.id, ()):
            self._count(each)
        if record.open and not record.told:
            for number in [number for number in listener.sockets if number < 0]:
                self._sockets.closed(number, record.time)
            self._sockets.listening(record.socket, record.time, listener)
            self._sockets.saw(record.socket, record.time, record.q0, record.q, record.qmax)

    def _count(self, record: Counts) -> None:
        who = self._listeners.get(record.id)
        if who is None:
            if len(self._waiting) >= _MOST_WAITING and record.id not in self._waiting:
                raise RowError(f"no row has told who {_MOST_WAITING} listeners are")
            self._waiting.setdefault(record.id, []).append(record)
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
