"""A model of a listener's Q in virtual time, and of the series that an exporter has of it.

An application takes one connection after the other out of Q. A refused client sends its SYN again
after 1, 3, 7, 15, 31 and 63 seconds (RFC 6298, 2.1 and 5.5), unless it is impatient.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf

SATURATIONS = [tenth / 10 for tenth in range(11)]
WAITS = [4**n / 1e9 for n in range(5, 18)]
"""The bounds of the histograms, as they are exported."""
AGAIN = (1, 2, 4, 8, 16, 32)
Key = tuple[str, tuple[tuple[str, str], ...]]
Series = dict[Key, list[float]]
"""The values of each metric, by its name without the prefix and by its own labels."""


@dataclass
class Queue:
    """A listener and its application.

    Args:
        backlog: Qmax; Q holds one more, as on Linux.
        service: the least seconds from one accept() to the next.
        pauses: when the application stands still, as begins and ends in seconds, in their order.
        patient: whether a refused client tries again.

    ``waits`` has for each connection when it entered Q and how long it stayed there; ``drops`` has
    the time of each refusal.
    """

    backlog: int
    service: float
    pauses: Sequence[tuple[float, float]] = ()
    patient: bool = True
    waits: list[tuple[float, float]] = field(default_factory=list)
    drops: list[float] = field(default_factory=list)
    waiting: deque[float] = field(default_factory=deque)
    _free: float = 0.0
    _waited: float = 0.0
    _by_wait: list[int] = field(default_factory=lambda: [0] * (len(WAITS) + 1))
    _by_found: list[int] = field(default_factory=lambda: [0] * (len(SATURATIONS) + 1))

    def run(self, arrivals: Iterable[float], samples: Sequence[float]) -> Series:
        """Let clients arrive, and return the exporter's values at the time of each sample."""
        events = [(at, 0) for at in arrivals]
        heapq.heapify(events)
        series: Series = {}
        for now in samples:
            while events and events[0][0] <= now:
                at, attempt = heapq.heappop(events)
                self._accept(at)
                full = len(self.waiting) / max(self.backlog, 1)
                self._by_found[bisect_left(SATURATIONS, full)] += 1
                if len(self.waiting) <= self.backlog:
                    self.waiting.append(at)
                    continue
                self.drops.append(at)
                if self.patient and attempt < len(AGAIN):
                    heapq.heappush(events, (at + AGAIN[attempt], attempt + 1))
            self._accept(now)
            for key, value in self._now():
                series.setdefault(key, []).append(value)
        return series

    def _accept(self, now: float) -> None:
        while self.waiting:
            at = max(self._free, self.waiting[0])
            before = bisect_left(self.pauses, (at, inf)) - 1
            if before >= 0 and at < self.pauses[before][1]:
                at = self.pauses[before][1]
            if at > now:
                return
            came = self.waiting.popleft()
            self.waits.append((came, at - came))
            self._waited += at - came
            self._by_wait[bisect_left(WAITS, at - came)] += 1
            self._free = at + self.service

    def _now(self) -> Iterator[tuple[Key, float]]:
        for name, value in (
            ("q_length", len(self.waiting)),
            ("q_limit", self.backlog),
            ("q_capacity", self.backlog + 1),
            ("syns_total", sum(self._by_found)),
            ("established_total", len(self.waits) + len(self.waiting)),
            ("accepts_total", len(self.waits)),
            ("accept_wait_seconds_sum", self._waited),
        ):
            yield (name, ()), value
        yield ("drops_total", (("reason", "q_full"),)), len(self.drops)
        yield ("drops_total", (("reason", "q_full_ack"),)), 0
        for name, bounds, seen in (
            ("q_saturation_ratio", SATURATIONS, self._by_found),
            ("accept_wait_seconds", WAITS, self._by_wait),
        ):
            yield (f"{name}_count", ()), sum(seen)
            for bound, below in zip([*bounds, inf], accumulate(seen), strict=True):
                le = "+Inf" if bound == inf else str(bound)
                yield (f"{name}_bucket", (("le", le),)), below
