"""A consumer that cannot run for a while, and one that is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab.exporter import UP, StartExporter
from lab.traffic import HERE4, Listen, send_syns
from lab.waiting import until
from lab.witness import CountSyns, Netstat

SYNS = "dtrace_tcp_listen_syns_total"
RESTARTS = "dtrace_session_restarts_total"
UNCOUNTED = "dtrace_session_uncounted_seconds_total"
STOPPED_SECONDS = 20


@pytest.mark.usefixtures("foreign")
def test_stopped(exporter: StartExporter, port: int, listen: Listen, count_syns: CountSyns) -> None:
    """A dtrace(1) that is stopped for 20 s during a flood loses nothing and is not restarted."""
    running = exporter({"source": "dtrace", "listeners": [{"port": port}]})
    netstat, syns = Netstat(), count_syns(port)
    listen(port, 64, HERE4)
    running.settle()
    pids = running.pids()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + STOPPED_SECONDS
    sent = 0
    while time.monotonic() < end:
        sent += send_syns(port, 500)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    until(lambda: (running.value(SYNS, port=port, address=HERE4) or 0) >= sent, "all are told")
    metrics = running.settle()
    assert metrics.value(SYNS, port=port) == syns[port] == sent
    assert sum(metrics.drops(port=port).values()) == netstat["ListenDrops"]
    assert [count for _, count in metrics.select(RESTARTS)] == [0, 0]
    assert [seconds for _, seconds in metrics.select(UNCOUNTED)] == [0, 0]


@pytest.mark.usefixtures("foreign")
def test_frozen(exporter: StartExporter, port: int, listen: Listen, count_syns: CountSyns) -> None:
    """An exporter frozen with its sessions for 20 s loses nothing and restarts none."""
    running = exporter({"source": "dtrace", "listeners": [{"port": port}]})
    netstat, syns = Netstat(), count_syns(port)
    listen(port, 64, HERE4)
    running.settle()
    sent = 0
    with frozen([running.process.pid, *running.pids()]):
        end = time.monotonic() + STOPPED_SECONDS
        while time.monotonic() < end:
            sent += send_syns(port, 500)
    until(lambda: (running.value(SYNS, port=port, address=HERE4) or 0) >= sent, "all are told")
    metrics = running.settle()
    assert metrics.value(SYNS, port=port) == syns[port] == sent
    assert sum(metrics.drops(port=port).values()) == netstat["ListenDrops"]
    assert [count for _, count in metrics.select(RESTARTS)] == [0, 0]
    assert [seconds for _, seconds in metrics.select(UNCOUNTED)] == [0, 0]


@contextmanager
def frozen(pids: list[int]) -> Iterator[None]:
    """Freeze processes, as a paused container; see Documentation/admin-guide/cgroup-v2."""
    root = Path("/sys/fs/cgroup")
    group = root / "paused"
    group.mkdir()
    try:
        for pid in pids:
            (group / "cgroup.procs").write_text(str(pid))
        (group / "cgroup.freeze").write_text("1")
        events = group / "cgroup.events"
        until(lambda: "frozen 1" in events.read_text(), "they are frozen")
        try:
            yield
        finally:
            (group / "cgroup.freeze").write_text("0")
    finally:
        for pid in pids:
            (root / "cgroup.procs").write_text(str(pid))
        until(lambda: "populated 0" in events.read_text(), "it is empty")
        group.rmdir()


def test_killed(exporter: StartExporter, port: int) -> None:
    """A killed dtrace(1) leaves no uprobe, and the time without a session is exported."""
    running = exporter({"source": "dtrace", "listeners": [{"port": port}]})
    session = f"port-{port}"
    before = time.monotonic()
    victim = running.pids()[0]
    os.kill(victim, signal.SIGKILL)
    running.wait(UP, 0, session=session)
    running.wait(UP, 1, session=session, seconds=120)
    told = running.value(UNCOUNTED, session=session)
    assert told is not None
    assert 0 < told < time.monotonic() - before + 2
    events = Path("/sys/kernel/tracing/uprobe_events")
    until(lambda: f"dt_{victim}_dtrace" not in events.read_text(), "its uprobes are removed")
