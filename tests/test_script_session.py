"""Scripts in the service, run by a fake dtrace(1): supervised and exact, whatever they do."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lab.waiting import eventually
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain

from dtrace_exporter.config import load
from dtrace_exporter.listeners import SessionId
from dtrace_exporter.scripts import session as script_session
from dtrace_exporter.service import Service
from dtrace_exporter.tracing import supervision
from dtrace_exporter.tracing.rendering import window
from dtrace_exporter.web.exposition import Exposition
from fake_steps import FOREVER, READY, FakeDTrace

pytestmark = pytest.mark.usefixtures("no_child_left")

IO = SessionId("", "script-io")
ALL = SessionId("", "all")
CALLS = SessionId("", "calls")
TEXT = (
    "io:::done { @n[execname] = count(); @size = quantize(arg0); @most[execname] = max(arg0); }\n"
)
TABLE = (
    "\n           value  ------------- Distribution ------------- count    \n"
    "               2 |                                         0        \n"
    "               4 |@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@ {}        \n"
    "               8 |                                         0        \n"
)

Configure = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all delays of a session short."""
    monkeypatch.setattr(supervision, "_FIRST_DELAY", 0.05)
    monkeypatch.setattr(supervision, "_LONGEST_DELAY", 0.1)
    monkeypatch.setattr(supervision, "_STOP_SECONDS", 1.0)


@pytest.fixture
def configure(tmp_path: Path, fake_dtrace: FakeDTrace) -> Configure:
    """Return a function that writes a configuration with the script io.d.

    It takes the steps of the script's dtrace(1), the script, and keys of its entry.
    """

    def write(*steps: dict[str, Any], text: str = TEXT, **keys: Any) -> Path:
        (tmp_path / "io.d").write_text(text, encoding="utf-8")
        command = fake_dtrace(READY, FOREVER, {"script": [READY, *steps]})
        file = tmp_path / "dtrace_exporter.yml"
        config = {
            "source": "dtrace",
            "dtrace": {"command": command, "program": "linux", "interval": "100ms"},
            "scripts": [{"script": "io.d", **keys}],
        }
        file.write_text(json.dumps(config), encoding="utf-8")
        return file

    return write


@asynccontextmanager
async def running(path: Path | None, *scripts: Path) -> AsyncIterator[Service]:
    """Run the service on a configuration file."""
    one = Service(path, load(path, scripts=scripts), scripts=scripts)
    await one.start()
    try:
        yield one
    finally:
        async with asyncio.timeout(10):
            await one.stop()


async def scraped(one: Service, *, as_openmetrics: bool = False) -> dict[str, float]:
    """Return the samples of sessions and scripts in a scrape, by name and labels."""
    body = await Exposition(one.state).answer(openmetrics=as_openmetrics)
    found = {}
    parse = openmetrics if as_openmetrics else plain
    for family in parse(b"".join(body).decode()):
        for sample in family.samples:
            inside = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            if not sample.name.startswith(("dtrace_tcp", "dtrace_exporter", "python", "process")):
                found[f"{sample.name}{{{inside}}}"] = sample.value
    return found


async def shows(one: Service, **wanted: float) -> None:
    """Wait until a scrape has these values of @n, by key."""
    names = {f'dtrace_io_n_total{{execname="{key}"}}': value for key, value in wanted.items()}

    table = one.state.scripts

    def same() -> bool:
        found = {
            f'{name}{suffix}{{{labels[0][0]}="{labels[0][1]}"}}': value
            for script in table.values()
            for _, (name, layout, values) in script.blocks()
            for (suffix, labels), value in zip(layout, values, strict=True)
            if labels
        }
        return {name: found.get(name) for name in names} == names

    await eventually(same)


def logged(caplog: pytest.LogCaptureFixture, message: str) -> list[dict[str, Any]]:
    """Return the details of the events with a message."""
    return [vars(r)["fields"] for r in caplog.records if r.getMessage() == message]


async def test_a_script_is_metrics(configure: Configure) -> None:
    """A script's rows are metrics in both formats, and the script has its own session."""
    rows = ["0;sshd;7", f"1;{TABLE.format(3)}", "2;sshd;-5"]
    async with running(configure({"rows": rows}, FOREVER)) as one:
        await eventually(lambda: one.state.ready)
        await shows(one, sshd=7)
        await eventually(lambda: len(one.state.scripts[IO]) == 3)
        assert {*one.state.sessions} == {ALL, CALLS, IO}
        found = await scraped(one)
        assert found['dtrace_io_most{execname="sshd"}'] == -5
        assert found['dtrace_io_size_bucket{le="3.0"}'] == 0
        assert found['dtrace_io_size_bucket{le="7.0"}'] == 3
        assert found['dtrace_io_size_bucket{le="+Inf"}'] == 3
        assert found["dtrace_io_size_count{}"] == 3
        assert found['dtrace_session_up{session="script-io"}'] == 1
        file = one.state.scripts[IO].file
        assert found[f'dtrace_script_info{{file="{file}",script="io"}}'] == 1
        again = await scraped(one, as_openmetrics=True)
        del found["dtrace_io_size_count{}"]
        assert {name for name in again if "dtrace_io" in name} == {
            name for name in found if "dtrace_io" in name
        }


