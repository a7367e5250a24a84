"""Measures what SYNs, connections and nginx cost on Linux, in a machine that counts instructions.

With QEMU's ``-icount shift=0,sleep=off`` each instruction of the guest takes a nanosecond, and no
time passes while the guest is idle. So all nanoseconds here are numbers of instructions.
"""

from __future__ import annotations

import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flood import Flood
from lab import bpf
from lab.exporter import Exporter
from lab.traffic import HERE4, Listener, nowhere, sysctl
from tools import (
    UNTRACED,
    Tool,
    barest,
    bpftrace_keyed,
    counting,
    ours,
    with_program,
)
from tracing import Tracer, complain, tell, tell_versions
from turns import by_turns

from dtrace_exporter.tracing import program

DTRACE = "dtrace"
ENTRY = "fbt::tcp_conn_request:entry"
RETURN = "fbt::tcp_conn_request:return"
PORT, FOREIGN, WEB = 7001, 7002, 7003
MANY = range(7100, 7150)
FULL4 = "192.0.2.2"
"""The address of the listener on PORT whose Q is full."""
BACKLOG = 60_000
SYNS = 300
CONNECTIONS = 50
REPEATS = 15
REQUESTS, WARM = 10_000, 500
TURNS = 3

TAKEN, MANY_TAKEN, COOKIE = "taken", "taken, 50 listeners in turn", "answered by a cookie"
DROPPED, UNWATCHED, CONNECTION = "dropped, Q full", "of an unwatched port", "a whole connection"

FALSE = "clause whose predicate is false"
FALSE_PORT = "clause whose predicate reads the port"
LISTENER = "((struct sock *)arg2)"


def tools() -> list[Tool]:
    """Return the tools that are compared."""
    numbers = program.drop_counters([DTRACE])
    with_dtrace = partial(Tool, command=with_program(DTRACE), ready="ready")
    reads = f"{ENTRY} / {LISTENER}->__sk_common.skc_num == {PORT} /"
    return [
        UNTRACED,
        barest(DTRACE, ENTRY),
        with_dtrace(FALSE, text=counting(f"{ENTRY} / arg2 == 1 /")),
        with_dtrace(FALSE_PORT, text=counting(reads)),
        bpftrace_keyed("kprobe:tcp_conn_request", "arg2"),
        Tool("tcpaccept.bt", ["bpftrace", "/usr/sbin/tcpaccept.bt"], None, "Tracing"),
        Tool("tcpsynbl.bt", ["bpftrace", "/usr/sbin/tcpsynbl.bt"], None, "Tracing"),
        ours(DTRACE, "linux", numbers=numbers),
        ours(DTRACE, "linux", PORT, numbers),
        ours(DTRACE, "linux", PORT, numbers, handshake=True),
        with_dtrace("linux_calls.d", text=program.load("linux_calls").text),
    ]


def pieces() -> list[tuple[str, str, str]]:
    """Return the pieces of a program: for each its name, a program with it, and one without it.

    The program without it is that of another piece, by name; an empty name means none.
    """
    base = "a probe at entry whose clause does nothing"
    action = "this->x = arg2;"
    keys = "this->x, 10, this->x & 1, this->x & 3"

    def text(more: str, others: str = "") -> str:
        return (
            "#pragma D option quiet\nthis uint64_t x, y;\nuint64_t known[uint64_t], few[1024];\n"
            f'BEGIN {{ known[0] = 1; few[0] = 1; printf("ready\\n"); }}\n'
            f"{ENTRY} {{ {action} {more} }}\n{others}"
        )

    read = f"this->y = *(uint64_t *)&{LISTENER}->sk_ack_backlog;"
    return [
        (base, text(""), ""),
        (
            "a probe at return whose clause does nothing",
            text("", f"{RETURN} {{ this->y = 1; }}"),
            base,
        ),
        ("one more clause", text("", f"{ENTRY} {{ this->y = 1; }}"), base),
        (
            "one more clause whose predicate is false",
            text("", f"{ENTRY} / this->x == 1 / {{ this->y = 1; }}"),
            base,
        ),
        ("a read of the kernel's memory", text(read), base),
        ("timestamp", text("this->y = timestamp;"), base),
        ("a read of an array by number", text("this->y = few[this->x & 1023];"), base),
        ("a read of an associative array", text("this->y = known[this->x];"), base),
        ("a store to an associative array", text("known[this->x] = 1;"), base),
        ("@ = count()", text("@ = count();"), base),
        ("@[one word] = count()", text("@[this->x] = count();"), base),
        ("@[four words] = sum()", text(f"@[{keys}] = sum(this->x);"), base),
        ("@[two words] = max()", text("@[this->x, this->x & 1] = max(this->x);"), base),
    ]


