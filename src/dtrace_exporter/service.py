"""The service: runs the sessions that the configuration asks for, and changes them at a reload."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from dtrace_exporter import (
    inet_diag,
    kernel,
    kernel_totals,
    namespaces,
    notify,
    privileges,
    reasons,
    untraced,
)
from dtrace_exporter.background import keep_at
from dtrace_exporter.config import Config, ConfigError, load
from dtrace_exporter.families import families
from dtrace_exporter.listeners import SessionId
from dtrace_exporter.log import fields
from dtrace_exporter.regular import Look, unseen
from dtrace_exporter.scripts import session as scripts
from dtrace_exporter.scripts.session import ScriptPlan, ScriptSession
from dtrace_exporter.state import Source, State
from dtrace_exporter.this_host import UNTRACED, ThisHost
from dtrace_exporter.tracing import dtrace, plan, program
from dtrace_exporter.tracing.plan import Plan
from dtrace_exporter.tracing.session import Session
from dtrace_exporter.tracing.uprobes import remove_leftovers
from dtrace_exporter.turns import by_turns
from dtrace_exporter.watched import Watched

_log = logging.getLogger(__name__)

Plans = dict[SessionId, tuple[Plan, Watched]]

_COMPARE_SECONDS = 1.0
_FORGET_SECONDS = 60.0
_NAMES_SECONDS = 1.0
_RETRY_SECONDS = 300.0
"""How often DTrace is tried again if ``source: auto`` has chosen another source."""
_MOST_TOLD = 20


class Service:
    """Runs a configuration, and reads its file again on demand.

    Args:
        path: the configuration file, None if there is none.
        config: its contents.
        look: raises a ConfigError for a file that must not be used.
        keep: gives up all capabilities but some; raises a ConfigError if some of these have been
            given up already.
        scripts: as for load().
    """

    def __init__(
        self,
        path: Path | None,
        config: Config,
        look: Look = unseen,
        keep: Callable[[frozenset[int]], None] = lambda _: None,
        scripts: Collection[Path] = (),
    ) -> None:
        self.state = State()
        self.sessions: dict[SessionId, Session | ScriptSession] = {}
        self._path = path
        self._scripts = scripts
        self._config = config
        self._look = look
        self._keep = keep
        self._one_at_a_time = asyncio.Lock()
        # One for each host, so that a host that does not answer does not delay others.
        self._starting = defaultdict[str, asyncio.Semaphore](
            lambda: asyncio.Semaphore(os.cpu_count() or 1)
        )
        self.this_host = ThisHost(self.state, self._home)
        self._basis: tuple[object, ...] = ()
        self._netns: dict[str, str] = {}
        self._asked: dict[tuple[str, ...], asyncio.Task[str]] = {}
        self._chosen: tuple[str, str] | None = None
        self._silent: set[tuple[str, int]] = set()
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the sessions, without waiting until they are up.

        Raises:
            program.ProgramError: there is no D program to run.
        """
        self._give_up(self._config)
        # A service that was killed together with its sessions has left some behind.
        remove_leftovers()
        async with self._one_at_a_time:
            await self._apply(self._config)
            self._loaded()
        tasks = [self._forget_closed]
        if untraced.here():
            tasks.append(self._go_over)
        if sys.platform == "linux":
            tasks += [self._compare, self._follow_names, self.this_host.know_owners]
            tasks.append(partial(self._tell_silent, self._config))
        else:
            self.this_host.owners_looked_for.set()
        self._background = [keep_at(task) for task in tasks]

    async def reload(self) -> None:
        """Read the configuration file again and apply it. A bad file changes nothing.

        Raises:
            config.ConfigError: the file is bad.
            program.ProgramError: a D program that it names cannot be read.
        """
        async with self._one_at_a_time:
            notify.tell_reloading()
            try:
                # Parsing a large file takes a second.
                config = await asyncio.to_thread(load, self._path, self._look, self._scripts)
                await self._apply(config)
                self._loaded()
            except Exception as error:
                self.state.last_reload_successful = False
                _log.error("reload failed", extra=fields(why=str(error)))
                raise
            finally:
                notify.tell("READY=1")
            self._config = config
            _log.info("reloaded", extra=fields(sessions=len(self.sessions)))
            if sys.platform == "linux":
                await self._tell_silent(config)

    def summary(self) -> str:
        """Return the status in one line, which systemctl(1) shows."""
        up = sum(status.up for status in self.state.sessions.values())
        return f"{up} of {len(self.state.sessions)} sessions up, source {self.state.source.name}"

    async def stop(self) -> None:
        """End all sessions."""
        for task in self._background:
            task.cancel()
        if self._background:
            await asyncio.wait(self._background)
        async with self._one_at_a_time:
            await asyncio.gather(*(session.stop() for session in self.sessions.values()))
            await self.this_host.stop()
        for asking in self._asked.values():
            asking.cancel()

    async def _apply(self, config: Config) -> None:
        netns = _netns(config)
        plans = await asyncio.to_thread(plan.sessions, config, netns)
        self._forget_failures()
        basis = config.source, config.local.dtrace.command, config.local.dtrace.program
        self._give_up(config)
        before = source = self.state.source
        if basis != self._basis or (config.source == "auto" and not self._counts_here()):
            source, why = await choose_source(config, self._ask)
            self._tell_source(source, why)
        changes = bool(self._basis) and source.name != before.name
        other = untraced.SOURCES.get(source.name)
        if changes:
            # Without DTrace, count the drops since the last scrape.
            await self.state.refresh()
        if other is not None:
            plans = {name: planned for name, planned in plans.items() if name.host}
        # A host may have answered while the source was chosen.
        self._go_on_with_calls(plans)
        script_plans = scripts.plans(config)
        wanted = {name: planned for name, (planned, _) in plans.items()} | script_plans
        ended = await self._end(wanted)
        for host in (config.local, *config.hosts):
            self.state.table.limit(host.name, host.dtrace.limits)
        watched = plan.watched(config.local, netns)
        interval = config.sock_diag.sample_interval
        # A reading that began before must not change listeners of other sessions.
        async with self.this_host.reading:
            # Before anything is forgotten, so that the new sessions take over their listeners.
            await by_turns(self._watch(plans))
            self.this_host.use(other, watched, interval, counted=changes)
            self.this_host.use_unix(config.unix.paths)
        await by_turns(self._forget(ended, wanted))
        if changes:
            await self.state.refresh()
        for name, planned in wanted.items():
            if name not in self.sessions:
                self._start(name, planned)
                # Let its task begin.
                await asyncio.sleep(0)
        self._basis, self._netns, self.state.source = basis, netns, source

    def _loaded(self) -> None:
        self.state.last_reload_successful = True
        self.state.last_reload_success = time.time()

    def _counts_here(self) -> bool:
        """Return whether a session of this host that counts at listeners is up."""
        return any(
            session.status.up
            for session in self.of_listeners()
            if not session.id.host and session.id.name not in plan.BESIDE
        )

    def _forget_failures(self) -> None:
        """Forget hosts that did not answer, so that they are asked again."""
        self._asked = {
            command: asking
            for command, asking in self._asked.items()
            if asking.done() and not asking.cancelled() and not asking.exception()
        }

    def _go_on_with_calls(self, plans: Plans) -> None:
        """Keep sessions ``calls`` that were started when their host's kernel became known."""
        for session in self.of_listeners():
            name = session.id
            others = [planned for other, (planned, _) in plans.items() if other.host == name.host]
            same = any(planned.dtrace == session.plan.dtrace for planned in others)
            if name.name == plan.CALLS and name not in plans and same:
                plans[name] = session.plan, Watched(())

    async def _end(
        self, wanted: Mapping[SessionId, Plan | ScriptPlan]
    ) -> list[Session | ScriptSession]:
        """End the sessions that are not wanted any more or whose plan has changed."""
        ending = [
            session for name, session in self.sessions.items() if wanted.get(name) != session.plan
        ]
        await asyncio.gather(*(session.stop() for session in ending))
        return ending

    def _watch(self, plans: Plans) -> Generator[None, None, None]:
        for name, (_, watched) in plans.items():
            self.state.table.watch(name, watched)
            yield

    def _forget(
        self,
        ended: Iterable[Session | ScriptSession],
        wanted: Mapping[SessionId, Plan | ScriptPlan],
    ) -> Generator[None, None, None]:
        for session in ended:
            del self.sessions[session.id]
            if session.id not in wanted:
                self.state.table.unwatch(session.id)
                del self.state.sessions[session.id]
                self.state.scripts.pop(session.id, None)
            yield

    def _start(self, name: SessionId, wanted: Plan | ScriptPlan) -> None:
        starting = self._starting[name.host]
        if isinstance(wanted, ScriptPlan):
            self.sessions[name] = ScriptSession(name, wanted, self.state, starting)
            return
        finding = partial(self._find, name.host)
        self.sessions[name] = Session(name, wanted, self.state, starting, finding)

    def of_listeners(self) -> list[Session]:
        """Return the sessions of listen queues, without those of scripts."""
        return [each for each in self.sessions.values() if isinstance(each, Session)]

    async def _ask(self, command: tuple[str, ...]) -> str:
        """Ask a host which program it needs, once for all of its sessions."""
        if command not in self._asked or (
            self._asked[command].done() and self._asked[command].exception()
        ):
            self._asked[command] = asyncio.create_task(dtrace.find_program(command))
        return await asyncio.shield(self._asked[command])

    async def _find(self, host: str, command: tuple[str, ...]) -> str:
        """Ask a host which program it needs, and start its session ``calls`` if it needs one."""
        family = await self._ask(command)
        name = SessionId(host, plan.CALLS)
        main = next((one for one in self.of_listeners() if one.id.host == host), None)
        if families()[family].calls and name not in self.sessions and main is not None:
            self.state.table.watch(name, Watched(()))
            self._start(name, plan.calls(main.plan.dtrace, families()[family].calls))
        return family

    async def _follow_names(self) -> None:
        """Watch other network namespaces when configured names begin to mean other ones."""
        while True:
            await asyncio.sleep(_NAMES_SECONDS)
            async with self._one_at_a_time:
                netns = _netns(self._config)
                if netns != self._netns:
                    self._netns = netns
                    plans = await asyncio.to_thread(plan.sessions, self._config, netns)
                    there = {name: each for name, each in plans.items() if name in self.sessions}
                    await by_turns(self._watch(there))
                    if self.state.table.is_watched(UNTRACED):
                        self.state.table.watch(UNTRACED, plan.watched(self._config.local, netns))

    async def _compare(self) -> None:
        """Compare the sessions of this host with the kernel's own numbers, for ever."""
        known: set[int] = set()
        took = 0.0
        while True:
            # With thousands of listeners, to read the kernel's numbers takes a second.
            await asyncio.sleep(max(_COMPARE_SECONDS, 10 * took))
            mine = [one for one in self.of_listeners() if not one.id.host and one.status.up]
            if not mine:
                continue
            try:
                at = time.monotonic_ns()
                began = time.monotonic()
                samples = await asyncio.to_thread(inet_diag.listeners, known)
                took = time.monotonic() - began
                totals = kernel_totals.read()
            except OSError:
                continue
            known = {sample.socket for sample in samples}
            for session in mine:
                await session.compare(samples, at, totals)

    async def _forget_closed(self) -> None:
        """Forget listeners that closed long ago, for ever."""
        table = self.state.table
        while True:
            await asyncio.sleep(_FORGET_SECONDS)
            before = time.monotonic() - self._config.forget_closed_after
            table.unix_drops.forget_closed(before)
            if await by_turns(table.forget_closed(before)):
                await by_turns(self.this_host.forget())
                for session in self.of_listeners():
                    await session.forget()

    async def _go_over(self) -> None:
        """Change over to DTrace once it can be used, if the configuration permits it.

        Only a reload changes back, so that the source does not alternate if trials succeed and
        sessions fail.
        """
        while True:
            await asyncio.sleep(_RETRY_SECONDS)
            command = self._config.local.dtrace.command
            if not self._waits_for_dtrace():
                continue
            if refusal := await dtrace.attempt(command):
                if self._waits_for_dtrace():
                    self.state.source = replace(
                        self.state.source, reason=_why_not(command, refusal)
                    )
                    self._tell_source(self.state.source, refusal)
                continue
            async with self._one_at_a_time:
                # A reload may have come first.
                if self._waits_for_dtrace():
                    try:
                        await self._apply(self._config)
                    except Exception:
                        _log.exception("cannot change to DTrace")

    def _tell_source(self, source: Source, why: str) -> None:
        """Log the source and why it was chosen, unless nothing has changed."""
        if (source.name, source.reason) != self._chosen:
            self._chosen = source.name, source.reason
            _log.info("source chosen", extra=fields(source=source.name, why=why))

    def _waits_for_dtrace(self) -> bool:
        return self._config.source == "auto" and self.this_host.source is not None

    async def _tell_silent(self, config: Config) -> None:
        """Log once for each configured port that nobody listens at it."""
        expected = set[tuple[str, int]]().union(*config.local.expected())
        if not program.runs_here(config.local.dtrace.command):
            return
        with contextlib.suppress(OSError):
            silent = {*await asyncio.to_thread(inet_diag.silent, expected)}
            if new := sorted(silent - self._silent, key=lambda where: where[::-1]):
                more = {"more": len(new) - _MOST_TOLD} if len(new) > _MOST_TOLD else {}
                told = ",".join(
                    f"{port} at {address}" if address else str(port)
                    for address, port in new[:_MOST_TOLD]
                )
                _log.info("nobody listens", extra=fields(ports=told, **more))
            self._silent = silent

    def _give_up(self, config: Config) -> None:
        """Give up the capabilities that a configuration does not need.

        First the process is started that needs more: it finds other network namespaces and the
        programs that have sockets open.

        Raises:
            ConfigError: the configuration needs capabilities that have been given up.
        """
        is_new = self.this_host.namespaces.pid is None
        self.this_host.namespaces.begin(config.local.dtrace.limits.places)
        try:
            self._keep(privileges.needed(config))
        except ConfigError:
            if is_new:
                self.this_host.namespaces.close()
            raise

    def _home(self) -> str | None:
        """Return the inode of the network namespace that is the table's own place, as ThisHost."""
        if not program.runs_here(self._config.local.dtrace.command):
            return None
        told = (one.own_place for one in self.of_listeners() if not one.id.host)
        return next(filter(None, told), namespaces.own())


