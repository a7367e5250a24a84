"""The fake dtrace(1) does what its text says, or tests that use it show nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dtrace_exporter import rows, tally
from dtrace_exporter.listeners import ListenerTable, SessionId
from dtrace_exporter.program import load
from dtrace_exporter.sun_rows import PROTOCOL, Ready, Tick, parse
from dtrace_exporter.sun_tally import Tally
from linux_rows import ESTABLISHED, counted, told

Fake = Callable[..., list[str]]
SESSION = SessionId("", "all")
EVEN = "row 0 1 f000000000500080 0 0 a 5 0 17179869184"
ODD = "row 1 1 f000000000500080 0 0 a 3 0 17179869184"
READY = {"ready": "4026531840"}
END = {"exit": 0}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Return a D program whose heartbeat is quick."""
    path = tmp_path / "program.d"
    path.write_text("BEGIN { } fbt::tcp_conn_request:entry { } tick-5ms { }\n", encoding="utf-8")
    return path


def run(command: list[str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a fake that ends by itself."""
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
    """Wait for the next line of a fake."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def shown(output: str) -> list[str]:
    """Return the lines of an output, tick lines without their time."""
    return [
        text.rpartition(" ")[0] if text.startswith("tick") else text for text in output.split("\n")
    ][:-1]


def test_without_steps(fake_dtrace: Fake, script: Path) -> None:
    """Without steps it is ready and then ticks for ever, in generation 0."""
    with running(fake_dtrace(), script) as process:
        assert parse(line(process)) == Ready(PROTOCOL, "4026531840")
        times = []
        for _ in range(3):
            tick = parse(line(process))
            assert isinstance(tick, Tick)
            assert tick.generation == 0
            times.append(tick.time)
    assert times == sorted(set(times))


def test_one_set_in_the_first_generation(fake_dtrace: Fake, script: Path) -> None:
    """In generation 0 there is no other set: each heartbeat is one tick line and its rows."""
    result = run(fake_dtrace(READY, {"rows": [EVEN]}, {"tick": 2}, END), "-s", script)
    assert shown(result.stdout) == ["ready 3 4026531840", *["tick 0", EVEN] * 2]


@pytest.mark.parametrize(
    ("generation", "first", "next_one"),
    [
        (1, ["tick 0", EVEN, "tick 1", ODD], ["tick 1", ODD]),
        (2, ["tick 2", EVEN, "tick 1", ODD], ["tick 2", EVEN]),
        (7, ["tick 6", EVEN, "tick 7", ODD], ["tick 7", ODD]),
    ],
)
def test_set_at_rest(
    fake_dtrace: Fake, script: Path, generation: int, first: list[str], next_one: list[str]
) -> None:
    """A later generation's first heartbeat has both sets, each behind its tick, the even first."""
    steps = [{"generation": generation}, {"rows": [ODD, EVEN]}, {"tick": 3}, END]
    result = run(fake_dtrace(*steps), "-s", script)
    assert shown(result.stdout) == first + next_one * 2


def test_new_generation_has_an_empty_set(fake_dtrace: Fake, script: Path) -> None:
    """The set that comes into use again is empty, the one that comes to rest is not."""
    steps = [{"rows": [EVEN, ODD]}, {"generation": 1}, {"tick": 1}, END]
    result = run(fake_dtrace(*steps), "-s", script)
    assert shown(result.stdout) == ["tick 0", EVEN, "tick 1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("generation", "end"),
    [
        (0, ["", "tick 0", EVEN, ""]),
        (1, ["", "tick 0", EVEN, "tick 1", ODD, ""]),
        (2, ["", "tick 2", EVEN, "tick 1", ODD, ""]),
    ],
)
def test_end(
    fake_dtrace: Fake, script: Path, number: signal.Signals, generation: int, end: list[str]
) -> None:
    """A signal while it runs makes it print all sets between blank lines and exit with 0."""
    steps = [{"generation": generation}, {"rows": [EVEN, ODD]}, READY]
    with running(fake_dtrace(*steps), script) as process:
        assert line(process) == "ready 3 4026531840"
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
    assert shown(output) == end
    assert process.returncode == 0


def test_signal_while_it_ticks(fake_dtrace: Fake, script: Path) -> None:
    """A signal ends it between two heartbeats as well as after the last step."""
    with running(fake_dtrace(), script) as process:
        line(process)
        line(process)
        process.terminate()
        output, _ = process.communicate(timeout=30)
    assert shown(output)[-3:] == ["", "tick 0", ""]
    assert process.returncode == 0


def test_ignored_signal(fake_dtrace: Fake, script: Path) -> None:
    """A signal to ignore does not end it; another one does."""
    with running(fake_dtrace({"ignore": "SIGTERM"}, READY, {"tick": True}), script) as process:
        line(process)
        process.terminate()
        # It would have ended before the first of these.
        assert [line(process).split()[:2] for _ in range(3)] == [["tick", "0"]] * 3
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_signal_before_it_runs(fake_dtrace: Fake, tmp_path: Path) -> None:
    """A signal while it would still compile kills it, and it prints nothing."""
    fifo = tmp_path / "program.d"
    os.mkfifo(fifo)
    with running(fake_dtrace(), fifo) as process, fifo.open("w", encoding="utf-8"):
        # That the pipe could be opened shows that it is reading its program.
        process.terminate()
        output, _ = process.communicate(timeout=30)
    assert (output, process.returncode) == ("", -signal.SIGTERM)


def test_output_steps(fake_dtrace: Fake, script: Path) -> None:
    """What it is told to print comes out as it is, on the output that it is meant for."""
    steps = [{"print": ["a", "b"]}, {"print": "c"}, {"stderr": ["d"]}, {"raw": "AP8K"}, {"exit": 3}]
    result = subprocess.run(
        [*fake_dtrace(*steps), "-s", str(script)], capture_output=True, timeout=30
    )
    assert (result.stdout, result.stderr) == (b"a\nb\nc\n\x00\xff\n", b"d\n")
    assert result.returncode == 3


def test_save_and_wait(fake_dtrace: Fake, script: Path, tmp_path: Path) -> None:
    """It writes down how it was started, and goes on when a file is there."""
    saved, go = tmp_path / "saved", tmp_path / "go"
    steps = [{"save": str(saved)}, READY, {"wait": str(go)}, {"print": "on"}]
    with running(fake_dtrace(*steps), script) as process:
        assert line(process) == "ready 3 4026531840"
        start = json.loads(saved.read_text(encoding="utf-8"))
        assert start == {
            "argv": ["-q", "-s", str(script)],
            "program": script.read_text(encoding="utf-8"),
            "pid": process.pid,
        }
        go.touch()
        assert line(process) == "on"


def test_program_on_standard_input(fake_dtrace: Fake, tmp_path: Path) -> None:
    """The program may come on standard input."""
    saved = tmp_path / "saved"
    command = [*fake_dtrace({"save": str(saved)}, END), "-s", "/dev/stdin"]
    subprocess.run(command, input="BEGIN { }", text=True, timeout=30, check=True)
    assert json.loads(saved.read_text(encoding="utf-8"))["program"] == "BEGIN { }"


@pytest.mark.parametrize("probe", ["tcp_conn_request", "fbt::tcp_conn_request:entry"])
def test_refused_probe(fake_dtrace: Fake, script: Path, probe: str) -> None:
    """A probe that cannot be enabled is fatal where the program has it, but not when compiling."""
    command = fake_dtrace({"refuse": probe}, READY, END)
    result = run(command, "-s", script)
    assert (result.stdout, result.returncode) == ("", 1)
    assert "could not enable tracing" in result.stderr
    assert "tcp_conn_request" in result.stderr
    compiled = run(command, "-e", "-s", script)
    assert (compiled.stdout, compiled.stderr, compiled.returncode) == ("", "", 0)
    script.write_text("BEGIN { }", encoding="utf-8")
    assert run(command, "-s", script).stdout == "ready 3 4026531840\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 1, "no probes specified"),
        (["-s", "/nonexistent/x.d"], 1, "failed to open /nonexistent/x.d: No such file"),
        (["-k"], 2, "option -k not recognized"),
    ],
)
def test_errors(fake_dtrace: Fake, arguments: list[str], status: int, message: str) -> None:
    """What dtrace(1) refuses it refuses, with its exit status."""
    result = run(fake_dtrace(), *arguments)
    assert (result.stdout, result.returncode) == ("", status)
    assert result.stderr.startswith(f"dtrace: {message}")


