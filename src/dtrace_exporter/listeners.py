"""The listener table: what every listener has counted, and its queues as last observed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import NamedTuple

from dtrace_exporter.limits import LimitError, Limits
from dtrace_exporter.sockets import UNKNOWN, Queues, Sockets

SYN_BUCKETS = 12
"""Buckets of Q/Qmax at a SYN: 0, up to 0.1, ... up to 1, above."""

WAIT_BUCKETS = 14
"""Buckets of the time in Q: up to 4^5 ns, ... up to 4^17 ns, above."""


_MOST_LIMITS = 32
"""So many of the limits that a listener's Q has had have a sum of their own."""

_LOOKS = 16
"""Among so many closed listeners one is looked for whose place may be forgotten."""


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
class Capabilities:
    """Which series the source of a listener's numbers can fill; the others are not exported.

    ``place_label`` is the label of a listener's place, and ``own_place`` its value for the host's
    own. ``opened`` and ``departures`` are whether what enters Q0, and what leaves it and Q, is
    counted.
    """

    place_label: str = "netns"
    own_place: str = ""
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
    older_sum: float = 0.0

    @property
    def saturation_sum(self) -> float:
        """Sum of Q/Qmax over all SYNs; a backlog of 0, which admits one connection, counts as 1."""
        return self.older_sum + sum(total / max(qmax, 1) for qmax, total in self.q_sums.items())

    @property
    def queues(self) -> Queues | None:
        """The queues of the fullest open socket; None when none is known."""
        known = (queues for queues in self.sockets.values() if queues != UNKNOWN)
        return max(known, key=_fullness, default=None)

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
        if qmax not in self.q_sums and len(self.q_sums) >= _MOST_LIMITS:
            first = next(iter(self.q_sums))
            self.older_sum += self.q_sums.pop(first) / max(first, 1)
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
    capabilities: Capabilities


@dataclass(slots=True)
class _Place:
    """A place that has listeners; ``cookie`` tells the uses of its name apart, if it is known.

    ``busy`` is one of them that could not be forgotten when somebody looked.
    """

    cookie: int | None = None
    identities: set[Identity] = field(default_factory=set)
    busy: Identity | None = None


class _Host:
    def __init__(self) -> None:
        self.limits = Limits()
        self.sockets = Sockets()
        self.listeners: dict[Identity, Listener] = {}
        self.places: dict[str, _Place] = {}


