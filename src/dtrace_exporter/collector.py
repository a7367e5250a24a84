"""What a scrape gets: the families of metrics, made anew from the state each time."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    Metric,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client import registry as prometheus_registry
from prometheus_client.samples import Sample

from dtrace_exporter import __version__, rows
from dtrace_exporter.listeners import Listener, ListenerTable, SessionId
from dtrace_exporter.state import SessionStatus, State

_log = logging.getLogger(__name__)

_SATURATION_BOUNDS = [*(str(tenth / 10) for tenth in range(rows.SYN_BUCKETS - 1)), "+Inf"]
_WAIT_BOUNDS = [*(str(4**n / 1e9) for n in range(5, rows.WAIT_BUCKETS + 4)), "+Inf"]

_FAMILIES = {
    "dtrace_tcp_listen_syns": (
        "counter",
        "SYNs that reached the listener, retransmitted ones too; counted in the kernel (DTrace).",
    ),
    "dtrace_tcp_listen_drops": (
        "counter",
        "Connections refused for want of room; counted in the kernel (DTrace or sock_diag).",
    ),
    "dtrace_tcp_listen_established": (
        "counter",
        "Handshakes completed, the connection put into Q; counted in the kernel (DTrace).",
    ),
    "dtrace_tcp_listen_accepts": (
        "counter",
        "Connections that the application took out of Q; counted in the kernel (DTrace).",
    ),
    "dtrace_tcp_listen_q0_length": (
        "gauge",
        "Half-open connections (Q0) at the last SYN, completion or accept (DTrace).",
    ),
    "dtrace_tcp_listen_q_length": (
        "gauge",
        "Connections waiting for accept (Q) at the last event (DTrace), or now (sock_diag).",
    ),
    "dtrace_tcp_listen_q0_limit": (
        "gauge",
        "Limit of the half-open queue (Q0max), where the kernel has one (DTrace).",
    ),
    "dtrace_tcp_listen_q_limit": (
        "gauge",
        "Limit of the accept queue (Qmax), from DTrace or sock_diag.",
    ),
    "dtrace_tcp_listen_q_saturation_ratio": (
        "histogram",
        "Fullness of the accept queue, Q/Qmax, at each SYN; counted in the kernel (DTrace).",
    ),
    "dtrace_tcp_listen_accept_wait_seconds": (
        "histogram",
        "Time in Q, from the handshake's completion to accept; measured in the kernel (DTrace).",
    ),
    "dtrace_session_up": ("gauge", "1 while the heartbeat of the session's dtrace(1) arrives."),
    "dtrace_session_restarts": (
        "counter",
        "Restarts of the session's dtrace(1) after an unexpected end.",
    ),
    "dtrace_session_lost": (
        "counter",
        "What dtrace(1) said on its standard error that it lost, by kind.",
    ),
    "dtrace_session_probe_errors": (
        "counter",
        "Faults inside the D program, as dtrace(1) reported them on its standard error.",
    ),
    "dtrace_session_bad_rows": (
        "counter",
        "Lines on dtrace(1)'s standard output that are no rows of the D program.",
    ),
    "dtrace_session_last_record_timestamp_seconds": (
        "gauge",
        "When the last row of the D program arrived, by the exporter's clock.",
    ),
    "dtrace_session_feature_enabled": (
        "gauge",
        "1 for each optional part of the D program that this kernel could enable, 0 for the rest.",
    ),
    "dtrace_exporter_source_info": (
        "gauge",
        "Where the listeners' numbers come from, as chosen at the start; always 1.",
    ),
    "dtrace_exporter_build_info": (
        "gauge",
        "Versions of the exporter and of the Python that runs it; always 1.",
    ),
    "dtrace_exporter_config_last_reload_successful": (
        "gauge",
        "1 when the exporter's last attempt to read its configuration succeeded, else 0.",
    ),
    "dtrace_exporter_config_last_reload_success_timestamp_seconds": (
        "gauge",
        "When the exporter last read its configuration with success, by its own clock.",
    ),
}


class Collector(prometheus_registry.Collector):
    """Families of everything in a state."""

    def __init__(self, state: State) -> None:
        self._state = state

    def describe(self) -> Iterable[Metric]:
        """Yield every family without samples; a name[] filter is matched against these."""
        return _families().values()

    def collect(self) -> Iterator[Metric]:
        """Yield the families that have samples.

        What cannot be made into samples is left out and logged: one odd listener must not cost
        the scrape of all others.
        """
        self._state.refresh()
        families = _families()
        seen: set[frozenset[tuple[str, str]]] = set()
        errors: list[Exception] = []
        for read in _readers(self._state):
            try:
                series = read()
            except Exception as error:
                errors.append(error)
                continue
            if series.identity not in seen:
                seen.add(series.identity)
                for family, sample in series.samples:
                    families[family].samples.append(sample)
        if errors:
            _log.error("series left out of a scrape: %d", len(errors), exc_info=errors[0])
        return (family for family in families.values() if family.samples)


def registry(state: State) -> CollectorRegistry:
    """Return a registry of the state's families and the process's, platform's and gc's own."""
    result = CollectorRegistry()
    result.register(Collector(state))
    ProcessCollector(registry=result)
    PlatformCollector(registry=result)
    GCCollector(registry=result)
    return result


def encodable(value: str) -> str:
    """Return a text that UTF-8 can encode.

    A lone surrogate, as from a command's output that was no UTF-8, would fail a whole answer.
    """
    return value.encode(errors="replace").decode()


class _Series:
    """Samples that share labels; put together before any of them is exported."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = {name: encodable(value) for name, value in labels.items()}
        self.samples: list[tuple[str, Sample]] = []

    @property
    def identity(self) -> frozenset[tuple[str, str]]:
        """The labels as Prometheus tells series apart: an empty one is as good as none."""
        return frozenset(label for label in self._labels.items() if label[1])

    def counter(self, family: str, value: float, **labels: str) -> None:
        self._add(family, "_total", value, labels)

    def gauge(self, family: str, value: float, **labels: str) -> None:
        self._add(family, "", value, labels)

    def histogram(
        self, family: str, bounds: Sequence[str], cells: Sequence[int], total: float
    ) -> None:
        count = 0
        for bound, count in zip(bounds, accumulate(cells), strict=True):
            self._add(family, "_bucket", count, {"le": bound})
        self._add(family, "_count", count, {})
        self._add(family, "_sum", total, {})

    def _add(self, family: str, suffix: str, value: float, labels: Mapping[str, str]) -> None:
        more = {name: encodable(value) for name, value in labels.items()}
        self.samples.append((family, Sample(family + suffix, self._labels | more, float(value))))


