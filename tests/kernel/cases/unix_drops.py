"""connect()s that full UNIX sockets refuse: the counter is what the clients have counted."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from lab.exporter import Exporter
from lab.io_uring import Ring
from lab.report import note
from lab.traffic import unix_socket
from lab.witness import netns_inode

DROPS = "dtrace_unix_listen_drops_total"
LACKS = "dtrace_session_unattributed_total"

# Arguments: the type of the socket, the processor, how often, and names in hexadecimal. It connects
# to one name after the other, and prints which answers it got, and how often.
_CLIENT = """
import collections, json, os, socket, sys
kind, cpu, times, *names = sys.argv[1:]
os.sched_setaffinity(0, {int(cpu)})
names = [bytes.fromhex(name) for name in names]
found = {name: collections.Counter() for name in names}
for _ in range(int(times)):
    for name in names:
        with socket.socket(socket.AF_UNIX, int(kind)) as client:
            client.setblocking(False)
            found[name][client.connect_ex(name)] += 1
print(json.dumps([[*found[name].items()] for name in names]))
"""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Return a stack that is unwound at the end of the case."""
    with ExitStack() as made:
        yield made


def start(
    names: list[bytes], times: int, kind: int = socket.SOCK_STREAM, cpu: int = 0, netns: str = ""
) -> subprocess.Popen[str]:
    """Start a process that tries to connect to names, each so many times."""
    where = ["ip", "netns", "exec", netns] if netns else []
    words = [str(int(kind)), str(cpu), str(times), *(name.hex() for name in names)]
    command = [*where, sys.executable, "-c", _CLIENT, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answers(client: subprocess.Popen[str]) -> list[dict[int, int]]:
    """Wait for a client; return for each of its names how often it got which errno."""
    output, _ = client.communicate(timeout=300)
    return [dict(each) for each in json.loads(output)]


def full(
    stack: ExitStack, name: bytes, kind: int = socket.SOCK_STREAM, netns: str | None = None
) -> socket.socket:
    """Return a listener whose queue is full: a backlog of 0 admits one."""
    listener = stack.enter_context(unix_socket(netns, kind))
    listener.bind(name)
    listener.listen(0)
    client = stack.enter_context(unix_socket(netns, kind))
    client.connect(name)
    return listener


@pytest.fixture(scope="module")
def running() -> Iterator[Exporter]:
    """Return an exporter that watches the UNIX sockets in /tmp, and some abstract ones."""
    config = {"source": "dtrace", "unix": {"paths": ["/tmp/*", "@drops*"]}}
    with Exporter(config) as made:
        made.wait_ready()
        for feature in ("unix_drops", "unix_io_uring", "exact"):
            made.wait("dtrace_session_feature_enabled", 1, session="unix", feature=feature)
        yield made


@pytest.fixture
def lacked(running: Exporter) -> float:
    """Return how many refusals are not known whose they are, before the case."""
    lacks = running.value(LACKS, session="unix", kind="drops")
    assert lacks is not None
    return lacks


def drops(running: Exporter, path: str, netns: str = "") -> float | None:
    """Return the counter of a path."""
    return running.value(DROPS, path=path, netns=netns)


def test_clients_count_the_same(
    running: Exporter, lacked: float, away: str, tmp_path: Path, stack: ExitStack
) -> None:
    """Names of all lengths, both types, two namespaces, two processors at once: it is the sum."""
    short, middle = f"{tmp_path}/a", f"{tmp_path}/{'m' * 25}".ljust(70, "x")
    longest = f"{tmp_path}/".ljust(107, "y")
    abstract, padded = b"\0drops", b"\0drops\0\0x\xff".ljust(108, b"\0")
    here = [short.encode(), middle.encode(), longest.encode(), abstract, padded]
    for name in here:
        full(stack, name)
    packets = f"{tmp_path}/packets"
    full(stack, packets.encode(), socket.SOCK_SEQPACKET)
    full(stack, abstract, netns=away)
    idle = f"{tmp_path}/idle"
    full(stack, idle.encode())
    clients = [
        start(here, 300, cpu=0),
        start(here, 200, cpu=1),
        start([packets.encode()], 150, socket.SOCK_SEQPACKET, cpu=1),
        start([abstract], 120, cpu=0, netns=away),
        # A path is found from any network namespace, and the listener's counts.
        start([short.encode()], 70, cpu=1, netns=away),
    ]
    found = [answers(client) for client in clients]
    assert all(each == {errno.EAGAIN: sum(each.values())} for one in found for each in one)
    metrics = running.settle()
    written = {
        short: 570,
        middle: 500,
        longest: 500,
        "@drops": 500,
        r"@drops\x00\x00x\xff" + r"\x00" * 98: 500,
        packets: 150,
        idle: 0,
    }
    got = {path: metrics.value(DROPS, path=path, netns="") for path in written}
    assert got == written
    assert metrics.value(DROPS, path="@drops", netns=netns_inode(away)) == 120
    assert metrics.value(LACKS, session="unix", kind="drops") == lacked
    for kind in ("principal", "aggregation", "dynamic_variable"):
        assert metrics.value("dtrace_session_lost_total", session="unix", kind=kind) == 0
    assert metrics.value("dtrace_session_probe_errors_total", session="unix") == 0


def test_who_waits(running: Exporter, lacked: float, tmp_path: Path, stack: ExitStack) -> None:
    """To wait is no refusal, nor to be interrupted; to wait as long as SO_SNDTIMEO is one."""
    name = f"{tmp_path}/waits"
    listener = full(stack, name.encode())
    with unix_socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 200_000))
        assert _connect(client, name) == errno.EAGAIN
    with unix_socket() as client, _alarm(0.2):
        assert _connect(client, name) == errno.EINTR
    with unix_socket() as client, unix_socket() as timed:
        threads = [
            threading.Thread(target=_connect, args=(one, name), daemon=True)
            for one in (client, timed)
        ]
        timed.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 60, 0))
        for thread in threads:
            thread.start()
        for _ in range(3):
            stack.enter_context(listener.accept()[0])
        for thread in threads:
            thread.join(60)
        assert client.getpeername() == timed.getpeername() == name
    # Neither are other failures.
    Path(f"{tmp_path}/file").touch()
    with unix_socket() as client:
        client.setblocking(False)
        assert client.connect_ex(f"{tmp_path}/nobody") == errno.ENOENT
        assert client.connect_ex(f"{tmp_path}/file") == errno.ECONNREFUSED
    running.settle()
    assert drops(running, name) == 1
    assert running.value(LACKS, session="unix", kind="drops") == lacked


