"""Half-open connections: SYNs whose SYN-ACK gets no answer."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import pytest
from lab.consumer import consumer
from lab.exporter import Exporter
from lab.traffic import HERE4, HERE6, Clients, HoldBack, Listen, send_syns, sysctl
from lab.waiting import until
from lab.witness import CountSyns, Netstat, half_open, listen_queues

pytestmark = pytest.mark.usefixtures("foreign")
SYNS = "dtrace_tcp_listen_syns_total"
Q0 = "dtrace_tcp_listen_q0_length"


def told_q0(exporter: Exporter, port: int) -> float | None:
    """Wait until Q0 is the kernel's, which a SYN's timer reports a second later, and return it."""
    return until(
        lambda: (q0 := exporter.value(Q0, port=port)) == half_open(port) and q0, "Q0 is told"
    )


@pytest.mark.parametrize("address", [HERE4, HERE6])
def test_q0_length(
    address: str, everything: Exporter, port: int, listen: Listen, clients: Clients
) -> None:
    """Q0 is the number of the port's sockets in SYN_RECV, without completed connections."""
    listen(port, 64, address)
    send_syns(port, 20, address)
    clients.connect(2, port, address)
    metrics = everything.settle()
    assert metrics.value(Q0, port=port) == half_open(port) == 20
    assert metrics.value("dtrace_tcp_listen_q_length", port=port) == 2
    assert metrics.value(SYNS, port=port) == 22
    assert metrics.drops(port=port) == {}


def test_deep_q0(everything: Exporter, port: int, listen: Listen) -> None:
    """A Q0 of 20,000 is exact, and so is the Q that shares a word with it in a row."""
    # If Q0 is more than half full, the kernel gives up the oldest connections after two tries.
    backlog = 50_000
    with (
        sysctl("net.core.somaxconn", backlog),
        sysctl("net.ipv4.tcp_max_syn_backlog", backlog),
        # Even on a slow machine, none may be given up meanwhile.
        sysctl("net.ipv4.tcp_synack_retries", 20),
    ):
        listen(port, backlog, HERE4)
        send_syns(port, 20_000)
        metrics = everything.settle()
        assert told_q0(everything, port) == 20_000
        assert metrics.value("dtrace_tcp_listen_q_length", port=port) == 0
        assert metrics.value("dtrace_tcp_listen_q_limit", port=port) == backlog


def test_half_open_end(everything: Exporter, port: int, listen: Listen) -> None:
    """Without another event, Q0 falls to 0 when the kernel gives up half-open connections."""
    with sysctl("net.ipv4.tcp_synack_retries", 1):
        listen(port, 64, HERE4)
        send_syns(port, 10)
        everything.wait(Q0, 10, port=port)
        until(lambda: half_open(port) == 0, "the kernel gives them up")
    metrics = everything.settle()
    if not metrics.value("dtrace_session_feature_enabled", session="all", feature="half_open_end"):
        pytest.skip("this kernel allows no probe where a half-open connection ends")
    assert metrics.value(Q0, port=port) == 0


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_half_open_reset(
    address: str, everything: Exporter, port: int, listen: Listen, held_back: HoldBack
) -> None:
    """Without another event, Q0 falls to 0 when a client resets its half-open connection."""
    listen(port, 64, address)
    held = held_back(port, address)
    everything.wait(Q0, 1, port=port)
    held.close()
    until(lambda: half_open(port) == 0, "the kernel frees it")
    metrics = everything.settle()
    if not metrics.value("dtrace_session_feature_enabled", session="all", feature="half_open_end"):
        pytest.skip("this kernel allows no probe where a half-open connection ends")
    assert metrics.value(Q0, port=port) == 0


