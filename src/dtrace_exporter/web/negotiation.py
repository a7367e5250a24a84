"""Content negotiation: chooses the format that a client prefers.

The version and the escaping that a client requests change only the Content-Type, because no name of
a metric or label here needs escaping. The scheme ``dots`` would double each underscore, so it is
not supported. The answer is then in ``underscores`` and says so, as Prometheus' escaping_schemes.md
permits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_QUALITY = re.compile(r"[01](?:\.[0-9]*)?")
_TEXT = "text/plain"
_OPENMETRICS = "application/openmetrics-text"
_VERSIONS = {_TEXT: ("", "0.0.4", "1.0.0"), _OPENMETRICS: ("", "1.0.0")}
_ESCAPINGS = ("underscores", "allow-utf-8", "values")
# Scrapers name a few. To parse as many as a header can have would take too long.
_MOST_RANGES = 100


class Format(NamedTuple):
    """The format of a scrape's answer: whether it is OpenMetrics, and its Content-Type."""

    openmetrics: bool
    content_type: str


class _Range(NamedTuple):
    name: str
    parameters: Mapping[str, str]
    quality: float


class _Liking(NamedTuple):
    """How much a client prefers a format; the greatest one wins."""

    quality: float
    specificity: int
    earliness: int


def _ranges(header: str) -> list[_Range]:
    found = []
    for item in header.lower().split(",", _MOST_RANGES)[:_MOST_RANGES]:
        name, *words = (word.strip() for word in item.split(";"))
        pairs = (word.partition("=") for word in words)
        parameters = {key.strip(): value.strip(' \t"') for key, _, value in pairs}
        said = _QUALITY.fullmatch(parameters.get("q", ""))
        found.append(_Range(name, parameters, min(float(said[0]), 1.0) if said else 1.0))
    return found


def _liking(accepted: Sequence[_Range], kind: str) -> tuple[_Liking, _Range] | None:
    """Return the preference for a format and its range, the most specific one: RFC 9110, 12.5.1."""
    for specificity, name in ((2, kind), (1, kind.partition("/")[0] + "/*"), (0, "*/*")):
        matching = [
            (_Liking(each.quality, specificity, -place), each)
            for place, each in enumerate(accepted)
            if each.name == name and each.parameters.get("version", "") in _VERSIONS[kind]
        ]
        if matching:
            return max(matching, key=lambda found: found[0])
    return None


def choose(accept: str) -> Format | None:
    """Return the format that a scraper prefers, the text format if it names neither.

    If it prefers none, the one that it names first wins. None if it refuses both.

    Args:
        accept: the header Accept.
    """
    accepted = _ranges(accept)
    text, openmetrics = (_liking(accepted, kind) for kind in (_TEXT, _OPENMETRICS))
    if openmetrics and openmetrics[0].quality and (not text or openmetrics[0] > text[0]):
        return Format(openmetrics=True, content_type=_content_type(_OPENMETRICS, openmetrics[1]))
    if text and not text[0].quality:
        return None
    return Format(openmetrics=False, content_type=_content_type(_TEXT, text[1] if text else None))


def _content_type(kind: str, asked: _Range | None) -> str:
    asking = asked.parameters if asked else {}
    version = "1.0.0" if kind == _OPENMETRICS else asking.get("version") or "0.0.4"
    said = f"{kind}; version={version}; charset=utf-8"
    if asking.get("version") != "1.0.0":
        return said
    escaping = asking.get("escaping", "")
    return f"{said}; escaping={escaping if escaping in _ESCAPINGS else _ESCAPINGS[0]}"


def takes_gzip(accept_encoding: str) -> bool:
    """Return whether a client accepts gzip; ``q=0`` refuses it, which prometheus_client ignores.

    Args:
        accept_encoding: the header Accept-Encoding.
    """
    return any(each.name == "gzip" and each.quality for each in _ranges(accept_encoding))
