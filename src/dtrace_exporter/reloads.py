"""Reloads on demand: however many are requested, one runs at a time and at most one waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Reloads:
    """Runs reloads, one at a time. All requests that come meanwhile share the next one.

    Args:
        reload: does one reload.
    """

    def __init__(self, reload: Callable[[], Awaitable[None]]) -> None:
        self._reload = reload
        self._asked: list[asyncio.Future[None]] = []
        self._working: asyncio.Task[None] | None = None

    def ask(self) -> asyncio.Future[None]:
        """Request a reload that begins from now on.

        Returns:
            A future that is done when the reload is, with its exception if it has failed. Cancel it
            to withdraw the request; if all are withdrawn, the reload is not begun.
        """
        asked = asyncio.get_running_loop().create_future()
        self._asked.append(asked)
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return asked

    async def stop(self) -> None:
        """Cancel the reload that runs, and those that wait."""
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
