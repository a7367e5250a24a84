"""The table of listeners as JSON, for other programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache

from dtrace_exporter.collector import OWNED, Layout, listener_series
from dtrace_exporter.state import State
from dtrace_exporter.turns import at_once
from dtrace_exporter.web.selection import Selection

_PREFIX = "dtrace_tcp_listen_"

Row = dict[str, str | float | dict[str, float]]


def render(
    state: State, selection: Selection, give_way: Callable[[], None] = at_once
) -> list[bytes]:
    """Return the listeners as a JSON array of objects, in pieces.

    Args:
        state: the state that has them.
        selection: which of them.
        give_way: called after each listener.
    """
    return [*_array(json.dumps(row) for row in rows(state, selection, give_way))]


def _array(items: Iterable[str]) -> Iterator[bytes]:
    before = "["
    for item in items:
        yield f"{before}\n{item}".encode()
        before = ","
    yield b"[]\n" if before == "[" else b"\n]\n"


def rows(
    state: State, selection: Selection, give_way: Callable[[], None] = at_once
) -> Iterator[Row]:
    """Yield the labels and metrics of each listener, by their keys in JSON.

    Args:
        state: as for render().
        selection: as for render().
        give_way: as for render().
    """
    table = state.table
    for listener in selection.of(table, state):
        series = listener_series(
            listener,
            table.capabilities(listener),
            table.name(listener),
            table.has_histograms(listener),
            state.owner(listener),
        )
        row: Row = dict(series.labels)
        for family, layout, values in series.blocks:
            if family == OWNED:
                row |= dict(layout[0][1])
                continue
            for (key, own), value in zip(_keys(family, layout), values, strict=True):
                number = int(value) if value.is_integer() else value
                if own is None:
                    row[key] = number
                else:
                    by = row.setdefault(key, {})
                    assert isinstance(by, dict)
                    by[own] = number
        yield row
        give_way()


@cache
def _keys(family: str, layout: Layout) -> list[tuple[str, str | None]]:
    """Return for each sample of a block its key in JSON, and the value of its own label, if any."""
    names = ((family + suffix).removeprefix(_PREFIX) for suffix, _ in layout)
    owns = (own[0][1] if own else None for _, own in layout)
    return [*zip(names, owns, strict=True)]
