"""From the records of one run of a session to the listener table."""

from __future__ import annotations

from dtrace_exporter.listeners import Identity, Listener, ListenerTable, SessionId
from dtrace_exporter.rows import (
    Accepts,
    Closed,
    Drops,
    Established,
    Limit,
    Listening,
    Queue,
    Reader,
    Ready,
    RowError,
    Syns,
    Tick,
)
from dtrace_exporter.sock_diag import Sample

_MOST_WAITING = 10_000


class Tally:
    """What one run of a session tells.

    ``home`` is the place of the host itself, as the program names it.

    Args:
        table: where the listeners are.
        session: whose run it is; the table has to have a watch of it.
    """

    def __init__(self, table: ListenerTable, session: SessionId) -> None:
        self._table = table
        self._session = session
        self._sockets = table.sockets(session.host)
        self._reader = Reader()
        self.home = ""
        self._listeners: dict[int, tuple[int, Listener | None]] = {}
        self._waiting: dict[int, list[Syns | Drops | Established | Accepts]] = {}

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
                return record
            case Listening():
                self._listening(record)
            case Queue():
                if record.id in self._listeners:
                    socket, _ = self._listeners[record.id]
                    self._sockets.saw(socket, record.time, record.q0, record.q, record.qmax)
            case Limit():
                self._sockets.limit(record.socket, record.time, record.qmax)
            case Closed():
                self._sockets.closed(record.socket, record.time)
            case Syns() | Drops() | Established() | Accepts():
                self._count(record)
        return None

    def know(self, samples: list[Sample], time: int) -> None:
        """Take what the kernel tells, at a time, of the listeners of the host's own place.

        The kernel's address of a socket is not in it, so it is taken where a listener has only one;
        and where none has been seen yet, under a number that no address can be.

        Args:
            samples: as sock_diag.listeners() gives them.
            time: in nanoseconds of the monotonic clock, before they were read.
        """
        home = self._table.home(self._session)
        found: dict[Identity, list[Sample]] = {}
        for sample in samples:
            if self._table.watches(self._session, sample.port):
                identity = Identity(self._session.host, home, sample.address, sample.port)
                found.setdefault(identity, []).append(sample)
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

    def _listening(self, record: Listening) -> None:
        if not self._table.watches(self._session, record.port):
            self._listeners[record.id] = record.socket, None
            self._waiting.pop(record.id, None)
            return
        home = record.place == self.home
        place = self._table.home(self._session) if home else record.place
        self._table.live(self._session.host, place, record.cookie)
        listener = self._table.listener(self._session, place, record.address, record.port)
        self._listeners[record.id] = record.socket, listener
        for each in self._waiting.pop(record.id, ()):
            self._count(each)
        if record.open:
            for number in [number for number in listener.sockets if number < 0]:
                self._sockets.closed(number, record.time)
            self._sockets.listening(record.socket, record.time, listener)
            self._sockets.saw(record.socket, record.time, record.q0, record.q, record.qmax)

    def _count(self, record: Syns | Drops | Established | Accepts) -> None:
        if record.id not in self._listeners:
            if len(self._waiting) >= _MOST_WAITING and record.id not in self._waiting:
                raise RowError(f"no row has told who {_MOST_WAITING} listeners are")
            self._waiting.setdefault(record.id, []).append(record)
            return
        _, listener = self._listeners[record.id]
        if listener is None:
            return
        match record:
            case Syns():
                listener.count_syns(record.bucket, record.qmax, record.events, record.total)
                listener.drop(record.reason, record.events)
            case Drops():
                listener.drop(record.reason, record.events)
            case Established():
                listener.established += record.events
            case Accepts():
                listener.count_accepts(record.bucket, record.events, record.nanoseconds)
