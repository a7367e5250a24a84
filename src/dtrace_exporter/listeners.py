"""The listener table: the counters of each listener, and its queues as last observed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from math import inf
from typing import NamedTuple

from dtrace_exporter.limits import LimitError, Limits
from dtrace_exporter.sockets import MORE_THAN, UNKNOWN, Acceptors, QCapacity, Queues, Sockets
from dtrace_exporter.unix_drops import UnixDrops
from dtrace_exporter.watched import Watched

SYN_BUCKETS = 12
"""The number of buckets of Q/Qmax at a SYN: 0, up to 0.1, ... up to 1, above 1."""

WAIT_BUCKETS = 14
"""The number of buckets of a handshake's time and the time in Q: 4^5 ns, ... 4^17 ns, above."""

MOST_REFUSED_PORTS = 100
"""So many ports where nobody listens are counted each by itself: a scan comes to all of them."""
OTHER_PORTS = "other"
"""How all others of them are called."""


_MOST_LIMITS = 32
"""For how many different values of a listener's Qmax a sum is kept."""

_MOST_NAMES = 8

_ID, _SHORT = 64, 12
"""The length of a container's id, and how much of it is shown to people, as Docker does."""

_LOOKS = 16
"""How many closed listeners are examined to find a place that may be forgotten."""


