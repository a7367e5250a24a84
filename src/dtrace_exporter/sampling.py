"""Samples the accept queues between scrapes on hosts without DTrace."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Iterable

from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.listeners import Identity, ListenerTable, SessionId
from dtrace_exporter.sockets import MORE_THAN
from dtrace_exporter.turns import by_turns

Placed = tuple[str, ListeningSocket]
"""A socket, and the name of the place that it listens in."""


class Sampler:
    """Takes samples at a steady pace for the listeners of a table.

    Args:
        table: the table of listeners.
        session: the session of the listeners.
        read: returns the listening sockets; it is called in a thread and may block.
    """

    def __init__(
        self, table: ListenerTable, session: SessionId, read: Callable[[], Iterable[Placed]]
    ) -> None:
        self._table = table
        self._session = session
        self._read = read
        self._interval = 0.0
        self._running: asyncio.Task[None] | None = None

    def every(self, seconds: float) -> None:
        """Take a sample every ``seconds`` from now on; 0 is never."""
        if seconds == self._interval:
            return
        if self._running is not None:
            self._running.cancel()
        self._interval = seconds
        self._running = asyncio.create_task(self._run(seconds)) if seconds else None

    async def _run(self, interval: float) -> None:
        due = time.monotonic() + interval
        while True:
            await asyncio.sleep(due - time.monotonic())
            began = time.monotonic()
            try:
                sockets = await asyncio.to_thread(self._read)
            except OSError:
                # The next scrape gets the same error, and logs it.
                sockets = ()
            await by_turns(take(self._table, self._session, sockets))
            now = time.monotonic()
            # At most half of a processor's time, however long a sample takes.
            due = next_beat(due, interval, now + (now - began))


def next_beat(due: float, interval: float, after: float) -> float:
    """Return when the next sample is due.

    Samples that were missed are left out: several samples of one moment would give it more weight.

    Args:
        due: when the last sample was due, in seconds of the monotonic clock.
        interval: the time between two samples, in seconds.
        after: the next sample is due after this time, in seconds of the same clock.
    """
    return due + interval * max(1.0, (after - due) // interval + 1)


def take(
    table: ListenerTable, session: SessionId, sockets: Iterable[Placed]
) -> Generator[None, None, None]:
    """Add one sample to each listener, that of its fullest socket.

    Args:
        table: the table of listeners. Listeners that it does not have are left out.
        session: the session of the listeners.
        sockets: the sockets that listen.

    Yields:
        After each socket, and before each listener.
    """
    fullest: dict[Identity, ListeningSocket] = {}
    for place, socket in sockets:
        identity = Identity(session.host, place, socket.address, socket.port)
        known = fullest.get(identity)
        if known is None or _fullness(socket) > _fullness(known):
            fullest[identity] = socket
        yield
    for identity, socket in fullest.items():
        yield
        if not table.is_watched(session):
            return
        listener = table.get(identity)
        if listener is not None:
            listener.sample(socket.q, socket.qmax)


def _fullness(socket: ListeningSocket) -> float:
    return socket.q / MORE_THAN.of(socket.qmax)