class ListenerTable:
    """All listeners of all sessions.

    A listener that closed keeps its counters, so that it goes on counting when it comes back. Only
    where its host has as many listeners as it may, the one that closed first makes room for a new
    one; but not a configured one of the host's own place.
    """

    def __init__(self) -> None:
        self._watches: dict[SessionId, _Watch] = {}
        self._hosts = defaultdict[str, _Host](_Host)

    def limit(self, host: str, limits: Limits) -> None:
        """Say how much of a host is taken in from now on."""
        self._hosts[host].limits = limits
        self._hosts[host].sockets.most = limits.sockets

    def limits(self, host: str) -> Limits:
        """Return how much of a host is taken in."""
        return self._hosts[host].limits

    def watch(
        self,
        session: SessionId,
        ports: Mapping[int, str] | None,
        capabilities: Capabilities | None = None,
    ) -> None:
        """Say which ports a session watches; it takes over the host's listeners of these ports.

        Args:
            session: whose listeners they are.
            ports: the configured port numbers and names, or None for every listener of the host.
            capabilities: which series the session can fill; None leaves what was said before.
        """
        known = self._watches.get(session)
        if capabilities is None:
            capabilities = known.capabilities if known else Capabilities()
        self._watches[session] = _Watch(ports, capabilities)
        for listener in [*self._hosts[session.host].listeners.values()]:
            if ports is None or listener.identity.port in ports:
                if listener.session != session:
                    listener.session = session
                    self._close(listener)
                elif not listener.sockets:
                    self.idle(listener)
            elif listener.session == session:
                self._forget(listener)

    def unwatch(self, session: SessionId) -> None:
        """Forget a session and all of its listeners."""
        self._watches.pop(session, None)
        for listener in self.seen(session):
            self._forget(listener)
        if not any(other.host == session.host for other in self._watches):
            self._hosts.pop(session.host, None)

    def ports(self, session: SessionId) -> Mapping[int, str] | None:
        """Return the ports that a session watches and their names, or None for every port."""
        return self._watches[session].ports

    def watches(self, session: SessionId, port: int) -> bool:
        """Tell whether the session's configuration asks for a port."""
        ports = self._watches[session].ports
        return ports is None or port in ports

    def listener(
        self, session: SessionId, place: str, address: str, port: int, cookie: int | None = None
    ) -> Listener:
        """Return the listener of that identity, new when not yet known.

        Args:
            session: whose it is.
            place: where it is.
            address: what it is bound to.
            port: likewise.
            cookie: which use of the place's number it is, if known; what is known of another use
                is forgotten. A network namespace's inode is used again, and a new container must
                not go on with the counters of one that is gone. Its cookie is not used again:
                ``net_cookie`` of the kernel's struct net.

        Raises:
            LimitError: it is new, and its host has as many listeners or places as it may.
        """
        host = self._hosts[session.host]
        known = host.places.get(place)
        if known is not None and cookie is not None and cookie != known.cookie:
            if known.cookie is not None:
                self._end(host, known)
            known.cookie = cookie
        identity = Identity(session.host, place, address, port)
        listener = host.listeners.get(identity)
        if listener is None:
            self._make_room(host, place)
            listener = host.listeners[identity] = Listener(identity, session)
            host.places.setdefault(place, _Place(cookie)).identities.add(identity)
            self.idle(listener)
        return listener

    def idle(self, listener: Listener) -> None:
        """Note that a listener has no open socket: it may make room for another one."""
        self._hosts[listener.identity.host].sockets.idle.setdefault(listener.identity)

    def seen(self, session: SessionId) -> list[Listener]:
        """Return the listeners of a session that have been seen."""
        listeners = self._hosts[session.host].listeners.values()
        return [one for one in listeners if one.session == session]

    def sockets(self, host: str) -> Sockets:
        """Return the listening sockets of a host."""
        return self._hosts[host].sockets

    def clear_queues(self, session: SessionId) -> None:
        """Forget the queues of a session's listeners: nobody observes them any more."""
        for listener in self.seen(session):
            self._close(listener)
        if not len(self.sockets(session.host)):
            self.sockets(session.host).forget_closed()

    def copying(self) -> Generator[None, None, ListenerTable]:
        """Make a copy that stays as it is, for another thread to read.

        Yields:
            After each listener.
        """
        result = ListenerTable()
        result._watches = self._watches.copy()
        for host, known in [*self._hosts.items()]:
            for listener in [*known.listeners.values()]:
                if listener.session in result._watches:
                    result._hosts[host].listeners[listener.identity] = listener.copy()
                yield
        return result

    def is_watched(self, session: SessionId) -> bool:
        """Tell whether there is a watch of a session."""
        return session in self._watches

    def session_capabilities(self, session: SessionId) -> Capabilities:
        """Return which series a session can fill."""
        return self._watches[session].capabilities

    def capabilities(self, listener: Listener) -> Capabilities:
        """Return which series the listener's session can fill."""
        return self._watches[listener.session].capabilities

    def own_place(self, session: SessionId) -> str:
        """Return the name of the host's own place, as the session's program has it."""
        return self._watches[session].capabilities.own_place

    def name(self, listener: Listener) -> str:
        """Return the name that the configuration gives the listener, or an empty one."""
        ports = self._watches[listener.session].ports
        return ports.get(listener.identity.port, "") if ports else ""

    def __iter__(self) -> Iterator[Listener]:
        """Iterate over all listeners; a configured port not seen yet is one with all zeroes."""
        listeners = [*chain(*(host.listeners.values() for host in self._hosts.values()))]
        yield from listeners
        seen = {(one.identity.host, one.identity.port) for one in listeners}
        for session, watch in self._watches.items():
            for port in watch.ports or ():
                if (session.host, port) not in seen:
                    yield Listener(
                        Identity(session.host, watch.capabilities.own_place, "*", port), session
                    )

    def __contains__(self, identity: object) -> bool:
        """Tell whether a listener has been seen and not been forgotten."""
        return any(identity in host.listeners for host in self._hosts.values())

    def __len__(self) -> int:
        """Return the number of listeners that have been seen."""
        return sum(len(host.listeners) for host in self._hosts.values())

    def _make_room(self, host: _Host, place: str) -> None:
        """Let closed listeners go until there is room for one more, perhaps in a new place."""
        idle = host.sockets.idle
        while place not in host.places and len(host.places) >= host.limits.places:
            # Few at a time, so that it costs no more the more listeners there are.
            for identity in [*islice(idle, _LOOKS)]:
                del idle[identity]
                known = host.places.get(identity.place)
                if known and self._is_spare_place(host, known):
                    self._end(host, known)
                    break
                if identity in host.listeners:
                    idle[identity] = None
            else:
                raise LimitError("places")
        while len(host.listeners) >= host.limits.listeners:
            if not idle:
                raise LimitError("listeners")
            identity, _ = idle.popitem(last=False)
            listener = host.listeners.get(identity)
            if listener is not None and self._is_spare(listener):
                self._forget(listener)

    def _is_spare_place(self, host: _Host, place: _Place) -> bool:
        busy = host.listeners.get(place.busy) if place.busy else None
        if busy is None or self._is_spare(busy):
            # Of thousands the last may be the only one that is not.
            busy = next(
                (
                    host.listeners[one]
                    for one in place.identities
                    if not self._is_spare(host.listeners[one])
                ),
                None,
            )
        place.busy = busy.identity if busy else None
        return busy is None

    def _is_spare(self, listener: Listener) -> bool:
        watch = self._watches[listener.session]
        is_configured = (
            watch.ports is not None and listener.identity.place == watch.capabilities.own_place
        )
        return not listener.sockets and not is_configured

    def _end(self, host: _Host, place: _Place) -> None:
        for identity in [*place.identities]:
            self._forget(host.listeners[identity])

    def _forget(self, listener: Listener) -> None:
        identity = listener.identity
        host = self._hosts[identity.host]
        for socket in [*listener.sockets]:
            host.sockets.forget(socket)
        del host.listeners[identity]
        host.sockets.idle.pop(identity, None)
        place = host.places[identity.place]
        place.identities.remove(identity)
        if not place.identities:
            del host.places[identity.place]

    def _close(self, listener: Listener) -> None:
        """Forget a listener's sockets."""
        sockets = self._hosts[listener.identity.host].sockets
        for socket in [*listener.sockets]:
            sockets.forget(socket)
        listener.sockets.clear()
        self.idle(listener)


def _fullness(queues: Queues) -> tuple[float, int]:
    return (queues.q or 0) / max(queues.q_limit or 0, 1), queues.q0 or 0
