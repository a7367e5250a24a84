"""Rates and a short history of each listener, from samples of its counters.

There may be very many listeners. So their samples are stored in arrays of numbers, in which each
listener has an index, its slot.
"""

from __future__ import annotations

import struct
import time
from array import array
from collections import deque
from collections.abc import Callable, Generator, Mapping
from typing import NamedTuple

from dtrace_exporter.listeners import WAIT_BUCKETS, Capabilities, Identity, Listener
from dtrace_exporter.state import State
from dtrace_exporter.turns import at_once

WINDOW_SECONDS = 15.0
"""The time over which rates are averaged, in seconds, once there are samples for that long."""

POINTS = 60
"""The number of points in the history of a listener."""

POINT_SECONDS = 5.0
"""The length of a point of the history, in seconds."""

_LOOKS_APART = 5.0
_OLDEST_LOOK = 120.0
# A clock, the counters for a Change, and the waits by bucket.
_RECORD = struct.Struct(f"=d4Q{WAIT_BUCKETS}I")
_FULL = 250
_UNKNOWN = 255
_64_BITS, _32_BITS = (1 << 64) - 1, (1 << 32) - 1


class Change(NamedTuple):
    """What a listener did in some time; None for what its source does not have.

    ``syns``, ``drops`` and ``accepts`` are per second. ``wait`` is the mean time in Q, in seconds.
    ``longest`` is an upper bound of the times in Q, in seconds.
    """

    syns: float | None = None
    drops: float | None = None
    accepts: float | None = None
    wait: float | None = None
    longest: float | None = None


class Point(NamedTuple):
    """POINT_SECONDS of a listener: its drops, and the highest fullness of Q if known; 1 is full."""

    fullness: float | None
    drops: float


class _Grown(NamedTuple):
    """By how much a listener's counters have grown in some seconds."""

    seconds: float
    syns: int
    drops: int
    accepts: int
    wait_ns: int
    waits: list[int]


class _Look:
    """The counters of all listeners at a time, a record for each slot.

    The clock of a record is when the listener's last row came; it is 0 if the record is empty.
    """

    __slots__ = ("records", "when")

    def __init__(self, when: float, slots: int) -> None:
        self.when = when
        self.records = bytearray(_RECORD.size * slots)

    def take(self, slot: int, listener: Listener, clock: float) -> None:
        """Store the counters of a listener; numbers that are too large for a record wrap."""
        at = slot * _RECORD.size
        if at == len(self.records):
            self.records.extend(bytes(_RECORD.size))
        drops = sum(listener.drops.values())
        totals = listener.syns, drops, listener.accepts, listener.wait_ns
        try:
            _RECORD.pack_into(self.records, at, clock, *totals, *listener.waits)
        except struct.error:
            rest = [each & _32_BITS for each in listener.waits]
            _RECORD.pack_into(self.records, at, clock, *[each & _64_BITS for each in totals], *rest)

    def clear(self, slot: int) -> None:
        """Clear the record of a slot."""
        at = slot * _RECORD.size
        if at < len(self.records):
            self.records[at : at + _RECORD.size] = bytes(_RECORD.size)

    def since(self, before: _Look, slot: int) -> _Grown | None:
        """Return by how much the counters of a slot have grown.

        The result is None if no row has come since, or if a counter has fallen.
        """
        at = slot * _RECORD.size
        if at >= len(before.records):
            return None
        now, then = (_RECORD.unpack_from(look.records, at) for look in (self, before))
        if not 0 < then[0] < now[0]:
            return None
        totals = [(new - old) & _64_BITS for new, old in zip(now[1:5], then[1:5], strict=True)]
        # If a counter has fallen, another listener has replaced the old one.
        if max(totals) > _64_BITS >> 1:
            return None
        waits = [(new - old) & _32_BITS for new, old in zip(now[5:], then[5:], strict=True)]
        return _Grown(now[0] - then[0], totals[0], totals[1], totals[2], totals[3], waits)


class _Points:
    """A point in the history of all listeners, by slot."""

    __slots__ = ("drops", "fullness", "number")

    def __init__(self, number: int, slots: int) -> None:
        self.number = number
        self.fullness = bytearray([_UNKNOWN]) * slots
        self.drops = array("f", bytes(4 * slots))

    def add(self, slot: int, fullness: float | None, drops: int) -> None:
        """Add the fullness of Q, if known, and the drops since the last sample."""
        if slot == len(self.drops):
            self.fullness.append(_UNKNOWN)
            self.drops.append(0.0)
        if fullness is not None:
            known = self.fullness[slot]
            level = round(_FULL * min(fullness, 1.0))
            self.fullness[slot] = level if known == _UNKNOWN else max(level, known)
        self.drops[slot] += drops


