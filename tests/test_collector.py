"""The families of a scrape, compared with numbers computed by hand."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from dtrace_exporter import __version__
from dtrace_exporter.collector import FAMILIES, Collector, registry
from dtrace_exporter.families import families as kernels
from dtrace_exporter.listeners import Capabilities, ListenerTable, Owner, SessionId
from dtrace_exporter.sockets import QCapacity, Queues
from dtrace_exporter.state import SessionStatus, Source, State, UnixQueues, WebStatus
from dtrace_exporter.watched import Wanted, Watched, named

LOCAL = SessionId("", "port-22")
SSH = {"port": "22", "address": "*", "listener": "ssh", "netns": ""}


def families(state: State) -> dict[str, Metric]:
    """Collect the families by name."""
    return {family.name: family for family in Collector(state).collect()}


def value(state: State, name: str, **labels: str) -> float | None:
    """Return the value of the sample with exactly these labels, or None if there is none."""
    result = CollectorRegistry()
    result.register(Collector(state))
    return result.get_sample_value(name, labels)


def buckets(state: State, family: str) -> list[tuple[str, float]]:
    """Return the bounds and values of a family's buckets."""
    samples = families(state)[family].samples
    return [(s.labels["le"], s.value) for s in samples if s.name == family + "_bucket"]


def one_port(capabilities: Capabilities | None = None) -> State:
    """Return a state that watches port 22 as ``ssh`` and has counted nothing yet."""
    state = State()
    state.table.watch(
        LOCAL,
        named({22: "ssh"}),
        capabilities or Capabilities(reasons=("q_full", "q0_full", "q_full_ack")),
    )
    return state


def busy_port() -> State:
    """Return port 22 with Qmax 4: six SYNs, two of them dropped, two accepts timed and one not."""
    state = one_port()
    ssh = state.table.listener(LOCAL, "", "*", 22)
    ssh.count_syns(0, 4, 2, 0)  # Q/Qmax 0, 0
    ssh.count_syns(3, 4, 1, 1)  # 0.25
    ssh.count_syns(10, 4, 1, 4)  # 1
    ssh.count_syns(11, 4, 2, 10)  # 1.25, 1.25
    ssh.drop("q_full", 2)
    ssh.drop("q_full_ack", 5)
    ssh.count_established(None, 1, 0)
    ssh.count_established(5, 2, 2_000_000)
    ssh.synack_retransmits += 6
    ssh.count_accepts(0, 1, 1_000)
    ssh.count_accepts(2, 1, 16_000)
    ssh.count_accepts(None, 1, 0)
    ssh.sockets[0xABC] = Queues(7, 3, None, 4)
    return state


def test_counters_and_gauges() -> None:
    """Each number of a listener is in the series that the contract names for it."""
    state = busy_port()
    prefix = "dtrace_tcp_listen_"
    assert value(state, prefix + "syns_total", **SSH) == 6
    assert value(state, prefix + "drops_total", **SSH, reason="q_full") == 2
    assert value(state, prefix + "drops_total", **SSH, reason="q_full_ack") == 5
    assert value(state, prefix + "established_total", **SSH) == 3
    assert value(state, prefix + "synack_retransmits_total", **SSH) == 6
    assert value(state, prefix + "accepts_total", **SSH) == 3
    assert value(state, prefix + "q_length", **SSH) == 3
    assert value(state, prefix + "q0_length", **SSH) == 7
    assert value(state, prefix + "q_limit", **SSH) == 4
    assert value(state, prefix + "q_capacity", **SSH) == 5


def test_requested() -> None:
    """The backlog that listen() requested is exported if it is known, and only then."""
    state = one_port()
    ssh = state.table.listener(LOCAL, "", "*", 22)
    for requested in (65535, -1, 0, None):
        ssh.sockets[1] = Queues(0, 0, None, 128, requested)
        assert value(state, "dtrace_tcp_listen_backlog_requested", **SSH) == requested


