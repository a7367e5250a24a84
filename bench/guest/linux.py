"""Measures lost SYNs, memory by listeners and by sessions, and starts on Linux."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flood import Flood, counters
from lab.exporter import UP, Exporter
from lab.traffic import HERE4, Listener, nowhere, sysctl
from lab.waiting import until
from tools import (
    UNTRACED,
    Tool,
    barest,
    bpftrace_keyed,
    bpftrace_printf,
    ours,
    printf_per_syn,
)
from tracing import Tracer, complain, resident, tell, tell_versions
from turns import Account, by_turns, losses, rates, settle

from dtrace_exporter.tracing import program

DTRACE = "dtrace"
PORT = 7001
BACKLOG = 60_000
RATES = (1_000, 10_000)
INTERRUPTED = ("barest clause", "linux.d, shared", "linux.d, per-port")
INTERRUPTING = 200_000
BURST = 2_000
PATIENCE = 4.0
LISTENERS = (1, 10, 100, 1_000)
# Each has two programs, at the entry and the return of one function, which can have 38 of them: see
# BPF_MAX_TRAMP_LINKS in the kernel's linux/bpf.h.
SESSIONS = (1, 10, 19)
SESSION_SECONDS = 500
FIRST_PORT = 10_000

ENTRY = "fbt::tcp_conn_request:entry"
PRINTING = f"""#pragma D option quiet
BEGIN {{ printf("TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax\\n"); }}
{ENTRY}
/ ((struct sock *)arg2)->__sk_common.skc_num == {PORT} /
{{
    printf("%d,%Y,%s,0x%08x,%d,%d,%d,%d,%d\\n", timestamp, walltimestamp, "syn", 0, 0,
        ((struct sock *)arg2)->__sk_common.skc_num,
        ((struct inet_connection_sock *)arg2)->icsk_accept_queue.qlen.counter,
        ((struct sock *)arg2)->sk_ack_backlog, ((struct sock *)arg2)->sk_max_ack_backlog);
}}
"""


def tools() -> list[Tool]:
    """Return the tools that are compared."""
    probe = "kprobe:tcp_conn_request"
    numbers = program.drop_counters([DTRACE])
    return [
        UNTRACED,
        barest(DTRACE, ENTRY),
        ours(DTRACE, "linux", numbers=numbers),
        ours(DTRACE, "linux", PORT, numbers),
        printf_per_syn(DTRACE, PRINTING),
        bpftrace_keyed(probe, "arg2"),
        bpftrace_printf(probe, "arg2"),
        # A SYN meets no probe of these two.
        Tool("tcpaccept.bt", ["bpftrace", "/usr/sbin/tcpaccept.bt"], None, "Tracing", settle=3.0),
        Tool("tcpsynbl.bt", ["bpftrace", "/usr/sbin/tcpsynbl.bt"], None, "Tracing", settle=3.0),
        Tool("bcc tcpsynbl", ["python3", "/usr/sbin/tcpsynbl-bpfcc"], None, "Tracing", settle=3.0),
    ]


def measure(flood: Flood) -> None:
    """Report what each tool saw of bursts, of SYNs at rates, and of a flood of interrupts."""

    def one(tool: Tool, tracer: Tracer | None) -> None:
        account = Account(flood, tool, tracer, flood.made())
        settle(flood, tool, tracer)
        losses(flood, tool, account)
        rates(flood, tool, tracer, account, RATES)
        if tracer is not None and tool.name in INTERRUPTED:
            interrupted(flood, tool, tracer)

    flood.keeps = False
    with sysctl("net.ipv4.tcp_syncookies", 2):
        by_turns(tools(), one)


def interrupted(flood: Flood, tool: Tool, tracer: Tracer) -> None:
    """Report what a tool saw of SYNs that arrive in interrupts on the CPU of its consumer.

    CPU 1 sends the SYNs and CPU 0 receives them, where a process makes and accepts connections. SYN
    cookies answer all SYNs, also those of this process.
    """
    seen = tool.seen
    assert seen is not None
    told, cookies = seen(tracer.text()), cookies_sent()
    busy = Busy()
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(tracer.process.pid, {0})
    with steered():
        busy.start()
        os.sched_setaffinity(0, {1})
        try:
            for sent in range(0, INTERRUPTING, BURST):
                # CPU 0 should be busy, but not so late that clients send their SYNs again.
                while cookies_sent() - cookies < sent - BURST:
                    tracer.read(0.002)
                flood.send(BURST)
        finally:
            os.sched_setaffinity(0, own)
            busy.end()
        settled(cookies_sent, tracer)
    made = INTERRUPTING if tool.port_only else cookies_sent() - cookies
    told = settled(lambda: seen(tracer.text()), tracer) - told
    tell(event="interrupted", tool=tool.name, made=made, seen=told)


def cookies_sent() -> int:
    """Return how many SYNs the kernel has answered by a cookie."""
    return counters()["SyncookiesSent"]


class Busy(threading.Thread):
    """Makes connections on CPU 0, to listeners that come and go."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = threading.Event()

    def run(self) -> None:
        """Make and accept connections until end() is called."""
        os.sched_setaffinity(threading.get_native_id(), {0})
        while not self._ended.is_set():
            with socket.create_server(("127.0.0.1", 0)) as server:
                for _ in range(500):
                    client = socket.create_connection(server.getsockname())
                    server.accept()[0].close()
                    client.close()

    def end(self) -> None:
        """End the thread."""
        self._ended.set()
        self.join()


