"""Accounts compute Q0 and Q from reported lengths and counted changes, in any order of rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter.listeners import Identity, Listener, SessionId
from dtrace_exporter.sockets import Queues, Sockets
from dtrace_exporter.tracing.accounts import Accounts
from dtrace_exporter.tracing.rows import Listening

SESSION = SessionId("", "all")
SETTLED = 5
"""After so many ticks, the account settles a report that is not the newest."""
KEPT = 32
NOT_KNOWN: tuple[int | None, int | None] = (None, None)


class Books:
    """The accounts under test, and the sockets that they describe."""

    def __init__(self) -> None:
        self.sockets = Sockets()
        self.accounts = Accounts(self.sockets)
        self.listener = Listener(Identity("", "global", "*", 22), SESSION)
        self.other = Listener(Identity("", "global", "*", 80), SESSION)
        self.time = 1000
        self.counted = (True, True)

    def tell(
        self,
        number: int,
        q0: int = 0,
        q: int = 0,
        *,
        time: int | None = None,
        qmax: int = 8,
        q0max: int | None = None,
        socket: int = 1,
        listener: Listener | None = None,
    ) -> None:
        """Report a socket's queues under an ID, which is also the time unless the time is given."""
        listener = listener or self.listener
        time = number if time is None else time
        port = listener.identity.port
        record = Listening(
            number, socket, time, True, "global", 0, "*", port, q0, q, qmax, q0max, told=True
        )
        self.sockets.listening(socket, time, listener)
        self.accounts.tell(record, listener)

    def move(self, number: int, q0: int = 0, q: int = 0, socket: int = 1) -> None:
        """Report how many connections entered and left the queues under an ID."""
        self.accounts.move(socket, number, q0, q)

    def close(self, time: int, socket: int = 1) -> None:
        """Report that a socket had closed."""
        self.accounts.close(socket, time)
        self.sockets.closed(socket, time)

    def tick(self, times: int = 1) -> list[str]:
        """Run some heartbeats, and return the errors that they report."""
        wrong: list[str] = []
        for _ in range(times):
            self.time += 1
            wrong += filter(None, self.accounts.settle(self.time, *self.counted))
        return wrong

    @property
    def lengths(self) -> tuple[int | None, int | None] | None:
        """Return Q0 and Q as the gauges show them, or None if there are no gauges."""
        queues = self.listener.queues
        return queues and (queues.q0, queues.q)


@pytest.fixture
def books() -> Books:
    """Return accounts without an entry."""
    return Books()


# Reports, and changes since


def test_told_and_moved(books: Books) -> None:
    """A queue is the reported length plus what has entered since, minus what has left."""
    books.tell(1, q0=1, q=2)
    assert books.lengths is None
    books.tick()
    assert books.lengths == (1, 2)
    books.move(1, q0=3)
    books.move(1, q0=-2, q=2)
    books.move(1, q=-1)
    assert books.lengths == (1, 2)
    books.tick()
    assert books.lengths == (2, 3)


def test_limits_are_the_newest(books: Books) -> None:
    """The limits are those of the newest report, in whatever order the reports come."""
    books.tell(2, qmax=9, q0max=1033)
    books.tell(1, qmax=8, q0max=1032)
    books.tick()
    assert books.listener.queues == Queues(0, 0, 1033, 9)


def test_a_telling_adds_nothing(books: Books) -> None:
    """A report that agrees with the account changes nothing, not even when it settles."""
    books.tell(1, q=1)
    books.move(1, q=2)
    for number in range(2, 9):
        books.tell(number, q=number + 1)
        books.move(number, q=1)
        books.tick()
        assert books.lengths == (0, number + 2)
    books.tick(SETTLED)
    assert books.lengths == (0, 10)


@given(
    st.lists(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), max_size=4), min_size=1),
    st.randoms(),
)
def test_tellings_in_any_order(steps: list[list[tuple[int, int]]], random: object) -> None:
    """Reports may come in any order, each with its changes: the final lengths are the same."""
    q0 = q = 100
    entries = []
    for number, moves in enumerate(steps, 1):
        entries.append((number, q0, q, moves))
        q0, q = q0 + sum(move[0] for move in moves), q + sum(move[1] for move in moves)
    random.shuffle(entries)  # type: ignore[attr-defined]
    books = Books()
    for number, told_q0, told_q, moves in entries:
        books.tell(number, told_q0, told_q)
        for move in moves:
            books.move(number, *move)
    for _ in range(2):
        assert books.tick(SETTLED) == []
        assert books.lengths == (q0, q)


def test_what_nobody_has_told(books: Books) -> None:
    """Changes of a socket before its first report, or under an unknown ID, are ignored."""
    books.move(1, q=5)
    books.tell(1, q=1)
    books.move(7, q=5)
    books.move(1, q=5, socket=2)
    books.tick()
    assert books.lengths == (0, 1)


