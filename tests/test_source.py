"""``source: auto`` when dtrace(1) comes and goes: the source that it chooses, and its counts."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from lab.waiting import eventually

from dtrace_exporter import inet_diag, kernel_totals, service, this_host
from dtrace_exporter.collector import Collector
from dtrace_exporter.config import load
from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.listeners import SessionId
from dtrace_exporter.namespaces import Namespaces
from dtrace_exporter.scripts.session import ScriptPlan, ScriptSession
from dtrace_exporter.service import Service
from dtrace_exporter.tracing import session, supervision
from dtrace_exporter.tracing.plan import Plan
from fake_steps import FOREVER, READY, FakeDTrace
from linux_rows import Q_FULL, counted, syns

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sock_diag is Linux's")

SSH = SessionId("", "port-22")
ROWS = {"print": [*syns(22, 5), counted(22, 3, Q_FULL, part=11)]}
REFUSAL = "dtrace: run as root for tracing and listing probes"


class Kernel:
    """Fake listening sockets, as inet_diag reports them."""

    def __init__(self) -> None:
        self.samples = [ListeningSocket("*", 22, 1, 8, 5, 1001)]
        self.dropped = 5

    def drop(self, count: int) -> None:
        """Let the listener of port 22 drop some connections."""
        first, *others = self.samples
        assert first.drops is not None
        self.samples = [first._replace(drops=first.drops + count), *others]
        self.dropped += count


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Replace this host's sockets with fake ones, and make all delays short."""
    made = Kernel()
    monkeypatch.setattr(inet_diag, "listeners", lambda *_: made.samples)
    monkeypatch.setattr(inet_diag, "half_open", lambda *_: Counter())
    monkeypatch.setattr(kernel_totals, "dropped", lambda *_: made.dropped)
    # Other network namespaces of this host would have these sockets too.
    monkeypatch.setattr(Namespaces, "begin", lambda *_: None)
    monkeypatch.setattr(supervision, "_FIRST_DELAY", 0.05)
    monkeypatch.setattr(supervision, "_STOP_SECONDS", 1.0)
    monkeypatch.setattr(service, "_RETRY_SECONDS", 3600.0)
    return made


class Host:
    """A host with a configuration, whose dtrace(1) can be used while a file exists."""

    def __init__(self, place: Path, working: list[str]) -> None:
        self.usable, self.hang, self.hangs = (place / word for word in ("usable", "hang", "hangs"))
        self.path = place / "dtrace_exporter.yml"
        self._steps = working
        self.configure()

    def configure(self, source: str = "auto", **keys: Any) -> None:
        """Write the configuration."""
        hang = f"[ -e {self.hang} ] && {{ touch {self.hangs}; exec sleep 60; }};"
        script = f'{hang} [ -e {self.usable} ] || {{ echo "{REFUSAL}" >&2; exit 1; }}; exec "$@"'
        command = ["sh", "-c", script, "sh", *self._steps]
        dtrace = {"command": command, "program": "linux", "interval": "100ms"}
        config = {"source": source, "dtrace": dtrace, "listeners": [{"port": 22}], **keys}
        given = {key: value for key, value in config.items() if value != []}
        self.path.write_text(json.dumps(given), encoding="utf-8")


@pytest.fixture
def host(tmp_path: Path, fake_dtrace: FakeDTrace) -> Host:
    """Return a host whose dtrace(1) cannot be used yet."""
    return Host(tmp_path, fake_dtrace(READY, ROWS, FOREVER))


@asynccontextmanager
async def running(host: Host) -> AsyncIterator[Service]:
    """Run the service, which may start without any session."""
    one = Service(host.path, load(host.path))
    await one.start()
    try:
        yield one
    finally:
        async with asyncio.timeout(10):
            await one.stop()


def drops(one: Service) -> dict[str, float]:
    """Return the exported drops of port 22, by their reason."""
    samples = [
        sample
        for family in Collector(one.state).collect()
        if family.name == "dtrace_tcp_listen_drops"
        for sample in family.samples
    ]
    return {each.labels["reason"]: each.value for each in samples if each.value}


