"""The kernel's numbers are read exactly, and become gauges and counters in the table."""

from __future__ import annotations

import asyncio
import errno
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.waiting import until

import own_namespace
import zone_rows
from dtrace_exporter import inet_diag, kernel_totals, sock_diag
from dtrace_exporter.inet_diag import ListeningSocket, half_open, listeners
from dtrace_exporter.limits import Limits
from dtrace_exporter.listeners import ListenerTable, SessionId
from dtrace_exporter.namespace_finder import NETLINK_SOCK_DIAG
from dtrace_exporter.namespaces import Namespace
from dtrace_exporter.sock_diag import CAPABILITIES, Reading, SockDiagSource, read
from dtrace_exporter.sockets import Queues
from dtrace_exporter.tracing import rows
from dtrace_exporter.watched import Watched, named
from linux_rows import told

SESSION = SessionId("", "all")

linux = pytest.mark.skipif(sys.platform != "linux", reason="sock_diag is an interface of Linux")
needs_ss = pytest.mark.skipif(shutil.which("ss") is None, reason="ss of iproute2 is not installed")


class Net:
    """Real listeners and clients, closed at the end of the test."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def listen(
        self, address: str, backlog: int = 8, port: int = 0, reuse_port: bool = False
    ) -> socket.socket:
        """Open a listener; an IPv6 wildcard takes IPv4 as well."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            listener = socket.socket(family, socket.SOCK_STREAM)
            self._stack.enter_context(listener)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            if reuse_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind((address, port))
        except OSError as error:
            if family == socket.AF_INET6 and error.errno in (
                errno.EAFNOSUPPORT,
                errno.EADDRNOTAVAIL,
            ):
                pytest.skip(f"no IPv6 here: {error}")
            raise
        listener.listen(backlog)
        return listener

    def connect(self, listener: socket.socket, clients: int, wait: bool = True) -> None:
        """Connect clients to a listener that does not accept them."""
        for _ in range(clients):
            client = self._stack.enter_context(socket.socket(listener.family, socket.SOCK_STREAM))
            client.setblocking(wait)
            client.connect_ex(listener.getsockname())


@pytest.fixture
def net() -> Iterator[Net]:
    """Return a Net."""
    with ExitStack() as stack:
        yield Net(stack)


def port_of(listener: socket.socket) -> int:
    """Return a listener's port."""
    port: int = listener.getsockname()[1]
    return port


def samples(listener: socket.socket) -> list[ListeningSocket]:
    """Read the samples of a listener's port."""
    return [sample for sample in listeners() if sample.port == port_of(listener)]


def cookie(listener: socket.socket) -> int:
    """Return the kernel's cookie of a socket; SO_COOKIE of asm-generic/socket.h."""
    return int.from_bytes(listener.getsockopt(socket.SOL_SOCKET, 57, 8), sys.byteorder)


def update(source: SockDiagSource, table: ListenerTable) -> None:
    """Put a reading into the table, as the service does."""
    list(source.update(table, SESSION, read((), source.open)))


def ss(listener: socket.socket) -> tuple[int, int, int]:
    """Ask ss for Q, Qmax and drops."""
    command = ["ss", "-lntmH", f"sport = :{port_of(listener)}"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"LISTEN\s+(\d+)\s+(\d+).*\bd(\d+)\)", output, re.DOTALL)
    assert found, output
    return int(found[1]), int(found[2]), int(found[3])


def overrun(listener: socket.socket, clients: int) -> None:
    """Let clients connect until each is in Q or dropped, and none of them tries again."""

    def met() -> int:
        return sum(one.q + (one.drops or 0) for one in samples(listener))

    least = met() + clients
    with ExitStack() as connected:
        Net(connected).connect(listener, clients, wait=False)
        until(lambda: met() >= least)


