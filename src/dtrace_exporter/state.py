"""What the exporter knows at this moment: written by sessions, read by the collector and pages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, fields

from dtrace_exporter.limits import Limits
from dtrace_exporter.listeners import ListenerTable, SessionId

LIMITS = tuple(limit.name for limit in fields(Limits))
LOST_KINDS = ("principal", "aggregation", "dynamic_variable", "speculation")


@dataclass(slots=True)
class SessionStatus:
    """One session, as its metrics and the landing page show it.

    ``reason`` says in words why a session is down, and is empty while it is up. ``last_record`` is
    in seconds since 1970, or None before the first row. ``features`` has every optional part of
    the program, and whether it is enabled. ``uncounted`` is for how many seconds nobody counted,
    and ``unattributed`` what the kernel's own totals have and the listeners' counters do not; a
    kind that nobody can tell is not in it. ``refused`` is by limit how often it left no room.
    """

    up: bool = False
    reason: str = "starting"
    pid: int | None = None
    restarts: int = 0
    uncounted: float = 0.0
    unattributed: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LOST_KINDS, 0))
    probe_errors: int = 0
    bad_rows: int = 0
    refused: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0))
    last_record: float | None = None
    features: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the numbers come from: ``name`` is dtrace or sock_diag."""

    name: str
    program: str = ""
    dtrace_version: str = ""


async def unchanged() -> None:
    """Do nothing: what writes the state keeps it new."""


@dataclass(slots=True)
class State:
    """All of it; ``refresh`` is to be awaited before it is read."""

    table: ListenerTable = field(default_factory=ListenerTable)
    sessions: dict[SessionId, SessionStatus] = field(default_factory=dict)
    source: Source = Source("dtrace")
    last_reload_successful: bool = True
    last_reload_success: float = 0.0
    refresh: Callable[[], Awaitable[None]] = unchanged

    @property
    def ready(self) -> bool:
        """Whether the configuration is applied and every session is up."""
        return self.last_reload_success > 0 and all(status.up for status in self.sessions.values())
