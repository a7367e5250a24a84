#!/usr/bin/env python3
"""Runs a configuration, and scrapes it, until all of its sessions have ended.

It prints as JSON the longest step of the event loop in milliseconds of CPU time, the growth of the
memory in megabytes, and the time and size of the longest and the largest scrape.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import sys
import threading
import time
from asyncio.events import Handle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtrace_exporter.config import load
from dtrace_exporter.service import Service
from dtrace_exporter.tracing import supervision
from dtrace_exporter.web.exposition import Exposition


class Meter:
    """The longest step of the event loop, and what it was; garbage collection does not count."""

    def __init__(self) -> None:
        self.longest = 0.0
        self.what = ""
        self.longest_collection = 0.0
        self._collecting = self._collected = 0.0

    def run(self, run: Callable[[Handle], None], handle: Handle) -> None:
        """Run a step."""
        self._collected = 0.0
        began = time.thread_time()
        run(handle)
        took = time.thread_time() - began - self._collected
        if took > self.longest:
            self.longest, self.what = took, repr(handle)

    def note_collection(self, phase: str, _: object) -> None:
        """Note that a garbage collection starts or ends."""
        if phase == "start":
            self._collecting = time.thread_time()
            return
        took = time.thread_time() - self._collecting
        self.longest_collection = max(self.longest_collection, took)
        if threading.current_thread() is threading.main_thread():
            self._collected += took


@contextmanager
def metered() -> Iterator[Meter]:
    """Measure the steps of all event loops until the block ends."""
    meter = Meter()
    whole: Any = Handle
    original = whole._run
    whole._run = lambda handle: meter.run(original, handle)
    gc.callbacks.append(meter.note_collection)
    try:
        yield meter
    finally:
        whole._run = original
        gc.callbacks.remove(meter.note_collection)


def memory(name: str) -> float:
    """Return VmRSS, the resident memory, or VmHWM, its peak, in megabytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


async def run(path: Path) -> dict[str, Any]:
    """Run a configuration, and return the measurements."""
    service = Service(path, load(path))
    exposition = Exposition(service.state)
    await exposition.answer()
    gc.collect()
    gc.freeze()
    before = memory("VmRSS")
    statuses = service.state.sessions
    took, size = 0.0, 0
    over = False
    with metered() as meter:
        await service.start()
        while not over:
            await asyncio.sleep(0.2)
            over = all(status.reason not in ("", "starting") for status in statuses.values())
            began = time.monotonic()
            body = await exposition.answer()
            took, size = max(took, time.monotonic() - began), max(size, sum(map(len, body)))
    result = {
        "step_ms": 1000 * meter.longest,
        "step": meter.what,
        "collection_ms": 1000 * meter.longest_collection,
        "memory_mb": memory("VmHWM") - before,
        "scrape_s": took,
        "scrape_mb": size / 1e6,
        "listeners": len(service.state.table),
        "bad_rows": sum(status.bad_rows for status in statuses.values()),
        "refused": [status.refused for status in statuses.values()],
        "reasons": [status.reason for status in statuses.values()],
        "up": [status.last_record is not None for status in statuses.values()],
    }
    await service.stop()
    return result


if __name__ == "__main__":
    logging.basicConfig(level=logging.CRITICAL)
    supervision._FIRST_DELAY = 600.0
    print(json.dumps(asyncio.run(run(Path(sys.argv[1])))))  # noqa: T201
    sys.stdout.flush()
    os._exit(0)