def drops_of_all(port: int) -> int:
    """Ask ss for the sum of the drops of all sockets that listen on a port."""
    command = ["ss", "-lntmH", f"sport = :{port}"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"\bd(\d+)\)", output)))


@linux
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_queue(net: Net, address: str) -> None:
    """Q is the number of connections that are not accepted yet, and Qmax is the backlog."""
    listener = net.listen(address, backlog=7)
    assert [sample[:5] for sample in samples(listener)] == [(address, port_of(listener), 0, 7, 0)]
    net.connect(listener, 3)
    until(lambda: samples(listener)[0].q == 3)
    listener.accept()[0].close()
    assert [sample[:5] for sample in samples(listener)] == [(address, port_of(listener), 2, 7, 0)]
    port = port_of(listener)
    listener.close()
    assert port not in {sample.port for sample in listeners() if sample.address == address}


@linux
@needs_ss
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_same_as_ss(net: Net, address: str) -> None:
    """The Q, Qmax and drops of a full listener are the same as those of ss."""
    listener = net.listen(address, backlog=1)
    net.connect(listener, 2)
    net.connect(listener, 5, wait=False)
    until(lambda: (samples(listener)[0].drops or 0) >= 5)

    def same() -> bool:
        # Retransmitted SYNs may be dropped between one reading and the next.
        before = ss(listener)
        [sample] = samples(listener)
        return before == ss(listener) == (sample.q, sample.qmax, sample.drops)

    until(same)
    assert samples(listener)[0][2:4] == (2, 1)


@linux
def test_total_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the namespace's total cannot be read, its listeners are still read."""
    assert read((), {})[0].dropped is not None
    monkeypatch.setattr(kernel_totals, "NETSTAT", Path("/nowhere/netstat"))
    [reading] = read((), {})
    assert reading.dropped is None


_IN_A_NAMESPACE = """
from test_sock_diag import *

def discard(count):
    for _ in range(count):
        with socket.create_connection(deferring.getsockname()) as client:
            client.sendall(b"x")
            deferring.accept()[0].close()

def shown():
    update(source, table)
    drops = {one.identity.port: one.drops["unknown"] for one in table}
    total = int(re.search(r"TcpExtListenDrops +(\\d+)", nstat())[1])
    print(drops[port_of(deferring)], drops[port_of(full)], total, drops_of_all(port_of(deferring)))

def nstat():
    command = ["nstat", "-asz", "TcpExtListenDrops"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

with ExitStack() as stack:
    net = Net(stack)
    deferring, full = net.listen("127.0.0.1"), net.listen("127.0.0.1", 0)
    deferring.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 60)
    table, source = ListenerTable(), SockDiagSource()
    table.watch(SESSION, Watched(), CAPABILITIES)
    discard(3)
    shown()
    overrun(full, 5)
    shown()
    discard(4)
    shown()
"""


@linux
@needs_ss
def test_connections_that_are_deferred() -> None:
    """First ACKs of deferred connections are no drops, and another listener's drops match nstat."""
    output = own_namespace.output(_IN_A_NAMESPACE)
    numbers = [[*map(int, line.split())] for line in output.splitlines()]
    # A client that waits for a second retransmits its SYN.
    dropped = max(numbers[1][2], 4)
    assert numbers == [[0, 0, 0, 3], [0, dropped, dropped, 3], [0, dropped, dropped, 7]]


@linux
def test_discarded_without_a_drop(net: Net) -> None:
    """With TCP_DEFER_ACCEPT, the kernel counts each connection's bare ACK, though none is lost."""
    listener = net.listen("127.0.0.1")
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 60)
    for count in (1, 2, 3):
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(b"x")
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.recv(1) == b"x"
        assert samples(listener)[0].drops == count


