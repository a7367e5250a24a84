"""On the models of Solaris: what a SYN costs in the kernel, what is lost, what user space takes."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lab.exporter import Exporter
from lab.model import DTRACE, Model
from rounds import Account, by_turns, costs, losses, rates, settle
from tools import (
    UNTRACED,
    Tool,
    barest,
    bpftrace_keyed,
    bpftrace_printf,
    ours,
    printf_per_syn,
    with_program,
)
from tracing import Tracer, complain, cpu_seconds, tell, tell_versions

PORT = 80
CALLS = 20_000
ROUNDS = 2
REPEATS = 10
RATES = (1_000, 10_000, 100_000)
IDLE_SECONDS = 30

ENTRIES = {
    "illumos": "fbt:ip:tcp_input_listener:entry",
    "solaris10": "fbt:ip:tcp_conn_request:entry",
}
ENTRY = ENTRIES["illumos"]
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


class ModelLoad:
    """SYNs of a listener of the model; the kernel itself times a burst of them."""

    def __init__(self, model: Model, name: str) -> None:
        self._model, self._name = model, name

    def burst(self, syns: int) -> float:
        """Make SYNs; return how long one took, in nanoseconds."""
        self._model.run(f"burst {self._name} {syns}")
        return self._model.burst_nanoseconds() / syns

    def made(self) -> int:
        """Return how many SYNs all listeners have had."""
        return sum(int(totals["syns"]) for totals in self._model.all_totals())


def pieces() -> list[tuple[str, Tool]]:
    """Return a program for each piece that a SYN is made of, with those before it."""
    header = "((mblk_t *)arg1)->b_rptr + ((ip_recv_attr_t *)arg3)->ira_ip_hdr_length"
    queue = "((conn_t *)arg0)->conn_proto_priv.cp_tcp->tcp_conn_req_cnt_q"
    body = ""
    found = []
    for piece, name, action in (
        ("nothing", "a clause that does nothing", "this->x = 1;"),
        ("read", "and reads whether it is a SYN, and Q", f"this->x += *({header} + 13) + {queue};"),
        ("life", "and looks its listener up", "this->x += life[(conn_t *)arg0];"),
        ("thread", "and notes it for its thread", "syn[curthread] = arg0;"),
        ("count", "and counts by two words", "@[arg0, this->x] = count();"),
    ):
        body = f"{body} {action}"
        text = (
            "#pragma D option quiet\n"
            "uint64_t life[conn_t *];\nuint64_t syn[kthread_t *];\nthis uint64_t x;\n"
            f'BEGIN {{ printf("ready\\n"); }}\n{ENTRY} {{ {body} }}\n'
        )
        found.append((piece, Tool(name, with_program(DTRACE), text, "ready")))
    return found


def illumos_tools() -> list[Tool]:
    """Return all that is compared on the model of illumos."""
    probe = "kprobe:tcp_input_listener"
    return [
        UNTRACED,
        barest(DTRACE, ENTRY),
        ours(DTRACE, "illumos"),
        ours(DTRACE, "illumos", PORT),
        printf_per_syn(DTRACE, SEED),
        bpftrace_keyed(probe, "arg0"),
        bpftrace_printf(probe, "arg0"),
    ]


def solaris10_tools() -> list[Tool]:
    """Return what is compared on the model of Solaris 10."""
    return [
        UNTRACED,
        barest(DTRACE, ENTRIES["solaris10"]),
        ours(DTRACE, "solaris10"),
        bpftrace_keyed("kprobe:ip:tcp_conn_request", "arg0"),
    ]


def measure(model: Model, tools: Sequence[Tool], parts: Sequence[tuple[str, Tool]] = ()) -> None:
    """Measure tools on a model: costs in every round, losses in the first, by rate in the next."""
    where = model.generation
    web, full = ModelLoad(model, "web"), ModelLoad(model, "full")
    piece_of = {tool.name: piece for piece, tool in parts}

    def one(tool: Tool, tracer: Tracer | None, number: int) -> None:
        account = Account(web, tool, tracer, web.made())
        settle(web, tool, tracer)
        ns = costs(web, tracer, CALLS, REPEATS)
        if tool.name in piece_of:
            tell(event="piece", tool=tool.name, piece=piece_of[tool.name], ns=ns)
            return
        tell(event="cost", where=where, tool=tool.name, ns=ns)
        if number == 0:
            losses(where, web, tool, account)
        if number == 1 and where == "illumos":
            rates(where, web, tool, tracer, account, RATES)
        tell(event="dropped", where=where, tool=tool.name, ns=costs(full, tracer, CALLS, REPEATS))

    by_turns([*tools, *(tool for _, tool in parts)], ROUNDS, one)


def listeners(model: Model) -> None:
    """Have a listener with room and one whose Q is full."""
    model.run("q0max 0 1000000", f"listen web zone 0 address * port {PORT} backlog 128")
    model.run("syn web count 5")
    model.run("listen full zone 0 address * port 81 backlog 2", "syn full count 2")
    model.run("ack full count 2")
    # What this kernel itself does for a SYN is at its least when it has no memory for it.
    model.run(f"alloc_fail {2**31 - 1}")


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
            model.run("burst web 100000")
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
                model.run("burst web 200")
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
    """Measure everything on the models."""
    tell_versions("dtrace")
    with Model("illumos") as model:
        listeners(model)
        measure(model, illumos_tools(), pieces())
        try:
            user_space(model)
        except Exception as error:
            complain("user space", error)
    with Model("solaris10") as model:
        listeners(model)
        measure(model, solaris10_tools())
    tell(event="end")


if __name__ == "__main__":
    main()
