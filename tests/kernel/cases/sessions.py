"""Many sessions at the same time."""

from __future__ import annotations

import pytest
from lab.exporter import StartExporter
from lab.traffic import HERE4, Listen, Ports, start_syns
from lab.witness import CountSyns

SYNS = 5_000


@pytest.mark.usefixtures("foreign")
def test_fifteen_sessions(
    exporter: StartExporter,
    ports: Ports,
    listen: Listen,
    count_syns: CountSyns,
) -> None:
    """Fifteen sessions count fifteen floods, each exactly the SYNs of its own port."""
    watched = ports(15)
    running = exporter({"source": "dtrace", "listeners": [{"port": port} for port in watched]})
    assert len(running.pids()) == 16
    syns = count_syns(*watched)
    for port in watched:
        listen(port, 128, HERE4)
    generators = [start_syns(port, SYNS) for port in watched]
    for port, generator in zip(watched, generators, strict=True):
        sent, _ = generator.communicate(timeout=200)
        assert int(sent) == SYNS
        syns.wait(port, SYNS)
    metrics = running.settle()
    # A session that is ended for a missing heartbeat would lose its last counts.
    assert not any(restarts for _, restarts in metrics.select("dtrace_session_restarts_total"))
    counted = {port: metrics.value("dtrace_tcp_listen_syns_total", port=port) for port in watched}
    assert counted == dict.fromkeys(watched, SYNS)
    for name in ("lost", "probe_errors"):
        assert {count for _, count in metrics.select(f"dtrace_session_{name}_total")} == {0}
    assert len(metrics.select("dtrace_session_up")) == 16
