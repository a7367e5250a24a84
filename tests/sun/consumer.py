"""dtrace(1) as a consumer of the kernel's data: its copy of aggregations, and its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sun.compiler import Aggregation, Compiled, Statement
from sun.evaluate import BAD_ADDRESS, BAD_ALIGNMENT, Fault, Probe
from sun.expressions import MASK, signed
from sun.output import Value
from sun.rules import Rules

Keys = tuple[tuple[int, Value], ...]
_PREFIX = "dtrace: "


@dataclass(frozen=True, slots=True)
class Record:
    """The values that a clause recorded; ``number`` is the order of all records."""

    clause: Compiled
    values: tuple[Value, ...]
    number: int


@dataclass(frozen=True, slots=True)
class ErrorRecord:
    """A fault; ``action`` is 0 in a predicate, ``number`` is the order of all records."""

    epid: int
    probe: Probe
    fault: Fault
    action: int
    number: int


class Copy:
    """dtrace(1)'s own copy of all aggregations.

    Args:
        rules: the rules of the engine.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._values: dict[str, dict[Keys, list[int]]] = {}
        self._alike: dict[tuple[Any, ...], Keys] = {}
        self._known: dict[str, Aggregation] = {}
        self._printed: set[str] = set()

    def add(self, aggregation: Aggregation, keys: Keys, value: Sequence[int]) -> None:
        """Merge the counts of one CPU since the last time."""
        table = self._values.setdefault(aggregation.name, {})
        self._known.setdefault(aggregation.name, aggregation)
        old = table.get(keys)
        if self._rules.rows_merged:
            like = (aggregation.name, *_layout(keys))
            old = table.get(keys := self._alike.setdefault(like, keys))
        if old is None:
            table[keys] = list(value)
        elif aggregation.function in {"min", "max"}:
            choose = min if aggregation.function == "min" else max
            old[0] = choose(old[0], value[0], key=signed)
        else:
            old[:] = [one + other & MASK for one, other in zip(old, value, strict=True)]

    def rows(self, aggregations: Sequence[Aggregation]) -> list[tuple[Keys, list[int]]]:
        """Return the keys and values of aggregations that share keys, in the order of printing."""
        self._printed.update(name for a in aggregations if self._values.get(name := a.name))
        return self._sorted(aggregations)

    def unprinted(self) -> list[str]:
        """Return the rows of aggregations that were never printed, as lines."""
        return [
            _line(keys, values[0])
            for name, aggregation in self._known.items()
            if name not in self._printed
            for keys, values in self._sorted([aggregation])
        ]

    def _sorted(self, aggregations: Sequence[Aggregation]) -> list[tuple[Keys, list[int]]]:
        tables = [self._values.get(aggregation.name, {}) for aggregation in aggregations]
        rows = [
            (
                keys,
                [
                    _result(aggregation, table[keys]) if keys in table else 0
                    for aggregation, table in zip(aggregations, tables, strict=True)
                ],
            )
            for keys in sorted(dict.fromkeys(keys for table in tables for keys in table))
        ]
        if self._rules.sorted_by_value:
            rows.sort(
                key=lambda row: [
                    _rank(*one)
                    for one in zip(
                        aggregations, tables, row[1], [row[0]] * len(tables), strict=True
                    )
                ]
            )
        return rows

    def truncate(self, aggregation: Aggregation, keep: int) -> None:
        """Keep only the ``keep`` largest values, or the smallest if ``keep`` is negative."""
        table = self._values.get(aggregation.name, {})
        rows = self._sorted([aggregation])
        kept = rows[len(rows) - keep :] if keep > 0 else rows[: abs(keep)]
        if keep >= len(rows):
            kept = rows
        for keys in table.keys() - {keys for keys, _ in kept}:
            del table[keys]

    def clear(self, aggregation: Aggregation) -> None:
        """Set all values to 0, and keep their keys."""
        for value in self._values.get(aggregation.name, {}).values():
            value[:] = [0] * len(value)


