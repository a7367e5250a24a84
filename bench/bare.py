#!/usr/bin/env python3
"""Serves samples with prometheus_client's own objects and its own server, for comparison.

bare.py FILE PORT serves on 127.0.0.1 the samples in FILE, a scrape in the text format.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.parser import text_string_to_metric_families


def register(families: Iterable[Metric], registry: CollectorRegistry) -> None:
    """Make a Counter, Gauge or Histogram for each family, and a child of it for each series.

    Names and labels of its samples are those of the family; the values are arbitrary.
    """
    disable_created_metrics()  # type: ignore[no-untyped-call]
    for family in families:
        names = sorted({name for sample in family.samples for name in sample.labels} - {"le"})
        series = {tuple(sample.labels[name] for name in names) for sample in family.samples}
        bounds = {sample.labels["le"] for sample in family.samples if "le" in sample.labels}
        metric: Counter | Gauge | Histogram
        if family.type == "histogram":
            buckets = sorted(map(float, bounds))
            metric = Histogram(
                family.name, family.documentation, names, buckets=buckets, registry=registry
            )
        else:
            kind = Counter if family.type == "counter" else Gauge
            metric = kind(family.name, family.documentation, names, registry=registry)
        for number, values in enumerate(sorted(series)):
            child = metric.labels(*values) if names else metric
            if isinstance(child, Histogram):
                child.observe(number / 1000)
            else:
                child.inc(number)


def own(text: str) -> list[Metric]:
    """Return the families of a scrape, without those about the process that served it."""
    families = text_string_to_metric_families(text)
    return [family for family in families if family.name.startswith("dtrace_")]


if __name__ == "__main__":
    register(own(Path(sys.argv[1]).read_text(encoding="utf-8")), REGISTRY)
    start_http_server(int(sys.argv[2]), "127.0.0.1")
    threading.Event().wait()
