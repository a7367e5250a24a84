"""The headers of a scraper, and the format that it gets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter.web.negotiation import Format, choose, takes_gzip

TEXT = "text/plain; version=0.0.4; charset=utf-8"
TEXT_1 = "text/plain; version=1.0.0; charset=utf-8; escaping="
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

# As Prometheus 2.53 and 3.0 send it.
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;"
    "version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;"
    "escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
CHROMIUM = "text/html,application/xhtml+xml,application/xml;q=0.9,image/webp,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", TEXT),
        ("*/*", TEXT),
        (CHROMIUM, TEXT),
        ("image/png", TEXT),
        (PROMETHEUS_2, f"{OPENMETRICS}; escaping=underscores"),
        (PROMETHEUS_3, f"{OPENMETRICS}; escaping=allow-utf-8"),
        # By quality, whatever the order.
        ("application/openmetrics-text;q=0.5,text/plain;q=0.9", TEXT),
        ("text/plain;q=0.5,application/openmetrics-text;q=0.9", OPENMETRICS),
        ("text/plain;q=0.5,application/openmetrics-text", OPENMETRICS),
        ("text/plain;version=0.0.4;q=0.3,text/plain;version=1.0.0;q=0.4", TEXT_1 + "underscores"),
        ("text/plain;version=0.0.4,text/plain;version=1.0.0", TEXT),
        ("text/plain,application/openmetrics-text", TEXT),
        ("application/openmetrics-text,text/plain", OPENMETRICS),
        ("*/*,application/openmetrics-text", OPENMETRICS),
        # The quality is that of the most specific range.
        ("application/openmetrics-text;q=0.9,text/plain;q=0.1,*/*", OPENMETRICS),
        ("application/openmetrics-text;q=0.5,*/*", TEXT),
        ("text/*;q=0.1,application/*;q=0.2", OPENMETRICS),
        # A refused format is not chosen.
        ("application/openmetrics-text;q=0", TEXT),
        ("application/openmetrics-text;q=0,*/*", TEXT),
        ("application/openmetrics-text;version=1.0.0;q=0.000, text/plain;q=0.1", TEXT),
        ("text/plain;q=0,*/*;q=0.1", OPENMETRICS),
        ("text/*;q=0, application/openmetrics-text;q=0.001", OPENMETRICS),
        ("text/plain;q=0", None),
        ("*/*;q=0", None),
        ("text/*;q=0.0, application/openmetrics-text; q=0", None),
        # Only known versions are chosen.
        ("application/openmetrics-text;version=0.0.1", TEXT),
        ("application/openmetrics-text;version=2.0.0,text/plain;q=0.1", TEXT),
        ("text/plain;version=1.0.0-evil", TEXT),
        ("text/plain;version=9.9.9;escaping=allow-utf-8", TEXT),
        (
            "application/openmetrics-text;version=1.0.0;escaping=evil",
            f"{OPENMETRICS}; escaping=underscores",
        ),
        (
            "application/openmetrics-text;version=1.0.0;escaping=dots",
            f"{OPENMETRICS}; escaping=underscores",
        ),
        (
            'Application/OpenMetrics-Text; Version="1.0.0" ; Escaping=values',
            f"{OPENMETRICS}; escaping=values",
        ),
        # An invalid quality is ignored.
        ("application/openmetrics-text;q=x", OPENMETRICS),
        ("application/openmetrics-text;q=-1", OPENMETRICS),
        ("text/plain;q=1.5,application/openmetrics-text;q=1", TEXT),
    ],
)
def test_choice(accept: str, content_type: str | None) -> None:
    """Each Accept header gives the right format and Content-Type."""
    chosen = choose(accept)
    if content_type is None:
        assert chosen is None
    else:
        assert chosen == Format(content_type.startswith("application/"), content_type)


WORDS = st.sampled_from(
    [
        *("text/plain", "application/openmetrics-text", "*/*", "text/*", ";", ";", ",", "="),
        *("q=0", "q=1", "q=0.5", "q=nan", "q=1e9", "version=1.0.0", "version=9", "escaping=dots"),
    ]
)


@given(st.lists(WORDS | st.text(max_size=5)).map("".join))
def test_nothing_is_given_back(accept: str) -> None:
    """Whatever the Accept header, the Content-Type is one of a few."""
    escaped = {f"{TEXT_1}{one}" for one in ("underscores", "allow-utf-8", "values")}
    escaped |= {f"{OPENMETRICS}; escaping={one.rpartition('=')[2]}" for one in escaped}
    chosen = choose(accept)
    assert chosen is None or chosen.content_type in {TEXT, OPENMETRICS, *escaped}


@pytest.mark.parametrize(
    ("accepted", "taken"),
    [
        *[(each, True) for each in ("gzip", "br, GZIP;q=0.5", "gzip;q=x", "gzip ; q=1.000")],
        *[(each, False) for each in ("", "br", "x-gzip", "gzip;q=0", "GZIP ; q=0.0000, br")],
    ],
)
def test_gzip(accepted: str, *, taken: bool) -> None:
    """A client gets gzip only if it names gzip and does not refuse it."""
    assert takes_gzip(accepted) == taken


def test_few_are_looked_at() -> None:
    """Of a very long header only the first hundred ranges are examined."""
    for before, taken in ((99, True), (100, False)):
        chosen = choose("a/b," * before + "application/openmetrics-text;version=1.0.0")
        assert chosen is not None
        assert chosen.openmetrics == taken
    assert takes_gzip("br," * 99 + "gzip")
    assert not takes_gzip("br," * 100 + "gzip")
