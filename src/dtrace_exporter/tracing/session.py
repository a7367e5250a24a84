"""A session: one dtrace(1) process, started, listened to, ended and started again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import replace

from dtrace_exporter.families import Part
from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.limits import LimitError
from dtrace_exporter.listeners import Identity, SessionId
from dtrace_exporter.log import fields
from dtrace_exporter.state import SessionStatus, State
from dtrace_exporter.tracing import (
    diagnostics,
    dtrace,
    exactness,
    program,
    refusal,
    rendering,
    rows,
)
from dtrace_exporter.tracing.audit import Audits
from dtrace_exporter.tracing.heartbeat import SLICE, START_SECONDS, Heartbeat
from dtrace_exporter.tracing.lines import LineSplitter
from dtrace_exporter.tracing.plan import CALLS, Plan
from dtrace_exporter.tracing.process import child, hand_over
from dtrace_exporter.tracing.program import Program
from dtrace_exporter.tracing.rows import Ready, RowError, Tick
from dtrace_exporter.tracing.tally import Tally
from dtrace_exporter.tracing.uprobes import remove_leftovers
from dtrace_exporter.turns import Turn, by_turns

_log = logging.getLogger(__name__)

_CHUNK = 1 << 16
_STOP_SECONDS = 5.0
# So long a consumer that is late may take to print what it has counted, once it is told to end.
_DRAIN_SECONDS = 20.0
_FIRST_DELAY = 1.0
_LONGEST_DELAY = 60.0
# A run that lasted this long was a good one: the next failure is a first one again.
_GOOD_RUN_SECONDS = 60.0
_KEPT_MESSAGES = 8

EXACT = "exact"
"""The feature that says whether a session of this host sees everything; see exactness.py."""


class Session:
    """Keeps one D program running for as long as the exporter wants it.

    Args:
        id: its name.
        plan: what it runs.
        state: where its status and its listeners are; the table has to have a watch of it.
        starting: held while dtrace(1) compiles, which takes a processor's whole time, or is asked.
        finding: asks a host, by its command, which family it is of; the same for all its sessions.
    """

    def __init__(
        self,
        id: SessionId,  # noqa: A002
        plan: Plan,
        state: State,
        starting: asyncio.Semaphore,
        finding: Callable[[tuple[str, ...]], Awaitable[str]] = dtrace.find_program,
    ) -> None:
        self.id = id
        self.plan = plan
        self.status = state.sessions.setdefault(id, SessionStatus())
        self.settled = asyncio.Event()
        """Set once the session has been up, or down with a reason."""
        self._state = state
        self._starting = starting
        self._finding = finding
        self._stopping = False
        self._process: asyncio.subprocess.Process | None = None
        self.left_out = plan.switched_off
        """Optional parts that are not enabled, and why."""
        self._program: Program | None = None
        self._tally: Tally | None = None
        self._audits = Audits()
        self._last_row: float | None = None
        self._logged = False
        self._told_limits: set[str] = set()
        if plan.program is not None:
            self._use(plan.program)
        self._task = asyncio.create_task(self._supervise())

    @property
    def parts(self) -> Mapping[str, Part]:
        """The optional parts that its program may have, by name; none while it is not known."""
        return self._program.family.parts if self._program else {}

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
            name = await self._finding(tuple(self.plan.dtrace.command))
        chosen = program.load(name)
        self._use(chosen)
        if not self.id.host:
            self._state.source = replace(self._state.source, program=name)
        return chosen

    def _use(self, chosen: Program) -> None:
        self._program = chosen
        if chosen.needs_drop_counters and not self.plan.counters:
            why = "where this kernel counts its drops is not known here"
            self.left_out |= dict.fromkeys(chosen.with_dependents({"syn_drops"}), why)
        features = self.status.features or self._features(chosen)
        ports = self._state.table.ports(self.id)
        self._state.table.watch(self.id, ports, program.capabilities(chosen, features))

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
            part = None
            if self._program is not None and not self.status.up:
                part = refusal.blame(reason, text, self._program.family)
            # What is left out already is not why: it would begin again at once, and for ever.
            if part is not None and part not in self.left_out and not self._stopping:
                assert self._program is not None
                for each in self._program.with_dependents({part}):
                    self.left_out.setdefault(each, reason)
                _log.warning(
                    "left out what this kernel cannot do", extra=self._fields(part=part, why=reason)
                )
                continue
            self._down(reason)
            if self._tally is not None:
                await by_turns(self._tally.drain())
                self._tally = None
            if self._stopping:
                return
            if time.monotonic() - began > _GOOD_RUN_SECONDS:
                delay = _FIRST_DELAY
            wait = delay * random.uniform(0.75, 1.25)  # noqa: S311
            _log.error("session ended", extra=self._fields(why=reason, restart_in=f"{wait:.1f}s"))
            await asyncio.sleep(wait)
            # The kernel lets go of what a killed process had a moment after its end.
            if program.runs_here(self.plan.argv):
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
                async with child(self.plan.argv) as process:
                    self._process = process
                    self.status.pid = process.pid
                    return await self._attend(process, text, starting)
        finally:
            self._process = None
            self.status.pid = None
            if program.runs_here(self.plan.argv):
                remove_leftovers()

    async def _attend(
        self, process: asyncio.subprocess.Process, text: str, starting: contextlib.AsyncExitStack
    ) -> str:
        assert process.stdout is not None
        assert process.stderr is not None
        messages: deque[str] = deque(maxlen=_KEPT_MESSAGES)
        listening = asyncio.create_task(self._read_stderr(process.stderr, messages))
        try:
            try:
                async with asyncio.timeout(START_SECONDS):
                    await hand_over(process, text)
            except TimeoutError:
                return f"did not read its program within {START_SECONDS:g} s"
            self._logged = False
            self._told_limits.clear()
            splitter = LineSplitter()
            late = await self._read_stdout(process.stdout, splitter, starting, messages)
            if late:
                # What it has counted is in its last rows.
                self._signal(signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_DRAIN_SECONDS):
                        while chunk := await process.stdout.read(_CHUNK):
                            await self._take(splitter.feed(chunk), messages)
                return late
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _STOP_SECONDS)
            await asyncio.wait([listening], timeout=_STOP_SECONDS)
            return _describe(process.returncode, messages)
        finally:
            listening.cancel()

    async def _read_stdout(
        self,
        stdout: asyncio.StreamReader,
        splitter: LineSplitter,
        starting: contextlib.AsyncExitStack,
        messages: deque[str],
    ) -> str:
        """Take rows until the output ends, or its heartbeat.

        Returns:
            An empty string, or what it was that did not come in time.
        """
        heartbeat = Heartbeat(rendering.window(self.plan.dtrace.interval).patience)
        ended, late = False, ""
        while not (ended or late):
            lines: list[str] = []
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SLICE):
                    chunk = await stdout.read(_CHUNK)
                ended = not chunk
                lines = splitter.end() if ended else splitter.feed(chunk)
            records = await self._take(lines, messages)
            if any(isinstance(record, Ready) for record in records):
                await starting.aclose()
            late = heartbeat.look(records, is_up=self.status.up)
        return late

    async def _take(self, lines: list[str], messages: deque[str]) -> list[Ready | Tick]:
        """Give lines to the tally; return those of the session itself."""
        found = []
        turn = Turn()
        for line in lines:
            if turn.is_over:
                await turn.rest()
            try:
                if self._tally is None:
                    record: Ready | Tick | None = self._greeted(line)
                    # A greeting, a notice: not why it will have ended.
                    messages.clear()
                else:
                    record = self._tally.feed(line)
            except RowError as error:
                self._bad(line, str(error))
                continue
            except LimitError as error:
                self._refused(error)
                continue
            if isinstance(record, Tick):
                assert self._tally is not None
                for wrong in self._tally.settle(record):
                    if wrong:
                        self._bad(line, wrong)
                    if turn.is_over:
                        await turn.rest()
            if record is not None:
                found.append(record)
                self.status.last_record = time.time()
                self._last_row = time.monotonic()
        return found

    def _bad(self, line: str, why: str) -> None:
        self.status.bad_rows += 1
        if not self._logged:
            self._logged = True
            _log.warning("bad row", extra=self._fields(row=line[:200], why=why))

    def _refused(self, error: LimitError) -> None:
        self.status.refused[error.limit] += 1
        if error.limit not in self._told_limits:
            self._told_limits.add(error.limit)
            _log.warning("no room", extra=self._fields(why=str(error)))

    def _greeted(self, line: str) -> Ready:
        """Read the first row, which says how the others are written."""
        words = line.split()
        if len(words) != 3 or words[0] != "ready":
            raise RowError("not a row")
        if words[1] != str(rows.PROTOCOL):
            raise RowError(f"rows of version {words[1][:9]}, not of {rows.PROTOCOL}")
        reader = Tally(self._state.table, self.id)
        ready = reader.feed(line)
        assert isinstance(ready, Ready)
        self._tally = reader
        self._is_up()
        return ready

    def _is_up(self) -> None:
        assert self._program is not None
        self._audits = Audits()
        if self._last_row is not None:
            self.status.uncounted += time.monotonic() - self._last_row
        features = self._features(self._program)
        if self._program.calls and self.status.pid and program.runs_here(self.plan.argv):
            if why := exactness.why_not(self.status.pid):
                self.left_out[EXACT] = why
            features[EXACT] = not why
        self.status.features = features
        ports = self._state.table.ports(self.id)
        self._state.table.watch(self.id, ports, program.capabilities(self._program, features))
        self.status.up = True
        self.status.reason = ""
        self.settled.set()
        _log.info("session up", extra=self._fields(pid=self.status.pid))

    async def compare(
        self, samples: list[ListeningSocket], at: int, totals: Mapping[str, int]
    ) -> None:
        """Take the kernel's own word on this host's listeners, if it speaks of the same place.

        Args:
            samples: as inet_diag.listeners() gives them.
            at: in nanoseconds of the monotonic clock, before they were read.
            totals: as audit.totals() gives them; a session of all listeners is held against these,
                another one against the drops of its listeners' sockets.
        """
        reader, table = self._tally, self._state.table
        if reader is None or not self.status.up or reader.own_place != _own_netns():
            return
        own_place = table.own_place(self.id)
        found = await by_turns(_by_listener(samples, self.id.host, own_place))
        # It may have ended meanwhile, and nobody watch its listeners any more.
        if self._tally is not reader or not self.status.up:
            return
        for limit in await by_turns(reader.seed(found, at)):
            self._refused(LimitError(limit))
        if self.id.name == CALLS or not table.is_watched(self.id):
            return
        missing = await by_turns(self._audits.look(table, self.id, found, totals, reader.ticks))
        for kind, more in missing.items():
            self.status.unattributed[kind] = self.status.unattributed.get(kind, 0) + more

    async def _read_stderr(self, stderr: asyncio.StreamReader, messages: deque[str]) -> None:
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
                    if self._tally is not None:
                        self._tally.lose()
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


def _by_listener(
    samples: list[ListeningSocket], host: str, place: str
) -> Generator[None, None, dict[Identity, list[ListeningSocket]]]:
    """Return the sockets of a place by their listener; yields after each."""
    found: dict[Identity, list[ListeningSocket]] = {}
    for sample in samples:
        identity = Identity(host, place, sample.address, sample.port)
        found.setdefault(identity, []).append(sample)
        yield
    return found


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