@contextmanager
def steered() -> Iterator[None]:
    """Let CPU 0 receive all packets of the loopback interface, whichever CPU sends them."""
    switch = Path("/sys/class/net/lo/queues/rx-0/rps_cpus")
    switch.write_text("1")
    try:
        yield
    finally:
        switch.write_text("0")


def settled(read: Callable[[], int], tracer: Tracer) -> int:
    """Return a number once it has not changed for some seconds."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < PATIENCE:
        tracer.wait(0.5)
        if (now := read()) != last:
            last, since = now, time.monotonic()
    return last


def memory(listeners: int) -> None:
    """Report the memory of an exporter with some listeners, and of its dtrace(1), in bytes."""
    with ExitStack() as stack:
        for number in range(listeners):
            opened = stack.enter_context(socket.socket())
            opened.bind(("127.0.0.1", FIRST_PORT + number))
            opened.listen(8)
        began = time.monotonic()
        exporter = Exporter({"source": "dtrace"})
        stack.callback(exporter.stop)
        exporter.wait_ready()
        took = time.monotonic() - began
        for number in range(listeners):
            with socket.create_connection(("127.0.0.1", FIRST_PORT + number)):
                pass
        time.sleep(3)
        metrics = exporter.metrics()
        seen = len(metrics.select("dtrace_tcp_listen_syns_total"))
        tell(
            event="memory",
            listeners=listeners,
            seen=seen,
            seconds=took,
            exporter=resident(exporter.process.pid),
            dtrace=[resident(pid) for pid in exporter.pids()],
        )


def start(sessions: int) -> None:
    """Report the time from exec to the first row of the last session, and the memory of all.

    The exporter is not stopped, because the end of many sessions takes long.
    """
    ports = [FIRST_PORT + number for number in range(sessions)]
    began = time.monotonic()
    exporter = Exporter({"source": "dtrace", "listeners": [{"port": port} for port in ports]})
    exporter.wait_answers()
    until(
        lambda: sum(up for _, up in exporter.metrics(UP).select(UP)) == sessions,
        "every session is up",
        SESSION_SECONDS,
        every=0.5,
    )
    tell(
        event="start",
        sessions=sessions,
        seconds=time.monotonic() - began,
        exporter=resident(exporter.process.pid),
        dtrace=[resident(pid) for pid in exporter.pids()],
    )
    if sessions != SESSIONS[-1]:
        exporter.stop()


def main() -> None:
    """Measure everything on Linux."""
    tell_versions(DTRACE)
    with (
        nowhere(),
        sysctl("net.core.somaxconn", BACKLOG),
        sysctl("net.ipv4.tcp_max_syn_backlog", 2 * BACKLOG),
    ):
        listener = Listener(PORT, BACKLOG, HERE4)
        flood = Flood(HERE4, [PORT])
        try:
            measure(flood)
        finally:
            flood.close()
            listener.close()
    for what, numbers in ((memory, LISTENERS), (start, SESSIONS)):
        for number in numbers:
            try:
                what(number)
            except Exception as error:
                complain(f"{what.__name__} {number}", error)
    tell(event="end")


if __name__ == "__main__":
    main()
