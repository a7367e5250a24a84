"""Makes metrics of the rows of a script: counters, gauges, and histograms with fixed bounds.

A row has the value of an aggregation for its keys since the script last emptied it. A final row has
the value at the moment when the script empties it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import accumulate
from math import nan
from operator import add, lt
from typing import Generic, TypeVar

from dtrace_exporter.scripts.families import Family
from dtrace_exporter.scripts.rows import Histogram, Row

Labels = tuple[tuple[str, str], ...]
Layout = tuple[tuple[str, Labels], ...]
Block = tuple[str, Layout, tuple[float, ...]]
"""Samples of a family: its name, the suffix and labels of each sample, and the values."""

_SAMPLES = 4096
# Longer than the histograms of quantize(); a hostile host could send any length.
_MOST_REMEMBERED = 128
# A hostile host could make its keys so long that scrapes of histograms had gigabytes.
_SERIES_BYTES = 32 << 10
_LEAST_LIMIT = 1000

_Kept = TypeVar("_Kept", int, list[int])
"""A value as it is kept: a number, or the count in each bucket of a histogram."""


class BadValueError(ValueError):
    """The aggregation of a row cannot have this value; the text says why."""


class SeriesError(Exception):
    """The script has more series, or longer ones, than it may have; the text says what to do."""


class ScriptMetrics:
    """The series of a script, over all of its runs.

    Args:
        file: the path of the script, for its info metric.
        families: its metrics, in the order of its aggregations.
        limit: how many series it may have; a histogram counts as one.
        before: the metrics of the same script before a reload. Families that are equal go on.
    """

    def __init__(
        self,
        file: str,
        families: Sequence[Family],
        limit: int,
        before: ScriptMetrics | None = None,
    ) -> None:
        self.file = file
        self.families = families
        self.limit = limit
        old = {table.family: table for table in before.tables} if before else {}
        self.tables: list[_AnyTable] = [old.get(family) or _table(family) for family in families]

    def __len__(self) -> int:
        """Return the number of series."""
        return sum(len(table.index) for table in self.tables)

    def feed(self, row: Row) -> None:
        """Count a row.

        Rows with different keys may look alike. They are merged at the next heartbeat.

        Raises:
            BadValueError: the value is not possible.
            SeriesError: the row would add a series above the limit, or make scrapes too long.
        """
        table = self.tables[row.aggregation]
        at = table.index.get(row.keys)
        if at is None:
            if len(self) >= self.limit:
                raise SeriesError(
                    f"more than {self.limit} series: limit its keys, or raise its limit"
                )
            most = max(self.limit, _LEAST_LIMIT) * _SERIES_BYTES
            if sum(one.size for one in self.tables) + table.size_of(row.keys) > most:
                raise SeriesError(
                    f"names and labels of more than {most // 1_000_000} MB: shorten its keys, or"
                    " raise its limit"
                )
            at = table.add(row.keys)
        table.take(at, row)

    def tick(self) -> list[BadValueError]:
        """Handle a heartbeat, after all of its rows; return the errors in them."""
        return [*filter(None, self.ticking())]

    def ticking(self) -> Iterator[BadValueError | None]:
        """Handle a heartbeat piece by piece: yield after each series its error, or None."""
        for table in self.tables:
            yield from table.ticking()

    def end(self) -> None:
        """Handle the end of a run. In the next one all aggregations begin empty."""
        for _ in self.ending():
            pass

    def ending(self) -> Generator[None, None, None]:
        """Handle the end of a run piece by piece; if it is not finished, it can begin again."""
        for table in self.tables:
            yield from table.ending()

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """Yield the samples of all series, each block with the name of its piece."""
        for number, table in enumerate(self.tables):
            for piece in range(table.pieces):
                for block in table.blocks(piece):
                    if block[2]:
                        yield f"{number}.{piece}{block[1][0][0]}", block


class _Table(ABC, Generic[_Kept]):
    """The series of one aggregation, in the order of their first rows.

    ``size`` is how many bytes their names and labels have in a scrape.
    """

    _suffix = ""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.index: dict[tuple[str, ...], int] = {}
        self.size = 0
        self._samples = len(family.edges) + 2 if family.edges else 1
        self._names = [(at, label) for at, label in enumerate(family.labels) if label]
        # None is a free place.
        self._labels: list[Labels | None] = []
        self._piece = max(1, _SAMPLES // (len(family.edges) + 1))
        self._layouts: dict[int, tuple[Layout, ...]] = {}
        self._blocks: dict[int, tuple[Block, ...]] = {}
        # The values since the last heartbeat, if keys may look alike; None if not known.
        self._finals: dict[int, _Kept | None] = {}
        self._rows: dict[int, _Kept | None] = {}

    @property
    def pieces(self) -> int:
        """The number of pieces that blocks() has."""
        return -(-len(self._labels) // self._piece)

    def size_of(self, keys: tuple[str, ...]) -> int:
        """Return how many bytes the names and labels of a series have in a scrape."""
        values = (keys[key] for key, _ in self._names)
        return self._samples * (len(self.family.name) + sum(len(each.encode()) for each in values))

    def add(self, keys: tuple[str, ...]) -> int:
        """Add a series; return its index."""
        self.size += self.size_of(keys)
        at = self.index[keys] = len(self._labels)
        self._labels.append(self._labels_of(keys))
        self._new_layout(at)
        return at

    def take(self, at: int, row: Row) -> None:
        """Count a row of a series."""
        if not self.family.alike:
            if row.final:
                self.set_last(at, self.kept(row.value))
            else:
                self.put(at, row.value)
            return
        told = self._finals if row.final else self._rows
        value = self.kept(row.value)
        before = told.get(at, value)
        if at in told and before is not None:
            before = self.merged(before, value)
        told[at] = before
        if before is None:
            raise BadValueError(f"the {self.family.function} of several keys that look alike")

    def ticking(self) -> Iterator[BadValueError | None]:
        """Count the merged rows of a heartbeat; yield for each series its error, or None."""
        yield from self._settle(self._finals, self.set_last)
        yield from self._settle(self._rows, self.set)

    def ending(self) -> Generator[None, None, None]:
        """Count the final rows of a run that ends; drop other rows since its last heartbeat."""
        for _ in self._settle(self._finals, self.set_last):
            yield
        while self._rows:
            self._rows.popitem()
            yield

    def _settle(
        self, told: dict[int, _Kept | None], count: Callable[[int, _Kept], None]
    ) -> Iterator[BadValueError | None]:
        for at in [*told]:
            # Removed before it is counted, so that no value counts twice if the caller stops here.
            value, wrong = told.pop(at), None
            try:
                if value is not None:
                    count(at, value)
            except BadValueError as error:
                wrong = error
            yield wrong

    def put(self, at: int, value: int | Histogram) -> None:
        """Set the value of a series, as a row has it."""
        self.set(at, self.kept(value))

    @abstractmethod
    def kept(self, value: int | Histogram) -> _Kept:
        """Return a value as it is kept."""

    @abstractmethod
    def merged(self, one: _Kept, other: _Kept) -> _Kept | None:
        """Return the merged value of two keys, None if it cannot be computed."""

    @abstractmethod
    def set(self, at: int, value: _Kept) -> None:
        """Set the value of a series."""

    @abstractmethod
    def set_last(self, at: int, value: _Kept) -> None:
        """Set the value that a series has when it is emptied."""

    def blocks(self, piece: int) -> tuple[Block, ...]:
        """Return the samples of a piece; if nothing has changed, the same objects as before."""
        blocks = self._blocks.get(piece)
        if blocks is None:
            part = slice(piece * self._piece, (piece + 1) * self._piece)
            layouts = self._layouts.get(piece)
            if layouts is None:
                labels = [each for each in self._labels[part] if each is not None]
                layouts = self._layouts[piece] = self._layout(labels)
            name = self.family.name
            blocks = self._blocks[piece] = tuple(
                (name, layout, values)
                for layout, values in zip(layouts, self._values(part), strict=True)
            )
        return blocks

    def _labels_of(self, keys: tuple[str, ...]) -> Labels:
        return tuple([(label, keys[key]) for key, label in self._names])

    def _new_layout(self, at: int) -> None:
        self._layouts.pop(at // self._piece, None)
        self._blocks.pop(at // self._piece, None)

    def _layout(self, labels: list[Labels]) -> tuple[Layout, ...]:
        return (tuple([(self._suffix, each) for each in labels]),)

    @abstractmethod
    def _values(self, part: slice) -> tuple[tuple[float, ...], ...]: ...


class _Numbers(_Table[int]):
    def kept(self, value: int | Histogram) -> int:
        if not isinstance(value, int):
            raise BadValueError("not a whole number")
        return value

    def merged(self, one: int, other: int) -> int | None:
        function = self.family.function
        if function in ("min", "max"):
            return min(one, other) if function == "min" else max(one, other)
        return one + other if function in ("count", "sum") else None


class _Counters(_Numbers):
    _suffix = "_total"

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self._before: list[int] = []
        self._now: list[int] = []

    def add(self, keys: tuple[str, ...]) -> int:
        self._before.append(0)
        self._now.append(0)
        return super().add(keys)

    def set(self, at: int, value: int) -> None:
        if value < self._now[at]:
            if not (self.family.alike and self.family.function == "count"):
                raise BadValueError(f"a {self.family.function} that falls: its type would be gauge")
            # A process has ended, and from now on its stacks are printed as addresses.
            self._before[at] += self._now[at] - value
        if value != self._now[at]:
            self._now[at] = value
            self._blocks.pop(at // self._piece, None)

    def set_last(self, at: int, value: int) -> None:
        self.set(at, value)
        self._before[at] += self._now[at]
        self._now[at] = 0

    def ending(self) -> Generator[None, None, None]:
        """Also go on from the counts of this run."""
        yield from super().ending()
        self._before = [a + b for a, b in zip(self._before, self._now, strict=True)]
        self._now = [0] * len(self._before)

    def _values(self, part: slice) -> tuple[tuple[float, ...], ...]:
        both = zip(self._before[part], self._now[part], strict=True)
        scale = self.family.scale
        return (tuple([(a + b) * scale for a, b in both]),)


class _Gauges(_Numbers):
    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self._last: list[float] = []
        self._told: set[int] = set()
        self._free: list[int] = []

    def add(self, keys: tuple[str, ...]) -> int:
        if not self._free:
            # It has no value until all rows that look alike have come.
            self._last.append(nan)
            return super().add(keys)
        self.size += self.size_of(keys)
        at = self.index[keys] = self._free.pop()
        self._last[at] = nan
        self._labels[at] = self._labels_of(keys)
        self._new_layout(at)
        return at

    def set(self, at: int, value: int) -> None:
        self._told.add(at)
        scaled = float(value * self.family.scale)
        if scaled != self._last[at]:
            self._last[at] = scaled
            self._blocks.pop(at // self._piece, None)

    def set_last(self, at: int, value: int) -> None:
        self.set(at, value)

    def ticking(self) -> Iterator[BadValueError | None]:
        """Also forget series without a row since the last heartbeat."""
        yield from super().ticking()
        if len(self._told) < len(self.index):
            for keys, at in [*self.index.items()]:
                if at not in self._told:
                    self.size -= self.size_of(keys)
                    del self.index[keys]
                    self._labels[at] = None
                    self._free.append(at)
                    self._new_layout(at)
                    yield None
        self._told.clear()

    def ending(self) -> Generator[None, None, None]:
        """Also forget all series."""
        yield from super().ending()
        self._told.clear()
        for _ in self.ticking():
            yield

    def _values(self, part: slice) -> tuple[tuple[float, ...], ...]:
        both = zip(self._last[part], self._labels[part], strict=True)
        return (tuple([value for value, labels in both if labels is not None]),)


class _Histograms(_Table[list[int]]):
    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self._edges = family.edges
        self._bounds = [(("le", bound),) for bound in (*family.bounds, "+Inf")]
        self._before: list[list[int]] = []
        self._now: list[list[int]] = []
        self._raw: list[object] = []

    def add(self, keys: tuple[str, ...]) -> int:
        self._before.append([0] * len(self._bounds))
        self._now.append([0] * len(self._bounds))
        self._raw.append(())
        return super().add(keys)

    def kept(self, value: int | Histogram) -> list[int]:
        if not isinstance(value, tuple):
            raise BadValueError("not a distribution")
        cells = [0] * len(self._bounds)
        for edge, count in value:
            cells[0 if edge is None else bisect_right(self._edges, edge)] += count
        return cells

    def merged(self, one: list[int], other: list[int]) -> list[int]:
        return [*map(add, one, other)]

    def put(self, at: int, value: int | Histogram) -> None:
        if value != self._raw[at]:
            super().put(at, value)
            if isinstance(value, tuple) and len(value) <= _MOST_REMEMBERED:
                self._raw[at] = value

    def set(self, at: int, value: list[int]) -> None:
        self._raw[at] = ()
        if any(map(lt, value, self._now[at])):
            if not self.family.alike:
                raise BadValueError("a count that falls")
            # As for a counter.
            pairs = zip(self._now[at], value, strict=True)
            fallen = [max(0, now - cell) for now, cell in pairs]
            self._before[at] = [*map(add, self._before[at], fallen)]
        if value != self._now[at]:
            self._now[at] = value
            self._blocks.pop(at // self._piece, None)

    def set_last(self, at: int, value: list[int]) -> None:
        self.set(at, value)
        self._empty(at)

    def ending(self) -> Generator[None, None, None]:
        """Also go on from the counts of this run."""
        yield from super().ending()
        for at in range(len(self._now)):
            self._empty(at)
            yield

    def _empty(self, at: int) -> None:
        self._before[at] = [*map(add, self._before[at], self._now[at])]
        self._now[at], self._raw[at] = [0] * len(self._bounds), ()

    def _layout(self, labels: list[Labels]) -> tuple[Layout, ...]:
        buckets = [("_bucket", each + bound) for each in labels for bound in self._bounds]
        return tuple(buckets), tuple([("_count", each) for each in labels])

    def _values(self, part: slice) -> tuple[tuple[float, ...], ...]:
        buckets: list[float] = []
        counts = []
        for before, now in zip(self._before[part], self._now[part], strict=True):
            cells = [float(a + b) for a, b in zip(before, now, strict=True)]
            buckets += accumulate(cells)
            counts.append(buckets[-1])
        return tuple(buckets), tuple(counts)


_AnyTable = _Table[int] | _Table[list[int]]


def _table(family: Family) -> _AnyTable:
    if family.kind == "counter":
        return _Counters(family)
    return _Gauges(family) if family.kind == "gauge" else _Histograms(family)