class Consumer:
    """Prints records.

    Args:
        copy: the copy of the aggregations.
        on_exit: called when a record is of exit().
        on_empty: called with an aggregation that trunc() or clear() empties.
        rules: the rules of the engine.
    """

    def __init__(
        self,
        copy: Copy,
        on_exit: Callable[[], object],
        on_empty: Callable[[Aggregation], object],
        rules: Rules,
    ) -> None:
        self._copy = copy
        self._on_exit = on_exit
        self._on_empty = on_empty
        self._rules = rules
        self._told: set[int] = set()
        self.pieces: list[str] = []
        self.errors: list[str] = []

    def consume(self, records: Sequence[Record | ErrorRecord]) -> None:
        """Carry out the statements of records, in order."""
        for record in records:
            if isinstance(record, ErrorRecord):
                self._error(record)
                continue
            for statement in record.clause.statements:
                first = statement.first
                self._act(statement, record.values[first : first + statement.count])

    def drops(self, count: int, kind: str = "", cpu: int | None = None, behind: str = "") -> None:
        """Report on stderr how much was lost, if anything was."""
        if count:
            where = behind if cpu is None else f" on CPU {cpu}"
            self.errors.append(f"{_PREFIX}{count} {kind}drop{'s' * (count > 1)}{where}")

    def rest(self) -> None:
        """Print the aggregations that no printa() has printed, without the newline at the end."""
        rows = self._copy.unprinted()
        if rows:
            self.pieces.append("\n" + "\n".join(rows))

    def _act(self, statement: Statement, values: tuple[Any, ...]) -> None:
        if statement.kind == "exit":
            self._on_exit()
        elif statement.kind == "printf":
            assert statement.format
            self.pieces.append(statement.format.fill(values))
        elif statement.kind == "printa":
            rows = self._copy.rows(statement.aggregations)
            if statement.format is None:
                lines = [_line(keys, results[0]) for keys, results in rows]
                self.pieces.append("\n" + "".join(f"{line}\n" for line in lines))
                return
            for keys, results in rows:
                self.pieces.append(statement.format.fill([key for _, key in keys], results))
        else:
            aggregation = statement.aggregations[0]
            if statement.kind == "trunc":
                # The number is recorded in 32 or 64 bits; no aggregation has so many keys that the
                # sign bit counts.
                keep = values[1]
                bits = 64 if keep >> 32 else 32
                self._copy.truncate(aggregation, keep - ((keep >> (bits - 1)) << bits))
            else:
                self._copy.clear(aggregation)
            if not self._rules.trunc_on_copy:
                self._on_empty(aggregation)

    def _error(self, record: ErrorRecord) -> None:
        if record.epid in self._told and not self._rules.faults_told_each_time:
            return
        self._told.add(record.epid)
        fault, probe = record.fault, record.probe
        where = f"action #{record.action}" if record.action else "predicate"
        if fault.offset is not None:
            where += f" at DIF offset {fault.offset}"
        address = f" ({fault.address:#x})" if fault.what in {BAD_ADDRESS, BAD_ALIGNMENT} else ""
        name = ":".join(probe[1:])
        self.errors.append(
            f"{_PREFIX}error on enabled probe ID {record.epid} (ID {probe.id}: {name}): "
            f"{fault.what}{address} in {where}"
        )


def _result(aggregation: Aggregation, value: list[int]) -> int:
    if aggregation.function != "avg":
        return value[0]
    # printa() divides it as an unsigned number.
    return value[1] // value[0] if value[0] else 0


def _rank(aggregation: Aggregation, table: dict[Keys, list[int]], value: int, keys: Keys) -> int:
    """Return the sort key of a row: an average sorts by its signed value, whatever is printed."""
    if aggregation.function == "avg":
        return _average(table.get(keys, [0, 0]))
    return signed(value)


def _average(value: Sequence[int]) -> int:
    """Return an average with its sign, rounded towards zero."""
    count, sum_ = value[0], signed(value[1])
    average = abs(sum_) // count if count else 0
    return average if sum_ >= 0 else -average


def _layout(keys: Keys) -> tuple[Any, ...]:
    """Return what dtrace(1) compares to find equal keys: their places and bytes.

    Keys are compared at their places, after the number of their aggregation, and by the size of the
    whole, in which smaller keys leave gaps.
    """
    at, places = 8, []
    for size, value in keys:
        step = next(n for n in (8, 4, 2, 1) if size % n == 0)
        at = -(-at // step) * step
        places.append((at, value))
        at += size
    return -(-at // 8), *places


def _line(keys: Keys, value: int) -> str:
    """Return a row in dtrace(1)'s own format."""
    widths = {1: 3, 2: 5, 4: 8, 8: 16}
    words = []
    for size, key in keys:
        if isinstance(key, bytes):
            words.append(f"  {key.decode('utf-8', 'replace'):<50}")
        else:
            number = key - (key >> (8 * size - 1) << 8 * size) if size >= 4 else key
            words.append(f" {number:{widths[size]}}")
    return "".join(words) + f" {signed(value):16}"
