"""A session over a fake dtrace(1): up, down, up again, and no process is ever left."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import re
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lab.waiting import eventually

import zone_rows
from dtrace_exporter import namespaces, turns
from dtrace_exporter.config import DTraceConfig
from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.limits import Limits
from dtrace_exporter.listeners import Identity, Listener, SessionId
from dtrace_exporter.sockets import Queues
from dtrace_exporter.state import State
from dtrace_exporter.tracing import heartbeat, rendering, supervision
from dtrace_exporter.tracing.lines import MAX_LINE
from dtrace_exporter.tracing.plan import ALL, Plan
from dtrace_exporter.tracing.program import load
from dtrace_exporter.tracing.session import Session
from dtrace_exporter.watched import Watched, named
from fake_steps import FOREVER, READY, FakeDTrace
from linux_rows import ESTABLISHED, Q_FULL, address, counted, syns, told

pytestmark = pytest.mark.usefixtures("no_child_left")

SSH = SessionId("", "port-22")
WEB = SessionId("", "port-80")
# These are not those of a network namespace of this machine.
NO_TOTALS = {"drops": 0, "established": 0}
COUNTERS = {"LISTENOVERFLOWS": 19, "LISTENDROPS": 20, "TCPREQQFULLDROP": 75}
REFUSAL = "Failed to enable fbt::tcp_conn_request:entry: Operation not supported"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all delays of a session short."""
    monkeypatch.setattr(supervision, "_FIRST_DELAY", 0.05)
    monkeypatch.setattr(supervision, "_STOP_SECONDS", 0.5)
    monkeypatch.setattr(supervision, "_DRAIN_SECONDS", 0.5)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a silent session end soon."""
    real = rendering.window
    monkeypatch.setattr(rendering, "window", lambda interval: replace(real(interval), patience=1.0))


async def a_tick(one: Session) -> None:
    """Wait until a session has another heartbeat."""
    before = one.status.last_record
    await eventually(lambda: one.status.last_record != before)


def is_there(pid: int) -> bool:
    """Tell whether a process exists."""
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@asynccontextmanager
async def running(
    command: Sequence[str],
    id: SessionId = SSH,  # noqa: A002
    state: State | None = None,
    *,
    name: str | None = "linux",
    counters: Mapping[str, int] = COUNTERS,
    **dtrace: Any,
) -> AsyncIterator[Session]:
    """Run a session of one port, and check that it stops quickly at the end.

    It runs the program of that name, or the one that its kernel needs if there is no name.
    """
    state = state or State()
    is_calls = id.name == "calls"
    port = 0 if is_calls else int(id.name.removeprefix("port-"))
    state.table.watch(id, Watched(()) if is_calls else named({port: "name"}))
    config = DTraceConfig(command=tuple(command), interval=0.1, **{"handshake": True, **dtrace})
    plan = Plan(config, load(name) if name else None, port, counters)
    one = Session(id, plan, state, asyncio.Semaphore(1))
    try:
        yield one
    finally:
        pid = one.status.pid
        async with asyncio.timeout(5):
            await one.stop()
        assert (one.status.up, one.status.pid, one.status.reason) == (False, None, "stopped")
        assert pid is None or not is_there(pid)


def listener(one: Session) -> Listener:
    """Return the session's only listener, as a scrape would see it."""
    (found,) = one._state.table
    return found


def logged(caplog: pytest.LogCaptureFixture, message: str) -> list[dict[str, Any]]:
    """Return the details of the events with a message."""
    return [vars(r)["fields"] for r in caplog.records if r.getMessage() == message]


async def test_up(fake_dtrace: FakeDTrace, tmp_path: Path) -> None:
    """A session is up after the ready row, and counts what the rows say."""
    saved = tmp_path / "start.json"
    steps = [
        {"save": str(saved)},
        READY,
        {"print": [*syns(22, 3), counted(22, 4, ESTABLISHED)]},
    ]
    async with running(fake_dtrace(*steps, FOREVER), options={"aggsize": "4m"}) as one:
        await eventually(lambda: listener(one).established)
        assert one.settled.is_set()
        assert (one.status.up, one.status.reason) == (True, "")
        assert one.status.last_record is not None
        assert all(one.status.features.values())
        assert {"syn_drops", "exact", *load("linux").parts} == set(one.status.features)
        assert (listener(one).syns, listener(one).established) == (3, 4)
        assert listener(one).queues
        start = json.loads(saved.read_text(encoding="utf-8"))
        assert start["pid"] == one.status.pid
        assert start["argv"] == ["-x", "aggsize=4m", "-s", "/dev/stdin"]
        assert start["program"] == one.plan.render(load("linux"), set())
    assert listener(one).syns == 3
    assert not listener(one).queues


async def test_what_end_prints_is_counted(fake_dtrace: FakeDTrace) -> None:
    """After SIGTERM the program prints its last counts, and they are counted."""
    async with running(
        fake_dtrace({"rows": [f"0 {row}" for row in syns(22, 7)[2:]]}, READY)
    ) as one:
        await eventually(lambda: one.status.up)
        assert listener(one).syns == 0
    assert listener(one).syns == 7
    assert one.status.restarts == 0


