"""Rows of the programs for Linux become counters that are exact, and gauges that are the newest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter.listeners import Identity, Listener, ListenerTable, SessionId
from dtrace_exporter.rows import Ready, RowError, Tick
from dtrace_exporter.sock_diag import Sample
from dtrace_exporter.sockets import Queues
from dtrace_exporter.tally import Tally
from linux_rows import (
    ACCEPTED,
    ACK_OTHER,
    ACK_Q_FULL,
    ESTABLISHED,
    OTHER,
    Q0_FULL,
    Q_FULL,
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
    table.watch(SESSION, None)
    table.watch(CALLS, {})
    return table


@pytest.fixture
def tally(table: ListenerTable) -> Tally:
    """Return a Tally that has had its ready row, and whose first set has begun."""
    return fed(Tally(table, SESSION), READY, "set 1")


@pytest.fixture
def calls(table: ListenerTable) -> Tally:
    """Return the Tally of the second session."""
    return fed(Tally(table, CALLS), READY)


def fed(tally: Tally, *lines: str) -> Tally:
    """Give lines to a Tally, and return it."""
    for line in lines:
        tally.feed(line)
    return tally


def closed(time: int, port: int = 22) -> str:
    """Return a row of a port's socket that has closed."""
    return f"closed {address(port):x} {time}"


def only(table: ListenerTable) -> Listener:
    """Return the only listener of a table."""
    [listener] = table
    return listener


def sample(port: int = 22, *, bound: str = "*", q: int = 3, qmax: int = 8, key: int = 77) -> Sample:
    """Return a listening socket as sock_diag has it."""
    return Sample(bound, port, q, qmax, None, key)


# Counting


def test_what_the_session_has_to_know(table: ListenerTable) -> None:
    """The ready row and heartbeats are handed on; the home place is known after the first."""
    tally = Tally(table, SESSION)
    assert tally.feed(READY) == Ready(5, str(HOME))
    assert tally.home == str(HOME)
    assert tally.feed("tick 7") == Tick(7)
    assert tally.feed("set 7") is None
    assert tally.feed(told(22)) is None


@pytest.mark.parametrize("part", range(12))
@pytest.mark.parametrize(
    ("what", "reason"),
    [(TAKEN, None), (Q_FULL, "q_full"), (Q0_FULL, "q0_full"), (OTHER, "other")],
)
def test_syns(what: int, reason: str | None, part: int, table: ListenerTable, tally: Tally) -> None:
    """A SYN is in the bucket it says, and a drop of the reason that its outcome is."""
    fed(tally, told(22), counted(22, 4, what, qmax=10, part=part, value=12))
    listener = only(table)
    assert listener.saturation == [4 if bucket == part else 0 for bucket in range(12)]
    assert (listener.syns, listener.saturation_sum) == (4, 1.2)
    assert listener.drops == ({reason: 4} if reason else {})


@pytest.mark.parametrize("part", range(14))
def test_waits(part: int, table: ListenerTable, tally: Tally) -> None:
    """A timed accept is in the bucket it says, with its time."""
    fed(tally, told(22), counted(22, 2, ACCEPTED, part=part, value=5))
    listener = only(table)
    assert listener.waits == [2 if bucket == part else 0 for bucket in range(14)]
    assert (listener.accepts, listener.wait_ns, listener.syns) == (2, 5000, 0)


def test_other_events(table: ListenerTable, tally: Tally) -> None:
    """Completions, drops at the final ACK and accepts without a time count where they belong."""
    events = (1, ESTABLISHED, 0), (2, ACK_Q_FULL, 0), (3, ACK_OTHER, 0), (4, ACCEPTED, 14)
    fed(tally, told(22), *(counted(22, n, what, part=part) for n, what, part in events))
    listener = only(table)
    assert (listener.established, listener.accepts, listener.syns) == (1, 4, 0)
    assert listener.drops == {"q_full_ack": 2, "other": 3}
    assert (sum(listener.waits), listener.wait_ns) == (0, 0)


def test_a_row_that_is_printed_again(table: ListenerTable, tally: Tally) -> None:
    """A set is printed again and again: each event counts once, over a change of sets as well."""
    rows = [counted(22, n, ESTABLISHED) for n in (3, 3, 5)]
    fed(tally, told(22), *rows, "set 2", rows[0], "set 1", rows[2], "set 2", rows[2])
    assert only(table).established == 5 + 5


