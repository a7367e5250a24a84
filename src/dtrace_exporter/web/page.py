"""The landing page: sessions and listeners as they are now, for a person with a browser."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import NamedTuple
from urllib.parse import urlencode

from tornado.template import Template

from dtrace_exporter import __version__
from dtrace_exporter.collector import encodable
from dtrace_exporter.listeners import WAIT_BUCKETS, Identity, Listener, SessionId
from dtrace_exporter.state import SessionStatus, State
from dtrace_exporter.web.rates import Change, History, wait_bound

MAX_LISTENERS = 1000
"""Rows of the table of listeners; a host with more has them all in its metrics."""

REFRESH_SECONDS = 5
"""How often a page that is looked at shows newer numbers."""

_UNKNOWN = "\N{EN DASH}"
_TEMPLATE = Template(
    files("dtrace_exporter.web").joinpath("templates/index.html").read_text("utf-8"), "index.html"
)


class _SessionRow(NamedTuple):
    host: str
    name: str
    up: bool
    reason: str
    pid: str
    restarts: int
    lost: str
    faults: int


class _ListenerRow(NamedTuple):
    host: str
    port: int
    name: str
    address: str
    place: str
    q: int | None
    q_limit: int | None
    q0: str
    drops: str
    change: Change

    @property
    def fullness(self) -> float:
        return -1.0 if self.q is None else self.q / max(self.q_limit or 0, 1)


class _Column(NamedTuple):
    """A column of the table of listeners; ``key`` sorts by it, and is None where nothing does."""

    name: str
    title: str
    number: bool
    key: Callable[[_ListenerRow], tuple[object, ...]] | None


def _most(value: float | None) -> float:
    return 1.0 if value is None else -value


_COLUMNS = (
    _Column("host", "Host", False, lambda row: (row.host,)),
    _Column("port", "Port", True, lambda row: (row.port,)),
    _Column("name", "Name", False, lambda row: (not row.name, row.name)),
    _Column("address", "Address", False, None),
    _Column("place", "Zone or netns", False, lambda row: (row.place,)),
    _Column("full", "Q / Qmax", False, lambda row: (-row.fullness, _most(row.change.drops))),
    _Column("q0", "Q0", True, None),
    _Column("syns", "SYN/s", True, lambda row: (_most(row.change.syns),)),
    _Column("accepts", "Accepts/s", True, lambda row: (_most(row.change.accepts),)),
    _Column("drops", "Drops/s", True, lambda row: (_most(row.change.drops),)),
    _Column("dropped", "Drops so far", False, None),
    _Column("wait", "Mean wait", True, lambda row: (_most(row.change.wait),)),
    _Column("longest", "Longest wait", True, lambda row: (_most(row.change.longest),)),
)
_FIRST_SORT = "full"
SORTS = tuple(column.name for column in _COLUMNS if column.key)
"""What the table of listeners can be sorted by."""


class View(NamedTuple):
    """How somebody wants to see the page.

    ``sort`` is one of SORTS; any other is the fullest first. ``paused`` lets the page stay as it is
    until somebody asks again.
    """

    sort: str = ""
    paused: bool = False


class _Listeners(NamedTuple):
    """The table of listeners; ``seconds`` is what its rates are measured over, None for nothing."""

    rows: list[_ListenerRow]
    columns: list[_Column]
    seconds: float | None

    @property
    def shown(self) -> list[_ListenerRow]:
        return self.rows[:MAX_LISTENERS]

    @property
    def names(self) -> set[str]:
        return {column.name for column in self.columns}

    @property
    def fullest(self) -> _ListenerRow | None:
        most = max(self.rows, key=lambda row: row.fullness, default=None)
        return most if most and most.fullness >= 0 else None

    @property
    def drops(self) -> float | None:
        known = [row.change.drops for row in self.rows if row.change.drops is not None]
        return sum(known) if known else None


class _Sessions(NamedTuple):
    rows: list[_SessionRow]

    @property
    def down(self) -> list[_SessionRow]:
        return [row for row in self.rows if not row.up]


def render(state: State, history: History, telemetry_path: str, nonce: str, view: View) -> bytes:
    """Render the page.

    Args:
        state: what it shows.
        history: what it showed before.
        telemetry_path: where its link to the metrics leads.
        nonce: of the style sheet and the script, as in the page's Content-Security-Policy.
        view: how it is asked for.
    """
    sort = view.sort if view.sort in SORTS else _FIRST_SORT
    return _TEMPLATE.generate(
        version=__version__,
        source=encodable(_source(state)),
        reload_failed=not state.last_reload_successful,
        sessions=_sessions(state),
        listeners=_listeners(state, history, sort),
        view=View(sort, view.paused),
        telemetry_path=encodable(telemetry_path),
        nonce=nonce,
        **_WORDS,
    )


def _sessions(state: State) -> _Sessions:
    rows = [_session(*item) for item in sorted(state.sessions.items())]
    return _Sessions(sorted(rows, key=lambda row: row.up))


def _listeners(state: State, history: History, sort: str) -> _Listeners:
    seconds, changes = history.look(state)
    rows = [_listener(state, each, changes) for each in sorted(state.table, key=_order)]
    (key,) = (column.key for column in _COLUMNS if column.name == sort)
    assert key is not None
    rows.sort(key=key)
    empty = {
        *({"host"} if not any(session.host for session in state.sessions) else ()),
        *({"name"} if not any(row.name for row in rows) else ()),
        *({"place"} if not any(row.place for row in rows) else ()),
    }
    columns = [column for column in _COLUMNS if column.name not in empty]
    return _Listeners(rows, columns, seconds)


def compress(body: bytes) -> bytes:
    """Return a page as gzip has it: rows are so alike that the fastest way is good enough."""
    return gzip.compress(body, compresslevel=1)


def _href(view: View) -> str:
    query = {"sort": view.sort} if view.sort != _FIRST_SORT else {}
    return "?" + urlencode(query | ({"refresh": "off"} if view.paused else {}))


def _source(state: State) -> str:
    source = state.source
    program = f", program {source.program}" if source.program else ""
    version = f", DTrace {source.dtrace_version}" if source.dtrace_version else ""
    return source.name + program + version


def _session(session: SessionId, status: SessionStatus) -> _SessionRow:
    return _SessionRow(
        host=encodable(session.host),
        name=encodable(session.name),
        up=status.up,
        reason=encodable(status.reason),
        pid=_shown(status.pid),
        restarts=status.restarts,
        lost=encodable(_by_kind(status.lost)),
        faults=status.probe_errors,
    )


def _listener(state: State, listener: Listener, changes: Mapping[Identity, Change]) -> _ListenerRow:
    capabilities = state.table.capabilities(listener)
    queues = listener.queues
    drops = {reason: listener.drops.get(reason, 0) for reason in capabilities.reasons}
    return _ListenerRow(
        host=encodable(listener.identity.host),
        port=listener.identity.port,
        name=encodable(state.table.name(listener)),
        address=encodable(listener.identity.address),
        place=encodable(listener.identity.place),
        q=queues.q if queues else None,
        q_limit=queues.q_limit if queues else None,
        q0=_shown(queues.q0 if queues else None),
        drops=encodable(_by_kind(drops)) if drops else _UNKNOWN,
        change=changes.get(listener.identity, Change()),
    )


def _order(listener: Listener) -> tuple[str, int, str, str]:
    identity = listener.identity
    return identity.host, identity.port, identity.address, identity.place


def _by_kind(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in counts.items() if count) or "0"


def _rate(per_second: float | None) -> str:
    if per_second is None:
        return _UNKNOWN
    if 0 < per_second < 0.01:
        return "< 0.01"
    if per_second >= 100 or per_second == int(per_second):
        return f"{per_second:,.0f}"
    return f"{per_second:.1f}" if per_second >= 10 else f"{per_second:.2f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return _UNKNOWN
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds * 1e6:.1f} \N{MICRO SIGN}s"


def _longest(seconds: float | None) -> str:
    if seconds is None:
        return _UNKNOWN
    if seconds == float("inf"):
        return f"> {_duration(wait_bound(WAIT_BUCKETS - 2))}"
    return f"\N{LESS-THAN OR EQUAL TO} {_duration(seconds)}"


def _shown(value: int | None) -> str:
    return _UNKNOWN if value is None else f"{value:,}" if value >= 1_000_000 else str(value)


_WORDS = {
    "href": _href,
    "rate": _rate,
    "duration": _duration,
    "longest": _longest,
    "refresh": REFRESH_SECONDS,
}
"""What the template writes with."""