def _families() -> dict[str, Metric]:
    return {name: Metric(name, text, kind) for name, (kind, text) in _FAMILIES.items()}


def _readers(state: State) -> Iterator[Callable[[], _Series]]:
    for listener in state.table:
        yield partial(_listener, state.table, listener)
    for session, status in state.sessions.items():
        yield partial(_session, session, status)
    yield partial(_exporter, state)


def _listener(table: ListenerTable, listener: Listener) -> _Series:
    identity = listener.identity
    exports = table.exports(listener)
    series = _Series(
        {
            "port": str(identity.port),
            "address": identity.address,
            "listener": table.name(listener),
            exports.place_label: identity.place,
        }
        | _host(identity.host)
    )
    if exports.syns:
        series.counter("dtrace_tcp_listen_syns", listener.syns)
        series.histogram(
            "dtrace_tcp_listen_q_saturation_ratio",
            _SATURATION_BOUNDS,
            listener.saturation,
            listener.saturation_sum,
        )
    for reason in exports.reasons:
        series.counter("dtrace_tcp_listen_drops", listener.drops.get(reason, 0), reason=reason)
    if exports.established:
        series.counter("dtrace_tcp_listen_established", listener.established)
    if exports.accepts:
        series.counter("dtrace_tcp_listen_accepts", listener.accepts)
    if exports.accept_wait:
        series.histogram(
            "dtrace_tcp_listen_accept_wait_seconds",
            _WAIT_BOUNDS,
            listener.waits,
            listener.wait_ns / 1e9,
        )
    queues = listener.queues
    if queues is not None:
        for family, value in (
            ("dtrace_tcp_listen_q0_length", queues.q0),
            ("dtrace_tcp_listen_q_length", queues.q),
            ("dtrace_tcp_listen_q0_limit", queues.q0_limit),
            ("dtrace_tcp_listen_q_limit", queues.q_limit),
        ):
            if value is not None:
                series.gauge(family, value)
    return series


def _session(session: SessionId, status: SessionStatus) -> _Series:
    series = _Series({"session": session.name} | _host(session.host))
    series.gauge("dtrace_session_up", status.up)
    series.counter("dtrace_session_restarts", status.restarts)
    for kind, count in status.lost.items():
        series.counter("dtrace_session_lost", count, kind=kind)
    series.counter("dtrace_session_probe_errors", status.probe_errors)
    series.counter("dtrace_session_bad_rows", status.bad_rows)
    if status.last_record is not None:
        series.gauge("dtrace_session_last_record_timestamp_seconds", status.last_record)
    for feature, enabled in status.features.items():
        series.gauge("dtrace_session_feature_enabled", enabled, feature=feature)
    return series


def _exporter(state: State) -> _Series:
    series = _Series({})
    series.gauge(
        "dtrace_exporter_source_info",
        1,
        source=state.source.name,
        program=state.source.program,
        dtrace_version=state.source.dtrace_version,
    )
    series.gauge(
        "dtrace_exporter_build_info", 1, version=__version__, python=platform.python_version()
    )
    series.gauge("dtrace_exporter_config_last_reload_successful", state.last_reload_successful)
    series.gauge(
        "dtrace_exporter_config_last_reload_success_timestamp_seconds", state.last_reload_success
    )
    return series


def _host(host: str) -> dict[str, str]:
    return {"host": host} if host else {}