def test_info() -> None:
    """An open listener's owner is exported as soon as it is known, and changes with it."""
    state = one_port()
    collector = Collector(state)
    ssh = state.table.listener(LOCAL, "", "*", 22)

    def infos() -> list[dict[str, str]]:
        found = [one for one in collector.collect() if one.name == "dtrace_tcp_listen_info"]
        assert all(sample.value == 1 for one in found for sample in one.samples)
        return [
            {key: text for key, text in sample.labels.items() if text and key not in SSH}
            for one in found
            for sample in one.samples
        ]

    state.owners = {ssh.identity: Owner("sshd", "ssh.service")}
    assert infos() == []
    ssh.sockets[1] = Queues(0, 0, None, 128)
    assert infos() == [{"program": "sshd", "unit": "ssh.service"}]
    state.owners = {ssh.identity: Owner("sshd", "", "c", "f", "blue")}
    assert infos() == [{"program": "sshd", "container": "c", "fmri": "f", "netns_name": "blue"}]
    state.owners = {ssh.identity: Owner()}
    assert infos() == [{}]
    state.owners = {}
    assert infos() == []
    # The owners that accepts have shown.
    ssh.acceptors[1] = frozenset([("program", "sshd"), ("program", "in.x"), ("fmri", "svc:/x")])
    assert infos() == [{"program": "in.x,sshd", "fmri": "svc:/x"}]
    ssh.acceptors[2] = frozenset([("program", "a")])
    assert infos() == [{"program": "a,in.x,sshd", "fmri": "svc:/x"}]
    ssh.sockets.clear()
    assert infos() == []


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [
        (kernels()["linux"].q_capacity, {0: 1, 5: 6, 128: 129}),
        (kernels()["illumos"].q_capacity, {1: 1, 5: 5, 128: 128}),
        (kernels()["solaris10"].q_capacity, {1: 1, 5: 5, 128: 128}),
        (kernels()["freebsd"].q_capacity, {0: 1, 1: 2, 5: 8, 128: 193}),
    ],
)
def test_capacity(capacity: QCapacity, expected: dict[int, int]) -> None:
    """The capacity of Q is what the family's kernel makes of Qmax."""
    state = one_port(Capabilities(q_capacity=capacity))
    ssh = state.table.listener(LOCAL, "", "*", 22)
    for limit, holds in expected.items():
        ssh.sockets[1] = Queues(0, 0, None, limit)
        assert value(state, "dtrace_tcp_listen_q_capacity", **SSH) == holds


def test_fullest_socket() -> None:
    """The fullest of several sockets is the one with the highest ratio: 8 of 11, not 1 of 2."""
    state = one_port()
    ssh = state.table.listener(LOCAL, "", "*", 22)
    ssh.sockets[1] = Queues(0, 1, None, 1)
    ssh.sockets[2] = Queues(0, 8, None, 10)
    assert value(state, "dtrace_tcp_listen_q_capacity", **SSH) == 11
    state.table.watch(LOCAL, named({22: "ssh"}), Capabilities(q_capacity=QCapacity(plus=0)))
    assert value(state, "dtrace_tcp_listen_q_capacity", **SSH) == 1


def test_saturation_buckets_are_cumulative() -> None:
    """The twelve cells become the buckets 0 to 1 and +Inf; sum and count are of all SYNs."""
    state = busy_port()
    assert buckets(state, "dtrace_tcp_listen_q_saturation_ratio") == [
        ("0.0", 2),
        ("0.1", 2),
        ("0.2", 2),
        ("0.3", 3),
        ("0.4", 3),
        ("0.5", 3),
        ("0.6", 3),
        ("0.7", 3),
        ("0.8", 3),
        ("0.9", 3),
        ("1.0", 4),
        ("+Inf", 6),
    ]
    assert value(state, "dtrace_tcp_listen_q_saturation_ratio_count", **SSH) == 6
    # 0.25 + 1 + 2 * 1.25
    assert value(state, "dtrace_tcp_listen_q_saturation_ratio_sum", **SSH) == 3.75


def test_wait_buckets_are_exact_seconds() -> None:
    """The bounds are 4^5 to 4^17 ns in seconds, without a rounding error."""
    state = busy_port()
    assert buckets(state, "dtrace_tcp_listen_accept_wait_seconds") == [
        ("1.024e-06", 1),
        ("4.096e-06", 1),
        ("1.6384e-05", 2),
        ("6.5536e-05", 2),
        ("0.000262144", 2),
        ("0.001048576", 2),
        ("0.004194304", 2),
        ("0.016777216", 2),
        ("0.067108864", 2),
        ("0.268435456", 2),
        ("1.073741824", 2),
        ("4.294967296", 2),
        ("17.179869184", 2),
        ("+Inf", 2),
    ]
    assert value(state, "dtrace_tcp_listen_accept_wait_seconds_count", **SSH) == 2
    assert value(state, "dtrace_tcp_listen_accept_wait_seconds_sum", **SSH) == 17e-6


