"""Writes the measurements: the tables of the page, and the plots beside it.

Each part of the measurements is a dictionary with these keys:

``software``
    The versions of what was measured, by name.
``figures``
    Each has a ``table``, whose title ends in the unit, a ``row``, a ``column``, and ``values``, one
    for each repetition. Tables, rows and columns keep their order. If there are no values, a
    ``text`` is shown instead.
``reach``
    The goals. Each has a ``figure``, its ``unit``, ``at_most`` or ``at_least``, the ``value`` that
    was reached, None if it was not measured, and the ``reason`` if it was not reached. Those with
    ``headline`` come first.
``plots``
    Each has a ``title``, the titles ``x`` and ``y`` of the axes, and ``lines``: points by name.
``not_measured``
    Why something could not be measured, by its name; it may be missing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any
from xml.sax.saxutils import escape

PARTS = {
    "instructions": "On Linux, in instructions",
    "linux": "On Linux, losses, memory and starts",
    "user": "In user space",
}
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"


def insert(page: str, results: dict[str, Any]) -> str:
    """Return a page with new figures between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + tables(results) + END + after


def tables(results: dict[str, Any]) -> str:
    """Return all tables, in Markdown.

    Args:
        results: each part of the measurements by its name, one of PARTS; and under ``machine`` and
            ``date`` the machine and the date of each part.
    """
    text = []
    parts = [(name, results[name]) for name in PARTS if name in results]
    if targets := [target for _, part in parts for target in part["reach"]]:
        text += ["## Goals, and what was reached\n", _reach(targets)]
    if plots(results):
        text.append("![Each tool by the rate of SYNs](performance.svg)\n")
    for name, part in parts:
        text += [f"## {PARTS[name]}\n", _machine(part)]
        for title in dict.fromkeys(figure["table"] for figure in part["figures"]):
            figures = [figure for figure in part["figures"] if figure["table"] == title]
            text += [f"### {title}\n", _table(figures)]
        if missing := part.get("not_measured"):
            text.append("Not measured:\n")
            text.append("".join(f"- {what}: {why}\n" for what, why in missing.items()))
    return "\n" + "\n".join(text) + "\n"


