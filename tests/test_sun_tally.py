"""Rows become counters that are exact and never fall, and gauges that are the newest seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter.listeners import Exports, Identity, Listener, ListenerTable, SessionId
from dtrace_exporter.rows import Ready, RowError
from dtrace_exporter.sockets import Queues
from dtrace_exporter.sun_rows import (
    OLD_TERMS,
    TERMS,
    Calm,
    Outcome,
    Place,
    Row,
    Tick,
    What,
)
from dtrace_exporter.sun_tally import Tally

SESSION = SessionId("", "all")
HOME = "4026531840"
GLOBAL_ZONE = "0"
ZONES = Exports(place_label="zone", home="global")
U64 = (1 << 64) - 1


def last(when: int, q0: int, q: int) -> int:
    """Pack a LAST field."""
    return when << 34 | q0 << 17 | q


def row(
    what: int,
    events: int,
    total: int = 0,
    *,
    parity: int = 0,
    socket: int = 1,
    seen: int = 0,
    qmax: int = 10,
    q0max: int = 0,
    port: int = 80,
    place: str = HOME,
    address: str = "*",
) -> Row:
    """Make a row up."""
    return Row(parity, socket, place, port, address, qmax, q0max, what, events, total, seen)


@pytest.fixture
def table() -> ListenerTable:
    """Return a table whose one session watches every port."""
    table = ListenerTable()
    table.watch(SESSION, None, Exports())
    return table


@pytest.fixture
def tally(table: ListenerTable) -> Tally:
    """Return a Tally that has had its ready row and the first heartbeat."""
    tally = Tally(table, SESSION)
    tally.ready(Ready(1, HOME))
    tally.tick(Tick(0, 0))
    return tally


def close(when: int, *, socket: int = 1, parity: int = 0, port: int = 80) -> Row:
    """Make up the row of a socket that stopped listening."""
    return row(What.CLOSED, 1, parity=parity, socket=socket, port=port, seen=when << 34)


def only(table: ListenerTable) -> Listener:
    """Return the only listener of a table."""
    [listener] = table
    return listener


# Counting


def test_cumulative_rows(table: ListenerTable, tally: Tally) -> None:
    """A row that grows adds what it grew by, one that did not adds nothing."""
    for events, total in ((3, 30), (3, 30), (5, 70)):
        tally.row(row(What.SYN + 2, events, total))
    listener = only(table)
    assert listener.identity == Identity("", "", "*", 80)
    assert (listener.syns, listener.saturation[2], listener.q_sums) == (5, 5, {10: 70})


def test_lost_row_is_made_up(table: ListenerTable, tally: Tally) -> None:
    """What a lost row would have said is in the next one."""
    tally.row(row(What.ESTABLISHED, 1))
    tally.tick(Tick(0, 1))
    tally.tick(Tick(0, 2))
    tally.row(row(What.ESTABLISHED, 9))
    assert only(table).established == 9


def test_row_that_fell_is_left_out(table: ListenerTable, tally: Tally) -> None:
    """A garbled row with smaller numbers changes nothing, nor what the next one adds."""
    for events, total in ((5, 50), (4, 60), (6, 40), (6, 60)):
        tally.row(row(What.ACCEPT, events, total))
    listener = only(table)
    assert (listener.accepts, listener.wait_ns) == (6, 60)


@pytest.mark.parametrize("bucket", range(12))
@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (Outcome.TAKEN, None),
        (Outcome.Q_FULL, "q_full"),
        (Outcome.Q0_FULL, "q0_full"),
        (Outcome.OTHER, "other"),
    ],
)
def test_syns(
    table: ListenerTable, tally: Tally, outcome: Outcome, reason: str | None, bucket: int
) -> None:
    """A SYN is in the bucket it says, and a drop of the reason that its outcome is."""
    tally.row(row(16 * outcome + bucket, 4, 12))
    listener = only(table)
    assert listener.syns == 4
    assert listener.saturation == [4 if number == bucket else 0 for number in range(12)]
    assert listener.drops == ({reason: 4} if reason else {})
    assert listener.saturation_sum == 1.2


@pytest.mark.parametrize("bucket", range(14))
def test_waits(table: ListenerTable, tally: Tally, bucket: int) -> None:
    """A timed accept is in the bucket it says, with its nanoseconds."""
    tally.row(row(What.ACCEPT + bucket, 2, 4**9))
    listener = only(table)
    assert listener.waits == [2 if number == bucket else 0 for number in range(14)]
    assert (listener.accepts, listener.wait_ns, listener.syns) == (2, 4**9, 0)


def test_other_events(table: ListenerTable, tally: Tally) -> None:
    """Completions, drops at the final ACK and accepts without a time count where they belong."""
    tally.row(row(What.ESTABLISHED, 1))
    tally.row(row(What.ACK_Q_FULL, 2))
    tally.row(row(What.ACK_OTHER, 3))
    tally.row(row(What.ACCEPT_UNTIMED, 4, 99))
    tally.row(row(What.OBSERVED, 5, 99))
    listener = only(table)
    assert (listener.established, listener.accepts, listener.syns) == (1, 4, 0)
    assert listener.drops == {"q_full_ack": 2, "other": 3}
    assert (sum(listener.waits), listener.wait_ns, listener.saturation_sum) == (0, 0, 0.0)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (What.SYN_Q_FULL, "q_full"),
        (What.SYN_Q0_FULL, "q0_full"),
        (What.SYN_Q0_EVICTED, "q0_evicted"),
    ],
)
def test_syns_dropped_after_they_were_counted(
    table: ListenerTable, tally: Tally, what: What, reason: str
) -> None:
    """A drop that is told apart from its SYN is of the reason it says, and no SYN more."""
    tally.row(row(Outcome.TAKEN * 16 + 11, 9, 90))
    tally.row(row(what, 4, 99))
    tally.row(row(what, 6, 99))
    listener = only(table)
    assert (listener.syns, listener.saturation[11], sum(listener.saturation)) == (9, 9, 9)
    assert listener.drops == {reason: 6}
    assert (listener.q_sums, listener.established, listener.accepts) == ({10: 90}, 0, 0)


def test_saturation_sum() -> None:
    """The sum adds each SYN's Q by its own Qmax; a backlog of 0 is taken as 1."""
    listener = Listener(Identity("", "", "*", 80), SESSION)
    listener.count_syns(5, 10, 2, 10)
    listener.count_syns(5, 4, 1, 2)
    listener.count_syns(10, 0, 3, 3)
    assert listener.saturation_sum == 1.0 + 0.5 + 3.0


