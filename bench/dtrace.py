#!/usr/bin/env python3
"""dtrace(1) of a host with many listeners: prints the rows of their set at each tick.

    dtrace.py LISTENERS busy|idle [dtrace(1)'s own arguments]

Every listener that is busy has had more of each kind of event since the tick before. Of those that
are idle only the first tick has rows.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator

from dtrace_exporter.rows import PROTOCOL

FIRST_PORT = 10_000
# Ticks; much shorter than in truth, so that both sets are in use before anything is measured.
_GENERATION = 4
_HOME = "/proc/self/ns/net"
# What, of how many a tick, the sum of their values for each: SYNs at three lengths of Q and one
# dropped, completions, accepts after three lengths of time, one that was not timed.
_EVENTS = (
    (0, 900, 0),
    (1, 60, 2),
    (2, 30, 20),
    (27, 10, 129),
    (128, 990, 0),
    (144, 500, 800),
    (147, 400, 50_000),
    (150, 80, 3_000_000),
    (158, 1, 0),
)


def rows(listeners: int, generation: int, tick: int, place: int) -> Iterator[str]:
    """Yield the rows of a generation's set after so many ticks of it; see dtrace_exporter.rows."""
    for number in range(listeners):
        socket = 0xFFFF888000000000 + 0x1000 * number
        port = FIRST_PORT + number
        for what, count, value in _EVENTS:
            events = count * tick
            last = tick << 34 | (number % 7) << 17 | (tick + number) % 5
            yield (
                f"row {generation & 1} {socket:x} {place << 32 | port << 16 | what:x} "
                "0 ffff00000000 80 "
                f"{events} {events * value} {last}\n"
            )


def main(listeners: int, busy: bool) -> None:
    """Print until the reader is gone."""
    program = sys.stdin.read()
    match = re.search(r"\btick-(\d+)ms", program)
    interval = int(match[1]) / 1000 if match else 1.0
    place = os.stat(_HOME).st_ino  # noqa: PTH116
    sys.stdout.write(f"\nready {PROTOCOL} {place}\n")
    ticks = 0
    due = time.monotonic()
    while True:
        generation, tick = divmod(ticks, _GENERATION)
        ticks += 1
        sys.stdout.write(f"tick {generation} {time.monotonic_ns()}\n")
        if busy or ticks == 1:
            sys.stdout.writelines(rows(listeners, generation, tick + 1, place))
        sys.stdout.flush()
        due += interval
        time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    if "-V" in sys.argv:
        print("dtrace: D 2.0.7")
    elif "-l" not in sys.argv and "-e" not in sys.argv:
        try:
            main(int(sys.argv[1]), sys.argv[2] == "busy")
        except BrokenPipeError:
            os._exit(0)
