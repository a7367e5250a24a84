"""SYNs as fast as the machine can make them: every one is counted."""

from __future__ import annotations

import pytest
from lab.exporter import Exporter, Metrics, StartExporter
from lab.traffic import HERE4, HERE6, Listen, Ports, send_syns, start_syns
from lab.witness import CountSyns, Netstat

pytestmark = pytest.mark.usefixtures("foreign")
SYNS = 50_000


def losses(metrics: Metrics) -> list[tuple[dict[str, str], float]]:
    """Return what DTrace says that it lost, and the errors that it met."""
    lost = metrics.select("dtrace_session_lost_total")
    faults = metrics.select("dtrace_session_probe_errors_total")
    assert lost
    assert faults
    return [sample for sample in (*lost, *faults) if sample[1]]


@pytest.mark.parametrize("address", [HERE4, HERE6])
def test_one_session(
    address: str,
    everything: Exporter,
    port: int,
    listen: Listen,
    count_syns: CountSyns,
) -> None:
    """50,000 SYNs at one listener are 50,000 in the counter, and DTrace lost none."""
    netstat, syns = Netstat(), count_syns(port)
    listen(port, 128, address)
    assert send_syns(port, SYNS, address) == SYNS
    syns.wait(port, SYNS)
    metrics = everything.settle()
    assert metrics.value("dtrace_tcp_listen_syns_total", port=port) == SYNS
    assert sum(metrics.drops(port=port).values()) == netstat["ListenDrops"]
    assert losses(metrics) == []


def test_ten_sessions(
    exporter: StartExporter,
    ports: Ports,
    listen: Listen,
    count_syns: CountSyns,
) -> None:
    """Ten sessions, each on its port, and ten generators at once: each counts its own exactly."""
    watched = ports(10)
    running = exporter({"source": "dtrace", "listeners": [{"port": port} for port in watched]})
    assert len(running.pids()) == 10
    syns = count_syns(*watched)
    for port in watched:
        listen(port, 128, HERE4)
    generators = [start_syns(port, SYNS // 10) for port in watched]
    for port, generator in zip(watched, generators, strict=True):
        sent, _ = generator.communicate(timeout=200)
        assert int(sent) == SYNS // 10
        syns.wait(port, SYNS // 10)
    metrics = running.settle()
    # One that was ended, for it had no heartbeat, takes with it what it had not told.
    assert not any(restarts for _, restarts in metrics.select("dtrace_session_restarts_total"))
    counted = {port: metrics.value("dtrace_tcp_listen_syns_total", port=port) for port in watched}
    assert counted == dict.fromkeys(watched, SYNS // 10)
    assert losses(metrics) == []
    assert len(metrics.select("dtrace_session_up")) == 10


def test_port_scan(everything: Exporter, ports: Ports, listen: Listen) -> None:
    """SYNs to ports nobody listens on leave no series."""
    opened, *closed = ports(20)
    listen(opened, 8, HERE4)
    for port in (*closed, opened):
        send_syns(port, 1)
    metrics = everything.settle()
    seen = {int(labels["port"]) for labels, _ in metrics.select("dtrace_tcp_listen_syns_total")}
    assert opened in seen
    assert not seen & set(closed)
