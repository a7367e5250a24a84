"""What each session runs: the program that its host needs, its numbers, and the command."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from dtrace_exporter import namespaces
from dtrace_exporter.config import Config, DTraceConfig, HostConfig
from dtrace_exporter.listeners import SessionId
from dtrace_exporter.tracing import dtrace, program, rendering
from dtrace_exporter.tracing.program import Program
from dtrace_exporter.watched import Wanted, Watched

ALL = "all"
"""The name of the session that watches all listeners."""
CALLS = "calls"
"""The name of the session that watches processes, one for each host."""
UNIX = "unix"
"""The name of the session that watches this host's UNIX sockets."""
BESIDE = (CALLS, UNIX)
"""The sessions that count for no listener of the table."""

Ask = Callable[[tuple[str, ...]], Awaitable[str]]


@dataclass(frozen=True)
class Plan:
    """All that a session's process depends on. If two plans are equal, no new process is needed.

    Attributes:
        dtrace: the settings of the host's dtrace(1).
        program: None if the host's kernel has to be asked which program it needs.
        port: the TCP port to watch, 0 for all ports.
        counters: as program.drop_counters() returns them.
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
        """The optional parts that the configuration switches off, each with the reason."""
        chosen = {"accept_wait": self.dtrace.accept_wait, "handshake": self.dtrace.handshake}
        return {
            part: f"needs dtrace: {{{part}: true}} in the configuration"
            for part, is_on in chosen.items()
            if not is_on
        }

    def render(
        self, chosen: Program, without: Collection[str], more: Mapping[str, int] | None = None
    ) -> str:
        """Return a program's text without some optional parts.

        Args:
            chosen: the program.
            without: the names of these parts.
            more: numbers that replace those of the file, by the inline's name.
        """
        window = rendering.window(self.dtrace.interval)
        counters = self.counters or program.no_drop_counters()
        numbers = {**counters, **program.offsets(self.dtrace.offsets), **(more or {})}
        options = list(self.dtrace.options)
        return rendering.render(chosen, window, self.port, numbers, without, options)


def known(host: HostConfig) -> str:
    """Return the name of the program that a host needs, empty if its kernel has to be asked."""
    if host.dtrace.program != "auto":
        return host.dtrace.program
    return "" if host.name else program.local(host.dtrace.command)


async def needed(host: HostConfig, ask: Ask = dtrace.find_program) -> str:
    """Return the name of the program that a host needs.

    Args:
        host: the host.
        ask: asks a host, such as dtrace.find_program(). It is given the host's command.

    Raises:
        DTraceError: as dtrace.find_program().
    """
    return known(host) or await ask(host.dtrace.command)


def sessions(config: Config, netns: Mapping[str, str]) -> dict[SessionId, tuple[Plan, Watched]]:
    """Return for each session what it runs, and which listeners it watches.

    Args:
        config: the configuration.
        netns: the inodes of the local host's named network namespaces, by name.

    Raises:
        ProgramError: as program.load().
    """
    counters = program.drop_counters(config.local.dtrace.command)
    plans: dict[SessionId, tuple[Plan, Watched]] = {}
    for host in (config.local, *config.hosts):
        name = known(host)
        chosen = program.load(name) if name else None
        for session, port, watched in _split(host, netns):
            plan = Plan(host.dtrace, chosen, port, {} if host.name else counters)
            plans[SessionId(host.name, session)] = plan, watched
        if chosen is not None and chosen.calls:
            plans[SessionId(host.name, CALLS)] = calls(host.dtrace, chosen.calls), Watched(())
    if planned := _unix(config):
        plans[SessionId("", UNIX)] = planned, Watched(())
    return plans


def calls(settings: DTraceConfig, name: str) -> Plan:
    """Return the plan of a host's session ``calls``, which runs the program of this name."""
    return Plan(settings, program.load(name))


def _unix(config: Config) -> Plan | None:
    """Return the plan of the session ``unix``, None if there is none.

    Which UNIX sockets listen is known of this kernel only.
    """
    settings = config.local.dtrace
    name = known(config.local)
    if not (config.unix.paths and name and program.runs_here(settings.command)):
        return None
    unix = program.load(name).family.unix
    return Plan(settings, program.load(unix)) if unix else None


def watched(host: HostConfig, netns: Mapping[str, str]) -> Watched:
    """Return which listeners of a host are watched.

    Args:
        host: the host.
        netns: as for sessions().
    """
    if not host.listeners:
        return Watched(None, host.exclude_ports)
    return Watched(_wanted(host, netns))


def _wanted(host: HostConfig, netns: Mapping[str, str]) -> list[Wanted]:
    own = "" if host.name else namespaces.own()
    found = []
    for each in host.listeners:
        place: str | None = each.zone or None
        if each.jail:
            place = "" if each.jail == "0" else each.jail
        if each.netns:
            place = each.netns if each.netns.isdecimal() else netns.get(each.netns)
            if place is None:
                continue
            place = "" if place == own else place
        found.append(Wanted(each.ports, each.name, each.address or None, place, each.histograms))
    return found


def _split(host: HostConfig, netns: Mapping[str, str]) -> list[tuple[str, int, Watched]]:
    """Divide a host's listeners among sessions: name, port (0 for all), and what it watches."""
    if not host.listeners or host.dtrace.session == "shared":
        return [(ALL, 0, watched(host, netns))]
    ports = dict.fromkeys(port for each in host.listeners for ports in each.ports for port in ports)
    by_port: dict[int, list[Wanted]] = {port: [] for port in ports}
    for entry in _wanted(host, netns):
        for port in (port for ports in entry.ports for port in ports):
            by_port[port].append(replace(entry, ports=(range(port, port + 1),)))
    return [(f"port-{port}", port, Watched(entries)) for port, entries in by_port.items()]
