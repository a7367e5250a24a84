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
from dtrace_exporter.listeners import Capabilities
from dtrace_exporter.tracing import btf, rows

KERNEL_TYPES = Path("/sys/kernel/btf/vmlinux")

BEGIN = re.compile(r"/\* begin (\w+) \*/")
END = re.compile(r"/\* end (\w+) \*/")
_PLACE = re.compile(r"/\* place (\w+) \*/")
ONLY = re.compile(r"/\* only (\w+) \*/")
# Lines that only a session of one port needs: a test costs every SYN of all others some time.
ONE_PORT = "one_port"
_NEEDS = re.compile(r"/\* (\w+) needs ([\w, ]+) \*/")
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
        """Return optional parts and those that rest on them, by the facts or the text itself."""
        needs = {name: {*part.needs} for name, part in self.family.parts.items()}
        needs |= {part: set(words.split(", ")) for part, words in _NEEDS.findall(self.text)}
        found = {*parts}
        while more := {part for part, need in needs.items() if need & found} - found:
            found |= more
        return found & {*parts, *self.parts}

    @property
    def place_label(self) -> str:
        """The label of a listener's place, that of a family; from ``/* place LABEL */``."""
        if self.name in families():
            return families()[self.name].place
        known = {family.place for family in families().values()}
        found = [label for label in _PLACE.findall(self.text) if label in known]
        return found[0] if found else "netns"

    @property
    def needs_drop_counters(self) -> bool:
        """Whether it tells drops by the kernel's counters, as drop_counters() numbers them."""
        return "inline int LISTENDROPS " in self.text


def runs_here(command: Sequence[str]) -> bool:
    """Tell whether a command's dtrace(1) traces this kernel; by ssh(1) it is another host's."""
    return Path(command[0]).name != "ssh"


def local(command: Sequence[str]) -> str:
    """Return the name of the only program that a command's system can need; empty if not known.

    Solaris and illumos have the same system name; dtrace.find_program() tells them apart.
    """
    here = [name for name, family in families().items() if family.system == sys.platform]
    return here[0] if here and runs_here(command) else ""


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


def capabilities(program: Program, features: Mapping[str, bool]) -> Capabilities:
    """Return which series a program fills whose optional parts are enabled as given."""
    parts = program.family.parts
    reasons = [
        reason for part, facts in parts.items() if features.get(part) for reason in facts.reasons
    ]
    return Capabilities(
        place_label=program.place_label,
        own_place=program.family.own_place,
        reasons=tuple(dict.fromkeys(reasons)),
        opened=features.get("half_open", False),
        established=features.get("established", False),
        departures=features.get("departures", False)
        and all(features.get(part, True) for part, facts in parts.items() if facts.moves),
        accepts=features.get("accepts", False),
        accept_wait=features.get("accept_wait", False),
    )