def syn_bucket(q: int, qmax: int) -> int:
    """Return the number of the bucket that Q/Qmax is in."""
    return min(-(-10 * q // max(qmax, 1)), SYN_BUCKETS - 1)


class SessionId(NamedTuple):
    """A session's name, unique on its host; ``host`` is empty for the local one."""

    host: str
    name: str


class Identity(NamedTuple):
    """The identity of a listener.

    Attributes:
        host: the host's name, empty for the local one.
        place: a zone's or jail's name, or the inode of a network namespace; for the host's own
            place what Capabilities.own_place says.
        address: the address that it is bound to, ``*`` for the wildcard.
        port: its TCP port.
    """

    host: str
    place: str
    address: str
    port: int


def printable(name: str) -> str:
    """Return a name without control characters. Any user can choose the name of a program."""
    if name.isprintable():
        return name
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in name)


def joined(names: Iterable[str]) -> str:
    """Return several names as one text, in alphabetical order; if there are many, the first."""
    known = sorted({*map(printable, names)} - {""})
    return ",".join(known[:_MOST_NAMES] + ["..."] * (len(known) > _MOST_NAMES))


class Owner(NamedTuple):
    """The owner of a listener, as far as it is known. Several names of a kind are joined by commas.

    Attributes:
        program: the names of the processes that have it open, or that accept.
        unit: the systemd unit.
        container: the id of the container or pod.
        fmri: the service on Solaris and illumos.
        place_name: a name for its place, if the label of the place is only a number.
    """

    program: str = ""
    unit: str = ""
    container: str = ""
    fmri: str = ""
    place_name: str = ""

    def __str__(self) -> str:
        """Return a text for people: the program, and its service, container or unit."""
        ids = (each[:_SHORT] if len(each) == _ID else each for each in self.container.split(","))
        whose = self.fmri or (f"container {','.join(ids)}" if self.container else self.unit)
        return f"{self.program} ({whose})" if self.program and whose else self.program or whose


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Which series the source of a listener's numbers can fill; the others are not exported.

    Attributes:
        place_label: the label of a listener's place.
        own_place: the value of this label for the host's own place.
        q_capacity: how many connections Q can hold.
        syns: whether SYNs are counted.
        reasons: the reasons of the drops that are counted; empty if none are.
        opened: whether all that enters Q0 is counted.
        established: whether all that enters Q is counted.
        handshake: whether the time of handshakes is measured.
        departures: whether all that leaves Q0 or Q is counted.
        accepts: whether accepts are counted.
        accept_wait: whether the time in Q is measured.
        synack_retransmits: whether SYN-ACKs that are sent again are counted.
        sampled: whether Q is sampled between scrapes.
    """

    place_label: str = "netns"
    own_place: str = ""
    q_capacity: QCapacity = MORE_THAN
    syns: bool = True
    reasons: tuple[str, ...] = ()
    opened: bool = True
    established: bool = True
    handshake: bool = True
    departures: bool = True
    accepts: bool = True
    accept_wait: bool = True
    synack_retransmits: bool = True
    sampled: bool = False


@dataclass(slots=True)
class Listener:
    """The counters of one listener, and the queues of each of its open sockets.

    ``closed`` is when the last socket was seen to close, in seconds of the monotonic clock; None if
    one is open, or if this is not known.
    """

    identity: Identity
    session: SessionId
    syns: int = 0
    drops: dict[str, int] = field(default_factory=dict)
    established: int = 0
    handshakes: list[int] = field(default_factory=lambda: [0] * WAIT_BUCKETS)
    handshake_ns: int = 0
    accepts: int = 0
    synack_retransmits: int = 0
    saturation: list[int] = field(default_factory=lambda: [0] * SYN_BUCKETS)
    q_sums: dict[int, int] = field(default_factory=dict)
    waits: list[int] = field(default_factory=lambda: [0] * WAIT_BUCKETS)
    wait_ns: int = 0
    sockets: dict[int, Queues] = field(default_factory=dict)
    acceptors: dict[int, Acceptors] = field(default_factory=dict)
    older_sum: float = 0.0
    q_capacity: QCapacity = MORE_THAN
    sampled: list[int] = field(default_factory=list)
    sampled_sum: float = 0.0
    closed: float | None = field(default=None, compare=False)

    @property
    def saturation_sum(self) -> float:
        """Sum of Q/Qmax over all SYNs. A Qmax of 0, which admits one connection, counts as 1."""
        return self.older_sum + sum(total / max(qmax, 1) for qmax, total in self.q_sums.items())

    @property
    def queues(self) -> Queues | None:
        """The queues of the fullest open socket, None if none are known."""
        known = (queues for queues in self.sockets.values() if queues != UNKNOWN)
        return max(known, key=self._fullness, default=None)

    @property
    def owner(self) -> Owner | None:
        """The owner, according to who accepts; None if nobody was seen to accept."""
        names = {name for each in self.acceptors.values() for name in each}
        if not names:
            return None
        program, fmri = (
            joined(name for of, name in names if of == kind) for kind in ("program", "fmri")
        )
        return Owner(program, fmri=fmri)

    @property
    def fullness(self) -> float | None:
        """How full Q is, from 0 to 1 (full) or more; None if not known."""
        queues = self.queues
        if queues is None or queues.q is None or queues.q_limit is None:
            return None
        return queues.q / self.q_capacity.of(queues.q_limit)

    def _fullness(self, queues: Queues) -> tuple[float, int]:
        return (queues.q or 0) / self.q_capacity.of(queues.q_limit or 0), queues.q0 or 0

    def copy(self) -> Listener:
        """Return a copy that shares nothing that changes."""
        return replace(
            self,
            drops=self.drops.copy(),
            handshakes=self.handshakes.copy(),
            saturation=self.saturation.copy(),
            q_sums=self.q_sums.copy(),
            waits=self.waits.copy(),
            sampled=self.sampled.copy(),
            sockets=self.sockets.copy(),
            acceptors=self.acceptors.copy(),
        )

    def count_syns(self, bucket: int, qmax: int, count: int, total: int) -> None:
        """Add ``count`` SYNs that found Q/Qmax in a bucket; ``total`` is the sum of their Q."""
        self.syns += count
        self.saturation[bucket] += count
        if qmax not in self.q_sums and len(self.q_sums) >= _MOST_LIMITS:
            first = next(iter(self.q_sums))
            self.older_sum += self.q_sums.pop(first) / max(first, 1)
        self.q_sums[qmax] = self.q_sums.get(qmax, 0) + total

    def sample(self, q: int, qmax: int) -> None:
        """Add a sample of Q and Qmax."""
        if not self.sampled:
            self.sampled = [0] * SYN_BUCKETS
        self.sampled[syn_bucket(q, qmax)] += 1
        self.sampled_sum += q / max(qmax, 1)

    def count_established(self, bucket: int | None, count: int, nanoseconds: int) -> None:
        """Add completed handshakes.

        Args:
            bucket: the bucket of the time that they took, None if it was not measured.
            count: how many.
            nanoseconds: the sum of these times.
        """
        self.established += count
        if bucket is not None:
            self.handshakes[bucket] += count
            self.handshake_ns += nanoseconds

    def count_accepts(self, bucket: int | None, count: int, nanoseconds: int) -> None:
        """Add accepts.

        Args:
            bucket: the bucket of their time in Q, None if it was not measured.
            count: how many.
            nanoseconds: the sum of their times in Q.
        """
        self.accepts += count
        if bucket is not None:
            self.waits[bucket] += count
            self.wait_ns += nanoseconds

    def drops_by(self, reasons: Iterable[str]) -> dict[str, int]:
        """Return the drops by these reasons, and by others that have been counted.

        A source that was used before may have had other reasons. Without them the sum would fall.
        """
        counted = {reason: count for reason, count in self.drops.items() if count}
        return dict.fromkeys(reasons, 0) | counted

    def drop(self, reason: str | None, count: int) -> None:
        """Add ``count`` drops; without a reason, do nothing."""
        if reason is not None:
            self.drops[reason] = self.drops.get(reason, 0) + count


@dataclass(slots=True)
class _Watch:
    watched: Watched
    capabilities: Capabilities


@dataclass(slots=True)
class _Place:
    """A place that has listeners.

    ``cookie`` differs for each use of the place's name, None if unknown. ``busy`` is a listener
    that could not be forgotten at the last attempt.
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
        self.forgotten = Counter[str]()
        self.refused = {OTHER_PORTS: 0}


class ListenerTable:
    """All listeners of all sessions.

    A listener that has closed keeps its counters, and goes on counting if it comes back. If its
    host reaches the limit of listeners, the one that closed first is forgotten for a new one, but
    never a configured one of the host's own place.

    Attributes:
        unix_drops: what this host's UNIX sockets have refused.
    """

    def __init__(self) -> None:
        self.unix_drops = UnixDrops()
        self._watches: dict[SessionId, _Watch] = {}
        self._hosts = defaultdict[str, _Host](_Host)

    def limit(self, host: str, limits: Limits) -> None:
        """Set the limits of a host."""
        self._hosts[host].limits = limits
        self._hosts[host].sockets.most = limits.sockets
        if not host:
            self.unix_drops.most = limits.listeners

    def limits(self, host: str) -> Limits:
        """Return the limits of a host."""
        return self._hosts[host].limits

    def watch(
        self,
        session: SessionId,
        watched: Watched,
        capabilities: Capabilities | None = None,
    ) -> None:
        """Set which listeners a session watches. It takes them over from the host's other sessions.

        Args:
            session: the session.
            watched: the listeners.
            capabilities: which series the session can fill; None changes nothing.
        """
        known = self._watches.get(session)
        if capabilities is None:
            capabilities = known.capabilities if known else Capabilities()
        self._watches[session] = _Watch(watched, capabilities)
        for listener in [*self._hosts[session.host].listeners.values()]:
            if watched.find(*listener.identity[1:]):
                listener.q_capacity = capabilities.q_capacity
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

    def watched(self, session: SessionId) -> Watched:
        """Return which listeners a session watches."""
        return self._watches[session].watched

    def watches(self, session: SessionId, place: str, address: str, port: int) -> bool:
        """Return whether a session watches a listener."""
        return self._watches[session].watched.find(place, address, port) is not None

    def listener(
        self, session: SessionId, place: str, address: str, port: int, cookie: int | None = None
    ) -> Listener:
        """Return a listener; it is added if it is not known yet.

        Args:
            session: the session that has seen it.
            place: its place.
            address: the address that it is bound to.
            port: its TCP port.
            cookie: a number that differs for each use of the place's name, if known. If it has
                changed, all listeners of the place are forgotten. The kernel reuses the inodes of
                network namespaces, and a new container must not go on with the counters of an old
                one. It does not reuse cookies: ``net_cookie`` of its struct net.

        Raises:
            LimitError: it is new, and its host has reached the limit of listeners or places.
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
            capacity = self._watches[session].capabilities.q_capacity
            listener = Listener(identity, session, q_capacity=capacity)
            host.listeners[identity] = listener
            host.places.setdefault(place, _Place(cookie)).identities.add(identity)
            self.idle(listener)
        return listener

    def idle(self, listener: Listener) -> None:
        """Record that a listener has no open socket, so that it may be forgotten for a new one."""
        self._hosts[listener.identity.host].sockets.idle.setdefault(listener.identity)

    def seen(self, session: SessionId) -> list[Listener]:
        """Return the listeners that a session has seen."""
        listeners = self._hosts[session.host].listeners.values()
        return [one for one in listeners if one.session == session]

    def get(self, identity: Identity) -> Listener | None:
        """Return a listener, None if it has not been seen or has been forgotten."""
        host = self._hosts.get(identity.host)
        return host.listeners.get(identity) if host else None

    def forgotten(self, host: str) -> Mapping[str, int]:
        """Return the sums of ``drops`` and ``established`` of a host's forgotten listeners.

        Only those of its own place count.
        """
        return self._hosts[host].forgotten

    def refuse(self, host: str, port: int | None, count: int) -> None:
        """Count SYNs to a port of a host's own place where nobody listened.

        Args:
            host: the host's name.
            port: the port, or None for some of several.
            count: how many.
        """
        refused = self._hosts[host].refused
        name = OTHER_PORTS if port is None else str(port)
        if name not in refused and len(refused) > MOST_REFUSED_PORTS:
            name = OTHER_PORTS
        refused[name] = refused.get(name, 0) + count

    def refused(self, host: str) -> Mapping[str, int]:
        """Return how many SYNs a host's own place has refused as nobody listened, by port."""
        return self._hosts[host].refused

    def forget_closed(self, before: float) -> Generator[None, None, int]:
        """Forget listeners that closed before a time, but not configured ones.

        Args:
            before: the time, in seconds of the monotonic clock.

        Yields:
            Before each listener.

        Returns:
            How many were forgotten.
        """
        count = 0
        for listener in [*chain(*(host.listeners.values() for host in self._hosts.values()))]:
            yield
            if (
                listener.closed is not None
                and listener.closed < before
                and self.get(listener.identity) is listener
                and self._is_spare(listener)
            ):
                self._forget(listener)
                count += 1
        return count

    def sockets(self, host: str) -> Sockets:
        """Return the listening sockets of a host."""
        return self._hosts[host].sockets

    def clear_queues(self, session: SessionId) -> None:
        """Forget the queues of a session's listeners, because nobody observes them any more."""
        for listener in self.seen(session):
            self._close(listener)
        if not len(self.sockets(session.host)):
            self.sockets(session.host).forget_closed()

    def lose_sight(self, host: str) -> None:
        """Forget the queues of all listeners of a host, because closes are not seen any more.

        They are taken from new observations once ``sockets(host).since`` is set, if these are
        newer than it.
        """
        for listener in self._hosts[host].listeners.values():
            self._close(listener)
        self._hosts[host].sockets.forget_listens()
        self._hosts[host].sockets.since = inf

    def copying(self) -> Generator[None, None, ListenerTable]:
        """Make a copy that another thread can read.

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
        """Return whether watch() has been called for a session."""
        return session in self._watches

    def session_capabilities(self, session: SessionId) -> Capabilities:
        """Return which series a session can fill."""
        return self._watches[session].capabilities

    def capabilities(self, listener: Listener) -> Capabilities:
        """Return which series a listener's session can fill."""
        return self._watches[listener.session].capabilities

    def own_place(self, session: SessionId) -> str:
        """Return the name of the host's own place, as a session's program prints it."""
        return self._watches[session].capabilities.own_place

    def name(self, listener: Listener) -> str:
        """Return the name that the configuration gives to a listener, or an empty string."""
        entry = self._watches[listener.session].watched.find(*listener.identity[1:])
        return entry.name if entry else ""

    def has_histograms(self, listener: Listener) -> bool:
        """Return whether the configuration asks for a listener's histograms."""
        entry = self._watches[listener.session].watched.find(*listener.identity[1:])
        return entry is None or entry.histograms

    def __iter__(self) -> Iterator[Listener]:
        """Iterate over all listeners. Expected ones that have not been seen have zeroes only."""
        seen = set()
        for listener in [*chain(*(host.listeners.values() for host in self._hosts.values()))]:
            yield listener
            if known := self._watches.get(listener.session):
                entry = known.watched.find(*listener.identity[1:])
                seen.add((listener.session, id(entry), listener.identity.port))
        for session, watch in [*self._watches.items()]:
            for entry, where in watch.watched.expected(watch.capabilities.own_place):
                identity = Identity(session.host, *where)
                if (session, id(entry), identity.port) not in seen:
                    yield Listener(identity, session)

    def __contains__(self, identity: object) -> bool:
        """Return whether a listener has been seen and not been forgotten."""
        return any(identity in host.listeners for host in self._hosts.values())

    def __len__(self) -> int:
        """Return the number of listeners that have been seen and not been forgotten."""
        return sum(len(host.listeners) for host in self._hosts.values())

    def _make_room(self, host: _Host, place: str) -> None:
        """Forget closed listeners until one more can be added, perhaps in a new place."""
        idle = host.sockets.idle
        while place not in host.places and len(host.places) >= host.limits.places:
            # A bounded number, so that the cost does not grow with the listeners.
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
            # While closes are not seen, any of them may be open.
            if not idle or host.sockets.since == inf:
                raise LimitError("listeners")
            identity, _ = idle.popitem(last=False)
            listener = host.listeners.get(identity)
            if listener is not None and self._is_spare(listener):
                self._forget(listener)

    def _is_spare_place(self, host: _Host, place: _Place) -> bool:
        busy = host.listeners.get(place.busy) if place.busy else None
        if busy is None or self._is_spare(busy):
            # This may look at thousands, so the result is kept.
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
            listener.identity.place == watch.capabilities.own_place
            and watch.watched.is_expected(*listener.identity[1:])
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
        watch = self._watches.get(listener.session)
        if watch is not None and identity.place == watch.capabilities.own_place:
            host.forgotten["drops"] += sum(listener.drops.values())
            host.forgotten["established"] += listener.established
        del host.listeners[identity]
        host.sockets.idle.pop(identity, None)
        place = host.places[identity.place]
        place.identities.remove(identity)
        if not place.identities:
            del host.places[identity.place]

    def _close(self, listener: Listener) -> None:
        """Forget a listener's sockets. They may still be open."""
        closed = None if listener.sockets else listener.closed
        sockets = self._hosts[listener.identity.host].sockets
        for socket in [*listener.sockets]:
            sockets.forget(socket)
        listener.sockets.clear()
        listener.acceptors.clear()
        listener.closed = closed
        self.idle(listener)
