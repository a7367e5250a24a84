"""The heartbeat of a session: whether its rows come, and whether they come in time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

Beat = int | None
"""None when the session is ready, after that the time of a heartbeat, in nanoseconds of the
monotonic clock of its host."""

START_SECONDS = 180.0
"""How long a session may take to become ready, in seconds."""
SLICE = 1.0
"""The longest time between two calls of Heartbeat.look(), in seconds."""


class Heartbeat:
    """Watches the heartbeat of one run of a session.

    It compares the clock of the session's host with ours. Their difference means nothing; by as
    much as it grows, the rows are late.

    Args:
        patience: for how many seconds the session may be silent, and how late rows may be.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._silent = 0.0
        self._looked = time.monotonic()
        self._least = math.inf

    def look(self, beats: Iterable[Beat], *, is_up: bool) -> str:
        """Return what did not come in time, or an empty string.

        Args:
            beats: the heartbeats since the last call.
            is_up: whether the session is ready.
        """
        # If more time has passed, it was this process that did not run: the session was not silent
        # for all of it. Rows without a heartbeat count as silence.
        now = time.monotonic()
        self._silent += min(now - self._looked, 2 * SLICE)
        self._looked = now
        for beat in beats:
            self._silent = 0.0
            if beat is not None and (late := self._lateness(beat)) > self._patience:
                return f"rows come {late:.0f} s late"
        if self._silent > (self._patience if is_up else START_SECONDS):
            return (
                f"no heartbeat for {self._patience:g} s"
                if is_up
                else f"not ready after {START_SECONDS:g} s"
            )
        return ""

    def _lateness(self, beat: int) -> float:
        """Return how late a heartbeat is, in seconds, compared with the fastest one so far."""
        age = time.monotonic() - beat / 1e9
        self._least = min(self._least, age)
        return age - self._least
