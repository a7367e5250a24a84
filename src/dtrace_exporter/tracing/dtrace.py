"""Asking a host's dtrace(1): its version, whether it may be used, which program fits the kernel."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import STDOUT, Process
from collections.abc import Sequence

from dtrace_exporter.families import families
from dtrace_exporter.terminal import printable
from dtrace_exporter.tracing.process import child, hand_over

_TRIAL_SECONDS = 120.0
_TRIAL = "BEGIN { exit(0); }\n"
_CHUNK = 1 << 16
_MOST = 1 << 16
_LONGEST = 300


class DTraceError(Exception):
    """dtrace(1) does not say what it was asked for; the text says why."""


async def version(command: Sequence[str]) -> str:
    """Return what dtrace(1) says its version is, or an empty string."""
    status, output = await _run([*command, "-V"])
    return _plain(output).rpartition(" ")[2][:32] if status == 0 else ""


async def attempt(command: Sequence[str]) -> str:
    """Run the smallest D program, from standard input as a session's: no shell takes it apart.

    Returns:
        An empty string, or why it did not run.
    """
    status, output = await _run([*command, "-q", "-s", "/dev/stdin"], _TRIAL)
    return "" if status == 0 else _reason(command, status, output)


async def find_program(command: Sequence[str]) -> str:
    """Tell by the kernel's functions which of the D programs a host needs.

    Raises:
        DTraceError: it has none of them, or dtrace(1) cannot be asked.
    """
    wanted = [word for family in families().values() for word in ("-n", family.entrance)]
    # Those that are not there are only said; the exit status is 0 all the same.
    status, output = await _run([*command, "-l", *wanted])
    listed = {
        tuple(words[1:])
        for words in map(str.split, output.splitlines())
        if words and words[0].isascii() and words[0].isdecimal()
    }
    for name, family in families().items():
        if tuple(family.entrance.split(":")) in listed:
            return name
    if status == 0 or "does not match any probes" in output or "No probe matches" in output:
        raise DTraceError("no D program fits this kernel: give dtrace.program a path")
    raise DTraceError(_reason(command, status, output))


def _reason(command: Sequence[str], status: int, output: str) -> str:
    said = _plain(output)
    if status < 0:
        # Nobody but we.
        return said[:_LONGEST]
    # What was said last is why: before it a host may greet, and ssh warn at length.
    return said[-_LONGEST:] or f"{command[0]} ended with exit status {status}"


def _plain(output: str) -> str:
    """Return an output as one line that is fit for a terminal."""
    return " ".join(printable(output).split())


async def _run(argv: list[str], program: str = "") -> tuple[int, str]:
    """Run a command; the status is -1 where it does not come to an end, and the output says so."""
    try:
        async with child(argv, stderr=STDOUT) as process:
            try:
                output = await asyncio.wait_for(_output(process, program), _TRIAL_SECONDS)
            except TimeoutError:
                return -1, f"{argv[0]} did not end within {_TRIAL_SECONDS:g} s"
    except OSError as error:
        return -1, f"cannot start {argv[0]}: {error.strerror}"
    if len(output) > _MOST:
        return -1, f"{argv[0]} does not stop printing"
    return process.returncode or 0, output.decode("utf-8", "replace")


async def _output(process: Process, program: str) -> bytes:
    assert process.stdout is not None
    await hand_over(process, program)
    output = bytearray()
    while chunk := await process.stdout.read(_CHUNK):
        output += chunk
        if len(output) > _MOST:
            break
    else:
        await process.wait()
    return bytes(output)
