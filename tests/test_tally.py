"""Rows of the programs become exact counters, and gauges of the newest observations."""

from __future__ import annotations

from time import monotonic_ns
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import zone_rows
from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.listeners import (
    Capabilities,
    Identity,
    Listener,
    ListenerTable,
    Owner,
    SessionId,
)
from dtrace_exporter.sockets import Queues
from dtrace_exporter.tracing.rows import Ready, RowError, Tick
from dtrace_exporter.tracing.tally import Tally
from dtrace_exporter.watched import Watched, named
from linux_rows import (
    ACCEPTED,
    ACK_OTHER,
    ACK_Q_FULL,
    ESTABLISHED,
    MEASURED,
    OTHER,
    Q0_FULL,
    Q_FULL,
    RESENT,
    TAKEN,
    address,
    counted,
    number,
    told,
)

SESSION = SessionId("", "all")
CALLS = SessionId("", "calls")
HOME = 1
READY = f"ready 5 {HOME}"
AWAY = 4026532281


@pytest.fixture
def table() -> ListenerTable:
    """Return a table with a session that watches every port, and one that watches none."""
    table = ListenerTable()
    table.watch(SESSION, Watched())
    table.watch(CALLS, Watched(()))
    return table


@pytest.fixture
def tally(table: ListenerTable) -> Tally:
    """Return a Tally after its ready row and the start of its first set."""
    return fed(Tally(table, SESSION), READY, "set 1")


@pytest.fixture
def calls(table: ListenerTable) -> Tally:
    """Return the Tally of the second session."""
    return fed(Tally(table, CALLS, sees_closes=True), READY)


def fed(tally: Tally, *lines: str) -> Tally:
    """Feed lines to a Tally, and return it."""
    wrongs(tally, *lines)
    return tally


def wrongs(tally: Tally, *lines: str) -> list[str]:
    """Feed lines to a Tally, and return what is impossible in its accounts."""
    found: list[str] = []
    for line in lines:
        record = tally.feed(line)
        if isinstance(record, Tick):
            found += filter(None, tally.settle(record))
    return found


def closed(time: int, port: int = 22) -> str:
    """Return the row of a close of a port's socket."""
    return f"closed {address(port):x} {time}"


def seed(tally: Tally, samples: list[ListeningSocket], time: int) -> None:
    """Give a Tally the listeners that the kernel reports."""
    found: dict[Identity, list[ListeningSocket]] = {}
    for one in samples:
        found.setdefault(Identity("", "", one.address, one.port), []).append(one)
    list(tally.seed(found, time))


def only(table: ListenerTable) -> Listener:
    """Return the only listener of a table."""
    [listener] = table
    return listener


def sample(
    port: int = 22, *, bound: str = "*", q: int = 3, qmax: int = 8, key: int = 77
) -> ListeningSocket:
    """Return a listening socket as sock_diag has it."""
    return ListeningSocket(bound, port, q, qmax, None, key)


# Whether the close of a listener is seen


def test_nobody_sees_what_closes(table: ListenerTable, tally: Tally) -> None:
    """Gauges begin once the second session works, and include only later observations."""
    fed(tally, told(22, time=5, q=3), counted(22, 4))
    assert only(table).queues == Queues(0, 3, None, 8)
    table.lose_sight("")
    fed(tally, told(22, time=20), counted(22, 6))
    seed(tally, [sample()], 20)
    assert (only(table).queues, only(table).syns, only(table).closed) == (None, 6, None)
    fed(Tally(table, CALLS, sees_closes=True), READY, "tick 30", "tick 40")
    fed(tally, told(22, time=29, q=2))
    assert only(table).queues is None
    fed(tally, told(22, time=31, q=1))
    assert only(table).queues == Queues(0, 1, None, 8)


def test_what_closes_may_be_lost(table: ListenerTable, tally: Tally, calls: Tally) -> None:
    """A loss removes all gauges, and the next heartbeat may be older than the loss."""
    fed(calls, "tick 1")
    fed(tally, told(22, time=5, q=3))
    calls.lose()
    fed(calls, "tick 10")
    fed(tally, told(22, time=11, q=2))
    assert only(table).queues is None
    fed(calls, "tick 20")
    fed(tally, told(22, time=21, q=1))
    assert only(table).queues == Queues(0, 1, None, 8)
    tally.lose()
    assert only(table).queues == Queues(0, 1, None, 8)


def test_what_listen_asked_for_may_have_changed(
    table: ListenerTable, tally: Tally, calls: Tally
) -> None:
    """After a loss, the requested backlog is unknown, because a listen() may have been missed."""
    fed(calls, "tick 1", f"limit {address(22):x} 6 8 20")
    fed(tally, told(22, time=7))
    assert only(table).queues == Queues(0, 1, None, 8, 20)
    calls.lose()
    fed(calls, f"limit {address(22):x} 9 8 20", "tick 10", "tick 20")
    fed(calls, f"limit {address(22):x} 19 8 20")
    fed(tally, told(22, time=21))
    assert only(table).queues == Queues(0, 1, None, 8)
    fed(calls, f"limit {address(22):x} 22 8 30")
    assert only(table).queues == Queues(0, 1, None, 8, 30)


# Counting


def test_what_the_session_has_to_know(table: ListenerTable) -> None:
    """The tally returns the ready row and heartbeats, and takes the own place from the first."""
    tally = Tally(table, SESSION)
    assert tally.feed(READY) == Ready(5, str(HOME))
    assert tally.own_place == str(HOME)
    assert tally.feed("tick 7") == Tick(7)
    assert tally.feed("set 7") is None
    assert tally.feed(told(22)) is None


