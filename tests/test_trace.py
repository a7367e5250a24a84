"""Which program the trace command runs, on hosts of which the kernel alone can tell."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from dtrace_exporter import program
from dtrace_exporter.config import DTraceConfig
from dtrace_exporter.dtrace import DTraceError
from dtrace_exporter.program import ProgramError
from dtrace_exporter.trace import HEADER, trace

FakeDTrace = Callable[..., list[str]]

LINE = "100,2026 Nov 22 08:00:00,drop:q0_full,0:ffffc0a80102,40000,22,9,1,8"
SHOWN = "100,2026 Nov 22 08:00:00,drop:q0_full,192.168.1.2,40000,22,9,1,8"


@pytest.fixture(autouse=True)
def _solaris(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this system's name not tell which program it needs, as that of Solaris does not."""
    monkeypatch.setattr(program, "local", lambda _: "")


@pytest.fixture(autouse=True)
def _no_child_left() -> Iterator[None]:
    """Show that a test leaves no child process, running or not yet waited for."""
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture
def own_trace(tmp_path: Path) -> Path:
    """Return a program of one's own that prints a line for each event."""
    path = tmp_path / "own_trace.d"
    text = "inline int FIRST_PORT = 0;\ninline int CONN_TCP = 0x28;\nBEGIN\n{\n}\n"
    path.write_text(text, encoding="utf-8")
    return path


def traced(command: list[str], **dtrace: Any) -> tuple[int, list[str]]:
    """Trace port 22 until dtrace(1) ends, and return the exit status and the lines."""
    out = StringIO()
    status = asyncio.run(trace(DTraceConfig(command=tuple(command), **dtrace), 22, out))
    return status, out.getvalue().splitlines()


@pytest.mark.parametrize(
    ("functions", "name"),
    [
        ([["ip", "tcp_input_listener"]], "illumos"),
        ([["ip", "tcp_conn_request"]], "solaris10"),
        ([["vmlinux", "tcp_conn_request"]], "linux"),
    ],
)
def test_program_of_the_kernel(
    functions: list[list[str]], name: str, fake_dtrace: FakeDTrace, tmp_path: Path
) -> None:
    """The kernel is asked which program it needs, and the one that traces beside it runs."""
    saved = tmp_path / "start.json"
    steps = [{"functions": functions}, {"save": str(saved)}, {"print": [HEADER, LINE]}, {"exit": 0}]
    assert traced(fake_dtrace(*steps)) == (0, [HEADER, SHOWN])
    start = json.loads(saved.read_text(encoding="utf-8"))
    assert start["argv"] == ["-s", "/dev/stdin"]
    expected = program.render(
        program.load_trace(name), program.window(1.0), (22, 22), program.drop_counters(["dtrace"])
    )
    assert start["program"] == expected


def test_configured_program(own_trace: Path, fake_dtrace: FakeDTrace, tmp_path: Path) -> None:
    """Where the configuration names the program the kernel is not asked: here it has none."""
    saved = tmp_path / "start.json"
    command = fake_dtrace({"functions": []}, {"save": str(saved)}, {"exit": 3})
    settings = {"program": str(own_trace), "offsets": {"conn_tcp": 0x20}}
    assert traced(command, **settings) == (3, [])
    text = json.loads(saved.read_text(encoding="utf-8"))["program"]
    assert text == "inline int FIRST_PORT = 22;\ninline int CONN_TCP = 32;\nBEGIN\n{\n}\n"
    saved.unlink()
    assert traced(command, program="linux") == (3, [])
    text = json.loads(saved.read_text(encoding="utf-8"))["program"]
    assert text.splitlines()[0] == "#!/usr/sbin/dtrace -s"
    assert HEADER in text


def test_a_kernel_that_cannot_be_asked(fake_dtrace: FakeDTrace) -> None:
    """Where dtrace(1) may not be used, or no program fits, nothing is run and the reason raised."""
    with pytest.raises(DTraceError, match=r"^dtrace: run as root"):
        traced(fake_dtrace({"unprivileged": True}))
    with pytest.raises(DTraceError, match=r"^no D program fits this kernel"):
        traced(fake_dtrace({"functions": []}, {"print": HEADER}))
    with pytest.raises(ProgramError, match="the D program nonsense_trace: No such file"):
        traced(fake_dtrace(), program="nonsense")
