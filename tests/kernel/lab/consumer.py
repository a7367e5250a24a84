"""A dtrace(1) whose program changes its sets of aggregations often, and its counts."""

from __future__ import annotations

import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from dtrace_exporter.listeners import ListenerTable, SessionId
from dtrace_exporter.tracing import program, rendering
from dtrace_exporter.tracing.tally import Tally
from dtrace_exporter.watched import Watched
from lab.compiling import CRASHES
from lab.report import note

ME = SessionId("", "all")
WINDOW = rendering.Window(interval=1, turn=5_000_000_000, patience=60)
"""Each set is in use for 10 s, and is emptied 5 s later."""


class Consumer:
    """A dtrace(1) whose sets of aggregations take turns every few seconds, and its counts.

    Args:
        options: options of dtrace(1).
    """

    def __init__(self, options: Sequence[str]) -> None:
        text = rendering.render(
            program.load("linux"),
            WINDOW,
            numbers=program.drop_counters(["dtrace"]),
            options=["aggsize"] if "-x" in options else [],
        )
        self.sets: set[str] = set()
        """When each use of a set began."""
        self.table = ListenerTable()
        self.table.watch(ME, Watched())
        self.generation = 0
        self.rows_of_tick = -1
        self.ticks = 0
        self._tally = Tally(self.table, ME)
        self._process = subprocess.Popen(
            ["dtrace", *options, "-s", "/dev/stdin"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(text)
        self._process.stdin.close()
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        """Read rows until a condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"did not happen in {seconds} s: {what}")
            self._take(line)

    def end(self) -> str:
        """End dtrace(1), read its last rows, and return its other output."""
        self._process.send_signal(signal.SIGTERM)
        assert self._process.stderr is not None
        errors = self._process.stderr.read()
        status = self._process.wait(60)
        if status in CRASHES:
            note("dtrace(1) crashed at its end")
        assert status in {0, *CRASHES}, errors
        while (line := self._lines.get(timeout=60)) != "":
            self._take(line)
        return errors

    def kill(self) -> None:
        """Kill dtrace(1)."""
        self._process.kill()
        self._process.wait()

    def caught_up(self) -> bool:
        """Return whether every line that has been printed so far is read."""
        return self._lines.empty()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _take(self, line: str) -> None:
        assert line, "dtrace(1) ended"
        if not line.strip():
            return
        line = line.strip("\n")
        self._tally.feed(line)
        if line.startswith("tick "):
            self.rows_of_tick = 0
            self.ticks += 1
        elif line.startswith("set "):
            self.sets.add(line)
            self.generation = len(self.sets)
        elif self.rows_of_tick >= 0:
            self.rows_of_tick += 1


@contextmanager
def consumer(*options: str) -> Iterator[Consumer]:
    """Run a Consumer that is ready; the arguments are Consumer's."""
    made = Consumer(options)
    try:
        made.until(lambda: made.rows_of_tick >= 0, "the first tick")
        yield made
    finally:
        made.kill()
