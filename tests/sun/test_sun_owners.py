"""The calls programs of Solaris and illumos: they report who accepts, and nobody else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings

from dtrace_exporter.listeners import Owner, SessionId
from dtrace_exporter.state import State
from dtrace_exporter.tracing import program, refusal, rendering
from dtrace_exporter.tracing.rows import Accepted, Reader
from dtrace_exporter.tracing.tally import Tally
from dtrace_exporter.watched import Watched
from sun.engine import Refused, Session
from sun.events import Script, fixed_profile, scripts
from sun.faulty import Faulty
from sun.library import SOLARIS, why_not
from sun.watching import SECOND, Host, Watch, listener_of

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

each_generation = pytest.mark.parametrize("generation", SOLARIS)
PLACES = 1024
DOF_MOST = 16 << 10
MEMORY_MOST = 1 << 20
SSH = "svc:/network/ssh:default"
HTTP = "svc:/network/http:apache24"


def rendered(generation: str, without: set[str] | None = None) -> str:
    """Return the program that the session `calls` runs."""
    return rendering.render(
        program.load(f"{generation}_calls"), rendering.window(1.0), without=without or set()
    )


def rows(session: Session) -> list[Accepted]:
    """Return the rows of acceptors that a session has printed so far."""
    reader = Reader()
    found = [reader.read(line) for line in session.output.splitlines() if line]
    return [row for row in found if isinstance(row, Accepted)]


def names(session: Session) -> Counter[tuple[str, str]]:
    """Return the number of rows with each name."""
    return Counter((row.kind, row.name) for row in rows(session))


class Owned(Watch):
    """A host with both sessions, whose rows fill one table."""

    def __init__(self, generation: str, **options: Any) -> None:
        super().__init__(generation, **options)
        calls = SessionId("", "calls")
        self.table.watch(calls, Watched(()))
        self.told = Tally(self.table, calls)
        self.calls = self.engine.start(rendered(generation))
        self._taken = 0

    def process(self, name: str, comm: str, pid: int, fmri: str = "") -> None:
        """Start a process; Solaris 10 has no services."""
        service = f"fmri {fmri}" if fmri and self.generation == "illumos" else ""
        self.run(f"process {name} {comm} pid {pid} {service}")

    def accepted(self, *lines: str) -> None:
        """Make a connection for each line, accept it, and read the rows."""
        for line in lines:
            listener = line.split()[0]
            self.run(f"syn {listener}", f"ack {listener}", f"accept {line}")
        self.seconds(2)
        *whole, _ = self.calls.output.split("\n")
        for row in filter(None, whole[self._taken :]):
            self.told.feed(row)
        self._taken = len(whole)
        assert self.calls.errors == []

    def owner(self, port: int) -> Owner | None:
        """Return the owner of a port's only listener, as a scrape has it."""
        return State(self.table).owner(listener_of(self.table, port))

    def has(self, port: int, programs: str, fmris: str = "") -> None:
        """Check a listener's owner."""
        fmris = fmris if self.generation == "illumos" else ""
        assert self.owner(port) == Owner(programs, fmri=fmris)


@each_generation
def test_two_listeners(generation: str) -> None:
    """A listener's owner is the program of the processes that accept there, once per program."""
    with Owned(generation) as host:
        host.run("zone 1 www", "listen L zone 0 address * port 22 backlog 9")
        host.run("listen M zone 1 address * port 80 backlog 9")
        host.process("A", "sshd", 7, SSH)
        host.process("B", "httpd", 8, HTTP)
        host.process("C", "httpd", 9, HTTP)
        host.process("D", "old%20httpd", 10, "svc:/network/http:old")
        host.accepted("L by A", "M by B", "M by C", "M by B")
        host.has(22, "sshd", SSH)
        host.has(80, "httpd", HTTP)
        host.accepted("M by D")
        host.has(80, "httpd,old httpd", f"{HTTP},svc:/network/http:old")
        host.has(22, "sshd", SSH)
        assert str(host.owner(22)) == ("sshd" if generation == "solaris10" else f"sshd ({SSH})")


