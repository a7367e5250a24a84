"""Listening UNIX sockets: their queues are those of ss, whatever their names are."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lab.exporter import Exporter
from lab.waiting import eventually
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dtrace_exporter import check, inet_diag, unix_diag
from dtrace_exporter.collector import Collector, registry
from dtrace_exporter.config import load
from dtrace_exporter.namespaces import Namespace
from dtrace_exporter.service import Service
from dtrace_exporter.state import State, UnixQueues, unchanged
from dtrace_exporter.unix_diag import UnixListener, listeners, written
from dtrace_exporter.unix_sockets import MOST, UnixSource
from fake_steps import FOREVER, READY, FakeDTrace
from host_tools import require

linux = pytest.mark.skipif(sys.platform != "linux", reason="unix_diag is an interface of Linux")


class Sockets:
    """Real listeners in a directory of their own, and clients that are not accepted."""

    def __init__(self, stack: ExitStack, directory: str) -> None:
        self._stack = stack
        self.directory = directory

    def listen(
        self, name: str | bytes, backlog: int = 8, kind: int = socket.SOCK_STREAM
    ) -> socket.socket:
        """Open a listener; a name that is not abstract is a file in the directory."""
        opened = self._stack.enter_context(socket.socket(socket.AF_UNIX, kind))
        raw = os.fsencode(name)
        opened.bind(raw if raw.startswith(b"\0") else os.fsencode(self.directory) + b"/" + raw)
        opened.listen(backlog)
        return opened

    def connect(self, listener: socket.socket, clients: int) -> list[int]:
        """Connect clients, without waiting, and return the errno of each; 0 for none."""
        results = []
        for _ in range(clients):
            client = self._stack.enter_context(socket.socket(socket.AF_UNIX, listener.type))
            client.setblocking(False)
            results.append(client.connect_ex(listener.getsockname()))
        return results


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    """Return Sockets. Their directory has a short name, because a path has at most 108 bytes."""
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="u"))
        yield Sockets(stack, directory)


def queues(path: str) -> list[tuple[int, int]]:
    """Return Q and Qmax of each socket with a path."""
    return [(one.q, one.qmax) for one in listeners() if one.path == path]


def ss(path: str) -> list[tuple[int, int]]:
    """Ask ss for Q and Qmax of each socket with a path."""
    command = [require("ss", "iproute2"), "-xlH"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(rf"LISTEN +(\d+) +(\d+) +{re.escape(path)} ", output)
    return [(int(q), int(qmax)) for q, qmax in found]


@linux
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize("abstract", [False, True])
def test_same_as_ss(sockets: Sockets, kind: int, abstract: bool) -> None:
    """Q grows to the backlog plus one, as in ss; then connect() fails with EAGAIN."""
    name = f"\0dtrace-exporter-test-{os.getpid()}" if abstract else "a.sock"
    listener = sockets.listen(name, 3, kind)
    path = f"@{name[1:]}" if abstract else f"{sockets.directory}/{name}"
    assert queues(path) == ss(path) == [(0, 3)]
    for q in (1, 2, 3, 4):
        assert sockets.connect(listener, 1) == [0]
        assert queues(path) == ss(path) == [(q, 3)]
    assert sockets.connect(listener, 2) == [errno.EAGAIN] * 2
    assert queues(path) == ss(path) == [(4, 3)]
    accepted, _ = listener.accept()
    accepted.close()
    assert queues(path) == ss(path) == [(3, 3)]
    listener.close()
    assert queues(path) == ss(path) == []


@linux
def test_only_listeners(sockets: Sockets) -> None:
    """A socket that is only bound, a datagram socket and a connection are not listeners."""
    listener = sockets.listen("a.sock")
    assert sockets.connect(listener, 1) == [0]
    for name, kind in (("b.sock", socket.SOCK_STREAM), ("c.sock", socket.SOCK_DGRAM)):
        bound = socket.socket(socket.AF_UNIX, kind)
        bound.bind(f"{sockets.directory}/{name}")
        with bound:
            found = [one.path for one in listeners() if one.path.startswith(sockets.directory)]
            assert found == [f"{sockets.directory}/a.sock"]


@linux
def test_a_file_that_is_gone(sockets: Sockets) -> None:
    """A socket keeps the name that it was bound to, even if its file is deleted or renamed."""
    sockets.listen("old.sock", 5)
    sockets.listen("moved.sock", 6)
    Path(sockets.directory, "old.sock").unlink()
    Path(sockets.directory, "moved.sock").rename(f"{sockets.directory}/new.sock")
    assert queues(f"{sockets.directory}/old.sock") == [(0, 5)]
    assert queues(f"{sockets.directory}/moved.sock") == [(0, 6)]
    assert queues(f"{sockets.directory}/new.sock") == []


@linux
@pytest.mark.parametrize("name", [b"\0a\nb\0c\xff\\\"'{}", b"\0" + b"\x01" * 107, b"n\n\xfe\t@"])
def test_hostile_names(sockets: Sockets, name: bytes) -> None:
    """A name of any bytes is a printable label, and the kernel's answer has the name."""
    listener = sockets.listen(name)
    assert sockets.connect(listener, 2) == [0, 0]
    whole = name if name.startswith(b"\0") else os.fsencode(sockets.directory) + b"/" + name
    assert queues(written(whole)) == [(2, 8)]


