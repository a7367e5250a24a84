"""Makes of a D program the text that a session runs: fills in numbers, leaves out parts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from dtrace_exporter.tracing.program import BEGIN, END, ONE_PORT, ONLY, Program, clauses

_OPTION = re.compile(r"#pragma D option (\w+)")
_HARMLESS = "#pragma D option destructive=unset"
_TICK = re.compile(r"\btick-1s\b")


@dataclass(frozen=True, slots=True)
class Window:
    """The timing of the two sets of aggregations, which take turns on Linux.

    A set is in use for two turns, and it is emptied one turn before its next use. The counts stay
    exact as long as the consumer is less than a turn late. So a consumer that has been silent for
    ``patience`` seconds, somewhat less than a turn, has to be ended. The programs for Sun's engine
    have no sets and lose nothing if they are late.

    Attributes:
        interval: the period of the heartbeat, in seconds.
        turn: the length of a turn, in nanoseconds.
        patience: for how long a session may be silent, in seconds.
    """

    interval: float
    turn: int
    patience: float


def window(interval: float) -> Window:
    """Return the timing for a heartbeat every ``interval`` seconds."""
    turn = max(30.0, 15 * interval)
    return Window(interval, round(turn * 1e9), turn * 5 / 6)


def render(
    program: Program,
    window: Window,
    port: int = 0,
    numbers: Mapping[str, int] | None = None,
    without: Collection[str] = (),
    options: Collection[str] = (),
) -> str:
    """Make a program ready to run.

    The text cannot take destructive actions, even if the program permits them: its last line
    forbids them, and DTrace obeys the last setting of an option, also over -x and -w. An empty line
    comes before it, in case the program ends in the middle of a line.

    Args:
        program: the program.
        window: its timing.
        port: the TCP port to watch, 0 for all ports.
        numbers: numbers that replace those of the file, by the inline's name.
        without: names of optional parts. They are left out, and so are the parts that need them.
        options: names of D options that the command line sets; their lines are removed.
    """
    without = program.with_dependents(without)
    if not port:
        without.add(ONE_PORT)
    filled = {
        "PORT": port,
        "TURN": window.turn,
        **(numbers or {}),
    }
    text = _without_probes(program, without)
    for name, value in filled.items():
        pattern = rf"^(inline \w+ {name} = )\w+;"
        text = re.sub(pattern, rf"\g<1>{value};", text, flags=re.MULTILINE)
    text = _TICK.sub(f"tick-{round(window.interval * 1000)}ms", text)
    lines = []
    skipped = ""
    for line in text.splitlines():
        if begin := BEGIN.search(line):
            skipped = begin[1] if begin[1] in without else skipped
        only = ONLY.search(line)
        option = _OPTION.match(line)
        if not (skipped or (only and only[1] in without) or (option and option[1] in options)):
            lines.append(line)
        if (end := END.search(line)) and end[1] == skipped:
            skipped = ""
    return "\n".join([*lines, "", _HARMLESS]) + "\n"


def _without_probes(program: Program, without: Collection[str]) -> str:
    """Return a program's text without the probes of some parts, and without empty clauses."""
    gone = {
        probe
        for name in without
        if name in program.family.parts
        for probe in program.family.parts[name].probes
    }
    if not gone:
        return program.text
    lines: list[str] = []
    for probes, clause in clauses(program.text):
        kept = [probe for probe in probes if not gone & {probe, probe.partition(":")[0]}]
        if probes and not kept:
            continue
        if len(kept) < len(probes):
            clause[:1] = [", ".join(f"fbt::{probe}" for probe in kept)]
            header = next(at for at, line in enumerate(clause) if line[:1] in "/{")
            del clause[1:header]
        lines += clause
    return "\n".join(lines) + "\n"
