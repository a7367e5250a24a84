"""The landing page: the current sessions and listeners, for people with a browser."""

from __future__ import annotations

import gzip
import re
import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import urlencode

from tornado.template import Template

from dtrace_exporter import __version__, reasons
from dtrace_exporter.collector import encodable
from dtrace_exporter.listeners import WAIT_BUCKETS, Identity, Listener, Owner, SessionId
from dtrace_exporter.state import SessionStatus, State
from dtrace_exporter.turns import at_once
from dtrace_exporter.web.rates import POINT_SECONDS, POINTS, Change, History, Point, wait_bound
from dtrace_exporter.web.selection import FIELDS, Selection

MAX_LISTENERS = 1000
"""The most rows of the table of listeners. The metrics have all listeners."""

REFRESH_SECONDS = 5
"""How often a visible page is updated."""

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


class _ScriptRow(NamedTuple):
    host: str
    name: str
    file: str
    up: bool
    reason: str
    series: str
    last: str
    href: str


class _ListenerRow(NamedTuple):
    host: str
    port: int
    name: str
    owner: str
    address: str
    place: str
    place_name: str
    q: int | None
    q_limit: int | None
    fullness: float | None
    q0: str
    drops: str
    change: Change
    identity: Identity
    open: bool
    closed: bool


_Key = Callable[[_ListenerRow], Any]


class _Column(NamedTuple):
    """A column of the table of listeners.

    Attributes:
        name: its name in queries.
        title: its title.
        number: whether its values are numbers.
        key: returns the sort key of a row, or None for an unknown value, which comes last. None if
            the table cannot be sorted by this column.
        most_first: whether the largest value comes first by default.
    """

    name: str
    title: str
    number: bool = False
    key: _Key | None = None
    most_first: bool = False


def _natural(text: str) -> list[tuple[int, str]]:
    """Return a key that sorts texts by the numbers in them: 9 is before 22."""
    parts = re.split(r"([0-9]+)", text.casefold())
    # A number with more digits is larger. Texts are compared, because int() refuses very long ones.
    parts[1::2] = [number.lstrip("0") for number in parts[1::2]]
    return [(len(part) if at % 2 else 0, part) for at, part in enumerate(parts)]


def _words(get: Callable[[_ListenerRow], str]) -> _Key:
    """Return a sort key for a text of a row; an empty text is an unknown value."""
    return lambda row: _natural(get(row)) if get(row) else None


_COLUMNS = (
    _Column("host", "Host", key=lambda row: _natural(row.host)),
    _Column("port", "Port", number=True, key=lambda row: row.port),
    _Column("name", "Name", key=_words(lambda row: row.name or row.owner)),
    _Column(
        "full",
        "Q / Qmax",
        key=lambda row: None if row.fullness is None else (row.fullness, row.change.drops or 0),
        most_first=True,
    ),
    _Column("history", f"Last {POINTS * POINT_SECONDS / 60:.0f} min"),
    _Column("drops", "Drops/s", True, lambda row: row.change.drops, True),
    _Column("syns", "SYN/s", True, lambda row: row.change.syns, True),
    _Column("accepts", "Accepts/s", True, lambda row: row.change.accepts, True),
    _Column("q0", "Q0", number=True),
    _Column("address", "Address"),
    _Column("place", "Zone, netns or jail", key=lambda row: _natural(row.place)),
    _Column("dropped", "Drops so far"),
    _Column("wait", "Mean wait", True, lambda row: row.change.wait, True),
    _Column("longest", "Longest wait", True, lambda row: row.change.longest, True),
)
_FIRST_SORT = "full"
_SORTED = {column.name: column for column in _COLUMNS if column.key}
SORTS = tuple(_SORTED)
"""The columns that the table of listeners can be sorted by."""


class View(NamedTuple):
    """How a user wants to see the page.

    Attributes:
        sort: one of SORTS; with any other value the fullest listener comes first.
        reverse: whether the order is reversed.
        paused: whether the page is not updated by itself.
        selection: which listeners the table has.
    """

    sort: str = ""
    reverse: bool = False
    paused: bool = False
    selection: Selection = Selection()

    @property
    def query(self) -> dict[str, str]:
        """The parameters of a query for this view."""
        return self.selection.query | self.arrangement

    @property
    def arrangement(self) -> dict[str, str]:
        """The parameters of a query for this view, without those of the selection."""
        query = {"sort": self.sort} if self.sort != _FIRST_SORT else {}
        query |= {"order": "reverse"} if self.reverse else {}
        return query | ({"refresh": "off"} if self.paused else {})

    def by(self, column: str) -> View:
        """Return a view sorted by another column, or in reverse if it is the same column."""
        return self._replace(sort=column, reverse=column == self.sort and not self.reverse)

    @property
    def ascends(self) -> bool:
        """Whether the smallest value comes first."""
        return _SORTED[self.sort].most_first == self.reverse