def test_keys_are_counted_apart(table: ListenerTable, tally: Tally) -> None:
    """The same event at other sockets and limits is another row of the same listener."""
    tally.row(row(What.SYN, 3, socket=1, qmax=10))
    tally.row(row(What.SYN, 4, socket=2, qmax=10))
    tally.row(row(What.SYN, 5, socket=1, qmax=20))
    tally.row(row(What.SYN, 5, socket=1, qmax=20))
    tally.row(row(What.SYN, 6, socket=1, qmax=20, q0max=1044))
    assert only(table).syns == 18


def test_limit_of_q0_changes(table: ListenerTable, tally: Tally) -> None:
    """When Q0's limit is tuned while a set is in use, counters stay exact and the newer is shown.

    The rows of the limit before are printed on, in any order.
    """
    tally.row(row(What.SYN, 3, 30, q0max=1034, seen=last(1, 2, 3)))
    assert only(table).queues == Queues(2, 3, 1034, 10)
    rows = [
        row(What.SYN, 4, 40, q0max=1034, seen=last(2, 2, 4)),
        row(What.SYN, 1, 10, q0max=2058, seen=last(3, 3, 4)),
    ]
    for tick in range(3):
        tally.tick(Tick(0, tick))
        for one in rows if tick else reversed(rows):
            tally.row(one)
        assert only(table).queues == Queues(3, 4, 2058, 10)
    tally.row(row(What.SYN, 5, 50, q0max=1034, seen=last(4, 4, 4)))
    assert only(table).queues == Queues(4, 4, 1034, 10)
    assert (only(table).syns, only(table).q_sums) == (6, {10: 60})


def test_identities(table: ListenerTable, tally: Tally) -> None:
    """Port, address and place tell listeners apart, and the home place is the empty one."""
    for place, address, port in (
        (HOME, "*", 80),
        (HOME, "*", 81),
        (HOME, "::1", 80),
        ("7", "*", 80),
    ):
        tally.row(row(What.SYN, 1, place=place, address=address, port=port))
    assert {listener.identity[1:] for listener in table} == {
        ("", "*", 80),
        ("", "*", 81),
        ("", "::1", 80),
        ("7", "*", 80),
    }
    assert [listener.syns for listener in table] == [1, 1, 1, 1]


def test_other_ports(table: ListenerTable, tally: Tally) -> None:
    """A row of a port that nobody asked for leaves nothing behind."""
    table.watch(SESSION, {22: "ssh"})
    tally.row(row(What.SYN, 1, port=80, seen=last(1, 2, 3)))
    assert [(listener.identity.port, listener.syns) for listener in table] == [(22, 0)]


def test_port_added_by_a_reload(table: ListenerTable, tally: Tally) -> None:
    """A port that is asked for later starts with what happens from then on, not with the past."""
    table.watch(SESSION, {22: "ssh"})
    tally.row(row(What.ACCEPT, 7, 700))
    table.watch(SESSION, {22: "ssh", 80: "web"})
    tally.row(row(What.ACCEPT, 7, 700))
    listeners = {listener.identity.port: listener for listener in table}
    assert (listeners[80].accepts, listeners[80].wait_ns) == (0, 0)
    tally.row(row(What.ACCEPT, 9, 950))
    assert (listeners[80].accepts, listeners[80].wait_ns) == (2, 250)
    tally.tick(Tick(1, 0))
    tally.row(row(What.ACCEPT, 4, 40, parity=1))
    assert (listeners[80].accepts, listeners[80].wait_ns) == (6, 290)


def test_port_taken_out_and_added_again(table: ListenerTable, tally: Tally) -> None:
    """What happened while a port was not asked for is not counted when it is again."""
    table.watch(SESSION, {22: "", 80: ""})
    tally.row(row(What.ESTABLISHED, 5, seen=last(1, 0, 1)))
    table.watch(SESSION, {22: ""})
    tally.row(row(What.ESTABLISHED, 8, seen=last(2, 0, 2)))
    table.watch(SESSION, {22: "", 80: ""})
    tally.row(row(What.ESTABLISHED, 9, seen=last(3, 0, 3)))
    [listener] = [one for one in table if one.identity.port == 80]
    assert listener.established == 1
    assert listener.queues == Queues(0, 3, None, 10)
    tally.row(close(4))
    assert listener.queues is None


def test_numbers_of_64_bits(table: ListenerTable, tally: Tally) -> None:
    """Counters go on beyond 64 bits."""
    tally.row(row(What.ACCEPT, U64, U64))
    tally.tick(Tick(1, 0))
    tally.row(row(What.ACCEPT, U64, U64, parity=1))
    listener = only(table)
    assert (listener.accepts, listener.wait_ns, listener.waits[0]) == (2 * U64, 2 * U64, 2 * U64)


# Generations


# The short way


def calm(events: int, *, q: int = 3, term: int = 0) -> Calm:
    """Make a row of the short way up."""
    return Calm(term, q, events)


def test_short_way(table: ListenerTable, tally: Tally) -> None:
    """SYNs of the short way count with what they found, beside those of the long one."""
    tally.row(row(What.CALM, 1, qmax=100))
    tally.row(row(What.SYN + 1, 2, 6, qmax=100))
    for events in (5, 5, 7, 6):
        tally.calm(calm(events))
        tally.calm(calm(events, q=0))
    listener = only(table)
    assert (listener.syns, listener.q_sums) == (16, {100: 27})
    assert listener.saturation[:3] == [7, 9, 0]


def test_short_way_of_nobody_yet(table: ListenerTable, tally: Tally) -> None:
    """SYNs of the short way wait for the row that tells whose they are."""
    tally.calm(calm(5))
    assert list(table) == []
    tally.row(row(What.CALM, 1, qmax=100))
    tally.calm(calm(5))
    assert only(table).syns == 5


