"""The D programs: which one a host needs, its optional parts, and the numbers to fill in.

A program is complete as it lies in programs/. What differs from host to host are numbers in lines
``inline TYPE NAME = ...;``, the period of its ``tick-`` probes, and optional parts that not every
kernel can do: probes that the family's facts give to a part, lines from ``/* begin PART */`` to
``/* end PART */``, and any ``/* only PART */``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from dtrace_exporter.families import Family, families
from dtrace_exporter.listeners import Exports
from dtrace_exporter.tracing import btf, rows

KERNEL_TYPES = Path("/sys/kernel/btf/vmlinux")

_BEGIN = re.compile(r"/\* begin (\w+) \*/")
_END = re.compile(r"/\* end (\w+) \*/")
_PLACE = re.compile(r"/\* place (netns|zone) \*/")
_ONLY = re.compile(r"/\* only (\w+) \*/")
# Lines that only a session of one port needs: a test costs every SYN of all others some time.
_ONE_PORT = "one_port"
# Parts without which some listeners' connections go into Q or leave it uncounted.
_MOVES = ("streams", "deferred", "tli_accepts")
_OPTION = re.compile(r"#pragma D option (\w+)")
_HARMLESS = "#pragma D option destructive=unset"
_TICK = re.compile(r"\btick-1s\b")
# A line of the program; one of DTrace's libraries comes behind its file's name in quotes.
_LINE = re.compile(r'(?<!", )\bline (\d{1,9})\b')
# What Sun's DTrace says, of no line, where a program needs more than there is: the kernel's
# dtrace_dof_maxsize, the registers of its virtual machine or those of the compiler.
_TOO_LARGE = re.compile(
    r"DIF program exceeds maximum program size|DIF program content is invalid"
    r"|[Ii]nsufficient (?:tuple )?registers"
)
_NEEDS = re.compile(r"/\* (\w+) needs ([\w, ]+) \*/")
# It begins where a word does, so that each is looked through but a few times.
_PROBE = re.compile(r"(?<!\w)\w*:\w*:(?:([\w.*]+):(?:entry|return)\b|[\w.]*:(\w+))")
# An error is about one.
_MOST_PROBES = 10
# A probe of a function where the facts give it to a part.
_FUNCTION = re.compile(r"fbt::([\w*]+):(entry|return)")


class ProgramError(Exception):
    """No program for this system, or one that cannot be read."""


@dataclass(frozen=True, slots=True)
class Program:
    """A D program as it lies in its file.

    ``name`` is one of the names in the configuration, or a path.
    """

    name: str
    text: str

    @property
    def family(self) -> Family:
        """The kernel family whose facts hold; of a program at some path the likeliest."""
        every = families()
        name = self.name.removesuffix("_trace")
        if name in every:
            return every[name]
        likely = [family for family in every.values() if family.place == self.place_label]
        return max(likely, key=lambda family: f"{family.name}.d" in self.text)

    @property
    def calls(self) -> str:
        """The name of the program that has to run beside it, once a host; empty if none."""
        calls = self.family.calls
        return calls if f"ready {rows.PROTOCOL} " in self.text and self.name != calls else ""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the optional parts that it has, in their order."""
        marked = [*_BEGIN.findall(self.text), *_ONLY.findall(self.text)]
        probed = {function for function, _ in _FUNCTION.findall(self.text)}
        facts = {
            name: (part.probes and {probe.partition(":")[0] for probe in part.probes} <= probed)
            or (name == "syn_drops" and self.needs_drop_counters)
            for name, part in self.family.parts.items()
        }
        order = [name for name, has in facts.items() if has or name in marked]
        return (*order, *dict.fromkeys(name for name in marked if name not in (*order, _ONE_PORT)))

    def with_dependents(self, parts: Collection[str]) -> set[str]:
        """Return optional parts and those that rest on them, by the facts or the text itself."""
        needs = {name: {*part.needs} for name, part in self.family.parts.items()}
        needs |= {part: set(words.split(", ")) for part, words in _NEEDS.findall(self.text)}
        found = {*parts}
        while more := {part for part, need in needs.items() if need & found} - found:
            found |= more
        return found & {*parts, *self.parts}

    @property
    def place_label(self) -> str:
        """The label of a listener's place, netns or zone, from ``/* place LABEL */``."""
        if self.name in families():
            return families()[self.name].place
        found = _PLACE.search(self.text)
        return found[1] if found else "netns"

    @property
    def needs_drop_counters(self) -> bool:
        """Whether it tells drops by the kernel's counters, as drop_counters() numbers them."""
        return "inline int LISTENDROPS " in self.text


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


def runs_here(command: Sequence[str]) -> bool:
    """Tell whether a command's dtrace(1) traces this kernel; by ssh(1) it is another host's."""
    return Path(command[0]).name != "ssh"


def local(command: Sequence[str]) -> str:
    """Return the name of the only program that a command's system can need; empty if not known.

    Solaris and illumos have the same system name; dtrace.find_program() tells them apart.
    """
    return "linux" if sys.platform == "linux" and runs_here(command) else ""