@dataclass
class Event:
    """An event whose cost is measured.

    Attributes:
        name: its name.
        make: makes a number of these events; returns the nanoseconds for each.
        count: how many are made at once.
        cookies: the value of the kernel's net.ipv4.tcp_syncookies meanwhile.
        after: is called when the measurement is over.
    """

    name: str
    make: Callable[[int], float]
    count: int
    cookies: int
    after: Callable[[int], None] = lambda _: None

    def measure(self, tool: str, tracer: Tracer | None) -> None:
        """Report what it costs in total, and in a tool's own BPF programs."""
        whole, programs, runs = [], [], []
        with sysctl("net.ipv4.tcp_syncookies", self.cookies):
            self._make()
            for _ in range(REPEATS):
                whole.append(self._make())
                drain(tracer)
            tell(event="whole", tool=tool, what=self.name, ns=whole)
            if tracer is None:
                return
            with bpf.statistics():
                self._make()
                for _ in range(REPEATS):
                    before = bpf.totals()
                    self.make(self.count)
                    after = bpf.totals()
                    programs.append((after.ns - before.ns) / self.count)
                    runs.append((after.runs - before.runs) / self.count)
                    self.after(self.count)
                    drain(tracer)
            tell(event="programs", tool=tool, what=self.name, ns=programs, runs=runs)

    def _make(self) -> float:
        took = self.make(self.count)
        self.after(self.count)
        return took


def drain(tracer: Tracer | None) -> None:
    """Read what a tool has printed."""
    if tracer is not None:
        tracer.read(0.02)


@contextmanager
def events() -> Iterator[list[Event]]:
    """Open listeners, and yield the events that can happen to them."""
    subprocess.run(["ip", "address", "add", f"{FULL4}/32", "dev", "nowhere"], check=True)
    listeners = [Listener(port, BACKLOG, HERE4) for port in (PORT, FOREIGN, *MANY)]
    full = Listener(PORT, 2, FULL4)
    clients = [socket.create_connection((FULL4, PORT)) for _ in range(3)]
    kept, cookies = Flood(HERE4, [PORT]), Flood(HERE4, [PORT])
    many, foreign, dropped = Flood(HERE4, MANY), Flood(HERE4, [FOREIGN]), Flood(FULL4, [PORT])
    floods = (kept, cookies, many, foreign, dropped)
    cookies.keeps = foreign.keeps = dropped.keeps = False
    dropped.dropped = True
    try:
        yield [
            Event(TAKEN, kept.arrive, SYNS, 0, kept.take_back),
            Event(MANY_TAKEN, many.arrive, SYNS, 0, many.take_back),
            Event(COOKIE, cookies.arrive, SYNS, 2),
            Event(DROPPED, dropped.arrive, SYNS, 1),
            Event(UNWATCHED, foreign.arrive, SYNS, 2),
            Event(CONNECTION, partial(connections, listeners[0].socket), CONNECTIONS, 1),
        ]
    finally:
        for flood in floods:
            flood.close()
        for client in clients:
            client.close()
        for listener in (*listeners, full):
            listener.close()


def connections(server: socket.socket, count: int) -> float:
    """Make connections and accept them; return the time of one, in nanoseconds."""
    began = time.monotonic_ns()
    for _ in range(count):
        client = socket.create_connection(server.getsockname())
        server.accept()[0].close()
        client.close()
    return (time.monotonic_ns() - began) / count


def measure() -> None:
    """Report what each event costs with each tool, and what each piece of a program costs."""
    with events() as every:
        taken = every[0]
        names = {name: over for name, _, over in pieces()}

        def one(tool: Tool, tracer: Tracer | None) -> None:
            if tool.name in names:
                tell(event="over", tool=tool.name, over=names[tool.name])
                taken.measure(tool.name, tracer)
                return
            for event in every:
                event.measure(tool.name, tracer)

        parts = [Tool(name, with_program(DTRACE), text, "ready") for name, text, _ in pieces()]
        by_turns([*tools(), *parts], one)


NGINX = """daemon off; worker_processes 1; user root; pid {folder}/pid; error_log {folder}/log;
events {{ }}
http {{
    access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};
    fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
    server {{ listen {address}:{port}; location / {{ return 200 "hello\\n"; }} }}
}}
"""


def nginx() -> None:
    """Report how many requests nginx answers in a second, each over a new connection."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config"
        config.write_text(NGINX.format(folder=folder, address=HERE4, port=WEB))
        server = subprocess.Popen(["nginx", "-e", f"{folder}/log", "-c", config])
        try:
            time.sleep(2)
            requests(WARM)
            for _ in range(TURNS):
                tell(event="nginx", tool=UNTRACED.name, rate=requests(REQUESTS))
                with Exporter({"source": "dtrace"}) as exporter:
                    exporter.wait_ready()
                    requests(WARM)
                    tell(event="nginx", tool="dtrace-exporter", rate=requests(REQUESTS))
        finally:
            server.terminate()
            server.wait()


def requests(count: int) -> float:
    """Make requests; return how many were answered in a second."""
    done = subprocess.run(
        ["ab", "-q", "-n", str(count), "-c", "4", f"http://{HERE4}:{WEB}/"],
        capture_output=True,
        text=True,
        check=True,
    )
    failed, rate = (
        re.search(rf"^{name}: +([\d.]+)", done.stdout, re.MULTILINE)
        for name in ("Failed requests", "Requests per second")
    )
    if not failed or not rate or int(failed[1]):
        raise RuntimeError(done.stdout[-400:])
    return float(rate[1])


def main() -> None:
    """Measure everything that is counted in instructions."""
    tell_versions(DTRACE)
    with (
        nowhere(),
        sysctl("net.core.somaxconn", BACKLOG),
        sysctl("net.ipv4.tcp_max_syn_backlog", 2 * BACKLOG),
    ):
        for what in (measure, nginx):
            try:
                what()
            except Exception as error:
                complain(what.__name__, error)
    tell(event="end")


if __name__ == "__main__":
    main()