def test_who_it_is_is_told_later(table: ListenerTable, tally: Tally) -> None:
    """What is counted at a listener that nobody has told of yet waits until somebody does."""
    fed(tally, counted(22, 3), counted(22, 1, ESTABLISHED), counted(22, 7))
    assert list(table) == []
    fed(tally, told(22))
    assert (only(table).syns, only(table).established) == (7, 1)
    fed(tally, told(22), counted(22, 8))
    assert only(table).syns == 8


def test_nobody_ever_tells_who_they_are(tally: Tally) -> None:
    """Those who wait are not more than a program can have: then it is an error."""
    for port in range(10_000):
        tally.feed(counted(port, 1))
    tally.feed(counted(0, 2))
    with pytest.raises(RowError):
        tally.feed(counted(10_000, 1))


def test_identities(table: ListenerTable, tally: Tally) -> None:
    """Port, address and place tell listeners apart, and the home place has no name."""
    for port, place, bound in ((80, 1, "::"), (81, 1, "::"), (82, 1, "::1"), (80, AWAY, "::")):
        fed(tally, told(port, place=place, bound=bound), counted(port, 1, place=place))
    assert {one.identity[1:]: one.syns for one in table} == {
        ("", "*", 80): 1,
        ("", "*", 81): 1,
        ("", "::1", 82): 1,
        (str(AWAY), "*", 80): 1,
    }


def test_several_sockets_of_one_identity(table: ListenerTable, tally: Tally) -> None:
    """Sockets with SO_REUSEPORT, and each of a socket's listens, add up to one listener."""
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
    """Rows of a port that nobody asked for leave nothing behind, whenever it is told which."""
    table.watch(SESSION, {80: ""})
    fed(tally, counted(22, 3), told(22), counted(22, 5), f"q {number(22):x} 8 10000003")
    fed(calls, "set 1", told(80), counted(80, 5))
    assert [(one.identity.port, one.syns, one.sockets) for one in table] == [(80, 0, {})]


# Queues


def test_queues(table: ListenerTable, tally: Tally) -> None:
    """The queues are as last seen, whichever row has told so."""
    fed(tally, told(22, time=5, q0=1, q=2, qmax=8))
    assert only(table).queues == Queues(1, 2, None, 8)
    fed(tally, f"q {number(22):x} 9 {9 * 10**7 + 6}", f"q0 {number(22):x} {8 * 10**7 + 5}")
    assert only(table).queues == Queues(5, 6, None, 9)
    fed(tally, told(22, time=7, q0=1, q=2, qmax=8))
    assert only(table).queues == Queues(5, 6, None, 9)
    fed(tally, told(22, time=12, q0=0, q=0, qmax=8))
    assert only(table).queues == Queues(0, 0, None, 8)


def test_queues_of_nobody(table: ListenerTable, tally: Tally) -> None:
    """A length of a listener that nobody has told of is of nobody."""
    fed(tally, f"q {number(22):x} 9 {9 * 10**7 + 6}", f"q0 {number(22):x} {8 * 10**7 + 5}")
    assert list(table) == []
    fed(tally, told(22, time=5, q=2))
    assert only(table).queues == Queues(0, 2, None, 8)


def test_limit(table: ListenerTable, tally: Tally, calls: Tally) -> None:
    """What listen() has made of the limit comes from the second session, unless it is old."""
    fed(tally, told(22, time=5, qmax=8))
    fed(calls, f"limit {address(22):x} 6 11")
    assert only(table).queues == Queues(0, 1, None, 11)
    fed(calls, f"limit {address(22):x} 5 4")
    assert only(table).queues == Queues(0, 1, None, 11)


def test_closed(table: ListenerTable, tally: Tally, calls: Tally) -> None:
    """A socket that has closed has no gauges, whatever still comes; its counters go on."""
    fed(tally, told(22, time=5), counted(22, 3))
    fed(calls, closed(9))
    assert only(table).queues is None
    fed(tally, told(22, time=8), counted(22, 4), f"q {number(22):x} 8 {7 * 10**7 + 6}")
    fed(calls, f"limit {address(22):x} 8 11")
    assert (only(table).queues, only(table).syns) == (None, 4)


def test_the_close_is_told_first(table: ListenerTable, tally: Tally, calls: Tally) -> None:
    """The two sessions' rows come in any order: a close may be told before the listener."""
    fed(calls, closed(9))
    fed(tally, told(22, time=5), counted(22, 3))
    assert (only(table).queues, only(table).syns) == (None, 3)


