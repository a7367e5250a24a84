"""The trace command: prints each SYN of a port when it comes, as CSV or as rows of a table."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv6Address
from typing import TextIO

from dtrace_exporter import kernel, reasons, terminal
from dtrace_exporter.config import DTraceConfig, HostConfig
from dtrace_exporter.sockets import QCapacity
from dtrace_exporter.tracing import dtrace, program
from dtrace_exporter.tracing.lines import LineSplitter
from dtrace_exporter.tracing.plan import Plan, needed
from dtrace_exporter.tracing.process import child, hand_over, send_signal
from dtrace_exporter.tracing.refusal import blame

HEADER = "TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax"
_HALVES = re.compile(r"([0-9a-f]{1,16}):([0-9a-f]{1,16})")
_LENGTH = re.compile(r"[0-9]{1,10}")
_ADDRESS_COLUMN = HEADER.split(",").index("Source IP")
_CHUNK = 1 << 16
_STOP_SECONDS = 5.0
_MOST_HELD = 100
"""How many lines of errors are kept until the first line of output."""


_NEXT = "dtrace-exporter check says what this host could have"


async def trace(config: DTraceConfig, port: int, out: TextIO) -> int:
    """Print a line of CSV for each event of a port until SIGINT, SIGTERM or the end of dtrace(1).

    On a terminal the lines are rows of a table instead. Messages of dtrace(1) go to the standard
    error, and so do messages about optional parts that are left out.

    Args:
        config: how dtrace(1) is run.
        port: the TCP port.
        out: the output.

    Returns:
        The exit status: that of dtrace(1), or 0 after a signal.

    Raises:
        OSError: ``out`` cannot be written to.
        dtrace.DTraceError: dtrace(1) cannot be started, or it is not known which program this
            system needs; the text says what to do.
        program.ProgramError: the program cannot be read.
    """
    chosen = program.load_trace(await needed(HostConfig(dtrace=config)))
    plan = Plan(config, chosen, port, program.drop_counters(config.command))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    columns = terminal.width(out)
    capacity = chosen.family.q_capacity
    show = table(columns, terminal.painter(out), capacity) if columns else csv

    def take(lines: Iterable[str]) -> None:
        out.writelines(show(line) + "\n" for line in lines)
        out.flush()

    status = await play(plan, take, warn, stop)
    if stop.is_set() and out.isatty():
        # The terminal shows ^C in the same line.
        out.write("\n")
    return status


async def play(
    plan: Plan,
    take: Callable[[Iterable[str]], None],
    say: Callable[[str], None],
    stop: asyncio.Event,
    numbers: Mapping[str, int] | None = None,
) -> int:
    """Run a program until its end or until ``stop`` is set.

    Optional parts that the kernel cannot do are left out.

    Args:
        plan: what to run.
        take: is given the lines of its output.
        say: is given the messages of dtrace(1), and those about parts that are left out.
        stop: set it to end the program.
        numbers: as for Plan.render().

    Returns:
        The exit status: that of dtrace(1), or 0 after ``stop`` was set.

    Raises:
        OSError: ``take`` raised it.
        dtrace.DTraceError: dtrace(1) cannot be started; the text says what to do.
    """
    chosen = plan.program
    assert chosen is not None
    without: set[str] = set()
    while True:
        text = plan.render(chosen, without, numbers)
        status, refusal = await _run(plan, text, take, say, stop)
        part = blame(refusal, text, chosen.family) if refusal else None
        if stop.is_set() or part is None or part in without:
            break
        without = chosen.with_dependents({*without, part})
        say(f"dtrace-exporter: left out what this kernel cannot do: {part}: {refusal}")
    if stop.is_set():
        return 0
    if refusal:
        say(refusal)
        if advice := _advice(refusal, plan):
            say(f"dtrace-exporter: {advice}")
    return status if status >= 0 else 128 - status


async def _run(
    plan: Plan,
    text: str,
    take: Callable[[Iterable[str]], None],
    say: Callable[[str], None],
    stop: asyncio.Event,
) -> tuple[int, str]:
    """Run dtrace(1) once, to its end or until ``stop`` is set.

    Returns:
        Its exit status, and its messages if it ended before it printed anything.
    """
    async with contextlib.AsyncExitStack() as stack:
        try:
            process = await stack.enter_async_context(child(plan.argv))
        except OSError as error:
            refusal = f"cannot start {plan.argv[0]}: {error.strerror}"
            raise dtrace.DTraceError(
                f"trace needs dtrace(1): {refusal}; {_advice(refusal, plan) or _NEXT}"
            ) from error
        copying = asyncio.create_task(_copy(process, text, take, say))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([copying, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not copying.done():
            send_signal(process, signal.SIGTERM)
            await asyncio.wait([copying], timeout=_STOP_SECONDS)
        if copying.cancel():
            return 0, ""
        return await copying


def _advice(refusal: str, plan: Plan) -> str:
    """Return what to do about an error of dtrace(1), or an empty string."""
    here = sys.platform == "linux" and program.runs_here(plan.argv)
    word = reasons.classify(refusal, kernel.look() if here else None)
    return "" if word == "refused" else f"{reasons.REASONS[word].advice}; {_NEXT}"


async def _copy(
    process: asyncio.subprocess.Process,
    text: str,
    take: Callable[[Iterable[str]], None],
    say: Callable[[str], None],
) -> tuple[int, str]:
    assert process.stdout is not None
    assert process.stderr is not None
    await hand_over(process, text)
    # Messages before the first line may be the reason why dtrace(1) fails, so they are kept.
    held: list[str] | None = []

    def pass_on() -> None:
        nonlocal held
        said, held = held or [], None
        for message in said:
            say(message)

    async def complain(stderr: asyncio.StreamReader) -> None:
        splitter = LineSplitter()
        ended = False
        while not ended:
            ended = not (chunk := await stderr.read(_CHUNK))
            for message in splitter.end() if ended else splitter.feed(chunk):
                held.append(message) if held is not None else say(message)
                if held is not None and len(held) >= _MOST_HELD:
                    pass_on()

    complaining = asyncio.create_task(complain(process.stderr))
    splitter = LineSplitter()
    try:
        while chunk := await process.stdout.read(_CHUNK):
            pass_on()
            take(splitter.feed(chunk))
        take(splitter.end())
        status = await process.wait()
        await asyncio.wait([complaining], timeout=_STOP_SECONDS)
    finally:
        complaining.cancel()
    return status, "\n".join(held) if held else ""


def warn(message: str) -> None:
    """Print a message on the standard error, without control characters."""
    for line in message.splitlines():
        sys.stderr.write(terminal.printable(line) + "\n")
    sys.stderr.flush()


def csv(line: str) -> str:
    """Return a line of a trace program as CSV, with its address in the usual form.

    Programs print an address as HIGH:LOW, the halves of an IPv6 address in hexadecimal, or in one
    of the forms of RFC 4291, 2.2. Any other line is returned unchanged, but for control characters:
    what reads the output may be a terminal in the end.
    """
    line = terminal.printable(line)
    columns = line.split(",")
    if len(columns) != len(HEADER.split(",")):
        return line
    text = columns[_ADDRESS_COLUMN]
    if halves := _HALVES.fullmatch(text):
        columns[_ADDRESS_COLUMN] = address(int(halves[1], 16), int(halves[2], 16))
    else:
        try:
            found = IPv6Address(text)
        except ValueError:
            return line
        columns[_ADDRESS_COLUMN] = str(found.ipv4_mapped or found)
    return ",".join(columns)


def address(high: int, low: int) -> str:
    """Return an address in the usual form, from the halves of an IPv6 address."""
    found = IPv6Address(high << 64 | low)
    return str(found.ipv4_mapped or found)


def table(columns: int, paint: terminal.Paint, capacity: QCapacity) -> Callable[[str], str]:
    """Return a function that makes aligned rows of the lines of the trace program.

    If the terminal is too narrow for all columns of the CSV, the rows lack the time stamp and the
    destination port, and have the time of day without the date. Lines that are not the program's
    are printed unchanged, without control characters.

    Args:
        columns: the width of the terminal.
        paint: adds colours to drops, and to queues that are full or nearly full.
        capacity: how many connections Q can hold.
    """
    widths = [15, 20, 15, 15, 11, 9, 5, 5, 5]
    wide = columns >= sum(widths) + 2 * len(widths) - 2
    shown = range(len(widths)) if wide else (1, 2, 3, 4, 6, 7, 8)
    if not wide:
        widths[1] = len("00:00:00")

    def row(line: str) -> str:
        cells = csv(line).split(",")
        if len(cells) != len(widths):
            return paint(",".join(cells), "dim")
        styles = [""] * len(cells)
        if cells == HEADER.split(","):
            styles = ["bold"] * len(cells)
        else:
            styles[2] = _ACTIONS.get(cells[2].partition(":")[0], "")
            styles[7] = _fullness(cells[7], cells[8], capacity)
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


def _fullness(q: str, limit: str, capacity: QCapacity) -> str:
    if not (_LENGTH.fullmatch(q) and _LENGTH.fullmatch(limit)):
        return ""
    full, part = capacity.of(int(limit)), int(q)
    return "red" if part >= full else "yellow" if part >= 0.8 * full else ""