async def test_zones(fake_dtrace: FakeDTrace) -> None:
    """A program with zones names the zone of each listener, and gives Q0's limit."""
    rows = [
        zone_rows.told(22, q0=1, q=2, syn=1, q0max=1032),
        zone_rows.told(22, socket=1, zone="web"),
        *(zone_rows.syns(22, 2, q=2), zone_rows.opened(22, 2)),
        f"syn {zone_rows.number(22, socket=1):x} 1 4",
        f"drop {zone_rows.number(22, socket=1):x} 1 1",
        f"drop {zone_rows.number(22, socket=1):x} 3 2",
    ]
    steps = [{"rows": rows}, {"ready": "global"}, FOREVER]
    async with running(fake_dtrace(*steps), name="illumos") as one:
        await eventually(lambda: one.status.last_record and len(one._state.table) == 2)
        found = {each.identity: each for each in one._state.table}
        zones = {place: Identity("", place, "*", 22) for place in ("global", "web")}
        assert found.keys() == set(zones.values())
        home = found[zones["global"]]
        await eventually(lambda: home.queues == Queues(3, 2, 1032, 8))
        assert [found[zones[place]].syns for place in zones] == [3, 4]
        assert found[zones["web"]].drops == {"q_full": 1, "q0_evicted": 2}
        assert one.status.bad_rows == 0
        capabilities = one._state.table.capabilities(found[zones["web"]])
        assert (capabilities.place_label, capabilities.own_place) == ("zone", "global")
        assert set(capabilities.reasons) == {"q_full", "q0_full", "q0_evicted"}


ACCEPTS = ("tcp_accept", "tcp_wput_accept")


@pytest.mark.parametrize("name", ["illumos_calls", "solaris10_calls", "linux_calls"])
async def test_calls_of_each_family(name: str, fake_dtrace: FakeDTrace) -> None:
    """Gauges on Linux disappear while the second session is down, because it alone sees closes."""
    state = State()
    state.table.watch(SSH, named({22: "name"}))
    ssh = state.table.listener(SSH, "", "*", 22)
    refused = [{"refuse": f"fbt:ip:{function}:entry"} for function in ACCEPTS]
    sockets = state.table.sockets("")
    assert sockets.listening(1, 5, ssh)
    async with running(
        fake_dtrace(*refused, {"calls": [{"ready": "global"}, FOREVER]}),
        SessionId("", "calls"),
        state,
        name=name,
    ) as one:
        await eventually(lambda: one.status.up)
        is_linux = name == "linux_calls"
        assert bool(ssh.sockets) != is_linux
        # A part that cannot run is left out, and the session is up without it.
        assert one.status.features == dict.fromkeys(load(name).parts, is_linux)
        assert "exact" not in one.status.features
    assert bool(ssh.sockets) != is_linux


async def test_jails(fake_dtrace: FakeDTrace) -> None:
    """FreeBSD's listeners are in jails, the host's own is unnamed, and they have Q but no Q0."""
    who = f"{zone_rows.number(22):x}"
    rows = [
        f"listener {who} 1 0 0.0.0.0 22 - 2 0 1",
        f"listener {zone_rows.number(22, socket=1):x} 1 www.blue 0.0.0.0 22 - 0 8 0",
        *(f"syn {who} 2 2", f"established {who} 3", zone_rows.left(22, 1, us=3)),
        *("evicted 0 0.0.0.0 22 1", f"drop {who} 4 5", f"drop {who} 5 2"),
        f"limit {zone_rows.address(22):x} 1 0 200",
    ]
    steps = [{"rows": rows}, {"ready": "0"}, FOREVER]
    async with running(fake_dtrace(*steps), name="freebsd") as one:
        await eventually(lambda: one.status.last_record and len(one._state.table) == 2)
        found = {each.identity.place: each for each in one._state.table}
        assert found.keys() == {"", "www.blue"}
        home = found[""]
        await eventually(lambda: home.queues == Queues(None, 4, None, 0, 200))
        assert (home.syns, home.established, home.accepts) == (3, 3, 1)
        assert home.drops == {"q0_evicted": 1, "q_full_ack": 5, "other": 2}
        assert one.status.bad_rows == 0
        capabilities = one._state.table.capabilities(home)
        assert (capabilities.place_label, capabilities.own_place) == ("jail", "")
        assert capabilities.q_capacity.of(0) == 1
        assert not capabilities.opened
        assert capabilities.departures


def test_either_of_two_parts() -> None:
    """A part that needs one of two goes only with both: FreeBSD 13 has one, FreeBSD 14 another."""
    family = load("freebsd")
    assert family.with_dependents({"enqueue"}) == {"enqueue"}
    assert family.with_dependents({"newconn"}) == {"newconn"}
    both = family.with_dependents({"enqueue", "newconn"})
    assert {"established", "ack_drops", "accept_wait"} <= both
    assert {"accepts", "jails", "open_close", "evictions"}.isdisjoint(both)


async def test_counts_that_cannot_be(
    fake_dtrace: FakeDTrace, caplog: pytest.LogCaptureFixture
) -> None:
    """If a queue's length becomes negative, the row is bad and the queue is no longer known."""
    steps = [{"rows": [zone_rows.told(22), zone_rows.left(22, 2)]}, {"ready": "global"}, FOREVER]

    async with running(fake_dtrace(*steps), name="illumos") as one:
        await eventually(lambda: one.status.bad_rows)
        assert one.status.up
        assert listener(one).accepts == 2
        assert not listener(one).queues
    assert logged(caplog, "bad row")[0]["why"] == "the queues of * port 22 come to 0 and -2"


