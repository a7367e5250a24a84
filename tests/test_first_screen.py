"""The commands of README's first screen, on a plain Debian 12, print the numbers it shows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import debian_root
from markdown_page import blocks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The packages that a Debian with Python 3.11 installs, from the index that this host uses.
DOWNLOAD = [
    *(sys.executable, "-m", "pip", "download", "--quiet", "--python-version=3.11"),
    *("--only-binary=:all:", "setuptools>=77", "prometheus-client", "pyyaml", "tornado"),
]

pytestmark = [
    pytest.mark.xdist_group("packages"),
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0,
        reason="needs root, to have another root directory",
    ),
]


def test_first_screen(debian_12: Path, tmp_path: Path) -> None:
    """`make run` serves, and curl prints what the page shows, in a Debian with its own network."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    for name in filter(None, files.stdout.split("\0")):
        (debian_12 / "exporter" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, debian_12 / "exporter" / name, follow_symlinks=False)
    subprocess.run([*DOWNLOAD, f"--dest={debian_12}/wheels"], check=True)
    _, serving = blocks(README, "sh")[0].splitlines()
    asking = blocks(README, "sh")[1]
    status, printed = debian_root.run(
        debian_12,
        f"""
        export PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels
        cd /exporter && {{ {serving.partition("#")[0]}
        }} &
        until curl --silent localhost:9748/-/ready; do sleep 1; done
        {asking}
        """,
        tmp_path / "said",
    )
    assert status == 0, printed
    (shown, _) = blocks(README, "")
    assert set(shown.splitlines()) <= set(printed.splitlines()), printed
