"""The connect()s that UNIX sockets refuse: rows, counters, and the session that counts them."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lab.waiting import eventually

from dtrace_exporter import namespaces, unix_drops
from dtrace_exporter.collector import Collector
from dtrace_exporter.config import Config, DTraceConfig, HostConfig, UnixConfig, load
from dtrace_exporter.limits import LimitError
from dtrace_exporter.listeners import ListenerTable, SessionId
from dtrace_exporter.service import Service
from dtrace_exporter.state import SessionStatus, State, UnixQueues
from dtrace_exporter.tracing import exactness, plan, program
from dtrace_exporter.tracing.plan import Plan
from dtrace_exporter.tracing.rows import Reader, RowError, Unattributed, UnixRefused
from dtrace_exporter.tracing.session import Session
from dtrace_exporter.tracing.tally import Tally
from dtrace_exporter.unix_drops import UnixDrops
from dtrace_exporter.watched import Watched
from fake_steps import FOREVER, FakeDTrace
from linux_rows import unix_refused

UNIX = SessionId("", "unix")
NAME = "dtrace_unix_listen_drops_total"
SOCKET = b"/run/a.sock\0"
LONG = b"/run/" + b"l" * 60 + b"\0"
LONGEST = b"/" + b"x" * 107 + b"\0"
GONE = f"unix 0 0 0 {'0' * 80}"
PREEMPT_DYNAMIC = "#1 SMP PREEMPT_DYNAMIC Debian 6.12.9-1"


def read(reader: Reader, *lines: str) -> list[Any]:
    """Return the records of lines that have any."""
    return [record for line in lines if (record := reader.read(line))]


@given(st.binary(min_size=1, max_size=109), st.integers(1, 2**62), st.integers(1, 2**32 - 1))
@example(SOCKET, 1, 1)
@example(LONGEST, 1, 1)
@example(b"\0abstract" + b"\0" * 99, 1, 1)
def test_names_of_all_lengths(name: bytes, events: int, inode: int) -> None:
    """Whatever a name consists of, the rows have all of it and nothing behind it."""
    rows = unix_refused(name, events, inode=inode, cookie=7)
    assert read(Reader(), "set 5", *rows) == [UnixRefused(7, name, events)]


def test_rows_are_cumulative() -> None:
    """What a row adds is what it has grown by, in each of two sets, and after one was emptied."""
    reader = Reader()
    assert read(reader, "set 5", *unix_refused(LONG, 3)) == [UnixRefused(1, LONG, 3)]
    assert read(reader, "set 6", *unix_refused(LONG, 0)) == [UnixRefused(1, LONG, 0)]
    assert read(reader, "set 5", *unix_refused(LONG, 3)) == []
    assert read(reader, "set 6", *unix_refused(LONG, 4)) == [UnixRefused(1, LONG, 4)]
    assert read(reader, "set 9", *unix_refused(LONG, 2)) == [UnixRefused(1, LONG, 2)]
    assert read(reader, "set 9", f"{GONE} 2") == [Unattributed(2)]
    assert read(reader, "set 9", f"{GONE} 5") == [Unattributed(3)]


def test_the_end_of_a_name_comes_late() -> None:
    """A name whose end is missing is counted once that has come, and not taken for a short one."""
    *ends, row = unix_refused(LONGEST, 3)
    assert len(ends) == 2
    for missing in ends:
        reader = Reader()
        there = [end for end in ends if end != missing]
        assert read(reader, "set 5", *there, row, "set 6", "set 5", row) == []
        assert read(reader, missing, row) == [UnixRefused(1, LONGEST, 3)]
    # The inode of a set that is gone says nothing: another socket may have it by now.
    reader = Reader()
    assert len(read(reader, "set 5", *ends, row)) == 1
    assert read(reader, "set 6", "set 7", "set 8", row) == []
    assert not any(reader.held)


@pytest.mark.parametrize(
    "line",
    [
        f"unix 1 5 14 {'0' * 80}",
        f"unix 1 5 14 {'0' * 79} 1",
        f"unix 1 5 14 {'0' * 82} 1",
        f"unix 1 5 14 {'0' * 79}g 1",
        f"unix 1 5 14 {'0' * 79}A 1",
        f"unix 1 5 2 {'0' * 80} 1",
        f"unix 1 5 112 {'0' * 80} 1",
        f"unix 1 5 -1 {'0' * 80} 1",
        f"unix x 5 14 {'0' * 80} 1",
        f"unix 1 5 14 {'0' * 80} 1 1",
        f"more 5 0 {'0' * 96} 1",
        f"more 5 3 {'0' * 96} 1",
        f"more 5 1 {'0' * 80} 1",
        f"more 5 {'0' * 96} 1",
    ],
)
def test_not_rows(line: str) -> None:
    """Rows with too few words or bytes, too many, or others than hexadecimal ones are errors."""
    reader = Reader()
    reader.read("set 5")
    with pytest.raises(RowError):
        reader.read(line)


def test_no_more_rows_than_so_many() -> None:
    """Names are no way round the limit of rows."""
    reader = Reader(most=2)
    read(reader, "set 5", *unix_refused(LONG, 1))
    for line in unix_refused(LONG, 1, inode=6):
        with pytest.raises(LimitError, match="rows"):
            reader.read(line)
    assert read(reader, *unix_refused(LONG, 4)) == [UnixRefused(1, LONG, 3)]


@pytest.fixture
def table() -> ListenerTable:
    """Return a table whose UNIX sockets in /run are wanted, and those that begin with @app."""
    table = ListenerTable()
    table.watch(UNIX, Watched(()))
    table.unix_drops.want(("/run/*", "@app*"))
    return table


def fed(table: ListenerTable, *lines: str, host: str = "") -> list[Any]:
    """Give lines to a new Tally of a session, and return what the session has to know."""
    session = SessionId(host, "unix")
    table.watch(session, Watched(()))
    tally = Tally(table, session)
    return [record for line in ("ready 5 1", "set 5", *lines) if (record := tally.feed(line))][1:]


def test_only_what_is_wanted_counts(table: ListenerTable) -> None:
    """What matches is counted by namespace and path, whichever of its sockets it was."""
    rows = [
        *unix_refused(SOCKET, 3, inode=5),
        *unix_refused(SOCKET, 4, inode=6),
        *unix_refused(SOCKET, 9, inode=7, cookie=2),
        *unix_refused(b"\0app\0", 2, inode=8),
        *unix_refused(b"/tmp/other\0", 2, inode=9),
    ]
    assert fed(table, *rows, f"{GONE} 2") == [Unattributed(2)]
    drops = table.unix_drops
    assert [drops.of(1, "/run/a.sock"), drops.of(2, "/run/a.sock")] == [7, 9]
    assert [drops.of(1, r"@app\x00"), drops.of(1, "/tmp/other"), drops.of(3, "/run/a.sock")] == [
        *(2, 0, 0)
    ]


def test_another_host_tells_nothing(table: ListenerTable) -> None:
    """What the dtrace(1) of another host says of UNIX sockets moves no counter of this one."""
    fed(table, *unix_refused(SOCKET, 3), host="far")
    assert table.unix_drops.of(1, "/run/a.sock") == 0


def test_goes_on_when_somebody_listens_again() -> None:
    """A counter outlives its listener until it is forgotten, however often it is looked for."""
    drops = UnixDrops()
    drops.want(["*"])
    a, b = (1, "/a"), (1, "/b")
    drops.count(*a, 3)
    drops.count(*b, 5)
    drops.look({a, b})
    drops.forget_closed(float("inf"))
    drops.look({b})
    drops.look({a, b})
    drops.forget_closed(float("inf"))
    assert (drops.of(*a), drops.of(*b)) == (3, 5)
    drops.look({b})
    drops.forget_closed(0)
    assert drops.of(*a) == 3
    drops.forget_closed(float("inf"))
    assert (drops.of(*a), drops.of(*b)) == (0, 5)


def test_no_more_paths_than_so_many(table: ListenerTable) -> None:
    """A user who makes very many listeners takes no place from those that are known and open."""
    drops = table.unix_drops
    drops.most = 3
    drops.want(["*"])
    for path in "abc":
        drops.count(1, path, 1)
    with pytest.raises(LimitError, match="listeners"):
        drops.count(1, "d", 1)
    drops.count(1, "a", 1)
    drops.look({(1, "a"), (1, "c")})
    drops.count(1, "d", 1)
    assert [drops.of(1, path) for path in "abcd"] == [2, 0, 1, 1]
    with pytest.raises(LimitError):
        drops.count(1, "e", 1)


def exported(state: State) -> dict[tuple[str, str], float]:
    """Return the counters of a scrape, by network namespace and path."""
    return {
        (sample.labels["netns"], sample.labels["path"]): sample.value
        for family in Collector(state).collect()
        for sample in family.samples
        if sample.name == NAME
    }


def test_series() -> None:
    """A counter is where Q and Qmax are, from 0 on, but only once a session can count."""
    state = State()
    state.table.unix_drops.want(["*"])
    state.table.unix_drops.count(2, "/a", 3)
    paths = {("", "/a"): (1, 8), ("4026532201", "/a"): (0, 8), ("4026532299", "/a"): (0, 8)}
    state.unix = UnixQueues(paths, {"": 1, "4026532201": 2}, 0)
    status = state.sessions[UNIX] = SessionStatus()
    assert exported(state) == {}
    status.features = {unix_drops.PART: False}
    assert exported(state) == {}
    status.features = {unix_drops.PART: True}
    assert exported(state) == {("", "/a"): 0, ("4026532201", "/a"): 3}
    state.unix = UnixQueues({}, {"": 1}, 0)
    assert exported(state) == {}


@asynccontextmanager
async def running(command: list[str], state: State) -> AsyncIterator[Session]:
    """Run the session of UNIX sockets, and stop it in the end."""
    state.table.watch(UNIX, Watched(()))
    state.table.unix_drops.want(["/run/*"])
    config = DTraceConfig(command=tuple(command), interval=0.1)
    runs = Plan(config, program.load("linux_unix"))
    one = Session(UNIX, runs, state, asyncio.Semaphore(1))
    try:
        yield one
    finally:
        async with asyncio.timeout(30):
            await one.stop()


async def test_session(fake_dtrace: FakeDTrace, tmp_path: Path) -> None:
    """A session counts, says what it does not know whose it is, and goes on after a restart."""
    rows = [f"0 {row}" for row in (*unix_refused(LONG, 3), f"{GONE} 2")]
    steps = [{"ready": "1"}, {"rows": rows}, {"tick": 2}, {"wait": str(tmp_path / "go")}]
    state = State()
    async with running(fake_dtrace({"unix": [*steps, {"exit": 1}]}), state) as one:
        path = LONG.decode().rstrip("\0")
        await eventually(lambda: state.table.unix_drops.of(1, path) == 3)
        await eventually(lambda: one.status.unattributed == {"drops": 2})
        assert one.status.features[unix_drops.PART]
        (tmp_path / "go").touch()
        await eventually(lambda: state.table.unix_drops.of(1, path) == 6)
        await eventually(lambda: one.status.unattributed == {"drops": 4})
        assert one.status.bad_rows == 0


@pytest.mark.parametrize(
    ("refused", "left"),
    [("unix_find_other", set()), ("io_connect", {unix_drops.PART})],
)
async def test_what_a_kernel_lacks(fake_dtrace: FakeDTrace, refused: str, left: set[str]) -> None:
    """A probe that is missing costs its part, and the session is up."""
    steps = {"refuse": f"fbt::{refused}:return"}
    async with running(fake_dtrace(steps), State()) as one:
        await eventually(lambda: one.status.up)
        features = {part for part, there in one.status.features.items() if there}
        assert features - {"exact"} == left
        assert ("drops" in one.status.unattributed) == bool(left)


@pytest.mark.parametrize(
    ("dtrace", "paths", "there"),
    [
        ({}, ("/run/*",), True),
        ({}, (), False),
        ({"command": ("ssh", "far", "dtrace")}, ("/run/*",), False),
        ({"program": "illumos"}, ("/run/*",), False),
    ],
    ids=["wanted", "no paths", "another machine's dtrace", "another kernel"],
)
def test_where_there_is_a_session(
    dtrace: dict[str, Any], paths: tuple[str, ...], there: bool
) -> None:
    """There is a session if paths are wanted and the dtrace(1) is Linux' and of this machine."""
    local = HostConfig(dtrace=DTraceConfig(**{"program": "linux", **dtrace}))
    found = plan.sessions(Config(local=local, unix=UnixConfig(paths)), {})
    assert (UNIX in found) == there


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[str]:
    """Return the path of a UNIX socket that listens."""
    path = str(tmp_path / "a.sock")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path)
        opened.listen()
        yield path