def test_handshakes() -> None:
    """Handshake times have the bounds of accept waits, and count only measured handshakes."""
    state = busy_port()
    waits = buckets(state, "dtrace_tcp_listen_accept_wait_seconds")
    found = buckets(state, "dtrace_tcp_listen_handshake_seconds")
    assert [bound for bound, _ in found] == [bound for bound, _ in waits]
    assert [count for _, count in found] == [0] * 5 + [2] * 9
    assert value(state, "dtrace_tcp_listen_handshake_seconds_sum", **SSH) == 0.002


def test_refused() -> None:
    """Refused SYNs are exported by host and port, from 0 on, once a session can count them."""
    state = one_port()
    calls = SessionId("", "calls")
    state.table.watch(calls, Watched(()))
    state.sessions[calls] = SessionStatus()
    name = "dtrace_tcp_refused_total"
    assert value(state, name, port="other", netns="") is None
    state.sessions[calls].features = {"refused": False}
    assert value(state, name, port="other", netns="") is None
    state.sessions[calls].features = {"refused": True}
    assert value(state, name, port="other", netns="") == 0
    state.table.refuse("", 8080, 3)
    state.table.refuse("", None, 2)
    assert value(state, name, port="8080", netns="") == 3
    assert value(state, name, port="other", netns="") == 2
    assert value(state, "dtrace_exporter_config_last_reload_successful") == 1


def test_types() -> None:
    """Every family of the contract is there under its name, with its type and a help line."""
    state = busy_port()
    features, unattributed = {"refused": True, "unix_drops": True}, {"drops": 3}
    status = SessionStatus(last_record=1.5, features=features, unattributed=unattributed)
    state.sessions[LOCAL] = status
    ssh = state.table.listener(LOCAL, "", "*", 22)
    ssh.sockets[0xABC] = Queues(7, 3, 1024, 4)
    state.web = WebStatus(certificate_end=2e9)
    state.unix = UnixQueues({("", "/run/a.sock"): (1, 8)}, {"": 1}, 0)
    found = families(state)
    assert {name: family.type for name, family in found.items()} == {
        "dtrace_tcp_listen_syns": "counter",
        "dtrace_tcp_listen_drops": "counter",
        "dtrace_tcp_listen_established": "counter",
        "dtrace_tcp_listen_accepts": "counter",
        "dtrace_tcp_listen_handshake_seconds": "histogram",
        "dtrace_tcp_listen_synack_retransmits": "counter",
        "dtrace_tcp_listen_q0_length": "gauge",
        "dtrace_tcp_listen_q_length": "gauge",
        "dtrace_tcp_listen_q0_limit": "gauge",
        "dtrace_tcp_listen_q_limit": "gauge",
        "dtrace_tcp_listen_q_capacity": "gauge",
        "dtrace_tcp_listen_q_saturation_ratio": "histogram",
        "dtrace_tcp_listen_accept_wait_seconds": "histogram",
        "dtrace_tcp_refused": "counter",
        "dtrace_session_up": "gauge",
        "dtrace_session_restarts": "counter",
        "dtrace_session_uncounted_seconds": "counter",
        "dtrace_session_unattributed": "counter",
        "dtrace_session_lost": "counter",
        "dtrace_session_probe_errors": "counter",
        "dtrace_session_bad_rows": "counter",
        "dtrace_session_refused": "counter",
        "dtrace_session_last_record_timestamp_seconds": "gauge",
        "dtrace_session_feature_enabled": "gauge",
        "dtrace_exporter_source_info": "gauge",
        "dtrace_exporter_build_info": "gauge",
        "dtrace_exporter_config_last_reload_successful": "gauge",
        "dtrace_exporter_config_last_reload_success_timestamp_seconds": "gauge",
        "dtrace_exporter_web_config_last_reload_successful": "gauge",
        "dtrace_exporter_web_certificate_expiry_timestamp_seconds": "gauge",
        "dtrace_unix_listen_q_length": "gauge",
        "dtrace_unix_listen_q_limit": "gauge",
        "dtrace_unix_listen_q_capacity": "gauge",
        "dtrace_unix_listen_drops": "counter",
        "dtrace_unix_listen_left_out": "gauge",
    }
    for family in found.values():
        assert family.documentation.endswith(".")
        assert "\n" not in family.documentation
        assert not any(sample.name.endswith("_created") for sample in family.samples)


