"""The newest observation of a socket counts, in whatever order the observations arrive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter.sockets import UNKNOWN, Acceptors, Queues, Sockets

Action = tuple[str, int, int, int]


@dataclass(eq=False)
class Owner:
    """A listener, as far as its sockets are concerned."""

    sockets: dict[int, Queues] = field(default_factory=dict)
    acceptors: dict[int, Acceptors] = field(default_factory=dict)
    closed: float | None = None

    @property
    def identity(self) -> int:
        """Return what distinguishes this listener from others."""
        return id(self)


def one() -> tuple[Sockets, Owner]:
    """Return sockets and a listener."""
    return Sockets(), Owner()


def test_a_listening_socket_has_gauges() -> None:
    """A listening socket has its newest observation, separately for each part, and Q0 no limit."""
    sockets, owner = one()
    sockets.listening(1, 10, owner)
    assert owner.sockets == {1: UNKNOWN}
    sockets.saw(1, 10, q0=1, q=2, qmax=8)
    sockets.saw(1, 12, q=5)
    sockets.saw(1, 11, q0=3, q=4)
    assert owner.sockets == {1: Queues(3, 5, None, 8)}


def test_limit_of_q0() -> None:
    """Q0's limit comes from the newest observation of Qmax, which may lack it."""
    sockets, owner = one()
    sockets.listening(1, 10, owner)
    sockets.saw(1, 10, q0=1, q=2, qmax=8, q0max=1032)
    sockets.saw(1, 11, q=3)
    assert owner.sockets == {1: Queues(1, 3, 1032, 8)}
    sockets.saw(1, 14, qmax=9, q0max=1033)
    sockets.saw(1, 13, qmax=7, q0max=1031)
    assert owner.sockets == {1: Queues(1, 3, 1033, 9)}
    sockets.saw(1, 15, qmax=9)
    assert owner.sockets == {1: Queues(1, 3, None, 9)}


def test_unsee() -> None:
    """Lengths become unknown and are shown once they are observed again; limits stay."""
    sockets, owner = one()
    sockets.listening(1, 10, owner)
    sockets.saw(1, 10, q0=1, q=2, qmax=8, q0max=1032)
    sockets.unsee(1)
    assert owner.sockets == {1: Queues(None, None, 1032, 8)}
    sockets.saw(1, 11, q=3)
    assert owner.sockets == {1: Queues(None, 3, 1032, 8)}


def test_unsee_of_nobody() -> None:
    """For a socket that is unlisted, unobserved or closed, unsee() adds no gauges."""
    sockets, owner = one()
    sockets.unsee(1)
    assert owner.sockets == {}
    sockets.listening(1, 10, owner)
    sockets.unsee(1)
    assert owner.sockets == {1: UNKNOWN}
    sockets.saw(1, 10, q=2)
    sockets.closed(1, 11)
    sockets.unsee(1)
    assert owner.sockets == {}


def test_of_two_at_once_the_later_told_counts() -> None:
    """If two observations have the same time, the one that arrives later counts."""
    sockets, owner = one()
    sockets.listening(1, 10, owner)
    sockets.saw(1, 10, q=2)
    sockets.saw(1, 10, q=3)
    assert owner.sockets[1].q == 3


def test_nobody_knows_whose_it_is() -> None:
    """Observations of a socket without a listener give no gauges."""
    sockets, owner = one()
    sockets.saw(1, 10, q=2)
    sockets.saw(1, 10, qmax=5)
    sockets.closed(1, 11)
    assert owner.sockets == {}


def test_closed() -> None:
    """A closed socket has no gauges, whatever older observations arrive."""
    sockets, owner = one()
    sockets.listening(1, 10, owner)
    sockets.saw(1, 10, q=2)
    sockets.closed(1, 20)
    assert owner.sockets == {}
    sockets.saw(1, 15, q=2)
    sockets.listening(1, 15, owner)
    sockets.saw(1, 25, q=2)
    sockets.saw(1, 25, qmax=9)
    assert owner.sockets == {}


def test_closed_is_told_first() -> None:
    """If the row of a close arrives before the socket's row, the socket has no gauges either."""
    sockets, owner = one()
    sockets.closed(1, 20)
    sockets.listening(1, 10, owner)
    sockets.saw(1, 10, q=2)
    assert owner.sockets == {}


