"""Measures tools by turns: losses in bursts, and losses and costs by the rate of SYNs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from tools import Tool
from tracing import Tracer, complain, running, tell

BURSTS = (1_000, 10_000, 1_000_000)
RATE_SECONDS = 3
PER_SECOND = 10
"""A rate consists of so many bursts per second."""
PATIENCE = 5.0
"""If a tool has reported too few SYNs, it is finished when no more come for so many seconds."""


class Load(Protocol):
    """A generator of SYNs."""

    def burst(self, syns: int) -> float:
        """Make SYNs; return how long one took, in nanoseconds."""

    def made(self) -> int:
        """Return how many SYNs the kernel has received so far."""


def by_turns(tools: Sequence[Tool], measure: Callable[[Tool, Tracer | None], None]) -> None:
    """Run and measure each tool; if one fails, the others go on.

    Args:
        tools: the tools.
        measure: is given the tool, and its tracer.
    """
    for tool in tools:
        try:
            with started(tool) as tracer:
                measure(tool, tracer)
        except Exception as error:
            complain(tool.name, error)


@contextmanager
def started(tool: Tool) -> Iterator[Tracer | None]:
    """Run a tool, if there is one, until the block ends."""
    if not tool.command:
        yield None
        return
    with running(tool.command, tool.text, tool.ready) as tracer:
        yield tracer


def settle(load: Load, tool: Tool, tracer: Tracer | None) -> None:
    """Send some SYNs, so that a tool knows the listener."""
    end = time.monotonic() + tool.settle
    while time.monotonic() < end:
        load.burst(1)
        if tracer is not None:
            tracer.wait(0.2)


class Account:
    """Compares the SYNs that a running tool reports with those that were sent.

    Args:
        load: the generator of SYNs.
        tool: the tool.
        tracer: its tracer, which was started before the first SYN, or None.
        since: how many SYNs had been received then.
    """

    def __init__(self, load: Load, tool: Tool, tracer: Tracer | None, since: int) -> None:
        self._load, self._tool, self._tracer = load, tool, tracer
        self._made, self._told = since, 0

    def balance(self) -> tuple[int, int | None]:
        """Return how many SYNs were received since the last call, and how many were reported."""
        made = self._load.made()
        more, self._made = made - self._made, made
        if self._tracer is None or self._tool.seen is None:
            return more, None
        before, self._told = self._told, self._all_told(self._told + more)
        return more, self._told - before

    def _all_told(self, expected: int) -> int:
        """Wait until a tool has reported as many as expected, or no more come; return how many."""
        assert self._tracer is not None
        assert self._tool.seen is not None
        told, changed = -1, time.monotonic()
        while time.monotonic() - changed < PATIENCE:
            # If there are more than expected, they come as well.
            self._tracer.wait(1.0)
            now = self._tool.seen(self._tracer.text())
            if now == told and now >= expected:
                break
            if now != told:
                told, changed = now, time.monotonic()
        return told


def losses(load: Load, tool: Tool, account: Account) -> None:
    """Report what a tool saw of bursts."""
    account.balance()
    for syns in BURSTS:
        told = partial(tell, event="loss", tool=tool.name, syns=syns)
        if tool.command and tool.seen is None:
            told(made=0, seen=None, ns=[])
            continue
        took = load.burst(syns)
        made, seen = account.balance()
        told(made=made, seen=seen, ns=[took])


def rates(
    load: Load,
    tool: Tool,
    tracer: Tracer | None,
    account: Account,
    rates: Sequence[int],
) -> None:
    """Report what a tool saw of SYNs at rates, and what they cost."""
    account.balance()
    for rate in rates:
        took = []
        began = due = time.monotonic()
        for _ in range(RATE_SECONDS * PER_SECOND):
            took.append(load.burst(rate // PER_SECOND))
            due += 1 / PER_SECOND
            while (left := due - time.monotonic()) > 0:
                tracer.wait(left) if tracer is not None else time.sleep(left)
        seconds = time.monotonic() - began
        made, seen = account.balance()
        tell(
            event="rate",
            tool=tool.name,
            asked=rate,
            rate=made / seconds,
            made=made,
            seen=seen,
            ns=took,
        )
