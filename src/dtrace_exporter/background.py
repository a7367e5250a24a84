"""Tasks that run for as long as the service does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

_log = logging.getLogger(__name__)

_AGAIN_SECONDS = 10.0


def keep_at(task: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
    """Start a task; if it fails, log why, and begin again after a while."""
    return asyncio.create_task(_keep_at(task))


async def _keep_at(task: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await task()
        except Exception:
            _log.exception("work in the background failed")
        else:
            return
        await asyncio.sleep(_AGAIN_SECONDS)
