"""The D programs: which one a host needs, its optional parts, and the numbers to fill in.

The files in programs/ are complete programs. These things differ from host to host: the numbers in
lines ``inline TYPE NAME = ...;``, the period of the ``tick-`` probes, and the optional parts, which
not every kernel can do. A part consists of the probes that the family's facts give to it, the lines
from ``/* begin PART */`` to ``/* end PART */``, and each line that ends in ``/* only PART */``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from dtrace_exporter import regular
from dtrace_exporter.families import Family, families
from dtrace_exporter.listeners import Capabilities
from dtrace_exporter.tracing import btf, rows

KERNEL_TYPES = Path("/sys/kernel/btf/vmlinux")

BEGIN = re.compile(r"/\* begin (\w+) \*/")
END = re.compile(r"/\* end (\w+) \*/")
_PLACE = re.compile(r"/\* place (\w+) \*/")
ONLY = re.compile(r"/\* only (\w+) \*/")
# The part of a session that watches one port. Its test would cost other sessions time at each SYN.
ONE_PORT = "one_port"
# What follows the family's name in the names of its other programs.
_KIND = re.compile(r"_(?:calls|senders|trace|unix)$")
_NEEDS = re.compile(r"/\* (\w+) needs ([\w, ]+) \*/")
# A probe that a family's facts may give to a part.
_FUNCTION = re.compile(r"fbt::([\w*]+):(entry|return)")


class ProgramError(Exception):
    """There is no program for this system, or it cannot be read."""


@dataclass(frozen=True, slots=True)
class Program:
    """A D program as it is in its file.

    Attributes:
        name: one of the names that the configuration knows, or a path.
        text: the contents of the file.
    """

    name: str
    text: str

    @property
    def family(self) -> Family:
        """The kernel family of the program; for a program given by a path, the likeliest one."""
        if known := families().get(_KIND.sub("", self.name)):
            return known
        likely = [one for one in families().values() if one.place == self.place_label]
        return max(likely, key=lambda family: f"{family.name}.d" in self.text)

    @property
    def calls(self) -> str:
        """The name of the program that runs beside it, once for each host; empty if none."""
        calls = self.family.calls
        return calls if self.tells_listeners and self.name != calls else ""

    @property
    def tells_listeners(self) -> bool:
        """Whether it prints rows of listeners."""
        return f"ready {rows.PROTOCOL} " in self.text

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its optional parts, in the order of the family's facts."""
        marked = [*BEGIN.findall(self.text), *ONLY.findall(self.text)]
        probed = {function for function, _ in _FUNCTION.findall(self.text)}
        facts = {
            name: (part.probes and {probe.partition(":")[0] for probe in part.probes} <= probed)
            or (name == "syn_drops" and self.needs_drop_counters)
            for name, part in self.family.parts.items()
        }
        order = [name for name, has in facts.items() if has or name in marked]
        return (*order, *dict.fromkeys(name for name in marked if name not in (*order, ONE_PORT)))

    def with_dependents(self, parts: Collection[str]) -> set[str]:
        """Return some optional parts and those that need them, by the family's facts or the text.

        Args:
            parts: the names of the parts.
        """
        needs = {name: {*part.needs} for name, part in self.family.parts.items()}
        needs |= {part: set(words.split(", ")) for part, words in _NEEDS.findall(self.text)}
        found = {*parts}

        def lacks(needed: str) -> bool:
            return found.issuperset(needed.split("|"))

        while more := {part for part, need in needs.items() if any(map(lacks, need))} - found:
            found |= more
        return found & {*parts, *self.parts}

    @property
    def place_label(self) -> str:
        """The label of a listener's place: that of its family, or from ``/* place LABEL */``."""
        if own := families().get(_KIND.sub("", self.name)):
            return own.place
        known = {family.place for family in families().values()}
        found = [label for label in _PLACE.findall(self.text) if label in known]
        return found[0] if found else "netns"

    @property
    def needs_drop_counters(self) -> bool:
        """Whether it recognizes drops by the kernel's counters; see drop_counters()."""
        return "inline int LISTENDROPS " in self.text