class History:
    """Samples of all listeners: all counters of the newest ones, fullness and drops of older ones.

    The counters of a session are as old as its last row. So rates are computed from the times of
    these rows, and they are right for any interval of the session. The slot of a listener that has
    gone is reused.

    Args:
        clock: returns the time in seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._looks: deque[_Look] = deque()
        self._points: deque[_Points] = deque(maxlen=POINTS)
        self._slots: dict[Identity, int] = {}
        self._free: list[int] = []
        self._most = 0

    def sampling(self, state: State) -> Generator[None, None, None]:
        """Take a sample of a state that has just been refreshed.

        Yields:
            After each listener.
        """
        now = self._clock()
        ago = now - self._looks[-1].when if self._looks else 0.0
        # If the clock was set back, all older samples are useless.
        if ago < 0:
            self._points.clear()
        if not 0 <= ago <= _OLDEST_LOOK:
            self._looks.clear()
        before = self._looks[-1] if self._looks else None
        look = _Look(now, self._most)
        points = self._point(int(now // POINT_SECONDS))
        seen = set()
        for listener in [*state.table]:
            seen.add(listener.identity)
            slot = self._slot(listener.identity)
            status = state.sessions.get(listener.session)
            # Without a session, the counters have just been read.
            look.take(slot, listener, now if status is None else status.last_record or 0.0)
            grown = look.since(before, slot) if before else None
            points.add(slot, listener.fullness, grown.drops if grown else 0)
            yield
        for identity in self._slots.keys() - seen:
            self._free.append(self._slots.pop(identity))
        self._remember(look)

    def look(
        self, state: State, give_way: Callable[[], None] = at_once
    ) -> tuple[float | None, Mapping[Identity, Change]]:
        """Take a sample of a state that has just been refreshed, and compare it with older ones.

        Args:
            state: the state.
            give_way: called after each listener.

        Returns:
            How old the oldest of these samples is, in seconds, None if there is none; and the
            changes of the listeners.
        """
        for _ in self.sampling(state):
            give_way()
        now = self._looks[-1]
        before = [look for look in self._looks if look.when < now.when]
        if not before:
            return None, {}
        changes = {}
        for listener in state.table:
            status = state.sessions.get(listener.session)
            if status is None or status.up:
                slot = self._slots[listener.identity]
                capabilities = state.table.capabilities(listener)
                changes[listener.identity] = _change(capabilities, slot, before, now)
            give_way()
        return now.when - before[0].when, changes

    def line(self, identity: Identity) -> list[Point]:
        """Return the history of a listener, the newest point last."""
        slot = self._slots.get(identity)
        return [] if slot is None else [_point(points, slot) for points in self._points]

    def _slot(self, identity: Identity) -> int:
        slot = self._slots.get(identity)
        if slot is not None:
            return slot
        if not self._free:
            self._free.append(self._most)
            self._most += 1
        slot = self._slots[identity] = self._free.pop()
        for look in self._looks:
            look.clear(slot)
        for points in self._points:
            if slot < len(points.drops):
                points.fullness[slot], points.drops[slot] = _UNKNOWN, 0.0
        return slot

    def _point(self, number: int) -> _Points:
        """Return the point that begins ``number`` times POINT_SECONDS after 1970."""
        if not self._points:
            self._points.append(_Points(number, self._most))
        # Points without samples are unknown.
        for missing in range(max(self._points[-1].number + 1, number - POINTS), number + 1):
            self._points.append(_Points(missing, self._most))
        return self._points[-1]

    def _remember(self, look: _Look) -> None:
        looks = self._looks
        # The newest one is kept only if it is long enough after the one before it.
        if len(looks) > 1 and looks[-1].when - looks[-2].when < _LOOKS_APART:
            looks.pop()
        looks.append(look)
        while len(looks) > 2 and look.when - looks[1].when >= WINDOW_SECONDS:
            looks.popleft()


def _point(points: _Points, slot: int) -> Point:
    if slot >= len(points.drops):
        return Point(None, 0.0)
    level = points.fullness[slot]
    return Point(None if level == _UNKNOWN else level / _FULL, points.drops[slot])


def _change(capabilities: Capabilities, slot: int, looks: list[_Look], now: _Look) -> Change:
    """Compare with the oldest sample since which rows have come."""
    for before in looks:
        grown = now.since(before, slot)
        if grown is not None:
            break
    else:
        return Change()
    seconds, waited = grown.seconds, sum(grown.waits)
    timed = capabilities.accept_wait and waited > 0
    longest = max((bucket for bucket, count in enumerate(grown.waits) if count), default=0)
    return Change(
        syns=grown.syns / seconds if capabilities.syns else None,
        drops=grown.drops / seconds if capabilities.reasons else None,
        accepts=grown.accepts / seconds if capabilities.accepts else None,
        wait=grown.wait_ns / waited / 1e9 if timed else None,
        longest=wait_bound(longest) if timed else None,
    )


def wait_bound(bucket: int) -> float:
    """Return the upper bound of a bucket of times in Q, in seconds."""
    return float("inf") if bucket == WAIT_BUCKETS - 1 else 4 ** (bucket + 5) / 1e9
