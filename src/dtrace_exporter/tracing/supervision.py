"""Supervises a dtrace(1): starts it, reads its output, ends it, and restarts it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from dtrace_exporter.listeners import SessionId
from dtrace_exporter.log import fields
from dtrace_exporter.state import SessionStatus, State
from dtrace_exporter.tracing import diagnostics, dtrace, program
from dtrace_exporter.tracing.heartbeat import SLICE, START_SECONDS, Beat, Heartbeat
from dtrace_exporter.tracing.lines import LineSplitter
from dtrace_exporter.tracing.process import child, hand_over, send_signal
from dtrace_exporter.tracing.uprobes import remove_leftovers
from dtrace_exporter.turns import Turn

_log = logging.getLogger(__name__)

_CHUNK = 1 << 16
_STOP_SECONDS = 5.0
# How long a late consumer may take to print its counts after SIGTERM.
_DRAIN_SECONDS = 20.0
_FIRST_DELAY = 1.0
_LONGEST_DELAY = 60.0
# After a run that lasted this long, the delay before the next start is the first one again.
_GOOD_RUN_SECONDS = 60.0
# So it is after a run that ended by itself, such as a script's exit(), if it lasted this long.
_BRIEF_RUN_SECONDS = 5.0
_KEPT_MESSAGES = 8


class EndedError(Exception):
    """The output of a session is a reason to kill its process at once; the text says why."""


class Supervised(ABC):
    """Keeps one D program running until stop() is called.

    A subclass decides what runs, and handles the output.

    Args:
        id: the session's host and name.
        state: holds the session's status.
        starting: held while dtrace(1) compiles a program or answers a question, because this keeps
            a processor busy.
    """

    def __init__(
        self,
        id: SessionId,  # noqa: A002
        state: State,
        starting: asyncio.Semaphore,
    ) -> None:
        self.id = id
        self.status = state.sessions.setdefault(id, SessionStatus())
        self.settled = asyncio.Event()
        """Set once the session has been up, or down with a reason."""
        self._state = state
        self._starting = starting
        self._stopping = False
        self._process: asyncio.subprocess.Process | None = None
        self._messages: deque[str] = deque(maxlen=_KEPT_MESSAGES)
        self._last_row: float | None = None
        self._logged = False
        self._ended_itself = False
        self._task = asyncio.create_task(self._supervise())

    @property
    @abstractmethod
    def argv(self) -> Sequence[str]:
        """The command that runs the program from its standard input."""

    @property
    @abstractmethod
    def patience(self) -> float:
        """For how many seconds it may be silent."""

    @abstractmethod
    async def _prepare(self) -> str:
        """Return the program text of the next run.

        Raises:
            DTraceError: there is none, for a reason that may pass.
        """

    @abstractmethod
    async def _take(self, chunk: bytes) -> list[Beat]:
        """Handle a piece of a run's output; an empty chunk is the end.

        Raises:
            EndedError: the process has to be killed.
        """

    async def _over(self) -> None:  # noqa: B027
        """Called after a run has ended and all of its output has been handled."""

    def _mends(self, reason: str, text: str) -> bool:  # noqa: ARG002
        """Return whether the next run has another text because this one failed for a reason."""
        return False

    def _loses(self) -> None:  # noqa: B027
        """Called when dtrace(1) has said that it lost something."""

    async def stop(self) -> None:
        """End the session: its process by SIGTERM, and by SIGKILL if that does not help."""
        self._stopping = True
        if self._process is None:
            self._task.cancel()
        else:
            self._signal(signal.SIGTERM)
        done, _ = await asyncio.wait([self._task], timeout=_STOP_SECONDS)
        if not done:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._down("stopped")

    async def _supervise(self) -> None:
        delay = _FIRST_DELAY
        while True:
            began = time.monotonic()
            text = ""
            try:
                text = await self._prepare()
                reason = await self._run(text)
            except (dtrace.DTraceError, EndedError) as error:
                reason = str(error)
            except OSError as error:
                reason = f"cannot start {self.argv[0]}: {error.strerror or error}"
            except Exception as error:
                _log.exception("session failed", extra=self._fields())
                reason = f"internal error: {error}"
            if not (self.status.up or self._stopping) and self._mends(reason, text):
                continue
            self._down(reason)
            await self._over()
            if self._stopping:
                return
            lasted = time.monotonic() - began
            done = self._ended_itself and lasted > _BRIEF_RUN_SECONDS
            if done or lasted > _GOOD_RUN_SECONDS:
                delay = _FIRST_DELAY
            wait = delay * random.uniform(0.75, 1.25)  # noqa: S311
            details = self._fields(why=reason, restart_in=f"{wait:.1f}s")
            if done:
                _log.info("session done", extra=details)
            else:
                _log.error("session ended", extra=details)
            await asyncio.sleep(wait)
            # The kernel releases the probes of a killed process a moment after its end.
            if program.runs_here(self.argv):
                remove_leftovers()
            delay = min(delay * 2, _LONGEST_DELAY)
            self.status.restarts += 1

    async def _run(self, text: str) -> str:
        """Run dtrace(1) once, to its end.

        Returns:
            Why it ended.
        """
        try:
            async with contextlib.AsyncExitStack() as starting:
                await starting.enter_async_context(self._starting)
                async with child(self.argv) as process:
                    self._process = process
                    self.status.pid = process.pid
                    return await self._attend(process, text, starting)
        finally:
            self._process = None
            self.status.pid = None
            if program.runs_here(self.argv):
                remove_leftovers()

    async def _attend(
        self, process: asyncio.subprocess.Process, text: str, starting: contextlib.AsyncExitStack
    ) -> str:
        assert process.stdout is not None
        assert process.stderr is not None
        self._messages.clear()
        self._ended_itself = False
        listening = asyncio.create_task(self._read_stderr(process.stderr))
        try:
            try:
                async with asyncio.timeout(START_SECONDS):
                    await hand_over(process, text)
            except TimeoutError:
                return f"did not read its program within {START_SECONDS:g} s"
            self._logged = False
            late = await self._read_stdout(process.stdout, starting)
            if late:
                # What it has counted is in its last rows.
                self._signal(signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_DRAIN_SECONDS):
                        while chunk := await process.stdout.read(_CHUNK):
                            await self._take(chunk)
                return late
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _STOP_SECONDS)
            await asyncio.wait([listening], timeout=_STOP_SECONDS)
            self._ended_itself = process.returncode == 0
            return _describe(process.returncode, self._messages)
        finally:
            listening.cancel()

    async def _read_stdout(
        self, stdout: asyncio.StreamReader, starting: contextlib.AsyncExitStack
    ) -> str:
        """Handle rows until the output ends or the heartbeat is late.

        Returns:
            An empty string at the end of the output, else what did not come in time.
        """
        heartbeat = Heartbeat(self.patience)
        ended, late = False, ""
        while not (ended or late):
            beats: list[Beat] = []
            chunk = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SLICE):
                    chunk = await stdout.read(_CHUNK)
            if chunk is not None:
                ended = not chunk
                beats = await self._take(chunk)
            if any(beat is None for beat in beats):
                await starting.aclose()
            late = heartbeat.look(beats, is_up=self.status.up)
        return late

    def _heard(self) -> None:
        """Record that a row has arrived."""
        self.status.last_record = time.time()
        self._last_row = time.monotonic()

    def _bad(self, row: str, why: str) -> None:
        self.status.bad_rows += 1
        if not self._logged:
            self._logged = True
            _log.warning("bad row", extra=self._fields(row=row[:200], why=why))

    def _is_up(self) -> None:
        if self._last_row is not None:
            self.status.uncounted += time.monotonic() - self._last_row
        # A greeting or a notice is not why it will end.
        self._messages.clear()
        self.status.up = True
        self.status.reason = ""
        self.settled.set()
        _log.info("session up", extra=self._fields(pid=self.status.pid))

    async def _read_stderr(self, stderr: asyncio.StreamReader) -> None:
        splitter = LineSplitter()
        logged = set()
        turn = Turn()
        while chunk := await stderr.read(_CHUNK):
            for line in splitter.feed(chunk):
                if turn.is_over:
                    await turn.rest()
                diagnostic = diagnostics.classify(line)
                if diagnostic.kind == "lost":
                    self.status.lost[diagnostic.lost] += diagnostic.count
                    self._loses()
                elif diagnostic.kind == "fault":
                    self.status.probe_errors += diagnostic.count
                else:
                    self._messages.append(diagnostic.text)
                key = diagnostic.kind, diagnostic.lost
                if key not in logged:
                    logged.add(key)
                    level = logging.DEBUG if diagnostic.kind == "notice" else logging.WARNING
                    _log.log(level, "dtrace says", extra=self._fields(message=diagnostic.text))
        self._messages.extend(diagnostics.classify(line).text for line in splitter.end())

    def _down(self, reason: str) -> None:
        self.status.up = False
        self.status.reason = reason
        self.settled.set()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            send_signal(self._process, number)

    def _fields(self, **values: object) -> dict[str, dict[str, object]]:
        host = {"host": self.id.host} if self.id.host else {}
        return fields(session=self.id.name, **host, **values)


def _describe(status: int | None, messages: deque[str]) -> str:
    if status is None:
        how = "it closed its output and had to be killed"
    elif status < 0:
        try:
            how = f"killed by {signal.Signals(-status).name}"
        except ValueError:
            how = f"killed by signal {-status}"
    else:
        how = f"exit status {status}"
    return ": ".join(["dtrace(1) ended", how, *([" / ".join(messages)] if messages else [])])
