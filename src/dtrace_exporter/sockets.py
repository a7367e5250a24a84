"""The listening sockets of a host, as the newest observation of any of its sessions has them.

A host's sessions see different things of a socket, and their rows come in any order. So everything
that is seen has the time at which the kernel was looked at, of a clock that they share.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from dtrace_exporter.limits import LimitError, Limits


class Queues(NamedTuple):
    """Lengths and limits of a listener's queues; None where not known."""

    q0: int | None
    q: int | None
    q0_limit: int | None
    q_limit: int | None


UNKNOWN = Queues(None, None, None, None)
"""Those of a socket of which nothing but that it listens is known."""


class Owner(Protocol):
    """A listener: whose sockets they are, which listen, whether or not their queues are known."""

    sockets: dict[int, Queues]

    @property
    def identity(self) -> Hashable:
        """What tells it from other listeners."""


_NEVER = -1


@dataclass(slots=True)
class _Socket:
    """One socket; its times are when it was last seen to listen, to have closed, and its queues."""

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

    @property
    def queues(self) -> Queues:
        return Queues(self.q0, self.q, self.q0max, self.qmax)


class Sockets:
    """The sockets of one host by the kernel's address, which is used again, if not at once.

    ``most`` is how many may be open. Of as many that have closed it is remembered when, since rows
    of theirs may still be on their way. ``idle`` are the identities of listeners without
    an open socket, the one that has been so for longest first.
    """

    def __init__(self) -> None:
        self.most = Limits().sockets
        self.idle = OrderedDict[Any, None]()
        self._sockets: dict[int, _Socket] = {}
        self._closed = OrderedDict[int, None]()

    def __len__(self) -> int:
        """Return how many are open."""
        return len(self._sockets) - len(self._closed)

    def listening(self, socket: int, time: int, listener: Owner) -> bool:
        """Note that a socket listened for a listener at a time, unless it has closed since.

        Nor where it has listened for another one since: its memory has been used again.

        Returns:
            Whether it is the listener's now.

        Raises:
            LimitError: as many as may be are open.
        """
        known = self._sockets.get(socket) or _Socket()
        if time <= known.closed or (known.listener is not listener and time < known.opened):
            return False
        if not known.is_open and len(self) >= self.most:
            raise LimitError("sockets")
        if known.listener is not None and (known.listener is not listener or not known.is_open):
            self._take_away(socket, known)
            known.q0 = known.q = known.qmax = known.q0max = None
        known.listener = listener
        known.opened = max(known.opened, time)
        self._sockets[socket] = known
        self._closed.pop(socket, None)
        listener.sockets[socket] = known.queues
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
        """Take what was seen of a socket's queues at a time, as far as nothing newer is known.

        A socket that has closed stays so, whatever was still on its way, until it listens again.
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
        known.listener.sockets[socket] = known.queues

    def unsee(self, socket: int) -> None:
        """Note that the lengths of a socket's queues are not known, until they are seen again."""
        known = self._sockets.get(socket)
        if known is not None and known.listener is not None and known.is_open:
            known.q0 = known.q = None
            known.listener.sockets[socket] = known.queues

    def closed(self, socket: int, time: int) -> None:
        """Note that at a time a socket had stopped listening: its gauges end."""
        known = self._sockets.setdefault(socket, _Socket())
        known.closed = max(known.closed, time)
        if known.is_open:
            return
        self._take_away(socket, known)
        # The last one to close is the last to be forgotten.
        self._closed[socket] = None
        self._closed.move_to_end(socket)
        if len(self._closed) > self.most:
            self.forget(next(iter(self._closed)))

    def forget(self, socket: int) -> None:
        """Forget a socket: no row can speak of it, or nobody tells any more what becomes of it."""
        self._closed.pop(socket, None)
        if known := self._sockets.pop(socket, None):
            self._take_away(socket, known)

    def forget_closed(self) -> None:
        """Forget when sockets have closed: no row of before is on its way any more.

        The clock of a host that has started anew begins at 0, and may be behind all of these.
        """
        for socket in self._closed:
            del self._sockets[socket]
        self._closed.clear()

    def _take_away(self, socket: int, known: _Socket) -> None:
        owner = known.listener
        if owner is not None and socket in owner.sockets:
            del owner.sockets[socket]
            if not owner.sockets:
                self.idle[owner.identity] = None