class _Listeners(NamedTuple):
    """All listeners, and those that the table shows.

    Attributes:
        rows: all listeners.
        chosen: those of the selection, in the order of the table.
        columns: the columns of the table.
        fields: what listeners can be selected by.
        seconds: the time over which their rates are averaged, None if there are no rates.
    """

    rows: list[_ListenerRow]
    chosen: list[_ListenerRow]
    columns: list[_Column]
    fields: list[str]
    seconds: float | None

    @property
    def shown(self) -> list[_ListenerRow]:
        return self.chosen[:MAX_LISTENERS]

    @property
    def names(self) -> set[str]:
        return {column.name for column in self.columns}

    @property
    def fullest(self) -> _ListenerRow | None:
        known = (row for row in self.rows if row.fullness is not None)
        return max(known, key=lambda row: row.fullness or 0.0, default=None)

    @property
    def open(self) -> int:
        return sum(row.open for row in self.rows)

    @property
    def others(self) -> str:
        closed = sum(row.closed for row in self.rows)
        counts = {"closed": closed, "not seen": len(self.rows) - self.open - closed}
        return "".join(f", {count:,} {what}" for what, count in counts.items() if count)

    @property
    def drops(self) -> float | None:
        known = [row.change.drops for row in self.rows if row.change.drops is not None]
        return sum(known) if known else None


class _Sessions(NamedTuple):
    rows: list[_SessionRow]

    @property
    def down(self) -> list[_SessionRow]:
        return [row for row in self.rows if not row.up]


def render(
    state: State,
    history: History,
    telemetry_path: str,
    nonce: str,
    view: View,
    give_way: Callable[[], None] = at_once,
) -> bytes:
    """Render the page.

    Args:
        state: what the page shows.
        history: earlier samples of the state.
        telemetry_path: the path of the metrics, for a link.
        nonce: that of the style sheet and the script in the Content-Security-Policy.
        view: how the user wants to see the page.
        give_way: called very often, about every ten microseconds of work.
    """

    def line(row: _ListenerRow) -> _Line:
        give_way()
        return _line(history.line(row.identity))

    selection = Selection(*map(encodable, view.selection))
    sort = view.sort if view.sort in SORTS else _FIRST_SORT
    view = view._replace(sort=sort, selection=selection)
    return _TEMPLATE.generate(
        version=__version__,
        source=encodable(_source(state)),
        missing=reasons.told(state.source.reason, state.source.name) if state.source.reason else "",
        left_out=encodable(state.left_out),
        reload_failed=not state.last_reload_successful,
        sessions=_sessions(state),
        scripts=_scripts(state, telemetry_path),
        listeners=_listeners(state, history, view, give_way),
        line=line,
        view=view,
        telemetry_path=encodable(telemetry_path),
        nonce=nonce,
        **_WORDS,
    )


def _sessions(state: State) -> _Sessions:
    rows = [_session(*item) for item in state.sessions.items()]
    rows.sort(key=lambda row: (row.up, _natural(row.host), _natural(row.name)))
    return _Sessions(rows)


def _listeners(
    state: State, history: History, view: View, give_way: Callable[[], None]
) -> _Listeners:
    seconds, changes = history.look(state, give_way)
    listeners = sorted(state.table, key=_order)
    rows = {}
    for each in listeners:
        rows[each.identity] = _listener(state, each, changes)
        give_way()
    labels = {
        state.table.capabilities(each).place_label for each in listeners if each.identity.place
    }
    have = {
        "port",
        *({"host"} if any(session.host for session in state.sessions) else ()),
        *({"name"} if any(row.name or row.owner for row in rows.values()) else ()),
        *({"owner"} if any(row.owner for row in rows.values()) else ()),
        *(labels | {"place"} if labels else ()),
    }
    columns = [column for column in _COLUMNS if column.name in have or column.name not in _MAYBE]
    chosen = [rows[each.identity] for each in view.selection.of(listeners, state)]
    fields = [field for field in FIELDS if field in have or field in view.selection.query]
    return _Listeners([*rows.values()], _sorted(chosen, view), columns, fields, seconds)


