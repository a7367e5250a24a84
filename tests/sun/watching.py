"""A program at work under Sun's DTrace: the model's events, the simulator, and the rows' reader.

    with Watch("illumos") as watch:
        watch.run("listen L zone 0 address * port 80 backlog 2", "syn L count 3")
        watch.seconds(2)
        assert not watch.differences()

The model and the engine share one clock. It moves a little at each probe, more between lines, and
by seconds where a test says so.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from dtrace_exporter.listeners import Identity, Listener, ListenerTable, SessionId
from dtrace_exporter.tracing import diagnostics, program, rendering
from dtrace_exporter.tracing.rows import Tick
from dtrace_exporter.tracing.tally import Tally
from dtrace_exporter.watched import Watched, named
from sun.c_types import Types
from sun.engine import Engine, Session
from sun.events import Script
from sun.library import BUILDS, Library, Line, Nested

SECOND = 1_000_000_000
PROBE_NS = 10
"""How far time moves at each probe."""
STEPS = (1_000, 20_000, 700_000, 30_000_000, 400_000_000, 2_300_000_000)
"""How far time moves between lines; the first steps are more frequent."""
STEP_WEIGHTS = (8, 6, 4, 3, 2, 1)
PHASE_LINES = 8
"""How many lines of each thread run in one phase."""
STALL_ODDS = 0.1
"""How often dtrace(1) stalls, or continues, when time passes."""
BETWEEN_ODDS = 0.15
"""How often another thread runs between two expressions of an event."""
CLOSES = (
    "tcp_usr_detach:entry",
    "closei_local:return",
    "unbind:return",
    "tcp_do_listen:return",
    "tcp_bind:return",
)
LACKS = {"freebsd13": ("enqueue",), "freebsd14": ("newconn",)}
"""Parts that a generation of a family cannot run."""
_THREAD = 0xFFFF_FE00_0000_0000
_ME = SessionId("", "all")
_SUMS = ("syns", "not_listening", "established", "accepts", "q_sum", "wait_ns", "unsure", "killed")
UNSEEN = "no_inpcb"
"""Final ACKs in `no_memory` that got a socket but then failed, which the program misses."""
UNSURE = "unsure_evicted"
"""Evictions that may be counted for another listener of the same jail and port, or for none.

This happens while one of these listeners is older than the session and has had no event since, or
closes.
"""
OTHER = ("no_memory", "overflown")
"""Reasons in FreeBSD's model that the program counts as one: the reason `other`."""


@functools.cache
def _types(types: bytes, missing: tuple[str, ...]) -> Types:
    """Read types, after changing some of their names."""
    for name in missing:
        types = types.replace(f"\0{name}\0".encode(), f"\0{name[:-1]}#\0".encode())
    return Types(types)


class Gauges(NamedTuple):
    """A listening socket's queues; ``limits`` compares the limits of Q0."""

    q0: int | None
    q: int | None
    qmax: int | None


def text(generation: str, port: int = 0, without: Collection[str] = (), trace: bool = False) -> str:
    """Return a program as a session runs it."""
    family = BUILDS[generation].family
    found = program.load_trace(family) if trace else program.load(family)
    left_out = {*without, *LACKS.get(generation, ())}
    return rendering.render(found, rendering.window(1.0), port, without=left_out)


class _Library(Library):
    """A model that knows how deeply a line is nested in others.

    Attributes:
        depths: the depths by thread.
        is_interrupted: whether an event inside a line is a thread of its own, like an interrupt; or
            else runs in the same thread.
    """

    def __init__(self, generation: str) -> None:
        self.is_interrupted = True
        self.depths: Counter[int] = Counter()
        super().__init__(generation)

    def refuses(self, line: str) -> bool:
        """Do as Library does, and count the depth."""
        self.depths[self.thread] += 1
        try:
            return super().refuses(line)
        finally:
            self.depths[self.thread] -= 1


