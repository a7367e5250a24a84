"""What sessions run: which program a host needs, with which numbers, and by which command."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field

from dtrace_exporter.config import Config, DTraceConfig, HostConfig
from dtrace_exporter.listeners import SessionId
from dtrace_exporter.tracing import dtrace, program, rendering
from dtrace_exporter.tracing.program import Program

ALL = "all"
"""The name of the session of all listeners."""
CALLS = "calls"
"""The name of the session of what only processes do, one a host: it observes and counts nothing."""

Ports = Mapping[int, str] | None
Ask = Callable[[tuple[str, ...]], Awaitable[str]]


@dataclass(frozen=True)
class Plan:
    """All that a session's process depends on. Two plans alike need no new process.

    ``program`` is None where the host's kernel has to be asked which one it needs; ``port`` is 0
    for all; ``counters`` are as program.drop_counters() gives them.
    """

    dtrace: DTraceConfig
    program: Program | None
    port: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)

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

    @property
    def switched_off(self) -> dict[str, str]:
        """The optional parts that the configuration does not want, and why they are left out."""
        if self.dtrace.accept_wait:
            return {}
        return {"accept_wait": "switched off in the configuration"}

    def render(self, chosen: Program, without: Collection[str]) -> str:
        """Return a program's text less some optional parts."""
        window = rendering.window(self.dtrace.interval)
        counters = self.counters or program.no_drop_counters()
        numbers = {**counters, **program.offsets(self.dtrace.offsets)}
        options = list(self.dtrace.options)
        return rendering.render(chosen, window, self.port, numbers, without, options)


def known(host: HostConfig) -> str:
    """Return the name of the program that a host needs; empty where its kernel has to be asked."""
    if host.dtrace.program != "auto":
        return host.dtrace.program
    return "" if host.name else program.local(host.dtrace.command)


async def needed(host: HostConfig, ask: Ask = dtrace.find_program) -> str:
    """Return the name of the program that a host needs.

    Args:
        host: the host.
        ask: asks one by its command, as dtrace.find_program().

    Raises:
        DTraceError: as dtrace.find_program().
    """
    return known(host) or await ask(host.dtrace.command)


def sessions(config: Config) -> dict[SessionId, tuple[Plan, Ports]]:
    """Return what each session is to run, and the ports that it is to watch, with their names.

    Raises:
        ProgramError: as program.load().
    """
    counters = program.drop_counters(config.local.dtrace.command)
    plans: dict[SessionId, tuple[Plan, Ports]] = {}
    for host in (config.local, *config.hosts):
        name = known(host)
        chosen = program.load(name) if name else None
        for session, port, watched in _split(host):
            plan = Plan(host.dtrace, chosen, port, {} if host.name else counters)
            plans[SessionId(host.name, session)] = plan, watched
        if chosen is not None and chosen.calls:
            plans[SessionId(host.name, CALLS)] = calls(host.dtrace, chosen.calls), {}
    return plans


def calls(settings: DTraceConfig, name: str) -> Plan:
    """Return the plan of a host's session for what only processes do, by its program's name."""
    return Plan(settings, program.load(name))


def _split(host: HostConfig) -> list[tuple[str, int, Ports]]:
    """Divide a host's listeners among sessions: name, the port or 0 for all, ports and names."""
    watched = {listener.port: listener.name for listener in host.listeners}
    if not watched or host.dtrace.session == "shared":
        return [(ALL, 0, watched or None)]
    return [(f"port-{port}", port, {port: name}) for port, name in watched.items()]
