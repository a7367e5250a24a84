"""Counts the connect()s that UNIX sockets refuse because their queue is full, by path."""

from __future__ import annotations

import time
from collections.abc import Collection

from dtrace_exporter.limits import LimitError, Limits
from dtrace_exporter.watched import matches

PART = "unix_drops"
"""The optional part of a D program that counts them."""


class UnixDrops:
    """The refusals of this host's UNIX sockets whose paths are wanted.

    A path goes on counting when somebody listens there again, also while nobody reads it.

    Attributes:
        most: how many paths are counted at most. Beyond it a new one takes the place of the one
            that has been closed the longest.
    """

    def __init__(self) -> None:
        self.most = Limits().listeners
        self._wanted: Collection[str] = ()
        # By the cookie of the network namespace, which is never used again, and path.
        self._counts: dict[tuple[int, str], int] = {}
        self._closed: dict[tuple[int, str], float] = {}

    def want(self, patterns: Collection[str]) -> None:
        """Count what some patterns match from now on, as for watched.matches()."""
        self._wanted = patterns

    def count(self, cookie: int, path: str, events: int) -> None:
        """Add refusals of a path, if it is wanted.

        Args:
            cookie: the cookie of the network namespace.
            path: as unix_diag.written() returns it.
            events: how many.

        Raises:
            LimitError: it is new, and there are too many already.
        """
        where = cookie, path
        if where not in self._counts:
            if not matches(path, self._wanted):
                return
            self._make_room()
        self._counts[where] = self._counts.get(where, 0) + events

    def of(self, cookie: int, path: str) -> int:
        """Return how many connect()s have been refused at a path."""
        return self._counts.get((cookie, path), 0)

    def look(self, there: Collection[tuple[int, str]]) -> None:
        """Note where somebody listens now, of all that is wanted.

        Args:
            there: the cookies of network namespaces and the paths.
        """
        for where in self._counts:
            if where in there:
                self._closed.pop(where, None)
            else:
                self._closed.setdefault(where, time.monotonic())

    def forget_closed(self, before: float) -> None:
        """Forget paths at which nobody has listened since a time, in monotonic seconds."""
        for where in [where for where, closed in self._closed.items() if closed < before]:
            del self._closed[where], self._counts[where]

    def _make_room(self) -> None:
        while len(self._counts) >= self.most:
            first = next(iter(self._closed), None)
            if first is None:
                raise LimitError("listeners")
            del self._closed[first], self._counts[first]
