"""Unusual kinds of connections are counted like all others."""

from __future__ import annotations

import socket
import subprocess

import pytest
from lab.exporter import Exporter
from lab.traffic import Clients, Listen, Ports, sysctl
from lab.waiting import until
from lab.witness import Netstat, listen_queues

MPTCP = 262


def counted(exporter: Exporter, port: int) -> list[float | None]:
    """Return the SYNs, completions and accepts of a port once all rows have come."""
    metrics = exporter.settle()
    names = ("syns_total", "established_total", "accepts_total")
    return [metrics.value(f"dtrace_tcp_listen_{name}", port=port) for name in names]


def test_mptcp(everything: Exporter, port: int) -> None:
    """An MPTCP connection is accepted as its first subflow, and its time in Q is measured."""
    try:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, MPTCP)
    except OSError as error:
        pytest.skip(f"this kernel has no MPTCP: {error}")
    with listener:
        listener.bind(("127.0.0.1", port))
        listener.listen(8)
        for protocol in (MPTCP, MPTCP, socket.IPPROTO_TCP):
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as client:
                client.connect(("127.0.0.1", port))
                listener.accept()[0].close()
        assert counted(everything, port) == [3, 3, 3]
        waits = "dtrace_tcp_listen_accept_wait_seconds_count"
        assert everything.value(waits, port=port) == 3
        assert everything.value("dtrace_tcp_listen_q_length", port=port) == 0


def test_fast_open(everything: Exporter, port: int, listen: Listen) -> None:
    """With TCP Fast Open, a connection enters Q with its SYN and is counted once."""
    with sysctl("net.ipv4.tcp_fastopen", 3):
        listener = listen(port, 8, fast_open=True)
        for _ in range(4):
            with socket.socket() as client:
                client.sendto(b"x", socket.MSG_FASTOPEN, ("127.0.0.1", port))
                listener.accept(1)
    assert counted(everything, port) == [4, 4, 4]
    assert everything.value("dtrace_tcp_listen_q_length", port=port) == 0


def test_defer_accept(everything: Exporter, port: int, listen: Listen) -> None:
    """With TCP_DEFER_ACCEPT, a connection enters Q with its first data."""
    listener = listen(port, 8)
    listener.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
    with socket.create_connection(("127.0.0.1", port)) as client:
        assert counted(everything, port) == [1, 0, 0]
        client.send(b"x")
        listener.accept(1)
        assert counted(everything, port) == [1, 1, 1]


def test_cookies_and_fast_open_full(
    everything: Exporter, port: int, listen: Listen, clients: Clients
) -> None:
    """A backlog of 0 admits one connection, and later ones are dropped as q_full."""
    netstat = Netstat()
    listen(port, 0)
    clients.fill(1, port)
    clients.knock(2, port)
    until(lambda: netstat["ListenDrops"] >= 2, "both are dropped")
    clients.give_up()
    metrics = everything.settle()
    assert metrics.drops(port=port) == {"q_full": netstat["ListenDrops"]}
    ratio = metrics.buckets("dtrace_tcp_listen_q_saturation_ratio", port=port)
    assert (ratio[0.0], ratio[1.0]) == (1, 1 + netstat["ListenDrops"])


def test_alternating(everything: Exporter, ports: Ports, listen: Listen) -> None:
    """Connections to fifty listeners in turn are counted at each listener."""
    watched = ports(50)
    listeners = {port: listen(port, 8) for port in watched}
    for _ in range(10):
        for port, listener in listeners.items():
            with socket.create_connection(("127.0.0.1", port)):
                listener.accept(1)
    metrics = everything.settle()
    for name in ("syns_total", "established_total", "accepts_total"):
        found = [metrics.value(f"dtrace_tcp_listen_{name}", port=port) for port in watched]
        assert found == [10] * 50, name


def test_migration(everything: Exporter, port: int, listen: Listen, clients: Clients) -> None:
    """If a socket closes, its Q moves to another socket of its port, and so do the gauges."""
    with sysctl("net.ipv4.tcp_migrate_req", 1):
        first = listen(port, 16, reuseport=True)
        clients.connect(3, port)
        second = listen(port, 16, reuseport=True)
        first.close()
        until(lambda: [one.q for one in listen_queues(port)] == [3], "the other one has them")
        assert everything.settle().value("dtrace_tcp_listen_q_length", port=port) == 3
        second.accept(3)
    metrics = everything.settle()
    assert metrics.value("dtrace_tcp_listen_accepts_total", port=port) == 3
    assert metrics.value("dtrace_tcp_listen_q_length", port=port) == 0


def test_netns_used_again(everything: Exporter, port: int) -> None:
    """A network namespace that uses the number of a former one starts at 0."""
    first = _in_a_namespace(port, 5)
    everything.settle()
    for _ in range(200):
        again = _in_a_namespace(port, 2)
        if again == first:
            break
    else:
        pytest.skip("this kernel did not use the number again")
    metrics = everything.settle()
    assert metrics.value("dtrace_tcp_listen_syns_total", port=port, netns=first) == 2


def _in_a_namespace(port: int, count: int) -> str:
    """Make connections in a new network namespace, and return its number."""
    script = (
        "import os, socket, subprocess\n"
        "os.unshare(os.CLONE_NEWNET)\n"
        "subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True)\n"
        f"server = socket.create_server(('127.0.0.1', {port}))\n"
        f"for _ in range({count}):\n"
        f"    socket.create_connection(('127.0.0.1', {port})).close()\n"
        "print(os.stat('/proc/self/ns/net').st_ino)\n"
    )
    done = subprocess.run(["python3", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.strip()
