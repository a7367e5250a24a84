"""Child processes of which nothing is left when one is done with them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import PIPE, Process, SubprocessStreamProtocol
from collections.abc import AsyncIterator, Sequence

_LIMIT = 1 << 16


@contextlib.asynccontextmanager
async def child(argv: Sequence[str], stderr: int | None = PIPE) -> AsyncIterator[Process]:
    """Run a command, its input and output piped, for as long as the block lasts.

    It is in a process group of its own, so that a terminal's Ctrl-C does not reach it. When the
    block is left while it runs, all of the group is killed.

    Args:
        argv: the command; it speaks English.
        stderr: where its standard error output goes, as for asyncio's create_subprocess_exec().

    Raises:
        OSError: it cannot be started.
    """
    starting = asyncio.create_task(_start(argv, stderr))
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


async def _start(
    argv: Sequence[str], stderr: int | None
) -> tuple[Process, asyncio.SubprocessTransport]:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.subprocess_exec(
        lambda: SubprocessStreamProtocol(_LIMIT, loop),
        *argv,
        stdin=PIPE,
        stdout=PIPE,
        stderr=stderr,
        start_new_session=True,
        env={**os.environ, "LC_ALL": "C"},
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