@each_generation
def test_once_a_minute(generation: str) -> None:
    """A process that accepts many connections has one row a minute for each listener."""
    with Host(generation) as host:
        session = host.engine.start(rendered(generation))
        service = f"fmri {SSH}" if generation == "illumos" else ""
        host.run(f"process A sshd pid 7 {service}", f"process B sshd pid 8 {service}")
        for name, port in (("L", 22), ("M", 23)):
            host.run(f"listen {name} zone 0 address * port {port} backlog 9")
        begin = host.engine.time // (60 * SECOND)
        for _ in range(300):
            for name, process in ("LA", "LB", "MA"):
                host.library.run(f"syn {name}", f"ack {name}", f"accept {name} by {process}")
            host.advance(SECOND)
        minutes = host.engine.time // (60 * SECOND) - begin + 1
        assert 5 <= minutes <= 6
        # Two processes with the same name in the same second are one row.
        told = Counter((row.socket, row.name) for row in rows(session))
        assert [*told.values()] == [minutes] * (4 if service else 2)
        assert session.errors == []


@each_generation
def test_time(generation: str) -> None:
    """A row's time is that of the last accept that it reports."""
    with Host(generation) as host:
        session = host.engine.start(rendered(generation))
        host.run("listen L zone 0 address * port 22 backlog 9")
        host.run("process A sshd pid 7", "process B sshd pid 8")
        host.library.run("syn L count 2", "ack L count 2", "accept L by A")
        host.engine.time += SECOND // 10
        between = host.engine.time
        host.library.run("accept L by B")
        host.advance(2 * SECOND)
        (row,) = rows(session)
        assert between < row.time < between + SECOND // 10


def test_without_a_service() -> None:
    """A process without a contract, or whose contract has no service, has only a program name."""
    with Owned("illumos") as host:
        host.run("listen L zone 0 address * port 22 backlog 9")
        host.run("listen M zone 0 address * port 23 backlog 9")
        host.run("process A one pid 7", "process B other pid 8 contract")
        host.accepted("L by A", "M by B")
        assert (host.owner(22), host.owner(23)) == (Owner("one"), Owner("other"))
        # The kernel itself also accepts connections.
        host.accepted("M")
        assert host.owner(23) == Owner("other,sched")


@each_generation
@pytest.mark.parametrize(
    ("comm", "shown"),
    [
        ("a%20b", "a b"),
        ("%0aclosed%201%209", "\ufffdclosed 1 9"),
        ("%0atick%209%0a", "\ufffdtick 9\ufffd"),
        ("%5c0%22%5cn", '\\0"\\n'),
        ("%1b[2J%7f%07", "\ufffd[2J\ufffd\ufffd"),
        ("d%c3%a9mon", "d\xe9mon"),
        ("%ff%80", "\ufffd\ufffd"),
        ("%2020%20%20", " 20  "),
        ("sixteen-bytes-it", "sixteen-bytes-it"),
    ],
)
def test_odd_names(generation: str, comm: str, shown: str) -> None:
    """A name of any bytes stays within its row, and is shown without terminal commands."""
    with Owned(generation) as host:
        host.run("listen L zone 0 address * port 22 backlog 9")
        host.process("A", comm, 7, comm)
        host.accepted("L by A")
        host.has(22, shown, shown)
        assert host.told.ticks == host.calls.output.count("\ntick ")


def test_long_services() -> None:
    """A service's name that is cut short is a bad row, and not an owner."""
    with Host("illumos") as host:
        session = host.engine.start(rendered("illumos"))
        host.run("listen L zone 0 address * port 22 backlog 9")
        for at, length in enumerate((127, 128, 255), 7):
            host.run(f"process P{at} p{at} pid {at} fmri {'x' * length}")
            host.run("syn L", "ack L", f"accept L by P{at}")
        host.advance(2 * SECOND)
        reader, bad = Reader(), 0
        told = set()
        for line in session.output.splitlines()[1:]:
            try:
                row = reader.read(line)
            except ValueError:
                bad += 1
            else:
                told |= {row.name} if isinstance(row, Accepted) and row.kind == "fmri" else set()
        assert (told, bad) == ({"x" * 127}, 1)


