"""Asks a host's dtrace(1) for its version, whether it may trace, and what its kernel has."""

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
    """dtrace(1) cannot be used or does not answer; the text says why."""


async def version(command: Sequence[str]) -> str:
    """Return the version of dtrace(1), or an empty string if it does not say."""
    status, output = await run([*command, "-V"])
    return _plain(output).rpartition(" ")[2][:32] if status == 0 else ""


async def is_suns(command: Sequence[str]) -> bool:
    """Return whether a host has Sun's engine, by dtrace(1)'s version; all but Linux have it.

    Raises:
        DTraceError: it does not say its version.
    """
    status, output = await run([*command, "-V"])
    if status:
        raise DTraceError(reason(command, status, output))
    return "Sun D" in output


async def attempt(command: Sequence[str]) -> str:
    """Try to run a D program that does nothing, from the standard input as sessions do.

    Returns:
        An empty string, or why it did not run.
    """
    status, output = await run([*command, "-q", "-s", "/dev/stdin"], _TRIAL)
    return "" if status == 0 else reason(command, status, output)


async def find_program(command: Sequence[str]) -> str:
    """Return the name of the D program that a host needs, by the functions that its kernel has.

    Raises:
        DTraceError: no program fits, or dtrace(1) does not answer.
    """
    wanted = [word for family in families().values() for word in ("-n", family.entrance)]
    # For a probe that does not exist there is a message; the exit status is 0 all the same.
    status, output = await run([*command, "-l", *wanted])
    listed = {
        tuple(words[1:])
        for words in map(str.split, output.splitlines())
        if words and words[0].isascii() and words[0].isdecimal()
    }
    for name, family in families().items():
        if tuple(family.entrance.split(":")) in listed:
            return name
    if status == 0 or "does not match any probes" in output or "No probe matches" in output:
        raise DTraceError("no D program fits this kernel: set dtrace.program to the path of one")
    raise DTraceError(reason(command, status, output))


def reason(command: Sequence[str], status: int, output: str) -> str:
    """Return in one line why a command failed.

    Args:
        command: the command.
        status: its exit status, as run() returns it.
        output: its output, as run() returns it.
    """
    said = _plain(output)
    if status < 0:
        # The text is run()'s own.
        return said[:_LONGEST]
    # The reason comes last: a host may print a greeting before it, and ssh long warnings.
    return said[-_LONGEST:] or f"{command[0]} ended with exit status {status}"


def _plain(output: str) -> str:
    """Return an output as one line without control characters."""
    return " ".join(printable(output).split())


async def run(argv: list[str], program: str = "") -> tuple[int, str]:
    """Run dtrace(1) to its end.

    Args:
        argv: the command and its arguments.
        program: what it reads from its standard input.

    Returns:
        Its exit status and its output. If it cannot be started or does not end, -1 and why.
    """
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
