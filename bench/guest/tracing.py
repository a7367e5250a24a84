"""What every guest of the bench needs: tracers, CPU time and memory of processes, reporting."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

READY_SECONDS = 120
QUIET_SECONDS = 4.0
"""A tracer has told all when it has been silent this long."""


def tell(**message: Any) -> None:
    """Send a message to whoever booted this guest."""
    print(json.dumps(message), flush=True)


class Tracer:
    """A tracer that runs, and what it has printed.

    Args:
        command: how to start it.
        text: its program, for standard input; None for none.
        ready: an expression that the output has once every probe is enabled; None where it does
            not say.
        settle: seconds to wait after that.
    """

    def __init__(
        self, command: Sequence[str], text: str | None, ready: str | None, settle: float = 1.0
    ) -> None:
        self.output = b""
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if text is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if text is not None:
            assert self.process.stdin is not None
            self.process.stdin.write(text.encode())
            self.process.stdin.close()
        deadline = time.monotonic() + READY_SECONDS
        while ready is not None and not re.search(ready.encode(), self.output):
            if not self.read(1.0) and self.process.poll() is not None:
                raise RuntimeError(self.output.decode(errors="replace")[-500:])
            if time.monotonic() > deadline:
                self.end()
                raise RuntimeError(f"not ready: {self.output[-500:]!r}")
        self.wait(settle)

    def read(self, seconds: float) -> bytes:
        """Return what comes next within some seconds."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return b""
        chunk = os.read(self.process.stdout.fileno(), 1 << 20)
        self.output += chunk
        return chunk

    def wait(self, seconds: float) -> None:
        """Read for some seconds."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not self.read(left) and self.process.poll() is not None:
                return

    def drain(self) -> None:
        """Read until nothing comes for a while, so that what is in buffers has come."""
        end = time.monotonic() + 120
        while time.monotonic() < end and self.read(QUIET_SECONDS):
            pass

    def end(self) -> str:
        """End it and return all that it printed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if not self.read(0.5) and self.process.poll() is not None:
                break
        else:
            self.process.kill()
        self.process.wait()
        return self.output.decode(errors="replace")


@contextmanager
def running(
    command: Sequence[str], text: str | None, ready: str | None, settle: float = 1.0
) -> Iterator[Tracer]:
    """Run a tracer for as long as the block lasts."""
    tracer = Tracer(command, text, ready, settle)
    try:
        yield tracer
    finally:
        tracer.end()


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has had so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Return the memory that a process has in RAM, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def complain(what: str, error: Exception) -> None:
    """Say that something could not be measured, and why."""
    tell(event="failed", what=what, why=str(error).strip()[-400:])
    print(f"{what}: {error}", file=sys.stderr)
