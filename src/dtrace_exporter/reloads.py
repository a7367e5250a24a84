"""Reloads on demand: whoever asks, and however often, one runs at a time and at most one waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Reloads:
    """Reloads for all who ask: one at a time, and one more that is shared by all who wait for it.

    Args:
        reload: does it once.
    """

    def __init__(self, reload: Callable[[], Awaitable[None]]) -> None:
        self._reload = reload
        self._asked: list[asyncio.Future[None]] = []
        self._working: asyncio.Task[None] | None = None

    def ask(self) -> asyncio.Future[None]:
        """Return what is done when a reload is that begins from now on.

        It has the exception of one that failed. Who waits no more cancels it; for nobody there is
        no reload.
        """
        asked = asyncio.get_running_loop().create_future()
        self._asked.append(asked)
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return asked

    async def stop(self) -> None:
        """Give up the one that runs, and those that wait."""
        for asked in self._asked:
            asked.cancel()
        if self._working is not None:
            self._working.cancel()
            await asyncio.wait([self._working])

    async def _work(self) -> None:
        while self._asked:
            asked, self._asked = [each for each in self._asked if not each.done()], []
            if not asked:
                return
            try:
                await self._reload()
            except Exception as error:
                for each in asked:
                    if not each.done():
                        each.set_exception(error)
            else:
                for each in asked:
                    if not each.done():
                        each.set_result(None)
            finally:
                for each in asked:
                    each.cancel()