@each_generation
@pytest.mark.parametrize("port", [22, 80])
def test_memory_that_is_used_again(generation: str, port: int) -> None:
    """A listener in another listener's memory does not get that one's owner."""
    with Owned(generation) as host:
        host.run("listen L zone 0 address * port 22 backlog 9")
        host.process("A", "sshd", 7, SSH)
        host.process("B", "httpd", 8, HTTP)
        host.accepted("L by A")
        host.has(22, "sshd", SSH)
        (before,) = listener_of(host.table, 22).sockets
        host.run("close L", f"listen M zone 0 address * port {port} backlog 9", "syn M")
        host.seconds(2)
        (after,) = listener_of(host.table, port).sockets
        assert after == before
        assert host.owner(port) is None
        host.accepted("M by B")
        host.has(port, "httpd", HTTP)


@each_generation
def test_closed(generation: str) -> None:
    """After its listener closes, a process is not its owner any more."""
    with Owned(generation) as host:
        host.run("listen L zone 0 address * port 22 backlog 9")
        host.process("A", "sshd", 7, SSH)
        host.accepted("L by A")
        host.run("close L")
        host.seconds(2)
        assert host.owner(22) is None
        assert listener_of(host.table, 22).acceptors == {}


@each_generation
def test_more_processes_than_places(generation: str) -> None:
    """If processes compete for a place, each is reported, and the number of places stays fixed."""
    count = PLACES + 500
    with Host(generation) as host:
        session = host.engine.start(rendered(generation))
        host.run("listen L zone 0 address * port 22 backlog 9")
        for at in range(count):
            host.library.run(f"process P{at} p{at} pid {at + 1}")
            host.library.run("syn L", "ack L", f"accept L by P{at}")
            if at % 500 == 0:
                host.advance(SECOND)
        host.advance(2 * SECOND)
        assert {name for _, name in names(session)} == {f"p{at}" for at in range(count)}
        assert session.errors == []
        assert len(session.kernel.dynamic.values) <= PLACES


@pytest.mark.parametrize(
    ("generation", "kind", "told"),
    [
        ("illumos", "", True),
        ("illumos", "streams", False),
        ("illumos", "tli", False),
        ("solaris10", "", True),
        ("solaris10", "tli", False),
    ],
)
def test_kinds(generation: str, kind: str, told: bool) -> None:
    """An accept that any thread may do, as with TLI, reports nobody, and does not fault."""
    with Owned(generation) as host:
        host.run(f"listen L zone 0 address * port 22 backlog 9 {kind}")
        host.process("A", "sshd", 7, SSH)
        host.accepted("L by A")
        assert (host.owner(22) is not None) == told


@each_generation
def test_any_script(generation: str) -> None:
    """In any script, nothing faults, and only acceptors are reported."""

    @settings(fixed_profile, max_examples=40)
    @given(scripts(generation, threads=3))
    def run(script: Script) -> None:
        with Host(generation, seed=script.seed) as host:
            session = host.engine.start(rendered(generation))
            host.run("process A never pid 7")
            host.play_script(script)
            host.advance(2 * SECOND)
            assert {*names(session)} <= {("program", "sched")}
            assert session.errors == []

    run()


@each_generation
def test_any_fault(generation: str) -> None:
    """If a load fails, only the row that needs it is missing, and it comes in the next minute."""

    def run(failing: frozenset[int]) -> tuple[int, Counter[tuple[bool, str, str]], Session]:
        memory = Faulty()
        with Host(generation, cpus=1, load=memory) as host:
            session = host.engine.start(rendered(generation))
            services = (f"fmri {SSH}", f"fmri {HTTP}") if generation == "illumos" else ("", "")
            host.run(f"process A sshd pid 7 {services[0]}", f"process B httpd pid 8 {services[1]}")
            host.run("listen L zone 0 address * port 22 backlog 9", "syn L", "ack L")
            host.run("listen M zone 0 address * port 80 backlog 9", "syn M", "ack M")
            # An event must not use what an earlier one left on its CPU.
            host.run("accept M by B")
            memory.host, memory.failing = host, failing
            host.run("accept L by A")
            memory.host = None
            host.advance(60 * SECOND)
            (other,) = {row.socket for row in rows(session) if row.name == "httpd"}
            first = Counter((row.socket == other, row.kind, row.name) for row in rows(session))
            host.run("syn L", "ack L", "accept L by A")
            host.advance(2 * SECOND)
            return memory.count, first, session

    loads, whole, _ = run(frozenset())
    expected = {(False, "program", "sshd"), (True, "program", "httpd")}
    if generation == "illumos":
        expected |= {(False, "fmri", SSH), (True, "fmri", HTTP)}
    assert whole == Counter(expected)
    lost = Counter[str]()
    for at in range(1, loads + 1):
        _, left, session = run(frozenset([at]))
        assert not left - whole, at
        assert {*names(session)} == {(kind, name) for _, kind, name in whole}
        assert len(session.errors) == 1
        lost.update(kind for _, kind, _ in whole - left)
    # A load for the service alone does not lose the program.
    assert lost["program"] < loads if generation == "illumos" else lost["program"] == loads