async def test_limits(fake_dtrace: FakeDTrace, caplog: pytest.LogCaptureFixture) -> None:
    """Refusals at each limit are counted and logged once per run, and the session stays up."""
    rows = [told(22, socket=socket, place=place) for place in (1, 2, 3) for socket in (0, 1)]
    state = State()
    state.table.limit("", Limits(sockets=1, places=1))

    steps = [READY, {"print": ["set 1", *rows, counted(22, 4)]}]
    async with running(fake_dtrace(*steps, FOREVER), state=state) as one:
        await eventually(lambda: sum(found.syns for found in state.table) == 4)
        assert one.status.refused == {"listeners": 0, "sockets": 1, "places": 4, "rows": 0}
        assert (one.status.up, one.status.bad_rows) == (True, 0)
    assert [each["why"] for each in logged(caplog, "limit reached")] == [
        "more sockets than dtrace.limits.sockets allows",
        "more places than dtrace.limits.places allows",
    ]


async def test_others_have_their_turn(
    fake_dtrace: FakeDTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many rows or messages at once are processed in many steps, so that others get their turn."""
    monkeypatch.setattr(turns, "_SECONDS", 0.0)
    steps = [READY, {"print": ["x"] * 1000}, {"stderr": ["x"] * 1000}, FOREVER]
    async with running(fake_dtrace(*steps)) as one:
        seen = set()
        while one.status.bad_rows < 1000:
            seen.add(one.status.bad_rows)
            await asyncio.sleep(0)
        assert len(seen) > 500


async def test_rows_that_were_lost(fake_dtrace: FakeDTrace, tmp_path: Path) -> None:
    """After a loss, the queues of a zone's listeners are unknown until a new row has them."""
    go = tmp_path / "go"
    steps = [
        *({"rows": [zone_rows.told(22, q=1)]}, {"ready": "global"}, {"tick": 2}),
        *({"stderr": "dtrace: 5 aggregation drops on CPU 0"}, {"tick": 2}, {"wait": str(go)}),
        *({"tick": 3}, {"rows": [zone_rows.told(22, 2, time="{now}", q=3)]}),
    ]
    async with running(fake_dtrace(*steps, FOREVER), name="illumos") as one:
        await eventually(lambda: listener(one).queues == Queues(0, 1, None, 8))
        await eventually(lambda: listener(one).queues == Queues(None, None, None, 8))
        assert one.status.lost["aggregation"] == 5
        go.touch()
        await eventually(lambda: listener(one).queues == Queues(0, 3, None, 8))


async def test_no_room_for_the_program(fake_dtrace: FakeDTrace) -> None:
    """If a program is too large for the kernel, its spare parts are left out."""
    why = "DIF program exceeds maximum program size"
    lacks = [{"lacks": [f"only {part}", why]} for part in ("tli_accepts", "streams_accepts")]
    steps = [*lacks, {"ready": "global"}, FOREVER]
    async with running(fake_dtrace(*steps), name="illumos") as one:
        await eventually(lambda: one.status.up)
        assert one.left_out.keys() == {"tli_accepts", "streams_accepts"}
        assert all(why in reason for reason in one.left_out.values())
        assert one.status.restarts == 0


@pytest.mark.usefixtures("_impatient")
async def test_heartbeat_missing(fake_dtrace: FakeDTrace, caplog: pytest.LogCaptureFixture) -> None:
    """A dtrace(1) whose heartbeat stops is killed and restarted."""
    async with running(fake_dtrace(READY, {"tick": 2})) as one:
        await eventually(lambda: one.status.up)
        pid = one.status.pid
        assert pid is not None
        await eventually(lambda: one.status.restarts)
        assert not is_there(pid)
        assert logged(caplog, "session ended")[0]["why"] == "no heartbeat for 1 s"


@pytest.mark.usefixtures("_impatient")
async def test_what_a_late_one_has_counted(fake_dtrace: FakeDTrace) -> None:
    """A dtrace(1) without a heartbeat gets SIGTERM first, and its last rows count."""
    steps = [{"rows": [f"0 {told(22)}", f"0 {counted(22, 7)}"]}, READY]
    async with running(fake_dtrace(*steps)) as one:
        await eventually(lambda: one.status.restarts)
        assert listener(one).syns >= 7


async def test_time_in_which_nobody_counts(fake_dtrace: FakeDTrace) -> None:
    """The time between two processes, from last row to first row, is exported as uncounted."""
    async with running(fake_dtrace(READY, FOREVER)) as one:
        await eventually(lambda: one.status.up)
        assert one.status.uncounted == 0
        assert one.status.pid is not None
        os.kill(one.status.pid, signal.SIGKILL)
        await eventually(lambda: one.status.restarts and one.status.up)
        assert one.status.uncounted > 0


async def test_a_host_that_starts_anew(fake_dtrace: FakeDTrace, tmp_path: Path) -> None:
    """A socket that closed before its host's clock started again is seen again."""
    first = [{"print": f"closed {address(22):x} 900000000000000000"}, {"tick": 1}, {"exit": 1}]
    once = {"once": {"mark": str(tmp_path / "mark"), "steps": [READY, *first]}}
    steps = [once, READY, {"rows": [f"0 {told(22)}"]}, FOREVER]
    async with running(fake_dtrace(*steps)) as one:
        await eventually(lambda: one.status.restarts == 1 and one.status.up)
        await eventually(lambda: listener(one).sockets)


async def test_compare(fake_dtrace: FakeDTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own numbers of listeners are used if the rows are of this network namespace."""
    monkeypatch.setattr(namespaces, "own", lambda: "1")
    sample = ListeningSocket("*", 22, 3, 8, None, 77)
    async with running(fake_dtrace(READY, FOREVER)) as one:
        await eventually(lambda: one.status.up)
        await one.compare([sample, sample._replace(port=80)], 5, NO_TOTALS)
        assert listener(one).queues == Queues(None, 3, None, 8)
        assert [one.identity.port for one in one._state.table] == [22]
        # A session of one port cannot be compared with the kernel's totals.
        assert one.status.unattributed == {}


async def test_compare_ends_with_the_session(
    fake_dtrace: FakeDTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a reload removes a session during a comparison, the comparison ends without an error."""
    many = [ListeningSocket("*", 22, 3, 8, None, 77)] * 200_000
    monkeypatch.setattr(namespaces, "own", lambda: "1")
    async with running(fake_dtrace(READY, FOREVER)) as one:
        await eventually(lambda: one.status.up)
        comparing = asyncio.create_task(one.compare(many, 5, NO_TOTALS))
        await asyncio.sleep(0)
        assert not comparing.done()
        one._down("stopped")
        one._state.table.unwatch(one.id)
        await comparing
        assert not one._state.table


async def test_compare_drops(fake_dtrace: FakeDTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drops of a socket that its session did not count are unattributed, and only those."""
    monkeypatch.setattr(namespaces, "own", lambda: "1")
    rows = [f"0 {told(22)}", f"0 {counted(22, 3, Q_FULL, qmax=8)}"]
    async with running(fake_dtrace({"rows": rows}, READY, FOREVER)) as one:
        await eventually(lambda: listener(one).drops == {"q_full": 3})
        for discarded, dropped in ((7, 7), (9, 9), (50, 9)):
            for _ in range(6):
                await a_tick(one)
                sample = ListeningSocket("*", 22, 3, 8, discarded, 77)
                await one.compare([sample], 5, {"drops": dropped, "established": 0})
        assert one.status.unattributed == {"drops": 2}


async def test_compare_after_a_reload(
    fake_dtrace: FakeDTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drops of a listener from before a reload that adds it are not unattributed."""
    monkeypatch.setattr(namespaces, "own", lambda: "1")
    samples = [ListeningSocket("*", port, 3, 8, 40, port) for port in (22, 80)]
    async with running(fake_dtrace(READY, FOREVER)) as one:
        await eventually(lambda: one.status.up)
        for dropped, ports in ((70, [22]), (90, [22, 80])):
            one._state.table.watch(SSH, named(dict.fromkeys(ports, "")))
            samples[1] = samples[1]._replace(drops=dropped - 40)
            for _ in range(6):
                await a_tick(one)
                await one.compare(samples, 5, {"drops": dropped, "established": 0})
        assert one.status.unattributed == {"drops": 0}


async def test_compare_totals(fake_dtrace: FakeDTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session of all listeners exports what the kernel counted and it did not, by kind."""
    monkeypatch.setattr(namespaces, "own", lambda: "1")
    id_ = SessionId("", ALL)
    state = State()
    state.table.watch(id_, Watched())
    config = DTraceConfig(command=tuple(fake_dtrace(READY, FOREVER)), interval=0.1)
    plan = Plan(config, load("linux"), 0, COUNTERS)
    one = Session(id_, plan, state, asyncio.Semaphore(1))
    try:
        await eventually(lambda: one.status.up)
        for drops in (50, 52):
            for _ in range(6):
                await a_tick(one)
                await one.compare([], 5, {"drops": drops, "established": 9})
        assert one.status.unattributed == {"drops": 2, "established": 0}
    finally:
        await one.stop()


async def test_compare_another_place(
    fake_dtrace: FakeDTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the exporter is in another network namespace, its kernel's numbers are not used."""
    monkeypatch.setattr(namespaces, "own", lambda: "2")
    async with running(fake_dtrace(READY, FOREVER)) as one:
        await eventually(lambda: one.status.up)
        await one.compare([ListeningSocket("*", 22, 3, 8, None, 77)], 5, NO_TOTALS)
        assert listener(one).queues is None


@pytest.mark.usefixtures("_impatient")
async def test_rows_come_ever_later(
    fake_dtrace: FakeDTrace, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A session ends if each heartbeat is older than the last, as over a slow link.

    The clocks of the two hosts may differ by years.
    """
    file = tmp_path / "go"
    ticks = [f"tick {9 * 10**17}", f"tick {9 * 10**17 - 5 * 10**8}"]
    late = f"tick {9 * 10**17 - 2 * 10**9}"
    steps = [
        READY,
        {"print": [*ticks, *syns(22, 3)[1:]]},
        {"wait": str(file)},
        {"print": late},
        FOREVER,
    ]
    async with running(fake_dtrace(*steps)) as one:
        await eventually(lambda: listener(one).syns)
        assert one.status.up
        file.touch()
        await eventually(lambda: one.status.restarts)
    (first, *_) = logged(caplog, "session ended")
    assert re.fullmatch(r"rows come [23] s late", first["why"])


async def test_greeting_is_no_reason(
    fake_dtrace: FakeDTrace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A message before the rows, such as a remote host's greeting, is not the reason for an end."""
    caplog.set_level(logging.DEBUG)
    heard, seen = tmp_path / "heard", tmp_path / "seen"
    greeting = [{"stderr": "Welcome"}, {"wait": str(heard)}]
    async with running(fake_dtrace(*greeting, READY, {"wait": str(seen)}, {"exit": 5})) as one:
        await eventually(lambda: logged(caplog, "dtrace says"))
        heard.touch()
        await eventually(lambda: one.status.up)
        seen.touch()
        await eventually(lambda: not one.status.up)
        assert one.status.reason == "dtrace(1) ended: exit status 5"


@pytest.mark.usefixtures("_impatient")
async def test_rows_without_heartbeat_are_no_life(caplog: pytest.LogCaptureFixture) -> None:
    """A process that prints endlessly but without a heartbeat is ended."""
    async with running(["sh", "-c", "echo ready 5 1; exec yes"]) as one:
        await eventually(lambda: one.status.restarts)
        assert logged(caplog, "session ended")[0]["why"] == "no heartbeat for 1 s"


async def test_restart_after_kill(fake_dtrace: FakeDTrace) -> None:
    """After kill -9, a session goes down, comes up and counts on; another one is unaffected."""
    state = State()
    command = fake_dtrace(READY, {"print": syns(22, 5)}, FOREVER)
    async with running(command, SSH, state) as one, running(fake_dtrace(), WEB, state) as two:
        ssh = state.table.listener(SSH, "", "*", 22)
        await eventually(lambda: ssh.syns == 5 and two.status.up)
        first, other = one.status.pid, two.status.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: not one.status.up)
        assert "SIGKILL" in one.status.reason
        assert not ssh.sockets
        await eventually(lambda: one.status.up)
        assert one.status.pid != first
        assert one.status.restarts == 1
        assert ssh.syns >= 5
        await eventually(lambda: ssh.syns == 10)
        assert (two.status.pid, two.status.restarts, two.status.up) == (other, 0, True)


async def test_back_off(fake_dtrace: FakeDTrace, caplog: pytest.LogCaptureFixture) -> None:
    """After each failure the next attempt waits longer, up to a limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervision, "_LONGEST_DELAY", 0.2)
        patch.setattr("random.uniform", lambda *_: 1.0)
        async with running(fake_dtrace({"exit": 3})) as one:
            await eventually(lambda: one.status.restarts >= 4)
            assert one.status.reason == "dtrace(1) ended: exit status 3"
    waits = [event["restart_in"] for event in logged(caplog, "session ended")]
    assert waits[:4] == ["0.1s", "0.1s", "0.2s", "0.2s"]


async def test_back_off_begins_again(
    fake_dtrace: FakeDTrace, caplog: pytest.LogCaptureFixture
) -> None:
    """After a good run that is long enough, the delay starts again from the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervision, "_GOOD_RUN_SECONDS", 0.0)
        patch.setattr("random.uniform", lambda *_: 1.0)
        async with running(fake_dtrace({"exit": 3})) as one:
            await eventually(lambda: one.status.restarts >= 4)
    waits = [event["restart_in"] for event in logged(caplog, "session ended")]
    assert waits[:4] == ["0.1s"] * 4


@pytest.mark.parametrize(
    ("probe", "gone"),
    [
        ("fbt::tcp_v*_syn_recv_sock:return", {"ack_drops"}),
        ("fbt::security_sock_graft:entry", {"accepts", "accept_wait", "mptcp"}),
        ("fbt::tcp_rtx_synack:entry", {"synack_retransmits"}),
        (
            "fbt::inet_csk_complete_hashdance:return",
            {"established", "handshake", "accepts", "accept_wait", "mptcp"},
        ),
    ],
)
async def test_what_the_kernel_lacks(
    probe: str, gone: set[str], fake_dtrace: FakeDTrace, caplog: pytest.LogCaptureFixture
) -> None:
    """A refused optional part costs only itself and the parts that need it, without a restart."""
    async with running(fake_dtrace({"refuse": probe}, READY, FOREVER)) as one:
        await one.settled.wait()
        assert one.status.up
        assert {name for name, enabled in one.status.features.items() if not enabled} == gone
        assert one.status.restarts == 0
        capabilities = one._state.table.capabilities(listener(one))
        assert ("q_full_ack" in capabilities.reasons) == ("ack_drops" not in gone)
        assert capabilities.accepts == ("accepts" not in gone)
        assert capabilities.handshake == ("handshake" not in gone)
        assert capabilities.accept_wait == ("accept_wait" not in gone)
        assert capabilities.synack_retransmits == ("synack_retransmits" not in gone)
    (event,) = logged(caplog, "left out what this kernel cannot do")
    assert event["part"] in gone
    assert probe in event["why"]


@pytest.mark.parametrize("part", ["accept_wait", "handshake"])
async def test_without_a_part(part: str, fake_dtrace: FakeDTrace) -> None:
    """A part that the configuration turns off is left out, and its feature is 0."""
    off: dict[str, Any] = {part: False}
    async with running(fake_dtrace(READY, FOREVER), **off) as one:
        await eventually(lambda: one.status.up)
        features = one.status.features
        assert [name for name in features if not features[name]] == [part]
        assert one.left_out == {part: f"needs dtrace: {{{part}: true}} in the configuration"}


@pytest.mark.parametrize(
    ("name", "counters", "without"),
    [
        ("linux", COUNTERS, set()),
        ("linux", {}, {"syn_drops", "ack_drops"}),
        ("illumos", COUNTERS, set()),
        ("illumos", {}, set()),
    ],
)
async def test_drop_counters_not_known(
    name: str,
    counters: dict[str, int],
    without: set[str],
    fake_dtrace: FakeDTrace,
    tmp_path: Path,
) -> None:
    """If the kernel's drop counters are unknown, only the program that needs them lacks drops.

    The drops are missing from the start, before the session is up.
    """
    saved = tmp_path / "start.json"
    steps = [{"save": str(saved)}, READY, FOREVER]
    async with running(fake_dtrace(*steps), name=name, counters=counters) as one:
        assert one.left_out.keys() == without
        assert bool(one._state.table.capabilities(listener(one)).reasons) == (not without)
        await eventually(lambda: one.status.up)
        off = {part for part, enabled in one.status.features.items() if not enabled}
        assert off == without
        assert bool(one._state.table.capabilities(listener(one)).reasons) == (not without)
        start = json.loads(saved.read_text(encoding="utf-8"))
        assert start["program"] == one.plan.render(load(name), without)


@pytest.mark.parametrize(
    ("functions", "name", "place_label", "home"),
    [
        ([["ip", "tcp_input_listener"]], "illumos", "zone", "global"),
        ([["vmlinux", "tcp_conn_request"]], "linux", "netns", ""),
        ([["kernel", "syncache_add"]], "freebsd", "jail", ""),
    ],
)
@pytest.mark.parametrize("host", ["", "far"])
async def test_the_kernel_is_asked(
    host: str,
    functions: list[list[str]],
    name: str,
    place_label: str,
    home: str,
    fake_dtrace: FakeDTrace,
    tmp_path: Path,
) -> None:
    """If a host's program is unknown, its kernel decides which program runs."""
    saved = tmp_path / "start.json"
    state = State()
    steps = [{"functions": functions}, {"save": str(saved)}, {"ready": "0"}, FOREVER]
    id_ = SessionId(host, "port-22")
    async with running(fake_dtrace(*steps), id_, state, name=None) as one:
        assert listener(one).identity == Identity(host, "", "*", 22)
        await eventually(lambda: one.status.up)
        exact = ["exact"] if name == "linux" else []
        assert [*one.status.features] == [*load(name).parts, *exact]
        capabilities = state.table.capabilities(listener(one))
        assert (capabilities.place_label, capabilities.own_place) == (place_label, home)
        assert listener(one).identity == Identity(host, home, "*", 22)
        start = json.loads(saved.read_text(encoding="utf-8"))
        assert start["program"] == one.plan.render(load(name), set())
        assert one.status.restarts == 0
        # The source shows the program of the local host only.
        assert state.source.program == ("" if host else name)


async def test_the_kernel_is_asked_until_it_answers(
    fake_dtrace: FakeDTrace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While a host does not answer, its session is down and says why, and asks before each start.

    Once the host's program is known, the session does not ask again.
    """
    asked, reachable = tmp_path / "asked", tmp_path / "reachable"
    script = (
        f'for a; do [ "$a" != -l ] || echo >> {asked}; done; [ -e {reachable} ] ||'
        ' { echo "ssh: connect to host far port 22: Connection refused" >&2; exit 255; };'
        ' exec "$@"'
    )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("random.uniform", lambda *_: 1.0)
        steps = [{"functions": [["ip", "tcp_input_listener"]]}, {"ready": "0"}, FOREVER]
        command = ["sh", "-c", script, "sh", *fake_dtrace(*steps)]
        async with running(command, SessionId("far", "port-22"), name=None) as one:
            await one.settled.wait()
            assert not one.status.up
            assert one.status.reason == "ssh: connect to host far port 22: Connection refused"
            await eventually(lambda: one.status.restarts >= 2)
            assert one.status.pid is None
            reachable.touch()
            await eventually(lambda: one.status.up)
            times = len(asked.read_text(encoding="utf-8"))
            assert times == one.status.restarts + 1
            for _ in range(2):
                pid = one.status.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await eventually(lambda: one.status.up and one.status.pid not in {None, pid})  # noqa: B023
            assert len(asked.read_text(encoding="utf-8")) == times
    ended = logged(caplog, "session ended")
    assert [event["restart_in"] for event in ended[:2]] == ["0.1s", "0.1s"]
    assert not logged(caplog, "left out what this kernel cannot do")


async def test_no_program_fits_the_kernel(fake_dtrace: FakeDTrace) -> None:
    """If no program fits the kernel, the session stays down and says what to do."""
    async with running(fake_dtrace({"functions": []}), name=None) as one:
        await one.settled.wait()
        assert one.status.reason.startswith("no D program fits this kernel: set dtrace.program to")
        await eventually(lambda: one.status.restarts == 1)


async def test_stop_while_the_kernel_is_asked(tmp_path: Path) -> None:
    """A session can be stopped before its host answers, and leaves no process."""
    pids = tmp_path / "pids"
    script = f"sleep 60 & echo $! > {pids}; wait"
    async with running(["sh", "-c", script], name=None):
        await eventually(lambda: pids.exists() and pids.read_text(encoding="utf-8").strip())
    pid = int(pids.read_text(encoding="utf-8"))
    await eventually(lambda: not is_there(pid) or is_zombie(pid))


async def test_asked_one_at_a_time(fake_dtrace: FakeDTrace, tmp_path: Path) -> None:
    """Sessions of one host ask it one at a time."""
    count, together = tmp_path / "count", tmp_path / "together"
    script = (
        f'for a; do if [ "$a" = -l ]; then mkdir {count} || touch {together};'
        f' "$@"; rmdir {count}; exit; fi; done; exec "$@"'
    )
    state = State()
    starting = asyncio.Semaphore(1)
    config = DTraceConfig(command=("sh", "-c", script, "sh", *fake_dtrace()), interval=0.1)
    ids = [SessionId("", f"port-{port}") for port in (22, 80, 443)]
    for port, id_ in zip((22, 80, 443), ids, strict=True):
        state.table.watch(id_, named({port: ""}))
    plan = Plan(config, None, 0, COUNTERS)
    sessions = [Session(id_, plan, state, starting) for id_ in ids]
    try:
        await eventually(lambda: all(one.status.up for one in sessions))
    finally:
        await asyncio.gather(*(one.stop() for one in sessions))
    assert not together.exists()


async def test_core_refused(fake_dtrace: FakeDTrace) -> None:
    """If a probe of the core is refused, the session is down with dtrace(1)'s message."""
    async with running(fake_dtrace({"refuse": "fbt::tcp_conn_request:entry"}, READY)) as one:
        await one.settled.wait()
        assert not one.status.up
        assert REFUSAL in one.status.reason
        await eventually(lambda: one.status.restarts == 1)
        assert not one.status.features


async def test_unprivileged(fake_dtrace: FakeDTrace) -> None:
    """The reason is dtrace(1)'s message to users without privileges."""
    async with running(fake_dtrace({"unprivileged": True})) as one:
        await one.settled.wait()
        assert one.status.reason == (
            "dtrace(1) ended: exit status 2: dtrace: run as root for tracing and listing probes"
        )


async def test_command_not_found(tmp_path: Path) -> None:
    """If a command does not exist or may not be run, the reason says so, and it is tried again."""
    async with running([str(tmp_path / "nowhere")]) as one:
        await one.settled.wait()
        assert one.status.reason == f"cannot start {tmp_path}/nowhere: No such file or directory"
        await eventually(lambda: one.status.restarts == 1)
    async with running([str(tmp_path)]) as one:
        await one.settled.wait()
        assert one.status.reason == f"cannot start {tmp_path}: Permission denied"


async def test_never_ready(monkeypatch: pytest.MonkeyPatch, fake_dtrace: FakeDTrace) -> None:
    """A dtrace(1) that starts but prints nothing is ended after a while."""
    monkeypatch.setattr(heartbeat, "START_SECONDS", 0.3)
    async with running(fake_dtrace({"sleep": 60})) as one:
        await one.settled.wait()
        assert one.status.reason == "not ready after 0.3 s"


async def test_rows_of_another_version(
    fake_dtrace: FakeDTrace, caplog: pytest.LogCaptureFixture
) -> None:
    """A program whose rows have another version does not bring its session up."""
    async with running(fake_dtrace({"print": "ready 1 1"}, FOREVER)) as one:
        await eventually(lambda: one.status.bad_rows)
        assert not one.status.up
    assert logged(caplog, "bad row")[0]["why"] == "rows of version 1, not of 5"


async def test_output_closed_but_alive() -> None:
    """A process that closes its output but stays alive is killed."""
    script = "trap '' TERM; echo ready 5 1; exec >&-; exec sleep 60"
    async with running(["sh", "-c", script]) as one:
        await eventually(lambda: one.status.up)
        pid = one.status.pid
        assert pid is not None
        await eventually(lambda: not one.status.up)
        assert one.status.reason == ("dtrace(1) ended: it closed its output and had to be killed")
        assert not is_there(pid)


async def test_stderr_flood(fake_dtrace: FakeDTrace, caplog: pytest.LogCaptureFixture) -> None:
    """However much dtrace(1) writes to stderr, it is not blocked, and the log stays short."""
    flood = ["dtrace: nonsense " + "x" * 2000] * 2000

    caplog.set_level(logging.DEBUG)
    steps = [READY, {"stderr": flood}, {"print": syns(22, 1)}, FOREVER]
    async with running(fake_dtrace(*steps)) as one:
        await eventually(lambda: listener(one).syns == 1)
        assert one.status.up
    (event,) = logged(caplog, "dtrace says")
    assert len(event["message"]) <= 300


async def test_endless_line_and_binary(
    fake_dtrace: FakeDTrace, caplog: pytest.LogCaptureFixture
) -> None:
    """Binary bytes and an endless line are one bad row each, and the session stays up."""
    endless = base64.b64encode(b"\xff" * (5 * MAX_LINE)).decode()
    binary = base64.b64encode(bytes(b for b in range(256) if b not in b"\n") + b"\n").decode()

    steps = [
        {"stderr": ["\x1b[2J\udcff".encode("utf-8", "replace").decode(), "y" * 5 * MAX_LINE]},
        READY,
        *({"raw": data} for data in (binary, endless)),
        {"print": ["", *syns(22, 2)]},
        FOREVER,
    ]
    async with running(fake_dtrace(*steps)) as one:
        await eventually(lambda: listener(one).syns == 2)
        assert one.status.up
        assert one.status.bad_rows == 2
    (event,) = logged(caplog, "bad row")
    assert len(event["row"]) <= 200


async def test_binary_on_stderr(caplog: pytest.LogCaptureFixture) -> None:
    """Binary data and an endless line on standard error are logged as printable text."""
    script = "head -c 300000 /dev/urandom >&2; echo ready 5 1; exec sleep 60"
    async with running(["sh", "-c", script]) as one:
        await eventually(lambda: one.status.up)
    assert all(event["message"].isprintable() for event in logged(caplog, "dtrace says"))


async def test_bad_rows(fake_dtrace: FakeDTrace, caplog: pytest.LogCaptureFixture) -> None:
    """Each bad row is counted and the first is logged, and the rows around them count."""
    early = counted(22, 9)
    bad = ["row", "count zz 10 8 2 3", "tick x", counted(22, 1, 99), "\t\N{SNOWMAN}"]

    steps = [READY, {"print": [early, *syns(22, 2), *bad, syns(22, 3)[-1]]}, FOREVER]
    async with running(fake_dtrace(*steps)) as one:
        await eventually(lambda: listener(one).syns == 3)
        assert one.status.bad_rows == len(bad) + 1
    (event,) = logged(caplog, "bad row")
    assert event["row"] == early


async def test_lost_and_faults(fake_dtrace: FakeDTrace) -> None:
    """Losses that DTrace reports are summed by kind, and so are faults of the program."""
    says = [
        "dtrace: 3 drops on CPU 0",
        "dtrace: 1 drop on CPU 1",
        "dtrace: 5 aggregation drops on CPU 1",
        "dtrace: 7 dynamic variable drops with non-empty dirty list",
        "dtrace: 2 speculative drops",
        (
            "dtrace: error in dt_clause_3 for probe ID 9 (fbt:vmlinux:tcp_conn_request:entry):"
            " invalid address (0x8) at BPF pc 12"
        ),
        (
            "dtrace: error on enabled probe ID 4 (ID 9: fbt:ip:tcp_conn_request:entry):"
            " invalid address (0x8) in action #1 at DIF offset 4"
        ),
    ]
    async with running(fake_dtrace(READY, {"stderr": says}, FOREVER)) as one:
        await eventually(lambda: one.status.probe_errors == 2)
        assert one.status.lost == {
            "principal": 4,
            "aggregation": 5,
            "dynamic_variable": 7,
            "speculation": 2,
        }
        assert one.status.up


async def test_sigterm_ignored(fake_dtrace: FakeDTrace) -> None:
    """A dtrace(1) that ignores SIGTERM is killed."""
    async with running(fake_dtrace({"ignore": "SIGTERM"}, READY, FOREVER)) as one:
        await eventually(lambda: one.status.up)


async def test_sigterm_ignored_in_a_flood() -> None:
    """A process that ignores SIGTERM and prints as fast as it can is killed too."""
    script = "trap '' TERM; echo ready 5 1; exec yes"
    async with running(["sh", "-c", script]) as one:
        await eventually(lambda: one.status.up)


async def test_a_process_behind_the_command(tmp_path: Path) -> None:
    """If the command is a wrapper that has to be killed, its child is killed too."""
    pids = tmp_path / "pids"
    script = f"trap '' TERM; sleep 60 & echo $! > {pids}; echo ready 5 1; wait; wait; wait"
    async with running(["sh", "-c", script]) as one:
        await eventually(lambda: one.status.up)
    pid = int(pids.read_text(encoding="utf-8"))
    await eventually(lambda: not is_there(pid) or is_zombie(pid))


def is_zombie(pid: int) -> bool:
    """Tell whether a process is dead and waits only for init to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2][1] == "Z"
    except FileNotFoundError:
        return True


async def test_stop_at_once(fake_dtrace: FakeDTrace) -> None:
    """A session can be stopped before its process starts."""
    async with running(fake_dtrace()) as one:
        assert one.status.pid is None


@pytest.mark.parametrize("turns", range(1, 6))
async def test_stop_while_it_starts(turns: int, fake_dtrace: FakeDTrace) -> None:
    """A session can be stopped at any step of its process's start."""
    async with running(fake_dtrace()):
        for _ in range(turns):
            await asyncio.sleep(0)


async def test_stop_before_it_is_ready(fake_dtrace: FakeDTrace, tmp_path: Path) -> None:
    """A session can be stopped while dtrace(1) compiles."""
    saved = tmp_path / "start.json"
    async with running(fake_dtrace({"save": str(saved)}, {"sleep": 60})) as one:
        await eventually(saved.exists)
        assert not one.settled.is_set()


async def test_stop_while_another_one_starts(fake_dtrace: FakeDTrace) -> None:
    """A session can be stopped while it waits for its turn to start."""
    state = State()
    starting = asyncio.Semaphore(1)
    state.table.watch(SSH, named({22: ""}))
    config = DTraceConfig(command=tuple(fake_dtrace()))
    async with starting:
        one = Session(SSH, Plan(config, load("linux"), 22, {}), state, starting)
        await asyncio.sleep(0)
        async with asyncio.timeout(2):
            await one.stop()
    assert one.status.reason == "stopped"


async def test_program_that_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A host that does not read a program larger than a pipe is given up as not ready."""
    monkeypatch.setattr(supervision, "START_SECONDS", 0.2)
    large = tmp_path / "large.d"
    large.write_text(load("linux").text + f"/* {'x' * (1 << 19)} */\n", encoding="utf-8")
    async with asyncio.timeout(20):
        async with running(["/bin/sh", "-c", "exec sleep 600"], name=str(large)) as one:
            await one.settled.wait()
            assert one.status.reason == "did not read its program within 0.2 s"


async def test_blame_for_what_is_left_out(tmp_path: Path) -> None:
    """If dtrace(1) blames a part that is already left out, it is not restarted at once."""
    starts = tmp_path / "starts"
    why = "dtrace: could not enable tracing: Failed to enable fbt:vmlinux:security_sock_graft:entry"
    script = f"echo >>{starts}; echo '{why}' >&2; exit 1"
    async with asyncio.timeout(20), running(["/bin/sh", "-c", script]) as one:
        await one.settled.wait()
        assert why in one.status.reason
        assert "accepts" in one.left_out
    # One start with the part, one without it, and one more that may have come already.
    assert 2 <= len(starts.read_text(encoding="utf-8").splitlines()) <= 3


async def test_stop_during_back_off(
    monkeypatch: pytest.MonkeyPatch, fake_dtrace: FakeDTrace
) -> None:
    """A session can be stopped while it waits to restart its process, without waiting on."""
    monkeypatch.setattr(supervision, "_FIRST_DELAY", 600.0)
    async with running(fake_dtrace({"exit": 1})) as one:
        await one.settled.wait()
        assert one.status.pid is None


async def test_stop_twice(fake_dtrace: FakeDTrace) -> None:
    """A session can be stopped twice."""
    async with running(fake_dtrace()) as one:
        await eventually(lambda: one.status.up)
        await asyncio.gather(one.stop(), one.stop())
