"""Long work in the event loop, done in small pieces so that other tasks run in between."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

_SECONDS = 0.005
# Much longer than the work between two calls, so that the other work gets nearly all the time.
_WAY_SECONDS = 0.001

_T = TypeVar("_T")


class Turn:
    """Measures for how long the event loop has been busy with the same task."""

    def __init__(self) -> None:
        self._end = time.monotonic() + _SECONDS

    @property
    def is_over(self) -> bool:
        """Whether other tasks should run now."""
        return time.monotonic() > self._end

    async def rest(self) -> None:
        """Let other tasks run."""
        await asyncio.sleep(0)
        self._end = time.monotonic() + _SECONDS


class Precedence:
    """Slows down threads while more urgent work goes on; Python runs one thread at a time."""

    def __init__(self) -> None:
        self._free = threading.Event()
        self._free.set()

    @contextmanager
    def first(self) -> Iterator[None]:
        """Make others give way until the block ends; it must not be entered twice at a time."""
        self._free.clear()
        try:
            yield
        finally:
            self._free.set()

    def give_way(self) -> None:
        """Wait a moment, in a thread, if more urgent work goes on."""
        if not self._free.is_set():
            self._free.wait(_WAY_SECONDS)


class Doorkeeper:
    """Lets a few of those who wait go on in each turn of the event loop, first come, first served.

    So the loop's other work has its turns, however many wait.

    Args:
        most: how many go on in a turn.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting = deque[Callable[[], bool]]()

    def __len__(self) -> int:
        """Return how many wait, perhaps with some that have given up."""
        return len(self._waiting)

    def call(self, admit: Callable[[], bool]) -> None:
        """Call a function in a later turn; it returns False if it has given up its place."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._open)
        self._waiting.append(admit)

    async def wait(self) -> None:
        """Wait for a place in a later turn."""
        admitted = asyncio.get_running_loop().create_future()

        def admit() -> bool:
            if admitted.done():
                return False
            admitted.set_result(None)
            return True

        self.call(admit)
        await admitted

    def _open(self) -> None:
        left = self._most
        while self._waiting and left:
            left -= self._waiting.popleft()()
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._open)


def at_once() -> None:
    """Do nothing: stands for give_way() where there is no more urgent work."""


async def by_turns(work: Generator[object, None, _T]) -> _T:
    """Run a generator that yields after each small piece of work, and return its result."""
    turn = Turn()
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: _T = end.value
            return result
        if turn.is_over:
            await turn.rest()
