"""The landing page: sessions and listeners as they are now, for a person with a browser."""

from __future__ import annotations

import gzip
import time
from collections import deque
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import NamedTuple
from urllib.parse import urlencode

from tornado.template import Template

from dtrace_exporter import __version__
from dtrace_exporter.collector import encodable
from dtrace_exporter.listeners import WAIT_BUCKETS, Exports, Identity, Listener, SessionId
from dtrace_exporter.state import SessionStatus, State

MAX_LISTENERS = 1000
"""Rows of the table of listeners; a host with more has them all in its metrics."""

REFRESH_SECONDS = 5
"""How often a page that is looked at shows newer numbers."""

WINDOW_SECONDS = 15.0
"""What rates are measured over, as soon as somebody has looked for that long."""

_LOOKS_APART = 1.0
_OLDEST_LOOK = 120.0
_UNKNOWN = "\N{EN DASH}"
_TEMPLATE = Template(
    files("dtrace_exporter").joinpath("templates/index.html").read_text("utf-8"), "index.html"
)


class Counts(NamedTuple):
    """What a listener has counted up to some moment; times in nanoseconds."""

    syns: int
    drops: int
    accepts: int
    wait_ns: int
    waits: tuple[int, ...]


class Change(NamedTuple):
    """What a listener did within a time, or None where its source cannot tell.

    ``syns``, ``drops`` and ``accepts`` are per second, ``wait`` is the mean time in Q in seconds;
    ``longest`` is a time in seconds that no wait exceeded.
    """

    syns: float | None = None
    drops: float | None = None
    accepts: float | None = None
    wait: float | None = None
    longest: float | None = None


class _Look(NamedTuple):
    when: float
    clocks: Mapping[SessionId, float]
    counts: Mapping[Identity, Counts]