@pytest.mark.parametrize("part", range(12))
@pytest.mark.parametrize(
    ("what", "reason"),
    [(TAKEN, None), (Q_FULL, "q_full"), (Q0_FULL, "q0_full"), (OTHER, "other")],
)
def test_syns(what: int, reason: str | None, part: int, table: ListenerTable, tally: Tally) -> None:
    """A SYN is counted in its row's bucket, and as a drop with the reason of its outcome."""
    fed(tally, told(22), counted(22, 4, what, qmax=10, part=part, value=12))
    listener = only(table)
    assert listener.saturation == [4 if bucket == part else 0 for bucket in range(12)]
    assert (listener.syns, listener.saturation_sum) == (4, 1.2)
    assert listener.drops == ({reason: 4} if reason else {})


@pytest.mark.parametrize("part", range(14))
def test_waits(part: int, table: ListenerTable, tally: Tally) -> None:
    """A timed accept is counted in its row's bucket, with its time."""
    fed(tally, told(22), counted(22, 2, ACCEPTED, part=part, value=5))
    listener = only(table)
    assert listener.waits == [2 if bucket == part else 0 for bucket in range(14)]
    assert (listener.accepts, listener.wait_ns, listener.syns) == (2, 5000, 0)


@pytest.mark.parametrize("part", range(14))
def test_handshakes(part: int, table: ListenerTable, tally: Tally) -> None:
    """A completion with a measured handshake is counted in its bucket and as a completion."""
    fed(tally, told(22), counted(22, 2, MEASURED, part=part, value=5), counted(22, 1, ESTABLISHED))
    listener = only(table)
    assert listener.handshakes == [2 if bucket == part else 0 for bucket in range(14)]
    assert (listener.established, listener.handshake_ns, listener.accepts) == (3, 5000, 0)


def test_refused(table: ListenerTable, calls: Tally) -> None:
    """Each refused SYN counts once, by its port or among others, also over a restart."""
    fed(calls, "tick 1", "set 1", "refused 80 3", "refused other 2", "refused 80 3")
    fed(calls, "tick 2", "set 1", "refused 80 4", "refused 0 1", "refused other 2")
    assert table.refused("") == {"other": 2, "80": 4, "0": 1}
    fed(Tally(table, CALLS), READY, "tick 3", "set 3", "refused 80 2")
    assert table.refused("") == {"other": 2, "80": 6, "0": 1}


def test_refused_by_a_scan(table: ListenerTable, calls: Tally) -> None:
    """A scan of all ports makes only a hundred of them known, and no SYN of it is lost."""
    fed(calls, "tick 1", "set 1", *(f"refused {port} 2" for port in range(1000)))
    refused = table.refused("")
    assert len(refused) == 101
    assert sum(refused.values()) == 2000
    fed(calls, "tick 2", "set 1", "refused 3 4", "refused 999 5")
    assert (refused["3"], refused["other"]) == (4, 1800 + 3)


def test_other_events(table: ListenerTable, tally: Tally) -> None:
    """Completions, drops at the final ACK, accepts without a time and SYN-ACKs are counted."""
    events = (1, ESTABLISHED, 0), (2, ACK_Q_FULL, 0), (3, ACK_OTHER, 0), (4, ACCEPTED, 14)
    resent = counted(22, 5, RESENT)
    fed(tally, told(22), resent, *(counted(22, n, what, part=part) for n, what, part in events))
    listener = only(table)
    assert listener.synack_retransmits == 5
    assert (listener.established, listener.accepts, listener.syns) == (1, 4, 0)
    assert listener.drops == {"q_full_ack": 2, "other": 3}
    assert (sum(listener.waits), listener.wait_ns) == (0, 0)


def test_a_row_that_is_printed_again(table: ListenerTable, tally: Tally) -> None:
    """Rows of a set that is printed again count each event once, also if the sets change."""
    rows = [counted(22, n, ESTABLISHED) for n in (3, 3, 5)]
    fed(tally, told(22), *rows, "set 2", rows[0], "set 1", rows[2], "set 2", rows[2])
    assert only(table).established == 5 + 5


def test_who_it_is_is_told_later(table: ListenerTable, tally: Tally) -> None:
    """Counts of a listener whose row has not come yet wait for that row."""
    fed(tally, counted(22, 3), counted(22, 1, ESTABLISHED), counted(22, 7))
    assert list(table) == []
    fed(tally, told(22))
    assert (only(table).syns, only(table).established) == (7, 1)
    fed(tally, told(22), counted(22, 8))
    assert only(table).syns == 8


def test_nobody_ever_tells_who_they_are(tally: Tally) -> None:
    """More waiting rows than a program can have are an error."""
    for port in range(10_000):
        tally.feed(counted(port, 1))
    for row in (counted(0, 2), counted(10_000, 1)):
        with pytest.raises(RowError):
            tally.feed(row)


def test_rows_of_nobody_are_forgotten(table: ListenerTable, tally: Tally) -> None:
    """Rows that wait ten minutes for their listener are dropped, with one message for it."""
    fed(tally, counted(22, 1), counted(80, 1), *ticks(300))
    found = wrongs(tally, told(80), *ticks(301))
    assert found == [f"the row of listener {number(22):x} is missing, which has 1 rows of counts"]
    fed(tally, told(22), counted(22, 4))
    assert {one.identity.port: one.syns for one in table} == {80: 1, 22: 3}


