"""On the model of illumos: what a SYN costs in the kernel, what is lost, what user space takes."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab.exporter import Exporter
from lab.model import DTRACE, Model
from tracing import Tracer, complain, cpu_seconds, running, tell

from dtrace_exporter import program
from dtrace_exporter.listeners import ListenerTable, SessionId
from dtrace_exporter.rows import Calm, Place, Ready, Row, RowError, Tick, parse
from dtrace_exporter.tally import Tally

PORT = 80
CALLS = 20_000
REPEATS = 31
BURSTS = (1_000, 10_000, 1_000_000)
RATES = (1_000, 10_000, 100_000)
RATE_SECONDS = 3
IDLE_SECONDS = 30

ENTRY = "fbt:ip:tcp_input_listener:entry"
SEED = """#pragma D option quiet
BEGIN { printf("TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax\\n"); }
fbt:ip:tcp_input_listener:entry
{
    self->tcpq = ((conn_t *)arg0)->conn_proto_priv.cp_tcp;
    self->lport = ntohs(((conn_t *)arg0)->u_port.connu_ports.connu_lport);
}
fbt:ip:tcp_input_listener:entry
/ self->lport == 80 /
{
    printf("%d,%Y,%s,0x%08x,%d,%d,%d,%d,%d\\n", timestamp, walltimestamp, "syn", 0, 0, self->lport,
        self->tcpq->tcp_conn_req_cnt_q0, self->tcpq->tcp_conn_req_cnt_q,
        self->tcpq->tcp_conn_req_max);
}
fbt:ip:tcp_input_listener:return / self->lport / { self->tcpq = 0; self->lport = 0; }
"""
BAREST = f"""#pragma D option quiet
BEGIN {{ printf("ready\\n"); }}
{ENTRY} {{ @ = count(); }}
END {{ printa("count %@d\\n", @); }}
"""


# What a SYN on the short way is made of, each with all that is above it.
PIECES = {
    "a clause that does nothing": "this->x = 1;",
    "and reads five fields": " ".join(
        f"this->x += (uint64_t)((conn_t *)arg0)->conn_proto_priv.cp_tcp->{field};"
        for field in ("tcp_conn_req_cnt_q0", "tcp_conn_req_cnt_q")
    )
    + " this->x += ((conn_t *)arg0)->conn_cpid;",
    "and counts by two words": "@[arg0, this->x] = count();",
}


def pieces() -> dict[str, str]:
    """Return a program for each piece, by its name."""
    begin = '#pragma D option quiet\nthis uint64_t x;\nBEGIN { printf("ready\\n"); }\n'
    found, body = {}, ""
    for name, more in PIECES.items():
        body = more if not body else f"{body} {more}"
        found[name] = f"{begin}{ENTRY} {{ {body} }}\n"
    last = found["and counts by two words"]
    found["and four more clauses whose predicate is false"] = (
        last + f"{ENTRY} / this->x == 0 / {{ this->x = 2; }}\n" * 4
    )
    return found


@dataclass(frozen=True)
class Tool:
    """Something that watches SYNs, and how to read from its output how many it saw."""

    name: str
    command: list[str]
    text: str | None
    ready: str
    seen: Callable[[str], int]
    settle: float = 1.0


def rows_seen(output: str) -> int:
    """Return how many SYNs the rows of one of our programs tell."""
    session = SessionId("", "all")
    table = ListenerTable()
    table.watch(session, None)
    tally = Tally(table, session)
    for line in output.splitlines():
        try:
            match parse(line):
                case Row() as row:
                    tally.row(row)
                case Calm() as calm:
                    tally.calm(calm)
                case Tick() as tick:
                    tally.tick(tick)
                case Ready() as ready:
                    tally.ready(ready)
                case Place() as place:
                    tally.place(place)
        except RowError:
            continue
    return sum(listener.syns for listener in table)


def number_behind(pattern: str) -> Callable[[str], int]:
    """Return a function that reads the last number behind a pattern."""

    def seen(output: str) -> int:
        found = re.findall(pattern, output)
        return int(found[-1]) if found else 0

    return seen


def ours(ports: tuple[int, int]) -> str:
    """Return illumos.d, all parts on, as a session would run it."""
    return program.render(program.load("illumos"), program.window(1), ports=ports)


def tools() -> list[Tool]:
    """Return all that is compared, the barest first."""
    stdin = [DTRACE, "-q", "-x", "aggsize=8m", "-s", "/dev/stdin"]
    bpftrace = ["bpftrace", "-e"]
    probe = "kprobe:tcp_input_listener"
    keyed = f"{probe} {{ @[arg0] = count(); }}"
    printing = f'{probe} {{ printf("syn %lx\\n", arg0); }}'
    attached = "Attach"
    return [
        Tool("barest clause", stdin, BAREST, "ready", number_behind(r"count (\d+)")),
        Tool("illumos.d, shared", stdin, ours((0, 65535)), "tick", rows_seen, 4.0),
        Tool("illumos.d, per-port", stdin, ours((PORT, PORT)), "tick", rows_seen, 4.0),
        Tool("printf per SYN", stdin, SEED, "TS,", lambda output: output.count(",syn,")),
        Tool(
            "bpftrace, keyed count", [*bpftrace, keyed], None, attached, number_behind(r": (\d+)")
        ),
        Tool(
            "bpftrace, printf",
            [*bpftrace, printing],
            None,
            attached,
            lambda output: output.count("syn "),
        ),
    ]


def burst(model: Model, name: str, calls: int) -> float:
    """Return how long a call took, in nanoseconds."""
    model.run(f"burst {name} {calls}")
    return model.burst_nanoseconds() / calls


def settle(model: Model, name: str, tracer: Tracer | None, seconds: float) -> None:
    """Let some SYNs come, so that a tracer has met the listener."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        model.run(f"syn {name}")
        if tracer is not None:
            tracer.wait(0.2)


