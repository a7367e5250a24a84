"""A user's own scripts in the service: exact over kills, clear() and exit(), and harmless."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lab.exporter
import pytest
from lab.exporter import Exporter, StartExporter
from lab.waiting import until

EVENTS = Path("/sys/kernel/tracing/uprobe_events")
CONFIGURED = Path(__file__).resolve().parents[3] / "config/scripts"
IMPATIENT = (
    "from dtrace_exporter.tracing import supervision\n"
    "supervision._LONGEST_DELAY = 0.5\n"
    "from dtrace_exporter.cli import main\n"
    "raise SystemExit(main())\n"
)
"""An exporter that does not wait a minute after dtrace(1) has ended many times."""

# The witness is this process, which makes and counts the calls; others' calls are not counted.
CALLS = "syscall::getpriority:entry /pid == $1/ { @calls[execname] = count(); }\n"
PATIENCE = 300.0
"""An emulated machine takes some seconds to compile a script, and a busy one a minute."""
TOTAL = "dtrace_calls_calls_total"
SESSION = "script-calls"


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str, str], str]:
    """Return a function that writes a script and returns its path."""

    def write(text: str, name: str = "calls") -> str:
        file = tmp_path / f"{name}.d"
        file.write_text(text, encoding="utf-8")
        return str(file)

    return write


def configured(path: str, **keys: Any) -> dict[str, Any]:
    """Return a configuration of one script, whose argument is this process."""
    # As few other sessions as possible, because each takes time to start.
    return {"source": "sock_diag", "scripts": [{"script": path, "args": [os.getpid()], **keys}]}


def call(times: int) -> int:
    """Make the system calls that the script counts, and return their number."""
    for _ in range(times):
        os.getpriority(os.PRIO_PROCESS, 0)
    return times


def restarts(running: Exporter) -> float:
    """Return how often the session has restarted."""
    return running.value("dtrace_session_restarts_total", session=SESSION) or 0.0


def started_again(running: Exporter, before: float) -> bool:
    """Tell whether the session has restarted since it had this number of restarts."""
    return restarts(running) > before


def consumers() -> set[int]:
    """Return the process IDs in the names of dtrace(1)'s uprobes."""
    lines = EVENTS.read_text(encoding="ascii", errors="replace").splitlines()
    names = [line.split(":", 1)[1].split("/")[0] for line in lines if "_dtrace/" in line]
    return {int(name.split("_")[1]) for name in names}


