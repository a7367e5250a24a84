"""The service over fake dtrace(1) processes: what a reload changes, and what it leaves alone."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lab.waiting import eventually

import zone_rows
from dtrace_exporter import background, inet_diag, owners, this_host
from dtrace_exporter.collector import Collector
from dtrace_exporter.config import ConfigError, load
from dtrace_exporter.listeners import Identity, Listener, Owner, SessionId
from dtrace_exporter.reloads import Reloads
from dtrace_exporter.service import Service
from dtrace_exporter.tracing import plan, program, supervision
from dtrace_exporter.tracing.program import ProgramError
from dtrace_exporter.tracing.program import load as load_program
from dtrace_exporter.turns import by_turns
from dtrace_exporter.web import api
from dtrace_exporter.web.selection import Selection
from fake_steps import FOREVER, READY, FakeDTrace
from linux_rows import syns as rows_of_syns

pytestmark = pytest.mark.usefixtures("no_child_left")

Configure = Callable[..., Path]

ROWS = {"print": [row for port in (22, 80, 443) for row in rows_of_syns(port, 5)]}
SSH = SessionId("", "port-22")
WEB = SessionId("", "port-80")
ALL = SessionId("", "all")
CALLS = SessionId("", "calls")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all delays of a session short."""
    monkeypatch.setattr(supervision, "_FIRST_DELAY", 0.05)
    monkeypatch.setattr(supervision, "_STOP_SECONDS", 1.0)


@pytest.fixture
def configure(tmp_path: Path, fake_dtrace: FakeDTrace) -> Configure:
    """Return a function that writes a configuration file from ports, names and keys of dtrace."""
    working = fake_dtrace(READY, ROWS, FOREVER)

    def write(
        listeners: dict[int, str] | None = None, source: str = "dtrace", **dtrace: Any
    ) -> Path:
        file = tmp_path / "dtrace_exporter.yml"
        named = [{"port": port, "name": name} for port, name in (listeners or {}).items()]
        keys = {"command": working, "program": "linux", "interval": "100ms", **dtrace}
        config = {"source": source, "dtrace": keys, **({"listeners": named} if named else {})}
        file.write_text(json.dumps(config), encoding="utf-8")
        return file

    return write


@asynccontextmanager
async def running(path: Path) -> AsyncIterator[Service]:
    """Run the service on a configuration file, and yield it once its sessions are up."""
    one = Service(path, load(path))
    await one.start()
    try:
        await eventually(lambda: one.state.ready)
        yield one
    finally:
        async with asyncio.timeout(5):
            await one.stop()


def pids(one: Service) -> dict[SessionId, int | None]:
    """Return the sessions' process IDs."""
    return {name: status.pid for name, status in one.state.sessions.items()}


def syns(one: Service) -> dict[int, int]:
    """Return each port's SYNs."""
    return {listener.identity.port: listener.syns for listener in one.state.table}


def listener(one: Service, port: int) -> Listener:
    """Return the listener of a port."""
    (found,) = (found for found in one.state.table if found.identity.port == port)
    return found


async def test_a_session_for_each_port(configure: Configure) -> None:
    """The service is ready when each configured port's session is up; each counts only its port."""
    async with running(configure({22: "ssh", 80: "web"})) as one:
        assert set(one.state.sessions) == {SSH, WEB, CALLS}
        await eventually(lambda: syns(one) == {22: 5, 80: 5})
        assert (one.state.source.name, one.state.source.dtrace_version) == ("dtrace", "2.0.7")
        assert one.state.source.program == "linux"
        started = pids(one)
    for pid in started.values():
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not one.state.ready


async def test_no_listeners_is_every_listener(configure: Configure) -> None:
    """Without configured ports, one session watches all listeners of the host."""
    async with running(configure()) as one:
        assert set(one.state.sessions) == {ALL, CALLS}
        await eventually(lambda: syns(one) == {22: 5, 80: 5, 443: 5})


async def test_a_second_session_watches_no_port(configure: Configure) -> None:
    """A second session, with another program and without a port, watches processes' calls."""
    async with running(configure({22: "ssh"})) as one:
        assert one.sessions[CALLS].plan == plan.calls(
            one.of_listeners()[0].plan.dtrace, "linux_calls"
        )
        assert not one.state.table.watches(CALLS, "", "*", 22)
        assert one.state.sessions[CALLS].up
        await eventually(lambda: syns(one) == {22: 5})


