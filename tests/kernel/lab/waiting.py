"""Waiting for a condition, never for a number of seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(ask: Callable[[], T], what: str, seconds: float = 60.0, every: float = 0.1) -> T:
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
