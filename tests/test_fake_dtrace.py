"""The fake dtrace(1) does what its description says, so that tests can rely on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import zone_rows
from dtrace_exporter.listeners import ListenerTable, SessionId
from dtrace_exporter.tracing.program import load
from dtrace_exporter.tracing.rows import PROTOCOL, Reader, Ready, Tick
from dtrace_exporter.tracing.tally import Tally
from dtrace_exporter.watched import Watched
from linux_rows import ESTABLISHED, counted, told

Fake = Callable[..., list[str]]
SESSION = SessionId("", "all")
ROW = zone_rows.established(22, 5)
MORE = zone_rows.established(22, 3)
READY = {"ready": "4026531840"}
END = {"exit": 0}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Return a D program with a quick heartbeat."""
    path = tmp_path / "program.d"
    path.write_text("BEGIN { } fbt::tcp_conn_request:entry { } tick-5ms { }\n", encoding="utf-8")
    return path


def run(command: list[str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a fake that ends by itself, and return its result."""
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=30
    )


@contextmanager
def running(command: list[str], script: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a fake until the block ends."""
    arguments = [*command, "-q", "-s", str(script)]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    """Wait for the next line of a fake, and return it."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def shown(output: str) -> list[str]:
    """Return the lines of an output, tick lines without their time."""
    return [
        text.rpartition(" ")[0] if text.startswith("tick") else text for text in output.split("\n")
    ][:-1]


def test_without_steps(fake_dtrace: Fake, script: Path) -> None:
    """Without steps, the fake is ready and then ticks for ever."""
    reader = Reader()
    with running(fake_dtrace(), script) as process:
        assert reader.read(line(process)) == Ready(PROTOCOL, "4026531840")
        times = []
        for _ in range(3):
            tick = reader.read(line(process))
            assert isinstance(tick, Tick)
            times.append(tick.time)
    assert times == sorted(set(times))


def test_rows_come_once(fake_dtrace: Fake, script: Path) -> None:
    """Without sets, a heartbeat prints the new rows and then the tick."""
    steps = [{"rows": [ROW]}, {"rows": [MORE]}, {"tick": 2}, {"rows": [ROW]}, {"tick": 1}, END]
    result = run(fake_dtrace(READY, *steps), "-s", script)
    assert shown(result.stdout) == ["ready 5 4026531840", ROW, MORE, "tick", "tick", ROW, "tick"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_end(fake_dtrace: Fake, script: Path, number: signal.Signals) -> None:
    """On a signal, a running fake prints new rows between blank lines, and exits with 0."""
    with running(fake_dtrace({"rows": [ROW]}, READY), script) as process:
        assert line(process) == "ready 5 4026531840"
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
    assert shown(output) == ["", ROW, "tick", ""]
    assert process.returncode == 0


def test_signal_while_it_ticks(fake_dtrace: Fake, script: Path) -> None:
    """A signal also ends the fake between two heartbeats."""
    with running(fake_dtrace(), script) as process:
        line(process)
        line(process)
        process.terminate()
        output, _ = process.communicate(timeout=30)
    assert shown(output)[-3:] == ["", "tick", ""]
    assert process.returncode == 0


def test_ignored_signal(fake_dtrace: Fake, script: Path) -> None:
    """An ignored signal does not end the fake, but another one does."""
    with running(fake_dtrace({"ignore": "SIGTERM"}, READY, {"tick": True}), script) as process:
        line(process)
        process.terminate()
        # Without the ignored signal it would have ended before the first of these.
        assert [line(process).split()[0] for _ in range(3)] == ["tick"] * 3
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_signal_before_it_runs(fake_dtrace: Fake, tmp_path: Path) -> None:
    """A signal before the program is read kills the fake, and it prints nothing."""
    fifo = tmp_path / "program.d"
    os.mkfifo(fifo)
    with running(fake_dtrace(), fifo) as process, fifo.open("w", encoding="utf-8"):
        # Once the pipe is open, the fake is reading its program.
        process.terminate()
        output, _ = process.communicate(timeout=30)
    assert (output, process.returncode) == ("", -signal.SIGTERM)


def test_output_steps(fake_dtrace: Fake, script: Path) -> None:
    """Steps print unchanged lines and bytes, to standard output or to standard error."""
    steps = [{"print": ["a", "b"]}, {"print": "c"}, {"stderr": ["d"]}, {"raw": "AP8K"}, {"exit": 3}]
    result = subprocess.run(
        [*fake_dtrace(*steps), "-s", str(script)], capture_output=True, timeout=30
    )
    assert (result.stdout, result.stderr) == (b"a\nb\nc\n\x00\xff\n", b"d\n")
    assert result.returncode == 3


def test_save_and_wait(fake_dtrace: Fake, script: Path, tmp_path: Path) -> None:
    """The fake records how it was started, and a wait ends when the file exists."""
    saved, go = tmp_path / "saved", tmp_path / "go"
    steps = [{"save": str(saved)}, READY, {"wait": str(go)}, {"print": "on"}]
    with running(fake_dtrace(*steps), script) as process:
        assert line(process) == "ready 5 4026531840"
        start = json.loads(saved.read_text(encoding="utf-8"))
        assert start == {
            "argv": ["-q", "-s", str(script)],
            "program": script.read_text(encoding="utf-8"),
            "pid": process.pid,
        }
        go.touch()
        assert line(process) == "on"


def test_program_on_standard_input(fake_dtrace: Fake, tmp_path: Path) -> None:
    """The fake accepts the program on standard input."""
    saved = tmp_path / "saved"
    command = [*fake_dtrace({"save": str(saved)}, END), "-s", "/dev/stdin"]
    subprocess.run(command, input="BEGIN { }", text=True, timeout=30, check=True)
    assert json.loads(saved.read_text(encoding="utf-8"))["program"] == "BEGIN { }"


@pytest.mark.parametrize("probe", ["tcp_conn_request", "fbt::tcp_conn_request:entry"])
def test_refused_probe(fake_dtrace: Fake, script: Path, probe: str) -> None:
    """A refused probe is fatal if the program has it, but not when only compiling."""
    command = fake_dtrace({"refuse": probe}, READY, END)
    result = run(command, "-s", script)
    assert (result.stdout, result.returncode) == ("", 1)
    assert "could not enable tracing" in result.stderr
    assert "tcp_conn_request" in result.stderr
    compiled = run(command, "-e", "-s", script)
    assert (compiled.stdout, compiled.stderr, compiled.returncode) == ("", "", 0)
    script.write_text("BEGIN { }", encoding="utf-8")
    assert run(command, "-s", script).stdout == "ready 5 4026531840\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 1, "no probes specified"),
        (["-s", "/nonexistent/x.d"], 1, "failed to open /nonexistent/x.d: No such file"),
        (["-k"], 2, "option -k not recognized"),
    ],
)
def test_errors(fake_dtrace: Fake, arguments: list[str], status: int, message: str) -> None:
    """The fake refuses what dtrace(1) refuses, with its exit status."""
    result = run(fake_dtrace(), *arguments)
    assert (result.stdout, result.returncode) == ("", status)
    assert result.stderr.startswith(f"dtrace: {message}")


def test_arguments_of_the_program(fake_dtrace: Fake, script: Path) -> None:
    """An argument that the program does not use is an error."""
    command = fake_dtrace(READY, END)
    assert "extraneous argument '22'" in run(command, "-s", script, "22").stderr
    script.write_text("BEGIN { port = $1; }", encoding="utf-8")
    assert run(command, "-s", script, "22").returncode == 0


def test_unprivileged(fake_dtrace: Fake, script: Path) -> None:
    """Without privileges, the fake refuses and exits with 2, but prints its version."""
    command = fake_dtrace({"unprivileged": True}, READY)
    result = run(command, "-s", script)
    assert (result.stdout, result.returncode) == ("", 2)
    assert "run as root" in result.stderr
    assert run(command, "-V").stdout == "dtrace: D 2.0.7\n"


def test_listing(fake_dtrace: Fake) -> None:
    """The fake lists the probes of its functions, and names a description without a match."""
    header = "   ID   PROVIDER            MODULE                          FUNCTION NAME"
    wanted = ["-n", "fbt:ip:tcp_input_listener:entry", "-n", "fbt:vmlinux:tcp_conn_request:entry"]
    result = run(fake_dtrace(), "-l", *wanted)
    assert result.stdout.splitlines() == [
        header,
        " 2435        fbt           vmlinux                  tcp_conn_request entry",
    ]
    assert result.stderr == (
        "dtrace: failed to match fbt:ip:tcp_input_listener:entry: No probe matches description\n"
    )
    assert result.returncode == 0
    functions = {"functions": [["ip", "tcp_accept"], ["ip", "tcp_input_listener"]]}
    result = run(fake_dtrace(functions), "-l", *wanted[:2], "-n", "fbt::tcp_accept:")
    assert [line.split()[1:] for line in result.stdout.splitlines()[1:]] == [
        ["fbt", "ip", "tcp_input_listener", "entry"],
        ["fbt", "ip", "tcp_accept", "entry"],
        ["fbt", "ip", "tcp_accept", "return"],
    ]
    assert result.stderr == ""
    result = run(fake_dtrace({"unprivileged": True}), "-l", *wanted)
    assert (result.stdout, result.returncode) == ("", 2)


def test_trial(fake_dtrace: Fake, script: Path) -> None:
    """A program that only exits does so before any step; any other program runs the steps."""
    script.write_text("BEGIN { exit(3); }\n", encoding="utf-8")
    result = run(fake_dtrace({"refuse": "BEGIN"}, READY), "-q", "-s", script)
    assert (result.stdout, result.stderr, result.returncode) == ("\n", "", 3)
    script.write_text("BEGIN { exit(3); }\nEND { }\n", encoding="utf-8")
    result = run(fake_dtrace(READY, END), "-q", "-s", script)
    assert (result.stdout, result.returncode) == ("ready 5 4026531840\n", 0)


def test_tally_takes_its_rows(fake_dtrace: Fake, script: Path) -> None:
    """A tally accepts the fake's rows of zones, and counts each event once."""
    steps = [
        *(READY, {"rows": [zone_rows.told(22), ROW]}, {"tick": 2}),
        *({"rows": [MORE]}, {"tick": 2}, END),
    ]
    assert established(run(fake_dtrace(*steps), "-s", script)) == [5 + 3]


def established(result: subprocess.CompletedProcess[str]) -> list[int]:
    """Return the established connections of each listener, counted by a tally."""
    table = ListenerTable()
    table.watch(SESSION, Watched())
    reader = Tally(table, SESSION)
    for text in result.stdout.splitlines():
        record = reader.feed(text)
        assert record is None or isinstance(record, Ready | Tick)
    return [listener.established for listener in table]


# Linux


@pytest.fixture
def linux(tmp_path: Path) -> Path:
    """Return the program for Linux with a quick heartbeat."""
    path = tmp_path / "linux.d"
    path.write_text(load("linux").text.replace("tick-1s", "tick-5ms"), encoding="utf-8")
    return path


def lines_of_linux(output: str) -> list[str]:
    """Return the lines of an output, without the times of ticks and sets."""
    return [
        text.rpartition(" ")[0] if text.startswith(("tick", "set")) else text
        for text in output.split("\n")
    ][:-1]


def test_both_sets_of_linux(fake_dtrace: Fake, linux: Path) -> None:
    """With the program for Linux, each heartbeat, and the end too, is a tick and two sets."""
    even, odd = counted(22, 5, ESTABLISHED), counted(22, 3, ESTABLISHED)
    beat = ["tick", "set", even, "set", odd]
    steps = [{"rows": [f"1 {odd}", f"0 {even}"]}, READY, {"tick": 2}, END]
    assert lines_of_linux(run(fake_dtrace(*steps), "-s", linux).stdout) == [
        *("ready 5 4026531840", *beat, *beat)
    ]
    with running(fake_dtrace(*steps[:2]), linux) as process:
        line(process)
        process.terminate()
        output, _ = process.communicate(timeout=30)
    assert lines_of_linux(output) == ["", *beat, ""]


def test_linux_calls(fake_dtrace: Fake, tmp_path: Path) -> None:
    """The second program for Linux has its own steps, ticks without sets, and is not recorded."""
    saved, calls = tmp_path / "saved", tmp_path / "linux_calls.d"
    calls.write_text(load("linux_calls").text.replace("tick-1s", "tick-5ms"), encoding="utf-8")
    steps = [{"save": str(saved)}, {"print": "limit 1 1 1"}, END]
    own = [{"ready": "1"}, {"tick": 1}, {"print": "closed 1 1"}, END]
    result = run(fake_dtrace(*steps, {"calls": own}), "-s", calls)
    assert lines_of_linux(result.stdout) == ["ready 5 1", "tick", "closed 1 1"]
    assert not saved.exists()
    with running(fake_dtrace(*steps), calls) as process:
        assert line(process) == "ready 5 4026531840"
        assert line(process).startswith("tick ")


def test_once(fake_dtrace: Fake, script: Path, tmp_path: Path) -> None:
    """Only the first process runs the steps of `once`; all later ones run the other steps."""
    steps = [{"once": {"mark": str(tmp_path / "mark"), "steps": [{"exit": 3}]}}, READY, END]
    command = fake_dtrace(*steps)
    assert [run(command, "-s", script).returncode for _ in range(3)] == [3, 0, 0]


def test_tally_takes_rows_of_linux(fake_dtrace: Fake, linux: Path) -> None:
    """A tally accepts the fake's rows over a change of sets, and counts each event once."""
    told_row = f"0 {told(22)}"

    def held(even: int, odd: int) -> dict[str, list[str]]:
        rows = [f"0 {counted(22, even, ESTABLISHED)}", f"1 {counted(22, odd, ESTABLISHED)}"]
        return {"rows": [told_row, *(row for row, n in zip(rows, (even, odd), strict=True) if n)]}

    steps = [
        *(READY, held(5, 0), {"tick": 2}, held(6, 3), {"tick": 2}),
        *({"generation": 0}, held(2, 4), {"tick": 2}, END),
    ]
    assert established(run(fake_dtrace(*steps), "-s", linux)) == [6 + 4 + 2]
