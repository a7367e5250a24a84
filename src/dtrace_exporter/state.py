"""The current state of the exporter: written by sessions, read by the collector and the pages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from dtrace_exporter.limits import Limits
from dtrace_exporter.listeners import Identity, Listener, ListenerTable, Owner, SessionId
from dtrace_exporter.scripts.metrics import ScriptMetrics

LIMITS = tuple(limit.name for limit in fields(Limits))
LOST_KINDS = ("principal", "aggregation", "dynamic_variable", "speculation")


@dataclass(slots=True)
class SessionStatus:
    """The status of a session, as its metrics and the landing page show it.

    Attributes:
        up: whether its heartbeat arrives.
        reason: why it is down, in words; empty while it is up.
        pid: the process of its dtrace(1), None if there is none.
        restarts: how often dtrace(1) was restarted after an unexpected end.
        uncounted: for how many seconds nothing was counted.
        unattributed: events that the kernel's own totals have and the listeners' counters lack, by
            kind; only the kinds that are known.
        lost: losses that dtrace(1) reported, by kind.
        probe_errors: faults in the D program that dtrace(1) reported.
        bad_rows: lines of its output that are not rows.
        refused: rows that were refused because of a limit, by limit.
        last_record: when the last row came, in seconds since 1970; None before the first row.
        features: whether each optional part of the program is enabled.
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
    """The source of this host's numbers.

    Attributes:
        name: dtrace, sock_diag or netstat.
        program: the name of the D program, empty without DTrace.
        dtrace_version: the version of dtrace(1), empty if not known.
        reason: why it is not dtrace, a key of reasons.REASONS; empty if it is dtrace.
    """

    name: str
    program: str = ""
    dtrace_version: str = ""
    reason: str = ""


@dataclass(slots=True)
class WebStatus:
    """The state of the web configuration file.

    ``certificate_end`` is when the first of the server's certificates expires, in seconds since
    1970, or None without TLS.
    """

    last_reload_successful: bool = True
    certificate_end: float | None = None


class UnixQueues(NamedTuple):
    """The listening UNIX sockets.

    Attributes:
        by_path: Q and Qmax by place and path.
        cookies: the cookies of the places, where the kernel tells them.
        left_out: how many paths are left out.
    """

    by_path: Mapping[tuple[str, str], tuple[int, int]]
    cookies: Mapping[str, int]
    left_out: int


async def unchanged() -> None:
    """Do nothing, because the sessions update the state themselves."""


@dataclass(slots=True)
class State:
    """The whole state of the exporter.

    Attributes:
        table: the listeners.
        sessions: the status of each session.
        scripts: the metrics of each script's session.
        source: where this host's numbers come from.
        left_out: why listeners of other network namespaces are missing; empty if none are.
        owners: on Linux, the owners of this host's open listeners when they were last looked up. It
            is replaced as a whole and never changed.
        last_reload_successful: whether the configuration could be read at the last attempt.
        last_reload_success: when it was last read, in seconds since 1970; 0 before the first time.
        web: None without a web configuration file.
        unix: None if the configuration asks for no UNIX sockets.
        refresh: await it before the state is read.
        refresh_unix: await it before ``unix`` is read.
    """

    table: ListenerTable = field(default_factory=ListenerTable)
    sessions: dict[SessionId, SessionStatus] = field(default_factory=dict)
    scripts: dict[SessionId, ScriptMetrics] = field(default_factory=dict)
    source: Source = Source("dtrace")
    left_out: str = ""
    owners: Mapping[Identity, Owner] = field(default_factory=dict)
    last_reload_successful: bool = True
    last_reload_success: float = 0.0
    web: WebStatus | None = None
    unix: UnixQueues | None = None
    refresh: Callable[[], Awaitable[None]] = unchanged
    refresh_unix: Callable[[], Awaitable[None]] = unchanged

    def owner(self, listener: Listener) -> Owner | None:
        """Return the owner of an open listener, None if it is not known."""
        if not listener.sockets:
            return None
        return self.owners.get(listener.identity) or listener.owner

    @property
    def ready(self) -> bool:
        """Whether the configuration is applied and every session is up."""
        return self.last_reload_success > 0 and all(status.up for status in self.sessions.values())
