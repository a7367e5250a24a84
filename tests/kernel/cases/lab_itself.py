"""The lab itself: its witnesses and its traffic are exact."""

from __future__ import annotations

import pytest
from lab.traffic import HERE4, HERE6, Clients, HoldBack, Listen, Ports, send_syns
from lab.waiting import until
from lab.witness import CountSyns, Netstat, half_open, listen_queues


def test_full_queue(
    port: int,
    listen: Listen,
    clients: Clients,
    count_syns: CountSyns,
) -> None:
    """A full queue holds the backlog plus one, and every later SYN is dropped."""
    netstat, syns = Netstat(), count_syns(port)
    listen(port, backlog=3)
    clients.connect(4, port)
    clients.knock(4, port)
    until(lambda: syns[port] > 8, "a SYN is sent again")
    clients.give_up()
    (queue,) = listen_queues(port)
    assert (queue.q, queue.qmax, queue.drops) == (4, 3, syns[port] - 4)
    assert netstat["ListenDrops"] == netstat["ListenOverflows"] == queue.drops


def test_held_back(
    port: int,
    listen: Listen,
    clients: Clients,
    held_back: HoldBack,
) -> None:
    """A client that is held back is half open until release(); its final ACK is then dropped."""
    netstat = Netstat()
    listen(port, backlog=0)
    held = held_back(port)
    assert half_open(port) == 1
    clients.connect(1, port)
    held.release()
    until(lambda: netstat["ListenOverflows"], "the final ACK is dropped")


@pytest.mark.usefixtures("foreign")
def test_syns(
    ports: Ports,
    listen: Listen,
    count_syns: CountSyns,
) -> None:
    """Every SYN that is sent arrives, and as many connections are half open as fit into Q0."""
    for port, address in zip(ports(2), (HERE4, HERE6), strict=True):
        listen(port, backlog=64, address=address)
        syns = count_syns(port)
        assert send_syns(port, 20, address) == 20
        syns.wait(port, 20)
        assert half_open(port) == 20
        assert send_syns(port, 50_000, address) == 50_000
        syns.wait(port, 50_020)
        # After some seconds the kernel gives up the oldest if Q0 has more than half of the backlog.
        assert 32 <= half_open(port) <= 65
