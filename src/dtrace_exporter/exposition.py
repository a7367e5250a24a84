"""The text of a scrape, of which only what has changed since the last one is written anew.

Between two scrapes numbers change and names do not, so prometheus_client is asked only once for
the names and labels of a listener's samples. Its sample lines are the same in the text format and
in OpenMetrics, and in every escaping that leaves plain names as they are.
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder, generate_latest
from prometheus_client.registry import Collector as AnyCollector
from prometheus_client.utils import floatToGoString

from dtrace_exporter.collector import (
    FAMILIES,
    Block,
    Collector,
    Labels,
    Series,
    family,
    registry,
    samples,
)
from dtrace_exporter.state import State

Encode = Callable[[Any], bytes]

# Of a text that repeats itself as much as this, more work makes little less.
_GZIP_LEVEL = 2
_RENAMING = ("; escaping=dots", "; escaping=values")
_END = b"# EOF\n"


class Exposition:
    """Answers the scrapes of a state, one at a time.

    Scrapes that want the same and come while another is being answered share the next answer. So
    no answer is older than its request, and a crowd of scrapers costs as much as two.
    """

    def __init__(self, state: State) -> None:
        self._collector = Collector(state)
        self._everything = registry(self._collector)
        self._process = registry()
        self._texts = Texts()
        self._one_at_a_time = asyncio.Lock()
        self._waiting: dict[object, asyncio.Task[bytes]] = {}

    async def answer(
        self, accept: str, names: Iterable[str] = (), *, compress: bool = False
    ) -> tuple[str, bytes]:
        """Return a scrape's content type and its body.

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
            self._waiting[key] = asyncio.create_task(self._next(encode, *key))
        return content_type, await asyncio.shield(self._waiting[key])

    async def _next(
        self, encode: Encode, content_type: str, names: frozenset[str], compress: bool
    ) -> bytes:
        async with self._one_at_a_time:
            del self._waiting[content_type, names, compress]
            # The state may only be read here, in the event loop; most of the time goes into the
            # text.
            if names or content_type.endswith(_RENAMING):
                wanted: AnyCollector = self._everything
                if names:
                    wanted = self._everything.restricted_registry(names)
                render = partial(encode, _Families(list(wanted.collect())))
            else:
                render = partial(self._texts.render, self._collector.read(), self._process, encode)
            return await asyncio.to_thread(_body, render, compress)


class Texts:
    """Renders series, and remembers the text of those that it was given last."""

    def __init__(self) -> None:
        self._known: dict[Labels, dict[str, _Text]] = {}

    def render(self, series: Iterable[Series], others: AnyCollector, encode: Encode) -> bytes:
        """Return the same as ``encode`` does of a registry of the series and what others collect.

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
                text = texts.get(block.family)
                if text is None or text.layout != block.layout:
                    text = texts[block.family] = _Text(one.labels, block)
                found[block.family].append(text.of(block.values))
        parts = []
        for name, blocks in found.items():
            if blocks:
                parts.append(encode(_Families([family(name)])).removesuffix(_END))
                parts += blocks
        return b"".join([*parts, encode(others)])


class _Text:
    """A block's lines, of which a template is kept: only numbers change."""

    __slots__ = ("_template", "_text", "_values", "layout")

    def __init__(self, labels: Labels, block: Block) -> None:
        self.layout = block.layout
        zeroes = Metric(block.family, "", "unknown")
        zeroes.samples = list(samples(labels, block._replace(values=(0.0,) * len(block.values))))
        _help, _type, *lines, _ = generate_latest(_Families([zeroes])).decode().split("\n")
        self._template = "".join(
            line.removesuffix("0.0").replace("%", "%%") + "%s\n" for line in lines
        )
        self._values: tuple[float, ...] = ()
        self._text = b""

    def of(self, values: tuple[float, ...]) -> bytes:
        if values != self._values:
            self._text = (self._template % tuple(map(floatToGoString, values))).encode()
            self._values = values
        return self._text


class _Families(AnyCollector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _body(render: Callable[[], bytes], compress: bool) -> bytes:
    text = render()
    return gzip.compress(text, _GZIP_LEVEL) if compress else text
