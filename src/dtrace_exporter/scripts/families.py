"""The metrics of a script: names, types, labels and bounds, from its aggregations."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal

from dtrace_exporter.scripts.reader import Aggregation, Script

RESERVED = ("session", "tcp", "unix", "exporter", "script")
"""Names that no script may have, because dtrace_NAME_ are the exporter's own metrics."""

COUNTERS = ("count", "sum")
GAUGES = ("min", "max", "avg", "stddev")
HISTOGRAMS = ("quantize", "lquantize", "llquantize")

MOST_BUCKETS = 1100
"""Somewhat more than ``lquantize(cpu, 0, 1024, 1)`` has, which has a bucket for each CPU."""
_FOREIGN = re.compile(
    r"(?:dtrace_(?:session|tcp|unix|exporter|script)|process|python|go|scrape)_|up$"
)
_ALIKE = re.compile(r"(?:[uj]?stack|u?(?:func|mod|sym)|uaddr) *\(")
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_]")
_SIDES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}


class FamilyError(ValueError):
    """An aggregation cannot be a metric.

    Args:
        aggregation: its name.
        key: the setting that is wrong or missing; empty if the script has to be changed.
        expected: what is expected there.
        found: what was found instead.
    """

    def __init__(self, aggregation: str, key: str, expected: str, found: str) -> None:
        super().__init__(f"@{aggregation}: expected {expected} (found {found})")
        self.aggregation = aggregation
        self.key = key
        self.expected = expected
        self.found = found


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of an aggregation in the configuration; if empty or None, the script decides.

    ``buckets`` are the arguments of the aggregation's function; for quantize the lowest and the
    highest power of two.
    """

    name: str = ""
    help: str = ""
    labels: tuple[str, ...] | None = None
    scale: float = 1.0
    buckets: tuple[int, ...] = ()
    type: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """A metric of a script.

    Attributes:
        aggregation: the name of its aggregation.
        function: the aggregating function.
        name: its name, without the ``_total`` of a counter.
        kind: counter, gauge or histogram.
        help: its help text.
        labels: a label for each key of the aggregation; empty if a key is not a label.
        scale: the factor that values are multiplied by.
        edges: the lower edges of a histogram's buckets, without that of the lowest bucket.
        alike: whether different keys may look alike: processes have their own stacks and symbols,
            and several addresses may have the same name.
    """

    aggregation: str
    function: str
    name: str
    kind: str
    help: str
    labels: tuple[str, ...]
    scale: float = 1.0
    edges: tuple[int, ...] = ()
    alike: bool = False

    @property
    def bounds(self) -> tuple[str, ...]:
        """The label ``le`` of each bucket but the highest: the next edge minus one, scaled."""
        scale = Decimal(repr(self.scale))
        return tuple(repr(float((edge - 1) * scale)) for edge in self.edges)

    @property
    def samples(self) -> tuple[str, ...]:
        """The names of its samples."""
        return tuple(self.name + side for side in _SIDES[self.kind] if side != "_sum")


def stem(path: str) -> str:
    """Return the name of a script, from its file without ``.d``.

    Characters other than letters, digits and underscores become underscores.
    """
    name = path.rpartition("/")[2].removesuffix(".d")
    return _NOT_IN_A_NAME.sub("_", name)


def families(script: Script, settings: Mapping[str, Settings]) -> tuple[Family, ...]:
    """Return the metrics of a script's aggregations, in their order.

    Args:
        script: the script.
        settings: the settings of its aggregations, by their names.

    Raises:
        FamilyError: an aggregation cannot be a metric, or two are the same metric.
    """
    found = []
    taken: dict[str, str] = {}
    for aggregation in script.aggregations:
        family = _family(script, aggregation, settings.get(aggregation.name, Settings()))
        for name in {family.name, *(family.name + side for side in _SIDES[family.kind])}:
            if name in taken:
                raise FamilyError(
                    aggregation.name,
                    "name",
                    "a metric that no other aggregation gives",
                    f"{name}, which @{taken[name]} gives, too",
                )
            taken[name] = aggregation.name
        found.append(family)
    return tuple(found)


def _family(script: Script, aggregation: Aggregation, settings: Settings) -> Family:
    kind = _kind(aggregation, settings)
    name = settings.name or "_".join(filter(None, ("dtrace", stem(script.path), aggregation.name)))
    if kind == "counter":
        name = name.removesuffix("_total")
    if settings.name and (foreign := _FOREIGN.match(settings.name)):
        raise FamilyError(
            aggregation.name, "name", f"a name that does not begin with {foreign[0]}", "one"
        )
    text = settings.help or f"{aggregation.function}() of @{aggregation.name} in {script.path}."
    edges = _edges(aggregation, settings.buckets) if kind == "histogram" else ()
    if settings.buckets and kind != "histogram":
        raise FamilyError(aggregation.name, "buckets", "no buckets", f"{aggregation.function}()")
    return Family(
        aggregation.name,
        aggregation.function,
        name,
        kind,
        text,
        _labels(aggregation, settings),
        settings.scale,
        edges,
        any(map(_ALIKE.match, aggregation.keys)),
    )


def _kind(aggregation: Aggregation, settings: Settings) -> str:
    function = aggregation.function
    if function in COUNTERS:
        kinds = ["counter", "gauge"]
    else:
        kinds = ["gauge" if function in GAUGES else "histogram"]
    if settings.type not in ("", *kinds):
        expected = f"{' or '.join(kinds)} for {function}()"
        raise FamilyError(aggregation.name, "type", expected, settings.type)
    return settings.type or kinds[0]


def _labels(aggregation: Aggregation, settings: Settings) -> tuple[str, ...]:
    """Return the labels of all keys: those of the settings, else those of the script."""
    if settings.labels is None:
        return aggregation.labels
    named = [label for label in aggregation.labels if label]
    if len(settings.labels) != len(named):
        expected = f"{len(named)} labels, one for each key that is not always the same"
        raise FamilyError(aggregation.name, "labels", expected, f"{len(settings.labels)}")
    instead = iter(settings.labels)
    return tuple(next(instead) if label else "" for label in aggregation.labels)


def _edges(aggregation: Aggregation, buckets: tuple[int, ...]) -> tuple[int, ...]:
    function, arguments = aggregation.function, buckets or aggregation.arguments
    if function == "quantize":
        edges = _quantize(aggregation, buckets)
    else:
        wanted = ("low", "high", "step") if function == "lquantize" else _LLQUANTIZE
        if not arguments and not buckets:
            raise FamilyError(
                aggregation.name,
                "buckets",
                f"buckets: [{', '.join(wanted)}], because line {aggregation.line} of the script has"
                " no numbers for them",
                "none",
            )
        if len(arguments) != len(wanted) and not (function == "lquantize" and len(arguments) == 2):
            found = f"{len(arguments)} numbers"
            raise FamilyError(aggregation.name, "buckets", f"[{', '.join(wanted)}]", found)
        edges = (_lquantize if function == "lquantize" else _llquantize)(aggregation, *arguments)
    if len(edges) >= MOST_BUCKETS:
        raise FamilyError(aggregation.name, "buckets", f"at most {MOST_BUCKETS} buckets", "more")
    return edges


_LLQUANTIZE = ("factor", "low", "high", "steps")


def _quantize(aggregation: Aggregation, buckets: Collection[int]) -> tuple[int, ...]:
    """Return powers of two as edges: those between the settings' bounds, else 0 and all of them.

    Without settings, all negative values are in the lowest bucket.
    """
    if not buckets:
        return (0, *(1 << power for power in range(63)))
    expected = "[low, high], both powers of two"
    if len(buckets) != 2 or any(edge < 1 or edge & (edge - 1) or edge >> 63 for edge in buckets):
        raise FamilyError(aggregation.name, "buckets", expected, "others")
    low, high = buckets
    if low >= high:
        raise FamilyError(aggregation.name, "buckets", f"{expected}, low less than high", "others")
    return tuple(1 << power for power in range(low.bit_length() - 1, high.bit_length()))


def _lquantize(aggregation: Aggregation, low: int, high: int, step: int = 1) -> tuple[int, ...]:
    """Return the edges of lquantize(): from low in steps, the last at most high (libdtrace)."""
    if step < 1 or high < low + step:
        expected = "[low, high, step], high at least a step above low"
        raise FamilyError(aggregation.name, "buckets", expected, "others")
    edges = range(low, low + (high - low) // step * step + 1, step)
    # There may be more than fit into the memory.
    return tuple(edges[: MOST_BUCKETS + 1])


def _llquantize(
    aggregation: Aggregation, factor: int, low: int, high: int, steps: int
) -> tuple[int, ...]:
    """Return the edges of llquantize(), as in dt_print_llquantize() of libdtrace.

    A magnitude is the range from a power of factor to the next one. The magnitudes from low to high
    have ``steps`` steps of equal size each, but no more than there are integers in them.
    """
    if factor < 2 or steps < 1 or not 0 <= low <= high < 63 or factor ** (high + 1) >> 63:
        expected = "[factor, low, high, steps] as llquantize() takes them"
        raise FamilyError(aggregation.name, "buckets", expected, "others")
    edges: list[int] = []
    value = factor**low
    for power in range(low, high + 1):
        following = factor ** (power + 1)
        step = following // steps if following > steps else 1
        while value < following and len(edges) <= MOST_BUCKETS:
            edges.append(value)
            value += step
        value = following
    return (*edges, value)
