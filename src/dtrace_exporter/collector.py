"""The families of metrics, read from the state at each scrape."""

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
    ListenerTable,
    Owner,
    SessionId,
)
from dtrace_exporter.scripts.metrics import ScriptMetrics
from dtrace_exporter.sockets import MORE_THAN
from dtrace_exporter.state import SessionStatus, State
from dtrace_exporter.unix_drops import PART

_log = logging.getLogger(__name__)

Labels = tuple[tuple[str, str], ...]


# There are very many of these, and nothing else runs during Python's garbage collection. It skips
# tuples that contain only tuples, strings and numbers; it would not skip instances of a class.
Layout = tuple[tuple[str, Labels], ...]
"""The samples of a block: for each its suffix, and the labels that only it has."""

Block = tuple[str, Layout, tuple[float, ...]]
"""The samples of one family of one listener, session or the exporter itself.

It has the family's name, the layout, and the values in the order of the layout.
"""


def _histogram(bounds: Iterable[str]) -> Layout:
    buckets = (("_bucket", (("le", bound),)) for bound in (*bounds, "+Inf"))
    return (*buckets, ("_count", ()), ("_sum", ()))


_COUNTER: Layout = (("_total", ()),)
_GAUGE: Layout = (("", ()),)
_SATURATION = _histogram(str(tenth / 10) for tenth in range(SYN_BUCKETS - 1))
_WAIT = _histogram(str(4**n / 1e9) for n in range(5, WAIT_BUCKETS + 4))

OWNED = "dtrace_tcp_listen_info"
"""The family with the owners of listeners."""

