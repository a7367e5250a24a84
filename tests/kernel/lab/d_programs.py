"""Generates D programs, and computes what they aggregate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isqrt

from hypothesis import strategies as st

Value = int | tuple[tuple[int | None, int], ...]
Keys = tuple[int | str, ...]
Table = dict[int | None, int]

LINEAR = (-100, 100, 7)
LOGARITHMIC = (10, 1, 4, 20)
LOWEST = -(1 << 63)


@dataclass(frozen=True)
class Program:
    """A program that only has BEGIN: its aggregations, and the values put into them, in order."""

    functions: dict[str, str] = field(default_factory=dict)
    put: tuple[tuple[str, Keys, int], ...] = ()

    @property
    def text(self) -> str:
        """The text of the program, with a clause for each value."""
        return "".join(
            f"BEGIN\n{{\n\t@{name}{_keys(keys)} = {self._call(name, value)};\n}}\n"
            for name, keys, value in self.put
        )

    def _call(self, name: str, value: int) -> str:
        function = self.functions[name]
        arguments = {
            "count": [],
            "lquantize": [value, *LINEAR],
            "llquantize": [value, *LOGARITHMIC],
        }
        return f"{function}({', '.join(map(str, arguments.get(function, [value])))})"

    def expected(self) -> dict[tuple[str, tuple[str, ...]], Value]:
        """Return the values of all aggregations by name and keys; tables without empty lines."""
        gathered: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for name, keys, value in self.put:
            gathered.setdefault((name, tuple(map(str, keys))), []).append(value)
        return {each: MODELS[self.functions[each[0]]](values) for each, values in gathered.items()}


def _keys(keys: Keys) -> str:
    # All 64 bits, because a long literal does not make other keys at its place long.
    written = (f'"{key}"' if isinstance(key, str) else f"(int64_t){key}" for key in keys)
    return f"[{', '.join(written)}]" if keys else ""


def _truncated(number: int, by: int) -> int:
    return number // by if number >= 0 else -(-number // by)


def _stddev(values: Sequence[int]) -> int:
    mean = _truncated(sum(values), len(values))
    return isqrt(sum(value * value for value in values) // len(values) - mean * mean)


def _table(row: Callable[[int], int | None]) -> Callable[[Sequence[int]], Value]:
    def made(values: Sequence[int]) -> Value:
        counts: Table = {}
        for value in values:
            counts[row(value)] = counts.get(row(value), 0) + 1
        return tuple(
            sorted(counts.items(), key=lambda each: LOWEST if each[0] is None else each[0])
        )

    return made


def _power_of_two(value: int) -> int:
    power = 1 << (abs(value).bit_length() - 1) if value else 0
    return 1 - 2 * power if value < 0 else power


def _linear(value: int) -> int | None:
    low, high, step = LINEAR
    levels = (high - low) // step
    return None if value < low else low + step * min((value - low) // step, levels)


def _logarithmic(value: int) -> int | None:
    factor, low, high, steps = LOGARITHMIC
    magnitude = abs(value)
    bottom: int = factor**low
    if magnitude < bottom:
        return 1 - bottom
    top: int = factor ** (high + 1)
    if magnitude >= top:
        return None if value < 0 else top
    order = next(order for order in range(low, high + 1) if magnitude < factor ** (order + 1))
    width: int = factor ** (order + 1) // steps
    edge = magnitude // width * width
    return 1 - edge - width if value < 0 else edge


MODELS: dict[str, Callable[[Sequence[int]], Value]] = {
    "count": len,
    "sum": sum,
    "min": min,
    "max": max,
    "avg": lambda values: _truncated(sum(values), len(values)),
    "stddev": _stddev,
    "quantize": _table(_power_of_two),
    "lquantize": _table(_linear),
    "llquantize": _table(_logarithmic),
}

NAMES = ("a", "b1", "C", "d_e", "f", "")
VALUES = st.one_of(
    st.integers(-200, 200), st.integers(-(10**6), 10**6), st.integers(-(1 << 40), 1 << 40)
)
STRINGS = st.sampled_from(["x", "a b", "*/", "/*", "@c", "%d", "(", "", "//"])
INTEGERS = st.integers(-(1 << 62), 1 << 62)
KEYS: list[st.SearchStrategy[int | str]] = [STRINGS, INTEGERS]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Draw a program."""
    functions = {
        name: draw(st.sampled_from([*MODELS]))
        for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    }
    shapes = {name: draw(st.lists(st.sampled_from(KEYS), max_size=3)) for name in functions}
    put: list[tuple[str, Keys, int]] = []
    for name in draw(st.lists(st.sampled_from([*functions]), min_size=1, max_size=12)):
        keys = tuple(draw(each) for each in shapes[name])
        put.append((name, keys, draw(VALUES)))
    return Program(functions, tuple(put))
