"""Hostile hosts against the real service, in a separate process that measures its event loop.

Each attack prints its cost: the longest step of the loop without garbage collection, the time of
the collection, the growth of the memory, and the size and time of a scrape.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import zone_rows
from dtrace_exporter import (
    config,
    families,
    namespaces,
    netstat,
    senders,
    service,
    trace,
    yaml_reader,
)
from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.limits import Limits
from dtrace_exporter.listeners import SessionId
from dtrace_exporter.scripts import conversions
from dtrace_exporter.service import Service
from dtrace_exporter.state import State
from dtrace_exporter.tracing import diagnostics, dtrace, program, refusal, rendering, rows
from dtrace_exporter.tracing.plan import Plan
from dtrace_exporter.tracing.session import Session
from dtrace_exporter.watched import named
from linux_rows import told, unix_refused
from step_meter import metered

METER = Path(__file__).with_name("step_meter.py")
LINUX, ZONES = "ready 5 1", "ready 5 global"
MANY = 50_000
STEP_MS = 250
"""A step should take less than 50 ms; the limit is higher because the machine may be busy."""
MEMORY_MB = 300

Lines = Callable[[], Iterator[str]]


def wide(number: int, *, place: int = 1, address: str = "", cookie: int = 1, port: int = 0) -> str:
    """Return the row of one of very many listeners."""
    who = f"{(1 << 47 | number) << 13:x} 1 10 {place} {cookie}"
    where = address or f"10.{number >> 16}.0.1"
    return f"listener {who} {where} {port or number % 65536} 0 0 8"


def zone(number: int, telling: int = 1, *, name: str = "global", port: int | None = None) -> str:
    """Return the row of one of very many listeners in zones."""
    who = f"{(1 << 47 | number) << 16 | telling:x} {telling} {name}"
    return f"listener {who} 10.0.0.1 {number if port is None else port} 0 0 8 1"


def closed(number: int, time: int = 1) -> str:
    """Return the row about the close of one of very many sockets."""
    return f"closed {0xFFFF << 48 | 1 << 47 | number:x} {time}"


def each(start: str, make: Callable[[int], str], times: int = MANY, end: str = "tick 1") -> Lines:
    """Return a generator of a row for each number, between a start and an end."""

    def lines() -> Iterator[str]:
        yield start
        yield "set 1"
        yield from map(make, range(times))
        yield end

    return lines


def again(make: Callable[[int, int], str], times: int, size: int) -> Lines:
    """Return a generator of so many rows before each of some heartbeats."""

    def lines() -> Iterator[str]:
        yield ZONES
        for turn in range(1, times + 1):
            for number in range(size):
                yield make(number, turn)
            yield f"tick {turn}000"

    return lines


def flap(number: int) -> str:
    """Return the rows of a listener in a zone of its own that closes at once."""
    return zone(number, 1, name=f"z{number}", port=80) + "\n" + closed(number, 2)


def refused(number: int) -> str:
    """Return the rows of refusals of one of very many UNIX sockets, which has a long name."""
    return "\n".join(unix_refused(b"/" + b"x" * 100, 1, inode=number + 1, cookie=number))


def accepting(number: int, _: int) -> str:
    """Return the rows of a socket, and of many programs that accept there."""
    socket = 0xFFFF << 48 | 1 << 47 | number
    names = (f"program {socket:x} 5 {number:05}-{which:02}-{'x' * 110}" for which in range(16))
    return "\n".join((zone(number, port=number % 10_000), *names))


LINUX_ATTACKS: dict[str, Lines] = {
    "ready again and again": each(LINUX, lambda _: LINUX),
    "heartbeats": each(LINUX, lambda number: f"tick {number}"),
    "ever new sets": each(LINUX, lambda number: f"set {number}"),
    "listeners": each(LINUX, wide),
    "places": each(LINUX, lambda number: wide(number, place=number)),
    "uses of a place": each(LINUX, lambda number: wide(number, cookie=number, port=80)),
    "sockets of a listener": each(LINUX, lambda number: wide(number, address="::", port=80)),
    "sockets that close": each(LINUX, closed),
    "limits of Q": each(LINUX, lambda number: f"count 1 10 {number} 1 10000001", 3 * MANY),
    "rows of nobody": each(LINUX, lambda number: f"count {number:x} 10 8 1 10000001"),
    "addresses of 16 KB": each(LINUX, lambda _: wide(1, address="fe80::1%" + "x" * 16000), 500),
    "refusals of UNIX sockets": each(LINUX, refused),
    "lines that are no rows": each(LINUX, lambda _: "x", 10 * MANY),
}
ZONES_ATTACKS: dict[str, Lines] = {
    "zones": each(ZONES, lambda number: zone(number, name="z" * 55 + str(number), port=80)),
    "listeners in zones, told again": again(zone, 5, 10_000),
    "sockets in zones, told again": again(lambda n, turn: zone(n, turn, port=80), 3, 20_000),
    "one listener told again and again": each(ZONES, lambda n: zone(1, n % 65535 + 1)),
    "listeners that come and go": each(ZONES, flap),
    "sockets at which many accept": again(accepting, 1, 20_000),
    "heartbeats after many closes": again(lambda n, turn: closed(n + 9 * turn), 3, 20_000),
}


def measure(place: Path, lines: Iterator[str], name: str, said: str = "") -> dict[str, Any]:
    """Return the cost of a host that prints some lines, and a text on standard error."""
    out, err, file = place / "out", place / "err", place / "c.yml"
    with out.open("w", encoding="ascii") as written:
        written.writelines(line + "\n" for line in lines)
    err.write_text(said, encoding="ascii")
    # The second program of a Linux host only prints that it is ready.
    script = f'grep -q "limit %x" && exec echo ready 5 1; cat {err} >&2 & cat {out}; wait'
    host = {"name": "evil", "dtrace": {"command": ["/bin/sh", "-c", script], "program": name}}
    nothing = {"command": ["/bin/true"], "program": "linux"}
    whole = {"source": "dtrace", "dtrace": nothing, "listeners": [{"port": 1}], "hosts": [host]}
    file.write_text(yaml.safe_dump(whole), encoding="ascii")
    command = [sys.executable, str(METER), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def tell(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Print the cost."""
    with capsys.disabled():
        print(  # noqa: T201
            f"\n    longest step {found['step_ms']:.0f} ms, search for garbage "
            f"{found['collection_ms']:.0f} ms, {found['memory_mb']:.0f} MB more, scrape "
            f"{found['scrape_mb']:.1f} MB in {found['scrape_s']:.2f} s",
            end=" ",
        )


