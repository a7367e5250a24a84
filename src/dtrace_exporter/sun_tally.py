"""From the rows of a program for Solaris or illumos to the listener table."""

from __future__ import annotations

from dataclasses import dataclass

from dtrace_exporter.listeners import Identity, Listener, ListenerTable, SessionId
from dtrace_exporter.rows import Ready, RowError
from dtrace_exporter.rows import Tick as Heartbeat
from dtrace_exporter.sockets import Queues
from dtrace_exporter.sun_rows import (
    OLD_TERMS,
    TERMS,
    Calm,
    Outcome,
    Place,
    Row,
    Tick,
    What,
    bucket,
    parse,
    queues,
)

_Key = tuple[int, str, int, str, int, int, int]
_Order = tuple[int, int, bool]


@dataclass(frozen=True, slots=True)
class _Term:
    """The listener of a term, and the SYNs counted in it so far by the Q that they found."""

    identity: Identity
    qmax: int
    counted: dict[int, int]


class Tally:
    """What one run of a session has counted so far.

    A row's COUNT and SUM only grow until its set is emptied, which the program does while the set
    of the other parity is in use; so a row that was lost or garbled is made up for by the next.
    """

    def __init__(self, table: ListenerTable, session: SessionId) -> None:
        self._table = table
        self._session = session
        self._names: dict[str, str] = {}
        self._generation = -1
        self._counted: tuple[dict[_Key, tuple[int, int]], ...] = ({}, {})
        self._terms: dict[int, _Term] = {}
        self._generations = [-1, -1]
        self._sockets: dict[int, tuple[_Order, Listener | None]] = {}

    def feed(self, line: str) -> Ready | Heartbeat | None:
        """Take a line; return it if the session has to know.

        Raises:
            RowError: it is no row.
        """
        match parse(line):
            case Ready() as ready:
                self.ready(ready)
                return ready
            case Tick() as tick:
                self.tick(tick)
                return Heartbeat(tick.time)
            case Row() as row:
                self.row(row)
            case Calm() as calm:
                self.calm(calm)
            case Place() as place:
                self.place(place)
        return None

    def ready(self, ready: Ready) -> None:
        """Note which place is the host's own."""
        self._names[ready.home] = self._table.home(self._session)

    def place(self, place: Place) -> None:
        """Note what a place is called."""
        self._names.setdefault(place.place, place.name)

    def tick(self, tick: Tick) -> None:
        """Begin the rows of one set; in a new generation it began empty."""
        parity = tick.generation & 1
        if tick.generation != self._generations[parity]:
            self._counted[parity].clear()
            self._generations[parity] = tick.generation
            self._forget_closed(before=tick.generation - 1)
        self._generation = tick.generation

    def row(self, row: Row) -> None:
        """Add what a row says beyond its last appearance, if anybody asked for its port.

        Raises:
            RowError: the heartbeat before it was not its own, so its generation is not known.
        """
        self._check(row.parity)
        place = self._place(row.place)
        if place is None:
            return
        identity = Identity(self._session.host, place, row.address, row.port)
        if row.what >= What.CALM:
            self._begin(row.what - What.CALM, identity, row.qmax)
            row = row._replace(what=What.OBSERVED)
        if row.what == What.CLOSED:
            self._observe(row, None)
            return
        key = row.socket, row.place, row.port, row.address, row.qmax, row.q0max, row.what
        counted = self._counted[row.parity]
        events, total = counted.get(key, (0, 0))
        more = row.events > events and row.total >= total
        if more:
            counted[key] = row.events, row.total
        if not self._table.watches(self._session, row.port):
            return
        closed = row.socket in self._sockets and self._sockets[row.socket][1] is None
        if closed and not more and identity not in self._table:
            # The socket has closed, and the table has forgotten whose it was.
            return
        listener = self._table.listener(self._session, place, row.address, row.port)
        if more:
            _add(listener, row.what, row.qmax, row.events - events, row.total - total)
        self._observe(row, listener)

    def calm(self, calm: Calm) -> None:
        """Add the SYNs of the short way beyond the row's last appearance.

        Those of a term that no row has told of yet wait for the next tick.
        """
        term = self._terms.get(calm.term)
        if term is None:
            return
        more = calm.events - term.counted.get(calm.q, 0)
        if more <= 0:
            return
        term.counted[calm.q] = calm.events
        if self._table.watches(self._session, term.identity.port):
            listener = self._table.listener(self._session, *term.identity[1:])
            listener.count_syns(bucket(calm.q, term.qmax), term.qmax, more, more * calm.q)

    def _begin(self, number: int, identity: Identity, qmax: int) -> None:
        """Note whose a term is, and forget those long before it: their numbers come again."""
        if number not in self._terms:
            self._terms = {
                known: term
                for known, term in self._terms.items()
                if (number - known) % TERMS < OLD_TERMS
            }
            self._terms[number] = _Term(identity, qmax, {})

    def _check(self, parity: int) -> None:
        if self._generation < 0 or parity != self._generation & 1:
            raise RowError("the heartbeat of this row's set is missing")

    def _place(self, place: str) -> str | None:
        """Return a place's label; None where places have names and this one's has not come yet."""
        if self._table.home(self._session):
            return self._names.get(place)
        return self._names.get(place, place)

    def _observe(self, row: Row, listener: Listener | None) -> None:
        """Take the row's observation of its socket, None for one that closed, unless it is old.

        The kernel uses a socket's address again, perhaps for another listener.
        """
        when, q0, q = queues(row.last)
        order = self._generation, when, listener is None
        known, owner = self._sockets.get(row.socket, (order, None))
        if order < known:
            return
        if owner is not None and owner is not listener:
            owner.sockets.pop(row.socket, None)
        if listener is not None:
            listener.sockets[row.socket] = Queues(q0, q, row.q0max or None, row.qmax)
        self._sockets[row.socket] = order, listener

    def _forget_closed(self, before: int) -> None:
        """Forget the sockets that closed in generations before one: no row can speak of them."""
        self._sockets = {
            socket: (order, owner)
            for socket, (order, owner) in self._sockets.items()
            if owner is not None or order[0] >= before
        }


_DROPS_AT_SYN = {
    Outcome.Q_FULL: "q_full",
    Outcome.Q0_FULL: "q0_full",
    Outcome.OTHER: "other",
}
_DROPS = {
    What.ACK_Q_FULL: "q_full_ack",
    What.ACK_OTHER: "other",
    What.SYN_Q_FULL: "q_full",
    What.SYN_Q0_FULL: "q0_full",
    What.SYN_Q0_EVICTED: "q0_evicted",
}


def _add(listener: Listener, what: int, qmax: int, count: int, total: int) -> None:
    """Add ``count`` events of the kind ``what`` whose values add up to ``total``."""
    if what < What.ESTABLISHED:
        listener.count_syns(what & 15, qmax, count, total)
        listener.drop(_DROPS_AT_SYN.get(Outcome(what >> 4)), count)
    elif what == What.ESTABLISHED:
        listener.established += count
    elif what >= What.ACCEPT:
        bucket = what - What.ACCEPT if what != What.ACCEPT_UNTIMED else None
        listener.count_accepts(bucket, count, total)
    else:
        listener.drop(_DROPS.get(What(what)), count)
