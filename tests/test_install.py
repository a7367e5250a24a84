"""docs/install.md: its formats, files and commands exist, and each system has a row."""

from __future__ import annotations

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import distribution
import pytest

from dtrace_exporter import cli
from markdown_page import blocks, languages

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/install.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = re.findall(r"`([^`\n]+)`", PAGE)


def test_formats() -> None:
    """The page names exactly the formats that can be built."""
    named = {word.removeprefix("make dist ARGS=") for word in WORDS if "ARGS=" in word}
    assert named == {*distribution.FORMATS}
    for name in re.findall(r"make dist ARGS=(\w+)", README):
        assert name in distribution.FORMATS


@pytest.mark.xdist_group("packages")
def test_files(packages: Path) -> None:
    """Each file that the pages name is one that is built."""
    built = {path.name for path in packages.iterdir()}
    patterns = re.findall(r"dist/(dtrace[\w.*-]+\w)", PAGE + README)
    assert len(patterns) >= 4
    for pattern in patterns:
        assert [name for name in built if fnmatch(name, pattern)], pattern


def test_every_system_has_been_tried_or_not() -> None:
    """Each row says what to do and what was tried."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.partition("\n\n## ")[0].splitlines()
        if line.startswith("|")
    ][2:]
    assert len(rows) > 8
    for system, commands, tried in rows:
        assert system
        assert "`" in commands or "](" in commands or commands == "the same", system
        assert tried


def test_one_file() -> None:
    """The exporter accepts the arguments that the page gives to the single file."""
    assert languages(PAGE) == {"sh"}
    for line in "".join(blocks(PAGE, "sh")).splitlines():
        _, isolated, file, *words = shlex.split(line)
        assert (isolated, file) == ("-I", "dtrace-exporter-*.pyz")
        cli._parser().parse_args(words)


def test_places() -> None:
    """The files of packages are where the page says, and its versions are the required ones."""
    script = (ROOT / "packages/install.sh").read_text(encoding="utf-8")
    for word in ("/etc/default/dtrace-exporter", "/etc/dtrace-exporter", "/share/dtrace-exporter"):
        assert word in script
        assert word in PAGE
    tornado = distribution.FLOORS["tornado"]
    assert f"one older than {tornado}" in " ".join(PAGE.split())
    assert f"prometheus_client {distribution.FLOORS['prometheus-client']}" in PAGE
