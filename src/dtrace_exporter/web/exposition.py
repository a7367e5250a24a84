"""The text of a scrape, of which only what has changed since the last one is written anew.

Between two scrapes numbers change and names do not, so prometheus_client is asked only once for
the names and labels of a listener's samples. Its sample lines are the same in the text format and
in OpenMetrics, and in every escaping that leaves plain names as they are.
"""

from __future__ import annotations

import asyncio
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder, generate_latest
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
from dtrace_exporter.turns import by_turns

Encode = Callable[[Any], bytes]
# A block's layout, its values and its lines.
_Text = tuple[Layout, tuple[float, ...], bytes]

# Of a text that repeats itself as much as this, more work makes little less.
_GZIP_LEVEL = 2
_GZIP = 16 + zlib.MAX_WBITS
_CHUNK = 1 << 16
# While a text is put together the event loop waits so long for the interpreter, at each of the
# many times that it asks for it.
_TURN_SECONDS = 0.0005
# What scrapers ask for. Of others there may be any number, as a version is given back as it came.
_USUAL = re.compile(
    r"(text/plain|application/openmetrics-text); version=(0\.0\.1|0\.0\.4|1\.0\.0)"
    r"; charset=utf-8(; escaping=(underscores|allow-utf-8))?"
)
_RENAMING = ("; escaping=dots", "; escaping=values")
_END = b"# EOF\n"
_BLOCKS = 500


@dataclass(slots=True)
class _Wanted:
    """An answer, and by how many scrapes it is waited for."""

    answer: asyncio.Task[list[bytes]]
    by: int = 0


class Exposition:
    """Answers the scrapes of a state, one at a time.

    Scrapes that want the same and come while another is being answered share the next answer. So
    no answer is older than its request, and a crowd of scrapers costs as much as two. One that
    nobody waits for any more is not begun.
    """

    def __init__(self, state: State) -> None:
        sys.setswitchinterval(_TURN_SECONDS)
        self._state = state
        self._collector = Collector(state)
        self._process = registry()
        self._texts = Texts()
        self._one_at_a_time = asyncio.Lock()
        self._one_that_is_unusual = asyncio.Lock()
        self._waiting: dict[object, _Wanted] = {}

    async def answer(
        self, accept: str, names: Iterable[str] = (), *, compress: bool = False
    ) -> tuple[str, list[bytes]]:
        """Return a scrape's content type and its body, in pieces.

        Args:
            accept: the formats that the scraper takes, as in the HTTP header.
            names: of the samples that it wants, if not all.
            compress: by gzip.
        """
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):
            # A version that is not made of numbers cannot be compared.
            encode, content_type = choose_encoder("")
        key = content_type, frozenset(names), compress
        if key not in self._waiting:
            self._waiting[key] = _Wanted(asyncio.create_task(self._next(encode, *key)))
        wanted = self._waiting[key]
        wanted.by += 1
        try:
            return content_type, await asyncio.shield(wanted.answer)
        finally:
            wanted.by -= 1
            # One that has begun is done to its end: its thread cannot be stopped.
            if not wanted.by and self._waiting.get(key) is wanted:
                del self._waiting[key]
                wanted.answer.cancel()

    async def _next(
        self, encode: Encode, content_type: str, names: frozenset[str], compress: bool
    ) -> list[bytes]:
        unusual = names or not _USUAL.fullmatch(content_type)
        # Of these no more than one is before a usual one, however many wait.
        first = self._one_that_is_unusual if unusual else nullcontext()
        async with first, self._one_at_a_time:
            del self._waiting[content_type, names, compress]
            # The state may only be read here, in the event loop; most of the time goes into the
            # text.
            await self._state.refresh()
            series = await by_turns(self._collector.reading())
            if names or content_type.endswith(_RENAMING):
                render: Callable[[], Iterable[bytes]] = partial(
                    _whole, encode, series, names, self._process
                )
            else:
                render = partial(self._texts.render, series, self._process, encode)
            return await asyncio.to_thread(_body, render, compress)