def test_identities(table: ListenerTable, tally: Tally) -> None:
    """Port, address and place distinguish listeners, and the own place has no name."""
    for port, place, bound in ((80, 1, "::"), (81, 1, "::"), (82, 1, "::1"), (80, AWAY, "::")):
        fed(tally, told(port, place=place, bound=bound), counted(port, 1, place=place))
    assert {one.identity[1:]: one.syns for one in table} == {
        ("", "*", 80): 1,
        ("", "*", 81): 1,
        ("", "::1", 82): 1,
        (str(AWAY), "*", 80): 1,
    }


def test_several_sockets_of_one_identity(table: ListenerTable, tally: Tally) -> None:
    """Sockets with SO_REUSEPORT, and all listens of one socket, add up to one listener."""
    for socket, generation in ((0, 0), (0, 1), (1, 0)):
        row = told(22, socket=socket, generation=generation, time=1 + generation, q=socket)
        fed(tally, row, counted(22, 2, socket=socket, generation=generation))
    listener = only(table)
    assert listener.syns == 6
    assert listener.sockets == {
        address(22): Queues(0, 0, None, 8),
        address(22, socket=1): Queues(0, 1, None, 8),
    }


def test_other_ports(table: ListenerTable, tally: Tally, calls: Tally) -> None:
    """Rows of a port that is not configured leave nothing behind, in any order."""
    table.watch(SESSION, named({80: ""}))
    fed(tally, counted(22, 3), told(22), counted(22, 5), f"q {number(22):x} 8 10000003")
    fed(calls, "set 1", told(80), counted(80, 5))
    assert [(one.identity.port, one.syns, one.sockets) for one in table] == [(80, 0, {})]


# Queues


def test_queues(table: ListenerTable, tally: Tally) -> None:
    """The queues are those of the newest observation, in any kind of row."""
    fed(tally, told(22, time=5, q0=1, q=2, qmax=8))
    assert only(table).queues == Queues(1, 2, None, 8)
    fed(tally, f"q {number(22):x} 9 {9 * 10**7 + 6}", f"q0 {number(22):x} {8 * 10**7 + 5}")
    assert only(table).queues == Queues(5, 6, None, 9)
    fed(tally, told(22, time=7, q0=1, q=2, qmax=8))
    assert only(table).queues == Queues(5, 6, None, 9)
    fed(tally, told(22, time=12, q0=0, q=0, qmax=8))
    assert only(table).queues == Queues(0, 0, None, 8)


def test_queues_of_nobody(table: ListenerTable, tally: Tally) -> None:
    """The length of a listener whose row has not come is ignored."""
    fed(tally, f"q {number(22):x} 9 {9 * 10**7 + 6}", f"q0 {number(22):x} {8 * 10**7 + 5}")
    assert list(table) == []
    fed(tally, told(22, time=5, q=2))
    assert only(table).queues == Queues(0, 2, None, 8)


def test_limit(table: ListenerTable, tally: Tally, calls: Tally) -> None:
    """The limit that listen() set comes from the second session, unless it is old."""
    fed(tally, told(22, time=5, qmax=8))
    fed(calls, f"limit {address(22):x} 6 11")
    assert only(table).queues == Queues(0, 1, None, 11)
    fed(calls, f"limit {address(22):x} 5 4")
    assert only(table).queues == Queues(0, 1, None, 11)
    fed(calls, f"limit {address(22):x} 7 4096 65535")
    assert only(table).queues == Queues(0, 1, None, 4096, 65535)
    fed(calls, f"limit {address(22):x} 8 4096")
    assert only(table).queues == Queues(0, 1, None, 4096)


def test_closed(table: ListenerTable, tally: Tally, calls: Tally) -> None:
    """A closed socket has no gauges, whatever rows still come, and its counters go on."""
    fed(tally, told(22, time=5), counted(22, 3))
    fed(calls, closed(9))
    assert only(table).queues is None
    fed(tally, told(22, time=8), counted(22, 4), f"q {number(22):x} 8 {7 * 10**7 + 6}")
    fed(calls, f"limit {address(22):x} 8 11")
    assert (only(table).queues, only(table).syns) == (None, 4)


def test_the_close_is_told_first(table: ListenerTable, tally: Tally, calls: Tally) -> None:
    """Rows of the two sessions come in any order, so a close may come before its listener."""
    fed(calls, closed(9))
    fed(tally, told(22, time=5), counted(22, 3))
    assert (only(table).queues, only(table).syns) == (None, 3)


def test_told_when_it_does_not_listen_any_more(table: ListenerTable, tally: Tally) -> None:
    """A listener whose row comes while its socket closes is counted and has no gauges."""
    fed(tally, told(22, time=5, state=7), counted(22, 3))
    assert (only(table).queues, only(table).syns) == (None, 3)


def test_listens_again(table: ListenerTable, tally: Tally, calls: Tally) -> None:
    """A socket that listens again has a new number and new gauges, and keeps its counters."""
    fed(tally, told(22, time=5, q0=4), counted(22, 3))
    fed(calls, closed(9), f"limit {address(22):x} 12 11")
    fed(tally, told(22, generation=1, time=12, q=0, qmax=11), counted(22, 2, generation=1))
    assert (only(table).queues, only(table).syns) == (Queues(0, 0, None, 11), 5)


def test_memory_used_again_by_another_listener(
    table: ListenerTable, tally: Tally, calls: Tally
) -> None:
    """Another listener in the same memory has its own counters, and the first loses its gauges."""
    fed(tally, told(22, time=5), counted(22, 3))
    fed(calls, closed(9))
    row = told(22, generation=1, time=12, bound="127.0.0.1", q=0)
    fed(tally, row, counted(22, 2, generation=1))
    found = {one.identity.address: (one.syns, one.queues) for one in table}
    assert found == {"*": (3, None), "127.0.0.1": (2, Queues(0, 0, None, 8))}


