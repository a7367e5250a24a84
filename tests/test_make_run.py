"""`make run` with a Python that is too old or lacks venv: the next try works."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from host_tools import require

ROOT = Path(__file__).parents[1]

# It says whether it is new enough, and makes a complete or incomplete copy of itself.
_PYTHON = """#!/bin/sh
case "$*" in
-c*) exit {old} ;;
"-m venv .venv")
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    {lacks_pip} && test ! -e has-venv && exit 1
    printf '#!/bin/sh\\necho served\\n' >.venv/bin/dtrace-exporter
    chmod +x .venv/bin/dtrace-exporter ;;
"-m pip "*) ;;
*) exit 9 ;;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a directory with the files that make needs, and an apt-get that fails."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    executable(tmp_path / "bin/apt-get", "#!/bin/sh\nexit 100\n")
    return tmp_path


def executable(path: Path, text: str) -> str:
    """Write a command, and return its path."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def python(tree: Path, name: str, *, old: bool = False, lacks_pip: bool = False) -> str:
    """Return the path of a Python of some kind."""
    text = _PYTHON.format(old=int(old), lacks_pip=str(lacks_pip).lower())
    return executable(tree / "bin" / name, text)


def make_run(tree: Path, command: str) -> tuple[bool, str]:
    """Run `make run` with a Python, and return whether it serves, and its errors."""
    made = subprocess.run(
        [require("make", "make"), "run", f"PYTHON={command}"],
        cwd=tree,
        # If make runs the tests, this make would otherwise print its directory.
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
            "PATH": f"{tree}/bin:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
    )
    return made.stdout.endswith("served\n"), made.stderr


@pytest.mark.parametrize("kind", ["old", "missing"])
def test_no_python(kind: str, tree: Path) -> None:
    """A Python that is missing or too old gives an error, and nothing is left behind."""
    command = python(tree, "old", old=True) if kind == "old" else f"{tree}/bin/missing"
    serves, said = make_run(tree, command)
    assert not serves
    assert f"{command} is missing or too old: name Python 3.11 or newer" in said
    assert not (tree / ".venv").exists()
    assert make_run(tree, python(tree, "new")) == (True, "")


@pytest.mark.parametrize("installed", [False, True])
def test_no_venv(installed: bool, tree: Path) -> None:
    """If venv lacks pip, its package is installed; after a failure the next try works."""
    command = python(tree, "new", lacks_pip=True)
    if installed:
        executable(tree / "bin/apt-get", '#!/bin/sh\necho "$*" >>apt\n')
    assert not make_run(tree, command)[0]
    assert not (tree / ".venv/bin/python").exists()
    executable(tree / "bin/apt-get", '#!/bin/sh\necho "$*" >>apt; touch has-venv\n')
    assert make_run(tree, command)[0]
    asked = (tree / "apt").read_text(encoding="utf-8").splitlines()
    assert asked == ["install --yes python3-venv"] * (1 + installed)
