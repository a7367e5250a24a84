"""The listener table: what every listener has counted, and its queues as last observed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dtrace_exporter.sockets import Queues, Sockets

SYN_BUCKETS = 12
"""Buckets of Q/Qmax at a SYN: 0, up to 0.1, ... up to 1, above."""

WAIT_BUCKETS = 14
"""Buckets of the time in Q: up to 4^5 ns, ... up to 4^17 ns, above."""


def syn_bucket(q: int, qmax: int) -> int:
    """Return in which bucket Q/Qmax is."""
    return min(-(-10 * q // max(qmax, 1)), SYN_BUCKETS - 1)


class SessionId(NamedTuple):
    """A session's name, unique on its host; ``host`` is empty for the local one."""

    host: str
    name: str


class Identity(NamedTuple):
    """Who a listener is; ``place`` is a zone's name, or a netns' inode if not the host's own."""

    host: str
    place: str
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class Exports:
    """Which series the source of a listener's numbers can fill; the others are not exported.

    ``place_label`` is the label of a listener's place, and ``home`` its value for the host's own.
    ``opened`` and ``departures`` are whether what enters Q0, and what leaves it and Q, is counted.
    """

    place_label: str = "netns"
    home: str = ""
    syns: bool = True
    reasons: tuple[str, ...] = ()
    opened: bool = True
    established: bool = True
    departures: bool = True
    accepts: bool = True
    accept_wait: bool = True


@dataclass(slots=True)
class Listener:
    """Counters of one identity, and the queues of each of its open sockets."""

    identity: Identity
    session: SessionId
    syns: int = 0
    drops: dict[str, int] = field(default_factory=dict)
    established: int = 0
    accepts: int = 0
    saturation: list[int] = field(default_factory=lambda: [0] * SYN_BUCKETS)
    q_sums: dict[int, int] = field(default_factory=dict)
    waits: list[int] = field(default_factory=lambda: [0] * WAIT_BUCKETS)
    wait_ns: int = 0
    sockets: dict[int, Queues] = field(default_factory=dict)

    @property
    def saturation_sum(self) -> float:
        """Sum of Q/Qmax over all SYNs; a backlog of 0, which admits one connection, counts as 1."""
        return sum(total / max(qmax, 1) for qmax, total in self.q_sums.items())

    @property
    def queues(self) -> Queues | None:
        """The queues of the fullest open socket; None when none is known."""
        return max(self.sockets.values(), key=_fullness, default=None)

    def copy(self) -> Listener:
        """Return one that is equal, and stays as it is."""
        return replace(
            self,
            drops=self.drops.copy(),
            saturation=self.saturation.copy(),
            q_sums=self.q_sums.copy(),
            waits=self.waits.copy(),
            sockets=self.sockets.copy(),
        )

    def count_syns(self, bucket: int, qmax: int, count: int, total: int) -> None:
        """Add SYNs that found Q/Qmax in a bucket; ``total`` is the sum of the Q that they found."""
        self.syns += count
        self.saturation[bucket] += count
        self.q_sums[qmax] = self.q_sums.get(qmax, 0) + total

    def count_accepts(self, bucket: int | None, count: int, nanoseconds: int) -> None:
        """Add accepts whose times in Q were in a bucket; None is where nobody looked at them."""
        self.accepts += count
        if bucket is not None:
            self.waits[bucket] += count
            self.wait_ns += nanoseconds

    def drop(self, reason: str | None, count: int) -> None:
        """Add drops; no reason is none."""
        if reason is not None:
            self.drops[reason] = self.drops.get(reason, 0) + count


@dataclass(slots=True)
class _Watch:
    ports: Mapping[int, str] | None
    exports: Exports