def runs_here(command: Sequence[str]) -> bool:
    """Return whether a command traces this kernel. With ssh(1) it traces that of another host."""
    return Path(command[0]).name != "ssh"


def local(command: Sequence[str]) -> str:
    """Return the name of the only program that a command's system can need, empty if not known.

    Solaris and illumos have the same system name; dtrace.find_program() tells them apart.
    """
    # On FreeBSD sys.platform ends in the version.
    here = [
        name
        for name, family in families().items()
        if family.system and sys.platform.startswith(family.system)
    ]
    return here[0] if here and runs_here(command) else ""


def load(name: str) -> Program:
    """Read a program.

    Args:
        name: the program's name, or an absolute path.

    Raises:
        ProgramError: the file cannot be read, or has a zero byte.
    """
    try:
        if "/" in name:
            text = regular.read(Path(name)).decode()
        else:
            resource = files("dtrace_exporter") / "programs" / f"{name}.d"
            text = resource.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ProgramError(f"cannot read the D program {name}: {reason}") from None
    if "\0" in text:
        # Sun's DTrace stops there (input() of libdtrace's dt_lex.l), and so before the line of
        # rendering.render() that forbids destructive actions.
        raise ProgramError(f"cannot read the D program {name}: a zero byte in it")
    return Program(name, text)


def drop_counters(command: Sequence[str]) -> dict[str, int]:
    """Return the numbers of the kernel's counters of drops, by the inline's name.

    They are the values of enum LINUX_MIB_* in include/uapi/linux/snmp.h, which differ between
    versions; this kernel's BTF has them.

    Args:
        command: the command of dtrace(1), which may be that of another host.

    Returns:
        The numbers, or nothing if they are not known.
    """
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
    """Return numbers for a kernel whose own are not known; with these a program sees no drop.

    Number 0 of enum LINUX_MIB_* (include/uapi/linux/snmp.h) is not a counter.
    """
    return {name: 0 for family in families().values() for name in family.drop_counters}


def offsets(configured: Mapping[str, int]) -> dict[str, int]:
    """Return the offsets of struct members, in bytes, by the inline's name.

    Args:
        configured: the offsets by the names that the configuration has for them.
    """
    return {name.upper(): value for name, value in configured.items()}


def load_trace(name: str) -> Program:
    """Read the program that prints a line for each event, for the command ``trace``.

    Args:
        name: the name of the program that counts these events, or the absolute path of a program
            that prints the lines itself.

    Raises:
        ProgramError: the file cannot be read.
    """
    return load(name if "/" in name else f"{name}_trace")


def load_senders(name: str) -> Program:
    """Read the program that counts by sender, for the command ``trace --top``.

    Args:
        name: the name of the program that counts by listener, or an absolute path. The program of
            the same family is read.

    Raises:
        ProgramError: the file cannot be read, or the family has no such program.
    """
    return load(f"{load(name).family.name if '/' in name else name}_senders")


def clauses(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """Divide a program's text into its clauses of fbt and the lines between them.

    Yields:
        For a clause, its probes as ``function:entry`` and its lines. For another line, no probes
        and this line.
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


def capabilities(program: Program, features: Mapping[str, bool]) -> Capabilities:
    """Return which series a program fills.

    Args:
        program: the program.
        features: for each of its optional parts, whether it is enabled.
    """
    parts = program.family.parts
    reasons = [
        reason for part, facts in parts.items() if features.get(part) for reason in facts.reasons
    ]
    return Capabilities(
        place_label=program.place_label,
        own_place=program.family.own_place,
        q_capacity=program.family.q_capacity,
        reasons=tuple(dict.fromkeys(reasons)),
        opened=features.get("half_open", False),
        established=features.get("established", False),
        handshake=features.get("handshake", False),
        departures=any(features.get(part) for part, facts in parts.items() if facts.departs)
        and all(features.get(part, True) for part, facts in parts.items() if facts.moves),
        accepts=features.get("accepts", False),
        accept_wait=features.get("accept_wait", False),
        synack_retransmits=features.get("synack_retransmits", False),
    )
