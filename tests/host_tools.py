"""Commands that a few tests need, from Debian's packages."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

_APT = Path(tempfile.gettempdir(), "dtrace-exporter-tests-apt.lock")
"""A lock, because apt-get fails while another process of the tests runs it."""


@cache
def find(command: str, package: str) -> str | None:
    """Return the path of a command, or None; install it if that is possible.

    Args:
        command: its name.
        package: the Debian package that has it.
    """
    if not shutil.which(command) and os.geteuid() == 0 and shutil.which("apt-get"):
        with _APT.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not shutil.which(command):
                _install(package)
    return shutil.which(command)


def _install(package: str) -> None:
    wait = ["-o", "DPkg::Lock::Timeout=600"]
    apt = ["apt-get", *wait, "-q", "-y", "--no-install-recommends", "install", package]
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if subprocess.run(apt, env=quiet, capture_output=True).returncode:
        subprocess.run(["apt-get", "-q", "update"], capture_output=True)
        subprocess.run(apt, env=quiet, capture_output=True)


def require(command: str, package: str) -> str:
    """Return the path of a command, and install it if that is possible, or else skip the test.

    Args:
        command: its name.
        package: the Debian package that has it.
    """
    return find(command, package) or pytest.skip(f"no {command} here (Debian: {package})")
