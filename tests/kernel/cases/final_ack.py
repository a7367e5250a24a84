"""Drops at the final ACK, when Q has become full during the handshake."""

from __future__ import annotations

import pytest
from lab.exporter import Exporter
from lab.traffic import Clients, HoldBack, Listen
from lab.waiting import until
from lab.witness import CountSyns, Netstat, half_open, listen_queues


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_q_full_ack(
    address: str,
    everything: Exporter,
    port: int,
    listen: Listen,
    clients: Clients,
    held_back: HoldBack,
    count_syns: CountSyns,
) -> None:
    """Every final ACK that the kernel drops because Q is full is one drop q_full_ack."""
    if not everything.value("dtrace_session_feature_enabled", session="all", feature="ack_drops"):
        pytest.skip("this kernel does not allow the probe on tcp_v4_syn_recv_sock")
    netstat, syns = Netstat(), count_syns(port)
    listen(port, 1, address)
    held = held_back(port, address)
    assert half_open(port) == 1
    clients.connect(2, port, address)
    assert netstat["ListenDrops"] == 0
    held.release()
    # The client retransmits what is not acknowledged.
    until(lambda: netstat["ListenOverflows"] >= 2, "the final ACK is dropped more than once")
    held.close()
    metrics = everything.settle()
    (queue,) = listen_queues(port)
    assert metrics.drops(port=port) == {"q_full_ack": netstat["ListenDrops"]}
    # Not sk_drops, because Linux adds the packets of the ACK and of the reset to it.
    assert netstat["ListenDrops"] == netstat["ListenOverflows"]
    assert metrics.value("dtrace_tcp_listen_syns_total", port=port) == syns[port] == 3
    assert metrics.value("dtrace_tcp_listen_established_total", port=port) == 2
    assert metrics.value("dtrace_tcp_listen_q_length", port=port) == queue.q == 2


def test_late_completion(
    everything: Exporter,
    port: int,
    listen: Listen,
    clients: Clients,
    held_back: HoldBack,
) -> None:
    """A connection whose final ACK was dropped completes once Q has room, and counts once."""
    listener = listen(port, 1)
    held = held_back(port)
    clients.connect(2, port)
    held.release()
    listener.accept(2)
    until(lambda: listen_queues(port)[0].q == 1, "the repeated ACK completes the connection")
    metrics = everything.settle()
    assert metrics.value("dtrace_tcp_listen_established_total", port=port) == 3
    assert metrics.value("dtrace_tcp_listen_q0_length", port=port) == 0
    assert metrics.value("dtrace_tcp_listen_q_length", port=port) == 1
