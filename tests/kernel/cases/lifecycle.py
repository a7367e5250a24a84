"""Listeners that open and close."""

from __future__ import annotations

import socket
import subprocess

import pytest
from lab.exporter import Exporter, Metrics
from lab.traffic import HERE4, Clients, Listen, Ports, start_syns

GAUGES = ("q_length", "q_limit", "q0_length")


def gauges(metrics: Metrics, port: int) -> dict[str, float | None]:
    """Return the gauges of a port."""
    return {name: metrics.value(f"dtrace_tcp_listen_{name}", port=port) for name in GAUGES}


def test_listen(everything: Exporter, port: int, listen: Listen) -> None:
    """A listener is exported as soon as it is opened, before its first SYN."""
    listen(port, 17)
    metrics = everything.settle()
    assert gauges(metrics, port) == {"q_length": 0, "q_limit": 17, "q0_length": 0}
    assert metrics.value("dtrace_tcp_listen_syns_total", port=port) == 0


def test_listen_again(everything: Exporter, port: int, listen: Listen, clients: Clients) -> None:
    """Another listen(2) on an open listener changes the limit, whether it is idle or not."""
    listener = listen(port, 3)
    clients.connect(1, port)
    assert everything.settle().value("dtrace_tcp_listen_q_limit", port=port) == 3
    listener.socket.listen(11)
    assert everything.settle().value("dtrace_tcp_listen_q_limit", port=port) == 11
    listener.socket.listen(7)
    clients.connect(1, port)
    assert everything.settle().value("dtrace_tcp_listen_q_limit", port=port) == 7


def test_close_and_reopen(
    everything: Exporter, port: int, listen: Listen, clients: Clients
) -> None:
    """A closed listener has no gauges; reopened, it has the new limit and the old counters."""
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


def test_ends(everything: Exporter, ports: Ports, listen: Listen, clients: Clients) -> None:
    """A listener that ends by shutdown(2) or by an administrator loses its gauges."""
    shut, destroyed = ports(2)
    listeners = {port: listen(port, 5) for port in (shut, destroyed)}
    for port in listeners:
        clients.connect(2, port)
    before = everything.settle()
    assert [gauges(before, port)["q_length"] for port in listeners] == [2, 2]
    listeners[shut].socket.shutdown(socket.SHUT_RD)
    subprocess.run(["ss", "-K", "-lnt", "sport", "=", f":{destroyed}"], check=True)
    after = everything.settle()
    assert [gauges(after, port) for port in listeners] == [dict.fromkeys(GAUGES)] * 2
    assert not after.fell_since(before)
    listeners[shut].socket.listen(6)
    clients.connect(1, shut)
    again = everything.settle()
    assert gauges(again, shut) == {"q_length": 1, "q_limit": 6, "q0_length": 0}


@pytest.mark.usefixtures("foreign")
def test_closed_under_flood(everything: Exporter, ports: Ports, listen: Listen) -> None:
    """60 listeners that close during a flood of SYNs lose their gauges and stay without."""
    watched = ports(60)
    for round_of in range(0, 60, 6):
        those = watched[round_of : round_of + 6]
        opened = [listen(port, 64, HERE4) for port in those]
        floods = [start_syns(port, 1_500) for port in those]
        for listener in opened:
            listener.close()
        for flood in floods:
            assert int(flood.communicate(timeout=100)[0]) == 1_500
    for _ in range(2):
        metrics = everything.settle()
        left = [port for port in watched if gauges(metrics, port) != dict.fromkeys(GAUGES)]
        assert left == []


def test_close_one_of_two(
    everything: Exporter, port: int, listen: Listen, clients: Clients
) -> None:
    """If one of two sockets on a port closes, only its own queue disappears."""
    sockets = [listen(port, backlog, reuseport=True) for backlog in (5, 6)]
    clients.connect(6, port)
    everything.settle()
    sockets[0].close()
    metrics = everything.settle()
    assert metrics.value("dtrace_tcp_listen_q_limit", port=port) == 6
    assert metrics.value("dtrace_tcp_listen_syns_total", port=port) == 6