class Texts:
    """Renders series, and remembers the text of those that it was given last."""

    def __init__(self) -> None:
        self._known: dict[Labels, dict[str, _Text]] = {}

    def render(
        self, series: Iterable[Series], others: AnyCollector, encode: Encode
    ) -> Iterator[bytes]:
        """Yield piece by piece what ``encode`` makes of the series and of what others collect.

        Args:
            series: as Collector.read() gives them.
            others: whose families come behind.
            encode: prometheus_client's encoder of a format, one that leaves plain names alone.
        """
        before, self._known = self._known, {}
        found: dict[str, list[bytes]] = {name: [] for name in FAMILIES}
        for one in series:
            texts = self._known[one.labels] = before.get(one.labels, {})
            for block in one.blocks:
                name, layout, values = block
                text = texts.get(name)
                if text is None or text[0] != layout:
                    text = texts[name] = _written(one.labels, block)
                elif text[1] != values:
                    text = texts[name] = _changed(text, values)
                found[name].append(text[2])
        for name, blocks in found.items():
            if blocks:
                yield encode(_Families([family(name)])).removesuffix(_END)
                yield from blocks
        yield encode(others)


def _written(labels: Labels, block: Block) -> _Text:
    """Return the text of a block as prometheus_client writes it; then only numbers change."""
    name, layout, values = block
    metric = Metric(name, "", "unknown")
    metric.samples = list(samples(labels, block))
    _help, _type, lines = generate_latest(_Families([metric])).split(b"\n", 2)
    return layout, values, lines


def _changed(text: _Text, values: tuple[float, ...]) -> _Text:
    """Return the text of the same block with other values."""
    layout, before, whole = text
    lines = whole.split(b"\n")
    for index, (old, new) in enumerate(zip(before, values, strict=True)):
        if new != old:
            name, _, _ = lines[index].rpartition(b" ")
            number: str = floatToGoString(new)  # type: ignore[no-untyped-call]
            lines[index] = b"%b %b" % (name, number.encode())
    return layout, values, b"\n".join(lines)


class _Families(AnyCollector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families

    describe = collect


def _whole(
    encode: Encode, series: Iterable[Series], names: frozenset[str], others: CollectorRegistry
) -> Iterator[bytes]:
    """Yield piece by piece what ``encode`` makes of the samples with some names, or of all."""
    found: dict[str, list[tuple[Labels, Block]]] = {name: [] for name in FAMILIES}
    for one in series:
        for block in one.blocks:
            found[block[0]].append((one.labels, block))
    for name, blocks in found.items():
        begun = False
        # All samples of thousands of listeners at once would take some hundred megabytes.
        for start in range(0, len(blocks), _BLOCKS):
            metric = family(name)
            metric.samples = [
                sample
                for labels, block in blocks[start : start + _BLOCKS]
                for sample in samples(labels, block)
                if not names or sample.name in names
            ]
            if metric.samples:
                text = encode(_Families([metric])).removesuffix(_END)
                yield text.split(b"\n", 2)[2] if begun else text
                begun = True
    wanted: AnyCollector = others.restricted_registry(names) if names else others
    yield encode(_Families(list(wanted.collect())))


def _body(render: Callable[[], Iterable[bytes]], compress: bool) -> list[bytes]:
    if not compress:
        return list(render())
    compressor = zlib.compressobj(_GZIP_LEVEL, wbits=_GZIP)
    return [*map(compressor.compress, chunks(render())), compressor.flush()]


def chunks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Join pieces: thousands of small ones are slow to handle, a large one leaves a large hole."""
    gathered: list[bytes] = []
    size = 0
    for piece in pieces:
        gathered.append(piece)
        size += len(piece)
        if size >= _CHUNK:
            yield b"".join(gathered)
            gathered, size = [], 0
    yield b"".join(gathered)
