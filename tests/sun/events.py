"""Scripts of events for the model, for Hypothesis: whatever can happen to a few listeners.

A line that cannot be when it comes is refused by the model and does nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st

from sun.library import Library, Line, Nested

ZONES = ("zone 1 www", "zone 2 db exclusive", "zone 3 mail exclusive")
PLACES = {"A": (0, 80), "B": (1, 80), "C": (2, 80), "D": (0, 81), "E": (3, 443)}
"""Zone and port of each listener; some have the same port, zones 0 and 1 the same IP stack."""
ADDRESSES = (
    *("*", "*", "* family 4", "192.0.2.1", "192.0.2.1 family 6", "2001:db8::7", "255.0.254.1"),
)
PACKETS = (
    *("", "", "from 198.51.100.7 port 7", "from 2001:db8::5", "options 4", "options 40"),
    *("from 2001:db8::5 extension 8", "from 2001:db8::5 extension 264"),
)
FLAGS = ("a", "r", "ra", "f", "pa", "u", "sa")
HOOKS_MOST = 9


class Script(NamedTuple):
    """What happens in a model."""

    setup: tuple[str, ...]
    threads: tuple[tuple[Line, ...], ...]
    """What each thread does, all at once."""
    seed: int
    """Of the order in which the threads run."""
    migrate: bool

    def play(self, library: Library) -> None:
        """Let it happen; without hooks threads take turns between lines only."""
        alone = self.threads[0] if len(self.threads) == 1 else ()
        for line in (*self.setup, *alone):
            library.play(line)
        if not alone:
            library.concurrently(*self.threads, seed=self.seed, migrate=self.migrate)


def _weighted(*pairs: tuple[int, st.SearchStrategy[list[str]]]) -> st.SearchStrategy[list[str]]:
    """Return a strategy that uses each of some as often as its weight says."""
    choices = [strategy for weight, strategy in pairs for _ in range(weight)]
    return st.integers(0, len(choices) - 1).flatmap(choices.__getitem__)


def listens(generation: str, name: str) -> st.SearchStrategy[str]:
    """Return lines that open a listener of any kind.

    Args:
        generation: only illumos has limits of connections.
        name: the listener's, a key of PLACES.
    """
    zone, port = PLACES[name]
    limits = ["", "", "", "limit 3"] if generation == "illumos" else [""]
    return st.builds(
        " ".join,
        st.tuples(
            st.sampled_from(ADDRESSES).map(lambda address: f"listen {name} address {address}"),
            st.just(f"zone {zone} port {port}"),
            st.integers(1, 4).map(lambda backlog: f"backlog {backlog}"),
            st.sampled_from(["", "", "streams", "tli"]),
            st.sampled_from(limits),
        ),
    ).map(lambda line: " ".join(line.split()))


def _of(name: str, generation: str) -> st.SearchStrategy[list[str]]:
    """Return lines of one listener, mostly one."""

    def one(*templates: str) -> st.SearchStrategy[list[str]]:
        return st.sampled_from([[template.format(name)] for template in templates])

    syns = st.builds(
        lambda count, packet: [f"syn {name} count {count} {packet}".rstrip()],
        st.sampled_from([1, 1, 2, 9]),
        st.sampled_from(PACKETS),
    )
    moves = one(
        *("ack {}", "ack {}", "ack {} count 2", "ack {} count 3", "ack {} refused"),
        *("accept {}", "accept {}", "accept {} count 2"),
    )
    ack, accept = f"ack {name}", f"accept {name}"
    life = [f"syn {name}", ack, accept]
    fill = [f"syn {name} count 4", ack, ack, ack, f"syn {name} count 2", accept]
    resets = [ack, f"abort {name} deferred", f"abort {name} q", accept, accept]
    flood = [f"syn {name} count 9", f"timeout {name}", f"syn {name} count 3"]
    # A line of its own in another thread can be on its way when the listener closes.
    again = listens(generation, name).map(lambda line: [f"close {name}", line, f"syn {name}"])
    aborts = ("abort {} q0", "abort {} q", "abort {} q", "abort {} deferred", "abort {} deferred")
    return _weighted(
        (5, syns),
        (6, moves),
        (4, one(*aborts, "timeout {} count 1", "timeout {}")),
        (1, one("backlog {} 1", "backlog {} 2", "backlog {} 3", "backlog {} 9", "finish {}")),
        (1, one("unlisten {}", "close {}")),
        (1, one(*(f"segment {{}} {flags}" for flags in FLAGS))),
        (6, st.sampled_from([life, fill, fill + resets, fill + resets, resets, flood])),
        (1, again),
        (1, listens(generation, name).map(lambda line: [line])),
    )


def _of_all(generation: str) -> st.SearchStrategy[list[str]]:
    """Return lines that are not a listener's, and so rare that they are less often wanted."""
    lines = ["alloc_fail 1", "alloc_fail 2", "forget"]
    lines += [f"q0max {zone} {limit}" for zone in (0, 2) for limit in (0, 4)]
    if generation == "illumos":
        lines += [f"reclaim {zone} {on}" for zone in (0, 2) for on in (0, 1)]
    return st.sampled_from([[line] for line in lines])


def events(
    generation: str, names: str = "".join(PLACES), nested: bool = True
) -> st.SearchStrategy[list[Line]]:
    """Return strategies for what happens next: a line, or a few that belong together.

    Args:
        generation: one of library.GENERATIONS.
        names: of which listeners, keys of PLACES.
        nested: whether events can happen inside others.
    """
    one = st.sampled_from(names).flatmap(lambda name: _of(name, generation))
    plain = _weighted((12, one), (1, _of_all(generation)))
    if not nested:
        return plain.map(list[Line])

    def nest(lines: list[str], at: int, inner: list[str]) -> list[Line]:
        return [*lines[:-1], Nested(lines[-1], at, tuple(inner))]

    inside = st.builds(nest, plain, st.integers(1, HOOKS_MOST), plain)
    return st.one_of(plain.map(list[Line]), plain.map(list[Line]), inside)


@st.composite
def scripts(
    draw: st.DrawFn,
    generation: str,
    threads: int = 1,
    nested: bool = True,
    least: int = 8,
    most: int = 30,
) -> Script:
    """Return a strategy for scripts.

    Args:
        draw: Hypothesis' own.
        generation: one of library.GENERATIONS.
        threads: how many threads there are at most.
        nested: whether events can happen inside others.
        least: how many events a thread has at least.
        most: how many it has at most.
    """
    names = draw(st.sampled_from(["A", "AB", "ABD", "".join(PLACES)]))
    setup = [*ZONES]
    setup += [f"q0max {zone} {draw(st.integers(0, 5))}" for zone in (0, 2, 3)]
    setup += [draw(listens(generation, name)) for name in names]
    some = st.lists(events(generation, names, nested), min_size=least, max_size=most).map(
        lambda found: tuple(line for lines in found for line in lines)
    )
    return Script(
        tuple(setup),
        tuple(draw(st.lists(some, min_size=1, max_size=threads))),
        draw(st.integers(0, 999)),
        draw(st.booleans()),
    )
