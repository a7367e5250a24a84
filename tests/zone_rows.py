"""Rows in the format of the programs for Solaris and illumos, for tests."""

from __future__ import annotations

PAIR = 10_000_000
Q_FULL, Q0_FULL, Q0_EVICTED = 1, 2, 3
UNTIMED, LEFT_Q, LEFT_Q0 = 14, 15, 16


def address(port: int, socket: int = 0) -> int:
    """Return the kernel address of one of a port's sockets."""
    return 0xFFFFFF01 << 32 | port << 8 | socket


def number(port: int, telling: int = 1, *, socket: int = 0) -> int:
    """Return the number of one of a port's sockets, made of its address and the row's number."""
    return address(port, socket) << 16 & (1 << 64) - 1 | telling


def told(
    port: int,
    telling: int = 1,
    *,
    socket: int = 0,
    time: int | str = 1,
    zone: str = "global",
    bound: str = "0.0.0.0",
    q0: int = 0,
    q: int = 0,
    qmax: int = 8,
    syn: int = 0,
    q0max: int | None = None,
) -> str:
    """Return the row of a listener and its queues."""
    who = f"{number(port, telling, socket=socket):x} {time} {zone} {bound} {port}"
    limit = "" if q0max is None else f" {q0max}"
    return f"listener {who} {q0} {q} {qmax} {syn}{limit}"


def syns(port: int, events: int, q: int = 0, telling: int = 1) -> str:
    """Return a row of SYNs that found so many connections in Q."""
    return f"syn {number(port, telling):x} {q} {events}"


def drops(port: int, events: int, reason: int = Q_FULL, telling: int = 1) -> str:
    """Return a row of drops."""
    return f"drop {number(port, telling):x} {reason} {events}"


def evicted(port: int, events: int, *, zone: str = "global", bound: str = "0.0.0.0") -> str:
    """Return a row of half-open connections that were evicted from a cache of many listeners."""
    return f"evicted {zone} {bound} {port} {events}"


def opened(port: int, events: int, telling: int = 1) -> str:
    """Return a row of connections that entered Q0."""
    return f"opened {number(port, telling):x} {events}"


def established(port: int, events: int, telling: int = 1) -> str:
    """Return a row of connections that entered Q."""
    return f"established {number(port, telling):x} {events}"


def left(port: int, events: int, how: int = UNTIMED, telling: int = 1, us: int = 0) -> str:
    """Return a row of connections that left Q or Q0; ``us`` is the sum of their times in Q."""
    return f"left {number(port, telling):x} {how} {PAIR * us + events}"


def closed(port: int, time: int, socket: int = 0) -> str:
    """Return the row of a socket that was closed."""
    return f"closed {address(port, socket):x} {time}"
