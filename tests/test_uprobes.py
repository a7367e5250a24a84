"""Uprobes that dead dtrace(1) processes left in the kernel are removed, and no others."""

from __future__ import annotations

import asyncio
import mmap
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter.config import Config
from dtrace_exporter.service import Service
from dtrace_exporter.tracing import uprobes
from dtrace_exporter.tracing.uprobes import remove_leftovers


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file that replaces the kernel's list of uprobes."""
    file = tmp_path / "uprobe_events"
    file.write_text("", encoding="ascii")
    monkeypatch.setattr(uprobes, "EVENTS", file)
    return file


@pytest.fixture
def dead() -> int:
    """Return the process ID of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def uprobe(pid: int, name: str = "BEGIN", group: str = "dt") -> str:
    """Return a line of the kernel's list."""
    return f"p:{group}_{pid}_dtrace/{name} /usr/lib64/libdtrace.so.2:0x0000000000012345\n"


def written(events: Path, listed: str) -> str:
    """Return what is written to the list if it has these lines."""
    events.write_text(listed, encoding="ascii")
    remove_leftovers()
    return events.read_text(encoding="ascii").removeprefix(listed)


def test_leftovers_of_the_dead(events: Path, dead: int) -> None:
    """Both uprobes of a dead process are removed by their names."""
    listed = uprobe(dead) + uprobe(dead, "END")
    assert written(events, listed) == f"-:dt_{dead}_dtrace/BEGIN\n-:dt_{dead}_dtrace/END\n"


def test_uprobes_of_the_living(events: Path, dead: int, tmp_path: Path) -> None:
    """The uprobes of a running consumer stay, and those of a dead one beside them go."""
    library = tmp_path / "libdtrace.so.2"
    library.write_bytes(b"0")
    listed = uprobe(os.getpid()) + uprobe(dead)
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        assert written(events, listed) == f"-:dt_{dead}_dtrace/BEGIN\n"


def test_a_number_that_another_process_has(events: Path) -> None:
    """Uprobes of a dead process are removed, even if another program now has its process ID."""
    assert written(events, uprobe(os.getpid())) == f"-:dt_{os.getpid()}_dtrace/BEGIN\n"


def test_a_process_that_cannot_be_looked_at(events: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The uprobes of a process that cannot be examined stay."""

    def denied(_: Path) -> bytes:
        raise PermissionError

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert written(events, uprobe(os.getpid())) == ""


def test_others_uprobes(events: Path, dead: int) -> None:
    """Uprobes that are not dtrace(1)'s own stay."""
    own = f"p:uprobes/p_bash_0x4245c0 /bin/bash:0x4245c0\nr{uprobe(dead)[1:]}"
    other = f"p:dt_{dead}_sshd/BEGIN /bin/sshd:0x1\n{uprobe(dead, group='xdt')}"
    assert written(events, own + other) == ""


def test_a_kernel_without_uprobes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the list does not exist or cannot be read, nothing happens."""
    monkeypatch.setattr(uprobes, "EVENTS", tmp_path / "none")
    remove_leftovers()
    monkeypatch.setattr(uprobes, "EVENTS", tmp_path)
    remove_leftovers()
    assert list(tmp_path.iterdir()) == []


def test_one_that_cannot_be_removed(
    events: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An uprobe that is still in use stays, and the next one is removed all the same."""
    tried: list[bytes] = []
    real = os.write

    def refusing(descriptor: int, data: bytes) -> int:
        tried.append(data)
        if len(tried) == 1:
            raise OSError(16, "Device or resource busy")
        return real(descriptor, data)

    events.write_text(uprobe(dead) + uprobe(dead, "END"), encoding="ascii")
    monkeypatch.setattr(os, "write", refusing)
    remove_leftovers()
    monkeypatch.undo()
    assert events.read_text(encoding="ascii").endswith(f"-:dt_{dead}_dtrace/END\n")
    assert len(tried) == 2


@given(st.binary(max_size=300))
def test_any_list(content: bytes) -> None:
    """Any content of the list is read without harm."""
    with pytest.MonkeyPatch.context() as patch:

        class File:
            def read_text(self, errors: str) -> str:
                return content.decode(errors=errors)

        patch.setattr(uprobes, "EVENTS", File())
        remove_leftovers()


def test_at_the_start(events: Path, dead: int) -> None:
    """A service that starts removes the uprobes that a killed one left."""

    async def start() -> None:
        service = Service(None, Config(source="sock_diag"))
        await service.start()
        await service.stop()

    events.write_text(uprobe(dead), encoding="ascii")
    asyncio.run(start())
    assert events.read_text(encoding="ascii").endswith(f"-:dt_{dead}_dtrace/BEGIN\n")
