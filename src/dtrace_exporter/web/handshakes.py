"""Threads for handshakes with clients that send certificates.

OpenSSL decodes all certificates that a client sends before it verifies the first one. A stranger
can make certificates with keys that take 0.1 s each, and all this is one call of OpenSSL.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from threading import Thread
from weakref import WeakValueDictionary

from dtrace_exporter import threads

_MOST = 16
"""How many threads there are for hosts that have not been let in before."""

_MOST_KNOWN = 256
# So that the event loop and other processes have most of the processor.
_NICE = 10


class Handshakes:
    """Runs calls of OpenSSL in threads, one at a time for each host.

    Hosts that have been let in before do not wait for others.
    """

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(_MOST)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._known: dict[str, None] = {}

    def remember(self, host: str) -> None:
        """Record that a client of a host has been let in."""
        self._known.pop(host, None)
        self._known[host] = None
        if len(self._known) > _MOST_KNOWN:
            del self._known[next(iter(self._known))]

    async def run(self, host: str, call: Callable[[], None]) -> None:
        """Run a call in a thread, and raise its exception.

        If this is cancelled, the thread goes on, and the next call for this host waits for it.
        """
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        held = ExitStack()

        def end(error: BaseException | None) -> None:
            held.close()
            if done.done():
                return
            done.set_exception(error) if error else done.set_result(None)

        def work() -> None:
            _begin()
            error = None
            try:
                call()
            except BaseException as raised:
                error = raised
            # The service may have ended meanwhile.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(end, error)

        with ExitStack() as waiting:
            turn = self._turns.setdefault(host, asyncio.Lock())
            for each in (turn,) if host in self._known else (turn, self._free):
                await each.acquire()
                waiting.callback(each.release)
            Thread(target=work, daemon=True).start()
            held.push(waiting.pop_all())
        await done


def _begin() -> None:
    threads.begin()
    if sys.platform == "linux":
        # This is for the calling thread only, see setpriority(2).
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, _NICE)
