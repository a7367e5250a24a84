"""What each listener does in a second, from what it had counted when somebody looked before."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from dtrace_exporter.listeners import WAIT_BUCKETS, Capabilities, Identity, Listener, SessionId
from dtrace_exporter.state import State

WINDOW_SECONDS = 15.0
"""What rates are measured over, as soon as somebody has looked for that long."""

_LOOKS_APART = 1.0
_OLDEST_LOOK = 120.0


class Counts(NamedTuple):
    """What a listener has counted up to some moment; times in nanoseconds."""

    syns: int
    drops: int
    accepts: int
    wait_ns: int
    waits: tuple[int, ...]


class Change(NamedTuple):
    """What a listener did within a time, or None where its source cannot tell.

    ``syns``, ``drops`` and ``accepts`` are per second, ``wait`` is the mean time in Q in seconds;
    ``longest`` is a time in seconds that no wait exceeded.
    """

    syns: float | None = None
    drops: float | None = None
    accepts: float | None = None
    wait: float | None = None
    longest: float | None = None


class _Look(NamedTuple):
    when: float
    clocks: Mapping[SessionId, float]
    counts: Mapping[Identity, Counts]


class History:
    """What listeners had counted when somebody looked before: a rate needs two looks.

    Only looks cost anything. A session's counters are as old as its last row, so that row's time
    is their clock: a rate is right whatever the session's interval is.

    Args:
        clock: returns seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._looks: deque[_Look] = deque()

    def look(self, state: State) -> tuple[float | None, Mapping[Identity, Change]]:
        """Compare a state, refreshed just now, with an earlier one, and remember it for later.

        Returns:
            How many seconds ago that was, or None when there is none, and the listeners' changes.
        """
        now = _look(state, self._clock())
        looks = self._looks
        # A clock that was set back makes all that came before it useless.
        while looks and not 0 <= now.when - looks[0].when <= _OLDEST_LOOK:
            looks.popleft()
        while len(looks) > 1 and now.when - looks[1].when >= WINDOW_SECONDS:
            looks.popleft()
        before = looks[0] if looks and now.when > looks[0].when else None
        if not looks or now.when - looks[-1].when >= _LOOKS_APART:
            looks.append(now)
        if before is None:
            return None, {}
        changes = {}
        for listener in state.table:
            status = state.sessions.get(listener.session)
            if status is None or status.up:
                capabilities = state.table.capabilities(listener)
                changes[listener.identity] = _change(listener, capabilities, before, now)
        return now.when - before.when, changes


def _look(state: State, now: float) -> _Look:
    clocks = {name: status.last_record or 0.0 for name, status in state.sessions.items()}
    counts = {}
    for listener in state.table:
        # What is no session is read in the moment in which it is looked at.
        clocks.setdefault(listener.session, now)
        counts[listener.identity] = Counts(
            listener.syns,
            sum(listener.drops.values()),
            listener.accepts,
            listener.wait_ns,
            tuple(listener.waits),
        )
    return _Look(now, clocks, counts)


def _change(listener: Listener, capabilities: Capabilities, before: _Look, now: _Look) -> Change:
    old, new = before.counts.get(listener.identity), now.counts[listener.identity]
    began = before.clocks.get(listener.session)
    seconds = now.clocks[listener.session] - began if began else 0.0
    # Counters that went back are another listener's, which came in its place.
    if old is None or seconds <= 0 or any(a < b for a, b in zip(new[:4], old[:4], strict=True)):
        return Change()
    waits = [a - b for a, b in zip(new.waits, old.waits, strict=True)]
    waited = sum(waits)
    timed = capabilities.accept_wait and waited > 0
    return Change(
        syns=(new.syns - old.syns) / seconds if capabilities.syns else None,
        drops=(new.drops - old.drops) / seconds if capabilities.reasons else None,
        accepts=(new.accepts - old.accepts) / seconds if capabilities.accepts else None,
        wait=(new.wait_ns - old.wait_ns) / waited / 1e9 if timed else None,
        longest=wait_bound(max(i for i, count in enumerate(waits) if count)) if timed else None,
    )


def wait_bound(bucket: int) -> float:
    """Return the time in seconds that no wait of a bucket exceeds."""
    return float("inf") if bucket == WAIT_BUCKETS - 1 else 4 ** (bucket + 5) / 1e9
