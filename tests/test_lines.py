"""The splitter makes lines of chunks, however these are cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter.tracing.lines import MAX_LINE, LineSplitter

TEXT = st.lists(
    st.sampled_from([b"tick 1 2", b"a", b"\n", b"\n", b" ", b"\xff\xfe\0", "é".encode()])
)
CUTS = st.lists(st.integers(0, 200))


def split(data: bytes, cuts: list[int]) -> list[str]:
    """Feed the data cut at these places, and return all lines."""
    splitter = LineSplitter()
    lines = []
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for begin, end in pairwise(places):
        lines += splitter.feed(data[begin:end])
    return lines + splitter.end()


@given(TEXT.map(b"".join) | st.binary(), CUTS)
def test_chunks_do_not_matter(data: bytes, cuts: list[int]) -> None:
    """However the bytes are cut into chunks, the lines are the same."""
    lines = [line.decode("utf-8", "replace") for line in data.split(b"\n") if line.strip()]
    assert split(data, cuts) == lines


@given(
    st.lists(st.integers(0, 3 * MAX_LINE), min_size=1, max_size=4),
    st.lists(st.integers(0, 12 * MAX_LINE), max_size=8),
)
def test_long_lines_are_cut_once(lengths: list[int], cuts: list[int]) -> None:
    """Each line that is too long appears once, cut to its beginning; other lines stay whole."""
    data = b"\n".join(bytes([ord("a") + i]) * length for i, length in enumerate(lengths))
    expected = [
        chr(ord("a") + i) * min(length, MAX_LINE) for i, length in enumerate(lengths) if length
    ]
    assert [line[:MAX_LINE] for line in split(data, cuts)] == expected


def test_an_endless_line_takes_no_memory() -> None:
    """A line that never ends is reported once, as soon as it exceeds the limit."""
    splitter = LineSplitter()
    found = [line for _ in range(100) for line in splitter.feed(b"x" * MAX_LINE)]
    assert found == ["x" * MAX_LINE]
    assert splitter.feed(b"x\nnext\n") == ["next"]
    assert splitter.end() == []


def test_a_long_line_is_never_longer_than_said() -> None:
    """A line over the limit is also cut if it comes in one chunk with its end."""
    splitter = LineSplitter()
    assert splitter.feed(b"y" * (MAX_LINE + 1) + b"\nz\n") == ["y" * MAX_LINE, "z"]
