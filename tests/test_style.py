"""The style that editors and git are told is well-formed, and the tree follows it."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from editorconfig import get_properties

from host_tools import require

ROOT = Path(__file__).parent.parent
FOLDERS = (
    "bench",
    "config",
    "docs",
    "freebsd",
    "man",
    "packages",
    "smf",
    "src",
    "systemd",
    "tests",
)
HOOKS = [
    hook
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    for hook in repo["hooks"]
]


def files() -> Iterator[Path]:
    """Yield the text files of the tree."""
    inside = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    for path in (*ROOT.glob("*"), *inside):
        made = "__pycache__" in path.parts or path.parent.suffix == ".egg-info"
        if path.is_file() and path.suffix != ".png" and not made:
            yield path


def test_editorconfig() -> None:
    """Each file has the line ends, indentation and so on that .editorconfig gives it."""
    styles = set()
    for path in files():
        style = get_properties(str(path))
        data = path.read_bytes()
        if style["charset"] == "utf-8":
            data.decode()
        if style["end_of_line"] == "lf":
            assert b"\r" not in data, path
        if style["insert_final_newline"] == "true" and data:
            assert data.endswith(b"\n"), path
        if style["trim_trailing_whitespace"] == "true":
            assert not re.search(rb"[ \t]$", data, re.MULTILINE), path
        indented = re.findall(rb"^(\t|  )", data, re.MULTILINE)
        if indented:
            usual = max(b"\t", b"  ", key=indented.count)
            assert {b"\t": "tab", b"  ": "space"}[usual] == style["indent_style"], path
        styles.add(tuple(sorted(style.items())))
    # The general style, that with two spaces, that with tabs and that of the seeds.
    assert len(styles) == 4


@pytest.mark.parametrize("hook", HOOKS, ids=[hook["id"] for hook in HOOKS])
def test_hooks(hook: dict[str, object]) -> None:
    """Each hook runs git or make, so that no tool has a second version here."""
    assert hook["language"] == "system"
    program, *words = shlex.split(str(hook["entry"]))
    assert program in {"git", "make"}
    command = require(program, program)
    if program == "make":
        subprocess.run([command, "--dry-run", *words], cwd=ROOT, check=True)


def test_a_commit_is_linted() -> None:
    """One of the hooks runs make lint."""
    assert "make lint" in {hook["entry"] for hook in HOOKS}