def test_each_socket_has_its_own(books: Books) -> None:
    """Each socket of a listener has its own queue lengths."""
    books.tell(1, q=1)
    books.tell(2, q=2, socket=2)
    books.move(2, q=3, socket=2)
    books.tick()
    assert {socket: queues.q for socket, queues in books.listener.sockets.items()} == {1: 1, 2: 5}


# Reports that disagree with the account


def test_a_telling_that_is_one_off(books: Books) -> None:
    """One report that is off, because another CPU was ahead or behind, moves no gauge."""
    books.tell(1)
    books.move(1, q=5)
    books.tell(2, q=4)
    for _ in range(2 * SETTLED):
        books.tick()
        assert books.lengths == (0, 5)
    books.tell(3, q=5)
    books.tick(SETTLED)
    assert books.lengths == (0, 5)


def test_two_that_say_the_same(books: Books) -> None:
    """If two reports in a row are off by the same amount, the account is corrected."""
    books.tell(1)
    books.move(1, q0=2, q=5)
    books.tell(2, q0=2, q=4)
    books.move(2, q=1)
    books.tell(3, q0=2, q=5)
    books.tick(SETTLED)
    assert books.lengths == (2, 5)
    books.move(3, q=-5)
    books.tick()
    assert books.lengths == (2, 0)


@pytest.mark.parametrize("second", [6, 3, 5])
def test_two_that_do_not(books: Books, second: int) -> None:
    """If the next report is off by another amount, or agrees, the account stays as it is."""
    books.tell(1)
    books.move(1, q=5)
    books.tell(2, q=4)
    books.tell(3, q=second)
    books.tick(SETTLED)
    assert books.lengths == (0, 5)


def test_off_long_ago(books: Books) -> None:
    """Two reports that are off do not count as consecutive if one between them agreed."""
    books.tell(1)
    books.move(1, q=5)
    for number, q in ((2, 4), (3, 5), (4, 4), (5, 5)):
        books.tell(number, q=q)
        books.tick(SETTLED)
        assert books.lengths == (0, 5)


# Rows that come late


def test_rows_of_old_numbers(books: Books) -> None:
    """A change under an old ID still counts after the report of that ID has settled."""
    books.tell(1)
    books.tell(2, q=1)
    books.tick(SETTLED)
    books.move(1, q=1)
    books.tick()
    assert books.lengths == (0, 1)


def test_rows_of_numbers_long_past(books: Books) -> None:
    """IDs long past are forgotten, and changes that still come under them are ignored."""
    for number in range(1, KEPT + 4):
        books.tell(number)
        books.tick(SETTLED)
    books.move(1, q=1)
    books.move(2, q=1)
    books.tick()
    assert books.lengths == (0, 0)
    books.move(3, q=1)
    books.tick()
    assert books.lengths == (0, 1)


# Closed sockets, and memory that is used again


def test_close(books: Books) -> None:
    """A closed socket has no account: later rows about the time before the close are lost."""
    books.tell(1, q=1)
    books.tick()
    books.close(5)
    assert books.lengths is None
    books.tell(4, q=2)
    books.move(1, q=1)
    books.move(4, q=1)
    books.tick(SETTLED)
    assert books.lengths is None


def test_listens_again(books: Books) -> None:
    """A socket that listens again starts from its new report, without its former changes."""
    books.tell(1, q=1)
    books.close(5)
    books.tell(6, q=3)
    books.move(1, q=1)
    books.move(6, q=1)
    books.tick()
    assert books.lengths == (0, 4)


def test_the_close_is_told_late(books: Books) -> None:
    """If a close is reported after the socket listens again, only the new life counts."""
    books.tell(1, q=1)
    books.move(1, q=9)
    books.tell(6, q=3)
    books.move(6, q=1)
    books.close(5)
    books.move(1, q=1)
    books.tick(SETTLED)
    assert books.lengths == (0, 4)


def test_the_close_is_told_first(books: Books) -> None:
    """If a close is reported first, an older report that comes later is ignored."""
    books.close(5)
    books.tell(1, q=1)
    books.tell(6, q=3)
    books.tick()
    assert books.lengths == (0, 3)


def test_an_older_close(books: Books) -> None:
    """Of two closes the later one counts, in whatever order they are reported."""
    for time in (5, 3):
        books.close(time)
    books.tell(4, q=1)
    books.tick()
    assert books.lengths is None


def test_memory_is_used_again(books: Books) -> None:
    """A new listener in the same memory has its own account, even if no close was reported."""
    books.tell(1, q=1)
    books.tick()
    books.tell(6, q=3, listener=books.other)
    books.tell(2, q=7)
    books.move(1, q=1)
    books.move(2, q=1)
    books.move(6, q=1)
    books.tick()
    assert books.lengths is None
    assert books.other.queues == Queues(0, 4, None, 8)


