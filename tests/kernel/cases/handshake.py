"""The duration of handshakes, compared with the round-trip times that ss(8) shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from lab.exporter import Exporter, Metrics
from lab.traffic import Clients, HoldBack, Listen, Ports, ip, sysctl
from lab.waiting import until
from lab.witness import Netstat, listen_queues, round_trips

HANDSHAKES = "dtrace_tcp_listen_handshake_seconds"
NEAR, FAR = "198.51.100.1", "198.51.100.2"


def check(metrics: Metrics, port: int, times: list[int]) -> None:
    """Check that the measured handshakes of a port's listener took exactly these microseconds."""
    assert metrics.value(f"{HANDSHAKES}_count", port=port) == len(times)
    total = metrics.value(f"{HANDSHAKES}_sum", port=port)
    assert total is not None
    assert round(total * 1e6) == sum(times)
    for bound, count in metrics.buckets(HANDSHAKES, port=port).items():
        assert count == sum(time / 1e6 <= bound for time in times)


@contextmanager
def slow_link(netns: str, milliseconds: int) -> Iterator[None]:
    """Create a link to a network namespace that delays what the namespace sends."""
    ip("link", "add", "near", "type", "veth", "peer", "name", "far", "netns", netns)
    try:
        ip("address", "add", f"{NEAR}/24", "dev", "near")
        ip("link", "set", "near", "up")
        ip("-n", netns, "address", "add", f"{FAR}/24", "dev", "far")
        ip("-n", netns, "link", "set", "far", "up")
        delay = f"tc qdisc add dev far root netem delay {milliseconds}ms"
        ip("netns", "exec", netns, *delay.split())
        yield
    finally:
        ip("link", "delete", "near")


@pytest.fixture(autouse=True)
def measured(everything: Exporter) -> None:
    """Wait until the part handshake is enabled."""
    everything.wait("dtrace_session_feature_enabled", 1, session="all", feature="handshake")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_handshakes(
    address: str, everything: Exporter, port: int, listen: Listen, clients: Clients
) -> None:
    """Each handshake is in its bucket, with the microseconds that the kernel measured."""
    listener = listen(port, 16, address)
    clients.connect(8, port, address)
    listener.accept(8)
    times = round_trips(port)
    assert len(times) == 8
    metrics = everything.settle()
    check(metrics, port, times)
    assert metrics.value("dtrace_tcp_listen_established_total", port=port) == 8


def test_a_slow_link(
    everything: Exporter, port: int, listen: Listen, clients: Clients, away: str
) -> None:
    """Over a link that delays each segment by 60 ms, no handshake is shorter than 60 ms."""
    with slow_link(away, 60):
        listener = listen(port, 16, NEAR)
        clients.connect(4, port, NEAR, away)
        listener.accept(4)
        times = round_trips(port)
        assert times
        assert min(times) >= 60_000
        check(everything.settle(), port, times)


def test_sent_again(everything: Exporter, port: int, listen: Listen, held_back: HoldBack) -> None:
    """If a SYN-ACK was retransmitted, the handshake has no time, because either was answered."""
    kernel = Netstat()
    listen(port, 4)
    held = held_back(port)
    until(lambda: kernel["TCPSynRetrans"] >= 1, "the SYN-ACK is sent again")
    held.release()
    until(lambda: listen_queues(port)[0].q == 1, "the handshake is complete")
    metrics = everything.settle()
    check(metrics, port, [])
    assert metrics.value("dtrace_tcp_listen_established_total", port=port) == 1


def test_cookies(everything: Exporter, port: int, listen: Listen, clients: Clients) -> None:
    """A connection by a SYN cookie has no time, because the kernel forgets its SYN-ACK."""
    kernel = Netstat()
    with sysctl("net.ipv4.tcp_syncookies", 2):
        listen(port, 8)
        clients.connect(3, port)
        until(lambda: listen_queues(port)[0].q == 3, "Q")
    assert kernel["SyncookiesRecv"] == 3
    metrics = everything.settle()
    check(metrics, port, [])
    assert metrics.value("dtrace_tcp_listen_established_total", port=port) == 3


def test_moved(everything: Exporter, ports: Ports, listen: Listen, clients: Clients) -> None:
    """A handshake counts once, even if its connection moves to the Q of another socket."""
    (port,) = ports(1)
    kernel = Netstat()
    with sysctl("net.ipv4.tcp_migrate_req", 1):
        closing, staying = [listen(port, 32, reuseport=True) for _ in range(2)]
        clients.connect(12, port)
        until(lambda: sum(queue.q for queue in listen_queues(port)) == 12, "Q")
        times = round_trips(port)
        closing.close()
        until(lambda: listen_queues(port)[0].q == 12, "all are in the other Q")
        staying.accept(12)
    assert kernel["TCPMigrateReqSuccess"] > 0
    check(everything.settle(), port, times)