def costs(model: Model, name: str, tracer: Tracer | None, seconds: float) -> list[float]:
    """Return the time of a SYN in each of some bursts, in nanoseconds."""
    settle(model, name, tracer, seconds)
    found = []
    for _ in range(REPEATS):
        found.append(burst(model, name, CALLS))
        if tracer is not None:
            tracer.read(0.02)
    return found


def measure_tool(model: Model, tool: Tool) -> None:
    """Measure one tool: costs, then losses."""
    with running(tool.command, tool.text, tool.ready, tool.settle) as tracer:
        tell(event="cost", tool=tool.name, ns=costs(model, "web", tracer, tool.settle))
        model.run("reclaim 0 0")
        tell(event="dropped", tool=tool.name, ns=costs(model, "full", tracer, 0))
        model.run("reclaim 0 1")
    for calls in BURSTS:
        with running(tool.command, tool.text, tool.ready, tool.settle) as tracer:
            before = model.totals("web")["syns"]
            burst(model, "web", calls)
            tracer.drain() if "printf" in tool.name else tracer.wait(2.5)
            made = model.totals("web")["syns"] - before
            tell(event="loss", tool=tool.name, made=made, seen=tool.seen(tracer.end()))


def measure_rates(model: Model, tool: Tool) -> None:
    """Measure what one tool loses at each rate, SYNs coming in tenths of a second's worth."""
    for rate in RATES:
        with running(tool.command, tool.text, tool.ready, tool.settle) as tracer:
            before = model.totals("web")["syns"]
            due = time.monotonic()
            for _ in range(RATE_SECONDS * 10):
                burst(model, "web", rate // 10)
                due += 0.1
                tracer.wait(max(0.0, due - time.monotonic()))
            tracer.drain() if "printf" in tool.name else tracer.wait(2.5)
            made = model.totals("web")["syns"] - before
            seen = tool.seen(tracer.end())
            tell(event="rate", tool=tool.name, rate=rate, made=made, seen=seen)


def user_space(model: Model) -> None:
    """CPU time of the exporter and its dtrace(1), and of the seed's script with wc -l."""
    config = {
        "source": "dtrace",
        "dtrace": {"command": [DTRACE], "program": "illumos"},
        "listeners": [{"port": PORT, "name": "web"}],
    }
    exporter = Exporter(config)
    try:
        exporter.wait_ready()
        pids = [exporter.process.pid, *exporter.pids()]
        before = sum(map(cpu_seconds, pids))
        time.sleep(IDLE_SECONDS)
        idle = sum(map(cpu_seconds, pids)) - before
        tell(event="idle", seconds=IDLE_SECONDS, cpu=idle)
        before = sum(map(cpu_seconds, pids))
        for _ in range(10):
            burst(model, "web", 100_000)
        time.sleep(2.5)
        used = sum(map(cpu_seconds, pids)) - before
        tell(event="user", tool="exporter and dtrace(1)", cpu=used, made=1_000_000)
    finally:
        exporter.stop()
    with tempfile.TemporaryDirectory() as directory:
        count = Path(directory) / "count"
        with count.open("w") as out:
            lines = subprocess.Popen(["wc", "-l"], stdin=subprocess.PIPE, stdout=out)
        assert lines.stdin is not None
        seed = subprocess.Popen(
            [DTRACE, "-s", "/dev/stdin"], stdin=subprocess.PIPE, stdout=lines.stdin
        )
        assert seed.stdin is not None
        seed.stdin.write(SEED.encode())
        seed.stdin.close()
        try:
            # It says nothing that can be waited for: its output is wc's.
            time.sleep(20)
            pids = [seed.pid, lines.pid]
            before = sum(map(cpu_seconds, pids))
            # No faster than it can print, for what is lost costs it nothing.
            for _ in range(100):
                burst(model, "web", 200)
                time.sleep(0.25)
            time.sleep(2.5)
            used = sum(map(cpu_seconds, pids)) - before
            lines.stdin.close()
        finally:
            seed.terminate()
            seed.wait(60)
            lines.wait(60)
        # Without its heading and the empty line at its end.
        seen = int(count.read_text()) - 2
        tell(event="user", tool="printf and wc -l", cpu=used, made=20_000, seen=seen)


def main() -> None:
    """Measure everything on the model."""
    with Model("illumos") as model:
        model.run("q0max 0 1000000", f"listen web zone 0 address * port {PORT} backlog 128")
        # What this kernel itself does for a SYN is at its least when it refuses it at once.
        model.run("syn web count 5", "reclaim 0 1")
        model.run("listen full zone 0 address * port 81 backlog 2")
        model.run("reclaim 0 0", "syn full count 2", "ack full count 2", "reclaim 0 1")
        tell(event="cost", tool="untraced", ns=costs(model, "web", None, 0))
        model.run("reclaim 0 0")
        tell(event="dropped", tool="untraced", ns=costs(model, "full", None, 0))
        model.run("reclaim 0 1")
        for tool in tools():
            try:
                measure_tool(model, tool)
                if "per-port" not in tool.name:
                    measure_rates(model, tool)
            except Exception as error:
                complain(tool.name, error)
        tell(event="cost", tool="untraced", ns=costs(model, "web", None, 0))
        for name, text in pieces().items():
            with running([DTRACE, "-s", "/dev/stdin"], text, "ready") as tracer:
                tell(event="piece", tool=name, ns=costs(model, "web", tracer, 0))
        tell(event="piece", tool="untraced", ns=costs(model, "web", None, 0))
        try:
            user_space(model)
        except Exception as error:
            complain("user space", error)
    tell(event="end")


if __name__ == "__main__":
    sys.path.insert(0, ".")
    main()
