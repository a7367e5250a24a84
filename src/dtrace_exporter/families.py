"""The kernel families: what is peculiar to each, from the file of facts beside its D programs.

A family is programs/NAME.d, which counts, NAME_trace.d, which prints, NAME_calls.d where a second
consumer is needed, and NAME.toml. To add one is to add these files.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True, slots=True)
class Part:
    """An optional part of a family's programs.

    ``what`` is what it is for and ``without`` what is missing without it, for people. ``probes``
    are the functions, or function:entry, that only it has; ``needs`` the parts that it rests on;
    ``reasons`` those of drops that it tells. ``moves`` is whether without it some connections go
    into Q or leave it uncounted.
    """

    what: str
    without: str
    probes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    moves: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """A kernel family.

    ``system`` is sys.platform where no other family has it, else empty; ``entrance`` is the probe
    that only its hosts have, ``place`` the label of a listener's place
    and ``own_place`` its value for the host's own. ``spare`` are the parts that are left out first
    where the kernel does not take the program's size. ``drop_counters`` are names of inlines by
    which its programs find the kernel's counters of drops, and the enumerators that number these.
    """

    name: str
    entrance: str
    place: str
    own_place: str
    parts: Mapping[str, Part]
    system: str = ""
    spare: tuple[str, ...] = ()
    drop_counters: Mapping[str, str] = field(default_factory=dict)

    @property
    def calls(self) -> str:
        """The name of the program for what only processes do, one a host; empty for none."""
        name = f"{self.name}_calls"
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
            found[name] = Family(name, parts=parts, spare=spare, **facts)
    return found


def _part(facts: dict[str, Any]) -> Part:
    lists: dict[str, Any] = {
        key: tuple(facts.pop(key, ())) for key in ("probes", "needs", "reasons")
    }
    return Part(**facts, **lists)


def parts() -> dict[str, Part]:
    """Return the optional parts of all families by name; one of several is for the same in each."""
    return {name: part for family in families().values() for name, part in family.parts.items()}