def test_what_has_closed_is_forgotten(books: Books) -> None:
    """However many sockets come and go, the accounts soon forget the closed ones."""
    for number in range(1, 200):
        books.tell(number, socket=number)
        books.close(number, socket=number)
        books.tick()
    assert len(books.accounts._closed) < 40
    assert not books.accounts.held
    books.tick()
    assert not books.accounts._touched


# Unknown lengths


def test_loss(books: Books) -> None:
    """After rows were lost, every queue is unknown until a newer report of it comes."""
    books.tell(1, q=1)
    books.tell(2, q=2, socket=2)
    books.tick()
    books.accounts.lose()
    assert {*books.listener.sockets.values()} == {Queues(None, None, None, 8)}
    books.move(1, q=1)
    books.tick()
    assert books.lengths == NOT_KNOWN
    books.tell(3, q=9, time=books.time)
    books.tick(2)
    assert books.lengths == NOT_KNOWN
    books.tell(4, q=4, time=books.time + 1)
    books.move(4, q=1)
    books.tick()
    assert books.listener.sockets == {
        1: Queues(0, 5, None, 8),
        2: Queues(None, None, None, 8),
    }


def test_loss_and_an_old_telling(books: Books) -> None:
    """A report from before the loss does not make a queue known again."""
    books.tell(2, q=1)
    books.accounts.lose()
    books.tell(1, q=5)
    books.tick(2)
    assert books.lengths is None
    books.tell(3, q=4, time=books.time + 1)
    books.tick()
    assert books.lengths == (0, 4)


def test_below_zero_for_a_while(books: Books) -> None:
    """CPUs are read in turn, so a queue may be below zero for two ticks without an error."""
    books.tell(1, q=1)
    books.tick()
    books.move(1, q=-3)
    assert books.tick(2) == []
    assert books.lengths == (0, 1)
    books.move(1, q=4)
    assert books.tick() == []
    assert books.lengths == (0, 2)
    books.move(1, q=-3)
    assert books.tick(2) == []


@pytest.mark.parametrize(("q0", "q"), [(-2, 0), (0, -2)])
def test_below_zero_for_three_ticks(books: Books, q0: int, q: int) -> None:
    """A queue below zero for three ticks is reported once, and is unknown until the next report."""
    books.tell(1, q0=1, q=1)
    books.tick()
    books.move(1, q0=q0, q=q)
    assert books.tick(10) == [f"the queues of * port 22 come to {1 + q0} and {1 + q}"]
    assert books.lengths == NOT_KNOWN
    books.move(1, q0=9, q=9)
    assert books.tick(10) == []
    assert books.lengths == NOT_KNOWN
    books.tell(2, q0=1, q=1)
    books.move(2, q=1)
    books.tick()
    assert books.lengths == (1, 2)


@pytest.mark.parametrize(
    ("counted", "lengths"),
    [((True, True), (3, 4)), ((False, True), (5, 4)), ((False, False), (5, 6))],
)
def test_parts_missing(books: Books, counted: tuple[bool, bool], lengths: tuple[int, int]) -> None:
    """If not all changes of a queue are counted, its length is the one last reported."""
    books.counted = counted
    books.tell(1, q0=1, q=1)
    books.tell(2, q0=5, q=6)
    books.move(1, q0=2)
    books.move(2, q=3)
    assert books.tick() == []
    assert books.lengths == lengths


def test_parts_missing_and_below_zero(books: Books) -> None:
    """If not all changes of a queue are counted, a negative balance is not an error."""
    books.counted = (False, False)
    books.tell(1, q0=1, q=1)
    books.move(1, q0=-9, q=-9)
    assert books.tick(10) == []
    assert books.lengths == (1, 1)


# Arbitrary steps


steps = st.lists(
    st.one_of(
        st.tuples(st.just("tell"), st.integers(1, 9), st.integers(0, 4), st.integers(1, 2)),
        st.tuples(st.just("move"), st.integers(1, 9), st.integers(-4, 4), st.integers(1, 2)),
        st.tuples(st.just("close"), st.integers(1, 9), st.just(0), st.integers(1, 2)),
        st.tuples(st.sampled_from(["tick", "lose"]), st.just(0), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@given(steps)
def test_hostile_steps(several: list[tuple[str, int, int, int]]) -> None:
    """No queue is ever shown below zero, whatever rows come in whatever order."""
    books = Books()
    for kind, number, value, socket in several:
        do: dict[str, Callable[[], object]] = {
            "tell": lambda: books.tell(number, q0=value, q=value, socket=socket),  # noqa: B023
            "move": lambda: books.move(number, q0=value, q=-value, socket=socket),  # noqa: B023
            "close": lambda: books.close(number, socket=socket),  # noqa: B023
            "tick": books.tick,
            "lose": books.accounts.lose,
        }
        do[kind]()
        for queues in books.listener.sockets.values():
            assert (queues.q0 or 0) >= 0
            assert (queues.q or 0) >= 0