def test_recorded() -> None:
    """A recorded answer of Linux 6.18 is read: an abstract name with a line feed, Q 0, Qmax 2."""
    answer = (
        b"@\0\0\0\x14\0\x02\0\0\0\0\0Xg\0\0\x01\x01\n\0L\x1e\x0e\0\xed6\0\0\0\0\0\0"
        b"\n\0\0\0\0abc\nx\0\0\x0c\0\x04\0\0\0\0\0\x02\0\0\0\x05\0\x06\0\0\0\0\0"
    )
    (message,) = inet_diag._messages(memoryview(answer))
    assert unix_diag._listener(message) == UnixListener(r"@abc\x0ax", 0, 2)


def message(*attributes: tuple[int, bytes], state: int = 10) -> memoryview:
    """Return the kernel's message about a socket."""
    data = struct.pack("=BBBxI8x", 1, 1, state, 7)
    for kind, value in attributes:
        padding = b"\0" * (-len(value) % 4)
        data += struct.pack("=HH", 4 + len(value), kind) + value + padding
    return memoryview(data)


NAME, QUEUES = (0, b"/x\0"), (4, struct.pack("=II", 5, 8))


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (message(NAME, QUEUES), UnixListener("/x", 5, 8)),
        (message(QUEUES, (9, b"later"), NAME), UnixListener("/x", 5, 8)),
        (message(QUEUES), None),
        (message((0, b""), QUEUES), None),
        (message(NAME), None),
        (message(NAME, (4, b"\5\0\0\0")), None),
        (message(NAME, QUEUES, state=7), None),
    ],
)
def test_messages(told: memoryview, expected: UnixListener | None) -> None:
    """A socket without a name or queues, or that does not listen any more, is left out."""
    assert unix_diag._listener(told) == expected


@given(st.binary(max_size=300))
def test_any_message(data: bytes) -> None:
    """Any answer of the kernel is read to its end, and gives sockets or an OSError."""
    try:
        for one in inet_diag._messages(memoryview(data)):
            unix_diag._listener(one)
        unix_diag._listener(memoryview(data))
    except OSError:
        pass


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (b"/run/php/php8.2-fpm.sock\0", "/run/php/php8.2-fpm.sock"),
        (b"\0app", "@app"),
        (b"\0app\0", r"@app\x00"),
        (b"@app\0", r"\x40app"),
        (b"\0", "@"),
        ("/run/caf\u00e9\0".encode(), "/run/caf\u00e9"),
        (b"/a\xffb\0", r"/a\xffb"),
        (b"/a\nb c\\x0a\0", r"/a\x0ab c\x5cx0a"),
        ("/\u202egnp.sock\0".encode(), r"/\xe2\x80\xaegnp.sock"),
        (b"\0" + b"\xff" * 107, "@" + r"\xff" * 107),
        (b"/" + b"a" * 107, "/" + "a" * 107),
    ],
)
def test_written(name: bytes, path: str) -> None:
    """Names are written in the usual form, with unusual bytes as hexadecimal numbers."""
    assert written(name) == path
    assert path.isprintable()
    assert len(path) <= 432