@linux
def test_every_listener_of_the_host(net: Net) -> None:
    """The sockets are those of /proc/net/tcp and tcp6 in state LISTEN, with the same Q."""
    net.connect(net.listen("127.0.0.1"), 2)
    net.connect(net.listen("::1"), 1)

    def same() -> bool:
        lines = [
            line.split()
            for name in ("tcp", "tcp6")
            for line in Path("/proc/net", name).read_text(encoding="ascii").splitlines()
        ]
        proc = [(words[1][-4:], words[4][9:]) for words in lines if words[3] == "0A"]
        queues = [(int(port, 16), int(q, 16)) for port, q in proc]
        return sorted(queues) == sorted((sample.port, sample.q) for sample in listeners())

    until(same)


@linux
@pytest.mark.parametrize(
    ("bound", "shown"),
    [("0.0.0.0", "*"), ("::", "*"), ("::ffff:127.0.0.1", "127.0.0.1"), ("127.0.0.2", "127.0.0.2")],
)
def test_addresses(net: Net, bound: str, shown: str) -> None:
    """The wildcards of both families are one address, and mapped IPv4 is IPv4."""
    assert [sample.address for sample in samples(net.listen(bound))] == [shown]


@given(
    st.integers(0, (1 << 128) - 1) | st.integers(0, (1 << 32) - 1).map(lambda n: n | 0xFFFF << 32)
)
def test_addresses_as_in_rows(number: int) -> None:
    """An address reads the same here and in the rows of a D program."""
    address = str(IPv6Address(number))
    # Solaris 10's program prints all words of the address, with all of their zeros.
    by_words = ":".join(f"{number >> shift & 0xFFFF:x}" for shift in range(112, -1, -16))
    told_by = told(22, bound=address), *(zone_rows.told(22, bound=b) for b in (address, by_words))
    for line in told_by:
        record = rows.Reader().read(line)
        assert isinstance(record, rows.Listening)
        assert record.address == inet_diag._address(number.to_bytes(16))


@linux
def test_reuse_port(net: Net) -> None:
    """Two sockets of one address and port are separate when read, and one listener in the table."""
    first = net.listen("127.0.0.1", backlog=10, reuse_port=True)
    second = net.listen("127.0.0.1", backlog=4, port=port_of(first), reuse_port=True)
    net.connect(first, 4)
    until(lambda: sum(sample.q for sample in samples(first)) == 4)
    found = samples(first)
    assert len({sample.socket for sample in found}) == 2
    assert {(sample.address, sample.qmax) for sample in found} == {
        ("127.0.0.1", 10),
        ("127.0.0.1", 4),
    }
    table = ListenerTable()
    table.watch(SESSION, named({port_of(first): ""}), CAPABILITIES)
    update(SockDiagSource(), table)
    [listener] = table
    fullest = max(found, key=lambda sample: sample.q / sample.qmax)
    assert len(listener.sockets) == 2
    assert listener.queues == Queues(0, fullest.q, None, fullest.qmax)
    assert second.fileno() >= 0