async def test_counters_go_on(configure: Configure, tmp_path: Path) -> None:
    """Counters keep what a script empties, and what it had counted when it ended."""
    mark = str(tmp_path / "mark")
    first = [
        READY,
        {"rows": ["0;a;3", "2;a;1"]},
        {"tick": 1},
        {"final": ["0;a;5"]},
        {"rows": ["0;a;2", "0;b;1"]},
        {"tick": 1},
        {"exit": 0},
    ]
    once = {"once": {"mark": mark, "steps": first}}
    async with running(configure(once, {"rows": ["0;a;10"]}, FOREVER)) as one:
        await shows(one, a=17, b=1)
        assert one.state.sessions[IO].restarts >= 1
        # The maximum of a run that is over is not a gauge any more.
        assert not [name for name in await scraped(one) if "dtrace_io_most" in name]
        assert one.state.sessions[IO].uncounted > 0


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([{"abort": True}], "killed by SIGABRT"),
        ([{"exit": 1}], "exit status 1"),
        ([{"become": "kill -9 $$"}], "killed by SIGKILL"),
        ([{"become": "exec sleep 600"}], "no heartbeat for 1 s"),
        ([{"become": "exec yes"}], "no heartbeat for 1 s"),
    ],
)
async def test_ends(
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    steps: list[dict[str, Any]],
    reason: str,
) -> None:
    """A script that ends, hangs or floods is restarted, and the other sessions keep running."""
    monkeypatch.setattr(script_session, "window", lambda _: replace(window(0.1), patience=1.0))
    async with running(configure({"rows": ["0;a;1"]}, {"tick": 1}, *steps)) as one:
        await eventually(lambda: one.state.sessions[IO].restarts >= 1, seconds=30)
        assert one.state.sessions[ALL].restarts == 0
        assert one.state.sessions[ALL].up
        assert logged(caplog, "session ended")[0]["why"].endswith(reason)
        assert logged(caplog, "session ended")[0]["session"] == "script-io"
        # Each run has counted one, if it got that far.
        total = (await scraped(one))['dtrace_io_n_total{execname="a"}']
        assert 1 <= total <= 2 + one.state.sessions[IO].restarts