def test_terms_of_the_short_way(table: ListenerTable, tally: Tally) -> None:
    """Each term is of one listener with one Qmax, though it be the same socket or address."""
    tally.row(row(What.CALM, 1, port=80, qmax=100))
    tally.row(row(What.CALM + 1, 1, port=443, qmax=100))
    tally.row(row(What.CALM + 2, 1, port=443, qmax=200))
    tally.calm(calm(5))
    tally.calm(calm(7, term=1))
    tally.calm(calm(9, term=2, q=20))
    tally.calm(calm(11, term=3))
    assert {one.identity.port: one.q_sums for one in table} == {
        80: {100: 15},
        443: {100: 21, 200: 180},
    }


def test_short_way_at_a_change_of_sets(table: ListenerTable, tally: Tally) -> None:
    """What is counted in a term goes on through all generations, its row in either set or none."""
    tally.row(row(What.CALM, 1, port=80))
    for generation, events in enumerate((5, 7, 8, 12), start=1):
        tally.calm(calm(events))
        assert only(table).syns == events
        tally.tick(Tick(generation, 0))
        if generation == 2:
            tally.row(row(What.CALM, 9, port=80))


@pytest.mark.parametrize("first", [0, 5, TERMS - 3])
def test_numbers_of_terms_come_again(first: int, table: ListenerTable, tally: Tally) -> None:
    """A number that comes again is another term, and of those long past nothing is kept."""
    for number in range(2 * TERMS):
        term = (first + number) % TERMS
        tally.row(row(What.CALM + term, 1, port=80 + number // TERMS))
        tally.calm(calm(2, term=term))
        tally.calm(calm(3, term=term))
        # What programs throw away after some terms they have told until then.
        tally.calm(calm(3, term=(term - 32) % TERMS))
    assert {one.identity.port: one.syns for one in table} == {80: 3 * TERMS, 81: 3 * TERMS}
    assert len(tally._terms) <= OLD_TERMS


def test_short_way_of_other_ports(table: ListenerTable, tally: Tally) -> None:
    """SYNs of the short way at a port that nobody asks for any more are left out."""
    tally.row(row(What.CALM, 1, port=80))
    table.watch(SESSION, {443: "web"})
    tally.calm(calm(5))
    assert {one.identity.port: one.syns for one in table} == {443: 0}


def test_emptied_set_starts_from_nothing(table: ListenerTable, tally: Tally) -> None:
    """In a new generation the set of its parity counts from zero again."""
    for generation, events in enumerate((5, 7, 3, 7)):
        tally.tick(Tick(generation, 0))
        tally.row(row(What.ESTABLISHED, events, parity=generation & 1))
        tally.tick(Tick(generation, 1))
        tally.row(row(What.ESTABLISHED, events, parity=generation & 1))
    assert only(table).established == 5 + 7 + 3 + 7


@pytest.mark.parametrize("generation", [0, 1])
def test_last_rows_of_the_set_at_rest(table: ListenerTable, tally: Tally, generation: int) -> None:
    """What was counted between the last heartbeat of a generation and its end is not lost."""
    now, then = (generation + 1) & 1, generation & 1
    tally.tick(Tick(generation, 0))
    tally.row(row(What.ESTABLISHED, 5, parity=then))
    # The even set is printed first.
    for parity in (0, 1):
        tally.tick(Tick(generation + (parity == now), 1))
        tally.row(row(What.ESTABLISHED, 6 if parity == then else 1, parity=parity))
    tally.tick(Tick(generation + 1, 2))
    tally.row(row(What.ESTABLISHED, 3, parity=now))
    assert only(table).established == 6 + 3


def test_generation_missed(table: ListenerTable, tally: Tally) -> None:
    """When a whole generation was not heard of, neither set is what it was."""
    tally.row(row(What.ESTABLISHED, 5))
    tally.tick(Tick(1, 0))
    tally.row(row(What.ESTABLISHED, 4, parity=1))
    # Of generation 2 only what the set at rest is printed with is heard.
    tally.tick(Tick(2, 0))
    tally.row(row(What.ESTABLISHED, 7))
    tally.tick(Tick(3, 0))
    tally.row(row(What.ESTABLISHED, 6, parity=1))
    assert only(table).established == 5 + 4 + 7 + 6
    tally.tick(Tick(6, 0))
    tally.row(row(What.ESTABLISHED, 8))
    assert only(table).established == 5 + 4 + 7 + 6 + 8


def test_row_before_any_heartbeat(table: ListenerTable) -> None:
    """A row that comes before the first heartbeat is an error and changes nothing."""
    tally = Tally(table, SESSION)
    tally.ready(Ready(1, HOME))
    for parity in (0, 1):
        with pytest.raises(RowError, match="heartbeat"):
            tally.row(row(What.ESTABLISHED, 1, parity=parity))
    assert len(table) == 0


def test_lost_heartbeat(table: ListenerTable, tally: Tally) -> None:
    """Rows behind a lost heartbeat are errors, and made up for once by those of the next one."""
    tally.row(row(What.ESTABLISHED, 2))
    tally.tick(Tick(1, 0))
    # Here "tick 2" is missing: these would look like rows of generation 0.
    with pytest.raises(RowError, match="heartbeat"):
        tally.row(row(What.ESTABLISHED, 5))
    with pytest.raises(RowError, match="heartbeat"):
        tally.row(close(9))
    assert only(table).established == 2
    for again in range(2):
        tally.tick(Tick(2, again))
        tally.row(row(What.ESTABLISHED, 5))
    assert only(table).established == 2 + 5


def test_lost_heartbeat_of_the_set_at_rest(table: ListenerTable, tally: Tally) -> None:
    """The set at rest is not taken for the one in use when its heartbeat is lost."""
    tally.tick(Tick(1, 0))
    tally.row(row(What.ESTABLISHED, 5, parity=1))
    tally.tick(Tick(2, 0))
    tally.row(row(What.ESTABLISHED, 1))
    with pytest.raises(RowError, match="heartbeat"):
        tally.row(row(What.ESTABLISHED, 6, parity=1))
    assert only(table).established == 5 + 1


def test_next_run(table: ListenerTable, tally: Tally) -> None:
    """A session that starts again counts on from where the last one was."""
    tally.row(row(What.ESTABLISHED, 5))
    again = Tally(table, SESSION)
    again.ready(Ready(1, HOME))
    again.tick(Tick(0, 0))
    again.row(row(What.ESTABLISHED, 2))
    assert only(table).established == 7


Kind = tuple[int, int, int, int]
Happening = tuple[int, int, int, int]
Printed = list[tuple[Tick, list[Row]]]


class Program:
    """What a D program does: two sets in turn, the one at rest printed once more, then emptied."""

    TICKS = 4

    def __init__(self, places: Mapping[int, str]) -> None:
        self.places = places
        self.named: set[str] = set()
        self.generation = 0
        self.ticks = 0
        self.now = 0
        self.sets: tuple[dict[Kind, list[int]], ...] = ({}, {})
        self.open: dict[int, tuple[int, Queues]] = {}

    def happen(self, socket: int, port: int, what: int, events: int) -> None:
        """Let something happen at a socket; one that listens elsewhere has to be closed first."""
        if socket in self.open and self.open[socket][0] != port:
            self.close(socket, 0)
        self.now += 1
        q, q0max = self.now % 11, self._q0max()
        self.open[socket] = port, Queues(3, q, q0max, 10)
        self._count((socket, port, q0max, what), events, last(self.now, 3, q))

    def close(self, socket: int, port: int) -> None:
        """Close a socket, which may have given back its port."""
        self.now += 1
        self.open.pop(socket, None)
        self._count((socket, port, self._q0max(), What.CLOSED), 1, last(self.now, 0, 0))

    def _q0max(self) -> int:
        """Return Q0's limit, which is tuned now and then."""
        return 1034 + self.now // 4

    def _count(self, kind: Kind, events: int, seen: int) -> None:
        self.named.add(self.places[kind[0]])
        held = self.sets[self.generation & 1].setdefault(kind, [0, 0])
        held[0] += events
        held[1] = seen

    def tick(self) -> Printed:
        """Return a heartbeat, and go on to the next."""
        self.ticks += 1
        printed = self.printed(both=self.ticks == 1)
        if self.ticks == self.TICKS // 2:
            self.sets[~self.generation & 1].clear()
        if self.ticks == self.TICKS:
            self.generation += 1
            self.ticks = self.now = 0
        return printed

    def printed(self, both: bool) -> Printed:
        """Return the ticks and rows of the set in use or of both, each event of the value 3."""
        in_use = self.generation & 1
        return [
            (
                Tick(self.generation - (parity != in_use), 0),
                [
                    row(
                        what,
                        events,
                        3 * events,
                        parity=parity,
                        socket=socket,
                        place=self.places[socket],
                        port=port,
                        q0max=q0max,
                        seen=seen,
                    )
                    for (socket, port, q0max, what), (events, seen) in self.sets[parity].items()
                ],
            )
            for parity in (0, 1)
            if parity == in_use or (both and self.generation > 0)
        ]


KINDS = [
    What.SYN,
    What.SYN + 11,
    16 + 5,
    What.ESTABLISHED,
    What.ACK_Q_FULL,
    What.SYN_Q0_FULL,
    What.SYN_Q0_EVICTED,
    What.ACCEPT + 3,
]
NAMES = -1
"""Stands among kinds of row for those that name places."""
NETNS = {1: HOME, 2: HOME, 3: "7"}, {HOME: "", "7": "7"}
ZONED = {1: GLOBAL_ZONE, 2: "3", 3: "12"}, {GLOBAL_ZONE: "global", "3": "web", "12": "db"}
"""Each socket's place, and what the places are called."""
WATCHED = (80, 81)
FOREIGN = 99


def counted(table: ListenerTable) -> Counter[tuple[int, int]]:
    """Return the counters by port and kind of event."""
    totals: Counter[tuple[int, int]] = Counter()
    for listener in table:
        drops = Counter(listener.drops)
        assert listener.syns == sum(listener.saturation)
        assert listener.accepts == sum(listener.waits)
        assert sum(listener.q_sums.values()) == 3 * listener.syns
        assert listener.wait_ns == 3 * listener.accepts
        assert listener.saturation[5] == drops["q_full"]
        numbers = {
            What.SYN: listener.saturation[0],
            What.SYN + 11: listener.saturation[11],
            16 + 5: listener.saturation[5],
            What.ESTABLISHED: listener.established,
            What.ACK_Q_FULL: drops["q_full_ack"],
            What.SYN_Q0_FULL: drops["q0_full"],
            What.SYN_Q0_EVICTED: drops["q0_evicted"],
            What.ACCEPT + 3: listener.accepts,
        }
        totals.update({(listener.identity.port, what): n for what, n in numbers.items()})
    return totals


class Run:
    """A program, of zones or not, and a table that hears of it with losses."""

    def __init__(self, zones: bool) -> None:
        self.places, self.names = ZONED if zones else NETNS
        self.zones = zones
        self.table = ListenerTable()
        self.table.watch(SESSION, dict.fromkeys(WATCHED, ""), ZONES if zones else Exports())
        self.restart()
        self.truth: Counter[tuple[int, int]] = Counter()
        self._before: Counter[tuple[int, int]] = Counter()

    def restart(self) -> None:
        """Start the program and the tally anew; the table stays."""
        self.table.clear_queues(SESSION)
        self.program = Program(self.places)
        self.tally = Tally(self.table, SESSION)
        self.tally.ready(Ready(1, self.places[1]))
        self.unheard = 0

    def check(self) -> None:
        """Check that no counter fell, or says more than happened."""
        now = counted(self.table)
        assert all(now[key] >= self._before[key] for key in self._before)
        assert all(now[key] <= self.truth[key] for key in now)
        self._before = now

    def check_queues(self) -> None:
        """Check that the queues are those of all open sockets, and of no other."""
        shown = {
            socket: (listener.identity.place, listener.identity.port, queues)
            for listener in self.table
            for socket, queues in listener.sockets.items()
        }
        assert shown == {
            socket: (self.names[self.places[socket]], port, queues)
            for socket, (port, queues) in self.program.open.items()
            if port in WATCHED
        }
        assert sum(len(listener.sockets) for listener in self.table) == len(shown)

    def happen(self, happened: list[Happening]) -> None:
        """Let events happen in the kernel."""
        for socket, port, what, events in happened:
            if what == What.CLOSED:
                self.program.close(socket, port)
            else:
                self.program.happen(socket, port, what, events)
                if port in WATCHED and what != What.OBSERVED:
                    self.truth[port, what] += events

    def tick(self, lost: set[int], tick_lost: bool = False) -> None:
        """Have a heartbeat and its rows printed, and heard but for the kinds lost."""
        self.unheard = self.unheard + 1 if tick_lost else 0
        self._hear(self.program.tick(), lost, tick_lost)

    def end(self) -> None:
        """End the program, which prints everything again."""
        self._hear(self.program.printed(both=True))

    def _hear(self, printed: Printed, lost: Collection[int] = (), tick_lost: bool = False) -> None:
        if self.zones and NAMES not in lost:
            for place in self.program.named - {GLOBAL_ZONE}:
                self.tally.place(Place(place, self.names[place]))
        for tick, rows in printed:
            if not tick_lost:
                self.tally.tick(tick)
            for one in rows:
                if one.what not in lost:
                    try:
                        self.tally.row(one)
                    except RowError:
                        assert tick_lost
                    self.check()


happenings = st.lists(
    st.tuples(
        st.integers(1, 3),
        st.sampled_from([*WATCHED, FOREIGN]),
        st.sampled_from([*KINDS, What.OBSERVED, What.CLOSED]),
        st.integers(1, 5),
    ),
    max_size=6,
)
losses = st.sets(st.sampled_from([*KINDS, What.CLOSED, NAMES]))


@given(
    st.booleans(), st.lists(st.tuples(happenings, losses, st.integers(0, 30).map(lambda n: n == 0)))
)
def test_exact_with_lost_rows(
    zones: bool, steps: list[tuple[list[Happening], set[int], bool]]
) -> None:
    """Whatever rows of the set in use are lost, and with restarts, all is right in the end."""
    run = Run(zones)
    for happened, lost, ends in steps:
        run.happen(happened)
        run.tick(lost if run.program.ticks else set())
        if ends:
            run.end()
            run.check_queues()
            run.restart()
    run.end()
    run.check_queues()
    assert +counted(run.table) == +run.truth


@given(st.booleans(), st.lists(st.tuples(happenings, losses, st.booleans()), max_size=40))
def test_never_too_much_with_lost_heartbeats(
    zones: bool,
    steps: list[tuple[list[Happening], set[int], bool]],
) -> None:
    """Whatever rows and heartbeats are lost, no counter falls or says more than happened.

    A program is ended when no heartbeat was heard for part of a generation.
    """
    run = Run(zones)
    for happened, lost, tick_lost in steps:
        run.happen(happened)
        run.tick(lost, tick_lost and run.unheard < Program.TICKS - 1)
    run.end()
    run.check()


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5),
            st.integers(0, 1),
            st.integers(0, 3) | st.just(U64),
            st.integers(0, 3) | st.just(U64),
            st.sampled_from([*KINDS, What.CLOSED]),
        )
    )
)
def test_hostile_rows(steps: list[tuple[int, int, int, int, int]]) -> None:
    """Rows in any order and with any numbers never let a counter fall."""
    table = ListenerTable()
    table.watch(SESSION, None)
    tally = Tally(table, SESSION)
    before: tuple[int, ...] = (0,) * 5
    for generation, parity, events, total, what in steps:
        tally.tick(Tick(generation, 0))
        if parity == generation & 1:
            tally.row(row(what, events, total, parity=parity))
        else:
            with pytest.raises(RowError):
                tally.row(row(what, events, total, parity=parity))
        one = table.listener(SESSION, "", "*", 80)
        now = (one.syns, one.established, one.accepts, one.wait_ns, sum(one.drops.values()))
        assert all(new >= old for new, old in zip(now, before, strict=True))
        before = now


