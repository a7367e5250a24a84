"""Limits on what is stored for a host, because a hostile host or user could report anything."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that is stored for a host at a time.

    The length of names needs no limit: rows.py refuses names that no kernel can have.

    Attributes:
        listeners: the listeners of all of its sessions.
        sockets: their open sockets.
        places: their zones, jails or network namespaces.
        rows: the different rows of counts in one heartbeat of a session.
    """

    listeners: int = 10_000
    sockets: int = 20_000
    places: int = 1_000
    rows: int = 100_000


class LimitError(ValueError):
    """A limit is exceeded.

    Args:
        limit: the name of the limit.
    """

    def __init__(self, limit: str) -> None:
        super().__init__(f"more {limit} than dtrace.limits.{limit} allows")
        self.limit = limit