def test_memory_used_again_in_another_session(table: ListenerTable) -> None:
    """A late row of one session takes no socket from a listener of another session."""
    ids = SessionId("", "port-22"), SessionId("", "port-80")
    table.unwatch(SESSION)
    table.watch(ids[0], named({22: ""}))
    table.watch(ids[1], named({80: ""}))
    first, second = (fed(Tally(table, id_), READY, "set 1") for id_ in ids)
    fed(first, told(22, time=5))
    memory = f"{number(22, generation=1):x}"
    fed(second, told(80, time=12).replace(f"{number(80):x}", memory))
    fed(first, told(22, time=8))
    found = {one.identity.port: one.queues for one in table}
    assert found == {22: None, 80: Queues(0, 1, None, 8)}


def test_a_place_used_again(table: ListenerTable, tally: Tally) -> None:
    """A network namespace that uses the number of a former one does not go on with its counters."""
    fed(tally, told(22, place=AWAY, cookie=5), counted(22, 3, place=AWAY))
    fed(tally, told(22), counted(22, 9))
    again = told(22, place=AWAY, cookie=6, generation=1)
    fed(tally, again, counted(22, 2, place=AWAY, generation=1))
    found = {one.identity.place: one.syns for one in table}
    assert found == {"": 9, str(AWAY): 2}


def test_the_same_place_again(table: ListenerTable, tally: Tally) -> None:
    """A namespace with the same cookie is the same namespace, and its counters go on."""
    for generation in (0, 1):
        row = told(22, place=AWAY, cookie=5, generation=generation)
        fed(tally, row, counted(22, 3, place=AWAY, generation=generation))
    assert only(table).syns == 6


def test_a_forgotten_listener_counts_on(table: ListenerTable, tally: Tally) -> None:
    """A forgotten listener is counted and shown again once it has a new row."""
    table.watch(SESSION, named({22: ""}))
    fed(tally, told(22), counted(22, 3))
    table.watch(SESSION, Watched(()))
    table.watch(SESSION, named({22: ""}))
    fed(tally, told(22, time=5, q=4), counted(22, 5))
    assert only(table).queues == Queues(0, 4, None, 8)
    assert only(table).syns == 2


# Zones

ZONES = Capabilities(place_label="zone", own_place="global")


@pytest.fixture
def zones() -> ListenerTable:
    """Return a table with one session that watches every port of a host with zones."""
    table = ListenerTable()
    table.watch(SESSION, Watched(), ZONES)
    return table


@pytest.fixture
def of_zones(zones: ListenerTable) -> Tally:
    """Return the Tally of that session after its ready row."""
    return fed(Tally(zones, SESSION), "ready 5 global")


def ticks(number: int = 1, first: int = 100) -> list[str]:
    """Return heartbeats."""
    return [f"tick {first + tick}" for tick in range(number)]


@pytest.mark.parametrize(
    ("q", "qmax", "bucket"),
    [(0, 8, 0), (1, 10, 1), (2, 10, 2), (10, 10, 10), (11, 10, 11), (0, 0, 0), (1, 0, 10)],
)
def test_syns_of_zones(
    q: int, qmax: int, bucket: int, zones: ListenerTable, of_zones: Tally
) -> None:
    """A SYN is counted in the bucket of its Q and of its listener's limit."""
    fed(of_zones, zone_rows.told(22, qmax=qmax), zone_rows.syns(22, 4, q=q))
    listener = only(zones)
    assert listener.saturation == [4 if number == bucket else 0 for number in range(12)]
    assert (listener.syns, listener.q_sums) == (4, {qmax: 4 * q})


def test_the_syn_that_tells(zones: ListenerTable, of_zones: Tally) -> None:
    """The first SYN of a listener is counted by the listener's own row."""
    fed(of_zones, zone_rows.told(22, q=4, syn=1), "syn ff0100000000 4 1")
    assert (only(zones).syns, only(zones).saturation[5], only(zones).q_sums) == (1, 1, {8: 4})
    fed(of_zones, zone_rows.told(22, 2, q=4), zone_rows.syns(22, 2, q=8, telling=2))
    assert (only(zones).syns, only(zones).saturation[10]) == (3, 2)


def test_counters_of_zones(zones: ListenerTable, of_zones: Tally) -> None:
    """Drops, completions, accepts and other departures from Q are counted, each row once."""
    rows = [
        *(zone_rows.drops(22, n, reason) for n, reason in ((1, 1), (2, 2), (3, 3))),
        *(zone_rows.opened(22, 90), zone_rows.established(22, 40)),
        *(zone_rows.left(22, 4, how=3, us=50), zone_rows.left(22, 5, how=14)),
        *(zone_rows.left(22, 6, how=15), zone_rows.left(22, 7, how=16)),
    ]
    fed(of_zones, zone_rows.told(22), *rows, *rows)
    listener = only(zones)
    assert listener.drops == {"q_full": 2, "q0_full": 4, "q0_evicted": 6}
    assert (listener.established, listener.accepts, listener.syns) == (80, 18, 0)
    assert (listener.waits[3], sum(listener.waits), listener.wait_ns) == (8, 8, 100_000)


def test_queues_of_zones(zones: ListenerTable, of_zones: Tally) -> None:
    """At each heartbeat, queues are the listener row's lengths plus entries minus departures."""
    fed(of_zones, zone_rows.told(22, q0=1, q=2, q0max=1032))
    assert only(zones).queues is None
    fed(of_zones, *ticks())
    assert only(zones).queues == Queues(1, 2, 1032, 8)
    fed(of_zones, zone_rows.opened(22, 9), zone_rows.established(22, 6))
    fed(of_zones, zone_rows.left(22, 2), zone_rows.left(22, 1, how=15))
    fed(of_zones, zone_rows.left(22, 3, how=16), *ticks(first=101))
    assert only(zones).queues == Queues(1 + 9 - 6 - 3, 2 + 6 - 2 - 1, 1032, 8)