def test_an_older_close_ends_nothing() -> None:
    """A socket that listens again after a close keeps its gauges, even if the close comes late."""
    sockets, owner = one()
    sockets.listening(1, 30, owner)
    sockets.saw(1, 30, q=2)
    sockets.closed(1, 20)
    assert owner.sockets == {1: Queues(None, 2, None, None)}


def test_listens_again() -> None:
    """A socket that listens again shows only observations from then on."""
    sockets, owner = one()
    sockets.listening(1, 10, owner)
    sockets.saw(1, 10, q0=1, q=2, qmax=8)
    sockets.closed(1, 20)
    sockets.listening(1, 30, owner)
    assert owner.sockets == {1: UNKNOWN}
    sockets.saw(1, 30, q=0)
    assert owner.sockets == {1: Queues(None, 0, None, None)}


def test_memory_is_used_again() -> None:
    """If another listener uses a socket's memory again, the first listener loses the socket."""
    sockets, first = one()
    second = Owner()
    sockets.listening(1, 10, first)
    sockets.saw(1, 10, q0=1, q=2, qmax=8)
    sockets.listening(1, 30, second)
    assert first.sockets == {}
    sockets.saw(1, 30, q=0)
    assert (first.sockets, second.sockets) == ({}, {1: Queues(None, 0, None, None)})


def test_memory_is_used_again_and_an_old_row_comes() -> None:
    """An old row of the listener that had a socket's memory before does not affect the next."""
    sockets, first = one()
    second = Owner()
    sockets.listening(1, 10, first)
    sockets.closed(1, 20)
    sockets.listening(1, 30, second)
    sockets.saw(1, 30, q=4)
    sockets.listening(1, 12, first)
    sockets.saw(1, 12, q=9)
    assert (first.sockets, second.sockets) == ({}, {1: Queues(None, 4, None, None)})


def test_memory_is_used_again_and_no_close_was_told() -> None:
    """An old row does not affect the next listener even if the row of the close is lost."""
    sockets, first = one()
    second = Owner()
    sockets.listening(1, 10, first)
    sockets.listening(1, 30, second)
    sockets.saw(1, 30, q=4)
    sockets.listening(1, 12, first)
    sockets.saw(1, 12, q=9)
    assert (first.sockets, second.sockets) == ({}, {1: Queues(None, 4, None, None)})


def test_limit() -> None:
    """An older limit does not replace a newer one."""
    sockets, owner = one()
    sockets.listening(1, 10, owner)
    sockets.saw(1, 10, q=2, qmax=8)
    sockets.saw(1, 12, qmax=9)
    sockets.saw(1, 11, qmax=7)
    assert owner.sockets == {1: Queues(None, 2, None, 9)}


def test_what_has_closed_is_forgotten() -> None:
    """However many sockets come and go, the closed ones that are remembered are limited."""
    sockets, owner = one()
    for number in range(3 * sockets.most):
        sockets.listening(number, 2 * number, owner)
        sockets.closed(number, 2 * number + 1)
    assert len(sockets._sockets) == len(sockets._closed) == sockets.most
    assert owner.sockets == {}


def test_open_sockets_are_not_forgotten() -> None:
    """Listening sockets stay, however many others close."""
    sockets, owner = one()
    sockets.listening(1, 1, owner)
    sockets.saw(1, 1, q=3)
    for number in range(2, sockets.most + 9):
        sockets.closed(number, number)
    sockets.saw(1, 2 * sockets.most, q=4)
    assert owner.sockets == {1: Queues(None, 4, None, None)}


def test_what_listen_asked_for() -> None:
    """The requested backlog is shown with the granted one, whichever of the rows comes first."""
    sockets, owner = one()
    sockets.listened(1, 11, 4096, 65535)
    sockets.listening(1, 10, owner)
    sockets.saw(1, 10, q=0, qmax=4096)
    assert owner.sockets == {1: Queues(None, 0, None, 4096, 65535)}
    sockets.listened(1, 20, 7, 7)
    assert owner.sockets == {1: Queues(None, 0, None, 7, 7)}
    sockets.listened(1, 15, 9, 9)
    sockets.saw(1, 30, q=3, qmax=7)
    assert owner.sockets == {1: Queues(None, 3, None, 7, 7)}


