"""Processes that are killed, and processes that are told to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.exporter import LAST_RECORD, UP, Exporter, StartExporter, runs
from lab.traffic import HERE4, Clients, Listen, Ports, start_syns
from lab.waiting import until
from lab.witness import CountSyns

SYNS = "dtrace_tcp_listen_syns_total"
WAITED = "dtrace_tcp_listen_accept_wait_seconds_sum"


@pytest.fixture(scope="module")
def watched(ports: Ports) -> list[int]:
    """Return two ports."""
    return ports(2)


@pytest.fixture(scope="module")
def running(watched: list[int]) -> Iterator[Exporter]:
    """Return an exporter with a session for each of the two ports."""
    made = Exporter({"source": "dtrace", "listeners": [{"port": port} for port in watched]})
    try:
        made.wait_ready()
        yield made
    finally:
        made.stop()


def test_dtrace_killed(
    running: Exporter, watched: list[int], listen: Listen, clients: Clients
) -> None:
    """If dtrace(1) is killed, its session goes down and comes back, and no count is lost."""
    for port in watched:
        listen(port, 20)
        clients.connect(3, port)
    before = running.settle()
    assert [before.value(SYNS, port=port) for port in watched] == [3, 3]
    victim, other, _ = running.pids()

    os.kill(victim, signal.SIGKILL)
    down = until(
        lambda: [have["session"] for have, up in running.metrics().select(UP) if not up],
        "a session is down",
    )
    assert len(down) == 1
    port = int(down[0].removeprefix("port-"))
    (kept,) = set(watched) - {port}
    metrics = running.metrics()
    assert not metrics.fell_since(before)
    assert metrics.value("dtrace_tcp_listen_q_length", port=port) is None
    assert metrics.value("dtrace_tcp_listen_q_length", port=kept) == 3

    running.wait(UP, 1, session=down[0])
    clients.connect(2, port)
    clients.connect(2, kept)
    after = running.settle()
    assert after.value("dtrace_session_restarts_total", session=down[0]) == 1
    assert after.value("dtrace_session_restarts_total", session=f"port-{kept}") == 0
    assert [after.value(SYNS, port=port) for port in watched] == [5, 5]
    assert after.value("dtrace_tcp_listen_q_length", port=port) == 5
    assert not after.fell_since(before)
    assert other in running.pids()
    assert victim not in running.pids()


def test_privileges(running: Exporter) -> None:
    """Started by hand as root, the service and each dtrace(1) have just two capabilities."""
    for pid in (running.process.pid, *running.pids()):
        status = Path(f"/proc/{pid}/status").read_text()
        # CAP_SYS_ADMIN is 21, CAP_SYSLOG 34.
        for kind in ("Prm", "Eff", "Bnd"):
            assert f"Cap{kind}:\t{1 << 21 | 1 << 34:016x}\n" in status
        assert "NoNewPrivs:\t1\n" in status


def last_record(running: Exporter, port: int) -> float:
    """Return the time of the last row of a port's session."""
    return running.value(LAST_RECORD, session=f"port-{port}") or 0.0


def test_clock_steps(
    running: Exporter, watched: list[int], listen: Listen, clients: Clients
) -> None:
    """If the clock jumps an hour, no session restarts, and counts and waits stay exact."""
    port, _ = watched
    listener = listen(port, 20)
    began = time.monotonic()
    before = running.settle()
    counted = before.value(SYNS, port=port)
    waited = before.value(WAITED, port=port)
    assert counted is not None
    assert waited is not None
    for step in (3600, -3600):
        clients.connect(1, port)
        time.clock_settime(time.CLOCK_REALTIME, time.time() + step)
        listener.accept(1)
        until(lambda: abs(last_record(running, port) - time.time()) < 60, "rows have the new time")
        after = running.settle()
        assert not after.fell_since(before)
        assert {up for _, up in after.select(UP)} == {1}
    assert after.value(SYNS, port=port) == counted + 2
    now = after.value(WAITED, port=port)
    assert now is not None
    assert 0 < now - waited < time.monotonic() - began
    restarts = "dtrace_session_restarts_total"
    assert after.select(restarts) == before.select(restarts)


@pytest.mark.usefixtures("foreign")
def test_fifty_reloads_under_load(
    running: Exporter, watched: list[int], listen: Listen, count_syns: CountSyns
) -> None:
    """With fifty reloads during a flood of SYNs, all SYNs are counted and no session restarts."""
    port, _ = watched
    listen(port, 20, HERE4)
    before = running.settle()
    counted = before.value(SYNS, port=port, address=HERE4) or 0.0
    sessions = running.pids()
    syns = count_syns(port)
    generator = start_syns(port, 20_000)
    assert [running.reload() for _ in range(50)] == [200] * 50
    sent, _ = generator.communicate(timeout=200)
    assert int(sent) == 20_000
    syns.wait(port, 20_000)
    after = running.settle()
    assert after.value(SYNS, port=port, address=HERE4) == counted + 20_000
    assert not after.fell_since(before)
    assert running.pids() == sessions


def test_exporter_killed(running: Exporter) -> None:
    """If the exporter is killed, each dtrace(1) ends at its next tick."""
    sessions = running.pids()
    assert len(sessions) == 3
    assert running.stop(signal.SIGKILL) == -signal.SIGKILL
    assert not any(runs(pid) for pid in sessions)


def test_stop(exporter: StartExporter) -> None:
    """SIGTERM ends the exporter with status 0, and all its sessions."""
    running = exporter({"source": "dtrace"})
    sessions = running.pids()
    assert len(sessions) == 2
    assert running.stop() == 0
    assert not any(runs(pid) for pid in sessions)


def test_stop_while_starting(exporter: StartExporter) -> None:
    """SIGINT ends the exporter and its sessions, even while dtrace(1) compiles."""
    running = exporter({"source": "dtrace"}, ready=False)
    sessions = until(running.pids, "dtrace(1) is started")
    assert running.stop(signal.SIGINT) == 0
    assert not any(runs(pid) for pid in sessions)