def test_queues_of_linux_have_no_account(table: ListenerTable, tally: Tally) -> None:
    """On Linux, counts do not change the queues, because the rows have their lengths."""
    fed(tally, told(22, q0=1, q=2), counted(22, 5, ESTABLISHED), counted(22, 4, ACCEPTED))
    fed(tally, *ticks(5))
    assert only(table).queues == Queues(1, 2, None, 8)


def test_told_anew(zones: ListenerTable, of_zones: Tally) -> None:
    """A listener has a new number each second, and rows of each number count, in any order."""
    fed(of_zones, zone_rows.established(22, 5), zone_rows.syns(22, 2, telling=2))
    assert list(zones) == []
    fed(of_zones, zone_rows.told(22, 2, time=2, q=5), zone_rows.told(22, q0=9))
    fed(of_zones, zone_rows.left(22, 3, telling=2), zone_rows.syns(22, 1), *ticks())
    listener = only(zones)
    assert (listener.syns, listener.established, listener.accepts) == (3, 5, 3)
    assert listener.queues == Queues(4, 2, None, 8)


def test_numbers_of_the_past_are_forgotten(zones: ListenerTable, of_zones: Tally) -> None:
    """However long a listener gets new numbers, only its latest numbers are remembered."""
    for telling in range(1, 200):
        fed(of_zones, zone_rows.told(22, telling, time=telling), *ticks(first=telling))
    assert len(of_zones._listeners) < 70
    fed(of_zones, zone_rows.syns(22, 1, telling=199), zone_rows.syns(22, 1, telling=180))
    assert only(zones).syns == 2


def test_a_listener_that_has_been_idle(zones: ListenerTable, of_zones: Tally) -> None:
    """The first events after hours count under the listener's last number, however old it is."""
    fed(of_zones, zone_rows.told(22, q=2, q0=1), *ticks(1000))
    fed(of_zones, zone_rows.syns(22, 3), zone_rows.left(22, 1), *ticks(700, first=1100))
    listener = only(zones)
    assert (listener.syns, listener.accepts, listener.queues) == (3, 1, Queues(1, 1, None, 8))
    assert not of_zones._waiting


def test_numbers_of_closed_sockets_are_forgotten(of_zones: Tally) -> None:
    """Of sockets that come and go, only the latest are remembered."""
    for socket in range(200):
        told = zone_rows.told(22, socket=socket, time=2 * socket + 1)
        close = zone_rows.closed(22, 2 * socket + 2, socket=socket)
        fed(of_zones, told, close, *ticks(first=1000 + socket))
    assert len(of_zones._listeners) < 70
    assert not of_zones._newest


def test_numbers_come_round(zones: ListenerTable, of_zones: Tally) -> None:
    """A number that is used again before it is forgotten is remembered as long as it is used."""
    for time, telling in enumerate((1, 2, 1, 2), 1):
        fed(of_zones, zone_rows.told(22, telling, time=time), *ticks(10, first=10 * time))
    fed(of_zones, *ticks(45, first=50), zone_rows.syns(22, 1, telling=2))
    assert only(zones).syns == 1
    assert of_zones._listeners.keys() == {zone_rows.number(22, 2)}


def test_zones_are_apart(zones: ListenerTable, of_zones: Tally) -> None:
    """The global zone has its usual name, and is the zone of a row without a zone."""
    for socket, zone in enumerate(("global", "web", "db")):
        fed(of_zones, zone_rows.told(22, zone=zone, socket=socket, syn=1))
    fed(of_zones, zone_rows.told(80, zone="", syn=1))
    assert {one.identity[1:]: one.syns for one in zones} == {
        ("global", "*", 22): 1,
        ("web", "*", 22): 1,
        ("db", "*", 22): 1,
        ("global", "*", 80): 1,
    }


def test_other_ports_of_zones(zones: ListenerTable, of_zones: Tally) -> None:
    """Rows of a port that is not configured leave nothing behind, in any order."""
    zones.watch(SESSION, named({80: ""}))
    fed(of_zones, zone_rows.syns(22, 3), zone_rows.told(22, syn=1), zone_rows.opened(22, 5))
    fed(of_zones, *ticks(5))
    assert [(one.identity.port, one.syns, one.sockets) for one in zones] == [(80, 0, {})]
    assert not of_zones._waiting


def test_a_socket_of_zones_closes(zones: ListenerTable, of_zones: Tally) -> None:
    """A closed socket has no gauges, its counters go on, and a new row brings both back."""
    fed(of_zones, zone_rows.told(22, q=2), *ticks(), zone_rows.closed(22, 9))
    assert only(zones).queues is None
    fed(of_zones, zone_rows.left(22, 2, how=15), zone_rows.syns(22, 3), *ticks(5, first=101))
    assert (only(zones).queues, only(zones).syns) == (None, 3)
    fed(of_zones, zone_rows.told(22, 2, time=12), *ticks(first=110))
    assert only(zones).queues == Queues(0, 0, None, 8)