def test_told_when_it_does_not_listen_any_more(table: ListenerTable, tally: Tally) -> None:
    """Who it was may be told when the socket is closing: it counts, and has no gauges."""
    fed(tally, told(22, time=5, state=7), counted(22, 3))
    assert (only(table).queues, only(table).syns) == (None, 3)


def test_listens_again(table: ListenerTable, tally: Tally, calls: Tally) -> None:
    """A socket that listens again has a new number, new gauges and the counters it had."""
    fed(tally, told(22, time=5, q0=4), counted(22, 3))
    fed(calls, closed(9), f"limit {address(22):x} 12 11")
    fed(tally, told(22, generation=1, time=12, q=0, qmax=11), counted(22, 2, generation=1))
    assert (only(table).queues, only(table).syns) == (Queues(0, 0, None, 11), 5)


def test_memory_used_again_by_another_listener(
    table: ListenerTable, tally: Tally, calls: Tally
) -> None:
    """Another listener in the same memory has its own counters; the first one's gauges end."""
    fed(tally, told(22, time=5), counted(22, 3))
    fed(calls, closed(9))
    row = told(22, generation=1, time=12, bound="127.0.0.1", q=0)
    fed(tally, row, counted(22, 2, generation=1))
    found = {one.identity.address: (one.syns, one.queues) for one in table}
    assert found == {"*": (3, None), "127.0.0.1": (2, Queues(0, 0, None, 8))}


def test_memory_used_again_in_another_session(table: ListenerTable) -> None:
    """A row that one session prints late takes no socket from a listener of another session."""
    ids = SessionId("", "port-22"), SessionId("", "port-80")
    table.unwatch(SESSION)
    table.watch(ids[0], {22: ""})
    table.watch(ids[1], {80: ""})
    first, second = (fed(Tally(table, id_), READY, "set 1") for id_ in ids)
    fed(first, told(22, time=5))
    memory = f"{number(22, generation=1):x}"
    fed(second, told(80, time=12).replace(f"{number(80):x}", memory))
    fed(first, told(22, time=8))
    found = {one.identity.port: one.queues for one in table}
    assert found == {22: None, 80: Queues(0, 1, None, 8)}


def test_a_place_used_again(table: ListenerTable, tally: Tally) -> None:
    """A network namespace with the number of one that is gone does not go on with its counters."""
    fed(tally, told(22, place=AWAY, cookie=5), counted(22, 3, place=AWAY))
    fed(tally, told(22), counted(22, 9))
    again = told(22, place=AWAY, cookie=6, generation=1)
    fed(tally, again, counted(22, 2, place=AWAY, generation=1))
    found = {one.identity.place: one.syns for one in table}
    assert found == {"": 9, str(AWAY): 2}


def test_the_same_place_again(table: ListenerTable, tally: Tally) -> None:
    """Where the cookie is the same it is the same namespace, and its counters go on."""
    for generation in (0, 1):
        row = told(22, place=AWAY, cookie=5, generation=generation)
        fed(tally, row, counted(22, 3, place=AWAY, generation=generation))
    assert only(table).syns == 6


def test_a_forgotten_listener_counts_on(table: ListenerTable, tally: Tally) -> None:
    """Where a listener has been forgotten, what is told of it again is counted and shown."""
    table.watch(SESSION, {22: ""})
    fed(tally, told(22), counted(22, 3))
    table.watch(SESSION, {})
    table.watch(SESSION, {22: ""})
    fed(tally, told(22, time=5, q=4), counted(22, 5))
    assert only(table).queues == Queues(0, 4, None, 8)
    assert only(table).syns == 2


# What the kernel itself says


def test_know_listeners_that_nobody_has_told_of(table: ListenerTable, tally: Tally) -> None:
    """Listeners that have seen no event yet are known from the kernel, with Q and Qmax."""
    tally.know([sample(22), sample(80, bound="127.0.0.1", key=78)], 5)
    found = {one.identity: one.queues for one in table}
    queues = Queues(None, 3, None, 8)
    assert found == {
        Identity("", "", "*", 22): queues,
        Identity("", "", "127.0.0.1", 80): queues,
    }


def test_know_only_what_is_watched(table: ListenerTable, tally: Tally, calls: Tally) -> None:
    """Listeners of a port that nobody asked for do not become known by that."""
    table.watch(SESSION, {80: ""})
    for one in (tally, calls):
        one.know([sample(22)], 5)
    assert [one.identity.port for one in table] == [80]