def read_back(path: str) -> bytes:
    """Return the name from which a path was written."""

    def octet(found: re.Match[str]) -> str:
        return bytes([int(found[1], 16)]).decode("latin-1")

    text = path.removeprefix("@")
    # A printable character stands for its own bytes in UTF-8.
    raw = re.sub(r"\\x([0-9a-f]{2})", octet, text.encode().decode("latin-1")).encode("latin-1")
    return b"\0" + raw if path.startswith("@") else raw + b"\0"


@given(st.binary(min_size=1, max_size=107), st.booleans())
@example(b"@", False)
@example(b"\\x40", False)
def test_no_two_names_are_alike(name: bytes, abstract: bool) -> None:
    """The name can be read back from the written path, and a scrape has the path unchanged."""
    whole = b"\0" + name if abstract else name.replace(b"\0", b"/") + b"\0"
    path = written(whole)
    assert read_back(path) == whole
    state = State(unix=UnixQueues({("", path): (1, 2)}, {}, 0))
    text = generate_latest(registry(Collector(state))).decode()
    (value,) = (
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "dtrace_unix_listen_q_length" and sample.labels["path"] == path
    )
    assert value == 1


def made_up(monkeypatch: pytest.MonkeyPatch, *found: UnixListener | Exception) -> None:
    """Let the kernel return some listeners, or an error."""

    def tell(_: object = None) -> Iterator[UnixListener]:
        for one in found:
            if isinstance(one, Exception):
                raise one
            yield one

    monkeypatch.setattr(unix_diag, "listeners", tell)


@pytest.mark.parametrize("name", [b"\xff" * 107, "\u202e".encode() * 35, b"\\" * 107])
def test_very_many_odd_names(name: bytes) -> None:
    """A name takes a bounded time, even if each of its bytes must be escaped."""

    def cost(name: bytes) -> float:
        began = time.thread_time()
        for _ in range(1000):
            written(b"\0" + name)
        return time.thread_time() - began

    assert min(cost(name) for _ in range(5)) < 1000 * 25e-6


def test_patterns_and_the_fullest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths that match a pattern are shown, each with its socket nearest to its capacity."""
    made_up(
        monkeypatch,
        UnixListener("/run/a.sock", 9, 511),
        UnixListener("/run/a.sock", 2, 1),
        UnixListener("/run/a.sock", 0, 0),
        UnixListener("/run/b/c.sock", 1, 8),
        UnixListener("@app-1", 3, 8),
        UnixListener("@other", 4, 8),
    )
    found = UnixSource().read(("/run/*.sock", "@app*"), ())
    assert found.by_path == {
        ("", "/run/a.sock"): (2, 1),
        ("", "/run/b/c.sock"): (1, 8),
        ("", "@app-1"): (3, 8),
    }
    assert found.left_out == 0


def test_no_more_than_so_many(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Thousands of sockets of one user displace no others, and those left out are counted."""
    source = UnixSource()
    mine = [UnixListener(f"/run/z{n}", 1, 8) for n in range(10)]
    made_up(monkeypatch, *mine)
    assert len(source.read(("*",), ()).by_path) == 10
    made_up(monkeypatch, *(UnixListener(f"@a{n}", 0, 8) for n in range(3 * MOST)), *mine)
    for _ in range(2):
        found = source.read(("*",), ())
        assert len(found.by_path) == MOST
        assert found.left_out == 2 * MOST + 10
        assert {("", one.path) for one in mine} <= found.by_path.keys()
    assert [one.getMessage() for one in caplog.records] == ["UNIX sockets left out"]
    made_up(monkeypatch, *mine)
    assert source.read(("*",), ()).left_out == 0


