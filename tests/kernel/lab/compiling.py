"""DTrace that only compiles a program."""

from __future__ import annotations

import signal
import subprocess

from lab.report import note

CRASHES = {-signal.SIGSEGV, -signal.SIGABRT}
"""How Debian's dtrace has ended while it freed its memory, when all its work was done."""
_TRIES = 3


def compiled(text: str) -> tuple[int, str]:
    """Let DTrace compile a program; return its exit status and its errors.

    If dtrace(1) crashes, it is run again, up to three times in all.
    """
    command = ["dtrace", "-e", "-s", "/dev/stdin"]
    for _ in range(_TRIES):
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        if done.returncode not in CRASHES:
            break
        note(f"dtrace(1) crashed after it compiled: {done.stderr}")
    return done.returncode, done.stderr
