"""What the kernel of this host tells without a D program."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import replace

from dtrace_exporter import owners, sock_diag
from dtrace_exporter.background import keep_at
from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.listeners import Identity, Owner, SessionId
from dtrace_exporter.log import fields
from dtrace_exporter.namespaces import Namespaces
from dtrace_exporter.sampling import Sampler
from dtrace_exporter.state import State, UnixQueues, unchanged
from dtrace_exporter.turns import by_turns
from dtrace_exporter.unix_sockets import UnixSource
from dtrace_exporter.untraced import Untraced
from dtrace_exporter.watched import Watched

_log = logging.getLogger(__name__)

UNTRACED = SessionId("", "untraced")
"""Stands for the source without DTrace in the listener table. It is not exported as a session."""

_LOOK_SECONDS = 3.0
_LET_GO_SECONDS = 5.0
_OWNERS_SECONDS = 10.0
_OWNERS_SECONDS_AT_MOST = 60.0


class ThisHost:
    """Reads listeners where DTrace is not the source, owners of listeners, and UNIX sockets.

    All of it is read in threads, and one thing at a time.

    Args:
        state: what is read is written to it.
        home: returns the inode of the network namespace that is the table's own place; None if the
            sessions of the local host run elsewhere.

    Attributes:
        namespaces: the other network namespaces.
        source: the source without DTrace, None if DTrace is the source.
        reading: held while listeners are read and the table is updated.
        owners_looked_for: set once it has been looked whose the listeners are.
    """

    def __init__(self, state: State, home: Callable[[], str | None]) -> None:
        self.namespaces = Namespaces()
        self.source: Untraced | None = None
        self.reading = asyncio.Lock()
        self.owners_looked_for = asyncio.Event()
        self._state = state
        self._home = home
        self._sock_diag = sock_diag.SockDiagSource()
        self._sampler = Sampler(state.table, UNTRACED, self._read_queues)
        self._owners = owners.Owners(self.namespaces.holders)
        self._unix = UnixSource()
        self._unix_paths: tuple[str, ...] = ()
        # A thread goes on when the task that waits for it is cancelled.
        self._one_thread = threading.Lock()
        self._letting_go: asyncio.Task[None] | None = None

    def use(
        self, source: Untraced | None, watched: Watched, interval: float, *, counted: bool
    ) -> None:
        """Fill the listener table from a source from now on. The caller holds ``reading``.

        Args:
            source: the source, None if DTrace is the source.
            watched: the listeners that are wanted.
            interval: the time between two samples of Q in seconds, 0 for no samples.
            counted: whether another source has counted the drops until now.
        """
        self.source = source
        if counted:
            self._sock_diag = sock_diag.SockDiagSource(counted=True)
        if source is None:
            self._sampler.every(0)
            self._state.refresh = unchanged
            self._state.table.unwatch(UNTRACED)
            self._keep_namespaces()
            self._state.left_out = ""
            return
        if source.queues is None:
            interval = 0
        capabilities = replace(source.capabilities, sampled=interval > 0)
        self._state.table.watch(UNTRACED, watched, capabilities)
        self._sampler.every(interval)
        if self._letting_go is None:
            self._letting_go = keep_at(self._let_go)
        self._state.refresh = self._refresh

    def use_unix(self, paths: tuple[str, ...]) -> None:
        """Read the UNIX sockets whose paths match some patterns from now on.

        Args:
            paths: as UnixSource.read() wants them; without any, no UNIX sockets are read.
        """
        self._unix_paths = paths
        self._state.table.unix_drops.want(paths)
        self._state.refresh_unix = self._refresh_unix if paths else unchanged
        if not paths:
            self._state.unix = None

    def forget(self) -> Generator[None, None, None]:
        """Drop the references to listeners that the table has forgotten; see SockDiagSource."""
        return self._sock_diag.forget(self._state.table)

    async def know_owners(self) -> None:
        """Look up the owners of this host's listeners, for ever.

        A walk through /proc takes long. Meanwhile all but the programs is looked up.
        """
        walking: asyncio.Future[bool] | None = None
        # If this failed and begins again, the old ones may not be true any more.
        self._state.owners = {}
        while True:
            began = time.monotonic()
            self._state.owners = await asyncio.to_thread(self._find_owners, self._home())
            took = time.monotonic() - began
            if walking is None or walking.done():
                walking = asyncio.ensure_future(asyncio.to_thread(self._owners.walk))
            pause = min(max(_OWNERS_SECONDS, owners.SHARE * took), _OWNERS_SECONDS_AT_MOST)
            await asyncio.wait([walking], timeout=pause)
            if walking.done() and await walking:
                self._state.owners = await asyncio.to_thread(self._find_owners, self._home())
            self.owners_looked_for.set()
            await asyncio.sleep(began + pause - time.monotonic())

    async def stop(self) -> None:
        """End what runs in the background, and leave the other network namespaces."""
        self._sampler.every(0)
        self._keep_namespaces()
        await asyncio.to_thread(self._close_namespaces)

    def _keep_namespaces(self) -> None:
        if self._letting_go is not None:
            self._letting_go.cancel()
            self._letting_go = None

    async def _let_go(self) -> None:
        """Release namespaces that are not used any more, even if nobody scrapes."""
        while True:
            await asyncio.sleep(_LET_GO_SECONDS)
            if len(self.namespaces):
                await asyncio.to_thread(self._find_namespaces)

    async def _refresh(self) -> None:
        try:
            async with self.reading:
                readings = await asyncio.to_thread(self._read)
                self._state.left_out = self.namespaces.why_not
                await by_turns(self._sock_diag.update(self._state.table, UNTRACED, readings))
        except OSError as error:
            self._state.table.clear_queues(UNTRACED)
            _log.error("cannot read the listeners", extra=fields(why=str(error)))

    async def _refresh_unix(self) -> None:
        paths = self._unix_paths
        found = await asyncio.to_thread(self._read_unix, paths)
        # There may have been a reload meanwhile.
        if paths == self._unix_paths:
            self._state.unix = found
            cookies = found.cookies
            there = {(cookies[at], path) for at, path in found.by_path if at in cookies}
            self._state.table.unix_drops.look(there)

    def _find_owners(self, home: str | None) -> dict[Identity, Owner]:
        if home is None:
            return {}
        try:
            with self._one_thread:
                self.namespaces.look(_LOOK_SECONDS)
                places = owners.read(home, self.namespaces)
            return self._owners.find(places)
        except OSError as error:
            # Only the owners are missing. If sock_diag is the source, its reader reports this, too.
            _log.debug("owners not known", extra=fields(why=str(error)))
            return {}

    def _read_unix(self, paths: tuple[str, ...]) -> UnixQueues:
        with self._one_thread:
            self.namespaces.look(_LOOK_SECONDS)
            return self._unix.read(paths, self.namespaces)

    def _read(self) -> list[sock_diag.Reading]:
        with self._one_thread:
            source = self.source
            if source is None:
                return []
            self.namespaces.look(_LOOK_SECONDS)
            return source.read(self.namespaces, self._sock_diag.open)

    def _read_queues(self) -> list[tuple[str, ListeningSocket]]:
        with self._one_thread:
            source = self.source
            return [*source.queues(self.namespaces)] if source and source.queues else []

    def _find_namespaces(self) -> None:
        with self._one_thread:
            self.namespaces.look(_LOOK_SECONDS)

    def _close_namespaces(self) -> None:
        with self._one_thread:
            self.namespaces.close()
