"""The trace command: each SYN of a port as it comes, in the columns of the first D script."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from collections.abc import Callable
from ipaddress import IPv6Address
from typing import TextIO

from dtrace_exporter import dtrace, program, terminal
from dtrace_exporter.config import DTraceConfig
from dtrace_exporter.lines import LineSplitter
from dtrace_exporter.process import child
from dtrace_exporter.session import Plan

HEADER = "TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax"
_HALVES = re.compile(r"([0-9a-f]{1,16}):([0-9a-f]{1,16})")
_CHUNK = 1 << 16
_STOP_SECONDS = 5.0


async def trace(config: DTraceConfig, port: int, out: TextIO) -> int:
    """Print a line of CSV for each event of a port until SIGINT, SIGTERM or dtrace(1)'s end.

    On a terminal it is the row of a table instead. What dtrace(1) says goes to the standard error
    output.

    Returns:
        The exit status: that of dtrace(1), or 0 when a signal ended it.

    Raises:
        OSError: dtrace(1) cannot be started, or nobody reads ``out``.
        dtrace.DTraceError: which program this system needs is not known.
        program.ProgramError: the program cannot be read.
    """
    name = config.program
    if name == "auto":
        name = program.local(config.command) or await dtrace.find_program(config.command)
    chosen = program.load_trace(name)
    plan = Plan(config, chosen, port, program.drop_counters(config.command))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with child(plan.argv, stderr=None) as process:
        copying = asyncio.create_task(_copy(process, plan.render(chosen, set()), out))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([copying, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not copying.done():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await asyncio.wait([copying], timeout=_STOP_SECONDS)
        if not copying.cancel():
            status = await copying
    if stop.is_set():
        if out.isatty():
            # Behind the ^C that the terminal shows.
            out.write("\n")
        return 0
    return status if status >= 0 else 128 - status


async def _copy(process: asyncio.subprocess.Process, text: str, out: TextIO) -> int:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(text.encode())
        await process.stdin.drain()
    process.stdin.close()
    splitter = LineSplitter()
    columns = terminal.width(out)
    show = table(columns, terminal.painter(out)) if columns else csv
    while chunk := await process.stdout.read(_CHUNK):
        out.writelines(show(line) + "\n" for line in splitter.feed(chunk))
        out.flush()
    return await process.wait()


def csv(line: str) -> str:
    """Turn a line of the trace program into CSV: the address HIGH:LOW becomes one in text form.

    Any other line is returned as it is.
    """
    columns = line.split(",")
    if len(columns) != len(HEADER.split(",")) or not (halves := _HALVES.fullmatch(columns[3])):
        return line
    address = IPv6Address(int(halves[1], 16) << 64 | int(halves[2], 16))
    columns[3] = str(address.ipv4_mapped or address)
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
