"""Sun's DTrace for tests: sessions of D programs, fed with events by hand.

    engine = Engine(Types(btf), symbols)
    session = engine.start(text)
    engine.fire("fbt:ip:tcp_accept:entry", (listener, eager), cpu=1, thread=0x1000)
    engine.advance(1_000_000_000)
    session.stop()
    print(session.output, session.errors)

Time stands still until advance() moves it, with the ticks and the rounds of dtrace(1) that are due.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

from sun.c_types import Types
from sun.compiler import Compiled, Compiler, Program, invalid
from sun.consumer import Consumer, Copy
from sun.evaluate import Memory, Probe
from sun.expressions import MASK, Checker, Variable
from sun.kernel import Cpu, Kernel, fields, matches
from sun.limits import Options, dof_size, memory_per_cpu, period
from sun.rules import SYSTEMS, Rules
from sun.syntax import ProgramError

_NEVER = 1 << 62
_OWN_PROBES = ("BEGIN", "END", "ERROR")


class Refused(Exception):  # noqa: N818 - dtrace(1) refuses a program
    """A program that dtrace(1) does not start; the text is its message.

    Args:
        message: dtrace(1)'s message.
        dof_size: the size of the program; 0 if it was not compiled.
        registers: the highest register that its code uses; 0 if it was not compiled.
    """

    def __init__(self, message: str, dof_size: int = 0, registers: int = 0) -> None:
        super().__init__(message)
        self.dof_size = dof_size
        self.registers = registers


class Engine:
    """A host with Sun's DTrace.

    Args:
        types: the types of the kernel.
        symbols: addresses of the kernel's variables, whose types are in ``types``.
        cpus: the number of CPUs.
        rules: the rules of the engine.
        system: illumos or solaris10.
        load: returns memory by address and size, or raises Fault or OSError; by default this
            process's own memory.
        dof_maxsize: the largest program that the kernel takes; by default the system's limit.
        probes: descriptions of all probes that exist; by default any probe exists.

    Attributes:
        time: the current time, in nanoseconds.
        wall_time: how far the time of day is ahead of ``time``.
        tick_cpu: the CPU of ticks.
        own_cpu: the CPU of dtrace(1), and so of BEGIN and END.
        between: called between two expressions of an event, to let another CPU run; or None.
        sessions: the running sessions.
    """

    def __init__(
        self,
        types: Types,
        symbols: Mapping[str, int] | None = None,
        cpus: int = 2,
        rules: Rules = Rules(),  # noqa: B008 - it cannot change
        system: str = "illumos",
        load: Callable[[int, int], bytes] | None = None,
        dof_maxsize: int | None = None,
        probes: Collection[str] | None = None,
    ) -> None:
        self.types = types
        self.symbols = dict(symbols or {})
        self.cpus = cpus
        self.rules = rules
        self.system = SYSTEMS[system]
        self.load = load or Memory()
        self.dof_maxsize = self.system.dof_maxsize if dof_maxsize is None else dof_maxsize
        self.probes = None if probes is None else [fields(probe) for probe in probes]
        self.time = 1_000_000_000_000
        self.wall_time = 1_700_000_000_000_000_000 - self.time
        self.tick_cpu = 0
        self.own_cpu = 0
        self.between: Callable[[], object] | None = None
        self.sessions: list[Session] = []
        self._numbers: dict[str, Probe] = {}

    def start(
        self, text: str, options: Mapping[str, str] | None = None, name: str = "/dev/stdin"
    ) -> Session:
        """Start dtrace(1) on a program.

        Args:
            text: the program.
            options: options of the command line.
            name: the name of the program's file, for messages.

        Raises:
            Refused: dtrace(1) does not start.
        """
        session = Session(self, text, options or {}, name)
        self.sessions.append(session)
        session.begin()
        return session

    def fire(
        self,
        description: str,
        args: Sequence[int] = (),
        cpu: int = 0,
        thread: int = 0x1000,
        pid: int = 0,
        execname: bytes = b"sched",
        sessions: Sequence[Session] = (),
    ) -> None:
        """Let a probe fire.

        Args:
            description: the full description of the probe.
            args: arg0 and so on, 64 bits each; at a return probe, arg1 is the value.
            cpu: the CPU.
            thread: the address of the thread.
            pid: the process ID.
            execname: the name of the process.
            sessions: the sessions that see it; by default all.
        """
        probe = self._numbers.get(description) or self._probe(description)
        wanting = [session for session in sessions or self.sessions if session.kernel.wants(probe)]
        if not wanting:
            return
        seen = {
            "args": (*[arg & MASK for arg in args], *[0] * (10 - len(args))),
            "thread": thread,
            "pid": pid,
            "execname": execname,
            "time": self.time,
            "wall_time": self.time + self.wall_time,
        }
        for session in wanting:
            session.kernel.fire(probe, cpu, seen)

    def advance(self, nanoseconds: int) -> None:
        """Let time pass, and do all that is due meanwhile."""
        end = self.time + nanoseconds
        while due := [(when, s) for s in self.sessions if (when := s.due()) <= end]:
            when, session = min(due, key=lambda one: one[0])
            self.time = max(self.time, when)
            session.work()
        self.time = end

    def _probe(self, description: str) -> Probe:
        """Return a probe, which gets its number at its first use."""
        probe = Probe(len(self._numbers) + 1, *fields(description))
        self._numbers[description] = probe
        return probe


class Session:
    """A running dtrace(1); see Engine.start().

    Attributes:
        kernel: the kernel's part of the session.
        errors: the lines of stderr so far.
        dof_size: the size of its program.
        registers: the highest register that its code uses.
        options: the options in force.
        is_running: whether it has not ended.
    """

    def __init__(self, engine: Engine, text: str, options: Mapping[str, str], name: str) -> None:
        self._engine = engine
        rules = engine.rules
        try:
            program = self._compiled(text, options)
            self.options = Options.of(program.options, options)
        except ProgramError as error:
            line = f"line {error.line}: " if error.line else ""
            message = f"dtrace: failed to compile script {name}: {line}{error}"
            raise Refused(message) from None
        counted = {id(clause.source): clause for clause in program.clauses}
        each = program.clauses if rules.clause_per_probe else counted.values()
        self.dof_size = dof_size(each)
        self.registers = max((d.register for c in each for d in c.difos), default=0)
        if rules.program_limited and self.dof_size >= engine.dof_maxsize:
            self._refuse(name, "DIF program exceeds maximum program size")
        if rules.registers_limited and invalid(program):
            self._refuse(name, "DIF program content is invalid")
        self.kernel = Kernel(
            *(program, self.options, engine.cpus, engine.system.header),
            *(engine.load, lambda: engine.between, rules),
        )
        self._copy = Copy(rules)
        self._consumer = Consumer(self._copy, self._exit, self._empty, rules)
        self.errors = self._consumer.errors
        self.is_running = True
        self._is_exiting = False
        self._is_stalled = False
        self._periods = {
            "status": self.options.statusrate,
            "aggregations": self.options.aggrate,
            "records": self.options.switchrate,
        }
        self._last = dict.fromkeys(self._periods, engine.time)
        ticks = {clause.probe: _tick(clause.probe) for clause in program.clauses}
        self._ticks = {probe: engine.time + every for probe, every in ticks.items() if every}

    def _refuse(self, name: str, reason: str) -> NoReturn:
        message = f"dtrace: failed to enable '{name}': {reason}"
        raise Refused(message, self.dof_size, self.registers)

    def _compiled(self, text: str, options: Mapping[str, str]) -> Program:
        engine = self._engine
        known = engine.types.variables
        symbols = {
            symbol: Variable(symbol, "symbol", known.get(symbol), slot=address)
            for symbol, address in engine.symbols.items()
        }
        checker = Checker(engine.types, symbols, engine.rules, engine.system)
        compiler = Compiler(checker, engine.rules, engine.system)
        program = compiler.compile(text, lambda own: Options.of(own, options).strsize)
        for clause in program.clauses:
            self._find(clause)
        return program

    def _find(self, clause: Compiled) -> None:
        """Check that the probe of a clause exists."""
        pattern = fields(clause.probe)
        own = pattern[3] in _OWN_PROBES or _tick(clause.probe)
        probes = self._engine.probes
        if not own and probes is not None and not any(matches(pattern, one) for one in probes):
            message = f"probe description {':'.join(pattern)} does not match any probes"
            raise ProgramError(message, clause.line)

    @property
    def output(self) -> str:
        """The output so far."""
        return "".join(self._consumer.pieces)

    @property
    def memory_per_cpu(self) -> int:
        """The session's kernel memory for each CPU, in bytes."""
        return memory_per_cpu(self.options, self._engine.cpus)

    def begin(self) -> None:
        """Let BEGIN fire, and dtrace(1) do its first round."""
        self._fire("dtrace:::BEGIN", self._engine.own_cpu)
        self._take(self.kernel.cpus, aggregations=True, records=True)
        if self._is_exiting:
            self.stop()

    def due(self) -> int:
        """Return when the next tick or round of dtrace(1) is due."""
        rounds = [last + self._periods[what] for what, last in self._last.items()]
        return min([*self._ticks.values(), *([] if self._is_stalled else rounds)], default=_NEVER)

    def work(self) -> None:
        """Do what is due now."""
        now = self._engine.time
        for probe, when in self._ticks.items():
            if when <= now:
                self._ticks[probe] = when + _tick(probe)
                self._fire(f"profile:::{fields(probe)[3]}", self._engine.tick_cpu)
        if not self._is_stalled:
            self._round(now)

    def stall(self) -> None:
        """Let dtrace(1) do nothing for a while, as on a busy host."""
        self._is_stalled = True

    def go(self) -> None:
        """Let dtrace(1) continue; what was due is done at once."""
        self._is_stalled = False
        self._round(self._engine.time)

    def stop(self) -> None:
        """End the session as a signal does: END fires, and all that is left is printed."""
        if not self.is_running:
            return
        self.is_running = False
        self.kernel.is_active = True
        own = self._engine.own_cpu
        self._fire("dtrace:::END", own)
        self.kernel.is_active = False
        self._engine.sessions.remove(self)
        self._status()
        # The CPU of END comes last.
        cpus = self.kernel.cpus
        self._take([*cpus[:own], *cpus[own + 1 :], cpus[own]], aggregations=True, records=True)
        self._consumer.rest()

    def _round(self, now: int) -> None:
        """Do one round of dtrace(1)'s loop, whose steps each have a rate of their own."""
        due = {what for what, last in self._last.items() if now - last >= self._periods[what]}
        for what in due:
            self._last[what] += self._periods[what]
        if "status" in due:
            self._status()
        self._take(self.kernel.cpus, "aggregations" in due, "records" in due)
        if self._is_exiting:
            self.stop()

    def _status(self) -> None:
        dynamic = self.kernel.dynamic
        for state, drops in dynamic.drops.items():
            self._consumer.drops(drops, "dynamic variable ", behind=state)
        dynamic.drops.clear()

    def _take(self, cpus: list[Cpu], aggregations: bool, records: bool) -> None:
        """Take the kernel's data, aggregations before the records that print them."""
        rules = self._engine.rules
        if aggregations and rules.snapshot_first:
            self._snapshot()
        if records and rules.rows_by_cpu:
            for cpu in cpus:
                self._consumer.consume(cpu.switch())
                self._lost(cpu)
        elif records:
            rows = [record for cpu in cpus for record in cpu.switch()]
            self._consumer.consume(sorted(rows, key=lambda record: record.number))
            for cpu in cpus:
                self._lost(cpu)
        if aggregations and not rules.snapshot_first:
            self._snapshot()

    def _lost(self, cpu: Cpu) -> None:
        self._consumer.drops(cpu.drops, cpu=cpu.context.cpu)
        cpu.drops = 0

    def _snapshot(self) -> None:
        for cpu in self.kernel.cpus:
            self._consumer.drops(cpu.counts_drops, "aggregation ", cpu.context.cpu)
            cpu.counts_drops = 0
            for (action, keys), value in cpu.snapshot().items():
                assert action.aggregation
                self._copy.add(action.aggregation, keys, value)

    def _fire(self, description: str, cpu: int) -> None:
        """Let one of dtrace(1)'s own probes fire."""
        self._engine.fire(description, cpu=cpu, execname=b"dtrace", sessions=[self])

    def _exit(self) -> None:
        self._is_exiting = True

    def _empty(self, aggregation: Any) -> None:
        self.kernel.forget(aggregation)


def _tick(description: str) -> int:
    """Return the period of a tick's probe; 0 for another probe."""
    name = fields(description)[3]
    return period(name.removeprefix("tick-")) if name.startswith("tick-") else 0
