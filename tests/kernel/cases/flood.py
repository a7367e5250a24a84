"""SYNs as fast as the machine can make them: every one is counted."""

from __future__ import annotations

import pytest
from lab.exporter import Exporter, Metrics
from lab.traffic import HERE4, HERE6, Listen, Ports, send_syns
from lab.witness import CountSyns, Netstat

pytestmark = pytest.mark.usefixtures("foreign")
SYNS = 50_000


def losses(metrics: Metrics) -> list[tuple[dict[str, str], float]]:
    """Return the losses that DTrace reports, and its probe errors."""
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
    """A listener that gets 50,000 SYNs counts 50,000, and DTrace loses none."""
    netstat, syns = Netstat(), count_syns(port)
    listen(port, 128, address)
    assert send_syns(port, SYNS, address) == SYNS
    syns.wait(port, SYNS)
    metrics = everything.settle()
    assert metrics.value("dtrace_tcp_listen_syns_total", port=port) == SYNS
    assert sum(metrics.drops(port=port).values()) == netstat["ListenDrops"]
    assert losses(metrics) == []


def test_port_scan(everything: Exporter, ports: Ports, listen: Listen) -> None:
    """SYNs to ports without a listener create no series."""
    opened, *closed = ports(20)
    listen(opened, 8, HERE4)
    for port in (*closed, opened):
        send_syns(port, 1)
    metrics = everything.settle()
    seen = {int(labels["port"]) for labels, _ in metrics.select("dtrace_tcp_listen_syns_total")}
    assert opened in seen
    assert not seen & set(closed)
