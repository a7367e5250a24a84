"""Makes the text of a scrape; only lines that have changed since the last one are written anew.

Between two scrapes numbers change, but names do not. Two listeners differ in the values of their
labels. So prometheus_client formats the samples of a family only once, and the result is used as a
pattern. Lines of samples are the same in the text format and in OpenMetrics.
"""

from __future__ import annotations

import asyncio
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector as AnyCollector
from prometheus_client.utils import floatToGoString

from dtrace_exporter.collector import (
    FAMILIES,
    Block,
    Collector,
    Labels,
    Layout,
    Series,
    family,
    registry,
    samples,
)
from dtrace_exporter.state import State
from dtrace_exporter.turns import Precedence, by_turns

Encode = Callable[[Any], bytes]
# A block's layout, its values and its lines.
_Text = tuple[Layout, tuple[float, ...], bytes]

# This text is very repetitive, so higher levels cost much and save little.
_GZIP_LEVEL = 2
_GZIP = 16 + zlib.MAX_WBITS
_CHUNK = 1 << 16
# How long the event loop may wait for the interpreter while a text is made in a thread. It waits
# many times.
_TURN_SECONDS = 0.0005
_FIELD = re.compile(r"%(?:%|\((\d+)\)s)")
_END = b"# EOF\n"
# OpenMetrics permits it only beside a sum, which histograms of scripts do not have.
_COUNT = "_count"
_BLOCKS = 500
_SHORT = 100


@dataclass(slots=True)
class _Wanted:
    """An answer, and how many scrapes wait for it."""

    answer: asyncio.Task[list[bytes]]
    by: int = 0


class Exposition:
    """Answers the scrapes of a state, one at a time.

    Scrapes that request the same while another one is being answered share the next answer. So no
    answer is older than its request, and many scrapers cost as much as two. An answer that nobody
    waits for any more is not begun.

    Args:
        state: what the scrapes show.
        precedence: that of scrapes without name[] over other work.
    """

    def __init__(self, state: State, precedence: Precedence | None = None) -> None:
        sys.setswitchinterval(_TURN_SECONDS)
        self._state = state
        self._precedence = precedence or Precedence()
        self._collector = Collector(state)
        self._process = registry()
        self._texts = Texts()
        self._one_at_a_time = asyncio.Lock()
        self._one_with_names = asyncio.Lock()
        self._waiting: dict[object, _Wanted] = {}

    async def answer(
        self, *, openmetrics: bool = False, names: Iterable[str] = (), compress: bool = False
    ) -> list[bytes]:
        """Return the body of an answer, in pieces.

        Args:
            openmetrics: whether it is OpenMetrics, else it is Prometheus' text format.
            names: the names of the requested samples, empty for all.
            compress: whether it is compressed by gzip.
        """
        key = openmetrics, frozenset(names), compress
        if key not in self._waiting:
            self._waiting[key] = _Wanted(asyncio.create_task(self._next(*key)))
        wanted = self._waiting[key]
        wanted.by += 1
        try:
            return await asyncio.shield(wanted.answer)
        finally:
            wanted.by -= 1
            # Once begun, it is finished, because its thread cannot be stopped.
            if not wanted.by and self._waiting.get(key) is wanted:
                del self._waiting[key]
                wanted.answer.cancel()

    async def _next(self, openmetrics: bool, names: frozenset[str], compress: bool) -> list[bytes]:
        # At most one scrape with names is before another scrape, however many wait.
        one = self._one_with_names if names else nullcontext()
        async with one, self._one_at_a_time:
            del self._waiting[openmetrics, names, compress]
            with nullcontext() if names else self._precedence.first():
                return await self._made(openmetrics, names, compress)

    async def _made(self, openmetrics: bool, names: frozenset[str], compress: bool) -> list[bytes]:
        # The state may be read only here, in the event loop. Most of the time is spent on the text.
        await self._state.refresh()
        await self._state.refresh_unix()
        series = await by_turns(self._collector.reading())
        known = self._collector.families
        if openmetrics:
            series = [one for one in series if not one.piece.endswith(_COUNT)]
        encode: Encode = generate_openmetrics if openmetrics else generate_latest
        if names:
            render: Callable[[], Iterable[bytes]] = partial(
                _whole, encode, series, names, self._process, known
            )
        else:
            render = partial(self._texts.render, series, self._process, encode, known)
        return await asyncio.to_thread(_body, render, compress)


