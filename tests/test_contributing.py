"""CONTRIBUTING.md: its commands and names exist, and its first command works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import dtrace_exporter
from markdown_page import blocks

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PACKAGE = Path(dtrace_exporter.__file__).parent
COMMANDS = [line for block in blocks(TEXT, "sh") for line in block.splitlines()]
PYTEST = {"unit": ["--ignore=tests/kernel"], "kernel": ["tests/kernel"]}
"""The arguments that the Makefile's targets give pytest before ARGS."""


def done(*command: str) -> str:
    """Run a command in the tree, which has to succeed, and return its output."""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_there_are_commands() -> None:
    """Every command is of a kind that is tested here."""
    assert len(COMMANDS) >= 7
    for line in COMMANDS:
        assert line.startswith(("make ", ".venv/bin/python ")), line


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_make(line: str) -> None:
    """The Makefile has the target, and its arguments for pytest select tests."""
    _, target, *rest = shlex.split(line)
    said = done("make", "--dry-run", target, *rest)
    arguments = rest[0].removeprefix("ARGS=") if rest else ""
    assert arguments in said
    if target in PYTEST:
        assert " ".join([*PYTEST[target], arguments]) in said
        words = [*PYTEST[target], *shlex.split(arguments)]
        listed = done(sys.executable, "-m", "pytest", "--collect-only", "-q", *words)
        assert "::test_" in listed


def test_the_first_command() -> None:
    """The first command of the page runs some tests, and they pass."""
    _, _, arguments = shlex.split(COMMANDS[0])
    words = [*PYTEST["unit"], *shlex.split(arguments.removeprefix("ARGS="))]
    assert re.search(r"\d+ passed", done(sys.executable, "-m", "pytest", *words))


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith(".venv/")])
def test_script(line: str) -> None:
    """The script exists and knows its arguments."""
    _, script, *arguments = shlex.split(line)
    said = done(sys.executable, script, *arguments[:-1], "--help")
    assert arguments[-1] in said


def test_every_module_is_on_the_map() -> None:
    """The four tables list every module of the package once, and nothing else."""
    tables = re.findall(
        r"^\| (at the top|in `\w+/`) \| \|\n(.*?)\n\n", TEXT, re.DOTALL | re.MULTILINE
    )
    assert len(tables) == 4
    found = []
    for heading, rows in tables:
        side = "" if heading == "at the top" else heading.split("`")[1]
        cells = [row.split("|")[1] for row in rows.splitlines()[1:]]
        found += [side + name for cell in cells for name in re.findall(r"`([\w.]+)`", cell)]
    modules = (path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
    assert sorted(found) == sorted(
        name for name in modules if not name.split("/")[-1].startswith("__")
    )


def test_what_is_named_is_there() -> None:
    """The files, directories and names that the page mentions exist."""
    for name in re.findall(r"`((?:tests|tracing|web|programs|config|docs)/[\w./-]*)`", TEXT):
        assert (ROOT / name).exists() or (PACKAGE / name).exists() or "NAME" in name, name
    for name in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (ROOT / name).exists(), name
    for name in (
        *("RowError", "PROTOCOL", "FAMILIES", "Capabilities", "CAPABILITIES", "Listener", "_ROWS"),
        *("_counted()", "_count()", "copy()", "capabilities()", "listener_series()", "_session()"),
    ):
        assert f"`{name}`" in TEXT
        word = name.removesuffix("()")
        assert any(
            re.search(
                rf"^ *(?:class |def )?{word}\b", path.read_text(encoding="utf-8"), re.MULTILINE
            )
            for path in PACKAGE.rglob("*.py")
        ), name
