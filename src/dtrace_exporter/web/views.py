"""Makes pages and JSON of the state and its history, one at a time and in a thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from dtrace_exporter.state import State, unchanged
from dtrace_exporter.turns import Precedence, at_once, by_turns
from dtrace_exporter.web.rates import POINT_SECONDS, History

_log = logging.getLogger(__name__)

SAMPLE_SECONDS = 1.0
"""How often a sample is taken, in seconds, if sessions update the state. A source without DTrace is
read once in POINT_SECONDS."""

_SHARE = 50
"""Samples take at most 1/50 of the time."""

_T = TypeVar("_T")


class Views:
    """A state and its history, for views that take long to make.

    Args:
        state: what the views show.
        precedence: that of scrapes over views.

    Attributes:
        turn: a lock to hold while a view is made.
        give_way: the function that makes a view calls it after each listener.
    """

    def __init__(self, state: State, precedence: Precedence | None = None) -> None:
        self.turn = asyncio.Lock()
        self.give_way = precedence.give_way if precedence else at_once
        self._state = state
        self._history = History()

    async def keep_sampling(self) -> None:
        """Take samples for the history, for ever."""
        while True:
            began = time.monotonic()
            try:
                async with self.turn:
                    began = time.monotonic()
                    await self._state.refresh()
                    await by_turns(self._history.sampling(self._state))
            except Exception:
                _log.exception("no sample for the history")
            took = time.monotonic() - began
            pause = SAMPLE_SECONDS if self._state.refresh is unchanged else POINT_SECONDS
            await asyncio.sleep(max(pause - took, _SHARE * took))

    async def make(self, what: Callable[[State, History], _T]) -> _T:
        """Return the result of a function of the current state and its history.

        The function runs in a thread. The caller must hold ``turn``.
        """
        await self._state.refresh()
        shown = replace(
            self._state,
            table=await by_turns(self._state.table.copying()),
            sessions={id_: replace(status) for id_, status in self._state.sessions.items()},
        )
        return await asyncio.to_thread(what, shown, self._history)
