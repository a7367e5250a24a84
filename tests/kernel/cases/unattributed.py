"""What the kernel has dropped and no counter has, listener by listener and in all."""

from __future__ import annotations

import ctypes
import socket
import struct

import pytest
from lab.exporter import Exporter, StartExporter
from lab.traffic import HERE4, Clients, Listen, Listener, Ports, send_syns
from lab.waiting import until
from lab.witness import Netstat, listen_queues

UNATTRIBUTED = "dtrace_session_unattributed_total"
SYNS = 300
# include/uapi/asm-generic/socket.h
SO_ATTACH_FILTER = 26
# include/uapi/linux/filter.h: a filter that lets nothing through.
NOTHING = struct.pack("HBBI", 0x06, 0, 0, 0)


def refuse_all(listener: socket.socket) -> None:
    """Have the kernel drop all that comes to a listener, before TCP looks at it."""
    code = ctypes.create_string_buffer(NOTHING)
    program = struct.pack("HP", 1, ctypes.addressof(code))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def missing(running: Exporter, session: str) -> float | None:
    """Return how many drops a session's counters lack."""
    return running.value(UNATTRIBUTED, session=session, kind="drops")


@pytest.mark.usefixtures("foreign")
def test_of_a_port(exporter: StartExporter, ports: Ports, listen: Listen, clients: Clients) -> None:
    """Drops for a full Q are all counted; those of a socket's filter are in sk_drops alone."""
    new, old = ports(2)
    before = listen(old, 64, HERE4)
    running = exporter({"source": "dtrace", "listeners": [{"port": new}, {"port": old}]})
    after = listen(new, 1, HERE4)
    netstat = Netstat()
    clients.fill(2, new, HERE4)
    send_syns(new, SYNS)
    until(lambda: netstat["ListenDrops"] >= SYNS, "the kernel has dropped them")
    metrics = running.settle()
    (queue,) = listen_queues(new)
    assert sum(metrics.drops(port=new).values()) == queue.drops == netstat["ListenDrops"]

    def drop_by_filter(port: int, listener: Listener, more: int) -> None:
        session = f"port-{port}"
        until(lambda: missing(running, session) == 0, "nothing is missing")
        refuse_all(listener.socket)
        dropped = listen_queues(port)[0].drops
        send_syns(port, more)
        told = "what the filter has dropped is told"
        until(lambda: missing(running, session) == more, told)
        assert listen_queues(port)[0].drops == dropped + more

    drop_by_filter(new, after, 20)
    drop_by_filter(old, before, 30)
    assert netstat["ListenDrops"] == sum(running.metrics().drops(port=new).values())
