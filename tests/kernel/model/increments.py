"""Turns the cumulative counts in rows of Linux' DTrace into increments; see dtrace beside this."""

from __future__ import annotations

import contextlib
import sys

COUNTS = ("syn", "drop", "evicted", "opened", "established", "left")


def main() -> None:
    """Copy standard input to standard output, with each count reduced by its earlier row's."""
    told: dict[str, int] = {}
    for line in sys.stdin:
        key, _, value = line.rpartition(" ")
        more = line
        if key.partition(" ")[0] in COUNTS:
            count = int(value)
            more = f"{key} {count - told.get(key, 0)}\n" if count != told.get(key) else ""
            told[key] = count
        sys.stdout.write(more)
        sys.stdout.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
