"""The service: the sessions that a configuration asks for, and their change on a reload."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from dtrace_exporter import audit, dtrace, inet_diag, notify, privileges, program, sock_diag
from dtrace_exporter.config import Config, HostConfig, files, load
from dtrace_exporter.families import families
from dtrace_exporter.listeners import SessionId
from dtrace_exporter.log import fields
from dtrace_exporter.session import ALL, CALLS, Plan, Session
from dtrace_exporter.state import Source, State, unchanged
from dtrace_exporter.turns import Turn, by_turns

_log = logging.getLogger(__name__)

SOCK_DIAG = SessionId("", "sock_diag")
"""Whose listeners they are where no session is: not a session, and not exported as one."""

Ports = Mapping[int, str] | None

_COMPARE_SECONDS = 1.0


class Service:
    """Runs a configuration, and replaces it by the file's newer content on demand.

    Args:
        path: the configuration file, or None where there is none.
        config: what was read from it.
        admit: raises a ConfigError for files that are not to be used.
        keep: gives up all capabilities but some; raises a ConfigError where they are gone already.
    """

    def __init__(
        self,
        path: Path | None,
        config: Config,
        admit: Callable[[Iterable[Path]], None] = lambda _: None,
        keep: Callable[[frozenset[int]], None] = lambda _: None,
    ) -> None:
        self.state = State()
        self.sessions: dict[SessionId, Session] = {}
        self._path = path
        self._config = config
        self._admit = admit
        self._keep = keep
        self._one_at_a_time = asyncio.Lock()
        # By host: one that does not answer must not keep another's sessions from starting.
        self._starting = defaultdict[str, asyncio.Semaphore](
            lambda: asyncio.Semaphore(os.cpu_count() or 1)
        )
        self._sock_diag = sock_diag.SockDiagSource()
        self._reading = asyncio.Lock()
        self._basis: tuple[object, ...] = ()
        self._asked: dict[tuple[str, ...], asyncio.Task[str]] = {}
        self._comparing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the sessions, without waiting until they are up.

        Raises:
            program.ProgramError: there is no D program to run.
        """
        self._keep(privileges.needed(self._config, self._config.source))
        async with self._one_at_a_time:
            await self._apply(self._config)
        if sys.platform == "linux":
            self._comparing = asyncio.create_task(self._compare())

    async def reload(self) -> None:
        """Read the configuration file again and change over to it; a bad one changes nothing.

        Raises:
            config.ConfigError: the file is bad.
            program.ProgramError: a D program in it is.
        """
        async with self._one_at_a_time:
            notify.tell_reloading()
            try:
                # Of a large file YAML alone takes a second.
                config = await asyncio.to_thread(load, self._path)
                self._admit(files(self._path, config))
                await self._apply(config)
            except Exception as error:
                self.state.last_reload_successful = False
                _log.error("reload failed", extra=fields(why=str(error)))
                raise
            finally:
                notify.tell("READY=1")
            self._config = config
            _log.info("reloaded", extra=fields(sessions=len(self.sessions)))

    def summary(self) -> str:
        """Return in a line how it is, as for systemctl(1)."""
        up = sum(status.up for status in self.state.sessions.values())
        return f"{up} of {len(self.state.sessions)} sessions up, source {self.state.source.name}"

    async def stop(self) -> None:
        """End all sessions."""
        if self._comparing is not None:
            self._comparing.cancel()
        async with self._one_at_a_time:
            await asyncio.gather(*(session.stop() for session in self.sessions.values()))
        for asking in self._asked.values():
            asking.cancel()

    async def _apply(self, config: Config) -> None:
        plans = await asyncio.to_thread(_plans, config)
        turn = Turn()
        self._asked = {
            command: asking
            for command, asking in self._asked.items()
            if asking.done() and not asking.cancelled() and not asking.exception()
        }
        for name, session in self.sessions.items():
            # One that was started when the host's kernel was known goes on beside the others.
            others = [plan for other, (plan, _) in plans.items() if other.host == name.host]
            same = any(plan.dtrace == session.plan.dtrace for plan in others)
            if name.name == CALLS and name not in plans and same:
                plans[name] = session.plan, {}
        basis = config.source, config.local.dtrace.command, config.local.dtrace.program
        source = self.state.source if basis == self._basis else await choose_source(config)
        self._keep(privileges.needed(config, source.name))
        if source.name == "sock_diag":
            plans = {name: plan for name, plan in plans.items() if name.host}
        ending = [
            session
            for name, session in self.sessions.items()
            if name not in plans or plans[name][0] != session.plan
        ]
        await asyncio.gather(*(session.stop() for session in ending))
        # Before anything is forgotten, so that listeners go over to the session that watches them.
        for host in (config.local, *config.hosts):
            self.state.table.limit(host.name, host.dtrace.limits)
        for name, (_, ports) in plans.items():
            self.state.table.watch(name, ports)
            if turn.is_over:
                await turn.rest()
        self._use_sock_diag(source.name == "sock_diag", config)
        for session in ending:
            del self.sessions[session.id]
            if session.id not in plans:
                self.state.table.unwatch(session.id)
                del self.state.sessions[session.id]
            if turn.is_over:
                await turn.rest()
        for name, (plan, _) in plans.items():
            if name not in self.sessions:
                self._start(name, plan)
                # Its own first steps are part of it.
                await asyncio.sleep(0)
        self._basis, self.state.source = basis, source
        self.state.last_reload_successful = True
        self.state.last_reload_success = time.time()

    def _start(self, name: SessionId, plan: Plan) -> None:
        finding = partial(self._find, name.host)
        session = Session(name, plan, self.state, self._starting[name.host], finding)
        self.sessions[name] = session

    async def _find(self, host: str, command: tuple[str, ...]) -> str:
        """Ask a host which program it needs, once for all of its sessions; start its second one."""
        if command not in self._asked or (
            self._asked[command].done() and self._asked[command].exception()
        ):
            self._asked[command] = asyncio.create_task(dtrace.find_program(command))
        family = await asyncio.shield(self._asked[command])
        name = SessionId(host, CALLS)
        main = next((one for one in self.sessions.values() if one.id.host == host), None)
        if families()[family].calls and name not in self.sessions and main is not None:
            self.state.table.watch(name, {})
            plan = replace(main.plan, program=program.load(families()[family].calls), port=0)
            self._start(name, plan)
        return family

    async def _compare(self) -> None:
        """Hold the sessions of this host against the kernel's own word, again and again."""
        known: set[int] = set()
        took = 0.0
        while True:
            # Thousands of listeners take the kernel's word a second to read.
            await asyncio.sleep(max(_COMPARE_SECONDS, 10 * took))
            mine = [one for one in self.sessions.values() if not one.id.host and one.status.up]
            if not mine:
                continue
            try:
                at = time.monotonic_ns()
                began = time.monotonic()
                samples = await asyncio.to_thread(inet_diag.listeners, known)
                took = time.monotonic() - began
                totals = audit.totals()
            except OSError:
                continue
            known = {sample.socket for sample in samples}
            for session in mine:
                await session.compare(samples, at, totals)

    def _use_sock_diag(self, use: bool, config: Config) -> None:
        if not use:
            self.state.refresh = unchanged
            self.state.table.unwatch(SOCK_DIAG)
            return
        ports = {listener.port: listener.name for listener in config.local.listeners} or None
        self.state.table.watch(SOCK_DIAG, ports, sock_diag.EXPORTS)
        self.state.refresh = self._read_sock_diag

    async def _read_sock_diag(self) -> None:
        try:
            async with self._reading:
                samples = await asyncio.to_thread(inet_diag.listeners, self._sock_diag.open)
                await by_turns(self._sock_diag.update(self.state.table, SOCK_DIAG, samples))
        except OSError as error:
            self.state.table.clear_queues(SOCK_DIAG)
            _log.error("cannot read the listeners", extra=fields(why=str(error)))


