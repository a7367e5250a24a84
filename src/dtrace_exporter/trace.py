"""The trace command: each SYN of a port as it comes, in the columns of the first D script."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from ipaddress import IPv6Address
from typing import TextIO

from dtrace_exporter import dtrace, program
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

    What dtrace(1) says goes to the standard error output.

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
    plan = Plan(config, chosen, (port, port), program.drop_counters(config.command))
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
    while chunk := await process.stdout.read(_CHUNK):
        out.writelines(csv(line) + "\n" for line in splitter.feed(chunk))
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