# Queues


def test_newest_observation(table: ListenerTable, tally: Tally) -> None:
    """The queues are those of the newest observation, whatever row it came with."""
    tally.row(row(What.SYN, 1, seen=last(5, 2, 3)))
    tally.row(row(What.ESTABLISHED, 1, seen=last(7, 1, 4)))
    tally.row(row(What.ACCEPT, 1, seen=last(6, 9, 9), qmax=20))
    assert only(table).queues == Queues(1, 4, None, 10)


def test_newer_generation_is_newer(table: ListenerTable, tally: Tally) -> None:
    """Time starts again with each generation, and the set at rest is older than the one in use."""
    tally.tick(Tick(1, 0))
    tally.row(row(What.SYN, 1, parity=1, seen=last(1000, 2, 3)))
    tally.tick(Tick(2, 0))
    tally.row(row(What.SYN, 1, parity=0, seen=last(1, 0, 1)))
    tally.tick(Tick(1, 0))
    tally.row(row(What.SYN, 2, parity=1, seen=last(1001, 5, 5)))
    assert only(table).queues == Queues(0, 1, None, 10)


def test_fullest_socket(table: ListenerTable, tally: Tally) -> None:
    """Of several sockets the queues are those of the one nearest to its limit."""
    tally.row(row(What.SYN, 1, socket=1, qmax=100, seen=last(1, 0, 50)))
    tally.row(row(What.SYN, 1, socket=2, qmax=10, seen=last(1, 0, 6)))
    tally.row(row(What.SYN, 1, socket=3, qmax=10, seen=last(1, 3, 6)))
    tally.row(row(What.SYN, 1, socket=4, qmax=10, seen=last(1, 4, 5)))
    assert only(table).queues == Queues(3, 6, None, 10)


