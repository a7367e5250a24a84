"""Retransmitted SYN-ACKs, compared with the kernel's count for the whole namespace."""

from __future__ import annotations

import pytest
from lab.exporter import Exporter
from lab.traffic import HERE4, HERE6, Clients, Listen, Ports, send_syns, sysctl
from lab.waiting import until
from lab.witness import Netstat, half_open

pytestmark = pytest.mark.usefixtures("foreign")
RETRANSMITS = "dtrace_tcp_listen_synack_retransmits_total"


def test_synack_retransmits(
    everything: Exporter, ports: Ports, listen: Listen, clients: Clients
) -> None:
    """All listeners' retransmits add up to TCPSynRetrans; one with prompt clients has none."""
    everything.wait(
        "dtrace_session_feature_enabled", 1, session="all", feature="synack_retransmits"
    )
    few, many, none = ports(3)
    kernel = Netstat()
    with sysctl("net.ipv4.tcp_synack_retries", 2):
        for port, address in ((few, HERE4), (many, HERE6), (none, HERE4)):
            listen(port, 16, address)
        clients.connect(3, none, HERE4)
        assert send_syns(few, 2, HERE4) == 2
        assert send_syns(many, 5, HERE6) == 5
        # Each is retransmitted after one second and after two more, and is then given up.
        until(lambda: half_open(few) == half_open(many) == 0, "the kernel gives them up")
    metrics = everything.settle()
    assert [metrics.value(RETRANSMITS, port=port) for port in (few, many, none)] == [4, 10, 0]
    assert kernel["TCPSynRetrans"] == 14
