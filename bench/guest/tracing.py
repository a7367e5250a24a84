"""The common part of the bench's guests: tracers, BPF programs, memory of processes, messages."""

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


def tell(**message: Any) -> None:
    """Send a message to the host that has booted this guest."""
    print(json.dumps(message), flush=True)


def tell_versions(dtrace: str) -> None:
    """Report the versions of the tools and of the kernel.

    Args:
        dtrace: the command.
    """
    for name, command in (
        ("DTrace", [dtrace, "-V"]),
        ("bpftrace", ["bpftrace", "--version"]),
        ("Linux", ["uname", "-r"]),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        match = re.search(r"\d+\.[\w.]+", done.stdout + done.stderr)
        tell(event="version", name=name, version=match[0] if match else "")


class Tracer:
    """A running tracer, and its output.

    Args:
        command: how to start it.
        text: its program, for the standard input; None for none.
        ready: an expression that matches the output once all probes are enabled.
    """

    def __init__(self, command: Sequence[str], text: str | None, ready: str) -> None:
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
        while not re.search(ready.encode(), self.output):
            if not self.read(1.0) and self.process.poll() is not None:
                raise RuntimeError(self.output.decode(errors="replace")[-500:])
            if time.monotonic() > deadline:
                self.end()
                raise RuntimeError(f"not ready: {self.output[-500:]!r}")
        self.wait(1.0)

    def text(self) -> str:
        """Return all of its output so far."""
        return self.output.decode(errors="replace")

    def read(self, seconds: float) -> bytes:
        """Return the next output within some seconds."""
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

    def end(self) -> str:
        """End it and return all of its output."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if not self.read(0.5) and self.process.poll() is not None:
                break
        else:
            self.process.kill()
        self.process.wait()
        return self.text()


@contextmanager
def running(command: Sequence[str], text: str | None, ready: str) -> Iterator[Tracer]:
    """Run a tracer until the block ends."""
    tracer = Tracer(command, text, ready)
    try:
        yield tracer
    finally:
        tracer.end()


def resident(pid: int) -> int:
    """Return the resident memory of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def complain(what: str, error: Exception) -> None:
    """Report that something could not be measured, and why."""
    tell(event="failed", what=what, why=str(error).strip()[-400:])
    print(f"{what}: {error}", file=sys.stderr)