def test_memory_of_zones_is_used_again(zones: ListenerTable, of_zones: Tally) -> None:
    """Another listener in the same memory has its own counters, and the first loses its gauges."""
    fed(of_zones, zone_rows.told(22, q=2), *ticks())
    fed(of_zones, zone_rows.told(22, 2, time=12, bound="127.0.0.1", q=1))
    fed(of_zones, zone_rows.syns(22, 3), zone_rows.syns(22, 4, telling=2), *ticks(first=101))
    found = {one.identity.address: (one.syns, one.queues) for one in zones}
    assert found == {"*": (3, None), "127.0.0.1": (4, Queues(0, 1, None, 8))}


def test_loss_of_zones(zones: ListenerTable, of_zones: Tally) -> None:
    """After a loss the queues are unknown until the listener has a new row."""
    fed(of_zones, zone_rows.told(22, q=2), *ticks())
    of_zones.lose()
    fed(of_zones, zone_rows.established(22, 1), *ticks(first=101))
    assert only(zones).queues == Queues(None, None, None, 8)
    # This row may have been printed before the loss.
    fed(of_zones, zone_rows.told(22, 2, time=101, q=3), *ticks(first=102))
    assert only(zones).queues == Queues(None, None, None, 8)
    fed(of_zones, zone_rows.told(22, 3, time=103, q=4), *ticks(first=104))
    assert only(zones).queues == Queues(0, 4, None, 8)
    assert only(zones).established == 1


def test_an_account_that_cannot_be(zones: ListenerTable, of_zones: Tally) -> None:
    """An impossible account is reported once."""
    assert wrongs(of_zones, zone_rows.told(22), zone_rows.left(22, 1), *ticks(2)) == []
    found = wrongs(of_zones, *ticks(5, first=102))
    assert found == ["the queues of * port 22 come to 0 and -1"]
    assert only(zones).queues is None


@pytest.mark.parametrize(
    ("missing", "queues"),
    [
        ({}, (5, 6)),
        ({"opened": False}, (4, 6)),
        ({"established": False}, (4, 5)),
        ({"departures": False}, (4, 5)),
        ({"accepts": False}, (5, 6)),
    ],
)
def test_parts_missing(
    missing: dict[str, Any], queues: tuple[int, int], zones: ListenerTable, of_zones: Tally
) -> None:
    """A queue whose entries and departures are not all counted has the length of its last row."""
    zones.watch(SESSION, Watched(), Capabilities(place_label="zone", own_place="global", **missing))
    fed(of_zones, zone_rows.told(22, q0=1, q=2), zone_rows.told(22, 2, time=2, q0=4, q=5))
    fed(of_zones, zone_rows.opened(22, 5), zone_rows.established(22, 4))
    fed(of_zones, zone_rows.left(22, 1, how=16), *ticks())
    expected = {
        (5, 6): (1 + 5 - 4 - 1, 2 + 4),
        (4, 6): (4, 2 + 4),
        (4, 5): (4, 5),
    }
    assert only(zones).queues is not None
    assert only(zones).queues[:2] == expected[queues]  # type: ignore[index]


# What the kernel itself reports


def test_know_listeners_that_nobody_has_told_of(table: ListenerTable, tally: Tally) -> None:
    """Listeners without any event are known from the kernel, with Q and Qmax."""
    seed(tally, [sample(22), sample(80, bound="127.0.0.1", key=78)], 5)
    queues = Queues(None, 3, None, 8)
    assert {one.identity: one.queues for one in table} == {
        Identity("", "", "*", 22): queues,
        Identity("", "", "127.0.0.1", 80): queues,
    }


def test_know_only_what_is_watched(table: ListenerTable, tally: Tally, calls: Tally) -> None:
    """Listeners that the kernel reports on other ports are ignored."""
    table.watch(SESSION, named({80: ""}))
    for one in (tally, calls):
        seed(one, [sample(22)], 5)
    assert [one.identity.port for one in table] == [80]


def test_know_goes_on(table: ListenerTable, tally: Tally) -> None:
    """Each report of the kernel replaces the one before, and removes listeners that are gone."""
    seed(tally, [sample(q=3)], 5)
    seed(tally, [sample(q=0)], 6)
    assert only(table).queues == Queues(None, 0, None, 8)
    seed(tally, [], 7)
    assert only(table).queues is None
    seed(tally, [sample(q=2, key=78)], monotonic_ns())
    assert only(table).queues == Queues(None, 2, None, 8)


def test_know_what_was_read_before_a_close(
    table: ListenerTable, tally: Tally, calls: Tally
) -> None:
    """A report from before a close does not open the listener again, but a later one does."""
    fed(tally, told(22, time=7, q=4))
    before = monotonic_ns()
    fed(calls, closed(8))
    seed(tally, [sample(q=5)], before)
    assert only(table).queues is None
    seed(tally, [sample(q=2, key=78)], monotonic_ns())
    assert only(table).queues == Queues(None, 2, None, 8)


def test_know_then_a_row(table: ListenerTable, tally: Tally) -> None:
    """The first row of a listener that was known from the kernel is about the same socket."""
    seed(tally, [sample(q=3)], 5)
    fed(tally, told(22, time=7, q0=2, q=4))
    assert only(table).sockets == {address(22): Queues(2, 4, None, 8)}


def test_know_one_socket(table: ListenerTable, tally: Tally) -> None:
    """If a listener has one socket, a newer report of the kernel is about that socket."""
    fed(tally, told(22, time=7, q0=2, q=4))
    seed(tally, [sample(q=5, qmax=9)], 9)
    assert only(table).sockets == {address(22): Queues(2, 5, None, 9)}
    seed(tally, [sample(q=6)], 8)
    assert only(table).sockets == {address(22): Queues(2, 5, None, 9)}


