"""Root directories of Debian, and commands that run in them with a network of their own."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path

from lab.waiting import until

from host_tools import require

MINUTES = 60.0
CONTROL = Path(__file__).parents[1] / "packages/debian/control"


def dependencies() -> list[str]:
    """Return the names of the packages that ours depends on."""
    text = CONTROL.read_text(encoding="utf-8")
    (depends,) = re.findall(r"^Depends:(.*?)^\w", text, re.DOTALL | re.MULTILINE)
    return re.findall(r"python3(?:-[\w-]+)?(?= \()", depends)


def make(suite: str, packages: Iterable[str], root: Path, script: str = "") -> None:
    """Make a minimal Debian.

    Args:
        suite: its name, such as bookworm.
        packages: what is installed besides.
        root: the directory to be made.
        script: what a shell runs in it at the end, with this host's network.
    """
    require("mmdebstrap", "mmdebstrap")
    made = subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}",
         # An archive of a past day has a Release file that has expired.
         '--aptopt=Acquire::Check-Valid-Until "false"', '--aptopt=APT::Get::Assume-Yes "true"',
         f'--customize-hook=chroot "$1" sh -ec {shlex.quote(script)}', suite, str(root)],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr


def run(root: Path, script: str, log: Path) -> tuple[int, str]:
    """Run a shell script in a root, with processes and a network of its own.

    Returns:
        Its exit status, and the output of all its processes.
    """
    inside = log.with_suffix(".sh")
    inside.write_text(
        f"""
        ip link set lo up && mount -t proc proc {root}/proc && mount --rbind /dev {root}/dev
        exec chroot {root} sh -c "$1"
        """,
        encoding="utf-8",
    )
    own = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
    with log.open("w+", encoding="utf-8") as said:
        with subprocess.Popen(
            [*own, "sh", str(inside), script], stdout=said, stderr=subprocess.STDOUT
        ) as process:
            until(lambda: process.poll() is not None, seconds=10 * MINUTES)
        said.seek(0)
        return process.returncode, said.read()