@pytest.mark.parametrize(
    ("cookies", "syn_backlog"),
    [(1, 4096), (2, 4096), (0, 16)],
    ids=["cookies if full", "cookies always", "dropped"],
)
def test_never_half_open(
    cookies: int, syn_backlog: int, port: int, listen: Listen, count_syns: CountSyns
) -> None:
    """Every SYN of a flood is counted once, and Q0 is 0 once those that entered it have left."""
    parameters = {
        "tcp_syncookies": cookies,
        "tcp_max_syn_backlog": syn_backlog,
        "tcp_synack_retries": 1,
    }
    netstat, syns = Netstat(), count_syns(port)
    with ExitStack() as stack:
        for name, value in parameters.items():
            stack.enter_context(sysctl(f"net.ipv4.{name}", value))
        running = stack.enter_context(consumer())

        def later(before: int) -> bool:
            return running.ticks > before

        listen(port, 32, HERE4)
        for _ in range(4):
            send_syns(port, 5_000)
            running.until(partial(later, running.ticks), "a heartbeat")
        until(lambda: half_open(port) == 0, "the kernel gives them up")
        quiet = running.ticks + 3
        running.until(lambda: running.ticks > quiet, "some quiet heartbeats")
        errors = running.end()
    (found,) = [one for one in running.table if one.identity.port == port]
    assert found.queues is not None
    assert (found.queues.q0, found.queues.q) == (0, 0)
    assert found.syns == syns[port] == 20_000
    assert sum(found.drops.values()) == netstat["ListenDrops"]
    answered = netstat["TCPReqQFullDoCookies"]
    assert (answered > 0, netstat["ListenDrops"] > 0) == (cookies > 0, cookies == 0)
    assert "drop" not in errors


def test_q0_full(everything: Exporter, port: int, listen: Listen) -> None:
    """Without SYN cookies, a SYN that finds Q0 full is dropped, and is counted as q0_full."""
    netstat = Netstat()
    with sysctl("net.ipv4.tcp_syncookies", 0):
        listen(port, 8, HERE4)
        send_syns(port, 30)
    metrics = everything.settle()
    (queue,) = listen_queues(port)
    assert metrics.value(SYNS, port=port) == 30
    # Those that found room; after some seconds the kernel gives up the oldest if Q0 is half full.
    assert 0 < (told_q0(everything, port) or 0) <= 30 - queue.drops == 9
    assert metrics.drops(port=port) == {"q0_full": netstat["TCPReqQFullDrop"]}
    assert netstat["ListenDrops"] == queue.drops == netstat["TCPReqQFullDrop"] > 0


def test_syn_backlog_full(everything: Exporter, port: int, listen: Listen) -> None:
    """Without SYN cookies, tcp_max_syn_backlog limits Q0 too, and its drops are q0_full."""
    netstat = Netstat()
    with sysctl("net.ipv4.tcp_syncookies", 0), sysctl("net.ipv4.tcp_max_syn_backlog", 16):
        listen(port, 64, HERE4)
        send_syns(port, 30)
    metrics = everything.settle()
    assert netstat["TCPReqQFullDrop"] == 0
    assert metrics.drops(port=port) == {"q0_full": netstat["ListenDrops"]}
    assert told_q0(everything, port) == 30 - netstat["ListenDrops"]


def test_cookies(everything: Exporter, port: int, listen: Listen) -> None:
    """With SYN cookies, a full Q0 drops no connection, and no drop is counted."""
    netstat = Netstat()
    with sysctl("net.ipv4.tcp_syncookies", 1):
        listen(port, 8, HERE4)
        send_syns(port, 30)
    metrics = everything.settle()
    assert netstat["TCPReqQFullDoCookies"] > 0
    assert netstat["ListenDrops"] == 0
    assert metrics.drops(port=port) == {}
    assert metrics.value(SYNS, port=port) == 30
    assert (told_q0(everything, port) or 0) > 0


def test_cookies_complete(
    everything: Exporter, port: int, listen: Listen, clients: Clients
) -> None:
    """A connection by a SYN cookie counts as completed, and its time in Q is measured."""
    netstat = Netstat()
    with sysctl("net.ipv4.tcp_syncookies", 2):
        listener = listen(port, 8)
        clients.connect(3, port)
        listener.accept(3)
    assert netstat["SyncookiesRecv"] == 3
    metrics = everything.settle()
    for name in ("syns_total", "established_total", "accepts_total", "accept_wait_seconds_count"):
        assert metrics.value(f"dtrace_tcp_listen_{name}", port=port) == 3, name
