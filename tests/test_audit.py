"""The audit reports once what the kernel counted and the listeners' counters lack."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import own_namespace
from dtrace_exporter import kernel_totals
from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.kernel_totals import KINDS
from dtrace_exporter.listeners import Identity
from dtrace_exporter.tracing.audit import Audit, DropAudit, TotalAudits
from dtrace_exporter.turns import by_turns

SNMP = """Ip: Forwarding DefaultTTL
Ip: 1 64
Tcp: RtoAlgorithm MaxConn PassiveOpens CurrEstab
Tcp: 1 -1 70 3
"""
NETSTAT = """TcpExt: SyncookiesSent ListenOverflows ListenDrops
TcpExt: 0 4 9
IpExt: InNoRoutes
IpExt: 0
"""


def looks(one: Audit, *pairs: tuple[int, int]) -> list[int | None]:
    """Return what the audit reports for each pair of a kernel's total and the counters' total."""
    return [one.look(kernel, ours) for kernel, ours in pairs]


def calm(one: Audit, kernel: int, ours: int) -> int | None:
    """Look until the totals have been stable for some time, and return the sum of the reports."""
    told = looks(one, *[(kernel, ours)] * 6)
    found = [more for more in told if more is not None]
    return sum(found) if found else None


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return made-up files with the kernel's totals."""
    made = tmp_path / "snmp", tmp_path / "netstat"
    for name, file, text in zip(("SNMP", "NETSTAT"), made, (SNMP, NETSTAT), strict=True):
        file.write_text(text, encoding="ascii")
        monkeypatch.setattr(kernel_totals, name, file)
    return made


@pytest.mark.usefixtures("files")
def test_totals() -> None:
    """The kernel's totals are found by name, wherever they are in the line."""
    assert kernel_totals.read() == {"drops": 9, "established": 70}
    assert kernel_totals.dropped() == 9


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' /proc")
def test_totals_of_this_kernel() -> None:
    """A real kernel has all the totals."""
    found = kernel_totals.read()
    assert found.keys() == KINDS.keys()
    assert all(value >= 0 for value in found.values())


def test_totals_that_there_are_not(files: tuple[Path, Path]) -> None:
    """Missing files of totals raise OSError."""
    files[0].unlink()
    with pytest.raises(OSError):  # noqa: PT011
        kernel_totals.read()


@pytest.mark.parametrize(
    "text", ["", "Tcp: A B\n", "Tcp: A B\nTcp: 1\n", "Tcp: A\nTcp: x\n", "Tcp: A\nTcp: 1\n"]
)
def test_totals_that_are_none(files: tuple[Path, Path], text: str) -> None:
    """Totals in a format that no known kernel writes raise OSError, too."""
    files[0].write_text(text, encoding="ascii")
    with pytest.raises(OSError):  # noqa: PT011
        kernel_totals.read()


def test_what_lies_before_is_not_missing() -> None:
    """The audit ignores what the kernel counted before the session, and reports nothing early."""
    one = Audit()
    assert looks(one, (100, 0), (100, 0)) == [None, None]
    assert calm(one, 100, 0) == 0
    assert calm(one, 105, 5) == 0


def test_what_is_missing_is_told_once() -> None:
    """The audit reports what the counters lack once, after some time without changes."""
    one = Audit()
    assert calm(one, 100, 0) == 0
    assert looks(one, (103, 1)) == [0]
    assert calm(one, 103, 1) == 2
    assert calm(one, 103, 1) == 0
    assert calm(one, 110, 5) == 3


def test_what_comes_late_is_not_missing() -> None:
    """Counters that lag behind during traffic are not reported as missing."""
    one = Audit()
    assert calm(one, 100, 0) == 0
    assert looks(one, *((100 + n, n - 3) for n in range(4, 60))) == [0] * 56
    assert calm(one, 160, 60) == 0


def test_never_calm() -> None:
    """If something changes at each look, the audit reports nothing."""
    assert looks(Audit(), *((n, n) for n in range(50))) == [None] * 50


