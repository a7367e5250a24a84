"""The service: the sessions that a configuration asks for, and their change on a reload."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from functools import partial
from pathlib import Path

from dtrace_exporter import inet_diag, notify, privileges, sock_diag
from dtrace_exporter.config import Config, files, load
from dtrace_exporter.families import families
from dtrace_exporter.listeners import SessionId
from dtrace_exporter.log import fields
from dtrace_exporter.state import Source, State, unchanged
from dtrace_exporter.tracing import audit, dtrace, plan
from dtrace_exporter.tracing.plan import Plan
from dtrace_exporter.tracing.session import Session
from dtrace_exporter.turns import by_turns

_log = logging.getLogger(__name__)

SOCK_DIAG = SessionId("", "sock_diag")
"""Whose listeners they are where no session is: not a session, and not exported as one."""

Plans = dict[SessionId, tuple[Plan, plan.Ports]]

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
        plans = await asyncio.to_thread(plan.sessions, config)
        self._forget_failures()
        basis = config.source, config.local.dtrace.command, config.local.dtrace.program
        source = self.state.source
        if basis != self._basis:
            source = await choose_source(config, self._ask)
        self._keep(privileges.needed(config, source.name))
        if source.name == "sock_diag":
            plans = {name: planned for name, planned in plans.items() if name.host}
        # A host may have answered while the source was chosen.
        self._go_on_with_calls(plans)
        ended = await self._end(plans)
        for host in (config.local, *config.hosts):
            self.state.table.limit(host.name, host.dtrace.limits)
        # Before anything is forgotten, so that listeners go over to the session that watches them.
        await by_turns(self._watch(plans))
        self._use_sock_diag(source.name == "sock_diag", config)
        await by_turns(self._forget(ended, plans))
        for name, (wanted, _) in plans.items():
            if name not in self.sessions:
                self._start(name, wanted)
                # Its own first steps are part of it.
                await asyncio.sleep(0)
        self._basis, self.state.source = basis, source
        self.state.last_reload_successful = True
        self.state.last_reload_success = time.time()

    def _forget_failures(self) -> None:
        """Have hosts asked again that did not answer."""
        self._asked = {
            command: asking
            for command, asking in self._asked.items()
            if asking.done() and not asking.cancelled() and not asking.exception()
        }

    def _go_on_with_calls(self, plans: Plans) -> None:
        """Keep second sessions that were started when their host's kernel was known."""
        for name, session in self.sessions.items():
            others = [planned for other, (planned, _) in plans.items() if other.host == name.host]
            same = any(planned.dtrace == session.plan.dtrace for planned in others)
            if name.name == plan.CALLS and name not in plans and same:
                plans[name] = session.plan, {}

    async def _end(self, plans: Plans) -> list[Session]:
        """End the sessions that are not wanted any more, or not as they are."""
        ending = [
            session
            for name, session in self.sessions.items()
            if name not in plans or plans[name][0] != session.plan
        ]
        await asyncio.gather(*(session.stop() for session in ending))
        return ending

    def _watch(self, plans: Plans) -> Generator[None, None, None]:
        for name, (_, ports) in plans.items():
            self.state.table.watch(name, ports)
            yield

    def _forget(self, ended: list[Session], plans: Plans) -> Generator[None, None, None]:
        for session in ended:
            del self.sessions[session.id]
            if session.id not in plans:
                self.state.table.unwatch(session.id)
                del self.state.sessions[session.id]
            yield

    def _start(self, name: SessionId, wanted: Plan) -> None:
        finding = partial(self._find, name.host)
        session = Session(name, wanted, self.state, self._starting[name.host], finding)
        self.sessions[name] = session

    async def _ask(self, command: tuple[str, ...]) -> str:
        """Ask a host by its command which program it needs, once for all of its sessions."""
        if command not in self._asked or (
            self._asked[command].done() and self._asked[command].exception()
        ):
            self._asked[command] = asyncio.create_task(dtrace.find_program(command))
        return await asyncio.shield(self._asked[command])

    async def _find(self, host: str, command: tuple[str, ...]) -> str:
        """Ask a host which program it needs, and start its second session."""
        family = await self._ask(command)
        name = SessionId(host, plan.CALLS)
        main = next((one for one in self.sessions.values() if one.id.host == host), None)
        if families()[family].calls and name not in self.sessions and main is not None:
            self.state.table.watch(name, {})
            self._start(name, plan.calls(main.plan.dtrace, families()[family].calls))
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
        self.state.table.watch(SOCK_DIAG, ports, sock_diag.CAPABILITIES)
        self.state.refresh = self._read_sock_diag

    async def _read_sock_diag(self) -> None:
        try:
            async with self._reading:
                samples = await asyncio.to_thread(inet_diag.listeners, self._sock_diag.open)
                half_open = await asyncio.to_thread(inet_diag.half_open)
                await by_turns(
                    self._sock_diag.update(self.state.table, SOCK_DIAG, samples, half_open)
                )
        except OSError as error:
            self.state.table.clear_queues(SOCK_DIAG)
            _log.error("cannot read the listeners", extra=fields(why=str(error)))


async def choose_source(config: Config, ask: plan.Ask = dtrace.find_program) -> Source:
    """Decide where the local host's numbers come from, and log why.

    Where the configuration leaves it open this is DTrace if a trial shows that it may be used, and
    on Linux otherwise the kernel's sock_diag.

    Args:
        config: the configuration.
        ask: asks a host which program it needs, as plan.needed() has it.
    """
    if config.source == "sock_diag":
        source, why = Source("sock_diag"), "configured"
    else:
        command = config.local.dtrace.command
        version = await dtrace.version(command)
        source, why = Source("dtrace", config.local.dtrace.program, version), "configured"
        with contextlib.suppress(dtrace.DTraceError):
            source = Source("dtrace", await plan.needed(config.local, ask), version)
        if config.source == "auto":
            refusal = await dtrace.attempt(command)
            why = refusal or "dtrace(1) is there and may be used"
            if refusal and sys.platform == "linux":
                source = Source("sock_diag")
    _log.info("source chosen", extra=fields(source=source.name, why=why))
    return source
