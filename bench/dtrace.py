#!/usr/bin/env python3
"""Stands in for the dtrace(1) of a host with many listeners: prints rows of both sets at each tick.

    dtrace.py LISTENERS busy|idle [dtrace(1)'s own arguments]

A busy listener has more events of each kind at each tick. An idle one repeats its rows.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator

from dtrace_exporter.tracing.rows import PROTOCOL

FIRST_PORT = 10_000
# In ticks. It is much shorter than in reality, so that both sets are in use before the measurement.
_TURN = 4
_HOME = "/proc/self/ns/net"
_CALLS = "limit %x"
_QMAX = 128
_PAIR = 10_000_000
# WHAT, PART, events in a tick, and the value of each: SYNs at three lengths of Q and a dropped one,
# completions, accepts after three times in Q (us) and one whose time is unknown.
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
# The rows of the programs for Sun's engine for the same events; %s is the ID.
_SUN_EVENTS = (
    *("syn %s 0 900", "syn %s 2 60", "syn %s 20 30", "syn %s 129 10"),
    *("drop %s 1 10", "opened %s 990", "established %s 990"),
    *(
        f"left %s {how} {count * (_PAIR * value + 1)}"
        for how, count, value in ((0, 500, 1), (3, 400, 50), (6, 80, 3_000), (14, 1, 0), (15, 9, 0))
    ),
)


def rows(listeners: int, tick: int, place: int, now: int) -> Iterator[str]:
    """Yield the rows of a set after some ticks; see dtrace_exporter.tracing.rows.

    Args:
        listeners: the number of listeners.
        tick: the number of ticks.
        place: the place of the listeners; 0 for no rows of listeners.
        now: when Q and Q0 were looked at, in nanoseconds; the exporter ignores what is older than
            the first heartbeat of the session ``calls``.
    """
    for number in range(listeners):
        listener = f"{(0x888000000000 + 0x1000 * number) << 16 | 1:x}"
        if place:
            port = FIRST_PORT + number
            yield f"listener {listener} {now} 10 {place} 1 0.0.0.0 {port} 0 0 {_QMAX}"
        for what, part, count, value in _EVENTS:
            qmax = _QMAX if what < 20 else 0
            yield f"count {listener} {what} {qmax} {part} {count * tick * (_PAIR * value + 1)}"
        yield f"q {listener} {_QMAX} {_PAIR * now + (tick + number) % 5}"
        yield f"q0 {listener} {_PAIR * now + number % 7}"


def sun_rows(listeners: int, tick: int) -> Iterator[str]:
    """Yield the rows of a program for Sun's engine for the same events, at one heartbeat."""
    for number in range(listeners):
        listener = f"{(0x888000000000 + 0x1000 * number) << 16 | tick % 65535 + 1:x}"
        queues = f"{number % 7} {number % 5} {_QMAX} 0 {1_024 + _QMAX}"
        time = tick * 1_000_000_000
        yield f"listener {listener} {time} global 0.0.0.0 {FIRST_PORT + number} {queues}"
        for row in _SUN_EVENTS:
            yield row % listener


def main(listeners: int, busy: bool) -> None:
    """Print rows until the reader has gone."""
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
        # With the first heartbeat of the session ``calls``, closes are seen.
        sys.stdout.write(f"tick {time.monotonic_ns() if counts or ticks else 1}\n")
        turn, tick = divmod(ticks, _TURN)
        ticks += 1
        if counts:
            # Rows of listeners are printed once a turn; in the first one until closes are seen.
            is_told = tick == 0 or turn == 0
            now = time.monotonic_ns()
            if busy:
                if turn > 1 and tick == 0:
                    began[turn & 1] = now
                sets[turn & 1] = list(rows(listeners, tick + 1, place, now))
            else:
                sets[0] = list(rows(listeners, 1, place, now)) if is_told else []
            for began_at, lines in zip(began, sets, strict=True):
                told = [line for line in lines if is_told or not line.startswith("listener")]
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
