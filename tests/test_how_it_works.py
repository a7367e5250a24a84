"""The page on how it works: everything that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dtrace_exporter import trace
from dtrace_exporter.tracing import program

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and line.count("|") == 6
]
"""The rows of the table with something about each of the programs."""


@pytest.mark.parametrize(
    ("column", "name"), [(1, "linux"), (2, "illumos"), (3, "solaris10"), (4, "freebsd")]
)
def test_what_the_table_names(column: int, name: str) -> None:
    """Each function, member and probe that the table names for a program is in that program."""
    text = program.load(name).text
    text += text.replace("tcp_v*_", "tcp_v4_") + text.replace("tcp_v*_", "tcp_v6_")
    cells = " ".join(row[column] for row in TABLE)
    named = re.findall(r"`(?:mib:::)?(\w[\w.]*?)(?:\(\))?`", cells)
    assert len(named) > 2
    assert [word for word in named if word != f"{name}.d" and word not in text] == []


def test_trace_example() -> None:
    """The example of trace has the columns of the trace command."""
    example = re.findall(r"^    (\S.*)$", PAGE, re.MULTILINE)
    header, *lines = example[1:]
    assert header == trace.HEADER
    assert lines
    assert {len(line.split(",")) for line in lines} == {9}


def test_links() -> None:
    """Every file that the page names exists."""
    named = re.findall(r"`(src/[\w/.]+)`", PAGE)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
