"""The sockets that share a series, and those that do not."""

from __future__ import annotations

from lab.exporter import Exporter
from lab.traffic import Clients, Listen
from lab.waiting import until
from lab.witness import CountSyns, Netstat, listen_queues, netns_inode

SYNS = "dtrace_tcp_listen_syns_total"
Q = "dtrace_tcp_listen_q_length"
LIMIT = "dtrace_tcp_listen_q_limit"


def test_dual_stack(everything: Exporter, port: int, listen: Listen, clients: Clients) -> None:
    """A wildcard socket for both IP versions is one series with the address *."""
    listen(port, 10, "::")
    clients.connect(2, port, "127.0.0.1")
    clients.connect(3, port, "::1")
    metrics = everything.settle()
    ((labels, syns),) = metrics.select(SYNS, port=port)
    assert (labels["address"], syns) == ("*", 5)
    assert metrics.value("dtrace_tcp_listen_established_total", port=port) == 5
    assert metrics.value(Q, port=port) == 5 == listen_queues(port)[0].q


def test_wildcard(everything: Exporter, port: int, listen: Listen, clients: Clients) -> None:
    """An IPv4 wildcard socket has the address * too."""
    listen(port, 10, "0.0.0.0")
    clients.connect(2, port, "127.0.0.5")
    assert everything.settle().value(SYNS, port=port, address="*") == 2


def test_two_addresses(
    everything: Exporter,
    port: int,
    listen: Listen,
    clients: Clients,
    count_syns: CountSyns,
) -> None:
    """Listeners on one port with different addresses are counted separately."""
    netstat, syns = Netstat(), count_syns(port)
    listen(port, 1, "127.0.0.1")
    listen(port, 7, "127.0.0.2")
    listen(port, 9, "::1", v6only=True)
    clients.connect(2, port, "127.0.0.1")
    clients.connect(5, port, "127.0.0.2")
    clients.connect(6, port, "::1")
    clients.insist(3, port, syns)
    metrics = everything.settle()
    values = {
        labels["address"]: [count, *(metrics.value(name, **labels) for name in (Q, LIMIT))]
        for labels, count in metrics.select(SYNS, port=port)
    }
    assert values == {
        "127.0.0.1": [syns[port] - 11, 2, 1],
        "127.0.0.2": [5, 5, 7],
        "::1": [6, 6, 9],
    }
    assert metrics.drops(port=port, address="127.0.0.1") == {"q_full": netstat["ListenDrops"]}
    assert metrics.drops(port=port, address="127.0.0.2") == {}
    assert metrics.drops(port=port, address="::1") == {}


def test_reuseport(
    everything: Exporter,
    port: int,
    listen: Listen,
    clients: Clients,
    count_syns: CountSyns,
) -> None:
    """Sockets with one address and port are one series: summed counters, the fullest's gauges."""
    netstat, syns = Netstat(), count_syns(port)
    for _ in range(4):
        listen(port, 5, reuseport=True)
    clients.knock(40, port)
    until(lambda: syns[port] > 60, "SYNs are sent again")
    clients.give_up()
    queues = listen_queues(port)
    assert len(queues) == 4
    metrics = everything.settle()
    assert metrics.value(SYNS, port=port) == syns[port]
    assert metrics.value("dtrace_tcp_listen_established_total", port=port) == sum(
        queue.q for queue in queues
    )
    assert metrics.value(Q, port=port) == max(queue.q for queue in queues)
    assert metrics.value(LIMIT, port=port) == 5
    drops = sum(queue.drops for queue in queues)
    assert metrics.drops(port=port) == {"q_full": drops}
    assert netstat["ListenDrops"] == drops


def test_network_namespaces(
    everything: Exporter,
    port: int,
    away: str,
    listen: Listen,
    clients: Clients,
    count_syns: CountSyns,
) -> None:
    """One port and address in two network namespaces are two listeners with different netns."""
    netstat, syns = Netstat(away), count_syns(port, netns=away)
    listen(port, 4)
    listen(port, 1, netns=away)
    clients.connect(3, port)
    clients.connect(2, port, netns=away)
    clients.insist(3, port, syns, netns=away)
    metrics = everything.settle()
    values = {
        labels["netns"]: [count, *(metrics.value(name, **labels) for name in (Q, LIMIT))]
        for labels, count in metrics.select(SYNS, port=port)
    }
    assert values == {"": [3, 3, 4], netns_inode(away): [syns[port], 2, 1]}
    assert metrics.drops(port=port, netns="") == {}
    there = {"q_full": netstat["ListenDrops"]}
    assert metrics.drops(port=port, netns=netns_inode(away)) == there
