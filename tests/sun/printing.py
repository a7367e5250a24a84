"""The output of trace programs, which have a line for each event."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

from dtrace_exporter.trace import csv
from sun.engine import Session
from sun.watching import Host, text


def started(host: Host, port: int = 0) -> Session:
    """Start the trace program."""
    return host.engine.start(text(host.generation, port, trace=True))


def printed(session: Session) -> list[str]:
    """End a session; return its lines without empty ones, as CSV."""
    session.stop()
    return [csv(line) for line in session.output.splitlines() if line]


def short(lines: list[str]) -> list[str]:
    """Return lines without their times."""
    return [",".join(line.split(",")[2:]) for line in lines]


def per_action(session: Session) -> Counter[tuple[str, str]]:
    """End a session; return how many lines each action of each port has."""
    found: Counter[tuple[str, str]] = Counter()
    for line in printed(session)[1:]:
        columns = line.split(",")
        assert len(columns) == 9
        found[columns[5], columns[2]] += 1
    return found


def only_its_port(generation: str, lines: Sequence[str]) -> None:
    """Check that a session of one port prints only lines of that port, whatever came before.

    Args:
        generation: the generation of the system.
        lines: what happens first.
    """
    with Host(generation) as host:
        one, other, both = started(host, 22), started(host, 81), started(host)
        host.run(*lines, "listen M zone 0 address * port 81 backlog 1")
        for name in "MLML":
            host.play(f"syn {name} count 3", f"ack {name}", f"syn {name}", f"accept {name}")
        whole = printed(both)[1:]
        for session, port in ((one, "22"), (other, "81")):
            assert printed(session)[1:] == [one for one in whole if one.split(",")[5] == port]
            assert session.errors == []


def nothing_wrong(with_faults: Callable[[frozenset[int]], tuple[int, Counter[str]]]) -> None:
    """Check that no fault causes a line to be printed that is wrong or repeated.

    Args:
        with_faults: lets some loads fail; returns the number of loads and the printed lines.
    """
    loads, whole = with_faults(frozenset())
    assert max(whole.values()) == 1
    chance = random.Random(1)
    for at in range(1, loads + 1, 5):
        _, left = with_faults(frozenset([at]))
        assert not left - whole, at
    for _ in range(20):
        failing = frozenset(chance.choices(range(1, loads + 1), k=6))
        assert not with_faults(failing)[1] - whole, failing
