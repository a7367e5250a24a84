"""docs/getting-dtrace.md: each system has a row, and the commands for Debian 13 work."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

import debian_root
from markdown_page import blocks

PAGE = (Path(__file__).parents[1] / "docs/getting-dtrace.md").read_text(encoding="utf-8")
SYSTEMS = ("Debian 12", "Debian 13", "Ubuntu", "Fedora", "RHEL", "Oracle Linux", "Arch", "SUSE")


def test_every_system_has_been_tried_or_not() -> None:
    """Each row says what to do and whether it was tried."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", PAGE, re.MULTILINE)[1:]
    for system in SYSTEMS:
        assert sum(system in named for named, _, _ in rows) == 1, system
    for named, todo, tried in rows:
        assert "`" in todo or "](" in todo, named
        assert tried.startswith(("yes: ", "not tried")), named


@pytest.mark.xdist_group("packages")
@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0,
    reason="needs root, to have another root directory",
)
def test_debian_13(tmp_path: Path) -> None:
    """The commands install a DTrace that runs, with exactly the named packages from unstable."""
    (commands,) = blocks(PAGE, "sh")
    root = tmp_path / "root"
    debian_root.make(
        "trixie", ["apt"], root, f'sudo() {{ "$@"; }}\n{commands}apt list --installed >/had'
    )
    status, said = debian_root.run(root, "dtrace -V", tmp_path / "said")
    assert (status, said.startswith("dtrace: D 2.")) == (0, True), said
    installed = (root / "had").read_text(encoding="utf-8")
    foreign = set(re.findall(r"^(\S+)/unstable", installed, re.MULTILINE))
    (sentence,) = re.findall(r"^From unstable these are (.+)\. Look", PAGE, re.MULTILINE)
    assert foreign == set(re.findall(r"`(.+?)`", sentence)), installed
