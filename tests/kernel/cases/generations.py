"""Sets of aggregations that take turns: nothing is lost at a change, nothing stays behind."""

from __future__ import annotations

import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from lab.traffic import HERE4, Clients, Listen, Ports, send_syns

from dtrace_exporter import program
from dtrace_exporter.listeners import ListenerTable, SessionId
from dtrace_exporter.rows import Row, Tick, parse
from dtrace_exporter.tally import Tally

ME = SessionId("", "all")
WINDOW = program.Window(interval=1, ticks=10, clock=8, patience=60)
"""Generations of 10 s, each set emptied 5 s after its last use."""


class Consumer:
    """A dtrace(1) whose sets change places every few seconds, and what it has counted."""

    def __init__(self, *options: str) -> None:
        text = program.render(
            program.load("linux"),
            WINDOW,
            numbers=program.drop_counters(["dtrace"]),
            options=["aggsize"],
        )
        self.table = ListenerTable()
        self.table.watch(ME, None)
        self.generation = 0
        self.rows_of_tick = -1
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
        """Take rows until a condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"did not happen in {seconds} s: {what}")
            self._take(line)

    def end(self) -> str:
        """End it, take its last rows and return what it said beside them."""
        self._process.send_signal(signal.SIGTERM)
        assert self._process.stderr is not None
        errors = self._process.stderr.read()
        assert self._process.wait(60) == 0, errors
        while (line := self._lines.get(timeout=60)) != "":
            self._take(line)
        return errors

    def kill(self) -> None:
        """End it in any case."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _take(self, line: str) -> None:
        assert line, "dtrace(1) ended"
        if not line.strip():
            return
        match parse(line.strip()):
            case Tick() as tick:
                self.generation = max(self.generation, tick.generation)
                self.rows_of_tick = 0
                self._tally.tick(tick)
            case Row() as row:
                self.rows_of_tick += 1
                self._tally.row(row)
            case ready:
                self._tally.ready(ready)


@contextmanager
def consumer(*options: str) -> Iterator[Consumer]:
    """Run one that is ready."""
    made = Consumer(*options)
    try:
        made.until(lambda: made.rows_of_tick >= 0, "the first tick")
        yield made
    finally:
        made.kill()


@pytest.mark.usefixtures("foreign")
def test_exact_across_generations(port: int, listen: Listen) -> None:
    """SYNs that never cease while the sets change places are all counted, and just once."""
    with consumer() as running:
        listen(port, 8, HERE4)
        sent = 0
        first = running.generation
        while running.generation < first + 3:
            sent += send_syns(port, 500)
            running.until(running._lines.empty, "rows are taken")
        errors = running.end()
    (listener,) = [one for one in running.table if one.identity.port == port]
    assert listener.syns == sum(listener.saturation) == sent
    assert "drop" not in errors


def test_listeners_come_and_go(ports: Ports, listen: Listen, clients: Clients) -> None:
    """Listeners of the past leave no key behind: more of them than there is room for all fit."""
    # Room for some 1,500 keys a CPU; each listener here makes up to 15.
    with consumer("-x", "aggsize=128k") as running:
        used = []
        first = running.generation
        while running.generation < first + 5:
            before = running.generation
            for port in ports(30):
                used.append(port)
                opened = listen(port, 4)
                clients.connect(1, port)
                opened.accept(1)
                opened.close()
            clients.close()
            running.until(lambda old=before: running.generation > old, "the next generation")
        quiet = running.generation + 2
        running.until(lambda: running.generation >= quiet, "two quiet generations")
        running.until(lambda: running.rows_of_tick == 0, "a tick without rows")
        errors = running.end()
    counted = {one.identity.port: (one.syns, one.established, one.accepts) for one in running.table}
    assert {port: counted.get(port) for port in used} == dict.fromkeys(used, (1, 1, 1))
    assert not any(one.sockets for one in running.table if one.identity.port in used)
    assert "drop" not in errors
