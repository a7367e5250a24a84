"""The limits of a host: within them all counts are exact, and beyond them nothing is kept."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

import zone_rows
from dtrace_exporter.limits import LimitError, Limits
from dtrace_exporter.listeners import Capabilities, Identity, Listener, ListenerTable, SessionId
from dtrace_exporter.tracing.rows import RowError, Tick
from dtrace_exporter.tracing.tally import Tally
from dtrace_exporter.watched import Watched, named
from linux_rows import ESTABLISHED, address, counted, told

SESSION = SessionId("", "all")
CALLS = SessionId("", "calls")
READY = "ready 5 1"
AWAY = 4026532281
ZONES = Capabilities(place_label="zone", own_place="global")


def taking(limits: Limits, ports: dict[int, str] | None = None) -> tuple[ListenerTable, Tally]:
    """Return a table with limits, and the tally of a Linux host whose first set has begun."""
    table = ListenerTable()
    table.limit("", limits)
    table.watch(SESSION, Watched() if ports is None else named(ports))
    table.watch(CALLS, Watched(()))
    tally = Tally(table, SESSION)
    feed(tally, READY, "set 1")
    return table, tally


def feed(tally: Tally, *lines: str) -> Counter[str]:
    """Give lines to a tally, and return how many were refused, by limit."""
    refused = Counter[str]()
    for line in lines:
        try:
            record = tally.feed(line)
        except LimitError as error:
            refused[error.limit] += 1
        else:
            if isinstance(record, Tick):
                assert not any(tally.settle(record))
    return refused


def close(table: ListenerTable, port: int, *, place: int = 1, time: int = 9) -> None:
    """Let the second session report that a port's socket has closed."""
    feed(Tally(table, CALLS, sees_closes=True), READY, f"closed {address(port, place):x} {time}")


def syns(table: ListenerTable) -> dict[int, int]:
    """Return the SYNs of each port."""
    return {one.identity.port: one.syns for one in table}


def test_listeners() -> None:
    """A listener beyond the limit is left out with its counts, and the others stay exact."""
    table, tally = taking(Limits(listeners=2))
    refused = feed(tally, told(1), told(2), told(3), *(counted(port, 5) for port in (1, 2, 3)))
    assert refused == {"listeners": 1}
    assert syns(table) == {1: 5, 2: 5}
    assert feed(tally, told(1, time=2), told(3, time=2), counted(2, 6), counted(3, 9)) == refused
    assert syns(table) == {1: 5, 2: 6}


def test_room_again() -> None:
    """After another listener has closed, a refused one is added at its next row, and counts on."""
    table, tally = taking(Limits(listeners=2))
    feed(tally, told(1), told(2), told(3), counted(1, 5), counted(2, 5), counted(3, 5))
    close(table, 1)
    assert feed(tally, told(3, time=12), counted(3, 7)) == {}
    assert syns(table) == {2: 5, 3: 2}
    assert {one.identity.port for one in table if one.queues} == {2, 3}


def test_who_closed_first_makes_room() -> None:
    """To make room, the listener that closed first is forgotten first, and no more than needed."""
    table, tally = taking(Limits(listeners=3))
    feed(tally, told(1), told(2), told(3))
    for port in (2, 3, 1):
        close(table, port)
    assert feed(tally, told(4)) == {}
    assert syns(table).keys() == {1, 3, 4}
    # This one had closed, but listens again.
    assert feed(tally, told(3, time=12, generation=1), told(5)) == {}
    assert syns(table).keys() == {3, 4, 5}


def test_configured_ports_stay() -> None:
    """A configured listener of the host's own place keeps its counters, whoever needs its room."""
    table, tally = taking(Limits(listeners=1), {22: "", 80: ""})
    feed(tally, told(22), counted(22, 5))
    close(table, 22)
    assert feed(tally, told(80)) == {"listeners": 1}
    assert syns(table) == {22: 5, 80: 0}
    assert Identity("", "", "*", 80) not in table


def test_places() -> None:
    """A place beyond the limit is added when another place has no open listener."""
    table, tally = taking(Limits(places=2))
    rows = [told(22, place=place) for place in (1, AWAY, AWAY + 1)]
    assert feed(tally, *rows, told(80), told(80, place=AWAY + 1)) == {"places": 2}
    assert {one.identity.place for one in table} == {"", str(AWAY)}
    close(table, 22, place=AWAY)
    assert feed(tally, told(22, place=AWAY + 1, time=12)) == {}
    assert {one.identity.place for one in table} == {"", str(AWAY + 1)}