def test_closes_and_listens_again(
    running: Exporter, lacked: float, tmp_path: Path, stack: ExitStack
) -> None:
    """The counter of a path goes on with the next listener; one nobody has seen counts as well."""
    name = f"{tmp_path}/again"
    assert drops(running, name) is None
    for times in (30, 40):
        with ExitStack() as those:
            full(those, name.encode())
            assert answers(start([name.encode()], times)) == [{errno.EAGAIN: times}]
        Path(name).unlink()
    running.settle()
    assert drops(running, name) is None
    full(stack, name.encode())
    assert drops(running, name) == 70
    # A new server takes over the path while the old one, which has it no more, is still open.
    Path(name).unlink()
    full(stack, name.encode())
    assert answers(start([name.encode()], 5)) == [{errno.EAGAIN: 5}]
    running.settle()
    assert drops(running, name) == 75
    assert running.value(LACKS, session="unix", kind="drops") == lacked


def test_a_listener_that_closes_meanwhile(running: Exporter, lacked: float, tmp_path: Path) -> None:
    """While it closes again and again, each refusal is counted, or told as nobody's."""
    name = f"{tmp_path}/flaps"
    client = start([name.encode()], 1_500, cpu=1)
    os.sched_setaffinity(0, {0})
    closes = mine = 0
    try:
        while client.poll() is None:
            with unix_socket() as listener, unix_socket() as other:
                listener.bind(name)
                listener.listen(0)
                # It is full at once, whoever comes first.
                other.setblocking(False)
                mine += other.connect_ex(name) == errno.EAGAIN
                os.sched_yield()
            Path(name).unlink()
            closes += 1
    finally:
        os.sched_setaffinity(0, {0, 1})
    (found,) = answers(client)
    refused = found.get(errno.EAGAIN, 0) + mine
    with unix_socket() as listener:
        listener.bind(name)
        listener.listen(0)
        running.settle()
        counted = drops(running, name)
    lacks = running.value(LACKS, session="unix", kind="drops")
    note(f"unix_drops: {closes} closes, {found}, {mine}, counted {counted}, lacks {lacks}")
    assert counted is not None
    assert lacks is not None
    assert counted + lacks - lacked == refused
    assert refused


def test_io_uring(running: Exporter, tmp_path: Path, stack: ExitStack) -> None:
    """What io_uring tries by itself is no refusal, only what it tells the process."""
    name = f"{tmp_path}/ring"
    listener = full(stack, name.encode())
    ring = stack.enter_context(Ring())
    with unix_socket() as client:
        ring.connect(client.fileno(), name.encode())
        running.settle()
        assert drops(running, name) == 0
        stack.enter_context(listener.accept()[0])
        assert ring.wait() == 0
    with unix_socket() as client:
        client.setblocking(False)
        ring.connect(client.fileno(), name.encode())
        assert ring.wait() == -errno.EAGAIN
    # What comes after it is not taken for it.
    full(stack, f"{tmp_path}/next".encode())
    running.settle()
    assert drops(running, name) == 1
    assert drops(running, f"{tmp_path}/next") == 0


def _connect(client: socket.socket, name: str) -> int:
    """Connect; return the errno, or 0."""
    try:
        return client.connect_ex(name)
    except InterruptedError:
        return errno.EINTR


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Have a signal interrupt what is done meanwhile."""

    def interrupt(*_: object) -> None:
        raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
