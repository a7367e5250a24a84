"""Finds and reads the rows in the output of a script.

Their format is described in rendering.py. Between them there may be the script's own output, and a
key may have any text, such as the name that a user gave to a process or a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from dtrace_exporter.scripts.reader import Script
from dtrace_exporter.scripts.rendering import STACK, STRING, Conversions, counted

MAX_ROW = 256 << 10
"""The longest row, in bytes. Keys of some 10 KB are four times as long if each byte is escaped."""

MAX_KEYS = 16 << 10
"""The most bytes of all keys of a row. Honest ones have some 10 KB; a hostile host could fill the
memory."""

Histogram = tuple[tuple[int | None, int], ...]
"""Buckets: the lowest value of each, None for the one of all lower values, and its count."""


class Row(NamedTuple):
    """The value of an aggregation for some keys.

    ``aggregation`` is its index in the script. After a ``final`` row the script empties it, so the
    next value begins from nothing.
    """

    aggregation: int
    keys: tuple[str, ...]
    value: int | Histogram
    final: bool


class Ready(NamedTuple):
    """All probes are enabled."""


class Tick(NamedTuple):
    """All rows of a tick have come; ``time`` is in nanoseconds of the host's monotonic clock."""

    time: int


class BadRow(NamedTuple):
    """A row that cannot be read, or whose value DTrace prints wrong; ``why`` says what is wrong."""

    text: str
    why: str


Record = Row | Ready | Tick | BadRow

_BEGIN, _FIELD = b"\x1e", b"\x1f"
_LONGEST_TEXT = 200
# An honest line has at least 60 bytes.
_MOST_LINES = MAX_ROW // 60
_U64 = 1 << 64
_LOWEST, _HIGHEST = -(1 << 63), (1 << 63) - 1
_NUMBER = re.compile(rb"-?[0-9]{1,20}")
_ESCAPE = re.compile(rb"\\(?:([0-3][0-7]{2})|(.))", re.DOTALL)
_UNESCAPED = bytes.maketrans(b"abfnrtv", b"\a\b\f\n\r\t\v")
# It matches each line of a table once, also the head and empty lines.
_LINES = re.compile(
    rb"^ *+(?:(< |>= |<= |abs\(\) < |)(-?[0-9]{1,20}) [ @|]* (-?[0-9]{1,20}) *|.*Distribution.*|)$",
    re.MULTILINE,
)


class Splitter:
    """Finds and reads the rows of one run.

    Args:
        script: the script.
        conversions: as for rendering.render(), like the other arguments.
        engine: LINUX or SUN.
        token: the mark of the rows.
    """

    def __init__(self, script: Script, conversions: Conversions, engine: str, token: str) -> None:
        self._functions = [each.function for each in script.aggregations]
        self._kinds = {
            f"{kind} {number}".encode(): (number, kind == "final")
            for number in range(len(script.aggregations))
            for kind in ("row", "final")
        }
        self._conversions = conversions
        self._engine = engine
        self._mark = f"{token} ".encode()
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[Record]:
        """Yield the records of the rows that a chunk completes."""
        *pieces, self._rest = (self._rest + chunk).split(_BEGIN)
        for piece in pieces:
            if piece.startswith(self._mark):
                yield self._record(piece[len(self._mark) :])
        if len(self._rest) > MAX_ROW:
            if self._rest.startswith(self._mark):
                yield _bad(self._rest[len(self._mark) :], f"longer than {MAX_ROW} bytes")
            # It does not begin like a row, so it is none, whatever follows.
            self._rest = b"?"

    def _record(self, row: bytes) -> Record:
        if len(row) > MAX_ROW:
            return _bad(row, f"longer than {MAX_ROW} bytes")
        try:
            return self._read(row)
        except _BadRowError as error:
            return _bad(row, str(error))

    def _read(self, row: bytes) -> Record:
        kind, *fields = row.split(_FIELD)
        if kind not in self._kinds:
            if kind == b"ready" and not fields:
                return Ready()
            if kind.startswith(b"tick ") and not fields:
                return Tick(_number(kind[5:]))
            raise _BadRowError("unknown kind of row")
        number, final = self._kinds[kind]
        function, conversions = self._functions[number], self._conversions[number]
        values = fields[len(conversions) :]
        if len(values) != 1 + counted(function, self._engine):
            raise _BadRowError(f"{len(fields)} fields")
        if sum(map(len, fields[: len(conversions)])) > 4 * MAX_KEYS:
            raise _BadRowError(f"keys longer than {MAX_KEYS} bytes")
        keys = tuple(map(_key, fields, conversions))
        if sum(len(key.encode()) for key in keys) > MAX_KEYS:
            raise _BadRowError(f"keys longer than {MAX_KEYS} bytes")
        value = _table(function, values[0]) if "quantize" in function else _value(function, *values)
        return Row(number, keys, value, final)