def test_queue_too_long_for_its_field(table: ListenerTable, tally: Tally) -> None:
    """A queue that its field cannot hold is not known; the other one is."""
    tally.row(row(What.SYN, 1, seen=last(1, 0x1FFFF, 4)))
    assert only(table).queues == Queues(None, 4, None, 10)


def test_closed_socket(table: ListenerTable, tally: Tally) -> None:
    """A socket that closed has no queues, but its counters stay; one in its place has both."""
    tally.row(row(What.SYN, 3, seen=last(1, 1, 2)))
    tally.row(close(2))
    assert only(table).queues is None
    assert only(table).sockets == {}
    assert only(table).syns == 3
    tally.row(row(What.OBSERVED, 2, seen=last(3, 0, 0)))
    assert only(table).queues == Queues(0, 0, None, 10)
    tally.row(close(2))
    assert only(table).queues == Queues(0, 0, None, 10)


@pytest.mark.parametrize(
    ("port", "address", "place"),
    [(0, "*", HOME), (80, "*", HOME), (99, "::1", "7"), (0, "127.0.0.1", "7")],
)
def test_socket_closes_by_its_address(
    table: ListenerTable, tally: Tally, port: int, address: str, place: str
) -> None:
    """Whatever identity the row of a close has, its socket closes, and no listener is made."""
    table.watch(SESSION, {80: "web"})
    tally.row(row(What.SYN, 3, socket=1, seen=last(1, 1, 2)))
    tally.row(row(What.SYN, 3, socket=2, seen=last(1, 1, 5)))
    seen = last(2, 0x1FFFF, 0x1FFFF)
    tally.row(row(What.CLOSED, 1, port=port, address=address, place=place, seen=seen))
    assert only(table).sockets == {2: Queues(1, 5, None, 10)}
    assert (only(table).syns, only(table).drops) == (6, {})


