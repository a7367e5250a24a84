"""A session of listen queues: runs a program, and adds its rows to the listener table."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import replace

from dtrace_exporter import namespaces, unix_drops
from dtrace_exporter.families import Part
from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.limits import LimitError
from dtrace_exporter.listeners import Identity, SessionId
from dtrace_exporter.state import State
from dtrace_exporter.tracing import dtrace, exactness, program, refusal, rendering, rows
from dtrace_exporter.tracing.audit import Audits
from dtrace_exporter.tracing.heartbeat import Beat
from dtrace_exporter.tracing.lines import LineSplitter
from dtrace_exporter.tracing.plan import BESIDE, CALLS, UNIX, Plan
from dtrace_exporter.tracing.program import Program
from dtrace_exporter.tracing.rows import Ready, RowError, Tick, Unattributed
from dtrace_exporter.tracing.supervision import Supervised
from dtrace_exporter.tracing.tally import Tally
from dtrace_exporter.turns import Turn, by_turns

_log = logging.getLogger(__name__)

EXACT = "exact"
"""The feature that says whether a session of this host can miss no event; see exactness.py."""


class Session(Supervised):
    """Keeps a program that counts at listeners running, and adds its counts to the table.

    Args:
        id: the session's host and name.
        plan: what it runs.
        state: holds its status and its listeners. The table must have a watch of this session.
        starting: held while dtrace(1) compiles a program or answers a question, because this keeps
            a processor busy.
        finding: asks a host, by its command, which program it needs.
    """

    def __init__(
        self,
        id: SessionId,  # noqa: A002
        plan: Plan,
        state: State,
        starting: asyncio.Semaphore,
        finding: Callable[[tuple[str, ...]], Awaitable[str]] = dtrace.find_program,
    ) -> None:
        super().__init__(id, state, starting)
        self.plan = plan
        self._finding = finding
        self.left_out: dict[str, str] = {}
        """The optional parts that are not enabled, each with the reason."""
        self._program: Program | None = None
        self._splitter = LineSplitter()
        self._tally: Tally | None = None
        self._audits = Audits()
        self._told_limits: set[str] = set()
        if plan.program is not None:
            self._use(plan.program)
        if self._sees_closes:
            state.table.lose_sight(id.host)

    @property
    def argv(self) -> list[str]:
        """The command that runs the program from its standard input."""
        return self.plan.argv

    @property
    def own_place(self) -> str:
        """The place of the host itself, as its program names it; empty while it is down."""
        return self._tally.own_place if self._tally else ""

    @property
    def patience(self) -> float:
        """For how many seconds it may be silent."""
        return rendering.window(self.plan.dtrace.interval).patience

    @property
    def _sees_closes(self) -> bool:
        """Whether only this session sees the host's listeners close."""
        chosen = self._program
        return self.id.name == CALLS and chosen is not None and chosen.family.skips_nested

    @property
    def parts(self) -> Mapping[str, Part]:
        """The optional parts that its program may have, by name; empty until it is known."""
        return self._program.family.parts if self._program else {}

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
        off = self.plan.switched_off
        self.left_out |= {part: off[part] for part in off if part in chosen.parts}
        if chosen.needs_drop_counters and not self.plan.counters:
            why = "unknown where this kernel counts its drops"
            self.left_out |= dict.fromkeys(chosen.with_dependents({"syn_drops"}), why)
        features = self.status.features or self._features(chosen)
        watched = self._state.table.watched(self.id)
        self._state.table.watch(self.id, watched, program.capabilities(chosen, features))

    def _features(self, chosen: Program) -> dict[str, bool]:
        return {part: part not in self.left_out for part in chosen.parts}

    async def _prepare(self) -> str:
        chosen = self._program or await self._find()
        self._splitter = LineSplitter()
        self._told_limits.clear()
        return self.plan.render(chosen, set(self.left_out))

    def _mends(self, reason: str, text: str) -> bool:
        """Leave out the optional part that a refusal is about."""
        if self._program is None:
            return False
        part = refusal.blame(reason, text, self._program.family)
        # A part that is left out already cannot be the reason. The session would restart at once,
        # for ever.
        if part is None or part in self.left_out:
            return False
        for each in self._program.with_dependents({*self.left_out, part}):
            self.left_out.setdefault(each, reason)
        _log.warning(
            "left out what this kernel cannot do", extra=self._fields(part=part, why=reason)
        )
        return True

    async def _over(self) -> None:
        if self._tally is not None:
            await by_turns(self._tally.drain())
            self._tally = None

    def _loses(self) -> None:
        if self._tally is not None:
            self._tally.lose()

    async def _take(self, chunk: bytes) -> list[Beat]:
        """Give the lines of a chunk to the tally."""
        lines = self._splitter.feed(chunk) if chunk else self._splitter.end()
        beats: list[Beat] = []
        turn = Turn()
        for line in lines:
            if turn.is_over:
                await turn.rest()
            try:
                record = self._tally.feed(line) if self._tally else self._greeted(line)
            except RowError as error:
                self._bad(line, str(error))
                continue
            except LimitError as error:
                self._refused(error)
                continue
            if isinstance(record, Unattributed):
                self._lack("drops", record.events)
                continue
            if isinstance(record, Tick):
                assert self._tally is not None
                for wrong in self._tally.settle(record):
                    if wrong:
                        self._bad(line, wrong)
                    if turn.is_over:
                        await turn.rest()
            if record is not None:
                beats.append(record.time if isinstance(record, Tick) else None)
                self._heard()
        return beats

    def _refused(self, error: LimitError) -> None:
        self.status.refused[error.limit] += 1
        if error.limit not in self._told_limits:
            self._told_limits.add(error.limit)
            _log.warning("limit reached", extra=self._fields(why=str(error)))

    def _greeted(self, line: str) -> Ready:
        """Read the first row, which has the version of all rows."""
        words = line.split()
        if len(words) != 3 or words[0] != "ready":
            raise RowError("not a row")
        if words[1] != str(rows.PROTOCOL):
            raise RowError(f"rows of version {words[1][:9]}, not of {rows.PROTOCOL}")
        reader = Tally(self._state.table, self.id, sees_closes=self._sees_closes)
        ready = reader.feed(line)
        assert isinstance(ready, Ready)
        self._tally = reader
        self._is_up()
        return ready

    def _is_up(self) -> None:
        assert self._program is not None
        self._audits = Audits()
        features = self._features(self._program)
        counts = self.id.name != CALLS and self._program.tells_listeners
        look = counts and self._program.family.skips_nested
        if look and self.status.pid and program.runs_here(self.plan.argv):
            in_processes = self.id.name == UNIX
            if why := exactness.why_not(self.status.pid, in_processes=in_processes):
                self.left_out[EXACT] = why
            features[EXACT] = not why
        self.status.features = features
        if features.get(unix_drops.PART):
            self._lack("drops", 0)
        watched = self._state.table.watched(self.id)
        self._state.table.watch(self.id, watched, program.capabilities(self._program, features))
        super()._is_up()

    async def compare(
        self, samples: list[ListeningSocket], at: int, totals: Mapping[str, int]
    ) -> None:
        """Compare with what the kernel itself says of the listeners, if it is of the same place.

        Args:
            samples: the listening sockets, as inet_diag.listeners() returns them.
            at: a time before they were read, in nanoseconds of the monotonic clock.
            totals: as kernel_totals.read() returns them, read after the samples. A session of all
                listeners is compared with these, another one with its listeners' sockets as well.
        """
        reader, table = self._tally, self._state.table
        if self.id.name in BESIDE or reader is None or not self.status.up:
            return
        if reader.own_place != namespaces.own():
            return
        own_place = table.own_place(self.id)
        found = await by_turns(_by_listener(samples, self.id.host, own_place))
        # Meanwhile the session may have ended, and its watch may be gone.
        if self._tally is not reader or not self.status.up:
            return
        for limit in await by_turns(reader.seed(found, at)):
            self._refused(LimitError(limit))
        if not table.is_watched(self.id):
            return
        missing = await by_turns(self._audits.look(table, self.id, found, totals, reader.ticks))
        for kind, more in missing.items():
            self._lack(kind, more)

    def _lack(self, kind: str, events: int) -> None:
        """Count events of which it is not known whose they are."""
        self.status.unattributed[kind] = self.status.unattributed.get(kind, 0) + events

    async def stop(self) -> None:
        """End the session. After ``calls``, observations of sockets from any time count again."""
        await super().stop()
        if self._sees_closes:
            self._state.table.sockets(self.id.host).since = 0

    async def forget(self) -> None:
        """Drop the references to listeners that the table has forgotten."""
        if self._tally is not None:
            await by_turns(self._tally.forget())

    def _down(self, reason: str) -> None:
        super()._down(reason)
        if self.id.name == UNIX:
            return
        self._state.table.clear_queues(self.id)
        if self._tally is not None:
            self._tally.forget_listens()
        if self._sees_closes:
            self._state.table.lose_sight(self.id.host)


def _by_listener(
    samples: list[ListeningSocket], host: str, place: str
) -> Generator[None, None, dict[Identity, list[ListeningSocket]]]:
    """Return the sockets of a place by their listener; yields after each socket."""
    found: dict[Identity, list[ListeningSocket]] = {}
    for sample in samples:
        identity = Identity(host, place, sample.address, sample.port)
        found.setdefault(identity, []).append(sample)
        yield
    return found
