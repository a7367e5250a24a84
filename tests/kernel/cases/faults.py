"""Processes that die, and processes that are asked to."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from lab.exporter import UP, Exporter, StartExporter, runs
from lab.traffic import Clients, Listen, Ports
from lab.waiting import until

SYNS = "dtrace_tcp_listen_syns_total"


@pytest.fixture(scope="module")
def watched(ports: Ports) -> list[int]:
    """Return two ports."""
    return ports(2)


@pytest.fixture(scope="module")
def running(watched: list[int]) -> Iterator[Exporter]:
    """Return an exporter with a session for each of them."""
    made = Exporter({"source": "dtrace", "listeners": [{"port": port} for port in watched]})
    try:
        made.wait_ready()
        yield made
    finally:
        made.stop()


def test_dtrace_killed(
    running: Exporter, watched: list[int], listen: Listen, clients: Clients
) -> None:
    """A killed dtrace(1) is down, then back, and nothing that was counted is lost for it."""
    for port in watched:
        listen(port, 20)
        clients.connect(3, port)
    before = running.settle()
    assert [before.value(SYNS, port=port) for port in watched] == [3, 3]
    victim, other = running.pids()

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


def test_exporter_killed(running: Exporter) -> None:
    """An exporter killed at once leaves no dtrace(1) behind: each ends at its next tick."""
    sessions = running.pids()
    assert len(sessions) == 2
    assert running.stop(signal.SIGKILL) == -signal.SIGKILL
    assert not any(runs(pid) for pid in sessions)


def test_stop(exporter: StartExporter) -> None:
    """SIGTERM ends the exporter with status 0, and its sessions with it."""
    running = exporter({"source": "dtrace"})
    (session,) = running.pids()
    assert running.stop() == 0
    assert not runs(session)


def test_stop_while_starting(exporter: StartExporter) -> None:
    """SIGINT does the same, and while dtrace(1) still compiles too."""
    running = exporter({"source": "dtrace"}, ready=False)
    (session,) = until(running.pids, "dtrace(1) is started")
    assert running.stop(signal.SIGINT) == 0
    assert not runs(session)