FAMILIES = {
    "dtrace_tcp_listen_syns": (
        "counter",
        "SYNs that reached the listener, retransmitted ones too; counted in the kernel (DTrace).",
    ),
    "dtrace_tcp_listen_drops": (
        "counter",
        "Connections refused for lack of room; counted in the kernel (DTrace or sock_diag).",
    ),
    "dtrace_tcp_listen_established": (
        "counter",
        "Handshakes completed, the connection put into Q; counted in the kernel (DTrace).",
    ),
    "dtrace_tcp_listen_accepts": (
        "counter",
        "Connections that the application took out of Q; counted in the kernel (DTrace).",
    ),
    "dtrace_tcp_listen_handshake_seconds": (
        "histogram",
        "Time from the SYN-ACK to the final ACK; measured in the kernel, by TCP itself (DTrace).",
    ),
    "dtrace_tcp_listen_synack_retransmits": (
        "counter",
        "SYN-ACKs that the kernel sent again for the listener; counted in the kernel (DTrace).",
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
    "dtrace_tcp_listen_backlog_requested": (
        "gauge",
        "The backlog that the application passed to listen(); the kernel made Qmax of it (DTrace).",
    ),
    "dtrace_tcp_listen_q_capacity": (
        "gauge",
        "How many connections the accept queue can hold on this kernel; from DTrace or sock_diag.",
    ),
    "dtrace_tcp_listen_q_saturation_ratio": (
        "histogram",
        "Fullness of the accept queue, Q/Qmax, at each SYN; counted in the kernel (DTrace).",
    ),
    "dtrace_tcp_listen_q_sampled_ratio": (
        "histogram",
        "Fullness of the accept queue, Q/Qmax, sampled between scrapes (sock_diag).",
    ),
    "dtrace_tcp_listen_accept_wait_seconds": (
        "histogram",
        "Time in Q, from the handshake's completion to accept; measured in the kernel (DTrace).",
    ),
    "dtrace_tcp_refused": (
        "counter",
        "SYNs answered with RST because nobody listened, by port; counted in the kernel (DTrace).",
    ),
    OWNED: (
        "gauge",
        "Who owns the listener, as its labels say; always 1 (sock_diag and /proc, or DTrace).",
    ),
    "dtrace_unix_listen_q_length": (
        "gauge",
        "Connections waiting for accept (Q) at a UNIX socket, now (sock_diag).",
    ),
    "dtrace_unix_listen_q_limit": (
        "gauge",
        "Limit of the accept queue (Qmax) of a UNIX socket, its backlog (sock_diag).",
    ),
    "dtrace_unix_listen_q_capacity": (
        "gauge",
        "How many connections the accept queue of a UNIX socket can hold, by Qmax (sock_diag).",
    ),
    "dtrace_unix_listen_drops": (
        "counter",
        "Failures of connect() with EAGAIN as the queue was full; counted in the kernel (DTrace).",
    ),
    "dtrace_unix_listen_left_out": (
        "gauge",
        "Paths of UNIX sockets that the configuration matches but that are too many to export.",
    ),
    "dtrace_session_up": ("gauge", "1 while the heartbeat of the session's dtrace(1) arrives."),
    "dtrace_session_restarts": (
        "counter",
        "Restarts of the session's dtrace(1) after an unexpected end.",
    ),
    "dtrace_session_uncounted_seconds": (
        "counter",
        "Time in which nothing was counted, from the session's last row to its next start.",
    ),
    "dtrace_session_unattributed": (
        "counter",
        "Events that the kernel's own totals have and the listeners' counters lack, by kind.",
    ),
    "dtrace_session_lost": (
        "counter",
        "Losses of data that dtrace(1) reported on its standard error, by kind.",
    ),
    "dtrace_session_probe_errors": (
        "counter",
        "Faults inside the D program, as dtrace(1) reported them on its standard error.",
    ),
    "dtrace_session_bad_rows": (
        "counter",
        "Lines on dtrace(1)'s standard output that are not rows of the D program.",
    ),
    "dtrace_session_refused": (
        "counter",
        "Rows that were refused because a limit of the configuration was reached, by limit.",
    ),
    "dtrace_session_last_record_timestamp_seconds": (
        "gauge",
        "When the last row of the D program arrived, by the exporter's clock.",
    ),
    "dtrace_session_feature_enabled": (
        "gauge",
        "1 for each optional part of the D program that this kernel could enable, 0 for the rest.",
    ),
    "dtrace_script_info": (
        "gauge",
        "A script whose aggregations are metrics, and its file; always 1.",
    ),
    "dtrace_exporter_source_info": (
        "gauge",
        "Where the listeners' numbers come from, and why that is not DTrace; always 1.",
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
        "When the exporter last read its configuration successfully, by its own clock.",
    ),
    "dtrace_exporter_web_config_last_reload_successful": (
        "gauge",
        "1 when the exporter's last attempt to read its web configuration succeeded, else 0.",
    ),
    "dtrace_exporter_web_certificate_expiry_timestamp_seconds": (
        "gauge",
        "When the first of the web server's certificates expires, as the certificate says.",
    ),
}


class Series:
    """Blocks whose samples share labels; they are complete before any of them is exported.

    Attributes:
        blocks: the blocks.
        labels: the labels that all samples share.
        identity: what Prometheus compares to tell series apart: the labels that are not empty.
        piece: distinguishes the series of a script, whose samples have more labels.
    """

    __slots__ = ("blocks", "identity", "labels", "piece")

    def __init__(self, labels: Mapping[str, str], piece: str = "") -> None:
        self.labels = _labels(labels)
        self.piece = piece
        known = [label for label in self.labels if label[1]]
        self.identity = (*sorted(known), *([("", piece)] if piece else []))
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
        """Add a gauge of value 1 with some labels."""
        self.blocks.append((family, (("", _labels(labels)),), (1.0,)))

    def histogram(self, family: str, layout: Layout, cells: Sequence[int], total: float) -> None:
        """Add a histogram.

        Args:
            family: its name.
            layout: its samples.
            cells: how many values are in each bucket, not cumulative.
            total: the sum of the values.
        """
        counts = tuple(map(float, accumulate(cells)))
        values = (*counts, counts[-1], float(total))
        if len(values) != len(layout):
            raise ValueError(f"{len(cells)} buckets in a histogram of {len(layout) - 2}")
        self.blocks.append((family, layout, values))


class Collector(prometheus_registry.Collector):
    """Collects the families of everything in a state."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._known: dict[Identity, _Known] = {}

    def describe(self) -> Iterable[Metric]:
        """Yield every family without samples; a name[] filter is matched against these."""
        return (family(name, self.families) for name in self.families)

    def collect(self) -> Iterator[Metric]:
        """Yield the families that have samples."""
        return families(self.read(), self.families)

    @property
    def families(self) -> dict[str, tuple[str, str]]:
        """The type and help of all families, also of those of scripts, by name."""
        scripts = self._state.scripts.values()
        return FAMILIES | {
            each.name: (each.kind, encodable(each.help))
            for script in scripts
            for each in script.families
        }

    def read(self) -> list[Series]:
        """Read all series at once; see reading()."""
        work = self.reading()
        while True:
            try:
                next(work)
            except StopIteration as end:
                series: list[Series] = end.value
                return series

    def reading(self) -> Generator[None, None, list[Series]]:
        """Read all series, of which no two have the same labels.

        If a listener cannot be read, its series is left out and this is logged, so that the scrape
        still has all others. For a listener that has not changed, the same object as before is
        returned.

        Yields:
            After each series.
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
            # Its session may have ended meanwhile.
            if not self._state.table.is_watched(listener.session):
                continue
            # pop(), so that at most one changed listener is in memory twice.
            yield partial(self._listener, listener, before.pop(listener.identity, None))
        if self._state.unix is not None:
            for (place, path), queues in self._state.unix.by_path.items():
                yield partial(_unix, place, path, *queues, self._unix_drops(place, path))
        for session, status in [*self._state.sessions.items()]:
            yield partial(_session, session, status)
            if status.features.get("refused") and self._state.table.is_watched(session):
                yield partial(_refused, session.host, self._state.table)
        for session, script in [*self._state.scripts.items()]:
            yield partial(_script_info, session, script)
            for piece, block in script.blocks():
                yield partial(_script, session, piece, block)
        yield partial(_exporter, self._state)

    def _unix_drops(self, place: str, path: str) -> int | None:
        """Return how many connect()s a UNIX socket has refused, None if that is not counted."""
        state = self._state
        counted = any(status.features.get(PART) for status in state.sessions.values())
        cookie = state.unix.cookies.get(place) if counted and state.unix else None
        return None if cookie is None else state.table.unix_drops.of(cookie, path)

    def _listener(self, listener: Listener, known: _Known | None) -> Series:
        table = self._state.table
        capabilities, name = table.capabilities(listener), table.name(listener)
        owner = self._state.owner(listener)
        asked = capabilities, name, table.has_histograms(listener), owner
        if known is None or (listener, asked) != known[:2]:
            known = _Known(listener.copy(), asked, listener_series(listener, *asked))
        self._known[listener.identity] = known
        return known.series


def registry(collector: prometheus_registry.Collector | None = None) -> CollectorRegistry:
    """Return a registry with the metrics of the process, the platform and the garbage collector.

    Args:
        collector: a further collector for it, if any.
    """
    # auto_describe asks collectors that do not describe themselves, so that name[] finds theirs.
    result = CollectorRegistry(auto_describe=True)
    if collector is not None:
        result.register(collector)
    ProcessCollector(registry=result)
    PlatformCollector(registry=result)
    GCCollector(registry=result)
    return result


def families(
    series: Iterable[Series], known: Mapping[str, tuple[str, str]] = FAMILIES
) -> Iterator[Metric]:
    """Yield the families that have samples in some series."""
    found = {name: family(name, known) for name in known}
    for one in series:
        for block in one.blocks:
            found[block[0]].samples.extend(samples(one.labels, block))
    return (family for family in found.values() if family.samples)


def family(name: str, known: Mapping[str, tuple[str, str]] = FAMILIES) -> Metric:
    """Return a family, without samples."""
    kind, text = known[name]
    return Metric(name, text, kind)


def samples(labels: Labels, block: Block) -> Iterator[Sample]:
    """Yield the samples of a block, with its own labels and those of its series."""
    shared = dict(labels)
    family, layout, values = block
    for (suffix, more), value in zip(layout, values, strict=True):
        yield Sample(family + suffix, shared | dict(more), value)


def encodable(value: str) -> str:
    """Return a text that UTF-8 can encode.

    Output of a command that was not UTF-8 has lone surrogates; they would make an answer fail.
    """
    return value if value.isascii() else value.encode(errors="replace").decode()


def _labels(labels: Mapping[str, str]) -> Labels:
    return tuple([(name, encodable(value)) for name, value in labels.items()])


@cache
def _each(suffix: str, label: str, values: tuple[str, ...]) -> Layout:
    return tuple((suffix, _labels({label: value})) for value in values)


class _Known(NamedTuple):
    listener: Listener
    asked: tuple[Capabilities, str, bool, Owner | None]
    series: Series


def listener_series(
    listener: Listener,
    capabilities: Capabilities,
    name: str,
    histograms: bool,
    owner: Owner | None = None,
) -> Series:
    """Return the series of a listener.

    Args:
        listener: the listener.
        capabilities: which series its source can fill.
        name: its name in the configuration, or an empty string.
        histograms: whether its histograms are exported.
        owner: its owner, None if it has not been looked up.
    """
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
    if capabilities.syns and histograms:
        series.histogram(
            "dtrace_tcp_listen_q_saturation_ratio",
            _SATURATION,
            listener.saturation,
            listener.saturation_sum,
        )
    if capabilities.sampled and histograms:
        series.histogram(
            "dtrace_tcp_listen_q_sampled_ratio",
            _SATURATION,
            listener.sampled or [0] * SYN_BUCKETS,
            listener.sampled_sum,
        )
    drops = listener.drops_by(capabilities.reasons)
    series.counters("dtrace_tcp_listen_drops", "reason", drops)
    if capabilities.established:
        series.counter("dtrace_tcp_listen_established", listener.established)
    if capabilities.handshake and histograms:
        series.histogram(
            "dtrace_tcp_listen_handshake_seconds",
            _WAIT,
            listener.handshakes,
            listener.handshake_ns / 1e9,
        )
    if capabilities.accepts:
        series.counter("dtrace_tcp_listen_accepts", listener.accepts)
    if capabilities.synack_retransmits:
        series.counter("dtrace_tcp_listen_synack_retransmits", listener.synack_retransmits)
    if capabilities.accept_wait and histograms:
        series.histogram(
            "dtrace_tcp_listen_accept_wait_seconds",
            _WAIT,
            listener.waits,
            listener.wait_ns / 1e9,
        )
    queues = listener.queues
    if queues is not None:
        limit = queues.q_limit
        for family, value in (
            ("dtrace_tcp_listen_q0_length", queues.q0),
            ("dtrace_tcp_listen_q_length", queues.q),
            ("dtrace_tcp_listen_q0_limit", queues.q0_limit),
            ("dtrace_tcp_listen_q_limit", limit),
            ("dtrace_tcp_listen_backlog_requested", queues.requested),
            (
                "dtrace_tcp_listen_q_capacity",
                None if limit is None else listener.q_capacity.of(limit),
            ),
        ):
            if value is not None:
                series.gauge(family, value)
    if owner is not None:
        series.info(OWNED, **owner_labels(owner, capabilities.place_label))
    return series


def owner_labels(owner: Owner, place_label: str) -> dict[str, str]:
    """Return the labels of an owner. Some may be empty, which for Prometheus means absent."""
    named = {f"{place_label}_name": owner.place_name} if owner.place_name else {}
    whose = owner._asdict()
    del whose["place_name"]
    return whose | named


def _unix(place: str, path: str, q: int, qmax: int, drops: int | None) -> Series:
    series = Series({"path": path, "netns": place})
    series.gauge("dtrace_unix_listen_q_length", q)
    series.gauge("dtrace_unix_listen_q_limit", qmax)
    # net/unix/af_unix.c, unix_recvq_full(): the same as for TCP.
    series.gauge("dtrace_unix_listen_q_capacity", MORE_THAN.of(qmax))
    if drops is not None:
        series.counter("dtrace_unix_listen_drops", drops)
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


def _refused(host: str, table: ListenerTable) -> Series:
    series = Series({"netns": ""} | _host(host), "refused")
    series.counters("dtrace_tcp_refused", "port", table.refused(host))
    return series


def _script_info(session: SessionId, script: ScriptMetrics) -> Series:
    series = Series(_host(session.host), f"{session.name} info")
    series.info("dtrace_script_info", script=session.name.partition("-")[2], file=script.file)
    return series


def _script(session: SessionId, piece: str, block: Block) -> Series:
    series = Series(_host(session.host), f"{session.name} {piece}")
    series.blocks.append(block)
    return series


def _exporter(state: State) -> Series:
    series = Series({})
    series.info(
        "dtrace_exporter_source_info",
        source=state.source.name,
        program=state.source.program,
        dtrace_version=state.source.dtrace_version,
        reason=state.source.reason,
    )
    series.info("dtrace_exporter_build_info", version=__version__, python=platform.python_version())
    series.gauge("dtrace_exporter_config_last_reload_successful", state.last_reload_successful)
    series.gauge(
        "dtrace_exporter_config_last_reload_success_timestamp_seconds", state.last_reload_success
    )
    if state.unix is not None:
        series.gauge("dtrace_unix_listen_left_out", state.unix.left_out)
    if (web := state.web) is not None:
        series.gauge(
            "dtrace_exporter_web_config_last_reload_successful", web.last_reload_successful
        )
        if web.certificate_end is not None:
            series.gauge(
                "dtrace_exporter_web_certificate_expiry_timestamp_seconds", web.certificate_end
            )
    return series


def _host(host: str) -> dict[str, str]:
    return {"host": host} if host else {}
