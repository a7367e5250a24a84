"""The listening sockets of a host, merged from the observations of all of its sessions.

The sessions of a host observe different things of a socket, and their rows come in any order. So
each observation has a time, in nanoseconds of a clock that all sessions of the host share.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import islice
from time import monotonic
from typing import Any, NamedTuple, Protocol

from dtrace_exporter.limits import LimitError, Limits


class Queues(NamedTuple):
    """Lengths and limits of a listener's queues, in connections; None for what is not known.

    ``requested`` is the backlog that the application passed to listen(), and ``q_limit`` what the
    kernel made of it.
    """

    q0: int | None
    q: int | None
    q0_limit: int | None
    q_limit: int | None
    requested: int | None = None


class QCapacity(NamedTuple):
    """How many connections Q can hold, by Qmax: ``Qmax * times // over + plus``."""

    times: int = 1
    over: int = 1
    plus: int = 1

    def of(self, q_limit: int) -> int:
        """Return the capacity for a Qmax; it is at least one connection."""
        return max(q_limit * self.times // self.over + self.plus, 1)


MORE_THAN = QCapacity()
"""Linux's: Q is full when it is longer than Qmax, sk_acceptq_is_full() in include/net/sock.h."""


UNKNOWN = Queues(None, None, None, None)
"""The queues of a socket that listens, if nothing else is known of it."""


Acceptors = frozenset[tuple[str, str]]
"""Who accepts at a socket: pairs of kind and name, as in rows.Accepted."""


class Owner(Protocol):
    """A listener, the owner of sockets.

    Attributes:
        sockets: its open sockets, also those whose queues are not known.
        acceptors: by socket, who accepts; only sockets of which this is known.
        closed: when the last of them was seen to close, in seconds of the monotonic clock. None if
            a socket is open, or if this is not known.
    """

    sockets: dict[int, Queues]
    acceptors: dict[int, Acceptors]
    closed: float | None

    @property
    def identity(self) -> Hashable:
        """The identity of the listener, which no other one has."""


_NEVER = -1
_STALE_NS = 600_000_000_000
_MOST_NAMES = 16
_NAMES_EACH = 2
"""How many names are kept for each socket on average: a hostile host could invent any number."""


@dataclass(slots=True)
class _Socket:
    """One socket, and the times at which it was last seen to listen, to close, and its queues."""

    listener: Owner | None = None
    opened: int = _NEVER
    closed: int = _NEVER
    q0_at: int = _NEVER
    q_at: int = _NEVER
    qmax_at: int = _NEVER
    q0: int | None = None
    q: int | None = None
    qmax: int | None = None
    q0max: int | None = None

    @property
    def is_open(self) -> bool:
        return self.opened > self.closed


class _Listen(NamedTuple):
    """The newest listen() of a socket."""

    time: int
    qmax: int
    requested: int


class Sockets:
    """The sockets of one host, by the kernel's address. The kernel reuses addresses after a while.

    Attributes:
        most: how many sockets may be open. For as many closed ones the time of the close is kept,
            because late rows of theirs may follow.
        idle: the identities of listeners without an open socket, the one that has been idle for
            longest first.
        since: closes are seen from this time on, in nanoseconds. Older observations are ignored:
            their socket may have closed unseen.
    """

    def __init__(self) -> None:
        self.most = Limits().sockets
        self.idle = OrderedDict[Any, None]()
        self.since: float = 0
        self._sockets: dict[int, _Socket] = {}
        self._closed = OrderedDict[int, None]()
        self._listens = OrderedDict[int, _Listen]()
        # By socket: when each of its acceptors last accepted.
        self._acceptors = OrderedDict[int, dict[tuple[str, str], int]]()
        self._names = 0

    def __len__(self) -> int:
        """Return how many sockets are open."""
        return len(self._sockets) - len(self._closed)

    def listening(self, socket: int, time: int, listener: Owner) -> bool:
        """Record that a socket listened for a listener at a time.

        This is ignored if the socket has closed since then, or if it has listened for another
        listener since then, because the kernel has reused its address.

        Args:
            socket: the kernel's address of it.
            time: in nanoseconds.
            listener: the listener that it belongs to.

        Returns:
            Whether the socket belongs to this listener now.

        Raises:
            LimitError: ``most`` sockets are open already.
        """
        known = self._sockets.get(socket) or _Socket()
        if time < self.since or time <= known.closed:
            return False
        if known.listener is not listener and time < known.opened:
            return False
        listener.closed = None
        if not known.is_open and len(self) >= self.most:
            raise LimitError("sockets")
        if known.listener is not listener:
            if known.listener is not None:
                self._forget_acceptors(socket, time - 1)
            self._take_away(socket, known)
            if socket in self._acceptors:
                listener.acceptors[socket] = frozenset(self._acceptors[socket])
        known.listener = listener
        known.opened = max(known.opened, time)
        self._sockets[socket] = known
        self._closed.pop(socket, None)
        listener.sockets[socket] = self._queues(socket, known)
        self.idle.pop(listener.identity, None)
        return True

    def saw(
        self,
        socket: int,
        time: int,
        q0: int | None = None,
        q: int | None = None,
        qmax: int | None = None,
        q0max: int | None = None,
    ) -> None:
        """Record the queues of a socket at a time, unless something newer is known.

        This is ignored for a socket that is not open.

        Args:
            socket: the kernel's address of it.
            time: in nanoseconds.
            q0: half-open connections, None if not observed.
            q: connections that wait for accept(), None if not observed.
            qmax: the limit of Q, None if not observed.
            q0max: the limit of Q0, None if the kernel has none.
        """
        known = self._sockets.get(socket)
        if known is None or known.listener is None or not known.is_open or time <= known.closed:
            return
        if q0 is not None and time >= known.q0_at:
            known.q0, known.q0_at = q0, time
        if q is not None and time >= known.q_at:
            known.q, known.q_at = q, time
        if qmax is not None and time >= known.qmax_at:
            known.qmax, known.q0max, known.qmax_at = qmax, q0max, time
        known.listener.sockets[socket] = self._queues(socket, known)

    def listened(self, socket: int, time: int, qmax: int, requested: int | None) -> None:
        """Record a call of listen(). It may be recorded before the listener of its socket is known.

        Args:
            socket: the kernel's address of it.
            time: when listen() ended, in nanoseconds.
            qmax: the limit that the kernel has granted.
            requested: the backlog that was requested, None if it was not seen.
        """
        known, before = self._sockets.get(socket), self._listens.get(socket)
        is_open = time >= self.since and (known is None or time > known.closed)
        if is_open and (before is None or time >= before.time):
            self._listens.pop(socket, None)
            if requested is not None:
                self._listens[socket] = _Listen(time, qmax, requested)
            if len(self._listens) > self.most:
                self._listens.popitem(last=False)
        self.saw(socket, time, qmax=qmax)

    def accepted(self, socket: int, time: int, kind: str, name: str) -> None:
        """Record who accepted a connection at a socket at a time.

        This can come before the socket's listener is known. Who has not accepted for ten minutes,
        while another one has, is forgotten. If too many are known, those of the sockets at which
        nobody has accepted for longest are forgotten.

        Args:
            socket: the kernel's address of the socket.
            time: in nanoseconds of the host's monotonic clock.
            kind: what the name is of, as in rows.Accepted.
            name: the name.
        """
        known = self._sockets.get(socket)
        if known is not None and time <= known.closed:
            return
        names = self._take_names(socket)
        last = max(names.pop((kind, name), time), time)
        names[kind, name] = last
        for old in [one for one in names if one[0] == kind and names[one] < last - _STALE_NS]:
            del names[old]
        for old in [*islice(names, max(len(names) - _MOST_NAMES, 0))]:
            del names[old]
        self._keep_names(socket, names)
        if known is not None and known.listener is not None:
            known.listener.acceptors[socket] = frozenset(names)

    def _take_names(self, socket: int) -> dict[tuple[str, str], int]:
        names = self._acceptors.pop(socket, {})
        self._names -= len(names)
        return names

    def _keep_names(self, socket: int, names: dict[tuple[str, str], int]) -> None:
        self._acceptors[socket] = names
        self._names += len(names)
        while self._names > _NAMES_EACH * self.most and len(self._acceptors) > 1:
            oldest = next(iter(self._acceptors))
            self._take_names(oldest)
            known = self._sockets.get(oldest)
            if known is not None and known.listener is not None:
                known.listener.acceptors.pop(oldest, None)

    def _forget_acceptors(self, socket: int, time: int) -> None:
        """Forget who accepted at a socket up to a time, because it was another listener's."""
        names = self._take_names(socket)
        if left := {name: last for name, last in names.items() if last > time}:
            self._keep_names(socket, left)

    def forget_listens(self) -> None:
        """Forget the requested backlogs, because a call of listen() may not have been seen."""
        self._listens.clear()
        for socket, known in self._sockets.items():
            if known.listener is not None:
                known.listener.sockets[socket] = self._queues(socket, known)

    def unsee(self, socket: int) -> None:
        """Record that the lengths of a socket's queues are not known until they are seen again."""
        known = self._sockets.get(socket)
        if known is not None and known.listener is not None and known.is_open:
            known.q0 = known.q = None
            known.listener.sockets[socket] = self._queues(socket, known)

    def closed(self, socket: int, time: int) -> None:
        """Record that a socket had stopped listening at a time, in nanoseconds."""
        known = self._sockets.setdefault(socket, _Socket())
        known.closed = max(known.closed, time)
        if socket in self._listens and self._listens[socket].time <= time:
            del self._listens[socket]
        self._forget_acceptors(socket, time)
        if known.is_open:
            return
        self._take_away(socket, known)
        # The one that closed last is forgotten last.
        self._closed[socket] = None
        self._closed.move_to_end(socket)
        if len(self._closed) > self.most:
            self.forget(next(iter(self._closed)))

    def forget(self, socket: int) -> None:
        """Forget a socket, because no more rows of it can come, or nobody watches it any more."""
        self._closed.pop(socket, None)
        self._take_names(socket)
        if known := self._sockets.pop(socket, None):
            self._take_away(socket, known)

    def forget_closed(self) -> None:
        """Forget when sockets have closed, because no late rows can follow any more.

        After a reboot the host's clock begins at 0, so these times may be in the future.
        """
        for socket in self._closed:
            del self._sockets[socket]
        self._closed.clear()
        self._acceptors.clear()
        self._names = 0

    def _queues(self, socket: int, known: _Socket) -> Queues:
        asked = self._listens.get(socket)
        # If the limit differs, there was another listen(), which nobody has seen.
        requested = asked.requested if asked and asked.qmax == known.qmax else None
        return Queues(known.q0, known.q, known.q0max, known.qmax, requested)

    def _take_away(self, socket: int, known: _Socket) -> None:
        owner = known.listener
        known.listener = known.q0 = known.q = known.qmax = known.q0max = None
        if owner is not None and socket in owner.sockets:
            del owner.sockets[socket]
            owner.acceptors.pop(socket, None)
            if not owner.sockets:
                owner.closed = monotonic()
                self.idle[owner.identity] = None
