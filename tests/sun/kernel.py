"""The kernel's part of a session: enabled clauses, variables, and two buffers for each CPU.

A principal buffer holds records and an aggregation buffer counts, until dtrace(1) takes them.
What has no room is lost, and the losses are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from sun.compiler import Action, Aggregation, Compiled, Program, link
from sun.consumer import ErrorRecord, Record
from sun.evaluate import Context, Dynamic, Fault, Machine, Probe
from sun.expressions import MASK, signed
from sun.limits import Options, Room, aggregation_room, dynamic_variables, lay_out
from sun.rules import Rules

_ENDLESS = 1 << 62
_ERROR = ("dtrace", "", "", "ERROR")
# dtrace(1)'s own clause at dtrace:::ERROR records five numbers.
_ERROR_NUMBERS = 5 * 8
_PATIENCE = 1_000_000

Counts = dict[tuple[Action, tuple[Any, ...]], list[int]]


@dataclass(eq=False, slots=True)
class Enabling:
    """A clause at its probe, with its number and the room that it needs."""

    epid: int
    clause: Compiled
    room: Room
    pattern: tuple[str, ...]
    exits: bool


@dataclass(eq=False, slots=True)
class Cpu:
    """A session's buffers on a CPU, how full they are, and what did not fit."""

    context: Context
    used: int = 0
    records: list[Record | ErrorRecord] = field(default_factory=list)
    drops: int = 0
    counts: Counts = field(default_factory=dict)
    counts_used: int = 0
    counts_drops: int = 0
    is_busy: bool = False

    def switch(self) -> list[Record | ErrorRecord]:
        """Return the records, and empty the buffer."""
        records, self.records = self.records, []
        self.used = 0
        return records

    def snapshot(self) -> Counts:
        """Return the counts, and empty the buffer."""
        counts, self.counts = self.counts, {}
        self.counts_used = 0
        return counts


