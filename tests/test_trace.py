"""The program that the trace command runs, on hosts where only the kernel can decide it."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from dtrace_exporter.config import DTraceConfig
from dtrace_exporter.families import families
from dtrace_exporter.trace import HEADER, table, trace
from dtrace_exporter.tracing import program, rendering
from dtrace_exporter.tracing.dtrace import DTraceError
from dtrace_exporter.tracing.program import ProgramError
from fake_steps import FakeDTrace
from pseudo_terminal import on_terminal

pytestmark = pytest.mark.usefixtures("no_child_left")

LINUX = families()["linux"].q_capacity
LINE = "100,2026 Nov 22 08:00:00,drop:q0_full,0:ffffc0a80102,40000,22,9,1,8"
SHOWN = "100,2026 Nov 22 08:00:00,drop:q0_full,192.168.1.2,40000,22,9,1,8"


@pytest.fixture(autouse=True)
def _solaris(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this system's name not decide the program, as on Solaris."""
    monkeypatch.setattr(program, "local", lambda _: "")


@pytest.fixture
def own_trace(tmp_path: Path) -> Path:
    """Return a user's own program that prints a line for each event."""
    path = tmp_path / "own_trace.d"
    text = "inline int PORT = 0;\ninline int CONN_TCP = 0x28;\nBEGIN\n{\n}\n"
    path.write_text(text, encoding="utf-8")
    return path


def traced(command: list[str], **dtrace: Any) -> tuple[int, list[str]]:
    """Trace port 22 until dtrace(1) ends, and return the exit status and the lines."""
    out = StringIO()
    status = asyncio.run(trace(DTraceConfig(command=tuple(command), **dtrace), 22, out))
    return status, out.getvalue().splitlines()


@pytest.mark.parametrize(
    ("functions", "name"),
    [
        ([["ip", "tcp_input_listener"]], "illumos"),
        ([["ip", "tcp_conn_request"]], "solaris10"),
        ([["vmlinux", "tcp_conn_request"]], "linux"),
    ],
)
def test_program_of_the_kernel(
    functions: list[list[str]], name: str, fake_dtrace: FakeDTrace, tmp_path: Path
) -> None:
    """The kernel decides the program, and the trace program of that family runs."""
    saved = tmp_path / "start.json"
    steps = [{"functions": functions}, {"save": str(saved)}, {"print": [HEADER, LINE]}, {"exit": 0}]
    assert traced(fake_dtrace(*steps)) == (0, [HEADER, SHOWN])
    start = json.loads(saved.read_text(encoding="utf-8"))
    assert start["argv"] == ["-s", "/dev/stdin"]
    counters = program.drop_counters(["dtrace"]) or program.no_drop_counters()
    expected = rendering.render(program.load_trace(name), rendering.window(1.0), 22, counters)
    assert start["program"] == expected


def test_configured_program(own_trace: Path, fake_dtrace: FakeDTrace, tmp_path: Path) -> None:
    """If the configuration names the program, the kernel is not asked."""
    saved = tmp_path / "start.json"
    command = fake_dtrace({"functions": []}, {"save": str(saved)}, {"exit": 3})
    settings = {"program": str(own_trace), "offsets": {"conn_tcp": 0x20}}
    assert traced(command, **settings) == (3, [])
    text = json.loads(saved.read_text(encoding="utf-8"))["program"]
    assert text.startswith("inline int PORT = 22;\ninline int CONN_TCP = 32;\nBEGIN\n{\n}\n")
    saved.unlink()
    assert traced(command, program="linux") == (3, [])
    text = json.loads(saved.read_text(encoding="utf-8"))["program"]
    assert text.splitlines()[0] == "#!/usr/sbin/dtrace -s"
    assert HEADER in text