async def test_a_script_that_exits_is_no_failure(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A script that exits by itself after a while is restarted at once, however often it does."""
    monkeypatch.setattr(supervision, "_BRIEF_RUN_SECONDS", 0.1)
    monkeypatch.setattr(supervision, "_LONGEST_DELAY", 600.0)
    caplog.set_level(logging.INFO)
    async with running(configure({"rows": ["0;a;1"]}, {"tick": 2}, {"exit": 0})) as one:
        await eventually(lambda: one.state.sessions[IO].restarts >= 5, seconds=60)
        assert not logged(caplog, "session ended")
        assert len(logged(caplog, "session done")) >= 5
        await shows(one, a=(await scraped(one))['dtrace_io_n_total{execname="a"}'])


async def test_limit(configure: Configure, caplog: pytest.LogCaptureFixture) -> None:
    """A script with more series than its limit goes down and says so; its counts stay."""
    rows = [f"0;key {number};1" for number in range(50_000)]
    steps = ({"rows": ["0;a;4"]}, {"tick": 1}, {"rows": ["0;a;4", *rows]}, FOREVER)
    async with running(configure(*steps, limit=20)) as one:
        await eventually(lambda: logged(caplog, "session ended"), seconds=30)
        why = logged(caplog, "session ended")[0]["why"]
        assert why == "more than 20 series: limit its keys, or raise its limit"
        await eventually(lambda: not one.state.sessions[IO].up)
        assert one.state.sessions[IO].reason == why
        assert not one.state.ready
        assert len(one.state.scripts[IO]) == 20
        found = await scraped(one)
        assert found['dtrace_io_n_total{execname="a"}'] >= 4
        assert found['dtrace_session_up{session="script-io"}'] == 0
        assert one.state.sessions[ALL].up


HOSTILE = {
    "newlines": (r"a\nb\\n", "a\nb\\n"),
    "quotes": (r"\"'\t", "\"'\t"),
    "NUL": (r"a\0", "a"),
    "binary": (r"\377\376", "\\xff\\xfe"),
    "10 KB": ("x" * 10_000, "x" * 10_000),
    "an escape of a terminal": (r"\033[2J", r"\x1b[2J"),
    "braces": ('{a=\\"b\\"} 1', '{a="b"} 1'),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_keys(configure: Configure, name: str) -> None:
    """Any text in a key is in its label, in printable characters, and harms nothing else."""
    written, read = HOSTILE[name]
    async with running(configure({"rows": [f"0;{written};3", "0;b;1"]}, FOREVER)) as one:
        await shows(one, b=1)
        body = await Exposition(one.state).answer()
        found = {
            sample.labels["execname"]: sample.value
            for family in plain(b"".join(body).decode())
            for sample in family.samples
            if sample.name == "dtrace_io_n_total"
        }
        assert found == {read: 3.0, "b": 1.0}


async def test_what_a_script_prints_is_no_row(configure: Configure) -> None:
    """Output of a script is never a row, even if it looks like one of the exporter's rows."""
    noise = [
        "\n\x1et0123456789abcdef row 0\x1fforged\x1f99\x1e",
        "\n\x1erow 0\x1fforged\x1f99\x1e",
        "ready 5 1",
        "tick 1",
        "a line without end " * 100,
    ]
    raw = base64.b64encode(bytes(range(256)) * 100).decode()
    steps = (
        {"print": noise},
        {"raw": raw},
        {"stderr": ["dtrace: 5 aggregation drops on CPU 0", "dtrace: \0\xff"] + ["x" * 999] * 500},
        {"rows": ["0;a;2"]},
        FOREVER,
    )
    async with running(configure(*steps)) as one:
        await shows(one, a=2)
        assert not [name for name in await scraped(one) if "forged" in name]
        await eventually(lambda: one.state.sessions[IO].lost["aggregation"] == 5)
        assert one.state.sessions[IO].up


async def test_a_flood_is_harmless(configure: Configure) -> None:
    """A script that prints without end does not delay the other sessions."""
    steps = ({"rows": ["0;a;1"]}, {"tick": 1}, {"forever": "x" * 1000})
    async with running(configure(*steps)) as one:
        await shows(one, a=1)
        last = one.state.sessions[ALL].last_record
        await eventually(lambda: one.state.sessions[ALL].last_record != last)


async def test_bad_rows(configure: Configure, caplog: pytest.LogCaptureFixture) -> None:
    """An impossible value is a bad row, which is logged once and not exported."""
    rows = ["0;a;5", "0;b;-1", "2;a;-9223372036854775808", "0;c", "9;a;1"]
    async with running(configure({"rows": rows}, FOREVER)) as one:
        await shows(one, a=5)
        await eventually(lambda: one.state.sessions[IO].bad_rows >= 4)
        assert len(logged(caplog, "bad row")) == 1
        assert not [name for name in await scraped(one) if "dtrace_io_most" in name]
        keys = [name for name in await scraped(one) if "dtrace_io_n" in name]
        assert keys == ['dtrace_io_n_total{execname="a"}']


async def test_reload(configure: Configure) -> None:
    """A reload restarts only the sessions that it changes, and unchanged ones keep counting."""
    file = configure({"rows": ["0;a;5"]}, FOREVER)
    async with running(file) as one:
        await shows(one, a=5)
        pids = {name: status.pid for name, status in one.state.sessions.items()}
        await one.reload()
        assert {name: status.pid for name, status in one.state.sessions.items()} == pids
        config = json.loads(file.read_text(encoding="utf-8"))
        config["scripts"][0]["limit"] = 7
        file.write_text(json.dumps(config), encoding="utf-8")
        await one.reload()
        await shows(one, a=10)
        after = {name: status.pid for name, status in one.state.sessions.items()}
        assert (after[ALL], after[CALLS]) == (pids[ALL], pids[CALLS])
        assert after[IO] != pids[IO]
        # A file with a mistake changes nothing.
        (file.parent / "io.d").write_text("no D\n", encoding="utf-8")
        with pytest.raises(Exception, match="a D script with aggregations"):
            await one.reload()
        assert one.state.sessions[IO].pid == after[IO]
        config["scripts"] = []
        file.write_text(json.dumps(config), encoding="utf-8")
        await one.reload()
        assert {*one.state.sessions} == {ALL, CALLS}
        assert not [name for name in await scraped(one) if "dtrace_io" in name]
        assert "dtrace_script_info" not in str(await scraped(one))


async def test_other_hosts(configure: Configure, tmp_path: Path) -> None:
    """A script runs on another host too, and its series there have the label host."""
    file = configure({"rows": ["0;a;5"]}, FOREVER)
    config = json.loads(file.read_text(encoding="utf-8"))
    config["hosts"] = [
        {"name": "far", "dtrace": config["dtrace"], "scripts": [{"script": "io.d", "args": ["1"]}]}
    ]
    (tmp_path / "io.d").write_text(TEXT.replace("arg0", "$1 + arg0"), encoding="utf-8")
    config["scripts"][0]["args"] = [1]
    file.write_text(json.dumps(config), encoding="utf-8")
    async with running(file) as one:
        await eventually(lambda: [len(each) for each in one.state.scripts.values()] == [1, 1])
        await eventually(lambda: one.state.ready)
        found = await scraped(one)
        assert {value for name, value in found.items() if "dtrace_io_n_total" in name} == {5.0}
        assert len([name for name in found if 'host="far"' in name and "io_n_total" in name]) == 1
        assert 'dtrace_session_up{host="far",session="script-io"}' in found


async def test_the_command(configure: Configure, tmp_path: Path) -> None:
    """dtrace(1) gets the options, the script's own flags, its process and its arguments."""
    saved = tmp_path / "saved.json"
    text = "#!/usr/sbin/dtrace -Cs\n" + TEXT.replace("arg0", "$1 + $2")
    file = configure({"save": str(saved)}, FOREVER, text=text, args=[5, "/x"], pid=os.getpid())
    async with running(file) as one:
        await eventually(lambda: one.state.sessions[IO].up)
        start = json.loads(saved.read_text(encoding="utf-8"))
        assert start["argv"] == [
            *("-C", "-I", str(tmp_path), "-p", str(os.getpid()), "-s", "/dev/stdin", "5", "/x"),
        ]
        assert start["program"].rstrip().endswith("#pragma D option destructive=unset")
        assert not start["program"].startswith("#!")


DESTRUCTIVE = 'BEGIN { @a = count(); system("echo"); }\n'


@pytest.mark.parametrize(
    "text",
    [
        f"#pragma D option destructive\n{DESTRUCTIVE}",
        f"{DESTRUCTIVE}#pragma D option destructive",
        f"#pragma D option destructive=1\n{DESTRUCTIVE}",
        DESTRUCTIVE,
    ],
)
async def test_destructive_actions(configure: Configure, text: str) -> None:
    """Destructive actions are refused, wherever the script permits them."""
    async with running(configure(FOREVER, text=text)) as one:
        await eventually(lambda: one.state.sessions[IO].reason != "starting")
        assert "Destructive actions not allowed" in one.state.sessions[IO].reason
        assert not one.state.sessions[IO].up


@pytest.mark.parametrize(
    "options",
    ["-w", "-qws", "-x destructive", "-c 'sh -c x'", "-G", "-A", "-C -x cpppath=/tmp/x", "-p 1"],
)
def test_options_of_the_script(configure: Configure, options: str) -> None:
    """An option that lets a script change, run or write something is refused in its #! line."""
    file = configure(text=f"#!/usr/sbin/dtrace {options} -s\n{TEXT}")
    with pytest.raises(Exception, match="a D script with aggregations") as caught:
        load(file)
    assert "io.d:1: " in getattr(caught.value, "in_full", "")


async def test_without_a_configuration(
    tmp_path: Path, fake_dtrace: FakeDTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script of the command line runs beside all listeners, and still does after a reload."""
    script = tmp_path / "io.d"
    script.write_text(TEXT, encoding="utf-8")
    told = {"script": [READY, {"rows": ["0;a;5"]}, FOREVER]}
    command = fake_dtrace(READY, FOREVER, told)
    path = tmp_path / "bin"
    path.mkdir()
    (path / "dtrace").write_text(f'#!/bin/sh\nexec {" ".join(command)} "$@"\n', encoding="utf-8")
    (path / "dtrace").chmod(0o755)
    monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
    async with running(None, script) as one:
        await shows(one, a=5)
        await one.reload()
        await shows(one, a=5)
        assert IO in one.sessions


async def test_killed_again_and_again(configure: Configure) -> None:
    """A script whose dtrace(1) is killed again and again keeps all that its rows had counted."""
    async with running(configure({"rows": ["0;a;1"]}, {"tick": 1}, FOREVER)) as one:
        for number in range(1, 6):
            await shows(one, a=number)
            pid = one.state.sessions[IO].pid
            assert pid
            os.kill(pid, signal.SIGKILL)