_MAYBE = ("host", "name", "place")
"""Columns that are left out if they would be empty."""


def _sorted(rows: list[_ListenerRow], view: View) -> list[_ListenerRow]:
    key = _SORTED[view.sort].key
    assert key is not None
    known: list[_ListenerRow] = []
    unknown: list[_ListenerRow] = []
    for row in rows:
        (unknown if key(row) is None else known).append(row)
    known.sort(key=key, reverse=not view.ascends)
    return known + unknown


def compress(body: list[bytes]) -> list[bytes]:
    """Compress a page by gzip. Its rows are similar, so the fastest level is good enough."""
    return [gzip.compress(b"".join(body), compresslevel=1)]


def _href(view: View) -> str:
    return "?" + urlencode(view.query)


class _Line(NamedTuple):
    """A listener's history in words and as paths of SVG, one unit wide for a point and ten high."""

    text: str
    full: str
    drops: str


def _line(points: list[Point]) -> _Line:
    """Draw the highest fullness of Q in each point, and above it marks for drops."""
    full, drops = "", ""
    before = None
    for at, point in enumerate(points, POINTS - len(points)):
        height = None if point.fullness is None else round(10 - 9 * point.fullness, 1)
        if height != before:
            full += f"M{at} 10" if before is None else f"H{at}"
            full += f"V{10 if height is None else height:g}"
        before = height
        drops += f"M{at} .5h1" if point.drops else ""
    full += "" if before is None else f"H{POINTS}V10"
    most = max((point.fullness for point in points if point.fullness is not None), default=None)
    if most is None:
        return _Line("", "", "")
    dropped = sum(point.drops for point in points)
    return _Line(f"up to {_percent(most)} full, {dropped:,.0f} drops", full, drops)


def _percent(fullness: float) -> str:
    return f"{100 * fullness:.0f} %"


def _level(fullness: float) -> str:
    return "low" if fullness < 0.5 else "mid" if fullness < 0.8 else "high"


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


def _scripts(state: State, telemetry_path: str) -> list[_ScriptRow]:
    rows = []
    for session, script in sorted(state.scripts.items()):
        status = state.sessions[session]
        names = [("name[]", name) for family in script.families for name in family.samples]
        last = None if status.last_record is None else max(0.0, time.time() - status.last_record)
        rows.append(
            _ScriptRow(
                host=encodable(session.host),
                name=encodable(session.name.partition("-")[2]),
                file=encodable(script.file),
                up=status.up,
                reason=encodable(status.reason),
                series=f"{len(script):,} of {script.limit:,}",
                last=_UNKNOWN if last is None else f"{last:.0f} s ago",
                href=f"{encodable(telemetry_path)}?{urlencode(names)}",
            )
        )
    return rows


def _listener(state: State, listener: Listener, changes: Mapping[Identity, Change]) -> _ListenerRow:
    capabilities = state.table.capabilities(listener)
    queues = listener.queues
    drops = listener.drops_by(capabilities.reasons)
    owner = state.owner(listener) or Owner()
    return _ListenerRow(
        host=encodable(listener.identity.host),
        port=listener.identity.port,
        name=encodable(state.table.name(listener)),
        owner=encodable(str(owner)),
        address=encodable(listener.identity.address),
        place=encodable(listener.identity.place),
        place_name=encodable(owner.place_name),
        q=queues.q if queues else None,
        q_limit=queues.q_limit if queues else None,
        fullness=listener.fullness,
        q0=_shown(queues.q0 if queues else None),
        drops=encodable(_by_kind(drops)) if drops else _UNKNOWN,
        change=changes.get(listener.identity, Change()),
        identity=listener.identity,
        open=bool(listener.sockets),
        closed=not listener.sockets and listener.closed is not None,
    )


def _order(listener: Listener) -> tuple[object, ...]:
    identity = listener.identity
    place = _natural(identity.place)
    return _natural(identity.host), identity.port, _natural(identity.address), place


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
    "percent": _percent,
    "level": _level,
    "titles": {
        "port": "Port",
        "name": "Name",
        "host": "Host",
        "zone": "Zone",
        "netns": "Netns",
        "jail": "Jail",
        "owner": "Owner",
    },
    "points": POINTS,
    "refresh": REFRESH_SECONDS,
}
"""The names that the template uses."""