async def test_nobody_sees_a_close(configure: Configure) -> None:
    """Queues are not recorded while the second session is down, but after its next heartbeat."""

    def since(one: Service) -> float:
        return one.state.table.sockets("").since

    async with running(configure({22: "ssh"})) as one:
        await eventually(lambda: 0 < since(one) < math.inf)
        first = since(one)
        pid = one.state.sessions[CALLS].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: since(one) == math.inf)
        await eventually(lambda: first < since(one) < math.inf)
    assert since(one) == 0


async def test_reload_adds_and_removes(configure: Configure) -> None:
    """A new port gets a session, a removed port loses its series, and the other sessions run on."""
    async with running(configure({22: "ssh", 80: "web"})) as one:
        await eventually(lambda: syns(one) == {22: 5, 80: 5})
        before = pids(one)
        configure({22: "ssh", 443: "tls"})
        await one.reload()
        assert set(one.state.sessions) == {SSH, SessionId("", "port-443"), CALLS}
        assert pids(one)[SSH] == before[SSH]
        assert 80 not in syns(one)
        await eventually(lambda: one.state.ready and syns(one) == {22: 5, 443: 5})
        assert one.state.table.name(listener(one, 443)) == "tls"
        configure({22: "ssh", 80: "web"})
        await one.reload()
        await eventually(lambda: syns(one) == {22: 5, 80: 5})


async def test_reload_renames(configure: Configure) -> None:
    """If a port gets another name, its process stays the same."""
    async with running(configure({22: "ssh"})) as one:
        before = pids(one)
        configure({22: "secure-shell"})
        await one.reload()
        assert pids(one) == before
        assert one.state.table.name(listener(one, 22)) == "secure-shell"


async def test_reload_leaves_out_histograms(configure: Configure) -> None:
    """If the configuration turns a port's histograms off, they disappear but are still counted."""

    def histograms() -> dict[str, float]:
        name = "dtrace_tcp_listen_q_saturation_ratio"
        found = (each for each in Collector(one.state).collect() if each.name == name)
        return {
            each.labels["port"]: each.value
            for family in found
            for each in family.samples
            if each.name == f"{name}_count"
        }

    async with running(configure({22: "ssh", 80: "web"})) as one:
        await eventually(lambda: syns(one) == {22: 5, 80: 5})
        assert histograms() == {"22": 5, "80": 5}
        path = configure({22: "ssh", 80: "web"})
        whole = json.loads(path.read_text(encoding="utf-8"))
        whole["listeners"][0]["histograms"] = False
        path.write_text(json.dumps(whole), encoding="utf-8")
        await one.reload()
        assert histograms() == {"80": 5}
        configure({22: "ssh", 80: "web"})
        await one.reload()
        assert histograms() == {"22": 5, "80": 5}


async def test_reload_of_the_same(configure: Configure) -> None:
    """A reload of an unchanged file changes nothing but the time of the reload."""
    async with running(configure({22: "ssh"})) as one:
        before, when = pids(one), one.state.last_reload_success
        await one.reload()
        assert pids(one) == before
        assert one.state.last_reload_success > when


async def test_reload_changes_the_interval(configure: Configure) -> None:
    """Another interval starts another process, and the counters go on."""
    async with running(configure({22: "ssh"})) as one:
        await eventually(lambda: syns(one) == {22: 5})
        before = pids(one)
        configure({22: "ssh"}, interval="200ms")
        await one.reload()
        assert syns(one) == {22: 5}
        await eventually(lambda: one.state.ready)
        assert pids(one)[SSH] not in {None, before[SSH]}
        assert one.state.sessions[SSH].restarts == 0
        await eventually(lambda: syns(one) == {22: 10})


async def test_reload_of_one_host_only(configure: Configure, fake_dtrace: FakeDTrace) -> None:
    """A change for one host leaves another host's session alone."""
    path = configure({22: "ssh"})
    config = json.loads(path.read_text(encoding="utf-8"))
    far = {"command": fake_dtrace(), "program": "linux", "interval": "100ms"}
    config["hosts"] = [{"name": "far", "dtrace": far, "listeners": [{"port": 22}]}]
    path.write_text(json.dumps(config), encoding="utf-8")
    async with running(path) as one:
        before = pids(one)
        far["interval"] = "200ms"
        path.write_text(json.dumps(config), encoding="utf-8")
        await one.reload()
        await eventually(lambda: one.state.ready)
        assert pids(one)[SSH] == before[SSH]
        assert pids(one)[SessionId("far", "port-22")] != before[SessionId("far", "port-22")]


