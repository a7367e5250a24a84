"""Listeners come and go."""

from __future__ import annotations

from lab.exporter import Exporter, Metrics
from lab.traffic import Clients, Listen

GAUGES = ("q_length", "q_limit", "q0_length")


def gauges(metrics: Metrics, port: int) -> dict[str, float | None]:
    """Return the gauges of a port."""
    return {name: metrics.value(f"dtrace_tcp_listen_{name}", port=port) for name in GAUGES}


def test_listen(everything: Exporter, port: int, listen: Listen) -> None:
    """A listener is there as soon as it is opened, before its first SYN."""
    listen(port, 17)
    metrics = everything.settle()
    assert gauges(metrics, port) == {"q_length": 0, "q_limit": 17, "q0_length": 0}
    assert metrics.value("dtrace_tcp_listen_syns_total", port=port) == 0


def test_listen_again(everything: Exporter, port: int, listen: Listen, clients: Clients) -> None:
    """Another listen(2) on an open listener changes the limit, seen at the next event."""
    listener = listen(port, 3)
    clients.connect(1, port)
    everything.wait("dtrace_tcp_listen_q_limit", 3, port=port)
    listener.socket.listen(11)
    clients.connect(1, port)
    everything.wait("dtrace_tcp_listen_q_limit", 11, port=port)


def test_close_and_reopen(
    everything: Exporter, port: int, listen: Listen, clients: Clients
) -> None:
    """A closed listener has no gauges; reopened it has the new limit, and its counters go on."""
    first = listen(port, 3)
    clients.connect(2, port)
    opened = everything.settle()
    assert gauges(opened, port) == {"q_length": 2, "q_limit": 3, "q0_length": 0}

    first.close()
    closed = everything.settle()
    assert gauges(closed, port) == dict.fromkeys(GAUGES)
    assert not closed.fell_since(opened)

    listen(port, 9)
    clients.connect(4, port)
    again = everything.settle()
    assert gauges(again, port) == {"q_length": 4, "q_limit": 9, "q0_length": 0}
    assert again.value("dtrace_tcp_listen_syns_total", port=port) == 6
    assert not again.fell_since(closed)


def test_close_one_of_two(
    everything: Exporter, port: int, listen: Listen, clients: Clients
) -> None:
    """Of two sockets that share a port, the one that closes takes only its own queue with it."""
    sockets = [listen(port, backlog, reuseport=True) for backlog in (5, 6)]
    clients.connect(6, port)
    everything.settle()
    sockets[0].close()
    metrics = everything.settle()
    assert metrics.value("dtrace_tcp_listen_q_limit", port=port) == 6
    assert metrics.value("dtrace_tcp_listen_syns_total", port=port) == 6
