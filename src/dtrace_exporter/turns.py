"""Long work in the event loop, done piece by piece so that others have their turn between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from typing import TypeVar

_SECONDS = 0.005

_T = TypeVar("_T")


class Turn:
    """How long the event loop has been busy with the same thing."""

    def __init__(self) -> None:
        self._end = time.monotonic() + _SECONDS

    @property
    def is_over(self) -> bool:
        """Whether it is time that others had their turn."""
        return time.monotonic() > self._end

    async def rest(self) -> None:
        """Let others have their turn."""
        await asyncio.sleep(0)
        self._end = time.monotonic() + _SECONDS


async def by_turns(work: Generator[object, None, _T]) -> _T:
    """Do work that yields after each small piece, and return what it returns."""
    turn = Turn()
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: _T = end.value
            return result
        if turn.is_over:
            await turn.rest()
