"""On Linux: what a SYN costs under a flood, what is lost, memory by listeners, starts."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from contextlib import ExitStack

from lab.exporter import Exporter
from lab.traffic import HERE4, Listener, nowhere, send_syns, sysctl
from model import Tool, number_behind, rows_seen
from tracing import Tracer, complain, resident, running, tell

from dtrace_exporter import program

PORT = 7001
SYNS = 5_000
REPEATS = 5
BURSTS = (1_000, 10_000)
LISTENERS = (1, 10, 100, 1_000)
SESSIONS = (1, 4)
FIRST_PORT = 10_000

ENTRY = "fbt::tcp_conn_request:entry"
BAREST = f"""#pragma D option quiet
BEGIN {{ printf("ready\\n"); }}
{ENTRY} {{ @ = count(); }}
END {{ printa("count %@d\\n", @); }}
"""
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


def ours(ports: tuple[int, int]) -> str:
    """Return linux.d, all parts on, as a session would run it."""
    numbers = program.drop_counters(["dtrace"])
    return program.render(program.load("linux"), program.window(1), ports=ports, numbers=numbers)


def tools() -> list[Tool]:
    """Return all that is compared, the barest first."""
    stdin = ["dtrace", "-q", "-x", "aggsize=8m", "-s", "/dev/stdin"]
    keyed = "kprobe:tcp_conn_request { @[arg2] = count(); }"
    none = number_behind(r"^\b$")
    return [
        Tool("barest clause", stdin, BAREST, "ready", number_behind(r"count (\d+)")),
        Tool("linux.d, shared", stdin, ours((0, 65535)), "tick", rows_seen, 2.0),
        Tool("linux.d, per-port", stdin, ours((PORT, PORT)), "tick", rows_seen, 2.0),
        Tool("printf per SYN", stdin, PRINTING, "TS,", lambda output: output.count(",syn,")),
        Tool(
            "bpftrace, keyed count",
            ["bpftrace", "-e", keyed],
            None,
            "Attach",
            number_behind(r": (\d+)"),
        ),
        Tool("tcpaccept.bt", ["bpftrace", "/usr/sbin/tcpaccept.bt"], None, "Tracing", none, 3.0),
        Tool("tcpsynbl.bt", ["bpftrace", "/usr/sbin/tcpsynbl.bt"], None, "Tracing", none, 3.0),
        Tool("bcc tcpsynbl", ["python3", "/usr/sbin/tcpsynbl-bpfcc"], None, "Tracing", none, 3.0),
    ]


def flood(syns: int) -> float:
    """Send SYNs; return how long one took, in nanoseconds, until the kernel had taken all in."""
    began = time.monotonic_ns()
    assert send_syns(PORT, syns) == syns
    return (time.monotonic_ns() - began) / syns


def costs(tracer: Tracer | None) -> list[float]:
    """Return the time of a SYN in each of some floods, in nanoseconds."""
    found = []
    for _ in range(REPEATS):
        found.append(flood(SYNS))
        if tracer is not None:
            tracer.read(0.2)
    return found


def measure_tool(tool: Tool) -> None:
    """Measure one tool: cost, then losses if it tells SYNs at all."""
    with running(tool.command, tool.text, tool.ready, tool.settle) as tracer:
        tell(event="flood", tool=tool.name, ns=costs(tracer))
    if "tcp" in tool.name:
        return
    for syns in BURSTS:
        with running(tool.command, tool.text, tool.ready, tool.settle) as tracer:
            flood(syns)
            tracer.drain() if "printf" in tool.name else tracer.wait(2.5)
            tell(event="loss", tool=tool.name, made=syns, seen=tool.seen(tracer.end()))


def memory(listeners: int) -> None:
    """Tell the memory of an exporter of so many listeners, and of its dtrace(1), in bytes."""
    with ExitStack() as stack:
        for number in range(listeners):
            opened = stack.enter_context(socket.socket())
            opened.bind(("127.0.0.1", FIRST_PORT + number))
            opened.listen(8)
        exporter = Exporter({"source": "dtrace"})
        stack.callback(exporter.stop)
        exporter.wait_ready()
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
            exporter=resident(exporter.process.pid),
            dtrace=[resident(pid) for pid in exporter.pids()],
        )


def start(sessions: int) -> None:
    """Tell how long it is from exec to the last session's first row, and the memory of it all."""
    ports = [FIRST_PORT + number for number in range(sessions)]
    began = time.monotonic()
    exporter = Exporter({"source": "dtrace", "listeners": [{"port": port} for port in ports]})
    try:
        exporter.wait_ready()
        took = time.monotonic() - began
        tell(
            event="start",
            sessions=sessions,
            seconds=took,
            exporter=resident(exporter.process.pid),
            dtrace=[resident(pid) for pid in exporter.pids()],
        )
    finally:
        exporter.stop()


def version(*command: str) -> str:
    """Return the version that a program tells."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(r"\d+\.[\w.]+", done.stdout + done.stderr)
    return match[0] if match else ""


def main() -> None:
    """Measure everything on Linux."""
    tell(event="version", name="DTrace", version=version("dtrace", "-V"))
    tell(event="version", name="bpftrace", version=version("bpftrace", "--version"))
    tell(event="version", name="Linux", version=version("uname", "-r"))
    with nowhere(), sysctl("net.ipv4.tcp_syncookies", 1):
        listener = Listener(PORT, 128, HERE4)
        try:
            tell(event="flood", tool="untraced", ns=costs(None))
            for tool in tools():
                try:
                    measure_tool(tool)
                except Exception as error:
                    complain(tool.name, error)
            tell(event="flood", tool="untraced", ns=costs(None))
        finally:
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
