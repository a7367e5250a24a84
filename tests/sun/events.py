"""Random scripts of events for the model, by Hypothesis: anything that a few listeners can meet.

A line that is impossible when it comes is refused by the model and does nothing.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from sun import freebsd_events
from sun.library import FREEBSD, Library, Line, Nested

ZONES = ("zone 1 www", "zone 2 db exclusive", "zone 3 mail exclusive")
PLACES = {"A": (0, 80), "B": (1, 80), "C": (2, 80), "D": (0, 81), "E": (3, 443)}
"""Zone and port of each listener; some share a port, and zones 0 and 1 share an IP stack."""
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
    """The events in a model."""

    setup: tuple[str, ...]
    threads: tuple[tuple[Line, ...], ...]
    """The lines of each thread; all threads run concurrently."""
    seed: int
    """The seed of the order in which the threads run."""
    migrate: bool

    def play(self, library: Library) -> None:
        """Play the script; without hooks, threads switch only between lines."""
        alone = self.threads[0] if len(self.threads) == 1 else ()
        for line in (*self.setup, *alone):
            library.play(line)
        if not alone:
            library.concurrently(*self.threads, seed=self.seed, migrate=self.migrate)


def places(generation: str) -> dict[str, tuple[int, int]]:
    """Return the zone or jail and the port of each listener."""
    return freebsd_events.PLACES if generation in FREEBSD else PLACES


def listens(generation: str, name: str) -> list[str]:
    """Return lines that open a listener, of every kind.

    Args:
        generation: the generation; only illumos has limits of connections.
        name: the name of the listener, a key of PLACES.
    """
    if generation in FREEBSD:
        return freebsd_events.listens(name)
    zone, port = PLACES[name]
    limits = ("", "", "", " limit 3") if generation == "illumos" else ("",)
    return [
        f"listen {name} zone {zone} address {address} port {port} backlog {backlog}{kind}{limit}"
        for backlog, address, kind, limit in product(
            (1, 2, 3, 4), ADDRESSES, ("", "", " streams", " tli"), limits
        )
    ]


def _of(name: str, generation: str) -> list[tuple[str, ...]]:
    """Return the events of one listener, each as often as its share among all."""
    if generation in FREEBSD:
        return freebsd_events.of(name)
    ack, accept, reset = f"ack {name}", f"accept {name}", f"abort {name}"
    syns = [
        f"syn {name} count {count} {packet}".rstrip()
        for count, packet in product((1, 1, 2, 9), PACKETS)
    ]
    moves = [ack, accept, f"{ack} count 2", f"{accept} count 2", f"{ack} count 3", f"{ack} refused"]
    resets = [f"{reset} q0", f"{reset} q", f"{reset} deferred", f"timeout {name}"]
    resets.append(f"timeout {name} count 1")
    calls = [f"backlog {name} {backlog}" for backlog in (1, 2, 3, 9)]
    calls += [f"finish {name}", f"unlisten {name}", f"close {name}"]
    segments = [f"segment {name} {flags}" for flags in FLAGS]
    life = (f"syn {name}", ack, accept)
    fill = (f"syn {name} count 4", ack, ack, ack, f"syn {name} count 2", accept)
    dead = (ack, f"{reset} deferred", f"{reset} q", accept, accept)
    flood = (f"syn {name} count 9", f"timeout {name}", f"syn {name} count 3")
    quiet = (f"unlisten {name}", f"syn {name} count 2", f"backlog {name} 3")
    whole = (*fill, *dead)
    several: list[tuple[str, ...]] = [life, fill, whole, whole, dead, flood, flood, quiet]
    if generation == "illumos":
        zone, _ = PLACES[name]
        several.append((f"reclaim {zone} 1", f"syn {name} count 2", f"reclaim {zone} 0"))
    opened = listens(generation, name)
    # If it is a line of its own, one in another thread can be under way when the listener closes.
    again: list[tuple[str, ...]] = [(f"close {name}", line, f"syn {name}") for line in opened]
    shares: list[tuple[int, list[tuple[str, ...]]]] = [
        (5, [(line,) for line in syns]),
        (5, [(line,) for line in moves]),
        (3, [(line,) for line in resets]),
        (2, [(line,) for line in calls]),
        (1, [(line,) for line in segments]),
        (6, several),
        (1, [(line,) for line in opened]),
        (1, again),
    ]
    size = max(len(lines) for _, lines in shares)
    return [lines[slot % len(lines)] for share, lines in shares for slot in range(share * size)]


def _of_all(generation: str) -> list[tuple[str, ...]]:
    """Return events that concern all listeners or none."""
    if generation in FREEBSD:
        return freebsd_events.of_all()
    lines = ["alloc_fail 1", "alloc_fail 2", "alloc_fail 1", "forget"]
    lines += [f"q0max {zone} {limit}" for zone in (0, 2) for limit in (0, 4)]
    if generation == "illumos":
        lines += [f"reclaim {zone} {on}" for zone in (0, 2) for on in (0, 1)]
    return [(line,) for line in lines]


@cache
def _plain(generation: str, names: str) -> st.SearchStrategy[tuple[str, ...]]:
    """Return a strategy for groups of lines, mostly of one line."""
    every = [lines for name in names for lines in _of(name, generation)]
    of_all = _of_all(generation)
    every += [of_all[slot % len(of_all)] for slot in range(len(every) // 10)]
    # A single choice for each group, because there are many to make.
    return st.sampled_from(every)


@cache
def events(
    generation: str, names: str = "".join(PLACES), nested: bool = True
) -> st.SearchStrategy[tuple[Line, ...]]:
    """Return a strategy for the next event: a line, or a group of them.

    Args:
        generation: one of library.GENERATIONS.
        names: the listeners, as keys of PLACES.
        nested: whether events can happen inside others.
    """
    plain = _plain(generation, names)
    outside: st.SearchStrategy[tuple[Line, ...]] = plain.map(tuple[Line, ...])
    if not nested:
        return outside

    def nest(lines: tuple[str, ...], at: int, inner: tuple[str, ...]) -> tuple[Line, ...]:
        return (*lines[:-1], Nested(lines[-1], at, inner))

    inside = st.builds(nest, plain, st.integers(1, HOOKS_MOST), plain)
    return st.integers(0, 2).flatmap(lambda third: inside if third == 2 else outside)


fixed_profile = settings(
    derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
"""For tests with these scripts: the same scripts in each run, however long their creation takes."""


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
        draw: Hypothesis' function.
        generation: one of library.GENERATIONS.
        threads: the largest number of threads.
        nested: whether events can happen inside others.
        least: the smallest number of events of a thread.
        most: the largest number of events of a thread.
    """
    some_names = ["A", "AB", "ABD", "".join(places(generation))]
    if generation in FREEBSD:
        names = draw(st.sampled_from([*some_names, "AF"]))
        setup = [*freebsd_events.JAILS]
        setup += [f"bucketlimit {zone} {draw(st.integers(1, 9))}" for zone in (0, 2, 3)]
    else:
        names = draw(st.sampled_from(some_names))
        setup = [*ZONES]
        setup += [f"q0max {zone} {draw(st.integers(0, 5))}" for zone in (0, 2, 3)]
    setup += [draw(st.sampled_from(listens(generation, name))) for name in names]
    some = st.lists(events(generation, names, nested), min_size=least, max_size=most).map(
        lambda found: tuple(line for lines in found for line in lines)
    )
    return Script(
        tuple(setup),
        tuple(draw(st.lists(some, min_size=1, max_size=threads))),
        draw(st.integers(0, 999)),
        draw(st.booleans()),
    )