class Host:
    """A model of a generation, and an engine that sees its events.

    Args:
        generation: one of library.GENERATIONS.
        cpus: the number of CPUs.
        seed: the same seed makes time pass in the same way.
        stalls: whether dtrace(1) stalls now and then.
        missing: names of members and types that the kernel's types lack.
        options: options of the engine.

    Attributes:
        library: the model.
        engine: the engine, on which sessions start.
        met: the probe that fires, and its arguments.
    """

    def __init__(
        self,
        generation: str,
        cpus: int = 4,
        seed: int = 0,
        stalls: bool = False,
        missing: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.generation = generation
        self.library = _Library(generation)
        symbols = {name: symbol.address for name, symbol in self.library.symbols.items()}
        chosen: dict[str, Any] = {"cpus": cpus, "system": self.library.family} | options
        if "freebsd" in generation:
            # Its program distinguishes 13 and 14 by the probes that exist.
            chosen.setdefault("probes", self.library.probes)
        self.engine = Engine(_types(self.library.types, (*missing,)), symbols, **chosen)
        self.cpus = cpus
        self.jumps = 0
        self.was_concurrent = False
        self.met: tuple[str, list[int]] = ("", [])
        self._jump = 0
        self._stalls = stalls
        self._stalled: set[Session] = set()
        self._closed: dict[int, int] = {}
        self._late: Counter[int] = Counter()
        self._chance = random.Random(seed)
        self._names = self.library.probes
        self.library.now = self.engine.time
        self.library.hook(self._names, self._met)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.library.close()

    def advance(self, nanoseconds: int) -> None:
        """Let time pass."""
        # dtrace(1) takes nothing from a CPU during an event.
        while any(cpu.is_busy for session in self._sessions() for cpu in session.kernel.cpus):
            self.library.pause()
        if self._stalls and self._chance.random() < STALL_ODDS:
            for session in self._sessions():
                session.go() if session in self._stalled else session.stall()
                self._stalled ^= {session}
        self.engine.advance(nanoseconds)
        self.library.now = self.engine.time

    def run(self, *lines: str) -> None:
        """Let events happen, one after the other."""
        for line in lines:
            self.step()
            self.library.run(line)

    def play(self, *lines: Line) -> None:
        """Let the possible ones of some events happen."""
        for line in lines:
            self.step()
            if left := _remembered(line):
                self.library.play(left)

    def play_script(self, script: Script) -> None:
        """Play a script, with its threads running concurrently."""
        self.play(*script.setup)
        if len(script.threads) == 1:
            self.play(*script.threads[0])
        else:
            self.concurrently(*script.threads, seed=script.seed, migrate=script.migrate)

    def concurrently(self, *threads: Sequence[Line], seed: int = 0, migrate: bool = True) -> None:
        """Let threads run concurrently, on all CPUs, some lines of each at a time.

        Once in each such phase, time passes during their work; so no event lasts longer than a
        second, unless a line waits for another.
        """
        kept = [[left for line in lines if (left := _remembered(line))] for lines in threads]
        places = [number % self.cpus for number in range(len(kept))]
        self.was_concurrent = True
        for at in range(0, max(map(len, kept), default=0), PHASE_LINES):
            self.step()
            self._jump = self._chance.randrange(1, 2 * PHASE_LINES * len(kept))
            self.engine.between = self._between
            phase = [lines[at : at + PHASE_LINES] for lines in kept]
            try:
                self.library.concurrently(*phase, seed=seed + at, cpus=places, migrate=migrate)
            finally:
                self.engine.between = None

    def step(self) -> None:
        """Let some time pass, as it does between lines."""
        (step,) = self._chance.choices(STEPS, STEP_WEIGHTS)
        self.advance(step)

    def _sessions(self) -> Sequence[Session]:
        return self.engine.sessions

    def _met(self, number: int, arguments: list[int]) -> None:
        library = self.library
        name = self._names[number]
        self.engine.time += PROBE_NS
        library.now = self.engine.time
        if self.engine.between and name.endswith(CLOSES):
            self._look_for_closed()
        self.met = name, arguments
        depth = library.depths[library.thread] if library.is_interrupted else 0
        thread = _THREAD + 0x1000 * library.thread + 0x100 * depth
        self.engine.fire(
            *(name, arguments, library.cpu % self.cpus),
            library.kthread(thread) or thread,
            *library.process(),
        )
        if self.engine.between and self._jump:
            self._jump -= 1
            if not self._jump:
                self.jumps += 1
                self.step()

    def _look_for_closed(self) -> None:
        """Record how many connections each closed listener had established until it closed."""
        for number, totals in enumerate(self.library.all_totals()):
            is_open = not totals["closed"] and totals["listens"]
            if not is_open:
                self._closed.setdefault(number, totals["established"])
            elif number in self._closed:
                self._late[number] += totals["established"] - self._closed.pop(number)

    def late(self, number: int) -> int:
        """Return how many connections entered a listener's Q after it stopped listening."""
        if number not in self._closed:
            return self._late[number]
        established: int = self.library.all_totals()[number]["established"]
        return self._late[number] + established - self._closed[number]

    def _between(self) -> None:
        if self._chance.random() < BETWEEN_ODDS:
            self.library.pause()


class Watch(Host):
    """A host with a session of a counting program, whose rows are read as they come.

    Args:
        generation: one of library.GENERATIONS.
        cpus: the number of CPUs.
        seed: as for Host.
        source: the program; by default the generation's own.
        port: the only port that it watches; 0 for all.
        without: optional parts that are left out.
        before: lines that happen before the session starts.
        stalls: as for Host.
        options: options of dtrace(1).
        engine: options of the engine.

    Attributes:
        session: the session.
        tally: the reader of its rows.
        table: the reader's listener table.
        rows: all rows.
        errors: the kinds and counts of dtrace(1)'s messages.
    """

    def __init__(
        self,
        generation: str,
        cpus: int = 4,
        seed: int = 0,
        source: str = "",
        port: int = 0,
        without: Collection[str] = (),
        before: Sequence[Line] = (),
        stalls: bool = False,
        options: Mapping[str, str] | None = None,
        **engine: Any,
    ) -> None:
        super().__init__(generation, cpus, seed, stalls, **engine)
        self.play(*before)
        if "freebsd" in generation:
            self.library.run("watch")
        self._before = self.library.all_totals()
        self.port = port
        chosen = program.load(self.library.family)
        left_out = chosen.with_dependents({*without, *LACKS.get(generation, ())})
        features = {part: part not in left_out for part in chosen.parts}
        self.features = features
        self.own_place = chosen.family.own_place
        self.table = ListenerTable()
        watched = named({port: ""}) if port else Watched()
        self.table.watch(_ME, watched, program.capabilities(chosen, features))
        self.reasons = self.table.session_capabilities(_ME).reasons
        self.tally = Tally(self.table, _ME)
        self.wrong: list[str] = []
        self.rows: list[str] = []
        self.errors: Counter[str] = Counter()
        self.messages: list[str] = []
        self._pieces = 0
        self._rest = ""
        self.session = self.engine.start(source or text(generation, port, without), options)
        self.read()

    def read(self) -> None:
        """Read the rows since the last time, and dtrace(1)'s messages."""
        errors = self.session.errors[len(self.messages) :]
        self.messages += errors
        for line in errors:
            found = diagnostics.classify(line)
            self.errors[found.lost or found.kind] += found.count
            if found.kind == "lost":
                self.tally.lose()
        output = self.session.output
        new, self._pieces = output[self._pieces :], len(output)
        *lines, self._rest = (self._rest + new).split("\n")
        for line in filter(None, lines):
            self.rows.append(line)
            record = self.tally.feed(line)
            if isinstance(record, Tick):
                self.wrong += filter(None, self.tally.settle(record))

    def seconds(self, count: int = 1) -> None:
        """Let seconds pass without any event or stall, and read the rows."""
        for session in self._stalled:
            session.go()
        self._stalled.clear()
        self._stalls = False
        for _ in range(count):
            self.advance(SECOND)
            self.read()

    def quiet(self, name: str) -> None:
        """Let a single event happen to a listener, and a second pass.

        If another listener of its port gets the SYNs to an address, this one gets those to others.
        """
        ends = ("", " from 2001:db8::5", " to 192.0.2.9", " from 2001:db8::5 to 2001:db8::9")
        any(self.library.play(f"syn {name}{end}") for end in ends)
        self.seconds()

    # The model's knowledge, by listener

    def _records(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """Yield each listener's totals since the session began, and whether it is older."""
        for number, totals in enumerate(self.library.all_totals()):
            if self.port and totals["port"] != self.port:
                continue
            older = number < len(self._before)
            totals["late"] = self.late(number)
            totals["other"] = sum(totals.get(name, 0) for name in OTHER)
            if older:
                before = self._before[number]
                before["other"] = sum(before.get(name, 0) for name in OTHER)
                for name in (*_SUMS, *self.reasons, UNSEEN, UNSURE, "asked_times"):
                    totals[name] = totals.get(name, 0) - before.get(name, 0)
                pairs = zip(totals["saturation"], before["saturation"], strict=True)
                totals["saturation"] = [now - then for now, then in pairs]
            yield totals, older

    def _identity(self, totals: Mapping[str, Any]) -> Identity:
        has_places = self.features.get("zones", self.features.get("jails"))
        place = totals["zone_name"] if has_places else self.tally.own_place
        place = self.own_place if place == self.tally.own_place else place
        return Identity("", place, totals["address"], totals["port"])

    def expected(self) -> dict[Identity, Counter[str]]:
        """Return the model's counts for each listener since the session began."""
        found: dict[Identity, Counter[str]] = {}
        for totals, older in self._records():
            sums = found.setdefault(self._identity(totals), Counter())
            sums.update({name: totals[name] for name in (*_SUMS, *self.reasons, "late")})
            sums.update({name: totals.get(name, 0) for name in (UNSEEN, UNSURE)})
            sums.update({f"found {at}": n for at, n in enumerate(totals["saturation"])})
            sums["older"] += older
            sums["sockets"] += 1
        return found

    def counted(self) -> dict[Identity, Counter[str]]:
        """Return the reader's counts, by the same names."""
        found = {}
        for listener in self.table:
            sums = Counter(listener.drops)
            sums.update(
                syns=listener.syns,
                established=listener.established,
                accepts=listener.accepts,
                q_sum=sum(listener.q_sums.values()),
                wait_ns=listener.wait_ns,
                waits=sum(listener.waits),
            )
            sums.update({f"found {at}": n for at, n in enumerate(listener.saturation)})
            found[listener.identity] = sums
        # A configured port that has not been seen is a listener with zeros.
        return {who: sums for who, sums in found.items() if who in self.table}

    def lengths(self) -> dict[Identity, list[Gauges]]:
        """Return the queues of all sockets in the reader's table."""
        return {
            listener.identity: sorted(
                Gauges(one.q0, one.q, one.q_limit) for one in listener.sockets.values()
            )
            for listener in self.table
            if listener.sockets
        }

    def queues(self, older: bool = True) -> dict[Identity, list[Gauges]]:
        """Return the queues of all listening sockets of the model.

        Args:
            older: whether to include those that listened before the session began.
        """
        found: dict[Identity, list[Gauges]] = {}
        for totals, is_older in self._records():
            if not totals["closed"] and totals["listens"] and (older or not is_older):
                one = Gauges(totals["tcp_q0"], totals["tcp_q"], totals["qmax"])
                found.setdefault(self._identity(totals), []).append(one)
        return {identity: sorted(gauges) for identity, gauges in found.items()}

    def asked(self) -> dict[Identity, list[int | None]]:
        """Return the requested backlogs of the sockets in the reader's table."""
        return {
            listener.identity: sorted((one.requested for one in listener.sockets.values()), key=str)
            for listener in self.table
            if listener.sockets
        }

    def requested(self) -> dict[Identity, list[int | None]]:
        """Return the backlogs that the model's sockets requested; None without a listen()."""
        found: dict[Identity, list[int | None]] = {}
        for totals, is_older in self._records():
            if not totals["closed"] and totals["listens"]:
                is_seen = self.features["open_close"] and "asked" in totals
                is_seen = is_seen and not (is_older and totals["asked_times"] == 0)
                one = totals["asked"] if is_seen else None
                found.setdefault(self._identity(totals), []).append(one)
        return {identity: sorted(backlogs, key=str) for identity, backlogs in found.items()}

    def limits(self) -> bool:
        """Tell whether all limits of Q0 are the model's."""
        ours = sorted(
            (listener.identity, queues.q0_limit)
            for listener in self.table
            for queues in listener.sockets.values()
        )
        return ours == sorted(
            (self._identity(totals), totals["q0max"])
            for totals, _ in self._records()
            if not totals["closed"] and totals["listens"]
        )

    def differences(self, gauges: str = "all") -> list[str]:
        """Return how the reader's counts and gauges differ from the model's.

        Some differences are allowed. A SYN may have found another Q, if Q changed while the SYN was
        at the listener. With concurrent threads, a SYN or a connection on its way to a listener
        that closes may be counted or not. On FreeBSD, UNSEEN may be missing, and evictions in
        UNSURE may be another listener's. Times in Q may differ by a microsecond each, and more for
        connections that are older than the session.

        Args:
            gauges: the listeners whose gauges are compared: ``new`` ones, ``all`` or ``none``.
        """
        found = [*self.wrong]
        expected, counted = self.expected(), self.counted()
        unsure = Counter[tuple[str, int]]()
        for identity, sums in expected.items():
            unsure[identity.place, identity.port] += sums[UNSURE]
        for identity in sorted({*expected, *counted}):
            want = expected.get(identity, Counter())
            want[UNSURE] = unsure[identity.place, identity.port]
            have = counted.get(identity, Counter())
            found += [
                f"{identity[1:]} {name}: {have[name]}, not {want[name]}"
                for name in self._names_of_counts()
                if not self._alike(name, want, have)
            ]
        if gauges != "none":
            lengths = self.lengths()
            wanted = self.queues(older=True)
            certain = wanted if gauges == "all" else self.queues(older=False)
            asked, requested = self.asked(), self.requested()
            for identity in sorted({*lengths, *wanted}):
                ours, theirs = lengths.get(identity, []), wanted.get(identity, [])
                surely = certain.get(identity, [])
                if gauges == "new" and surely != theirs:
                    continue
                if ours != theirs:
                    found.append(f"{identity[1:]} queues: {ours}, not {theirs}")
                elif asked.get(identity) != requested.get(identity) and not self.messages:
                    backlogs = asked.get(identity), requested.get(identity)
                    found.append(f"{identity[1:]} backlogs: {backlogs[0]}, not {backlogs[1]}")
        return found

    def _names_of_counts(self) -> list[str]:
        parts = self.features
        names = ["syns", "q_sum", "found"]
        names += self.reasons
        names += ["established"] if parts["established"] else []
        names += ["accepts"] if parts["accepts"] else []
        names += ["wait_ns"] if parts["accept_wait"] else []
        return names

    def _raced(self, want: Mapping[str, int]) -> int:
        """Return how many connections may have entered Q unseen by the program.

        FreeBSD's program sees that when soisconnected() returns, if the listener has not closed.
        """
        return want["killed"] if self.was_concurrent and "freebsd" in self.generation else 0

    def _alike(self, name: str, want: Mapping[str, int], have: Mapping[str, int]) -> bool:
        in_flight = want["not_listening"] if self.was_concurrent else 0
        unsure = want["unsure"] + in_flight
        if name == "syns":
            return want[name] <= have[name] <= want[name] + in_flight
        if name == "found":
            keys = {key for key in (*want, *have) if key.startswith("found ")}
            return sum(abs(want[key] - have[key]) for key in keys) <= 2 * unsure
        if name == "q_sum":
            return abs(want[name] - have[name]) <= 100 * unsure
        if name == "wait_ns":
            if want["older"]:
                return have["waits"] <= want["accepts"]
            if have["waits"] != want["accepts"]:
                return False
            # A few probes, and jumps, are between the model's times and the program's.
            off = want["accepts"] * (1000 + 8 * PROBE_NS)
            return bool(self.jumps) or abs(want[name] - have[name]) <= off
        if name == "q0_evicted":
            return abs(want[name] - have[name]) <= want[UNSURE]
        if name == "other":
            return want[name] - want[UNSEEN] <= have[name] <= want[name]
        if name == "established":
            return want[name] - want["late"] - self._raced(want) <= have[name] <= want[name]
        return want[name] == have[name]


def _remembered(line: Line) -> Line | None:
    """Return a line without parts that make the model forget totals."""
    if isinstance(line, str):
        return None if line == "forget" else line
    inner = tuple(one for one in line.inner if one != "forget")
    return None if line.line == "forget" else Nested(line.line, line.at, inner)


def listener_of(table: ListenerTable, port: int) -> Listener:
    """Return the only listener of a port."""
    (found,) = [one for one in table if one.identity.port == port]
    return found