def test_sockets() -> None:
    """A socket beyond the limit has no gauges, but its counts are added to its listener's."""
    table, tally = taking(Limits(sockets=2))
    rows = [told(22, socket=socket, q=socket) for socket in range(3)]
    counts = [counted(22, 5, socket=socket) for socket in range(3)]
    assert feed(tally, *rows, *counts) == {"sockets": 1}
    [listener] = table
    assert (listener.syns, {*listener.sockets}) == (15, {address(22), address(22, socket=1)})
    close(table, 22)
    assert feed(tally, told(22, socket=2, q=2, time=12)) == {}
    assert [queues.q for queues in listener.sockets.values()] == [1, 2]


def test_rows() -> None:
    """Rows beyond the limit are ignored; rows that were known before go on counting."""
    table, tally = taking(Limits(rows=2))
    rows = counted(22, 1), counted(22, 1, ESTABLISHED), counted(22, 1, qmax=9)
    assert feed(tally, told(22), *rows) == {"rows": 1}
    assert feed(tally, counted(22, 4), counted(22, 5, ESTABLISHED)) == {}
    assert [(one.syns, one.established) for one in table] == [(4, 5)]
    # The next set has room once the set before it is no longer printed.
    assert feed(tally, "set 2", counted(22, 1), "set 3", counted(22, 1)) == {"rows": 1}


def test_hosts_are_apart() -> None:
    """The limits of one host do not affect another host."""
    table = ListenerTable()
    sessions = [SessionId(host, "all") for host in ("good", "evil")]
    for id_ in sessions:
        table.watch(id_, Watched())
        table.limit(id_.host, Limits(listeners=5))
    good, evil = (Tally(table, id_) for id_ in sessions)
    feed(evil, READY, *(told(port) for port in range(100)))
    assert feed(good, READY, *(told(port) for port in range(5))) == {}
    assert len(table) == 10


def test_fewer_after_a_reload() -> None:
    """After the limit is lowered, closed listeners are forgotten until the limit holds."""
    table, tally = taking(Limits(listeners=9))
    feed(tally, *(told(port) for port in range(9)))
    table.clear_queues(SESSION)
    table.limit("", Limits(listeners=3))
    assert feed(tally, told(100, time=5)) == {}
    assert len(table) == 3


def test_a_session_that_ends_leaves_no_sockets() -> None:
    """Sockets of a run that has ended take no room from those of the next run."""
    table, tally = taking(Limits(sockets=3))
    for run in range(10):
        rows = [told(22, socket=socket + run % 2, time=run + 1) for socket in range(3)]
        assert feed(tally, *rows) == {}
        table.clear_queues(SESSION)
        tally = Tally(table, SESSION)
        feed(tally, READY)


def test_ready_once_more() -> None:
    """A run has one ready row; a second one is an error."""
    _, tally = taking(Limits())
    for row in (READY, "ready 5 2"):
        with pytest.raises(RowError):
            tally.feed(row)
    assert tally.own_place == "1"


@pytest.mark.parametrize(
    "row",
    [
        f"listener ff1 1 {'z' * 64} 10.0.0.1 80 0 0 8 0",
        "listener ff1 1 a/b 10.0.0.1 80 0 0 8 0",
        f"listener ff1 1 global fe80::1%{'z' * 9000} 80 0 0 8 0",
        "listener ff1 1 global fe80::1%z 80 0 0 8 0",
        f"listener ff1 1 global {'0' * 60}::1 80 0 0 8 0",
        f"ready 5 {'z' * 64}",
        "ready 5 a/b",
    ],
)
def test_names(row: str) -> None:
    """A zone's name or an address that no kernel can print is an error."""
    table = ListenerTable()
    table.watch(SESSION, Watched(), ZONES)
    tally = Tally(table, SESSION)
    with pytest.raises(RowError):
        tally.feed(row)


def test_limits_of_a_queue() -> None:
    """Of the many limits that a Q has had only few are kept, and the sum stays right."""
    listener = Listener(Identity("", "", "*", 22), SESSION)
    for qmax in range(1, 1001):
        listener.count_syns(5, qmax, 2, qmax)
    assert len(listener.q_sums) < 50
    assert listener.saturation_sum == pytest.approx(1000)
    assert listener.copy() == listener


FEW = Limits(listeners=3, sockets=4, places=2, rows=5)
small = st.integers(0, 9)


def rows_of_linux() -> st.SearchStrategy[str]:
    """Return rows as linux.d and linux_calls.d print them, of any listener at any time."""
    places = st.sampled_from([1, AWAY, AWAY + 1, AWAY + 2])
    return st.one_of(
        st.builds(
            lambda port, place, socket, generation, time, cookie, qmax: told(
                port,
                place=place,
                socket=socket,
                generation=generation,
                time=time,
                cookie=cookie,
                qmax=qmax,
            ),
            *(small, places, small, small, small, st.integers(1, 2), small),
        ),
        st.builds(
            lambda p, n, s, g, q: counted(p, n, socket=s, generation=g, qmax=q), *[small] * 5
        ),
        st.builds(lambda p, s, t: f"closed {address(p, socket=s):x} {t}", *[small] * 3),
        st.builds("set {}".format, small),
        st.builds("tick {}".format, small),
        st.just(READY),
    )


