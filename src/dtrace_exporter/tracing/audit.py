"""The kernel's own counts against the listeners' counters: what the latter lack is told."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path

from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.listeners import Identity, ListenerTable, SessionId

KINDS = {"drops": ("TcpExt", "ListenDrops"), "established": ("Tcp", "PassiveOpens")}
"""What is compared, and the kernel's counter of it; include/uapi/linux/snmp.h."""

_FILES = (Path("/proc/self/net/snmp"), Path("/proc/self/net/netstat"))
_QUIET = 3
_MOST_SEEN = 100_000


def totals() -> dict[str, int]:
    """Read the kernel's totals, by kind, of this process's network namespace.

    Raises:
        OSError: there are none.
    """
    found: dict[tuple[str, str], int] = {}
    try:
        for path in _FILES:
            lines = path.read_text().splitlines()
            for names, values in zip(lines[::2], lines[1::2], strict=True):
                group, _, words = names.partition(":")
                numbers = map(int, values.split()[1:])
                found |= {
                    (group, name): value for name, value in zip(words.split(), numbers, strict=True)
                }
        return {kind: found[counter] for kind, counter in KINDS.items()}
    except (KeyError, ValueError) as error:
        raise OSError(f"the kernel's totals are not where they were: {error}") from None


class Audit:
    """Compares one of the kernel's counts, from one start of a session to its end.

    The two are not read at the same moment, so they are compared only when neither has changed for
    some ticks. The first such comparison tells what lies before the session.

    Args:
        before: how many more the kernel had counted before the session, where that is known.
    """

    def __init__(self, before: int | None = None) -> None:
        self._last: tuple[int, int] | None = None
        self._quiet = 0
        self._before = before
        self._told = 0

    def look(self, kernel: int, ours: int) -> int | None:
        """Return how many more our counters lack than at the last look.

        Args:
            kernel: the kernel's count.
            ours: that of the listeners' counters.

        Returns:
            None as long as that cannot be told.
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
    """The totals of a network namespace, against the sums of all of its listeners."""

    def __init__(self) -> None:
        self._audits = {kind: Audit() for kind in KINDS}

    def look(self, kernel: Mapping[str, int], ours: Mapping[str, int]) -> dict[str, int]:
        """Return by kind how many more are missing now, where that can be told."""
        found = {kind: one.look(kernel[kind], ours[kind]) for kind, one in self._audits.items()}
        return {kind: more for kind, more in found.items() if more is not None}


class DropAudits:
    """The drops of each listener, by its sockets' ``sk_drops``, which sock_diag tells.

    Of a socket that listens since the session is up all drops have to be counted. What one that was
    there before had dropped until then is not known.
    """

    def __init__(self) -> None:
        self._audits: dict[Identity, tuple[frozenset[int], Audit]] = {}
        self._seen: dict[int, None] = {}
        self._looks = 0
        self._ours: Mapping[Identity, int] = {}

    def look(
        self, kernel: Mapping[Identity, list[ListeningSocket]], ours: Mapping[Identity, int]
    ) -> Generator[None, None, int | None]:
        """Return how many more drops the listeners' counters lack than at the last look.

        Args:
            kernel: the sockets that listen now, by their listener.
            ours: the drops that are counted, by listener; none of one that is not known yet.

        Yields:
            Before each listener.

        Returns:
            None as long as that cannot be told.
        """
        # The kernel's answer may lack a socket now and then, so one of them does not tell all.
        is_first = self._looks < _QUIET
        self._looks += 1
        told = []
        audits = {}
        for identity, those in kernel.items():
            yield
            if any(one.drops is None for one in those):
                continue
            sockets = frozenset(one.socket for one in those)
            known, audit = self._audits.get(identity, (None, Audit()))
            if sockets != known and not is_first and self._seen.keys().isdisjoint(sockets):
                audit = Audit(before=-self._ours.get(identity, 0))
            elif sockets != known:
                audit = Audit()
            audits[identity] = sockets, audit
            told.append(audit.look(sum(one.drops or 0 for one in those), ours.get(identity, 0)))
        self._audits, self._ours = audits, ours
        for those in kernel.values():
            yield
            self._seen |= dict.fromkeys(one.socket for one in those)
        for old in [*self._seen][:-_MOST_SEEN]:
            del self._seen[old]
        certain = [more for more in told if more is not None]
        return sum(certain) if certain else None


class Audits:
    """All of them, of a session from one start to its end."""

    def __init__(self) -> None:
        self._totals = TotalAudits()
        self._drops = DropAudits()
        self._ticks = 0

    def look(
        self,
        table: ListenerTable,
        session: SessionId,
        sockets: Mapping[Identity, list[ListeningSocket]],
        totals: Mapping[str, int],
        ticks: int,
    ) -> Generator[None, None, dict[str, int]]:
        """Return by kind how many more are missing now, where that can be told.

        Args:
            table: where the listeners are.
            session: whose they are; one of all listeners is held against the totals, another one
                against the drops of its listeners' sockets.
            sockets: those that listen now in the host's own place, by listener.
            totals: as totals() gives them.
            ticks: how many heartbeats there were; without a new one there is nothing to compare.

        Yields:
            After each listener.
        """
        if ticks == self._ticks:
            return {}
        self._ticks = ticks
        own_place, ports = table.own_place(session), table.ports(session)
        established = 0
        drops: dict[Identity, int] = {}
        for one in table.seen(session):
            if one.identity.place == own_place:
                established += one.established
                drops[one.identity] = sum(one.drops.values())
            yield
        if ports is None:
            ours = {"drops": sum(drops.values()), "established": established}
            return self._totals.look(totals, ours)
        watched: dict[Identity, list[ListeningSocket]] = {}
        for identity, those in sockets.items():
            if identity.port in ports:
                watched[identity] = those
            yield
        more = yield from self._drops.look(watched, drops)
        return {} if more is None else {"drops": more}