@pytest.mark.skipif(sys.platform != "linux", reason="unix_diag is an interface of Linux")
async def test_service(fake_dtrace: FakeDTrace, tmp_path: Path, listening: str) -> None:
    """With unix.paths and DTrace there is a session, and a counter; a reload ends both."""
    with socket.socket(socket.AF_UNIX) as here:
        own = namespaces.cookie(here)
    if own is None:
        pytest.skip("this kernel does not tell the cookie of a network namespace")
    rows = [f"0 {row}" for row in unix_refused(os.fsencode(listening) + b"\0", 3, cookie=own)]
    command = fake_dtrace({"unix": [{"ready": "1"}, {"rows": rows}, FOREVER]})
    file = tmp_path / "dtrace_exporter.yml"

    def configure(source: str, unix: bool) -> None:
        settings: dict[str, Any] = {"source": source, "dtrace": {"command": command}}
        settings["dtrace"] |= {"program": "linux", "interval": "100ms"}
        settings |= {"unix": {"paths": [f"{tmp_path}/*"]}} if unix else {}
        file.write_text(json.dumps(settings))

    async def scrape() -> dict[tuple[str, str], float]:
        await service.state.refresh_unix()
        return exported(service.state)

    async def wait(expected: float) -> None:
        async with asyncio.timeout(30):
            while (await scrape()).get(("", listening)) != expected:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    configure("dtrace", unix=True)
    service = Service(file, load(file))
    await service.start()
    try:
        await wait(3)
        assert service.state.sessions[UNIX].up
        configure("dtrace", unix=False)
        await service.reload()
        assert UNIX not in service.state.sessions
        assert await scrape() == {}
        configure("dtrace", unix=True)
        await service.reload()
        # Another run of the session counts from the beginning; the counter does not fall.
        await wait(6)
        configure("sock_diag", unix=True)
        await service.reload()
        assert UNIX not in service.state.sessions
        assert await scrape() == {}
    finally:
        async with asyncio.timeout(60):
            await service.stop()