def test_counters_that_are_ahead() -> None:
    """If the counters are ahead, as with those of other places, the audit reports 0."""
    one = Audit()
    assert calm(one, 100, 0) == 0
    assert calm(one, 100, 4) == 0


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=30))
def test_in_the_end_it_is_the_difference(steps: list[tuple[int, int]]) -> None:
    """The audit never reports more than is missing, and in the end all of it."""
    one = Audit()
    assert calm(one, 1000, 7) == 0
    kernel, ours, told, most = 1000, 7, 0, 0
    for counted, lost in steps:
        kernel, ours = kernel + counted + lost, ours + counted
        most = most + lost
        more = one.look(kernel, ours)
        assert more is not None
        told += more
        assert 0 <= told <= most
    told += calm(one, kernel, ours) or 0
    assert told == most


def test_each_kind_by_itself() -> None:
    """Kinds are audited separately: one that changes at each look does not hold up another."""
    both = TotalAudits()
    for n in range(6):
        found = both.look({"drops": 5, "established": n}, {"drops": 0, "established": n})
    assert found == {"drops": 0}
    for n in range(6):
        found = both.look({"drops": 7, "established": n}, {"drops": 0, "established": n})
        if n == 3:
            assert found == {"drops": 2}
    assert found == {"drops": 0}


# Listener by listener

SSH = Identity("", "", "*", 22)
WEB = Identity("", "", "*", 80)


def sockets(identity: Identity, **drops: int | None) -> dict[Identity, list[ListeningSocket]]:
    """Return the kernel's answer about a listener: what each of its sockets has dropped."""
    return {
        identity: [
            ListeningSocket(identity.address, identity.port, 0, 8, dropped, ord(name))
            for name, dropped in drops.items()
        ]
    }


class Told:
    """What a session that watches some listeners reports about missing drops.

    Args:
        watched: these listeners.
        most: as for DropAudit.
    """

    def __init__(self, *watched: Identity, most: int = 10) -> None:
        self._audit = DropAudit(most)
        self._watched = watched

    def look(
        self,
        kernel: dict[Identity, list[ListeningSocket]],
        dropped: int,
        ours: dict[Identity, int] | None = None,
    ) -> int | None:
        """Look once, without giving other tasks their turn."""
        looking = self._audit.look(kernel, self._watched, dropped, ours or {})
        return asyncio.run(by_turns(looking))

    def __call__(
        self,
        kernel: dict[Identity, list[ListeningSocket]],
        dropped: int,
        ours: dict[Identity, int] | None = None,
    ) -> int | None:
        """Look until the totals have been stable for some time, and return the sum of reports."""
        found = [self.look(kernel, dropped, ours) for _ in range(6)]
        certain = [more for more in found if more is not None]
        return sum(certain) if certain else None


def test_drops_before_the_session() -> None:
    """Drops from before the session are not missing; later ones are, if not counted."""
    told = Told(SSH)
    assert told(sockets(SSH, a=100), 100, {SSH: 0}) == 0
    assert told(sockets(SSH, a=104), 104, {SSH: 1}) == 3


def test_drops_of_a_new_socket() -> None:
    """Of a socket that is newer than the session, all drops have to be counted."""
    told = Told(SSH)
    assert told({}, 40) == 0
    assert told(sockets(SSH, a=5), 45, {SSH: 3}) == 2


def test_drops_of_a_socket_beside_an_old_one() -> None:
    """A new socket beside an old one of the same listener had no drops before it was seen."""
    told = Told(SSH)
    assert told(sockets(SSH, a=100), 100, {SSH: 0}) == 0
    assert told(sockets(SSH, a=100, b=7), 107, {SSH: 7}) == 0
    assert told(sockets(SSH, a=101, b=9), 110, {SSH: 8}) == 2