def test_know_goes_on(table: ListenerTable, tally: Tally) -> None:
    """What the kernel says next is newer, also that a listener is there no more."""
    tally.know([sample(q=3)], 5)
    tally.know([sample(q=0)], 6)
    assert only(table).queues == Queues(None, 0, None, 8)
    tally.know([], 7)
    assert only(table).queues is None
    tally.know([sample(q=2, key=78)], 8)
    assert only(table).queues == Queues(None, 2, None, 8)


def test_know_then_a_row(table: ListenerTable, tally: Tally) -> None:
    """The first row of a listener that was known from the kernel is of the same socket."""
    tally.know([sample(q=3)], 5)
    fed(tally, told(22, time=7, q0=2, q=4))
    assert only(table).sockets == {address(22): Queues(2, 4, None, 8)}


def test_know_one_socket(table: ListenerTable, tally: Tally) -> None:
    """Where a listener has one socket the kernel's word is of that one, if it is newer."""
    fed(tally, told(22, time=7, q0=2, q=4))
    tally.know([sample(q=5, qmax=9)], 9)
    assert only(table).sockets == {address(22): Queues(2, 5, None, 9)}
    tally.know([sample(q=6)], 8)
    assert only(table).sockets == {address(22): Queues(2, 5, None, 9)}


def test_know_several_sockets(table: ListenerTable, tally: Tally) -> None:
    """Where a listener has several, which of them the kernel speaks of cannot be told."""
    fed(tally, told(22, time=7, q=4), told(22, socket=1, time=7, q=1))
    before = dict(only(table).sockets)
    tally.know([sample(q=5), sample(q=6, key=78)], 9)
    assert only(table).sockets == before


def test_know_of_other_places(table: ListenerTable, tally: Tally) -> None:
    """The kernel speaks of this place: a container's listener with the same address is another."""
    fed(tally, told(22, place=AWAY, time=7, q=4))
    tally.know([sample(q=5)], 9)
    found = {one.identity.place: one.queues for one in table}
    assert found == {str(AWAY): Queues(0, 4, None, 8), "": Queues(None, 5, None, 8)}


def test_know_when_it_has_closed(table: ListenerTable, tally: Tally, calls: Tally) -> None:
    """What was read before a socket closed does not bring its gauges back."""
    fed(tally, told(22, time=5))
    fed(calls, closed(9))
    tally.know([], 10)
    assert only(table).queues is None


# Anything


def events() -> st.SearchStrategy[str]:
    """Return rows of two listeners: who they are, lengths, limits, closes."""
    ports, times = st.sampled_from([22, 80]), st.integers(1, 20)
    return st.one_of(
        st.builds(lambda p, t, q: told(p, time=t, q=q), ports, times, st.integers(0, 9)),
        st.builds(lambda p, t, q: f"q {number(p):x} 8 {t * 10**7 + q}", ports, times, times),
        st.builds(lambda p, t: closed(t, p), ports, times),
        st.builds(lambda p, t, q: f"limit {address(p):x} {t} {q}", ports, times, times),
    )


@given(st.lists(events(), max_size=30))
def test_closed_stays_closed(lines: list[str]) -> None:
    """In whatever order rows come, who was last seen to close has no gauges."""
    table = ListenerTable()
    table.watch(SESSION, None)
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
    """However rows are lost and wherever it is told who they are of, the last ones count."""
    lines, now = [], [0] * 4
    for part, more in rows:
        now[part] += more
        lines.append(counted(22, now[part], part=part, qmax=8))
    kept = [line for line in lines if random.random() < 0.5]  # type: ignore[attr-defined]
    last = [counted(22, n, part=part, qmax=8) for part, n in enumerate(now)]
    at = random.randint(0, len(kept))  # type: ignore[attr-defined]
    table = ListenerTable()
    table.watch(SESSION, None)
    fed(Tally(table, SESSION), READY, "set 1", *kept[:at], told(22), *kept[at:], *last)
    assert only(table).saturation[:4] == now
    assert only(table).syns == sum(now)


@given(st.lists(events() | st.text(max_size=20), max_size=30))
def test_hostile_rows(lines: list[str]) -> None:
    """Whatever comes, only a RowError is raised, and what is counted does not fall."""
    table = ListenerTable()
    table.watch(SESSION, None)
    tally = Tally(table, SESSION)
    before = 0
    for line in [READY, *lines]:
        try:
            tally.feed(line)
        except RowError:
            continue
        now = sum(one.syns for one in table)
        assert now >= before
        before = now