def test_without_histograms() -> None:
    """With its histograms off, a port keeps all other series, from the next scrape on."""
    state = busy_port()
    collector = Collector(state)

    def names() -> set[str]:
        return {one.name for one in collector.collect() if one.name.startswith("dtrace_tcp_")}

    before = names()
    session = next(iter(state.table)).session
    asked = state.table.watched(session)
    state.table.watch(session, Watched([Wanted((range(22, 23),), "ssh", histograms=False)]))
    kinds = {name for name in FAMILIES if FAMILIES[name][0] == "histogram"}
    assert before - names() == before & kinds == kinds - {"dtrace_tcp_listen_q_sampled_ratio"}
    state.table.watch(session, asked)
    assert names() == before


def test_web_configuration() -> None:
    """The file's series exist with a web configuration, the certificate's only with TLS."""
    state = one_port()
    successful = "dtrace_exporter_web_config_last_reload_successful"
    expiry = "dtrace_exporter_web_certificate_expiry_timestamp_seconds"
    assert not {successful, expiry} & {*families(state)}
    state.web = WebStatus()
    assert value(state, successful) == 1
    assert expiry not in families(state)
    state.web = WebStatus(last_reload_successful=False, certificate_end=2e9)
    assert value(state, successful) == 0
    assert value(state, expiry) == 2e9


def test_configured_port_starts_at_zero() -> None:
    """A configured port without a SYN has all counters at 0 and no gauge."""
    state = one_port()
    assert value(state, "dtrace_tcp_listen_syns_total", **SSH) == 0
    assert value(state, "dtrace_tcp_listen_accept_wait_seconds_sum", **SSH) == 0
    for reason in ("q_full", "q0_full", "q_full_ack"):
        assert value(state, "dtrace_tcp_listen_drops_total", **SSH, reason=reason) == 0
    assert not any(name.endswith(("_length", "_limit")) for name in families(state))


def test_sock_diag_exports_only_what_it_knows() -> None:
    """A source that cannot count SYNs has no SYN counter and no histogram at all."""
    state = one_port(
        Capabilities(
            reasons=("other",),
            syns=False,
            established=False,
            accepts=False,
            accept_wait=False,
            handshake=False,
            synack_retransmits=False,
        )
    )
    ssh = state.table.listener(LOCAL, "", "*", 22)
    ssh.sockets[1] = Queues(None, 2, None, 128)
    names = {name for name in families(state) if name.startswith("dtrace_tcp")}
    assert names == {
        "dtrace_tcp_listen_drops",
        "dtrace_tcp_listen_q_length",
        "dtrace_tcp_listen_q_limit",
        "dtrace_tcp_listen_q_capacity",
    }


def test_closed_listener_keeps_counters_only() -> None:
    """A closed listener has no gauges, but keeps its counters."""
    state = busy_port()
    del state.table.listener(LOCAL, "", "*", 22).sockets[0xABC]
    assert value(state, "dtrace_tcp_listen_syns_total", **SSH) == 6
    assert value(state, "dtrace_tcp_listen_q_limit", **SSH) is None


def test_place_and_host_labels() -> None:
    """The place's label is that of the source; only series of remote hosts have `host`."""
    state = busy_port()
    remote = SessionId("sol10", "all")
    state.table.watch(remote, Watched(), Capabilities(place_label="zone"))
    state.table.listener(remote, "web", "192.0.2.1", 80).established += 1
    state.sessions = {LOCAL: SessionStatus(), remote: SessionStatus(up=True, reason="")}
    labels = [s.labels for s in families(state)["dtrace_tcp_listen_established"].samples]
    assert labels == [
        SSH,
        {"port": "80", "address": "192.0.2.1", "listener": "", "zone": "web", "host": "sol10"},
    ]
    assert value(state, "dtrace_session_up", session="port-22") == 0
    assert value(state, "dtrace_session_up", session="all", host="sol10") == 1


