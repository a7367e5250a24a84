"""On Linux: what a SYN costs, what is lost, memory by listeners and by sessions, starts."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from flood import Flood
from lab.exporter import UP, Exporter
from lab.traffic import HERE4, Listener, nowhere, sysctl
from lab.waiting import until
from rounds import Account, by_turns, costs, losses, rates, settle
from tools import (
    UNTRACED,
    Tool,
    barest,
    bpftrace_keyed,
    bpftrace_printf,
    ours,
    printf_per_syn,
)
from tracing import Tracer, bpf_nanoseconds, bpf_statistics, complain, resident, tell

from dtrace_exporter import program

WHERE = "Linux"
DTRACE = "dtrace"
PORT = 7001
BACKLOG = 60_000
SYNS = 1_000
ROUNDS = 2
REPEATS = 20
RATES = (1_000, 10_000)
CONNECTIONS = 100
LISTENERS = (1, 10, 100, 1_000)
# Each has two programs at the entry and the return of one function, which takes 38 of them; see
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
    """Return all that is compared."""
    probe = "kprobe:tcp_conn_request"
    numbers = program.drop_counters([DTRACE])
    return [
        UNTRACED,
        barest(DTRACE, ENTRY),
        ours(DTRACE, "linux", (0, 65535), numbers),
        ours(DTRACE, "linux", (PORT, PORT), numbers),
        printf_per_syn(DTRACE, PRINTING),
        bpftrace_keyed(probe, "arg2"),
        bpftrace_printf(probe, "arg2"),
        # Neither of them has a probe that a SYN comes by.
        Tool("tcpaccept.bt", ["bpftrace", "/usr/sbin/tcpaccept.bt"], None, "Tracing", settle=3.0),
        Tool("tcpsynbl.bt", ["bpftrace", "/usr/sbin/tcpsynbl.bt"], None, "Tracing", settle=3.0),
        Tool("bcc tcpsynbl", ["python3", "/usr/sbin/tcpsynbl-bpfcc"], None, "Tracing", settle=3.0),
    ]


def measure(flood: Flood) -> None:
    """Measure all tools: costs in every round, losses in the first, by rate in the next."""

    def one(tool: Tool, tracer: Tracer | None, number: int) -> None:
        account = Account(flood, tool, tracer, flood.made())
        told = partial(tell, where=WHERE, tool=tool.name)
        with kept(flood, True):
            settle(flood, tool, tracer)
            told(event="flood", ns=costs(flood, tracer, SYNS, REPEATS))
        with kept(flood, False):
            told(event="cookies", ns=costs(flood, tracer, SYNS, REPEATS))
            if tracer is not None:
                told(event="programs", what="a SYN", ns=programs(lambda: flood.burst(SYNS), SYNS))
            if number == 0:
                losses(WHERE, flood, tool, account)
            if number == 1:
                rates(WHERE, flood, tool, tracer, account, RATES)
        told(event="connection", ns=[connections(CONNECTIONS) for _ in range(REPEATS)])
        if tracer is not None:
            ns = programs(lambda: connections(CONNECTIONS), CONNECTIONS)
            told(event="programs", what="a connection", ns=ns)

    by_turns(tools(), ROUNDS, one)


def programs(make: Callable[[], object], count: int) -> list[float]:
    """Return how long a tool's own programs run for each of what is made, in nanoseconds."""
    found = []
    with bpf_statistics():
        for _ in range(REPEATS // 2):
            before = bpf_nanoseconds()
            make()
            found.append((bpf_nanoseconds() - before) / count)
    return found


@contextmanager
def kept(flood: Flood, keeps: bool) -> Iterator[None]:
    """Have SYNs kept by their listener, or answered by a SYN cookie, each of them."""
    flood.keeps = keeps
    with sysctl("net.ipv4.tcp_syncookies", 0 if keeps else 2):
        yield


def connections(count: int) -> float:
    """Make connections and accept them; return the time of one, in nanoseconds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic_ns()
        for _ in range(count):
            client = socket.create_connection(server.getsockname())
            server.accept()[0].close()
            client.close()
        return (time.monotonic_ns() - began) / count


def memory(listeners: int) -> None:
    """Tell the memory of an exporter of so many listeners, and of its dtrace(1), in bytes."""
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
    """Tell how long it is from exec to the last session's first row, and the memory of it all.

    The exporter is left to the end of this guest, for the end of many of them takes long.
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


def version(*command: str) -> str:
    """Return the version that a program tells."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(r"\d+\.[\w.]+", done.stdout + done.stderr)
    return match[0] if match else ""


def main() -> None:
    """Measure everything on Linux."""
    tell(event="version", name="DTrace", version=version(DTRACE, "-V"))
    tell(event="version", name="bpftrace", version=version("bpftrace", "--version"))
    tell(event="version", name="Linux", version=version("uname", "-r"))
    with (
        nowhere(),
        sysctl("net.core.somaxconn", BACKLOG),
        sysctl("net.ipv4.tcp_max_syn_backlog", 2 * BACKLOG),
    ):
        listener = Listener(PORT, BACKLOG, HERE4)
        flood = Flood(HERE4, PORT)
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