def rows_of_zones() -> st.SearchStrategy[str]:
    """Return rows as illumos.d prints them, of any listener at any time."""
    return st.one_of(
        st.builds(
            lambda p, n, s, t, z, q: zone_rows.told(p, n, socket=s, time=t, zone=f"z{z}", q=q),
            *[small] * 6,
        ),
        st.builds(zone_rows.syns, *[small] * 4),
        st.builds(zone_rows.opened, *[small] * 3),
        st.builds(lambda p, e, n: zone_rows.left(p, e, telling=n), *[small] * 3),
        st.builds(zone_rows.closed, *[small] * 3),
        st.builds("tick {}".format, small),
    )


def sizes(table: ListenerTable, tally: Tally) -> dict[str, int]:
    """Return the sizes of everything that rows can enlarge."""
    host, accounts = table._hosts[""], tally._accounts
    return {
        "listeners": len(host.listeners),
        "places": len(host.places),
        "sockets": len(host.sockets),
        "closed": len(host.sockets._closed),
        "idle": len(host.sockets.idle),
        "rows": sum(map(len, tally._reader._sets.values())),
        "ids": len(tally._listeners),
        "accounts": len(accounts.held),
        "accounts closed": len(accounts._closed),
        "known": len(accounts._known),
        "touched": len(accounts._touched),
        "tellings": sum(len(one.tellings) for one in accounts.held.values()),
    }


MOST = {
    "listeners": FEW.listeners,
    "places": FEW.places,
    "sockets": FEW.sockets,
    "closed": FEW.sockets,
    "idle": FEW.listeners,
    "rows": FEW.rows,
    "ids": FEW.rows,
    "accounts": FEW.sockets,
    "accounts closed": FEW.sockets,
    "known": FEW.sockets,
    "touched": FEW.sockets,
    "tellings": FEW.rows + FEW.sockets,
}


@pytest.mark.parametrize(
    ("rows", "ready", "capabilities"),
    [
        (rows_of_linux(), READY, None),
        (rows_of_zones(), "ready 5 global", ZONES),
        (rows_of_linux() | rows_of_zones(), READY, None),
    ],
    ids=["linux", "zones", "both"],
)
@given(data=st.data())
def test_never_more(
    rows: st.SearchStrategy[str], ready: str, capabilities: Capabilities | None, data: st.DataObject
) -> None:
    """Whatever rows come, no size exceeds its limit, and nothing else fails."""
    table = ListenerTable()
    table.limit("", FEW)
    table.watch(SESSION, Watched(), capabilities)
    tally = Tally(table, SESSION)
    for line in [ready, "set 0", *data.draw(st.lists(rows, min_size=30, max_size=90))]:
        with suppress(RowError, LimitError):
            record = tally.feed(line)
            if isinstance(record, Tick):
                list(tally.settle(record))
        assert tally._accounts._kept == sizes(table, tally)["tellings"]
        found = sizes(table, tally)
        assert all(found[name] <= most for name, most in MOST.items()), found
        open_ = [socket for one in table for socket in one.sockets]
        assert len(open_) == len(set(open_)) == found["sockets"]


def steps(work: Iterable[object]) -> int:
    """Return the number of steps of some work."""
    return sum(1 for _ in work)


def test_a_heartbeat_is_settled_in_small_steps() -> None:
    """Settling a heartbeat gives other tasks their turn after each of many sockets."""
    table = ListenerTable()
    table.watch(SESSION, Watched(), ZONES)
    tally = Tally(table, SESSION)
    feed(tally, "ready 5 global", *(zone_rows.told(22, socket=socket) for socket in range(200)))
    record = tally.feed("tick 5")
    assert isinstance(record, Tick)
    assert steps(tally.settle(record)) == 200


def test_listener_that_is_told_again_and_again() -> None:
    """A listener with many rows and no heartbeat keeps few of them; its counts stay exact."""
    table = ListenerTable()
    table.watch(SESSION, Watched(), ZONES)
    tally = Tally(table, SESSION)
    feed(tally, "ready 5 global")
    for number in range(1, 1000):
        feed(tally, zone_rows.told(22, number, time=number, q=3), zone_rows.syns(22, 1, 3, number))
    [account] = tally._accounts.held.values()
    assert len(account.tellings) <= 64
    feed(tally, "tick 2000")
    [listener] = table
    assert listener.syns == 999
    assert listener.queues is not None
    assert listener.queues.q == 3


