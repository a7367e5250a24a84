"""Adds the records of one run of a session to the listener table."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Generator, Iterator, Mapping
from time import monotonic
from typing import Any, NamedTuple

from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.limits import LimitError
from dtrace_exporter.listeners import Identity, Listener, ListenerTable, SessionId, syn_bucket
from dtrace_exporter.sockets import MORE_THAN
from dtrace_exporter.tracing.accounts import Accounts
from dtrace_exporter.tracing.rows import (
    Accepted,
    Accepts,
    Closed,
    Counts,
    Drops,
    Established,
    Evicted,
    Found,
    Left,
    Limit,
    Listening,
    Opened,
    Queue,
    Reader,
    Ready,
    Refused,
    Resent,
    RowError,
    Syns,
    Tick,
    Unattributed,
    UnixRefused,
)
from dtrace_exporter.unix_diag import written

_MOST_WAITING = 10_000
_FORGET_TICKS = 60
"""The number of ticks after which no row has the old ID of a listener with a new one."""
_PATIENCE_TICKS = 600
"""The number of ticks after which the missing row of a listener is lost."""


class _Who(NamedTuple):
    """The listener of an ID, None if it is not watched."""

    socket: int
    listener: Listener | None
    qmax: int
    told: bool


class Tally:
    """Counts what one run of a session prints.

    Args:
        table: the table of listeners. It must have a watch of the session.
        session: the session that runs.
        sees_closes: whether only this session sees the host's listeners close.

    Attributes:
        own_place: the place of the host itself, as the program names it.
        ticks: the number of heartbeats.
    """

    def __init__(
        self, table: ListenerTable, session: SessionId, *, sees_closes: bool = False
    ) -> None:
        self._table = table
        self._session = session
        self._sees_closes = sees_closes
        self._most = table.limits(session.host).rows
        self._sockets = table.sockets(session.host)
        self._reader = Reader(self._most)
        self._accounts = Accounts(self._sockets, self._most)
        self.own_place = ""
        # By ID: the listeners, ordered by their last row; and the rows that wait, by the first one.
        self._listeners = OrderedDict[int, _Who]()
        # The newest ID of each socket. It never expires: the next event may be counted under it.
        self._newest: dict[int, int] = {}
        self._old = deque[tuple[int, int]]()
        self._waiting = OrderedDict[int, tuple[int, list[Counts]]]()
        self._waiting_rows = 0
        self.ticks = 0
        self._sees_listens = False
        # After so many ticks, every close is certain to be seen; for a session that sees closes.
        self._blind_ticks = 1 if sees_closes else 0

    def feed(self, line: str) -> Ready | Tick | Unattributed | None:
        """Read a line and count it.

        Returns:
            The record, if it is one that the session has to know. After a Tick, call settle().

        Raises:
            RowError: the line is not a row.
            LimitError: the row would exceed a limit, so it is refused.
        """
        record = self._reader.read(line)
        match record:
            case Ready():
                if self.own_place:
                    raise RowError("a second ready row")
                self.own_place = record.own_place
                return record
            case Tick():
                self.ticks += 1
                if self._blind_ticks:
                    self._blind_ticks -= 1
                    if not self._blind_ticks:
                        self._sockets.since = record.time
                return record
            case Listening():
                self._listening(record)
            case Queue():
                if record.id in self._listeners:
                    socket = self._listeners[record.id].socket
                    self._sockets.saw(socket, record.time, record.q0, record.q, record.qmax)
            case Limit():
                self._sees_listens = True
                if not self._accounts.is_sure(record.time):
                    record = record._replace(requested=None)
                self._sockets.listened(*record)
            case Refused():
                self._table.refuse(self._session.host, record.port, record.events)
            case UnixRefused():
                # Another host's namespaces may have the cookies of this one's.
                if record.events and not self._session.host:
                    self._table.unix_drops.count(record.cookie, written(record.name), record.events)
            case Unattributed():
                return record
            case Closed():
                self._close(record.socket, record.time)
            case Accepted():
                self._sockets.accepted(*record)
            case Evicted():
                listener = self._listener(record.place, record.address, record.port)
                if listener is not None:
                    listener.drop("q0_evicted", record.events)
            case None:
                return None
            case _:
                self._count(record)
        return None

    def settle(self, tick: Tick) -> Iterator[str]:
        """Do the work of a heartbeat, in many small steps.

        Yields:
            After each step an error that was found, usually an empty string.
        """
        while self._old and self._old[0][0] + _FORGET_TICKS < self.ticks:
            self._forget_old()
            yield ""
        while self._waiting:
            id_, (began, _) = next(iter(self._waiting.items()))
            if began + _PATIENCE_TICKS >= self.ticks:
                break
            lost = self._awaited(id_)
            yield f"the row of listener {id_:x} is missing, which has {len(lost)} rows of counts"
        counted = self._table.session_capabilities(self._session)
        q = counted.established and counted.departures
        yield from self._accounts.settle(tick.time, q and counted.opened, q)

    def drain(self) -> Generator[None, None, None]:
        """Free the memory after the run piece by piece; all at once takes a tenth of a second.

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
        # The number of the ID may have wrapped, and be in use again.
        if old in self._listeners and self._newest.get(self._listeners[old].socket) != old:
            del self._listeners[old]

    def _replace(self, socket: int) -> None:
        """Record that no more events are counted under a socket's newest ID."""
        if (newest := self._newest.pop(socket, None)) is not None:
            self._old.append((self.ticks, newest))
            if len(self._old) > self._most:
                self._forget_old()

    def _close(self, socket: int, time: int) -> None:
        self._replace(socket)
        self._accounts.close(socket, time)
        self._sockets.closed(socket, time)

    def forget(self) -> Generator[None, None, None]:
        """Drop the references to listeners that the table has forgotten.

        Yields:
            Before each ID.
        """
        for id_, who in [*self._listeners.items()]:
            yield
            listener = who.listener
            if (
                listener is not None
                and self._table.get(listener.identity) is not listener
                and self._listeners.get(id_) is who
            ):
                self._listeners[id_] = who._replace(listener=None)

    def forget_listens(self) -> None:
        """Forget the requested backlogs, if this run tells them: listen() may be called unseen."""
        if self._sees_listens:
            self._sockets.forget_listens()

    def lose(self) -> None:
        """Record that the kernel has lost rows or counts of this run."""
        if self._sees_closes:
            # The next heartbeat may have been printed before what was lost.
            self._blind_ticks = 2
            # First, because then nothing is left for the next lines to forget socket by socket.
            self._table.lose_sight(self._session.host)
        self._accounts.lose()
        self.forget_listens()

    def seed(
        self, found: Mapping[Identity, list[ListeningSocket]], time: int
    ) -> Generator[None, None, set[str]]:
        """Take over the kernel's own list of the listeners of the host's own place.

        This list does not have the kernel's addresses of the sockets. So a socket of it is matched
        only if its listener has one socket. If no socket of the listener has been seen yet, the
        fullest is added under a negative number, which is not an address; any user can have very
        many sockets of a listener, and the others are in no metric.

        Args:
            found: the sockets that inet_diag.listeners() returns, by listener.
            time: a time before they were read, in nanoseconds of the monotonic clock.

        Yields:
            Before or after each socket. It ends at once if the session has ended meanwhile.

        Returns:
            The limits because of which some of them were refused.
        """
        own_place = self._table.own_place(self._session)
        refused = set[str]()
        for identity, those in found.items():
            fullest = those[0]
            for one in those:
                yield
                fullest = max(fullest, one, key=_fullness)
            if not self._table.is_watched(self._session):
                return refused
            if not self._table.watches(self._session, *identity[1:]):
                continue
            try:
                listener = self._table.listener(self._session, *identity[1:])
                self._seed(listener, fullest, len(those), time)
            except LimitError as error:
                refused.add(error.limit)
        for listener in self._table.seen(self._session):
            # A listener that is missing had closed before they were read.
            if listener.identity.place == own_place and listener.identity not in found:
                for socket in [*listener.sockets]:
                    self._sockets.closed(socket, time)
                    yield
                if not listener.sockets:
                    self._note_closed(listener)
            yield
        return refused

    def _seed(self, listener: Listener, one: ListeningSocket, number: int, time: int) -> None:
        # What was read before its sockets were seen to close may be of these.
        if listener.closed is not None and time <= listener.closed * 1e9:
            return
        if not listener.sockets:
            self._sockets.listening(-one.socket, time, listener)
            self._sockets.saw(-one.socket, time, q=one.q, qmax=one.qmax)
        elif len(listener.sockets) == number == 1:
            (socket,) = listener.sockets
            self._sockets.saw(socket, time, q=one.q, qmax=one.qmax)

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
        # It has no listener if it is not watched, or if a limit is reached.
        who = _Who(record.socket, None, record.qmax, record.told)
        self._listeners[record.id] = who
        listener = self._listener(record.place, record.address, record.port, record.cookie)
        if listener is None:
            return
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

    def _listener(
        self, place: str, address: str, port: int, cookie: int | None = None
    ) -> Listener | None:
        """Return a listener by the name of its place in rows; None if it is not watched.

        Raises:
            LimitError: a limit is reached.
        """
        if place in (self.own_place, ""):
            place = self._table.own_place(self._session)
        if not self._table.watches(self._session, place, address, port):
            return None
        return self._table.listener(self._session, place, address, port, cookie)

    def _see(self, record: Listening, listener: Listener) -> None:
        if record.told:
            if self._sockets.listening(record.socket, record.time, listener):
                self._accounts.tell(record, listener)
        elif record.open:
            # The socket from seed() comes first; it has a negative number.
            if (number := next(iter(listener.sockets), 0)) < 0:
                self._sockets.forget(number)
            self._sockets.listening(record.socket, record.time, listener)
            self._sockets.saw(record.socket, record.time, record.q0, record.q, record.qmax)
        elif not listener.sockets:
            self._note_closed(listener)

    def _note_closed(self, listener: Listener) -> None:
        if listener.closed is None:
            listener.closed = monotonic()

    def _awaited(self, id: int) -> list[Counts]:  # noqa: A002
        """Remove and return the rows that have waited for the row of an ID."""
        _, rows = self._waiting.pop(id, (0, []))
        self._waiting_rows -= len(rows)
        return rows

    def _count(self, record: Counts) -> None:
        who = self._listeners.get(record.id)
        if who is None:
            if self._waiting_rows >= _MOST_WAITING:
                raise RowError(f"{_MOST_WAITING} rows of counts lack the row of their listener")
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
                listener.count_established(record.bucket, record.events, record.nanoseconds)
                if who.told:
                    self._accounts.move(who.socket, record.id, -record.events, record.events)
            case Accepts():
                listener.count_accepts(record.bucket, record.events, record.nanoseconds)
                if who.told:
                    self._accounts.move(who.socket, record.id, 0, -record.events)
            case Resent():
                listener.synack_retransmits += record.events
            case Left():
                q0, q = (record.events, 0) if record.half_open else (0, record.events)
                self._accounts.move(who.socket, record.id, -q0, -q)


def _fullness(socket: ListeningSocket) -> tuple[float, int]:
    return socket.q / MORE_THAN.of(socket.qmax), socket.q