def test_killed_twenty_times(
    exporter: StartExporter, script: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script whose dtrace(1) is killed 20 times counts exactly what the witness did.

    No uprobe of a dead process is left.
    """
    monkeypatch.setattr(lab.exporter, "COMMAND", [sys.executable, "-c", IMPATIENT])
    running = exporter(configured(script(CALLS)))
    made = 0
    for kill in range(20):
        made += call(1000 + kill)
        running.wait(TOTAL, made, PATIENCE)
        before = restarts(running)
        (pid,) = running.pids()
        os.kill(pid, signal.SIGKILL)
        until(partial(started_again, running, before), "it starts again", PATIENCE)
        running.wait("dtrace_session_up", 1, PATIENCE, session=SESSION)
    made += call(1)
    running.wait(TOTAL, made, PATIENCE)
    until(lambda: consumers() == {*running.pids()}, "no uprobes but of those that run")


def test_clear_and_exit(
    exporter: StartExporter, script: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the script's own clear() at any moment and exit(), no call is lost or counted twice."""
    monkeypatch.setattr(lab.exporter, "COMMAND", [sys.executable, "-c", IMPATIENT])
    text = (
        f"{CALLS}tick-300ms {{ printa(@calls); clear(@calls); }}\n"
        "syscall::getpgid:entry /pid == $1/ { exit(0); }\n"
    )
    running = exporter(configured(script(text)))
    made = 0
    for _ in range(3):
        for _ in range(20):
            made += call(5000)
        # Counts up to here are in the rows that the end prints.
        before = restarts(running)
        os.getpgid(0)
        until(partial(started_again, running, before), "it starts again", PATIENCE)
        running.wait(TOTAL, made, PATIENCE)
        running.wait("dtrace_session_up", 1, PATIENCE, session=SESSION)
    assert running.value("dtrace_session_bad_rows_total", session=SESSION) == 0


def test_too_many_keys(exporter: StartExporter, script: Callable[..., str]) -> None:
    """A script with 50,000 keys goes down with a reason, and takes no memory for them."""
    running = exporter(configured(script(CALLS)))
    before = memory(running)
    ups = len(re.findall("session up", running.log()))
    script(f"{CALLS}syscall::getpriority:entry /pid == $1/ {{ @many[arg1] = count(); }}\n")
    assert running.reload() == 200
    until(lambda: len(re.findall("session up", running.log())) > ups, "it is up again", PATIENCE)
    for key in range(50_000):
        with suppress(OSError):
            os.getpriority(os.PRIO_PROCESS, 1_000_000 + key)
    until(lambda: "more than 1000 series" in running.log(), "it says why it ends", PATIENCE)
    names = ("dtrace_calls_many_total", TOTAL)
    assert sum(len(running.metrics(*names).select(name)) for name in names) <= 1000
    assert memory(running) < before + 64 * 1024


def memory(running: Exporter) -> int:
    """Return the resident memory of the exporter, in KiB."""
    status = Path(f"/proc/{running.process.pid}/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


def says_why(running: Exporter, session: str) -> bool:
    """Tell whether a session is down with a known reason."""
    said = running.get("/-/ready")[1]
    return session in said and "starting" not in said


def test_destructive_actions(
    exporter: StartExporter, script: Callable[..., str], tmp_path: Path
) -> None:
    """No script can change the host: not by pragma, include, library or setopt()."""
    done = tmp_path / "done"
    action = f'BEGIN {{ @a = count(); system("touch {done}"); }}\n'
    (tmp_path / "more.h").write_text("#pragma D option destructive\n", encoding="ascii")
    (tmp_path / "lib").mkdir()
    library = "#pragma D option destructive\n"
    (tmp_path / "lib" / "more.d").write_text(library, encoding="ascii")
    ways = {
        "pragma": f"#pragma D option destructive\n{action}",
        "last": f"{action}#pragma D option destructive\n",
        "value": f"#pragma D option destructive=set\n{action}",
        "include": f'#!/usr/sbin/dtrace -Cs\n#include "{tmp_path}/more.h"\n{action}',
        "library": f"#!/usr/sbin/dtrace -L {tmp_path}/lib -s\n{action}",
        "setopt": f'BEGIN {{ setopt("destructive"); }}\n{action}',
        "none": action,
    }
    files = [script(text, name) for name, text in ways.items()]
    # The exporter starts with a script, because otherwise it gives up the privilege.
    running = exporter(configured(script(CALLS)))
    refused = []
    for name, file in zip(ways, files, strict=True):
        running.configure({"source": "sock_diag", "scripts": [{"script": file}]})
        if running.reload() != 200:
            refused.append(name)
            continue
        session = f"script-{name}"
        until(partial(says_why, running, session), f"{session} says why it is down", PATIENCE)
        if name != "include":
            # This script needs a preprocessor, which the machine may not have.
            assert "Destructive actions not allowed" in running.get("/-/ready")[1], name
        assert not done.exists(), name
    assert {*refused} <= {"library"}, running.log()[-2000:]


@pytest.mark.parametrize("name", ["syscalls", "blocklatency"])
def test_examples(exporter: StartExporter, name: str) -> None:
    """The examples of config/scripts run unchanged, and the busy one counts."""
    path = str(CONFIGURED / f"{name}.d")
    running = exporter({"source": "sock_diag", "scripts": [{"script": path}]})
    if name == "syscalls":
        until(lambda: running.metrics("dtrace_syscalls_calls_total").names(), "calls of programs")


def test_script_of_the_command_line(exporter: StartExporter, tmp_path: Path) -> None:
    """With --script, a script counts what the witness did, and listeners are watched too."""
    file = tmp_path / "calls.d"
    file.write_text(CALLS.replace("$1", str(os.getpid())), encoding="utf-8")
    running = exporter(args=[f"--script={file}"])
    running.wait("dtrace_session_up", 1, PATIENCE, session=SESSION)
    running.wait(TOTAL, call(1234), PATIENCE)
    assert running.value("dtrace_script_info", script="calls", file=str(file)) == 1