def test_close_of_an_unknown_socket(table: ListenerTable, tally: Tally) -> None:
    """A socket of which nothing was heard closes without a trace, whoever it belonged to."""
    tally.row(row(What.SYN, 3, seen=last(1, 1, 2)))
    tally.row(close(2, socket=7))
    tally.row(close(2, socket=8, port=0))
    tally.row(close(2, socket=9, port=22))
    assert only(table).sockets == {1: Queues(1, 2, None, 10)}
    assert only(table).identity.port == 80


def test_fullest_open_socket(table: ListenerTable, tally: Tally) -> None:
    """A closed socket of several is no longer the fullest."""
    tally.row(row(What.SYN, 1, socket=1, seen=last(1, 0, 9)))
    tally.row(row(What.SYN, 1, socket=2, seen=last(1, 0, 1)))
    tally.row(close(2, socket=1))
    assert only(table).queues == Queues(0, 1, None, 10)


@pytest.mark.parametrize("closed_first", [True, False])
def test_close_and_older_row(table: ListenerTable, tally: Tally, closed_first: bool) -> None:
    """In whichever order a tick prints them, a close ends what was seen before it."""
    rows = [close(9), row(What.SYN, 5, seen=last(8, 1, 2))]
    for tick in range(2):
        tally.tick(Tick(0, tick))
        for one in rows if closed_first else reversed(rows):
            tally.row(one)
        assert only(table).queues is None
        assert only(table).syns == 5


@pytest.mark.parametrize(("generation", "ticks"), [(0, [0, 1]), (1, [2, 1])])
def test_closed_socket_stays_closed(
    table: ListenerTable, tally: Tally, generation: int, ticks: list[int]
) -> None:
    """Older observations that are printed when their set has come to rest open no socket again."""
    tally.tick(Tick(generation, 0))
    tally.row(row(What.SYN, 5, parity=generation, seen=last(8, 1, 2)))
    tally.row(close(9, parity=generation))
    for tick in ticks:
        tally.tick(Tick(tick, 0))
        if tick == generation:
            tally.row(row(What.SYN, 6, parity=generation, seen=last(8, 1, 2)))
        assert only(table).queues is None
    assert only(table).syns == 6


@pytest.mark.parametrize("generation", [1, 2])
def test_close_heard_before_the_set_at_rest(
    table: ListenerTable, tally: Tally, generation: int
) -> None:
    """A close in the set in use holds against an older row that only the set at rest shows."""
    now = generation & 1
    sets = {
        now: (generation, close(1, parity=now)),
        1 - now: (generation - 1, row(What.SYN, 5, parity=1 - now, seen=last(99, 1, 2))),
    }
    for parity in (0, 1):
        tick, one = sets[parity]
        tally.tick(Tick(tick, 0))
        tally.row(one)
    assert only(table).queues is None
    assert only(table).syns == 5


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_address_used_again(first: list[int], second: list[int]) -> None:
    """A socket's address belongs to whom it was last seen with, in whatever order rows come."""
    rows = [
        row(What.SYN, 1, port=80, seen=last(1, 0, 1)),
        close(2, port=0),
        row(What.OBSERVED, 1, port=81, address="::1", seen=last(3, 0, 0)),
        row(What.SYN, 1, port=81, address="::1", seen=last(4, 0, 4)),
    ]
    table = ListenerTable()
    table.watch(SESSION, None)
    tally = Tally(table, SESSION)
    for order in (first, second):
        tally.tick(Tick(0, 0))
        for number in order:
            tally.row(rows[number])
        queues = {listener.identity.port: listener.sockets for listener in table}
        assert queues == {80: {}, 81: {1: Queues(0, 4, None, 10)}}


def test_address_used_again_without_a_close(table: ListenerTable, tally: Tally) -> None:
    """Another identity at a socket's address shows that the former one closed."""
    tally.row(row(What.SYN, 1, port=80, seen=last(1, 0, 1)))
    tally.row(row(What.SYN, 1, port=80, place="7", seen=last(2, 0, 2)))
    queues = {listener.identity.place: listener.queues for listener in table}
    assert queues == {"": None, "7": Queues(0, 2, None, 10)}


def test_closed_sockets_are_forgotten(table: ListenerTable, tally: Tally) -> None:
    """What is remembered of closed sockets does not grow with the generations, nor is it lost."""
    tally.row(row(What.SYN, 1, socket=1, seen=last(1, 0, 1)))
    numbers = count(2)
    for generation in range(20):
        for _ in range(2):
            tally.tick(Tick(generation, 0))
        for _ in range(50):
            tally.row(close(1, socket=next(numbers), parity=generation & 1))
        assert len(tally._sockets) <= 1 + 2 * 50
    assert only(table).sockets == {1: Queues(0, 1, None, 10)}
    tally.row(close(2, socket=1, parity=1))
    assert only(table).sockets == {}