def load(name: str) -> Program:
    """Read a program.

    Args:
        name: the program's name, or an absolute path.

    Raises:
        ProgramError: the file cannot be read.
    """
    resource = Path(name) if "/" in name else files("dtrace_exporter") / "programs" / f"{name}.d"
    try:
        return Program(name, resource.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ProgramError(f"cannot read the D program {name}: {reason}") from None


def drop_counters(command: Sequence[str]) -> dict[str, int]:
    """Return where a command's kernel counts its drops, by inline's name; nothing if not known."""
    name = local(command)
    wanted = families()[name].drop_counters if name else {}
    if not wanted:
        return {}
    try:
        found = btf.enumerators(KERNEL_TYPES, list(wanted.values()))
    except (OSError, btf.BTFError):
        return {}
    if len(found) < len(wanted):
        return {}
    return {inline: found[constant] for inline, constant in wanted.items()}


def no_drop_counters() -> dict[str, int]:
    """Return numbers with which a program sees no drop, for kernels whose own are not known.

    Number 0 of enum LINUX_MIB_* is none: that counter stands still.
    """
    return {name: 0 for family in families().values() for name in family.drop_counters}


def offsets(configured: Mapping[str, int]) -> dict[str, int]:
    """Return offsets of struct members, as the configuration names them, by inline's name."""
    return {name.upper(): value for name, value in configured.items()}


def load_trace(name: str) -> Program:
    """Read the program that prints a line for each event where the named one counts them.

    Args:
        name: the program's name, or the absolute path of one that prints such lines itself.

    Raises:
        ProgramError: the file cannot be read.
    """
    return load(name if "/" in name else f"{name}_trace")


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
        without.add(_ONE_PORT)
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
        if begin := _BEGIN.search(line):
            skipped = begin[1] if begin[1] in without else skipped
        only = _ONLY.search(line)
        option = _OPTION.match(line)
        if not (skipped or (only and only[1] in without) or (option and option[1] in options)):
            lines.append(line)
        if (end := _END.search(line)) and end[1] == skipped:
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


def clauses(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """Divide a program's text into its clauses of fbt and what is between them.

    Yields:
        Of a clause its probes as ``function:entry``, and its lines; no probes for other lines.
    """
    lines = iter(text.splitlines())
    for line in lines:
        if not line.startswith("fbt::"):
            yield [], [line]
            continue
        clause = [line]
        while not (clause[-1] == "}" or (clause[-1].endswith("}") and "{" in clause[-1])):
            clause.append(next(lines))
        head = "\n".join(clause).partition("\n/ ")[0].partition("{")[0]
        yield [f"{function}:{end}" for function, end in _FUNCTION.findall(head)], clause


def blame(message: str, text: str, family: Family) -> str | None:
    """Tell which optional part of a rendered program an error of dtrace(1) is about.

    Args:
        message: the error, which names a line of the program or a probe.
        text: the rendered program.
        family: whose facts give probes to parts.

    Returns:
        The part's name, or None where the error lies in what every kernel must have.
    """
    owners = _owners(text, family)
    # A shell, or ssh, has lines too.
    message = message[message.find("dtrace: ") :] if "dtrace: " in message else ""
    if _TOO_LARGE.search(message):
        left = {*_BEGIN.findall(text), *_ONLY.findall(text)}
        return next((part for part in family.spare if part in left), None)
    for number in _LINE.findall(message):
        if 0 < int(number) <= len(owners) and owners[int(number) - 1]:
            return owners[int(number) - 1]
    for function, name in _PROBE.findall(message)[:_MOST_PROBES]:
        for part, facts in family.parts.items():
            if any(_covers(probe, function, message) for probe in facts.probes):
                return part
        probe = re.compile(rf":{re.escape(function)}:" if function else rf":{name}\b")
        named = [
            owner
            for owner, line in zip(owners, text.splitlines(), strict=True)
            if probe.search(line)
        ]
        if named and all(named):
            return named[0]
    return None


def _covers(probe: str, function: str, message: str) -> bool:
    """Tell whether a part's probe, perhaps a pattern, is the one of a message."""
    pattern, _, end = probe.partition(":")
    return (
        bool(function)
        and re.fullmatch(pattern.replace("*", ".*"), function.replace("*", "x")) is not None
        and (not end or f"{function}:{end}" in message)
    )


def _owners(text: str, family: Family) -> list[str]:
    """Return of each line of a program the optional part that it belongs to, or an empty string."""
    owners: list[str] = []
    part = ""
    for probes, lines in clauses(text):
        alone = next(
            (
                name
                for name, facts in family.parts.items()
                if probes
                and all({probe, probe.partition(":")[0]} & {*facts.probes} for probe in probes)
            ),
            "",
        )
        for line in lines:
            if begin := _BEGIN.search(line):
                part = begin[1]
            only = _ONLY.search(line)
            owners.append(only[1] if only else part or alone)
            if _END.search(line):
                part = ""
    return owners


def exports(program: Program, features: Mapping[str, bool]) -> Exports:
    """Return which series a program fills whose optional parts are enabled as given."""
    reasons = [
        reason
        for part, facts in program.family.parts.items()
        if features.get(part)
        for reason in facts.reasons
    ]
    return Exports(
        place_label=program.place_label,
        home=program.family.home,
        reasons=tuple(dict.fromkeys(reasons)),
        opened=features.get("half_open", False),
        established=features.get("established", False),
        departures=features.get("departures", False)
        and all(features.get(part, True) for part in _MOVES),
        accepts=features.get("accepts", False),
        accept_wait=features.get("accept_wait", False),
    )
