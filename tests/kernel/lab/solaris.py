"""The exporter before the model of Solaris' TCP: what it exports against what the model counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lab.exporter import Exporter, Metrics
from lab.model import Model
from lab.waiting import until

GAUGES = ("q0_length", "q_length", "q0_limit", "q_limit", "backlog_requested")
fresh_names = (f"l{number}" for number in itertools.count())
"""The names of listeners in the models; none is used twice."""
BOUNDS = ["0.0", *(f"0.{tenth}" for tenth in range(1, 10)), "1.0", "+Inf"]


@dataclass
class Sun:
    """A loaded model and an exporter that watches it."""

    model: Model
    exporter: Exporter
    _known: dict[str, float] = field(default_factory=dict)

    def agrees(self, name: str, seconds: float = 30.0, races: bool = False) -> Metrics:
        """Wait until all that is exported of a listener is what the model counted of it.

        Args:
            name: the listener's in the model.
            seconds: when to give up.
            races: whether Q changed on one CPU while another took in a SYN. The program reads Q
                when the SYN comes, the model under the lock, so their buckets may differ.

        Raises:
            AssertionError: it is not; the text has both.
        """
        last: list[Any] = []

        def same() -> bool:
            metrics = self.exporter.metrics()
            last[:] = metrics, self.exported(metrics, name), self.counted(name)
            if races:
                for told in last[1:]:
                    told["saturation"] = told["saturation"].get("+Inf")
            return bool(last[1] == last[2])

        try:
            until(same, "the exporter and the model agree", seconds, every=0.2)
        except AssertionError:
            assert last[1] == last[2], self.exporter.log()[-3000:]
        found: Metrics = last[0]
        return found

    def counted(self, name: str) -> dict[str, Any]:
        """Return what should be exported of a listener, from the model's totals."""
        totals = self.model.totals(name)
        drops = {reason: float(count) for reason, count in self.drops(totals).items() if count}
        cumulative = 0
        buckets = {}
        for bound, count in zip(BOUNDS, totals["saturation"], strict=True):
            cumulative += count
            buckets[bound] = float(cumulative)
        return {
            "syns": totals["syns"],
            "drops": drops,
            "established": totals["established"],
            "accepts": totals["accepts"],
            "waits": totals["accepts"],
            "saturation": buckets,
            "queues": None if totals["closed"] or not totals["listens"] else self.queues(totals),
        }

    def drops(self, totals: dict[str, Any]) -> dict[str, int]:
        """Return the drops that should be exported, by reason."""
        return {reason: totals[reason] for reason in ("q_full", "q0_full", "q0_evicted")}

    def queues(self, totals: dict[str, Any]) -> tuple[int | None, ...]:
        """Return Q0, Q, their limits and the backlog that was asked for, if that is exported."""
        return totals["q0"], totals["q"], totals["q0max"], totals["qmax"], None

    def exported(self, metrics: Metrics, name: str) -> dict[str, Any]:
        """Return the same from a scrape."""
        labels = self.labels(name)

        def value(metric: str) -> float | None:
            return metrics.value(f"dtrace_tcp_listen_{metric}", **labels)

        queues = [value(what) for what in GAUGES]
        saturation = metrics.select("dtrace_tcp_listen_q_saturation_ratio_bucket", **labels)
        return {
            "syns": value("syns_total"),
            "drops": metrics.drops(**labels),
            "established": value("established_total"),
            "accepts": value("accepts_total"),
            "waits": value("accept_wait_seconds_count"),
            "saturation": {have["le"]: count for have, count in saturation},
            "queues": None if queues == [None] * len(GAUGES) else tuple(queues),
        }

    def labels(self, name: str) -> dict[str, Any]:
        """Return the labels that tell a listener's series from all others."""
        totals = self.model.totals(name)
        return {"zone": totals["zone_name"], "address": totals["address"], "port": totals["port"]}

    def begin(self) -> None:
        """Let nothing_lost() be about what comes from now on."""
        self._known = self._wrong()

    def nothing_lost(self) -> None:
        """Check that DTrace lost nothing, no clause had a fault, and no row was bad."""
        assert self._wrong() == self._known, self.exporter.log()[-3000:]

    def _wrong(self) -> dict[str, float]:
        metrics = self.exporter.metrics()
        names = ("lost_total", "probe_errors_total", "bad_rows_total", "restarts_total")
        return {n: sum(v for _, v in metrics.select(f"dtrace_session_{n}")) for n in names}


@contextmanager
def listening(sun: Sun, port: int, *before: str) -> Iterator[Callable[..., str]]:
    """Yield a function that opens a listener of the model and gives its name; then close all.

    Args:
        sun: the model and its exporter.
        port: the port, unless the function gets another one.
        before: the words of the model's lines that come before a listener's name and its close.
    """
    opened = []
    sun.begin()

    def start(text: str = "", *, backlog: int = 8, zone: int = 0, at: int | None = None) -> str:
        name = next(fresh_names)
        address = "" if "address " in text else "address * "
        sun.model.run(
            f"listen {name} zone {zone} {address}port {at or port} backlog {backlog} {text}"
        )
        opened.append(name)
        return name

    yield start
    for name in opened:
        if not sun.model.totals(name)["closed"]:
            sun.model.run(*(f"{words} {name}" for words in (*before, "close")))