def test_arguments_of_the_program(fake_dtrace: Fake, script: Path) -> None:
    """An argument that the program does not use is an error, one that it does use is not."""
    command = fake_dtrace(READY, END)
    assert "extraneous argument '22'" in run(command, "-s", script, "22").stderr
    script.write_text("BEGIN { port = $1; }", encoding="utf-8")
    assert run(command, "-s", script, "22").returncode == 0


def test_unprivileged(fake_dtrace: Fake, script: Path) -> None:
    """Without privileges it says so and exits with 2, but tells its version."""
    command = fake_dtrace({"unprivileged": True}, READY)
    result = run(command, "-s", script)
    assert (result.stdout, result.returncode) == ("", 2)
    assert "run as root" in result.stderr
    assert run(command, "-V").stdout == "dtrace: D 2.0.7\n"


def test_listing(fake_dtrace: Fake) -> None:
    """It lists the probes of the functions there are, and says which description has none."""
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
    """A program that only exits does so before any step; one that does more does not."""
    script.write_text("BEGIN { exit(3); }\n", encoding="utf-8")
    result = run(fake_dtrace({"refuse": "BEGIN"}, READY), "-q", "-s", script)
    assert (result.stdout, result.stderr, result.returncode) == ("\n", "", 3)
    script.write_text("BEGIN { exit(3); }\nEND { }\n", encoding="utf-8")
    result = run(fake_dtrace(READY, END), "-q", "-s", script)
    assert (result.stdout, result.returncode) == ("ready 3 4026531840\n", 0)


