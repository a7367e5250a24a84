"""The trace command: each SYN of a port as it comes, in the columns of the first D script."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
from collections.abc import Callable
from ipaddress import IPv6Address
from typing import TextIO

from dtrace_exporter import terminal
from dtrace_exporter.config import DTraceConfig, HostConfig
from dtrace_exporter.tracing import program
from dtrace_exporter.tracing.lines import LineSplitter
from dtrace_exporter.tracing.plan import Plan, needed
from dtrace_exporter.tracing.process import child, hand_over
from dtrace_exporter.tracing.refusal import blame

HEADER = "TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax"
_HALVES = re.compile(r"([0-9a-f]{1,16}):([0-9a-f]{1,16})")
_ADDRESS_COLUMN = HEADER.split(",").index("Source IP")
_CHUNK = 1 << 16
_STOP_SECONDS = 5.0
_MOST_HELD = 100
"""What says why it failed has fewer lines, and an endless one is not kept."""


async def trace(config: DTraceConfig, port: int, out: TextIO) -> int:
    """Print a line of CSV for each event of a port until SIGINT, SIGTERM or dtrace(1)'s end.

    On a terminal it is the row of a table instead. What dtrace(1) says goes to the standard error
    output. Optional parts that this kernel cannot do are left out, and that is said there.

    Returns:
        The exit status: that of dtrace(1), or 0 when a signal ended it.

    Raises:
        OSError: dtrace(1) cannot be started, or nobody reads ``out``.
        dtrace.DTraceError: which program this system needs is not known.
        program.ProgramError: the program cannot be read.
    """
    chosen = program.load_trace(await needed(HostConfig(dtrace=config)))
    plan = Plan(config, chosen, port, program.drop_counters(config.command))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    without: set[str] = set()
    while True:
        text = plan.render(chosen, without)
        status, refusal = await _run(plan, text, out, stop)
        part = blame(refusal, text, chosen.family) if refusal else None
        if stop.is_set() or part is None or part in without:
            break
        without |= chosen.with_dependents({part})
        _warn(f"dtrace-exporter: left out what this kernel cannot do: {part}: {refusal}")
    if stop.is_set():
        if out.isatty():
            # Behind the ^C that the terminal shows.
            out.write("\n")
        return 0
    if refusal:
        _warn(refusal)
    return status if status >= 0 else 128 - status


async def _run(plan: Plan, text: str, out: TextIO, stop: asyncio.Event) -> tuple[int, str]:
    """Run dtrace(1) once, to its end or until asked to stop.

    Returns:
        Its exit status, and what it said if it failed before it printed anything.
    """
    async with child(plan.argv) as process:
        copying = asyncio.create_task(_copy(process, text, out))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([copying, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not copying.done():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await asyncio.wait([copying], timeout=_STOP_SECONDS)
        if copying.cancel():
            return 0, ""
        return await copying


async def _copy(process: asyncio.subprocess.Process, text: str, out: TextIO) -> tuple[int, str]:
    assert process.stdout is not None
    assert process.stderr is not None
    await hand_over(process, text)
    # Until there is a line, what dtrace(1) says may be why there is none.
    held: list[str] | None = []

    def pass_on() -> None:
        nonlocal held
        said, held = held or [], None
        for message in said:
            _warn(message)

    async def complain(stderr: asyncio.StreamReader) -> None:
        splitter = LineSplitter()
        ended = False
        while not ended:
            ended = not (chunk := await stderr.read(_CHUNK))
            for message in splitter.end() if ended else splitter.feed(chunk):
                held.append(message) if held is not None else _warn(message)
                if held is not None and len(held) >= _MOST_HELD:
                    pass_on()

    complaining = asyncio.create_task(complain(process.stderr))
    splitter = LineSplitter()
    columns = terminal.width(out)
    show = table(columns, terminal.painter(out)) if columns else csv
    try:
        while chunk := await process.stdout.read(_CHUNK):
            pass_on()
            out.writelines(show(line) + "\n" for line in splitter.feed(chunk))
            out.flush()
        out.writelines(show(line) + "\n" for line in splitter.end())
        out.flush()
        status = await process.wait()
        await asyncio.wait([complaining], timeout=_STOP_SECONDS)
    finally:
        complaining.cancel()
    return status, "\n".join(held) if held else ""


def _warn(message: str) -> None:
    """Pass on what dtrace(1) says, less what a terminal would obey."""
    for line in message.splitlines():
        sys.stderr.write(terminal.printable(line) + "\n")
    sys.stderr.flush()


def csv(line: str) -> str:
    """Turn a line of a trace program into CSV: its address is written as usual.

    Programs print an address as HIGH:LOW, the halves of an IPv6 address in hexadecimal, or in one
    of the forms of RFC 4291, 2.2. Any other line is returned as it is.
    """
    columns = line.split(",")
    if len(columns) != len(HEADER.split(",")):
        return line
    text = columns[_ADDRESS_COLUMN]
    if halves := _HALVES.fullmatch(text):
        address = IPv6Address(int(halves[1], 16) << 64 | int(halves[2], 16))
    else:
        try:
            address = IPv6Address(text)
        except ValueError:
            return line
    columns[_ADDRESS_COLUMN] = str(address.ipv4_mapped or address)
    return ",".join(columns)


def table(columns: int, paint: terminal.Paint) -> Callable[[str], str]:
    """Return what turns lines of the trace program into rows that stand below each other.

    A terminal too narrow for all of the columns of the CSV gets neither the time stamp nor the port
    asked for, and of the date only the time of day. Any line that is none of the program's comes
    out as it is, less what a terminal would obey.

    Args:
        columns: how wide the terminal is.
        paint: colours what stands out: drops, and a queue that is full or nearly so.
    """
    widths = [15, 20, 15, 15, 11, 9, 5, 5, 5]
    wide = columns >= sum(widths) + 2 * len(widths) - 2
    shown = range(len(widths)) if wide else (1, 2, 3, 4, 6, 7, 8)
    if not wide:
        widths[1] = len("00:00:00")

    def row(line: str) -> str:
        cells = terminal.printable(csv(line)).split(",")
        if len(cells) != len(widths):
            return paint(terminal.printable(line), "dim")
        styles = [""] * len(cells)
        if cells == HEADER.split(","):
            styles = ["bold"] * len(cells)
        else:
            styles[2] = _ACTIONS.get(cells[2].partition(":")[0], "")
            styles[7] = _fullness(cells[7], cells[8])
        if not wide:
            cells[1] = cells[1].rpartition(" ")[2]
        for at in shown:
            widths[at] = max(widths[at], len(cells[at]))
        return "  ".join(
            paint(f"{cells[at]:{'<' if 0 < at < 4 else '>'}{widths[at]}}", styles[at])
            for at in shown
        )

    return row


_ACTIONS = {"drop": "red", "established": "green", "accept": "cyan"}


def _fullness(q: str, limit: str) -> str:
    if not (q.isdecimal() and limit.isdecimal()):
        return ""
    full, part = max(int(limit), 1), int(q)
    return "red" if part >= full else "yellow" if part >= 0.8 * full else ""