def test_know_several_sockets(table: ListenerTable, tally: Tally) -> None:
    """If a listener has several sockets, the kernel's report cannot be assigned to one of them."""
    fed(tally, told(22, time=7, q=4), told(22, socket=1, time=7, q=1))
    before = dict(only(table).sockets)
    seed(tally, [sample(q=5), sample(q=6, key=78)], 9)
    assert only(table).sockets == before


def test_know_of_other_places(table: ListenerTable, tally: Tally) -> None:
    """The kernel reports this place only; a container's listener with the same address differs."""
    fed(tally, told(22, place=AWAY, time=7, q=4))
    seed(tally, [sample(q=5)], 9)
    found = {one.identity.place: one.queues for one in table}
    assert found == {str(AWAY): Queues(0, 4, None, 8), "": Queues(None, 5, None, 8)}


def test_know_when_it_has_closed(table: ListenerTable, tally: Tally, calls: Tally) -> None:
    """A report from before a close does not bring the gauges back."""
    fed(tally, told(22, time=5))
    fed(calls, closed(9))
    seed(tally, [], 10)
    assert only(table).queues is None


# Arbitrary rows


def events() -> st.SearchStrategy[str]:
    """Return a strategy for rows of two listeners: listeners, lengths, limits and closes."""
    ports, times = st.sampled_from([22, 80]), st.integers(1, 20)
    return st.one_of(
        st.builds(lambda p, t, q: told(p, time=t, q=q), ports, times, st.integers(0, 9)),
        st.builds(lambda p, t, q: f"q {number(p):x} 8 {t * 10**7 + q}", ports, times, times),
        st.builds(lambda p, t: closed(t, p), ports, times),
        st.builds(lambda p, t, q: f"limit {address(p):x} {t} {q}", ports, times, times),
        st.builds(lambda p, t, q: f"limit {address(p):x} {t} {q} 20", ports, times, times),
    )


@given(st.lists(events(), max_size=30))
def test_closed_stays_closed(lines: list[str]) -> None:
    """In any order of rows, a socket whose newest event is a close has no gauges."""
    table = ListenerTable()
    table.watch(SESSION, Watched())
    tally = fed(Tally(table, SESSION), READY, "set 0")
    for line in lines:
        tally.feed(line)
    for listener in table:
        port = listener.identity.port
        own = [line.split() for line in lines]
        opened = [int(row[2]) for row in own if row[:2] == ["listener", f"{number(port):x}"]]
        ended = [int(row[2]) for row in own if row[:2] == ["closed", f"{address(port):x}"]]
        assert bool(listener.sockets) == (max(opened) > max(ended, default=-1))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=30), st.randoms())
def test_counters_in_any_order(rows: list[tuple[int, int]], random: object) -> None:
    """Whichever rows are lost and whenever the listener's row comes, the last counts are shown."""
    lines, now = [], [0] * 4
    for part, more in rows:
        now[part] += more
        lines.append(counted(22, now[part], part=part, qmax=8))
    kept = [line for line in lines if random.random() < 0.5]  # type: ignore[attr-defined]
    last = [counted(22, n, part=part, qmax=8) for part, n in enumerate(now)]
    at = random.randint(0, len(kept))  # type: ignore[attr-defined]
    table = ListenerTable()
    table.watch(SESSION, Watched())
    fed(Tally(table, SESSION), READY, "set 1", *kept[:at], told(22), *kept[at:], *last)
    assert only(table).saturation[:4] == now
    assert only(table).syns == sum(now)


def test_evicted(zones: ListenerTable, of_zones: Tally) -> None:
    """Evictions from a cache of many listeners count by place, address and port."""
    rows = [zone_rows.evicted(22, 3), zone_rows.evicted(22, 4, bound="::", zone="web")]
    rows.append(zone_rows.evicted(22, 5, bound="192.0.2.1"))
    fed(of_zones, zone_rows.told(22), *rows, zone_rows.closed(22, 9), *rows)
    assert {one.identity[1:]: one.drops for one in zones} == {
        ("global", "*", 22): {"q0_evicted": 6},
        ("web", "*", 22): {"q0_evicted": 8},
        ("global", "192.0.2.1", 22): {"q0_evicted": 10},
    }
    zones.watch(SESSION, named({80: ""}))
    fed(of_zones, *rows)
    assert [(one.identity.port, one.drops) for one in zones] == [(80, {})]


def test_loss_of_listens(zones: ListenerTable, of_zones: Tally) -> None:
    """After a loss, the requested backlog is unknown until the next listen()."""
    asked = "limit {:x} {} 8 {}".format
    fed(of_zones, zone_rows.told(22), asked(zone_rows.address(22), 2, 20), *ticks(3))
    queues = only(zones).queues
    assert queues
    assert queues == Queues(0, 0, None, 8, 20)
    of_zones.lose()
    fed(of_zones, asked(zone_rows.address(22), 3, 20), zone_rows.told(22, 2, time=110))
    fed(of_zones, asked(zone_rows.address(22), 109, 20), *ticks(4, first=110))
    fed(of_zones, zone_rows.told(22, 3, time=120), *ticks(4, first=120))
    assert only(zones).queues == queues._replace(requested=None)
    fed(of_zones, asked(zone_rows.address(22), 130, 30))
    assert only(zones).queues == queues._replace(requested=30)
    of_zones.forget_listens()
    assert only(zones).queues == queues._replace(requested=None)


