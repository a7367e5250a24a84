"""The files for a host that the package contains: units, SMF's files, rules, dashboards.

They are in the package's directory ``share``. In a checkout it has links to their sources.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

PROGRAM = "/usr/local/bin/dtrace-exporter"
"""The path of the program in the source of systemd's unit."""
ENVIRONMENT = "/opt/dtrace-exporter"
"""The path of the Python environment in the source of SMF's manifest."""


def names() -> list[str]:
    """Return the paths of all files, relative to ``share``."""
    return [name for name, _ in _below(files("dtrace_exporter") / "share", "")]


def copy(directory: Path) -> list[Path]:
    """Copy all files. The paths in the units and the manifest are changed to those of this program.

    Args:
        directory: where to; it is created.

    Returns:
        The paths of the copies.

    Raises:
        OSError: the directory is not empty, or cannot be written to.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OSError(f"{directory}: expected a directory that is empty or not there yet")
    written = []
    for name, file in _below(files("dtrace_exporter") / "share", ""):
        data = file.read_bytes()
        if name.startswith("systemd/"):
            data = data.replace(PROGRAM.encode(), _program().encode())
        if name.startswith("smf/"):
            data = data.replace(ENVIRONMENT.encode(), _environment().encode())
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if data.startswith(b"#!"):
            path.chmod(0o755)
        written.append(path)
    return written


def _below(directory: Traversable, before: str) -> Iterator[tuple[str, Traversable]]:
    for entry in sorted(directory.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _below(entry, f"{before}{entry.name}/")
        else:
            yield before + entry.name, entry


def _program() -> str:
    """Return the command of this program. A link of pipx is not followed: upgrades keep it.

    With -I Python loads nothing because of variables or a user's directories.
    """
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        started = Path(sysconfig.get_path("scripts"), "dtrace-exporter")
    return f"{sys.executable} -I {started.absolute()}"


def _environment() -> str:
    """Return the Python environment of this program, or the one in the manifest's source."""
    own = sys.prefix != sys.base_prefix and Path(sys.prefix, "bin/dtrace-exporter").exists()
    return sys.prefix if own else ENVIRONMENT
