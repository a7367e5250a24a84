"""A session of a user's own script: runs the script, and makes metrics of its rows."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dtrace_exporter.config import Config, HostConfig
from dtrace_exporter.listeners import SessionId
from dtrace_exporter.scripts import rendering, rows
from dtrace_exporter.scripts.configuration import ScriptConfig
from dtrace_exporter.scripts.conversions import conversions
from dtrace_exporter.scripts.metrics import BadValueError, ScriptMetrics, SeriesError
from dtrace_exporter.scripts.reader import ScriptError
from dtrace_exporter.state import State
from dtrace_exporter.tracing import dtrace, program
from dtrace_exporter.tracing.heartbeat import Beat
from dtrace_exporter.tracing.rendering import window
from dtrace_exporter.tracing.supervision import EndedError, Supervised
from dtrace_exporter.turns import Turn, by_turns

PREFIX = "script-"
"""The beginning of the name of a script's session."""


@dataclass(frozen=True)
class ScriptPlan:
    """All that a script's process depends on. If two plans are equal, no new process is needed.

    Attributes:
        command: the command of dtrace(1).
        options: D options for -x, by name.
        interval: the period of the heartbeat, in seconds.
        script: the script and its settings.
    """

    command: tuple[str, ...]
    options: Mapping[str, str]
    interval: float
    script: ScriptConfig

    @property
    def argv(self) -> list[str]:
        """The command that runs the script's text from its standard input."""
        return self._argv()

    @property
    def compiling(self) -> list[str]:
        """The command that only compiles the text."""
        return self._argv("-e")

    def _argv(self, *more: str) -> list[str]:
        options = [f"{name}={value}" if value else name for name, value in self.options.items()]
        script = self.script
        here = program.runs_here(self.command) and "-C" in script.script.flags
        return [
            *self.command,
            *(word for option in options for word in ("-x", option)),
            *script.script.flags,
            # Headers are searched for in the directory of the script.
            *(("-I", str(Path(script.script.path).parent)) if here else ()),
            *more,
            *(("-p", str(script.pid)) if script.pid else ()),
            *("-s", "/dev/stdin"),
            *script.args,
        ]


def plan(host: HostConfig, script: ScriptConfig) -> ScriptPlan:
    """Return the plan of a script's session on a host."""
    settings = host.dtrace
    return ScriptPlan(settings.command, settings.options, settings.interval, script)


def plans(config: Config) -> dict[SessionId, ScriptPlan]:
    """Return the plans of all scripts of a configuration."""
    return {
        SessionId(host.name, PREFIX + script.name): plan(host, script)
        for host in (config.local, *config.hosts)
        for script in host.scripts
    }


@dataclass(frozen=True, slots=True)
class Form:
    """How a script is rendered for a host: for which engine, and with which conversions."""

    engine: str
    conversions: rendering.Conversions

    def text(self, plan: ScriptPlan, token: str) -> str:
        """Return the text that runs.

        Args:
            plan: the plan of the session.
            token: the mark of its rows.

        Raises:
            DTraceError: the script cannot be rendered.
        """
        try:
            return rendering.render(
                plan.script.script,
                self.conversions,
                engine=self.engine,
                interval=plan.interval,
                token=token,
            )
        except ScriptError as error:
            raise dtrace.DTraceError(str(error)) from None


async def form(plan: ScriptPlan) -> Form:
    """Ask a host's dtrace(1) how a script has to be rendered for it.

    Raises:
        DTraceError: the script does not compile.
    """

    async def ask(question: str) -> tuple[int, str]:
        return await dtrace.run(plan.compiling, question)

    engine = rendering.SUN if await dtrace.is_suns(plan.command) else rendering.LINUX
    try:
        return Form(engine, await conversions(plan.script.script, ask))
    except ScriptError as error:
        raise dtrace.DTraceError(str(error)) from None


async def text(plan: ScriptPlan) -> str:
    """Return a script's text as it runs on its host.

    Raises:
        DTraceError: it does not compile, or cannot be rendered.
    """
    return (await form(plan)).text(plan, rendering.new_token())


async def compiled(plan: ScriptPlan) -> None:
    """Have a host's dtrace(1) compile a script's text as it runs.

    Raises:
        DTraceError: it does not compile, or cannot be rendered.
    """
    status, output = await dtrace.run(plan.compiling, await text(plan))
    if status:
        raise dtrace.DTraceError(dtrace.reason(plan.command, status, output))


class ScriptSession(Supervised):
    """Keeps a script running, and makes metrics of its rows.

    Args:
        id: the session's host and name.
        plan: what it runs.
        state: holds its status and its metrics.
        starting: held while dtrace(1) compiles a program, because this keeps a processor busy.
    """

    def __init__(
        self,
        id: SessionId,  # noqa: A002
        plan: ScriptPlan,
        state: State,
        starting: asyncio.Semaphore,
    ) -> None:
        super().__init__(id, state, starting)
        self.plan = plan
        script = plan.script
        self._metrics = state.scripts[id] = ScriptMetrics(
            script.script.path, script.families, script.limit, state.scripts.get(id)
        )
        self._form: Form | None = None
        self._splitter: rows.Splitter | None = None

    @property
    def argv(self) -> list[str]:
        """The command that runs the script's text from its standard input."""
        return self.plan.argv

    @property
    def patience(self) -> float:
        """For how many seconds it may be silent."""
        return window(self.plan.interval).patience

    async def _prepare(self) -> str:
        if self._form is None:
            async with self._starting:
                self._form = await form(self.plan)
        token = rendering.new_token()
        script, written = self.plan.script.script, self._form
        self._splitter = rows.Splitter(script, written.conversions, written.engine, token)
        return written.text(self.plan, token)

    async def _take(self, chunk: bytes) -> list[Beat]:
        assert self._splitter is not None
        beats: list[Beat] = []
        turn = Turn()
        for record in self._splitter.feed(chunk):
            if turn.is_over:
                await turn.rest()
            if isinstance(record, rows.BadRow):
                self._bad(record.text, record.why)
                continue
            self._heard()
            if isinstance(record, rows.Row):
                try:
                    self._metrics.feed(record)
                except BadValueError as error:
                    self._bad(" ".join(record.keys), str(error))
                except SeriesError as error:
                    raise EndedError(str(error)) from None
            elif isinstance(record, rows.Tick):
                for wrong in self._metrics.ticking():
                    if turn.is_over:
                        await turn.rest()
                    if wrong:
                        self._bad("rows of keys that look alike", str(wrong))
                beats.append(record.time)
            else:
                self._is_up()
                beats.append(None)
        return beats

    async def _over(self) -> None:
        await by_turns(self._metrics.ending())

    async def stop(self) -> None:
        """End the session."""
        await super().stop()
        await self._over()
