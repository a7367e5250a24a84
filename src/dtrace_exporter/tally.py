"""From the records of one run of a session to the listener table."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping
from typing import Any, NamedTuple

from dtrace_exporter.accounts import Accounts
from dtrace_exporter.inet_diag import Sample
from dtrace_exporter.limits import LimitError
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
_FORGET_TICKS = 60
"""So many ticks after Sun's engine told a listener's ID, no row has it any more."""
_PATIENCE_TICKS = 600
"""A listener of which there are rows is told within so many ticks, or its own row has been lost."""


class _Who(NamedTuple):
    """Whose an ID is; no listener where nobody asked for its port."""

    socket: int
    listener: Listener | None
    qmax: int
    told: bool
    tick: int


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
        self._most = table.limits(session.host).rows
        self._sockets = table.sockets(session.host)
        self._reader = Reader(self._most)
        self._accounts = Accounts(self._sockets, self._most)
        self.home = ""
        # By ID: in the order in which they were last told; and in that of the first row of each.
        self._listeners = OrderedDict[int, _Who]()
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
                if self.home:
                    raise RowError("ready once more")
                self.home = record.home
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
        while self._listeners:
            id_, who = next(iter(self._listeners.items()))
            if not who.told or who.tick + _FORGET_TICKS >= self.ticks:
                break
            del self._listeners[id_]
            yield ""
        while self._waiting:
            id_, (began, _) = next(iter(self._waiting.items()))
            if began + _PATIENCE_TICKS >= self.ticks:
                break
            lost = self._awaited(id_)
            yield f"no row has told who {id_:x} is, which has {len(lost)} rows of counts"
        counted = self._table.session_exports(self._session)
        q = counted.established and counted.departures
        yield from self._accounts.settle(tick.time, q and counted.opened, q)

    def drain(self) -> Generator[None, None, None]:
        """Let go of everything when the run is over: of so much at once takes a tenth of a second.

        Yields:
            After each piece.
        """
        whole: list[dict[Any, Any]] = [self._listeners, self._waiting]
        whole += [*self._reader.held, self._accounts.held]
        for held in whole:
            while held:
                held.popitem()
                yield

    def _close(self, socket: int, time: int) -> None:
        self._accounts.close(socket, time)
        self._sockets.closed(socket, time)

    def lose(self) -> None:
        """Note that the kernel has lost rows or counts of this run."""
        self._accounts.lose()

    def know(
        self, found: Mapping[Identity, list[Sample]], time: int
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
        home = self._table.home(self._session)
        refused = set[str]()
        for identity, those in found.items():
            yield
            if not self._table.is_watched(self._session):
                return refused
            if not self._table.watches(self._session, identity.port):
                continue
            try:
                listener = self._table.listener(self._session, *identity[1:])
                self._know(listener, those, time)
            except LimitError as error:
                refused.add(error.limit)
        for listener in self._table.seen(self._session):
            # One that is not among them had closed before they were read.
            if listener.identity.place == home and listener.identity not in found:
                for socket in [*listener.sockets]:
                    self._sockets.closed(socket, time)
            yield
        return refused

    def _know(self, listener: Listener, samples: list[Sample], time: int) -> None:
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
            self._listeners.popitem(last=False)
        # Nobody's where nobody asked for its port, or there is no room for it.
        who = _Who(record.socket, None, record.qmax, record.told, self.ticks)
        self._listeners[record.id] = who
        if not self._table.watches(self._session, record.port):
            return
        home = record.place in (self.home, "")
        place = self._table.home(self._session) if home else record.place
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
            # Those that know() has found are the first ones.
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
