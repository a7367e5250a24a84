"""The exporter as a process, mostly over a fake dtrace(1)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from lab.exporter import free_port
from lab.waiting import until

EXPORTER = [sys.executable, "-m", "dtrace_exporter"]
SECONDS = 60.0


def write(path: Path, command: list[str], port: int = 22, **dtrace: Any) -> Path:
    """Write a configuration with one port, and return its path."""
    keys = {"command": command, "program": "linux", "interval": "100ms", **dtrace}
    config = {"source": "dtrace", "dtrace": keys, "listeners": [{"port": port, "name": "name"}]}
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the exporter to its end."""
    return subprocess.run(
        [*EXPORTER, *map(str, arguments)], capture_output=True, text=True, timeout=SECONDS
    )


class Exporter:
    """A running exporter and its port."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port

    def get(self, path: str = "/metrics") -> str:
        """Return the answer for a path, or an empty string if there is none."""
        url = f"http://127.0.0.1:{self.port}{path}"
        with suppress(URLError, ConnectionError), urlopen(url, timeout=SECONDS) as answer:
            return str(answer.read().decode())
        return ""


@contextmanager
def serving(*arguments: str | Path, stderr: int = subprocess.PIPE) -> Iterator[Exporter]:
    """Run the service, and end it in any case."""
    port = free_port()
    flags = [f"--web.listen-address=127.0.0.1:{port}", *map(str, arguments)]
    with subprocess.Popen([*EXPORTER, *flags], stderr=stderr, text=True) as process:
        try:
            yield Exporter(process, port)
        finally:
            if process.poll() is None:
                process.kill()


def pid_in(saved: Path) -> int:
    """Wait for the fake dtrace(1) to start, and return its process ID."""
    until(saved.exists)
    return int(json.loads(saved.read_text(encoding="utf-8"))["pid"])