def chosen(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the sources that the log says were chosen."""
    events = [each for each in caplog.records if each.getMessage() == "source chosen"]
    return [vars(each)["fields"]["source"] for each in events]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Return a function that returns the chosen sources."""
    with caplog.at_level("INFO"):
        yield lambda: chosen(caplog)


async def test_by_itself(
    host: Host,
    kernel: Kernel,
    said: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once dtrace(1) can be used, it is used without a reload, and no counter falls."""
    monkeypatch.setattr(service, "_RETRY_SECONDS", 0.05)
    async with running(host) as one:
        assert (one.state.source.name, one.state.source.reason) == ("sock_diag", "not_permitted")
        await one.state.refresh()
        assert drops(one) == {"unknown": 5}
        # No scrape comes after this.
        kernel.drop(2)
        before = one.state.last_reload_success
        host.usable.touch()
        await eventually(lambda: drops(one) == {"q_full": 3, "unknown": 7})
        assert (one.state.source.name, one.state.source.reason) == ("dtrace", "")
        assert one.state.sessions[SSH].up
        await one.state.refresh()
        [listener] = one.state.table
        # The gauges are those of DTrace.
        assert (listener.syns, 1001 in listener.sockets) == (8, False)
        assert one.state.last_reload_success == before
        await one.reload()
        assert said() == ["sock_diag", "dtrace"]


async def test_by_a_reload(host: Host, said: Callable[[], list[str]]) -> None:
    """A reload of an unchanged file tries dtrace(1) again, and logs nothing if nothing changes."""
    async with running(host) as one:
        await one.reload()
        assert (one.state.source.name, said()) == ("sock_diag", ["sock_diag"])
        host.usable.touch()
        await one.reload()
        await eventually(lambda: one.state.sessions[SSH].up)
        assert said() == ["sock_diag", "dtrace"]
        pid = one.state.sessions[SSH].pid
        # The session is up, so dtrace(1) is not tried again.
        host.usable.unlink()
        await one.reload()
        assert (one.state.source.name, one.state.sessions[SSH].pid) == ("dtrace", pid)


async def test_a_script_that_is_up(host: Host, tmp_path: Path) -> None:
    """A running script does not count as proof: a reload still tries DTrace."""
    (tmp_path / "io.d").write_text("BEGIN { @n = count(); }", encoding="utf-8")
    host.configure(scripts=[{"script": "io.d"}])
    async with running(host) as one:
        assert one.state.source.name == "sock_diag"
        host.usable.touch()
        await eventually(lambda: one.state.sessions[SessionId("", "script-io")].up)
        await one.reload()
        assert one.state.source.name == "dtrace"


async def test_another_reason(
    host: Host,
    tmp_path: Path,
    said: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If a further trial is refused for another reason, that reason is shown and logged once."""
    monkeypatch.setattr(service, "_RETRY_SECONDS", 0.05)
    script = tmp_path / "dtrace"
    host.configure(dtrace={"command": [str(script)], "program": "linux"})
    async with running(host) as one:
        assert one.state.source.reason == "not_found"
        tried = tmp_path / "tried"
        text = f"#!/bin/sh\necho >>{tried}\necho 'dtrace: nonsense' $$ >&2\nexit 1\n"
        script.write_text(text, encoding="utf-8")
        script.chmod(0o755)
        await eventually(lambda: one.state.source.reason == "refused")
        await eventually(lambda: len(tried.read_text()) > 4)
        assert said() == ["sock_diag", "sock_diag"]


async def test_and_back(host: Host, kernel: Kernel) -> None:
    """Drops that DTrace has counted stay, and sock_diag does not count them again."""
    host.usable.touch()
    async with running(host) as one:
        await eventually(lambda: drops(one) == {"q_full": 3})
        kernel.drop(3)
        host.configure("sock_diag")
        await one.reload()
        assert drops(one) == {"q_full": 3}
        kernel.drop(2)
        await one.state.refresh()
        assert drops(one) == {"q_full": 3, "unknown": 2}
        host.configure("auto")
        await one.reload()
        await eventually(lambda: drops(one) == {"q_full": 6, "unknown": 2})


async def test_sessions_that_fail(
    host: Host,
    fake_dtrace: FakeDTrace,
    said: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If a trial succeeds but sessions fail, they are down with a reason; the source stays.

    A reload tries again, and uses sock_diag if the trial fails too.
    """
    monkeypatch.setattr(service, "_RETRY_SECONDS", 0.02)
    host._steps = fake_dtrace({"stderr": "dtrace: cannot count"}, {"exit": 1})
    host.configure()
    async with running(host) as one:
        host.usable.touch()
        await eventually(lambda: one.state.source.name == "dtrace")
        await eventually(lambda: one.state.sessions[SSH].restarts > 1)
        assert "cannot count" in one.state.sessions[SSH].reason
        assert said() == ["sock_diag", "dtrace"]
        monkeypatch.setattr(service, "_RETRY_SECONDS", 3600.0)
        host.usable.unlink()
        await one.reload()
        assert (one.state.source.name, [*one.state.sessions]) == ("sock_diag", [])
        assert said() == ["sock_diag", "dtrace", "sock_diag"]


async def test_a_trial_that_hangs(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a trial hangs in the background, neither the page nor a reload waits for it."""
    monkeypatch.setattr(service, "_RETRY_SECONDS", 0.3)
    async with running(host) as one:
        host.hang.touch()
        await eventually(host.hangs.exists)
        host.configure("sock_diag")
        async with asyncio.timeout(10):
            await one.state.refresh()
            await one.reload()
        assert one.state.source.reason == "configured"


async def test_readings_meanwhile(
    host: Host, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many scrapes read while the source changes, no socket of sock_diag is left."""
    steps = 0

    async def by_single_steps(work: Generator[None, None, Any]) -> Any:
        nonlocal steps
        steps = 0
        while True:
            try:
                next(work)
            except StopIteration as end:
                return end.value
            steps += 1
            await asyncio.sleep(0)

    for module in (service, this_host):
        monkeypatch.setattr(module, "by_turns", by_single_steps)
    kernel.samples = [ListeningSocket("*", port, 1, 8, 0, 10_000 + port) for port in range(1, 300)]
    host.configure(listeners=[])
    async with running(host) as one:
        await one.state.refresh()
        ended = False
        end = one._end

        async def until_half_read(
            wanted: Mapping[SessionId, Plan | ScriptPlan],
        ) -> list[session.Session | ScriptSession]:
            await eventually(lambda: 2.2 < steps / len(kernel.samples) < 2.8)
            return await end(wanted)

        monkeypatch.setattr(one, "_end", until_half_read)

        async def scrape() -> None:
            while not ended:
                await one.state.refresh()
                await asyncio.sleep(0)

        scraping = asyncio.create_task(scrape())
        host.usable.touch()
        await one.reload()
        ended = True
        await scraping
        assert one.state.source.name == "dtrace"
        left = [one for one in one.state.table if min(one.sockets, default=1 << 60) < 20_000]
        assert left == []


async def test_nobody_listens(host: Host, kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    """A configured port without a listener is logged once, and again if it loses one later."""

    def told() -> list[str]:
        events = [one for one in caplog.records if one.getMessage() == "nobody listens"]
        return [vars(one)["fields"]["ports"] for one in events]

    ports = [{"port": port} for port in (22, 80, 443)]
    host.configure(listeners=ports)
    with caplog.at_level("INFO"):
        async with running(host) as one:
            await eventually(told)
            await one.reload()
            assert told() == ["80,443"]
            kernel.samples.append(ListeningSocket("*", 80, 0, 8, 0, 1002))
            await one.reload()
            kernel.samples.pop()
            await one.reload()
            assert told() == ["80,443", "80"]
            host.configure(listeners=[{"port": 22, "address": "192.0.2.1"}, {"port": 22}])
            await one.reload()
            assert told()[2:] == ["22 at 192.0.2.1"]
            host.configure(listeners=[{"port": port} for port in range(100, 130)])
            await one.reload()
    assert told()[3].split(",") == [str(port) for port in range(100, 120)]