def test_tally_takes_its_rows(fake_dtrace: Fake, script: Path) -> None:
    """Over a change of generations a tally takes every line and counts each event once."""
    more = EVEN.replace(" a 5 ", " a 6 ")
    steps = [
        READY,
        *({"rows": [EVEN]}, {"tick": 2}),
        *({"generation": 1}, {"rows": [more, ODD]}, {"tick": 2}),
        *({"generation": 2}, {"rows": [EVEN, ODD]}, {"tick": 2}),
        END,
    ]
    table = ListenerTable()
    table.watch(SESSION, None)
    sun = Tally(table, SESSION)
    for text in run(fake_dtrace(*steps), "-s", script).stdout.splitlines():
        sun.feed(text)
    assert [listener.established for listener in table] == [6 + 3 + 5]


# Linux


@pytest.fixture
def linux(tmp_path: Path) -> Path:
    """Return the program for Linux, with a quick heartbeat."""
    path = tmp_path / "linux.d"
    path.write_text(load("linux").text.replace("tick-1s", "tick-5ms"), encoding="utf-8")
    return path


def lines_of_linux(output: str) -> list[str]:
    """Return the lines of an output, without when they were printed and when a set began."""
    return [
        text.rpartition(" ")[0] if text.startswith(("tick", "set")) else text
        for text in output.split("\n")
    ][:-1]


def test_both_sets_of_linux(fake_dtrace: Fake, linux: Path) -> None:
    """With the program for Linux each heartbeat is a tick and two sets, and so is the end."""
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
    """The second program for Linux has steps of its own, ticks without sets, and is not saved."""
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
    """Steps for once are gone through by the first process, the others by all after it."""
    steps = [{"once": {"mark": str(tmp_path / "mark"), "steps": [{"exit": 3}]}}, READY, END]
    command = fake_dtrace(*steps)
    assert [run(command, "-s", script).returncode for _ in range(3)] == [3, 0, 0]


def test_tally_takes_rows_of_linux(fake_dtrace: Fake, linux: Path) -> None:
    """Over a change of sets a tally takes every line of them and counts each event once."""
    told_row = f"0 {told(22)}"

    def held(even: int, odd: int) -> dict[str, list[str]]:
        rows = [f"0 {counted(22, even, ESTABLISHED)}", f"1 {counted(22, odd, ESTABLISHED)}"]
        return {"rows": [told_row, *(row for row, n in zip(rows, (even, odd), strict=True) if n)]}

    steps = [
        *(READY, held(5, 0), {"tick": 2}, held(6, 3), {"tick": 2}),
        *({"generation": 2}, held(2, 4), {"tick": 2}, END),
    ]
    table = ListenerTable()
    table.watch(SESSION, None)
    reader = tally.Tally(table, SESSION)
    for text in run(fake_dtrace(*steps), "-s", linux).stdout.splitlines():
        record = reader.feed(text)
        assert record is None or isinstance(record, rows.Ready | rows.Tick)
    assert [listener.established for listener in table] == [6 + 4 + 2]