def test_a_kernel_that_cannot_be_asked(fake_dtrace: FakeDTrace) -> None:
    """If dtrace(1) may not be used or no program fits, nothing runs and the reason is raised."""
    with pytest.raises(DTraceError, match=r"^dtrace: run as root"):
        traced(fake_dtrace({"unprivileged": True}))
    with pytest.raises(DTraceError, match=r"^no D program fits this kernel"):
        traced(fake_dtrace({"functions": []}, {"print": HEADER}))
    with pytest.raises(ProgramError, match="the D program nonsense_trace: No such file"):
        traced(fake_dtrace(), program="nonsense")


def test_endless_messages(
    fake_dtrace: FakeDTrace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Messages of dtrace(1) are passed on at once, and not stored until the first line."""
    end = tmp_path / "end"
    steps = [{"stderr": ["message"] * 1000}, {"wait": str(end)}, {"exit": 3}]

    async def test() -> int:
        config = DTraceConfig(command=tuple(fake_dtrace(*steps)), program="linux")
        tracing = asyncio.create_task(trace(config, 22, StringIO()))
        said = ""
        async with asyncio.timeout(20):
            while said.count("message\n") < 1000:
                said += capsys.readouterr().err
                await asyncio.sleep(0.01)
        end.touch()
        return await tracing

    assert asyncio.run(test()) == 3
    assert capsys.readouterr().err == ""


def test_parts_left_out(fake_dtrace: FakeDTrace, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts that the kernel cannot run are left out one by one, and the rest is traced."""
    missing = ("tcp_accept_swap:entry", "tcp_send_conn_ind:entry")
    why = "probe description fbt:ip:{} does not match any probes"
    lacks = [{"lacks": [probe, why.format(probe)]} for probe in missing]
    functions = {"functions": [["ip", "tcp_input_listener"]]}
    steps = [functions, *lacks, {"print": [HEADER, LINE]}, {"exit": 0}]
    assert traced(fake_dtrace(*steps)) == (0, [HEADER, SHOWN])
    said = capsys.readouterr().err.splitlines()
    left = [line.split(": ")[2] for line in said if "left out what this kernel cannot do" in line]
    assert left == ["tli_accepts", "streams"]
    assert all("does not match any probes" in line for line in said)


def test_refused(fake_dtrace: FakeDTrace, capsys: pytest.CaptureFixture[str]) -> None:
    """If the kernel refuses the core, it is not tried again, and the error is shown once."""
    functions = {"functions": [["ip", "tcp_input_listener"]]}
    lacks = {"lacks": ["SYN_FLAG", "no \x1b[2Jsuch thing"]}
    status, lines = traced(fake_dtrace(functions, lacks, {"print": [HEADER, LINE]}))
    assert (status, lines) == (1, [])
    said = capsys.readouterr().err
    assert said.count("such thing") == 1
    assert "\x1b" not in said
    assert "left out" not in said


FULL = "101,2026 Nov 22 08:00:01,drop:q_full_ack,20010db8000000ff:ff0001000200cafe,40001,22,0,9,8"


def plain(text: str, _style: str) -> str:
    """Return the text as it is."""
    return text


def test_table() -> None:
    """The columns stand below each other, whatever the rows contain."""
    row = table(130, plain, LINUX)
    rows = [row(HEADER), row(LINE.replace(":q0_full", "")), row(FULL), row(LINE)]
    assert rows[0].split() == HEADER.replace(",", " ").split()
    # The long address makes its column wider, from its own row on.
    assert len({len(row) for row in rows[:2]}) == len({len(row) for row in rows[2:]}) == 1
    for at, end in ((0, 15), (1, 119)):
        assert {row[at:end].rstrip() != "" for row in rows} == {True}
    assert [row.rindex(last) for row, last in zip(rows[2:], "88", strict=True)] == [
        len(rows[2]) - 1
    ] * 2
    assert rows[2].split() == [
        *("101", "2026", "Nov", "22", "08:00:01", "drop:q_full_ack"),
        *("2001:db8:0:ff:ff00:100:200:cafe", "40001", "22", "0", "9", "8"),
    ]


def test_table_for_a_narrow_terminal() -> None:
    """In 80 columns the table leaves out what is known and what is long."""
    row = table(80, plain, LINUX)
    rows = [row(HEADER), row(LINE)]
    assert {len(row) for row in rows} == {76}
    assert rows[0].split("  ")[0] == "Date"
    assert rows[1].split() == [
        *("08:00:00", "drop:q0_full", "192.168.1.2"),
        *["40000", "9", "1", "8"],
    ]


def test_table_of_what_is_none() -> None:
    """A line that is not the program's is printed without terminal commands."""
    row = table(80, plain, LINUX)
    assert row("dtrace: \x1b[2Jhm\x07") == "dtrace:  [2Jhm "
    assert row("") == ""


@pytest.mark.parametrize(
    ("q", "limit", "style", "sun"),
    [
        *(("0", "8", "", ""), ("7", "8", "", "yellow"), ("8", "8", "yellow", "red")),
        *(("9", "8", "red", "red"), ("0", "0", "", ""), ("1", "0", "red", "red")),
        *(("x", "8", "", ""), ("9" * 5000, "8", "", ""), ("1", "9" * 5000, "", "")),
    ],
)
def test_fullness(q: str, limit: str, style: str, sun: str) -> None:
    """A queue that is full or nearly full has a colour; Linux' Q holds one more than Qmax."""
    styles = []

    def paint(text: str, style: str) -> str:
        styles.append(style)
        return text

    for capacity, expected in ((LINUX, style), (families()["illumos"].q_capacity, sun)):
        styles.clear()
        table(80, paint, capacity)(f"1,d,syn,0:1,40000,22,99,{q},{limit}")
        assert styles == ["", "", "", "", "", expected, ""]


@pytest.mark.skipif(sys.platform != "linux", reason="terminals elsewhere end otherwise")
@pytest.mark.parametrize("colour", [True, False])
def test_on_a_terminal(colour: bool, fake_dtrace: FakeDTrace, tmp_path: Path) -> None:
    """A terminal gets a table until Ctrl-C, in colour unless NO_COLOR is set."""
    file = tmp_path / "c.yml"
    steps = [{"print": [HEADER, LINE, FULL]}]
    settings = {"command": fake_dtrace(*steps), "program": "linux"}
    file.write_text(json.dumps({"dtrace": settings}), encoding="utf-8")
    command = [sys.executable, "-m", "dtrace_exporter", "trace", f"--config.file={file}", "22"]
    with on_terminal(command, 80, **({} if colour else {"NO_COLOR": "1"})) as screen:
        screen.wait("cafe.*\n")
        screen.type("\x03")
        assert screen.end() == 0
    assert ("\x1b[1;31mdrop:q0_full" in screen.text) is colour
    assert ("\x1b" in screen.text) is colour
    text = re.sub(r"\x1b\[[0-9;]*m", "", screen.text)
    header, *rows, rest = text.split("\r\n", 3)
    assert header.split()[0] == "Date"
    assert [row.split()[:2] for row in rows] == [
        ["08:00:00", "drop:q0_full"],
        ["08:00:01", "drop:q_full_ack"],
    ]
    # Messages of dtrace(1) at its end may follow.
    assert rest.startswith("^C")
    assert rest.endswith("\r\n")
    assert "Traceback" not in rest


@pytest.mark.skipif(sys.platform != "linux", reason="terminals elsewhere end otherwise")
def test_interrupted_before_it_begins(tmp_path: Path) -> None:
    """Ctrl-C before the kernel answers ends the command without a traceback."""
    file = tmp_path / "c.yml"
    saved = tmp_path / "started"
    asked = ["sh", "-c", f"touch {saved}; exec sleep 600", "dtrace"]
    file.write_text(json.dumps({"dtrace": {"command": asked}}), encoding="utf-8")
    command = [sys.executable, "-m", "dtrace_exporter", "trace", f"--config.file={file}", "22"]
    with on_terminal(command, 80) as screen:
        while not saved.exists():
            screen.wait("")
        screen.type("\x03")
        assert screen.end() == 0
    assert screen.text.strip() == "^C"
