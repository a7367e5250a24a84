#!/usr/bin/env python3
"""dtrace(1) of a host with many listeners: prints the rows of both sets at each tick.

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

from dtrace_exporter.tracing.rows import PROTOCOL

FIRST_PORT = 10_000
# Ticks; much shorter than in truth, so that both sets are in use before anything is measured.
_TURN = 4
_HOME = "/proc/self/ns/net"
_CALLS = "limit %x"
_QMAX = 128
_PAIR = 10_000_000
# Of each kind WHAT and PART, how many a tick, the value of each: SYNs at three lengths of Q and one
# dropped, completions, accepts after three lengths of time (us) and one whose time is not known.
_EVENTS = (
    (10, 0, 900, 0),
    (10, 1, 60, 2),
    (10, 2, 30, 20),
    (11, 11, 10, 129),
    (30, 0, 990, 0),
    (40, 0, 500, 1),
    (40, 3, 400, 50),
    (40, 6, 80, 3_000),
    (40, 14, 1, 0),
)
# Of the same, what the rows of the programs for Sun's engine are, for ID at %s.
_SUN_EVENTS = (
    *("syn %s 0 900", "syn %s 2 60", "syn %s 20 30", "syn %s 129 10"),
    *("drop %s 1 10", "opened %s 990", "established %s 990"),
    *(
        f"left %s {how} {count * (_PAIR * value + 1)}"
        for how, count, value in ((0, 500, 1), (3, 400, 50), (6, 80, 3_000), (14, 1, 0), (15, 9, 0))
    ),
)


def rows(listeners: int, tick: int, place: int) -> Iterator[str]:
    """Yield the rows of a set after so many ticks of it; see dtrace_exporter.rows.

    Args:
        listeners: how many there are.
        tick: how many ticks.
        place: where they are; 0 where nobody is told who they are.
    """
    for number in range(listeners):
        listener = f"{(0x888000000000 + 0x1000 * number) << 16 | 1:x}"
        if place:
            port = FIRST_PORT + number
            yield f"listener {listener} {tick} 10 {place} 1 0.0.0.0 {port} 0 0 {_QMAX}"
        for what, part, count, value in _EVENTS:
            qmax = _QMAX if what < 20 else 0
            yield f"count {listener} {what} {qmax} {part} {count * tick * (_PAIR * value + 1)}"
        yield f"q {listener} {_QMAX} {_PAIR * tick * 1_000_000_000 + (tick + number) % 5}"
        yield f"q0 {listener} {_PAIR * tick * 1_000_000_000 + number % 7}"


def sun_rows(listeners: int, tick: int) -> Iterator[str]:
    """Yield what a program for Sun's engine prints of the same events at one heartbeat."""
    for number in range(listeners):
        listener = f"{(0x888000000000 + 0x1000 * number) << 16 | tick % 65535 + 1:x}"
        queues = f"{number % 7} {number % 5} {_QMAX} 0 {1_024 + _QMAX}"
        time = tick * 1_000_000_000
        yield f"listener {listener} {time} global 0.0.0.0 {FIRST_PORT + number} {queues}"
        for row in _SUN_EVENTS:
            yield row % listener


def main(listeners: int, busy: bool) -> None:
    """Print until the reader is gone."""
    program = sys.stdin.read()
    counts = _CALLS not in program
    match = re.search(r"\btick-(\d+)ms", program)
    interval = int(match[1]) / 1000 if match else 1.0
    place = os.stat(_HOME).st_ino  # noqa: PTH116
    sys.stdout.write(f"\nready {PROTOCOL} {place}\n")
    sets: list[list[str]] = [[], []]
    began = [time.monotonic_ns(), time.monotonic_ns() + 1]
    ticks = 0
    due = time.monotonic()
    while True:
        sys.stdout.write(f"tick {time.monotonic_ns()}\n")
        turn, tick = divmod(ticks, _TURN)
        ticks += 1
        if counts:
            if turn > 1 and tick == 0:
                began[turn & 1] = time.monotonic_ns()
                sets[turn & 1] = []
            if busy or ticks == 1:
                sets[turn & 1] = list(rows(listeners, tick + 1, place))
            for began_at, lines in zip(began, sets, strict=True):
                # Who a listener is is told when it is seen, and not with what was counted.
                told = [line for line in lines if tick == 0 or not line.startswith("listener")]
                sys.stdout.write("\n".join([f"set {began_at}", *told, ""]))
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