def _netns(config: Config) -> dict[str, str]:
    """Return the inodes of the network namespaces that a configuration names, by name."""
    names = (each.netns for each in config.local.listeners)
    return namespaces.named(name for name in names if name and not name.isdecimal())


async def choose_source(config: Config, ask: plan.Ask = dtrace.find_program) -> tuple[Source, str]:
    """Choose the source of the local host's numbers.

    With ``source: auto`` it is DTrace if a trial shows that it may be used, else the source that
    the system has without DTrace: sock_diag on Linux, netstat(1) on FreeBSD.

    Args:
        config: the configuration.
        ask: asks a host which program it needs, as for plan.needed().

    Returns:
        The source, and why it was chosen, in words.
    """
    if config.source in untraced.SOURCES:
        return Source(config.source, reason="configured"), "configured"
    command = config.local.dtrace.command
    version = await dtrace.version(command)
    source, why = Source("dtrace", config.local.dtrace.program, version), "configured"
    with contextlib.suppress(dtrace.DTraceError):
        source = Source("dtrace", await plan.needed(config.local, ask), version)
    if config.source == "auto":
        refusal = await dtrace.attempt(command)
        why = refusal or "dtrace(1) is there and may be used"
        if refusal and (other := untraced.here()):
            source = Source(other.name, reason=_why_not(command, refusal))
    return source, why


def _why_not(command: Sequence[str], refusal: str) -> str:
    """Return the key of reasons.REASONS for why a trial was refused."""
    here = sys.platform == "linux" and program.runs_here(command)
    return reasons.classify(refusal, kernel.look() if here else None)
