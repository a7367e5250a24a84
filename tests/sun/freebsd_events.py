"""The possible events of FreeBSD's listeners, for the scripts of events.py."""

from __future__ import annotations

from itertools import product

JAILS = ("zone 1 www", "zone 2 db exclusive", "zone 3 mail exclusive")
PLACES = {"A": (0, 80), "B": (1, 80), "C": (2, 80), "D": (0, 81), "E": (3, 443), "F": (0, 80)}
"""Jail and port of each listener; A and F have one identity if their addresses are equal."""
ADDRESSES = (
    *("*", "*", "* family 4", "* v6only", "192.0.2.1", "192.0.2.1 family 6", "2001:db8::7"),
    "255.0.254.1",
)
PACKETS = ("", "", "from 198.51.100.7 port 7", "from 2001:db8::5")


def listens(name: str) -> list[str]:
    """Return lines that open a listener, of every kind."""
    jail, port = PLACES[name]
    return [
        f"listen {name} zone {jail} address {address} port {port} backlog {backlog}{kind}"
        for backlog, address, kind in product((0, 1, 2, 3), ADDRESSES, ("", "", " filter"))
    ]


def of(name: str) -> list[tuple[str, ...]]:
    """Return the events of one listener, each as often as its share among all."""
    ack, accept, data, again = f"ack {name}", f"accept {name}", f"data {name}", f"again {name}"
    syns = [
        f"syn {name} count {count} {packet}".rstrip()
        for count, packet in product((1, 1, 2, 9), PACKETS)
    ]
    moves = [ack, accept, f"{ack} count 2", f"{accept} count 2", f"{ack} count 3", data, data]
    moves += [f"cookie {name}", f"cookie {name} count 3"]
    resets = [f"abort {name} q0", f"abort {name} q", f"timeout {name}", again, f"{again} count 2"]
    resets.append(f"poll {name}")
    calls = [f"backlog {name} {backlog}" for backlog in (0, 1, 2, 3, 9, -1)] + [f"close {name}"]
    life = (f"syn {name}", ack, data, accept)
    fill = (f"syn {name} count 6", f"{ack} count 6", f"{data} count 3", accept, f"syn {name}", ack)
    held = (f"syn {name} count 6", *[ack] * 6, data, data, accept, accept)
    dead = (ack, f"abort {name} q", accept, accept)
    flood = (f"syn {name} count 9", again, f"syn {name} count 3", ack)
    several: list[tuple[str, ...]] = [life, fill, fill, held, dead, flood, flood]
    opened = listens(name)
    # If it is a line of its own, one in another thread can be under way when the listener closes.
    reopened: list[tuple[str, ...]] = [(f"close {name}", line, f"syn {name}") for line in opened]
    shares: list[tuple[int, list[tuple[str, ...]]]] = [
        (5, [(line,) for line in syns]),
        (5, [(line,) for line in moves]),
        (3, [(line,) for line in resets]),
        (2, [(line,) for line in calls]),
        (6, several),
        (1, [(line,) for line in opened]),
        (1, reopened),
    ]
    size = max(len(lines) for _, lines in shares)
    return [lines[slot % len(lines)] for share, lines in shares for slot in range(share * size)]


def of_all() -> list[tuple[str, ...]]:
    """Return events that concern all listeners or none."""
    lines = ["alloc_fail 1", "alloc_fail 2", "alloc_fail 3", "forget", "local 2"]
    lines += [f"bucketlimit {jail} {limit}" for jail in (0, 2) for limit in (1, 3, 5)]
    return [(line,) for line in lines]
