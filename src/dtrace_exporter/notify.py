"""Tells systemd about the state of the service, by the datagrams of sd_notify(3).

Without systemd, or if the unit's Type is not notify, these functions do nothing.
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
    """Send assignments such as ``READY=1``.

    Errors are ignored, and it never blocks: if the socket's buffer is full, the message is lost.
    """
    address = os.environ.get(_SOCKET, "")
    if address[:1] not in ("/", "@"):
        return
    name = address.replace("@", "\0", 1) if address[0] == "@" else address
    with contextlib.suppress(OSError):
        _open().sendto("\n".join(assignments).encode("utf-8", "replace"), name)


@cache
def _open() -> socket.socket:
    # It stays open, so that it works even if the process runs out of descriptors.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.setblocking(False)
    return sock


def tell_reloading() -> None:
    """Tell systemd that a reload begins. ``READY=1`` tells it that the reload has ended."""
    # Since systemd 253 a unit of Type=notify-reload needs the time as well.
    tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_seconds() -> float | None:
    """Return the time-out of systemd's watchdog, in seconds; None if it is not active."""
    try:
        seconds = int(os.environ.get(_WATCHDOG, "")) / 1e6
        mine = int(os.environ.get(_WATCHDOG_PID, os.getpid())) == os.getpid()
    except ValueError:
        return None
    return seconds if mine and seconds > 0 else None


async def keep_telling(status: Callable[[], str]) -> None:
    """Notify systemd's watchdog for ever, and send the status when it changes.

    Args:
        status: returns the status of the service in one line.
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