def test_clear_queues(table: ListenerTable, tally: Tally) -> None:
    """When a session is down its queues are not known, and a next run's are, however it counts."""
    tally.tick(Tick(8, 0))
    tally.row(row(What.SYN, 5, seen=last(8, 1, 2)))
    table.clear_queues(SESSION)
    assert only(table).queues is None
    again = Tally(table, SESSION)
    again.ready(Ready(1, HOME))
    again.tick(Tick(0, 0))
    again.row(row(What.SYN, 5, seen=last(1, 1, 3)))
    assert only(table).queues == Queues(1, 3, None, 10)
    assert only(table).syns == 10


# Places


@pytest.fixture
def zones() -> ListenerTable:
    """Return a table whose one session runs a program of zones and watches every port."""
    table = ListenerTable()
    table.watch(SESSION, None, ZONES)
    return table


@pytest.fixture
def zone_tally(zones: ListenerTable) -> Tally:
    """Return a Tally of such a program that has had its ready row and the first heartbeat."""
    tally = Tally(zones, SESSION)
    tally.ready(Ready(1, GLOBAL_ZONE))
    tally.tick(Tick(0, 0))
    return tally


def places(table: ListenerTable) -> dict[str, int]:
    """Return the SYNs of each place."""
    return {listener.identity.place: listener.syns for listener in table}


def test_home_of_zones(zones: ListenerTable, zone_tally: Tally) -> None:
    """The ready row's zone is the global one by name, with no place row and whatever one says."""
    zone_tally.row(row(What.SYN, 2, place=GLOBAL_ZONE))
    zone_tally.place(Place(GLOBAL_ZONE, "other"))
    zone_tally.row(row(What.SYN, 3, place=GLOBAL_ZONE))
    assert places(zones) == {"global": 3}


def test_zone_whose_name_has_not_come(zones: ListenerTable, zone_tally: Tally) -> None:
    """Rows of a zone not named yet are left for the tick that has the name, and nothing is lost."""
    zone_tally.row(row(What.SYN, 2, 20, place="3", seen=last(1, 0, 1)))
    zone_tally.place(Place("4", "db"))
    zone_tally.tick(Tick(0, 1))
    zone_tally.row(row(What.SYN, 3, 30, place="3", seen=last(2, 0, 2)))
    assert len(zones) == 0
    zone_tally.place(Place("3", "web"))
    zone_tally.tick(Tick(0, 2))
    zone_tally.row(row(What.SYN, 7, 70, place="3", q0max=1034, seen=last(3, 1, 3)))
    zone_tally.row(row(What.SYN, 3, 30, place="3", seen=last(2, 0, 2)))
    listener = only(zones)
    assert listener.identity == Identity("", "web", "*", 80)
    assert (listener.syns, listener.q_sums) == (10, {10: 100})
    assert listener.queues == Queues(1, 3, 1034, 10)


def test_same_port_in_two_zones(zones: ListenerTable, zone_tally: Tally) -> None:
    """Zones' listeners of one address and port are told apart by the zones' names."""
    zone_tally.place(Place("3", "web"))
    zone_tally.place(Place("4", "db"))
    for number, place in enumerate((GLOBAL_ZONE, "3", "4"), 1):
        zone_tally.row(row(What.SYN, number, socket=number, place=place))
    assert places(zones) == {"global": 1, "web": 2, "db": 3}


def test_close_in_a_zone_whose_name_has_not_come(zones: ListenerTable, zone_tally: Tally) -> None:
    """A socket of a zone not named yet that closes stays closed once the name has come."""
    rows = [
        row(What.SYN, 5, place="3", seen=last(1, 0, 1)),
        row(What.CLOSED, 1, place="3", seen=last(2, 0x1FFFF, 0x1FFFF)),
    ]
    for tick in range(3):
        zone_tally.tick(Tick(0, tick))
        for one in rows:
            zone_tally.row(one)
        zone_tally.place(Place("3", "web"))
    assert only(zones).queues is None
    assert places(zones) == {"web": 5}


def test_names_are_each_runs_own(zones: ListenerTable, zone_tally: Tally) -> None:
    """A zone's number may be another zone's after a restart: names are heard anew."""
    zone_tally.place(Place("3", "web"))
    zone_tally.row(row(What.SYN, 1, place="3"))
    again = Tally(zones, SESSION)
    again.ready(Ready(1, GLOBAL_ZONE))
    again.tick(Tick(0, 0))
    again.row(row(What.SYN, 2, place="3"))
    assert places(zones) == {"web": 1}
    again.place(Place("3", "db"))
    again.row(row(What.SYN, 2, place="3"))
    assert places(zones) == {"web": 1, "db": 2}


def test_network_namespaces_need_no_names(table: ListenerTable, tally: Tally) -> None:
    """Where places have no names the number is the label, and the home's is empty."""
    tally.row(row(What.SYN, 1, place=HOME))
    tally.row(row(What.SYN, 2, place="7"))
    assert places(table) == {"": 1, "7": 2}


# The table


def test_configured_port_is_there_from_the_start(table: ListenerTable) -> None:
    """A configured port has a listener of all zeroes until one is seen, and its name after."""
    session = SessionId("", "port-22")
    table.watch(session, {22: "ssh"}, Exports())
    listener = only(table)
    assert (listener.identity, listener.syns) == (Identity("", "", "*", 22), 0)
    assert table.name(listener) == "ssh"
    seen = table.listener(session, "", "::1", 22)
    assert only(table) is seen
    assert (table.name(seen), len(table)) == ("ssh", 1)


def test_configured_port_is_at_home(table: ListenerTable) -> None:
    """A configured port not seen yet has the home's place, as soon as the program is known."""
    far = SessionId("sol10", "port-22")
    table.watch(far, {22: "ssh"})
    assert only(table).identity == Identity("sol10", "", "*", 22)
    table.watch(far, {22: "ssh"}, ZONES)
    assert only(table).identity == Identity("sol10", "global", "*", 22)
    assert (table.home(far), table.home(SESSION)) == ("global", "")
    table.listener(far, "web", "*", 22)
    assert only(table).identity == Identity("sol10", "web", "*", 22)


