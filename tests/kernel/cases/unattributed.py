"""Drops that the kernel counts but the exporter does not, for one listener and in all."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Callable

import pytest
from lab.exporter import Exporter, StartExporter
from lab.traffic import HERE4, Clients, Listen, send_syns
from lab.waiting import until
from lab.witness import Netstat, listen_queues

UNATTRIBUTED = "dtrace_session_unattributed_total"
SYNS = 300
BROADCAST = "127.255.255.255"
# include/uapi/asm-generic/socket.h
SO_ATTACH_FILTER = 26
SO_DETACH_FILTER = 27
# include/uapi/linux/filter.h: a filter that lets nothing through.
NOTHING = struct.pack("HBBI", 0x06, 0, 0, 0)


def refused(listener: socket.socket, count: int) -> None:
    """Let the kernel discard some SYNs before TCP sees them."""
    code = ctypes.create_string_buffer(NOTHING)
    program = struct.pack("HP", 1, ctypes.addressof(code))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    send_syns(listener.getsockname()[1], count)
    listener.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)


def deferred(listener: socket.socket, count: int) -> None:
    """Let the kernel discard the first ACK of some connections, none of which is dropped."""
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
    for _ in range(count):
        with socket.create_connection((HERE4, listener.getsockname()[1])) as client:
            client.sendall(b"x")
            listener.accept()[0].close()


def unseen(listener: socket.socket, count: int) -> None:
    """Let the kernel drop some SYNs before the function that a session watches.

    It never answers SYNs to a broadcast address: net/ipv4/tcp_ipv4.c, tcp_v4_conn_request().
    """
    send_syns(listener.getsockname()[1], count, BROADCAST)


def check_missing(
    running: Exporter, port: int, listener: socket.socket, discard: Callable[..., None]
) -> None:
    """Check that unseen drops are exported as unattributed, and earlier discards are not."""

    def missing() -> float | None:
        return running.value(UNATTRIBUTED, session=f"port-{port}", kind="drops")

    until(lambda: missing() == 0, "nothing is missing")
    netstat, before = Netstat(), listen_queues(port)[0].drops
    drops = running.metrics().drops(port=port)
    discard(listener, 30)
    assert (netstat["ListenDrops"], listen_queues(port)[0].drops) == (0, before + 30)
    unseen(listener, 20)
    assert (netstat["ListenDrops"], listen_queues(port)[0].drops) == (20, before + 50)
    until(lambda: missing() == 20, "what nobody has counted is told")
    assert running.settle().drops(port=port) == drops
    assert missing() == 20


@pytest.mark.usefixtures("foreign")
def test_of_a_port(exporter: StartExporter, port: int, listen: Listen, clients: Clients) -> None:
    """All drops for a full Q are counted, and SYNs to a broadcast address are unattributed."""
    running = exporter({"source": "dtrace", "listeners": [{"port": port}]})
    listener = listen(port, 1, "0.0.0.0")
    netstat = Netstat()
    clients.fill(2, port, HERE4)
    send_syns(port, SYNS)
    until(lambda: netstat["ListenDrops"] >= SYNS, "the kernel has dropped them")
    metrics = running.settle()
    (queue,) = listen_queues(port)
    assert sum(metrics.drops(port=port).values()) == queue.drops == netstat["ListenDrops"]
    check_missing(running, port, listener.socket, refused)


@pytest.mark.usefixtures("foreign")
def test_deferred(exporter: StartExporter, port: int, listen: Listen) -> None:
    """With TCP_DEFER_ACCEPT, no connection counts as an unattributed drop."""
    listener = listen(port, 64, "0.0.0.0")
    running = exporter({"source": "dtrace", "listeners": [{"port": port}]})
    check_missing(running, port, listener.socket, deferred)
