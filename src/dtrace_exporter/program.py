"""The D programs: which one a host needs, its optional parts, and the numbers to fill in.

A program is complete as it lies in programs/. What differs from host to host are numbers in lines
``inline int NAME = ...;``, the period of its ``tick-`` probes, and optional parts that not every
kernel can do: lines from ``/* begin PART */`` to ``/* end PART */``, and any ``/* only PART */``.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from dtrace_exporter import btf
from dtrace_exporter.listeners import Exports

KERNEL_TYPES = Path("/sys/kernel/btf/vmlinux")

_BEGIN = re.compile(r"/\* begin (\w+) \*/")
_END = re.compile(r"/\* end (\w+) \*/")
_PLACE = re.compile(r"/\* place (netns|zone) \*/")
_ONLY = re.compile(r"/\* only (\w+) \*/")
_OPTION = re.compile(r"#pragma D option (\w+)")
_TICK = re.compile(r"\btick-1s\b")
# A line of the program; one of DTrace's libraries comes behind its file's name in quotes.
_LINE = re.compile(r'(?<!", )\bline (\d+)\b')
_NEEDS = re.compile(r"/\* (\w+) needs ([\w, ]+) \*/")
_PROBE = re.compile(r"\w*:\w*:(?:([\w.]+):(?:entry|return)\b|[\w.]*:(\w+))")

# What the host's own place is called.
_HOMES = {"netns": "", "zone": "global"}

# Reasons of drops that an optional part can tell.
_REASONS: dict[str, dict[str, tuple[str, ...]]] = {
    "netns": {"syn_drops": ("q_full", "q0_full", "other"), "ack_drops": ("q_full_ack", "other")},
    "zone": {"syn_drops": ("q_full", "q0_full", "q0_evicted")},
}

# The kernel's own drop counters; enum in include/uapi/linux/snmp.h, its values differ by version.
_DROP_COUNTERS = {
    "LISTENOVERFLOWS": "LINUX_MIB_LISTENOVERFLOWS",
    "LISTENDROPS": "LINUX_MIB_LISTENDROPS",
    "TCPREQQFULLDROP": "LINUX_MIB_TCPREQQFULLDROP",
}

NO_DROP_COUNTERS = dict.fromkeys(_DROP_COUNTERS, 0)
"""Number 0 is none: where a kernel's own are not known a program with these sees no drop."""


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
    def parts(self) -> tuple[str, ...]:
        """Names of the optional parts, in their order."""
        return tuple(dict.fromkeys(_BEGIN.findall(self.text)))

    def with_dependents(self, parts: Collection[str]) -> set[str]:
        """Return optional parts and those that rest on them, as ``/* PART needs PART, ... */``."""
        needs = {part: set(words.split(", ")) for part, words in _NEEDS.findall(self.text)}
        return {*parts, *(part for part, need in needs.items() if need & {*parts})}

    @property
    def place_label(self) -> str:
        """The label of a listener's place, netns or zone, from ``/* place LABEL */``."""
        found = _PLACE.search(self.text)
        return found[1] if found else "netns"

    @property
    def needs_drop_counters(self) -> bool:
        """Whether it tells drops by the kernel's counters, as drop_counters() numbers them."""
        return all(f"inline int {name} " in self.text for name in _DROP_COUNTERS)


@dataclass(frozen=True, slots=True)
class Window:
    """Timing of the two sets of aggregations.

    A set is emptied half a generation after its last use, and used again half a generation later.
    What a consumer counts stays exact as long as it is never later than that; so one that is silent
    for ``patience`` seconds, half of that time, has to be ended.
    """

    interval: float
    ticks: int
    clock: int
    patience: float


def window(interval: float) -> Window:
    """Choose the timing for a tick of ``interval`` seconds."""
    ticks = max(30, math.ceil(60 / interval))
    # LAST has 29 bits for the time. A busy machine skips ticks, which makes a generation longer,
    # and observations beyond the clock's end have no order: four times as much as it should take.
    clock = math.ceil(math.log2(ticks * interval * 4e9 / (1 << 29)))
    return Window(interval, ticks, clock, ticks * interval / 4)


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
    if not runs_here(command):
        return {}
    try:
        found = btf.enumerators(KERNEL_TYPES, list(_DROP_COUNTERS.values()))
    except (OSError, btf.BTFError):
        return {}
    if len(found) < len(_DROP_COUNTERS):
        return {}
    return {name: found[constant] for name, constant in _DROP_COUNTERS.items()}


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
    ports: tuple[int, int] = (0, 65535),
    numbers: Mapping[str, int] | None = None,
    without: Collection[str] = (),
    options: Collection[str] = (),
) -> str:
    """Make a program ready to run.

    Args:
        program: the program.
        window: its timing.
        ports: the first and the last port to watch.
        numbers: those of the kernel, by inline's name, that are other than in the file.
        without: optional parts to leave out, and with them those that rest on them.
        options: names of D options that are set on the command line and so not in the program.
    """
    without = program.with_dependents(without)
    filled = {
        "FIRST_PORT": ports[0],
        "LAST_PORT": ports[1],
        "TICKS": window.ticks,
        "CLOCK": window.clock,
        **(numbers or {}),
    }
    text = program.text
    for name, value in filled.items():
        text = re.sub(rf"^(inline int {name} = )\w+;", rf"\g<1>{value};", text, flags=re.MULTILINE)
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
    return "\n".join(lines) + "\n"


def blame(message: str, text: str) -> str | None:
    """Tell which optional part of a rendered program an error of dtrace(1) is about.

    Args:
        message: the error, which names a line of the program or a probe.
        text: the rendered program.

    Returns:
        The part's name, or None where the error lies in what every kernel must have.
    """
    part = ""
    owners: list[str] = []
    for line in text.splitlines():
        if begin := _BEGIN.search(line):
            part = begin[1]
        only = _ONLY.search(line)
        owners.append(only[1] if only else part)
        if _END.search(line):
            part = ""
    # A shell, or ssh, has lines too.
    message = message[message.find("dtrace: ") :] if "dtrace: " in message else ""
    for number in _LINE.findall(message):
        if 0 < int(number) <= len(owners) and owners[int(number) - 1]:
            return owners[int(number) - 1]
    for function, name in _PROBE.findall(message):
        probe = re.compile(rf":{re.escape(function)}:" if function else rf":{name}\b")
        named = [
            owner
            for owner, line in zip(owners, text.splitlines(), strict=True)
            if probe.search(line)
        ]
        if named and all(named):
            return named[0]
    return None


def exports(program: Program, features: Mapping[str, bool]) -> Exports:
    """Return which series a program fills whose optional parts are enabled as given."""
    reasons = [
        reason
        for part, told in _REASONS[program.place_label].items()
        if features.get(part)
        for reason in told
    ]
    return Exports(
        place_label=program.place_label,
        home=_HOMES[program.place_label],
        reasons=tuple(dict.fromkeys(reasons)),
        established=features.get("established", False),
        accepts=features.get("accepts", False),
        accept_wait=features.get("accept_wait", False),
    )
