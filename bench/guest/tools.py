"""The tools that are compared, and how to read from their output how many SYNs they saw."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dtrace_exporter.config import DTraceConfig
from dtrace_exporter.listeners import ListenerTable, SessionId
from dtrace_exporter.tracing import program
from dtrace_exporter.tracing.plan import Plan
from dtrace_exporter.tracing.rows import RowError
from dtrace_exporter.tracing.tally import Tally
from dtrace_exporter.watched import Watched


@dataclass(frozen=True)
class Tool:
    """A tool that watches SYNs.

    Attributes:
        name: its name.
        command: how to start it; empty for no tool.
        text: its program, for the standard input; None for none.
        ready: an expression that matches its output once all probes are enabled.
        seen: returns how many SYNs an output reports; None if the tool reports none.
        settle: how many seconds it needs after that until it works as usual.
        port_only: whether it reports SYNs of one port only.
    """

    name: str
    command: Sequence[str]
    text: str | None
    ready: str
    seen: Callable[[str], int] | None = None
    settle: float = 1.0
    port_only: bool = False


UNTRACED = Tool("untraced", (), None, "")


def barest(dtrace: str, probe: str) -> Tool:
    """Return a clause that does the least possible; its count is printed once a second."""
    return Tool("barest clause", with_program(dtrace), counting(probe), "ready", counted)


def counting(probe: str) -> str:
    """Return a program that counts how often a probe fires, which may have a predicate."""
    return (
        "#pragma D option quiet\n"
        'BEGIN { printf("ready\\n"); }\n'
        f"{probe} {{ @ = count(); }}\n"
        'tick-1s, END { printa("count %@d\\n", @); }\n'
    )


def ours(
    dtrace: str,
    name: str,
    port: int = 0,
    numbers: dict[str, int] | None = None,
    *,
    handshake: bool = False,
) -> Tool:
    """Return one of our programs as a session with the default configuration runs it.

    Args:
        dtrace: the command.
        name: the name of the program.
        port: the port that it watches, 0 for all.
        numbers: the kernel's numbers, as for rendering.render().
        handshake: whether it measures how long handshakes take.
    """
    chosen = program.load(name)
    plan = Plan(DTraceConfig(handshake=handshake), chosen, port, numbers or {})
    text = plan.render(chosen, plan.switched_off)
    which = ("per-port" if port else "shared") + (", with handshake" if handshake else "")
    command = with_program(dtrace)
    return Tool(f"{name}.d, {which}", command, text, "tick", rows_seen, 4.0, bool(port))


def printf_per_syn(dtrace: str, text: str) -> Tool:
    """Return a D program that prints a line for each SYN."""
    return Tool(
        "printf per SYN",
        with_program(dtrace),
        text,
        "TS,",
        lambda output: output.count(",syn,"),
        port_only=True,
    )


def bpftrace_keyed(probe: str, key: str) -> Tool:
    """Return a bpftrace program that counts by a key; it prints once a second."""
    text = f"{probe} {{ @[{key}] = count(); }} interval:s:1 {{ print(@); }}"
    return Tool("bpftrace, keyed count", ["bpftrace", "-e", text], None, "Attach", sum_of_keys)


def bpftrace_printf(probe: str, key: str) -> Tool:
    """Return a bpftrace program that prints a line for each SYN."""
    text = f'{probe} {{ printf("syn %lx\\n", {key}); }}'
    return Tool(
        "bpftrace, printf per SYN",
        ["bpftrace", "-e", text],
        None,
        "Attach",
        lambda output: output.count("syn "),
    )


def with_program(dtrace: str) -> list[str]:
    """Return a command that runs a D program from its standard input."""
    return [dtrace, "-q", "-x", "aggsize=8m", "-s", "/dev/stdin"]


def rows_seen(output: str) -> int:
    """Return how many SYNs all rows of one of our programs report."""
    session = SessionId("", "all")
    table = ListenerTable()
    table.watch(session, Watched())
    reader = Tally(table, session)
    for line in output.splitlines():
        try:
            reader.feed(line)
        except RowError:
            continue
    return sum(listener.syns for listener in table)


def counted(output: str) -> int:
    """Return the last count of the barest clause."""
    found = re.findall(r"^count (\d+)$", output, re.MULTILINE)
    return int(found[-1]) if found else 0


def sum_of_keys(output: str) -> int:
    """Return the sum of bpftrace's last counts of all keys."""
    last = dict(re.findall(r"^@\[(.*?)\]: (\d+)$", output, re.MULTILINE))
    return sum(map(int, last.values()))
