"""Child processes: started in a known environment, and nothing left when one is done with them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
from asyncio.subprocess import PIPE, Process, SubprocessStreamProtocol
from collections.abc import AsyncIterator, Sequence

_LIMIT = 1 << 16
_SBIN = ("/usr/sbin", "/sbin")
_SYSTEMTAP = "there is only SystemTap's program of that name, which traces nothing"
_START = 4096

ENVIRONMENT = ("HOME", "KRB5CCNAME", "LOGNAME", "PATH", "SSH_AUTH_SOCK", "TZ", "USER")
"""The variables that a child gets from ours, and LC_ALL=C besides: what dtrace(1), ssh and sudo
need to find their files and keys, and to print dates. Those of a service manager, and what changes
how a program is loaded, are not among them."""


def resolve(command: str) -> str:
    """Return the absolute path of a command.

    A name without a slash is looked for in PATH, in the absolute directories of it only: whose
    directory is the current one must not decide what root runs; and in _SBIN, which users often do
    not have there. The script of SystemTap's that is named dtrace is passed over.

    Raises:
        FileNotFoundError: it is in none of them; the text says so.
    """
    if os.sep in command:
        return os.path.abspath(command)  # noqa: PTH100
    directories = [*os.environ.get("PATH", os.defpath).split(os.pathsep), *_SBIN]
    why = f"not in any directory of PATH, nor in {' or '.join(_SBIN)}"
    for directory in directories:
        # Without one it would look in the current one.
        if os.path.isabs(directory):  # noqa: PTH117
            found = shutil.which(command, path=directory)
            if found and not _is_systemtap(found):
                return found
            why = _SYSTEMTAP if found else why
    raise FileNotFoundError(errno.ENOENT, why, command)


def _is_systemtap(path: str) -> bool:
    """Tell whether a command is SystemTap's dtrace, which makes probes and traces nothing.

    It is a script (dtrace.in of SystemTap) whose first comment says what it is.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            start = file.read(_START)
    except OSError:
        return False
    return start.startswith(b"#!") and b"systemtap" in start.lower()


@contextlib.asynccontextmanager
async def child(argv: Sequence[str], stderr: int | None = PIPE) -> AsyncIterator[Process]:
    """Run a command, its input and output piped, for as long as the block lasts.

    It is in a process group of its own, so that a terminal's Ctrl-C does not reach it, and has no
    other descriptor of ours and no other variable than ENVIRONMENT. When the block is left while
    it runs, all of the group is killed.

    Args:
        argv: the command, as for resolve(), and its arguments; it speaks English.
        stderr: where its standard error output goes, as for asyncio's create_subprocess_exec().

    Raises:
        OSError: it cannot be started.
    """
    starting = asyncio.create_task(_start([resolve(argv[0]), *argv[1:]], stderr))
    try:
        process, _ = await asyncio.shield(starting)
        yield process
    finally:
        ending = asyncio.create_task(_end(starting))
        cancelled = None
        while not ending.done():
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError as error:
                # A process given up half-way, in its start or in its end, would stay behind.
                cancelled = error
        if cancelled:
            raise cancelled


async def hand_over(process: Process, program: str) -> None:
    """Write a child's standard input and close it; a child that has had enough is no error."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(program.encode())
        await process.stdin.drain()
    process.stdin.close()


async def _start(
    argv: Sequence[str], stderr: int | None
) -> tuple[Process, asyncio.SubprocessTransport]:
    loop = asyncio.get_running_loop()
    known = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    transport, protocol = await loop.subprocess_exec(
        lambda: SubprocessStreamProtocol(_LIMIT, loop),
        *argv,
        stdin=PIPE,
        stdout=PIPE,
        stderr=stderr,
        start_new_session=True,
        env={**known, "LC_ALL": "C"},
    )
    return Process(transport, protocol, loop), transport


async def _end(starting: asyncio.Task[tuple[Process, asyncio.SubprocessTransport]]) -> None:
    await asyncio.wait([starting])
    if starting.exception():
        return
    process, transport = starting.result()
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    # wait() would wait for the end of what nobody reads any more.
    for number in range(3):
        if pipe := transport.get_pipe_transport(number):
            pipe.close()
    await process.wait()
