"""Telling systemd how the service is, by the datagrams of sd_notify(3).

Elsewhere, or where the unit's Type is not notify, all of it does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from functools import cache

_SOCKET = "NOTIFY_SOCKET"
_WATCHDOG = "WATCHDOG_USEC"
_WATCHDOG_PID = "WATCHDOG_PID"
_STATUS_SECONDS = 5.0


def tell(*assignments: str) -> None:
    """Send assignments such as ``READY=1``; a manager that does not listen is none of ours.

    It does not wait: a message for which there is no room is lost.
    """
    address = os.environ.get(_SOCKET, "")
    if address[:1] not in ("/", "@"):
        return
    name = address.replace("@", "\0", 1) if address[0] == "@" else address
    with contextlib.suppress(OSError):
        _open().sendto("\n".join(assignments).encode("utf-8", "replace"), name)


@cache
def _open() -> socket.socket:
    # Kept open: a service that has run out of descriptors still lives.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.setblocking(False)
    return sock


def tell_reloading() -> None:
    """Say that a reload begins; ``READY=1`` says that it has ended."""
    # Since systemd 253 a unit of Type=notify-reload wants to know when.
    tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_seconds() -> float | None:
    """Return how long systemd waits for a sign of life, None where it does not."""
    try:
        seconds = int(os.environ.get(_WATCHDOG, "")) / 1e6
        mine = int(os.environ.get(_WATCHDOG_PID, os.getpid())) == os.getpid()
    except ValueError:
        return None
    return seconds if mine and seconds > 0 else None


async def keep_telling(status: Callable[[], str]) -> None:
    """Give signs of life for as long as the event loop turns, and the status when it changes.

    Args:
        status: says in a line how the service is.
    """
    limit = watchdog_seconds()
    pause = min(_STATUS_SECONDS, limit / 3) if limit else _STATUS_SECONDS
    told = ""
    while os.environ.get(_SOCKET):
        alive = ["WATCHDOG=1"] if limit else []
        new = status()
        if alive or new != told:
            tell(*alive, f"STATUS={new}")
            told = new
        await asyncio.sleep(pause)