def test_refusals(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """If the kernel refuses, there are no series, and one line in the log."""
    made_up(monkeypatch, OSError(errno.ENOENT, "cannot read sock_diag: No such file"))
    source = UnixSource()
    for _ in range(2):
        assert source.read(("*",), ()) == ({}, {}, 0)
    assert [one.getMessage() for one in caplog.records] == ["cannot read the UNIX sockets"]


@linux
def test_a_namespace_that_refuses(sockets: Sockets) -> None:
    """A network namespace that cannot be read loses only its own sockets."""
    sockets.listen("a.sock")
    with socket.socket(socket.AF_UNIX) as none:
        other = Namespace("4026532201", 1, none)
        found = UnixSource().read((f"{sockets.directory}/*",), (other,))
    assert found.by_path == {("", f"{sockets.directory}/a.sock"): (0, 8)}


_LISTEN = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(4)
clients = [socket.socket(socket.AF_UNIX) for _ in range(2)]
[client.connect(sys.argv[1]) for client in clients]
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def elsewhere(sockets: Sockets) -> Iterator[str]:
    """Return the namespace where another process listens at a.sock, with Q 2 and Qmax 4."""
    unshare = [require("unshare", "util-linux"), "--net"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no network namespace can be made here")
    path = Path(sockets.directory, "a.sock")
    container = subprocess.Popen(
        [*unshare, sys.executable, "-c", _LISTEN, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with container:
        assert container.stdout is not None
        assert container.stdout.readline() == "ready\n"
        path.unlink()
        yield str(Path(f"/proc/{container.pid}/ns/net").stat().st_ino)
        container.kill()


@linux
async def test_service(
    sockets: Sockets, elsewhere: str, fake_dtrace: FakeDTrace, tmp_path: Path
) -> None:
    """With source dtrace, UNIX sockets of all network namespaces are read; a reload stops that.

    The same path in two namespaces is two series.
    """
    path = f"{sockets.directory}/a.sock"
    sockets.connect(sockets.listen("a.sock", 2), 1)
    file = tmp_path / "dtrace_exporter.yml"

    def configure(unix: dict[str, Any]) -> None:
        dtrace = {"command": fake_dtrace(READY, FOREVER), "program": "linux"}
        file.write_text(json.dumps({"source": "dtrace", "dtrace": dtrace, **unix}))

    configure({"unix": {"paths": [f"{sockets.directory}/*"]}})
    service = Service(file, load(file))
    await service.start()
    try:
        await eventually(lambda: service.state.ready)
        await service.state.refresh_unix()
        assert service.state.unix is not None
        assert service.state.unix.by_path == {("", path): (1, 2), (elsewhere, path): (2, 4)}
        assert service.state.unix.left_out == 0
        configure({})
        reading = asyncio.ensure_future(service.state.refresh_unix())
        await service.reload()
        await reading
        assert service.state.unix is None
        assert service.state.refresh_unix is unchanged
    finally:
        async with asyncio.timeout(30):
            await service.stop()


@linux
def test_scrape(sockets: Sockets) -> None:
    """A scrape has a socket's current Q and Qmax, and the capacity of its queue."""
    listener = sockets.listen("a.sock", 2)
    path = f"{sockets.directory}/a.sock"
    config = {"source": "sock_diag", "unix": {"paths": [f"{sockets.directory}/*.sock"]}}

    def series() -> dict[str, float]:
        _, text = exporter.get("/metrics")
        return {
            sample.name.removeprefix("dtrace_unix_listen_"): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels == {"path": path, "netns": ""}
        }

    with Exporter(config) as exporter:
        exporter.wait_ready()
        assert series() == {"q_length": 0, "q_limit": 2, "q_capacity": 3}
        sockets.connect(listener, 9)
        assert series() == {"q_length": 3, "q_limit": 2, "q_capacity": 3}
        _, text = exporter.get("/metrics?name[]=dtrace_unix_listen_left_out")
        assert "\ndtrace_unix_listen_left_out 0.0\n" in text
        listener.close()
        assert series() == {}


@linux
async def test_check(sockets: Sockets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command check says how many paths match, and which pattern matches none."""
    sockets.listen("a.sock")
    patterns = [f"{sockets.directory}/*", "/nobody/listens/here"]
    file = tmp_path / "dtrace_exporter.yml"
    file.write_text(json.dumps({"source": "sock_diag", "unix": {"paths": patterns}}))
    out = io.StringIO()
    assert await check.check(load(file), out, quiet=True) == 0
    assert "Q and Qmax of UNIX sockets with 1 paths" in out.getvalue()
    assert "no UNIX socket listens at /nobody/listens/here" in " ".join(out.getvalue().split())
    made_up(monkeypatch, OSError(errno.ENOENT, "cannot read sock_diag: No such file"))
    out = io.StringIO()
    assert await check.check(load(file), out, quiet=True) == 0
    assert "its module unix_diag" in " ".join(out.getvalue().split())