@linux
def test_only_listeners_are_asked_for(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel sends only listeners, or only half-open connections, whichever is asked for."""
    listener = net.listen("127.0.0.1", backlog=100)
    net.connect(listener, 60)
    states: set[int] = set()
    dump = inet_diag._dump

    def seen(*asked: Any) -> Iterator[memoryview]:
        for message in dump(*asked):
            states.add(message[1])
            yield message

    monkeypatch.setattr(inet_diag, "_dump", seen)
    until(lambda: samples(listener)[0].q == 60)
    assert states == {10}, "TCP_LISTEN in include/net/tcp_states.h"
    states.clear()
    half_open()
    assert states <= {3}, "TCP_SYN_RECV"


class Answers:
    """The kernel's answers to successive questions, some of which lack sockets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: set[int]) -> None:
        self.left = [*answers]
        monkeypatch.setattr(inet_diag, "_read", self._read)
        monkeypatch.setattr(sys, "platform", "linux")

    def _read(self, _: object) -> dict[int, ListeningSocket]:
        return {key: sample(key, 0) for key in self.left.pop(0)}


@pytest.mark.parametrize(
    ("known", "answers", "found", "left"),
    [
        ((), [{1, 2}, {3}], {1, 2}, 1),
        ({1}, [{1, 2}, {3}], {1, 2}, 1),
        ({1, 2}, [{1}, {2}, {3}], {1, 2}, 1),
        ({1, 2, 3}, [{1}, {2}, {3}, {4}], {1, 2, 3}, 1),
        ({1, 2}, [{1}, {1}, {1, 3}, {2}], {1, 3}, 1),
    ],
)
def test_a_socket_that_an_answer_lacks(
    monkeypatch: pytest.MonkeyPatch,
    known: set[int],
    answers: list[set[int]],
    found: set[int],
    left: int,
) -> None:
    """A known socket is closed if three answers lack it; otherwise one answer is enough."""
    kernel = Answers(monkeypatch, *answers)
    assert {one.socket for one in listeners(known)} == found
    assert len(kernel.left) == left


@linux
@needs_ss
@pytest.mark.parametrize("answers", [1, 3])
def test_sockets_that_close_between_parts_of_an_answer(
    answers: int, net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket that closes during an answer can hide another; further answers find the other.

    Whatever answers lack, drops are those that ss showed, also for the sockets that closed.
    """
    first = net.listen("127.0.0.1", backlog=0, reuse_port=True)
    port = port_of(first)
    others = [net.listen("127.0.0.1", 0, port, reuse_port=True) for _ in range(600)]
    cookies = {one: cookie(one) for one in (first, *others)}
    for _ in range(5):
        overrun(first, 300)
    drops = drops_of_all(port)
    assert drops > 0
    table, source = ListenerTable(), SockDiagSource()
    table.watch(SESSION, named({port: ""}), CAPABILITIES)
    update(source, table)
    # The kernel sends the newest first.
    closing = iter([others[400:], others[300:400], others[200:300]])
    lacking = []
    read_once, messages = inet_diag._read, inet_diag._messages

    def close_after_a_part(data: memoryview) -> Generator[memoryview, None, bool]:
        ended = yield from messages(data)
        for one in next(closing, []):
            one.close()
        return ended

    def open_now() -> set[int]:
        return {key for one, key in cookies.items() if one.fileno() >= 0}

    def noting(netlink: socket.socket | None) -> dict[int, ListeningSocket]:
        found = read_once(netlink)
        lacking.append(open_now() - found.keys())
        return found

    monkeypatch.setattr(inet_diag, "_READINGS", answers)
    monkeypatch.setattr(inet_diag, "_messages", close_after_a_part)
    monkeypatch.setattr(inet_diag, "_read", noting)
    update(source, table)
    assert lacking[0]
    [listener] = table
    assert (listener.sockets.keys() >= open_now()) == (answers > 1)
    monkeypatch.undo()
    update(source, table)
    assert listener.sockets.keys() == open_now()
    assert listener.drops == {"unknown": drops}
    assert drops_of_all(port) < drops


def answer(*, cut: int = 0, length: int | None = None, kind: int = 20) -> bytes:
    """Return the kernel's answer with a listener, possibly cut short or with a wrong length."""
    body = struct.pack("=BBBB2s2s16s16s8I", 2, 10, 0, 0, b"\0P", b"", b"", b"", *range(8))
    data = struct.pack("=IHHII", length or 16 + len(body), kind, 0, 0, 0) + body
    return data[: len(data) - cut]


@linux
@pytest.mark.parametrize(
    "data", [b"", b"x", answer(cut=1), answer(cut=60), answer(length=3), answer(length=40)]
)
def test_answers_that_are_none(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """An answer that is cut short or has a wrong length is an OSError, and no endless loop."""
    monkeypatch.setattr(inet_diag, "_dump", lambda *_: inet_diag._messages(memoryview(data)))
    with pytest.raises(OSError, match="cannot read sock_diag"):
        listeners()


def attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute of a socket."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


@pytest.mark.parametrize(
    ("attributes", "cgroup"),
    [
        (b"", None),
        (attribute(8, b"\0"), None),
        (attribute(8, b"\0") + attribute(21, struct.pack("=Q", 1 << 40)), 1 << 40),
        (attribute(21, b"\1\0\0\0"), None),
        (attribute(21, struct.pack("=Q", 7))[:8], None),
    ],
)
def test_whose(attributes: bytes, cgroup: int | None) -> None:
    """A socket's cgroup is an attribute that newer kernels add; all kernels give its inode."""
    message = memoryview(answer()[16:] + attributes)
    assert inet_diag._owned(message) == ("*", 80, 7, cgroup)


@given(st.binary(max_size=300))
def test_any_answer(data: bytes) -> None:
    """Any answer is read to its end, and gives samples or an OSError."""
    try:
        for message in inet_diag._messages(memoryview(data)):
            inet_diag._sample(message)
            inet_diag._owned(message)
    except OSError:
        pass


@linux
def test_in_a_running_event_loop(net: Net) -> None:
    """A coroutine may call listeners()."""

    async def read() -> list[ListeningSocket]:
        return listeners()

    listener = net.listen("127.0.0.1")
    assert port_of(listener) in {sample.port for sample in asyncio.run(read())}


@linux
def test_leaves_no_descriptor_open() -> None:
    """Repeated readings leave no file descriptor open."""
    listeners()
    before = set(Path("/proc/self/fd").iterdir())
    for _ in range(10):
        listeners()
    assert set(Path("/proc/self/fd").iterdir()) == before


@linux
def test_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal of the kernel is an OSError with its number and a message."""
    monkeypatch.setattr(socket, "IPPROTO_TCP", 133)
    with pytest.raises(OSError, match="cannot read sock_diag: ") as caught:
        listeners()
    assert caught.value.errno in (errno.ENOENT, errno.EINVAL)


@linux
def test_no_netlink(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a netlink socket is refused, as under a strict service manager, that is an OSError too."""
    monkeypatch.setattr(inet_diag, "NETLINK_SOCK_DIAG", 31)
    with pytest.raises(OSError, match=r"cannot read sock_diag: .*not supported"):
        listeners()


def test_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another system, listeners() raises an OSError that names Linux."""
    monkeypatch.setattr(sys, "platform", "sunos5")
    with pytest.raises(OSError, match="Linux"):
        listeners()


class Kernel:
    """A fake for the readings of listeners()."""

    def __init__(self) -> None:
        self.table = ListenerTable()
        self.source = SockDiagSource()

    def read(
        self,
        *samples: ListeningSocket,
        half_open: Mapping[str, int] | None = None,
        dropped: tuple[int, int] | None = None,
    ) -> None:
        """Put one reading into the table, with numbers of half-open connections by address."""
        found = Counter({(address, 80): count for address, count in (half_open or {}).items()})
        reading = Reading([*samples], found, dropped=dropped)
        list(self.source.update(self.table, SESSION, [reading]))

    def drops(self, port: int = 80) -> int:
        """Return the drop counter of the only listener on a port."""
        [listener] = [one for one in self.table if one.identity.port == port]
        return listener.drops.get("unknown", 0)


@pytest.fixture
def kernel() -> Kernel:
    """Return a Kernel with all ports watched."""
    kernel = Kernel()
    kernel.table.watch(SESSION, Watched(), CAPABILITIES)
    return kernel


def sample(
    key: int, drops: int | None, port: int = 80, q: int = 0, address: str = "*"
) -> ListeningSocket:
    """Return a fake sample."""
    return ListeningSocket(address, port, q, 10, drops, key)


def test_half_open(kernel: Kernel) -> None:
    """A half-open connection belongs to its address's listener, or else to the wildcard's."""
    own, every = sample(1, 0, address="10.0.0.1"), sample(2, 0)
    kernel.read(own, every, half_open={"10.0.0.1": 3, "10.0.0.2": 4, "::1": 5})
    q0 = {one.identity.address: one.queues.q0 for one in kernel.table if one.queues}
    assert q0 == {"10.0.0.1": 3, "*": 9}
    kernel.read(every, half_open={"10.0.0.1": 3})
    assert {one.identity.address: one.queues and one.queues.q0 for one in kernel.table} == {
        "10.0.0.1": None,
        "*": 3,
    }


def test_half_open_of_several_sockets(kernel: Kernel) -> None:
    """Sockets that share a listener share its half-open connections."""
    kernel.read(sample(1, 0, q=9), sample(2, 0), half_open={"10.0.0.1": 3})
    [listener] = kernel.table
    assert listener.queues == Queues(3, 9, None, 10)
    assert {queues.q0 for queues in listener.sockets.values()} == {3}


def test_drops_count_up(kernel: Kernel) -> None:
    """The first reading sets the counter, and later ones add their increase."""
    for drops in (5, 5, 9, 12):
        kernel.read(sample(1, drops))
        assert kernel.drops() == drops


def test_drops_over_close_and_reopen(kernel: Kernel) -> None:
    """A closed socket leaves the counter as it is, and a new one adds its own drops."""
    kernel.read(sample(1, 5))
    kernel.read()
    assert kernel.drops() == 5
    kernel.read(sample(2, 2))
    assert kernel.drops() == 7
    kernel.read(sample(2, 3))
    assert kernel.drops() == 8


def test_drops_of_a_socket_that_an_answer_lacked(kernel: Kernel) -> None:
    """If one answer lacks a socket, the socket's earlier drops are not counted again."""
    kernel.read(sample(1, 5), sample(2, 10))
    kernel.read(sample(2, 10))
    kernel.read(sample(1, 6), sample(2, 10))
    assert kernel.drops() == 16


def test_no_more_than_the_namespace_has_dropped(kernel: Kernel) -> None:
    """A socket's discards count as drops only up to the drops of all listeners meanwhile."""
    for discarded, dropped, counted in (
        (5, (3, 3), 3),
        (9, (3, 3), 3),
        (12, (5, 5), 5),
        # A drop during an answer is in this answer or in the next.
        (14, (5, 8), 7),
        (15, (8, 8), 8),
    ):
        kernel.read(sample(1, discarded), dropped=dropped)
        assert kernel.drops() == counted
    # A socket that opens later has none of the earlier drops.
    kernel.read(sample(1, 15), sample(2, 4, 81), dropped=(9, 9))
    assert (kernel.drops(), kernel.drops(81)) == (8, 1)


def test_no_more_than_was_dropped_in_its_life(kernel: Kernel) -> None:
    """If a port is watched later or a listener is created again, all its sockets' drops count."""
    kernel.table.watch(SESSION, named({80: ""}))
    for _ in range(2):
        kernel.read(sample(1, 5), sample(2, 7, 81), dropped=(20, 20))
    kernel.table.watch(SESSION, named({81: "", 80: ""}))
    kernel.read(sample(1, 5), sample(2, 7, 81), dropped=(20, 20))
    assert (kernel.drops(), kernel.drops(81)) == (5, 7)
    for port in (80, 81):
        kernel.table.watch(SESSION, named({port: ""}))
    kernel.table.watch(SESSION, named({81: "", 80: ""}))
    kernel.read(sample(1, 5), sample(2, 7, 81), dropped=(20, 20))
    assert (kernel.drops(), kernel.drops(81)) == (5, 7)


def test_namespaces_are_told_apart(kernel: Kernel) -> None:
    """Sockets with the same number in two namespaces, as on old kernels, are counted separately."""

    def take(*readings: tuple[str, int, int]) -> dict[str, int]:
        """Read one socket's drops in each namespace, by place and cookie; return the counters."""
        there = [
            Reading([sample(1, drops)], Counter(), place, cookie)
            for place, cookie, drops in readings
        ]
        list(kernel.source.update(kernel.table, SESSION, there))
        return {one.identity.place: one.drops["unknown"] for one in kernel.table}

    assert take(("5", 1, 10), ("6", 2, 20)) == {"5": 10, "6": 20}
    assert take(("5", 1, 11), ("6", 2, 22)) == {"5": 11, "6": 22}
    # While the namespace is away, its counters stay the same, and it has no queues.
    assert take(("6", 2, 22)) == {"5": 11, "6": 22}
    assert {one.identity.place: bool(one.queues) for one in kernel.table} == {"5": False, "6": True}
    assert take(("5", 1, 12), ("6", 2, 22)) == {"5": 12, "6": 22}
    # Another namespace uses the number again.
    assert take(("5", 3, 4), ("6", 2, 22)) == {"5": 4, "6": 22}


def test_half_open_of_namespaces(kernel: Kernel) -> None:
    """A half-open connection does not belong to the same address and port in another namespace."""
    there = [
        Reading([sample(place, 0)], Counter({("10.0.0.1", 80): place}), str(place), place)
        for place in (2, 3)
    ]
    list(kernel.source.update(kernel.table, SESSION, there))
    assert {one.identity.place: one.queues and one.queues.q0 for one in kernel.table} == {
        "2": 2,
        "3": 3,
    }


@linux
@pytest.mark.parametrize("seconds", [0.0, 100.0])
def test_half_open_of_very_many_namespaces(
    net: Net, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Once the search for half-open connections has taken too long, other namespaces lack Q0."""
    net.listen("127.0.0.1")
    monkeypatch.setattr(sock_diag, "_HALF_OPEN_SECONDS", seconds)
    with ExitStack() as stack:
        there = [
            Namespace(
                str(number),
                number,
                stack.enter_context(
                    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
                ),
            )
            for number in (2, 3)
        ]
        own, *others = read(there, {})
    assert own.half_open is not None
    assert [bool(one.samples) for one in others] == [True, True]
    assert [one.half_open is None for one in others] == [seconds == 0] * 2


def test_sockets_without_end(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the newest of the closed sockets are remembered, up to a limit."""
    monkeypatch.setattr(sock_diag, "_MOST_COUNTED", 3)
    for n in range(20):
        kernel.read(sample(n, 1))
    assert [socket for *_, socket in kernel.source._counted] == [17, 18, 19]
    kernel.read(*(sample(n, 2) for n in range(20, 30)))
    assert len(kernel.source._counted) == 10


def test_drops_of_several_sockets(kernel: Kernel) -> None:
    """All sockets of one identity count into one counter."""
    kernel.read(sample(1, 5), sample(2, 10))
    kernel.read(sample(2, 11), sample(3, 1))
    assert kernel.drops() == 17


def test_drops_go_round(kernel: Kernel) -> None:
    """An overflow of the kernel's 32 bits is counted on."""
    kernel.read(sample(1, (1 << 32) - 1))
    kernel.read(sample(1, 4))
    assert kernel.drops() == (1 << 32) + 4


def test_kernel_without_drops(kernel: Kernel) -> None:
    """If the kernel does not report drops, the counter is absent, not zero."""
    kernel.read(sample(1, None))
    [listener] = kernel.table
    assert listener.drops == {}
    assert listener.queues == Queues(0, 0, None, 10)


def test_gauges_of_a_closed_listener_go(kernel: Kernel) -> None:
    """A closed listener has no queues, and an open one has its newest."""
    kernel.read(sample(1, 0, 80, 3), sample(2, 0, 81, 4))
    kernel.read(sample(2, 0, 81, 5))
    queues = {listener.identity.port: listener.queues for listener in kernel.table}
    assert queues == {80: None, 81: Queues(0, 5, None, 10)}


def test_gauges_of_one_closed_socket_go(kernel: Kernel) -> None:
    """If one of a listener's two sockets closes, its queues disappear."""
    kernel.read(sample(1, 0, q=9), sample(2, 0, q=4))
    kernel.read(sample(2, 0, q=5))
    [listener] = kernel.table
    assert listener.sockets == {2: Queues(0, 5, None, 10)}


def test_gauges_of_a_socket_that_moved(kernel: Kernel) -> None:
    """A socket that listens again on another port has its queues only there."""
    kernel.read(sample(1, 0, 80, 3))
    kernel.read(sample(1, 0, 81, 4))
    queues = {listener.identity.port: listener.queues for listener in kernel.table}
    assert queues == {80: None, 81: Queues(0, 4, None, 10)}


def test_only_watched_ports(kernel: Kernel) -> None:
    """Other ports are left out; a port that is configured later starts with the drops of ss."""
    kernel.table.watch(SESSION, named({80: "web"}))
    kernel.read(sample(1, 3), sample(2, 7, 81))
    assert {listener.identity.port for listener in kernel.table} == {80}
    kernel.table.watch(SESSION, named({81: "", 80: "web"}))
    kernel.read(sample(1, 3), sample(2, 8, 81))
    assert (kernel.drops(80), kernel.drops(81)) == (3, 8)
    kernel.table.watch(SESSION, named({80: "web"}))
    kernel.table.watch(SESSION, named({81: "", 80: "web"}))
    kernel.read(sample(1, 3), sample(2, 9, 81))
    assert (kernel.drops(80), kernel.drops(81)) == (3, 9)


@given(st.lists(st.dictionaries(st.integers(0, 4), st.integers(0, 9)), max_size=12))
def test_drops_never_fall(readings: list[dict[int, int]]) -> None:
    """Over any history of sockets, the counter is the sum of what each of them dropped."""
    kernel = Kernel()
    kernel.table.watch(SESSION, named({80: ""}), CAPABILITIES)
    total, open_now, born = 0, dict[int, tuple[int, int]](), 0
    for reading in readings:
        # A number that one reading lacks is another socket, with another cookie, later.
        for slot in set(open_now) - set(reading):
            del open_now[slot]
        for slot, more in reading.items():
            born += slot not in open_now
            cookie, before = open_now.get(slot, (born, 0))
            open_now[slot] = cookie, before + more
            total += more
        kernel.read(*(sample(cookie, drops) for cookie, drops in open_now.values()))
        assert kernel.drops() == total


def test_more_than_there_is_room_for(kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    """Listeners beyond the limit are left out and logged once, until another one closes."""
    kernel.table.limit("", Limits(listeners=2))
    three = [sample(number, 1, port) for number, port in enumerate((80, 81, 82), 1)]
    for _ in range(2):
        kernel.read(*three)
        assert {one.identity.port for one in kernel.table} == {80, 81}
    assert len(caplog.records) == 1
    kernel.read(*three[1:])
    assert {one.identity.port: one.drops["unknown"] for one in kernel.table} == {81: 1, 82: 1}


def test_sockets_of_one_listener(kernel: Kernel) -> None:
    """Sockets beyond the limit have no gauges, but their drops count; closed ones make room."""
    kernel.table.limit("", Limits(sockets=2))
    kernel.read(*(sample(key, 1) for key in (1, 2, 3)))
    [listener] = kernel.table
    assert listener.sockets.keys() == {1, 2}
    assert kernel.drops() == 3
    kernel.read(*(sample(key, 2) for key in (2, 3)))
    assert listener.sockets.keys() == {2, 3}
    assert kernel.drops() == 5
    many = Reading([sample(1, 0)] * 99, Counter())
    assert sum(1 for _ in kernel.source.update(kernel.table, SESSION, [many])) >= 99
