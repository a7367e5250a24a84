"""What is compared, and how to read from what a tool has printed how many SYNs it saw."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dtrace_exporter.listeners import ListenerTable, SessionId
from dtrace_exporter.tracing import program, rendering
from dtrace_exporter.tracing.rows import RowError
from dtrace_exporter.tracing.tally import Tally


@dataclass(frozen=True)
class Tool:
    """Something that watches SYNs.

    Attributes:
        name: what it is called.
        command: how to start it; none for no tool at all.
        text: its program, for standard input; None for none.
        ready: an expression that its output has once every probe is enabled.
        seen: how many SYNs it told in an output, None where it tells none.
        settle: seconds that it takes from then until it does as it always does.
        port_only: whether it tells SYNs of one port only.
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
    """Return the least that a clause can do; what it counted is printed once a second."""
    return Tool("barest clause", with_program(dtrace), counting(probe), "ready", counted)


def counting(probe: str) -> str:
    """Return a program that counts what comes by a probe, which may have a predicate."""
    return (
        "#pragma D option quiet\n"
        'BEGIN { printf("ready\\n"); }\n'
        f"{probe} {{ @ = count(); }}\n"
        'tick-1s, END { printa("count %@d\\n", @); }\n'
    )


def ours(dtrace: str, name: str, port: int = 0, numbers: dict[str, int] | None = None) -> Tool:
    """Return one of our programs, all parts on, as a session would run it.

    Args:
        dtrace: the command.
        name: the program's.
        port: the one that it watches, 0 for all.
        numbers: those of the kernel, as rendering.render takes them.
    """
    text = rendering.render(program.load(name), rendering.window(1), port, numbers)
    which = "per-port" if port else "shared"
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
    """Return bpftrace's count by a key; it is printed once a second."""
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
    """Return how many SYNs the rows of one of our programs tell, all that it printed."""
    session = SessionId("", "all")
    table = ListenerTable()
    table.watch(session, None)
    reader = Tally(table, session)
    for line in output.splitlines():
        try:
            reader.feed(line)
        except RowError:
            continue
    return sum(listener.syns for listener in table)


def counted(output: str) -> int:
    """Return what the barest clause told last."""
    found = re.findall(r"^count (\d+)$", output, re.MULTILINE)
    return int(found[-1]) if found else 0


def sum_of_keys(output: str) -> int:
    """Return the sum of what bpftrace told last for each key."""
    last = dict(re.findall(r"^@\[(.*?)\]: (\d+)$", output, re.MULTILINE))
    return sum(map(int, last.values()))
