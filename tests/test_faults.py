"""Faults of dtrace(1), the machine and its operator, and the recovery from each of them.

Each test injects a fault and then checks with `Normal` that the service is as before: the same
sessions are up, no counter was lower than at an earlier scrape, and there are no additional
processes, tasks or descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lab.waiting import eventually, until
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dtrace_exporter.collector import Collector, registry
from dtrace_exporter.config import load
from dtrace_exporter.listeners import SessionId
from dtrace_exporter.service import Service
from dtrace_exporter.tracing import rendering, supervision
from dtrace_faults import FAULTS
from exporter_process import is_alive, pid_in, serving, write
from fake_steps import FOREVER, READY, FakeDTrace
from linux_rows import syns

SYNS = {
    22: {"print": syns(22, 5)},
    80: {"print": syns(80, 7)},
}
SSH, FAR = SessionId("", "port-22"), SessionId("far", "port-80")
HERE = 0.1
CALLS = {SessionId(host, "calls") for host in ("", "far")}

pytestmark = [
    pytest.mark.usefixtures("no_child_left"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into Linux' /proc"),
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten everything that a session waits for."""
    monkeypatch.setattr(supervision, "_FIRST_DELAY", 0.05)
    monkeypatch.setattr(supervision, "_STOP_SECONDS", 1.0)
    monkeypatch.setattr(supervision, "_DRAIN_SECONDS", 1.0)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the time without a heartbeat after which the session here is ended."""
    real = rendering.window

    def window(interval: float) -> rendering.Window:
        return replace(real(interval), patience=3.0) if interval == HERE else real(interval)

    monkeypatch.setattr(rendering, "window", window)


def descriptors() -> dict[str, str]:
    """Return this process's open descriptors and what they refer to."""
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = str(path.readlink())
    return found


def children() -> set[int]:
    """Return this process's children, including zombies."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            if parent == os.getpid():
                found.add(int(stat.parent.name))
    return found


class Normal:
    """The state of a healthy service, to compare with after a fault."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = registry(Collector(service.state))
        self._up = {name for name, status in service.state.sessions.items() if status.up}
        self._counters: dict[Any, float] = {}
        self.scrape()
        self._had = self._has()
        self.tasks = self._had[1]

    def _has(self) -> tuple[int, int, int]:
        return len(children()), len(asyncio.all_tasks()), len(descriptors())

    def scrape(self) -> dict[str, float]:
        """Scrape, check that no counter fell, and return which sessions are up."""
        text = generate_latest(self._registry).decode()
        samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]
        counters = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for sample in samples
            if sample.name.startswith("dtrace_")
            and sample.name.endswith(("_total", "_count", "_sum", "_bucket"))
        }
        # Series that a reload adds and removes again are not counters that fell.
        self._counters = self._counters or counters
        fell = {key for key, was in self._counters.items() if counters.get(key, -1.0) < was}
        assert not fell
        self._counters = {key: counters[key] for key in self._counters}
        return {
            sample.labels["session"]: sample.value
            for sample in samples
            if sample.name == "dtrace_session_up"
        }

    async def shows(self, session: SessionId, up: float) -> None:
        """Wait until the metric says that a session is up (1) or down (0)."""
        await eventually(lambda: self.scrape().get(session.name) == up)

    async def again(self) -> None:
        """Wait until the sessions are up and no process, task or descriptor is additional."""
        async with asyncio.timeout(60):
            while True:
                ups = self.scrape()
                now = self._has()
                more = any(has > had for has, had in zip(now, self._had, strict=True))
                if ups == {name.name: 1.0 for name in self._up} and not more:
                    return
                await asyncio.sleep(0.02)


Configure = Callable[..., Path]


@pytest.fixture
def configure(tmp_path: Path, fake_dtrace: FakeDTrace) -> Configure:
    """Return a function that writes a configuration with a session here and one of another host.

    The session here runs the test's command; the other one stays healthy.
    """
    well = fake_dtrace(READY, SYNS[80], FOREVER)

    def make(command: list[str] | None = None, ports: tuple[int, ...] = (22,), **keys: Any) -> Path:
        path = tmp_path / "c.yml"
        here = {
            "program": "linux",
            "interval": f"{HERE * 1000:g}ms",
            "command": command or fake_dtrace(READY, SYNS[22], FOREVER),
            **keys,
        }
        far = {"program": "linux", "interval": "200ms", "command": well}
        config = {
            "source": "dtrace",
            "dtrace": here,
            "listeners": [{"port": port} for port in ports],
            "hosts": [{"name": "far", "dtrace": far, "listeners": [{"port": 80}]}],
        }
        # A rename, as editors should do: there is no moment with half of the file.
        new = path.with_suffix(".new")
        new.write_text(json.dumps(config), encoding="utf-8")
        new.rename(path)
        return path

    return make


