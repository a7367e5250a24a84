"""The kernel families: what differs between them, from the file of facts beside their D programs.

A family consists of programs/NAME.d, which counts, NAME_trace.d, which prints events, NAME_calls.d
if a second consumer is needed, NAME_unix.d if UNIX sockets are watched, and NAME.toml. To add a
family, add these files.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from dtrace_exporter.sockets import QCapacity


@dataclass(frozen=True, slots=True)
class Part:
    """An optional part of a family's programs.

    Attributes:
        what: what it is for, for people.
        without: what is missing without it, for people.
        probes: the functions, or function:entry, that only this part traces.
        needs: the parts that it needs; in ``a|b`` one of the two is enough.
        reasons: the reasons of the drops that it counts.
        departs: whether it sees all that leaves Q.
        moves: whether without it some connections enter or leave Q uncounted.
    """

    what: str
    without: str
    probes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    departs: bool = False
    moves: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """A kernel family.

    Attributes:
        name: its name in the configuration.
        entrance: the probe that only its hosts have.
        place: the label of a listener's place.
        own_place: the value of this label for the host's own place.
        q_capacity: how many connections Q can hold.
        parts: its optional parts by name.
        system: what sys.platform begins with, if only this family has it; else empty.
        spare: the parts that are left out first if the program is too large for the kernel.
        drop_counters: the enumerators that number the kernel's counters of drops, by the name of
            the program's inline.
        skips_nested: whether its DTrace skips a probe that fires within another one of the same
            program. Then only the program for processes sees listeners close, and exactness.py
            checks whether the others see everything.
    """

    name: str
    entrance: str
    place: str
    own_place: str
    q_capacity: QCapacity
    parts: Mapping[str, Part]
    system: str = ""
    spare: tuple[str, ...] = ()
    drop_counters: Mapping[str, str] = field(default_factory=dict)
    skips_nested: bool = False

    @property
    def calls(self) -> str:
        """The name of the program that watches processes, one on a host; empty if none."""
        return self._other("calls")

    @property
    def unix(self) -> str:
        """The name of the program that watches UNIX sockets, one on a host; empty if none."""
        return self._other("unix")

    def _other(self, kind: str) -> str:
        name = f"{self.name}_{kind}"
        return name if (_PROGRAMS / f"{name}.d").is_file() else ""


_PROGRAMS = files("dtrace_exporter") / "programs"


@cache
def families() -> dict[str, Family]:
    """Return all families by name."""
    found = {}
    for path in sorted(_PROGRAMS.iterdir(), key=lambda path: path.name):
        if path.name.endswith(".toml"):
            name = path.name.removesuffix(".toml")
            facts = tomllib.loads(path.read_text(encoding="utf-8"))
            parts = {part: _part(given) for part, given in facts.pop("parts").items()}
            spare = tuple(facts.pop("spare", ()))
            capacity = QCapacity(**facts.pop("q_capacity"))
            found[name] = Family(name, q_capacity=capacity, parts=parts, spare=spare, **facts)
    return found


def _part(facts: dict[str, Any]) -> Part:
    lists: dict[str, Any] = {
        key: tuple(facts.pop(key, ())) for key in ("probes", "needs", "reasons")
    }
    return Part(**facts, **lists)


def parts() -> dict[str, Part]:
    """Return the optional parts of all families by name; the same name has the same purpose."""
    return {name: part for family in families().values() for name, part in family.parts.items()}
