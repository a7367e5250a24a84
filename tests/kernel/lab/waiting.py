"""Waiting for a condition, never for a number of seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
COMES_TRUE = "it comes true"


def until(
    ask: Callable[[], T], what: str = COMES_TRUE, seconds: float = 60.0, every: float = 0.1
) -> T:
    """Ask until the answer is true, and return it.

    Args:
        ask: the question.
        what: the condition in words, for the failure.
        seconds: when to give up.
        every: seconds between two questions.

    Raises:
        AssertionError: the time is up; the text has the last answer.
    """
    end = time.monotonic() + seconds
    while not (answer := ask()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}; last answer {answer!r}")
        time.sleep(every)
    return answer


async def eventually(
    ask: Callable[[], Any], what: str = COMES_TRUE, seconds: float = 60.0, every: float = 0.005
) -> None:
    """Ask until the answer is true, as `until` does, and let other tasks run in between."""
    end = time.monotonic() + seconds
    while not (answer := ask()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}; last answer {answer!r}")
        await asyncio.sleep(every)
