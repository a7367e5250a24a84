"""A table on a terminal: its columns, which of them fit, and which one it is sorted by."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dtrace_exporter import screen
from dtrace_exporter.screen import Line

Row = Mapping[str, Any]
"""Values by the key of their column, without those that are not known."""

_WIDEST = 40
_HELP = "q quit   < > sort by another column   r reverse"


class Column(NamedTuple):
    """A column.

    Attributes:
        title: its title.
        show: returns a value as text.
        style: returns the style of a value.
        is_text: whether its values are aligned to the left and the least one comes first.
        upwards: whether the least value comes first.
    """

    title: str
    show: Callable[[Any], str] = str
    style: Callable[[Any], str] = lambda _: ""
    is_text: bool = False
    upwards: bool = False


def rate(value: float) -> str:
    """Return a rate, in events per second, as text."""
    return f"{value:.1f}" if 0 < value < 10 else f"{value:.0f}"


class Sorted:
    """A table that the user can sort by another column, or in reverse, by pressing a key.

    Args:
        columns: the columns by key, in their order.
        by: the key of the column that it is sorted by at first.
        first_to_go: the keys of the columns that a narrow terminal omits, in this order.
    """

    def __init__(self, columns: Mapping[str, Column], by: str, first_to_go: Sequence[str]) -> None:
        self.by = by
        self.backwards = False
        self._columns = columns
        self._first_to_go = first_to_go

    def press(self, key: str, rows: Sequence[Row]) -> None:
        """Handle a key.

        Args:
            key: as screen.show() passes it on.
            rows: the rows of the table; columns that none of them has are skipped.
        """
        if key == "r":
            self.backwards = not self.backwards
        step = {"<": -1, screen.LEFT: -1, ">": 1, screen.RIGHT: 1}.get(key, 0)
        there = [
            name for name in self._columns if name == self.by or any(name in row for row in rows)
        ]
        if step:
            self.by = there[(there.index(self.by) + step) % len(there)]

    def draw(
        self,
        columns: int,
        lines: int,
        what: str,
        rows: Sequence[Row],
        note: str,
        *,
        bad: bool = False,
    ) -> list[Line]:
        """Return the lines that a terminal shows.

        Args:
            columns: the width of the terminal.
            lines: its height.
            what: what the rows are, in the plural.
            rows: all rows; equal ones stay in this order.
            note: the end of the first line.
            bad: whether the note is about an error.
        """
        upwards = (
            self._columns[self.by].is_text or self._columns[self.by].upwards
        ) != self.backwards
        # Unknown values come last in both orders.
        known = [row for row in rows if self.by in row]
        known.sort(key=lambda row: row[self.by], reverse=not upwards)
        room = max(lines - 3, 0)
        shown = [*known, *(row for row in rows if self.by not in row)][:room]
        count = f"{len(rows)} {what}" + (f", {room} shown" if len(rows) > room else "")
        way = "upwards" if upwards else "downwards"
        head = f"{time.strftime('%H:%M:%S')} {count}, by {self.by} {way}; "
        keys, widths = self._fitting(shown, columns)
        titles = [(self._columns[key].title, "cyan" if key == self.by else "bold") for key in keys]
        table = [
            [
                (f"{text:{'<' if self._columns[key].is_text else '>'}{widths[key]}}  ", style)
                for key, (text, style) in zip(keys, cells, strict=True)
            ]
            for cells in (titles, *([self._cell(row, key) for key in keys] for row in shown))
        ]
        return [[(head, ""), (note, "red" if bad else "")], *table, [(_HELP, "dim")]]

    def _cell(self, row: Row, key: str) -> tuple[str, str]:
        column = self._columns[key]
        if key not in row:
            return "" if column.is_text else "-", ""
        return column.show(row[key])[:_WIDEST], column.style(row[key])

    def _fitting(self, rows: Sequence[Row], columns: int) -> tuple[list[str], dict[str, int]]:
        """Return the columns that fit into a terminal, and the width of each."""
        keys = [
            key
            for key in self._columns
            if key not in self._first_to_go or key == self.by or any(key in row for row in rows)
        ]
        widths = {
            key: max(
                len(self._columns[key].title), *(len(self._cell(row, key)[0]) for row in rows), 0
            )
            for key in keys
        }
        for key in self._first_to_go:
            if sum(widths[name] + 2 for name in keys) - 2 <= columns:
                break
            if key in keys and key != self.by:
                keys.remove(key)
        return keys, widths
