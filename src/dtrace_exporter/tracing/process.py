"""Child processes with a known environment, of which nothing is left when their block ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
from asyncio.subprocess import PIPE, Process, SubprocessStreamProtocol
from asyncio.transports import (
    BaseTransport,
    ReadTransport,
    SubprocessTransport,
    WriteTransport,
)
from collections.abc import AsyncIterator, Sequence

_LIMIT = 1 << 16
_SBIN = ("/usr/sbin", "/sbin")
_SYSTEMTAP = "there is only SystemTap's program of that name, which traces nothing"
_START = 4096
_LARGEST_PIPE = 1 << 20

ENVIRONMENT = ("HOME", "KRB5CCNAME", "LOGNAME", "PATH", "SSH_AUTH_SOCK", "TZ", "USER")
"""The variables that a child inherits; LC_ALL is C. dtrace(1), ssh and sudo need them to find their
files and keys, and to print dates. The variables of a service manager, and those that change how a
program is loaded, are left out on purpose."""


def resolve(command: str) -> str:
    """Return the absolute path of a command.

    A name without a slash is looked for in the absolute directories of PATH, and then in /usr/sbin
    and /sbin, which are often not in a user's PATH. Relative directories are skipped: the current
    directory must not decide what root runs. SystemTap's script named dtrace is skipped as well.

    Raises:
        FileNotFoundError: there is no such command, or only SystemTap's; the text says so.
    """
    if os.sep in command:
        if _is_systemtap(command):
            raise FileNotFoundError(errno.ENOENT, _SYSTEMTAP, command)
        return os.path.abspath(command)  # noqa: PTH100
    directories = [*os.environ.get("PATH", os.defpath).split(os.pathsep), *_SBIN]
    why = f"not in any directory of PATH, nor in {' or '.join(_SBIN)}"
    for directory in directories:
        # A relative one would depend on the current directory.
        if os.path.isabs(directory):  # noqa: PTH117
            found = shutil.which(command, path=directory)
            if found and not _is_systemtap(found):
                return found
            why = _SYSTEMTAP if found else why
    raise FileNotFoundError(errno.ENOENT, why, command)


def _is_systemtap(path: str) -> bool:
    """Return whether a command is SystemTap's dtrace, which generates probes and traces nothing.

    It is a script (SystemTap's dtrace.in), whose first comment names SystemTap.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            start = file.read(_START)
    except OSError:
        return False
    return start.startswith(b"#!") and b"systemtap" in start.lower()


@contextlib.asynccontextmanager
async def child(argv: Sequence[str], stderr: int | None = PIPE) -> AsyncIterator[Process]:
    """Run a command with pipes for its input and output while the block runs.

    The process has its own group, so that Ctrl-C in a terminal does not reach it. It inherits no
    other descriptors, and no variables but ENVIRONMENT. Its output ends when the process ends, even
    if another process still holds the pipes. If the process still runs at the end of the block, its
    whole group is killed.

    Args:
        argv: the command, as for resolve(), and its arguments.
        stderr: where its standard error goes, as for asyncio's create_subprocess_exec().

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
                # If this were cancelled half-way, the process would stay behind.
                cancelled = error
        if cancelled:
            raise cancelled


async def hand_over(process: Process, program: str) -> None:
    """Write a child's standard input and close it. It is no error if the child has closed it."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(program.encode())
        await process.stdin.drain()
    process.stdin.close()


def send_signal(process: Process, number: signal.Signals) -> None:
    """Send a signal to a child. It is no error if the child has ended.

    Process.send_signal() is not used, because it collects the status of a child that has just ended
    (Popen.poll() in Python's Lib/subprocess.py); the event loop would then never get this status.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


class _Protocol(SubprocessStreamProtocol):
    """Closes the pipes when the process ends: an ssh(1) that stays as a master keeps them open."""

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, SubprocessTransport)
        self._subprocess = transport
        super().connection_made(transport)

    def process_exited(self) -> None:
        for number, reader in ((1, self.stdout), (2, self.stderr)):
            pipe = self._subprocess.get_pipe_transport(number)
            if reader is None or not isinstance(pipe, ReadTransport) or pipe.is_closing():
                continue
            with contextlib.suppress(BlockingIOError):
                # All that it has printed is in the pipe by now; later output is another process's.
                rest = os.read(pipe.get_extra_info("pipe").fileno(), _LARGEST_PIPE)
                reader.feed_data(rest)
            pipe.close()
        stdin = self._subprocess.get_pipe_transport(0)
        if isinstance(stdin, WriteTransport) and not stdin.is_closing():
            stdin.abort()
        super().process_exited()


async def _start(
    argv: Sequence[str], stderr: int | None
) -> tuple[Process, asyncio.SubprocessTransport]:
    loop = asyncio.get_running_loop()
    known = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    transport, protocol = await loop.subprocess_exec(
        lambda: _Protocol(_LIMIT, loop),
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
    # Else wait() would wait for the end of pipes that nobody reads any more.
    for number in range(3):
        if pipe := transport.get_pipe_transport(number):
            pipe.close()
    await process.wait()
    transport.close()