class Reloads:
    """Reloads for all who ask: one at a time, and one more that is shared by all who wait for it.

    Args:
        reload: does it once.
    """

    def __init__(self, reload: Callable[[], Awaitable[None]]) -> None:
        self._reload = reload
        self._asked: list[asyncio.Future[None]] = []
        self._working: asyncio.Task[None] | None = None

    def ask(self) -> asyncio.Future[None]:
        """Return what is done when a reload is that begins from now on.

        It has the exception of one that failed. Who waits no more cancels it; for nobody there is
        no reload.
        """
        asked = asyncio.get_running_loop().create_future()
        self._asked.append(asked)
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return asked

    async def stop(self) -> None:
        """Give up the one that runs, and those that wait."""
        for asked in self._asked:
            asked.cancel()
        if self._working is not None:
            self._working.cancel()
            await asyncio.wait([self._working])

    async def _work(self) -> None:
        while self._asked:
            asked, self._asked = [each for each in self._asked if not each.done()], []
            if not asked:
                return
            try:
                await self._reload()
            except Exception as error:
                for each in asked:
                    if not each.done():
                        each.set_exception(error)
            else:
                for each in asked:
                    if not each.done():
                        each.set_result(None)
            finally:
                for each in asked:
                    each.cancel()


async def choose_source(config: Config) -> Source:
    """Decide where the local host's numbers come from, and log why.

    Where the configuration leaves it open this is DTrace if a trial shows that it may be used, and
    on Linux otherwise the kernel's sock_diag.
    """
    if config.source == "sock_diag":
        source, why = Source("sock_diag"), "configured"
    else:
        command = config.local.dtrace.command
        version = await dtrace.version(command)
        source, why = Source("dtrace", config.local.dtrace.program, version), "configured"
        if source.program == "auto":
            with contextlib.suppress(dtrace.DTraceError):
                local = program.local(command) or await dtrace.find_program(command)
                source = Source("dtrace", local, version)
        if config.source == "auto":
            refusal = await dtrace.attempt(command)
            why = refusal or "dtrace(1) is there and may be used"
            if refusal and sys.platform == "linux":
                source = Source("sock_diag")
    _log.info("source chosen", extra=fields(source=source.name, why=why))
    return source


