"""The landing page: sessions and listeners as they are now, for a person with a browser."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import NamedTuple

from tornado.template import Template

from dtrace_exporter import __version__
from dtrace_exporter.collector import encodable
from dtrace_exporter.listeners import Listener, ListenerTable, SessionId
from dtrace_exporter.state import SessionStatus, State

MAX_LISTENERS = 500
"""Rows of the table of listeners; a host with more has them all in its metrics."""

_UNKNOWN = "\N{EN DASH}"
_TEMPLATE = Template(
    files("dtrace_exporter").joinpath("templates/index.html").read_text("utf-8"), "index.html"
)


def render(state: State, telemetry_path: str, nonce: str) -> bytes:
    """Render the page.

    Args:
        state: what it shows.
        telemetry_path: where its link to the metrics leads.
        nonce: of the style sheet, as in the page's Content-Security-Policy.
    """
    state.refresh()
    listeners = sorted(state.table, key=_order)
    return _TEMPLATE.generate(
        version=__version__,
        source=encodable(_source(state)),
        sessions=[_session(*item) for item in sorted(state.sessions.items())],
        listeners=[_listener(state.table, listener) for listener in listeners[:MAX_LISTENERS]],
        unlisted=max(len(listeners) - MAX_LISTENERS, 0),
        hosts=any(session.host for session in state.sessions),
        telemetry_path=encodable(telemetry_path),
        nonce=nonce,
    )


class _SessionRow(NamedTuple):
    host: str
    name: str
    up: bool
    reason: str
    pid: str
    restarts: int
    lost: str


class _ListenerRow(NamedTuple):
    host: str
    port: int
    name: str
    address: str
    place: str
    q: int | None
    q_limit: int | None
    q0: str
    syns: str
    drops: str
    established: str
    accepts: str
    accept_wait: str


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
    )


def _listener(table: ListenerTable, listener: Listener) -> _ListenerRow:
    exports = table.exports(listener)
    queues = listener.queues
    drops = {reason: listener.drops.get(reason, 0) for reason in exports.reasons}
    return _ListenerRow(
        host=encodable(listener.identity.host),
        port=listener.identity.port,
        name=encodable(table.name(listener)),
        address=encodable(listener.identity.address),
        place=encodable(listener.identity.place),
        q=queues.q if queues else None,
        q_limit=queues.q_limit if queues else None,
        q0=_shown(queues.q0 if queues else None),
        syns=_shown(listener.syns if exports.syns else None),
        drops=encodable(_by_kind(drops)) if drops else _UNKNOWN,
        established=_shown(listener.established if exports.established else None),
        accepts=_shown(listener.accepts if exports.accepts else None),
        accept_wait=_mean_wait(listener) if exports.accept_wait else _UNKNOWN,
    )


def _order(listener: Listener) -> tuple[str, int, str, str]:
    identity = listener.identity
    return identity.host, identity.port, identity.address, identity.place


def _by_kind(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.items() if count) or "0"


def _mean_wait(listener: Listener) -> str:
    waited = sum(listener.waits)
    if not waited:
        return _UNKNOWN
    mean = listener.wait_ns / waited
    for unit, nanoseconds in (("s", 1e9), ("ms", 1e6)):
        if mean >= nanoseconds:
            return f"{mean / nanoseconds:.1f} {unit}"
    return f"{mean / 1e3:.1f} \N{MICRO SIGN}s"


def _shown(value: int | None) -> str:
    return _UNKNOWN if value is None else str(value)