def plots(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all plots that have points."""
    found = [plot for name in PARTS if name in results for plot in results[name]["plots"]]
    return [plot for plot in found if any(plot["lines"].values())]


def _machine(part: dict[str, Any]) -> str:
    software = ", ".join(f"{name} {version}" for name, version in part["software"].items())
    return f"Measured on {part['date']}: {part['machine']}. {software}.\n"


def _reach(targets: Iterable[dict[str, Any]]) -> str:
    rows = []
    for target in sorted(targets, key=lambda target: not target.get("headline")):
        at_most = target.get("at_most")
        word, limit = (
            ("at most", at_most) if at_most is not None else ("at least", target["at_least"])
        )
        value, unit = target["value"], target["unit"]
        reached = "not measured" if value is None else f"{number(value)} {unit}"
        if value is not None and (value > limit if at_most is not None else value < limit):
            reached = f"**{reached}: not reached.** {target.get('reason', '')}".strip()
        rows.append([target["figure"], f"{word} {number(limit)} {unit}", reached])
    return _markdown(["figure", "goal", "reached"], rows)


def _table(figures: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(figure["column"] for figure in figures))
    cells = {
        (figure["row"], figure["column"]): figure.get("text") or spread(figure["values"])
        for figure in figures
    }
    rows = [
        [row, *(cells.get((row, column), "") for column in columns)]
        for row in dict.fromkeys(figure["row"] for figure in figures)
    ]
    return _markdown(["", *columns], rows)


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


def spread(values: Sequence[float]) -> str:
    """Return the median of values and, if they differ, the quartiles."""
    middle = number(statistics.median(values))
    if len(values) < 2:
        return middle
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    around = f"{number(low)} to {number(high)}"
    return middle if number(low) == number(high) else f"{middle} ({around})"


def number(value: float) -> str:
    """Return a number with three significant digits, and all digits before its point."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


# Plots. Okabe and Ito's colours, which most eyes can tell apart, on white and on black; and a mark
# for each, so that nothing hangs on colour.

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#999999", "#7a5195")
_MARKS = (
    '<circle r="3.5"/>',
    '<path d="M-3.5-3.5h7v7h-7z"/>',
    '<path d="M0-4.5 4 3.5H-4z"/>',
    '<path d="M0-4.5 4.5 0 0 4.5-4.5 0z"/>',
)
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #222 }
.title { font-weight: 600; font-size: 14px }
.grid { stroke: #ddd }
.line { fill: none; stroke-width: 2 }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .grid { stroke: #444 } }
"""
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP, _ROW = 380, 260, 64, 40, 84, 20
_DOWN = _TOP + _HEIGHT + 56


def svg(plots: Sequence[dict[str, Any]]) -> str:
    """Draw plots in pairs, with one legend; axes are logarithmic if numbers differ much."""
    names = list(dict.fromkeys(name for plot in plots for name in plot["lines"]))
    columns = min(2, len(plots))
    width = _LEFT + columns * (_WIDTH + _GAP)
    legend = math.ceil(len(plots) / columns) * _DOWN + 12
    rows = math.ceil(len(names) / 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {legend + rows * _ROW}">',
        f"<title>{_text('; '.join(plot['title'] for plot in plots))}</title>",
        f"<style>{_STYLE}</style>",
    ]
    for index, plot in enumerate(plots):
        left = _LEFT + index % columns * (_WIDTH + _GAP)
        parts += _plot(plot, left, index // columns * _DOWN + _TOP, names)
    for index, name in enumerate(names):
        x, y = _LEFT + index % 2 * (width / 2), legend + index // 2 * _ROW
        parts.append(_line(names, name, [(x - 14, y - 4), (x + 14, y - 4)]))
        parts.append(_mark(names, name, x, y - 4))
        parts.append(_label(x + 22, y, "start", name))
    return "\n".join([*parts, "</svg>\n"])


def _plot(plot: dict[str, Any], left: float, top: float, names: Sequence[str]) -> list[str]:
    points = [point for line in plot["lines"].values() for point in line]
    across = _Axis([x for x, _ in points], left, left + _WIDTH)
    up = _Axis([y for _, y in points], top + _HEIGHT, top)
    middle = left + _WIDTH / 2
    parts = [
        f'<text class="title" x="{left:g}" y="{top - 20}">{_text(plot["title"])}</text>',
        _label(middle, top + _HEIGHT + 36, "middle", plot["x"]),
        _label(left - 50, top - 20, "start", plot["y"]),
    ]
    for value in across.ticks:
        x = across.at(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {top:g}V{top + _HEIGHT:g}"/>')
        parts.append(_label(x, top + _HEIGHT + 18, "middle", number(value)))
    for value in up.ticks:
        y = up.at(value)
        parts.append(f'<path class="grid" d="M{left:g} {y:.1f}H{left + _WIDTH:g}"/>')
        parts.append(_label(left - 8, y + 4, "end", number(value)))
    for name, line in plot["lines"].items():
        places = [(across.at(x), up.at(y)) for x, y in line]
        parts.append(_line(names, name, places))
        parts += [_mark(names, name, x, y) for x, y in places]
    return parts


def _line(names: Sequence[str], name: str, places: Iterable[tuple[float, float]]) -> str:
    index = names.index(name)
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dashes = ' stroke-dasharray="6 4"' if index // len(_COLOURS) % 2 else ""
    return f'<path class="line" stroke="{_COLOURS[index % len(_COLOURS)]}"{dashes} d="M{path}"/>'


class _Axis:
    """Maps numbers to positions on an axis."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        low, high = min(values), max(values)
        self._begin, self._end = begin, end
        self._log = low > 0 and high / low > 30
        if self._log:
            first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
            self.ticks = [10.0**power for power in range(first, last + 1)]
        else:
            # From 0, in about five steps of 1, 2 or 5 times a power of ten.
            raw = (high or 1) / 5
            power = 10 ** math.floor(math.log10(raw))
            step = next(power * times for times in (1, 2, 5, 10) if power * times >= raw)
            self.ticks = [step * count for count in range(math.ceil((high or 1) / step) + 1)]

    def at(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        if self._log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self._begin + (value - low) / (high - low) * (self._end - self._begin)


def _label(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(text)}</text>'


def _mark(names: Sequence[str], name: str, x: float, y: float) -> str:
    index = names.index(name)
    mark = _MARKS[(index + index // len(_COLOURS)) % len(_MARKS)]
    colour = _COLOURS[index % len(_COLOURS)]
    return f'<g fill="{colour}" transform="translate({x:.1f} {y:.1f})">{mark}</g>'


def _text(text: str) -> str:
    return escape(text, {'"': "&quot;"})