def test_a_listen_that_nobody_has_seen() -> None:
    """If a listen() in between was not seen, the requested backlog is unknown."""
    sockets, owner = one()
    sockets.listening(1, 10, owner)
    sockets.listened(1, 11, 4096, 65535)
    sockets.saw(1, 12, qmax=9)
    assert owner.sockets == {1: Queues(None, None, None, 9)}
    sockets.listened(1, 13, 8, None)
    assert owner.sockets == {1: Queues(None, None, None, 8)}


def test_a_listen_of_one_that_has_closed() -> None:
    """Memory that is used again has no backlog of the earlier socket, in any order of the rows."""
    for late in (False, True):
        sockets, owner = one()
        sockets.listening(1, 10, owner)
        if late:
            sockets.closed(1, 12)
        sockets.listened(1, 11, 8, 9)
        if not late:
            sockets.closed(1, 12)
        sockets.listening(1, 20, owner)
        sockets.saw(1, 20, qmax=8)
        assert owner.sockets == {1: Queues(None, None, None, 8)}


def test_listens_are_not_kept_for_ever() -> None:
    """Requested backlogs are remembered only for as many sockets as may be open."""
    sockets, owner = one()
    sockets.most = 10
    for socket in range(1, 30):
        sockets.listened(socket, socket, 8, 9)
    sockets.listening(19, 40, owner)
    sockets.listening(20, 40, owner)
    for socket in (19, 20):
        sockets.saw(socket, 40, qmax=8)
    assert [owner.sockets[socket].requested for socket in (19, 20)] == [None, 9]


MINUTE = 60_000_000_000
SSHD = "program", "sshd"
HTTPD = "program", "httpd"


def test_acceptors() -> None:
    """The acceptors of a socket belong to its listener, whichever row comes first."""
    sockets, owner = one()
    sockets.accepted(1, 5, *SSHD)
    assert owner.acceptors == {}
    sockets.listening(1, 6, owner)
    assert owner.acceptors == {1: {SSHD}}
    sockets.accepted(1, 4, *HTTPD)
    sockets.accepted(1, 7, "fmri", "svc:/x")
    assert owner.acceptors == {1: {SSHD, HTTPD, ("fmri", "svc:/x")}}
    sockets.forget(1)
    assert owner.acceptors == {}


def test_acceptors_of_one_that_has_closed() -> None:
    """Who accepted before a socket closed does not own the next socket in its memory."""
    sockets, owner = one()
    sockets.listening(1, 1, owner)
    sockets.accepted(1, 5, *SSHD)
    sockets.accepted(1, 9, *HTTPD)
    sockets.closed(1, 7)
    assert owner.acceptors == {}
    sockets.accepted(1, 6, *SSHD)
    sockets.listening(1, 8, owner)
    assert owner.acceptors == {1: {HTTPD}}


def test_acceptors_where_no_close_was_told() -> None:
    """Who accepted before another listener got the memory does not own it, without a close too."""
    sockets, owner = one()
    other = Owner()
    sockets.listening(1, 1, owner)
    sockets.accepted(1, 5, *SSHD)
    sockets.accepted(1, 9, *HTTPD)
    sockets.listening(1, 8, other)
    assert owner.acceptors == {}
    assert other.acceptors == {1: {HTTPD}}


def test_acceptors_of_long_ago() -> None:
    """An acceptor is forgotten after ten minutes, but only if others have accepted since."""
    sockets, owner = one()
    sockets.listening(1, 1, owner)
    sockets.accepted(1, 0, *SSHD)
    sockets.accepted(1, 0, "fmri", "svc:/x")
    sockets.accepted(1, 10 * MINUTE, *HTTPD)
    assert owner.acceptors == {1: {SSHD, HTTPD, ("fmri", "svc:/x")}}
    sockets.accepted(1, 10 * MINUTE + 1, *HTTPD)
    assert owner.acceptors == {1: {HTTPD, ("fmri", "svc:/x")}}
    sockets.accepted(1, 99 * MINUTE, *HTTPD)
    assert owner.acceptors == {1: {HTTPD, ("fmri", "svc:/x")}}