def test_zones() -> None:
    """A program with zones fills the same series, also Q0's limit and the evictions from Q0.

    A configured port that was not seen yet has its zeroes in the global zone.
    """
    state = State()
    remote = SessionId("omnios", "all")
    capabilities = Capabilities("zone", "global", reasons=("q_full", "q0_full", "q0_evicted"))
    state.table.watch(remote, named({22: "ssh", 80: "web"}), capabilities)
    web = state.table.listener(remote, "web", "*", 80)
    web.count_syns(10, 4, 9, 36)
    web.drop("q_full", 3)
    web.drop("q0_full", 2)
    web.drop("q0_evicted", 1)
    web.sockets[1] = Queues(7, 3, 1028, 4)
    zoned = {"port": "80", "address": "*", "listener": "web", "zone": "web", "host": "omnios"}
    prefix = "dtrace_tcp_listen_"
    assert value(state, prefix + "syns_total", **zoned) == 9
    assert value(state, prefix + "q_saturation_ratio_count", **zoned) == 9
    assert value(state, prefix + "q0_limit", **zoned) == 1028
    drops = {"q_full": 3, "q0_full": 2, "q0_evicted": 1, "q_full_ack": None, "other": None}
    for reason, number in drops.items():
        assert value(state, prefix + "drops_total", **zoned, reason=reason) == number
    unseen = zoned | {"port": "22", "listener": "ssh", "zone": "global"}
    assert value(state, prefix + "syns_total", **unseen) == 0
    assert value(state, prefix + "drops_total", **unseen, reason="q0_evicted") == 0


def test_session_series() -> None:
    """A session's numbers are exported under its name."""
    state = State()
    status = SessionStatus(restarts=2, probe_errors=3, bad_rows=4, features={"accept_wait": False})
    status.lost["aggregation"] = 5
    state.sessions[LOCAL] = status
    name = {"session": "port-22"}
    assert value(state, "dtrace_session_restarts_total", **name) == 2
    assert value(state, "dtrace_session_probe_errors_total", **name) == 3
    assert value(state, "dtrace_session_bad_rows_total", **name) == 4
    assert value(state, "dtrace_session_lost_total", **name, kind="aggregation") == 5
    assert value(state, "dtrace_session_lost_total", **name, kind="speculation") == 0
    assert value(state, "dtrace_session_feature_enabled", **name, feature="accept_wait") == 0
    assert value(state, "dtrace_session_last_record_timestamp_seconds", **name) is None
    status.last_record = 1700000000.25
    assert value(state, "dtrace_session_last_record_timestamp_seconds", **name) == 1700000000.25


def test_exporter_series() -> None:
    """The source, the build and the last reload are exported."""
    state = State(
        source=Source("dtrace", "linux", "2.0.1"),
        last_reload_successful=False,
        last_reload_success=1700000000.0,
    )
    prefix = "dtrace_exporter_"
    source = {"source": "dtrace", "program": "linux", "dtrace_version": "2.0.1", "reason": ""}
    assert value(state, prefix + "source_info", **source) == 1
    fallback = State(source=Source("sock_diag", reason="no_btf"))
    source = {"source": "sock_diag", "program": "", "dtrace_version": "", "reason": "no_btf"}
    assert value(fallback, prefix + "source_info", **source) == 1
    build = {"version": __version__, "python": platform.python_version()}
    assert value(state, prefix + "build_info", **build) == 1
    assert value(state, prefix + "config_last_reload_successful") == 0
    assert value(state, prefix + "config_last_reload_success_timestamp_seconds") == 1700000000


def test_drops_of_another_source() -> None:
    """Drops that another source has counted stay, so that their sum does not fall."""
    state = one_port()
    [listener] = [state.table.listener(LOCAL, "", "*", 22)]
    state.table.watch(LOCAL, named({22: "ssh"}), Capabilities(reasons=("q_full", "q0_full")))
    listener.drops = {"unknown": 7, "q_full": 2, "other": 0}
    samples = families(state)["dtrace_tcp_listen_drops"].samples
    assert {each.labels["reason"]: each.value for each in samples} == {
        "q_full": 2,
        "q0_full": 0,
        "unknown": 7,
    }


