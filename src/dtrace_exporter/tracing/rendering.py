"""How a D program becomes the text that a session runs: numbers, period, and parts left out."""

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
    """Timing of the two sets of aggregations, which take turns.

    A set is emptied while it is at rest. What a consumer counts stays exact as long as it is never
    later than the rest that is left then; so one that is silent for ``patience`` seconds, less than
    that, has to be ended.

    ``turn`` is in nanoseconds: a set is in use for two turns and emptied one turn before its next
    use. The programs for Sun's engine have no sets, and lose nothing by being late.
    """

    interval: float
    turn: int
    patience: float


def window(interval: float) -> Window:
    """Choose the timing for a tick of ``interval`` seconds."""
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

    Whatever it says, it cannot take destructive actions: DTrace obeys the last word on an option,
    of all that is included or given with -x or -w, and that is its last line. Before it is an empty
    one, should the program end in the middle of a line.

    Args:
        program: the program.
        window: its timing.
        port: the one to watch, 0 for all.
        numbers: those of the kernel, by inline's name, that are other than in the file.
        without: optional parts to leave out, and with them those that rest on them.
        options: names of D options that are set on the command line and so not in the program.
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
    """Return a program's text less the probes of some parts, and the clauses left without any."""
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
