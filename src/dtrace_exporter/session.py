"""A session: one dtrace(1) process, started, listened to, ended and started again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import random
import signal
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dtrace_exporter import diagnostics, dtrace, program, sock_diag
from dtrace_exporter.config import DTraceConfig
from dtrace_exporter.lines import LineSplitter
from dtrace_exporter.listeners import SessionId
from dtrace_exporter.log import fields
from dtrace_exporter.process import child
from dtrace_exporter.program import Program
from dtrace_exporter.rows import PROTOCOL, Calm, Place, Ready, Row, RowError, Tick, parse
from dtrace_exporter.state import SessionStatus, State
from dtrace_exporter.tally import Tally

_log = logging.getLogger(__name__)

_CHUNK = 1 << 16
_START_SECONDS = 180.0
_STOP_SECONDS = 5.0
_FIRST_DELAY = 1.0
_LONGEST_DELAY = 60.0
# A run that lasted this long was a good one: the next failure is a first one again.
_GOOD_RUN_SECONDS = 60.0
_KEPT_MESSAGES = 8


@dataclass(frozen=True)
class Plan:
    """All that a session's process depends on. Two plans alike need no new process.

    ``program`` is None where the host's kernel has to be asked which one it needs; ``counters`` are
    as program.drop_counters() gives them.
    """

    dtrace: DTraceConfig
    program: Program | None
    ports: tuple[int, int]
    counters: Mapping[str, int]

    @property
    def argv(self) -> list[str]:
        """The command that runs the program from its standard input."""
        options = [
            f"{name}={value}" if value else name for name, value in self.dtrace.options.items()
        ]
        return [
            *self.dtrace.command,
            *(word for option in options for word in ("-x", option)),
            *("-s", "/dev/stdin"),
        ]

    def render(self, chosen: Program, without: set[str]) -> str:
        """Return a program's text less some optional parts."""
        window = program.window(self.dtrace.interval)
        counters = self.counters or program.NO_DROP_COUNTERS
        numbers = {**counters, **program.offsets(self.dtrace.offsets)}
        return program.render(
            chosen, window, self.ports, numbers, without, list(self.dtrace.options)
        )


