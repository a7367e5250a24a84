"""Python code that runs in a network namespace of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from host_tools import require

_BEGIN = 'import subprocess\nsubprocess.run(["ip", "link", "set", "lo", "up"], check=True)\n'


def output(script: str) -> str:
    """Return the output of a script that runs in a new network namespace, where only lo is up.

    Args:
        script: the code; it can import what tests can.
    """
    unshare = [require("unshare", "util-linux"), "--net"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no network namespace can be made here")
    done = subprocess.run(
        [*unshare, sys.executable, "-c", _BEGIN + script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