@pytest.mark.parametrize(
    ("version", "debugfs", "cmdline", "words"),
    [
        (PREEMPT_DYNAMIC, "none (voluntary) full \n", "preempt=full", ""),
        (PREEMPT_DYNAMIC, "(none) voluntary full \n", "", ""),
        (PREEMPT_DYNAMIC, "none voluntary (full) lazy \n", "", "preempt=full"),
        (PREEMPT_DYNAMIC, "full (lazy) \n", "", "preempt=lazy"),
        (PREEMPT_DYNAMIC, None, "ro preempt=full quiet", "preempt=full"),
        (PREEMPT_DYNAMIC, None, "ro preempt=voluntary", ""),
        (PREEMPT_DYNAMIC, None, "ro quiet", "not known"),
        ("#1 SMP PREEMPT Thu", None, "", "PREEMPT"),
        ("#1 SMP Thu", None, "", ""),
    ],
)
def test_preemption(
    version: str,
    debugfs: str | None,
    cmdline: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel that may preempt a process within it makes the counter inexact, and no other."""
    for name, text in (("PREEMPT", debugfs), ("CMDLINE", cmdline), ("REALTIME", None)):
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(exactness, name, path)
    monkeypatch.setattr(exactness, "KPROBES", tmp_path / "none")
    monkeypatch.setattr(platform, "version", lambda: version)
    why = exactness.why_not(7, in_processes=True)
    assert (words in why, bool(why)) == (True, bool(words))
    assert exactness.why_not(7) == ""
