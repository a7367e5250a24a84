"""The heartbeat of a session: whether its rows come, and whether they come in time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from dtrace_exporter.tracing.rows import Ready, Tick

START_SECONDS = 180.0
SLICE = 1.0
"""So many seconds at most may lie between two looks, unless we did not run ourselves."""


class Heartbeat:
    """Looks at what one run of a session has told, slice by slice.

    How late rows are is told by two clocks: that their difference grows is all that it tells.

    Args:
        patience: for so many seconds it may say nothing, and so much later may rows come.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._silent = 0.0
        self._looked = time.monotonic()
        self._least = math.inf

    def look(self, records: Iterable[Ready | Tick], *, is_up: bool) -> str:
        """Return what it was that did not come in time, or an empty string.

        Args:
            records: what has come since the last look.
            is_up: whether the session has begun to tell.
        """
        # A slice that took longer was no silence: we did not run either. Rows without a heartbeat
        # among them are one.
        now = time.monotonic()
        self._silent += min(now - self._looked, 2 * SLICE)
        self._looked = now
        for record in records:
            self._silent = 0.0
            if isinstance(record, Tick) and (late := self._lateness(record)) > self._patience:
                return f"rows come {late:.0f} s late"
        if self._silent > (self._patience if is_up else START_SECONDS):
            return (
                f"no heartbeat for {self._patience:g} s"
                if is_up
                else f"not ready after {START_SECONDS:g} s"
            )
        return ""

    def _lateness(self, tick: Tick) -> float:
        """Return by how many seconds a heartbeat is later than the promptest has been."""
        age = time.monotonic() - tick.time / 1e9
        self._least = min(self._least, age)
        return age - self._least
