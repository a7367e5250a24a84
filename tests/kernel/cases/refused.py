"""SYNs to ports without a listener, compared with the packet filter and /proc/net/snmp."""

from __future__ import annotations

import pytest
from lab.exporter import Exporter, Metrics
from lab.traffic import HERE4, HERE6, Clients, HoldBack, Listen, Ports, send_syns
from lab.waiting import until
from lab.witness import CountSyns, tcp_counter

pytestmark = pytest.mark.usefixtures("foreign")
REFUSED = "dtrace_tcp_refused_total"
SCANNED = range(20_000, 20_300)


def by_port(metrics: Metrics) -> dict[str, float]:
    """Return the numbers of refused SYNs by port."""
    return {labels["port"]: value for labels, value in metrics.select(REFUSED)}


@pytest.fixture(autouse=True)
def counted(everything: Exporter) -> None:
    """Wait until the part refused is enabled."""
    everything.wait("dtrace_session_feature_enabled", 1, session="calls", feature="refused")


@pytest.mark.parametrize(("address", "here"), [("127.0.0.1", HERE4), ("::1", HERE6)])
def test_refused(
    address: str,
    here: str,
    everything: Exporter,
    ports: Ports,
    listen: Listen,
    clients: Clients,
    count_syns: CountSyns,
) -> None:
    """Each SYN to a port without a listener counts by its port, and accepted ones do not."""
    few, many, taken = ports(3)
    syns = count_syns(few, many, taken)
    resets = tcp_counter("OutRsts")
    listen(taken, 8, address)
    clients.connect(3, taken, address)
    for _ in range(4):
        with pytest.raises(ConnectionRefusedError):
            clients.connect(1, few, address)
    assert send_syns(many, 500, here) == 500
    syns.wait(many, 500)
    found = by_port(everything.settle())
    assert [found.get(str(port)) for port in (few, many, taken)] == [4, 500, None]
    assert [syns[port] for port in (few, many, taken)] == [4, 500, 3]
    assert tcp_counter("OutRsts") - resets == 504


def test_no_syn(everything: Exporter, port: int, listen: Listen, held_back: HoldBack) -> None:
    """An ACK to a closed listener gets an RST, but does not count as a SYN."""
    listener = listen(port, 8)
    held = held_back(port)
    listener.close()
    before, resets = by_port(everything.settle()), tcp_counter("OutRsts")
    held.release()
    until(lambda: tcp_counter("OutRsts") > resets, "an RST is sent")
    assert by_port(everything.settle()) == before


def test_elsewhere(everything: Exporter, port: int, clients: Clients, away: str) -> None:
    """SYNs that another network namespace refuses are not counted."""
    before = by_port(everything.settle())
    resets = tcp_counter("OutRsts", away)
    for address in ("127.0.0.1", "::1"):
        with pytest.raises(ConnectionRefusedError):
            clients.connect(1, port, address, away)
    assert tcp_counter("OutRsts", away) - resets == 2
    assert by_port(everything.settle()) == before


def test_scan(everything: Exporter, clients: Clients) -> None:
    """A scan creates at most a hundred series and ``other``; each of its SYNs is in one."""
    before, resets = by_port(everything.settle()), tcp_counter("OutRsts")
    for port in SCANNED:
        with pytest.raises(ConnectionRefusedError):
            clients.connect(1, port)
    found = by_port(everything.settle())
    assert len(found) <= 101
    assert found["other"] >= len(SCANNED) - 100
    assert sum(found.values()) - sum(before.values()) == len(SCANNED)
    assert tcp_counter("OutRsts") - resets == len(SCANNED)
