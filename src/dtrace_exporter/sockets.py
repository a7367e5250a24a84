"""The listening sockets of a host, as the newest observation of any of its sessions has them.

A host's sessions see different things of a socket, and their rows come in any order. So everything
that is seen has the time at which the kernel was looked at, of a clock that they share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Queues(NamedTuple):
    """Lengths and limits of a listener's queues; None where not known."""

    q0: int | None
    q: int | None
    q0_limit: int | None
    q_limit: int | None


class Owner(Protocol):
    """A listener: whose sockets they are."""

    sockets: dict[int, Queues]


_NEVER = -1
_MOST_CLOSED = 10_000


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


class Sockets:
    """The sockets of one host by the kernel's address, which is used again, if not at once."""

    def __init__(self) -> None:
        self._sockets: dict[int, _Socket] = {}

    def listening(self, socket: int, time: int, listener: Owner) -> None:
        """Note that a socket listened for a listener at a time, unless it has closed since.

        Nor where it has listened for another one since: its memory has been used again.
        """
        known = self._sockets.setdefault(socket, _Socket())
        if time <= known.closed or (known.listener is not listener and time < known.opened):
            return
        if known.listener is not None and (
            known.listener is not listener or known.opened <= known.closed
        ):
            self._take_away(socket, known)
            known.q0 = known.q = known.qmax = known.q0max = None
        known.listener = listener
        known.opened = max(known.opened, time)

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
        if known is None or known.listener is None or known.opened <= known.closed:
            return
        if time <= known.closed:
            return
        if q0 is not None and time >= known.q0_at:
            known.q0, known.q0_at = q0, time
        if q is not None and time >= known.q_at:
            known.q, known.q_at = q, time
        if qmax is not None and time >= known.qmax_at:
            known.qmax, known.q0max, known.qmax_at = qmax, q0max, time
        known.listener.sockets[socket] = Queues(known.q0, known.q, known.q0max, known.qmax)

    def unsee(self, socket: int) -> None:
        """Note that the lengths of a socket's queues are not known, until they are seen again."""
        known = self._sockets.get(socket)
        if known is not None and known.listener and socket in known.listener.sockets:
            known.q0 = known.q = None
            known.listener.sockets[socket] = Queues(None, None, known.q0max, known.qmax)

    def limit(self, socket: int, time: int, qmax: int) -> None:
        """Take a new limit of a socket, if somebody knows it."""
        known = self._sockets.get(socket)
        if known is not None and known.listener and socket in known.listener.sockets:
            self.saw(socket, time, qmax=qmax)

    def closed(self, socket: int, time: int) -> None:
        """Note that at a time a socket had stopped listening: its gauges end."""
        known = self._sockets.setdefault(socket, _Socket())
        known.closed = max(known.closed, time)
        if known.opened <= known.closed:
            self._take_away(socket, known)
        if len(self._sockets) > _MOST_CLOSED:
            self._forget()

    def _take_away(self, socket: int, known: _Socket) -> None:
        if known.listener is not None:
            known.listener.sockets.pop(socket, None)

    def _forget(self) -> None:
        """Forget sockets that closed, those first that did so first; no row can speak of them."""
        gone = [(one.closed, key) for key, one in self._sockets.items() if one.opened <= one.closed]
        for _, key in sorted(gone)[: max(0, len(gone) - _MOST_CLOSED // 2)]:
            del self._sockets[key]
