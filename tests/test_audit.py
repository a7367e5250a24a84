"""What the kernel has counted and the listeners' counters have not is told, once."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.listeners import Identity
from dtrace_exporter.tracing import audit
from dtrace_exporter.tracing.audit import KINDS, Audit, DropAudits, TotalAudits, totals
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
    """Return what looks at a kernel's total and at that of the counters tell."""
    return [one.look(kernel, ours) for kernel, ours in pairs]


def calm(one: Audit, kernel: int, ours: int) -> int | None:
    """Look until nothing has changed for some time, and return what that tells in all."""
    told = looks(one, *[(kernel, ours)] * 6)
    found = [more for more in told if more is not None]
    return sum(found) if found else None


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return the files with the kernel's totals, made up."""
    made = tmp_path / "snmp", tmp_path / "netstat"
    for file, text in zip(made, (SNMP, NETSTAT), strict=True):
        file.write_text(text, encoding="ascii")
    monkeypatch.setattr(audit, "_FILES", made)
    return made


@pytest.mark.usefixtures("files")
def test_totals() -> None:
    """Each kind is the kernel's counter of that name, wherever in its line it is."""
    assert totals() == {"drops": 9, "established": 70}


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' /proc")
def test_totals_of_this_kernel() -> None:
    """A real kernel has all of them."""
    found = totals()
    assert found.keys() == KINDS.keys()
    assert all(value >= 0 for value in found.values())


def test_totals_that_there_are_not(files: tuple[Path, Path]) -> None:
    """Where there are no totals that is an OSError."""
    files[0].unlink()
    with pytest.raises(OSError):  # noqa: PT011
        totals()


@pytest.mark.parametrize(
    "text", ["", "Tcp: A B\n", "Tcp: A B\nTcp: 1\n", "Tcp: A\nTcp: x\n", "Tcp: A\nTcp: 1\n"]
)
def test_totals_that_are_none(files: tuple[Path, Path], text: str) -> None:
    """Where they are written as no kernel that is known here does, that is an OSError too."""
    files[0].write_text(text, encoding="ascii")
    with pytest.raises(OSError):  # noqa: PT011
        totals()


def test_what_lies_before_is_not_missing() -> None:
    """What the kernel had counted before the session is no loss, and nothing is told too soon."""
    one = Audit()
    assert looks(one, (100, 0), (100, 0)) == [None, None]
    assert calm(one, 100, 0) == 0
    assert calm(one, 105, 5) == 0


def test_what_is_missing_is_told_once() -> None:
    """What the counters lack is told when nothing has changed for some time, and not again."""
    one = Audit()
    assert calm(one, 100, 0) == 0
    assert looks(one, (103, 1)) == [0]
    assert calm(one, 103, 1) == 2
    assert calm(one, 103, 1) == 0
    assert calm(one, 110, 5) == 3


def test_what_comes_late_is_not_missing() -> None:
    """The counters may be behind while there is traffic: nobody is told of that."""
    one = Audit()
    assert calm(one, 100, 0) == 0
    assert looks(one, *((100 + n, n - 3) for n in range(4, 60))) == [0] * 56
    assert calm(one, 160, 60) == 0


def test_never_calm() -> None:
    """Where something changes at each look, nothing can be told."""
    assert looks(Audit(), *((n, n) for n in range(50))) == [None] * 50


def test_counters_that_are_ahead() -> None:
    """Where the counters have more, as of other places, nothing is missing and nothing taken."""
    one = Audit()
    assert calm(one, 100, 0) == 0
    assert calm(one, 100, 4) == 0


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=30))
def test_in_the_end_it_is_the_difference(steps: list[tuple[int, int]]) -> None:
    """However it comes about, in the end all that is missing has been told, and never more."""
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
    """Kinds are looked at apart: one that is never calm does not keep another from being told."""
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
    """Return what the kernel tells of a listener: what each of its sockets has dropped."""
    return {
        identity: [
            ListeningSocket(identity.address, identity.port, 0, 8, dropped, ord(name))
            for name, dropped in drops.items()
        ]
    }


def looked(
    one: DropAudits, kernel: dict[Identity, list[ListeningSocket]], ours: dict[Identity, int]
) -> int | None:
    """Look, without others having their turn meanwhile."""
    return asyncio.run(by_turns(one.look(kernel, ours)))


def told(one: DropAudits, kernel: dict[Identity, list[ListeningSocket]], ours: int) -> int | None:
    """Look until nothing has changed for some time, and return what that tells in all."""
    identity = next(iter(kernel), SSH)
    found = [looked(one, kernel, {identity: ours}) for _ in range(6)]
    certain = [more for more in found if more is not None]
    return sum(certain) if certain else None


def test_drops_before_the_session() -> None:
    """What a socket had dropped before the session is not missing; what it drops later is."""
    one = DropAudits()
    assert told(one, sockets(SSH, a=100), 0) == 0
    assert told(one, sockets(SSH, a=104), 1) == 3


def test_drops_of_a_new_socket() -> None:
    """Of a socket that listens since the session is up, all drops have to be counted."""
    one = DropAudits()
    assert told(one, {}, 0) is None
    assert told(one, sockets(SSH, a=5), 3) == 2
    assert told(one, sockets(SSH, b=4), 6) == 1


def test_drops_of_a_socket_beside_an_old_one() -> None:
    """Where an old socket shares its listener, what was there when both were first seen is not."""
    one = DropAudits()
    assert told(one, sockets(SSH, a=100), 0) == 0
    assert told(one, sockets(SSH, a=100, b=7), 7) == 0
    assert told(one, sockets(SSH, a=101, b=9), 8) == 2


def test_drops_of_a_socket_that_an_answer_lacked() -> None:
    """A socket that is not in one of the kernel's answers is no new one in the next."""
    one = DropAudits()
    assert told(one, sockets(SSH, a=100, b=7), 0) == 0
    assert told(one, sockets(SSH, a=100), 0) == 0
    assert told(one, sockets(SSH, a=100, b=7), 0) == 0


def test_drops_of_a_socket_that_the_first_answer_lacked() -> None:
    """Nor is one that the very first answer did not have."""
    one = DropAudits()
    assert looked(one, sockets(WEB, a=1), {}) is None
    assert told(one, sockets(SSH, b=50), 0) == 0


def test_drops_that_the_kernel_does_not_tell() -> None:
    """Where the kernel is too old to tell, nothing is."""
    assert told(DropAudits(), sockets(SSH, a=None), 0) is None


def test_drops_one_listener_does_not_hide_another() -> None:
    """A listener whose counters are ahead does not make up for one that lacks some."""
    one = DropAudits()
    kernel = {**sockets(SSH, a=10), **sockets(WEB, b=10)}
    assert [looked(one, kernel, {}) for _ in range(4)][-1] == 0
    kernel = {**sockets(SSH, a=12), **sockets(WEB, b=10)}
    assert [looked(one, kernel, {WEB: 5}) for _ in range(4)][-1] == 2


def test_sockets_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many sockets come and go, no more than some are remembered."""
    monkeypatch.setattr(audit, "_MOST_SEEN", 20)
    one = DropAudits()
    for n in range(100):
        looked(one, {SSH: [ListeningSocket("*", 22, 0, 8, 0, n)]}, {})
    assert len(one._seen) == 20


def test_small_steps() -> None:
    """However many listeners there are, a look lets others have their turn between them."""
    kernel = {
        Identity("", "", "*", port): [ListeningSocket("*", port, 0, 8, 0, port)]
        for port in range(500)
    }
    assert sum(1 for _ in DropAudits().look(kernel, {})) >= 500
