"""The library of FreeBSD's model: its totals are consistent, and its hooks see all events."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings

from sun.events import Script, scripts
from sun.library import FREEBSD, Library, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

each_generation = pytest.mark.parametrize("generation", FREEBSD)
OPEN = "listen {} zone 0 address * port {} backlog 2"


@pytest.fixture(params=FREEBSD)
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    """Return the library of each build, with a listener L."""
    with Library(request.param) as made:
        made.run(OPEN.format("L", 80))
        yield made


class Seen:
    """The events that the hooks of a library see, for some probes or all."""

    def __init__(self, library: Library, *probes: str) -> None:
        self.names = probes or library.probes
        self.events: list[tuple[str, list[int]]] = []
        library.hook(self.names, self.add)

    def add(self, number: int, arguments: list[int]) -> None:
        self.events.append((self.names[number].removeprefix("fbt:kernel:"), arguments))

    def take(self) -> list[str]:
        """Return the names of the events since the last call."""
        names = [name for name, _ in self.events]
        self.events.clear()
        return names


def test_which_function_exists() -> None:
    """The builds differ by the functions that only one of the kernels has."""
    probes = {}
    for generation in FREEBSD:
        with Library(generation) as library:
            probes[generation] = {*library.probes}
    thirteen, fourteen = (probes[name] for name in FREEBSD)
    assert {name.split(":")[2] for name in fourteen - thirteen} == {
        "solisten_clone",
        "solisten_enqueue",
    }
    assert thirteen <= fourteen


def test_probes(library: Library) -> None:
    """The hooks see a connection's whole life, in the order of FreeBSD's own functions."""
    seen = Seen(library)
    library.run("syn L")
    assert seen.take() == ["syncache_add:entry", "syncache_add:return"]
    library.run("ack L")
    with_enqueue = "fbt:kernel:solisten_enqueue:entry" in library.probes
    into = ["solisten_enqueue:entry", "solisten_enqueue:return", "syncache_expand:return"]
    if not with_enqueue:
        into = ["syncache_expand:return", "soisconnected:entry", "soisconnected:return"]
    clone = "solisten_clone" if with_enqueue else "sonewconn"
    assert seen.take() == ["syncache_expand:entry", f"{clone}:entry", f"{clone}:return", *into]
    library.run("accept L")
    assert seen.take()[:4] == [
        *("solisten_dequeue:entry", "solisten_dequeue:return"),
        *("soaccept:entry", "soaccept:return"),
    ]


@each_generation
def test_every_probe(generation: str) -> None:
    """A script can reach every probe, except sonewconn() of UNIX sockets on FreeBSD 14."""
    with Library(generation) as library:
        seen = Seen(library)
        library.run("bucketlimit 0 1", "local 1")
        for kind in ("", " filter"):
            library.run(
                OPEN.format("L", 80) + kind, "poll L", "syn L count 3", "ack L", "syn L", "ack L"
            )
            library.run(*["data L"] * bool(kind), "accept L", "syn L", "ack L", "close L")
        missing = {one.removeprefix("fbt:kernel:") for one in library.probes} - {*seen.take()}
        assert not missing


@each_generation
@pytest.mark.parametrize(("limit", "most"), [(0, 1), (1, 2), (2, 4), (3, 5), (128, 193)])
def test_capacity(generation: str, limit: int, most: int) -> None:
    """Q holds 3 * limit / 2 + 1; the final ACK of one more is refused, but its SYN is not."""
    with Library(generation) as library:
        library.run("bucketlimit 0 1000", f"listen L zone 0 address * port 80 backlog {limit}")
        library.run(f"syn L count {most + 3}", f"ack L count {most}")
        assert library.totals("L")["q_full_ack"] == 0
        library.run("ack L")
        totals = library.totals("L")
        assert (totals["q"], totals["q_full_ack"], totals["created"]) == (most, 1, most + 3)
        library.run("accept L", "ack L", "ack L")
        totals = library.totals("L")
        assert (totals["q"], totals["q_full_ack"]) == (most, 2)


def test_memory_is_used_again(library: Library) -> None:
    """A new listener gets the memory of the one that closed last."""
    seen = Seen(library, "fbt:kernel:solisten_dequeue:entry")
    library.run("syn L", "ack L", "accept L", "close L", OPEN.format("M", 81))
    library.run("syn M", "ack M", "accept M")
    (_, first), (_, second) = seen.events
    assert first[0] == second[0]


def test_whose_is_evicted(library: Library) -> None:
    """A SYN without room evicts the oldest connection of the stack, whichever listener has it."""
    library.run("bucketlimit 0 2", OPEN.format("M", 81), "syn L count 2", "syn M")
    assert [library.totals(name)["q0_evicted"] for name in "LM"] == [1, 0]
    library.run("zone 1 www exclusive", "listen N zone 1 address * port 80 backlog 2", "syn N")
    assert [library.totals(name)["q0_evicted"] for name in "LMN"] == [1, 0, 0]


def consistent(library: Library) -> None:
    """Check that a model's queues match its totals and its own counts."""
    for totals in library.all_totals():
        # A backlog of -1 asks for the largest possible one.
        numbers = {name: one for name, one in totals.items() if isinstance(one, int)}
        assert numbers.pop("asked") >= -1
        assert min(totals["saturation"] + [*numbers.values()]) >= 0, totals
        assert totals["syns"] == sum(totals["saturation"]), totals
        made = totals["created"] + totals["duplicates"] + totals["zone_fail"]
        assert totals["syns"] == made, totals
        assert totals["accepts_dead"] <= totals["accepts"] <= totals["established"], totals
        in_q = totals["established"] - totals["accepts"] - totals["q"]
        assert 0 <= in_q <= totals["killed"], totals
        if not totals["closed"]:
            assert totals["tcp_q"] == totals["q"], totals
            assert not in_q
        else:
            assert totals["q"] == totals["waiting"] == 0, totals


@each_generation
@pytest.mark.parametrize("threads", [1, 3])
def test_any_script(generation: str, threads: int) -> None:
    """In any script, with nested or concurrent events, totals and queues stay consistent."""

    @settings(max_examples=150, derandomize=True)
    @given(scripts(generation, threads=threads))
    def run(script: Script) -> None:
        with Library(generation) as library:
            library.hook(library.probes, lambda _number, _arguments: None)
            script.play(library)
            consistent(library)
            for totals in library.all_totals():
                if not totals["closed"]:
                    library.run(f"close {totals['name']}")
            consistent(library)

    run()
