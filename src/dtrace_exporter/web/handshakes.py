"""Threads for handshakes with clients that send certificates.

OpenSSL decodes all certificates that a client sends before it verifies the first one. A stranger
can make certificates with keys that take 0.1 s each, and all this is one call of OpenSSL.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from threading import Thread
from weakref import WeakValueDictionary

from dtrace_exporter import threads

_MOST = 16
"""How many threads there are for hosts that have not been let in before."""

_MOST_KNOWN = 256
_COSTLY_SECONDS = 0.1
"""A call that takes more processor time is costly; those of honest clients take some 2 ms."""
_MOST_COSTLY = 2
"""How many threads there are for hosts that have had costly calls."""
_MOST_BLAMED = 4096
# So that the event loop and other processes have most of the processor.
_NICE = 10


class Handshakes:
    """Runs calls of OpenSSL in threads, one at a time for each host.

    Hosts that have been let in before do not wait for others. Those that have had costly calls
    share a few threads, so that new hosts do not wait for them.
    """

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(_MOST)
        self._few = asyncio.Semaphore(_MOST_COSTLY)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._known: dict[str, None] = {}
        self._blamed: dict[str, None] = {}

    def remember(self, host: str) -> None:
        """Record that a client of a host has been let in."""
        _add(self._known, host, _MOST_KNOWN)

    def knows(self, host: str) -> bool:
        """Return whether a client of a host has been let in."""
        return host in self._known

    async def run(self, host: str, call: Callable[[], None]) -> None:
        """Run a call in a thread, and raise its exception.

        If this is cancelled, the thread goes on, and the next call for this host waits for it.
        """
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        held = ExitStack()

        def end(error: BaseException | None, took: float) -> None:
            if took > _COSTLY_SECONDS:
                _add(self._blamed, host, _MOST_BLAMED)
            held.close()
            if done.done():
                return
            done.set_exception(error) if error else done.set_result(None)

        def work() -> None:
            _begin()
            error = None
            began = time.thread_time()
            try:
                call()
            except BaseException as raised:
                error = raised
            # The service may have ended meanwhile.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(end, error, time.thread_time() - began)

        with ExitStack() as waiting:
            turn = self._turns.setdefault(host, asyncio.Lock())
            await turn.acquire()
            waiting.callback(turn.release)
            if not self.knows(host):
                place = self._few if host in self._blamed else self._free
                await place.acquire()
                waiting.callback(place.release)
            Thread(target=work, daemon=True).start()
            held.push(waiting.pop_all())
        await done


def _add(hosts: dict[str, None], host: str, most: int) -> None:
    """Add a host as the newest; if there are too many, drop the oldest."""
    hosts.pop(host, None)
    hosts[host] = None
    if len(hosts) > most:
        del hosts[next(iter(hosts))]


def _begin() -> None:
    threads.begin()
    if sys.platform == "linux":
        # This is for the calling thread only, see setpriority(2).
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, _NICE)