def test_what_is_discarded_is_no_drop() -> None:
    """What a socket discards, but the kernel does not count as a drop, is not missing."""
    told = Told(SSH)
    assert told(sockets(SSH, a=10), 4) == 0
    assert told(sockets(SSH, a=500), 4) == 0
    assert told(sockets(SSH, a=507), 11, {SSH: 7}) == 0
    assert told(sockets(SSH, a=907), 16, {SSH: 9}) == 3


def test_what_others_discard() -> None:
    """While others discard packets, the audit reports only drops that cannot be theirs."""
    told = Told(SSH)
    assert told({**sockets(SSH, a=0), **sockets(WEB, b=0)}, 0) == 0
    assert told({**sockets(SSH, a=5), **sockets(WEB, b=2)}, 5) == 3
    assert told({**sockets(SSH, a=10), **sockets(WEB, b=9)}, 10) == 0
    assert told({**sockets(SSH, a=15), **sockets(WEB, b=9)}, 15) == 5


def test_what_others_drop() -> None:
    """Drops of a listener that the session does not watch are not missing."""
    told = Told(SSH)
    assert told({**sockets(SSH, a=0), **sockets(WEB, b=0)}, 0) == 0
    assert told({**sockets(SSH, a=0), **sockets(WEB, b=30)}, 30) == 0
    assert told({**sockets(SSH, a=2), **sockets(WEB, b=60)}, 60) == 0
    # Drops and discards at the same time: the discards are what exceeds ListenDrops.
    assert told({**sockets(SSH, a=9), **sockets(WEB, b=90)}, 95) == 5


def test_what_closes() -> None:
    """A socket's last drops are unknown when it closes, so the audit waits for stable totals."""
    told = Told(SSH)
    assert told({**sockets(SSH, a=0), **sockets(WEB, b=3)}, 3) == 0
    # The closed socket may have dropped some of these 7.
    assert told.look(sockets(SSH, a=7), 10) is None
    assert told(sockets(SSH, a=7), 10) == 0
    assert told(sockets(SSH, a=9), 12) == 2
    assert told.look({}, 15) is None


def test_more_sockets_than_may_be() -> None:
    """Of very many sockets nothing is told, not even of those that were there before."""
    told = Told(SSH, most=2)
    assert told(sockets(SSH, a=100, b=0), 100, {SSH: 100}) == 0
    assert told(sockets(SSH, a=100, b=0, c=0), 100, {SSH: 100}) is None
    assert told.look(sockets(SSH, a=100, b=7), 107, {SSH: 100}) is None
    assert told(sockets(SSH, a=100, b=7), 107, {SSH: 100}) == 0


def test_listener_that_is_forgotten() -> None:
    """A listener that was forgotten and added again counts from 0: nothing is missing."""
    told = Told(SSH)
    assert told({}, 50, {SSH: 50}) == 0
    assert told.look({}, 50) is None
    assert told(sockets(SSH, a=4), 54, {SSH: 4}) == 0


def test_drops_of_a_socket_that_an_answer_lacked() -> None:
    """A socket that is absent from one of the kernel's answers is not new in the next."""
    told = Told(SSH)
    assert told(sockets(SSH, a=100, b=7), 107) == 0
    assert told(sockets(SSH, a=100), 107) == 0
    assert told(sockets(SSH, a=100, b=7), 107) == 0


def test_drops_that_go_on() -> None:
    """While any connections are dropped, the audit reports nothing: the counters may lag behind."""
    told = Told(SSH)
    assert told({**sockets(SSH, a=0), **sockets(WEB, b=0)}, 0) == 0
    for n in range(1, 30):
        kernel = {**sockets(SSH, a=5), **sockets(WEB, b=n)}
        assert told.look(kernel, 5 + n, {SSH: 3}) == 0
    assert told(kernel, 5 + n, {SSH: 3}) == 2


def test_drops_that_the_kernel_does_not_tell() -> None:
    """On a kernel too old to count a socket's drops, the audit reports nothing."""
    assert Told(SSH)(sockets(SSH, a=None), 0) is None