def as_a_session(host: Callable[[], Host], generation: str) -> tuple[list[str], list[str]]:
    """Start the program as a session does; return the parts left out and the kinds of rows."""
    chosen = program.load(f"{generation}_calls")
    left_out: set[str] = set()
    while True:
        text = rendered(generation, left_out)
        with host() as made:
            try:
                session = made.engine.start(text)
            except Refused as refused:
                part = refusal.blame(str(refused), text, chosen.family)
                if part is None or part in left_out:
                    raise
                left_out |= chosen.with_dependents({part})
                continue
            service = f"fmri {SSH}" if generation == "illumos" else ""
            made.run(f"process A sshd pid 7 {service}")
            made.run("listen L zone 0 address * port 22 backlog 9", "syn L", "ack L")
            made.run("accept L by A")
            made.advance(2 * SECOND)
            assert session.errors == []
            assert session.output.count("\ntick ") == 2
            return sorted(left_out), sorted(kind for kind, _ in names(session))


@pytest.mark.parametrize(
    ("generation", "member", "left_out", "told"),
    [
        ("illumos", "conp_svc_fmri", ["fmri"], ["program"]),
        ("illumos", "p_ct_process", ["fmri"], ["program"]),
        ("illumos", "cont_process", ["fmri"], ["program"]),
        ("illumos", "rs_string", ["fmri"], ["program"]),
        ("illumos", "t_procp", ["fmri"], ["program"]),
        ("illumos", "tcp_listener", ["fmri", "owners"], []),
        ("solaris10", "tcp_listener", ["owners"], []),
        ("solaris10", "OPT_offset", ["owners"], []),
    ],
)
def test_missing_types(generation: str, member: str, left_out: list[str], told: list[str]) -> None:
    """If the kernel lacks a type, only the parts that need it are missing; the session is up."""
    found = as_a_session(partial(Host, generation, missing=[member]), generation)
    assert found == (left_out, told)


@each_generation
def test_missing_probes(generation: str) -> None:
    """Only the function that accepts is needed; without it, nobody is reported."""
    with Host(generation) as host:
        probes = host.library.probes
    function = {"illumos": ":tcp_accept:entry", "solaris10": ":tcp_wput_accept:entry"}[generation]
    for probe in probes:
        there = [one for one in probes if one != probe]
        left_out, told = as_a_session(partial(Host, generation, probes=there), generation)
        assert bool(left_out) == probe.endswith(function)
        assert bool(told) != bool(left_out)


@each_generation
def test_sizes(generation: str) -> None:
    """The program fits into any kernel, and takes little memory."""
    with Host(generation, cpus=64) as host:
        session = host.engine.start(rendered(generation))
        assert session.dof_size < DOF_MOST
        assert session.memory_per_cpu < MEMORY_MOST


@each_generation
def test_example(generation: str) -> None:
    """The program prints the output that its head shows."""
    with Host(generation, cpus=1) as host:
        session = host.engine.start(rendered(generation))
        host.advance(300_000_000)
        service = f"fmri {SSH}" if generation == "illumos" else ""
        host.library.run(f"process A sshd pid 7 {service}")
        host.library.run("listen L zone 0 address * port 22 backlog 9", "syn L", "ack L")
        host.library.run("accept L by A")
        host.advance(SECOND)
        (socket,) = {f"{row.socket:x}" for row in rows(session)}
        printed = session.output.replace(socket, "ffffff01d3b2ac80").splitlines()
    head = program.load(f"{generation}_calls").text.partition("*/")[0]
    shown = [line[5:] for line in head.splitlines() if line[:5] == " *   "]
    # Rows with names are followed by as many zeros as fit.
    assert shown == [
        line[: line.index("\\0") + 6] + "..." if "\\0" in line else line for line in printed if line
    ]
