"""The kernel's own totals against the listeners' counters: what the latter lack is told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

KINDS = {"drops": ("TcpExt", "ListenDrops"), "established": ("Tcp", "PassiveOpens")}
"""What is compared, and the kernel's counter of it; include/uapi/linux/snmp.h."""

_FILES = (Path("/proc/self/net/snmp"), Path("/proc/self/net/netstat"))
_QUIET = 3


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
    """Compares one total, from one start of a session to its end.

    The two are not read at the same moment, so they are compared only when neither has changed for
    some time. The first such comparison tells what lies before the session.
    """

    def __init__(self) -> None:
        self._last: tuple[int, int] | None = None
        self._quiet = 0
        self._before: int | None = None
        self._told = 0

    def look(self, kernel: int, ours: int) -> int | None:
        """Return how many more our counters lack than at the last look.

        Args:
            kernel: the kernel's total.
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


class Audits:
    """One of each kind."""

    def __init__(self) -> None:
        self._audits = {kind: Audit() for kind in KINDS}

    def look(self, kernel: Mapping[str, int], ours: Mapping[str, int]) -> dict[str, int]:
        """Return by kind how many more are missing now, where that can be told."""
        found = {kind: one.look(kernel[kind], ours[kind]) for kind, one in self._audits.items()}
        return {kind: more for kind, more in found.items() if more is not None}
