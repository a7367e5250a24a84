"""How much of a host is taken in: a hostile one, or a user of it, could tell of any number."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that is known of a host at a time.

    ``listeners``, open ``sockets`` and ``places`` (zones or network namespaces) are those of all
    of its sessions; ``rows`` are the different rows of counts in one heartbeat of a session. How
    long names are needs no limit of its own: rows.py takes none that a kernel cannot have.
    """

    listeners: int = 10_000
    sockets: int = 20_000
    places: int = 1_000
    rows: int = 100_000


class LimitError(ValueError):
    """Something is one too many.

    Args:
        limit: the name of the limit.
    """

    def __init__(self, limit: str) -> None:
        super().__init__(f"more {limit} than dtrace.limits.{limit} allows")
        self.limit = limit