async def test_per_port_to_shared_and_back(configure: Configure) -> None:
    """Counters stay when per-port sessions become one shared session, and when they split again."""
    ports = {22: "ssh", 80: "web"}
    async with running(configure(ports)) as one:
        await eventually(lambda: syns(one) == {22: 5, 80: 5})
        configure(ports, session="shared")
        await one.reload()
        assert set(one.state.sessions) == {ALL, CALLS}
        assert syns(one) in ({22: 5, 80: 5}, {22: 10, 80: 10})
        await eventually(lambda: syns(one) == {22: 10, 80: 10})
        configure(ports)
        await one.reload()
        assert set(one.state.sessions) == {SSH, WEB, CALLS}
        assert all(count >= 10 for count in syns(one).values())
        await eventually(lambda: syns(one) == {22: 15, 80: 15})
        assert one.state.table.name(listener(one, 80)) == "web"


@pytest.mark.parametrize("text", ["dtrace: {intervall: 1s}", "listeners: [", "\0"])
async def test_a_bad_file_changes_nothing(text: str, configure: Configure) -> None:
    """A bad file is refused and changes nothing, and the state says so until a good reload."""
    path = configure({22: "ssh"})
    async with running(path) as one:
        before, when = pids(one), one.state.last_reload_success
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError):
            await one.reload()
        assert not one.state.last_reload_successful
        assert (pids(one), one.state.last_reload_success) == (before, when)
        assert one.state.ready
        configure({22: "ssh"})
        await one.reload()
        assert one.state.last_reload_successful
        assert pids(one) == before


async def test_a_missing_program_changes_nothing(configure: Configure, tmp_path: Path) -> None:
    """A good file that names an unreadable program changes nothing either."""
    path = configure({22: "ssh"})
    own = tmp_path / "own.d"
    own.write_bytes(b"\xff")
    async with running(path) as one:
        before = pids(one)
        configure({22: "ssh"}, program=str(own))
        with pytest.raises(ProgramError, match=r"own\.d"):
            await one.reload()
        assert not one.state.last_reload_successful
        assert pids(one) == before


async def test_two_reloads_at_once(configure: Configure) -> None:
    """Simultaneous reloads run one after the other, and the last file is in force."""
    async with running(configure({22: "ssh"})) as one:
        first = asyncio.create_task(one.reload())
        configure({22: "ssh", 80: "web"}, interval="200ms")
        await asyncio.gather(first, one.reload(), one.reload())
        assert set(one.state.sessions) == {SSH, WEB, CALLS}
        assert set(one.sessions) == {SSH, WEB, CALLS}
        await eventually(lambda: one.state.ready)


async def test_reloads_are_shared() -> None:
    """Requests during a reload share the next reload and its error."""
    began = 0
    go = asyncio.Semaphore(0)

    async def reload() -> None:
        nonlocal began
        began += 1
        await go.acquire()
        if began == 2:
            raise ValueError("bad")

    reloads = Reloads(reload)
    first = reloads.ask()
    await eventually(lambda: began == 1)
    gone, *later = [reloads.ask() for _ in range(50)]
    gone.cancel()
    go.release()
    await first
    go.release()
    answers = await asyncio.gather(*later, return_exceptions=True)
    assert [str(answer) for answer in answers] == ["bad"] * 49
    last = reloads.ask()
    await eventually(lambda: began == 3)
    await reloads.stop()
    await asyncio.wait([last])
    assert last.cancelled()


async def test_stop_while_sessions_start(configure: Configure, fake_dtrace: FakeDTrace) -> None:
    """The service can be stopped before any session is up."""
    slow = fake_dtrace({"sleep": 60})
    path = configure(dict.fromkeys(range(20, 26), ""), command=slow)
    one = Service(path, load(path))
    await one.start()
    await eventually(lambda: any(status.pid for status in one.state.sessions.values()))
    async with asyncio.timeout(5):
        await one.stop()