class _BadRowError(ValueError):
    """A row cannot be read; the text says why."""


def _bad(row: bytes, why: str) -> BadRow:
    return BadRow(row[:_LONGEST_TEXT].decode("utf-8", "backslashreplace"), why)


def _number(text: bytes) -> int:
    if not _NUMBER.fullmatch(text):
        raise _BadRowError(f"{text[:24]!r} is not a number")
    return int(text)


def _key(text: bytes, conversion: str) -> str:
    """Return a key as it was in the kernel, but for what a terminal might obey.

    Bytes that are not UTF-8, and characters that cannot be printed, are escaped as Python does.
    """
    if conversion == STRING and b"\\" in text:
        text = _ESCAPE.sub(_unescaped, text)
    elif conversion == STACK:
        text = b";".join(filter(None, (line.strip() for line in text.split(b"\n"))))
    key = text.decode("utf-8", "backslashreplace")
    if key.isprintable():
        return key
    # Scrapes have newlines as \n.
    return "".join(
        one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode()
        for one in key
    )


def _unescaped(escape: re.Match[bytes]) -> bytes:
    if escape[1]:
        return bytes([int(escape[1], 8)])
    # \0 is the end of the string.
    return b"" if escape[2] == b"0" else escape[2].translate(_UNESCAPED)


def _value(function: str, text: bytes, of: bytes = b"") -> int:
    """Read the value of an aggregation.

    Args:
        function: the aggregating function.
        text: the value.
        of: the number of values that were aggregated, if the row has it.
    """
    value, events = _number(text), _number(of) if of else 1
    if function in ("min", "max") and not _LOWEST < value < _HIGHEST:
        raise _BadRowError(f"the {function} of nothing")
    if function in ("count", "stddev") and value < 0:
        raise _BadRowError(f"a {function} below 0")
    if function == "avg" and events < 1:
        raise _BadRowError("the avg of nothing")
    # A single value is printed right. For several ones, the remainder of the division is unknown.
    if function == "avg" and events > 1 and value % _U64 * events > _HIGHEST - events:
        raise _BadRowError("the average of values whose sum is negative")
    return value


def _table(function: str, text: bytes) -> Histogram:
    """Read the table of a histogram: a head, and lines of an edge, a bar and a count."""
    if text.count(b"\n") > _MOST_LINES:
        raise _BadRowError(f"a table of more than {_MOST_LINES} lines")
    lines = _LINES.findall(text)
    if len(lines) != text.count(b"\n") + 1:
        wrong = next(line for line in text.split(b"\n") if not _LINES.fullmatch(line))
        raise _BadRowError(f"{wrong[:80]!r} is not a line of a table")
    found: list[tuple[int | None, int]] = []
    above = 0
    for sign, edge_text, count_text in lines:
        if not edge_text:
            continue
        edge, count = int(edge_text), int(count_text)
        if count < 0:
            raise _BadRowError("a count below 0")
        found.append((_low(function, sign, edge, above) if sign or edge < 0 else edge, count))
        above = edge
    if not found:
        raise _BadRowError("a table without lines")
    return tuple(found)


def _low(function: str, sign: bytes, edge: int, above: int) -> int | None:
    """Return the lowest value that counts in a line of a table.

    A bucket begins at the edge of its line, and ends where the next one begins. With quantize and
    llquantize, buckets below 0 mirror those above 0, so they end at their edge.

    Args:
        function: the aggregating function.
        sign: what is before the edge in the line.
        edge: the edge of the line.
        above: the edge of the line above it, 0 for none.
    """
    if sign in (b"< ", b"<= "):
        return None
    if sign == b"abs() < ":
        return 1 - edge
    if function == "quantize" and edge < 0:
        return 2 * edge + 1 if 2 * edge > _LOWEST else _LOWEST
    if function == "llquantize" and edge < 0 and above:
        return above + 1
    return edge