class Kernel:
    """The kernel's part of a session.

    Args:
        program: the program to run.
        options: the options in force.
        cpus: the number of CPUs.
        header: the size of a record's header.
        load: returns memory by address and size.
        between: returns None, or a function to call between two expressions of an event.
        rules: the rules of the engine.

    Attributes:
        cpus: the session's state on each CPU.
        dynamic: its dynamic variables.
        is_active: whether its probes fire; not after exit().
    """

    def __init__(
        self,
        program: Program,
        options: Options,
        cpus: int,
        header: int,
        load: Callable[[int, int], bytes],
        between: Callable[[], Callable[[], object] | None],
        rules: Rules,
    ) -> None:
        self._rules = rules
        self._between = between
        places = dynamic_variables(program.clauses, options.dynvarsize)
        self.dynamic = Dynamic(places if rules.dynvars_limited else _ENDLESS, rules)
        self._clean_rate = options.cleanrate
        self._cleaned = 0
        room = aggregation_room(options.aggsize & -8)
        rooms = [lay_out(clause, header) for clause in program.clauses]
        size = options.bufsize
        if rules.buffers_grow and any(clause.aggregates for clause in program.clauses):
            size = max(size, *(room.needed for room in rooms))
        size &= -8
        self._aggregation_room = room if rules.aggregations_limited else _ENDLESS
        self._principal_room = size if rules.buffers_limited else _ENDLESS
        contexts = [Context(cpu, program.new_locals(), bytearray(size)) for cpu in range(cpus)]
        machine = Machine(
            *(load, contexts, self.dynamic, program.new_globals(), options.strsize, rules),
        )
        self._text = machine.text
        self._new_locals = program.new_locals
        link(program, machine.namespace)
        self.cpus = [Cpu(context) for context in contexts]
        self.enablings = [
            Enabling(
                *(number, clause, room, fields(clause.probe)),
                exits=any(statement.kind == "exit" for statement in clause.statements),
            )
            for number, (clause, room) in enumerate(zip(program.clauses, rooms, strict=True), 1)
        ]
        self._matching: dict[Probe, list[Enabling]] = {}
        self._at_errors = [e for e in self.enablings if matches(e.pattern, _ERROR)]
        size = -(-header // 8) * 8 + _ERROR_NUMBERS
        self._error_room = Room(size, size, 8)
        self._number = 0
        self.is_active = True

    def wants(self, probe: Probe) -> bool:
        """Tell whether a clause runs at a probe."""
        if probe not in self._matching:
            found = [e for e in self.enablings if matches(e.pattern, probe[1:])]
            self._matching[probe] = found
        return self.is_active and bool(self._matching[probe])

    def fire(self, probe: Probe, cpu: int, seen: Mapping[str, Any]) -> None:
        """Run a probe's clauses.

        Args:
            probe: the probe that fires.
            cpu: the CPU.
            seen: what clauses can see of the event, by the names of a Context.
        """
        state = self.cpus[cpu]
        self._wait_for(state)
        state.is_busy = True
        context = state.context
        context.probe = probe
        for name, value in seen.items():
            setattr(context, name, value)
        self._clean(context.time)
        if not self._rules.this_kept:
            context.this[:] = self._new_locals()
        try:
            for enabling in self._matching[probe]:
                if not self._run(enabling, state) and not self._rules.fault_ends_clause_only:
                    break
        finally:
            state.is_busy = False

    def forget(self, aggregation: Aggregation) -> None:
        """Lose an aggregation's counts, as if trunc() were the kernel's."""
        for cpu in self.cpus:
            for key in [key for key in cpu.counts if key[0].aggregation is aggregation]:
                del cpu.counts[key]

    def _clean(self, now: int) -> None:
        """Let the cleaner do what was due before now."""
        if self.dynamic.dirty and now // self._clean_rate > self._cleaned // self._clean_rate:
            self.dynamic.clean()
        self._cleaned = now

    def _wait_for(self, state: Cpu) -> None:
        """Wait until the event on the same CPU is over, because nothing interrupts an event."""
        for _ in range(_PATIENCE):
            if not state.is_busy:
                return
            between = self._between()
            if between is None:
                break
            between()
        raise RuntimeError(f"a probe fires within another on CPU {state.context.cpu}")

    def _reserve(self, room: Room, state: Cpu) -> int:
        """Return the offset of free room in the principal buffer, or -1 if there is none."""
        offset = -(-state.used // room.alignment) * room.alignment
        if offset + room.needed > self._principal_room:
            state.drops += 1
            return -1
        return offset

    def _run(self, enabling: Enabling, state: Cpu) -> bool:
        """Run a clause, and tell whether it did not fault."""
        context, clause, room, rules = state.context, enabling.clause, enabling.room, self._rules
        dynamic = self.dynamic
        offset = self._reserve(room, state)
        if offset < 0 and rules.room_first and rules.keys_need_room:
            return True
        counts = offset >= 0 or not rules.keys_need_room
        context.epid = enabling.epid
        context.scratch_used = max(offset, 0) + room.needed
        between = self._between()
        values: list[Any] = []
        keys: list[Any] = []
        number = 0
        try:
            if clause.test is not None:
                if between:
                    between()
                if not clause.test(context) or (dynamic.has_dropped and self._ends()):
                    return True
            for number, action in enumerate(clause.actions, 1):  # noqa: B007 - a fault tells it
                value: Any = 0
                if action.run is not None:
                    if between:
                        between()
                    value = action.run(context)
                    if dynamic.has_dropped and self._ends():
                        return True
                kind = action.kind
                if kind == "expression":
                    continue
                if kind == "aggregate":
                    if counts:
                        self._aggregate(action, tuple(keys), value, state)
                    keys = []
                    continue
                if action.is_text:
                    value = self._text(value)
                elif rules.records_truncated:
                    value &= action.mask
                if kind == "record":
                    values.append(value)
                elif action.run is not None:
                    keys.append((action.size, value))
        except Fault as fault:
            self._fault(fault, enabling, number, state)
            return False
        if room.size and offset >= 0:
            self._number += 1
            state.records.append(Record(clause, tuple(values), self._number))
            state.used = offset + room.size
            if enabling.exits:
                self.is_active = False
        return True

    def _ends(self) -> bool:
        """Tell whether a clause ends after its dynamic variable found no room."""
        self.dynamic.has_dropped = False
        return self._rules.drop_ends_clause

    def _fault(self, fault: Fault, enabling: Enabling, action: int, state: Cpu) -> None:
        """Let dtrace:::ERROR fire, the program's clauses first; its arguments are not simulated."""
        if enabling in self._at_errors:
            raise NotImplementedError("a fault in ERROR")
        for own in self._at_errors if self._rules.errors_fire else ():
            self._run(own, state)
        offset = self._reserve(self._error_room, state)
        if offset >= 0:
            self._number += 1
            probe = state.context.probe
            state.records.append(ErrorRecord(enabling.epid, probe, fault, action, self._number))
            state.used = offset + self._error_room.size

    def _aggregate(self, action: Action, keys: tuple[Any, ...], value: int, state: Cpu) -> None:
        aggregation = action.aggregation
        assert aggregation
        function = aggregation.function
        old = state.counts.get((action, keys))
        if old is None:
            if state.counts_used + action.record_size > self._aggregation_room:
                state.counts_drops += 1
                return
            state.counts_used += action.record_size
            new = {"count": [1], "avg": [1, value]}.get(function, [value])
            state.counts[action, keys] = new
        elif function == "count":
            old[0] += 1
        elif function == "sum":
            old[0] = old[0] + value & MASK
        elif function == "avg":
            old[:] = [old[0] + 1, old[1] + value & MASK]
        else:
            old[0] = (min if function == "min" else max)(old[0], value, key=signed)


def fields(description: str) -> tuple[str, str, str, str]:
    """Return the provider, module, function and name in a probe's description."""
    given = description.split(":")
    provider, module, function, name = [""] * (4 - len(given)) + given
    return provider, module, function, name


def matches(pattern: tuple[str, ...], probe: tuple[str, ...]) -> bool:
    """Tell whether a description, split into fields, matches a probe."""
    return all(
        not wanted or wanted == given or fnmatchcase(given, wanted)
        for wanted, given in zip(pattern, probe, strict=True)
    )