async def test_a_reload_that_is_given_up(configure: Configure, fake_dtrace: FakeDTrace) -> None:
    """If a reload is cancelled while it ends a session, stop() still ends all processes."""
    deaf = fake_dtrace({"ignore": "SIGTERM"}, READY, FOREVER)
    async with running(configure({22: "ssh"}, command=deaf)) as one:
        configure({80: "web"}, command=deaf)
        reload = asyncio.create_task(one.reload())
        await asyncio.sleep(0)
        await eventually(one._one_at_a_time.locked)
        reload.cancel()
        with suppress(asyncio.CancelledError):
            await reload


async def test_auto_takes_dtrace(configure: Configure, fake_dtrace: FakeDTrace) -> None:
    """With source auto, DTrace is the source if dtrace(1) runs a trial program."""
    command = fake_dtrace(READY, ROWS, FOREVER)
    async with running(configure({22: ""}, "auto", command=command)) as one:
        assert one.state.source.name == "dtrace"
        assert set(one.state.sessions) == {SSH, CALLS}


@pytest.mark.skipif(sys.platform != "linux", reason="sock_diag is Linux's")
async def test_auto_falls_back(
    configure: Configure,
    fake_dtrace: FakeDTrace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With source auto, sock_diag is used if dtrace(1) refuses; the log says why."""
    monkeypatch.setattr(inet_diag, "listeners", lambda *_: [])
    refusing = fake_dtrace({"unprivileged": True})
    caplog.set_level("INFO")

    async with running(configure({22: "ssh"}, "auto", command=refusing)) as one:
        assert one.state.source.name == "sock_diag"
        assert not one.state.sessions
        await one.state.refresh()
        assert [found.identity for found in one.state.table] == [Identity("", "", "*", 22)]
        configure({22: "ssh"}, "dtrace")
        await one.reload()
        await eventually(lambda: one.state.ready and syns(one) == {22: 5})
        assert one.state.source.name == "dtrace"
        configure({22: "ssh"}, "sock_diag")
        await one.reload()
        assert one.state.source.name == "sock_diag"
        assert not one.state.sessions
    (event, *_) = (vars(r)["fields"] for r in caplog.records if r.getMessage() == "source chosen")
    assert event["source"] == "sock_diag"
    assert event["why"].startswith("dtrace: ")


async def test_source_dtrace_stays(configure: Configure, fake_dtrace: FakeDTrace) -> None:
    """With source dtrace, a refusal makes the session go down, and the source stays."""
    path = configure({22: "ssh"}, command=fake_dtrace({"unprivileged": True}))
    one = Service(path, load(path))
    await one.start()
    try:
        await one.sessions[SSH].settled.wait()
        assert one.state.source.name == "dtrace"
        assert not one.state.ready
        assert "run as root" in one.state.sessions[SSH].reason
    finally:
        await one.stop()


ILLUMOS = {"functions": [["ip", "tcp_input_listener"]]}
ZONE_ROWS = {"print": [zone_rows.told(22, zone="web", q0max=1032), zone_rows.syns(22, 5)]}


async def test_the_kernel_of_another_host(
    configure: Configure, fake_dtrace: FakeDTrace, tmp_path: Path
) -> None:
    """The kernel of another host decides which program runs, whatever this system is.

    Parts that need the drop counters of that kernel are left out, since they are unknown here.
    """
    saved = tmp_path / "start.json"
    commands = {
        "omnios": fake_dtrace(
            {"save": str(saved)}, ILLUMOS, {"ready": "global"}, ZONE_ROWS, FOREVER
        ),
        "debian": fake_dtrace(READY, ROWS, FOREVER),
    }
    path = configure({22: "ssh"})
    config = json.loads(path.read_text(encoding="utf-8"))
    config["hosts"] = [
        {
            "name": name,
            "dtrace": {"command": command, "interval": "100ms"},
            "listeners": [{"port": 22, "name": "far"}],
        }
        for name, command in commands.items()
    ]
    path.write_text(json.dumps(config), encoding="utf-8")
    async with running(path) as one:
        omnios, debian = (SessionId(name, "port-22") for name in commands)
        sessions = {each.id: each for each in one.of_listeners()}
        assert sessions[omnios].plan.program is sessions[debian].plan.program is None
        assert not sessions[omnios].left_out
        assert sessions[debian].left_out.keys() == {"syn_drops", "ack_drops", "handshake"}
        text = json.loads(saved.read_text(encoding="utf-8"))["program"]
        assert text == sessions[omnios].plan.render(load_program("illumos"), set())
        web, netns = Identity("omnios", "web", "*", 22), Identity("debian", "", "*", 22)
        await eventually(lambda: {web, netns} <= {each.identity for each in one.state.table})
        capabilities = {
            each.identity: one.state.table.capabilities(each) for each in one.state.table
        }
        assert (capabilities[web].place_label, capabilities[netns].place_label) == (
            "zone",
            "netns",
        )
        assert "q0_evicted" in capabilities[web].reasons
        assert capabilities[netns].reasons == ()
        assert one.state.source.program == "linux"
        before = pids(one)
        await one.reload()
        assert pids(one) == before


async def test_who_accepts_on_a_far_host(configure: Configure, fake_dtrace: FakeDTrace) -> None:
    """A Sun host has a second session that finds owners; if it ends, nothing is lost."""
    socket = f"{zone_rows.address(22):x}"
    rows = [rf"program {socket} 9 sshd\0\0", f"fmri {socket} 9 svc:/network/ssh:default", "odd"]
    calls = {"calls": [{"ready": "global"}, {"print": rows}, FOREVER]}
    path = configure({443: "web"})
    config = json.loads(path.read_text(encoding="utf-8"))
    command = fake_dtrace(ILLUMOS, {"ready": "global"}, ZONE_ROWS, calls, FOREVER)
    config["hosts"] = [{"name": "far", "dtrace": {"command": command, "interval": "100ms"}}]
    path.write_text(json.dumps(config), encoding="utf-8")
    far = SessionId("far", "calls")
    async with running(path) as one:
        where = Identity("far", "web", "*", 22)
        await eventually(lambda: where in one.state.table)
        found = one.state.table.get(where)
        assert found is not None
        owner = Owner("sshd", fmri="svc:/network/ssh:default")
        await eventually(lambda: one.state.owner(found) == owner)
        assert one.state.sessions[far].features == {"owners": True, "fmri": True}
        # The page reads a copy.
        copied = replace(one.state, table=await by_turns(one.state.table.copying()))
        (row,) = api.rows(copied, Selection(owner="network/ssh"))
        assert (row["host"], row["zone"], row["program"], row["fmri"]) == (
            *("far", "web", "sshd"),
            "svc:/network/ssh:default",
        )
        await eventually(lambda: one.state.sessions[far].bad_rows)
        pid = one.state.sessions[far].pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: one.state.sessions[far].restarts)
        assert [*found.sockets] == [zone_rows.address(22)]
        assert one.state.owner(found) == owner
        # Nor does a reload change that.
        await one.reload()
        assert far in one.state.sessions


async def test_the_kernel_of_this_host(
    configure: Configure, fake_dtrace: FakeDTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this system has several kernels, the kernel decides the program and the place label."""
    monkeypatch.setattr(program, "local", lambda _: "")
    command = fake_dtrace(ILLUMOS, {"ready": "global"}, ZONE_ROWS, FOREVER)
    for source in ("dtrace", "auto"):
        path = configure({22: "ssh"}, source, command=command, program="auto")
        async with running(path) as one:
            assert (one.state.source.name, one.state.source.program) == ("dtrace", "illumos")
            await eventually(lambda: listener(one, 22).syns == 5)
            assert listener(one, 22).identity == Identity("", "web", "*", 22)


async def test_a_kernel_that_answers_late(
    configure: Configure, fake_dtrace: FakeDTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this host's kernel does not answer at first, its session is down until it does."""
    monkeypatch.setattr(program, "local", lambda _: "")
    reachable = tmp_path / "reachable"
    script = f'[ -e {reachable} ] || {{ echo "dtrace: not now" >&2; exit 1; }}; exec "$@"'
    command = ["sh", "-c", script, "sh", *fake_dtrace(ILLUMOS, {"ready": "global"}, FOREVER)]
    path = configure({22: "ssh"}, command=command, program="auto")
    one = Service(path, load(path))
    try:
        await one.start()
        await one.sessions[SSH].settled.wait()
        assert one.state.sessions[SSH].reason == "dtrace: not now"
        assert (one.state.source.program, one.state.source.dtrace_version) == ("auto", "")
        reachable.touch()
        await eventually(lambda: one.state.ready)
        assert one.state.source.program == "illumos"
        await one.reload()
        assert one.state.source.program == "illumos"
    finally:
        await one.stop()


async def test_a_host_that_answers_while_a_source_is_chosen(
    configure: Configure, fake_dtrace: FakeDTrace, tmp_path: Path
) -> None:
    """A second session that starts while a reload chooses the source is not ended by the reload."""
    asked, chosen, slow = (tmp_path / name for name in ("asked", "chosen", "slow"))
    wait = 'touch "$1"; until [ -e "$2" ]; do sleep 0.02; done; shift 2; exec "$@"'
    steps = fake_dtrace(READY, FOREVER)
    far = ["sh", "-c", wait, "sh", str(tmp_path / "begun"), str(asked), *steps]
    path = configure({22: "ssh"})

    def with_host(path: Path) -> None:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["hosts"] = [{"name": "far", "dtrace": {"command": far}, "listeners": [{"port": 22}]}]
        config["hosts"][0]["dtrace"]["program"] = "auto"
        path.write_text(json.dumps(config), encoding="utf-8")

    with_host(path)
    calls = SessionId("far", "calls")
    one = Service(path, load(path))
    try:
        await one.start()
        await eventually((tmp_path / "begun").exists)
        local = ["sh", "-c", wait, "sh", str(slow), str(chosen), *steps]
        with_host(configure({22: "ssh"}, command=local))
        reload = asyncio.create_task(one.reload())
        await eventually(slow.exists)
        asked.touch()
        await eventually(lambda: calls in one.sessions)
        chosen.touch()
        await reload
        assert calls in one.sessions
    finally:
        chosen.touch()
        async with asyncio.timeout(10):
            await one.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="owners are known on Linux")
async def test_work_in_the_background_fails(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A failing background task is logged and restarted, and its old results are removed."""
    failing = threading.Event()
    read = owners.read

    def fail(*given: Any) -> list[owners.Placed]:
        if failing.is_set():
            raise ValueError("odd")
        return read(*given)

    monkeypatch.setattr(owners, "read", fail)
    monkeypatch.setattr(background, "_AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(this_host, "_OWNERS_SECONDS", 0.05)
    monkeypatch.setattr(owners, "SHARE", 0)
    path = configure({22: "ssh"})
    one = Service(path, load(path))
    with socket.create_server(("127.0.0.1", 0)):
        try:
            await one.start()
            await eventually(lambda: one.state.owners)
            failing.set()
            await eventually(lambda: not one.state.owners)
            assert "work in the background failed" in {each.message for each in caplog.records}
            failing.clear()
            await eventually(lambda: one.state.owners)
        finally:
            await one.stop()


async def test_a_host_that_does_not_answer(
    configure: Configure, fake_dtrace: FakeDTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions that wait for one host do not delay the start or restart of another host's."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    path = configure({22: "ssh", 80: "web"})
    config = json.loads(path.read_text(encoding="utf-8"))
    silent = {"program": "linux", "command": fake_dtrace({"sleep": 60})}
    asked = {"command": ["sh", "-c", "exec sleep 60"]}
    config["hosts"] = [
        {"name": f"far-{number}", "dtrace": dtrace, "listeners": [{"port": 22}, {"port": 80}]}
        for number, dtrace in enumerate((silent, asked))
    ]
    path.write_text(json.dumps(config), encoding="utf-8")
    one = Service(path, load(path))
    try:
        await one.start()
        await eventually(lambda: one.state.sessions[SessionId("far-0", "port-22")].pid)
        for _ in range(2):
            await eventually(lambda: all(one.state.sessions[name].up for name in (SSH, WEB)))
            for name in (SSH, WEB):
                pid = one.state.sessions[name].pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await eventually(lambda: not one.state.sessions[name].up)  # noqa: B023
        await eventually(lambda: all(one.state.sessions[name].up for name in (SSH, WEB)))
        assert not any(status.up for id_, status in one.state.sessions.items() if id_.host)
    finally:
        async with asyncio.timeout(5):
            await one.stop()