def endure(
    place: Path, lines: Iterator[str], name: str, capsys: pytest.CaptureFixture[str], said: str = ""
) -> dict[str, Any]:
    """Let a host attack; no step of the loop may be long, and the memory is limited."""
    found = measure(place, lines, name, said)
    tell(found, capsys)
    assert found["step_ms"] < STEP_MS, found["step"]
    assert found["memory_mb"] < MEMORY_MB
    assert found["listeners"] <= Limits().listeners + 1
    assert any(found["up"])
    return found


@pytest.mark.parametrize("attack", LINUX_ATTACKS)
def test_linux(attack: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever rows a Linux host prints, other tasks get their turn and the memory is limited."""
    endure(tmp_path, LINUX_ATTACKS[attack](), "linux", capsys)


@pytest.mark.parametrize("attack", ZONES_ATTACKS)
def test_zones(attack: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever rows a Solaris host prints, other tasks get their turn and the memory is limited."""
    endure(tmp_path, ZONES_ATTACKS[attack](), "illumos", capsys)


@pytest.mark.parametrize(
    "said",
    [
        "x\n" * 5 * MANY,
        "dtrace: 1 drop on CPU 0\n" * MANY,
        ("dtrace: error in " + "x" * 16000) * 99,
    ],
    ids=["nothing", "losses", "endless"],
)
def test_messages(said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever a host prints on standard error, other tasks get their turn; memory is limited."""
    lines = again(lambda n, turn: zone(n, turn, port=80), 1, 10_000)
    endure(tmp_path, lines(), "illumos", capsys, said)


def test_local_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 30,000 listeners that a user opens, those beyond the limit are refused, and no rows."""
    lines = each(LINUX, wide, 30_000)
    found = endure(tmp_path, lines(), "linux", capsys)
    assert {name: sum(one[name] for one in found["refused"]) for name in ("listeners", "rows")} == {
        "listeners": 30_000 - Limits().listeners,
        "rows": 0,
    }


@pytest.mark.parametrize("addresses", [2 * MANY, 1])
def test_local_user_of_a_configured_port(
    addresses: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is long when the kernel's answer has 100,000 sockets of one port.

    They may have one address (SO_REUSEPORT), and then a SYN comes to it.
    """
    patient = replace(rendering.window(1.0), patience=math.inf)
    monkeypatch.setattr(rendering, "window", lambda _: patient)
    samples = [
        ListeningSocket(f"127.{n >> 16}.{n >> 8 & 255}.{n & 255}", 80, 0, 8, 0, key + 1)
        for key in range(2 * MANY)
        for n in [key % addresses]
    ]
    row = told(80, bound=samples[0].address, place=int(namespaces.own()))

    async def test() -> float:
        state, id_ = State(), SessionId("", "port-80")
        state.table.watch(id_, named({80: "web"}))
        command = ("/bin/sh", "-c", f"echo ready 5 {namespaces.own()}; exec sleep 600")
        plan = Plan(config.DTraceConfig(command=command), program.load("linux"), 80, {})
        one = Session(id_, plan, state, asyncio.Semaphore(1))
        await one.settled.wait()
        assert one._tally is not None
        with metered() as meter:
            for _ in range(4):
                one._tally.ticks += 1
                await asyncio.create_task(one.compare(samples, 5, {"drops": 0}))
            asyncio.get_running_loop().call_soon(one._tally.feed, row)
            await asyncio.sleep(0)
        assert len(state.table) == min(addresses, Limits().listeners)
        await one.stop()
        return 1000 * meter.longest

    step = asyncio.run(test())
    with capsys.disabled():
        print(f"\n    longest step {step:.0f} ms", end=" ")  # noqa: T201
    assert step < STEP_MS


# A reload


def large(ports: int, hosts: int) -> str:
    """Return a configuration with many ports, and with other hosts."""
    command = "dtrace: {command: [/bin/sleep, '600'], program: linux, session: shared}\n"
    listeners = "".join(f"  - port: {port}\n    name: p{port}\n" for port in range(1, ports + 1))
    others = "".join(
        f"  - name: host-{host}\n    {command}    listeners: [{{port: 80, name: web}}]\n"
        for host in range(hosts)
    )
    return f"source: dtrace\n{command}listeners:\n{listeners}hosts:\n{others or '  []'}"


def test_reload(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reload of 1,000 ports and 20 hosts reads the file in a thread, not in the event loop."""
    threads = []

    def load(*args: Any) -> config.Config:
        threads.append(threading.current_thread())
        return config.load(*args)

    monkeypatch.setattr(service, "load", load)
    path = tmp_path / "c.yml"
    path.write_text(large(1, 0), encoding="ascii")

    async def test() -> tuple[float, float]:
        one = Service(path, config.load(path))
        await one.start()
        with metered() as meter:
            path.write_text(large(1000, 20), encoding="ascii")
            began = time.monotonic()
            await one.reload()
            took = time.monotonic() - began
            assert len(one.sessions) == 2 * 21
            path.write_text(large(999, 0), encoding="ascii")
            await one.reload()
        await one.stop()
        return 1000 * meter.longest, took

    gc.collect()
    step, took = asyncio.run(test())
    with capsys.disabled():
        print(f"\n    longest step {step:.0f} ms of {took:.1f} s", end=" ")  # noqa: T201
    assert step < STEP_MS
    assert len(threads) == 2
    assert threading.main_thread() not in threads


# Patterns

ALPHABET = ["a", "0", " ", "-", ".", ":", "1 ", "a:", "::", "* ", "()", "line ", "1h", "ms", "9"]
STARTS = [
    "",
    "dtrace: ",
    "dtrace: error in ",
    "dtrace: error on enabled probe ID ",
    "dtrace: 1 failed speculation (",
    "dtrace: 1 drop with non-empty ",
    "dtrace: failed to compile script /dev/stdin: line ",
    "dtrace: invalid probe specifier fbt::",
    "f:g:",
    "0123456789abcdef:",
    "line 1: printa( ) argument #1 is incompatible with conversion #1 prototype:\nconversion: ",
]
PATTERNS = {
    f"{module.__name__}.{name}": value
    for module in (
        *(config, conversions, diagnostics, dtrace, families, program, rows, senders, trace),
        yaml_reader,
    )
    for name, value in vars(module).items()
    if isinstance(value, re.Pattern)
}


def hostile(size: int) -> Iterator[str]:
    """Yield lines of about this size, in the same order for each size."""
    for start in STARTS:
        for piece in ALPHABET:
            yield start + piece * (size // len(piece)) + "!"


def shortest(work: Callable[[str], object], text: str) -> float:
    """Return the CPU time of the fastest of three tries."""
    times = []
    for _ in range(3):
        began = time.thread_time()
        work(text)
        times.append(time.thread_time() - began)
    return min(times)


def assert_linear(work: Callable[[str], object], what: str) -> None:
    """Check that no text of four times the size takes much more than four times as long.

    A time below five milliseconds always passes, because it is too short to compare.
    """
    for small, big in zip(hostile(4000), hostile(16000), strict=True):
        took = shortest(work, big)
        if took > 0.005:
            assert took < 10 * shortest(work, small), (what, big[:60])


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_are_linear(name: str) -> None:
    """No pattern takes more than linear time, whatever the text and wherever the match begins."""
    pattern = PATTERNS[name]
    for method in (pattern.match, pattern.fullmatch, pattern.search, pattern.findall):
        assert_linear(method, method.__name__)


READERS: dict[str, Callable[[str], object]] = {
    "message": diagnostics.classify,
    "trace": trace.csv,
    "reason": dtrace._plain,
    "blame": lambda text: refusal.blame(
        text, program.load("illumos").text, families.families()["illumos"]
    ),
}


def read_netstat(text: str) -> None:
    """Read what netstat(1) of FreeBSD may print."""
    with suppress(OSError):
        deque(netstat.sockets(b'{"statistics": {"socket": [' + text.encode()))


def read(line: str) -> None:
    """Read any line as a row."""
    reader = rows.Reader()
    reader.read("set 1")
    with suppress(rows.RowError):
        reader.read(line)


@pytest.mark.parametrize("name", [*READERS, "netstat", "row"])
def test_readers_are_linear(name: str) -> None:
    """Nothing that reads the output of a host takes more than linear time."""
    assert_linear({**READERS, "netstat": read_netstat, "row": read}[name], name)


def read_behind(start: str, text: str) -> None:
    """Read a row that continues with a text."""
    read(start + text)


def read_within(start: str, text: str) -> None:
    """Read a row with a text in place of its first space."""
    read(start.replace(" ", text, 1))


def test_rows_of_any_length_are_linear() -> None:
    """Rows with a valid beginning are read in linear time, whatever follows it."""
    for start in (told(22), zone_rows.told(22), "count 1 10 8 1 ", "q 1 8 ", "syn 1 0 ", "left 1 "):
        assert_linear(partial(read_behind, start), start)
        assert_linear(partial(read_within, start), start)


def test_blame_looks_at_few_probes() -> None:
    """A message that names very many probes, and no line, costs no more than one with some."""
    family = families.families()["illumos"]
    text = program.load("illumos").text
    messages = [
        "dtrace: " + " ".join(f"fbt:ip:f{number}:entry" for number in range(size))
        for size in (100, 1000)
    ]
    few, many = (shortest(lambda m: refusal.blame(m, text, family), one) for one in messages)
    assert many < 5 * few


# A script's rows

SCRIPT = (
    "syscall:::entry { @a[execname] = count(); }\n"
    "syscall:::return { @b[execname] = llquantize(arg0, 10, 0, 6, 20); }\n"
    "io:::start { @c[ustack()] = llquantize(arg0, 10, 0, 6, 20); }\n"
)
TABLE = "\\n".join(f"{edge} | 1" for edge in range(4000))
ODD_TABLE = "\\n".join(f"{10**9 + edge} | {10**12 + edge}" for edge in range(4000))
SCRIPT_ATTACKS = {
    "keys of 200 KB": f"row 0\x1f%d{'x' * 200_000}\x1f1",
    "keys of 200 KB that are escaped": "row 0\x1f" + r"\033" * 50_000 + "%d\x1f1",
    "keys as long as may be": f"row 0\x1f%d{chr(0x1F600) * 4000}\x1f1",
    "tables of keys as long as may be": f"row 1\x1f%d{'x' * 16_000}\x1f1 | 1",
    "tables that wait for others, without a heartbeat": f"final 2\x1f%d\x1f{ODD_TABLE}",
    "tables of 4,000 lines": f"row 1\x1f%d\x1f{TABLE}",
    "tables of 40,000 lines": f"row 1\x1f%d\x1f{'1 | 1' + chr(10) * 40_000}",
    "heartbeats": "tick %d",
}


@pytest.mark.parametrize("attack", SCRIPT_ATTACKS)
def test_script(attack: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever a host prints as rows of a script, other tasks get their turn; memory is limited."""
    row = SCRIPT_ATTACKS[attack]
    (tmp_path / "s.d").write_text(SCRIPT, encoding="ascii")
    (tmp_path / "evil.py").write_text(
        "import re, sys\n"
        "token = re.search('(t[0-9a-f]{16}) ready', sys.stdin.read())\n"
        "if '-e' not in sys.argv and token:\n"
        "    print(f'\\x1e{token[1]} ready\\x1e')\n"
        f"    row = {row!r}.replace('\\\\n', '\\n')\n"
        "    for n in range(1000):\n"
        "        print(f'\\x1e{token[1]} {row % n}\\x1e')\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-X", "utf8", str(tmp_path / "evil.py")]
    host = {
        "name": "evil",
        "dtrace": {"command": command, "program": "linux"},
        "scripts": [{"script": str(tmp_path / "s.d")}],
    }
    nothing = {"command": ["/bin/true"], "program": "linux"}
    whole = {"source": "dtrace", "dtrace": nothing, "listeners": [{"port": 1}], "hosts": [host]}
    (tmp_path / "c.yml").write_text(yaml.safe_dump(whole), encoding="ascii")
    done = subprocess.run(
        [sys.executable, str(METER), str(tmp_path / "c.yml")],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = json.loads(done.stdout)
    tell(found, capsys)
    assert any(found["up"])
    assert found["step_ms"] < STEP_MS, found["step"]
    assert found["memory_mb"] < MEMORY_MB
