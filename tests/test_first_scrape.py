"""The first scrape of very many listeners, with nothing read or rendered before."""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from dtrace_exporter import inet_diag, kernel_totals, sock_diag
from dtrace_exporter.collector import Collector
from dtrace_exporter.limits import Limits
from dtrace_exporter.listeners import Capabilities, SessionId
from dtrace_exporter.sockets import Queues
from dtrace_exporter.state import State
from dtrace_exporter.watched import Watched
from dtrace_exporter.web.exposition import Texts

MANY = Limits().listeners
SECONDS = 2.0
SESSION = SessionId("", "all")


def rendered(state: State) -> bytes:
    """Return the text of a scrape."""
    return b"".join(Texts().render(Collector(state).read(), CollectorRegistry(), generate_latest))


def told(number: int) -> memoryview:
    """Return the kernel's message about a listener: struct inet_diag_msg and its memory info."""
    address = bytes([127, 1, number >> 8, number & 255])
    head = struct.pack(
        "=4B2s2s16s20x8I", socket.AF_INET, 10, 0, 0, b"\0\x50", b"", address, number, *[0] * 7
    )
    drops = struct.pack("=HH9I", 40, 7, *[0] * 8, number)
    return memoryview(head + drops)


@pytest.mark.skipif(sys.platform != "linux", reason="sock_diag is an interface of Linux")
def test_sock_diag(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the kernel's answer to the text, the scrape takes less than two seconds of CPU time."""
    answer = [told(number) for number in range(MANY)]

    def dump(_: object, request: bytes) -> Iterator[memoryview]:
        asked = request[0] == socket.AF_INET and request[4:8] == struct.pack("=I", 1 << 10)
        yield from answer if asked else ()

    monkeypatch.setattr(inet_diag, "dump", dump)
    monkeypatch.setattr(kernel_totals, "dropped", lambda *_: MANY)
    state = State()
    state.table.watch(SESSION, Watched(), sock_diag.CAPABILITIES)
    began = time.thread_time()
    readings = sock_diag.read((), {})
    for _ in sock_diag.SockDiagSource().update(state.table, SESSION, readings):
        pass
    text = rendered(state)
    took = time.thread_time() - began
    assert text.count(b"\ndtrace_tcp_listen_drops_total{") == MANY == len(state.table)
    assert b'port="80",reason="unknown"} 9999.0\n' in text
    assert took < SECONDS


def test_dtrace() -> None:
    """The text of DTrace's counts is rendered in less than two seconds of CPU time."""
    state = State()
    reasons = ("q_full", "q0_full", "q_full_ack", "other")
    state.table.watch(SESSION, Watched(), Capabilities(reasons=reasons))
    for number in range(MANY):
        listener = state.table.listener(SESSION, "", f"127.1.{number >> 8}.{number & 255}", 80)
        listener.count_syns(1, 128, number, number)
        listener.count_accepts(3, number, number)
        listener.sockets[number] = Queues(0, 1, None, 128)
    began = time.thread_time()
    text = rendered(state)
    took = time.thread_time() - began
    assert text.count(b"\ndtrace_tcp_listen_accept_wait_seconds_sum{") == MANY
    assert took < SECONDS
