"""A kernel family is complete: its programs, its facts, and its name in the documents."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from dtrace_exporter import config, families
from dtrace_exporter.families import Part, parts
from dtrace_exporter.tracing.program import Program, clauses, load

PROGRAMS = Path(families.__file__).with_name("programs")
FAMILIES = families.families()
LONGEST = 250
ROOT = Path(__file__).parent.parent

each_family = pytest.mark.parametrize("name", sorted(FAMILIES))


def test_every_file_is_of_a_family() -> None:
    """Each program belongs to a family with a file of facts, and there is no other file."""
    for file in PROGRAMS.iterdir():
        family = re.sub("_(trace|calls|senders|unix)$", "", file.stem)
        assert file.suffix in {".d", ".toml"}, file
        assert family in FAMILIES, file
    assert {file.stem for file in PROGRAMS.glob("*.toml")} == FAMILIES.keys()


@each_family
def test_every_family_has_its_programs(name: str) -> None:
    """Each family has a program that counts and one that prints; all but FreeBSD have a third."""
    assert FAMILIES[name].name == name
    for file in (f"{name}.d", f"{name}_trace.d"):
        assert (PROGRAMS / file).is_file()
    assert FAMILIES[name].calls == ("" if name == "freebsd" else f"{name}_calls")
    assert FAMILIES[name].unix == ("linux_unix" if name == "linux" else "")
    assert FAMILIES[name].skips_nested == (name == "linux")


@pytest.mark.parametrize("file", sorted(PROGRAMS.glob("*.d")), ids=lambda path: path.name)
def test_no_program_is_long(file: Path) -> None:
    """No program is too long to be read in one go."""
    count = len(file.read_text(encoding="utf-8").splitlines())
    assert count <= LONGEST


def test_the_configuration_knows_every_family() -> None:
    """The configuration accepts the programs of all families, and auto."""
    assert {*config.PROGRAMS} == FAMILIES.keys() | {"auto"}


@pytest.mark.parametrize("page", ["docs/configuration.md", "man/dtrace-exporter.8"])
def test_the_manual_knows_every_family(page: str) -> None:
    """The documentation names each family."""
    file = ROOT / page
    if not file.exists():
        pytest.skip(f"there is no {page}")
    text = file.read_text(encoding="utf-8")
    assert all(re.search(rf"\b{name}\b", text) for name in FAMILIES)


@each_family
def test_entrances(name: str) -> None:
    """A family's entrance probe is complete, unique, and of a function that its program probes."""
    provider, module, function, end = FAMILIES[name].entrance.split(":")
    assert (provider, end) == ("fbt", "entry")
    assert module
    assert f":{function}:" in load(name).text
    assert [one.entrance for one in FAMILIES.values()].count(FAMILIES[name].entrance) == 1


@each_family
def test_places(name: str) -> None:
    """Linux has netns and FreeBSD has jails, both with an empty name for the host; others zones."""
    found = FAMILIES[name].place, FAMILIES[name].own_place
    unnamed = {"linux": ("netns", ""), "freebsd": ("jail", "")}
    assert found == unnamed.get(name, ("zone", "global"))


def counting(name: str) -> list[Program]:
    """Return a family's programs, without those that print each event or count senders."""
    return [load(each) for each in (name, FAMILIES[name].calls, FAMILIES[name].unix) if each]


@each_family
def test_parts(name: str) -> None:
    """Each part has both texts, depends only on existing parts, and is in exactly one program."""
    own = FAMILIES[name].parts
    for part in own.values():
        assert part.what
        assert part.without
        assert {one for needed in part.needs for one in needed.split("|")} <= own.keys()
    assert sorted(part for one in counting(name) for part in one.parts) == sorted(own)


@each_family
def test_probes_of_parts(name: str) -> None:
    """Each probe listed for a part is in a program, and belongs to no other part."""
    probed = {
        probe for one in counting(name) for probes, _ in clauses(one.text) for probe in probes
    }
    named = [probe for part in FAMILIES[name].parts.values() for probe in part.probes]
    assert len(named) == len({*named})
    functions = {probe.partition(":")[0] for probe in probed}
    assert {probe for probe in named if ":" in probe} <= probed
    assert {probe for probe in named if ":" not in probe} <= functions


@each_family
def test_drop_counters(name: str) -> None:
    """The drop counters are enumerators of the kernel's types, and only Linux has them."""
    counters = FAMILIES[name].drop_counters
    assert bool(counters) == (name == "linux")
    for inline, enumerator in counters.items():
        assert enumerator == f"LINUX_MIB_{inline}"


def test_parts_of_all() -> None:
    """A part that several families have has the same purpose in each of them."""
    every = [(name, part) for one in FAMILIES.values() for name, part in one.parts.items()]
    for name, part in every:
        assert parts()[name].what == part.what
    assert parts().keys() == {name for name, _ in every}


@each_family
def test_spare_parts(name: str) -> None:
    """Spare parts are distinct parts, and each comes after all parts that depend on it."""
    family = FAMILIES[name]
    assert bool(family.spare) == (name != "linux")
    assert {*family.spare} <= family.parts.keys()
    assert len(family.spare) == len({*family.spare})
    gone: set[str] = set()
    for spare in family.spare:
        assert load(name).with_dependents({spare}) - {spare} <= gone
        gone.add(spare)


def test_facts_are_read_as_they_are_written() -> None:
    """A part is exactly what its file of facts says."""
    for name, family in FAMILIES.items():
        facts = tomllib.loads((PROGRAMS / f"{name}.toml").read_text(encoding="utf-8"))
        assert [*facts["parts"]] == [*family.parts]
        assert (*facts.get("spare", ()),) == family.spare
        for part, given in facts["parts"].items():
            lists = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
            assert family.parts[part] == Part(**{**given, **lists})
