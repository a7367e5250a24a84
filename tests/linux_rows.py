"""Rows in the format of linux.d and linux_unix.d, for tests."""

from __future__ import annotations

import socket as sockets
import struct

TAKEN, Q_FULL, Q0_FULL, OTHER = 10, 11, 12, 13
ACK_Q_FULL, ACK_OTHER, ESTABLISHED, MEASURED, ACCEPTED, RESENT = 21, 23, 30, 31, 40, 50

_KERNEL = 0x7F << 57


def number(port: int, place: int = 1, socket: int = 0, generation: int = 0) -> int:
    """Return the number of one of a port's sockets, made of its address and its listen() count."""
    return (1 << 47 | (place & 0x7FFFFF) << 24 | port << 8 | socket) << 13 | generation


def address(port: int, place: int = 1, socket: int = 0) -> int:
    """Return the kernel address of one of a port's sockets."""
    return _KERNEL | number(port, place, socket) >> 13 << 6


def told(
    port: int,
    *,
    place: int = 1,
    socket: int = 0,
    generation: int = 0,
    time: int = 1,
    state: int = 10,
    cookie: int = 1,
    bound: str = "0.0.0.0",
    q0: int = 0,
    q: int = 1,
    qmax: int = 8,
) -> str:
    """Return the row of a listener."""
    who = f"{number(port, place, socket, generation):x} {time} {state}"
    return f"listener {who} {place} {cookie} {bound} {port} {q0} {q} {qmax}"


def counted(
    port: int,
    events: int,
    what: int = TAKEN,
    *,
    place: int = 1,
    socket: int = 0,
    generation: int = 0,
    qmax: int = 0,
    part: int = 0,
    value: int = 0,
) -> str:
    """Return a row of counts; ``value`` is the sum of the values."""
    who = f"{number(port, place, socket, generation):x}"
    return f"count {who} {what} {qmax} {part} {10_000_000 * value + events}"


def syns(port: int, events: int, *, place: int = 1, q: int = 1, qmax: int = 8) -> list[str]:
    """Return the lines about SYNs at a new listener."""
    part = min((10 * q + qmax - 1) // qmax, 11)
    return [
        *("tick 1", "set 1", told(port, place=place, q=q, qmax=qmax)),
        counted(port, events, place=place, qmax=qmax, part=part, value=events * q),
    ]


def unix_refused(name: bytes, events: int, *, inode: int = 5, cookie: int = 1) -> list[str]:
    """Return the rows of a UNIX socket's refusals; its name is as unix_diag has it."""
    whole = struct.pack("=H", sockets.AF_UNIX) + name
    begin, *ends = (whole.ljust(136, b"\x88")[at:end] for at, end in ((0, 40), (40, 88), (88, 136)))
    more = [
        f"more {inode} {part} {end.hex()} {events}"
        for part, end in enumerate(ends, 1)
        if len(whole) > 40 + 48 * (part - 1)
    ]
    return [*more, f"unix {cookie} {inode} {len(whole)} {begin.hex()} {events}"]
