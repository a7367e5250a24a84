"""What a scrape gets: the families of metrics, read anew from the state each time."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    Metric,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client import registry as prometheus_registry
from prometheus_client.samples import Sample

from dtrace_exporter import __version__
from dtrace_exporter.listeners import (
    SYN_BUCKETS,
    WAIT_BUCKETS,
    Capabilities,
    Identity,
    Listener,
    SessionId,
)
from dtrace_exporter.state import SessionStatus, State

_log = logging.getLogger(__name__)

Labels = tuple[tuple[str, str], ...]


# There are very many of these. Tuples of nothing but tuples, texts and numbers, unlike any other
# class's, are left out where Python looks for garbage, during which nothing else runs.
Layout = tuple[tuple[str, Labels], ...]
"""Which samples a block has: the suffix and the labels of its own of each."""

Block = tuple[str, Layout, tuple[float, ...]]
"""The samples of one family that one listener, session or the exporter itself has.

The family, and the values in the order of the layout.
"""


def _histogram(bounds: Iterable[str]) -> Layout:
    buckets = (("_bucket", (("le", bound),)) for bound in (*bounds, "+Inf"))
    return (*buckets, ("_count", ()), ("_sum", ()))


_COUNTER: Layout = (("_total", ()),)
_GAUGE: Layout = (("", ()),)
_SATURATION = _histogram(str(tenth / 10) for tenth in range(SYN_BUCKETS - 1))
_WAIT = _histogram(str(4**n / 1e9) for n in range(5, WAIT_BUCKETS + 4))

FAMILIES = {
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
        "Half-open connections (Q0) at the last event (DTrace), or now (sock_diag).",
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
    "dtrace_session_uncounted_seconds": (
        "counter",
        "For how long nobody counted: from the session's last row to its next start.",
    ),
    "dtrace_session_unattributed": (
        "counter",
        "What the kernel's own totals have and the listeners' counters do not, by kind.",
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
    "dtrace_session_refused": (
        "counter",
        "Rows that were not taken in for want of room, by the limit that the configuration sets.",
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


class Series:
    """Blocks whose samples share labels; put together before any of them is exported.

    ``identity`` is the labels as Prometheus tells series apart: an empty one is as good as none.
    """

    __slots__ = ("blocks", "identity", "labels")

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.labels = _labels(labels)
        self.identity = tuple(sorted([label for label in self.labels if label[1]]))
        self.blocks: list[Block] = []

    def counter(self, family: str, value: float) -> None:
        """Add a counter."""
        self.blocks.append((family, _COUNTER, (float(value),)))

    def gauge(self, family: str, value: float) -> None:
        """Add a gauge."""
        self.blocks.append((family, _GAUGE, (float(value),)))

    def counters(self, family: str, label: str, values: Mapping[str, float]) -> None:
        """Add a counter for each value of a label."""
        if values:
            layout = _each("_total", label, tuple(values))
            self.blocks.append((family, layout, tuple(map(float, values.values()))))

    def gauges(self, family: str, label: str, values: Mapping[str, float]) -> None:
        """Add a gauge for each value of a label."""
        if values:
            layout = _each("", label, tuple(values))
            self.blocks.append((family, layout, tuple(map(float, values.values()))))

    def info(self, family: str, **labels: str) -> None:
        """Add a gauge that is 1, for the sake of its labels."""
        self.blocks.append((family, (("", _labels(labels)),), (1.0,)))

    def histogram(self, family: str, layout: Layout, cells: Sequence[int], total: float) -> None:
        """Add a histogram, from what each of its buckets has for itself and the values' sum."""
        counts = tuple(map(float, accumulate(cells)))
        values = (*counts, counts[-1], float(total))
        if len(values) != len(layout):
            raise ValueError(f"{len(cells)} buckets in a histogram of {len(layout) - 2}")
        self.blocks.append((family, layout, values))


class Collector(prometheus_registry.Collector):
    """Families of everything in a state."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._known: dict[Identity, _Known] = {}

    def describe(self) -> Iterable[Metric]:
        """Yield every family without samples; a name[] filter is matched against these."""
        return (family(name) for name in FAMILIES)

    def collect(self) -> Iterator[Metric]:
        """Yield the families that have samples."""
        return families(self.read())

    def read(self) -> list[Series]:
        """Read all series at once, as reading() does."""
        work = self.reading()
        while True:
            try:
                next(work)
            except StopIteration as end:
                series: list[Series] = end.value
                return series

    def reading(self) -> Generator[None, None, list[Series]]:
        """Read all series, of which no two have the same labels.

        What cannot be read is left out and logged: one odd listener must not cost the scrape of
        all others. The series of a listener that has not changed is the very same as before.

        Yields:
            After each of them.
        """
        before, self._known = self._known, {}
        found: dict[Labels, Series] = {}
        errors: list[Exception] = []
        for reader in self._readers(before):
            try:
                series = reader()
            except Exception as error:
                errors.append(error)
                continue
            found.setdefault(series.identity, series)
            yield
        if errors:
            _log.error("series left out of a scrape: %d", len(errors), exc_info=errors[0])
        return list(found.values())

    def _readers(self, before: dict[Identity, _Known]) -> Iterator[Callable[[], Series]]:
        for listener in self._state.table:
            # A session may have ended meanwhile, and its listeners with it.
            if not self._state.table.is_watched(listener.session):
                continue
            # Taken out, so that no more than one changed listener is kept twice at a time.
            yield partial(self._listener, listener, before.pop(listener.identity, None))
        for session, status in [*self._state.sessions.items()]:
            yield partial(_session, session, status)
        yield partial(_exporter, self._state)

    def _listener(self, listener: Listener, known: _Known | None) -> Series:
        table = self._state.table
        capabilities, name = table.capabilities(listener), table.name(listener)
        if known is None or (listener, capabilities, name) != known[:3]:
            known = _Known(
                listener.copy(), capabilities, name, _listener(listener, capabilities, name)
            )
        self._known[listener.identity] = known
        return known.series


def registry(collector: prometheus_registry.Collector | None = None) -> CollectorRegistry:
    """Return a registry of what a collector has, if any, and the process's, platform's and gc's."""
    result = CollectorRegistry()
    if collector is not None:
        result.register(collector)
    ProcessCollector(registry=result)
    PlatformCollector(registry=result)
    GCCollector(registry=result)
    return result