def test_no_duplicates() -> None:
    """Two sessions that watch the same unseen port, as during a reload, give one series."""
    state = one_port()
    state.table.watch(SessionId("", "all"), named({22: "ssh"}), Capabilities(reasons=("q_full",)))
    assert len(list(state.table)) == 2
    assert len(families(state)["dtrace_tcp_listen_syns"].samples) == 1


def test_rename() -> None:
    """A renamed listener goes on counting under its new name only."""
    state = busy_port()
    state.table.watch(LOCAL, named({22: "login"}))
    (sample,) = families(state)["dtrace_tcp_listen_syns"].samples
    assert (sample.labels["listener"], sample.value) == ("login", 6)


def test_no_duplicates_by_empty_labels() -> None:
    """Prometheus ignores empty labels, so an empty `netns` and an empty `zone` are one series."""
    state = one_port()
    other = Capabilities(place_label="zone", reasons=("q_full",))
    state.table.watch(SessionId("", "all"), named({22: "ssh"}), other)
    assert len(families(state)["dtrace_tcp_listen_syns"].samples) == 1


@pytest.mark.parametrize(
    ("field", "odd"),
    [("saturation", [1, 2]), ("syns", None), ("wait_ns", 10**400), ("drops", {"q_full": "x"})],
)
def test_odd_listener_does_not_fail_the_scrape(
    field: str, odd: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A listener that cannot be exported is left out and logged; the others stay."""
    state = busy_port()
    state.table.watch(
        SessionId("", "port-80"), named({80: "web"}), Capabilities(reasons=("q_full",))
    )
    web = state.table.listener(SessionId("", "port-80"), "", "*", 80)
    setattr(web, field, odd)
    ports = {s.labels["port"] for f in families(state).values() for s in f.samples if "tcp" in s[0]}
    assert ports == {"22"}
    assert "left out of a scrape: 1" in caplog.text


def test_registry_has_the_process_too() -> None:
    """The registry adds prometheus_client's metrics of the process, and filters by name."""
    result = registry(Collector(busy_port()))
    names = {family.name for family in result.collect()}
    assert {"dtrace_tcp_listen_syns", "python_info", "python_gc_collections"} <= names
    picked = list(result.restricted_registry(["dtrace_tcp_listen_syns_total"]).collect())
    assert [sample.value for family in picked for sample in family.samples] == [6]


def samples(parsed: Iterable[Metric]) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the value of every sample; no sample may appear twice."""
    result = {}
    for family in parsed:
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in result
            result[key] = sample.value
    return result


def strict_samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the samples that the OpenMetrics parser, the stricter one, reads."""
    return samples(parse_openmetrics(text))  # type: ignore[no-untyped-call]


def both_formats(state: State) -> tuple[str, str]:
    """Return the scrape as text and as OpenMetrics."""
    result = CollectorRegistry()
    result.register(Collector(state))
    openmetrics: bytes = generate_openmetrics(result)  # type: ignore[no-untyped-call]
    return generate_latest(result).decode(), openmetrics.decode()


def test_both_formats_parse_alike() -> None:
    """Both of prometheus_client's parsers read the same samples from the two formats."""
    state = busy_port()
    state.sessions[LOCAL] = SessionStatus(last_record=1.5)
    text, openmetrics = both_formats(state)
    assert "# TYPE dtrace_tcp_listen_syns_total counter\n" in text
    assert "# TYPE dtrace_tcp_listen_syns counter\n" in openmetrics
    parsed = samples(parse_text(text))
    assert parsed == strict_samples(openmetrics)
    assert parsed["dtrace_tcp_listen_syns_total", frozenset(SSH.items())] == 6


@given(st.text(st.characters(exclude_categories=())))
def test_hostile_names_survive(name: str) -> None:
    """Any listener name survives both formats unchanged, except that lone surrogates become `?`."""
    state = State(table=ListenerTable())
    state.table.watch(LOCAL, named({22: name}), Capabilities())
    shown = "".join("?" if "\ud800" <= c <= "\udfff" else c for c in name)
    key = "dtrace_tcp_listen_syns_total", frozenset((SSH | {"listener": shown}).items())
    text, openmetrics = both_formats(state)
    assert samples(parse_text(text))[key] == 0
    assert strict_samples(openmetrics)[key] == 0