def events_of_zones() -> st.SearchStrategy[str]:
    """Return a strategy for rows with zones, whose numbers and words vary little."""
    ports, numbers = st.sampled_from([22, 80]), st.integers(0, 3)
    few, any_ = st.integers(0, 5), st.integers(0, 5) | st.integers(0, 1 << 64)
    return st.one_of(
        st.builds(
            lambda port, n, time, zone, q0, q, qmax, syn: zone_rows.told(
                port, n, time=time, zone=zone, q0=q0, q=q, qmax=qmax, syn=syn
            ),
            *(ports, numbers, few, st.sampled_from(["global", "", "web"]), few, few, any_, few),
        ),
        st.builds(lambda p, n, q, m: zone_rows.syns(p, m, q, n), ports, numbers, any_, any_),
        st.builds(lambda p, n, r, m: zone_rows.drops(p, m, r, n), ports, numbers, few, any_),
        st.builds(lambda p, n, m: zone_rows.opened(p, m, n), ports, numbers, any_),
        st.builds(lambda p, n, m: zone_rows.established(p, m, n), ports, numbers, any_),
        st.builds(
            lambda p, n, how, m: zone_rows.left(p, m, how, n),
            *(ports, numbers, st.integers(0, 17), any_),
        ),
        st.builds(zone_rows.closed, ports, few),
        st.builds(zone_rows.evicted, ports, any_),
        st.integers(0, 50).map(lambda time: f"tick {time}"),
        st.just("\n".join(ticks(35))),
    )


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=30), st.randoms())
def test_zones_in_any_order(events: list[tuple[int, int]], random: object) -> None:
    """In any order of zone rows between two heartbeats, nothing is lost or counted twice."""
    rows, q0, q, syns = [zone_rows.told(22, 1, time=1)], 0, 0, 0
    for second, (kind, more) in enumerate(events, 2):
        rows.append(zone_rows.told(22, second, time=second, q0=q0, q=q))
        if kind == 0:
            rows.append(zone_rows.syns(22, more, q, second))
            syns += more
        elif kind == 1:
            rows.append(zone_rows.opened(22, more, second))
            q0 += more
        elif kind == 2:
            rows += [zone_rows.opened(22, more, second), zone_rows.established(22, more, second)]
            q += more
        else:
            rows.append(zone_rows.left(22, q, 14, second))
            q = 0
    random.shuffle(rows)  # type: ignore[attr-defined]
    table = ListenerTable()
    table.watch(SESSION, Watched(), ZONES)
    tally = fed(Tally(table, SESSION), "ready 5 global", *rows)
    for beat in (ticks(), ticks(20, first=200)):
        assert wrongs(tally, *beat) == []
        assert only(table).queues == Queues(q0, q, None, 8)
        assert only(table).syns == syns


@given(st.lists(events_of_zones() | st.text(max_size=20), max_size=40))
def test_hostile_rows_of_zones(rows: list[str]) -> None:
    """Any rows raise only RowError, and no count falls and no queue becomes negative."""
    table = ListenerTable()
    table.watch(SESSION, Watched(), ZONES)
    tally = Tally(table, SESSION)
    before = 0
    for line in [line for row in ["ready 5 global", *rows] for line in row.split("\n")]:
        try:
            fed(tally, line)
        except RowError:
            continue
        now = sum(one.syns + one.established + one.accepts for one in table)
        assert now >= before
        before = now
        for one in table:
            assert one.syns == sum(one.saturation)
            assert all((each.q0 or 0) >= 0 <= (each.q or 0) for each in one.sockets.values())


@given(st.lists(events() | st.text(max_size=20), max_size=30))
def test_hostile_rows(lines: list[str]) -> None:
    """Any rows raise only RowError, and no count falls."""
    table = ListenerTable()
    table.watch(SESSION, Watched())
    tally = Tally(table, SESSION)
    before = 0
    for line in [READY, *lines]:
        try:
            fed(tally, line)
        except RowError:
            continue
        now = sum(one.syns for one in table)
        assert now >= before
        before = now


# Who accepts, on Sun's kernels


@pytest.mark.parametrize("calls_first", [False, True])
def test_acceptors(table: ListenerTable, calls_first: bool) -> None:
    """A listener has an owner once both sessions have reported, until it closes."""
    main, calls = (Tally(table, session) for session in (SESSION, CALLS))
    for each in (main, calls):
        fed(each, "ready 5 global")
    socket = f"{zone_rows.address(22):x}"
    ways = [
        (main, zone_rows.told(22, time=5)),
        (calls, rf"program {socket} 7 sshd\0\0"),
        (calls, f"fmri {socket} 7 svc:/network/ssh:default"),
    ]
    for tally, row in reversed(ways) if calls_first else ways:
        fed(tally, row)
    listener = only(table)
    assert listener.owner == Owner("sshd", fmri="svc:/network/ssh:default")
    # A loss or a restart of the second session removes no socket and no owner.
    calls.lose()
    fed(Tally(table, CALLS), "ready 5 global")
    assert [*listener.sockets] == [zone_rows.address(22)]
    assert listener.owner == Owner("sshd", fmri="svc:/network/ssh:default")
    fed(main, f"closed {socket} 9")
    assert listener.owner is None


def test_acceptors_of_several_sockets(table: ListenerTable) -> None:
    """A listener has the owners of all its sockets; if they are many, the first ones."""
    main, calls = (Tally(table, session) for session in (SESSION, CALLS))
    for each in (main, calls):
        fed(each, "ready 5 global")
    for socket in range(3):
        fed(main, zone_rows.told(22, time=5, socket=socket))
        names = [f"p{socket}{at}" for at in range(4)]
        at = f"{zone_rows.address(22, socket):x} 7"
        fed(calls, *(f"program {at} {name}" for name in [*names, "a\\033[2J"]))
    owner = only(table).owner
    assert owner == Owner("a\ufffd[2J,p00,p01,p02,p03,p10,p11,p12,...")