class Texts:
    """Renders series, and remembers the text of the last ones."""

    def __init__(self) -> None:
        self._known: dict[tuple[Labels, str], dict[str, _Text]] = {}

    def render(
        self,
        series: Iterable[Series],
        others: AnyCollector,
        encode: Encode,
        known: Mapping[str, tuple[str, str]] = FAMILIES,
    ) -> Iterator[bytes]:
        """Yield the text of series and of other families, in pieces.

        Args:
            series: as Collector.read() returns them.
            others: a collector of families that come after the series.
            encode: prometheus_client's encoder of a format.
            known: type and help of all families of the series, by name.
        """
        before, self._known = self._known, {}
        found: dict[str, list[bytes]] = {name: [] for name in known}
        for one in series:
            key = one.labels, one.piece
            texts = self._known[key] = before.get(key, {})
            names: tuple[str, ...] = ()
            labels: list[str] = []
            for block in one.blocks:
                name, layout, values = block
                text = texts.get(name)
                if text is None or text[0] != layout:
                    names = names or tuple(label for label, _ in one.labels)
                    labels = labels or _escaped(one.labels)
                    text = texts[name] = _written(labels, block, names)
                elif text[1] != values:
                    text = texts[name] = _changed(text, values)
                found[name].append(text[2])
        for name, blocks in found.items():
            if blocks:
                yield encode(_Families([family(name, known)])).removesuffix(_END)
                yield from blocks
        yield encode(others)


def _written(labels: Iterable[str], block: Block, names: tuple[str, ...]) -> _Text:
    """Return the text of a block, as prometheus_client would write it.

    Args:
        labels: the values of its labels, escaped.
        block: the block.
        names: the names of its labels.
    """
    name, layout, values = block
    # Blocks of scripts are long, and no two have the same layout, so there is no use in a cache.
    pattern_of = _pattern if len(layout) <= _SHORT else _pattern.__wrapped__
    pattern, fields = pattern_of(name, layout, names)
    lines: str = pattern % fields((*labels, *map(_number, values)))
    return layout, values, lines.encode()


def _changed(text: _Text, values: tuple[float, ...]) -> _Text:
    """Return the text of the same block with other values."""
    layout, before, whole = text
    lines = whole.split(b"\n")
    for index, (old, new) in enumerate(zip(before, values, strict=True)):
        if new != old:
            name, _, _ = lines[index].rpartition(b" ")
            lines[index] = b"%b %b" % (name, _number(new).encode())
    return layout, values, b"\n".join(lines)


# Histograms have many numbers, most of them the same.
@lru_cache(maxsize=4096)
def _number(value: float) -> str:
    number: str = floatToGoString(value)  # type: ignore[no-untyped-call]
    return number


@lru_cache(maxsize=1024)
def _pattern(
    name: str, layout: Layout, labels: tuple[str, ...]
) -> tuple[str, Callable[[tuple[str, ...]], Any]]:
    """Return the pattern of blocks with such labels, and what selects its labels and values."""
    metric = Metric(name, "", "unknown")
    own = tuple(
        (suffix, tuple((label, value.replace("%", "%%")) for label, value in more))
        for suffix, more in layout
    )
    shared = tuple((label, f"%({index})s") for index, label in enumerate(labels))
    metric.samples = list(samples(shared, (name, own, (0.0,) * len(layout))))
    _help, _type, *lines = generate_latest(_Families([metric])).decode().strip().split("\n")
    text = "".join(
        f"{line.rpartition(' ')[0]} %({index})s\n" for index, line in enumerate(lines, len(labels))
    )
    fields = [int(index) for index in _FIELD.findall(text) if index]
    return _FIELD.sub(lambda found: "%s" if found[1] else "%%", text), itemgetter(*fields)


def _escaped(labels: Labels) -> list[str]:
    """Return the values of labels, escaped as in Prometheus' text formats."""
    return [
        value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"") for _, value in labels
    ]


class _Families(AnyCollector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families

    describe = collect


def _whole(
    encode: Encode,
    series: Iterable[Series],
    names: frozenset[str],
    others: CollectorRegistry,
    known: Mapping[str, tuple[str, str]],
) -> Iterator[bytes]:
    """Yield the text of the samples with some names, in pieces."""
    found: dict[str, list[tuple[Labels, Block]]] = {name: [] for name in known}
    for one in series:
        for block in one.blocks:
            found[block[0]].append((one.labels, block))
    for name, blocks in found.items():
        begun = False
        # All samples of thousands of listeners at once would take some hundred megabytes of memory.
        for start in range(0, len(blocks), _BLOCKS):
            metric = family(name, known)
            metric.samples = [
                sample
                for labels, block in blocks[start : start + _BLOCKS]
                for sample in samples(labels, block)
                if sample.name in names
            ]
            if metric.samples:
                text = encode(_Families([metric])).removesuffix(_END)
                yield text.split(b"\n", 2)[2] if begun else text
                begun = True
    yield encode(_Families(list(others.restricted_registry(names).collect())))


def _body(render: Callable[[], Iterable[bytes]], compress: bool) -> list[bytes]:
    if not compress:
        return list(render())
    compressor = zlib.compressobj(_GZIP_LEVEL, wbits=_GZIP)
    return [*map(compressor.compress, chunks(render())), compressor.flush()]


def chunks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Join pieces to chunks of a medium size.

    Thousands of small pieces are slow to handle, and one large piece would fragment the memory.
    """
    gathered: list[bytes] = []
    size = 0
    for piece in pieces:
        gathered.append(piece)
        size += len(piece)
        if size >= _CHUNK:
            yield b"".join(gathered)
            gathered, size = [], 0
    yield b"".join(gathered)