class Session:
    """Keeps one D program running for as long as the exporter wants it.

    Args:
        id: its name.
        plan: what it runs.
        state: where its status and its listeners are; the table has to have a watch of it.
        starting: held while dtrace(1) compiles, which takes a processor's whole time, or is asked.
    """

    def __init__(
        self,
        id: SessionId,  # noqa: A002
        plan: Plan,
        state: State,
        starting: asyncio.Semaphore,
    ) -> None:
        self.id = id
        self.plan = plan
        self.status = state.sessions.setdefault(id, SessionStatus())
        self.settled = asyncio.Event()
        """Set once the session has been up, or down with a reason."""
        self._state = state
        self._starting = starting
        self._stopping = False
        self._process: asyncio.subprocess.Process | None = None
        self.left_out: dict[str, str] = {}
        """Optional parts that are not enabled, and why."""
        if not plan.dtrace.accept_wait:
            self.left_out["accept_wait"] = "switched off in the configuration"
        self._program: Program | None = None
        if plan.program is not None:
            self._use(plan.program)
        self._task = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """End the session, its process with SIGTERM and, should that not help, with SIGKILL."""
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

    async def _find(self) -> Program:
        """Ask the host which program it needs, and use it from now on."""
        async with self._starting:
            name = await dtrace.find_program(self.plan.dtrace.command)
        chosen = program.load(name)
        self._use(chosen)
        if not self.id.host:
            self._state.source = replace(self._state.source, program=name)
        return chosen

    def _use(self, chosen: Program) -> None:
        self._program = chosen
        if chosen.needs_drop_counters and not self.plan.counters:
            why = "where this kernel counts its drops is not known here"
            self.left_out |= {"syn_drops": why, "ack_drops": why}
        features = self.status.features or self._features(chosen)
        ports = self._state.table.ports(self.id)
        self._state.table.watch(self.id, ports, program.exports(chosen, features))

    def _features(self, chosen: Program) -> dict[str, bool]:
        return {part: part not in self.left_out for part in chosen.parts}

    async def _supervise(self) -> None:
        delay = _FIRST_DELAY
        while True:
            began = time.monotonic()
            text = ""
            try:
                chosen = self._program or await self._find()
                text = self.plan.render(chosen, set(self.left_out))
                reason = await self._run(text)
            except dtrace.DTraceError as error:
                reason = str(error)
            except OSError as error:
                reason = f"cannot start {self.plan.argv[0]}: {error.strerror or error}"
            except Exception as error:
                _log.exception("session failed", extra=self._fields())
                reason = f"internal error: {error}"
            part = None if self.status.up else program.blame(reason, text)
            if part is not None and self._program is not None and not self._stopping:
                for each in self._program.with_dependents({part}):
                    self.left_out.setdefault(each, reason)
                _log.warning(
                    "left out what this kernel cannot do", extra=self._fields(part=part, why=reason)
                )
                continue
            self._down(reason)
            if self._stopping:
                return
            if time.monotonic() - began > _GOOD_RUN_SECONDS:
                delay = _FIRST_DELAY
            wait = delay * random.uniform(0.75, 1.25)  # noqa: S311
            _log.error("session ended", extra=self._fields(why=reason, restart_in=f"{wait:.1f}s"))
            await asyncio.sleep(wait)
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
                async with child(self.plan.argv) as process:
                    self._process = process
                    self.status.pid = process.pid
                    return await self._attend(process, text, starting)
        finally:
            self._process = None
            self.status.pid = None

    async def _attend(
        self, process: asyncio.subprocess.Process, text: str, starting: contextlib.AsyncExitStack
    ) -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        messages: deque[str] = deque(maxlen=_KEPT_MESSAGES)
        listening = asyncio.create_task(self._read_stderr(process.stderr, messages))
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.write(text.encode())
                await process.stdin.drain()
            process.stdin.close()
            silence = await self._read_stdout(process.stdout, starting, messages)
            if silence:
                return silence
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _STOP_SECONDS)
            await asyncio.wait([listening], timeout=_STOP_SECONDS)
            return _describe(process.returncode, messages)
        finally:
            listening.cancel()

    async def _read_stdout(
        self,
        stdout: asyncio.StreamReader,
        starting: contextlib.AsyncExitStack,
        messages: deque[str],
    ) -> str:
        """Take rows until the output ends, or its heartbeat.

        Returns:
            An empty string, or what it was that did not come in time.
        """
        tally = Tally(self._state.table, self.id)
        splitter = LineSplitter()
        patience = program.window(self.plan.dtrace.interval).patience
        deadline = time.monotonic() + _START_SECONDS
        least = math.inf
        logged = False
        while True:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    chunk = await stdout.read(_CHUNK)
            except TimeoutError:
                if self.status.up:
                    return f"no heartbeat for {patience:g} s"
                return f"not ready after {_START_SECONDS:g} s"
            for line in splitter.feed(chunk) if chunk else splitter.end():
                try:
                    record = parse(line)
                    if isinstance(record, Row):
                        tally.row(record)
                        continue
                    if isinstance(record, Calm):
                        tally.calm(record)
                        continue
                    if isinstance(record, Place):
                        tally.place(record)
                        continue
                    if isinstance(record, Tick):
                        tally.tick(record)
                        # Two clocks: that the difference grows is all that it tells.
                        age = time.monotonic() - record.time / 1e9
                        least = min(least, age)
                        if age - least > patience:
                            return f"rows come {age - least:.0f} s late"
                    else:
                        self._ready(record, tally)
                        # A greeting, a notice: not why it will have ended.
                        messages.clear()
                        await starting.aclose()
                    deadline = time.monotonic() + patience
                    self.status.last_record = time.time()
                except RowError as error:
                    self.status.bad_rows += 1
                    if not logged:
                        logged = True
                        _log.warning("bad row", extra=self._fields(row=line[:200], why=str(error)))
            if not chunk:
                return ""

    def _ready(self, ready: Ready, tally: Tally) -> None:
        if ready.version != PROTOCOL:
            raise RowError(f"rows of version {ready.version}, not {PROTOCOL}")
        assert self._program is not None
        tally.ready(ready)
        here = not self.id.host and program.runs_here(self.plan.argv)
        if here and ready.home == _own_netns():
            with contextlib.suppress(OSError, ImportError):
                tally.know(sock_diag.listeners())
        self.status.features = features = self._features(self._program)
        ports = self._state.table.ports(self.id)
        self._state.table.watch(self.id, ports, program.exports(self._program, features))
        self.status.up = True
        self.status.reason = ""
        self.settled.set()
        _log.info("session up", extra=self._fields(pid=self.status.pid))

    async def _read_stderr(self, stderr: asyncio.StreamReader, messages: deque[str]) -> None:
        splitter = LineSplitter()
        logged = set()
        while chunk := await stderr.read(_CHUNK):
            for line in splitter.feed(chunk):
                diagnostic = diagnostics.classify(line)
                if diagnostic.kind == "lost":
                    self.status.lost[diagnostic.lost] += diagnostic.count
                elif diagnostic.kind == "fault":
                    self.status.probe_errors += diagnostic.count
                else:
                    messages.append(diagnostic.text)
                key = diagnostic.kind, diagnostic.lost
                if key not in logged:
                    logged.add(key)
                    level = logging.DEBUG if diagnostic.kind == "notice" else logging.WARNING
                    _log.log(level, "dtrace says", extra=self._fields(message=diagnostic.text))
        messages.extend(diagnostics.classify(line).text for line in splitter.end())

    def _down(self, reason: str) -> None:
        self.status.up = False
        self.status.reason = reason
        self.settled.set()
        self._state.table.clear_queues(self.id)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _fields(self, **values: object) -> dict[str, dict[str, object]]:
        host = {"host": self.id.host} if self.id.host else {}
        return fields(session=self.id.name, **host, **values)


def _own_netns() -> str:
    """Return the number of this process's network namespace as D programs print it."""
    try:
        return str(os.stat("/proc/self/ns/net").st_ino)  # noqa: PTH116
    except OSError:
        return ""


def _describe(status: int | None, messages: deque[str]) -> str:
    if status is None:
        how = "its output did, and it had to be killed"
    elif status < 0:
        try:
            how = f"killed by {signal.Signals(-status).name}"
        except ValueError:
            how = f"killed by signal {-status}"
    else:
        how = f"exit status {status}"
    return ": ".join(["dtrace(1) ended", how, *([" / ".join(messages)] if messages else [])])
