"""The threads of the service: they do what would block the event loop."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

from dtrace_exporter import privileges

ENDING = (signal.SIGTERM, signal.SIGINT)
"""The signals that end the service. The main thread alone takes them."""


def executor(most: int | None = None, name: str = "") -> ThreadPoolExecutor:
    """Return an executor whose threads have no capabilities and do not take ENDING.

    A thread goes on for a moment after it has been joined. If it took a signal then, when the event
    loop has no handlers any more, the signal would end the process.

    Args:
        most: how many threads it may have, by default Python's number.
        name: how the names of its threads begin.
    """
    return ThreadPoolExecutor(most, name, initializer=begin)


def begin() -> None:
    """Begin a thread: it must not take ENDING, and it gives up all capabilities."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    privileges.give_up()