def test_ports_taken_out_of_the_configuration(table: ListenerTable) -> None:
    """A port no longer watched loses its listeners, the others keep theirs."""
    session = SessionId("", "shared")
    table.watch(session, {22: "", 80: ""}, Exports())
    table.listener(session, "", "*", 22).syns = 5
    table.listener(session, "", "*", 80).syns = 6
    table.watch(session, {80: "", 81: ""})
    assert {listener.identity.port: listener.syns for listener in table} == {80: 6, 81: 0}


def test_listener_goes_to_another_session(table: ListenerTable) -> None:
    """From one shared session to one for each port the counters go on."""
    table.listener(SESSION, "", "*", 22).syns = 5
    table.listener(SESSION, "", "*", 80).syns = 6
    table.watch(SessionId("", "port-22"), {22: "ssh"}, Exports())
    table.unwatch(SESSION)
    listener = only(table)
    assert (listener.syns, listener.session.name, table.name(listener)) == (5, "port-22", "ssh")


def test_listener_goes_to_the_session_of_all(table: ListenerTable) -> None:
    """From one session for each port to one for every listener the counters go on."""
    session = SessionId("", "port-22")
    table.watch(session, {22: "ssh"}, Exports())
    table.listener(session, "", "*", 22).syns = 5
    table.watch(SESSION, None)
    table.unwatch(session)
    assert [listener.syns for listener in table] == [5]


def test_there_and_back(table: ListenerTable) -> None:
    """From one session for each port to one for all and back the counters of the ports go on."""
    table.unwatch(SESSION)
    sessions = {port: SessionId("", f"port-{port}") for port in (22, 80)}
    for port, session in sessions.items():
        table.watch(session, {port: "name"}, Exports())
        table.listener(session, "", "*", port).syns = port
    table.watch(SESSION, None, Exports())
    for session in sessions.values():
        table.unwatch(session)
    assert {one.identity.port: one.syns for one in table} == {22: 22, 80: 80}
    table.listener(SESSION, "", "*", 9).syns = 9
    for one in table:
        one.syns += 1
    for port, session in sessions.items():
        table.watch(session, {port: "name"}, Exports())
    table.unwatch(SESSION)
    assert {one.identity.port: one.syns for one in table} == {22: 23, 80: 81}
    assert {one.session for one in table} == set(sessions.values())
    assert {table.name(one) for one in table} == {"name"}


def test_queues_of_the_session_before(table: ListenerTable, tally: Tally) -> None:
    """What a session observed that another one took over from does not outlive the socket."""
    tally.row(row(What.SYN, 1, port=22, seen=last(1, 0, 5)))
    session = SessionId("", "port-22")
    table.watch(session, {22: "ssh"}, Exports())
    # The former session ends after the change, as the service has it.
    table.clear_queues(SESSION)
    table.unwatch(SESSION)
    after = Tally(table, session)
    after.ready(Ready(1, HOME))
    after.tick(Tick(0, 0))
    after.row(close(1, port=22))
    assert only(table).queues is None


def test_hosts_are_apart(table: ListenerTable) -> None:
    """Another host's session of the same name and port is another matter."""
    far = SessionId("sol10", "all")
    table.watch(far, {22: "far"}, Exports(place_label="zone"))
    table.listener(SESSION, "", "*", 22).syns = 5
    assert [(one.identity.host, one.syns) for one in table] == [("", 5), ("sol10", 0)]
    table.unwatch(far)
    assert [one.identity.host for one in table] == [""]


def filled(max_closed: int, opened: int, closed: int) -> ListenerTable:
    """Return a table of some open listeners and some closed ones."""
    table = ListenerTable(max_closed=max_closed)
    table.watch(SESSION, None)
    for port in range(opened + closed):
        listener = table.listener(SESSION, "", "*", port)
        listener.syns = 1
        if port < opened:
            listener.sockets[port] = Queues(0, 0, None, 10)
    return table


@pytest.mark.parametrize("closed", [0, 1, 3, 4])
def test_few_closed_listeners_are_kept(closed: int) -> None:
    """However many listeners are open, closed ones are kept while they are not too many."""
    table = filled(10, 20, closed)
    for port in range(100, 105):
        table.listener(SESSION, "", "*", port).sockets[port] = Queues(0, 0, None, 10)
    kept = [one for one in table if one.queues is None and one.syns]
    assert len(kept) == closed


@pytest.mark.parametrize("opened", [0, 5, 40])
def test_too_many_closed_listeners_are_forgotten(opened: int) -> None:
    """Closed listeners do not pile up beyond the limit by half, and no open one is forgotten."""
    table = filled(10, opened, 5)
    for port in range(1000, 1050):
        table.listener(SESSION, "", "*", port)
        assert len([one for one in table if one.queues is not None]) == opened
        assert len(table) <= opened + 10 + 10 // 2 + 1
    assert 1049 in {one.identity.port for one in table}


def test_the_oldest_closed_listeners_are_forgotten() -> None:
    """Of the closed listeners those are kept that were new last."""
    table = filled(4, 0, 0)
    for port in range(30):
        table.listener(SESSION, "", "*", port)
    ports = [one.identity.port for one in table]
    assert ports == list(range(30 - len(ports), 30))


def test_forgotten_listener_stays_forgotten() -> None:
    """The rows of a closed listener that was forgotten do not bring it back with zeroes."""
    table = ListenerTable(max_closed=2)
    table.watch(SESSION, None)
    tally = Tally(table, SESSION)
    tally.ready(Ready(1, HOME))
    for tick in range(2):
        tally.tick(Tick(0, tick))
        for port in range(1, 10):
            tally.row(row(What.SYN, 1, socket=port, port=port, seen=last(1, 0, 0)))
            tally.row(close(2, socket=port))
    assert {listener.syns for listener in table} == {1}


def test_configured_listeners_are_never_forgotten() -> None:
    """A configured port keeps its counters, closed or not."""
    table = ListenerTable(max_closed=2)
    table.watch(SESSION, dict.fromkeys(range(10), ""))
    for port in range(10):
        table.listener(SESSION, "", "*", port).syns = 1
    assert sum(one.syns for one in table) == 10