class ListenerTable:
    """All listeners of all sessions.

    A listener that closed keeps its counters, so that it goes on counting when it comes back. Only
    where there are more than ``max_closed`` such listeners, none of them configured, are those
    forgotten that were new first.
    """

    def __init__(self, max_closed: int = 10_000) -> None:
        self._max_closed = max_closed
        self._listeners: dict[Identity, Listener] = {}
        self._watches: dict[SessionId, _Watch] = {}
        self._sockets: dict[str, Sockets] = {}
        self._cookies: dict[tuple[str, str], int] = {}
        self._enough = max_closed

    def watch(
        self, session: SessionId, ports: Mapping[int, str] | None, exports: Exports | None = None
    ) -> None:
        """Say which ports a session watches; it takes over the host's listeners of these ports.

        Args:
            session: whose listeners they are.
            ports: the configured port numbers and names, or None for every listener of the host.
            exports: which series the session can fill; None leaves what was said before.
        """
        known = self._watches.get(session)
        if exports is None:
            exports = known.exports if known else Exports()
        self._watches[session] = _Watch(ports, exports)
        for listener in list(self._listeners.values()):
            if listener.identity.host != session.host:
                continue
            if ports is None or listener.identity.port in ports:
                if listener.session != session:
                    listener.session = session
                    listener.sockets.clear()
            elif listener.session == session:
                del self._listeners[listener.identity]

    def unwatch(self, session: SessionId) -> None:
        """Forget a session and all of its listeners."""
        self._watches.pop(session, None)
        for listener in list(self._listeners.values()):
            if listener.session == session:
                del self._listeners[listener.identity]

    def ports(self, session: SessionId) -> Mapping[int, str] | None:
        """Return the ports that a session watches and their names, or None for every port."""
        return self._watches[session].ports

    def watches(self, session: SessionId, port: int) -> bool:
        """Tell whether the session's configuration asks for a port."""
        ports = self._watches[session].ports
        return ports is None or port in ports

    def listener(self, session: SessionId, place: str, address: str, port: int) -> Listener:
        """Return the listener of that identity, new when not yet known."""
        identity = Identity(session.host, place, address, port)
        listener = self._listeners.get(identity)
        if listener is None:
            if len(self._listeners) >= self._enough:
                self._forget_closed()
            listener = self._listeners[identity] = Listener(identity, session)
        return listener

    def seen(self, session: SessionId) -> list[Listener]:
        """Return the listeners of a session that have been seen."""
        return [one for one in self._listeners.values() if one.session == session]

    def sockets(self, host: str) -> Sockets:
        """Return the listening sockets of a host."""
        return self._sockets.setdefault(host, Sockets())

    def live(self, host: str, place: str, cookie: int) -> None:
        """Note which use of a place's number is alive; what is known of another use is forgotten.

        A network namespace's inode is used again, and a new container must not go on with the
        counters of one that is gone. Its cookie is not: ``net_cookie`` of the kernel's struct net.
        """
        before = self._cookies.get((host, place), cookie)
        self._cookies[host, place] = cookie
        if before != cookie:
            for identity in list(self._listeners):
                if (identity.host, identity.place) == (host, place):
                    del self._listeners[identity]

    def clear_queues(self, session: SessionId) -> None:
        """Forget the queues of a session's listeners: nobody observes them any more."""
        for listener in self._listeners.values():
            if listener.session == session:
                listener.sockets.clear()

    def session_exports(self, session: SessionId) -> Exports:
        """Return which series a session can fill."""
        return self._watches[session].exports

    def exports(self, listener: Listener) -> Exports:
        """Return which series the listener's session can fill."""
        return self._watches[listener.session].exports

    def home(self, session: SessionId) -> str:
        """Return the name of the host's own place, as the session's program has it."""
        return self._watches[session].exports.home

    def name(self, listener: Listener) -> str:
        """Return the name that the configuration gives the listener, or an empty one."""
        ports = self._watches[listener.session].ports
        return ports.get(listener.identity.port, "") if ports else ""

    def __iter__(self) -> Iterator[Listener]:
        """Iterate over all listeners; a configured port not seen yet is one with all zeroes."""
        yield from list(self._listeners.values())
        seen = {(identity.host, identity.port) for identity in self._listeners}
        for session, watch in self._watches.items():
            for port in watch.ports or ():
                if (session.host, port) not in seen:
                    yield Listener(Identity(session.host, watch.exports.home, "*", port), session)

    def __contains__(self, identity: object) -> bool:
        """Tell whether a listener has been seen and not been forgotten."""
        return identity in self._listeners

    def __len__(self) -> int:
        """Return the number of listeners that have been seen."""
        return len(self._listeners)

    def _forget_closed(self) -> None:
        closed = [
            listener
            for listener in self._listeners.values()
            if not listener.sockets and self._watches[listener.session].ports is None
        ]
        if len(closed) > self._max_closed:
            for listener in closed[: len(closed) - self._max_closed // 2]:
                del self._listeners[listener.identity]
        # Looking again pays only when as many more as may stay have come.
        self._enough = len(self._listeners) + self._max_closed // 2 + 1


def _fullness(queues: Queues) -> tuple[float, int]:
    return (queues.q or 0) / max(queues.q_limit or 0, 1), queues.q0 or 0