def test_drops_one_listener_does_not_hide_another() -> None:
    """A listener whose counters are ahead does not make up for one whose counters lack some."""
    told = Told(SSH, WEB)
    assert told({**sockets(SSH, a=10), **sockets(WEB, b=10)}, 20) == 0
    assert told({**sockets(SSH, a=12), **sockets(WEB, b=10)}, 22, {WEB: 5}) == 2


def test_drops_that_go_round() -> None:
    """The kernel's count of a socket starts at 0 again after 32 bits."""
    told = Told(SSH)
    assert told(sockets(SSH, a=(1 << 32) - 2), 70) == 0
    assert told(sockets(SSH, a=3), 75, {SSH: 4}) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
        max_size=20,
    ),
    st.sets(st.integers(0, 19)),
)
def test_never_more_than_is_missing(
    steps: list[tuple[str, int, int, int]], looks: set[int]
) -> None:
    """The audit never reports more than is missing, whatever sockets do, whenever it looks."""
    told = Told(SSH)
    discards, dropped, counted, missing, found = dict.fromkeys("abc", 0), 0, 0, 0, 0

    def tell() -> int:
        kernel = sockets(SSH, a=discards["a"]) | sockets(WEB, b=discards["b"], c=discards["c"])
        return told(kernel, dropped, {SSH: counted}) or 0

    assert tell() == 0
    for step, (name, seen, lost, discarded) in enumerate(steps):
        discards[name] += seen + lost + discarded
        dropped += seen + lost
        if name == "a":
            counted, missing = counted + seen, missing + lost
        if step in looks:
            found += tell()
            assert found <= missing
    found += tell()
    assert found <= missing
    if all(name == "a" for name, *_ in steps):
        assert found == missing


_DEFERRED = """
import socket
from collections import defaultdict
from lab.waiting import until
from dtrace_exporter import inet_diag, kernel_totals
from dtrace_exporter.listeners import Identity
from dtrace_exporter.tracing.audit import DropAudit

def listening():
    found = defaultdict(list)
    for one in inet_diag.listeners():
        found[Identity("", "", one.address, one.port)].append(one)
    return found

def discarded(listener):
    port = listener.getsockname()[1]
    return sum(one.drops for one in inet_diag.listeners() if one.port == port)

def defer(count):
    for _ in range(count):
        with socket.create_connection(deferring.getsockname()) as client:
            client.sendall(b"x")
            deferring.accept()[0].close()

def overrun(clients):
    knocking = [socket.socket() for _ in range(clients)]
    for each in knocking:
        each.setblocking(False)
        each.connect_ex(full.getsockname())
    until(lambda: discarded(full) >= clients - 1, "all but the one in Q are dropped")
    for each in knocking:
        each.close()

def show():
    found = listening()
    for _ in range(6):
        dropped = kernel_totals.read()["drops"]
        looking = audit.look(found, found.keys(), dropped, {})
        try:
            while True:
                next(looking)
        except StopIteration as end:
            missing.append(end.value or 0)
    print(sum(missing), dropped, discarded(deferring), discarded(full))

audit, missing = DropAudit(), []
deferring, full = (socket.create_server(("127.0.0.1", 0), backlog=n) for n in (8, 0))
deferring.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 60)
show()
defer(5)
show()
overrun(5)
defer(3)
show()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' sock_diag")
def test_connections_that_are_deferred() -> None:
    """Deferred connections of a real kernel are not missing; uncounted drops beside them are."""
    none, deferred, beside = own_namespace.output(_DEFERRED).splitlines()
    assert (none, deferred) == ("0 0 0 0", "0 0 5 0")
    missing, dropped, discarded, of_full = map(int, beside.split())
    assert missing == dropped == of_full >= 4
    assert discarded == 8


def test_small_steps() -> None:
    """However many listeners there are, a look gives other tasks their turn between them."""
    kernel = {
        Identity("", "", "*", port): [ListeningSocket("*", port, 0, 8, 0, port)]
        for port in range(500)
    }
    assert sum(1 for _ in DropAudit().look(kernel, (), 0, {})) >= 500
