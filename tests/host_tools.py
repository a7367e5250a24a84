"""Commands that a few tests need, from Debian's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache

import pytest


@cache
def _find(command: str, package: str) -> str | None:
    if not shutil.which(command) and os.geteuid() == 0 and shutil.which("apt-get"):
        apt = ["apt-get", "-q", "-y", "--no-install-recommends", "install", package]
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        if subprocess.run(apt, env=quiet, capture_output=True).returncode:
            subprocess.run(["apt-get", "-q", "update"], capture_output=True)
            subprocess.run(apt, env=quiet, capture_output=True)
    return shutil.which(command)


def require(command: str, package: str) -> str:
    """Return the path of a command, and install it where that is possible; or skip the test.

    Args:
        command: its name.
        package: the Debian package that has it.
    """
    return _find(command, package) or pytest.skip(f"no {command} here (Debian: {package})")
