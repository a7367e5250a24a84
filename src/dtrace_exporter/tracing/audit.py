"""Compares the listeners' counters with the kernel's own, and reports what they lack."""

from __future__ import annotations

from collections.abc import Container, Generator, Mapping
from typing import NamedTuple

from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.kernel_totals import KINDS
from dtrace_exporter.limits import Limits
from dtrace_exporter.listeners import Identity, ListenerTable, SessionId
from dtrace_exporter.watched import Watched

_QUIET = 3


class Audit:
    """Compares one of the kernel's counts with ours, from the start of a session to its end.

    The two are not read at the same moment. So they are compared only after neither has changed for
    some ticks. The difference at the first comparison is from before the session.
    """

    def __init__(self) -> None:
        self._last: tuple[int, int] | None = None
        self._quiet = 0
        self._before: int | None = None
        self._told = 0

    def look(self, kernel: int, ours: int) -> int | None:
        """Return how many more events our counters lack than at the last call.

        Args:
            kernel: the kernel's count.
            ours: the sum of the listeners' counters.

        Returns:
            The number, or None while it is not known.
        """
        self._quiet = self._quiet + 1 if (kernel, ours) == self._last else 0
        self._last = kernel, ours
        if self._quiet >= _QUIET:
            if self._before is None:
                self._before = kernel - ours
            more = max(0, kernel - ours - self._before - self._told)
            self._told += more
            return more
        return None if self._before is None else 0


class TotalAudits:
    """Compares the totals of a network namespace with the sums over all of its listeners."""

    def __init__(self) -> None:
        self._audits = {kind: Audit() for kind in KINDS}

    def look(self, kernel: Mapping[str, int], ours: Mapping[str, int]) -> dict[str, int]:
        """Return by kind how many more events our counters lack, for the kinds that are known.

        Args:
            kernel: as kernel_totals.read() returns them.
            ours: the sums of the listeners' counters, by kind.
        """
        found = {kind: one.look(kernel[kind], ours[kind]) for kind, one in self._audits.items()}
        return {kind: more for kind, more in found.items() if more is not None}


class _Look(NamedTuple):
    """What there was at a look; ``discarded`` is the sum of ``sk_drops`` of all sockets.

    ``own`` has that sum and the counted drops of each listener that is compared.
    """

    dropped: int
    discarded: int
    sockets: set[int]
    own: dict[Identity, tuple[int, int]]


class DropAudit:
    """Compares the drops of some listeners with ``sk_drops`` of their sockets and ListenDrops.

    The kernel adds a dropped connection to both (include/net/tcp.h, tcp_listendrop()). It adds what
    a socket discards otherwise to ``sk_drops`` alone (net/ipv4/tcp_ipv4.c, tcp_v4_rcv()). So the
    sum of ``sk_drops`` of all sockets less ListenDrops is how many segments were no drops. If these
    listeners discarded all of them, the rest of what their counters lack is still missing; no more
    is returned. The drops of a socket that opens and closes between two calls are in ListenDrops
    alone.

    Args:
        most: with more sockets than these, nothing is known, because any user can open hundreds of
            thousands.
    """

    def __init__(self, most: int = Limits().sockets) -> None:
        self._most = most
        self._base: _Look | None = None
        self._last: _Look | None = None
        self._quiet = 0

    def look(
        self,
        kernel: Mapping[Identity, list[ListeningSocket]],
        watched: Container[Identity],
        dropped: int,
        ours: Mapping[Identity, int],
    ) -> Generator[None, None, int | None]:
        """Return how many more drops the listeners' counters lack than at the last call.

        Args:
            kernel: all sockets that listen in the network namespace, by their listener.
            watched: which of these listeners count.
            dropped: the namespace's ListenDrops, read after the sockets.
            ours: the drops that are counted, by listener.

        Yields:
            Before each listener.

        Returns:
            The number, or None while it is not known.
        """
        discarded = 0
        sockets: set[int] = set()
        own = {identity: (0, counted) for identity, counted in ours.items()}
        for identity, those in kernel.items():
            yield
            drops = 0
            for one in those:
                if one.drops is None:
                    return None
                drops += one.drops
                sockets.add(one.socket)
            if len(sockets) > self._most:
                self._base, self._last, self._quiet = None, None, 0
                return None
            discarded += drops
            if identity in watched:
                own[identity] = drops, ours.get(identity, 0)
        last = self._last
        now = self._last = _Look(dropped, discarded, sockets, own)
        if last and not (last.sockets <= sockets and last.own.keys() <= own.keys()):
            # Nobody knows what a socket discarded between the last look and its close.
            self._base = None
        same = last is not None and (last.dropped, last.own) == (dropped, own)
        self._quiet = self._quiet + 1 if same else 0
        more = 0
        if self._quiet >= _QUIET:
            if self._base:
                more = yield from _missing(self._base, now)
            self._base = now
        return None if self._base is None else more


def _missing(before: _Look, now: _Look) -> Generator[None, None, int]:
    """Return how many drops certainly are missing since an earlier look; yields at each listener.

    Each of the kernel's counts of a socket has 32 bits and goes round.
    """
    lacking = 0
    for identity, (discarded, counted) in now.own.items():
        yield
        had, knew = before.own.get(identity, (0, 0))
        lacking += max(0, (discarded - had) % (1 << 32) - (counted - knew))
    no_drops = (now.discarded - before.discarded) % (1 << 32) - (now.dropped - before.dropped)
    return max(0, lacking - max(0, no_drops))


class Audits:
    """All comparisons of a session, from a start to its end."""

    def __init__(self) -> None:
        self._totals = TotalAudits()
        self._drops = DropAudit()
        self._watched: Watched | None = None
        self._ticks = 0

    def look(
        self,
        table: ListenerTable,
        session: SessionId,
        sockets: Mapping[Identity, list[ListeningSocket]],
        totals: Mapping[str, int],
        ticks: int,
    ) -> Generator[None, None, dict[str, int]]:
        """Return by kind how many more events our counters lack, for the kinds that are known.

        Args:
            table: the table of listeners.
            session: the session. One of all listeners is compared with the totals, another one with
                the drops of its listeners' sockets and ListenDrops of the totals.
            sockets: the sockets that listen now in the host's own place, by listener.
            totals: as kernel_totals.read() returns them, read after the sockets.
            ticks: the number of heartbeats so far; without a new one nothing is compared.

        Yields:
            After each listener.
        """
        if ticks == self._ticks:
            return {}
        self._ticks = ticks
        own_place = table.own_place(session)
        established = 0
        drops: dict[Identity, int] = {}
        for one in table.seen(session):
            if one.identity.place == own_place:
                established += one.established
                drops[one.identity] = sum(one.drops.values())
            yield
        if table.watched(session).is_every:
            gone = table.forgotten(session.host)
            ours = {
                "drops": sum(drops.values()) + gone["drops"],
                "established": established + gone["established"],
            }
            return self._totals.look(totals, ours)
        watched = set()
        for identity in sockets:
            if table.watches(session, *identity[1:]):
                watched.add(identity)
            yield
        if self._watched is not table.watched(session):
            most = table.limits(session.host).sockets
            self._watched, self._drops = table.watched(session), DropAudit(most)
        more = yield from self._drops.look(sockets, watched, totals["drops"], drops)
        return {} if more is None else {"drops": more}