def families(series: Iterable[Series]) -> Iterator[Metric]:
    """Yield the families that have samples in some series."""
    found = {name: family(name) for name in FAMILIES}
    for one in series:
        for block in one.blocks:
            found[block[0]].samples.extend(samples(one.labels, block))
    return (family for family in found.values() if family.samples)


def family(name: str) -> Metric:
    """Return a family of FAMILIES, without samples."""
    kind, text = FAMILIES[name]
    return Metric(name, text, kind)


def samples(labels: Labels, block: Block) -> Iterator[Sample]:
    """Yield the samples of a block, with its own labels and those of its series."""
    shared = dict(labels)
    family, layout, values = block
    for (suffix, more), value in zip(layout, values, strict=True):
        yield Sample(family + suffix, shared | dict(more), value)


def encodable(value: str) -> str:
    """Return a text that UTF-8 can encode.

    A lone surrogate, as from a command's output that was no UTF-8, would fail a whole answer.
    """
    return value.encode(errors="replace").decode()


def _labels(labels: Mapping[str, str]) -> Labels:
    return tuple([(name, encodable(value)) for name, value in labels.items()])


@cache
def _each(suffix: str, label: str, values: tuple[str, ...]) -> Layout:
    return tuple((suffix, _labels({label: value})) for value in values)


class _Known(NamedTuple):
    listener: Listener
    capabilities: Capabilities
    name: str
    series: Series


def _listener(listener: Listener, capabilities: Capabilities, name: str) -> Series:
    identity = listener.identity
    labels = {
        "port": str(identity.port),
        "address": identity.address,
        "listener": name,
        capabilities.place_label: identity.place,
    }
    series = Series(labels | _host(identity.host))
    if capabilities.syns:
        series.counter("dtrace_tcp_listen_syns", listener.syns)
        series.histogram(
            "dtrace_tcp_listen_q_saturation_ratio",
            _SATURATION,
            listener.saturation,
            listener.saturation_sum,
        )
    drops = {reason: listener.drops.get(reason, 0) for reason in capabilities.reasons}
    series.counters("dtrace_tcp_listen_drops", "reason", drops)
    if capabilities.established:
        series.counter("dtrace_tcp_listen_established", listener.established)
    if capabilities.accepts:
        series.counter("dtrace_tcp_listen_accepts", listener.accepts)
    if capabilities.accept_wait:
        series.histogram(
            "dtrace_tcp_listen_accept_wait_seconds",
            _WAIT,
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


def _session(session: SessionId, status: SessionStatus) -> Series:
    series = Series({"session": session.name} | _host(session.host))
    series.gauge("dtrace_session_up", status.up)
    series.counter("dtrace_session_restarts", status.restarts)
    series.counter("dtrace_session_uncounted_seconds", status.uncounted)
    series.counters("dtrace_session_unattributed", "kind", status.unattributed)
    series.counters("dtrace_session_lost", "kind", status.lost)
    series.counter("dtrace_session_probe_errors", status.probe_errors)
    series.counter("dtrace_session_bad_rows", status.bad_rows)
    series.counters("dtrace_session_refused", "limit", status.refused)
    if status.last_record is not None:
        series.gauge("dtrace_session_last_record_timestamp_seconds", status.last_record)
    series.gauges("dtrace_session_feature_enabled", "feature", status.features)
    return series


def _exporter(state: State) -> Series:
    series = Series({})
    series.info(
        "dtrace_exporter_source_info",
        source=state.source.name,
        program=state.source.program,
        dtrace_version=state.source.dtrace_version,
    )
    series.info("dtrace_exporter_build_info", version=__version__, python=platform.python_version())
    series.gauge("dtrace_exporter_config_last_reload_successful", state.last_reload_successful)
    series.gauge(
        "dtrace_exporter_config_last_reload_success_timestamp_seconds", state.last_reload_success
    )
    return series


def _host(host: str) -> dict[str, str]:
    return {"host": host} if host else {}