@contextlib.asynccontextmanager
async def running(path: Path) -> AsyncIterator[Service]:
    """Run the service until its sessions are up, and then for the block."""
    one = Service(path, load(path))
    await one.start()
    try:
        await eventually(lambda: one.state.ready and counts(one) == {22: 5, 80: 7})
        yield one
    finally:
        async with asyncio.timeout(20):
            await one.stop()


def counts(one: Service) -> dict[int, int]:
    """Return the SYNs of each port."""
    return {each.identity.port: each.syns for each in one.state.table}


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("fault", FAULTS)
async def test_dtrace_goes_wrong(
    fault: str,
    configure: Configure,
    fake_dtrace: FakeDTrace,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A session with a faulty dtrace(1) goes down with a reason and recovers; others go on."""
    steps, reason = FAULTS[fault]
    go = tmp_path / "go"
    bad = [READY, SYNS[22], {"tick": 3}, {"wait": str(go)}, *steps]
    once = {"once": {"mark": str(tmp_path / "was-bad"), "steps": bad}}
    command = fake_dtrace(once, READY, SYNS[22], FOREVER)

    async with running(configure(command)) as one:
        normal = Normal(one)
        status = one.state.sessions[SSH]
        first = status.pid
        assert first is not None
        go.touch()
        await normal.shows(SSH, 0.0)
        await eventually(lambda: status.restarts == 1)
        await normal.again()
        assert not is_alive(first)
        # The old process's counts are kept, and the new one's are added.
        await eventually(lambda: counts(one) == {22: 10, 80: 7})
        assert one.state.sessions[FAR].restarts == 0
    (event,) = (vars(r)["fields"] for r in caplog.records if r.getMessage() == "session ended")
    assert event["why"].startswith(reason)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGSEGV])
async def test_dtrace_gets_a_signal(number: signal.Signals, configure: Configure) -> None:
    """A dtrace(1) that is killed, stopped or crashes is replaced, and its session is up again."""
    async with running(configure()) as one:
        normal = Normal(one)
        status = one.state.sessions[SSH]
        first = status.pid
        assert first is not None
        os.kill(first, number)
        await normal.shows(SSH, 0.0)
        await normal.again()
        assert not is_alive(first)
        assert status.restarts == 1
        await eventually(lambda: counts(one) == {22: 10, 80: 7})
        assert one.state.sessions[FAR].restarts == 0


# A shell command that prints a heartbeat.
NOW = "read up _ </proc/uptime; echo tick ${up%.*}${up#*.}0000000"


@pytest.mark.parametrize(
    "steps",
    [
        [{"become": f"exec 2>&-; while sleep 0.1; do {NOW}; done"}],
        [{"stderr": ["dtrace: nonsense " + "x" * 500] * 500}, FOREVER],
        [{"print": ["nonsense"] * 500}, FOREVER],
    ],
    ids=["closes stderr only", "complains a lot", "prints a lot of nonsense"],
)
async def test_harmless(
    steps: list[dict[str, Any]], configure: Configure, fake_dtrace: FakeDTrace, tmp_path: Path
) -> None:
    """A fault that does not stop the heartbeat does not end the session."""
    go = tmp_path / "go"
    command = fake_dtrace(READY, SYNS[22], {"tick": 1}, {"wait": str(go)}, *steps)
    async with running(configure(command)) as one:
        normal = Normal(one)
        status = one.state.sessions[SSH]
        first, last = status.pid, status.last_record
        assert last is not None
        go.touch()
        await eventually(lambda: (status.last_record or 0.0) > last + 0.3)
        await normal.again()
        assert (status.pid, status.restarts) == (first, 0)


async def test_valid_rows_without_end(
    configure: Configure, fake_dtrace: FakeDTrace, tmp_path: Path
) -> None:
    """Rows without end, as fast as a process can print, delay no scrape and no other session."""
    go = tmp_path / "go"
    steps = [READY, SYNS[22], {"tick": 1}, {"wait": str(go)}, {"forever": "tick {now}"}]
    async with running(configure(fake_dtrace(*steps))) as one:
        normal = Normal(one)
        far = one.state.sessions[FAR]
        last = far.last_record
        assert last is not None
        go.touch()
        for _ in range(5):
            await asyncio.sleep(0.1)
            normal.scrape()
        await eventually(lambda: (far.last_record or 0.0) > last + 0.5)
        await normal.again()
        assert all(status.restarts == 0 for status in one.state.sessions.values())


async def test_exits_at_once_for_ever(
    configure: Configure, fake_dtrace: FakeDTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated failures to start do not pile up, and the session recovers after their cause."""
    monkeypatch.setattr(supervision, "_LONGEST_DELAY", 0.1)
    broken = tmp_path / "broken"
    script = f'[ -e {broken} ] && exit 1; exec "$@"'
    command = ["sh", "-c", script, "sh", *fake_dtrace(READY, SYNS[22], FOREVER)]
    async with running(configure(command)) as one:
        normal = Normal(one)
        status = one.state.sessions[SSH]
        broken.touch()
        assert status.pid is not None
        os.kill(status.pid, signal.SIGKILL)
        await eventually(lambda: status.restarts >= 20)
        assert normal.scrape()["port-22"] == 0.0
        assert len(asyncio.all_tasks()) <= normal.tasks + 4
        broken.unlink()
        await normal.again()


async def test_no_descriptor_left(configure: Configure) -> None:
    """Without a free descriptor a session cannot start; it says so and starts once there is one."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with running(configure()) as one:
        normal = Normal(one)
        status = one.state.sessions[SSH]
        assert status.pid is not None
        held = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        try:
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.open(os.devnull, os.O_RDONLY))
            # Its own pipes become free, which may be just enough for a new process.
            os.kill(status.pid, signal.SIGKILL)
            await eventually(lambda: not status.up)
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.open(os.devnull, os.O_RDONLY))
            await eventually(lambda: "Too many open files" in status.reason)
            assert normal.scrape()["port-80"] == 1.0
        finally:
            for descriptor in held:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        await normal.again()
        assert one.state.sessions[FAR].restarts == 0


@pytest.mark.parametrize("step", [3600.0, -3600.0])
async def test_clock_steps(
    step: float, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Setting the clock an hour forward or back restarts nothing and changes no counter."""
    real, offset = time.time, 0.0
    monkeypatch.setattr("time.time", lambda: real() + offset)
    async with running(configure()) as one:
        normal = Normal(one)
        status = one.state.sessions[SSH]
        for now in (step, 0.0):
            offset = now
            await eventually(lambda: abs((status.last_record or 0.0) - time.time()) < 60)
            assert set(normal.scrape().values()) == {1.0}
        await normal.again()
        assert all(status.restarts == 0 for status in one.state.sessions.values())
        assert counts(one) == {22: 5, 80: 7}


async def test_fifty_reloads(configure: Configure) -> None:
    """Fifty reloads in a row, with a port that comes and goes, leave only the configured sessions.

    Sessions that no reload changes are not restarted, and scrapes go on all the time.
    """
    path = configure()
    async with running(path) as one:
        normal = Normal(one)
        before = {name: one.state.sessions[name].pid for name in (SSH, FAR)}
        for number in range(50):
            configure(ports=(22, 443) if number % 5 == 0 else (22,), command=here(path))
            await one.reload()
            normal.scrape()
        await normal.again()
        assert set(one.sessions) == {SSH, FAR} | CALLS
        assert {name: one.state.sessions[name].pid for name in (SSH, FAR)} == before
        assert all(status.restarts == 0 for status in one.state.sessions.values())
        assert counts(one) == {22: 5, 80: 7}


def here(path: Path) -> list[str]:
    """Return the dtrace command of a configuration's own host."""
    command: list[str] = json.loads(path.read_text(encoding="utf-8"))["dtrace"]["command"]
    return command


async def test_fifty_restarting_reloads(configure: Configure, fake_dtrace: FakeDTrace) -> None:
    """Reloads that replace the process faster than it can start end with a running process."""
    command = fake_dtrace(READY, SYNS[22], FOREVER)
    async with running(configure(command)) as one:
        normal = Normal(one)
        for number in range(1, 51):
            configure(command, options={"aggsize": f"{number}m"})
            await one.reload()
            normal.scrape()
        await normal.again()
        assert all(status.restarts == 0 for status in one.state.sessions.values())
        assert one.state.sessions[FAR].last_record is not None


def test_sighup_before_it_has_started(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """SIGHUP while the source is still tried takes effect as a reload after that."""
    tried, go = tmp_path / "tried", tmp_path / "go"
    script = f'touch {tried}; until [ -e {go} ]; do sleep 0.05; done; exec "$@"'
    command = ["sh", "-c", script, "sh", *fake_dtrace()]
    path = write(tmp_path / "c.yml", command)
    with serving("--config.file", path) as exporter:
        until(tried.exists)
        write(path, command, port=80)
        exporter.process.send_signal(signal.SIGHUP)
        go.touch()
        until(lambda: 'dtrace_session_up{session="port-80"} 1.0' in exporter.get())
        assert "port-22" not in exporter.get()
        exporter.process.terminate()
        _, errors = exporter.process.communicate(timeout=20)
        assert (exporter.process.returncode, errors.count('msg="reloaded"')) == (0, 1)


EARLY = """
import os, signal, sys
from dtrace_exporter import cli
def early(path, *args, load=cli.load):
    config = load(path, *args)
    path.write_text(path.read_text().replace("22", "80"))
    os.kill(os.getpid(), signal.SIGHUP)
    return config
cli.load = early
raise SystemExit(cli.main())
"""


def test_sighup_at_the_very_start(
    tmp_path: Path, fake_dtrace: FakeDTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGHUP before its handler is installed takes effect as a reload once it is."""
    monkeypatch.setattr("exporter_process.EXPORTER", [sys.executable, "-c", EARLY])
    with serving("--config.file", write(tmp_path / "c.yml", fake_dtrace())) as exporter:
        until(lambda: 'dtrace_session_up{session="port-80"} 1.0' in exporter.get())
        exporter.process.terminate()
        _, errors = exporter.process.communicate(timeout=20)
        assert (exporter.process.returncode, errors.count('msg="reloaded"')) == (0, 1)


@pytest.mark.parametrize("when", ["between two attempts", "in the second one"])
def test_sigterm_while_a_session_restarts(
    when: str, tmp_path: Path, fake_dtrace: FakeDTrace
) -> None:
    """SIGTERM between two attempts to start, or during the second one, is a normal end."""
    mark, saved = tmp_path / "mark", tmp_path / "second"
    once = {"once": {"mark": str(mark), "steps": [{"exit": 1}]}}
    command = fake_dtrace(once, {"save": str(saved)}, {"sleep": 60})
    with serving("--config.file", write(tmp_path / "c.yml", command)) as exporter:
        until(mark.exists)
        pid = pid_in(saved) if when == "in the second one" else 0
        exporter.process.terminate()
        _, errors = exporter.process.communicate(timeout=20)
        assert (exporter.process.returncode, "Traceback" in errors) == (0, False)
        assert not pid or not is_alive(pid)


@pytest.mark.parametrize("where", ["/dev/full", "a pipe that nobody reads any more"])
def test_log_cannot_be_written(where: str, tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """If the log cannot be written, the service counts, restarts and ends as usual."""
    saved = tmp_path / "saved"
    config = write(tmp_path / "c.yml", fake_dtrace({"save": str(saved)}, READY, FOREVER))
    if where == "/dev/full":
        log = os.open(where, os.O_WRONLY)
    else:
        reader, log = os.pipe()
        os.close(reader)
    with serving("--config.file", config, "--log.level=debug", stderr=log) as exporter:
        os.close(log)
        until(lambda: exporter.get("/-/ready") == "ready\n")
        os.kill(pid_in(saved), signal.SIGKILL)
        until(lambda: 'restarts_total{session="port-22"} 1.0' in exporter.get())
        for _ in range(200):
            assert exporter.get("/-/healthy") == "healthy\n"
        until(lambda: exporter.get("/-/ready") == "ready\n")
        exporter.process.terminate()
        assert exporter.process.wait(20) == 0


def test_quiet_hour(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """An hour without events, with 3600 ticks and 240 scrapes, logs nothing at info."""
    hour = [f"tick {second}000000000" for second in range(1, 3600)]
    last = syns(22, 9)[1:]
    steps = [READY, {"print": [*hour, "tick 3600000000000", *last]}, {"sleep": 60}]
    config = write(tmp_path / "c.yml", fake_dtrace(*steps), interval="10s")
    with serving("--config.file", config) as exporter:
        until(lambda: 'port="22"} 9.0' in exporter.get())
        for _ in range(240):
            assert "dtrace_tcp_listen_syns_total" in exporter.get()
        exporter.process.terminate()
        _, log = exporter.process.communicate(timeout=20)
    messages = [line.split("msg=")[1].split(" session=")[0] for line in log.splitlines()]
    said = [re.split(" source=| address=| ports=", message)[0] for message in messages]
    # The moment when it looks who listens varies.
    said.remove('"nobody listens"')
    assert said == [
        '"listening"',
        '"source chosen"',
        '"session up"',
        '"session up"',
    ]