def _plans(config: Config) -> dict[SessionId, tuple[Plan, Ports]]:
    """Return what each session is to run, and the ports that it is to watch."""
    counters = program.drop_counters(config.local.dtrace.command)
    plans: dict[SessionId, tuple[Plan, Ports]] = {}
    for host in (config.local, *config.hosts):
        chosen = _program(host)
        for name, port, watched in _split(host):
            plan = Plan(host.dtrace, chosen, port, {} if host.name else counters)
            plans[SessionId(host.name, name)] = plan, watched
        calls = chosen.calls if chosen is not None else ""
        if calls:
            plan = Plan(host.dtrace, program.load(calls), 0, {})
            plans[SessionId(host.name, CALLS)] = plan, {}
    return plans


def _program(host: HostConfig) -> program.Program | None:
    """Return a host's program, None where its kernel has to be asked first."""
    name = host.dtrace.program
    if name == "auto":
        name = "" if host.name else program.local(host.dtrace.command)
    return program.load(name) if name else None


def _split(host: HostConfig) -> list[tuple[str, int, Ports]]:
    """Divide a host's listeners among sessions: name, the port or 0 for all, ports and names."""
    watched = {listener.port: listener.name for listener in host.listeners}
    if not watched or host.dtrace.session == "shared":
        return [(ALL, 0, watched or None)]
    return [(f"port-{port}", port, {port: name}) for port, name in watched.items()]