def test_two_kernels_at_once() -> None:
    """A host that prints rows of both kinds of programs has no more accounts than sockets."""
    few = Limits(sockets=20)
    table, tally = taking(few)
    for number in range(1, 100):
        # Each row is of another use of the place, which removes what is known of the one before.
        sun = zone_rows.told(22, socket=number, time=number, zone="7")
        feed(tally, sun, told(23, place=7, socket=number, cookie=number, time=number))
    assert len(table) == 1
    assert len(tally._accounts.held) <= few.sockets


def test_closes_of_another_session() -> None:
    """If another session reports the closes, there are no more accounts than sockets, either."""
    few = Limits(sockets=20)
    table, tally = taking(few)
    other = Tally(table, CALLS, sees_closes=True)
    feed(other, READY)
    for number in range(1, 100):
        feed(tally, zone_rows.told(22, socket=number, time=number))
        feed(other, zone_rows.closed(22, number + 1, number))
    assert len(tally._accounts.held) <= few.sockets


def test_tellings_of_all_sockets() -> None:
    """The rows kept of all sockets are limited together; after that each account starts anew."""
    few = Limits(sockets=20, rows=100)
    table, tally = taking(few)
    for number in range(1, 60):
        feed(tally, *(zone_rows.told(22, number, socket=n, time=number) for n in range(20)))
    tellings = [len(one.tellings) for one in tally._accounts.held.values()]
    assert len(tellings) == few.sockets
    assert sum(tellings) <= few.rows + few.sockets
    assert len(table) == 1


def test_what_closes_is_not_settled() -> None:
    """Sockets that close before a heartbeat leave no work for it, however many they are."""
    _, tally = taking(Limits(sockets=20))
    for number in range(1, 100):
        feed(tally, zone_rows.told(22, socket=number), zone_rows.closed(22, 9, number))
    assert not tally._accounts._touched


def test_drain() -> None:
    """After a run has ended, everything it reported is released, in small steps."""
    _, tally = taking(Limits())
    for number in range(1, 100):
        feed(tally, zone_rows.told(22, socket=number), told(number), counted(number, 1))
        feed(tally, counted(999 + number, 1), f"more {number} 1 {'0' * 96} 1")
    held = [tally._listeners, tally._waiting, *tally._reader.held, tally._accounts.held]
    assert all(held)
    assert steps(tally.drain()) > 4 * 99
    assert not any(held)


def calls_of(function: Callable[[], object]) -> int:
    """Return the number of calls that a function makes, including its own."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    # A garbage collection would call a function of Hypothesis.
    gc.disable()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.parametrize("kind", ["listener", "place", "socket", "cookie", "closed"])
def test_work_for_a_row_does_not_grow(kind: str) -> None:
    """The work for a row beyond the limits does not grow with the number of listeners."""
    costs = []
    for size in (100, 1000):
        _, tally = taking(Limits(listeners=size, sockets=size, places=size))
        for number in range(size):
            feed(tally, told(number, place=AWAY + number if kind == "place" else 1))
        row = {
            "listener": told(9999),
            "place": told(1, place=2),
            "socket": told(1, socket=1),
            "cookie": told(5, cookie=1),
            "closed": f"closed {address(9999):x} 5",
        }[kind]
        # The first row finds out something that the next ones use.
        feed(tally, row)
        costs.append(calls_of(partial(feed, tally, row)))
    assert costs[0] == costs[1]


def test_work_for_a_place_does_not_grow() -> None:
    """The work for a new place does not grow with the closed listeners of a place in use."""
    costs = []
    for size in (100, 1000):
        table, tally = taking(Limits(places=1))
        feed(tally, *(told(number) for number in range(size)))
        # The order of a set is not known, so the listener that is found last stays open.
        [place] = table._hosts[""].places.values()
        ports = [each.port for each in place.identities]
        ports.pop()
        for port in ports:
            close(table, port)
        row = told(1, place=AWAY)
        assert feed(tally, row)["places"]
        costs.append(calls_of(partial(feed, tally, row)))
    assert costs[0] == costs[1]


def test_a_second_loss_costs_nothing() -> None:
    """If no queue is known, a second loss does not visit the sockets again."""
    costs = []
    for size in (10, 100):
        table = ListenerTable()
        table.watch(SESSION, Watched(), ZONES)
        tally = Tally(table, SESSION)
        feed(
            tally, "ready 5 global", *(zone_rows.told(22, socket=socket) for socket in range(size))
        )
        costs += [calls_of(tally.lose), calls_of(tally.lose)]
    first, again, more, again_more = costs
    assert first < more
    assert again == again_more