def test_acceptors_have_a_limit() -> None:
    """Only the last acceptors of a socket are known, and of a host twice as many as sockets."""
    sockets, owner = one()
    sockets.most = 3
    sockets.listening(1, 1, owner)
    for at in range(100):
        sockets.accepted(1, at, "program", f"p{at}")
    assert owner.acceptors == {1: {("program", f"p{at}") for at in range(84, 100)}}
    for socket in range(2, 11):
        sockets.accepted(socket, 5, *SSHD)
    assert owner.acceptors == {}
    later = Owner()
    for socket in (4, 5):
        sockets.listening(socket, 6, later)
    assert later.acceptors == {5: {SSHD}}
    sockets.forget(5)
    sockets.accepted(11, 5, *SSHD)
    sockets.listening(6, 6, later)
    assert later.acceptors == {6: {SSHD}}


def test_acceptors_of_a_host_that_has_started_anew() -> None:
    """After forget_closed(), when the clock may start at 0 again, old acceptors do not count."""
    sockets, owner = one()
    sockets.accepted(1, 99 * MINUTE, *SSHD)
    sockets.forget_closed()
    sockets.accepted(1, 5, *HTTPD)
    sockets.listening(1, 4, owner)
    assert owner.acceptors == {1: {HTTPD}}


def do(sockets: Sockets, owners: list[Owner], action: Action) -> None:
    """Apply one action; its last number is a queue's length or a backlog."""
    kind, socket, time, number = action
    does: dict[str, Callable[[], object]] = {
        "listening": lambda: sockets.listening(socket, time, owners[0]),
        "closed": lambda: sockets.closed(socket, time),
        "q0": lambda: sockets.saw(socket, time, q0=number),
        "q": lambda: sockets.saw(socket, time, q=number),
        "limit": lambda: sockets.saw(socket, time, qmax=number),
        "listen": lambda: sockets.listened(socket, time, number, 2 * number),
        "unsee": lambda: sockets.unsee(socket),
    }
    does[kind]()


def end(actions: list[Action]) -> dict[int, Queues]:
    """Return a listener's gauges after some actions."""
    sockets, owner = one()
    sockets.listening(1, 0, owner)
    sockets.saw(1, 0, q0=0, q=0, qmax=0)
    for action in actions:
        do(sockets, [owner], action)
    return owner.sockets


def at_times(times: list[int]) -> st.SearchStrategy[list[Action]]:
    """Return a strategy for actions on an open socket, each with a time of its own."""
    return st.tuples(
        *(
            st.tuples(
                st.sampled_from(["listening", "q0", "q", "limit", "listen"]),
                st.just(1),
                st.just(time),
                st.integers(0, 9),
            )
            for time in times
        )
    ).map(list)


times = st.lists(st.integers(1, 50), min_size=1, max_size=6, unique=True).flatmap(at_times)


@given(times, st.randoms())
def test_any_order_of_what_was_seen(actions: list[Action], random: object) -> None:
    """Rows of an open socket may come in any order, and the gauges in the end are the same."""
    newest = end(sorted(actions, key=lambda action: action[2]))
    random.shuffle(actions)  # type: ignore[attr-defined]
    assert end(actions) == newest


@given(times, st.integers(51, 60))
def test_any_order_before_a_close(actions: list[Action], closed: int) -> None:
    """Wherever the row of a close comes among older ones, the socket has no gauges in the end."""
    for at in range(len(actions) + 1):
        assert end([*actions[:at], ("closed", 1, closed, 0), *actions[at:]]) == {}


def test_any_order_of_a_close_and_a_listen() -> None:
    """The rows of a close and of a later listen and observation may come in nearly any order.

    An observation has no listener as long as the row of the listen has not come.
    """
    actions: list[Action] = [("closed", 1, 5, 0), ("listening", 1, 7, 0), ("q", 1, 7, 3)]
    for order in permutations(actions):
        if order.index(actions[1]) < order.index(actions[2]):
            assert end([*order])[1].q == 3


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["listening", "closed", "q0", "q", "limit", "listen", "unsee"]),
            st.integers(1, 3),
            st.integers(0, 30),
            st.integers(0, 9),
        ),
        max_size=40,
    )
)
def test_closed_stays_closed(actions: list[Action]) -> None:
    """A socket has gauges only if its newest listen is later than its newest close."""
    sockets, owner = one()
    for action in actions:
        do(sockets, [owner], action)
    for socket in owner.sockets:
        opened = max(time for kind, key, time, _ in actions if (kind, key) == ("listening", socket))
        closed = [time for kind, key, time, _ in actions if (kind, key) == ("closed", socket)]
        assert opened > max(closed, default=-1)