class History:
    """What listeners had counted when somebody looked before: a rate needs two looks.

    Only looks cost anything. A session's counters are as old as its last row, so that row's time
    is their clock: a rate is right whatever the session's interval is.

    Args:
        clock: returns seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._looks: deque[_Look] = deque()

    def look(self, state: State) -> tuple[float | None, Mapping[Identity, Change]]:
        """Compare a state, refreshed just now, with an earlier one, and remember it for later.

        Returns:
            How many seconds ago that was, or None when there is none, and the listeners' changes.
        """
        now = _look(state, self._clock())
        looks = self._looks
        # A clock that was set back makes all that came before it useless.
        while looks and not 0 <= now.when - looks[0].when <= _OLDEST_LOOK:
            looks.popleft()
        while len(looks) > 1 and now.when - looks[1].when >= WINDOW_SECONDS:
            looks.popleft()
        before = looks[0] if looks and now.when > looks[0].when else None
        if not looks or now.when - looks[-1].when >= _LOOKS_APART:
            looks.append(now)
        if before is None:
            return None, {}
        changes = {}
        for listener in state.table:
            status = state.sessions.get(listener.session)
            if status is None or status.up:
                exports = state.table.exports(listener)
                changes[listener.identity] = _change(listener, exports, before, now)
        return now.when - before.when, changes


def _look(state: State, now: float) -> _Look:
    clocks = {name: status.last_record or 0.0 for name, status in state.sessions.items()}
    counts = {}
    for listener in state.table:
        # What is no session is read in the moment in which it is looked at.
        clocks.setdefault(listener.session, now)
        counts[listener.identity] = Counts(
            listener.syns,
            sum(listener.drops.values()),
            listener.accepts,
            listener.wait_ns,
            tuple(listener.waits),
        )
    return _Look(now, clocks, counts)


def _change(listener: Listener, exports: Exports, before: _Look, now: _Look) -> Change:
    old, new = before.counts.get(listener.identity), now.counts[listener.identity]
    began = before.clocks.get(listener.session)
    seconds = now.clocks[listener.session] - began if began else 0.0
    # Counters that went back are another listener's, which came in its place.
    if old is None or seconds <= 0 or any(a < b for a, b in zip(new[:4], old[:4], strict=True)):
        return Change()
    waits = [a - b for a, b in zip(new.waits, old.waits, strict=True)]
    waited = sum(waits)
    timed = exports.accept_wait and waited > 0
    return Change(
        syns=(new.syns - old.syns) / seconds if exports.syns else None,
        drops=(new.drops - old.drops) / seconds if exports.reasons else None,
        accepts=(new.accepts - old.accepts) / seconds if exports.accepts else None,
        wait=(new.wait_ns - old.wait_ns) / waited / 1e9 if timed else None,
        longest=_bound(max(i for i, count in enumerate(waits) if count)) if timed else None,
    )


def _bound(bucket: int) -> float:
    return float("inf") if bucket == WAIT_BUCKETS - 1 else 4 ** (bucket + 5) / 1e9


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


def render(
    state: State,
    history: History,
    telemetry_path: str,
    nonce: str,
    *,
    sort: str = "",
    paused: bool = False,
) -> bytes:
    """Render the page.

    Args:
        state: what it shows.
        history: what it showed before.
        telemetry_path: where its link to the metrics leads.
        nonce: of the style sheet and the script, as in the page's Content-Security-Policy.
        sort: one of SORTS; any other is the fullest first.
        paused: let it stay as it is until somebody asks again.
    """
    seconds, changes = history.look(state)
    rows = [_listener(state, each, changes) for each in sorted(state.table, key=_order)]
    sort = sort if sort in SORTS else _FIRST_SORT
    (key,) = (column.key for column in _COLUMNS if column.name == sort)
    assert key is not None
    rows.sort(key=key)
    sessions = [_session(*item) for item in sorted(state.sessions.items())]
    drops = [row.change.drops for row in rows if row.change.drops is not None]
    fullest = max(rows, key=lambda row: row.fullness, default=None)
    hidden = {
        *({"host"} if not any(session.host for session in state.sessions) else ()),
        *({"name"} if not any(row.name for row in rows) else ()),
        *({"place"} if not any(row.place for row in rows) else ()),
    }
    return _TEMPLATE.generate(
        version=__version__,
        source=encodable(_source(state)),
        sessions=sorted(sessions, key=lambda row: row.up),
        down=[row for row in sessions if not row.up],
        reload_failed=not state.last_reload_successful,
        listeners=rows[:MAX_LISTENERS],
        total=len(rows),
        fullest=fullest if fullest and fullest.fullness >= 0 else None,
        drops=_rate(sum(drops)) if drops else _UNKNOWN,
        dropping=any(drops),
        columns=[column for column in _COLUMNS if column.name not in hidden],
        hidden=hidden,
        sort=sort,
        href=_href,
        paused=paused,
        refresh=REFRESH_SECONDS,
        seconds=seconds,
        rate=_rate,
        duration=_duration,
        longest=_longest,
        telemetry_path=encodable(telemetry_path),
        nonce=nonce,
    )


def compress(body: bytes) -> bytes:
    """Return a page as gzip has it: rows are so alike that the fastest way is good enough."""
    return gzip.compress(body, compresslevel=1)


def _href(sort: str, paused: bool) -> str:
    query = {"sort": sort} if sort != _FIRST_SORT else {}
    return "?" + urlencode(query | ({"refresh": "off"} if paused else {}))


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
    exports = state.table.exports(listener)
    queues = listener.queues
    drops = {reason: listener.drops.get(reason, 0) for reason in exports.reasons}
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
        return f"> {_duration(_bound(WAIT_BUCKETS - 2))}"
    return f"\N{LESS-THAN OR EQUAL TO} {_duration(seconds)}"


def _shown(value: int | None) -> str:
    return _UNKNOWN if value is None else f"{value:,}" if value >= 1_000_000 else str(value)
