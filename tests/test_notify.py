"""The messages to systemd, received by a test's socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
from lab.waiting import until

from dtrace_exporter import notify
from exporter_process import serving, write
from fake_steps import FakeDTrace


class Manager:
    """Receives messages as systemd does."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1) if address[0] == "@" else address)
        self._socket.settimeout(20)

    def hear(self) -> list[str]:
        """Return the assignments of the next message."""
        return self._socket.recv(4096).decode().split("\n")

    def hear_until(self, wanted: str) -> list[str]:
        """Return all assignments up to and including the wanted one."""
        heard = []
        while wanted not in heard:
            heard += self.hear()
        return heard

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """Receive at a path, and on Linux also at an abstract name."""
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("names without a path are Linux's")
    # The path of a socket must be short.
    with TemporaryDirectory(dir="/tmp") as directory:
        abstract = f"@dtrace-exporter-{os.getpid()}"
        made = Manager(f"{directory}/s" if request.param == "path" else abstract)
        monkeypatch.setenv("NOTIFY_SOCKET", made.address)
        monkeypatch.delenv("WATCHDOG_USEC", raising=False)
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        yield made
        made.close()


def test_tell(manager: Manager) -> None:
    """Assignments arrive as the lines of one datagram."""
    notify.tell("READY=1", "STATUS=it is \N{SNOWMAN} \udcff")
    assert manager.hear() == ["READY=1", "STATUS=it is \N{SNOWMAN} ?"]


def test_reloading_has_the_time(manager: Manager) -> None:
    """RELOADING=1 comes with the time at which the reload began, as systemd 253 requires."""
    before = time.monotonic_ns() // 1000
    notify.tell_reloading()
    reloading, when = manager.hear()
    assert reloading == "RELOADING=1"
    assert before <= int(when.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


@pytest.mark.parametrize("address", ["", "nonsense", "vsock:2:1234", "/nowhere/at/all", "@nobody"])
def test_nobody_listens(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If nobody listens at the address, nothing happens."""
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify.tell("READY=1")


def test_a_manager_that_is_busy(manager: Manager) -> None:
    """A manager that does not read its messages does not block the service."""
    began = time.monotonic()
    for _ in range(5000):
        notify.tell("STATUS=" + "x" * 1000)
    assert time.monotonic() - began < 20
    assert manager.hear() == ["STATUS=" + "x" * 1000]


def test_without_a_free_descriptor(manager: Manager) -> None:
    """A service without free descriptors can still send messages."""
    notify.tell("READY=1")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.open(os.devnull, os.O_RDONLY)
        notify.tell("WATCHDOG=1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [manager.hear(), manager.hear()] == [["READY=1"], ["WATCHDOG=1"]]


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        (None, None, None),
        ("30000000", None, 30.0),
        pytest.param("30000000", str(os.getpid()), 30.0, id="30000000-own-30.0"),
        ("30000000", "1", None),
        ("0", None, None),
        ("-5", None, None),
        ("soon", None, None),
        ("30000000", "me", None),
    ],
)
def test_watchdog_seconds(
    usec: str | None, pid: str | None, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog's time is used only if it is valid and meant for this process."""
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert notify.watchdog_seconds() == seconds


async def test_status_when_it_changes(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a watchdog, the status is sent only when it changes."""
    monkeypatch.setattr(notify, "_STATUS_SECONDS", 0.01)
    statuses = iter(["a", "a", "a", "b", "b", "c"])
    telling = asyncio.create_task(notify.keep_telling(lambda: next(statuses, "c")))
    heard = [await asyncio.to_thread(manager.hear) for _ in range(3)]
    assert heard == [["STATUS=a"], ["STATUS=b"], ["STATUS=c"]]
    telling.cancel()


@pytest.mark.usefixtures("manager")
@pytest.mark.parametrize(("usec", "pause"), [("3000000", 1.0), ("60000000", 5.0), (None, 5.0)])
async def test_thrice_in_the_time(
    usec: str | None, pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog gets a message three times in its time, and at least every 5 s."""
    if usec is not None:
        monkeypatch.setenv("WATCHDOG_USEC", usec)
    slept = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        raise asyncio.CancelledError

    monkeypatch.setattr(notify, "asyncio", SimpleNamespace(sleep=sleep))
    with pytest.raises(asyncio.CancelledError):
        await notify.keep_telling(lambda: "well")
    assert slept == [pause]


async def test_no_sign_of_life_from_a_loop_that_does_not_turn(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog gets messages only while the event loop runs."""
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    telling = asyncio.create_task(notify.keep_telling(lambda: "well"))
    for _ in range(3):
        assert await asyncio.to_thread(manager.hear) == ["WATCHDOG=1", "STATUS=well"]
    manager._socket.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            manager.hear()
    time.sleep(0.5)  # noqa: ASYNC251
    with pytest.raises(BlockingIOError):
        manager.hear()
    telling.cancel()


def test_a_service_tells(
    manager: Manager, tmp_path: Path, fake_dtrace: FakeDTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service reports its start, its status, its reloads and its end."""
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    with serving("--config.file", write(tmp_path / "c.yml", fake_dtrace())) as exporter:
        manager.hear_until("READY=1")
        heard = manager.hear_until("STATUS=2 of 2 sessions up, source dtrace")
        assert "WATCHDOG=1" in heard
        exporter.process.send_signal(signal.SIGHUP)
        heard = manager.hear_until("RELOADING=1")
        assert "READY=1" not in heard
        manager.hear_until("READY=1")
        (tmp_path / "c.yml").write_text("nonsense: 1\n", encoding="utf-8")
        exporter.process.send_signal(signal.SIGHUP)
        manager.hear_until("RELOADING=1")
        # The end of a failed reload is reported, too.
        manager.hear_until("READY=1")
        exporter.process.terminate()
        manager.hear_until("STOPPING=1")
        exporter.process.communicate(timeout=20)
        assert exporter.process.returncode == 0


def test_not_ready_before_it_has_started(manager: Manager, tmp_path: Path) -> None:
    """While it still tries the source, the service is not ready."""
    trying = tmp_path / "trying"
    command = ["sh", "-c", f"touch {trying}; sleep 60; true"]
    with serving("--config.file", write(tmp_path / "c.yml", command)) as exporter:
        until(trying.exists)
        exporter.process.terminate()
        assert "READY=1" not in manager.hear_until("STOPPING=1")
        exporter.process.communicate(timeout=20)
        assert exporter.process.returncode == 0
