"""The source of Linux hosts without DTrace: the kernel's own numbers of listening sockets."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

from dtrace_exporter import inet_diag, kernel_totals
from dtrace_exporter.families import families
from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.limits import LimitError
from dtrace_exporter.listeners import Capabilities, Listener, ListenerTable, SessionId
from dtrace_exporter.log import fields
from dtrace_exporter.namespaces import Namespace
from dtrace_exporter.sockets import Queues

_log = logging.getLogger(__name__)

CAPABILITIES = Capabilities(
    q_capacity=families()["linux"].q_capacity,
    syns=False,
    reasons=("unknown",),
    established=False,
    accepts=False,
    accept_wait=False,
    handshake=False,
    synack_retransmits=False,
)
"""The series that this source fills. The kernel does not give the reason of drops."""

_MOST_COUNTED = 100_000
_HALF_OPEN_SECONDS = 2.0
"""After so much processor time no more namespaces are searched for half-open connections."""


class Reading(NamedTuple):
    """What the kernel says about one network namespace.

    Attributes:
        samples: as inet_diag.listeners() returns them.
        half_open: as inet_diag.half_open() returns it; None if it is not known.
        place: as for ListenerTable.listener().
        cookie: as for ListenerTable.listener().
        dropped: how many connections all of its listeners had dropped before and after the samples
            were taken, None if not known.
    """

    samples: list[ListeningSocket]
    half_open: Counter[tuple[str, int]] | None
    place: str = ""
    cookie: int | None = None
    dropped: tuple[int, int] | None = None


def read(others: Iterable[Namespace], known: Mapping[str, set[int]]) -> list[Reading]:
    """Read what the kernel says about this network namespace and others; it blocks.

    For half-open connections the kernel searches the connections of all namespaces, each time. Any
    user may have many of both. So the last of the others may lack these.

    Args:
        others: the others. Those that cannot be read are left out.
        known: the sockets that were open at the last reading, by place.

    Raises:
        OSError: this network namespace cannot be read.
    """
    before = _dropped()
    own = Reading(inet_diag.listeners(known.get("", ())), inet_diag.half_open())
    readings = [own._replace(dropped=_between(before, _dropped()))]
    searched, left_out = 0.0, 0
    for place, cookie, netlink, netstat in others:
        before = None if netstat is None else _dropped(netstat)
        try:
            samples = inet_diag.listeners(known.get(place, ()), netlink)
            half_open: Counter[tuple[str, int]] | None = Counter()
            if samples and searched < _HALF_OPEN_SECONDS:
                began = time.thread_time()
                half_open = inet_diag.half_open(netlink)
                searched += time.thread_time() - began
            elif samples:
                half_open = None
                left_out += 1
        except OSError as error:
            _log.warning("network namespace not read", extra=fields(netns=place, why=str(error)))
            continue
        after = None if netstat is None else _dropped(netstat)
        readings.append(Reading(samples, half_open, place, cookie, _between(before, after)))
    if left_out:
        _log.warning("Q0 of network namespaces left out", extra=fields(namespaces=left_out))
    return readings


def queues(others: Iterable[Namespace]) -> Iterator[tuple[str, ListeningSocket]]:
    """Read the queues of this network namespace and of others, with their places; it blocks.

    Args:
        others: as for read().

    Raises:
        OSError: this network namespace cannot be read.
    """
    yield from (("", socket) for socket in inet_diag.queues())
    for place, _, netlink, _ in others:
        # The next scrape gets the same error, and logs it.
        with suppress(OSError):
            yield from ((place, socket) for socket in inet_diag.queues(netlink))


def _dropped(netstat: int | None = None) -> int | None:
    try:
        return kernel_totals.dropped(netstat)
    except OSError:
        return None


def _between(before: int | None, after: int | None) -> tuple[int, int] | None:
    return None if before is None or after is None else (before, after)


class SockDiagSource:
    """Fills the listener table from sock_diag, or from another source with the same readings.

    Keep it as long as the table, because it knows which drops of a socket are counted already. It
    remembers this for sockets that are gone as well: the kernel's answer may only have missed them.

    Args:
        counted: whether another source has counted the drops until the first update.
    """

    def __init__(self, *, counted: bool = False) -> None:
        self.open: dict[str, set[int]] = {}
        """The sockets that were open at the last update, by place."""
        # The listener, how much its socket has discarded, and how much the namespace had dropped.
        self._counted: dict[tuple[str, int | None, int], tuple[Listener, int, int]] = {}
        self._dropped: dict[tuple[str, int | None], int] = {}
        self._by_another = counted
        self._refused = ""

    def update(
        self,
        table: ListenerTable,
        session: SessionId,
        readings: list[Reading],
    ) -> Generator[None, None, None]:
        """Update the listeners of the table, and remove the queues of sockets that are gone.

        When a socket is first seen, all of its drops since it was opened are counted. If another
        source has counted until then, the drops of the first update are not counted. ``ss -lntm``
        shows the same number or a higher one: a socket discards other segments as well, such as the
        first ACK of each connection with TCP_DEFER_ACCEPT (net/ipv4/tcp_ipv4.c, tcp_v4_rcv()). If
        it is known how many connections the namespace has dropped meanwhile, no more are counted.

        A half-open connection belongs to the listener of its address, else to that of the wildcard.
        If this listener has several sockets, the kernel does not say which one it belongs to, so
        each of them gets the total.

        Args:
            table: the table. The update ends if its watch of the session is removed meanwhile.
            session: the session of the listeners.
            readings: as read() returns them.

        Yields:
            Before each socket, and often besides.
        """
        open_now = set()
        open_: dict[str, set[int]] = {}
        q0 = Counter[tuple[str, str, int]]()
        for samples, half_open, place, *_ in readings:
            bound = set()
            for sample in samples:
                yield
                open_now.add((place, sample.address, sample.port, sample.socket))
                bound.add((sample.address, sample.port))
            open_[place] = {sample.socket for sample in samples}
            for (address, port), count in (half_open or {}).items():
                yield
                q0[place, address if (address, port) in bound else "*", port] += count
        earlier, self.open = self.open, open_
        held = 0
        for listener in table.seen(session):
            yield
            for key in [*listener.sockets]:
                if (*listener.identity[1:], key) not in open_now:
                    del listener.sockets[key]
                    listener.closed = time.monotonic()
            held += len(listener.sockets)
            if not listener.sockets and listener.identity in table:
                table.idle(listener)
        refused = ""
        for reading in readings:
            samples, half_open, place, cookie, _ = reading
            for sample in samples:
                yield
                if not table.is_watched(session):
                    return
                address, port = sample.address, sample.port
                if not table.watches(session, place, address, port):
                    continue
                try:
                    listener = table.listener(session, place, address, port, cookie)
                except LimitError as error:
                    refused = str(error)
                    continue
                listener.closed = None
                is_new = sample.socket not in earlier.get(place, ())
                self._count_drops(listener, sample, reading, is_new=is_new)
                if sample.socket not in listener.sockets:
                    if held >= table.limits(session.host).sockets:
                        refused = str(LimitError("sockets"))
                        continue
                    held += 1
                in_q0 = None if half_open is None else q0[place, address, port]
                listener.sockets[sample.socket] = Queues(in_q0, sample.q, None, sample.qmax)
        self._by_another = False
        self._dropped = {(one.place, one.cookie): one.dropped[0] for one in readings if one.dropped}
        while len(self._counted) > max(_MOST_COUNTED, len(open_now)):
            del self._counted[next(iter(self._counted))]
        if refused and not self._refused:
            _log.warning("listeners left out", extra=fields(why=refused))
        self._refused = refused

    def forget(self, table: ListenerTable) -> Generator[None, None, None]:
        """Drop the references to listeners that the table has forgotten.

        Yields:
            Before each socket.
        """
        for key, counted in [*self._counted.items()]:
            yield
            if table.get(counted[0].identity) is not counted[0]:
                self._counted.pop(key, None)

    def _count_drops(
        self, listener: Listener, sample: ListeningSocket, reading: Reading, *, is_new: bool
    ) -> None:
        if sample.drops is None:
            return
        key = reading.place, reading.cookie, sample.socket
        # For an older socket that was not watched, all drops since it was opened count.
        begun = self._dropped.get((reading.place, reading.cookie), 0) if is_new else 0
        # The newest entries are last, so the socket that was missing for longest is dropped first.
        owner, before, begun = self._counted.pop(key, (listener, 0, begun))
        if owner is not listener:
            # The table has forgotten the listener and made a new one: count from the start.
            before = begun = 0
        # The kernel's count has 32 bits and wraps; it is never reset.
        increase = (sample.drops - before) % (1 << 32)
        since, now = reading.dropped or (0, begun + increase)
        if not self._by_another:
            listener.drop("unknown", min(increase, now - begun))
        self._counted[key] = listener, sample.drops, since
