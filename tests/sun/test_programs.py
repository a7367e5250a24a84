"""The programs for Sun's engine count all events exactly, in any script."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dtrace_exporter
from dtrace_exporter.listeners import Identity
from dtrace_exporter.tracing import program, refusal, rendering
from sun import fixed, freebsd_fixed
from sun.engine import Refused
from sun.evaluate import BAD_ADDRESS, Fault, Memory
from sun.events import Script, fixed_profile, places, scripts
from sun.faulty import Faulty
from sun.fixed import Start, first_wrong, starting
from sun.library import BUILDS, FREEBSD, GENERATIONS, why_not
from sun.watching import LACKS, SECOND, Gauges, Host, Watch, text

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

each_generation = pytest.mark.parametrize("generation", GENERATIONS)
ENTRIES = {
    "illumos": "fbt:ip:tcp_input_listener:entry",
    "solaris10": "fbt:ip:tcp_conn_request:entry",
    **dict.fromkeys(FREEBSD, "fbt:kernel:syncache_add:entry"),
}
DOF_MOST = 128 << 10
MEMORY_MOST = 2 << 20
PROGRAMS = Path(dtrace_exporter.__file__).parent / "programs"


def _loaded(generation: str) -> program.Program:
    return program.load(BUILDS[generation].family)


def _fixed(generation: str) -> ModuleType:
    return freebsd_fixed if generation in FREEBSD else fixed


@pytest.mark.parametrize(
    ("generation", "case"),
    [(generation, case) for generation in GENERATIONS for case in _fixed(generation).CASES],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_fixed(generation: str, case: Callable[[Start], list[str]]) -> None:
    """In each fixed script, all counts and gauges are those of the model."""
    assert case(starting(generation)) == []


@each_generation
@pytest.mark.parametrize(("threads", "examples"), [(1, 60), (4, 60)])
def test_any_script(generation: str, threads: int, examples: int) -> None:
    """For listeners that open during the session, all numbers are the model's in any script."""
    met: Counter[str] = Counter()

    @settings(fixed_profile, max_examples=examples)
    @given(scripts(generation, threads=threads), st.integers(2, 4), st.booleans())
    def run(script: Script, cpus: int, stalls: bool) -> None:
        with Watch(generation, cpus, script.seed, stalls=stalls) as watch:
            watch.play_script(script)
            watch.seconds(2)
            assert watch.differences() + watch.messages == []
            for sums in watch.expected().values():
                met.update(name for name, value in sums.items() if value)

    run()
    assert {"syns", "established", "accepts"} <= met.keys()


@each_generation
@pytest.mark.parametrize(("threads", "examples"), [(1, 30), (4, 30)])
def test_any_older_listener(generation: str, threads: int, examples: int) -> None:
    """After two events of each, the gauges of listeners older than the session are right."""

    @settings(fixed_profile, max_examples=examples)
    @given(scripts(generation, threads=threads), st.integers(2, 4), st.booleans())
    def run(script: Script, cpus: int, stalls: bool) -> None:
        with Watch(generation, cpus, script.seed, before=script.setup, stalls=stalls) as watch:
            watch.play_script(script._replace(setup=()))
            watch.seconds(2)
            assert watch.differences("new") + watch.messages == []
            for name in [*places(generation)] * 2:
                watch.quiet(name)
            watch.seconds(5)
            assert watch.differences() + watch.messages == []
            assert watch.limits()

    run()


@each_generation
@pytest.mark.parametrize("port", [80, 81])
def test_any_script_of_one_port(generation: str, port: int) -> None:
    """A session of one port counts that port's events, and no others."""

    @settings(fixed_profile, max_examples=20)
    @given(scripts(generation, threads=3), st.booleans())
    def run(script: Script, is_older: bool) -> None:
        before = script.setup if is_older else ()
        with Watch(generation, seed=script.seed, port=port, before=before) as watch:
            watch.play_script(script._replace(setup=()) if is_older else script)
            watch.seconds(2)
            assert {identity.port for identity in watch.counted()} <= {port}
            assert watch.differences("new" if is_older else "all") + watch.messages == []

    run()


def test_a_syn_a_second() -> None:
    """A listener with a new row at each of its SYNs counts each SYN once."""
    for generation in GENERATIONS:
        with Watch(generation) as watch:
            watch.run("listen L zone 0 address * port 80 backlog 100")
            for number in range(1, 12):
                watch.library.run("syn L")
                watch.seconds()
                q0 = None if generation in FREEBSD else number
                assert [*watch.lengths().values()] == [[Gauges(q0, 0, 100)]]
                assert watch.counted()[Identity("", watch.own_place, "*", 80)]["syns"] == number


# Buffers that are smaller than those of any session


@each_generation
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("principal", {"bufsize": "1k"}),
        ("aggregation", {"aggsize": "1k"}),
        ("dynamic_variable", {"dynvarsize": "2k"}),
    ],
)
def test_full(generation: str, kind: str, options: dict[str, str]) -> None:
    """Losses are reported, no count is too high, and gauges are unknown until new rows come."""
    if kind == "dynamic_variable" and generation in FREEBSD:
        # The size lets three listeners fit.
        options = {"dynvarsize": "8k"}
    with Watch(generation, options=options, cpus=2) as watch:
        names = [f"L{number}" for number in range(30)]
        for port, name in enumerate(names, 80):
            watch.library.run(f"listen {name} zone 0 address * port {port} backlog 2")
        for name in names:
            for line in ("syn {} count 3", "ack {} count 2", "syn {}", "accept {}"):
                watch.library.run(line.format(name))
        # dtrace(1) reports a loss while rows are still coming.
        watch.seconds(1)
        assert watch.errors[kind]
        # If an entry's variable is lost, its return faults.
        assert {*watch.errors} - {"fault"} == {kind}
        assert not watch.errors["fault"] or kind == "dynamic_variable"
        assert too_much(watch) == []
        assert {one.q for gauges in watch.lengths().values() for one in gauges} <= {None, 1}
        # A listener without room in the kernel's memory tries again with each row.
        watch.library.run(*(f"close {name}" for name in names[3:] if kind == "dynamic_variable"))
        watch.seconds(2)
        lost = watch.errors[kind]
        for name in names[:3]:
            watch.quiet(name)
        assert watch.errors[kind] == lost
        watch.seconds(2)
        ours, theirs = watch.lengths(), watch.queues()
        for identity, gauges in theirs.items():
            if identity.port < 83:
                assert ours[identity] == gauges


@each_generation
def test_small_buffers(generation: str) -> None:
    """With buffers of any size, all is exact, or a loss is reported and no count is too high."""

    @settings(fixed_profile, max_examples=40)
    @given(
        scripts(generation),
        st.sampled_from(["1k", "2k", "8k"]),
        st.sampled_from(["1k", "2k", "8k"]),
        st.sampled_from(["2k", "8k"]),
    )
    def run(script: Script, bufsize: str, aggsize: str, dynvarsize: str) -> None:
        options = {"bufsize": bufsize, "aggsize": aggsize, "dynvarsize": dynvarsize}
        with Watch(generation, seed=script.seed, options=options) as watch:
            watch.play_script(script)
            watch.seconds(2)
            assert watch.differences() == [] if not watch.messages else too_much(watch) == []
            assert watch.errors["dynamic_variable"] or not watch.errors["fault"]

    run()


def too_much(watch: Watch) -> list[str]:
    """Return counts that are higher than the model's, or whose listeners the model lacks."""
    expected = watch.expected()
    found = []
    # A listen() without room for a variable, or with nothing to read, reports no limit.
    untold = watch.errors["dynamic_variable"]
    untold += watch.errors["fault"] if watch.generation in FREEBSD else 0
    for identity, sums in watch.counted().items():
        want = expected.get(identity, Counter())
        want["waits"] = want["accepts"]
        found += [
            f"{identity} {name}: {have}, at most {want[name]}"
            for name, have in sums.items()
            if name != "wait_ns" and have > want[name] and not (name.startswith("found") and untold)
        ]
    return found


# Faults


SOLARIS_LINES = (
    (
        *("zone 1 www", "q0max 0 2", "listen A zone 0 address * port 80 backlog 2"),
        "listen B zone 1 address 192.0.2.1 port 81 backlog 2 streams",
        *("listen C zone 0 address * port 82 backlog 1 tli", "syn A count 2"),
        *("syn B count 2", "syn C", "ack A count 2", "ack B count 2", "ack C", "syn A"),
        *("syn B", "syn C", "accept A", "accept A", "accept B", "syn A count 4", "timeout A"),
    ),
    (
        *("syn A", "syn A", "syn B count 2", "ack B count 2", "accept B", "accept C"),
        *("syn C", "syn C", "ack C", "syn C", "abort A q0", "abort B q", "abort B deferred"),
        *("backlog A 3", "syn A", "segment A a", "syn A", "ack A", "ack A", "abort A q"),
        *("unlisten A", "close A", "listen A zone 0 address * port 80 backlog 2", "syn A"),
        *("ack A", "accept A", "close C", "listen D zone 0 address * port 83 backlog 1 tli"),
        *("syn D count 2", "ack D count 2", "accept D", "accept D"),
    ),
)
FREEBSD_LINES = (
    (
        *("zone 1 www", "bucketlimit 0 4", "listen A zone 0 address * port 80 backlog 1"),
        "listen B zone 1 address 192.0.2.1 port 81 backlog 2 filter",
        *("listen C zone 0 address * v6only port 82 backlog 1", "syn A count 3"),
        *("ack A count 3", "syn B count 3", "ack B count 2", "data B", "syn C", "ack C"),
        *("syn A", "syn B", "accept A", "accept A", "accept B", "syn A count 5", "again A"),
    ),
    (
        *("syn A", "ack A", "syn B count 2", "ack B count 2", "data B", "accept B", "accept C"),
        *("poll C", "syn C", "syn C", "ack C", "abort A q0", "abort B q", "cookie A count 3"),
        *("backlog A 3", "syn A", "syn A", "ack A", "ack A", "abort A q", "local 2"),
        *("close A", "listen A zone 0 address * port 80 backlog 2", "syn A", "ack A"),
        *("accept A", "close C", "listen D zone 0 address * port 83 backlog 1 filter"),
        *("syn D count 3", "ack D count 3", "data D count 2", "accept D", "accept D"),
    ),
)


def with_faults(
    generation: str, port: int, failing: frozenset[int], source: str = ""
) -> tuple[int, list[str], list[str]]:
    """Run all kinds of events while some loads fail.

    Returns:
        The number of loads, the counts that are too high, and the gauges that stay wrong.
    """
    memory = Faulty()
    with Watch(generation, port=port, source=source, load=memory) as watch:
        memory.host, memory.failing = watch, failing
        first, second = FREEBSD_LINES if generation in FREEBSD else SOLARIS_LINES
        watch.play(*first)
        watch.advance(SECOND)
        watch.play(*second)
        memory.host = None
        watch.seconds(2)
        high = too_much(watch)
        for name in "ABD" * 3:
            watch.quiet(name)
        watch.seconds(5)
        watch.wrong.clear()
        gauges = [one for one in watch.differences() if "queues" in one]
        assert len(watch.messages) == watch.errors["fault"] <= 8 * len(failing)
        return memory.count, high, gauges


@each_generation
@pytest.mark.parametrize("port", [0, 80])
def test_any_fault(generation: str, port: int) -> None:
    """If a load fails, no count is too high, and the gauges become right again."""
    loads, *rest = with_faults(generation, port, frozenset())
    assert rest == [[], []]
    chance = random.Random(1)
    for at in range(1, loads + 1, 7):
        assert with_faults(generation, port, frozenset([at]))[1:] == ([], []), at
    for _ in range(20):
        failing = frozenset(chance.choices(range(1, loads + 1), k=6))
        assert with_faults(generation, port, failing)[1:] == ([], []), failing


@pytest.mark.parametrize(
    ("generation", "gone"),
    [
        ("illumos", "this->listener = NULL;"),
        ("solaris10", "this->conn = NULL;"),
    ],
)
def test_faults_need_error(generation: str, gone: str) -> None:
    """If ERROR does not clear an earlier event's pointers, some fault makes a count too high."""
    source = re.sub(rf"(?m)^(ERROR .*){gone}", r"\1", text(generation))
    assert source != text(generation)
    loads, *_ = with_faults(generation, 0, frozenset())
    assert any(
        with_faults(generation, 0, frozenset([at]), source)[1:] != ([], [])
        for at in range(1, loads + 1)
    )


@each_generation
@pytest.mark.parametrize("port", [0, 80])
def test_fault_at_a_syn(generation: str, port: int) -> None:
    """If a SYN's listener cannot be read, its drop does not count for the thread's last SYN."""
    memory, failing = Memory(), False

    def load(address: int, size: int) -> bytes:
        name, arguments = watch.met
        of = arguments[3 if generation in FREEBSD else 0]
        if failing and name == ENTRIES[generation] and 0 <= address - of < 0x200:
            raise Fault(BAD_ADDRESS, address)
        return memory(address, size)

    with Watch(generation, port=port, load=load) as watch:
        for name, number in (("M", 81), ("L", 80)):
            watch.run(f"listen {name} zone 0 address * port {number} backlog 1")
            watch.run(f"syn {name}", f"ack {name}", f"syn {name}")
        failing = True
        watch.run("syn M")
        failing = False
        watch.seconds(2)
        assert watch.errors["fault"]
        assert too_much(watch) == []


# Optional parts


def _parts() -> Iterator[tuple[str, str]]:
    for generation in GENERATIONS:
        for part in _loaded(generation).parts:
            if part not in LACKS.get(generation, ()):
                yield generation, part


MOVES = {"streams", "deferred", "tli_accepts"}
"""Without one of these parts, the queues are those of the last row."""


@pytest.mark.parametrize(("generation", "part"), list(_parts()))
def test_without_a_part(generation: str, part: str) -> None:
    """Without any one part, the program starts, and what does not need the part is exact."""
    left_out = _loaded(generation).with_dependents({part, *LACKS.get(generation, ())})
    start = starting(generation, without=[part])
    # Without streams, their completions are missing, and so are counts that need those.
    kinds = bool(left_out & {"streams", "streams_accepts", "tli_accepts", "established"})
    kinds |= bool(left_out & {"departures", "half_open", "accepts", "open_close", "q0_limit"})
    kinds |= bool(left_out & {"deferred"})
    if not kinds:
        cases = _fixed(generation)
        assert first_wrong(start, [cases.decisions, cases.lifes, cases.older]) == ""
        return
    with start() as watch:
        watch.play("listen L zone 0 address * port 80 backlog 2", "syn L count 3", "ack L", "ack L")
        watch.play("syn L", "accept L", "syn L", "abort L q0", "ack L", "abort L q", "accept L")
        watch.seconds(2)
        assert watch.differences("none") + watch.messages == []
        for gauges in watch.lengths().values():
            for one in gauges:
                assert min(one.q0 or 0, one.q or 0) >= 0
        moves = {"departures", "half_open", "established", "open_close", *MOVES}
        if not left_out & (moves | ({"accepts"} if generation in FREEBSD else set())):
            assert watch.differences() == []


def run_as_a_session(
    generation: str, host: Callable[[], Host], port: int = 0
) -> tuple[list[str], str]:
    """Start a program, leaving out each part for which it is refused, one after the other.

    Returns:
        The blamed parts, in order, and the reason if the program does not start at all.
    """
    chosen = _loaded(generation)
    blamed: list[str] = []
    left_out: set[str] = set()
    while True:
        rendered = rendering.render(chosen, rendering.window(1.0), port, without=left_out)
        with host() as made:
            try:
                made.engine.start(rendered)
            except Refused as refused:
                part = refusal.blame(str(refused), rendered, chosen.family)
                if part is None:
                    return blamed, str(refused)
                blamed.append(part)
                left_out = chosen.with_dependents({*left_out, part})
            else:
                return blamed, ""


OWNERS = {
    "tcpListenDrop": "syn_drops",
    "tcpListenDropQ0": "syn_drops",
    "tcpHalfOpenDrop": "syn_drops",
    "tcpPassiveOpens": "half_open",
    "tcp_newconn_notify:entry": "established",
    "tcp_eager_unlink:entry": "departures",
    "tcp_accept_swap:entry": "tli_accepts",
    "tcp_accept_swap:return": "tli_accepts",
    "tcp_closei_local:entry": "open_close",
    "tcp_closei_local:return": "open_close",
}
OWNERS_ILLUMOS = {
    "tcp_accept:entry": "accepts",
    "tcp_accept:return": "accepts",
    "tcp_tpi_accept:entry": "streams_accepts",
    "tcp_tpi_accept:return": "streams_accepts",
    "tcp_send_conn_ind:entry": "streams",
    "tcp_send_conn_ind:return": "streams",
    "tcp_get_def_conn_ind:entry": "streams",
    "tcp_get_def_conn_ind:return": "streams",
    "tcp_do_listen:entry": "open_close",
    "tcp_do_listen:return": "open_close",
    "tcp_do_unbind:entry": "open_close",
    "tcp_do_unbind:return": "open_close",
}
OWNERS_SOLARIS10 = {
    "tcp_accept:entry": "tli_accepts",
    "tcp_accept:return": "tli_accepts",
    "tcp_wput_accept:entry": "accepts",
    "tcp_wput_accept:return": "accepts",
    "tcp_send_conn_ind:entry": "established",
    "tcp_send_conn_ind:return": "established",
    "tcp_send_pending:entry": "deferred",
    "tcp_bind:entry": "open_close",
    "tcp_bind:return": "open_close",
    "tcp_unbind:entry": "open_close",
    "tcp_unbind:return": "open_close",
}

OWNERS_FREEBSD = {
    "solisten_clone:entry": "enqueue",
    "solisten_clone:return": "enqueue",
    "solisten_enqueue:entry": "enqueue",
    "solisten_enqueue:return": "enqueue",
    "tcp_usr_abort:entry": "ack_drops",
    "soisconnected:entry": "established",
    "soisconnected:return": "established",
    "solisten_dequeue:entry": "accepts",
    "solisten_dequeue:return": "accepts",
    "soaccept:entry": "accepts",
    "solisten_proto:entry": "open_close",
    "solisten_proto:return": "open_close",
    "tcp_usr_detach:entry": "open_close",
    "syncache_add:return": "evictions",
    "syncache_drop:entry": "evictions",
}
OWNERS_OF = {
    "illumos": OWNERS | OWNERS_ILLUMOS,
    "solaris10": OWNERS | OWNERS_SOLARIS10,
    **dict.fromkeys(FREEBSD, OWNERS_FREEBSD),
}
REQUIRED = {*ENTRIES.values(), "fbt:kernel:sonewconn:entry", "fbt:kernel:sonewconn:return"}


@each_generation
def test_missing_probes(generation: str) -> None:
    """For each probe that a kernel may lack, exactly the part that needs it is left out."""
    owners = OWNERS_OF[generation]
    lacks = {*LACKS.get(generation, ())}
    with Host(generation) as host:
        probes = host.library.probes
    rendered = text(generation)
    for probe in probes:
        _, _, function, name = probe.split(":")
        key = name if not function else f"{function}:{name}"
        there = [one for one in probes if one != probe]
        blamed, why = run_as_a_session(generation, partial(Host, generation, probes=there))
        if probe in REQUIRED:
            assert {*blamed} <= lacks
            assert "does not match any probes" in why
            continue
        assert why == ""
        used = probe in rendered
        assert {*blamed} == lacks | ({*owners[key].split()} if used else set()), probe
        assert len({*blamed}) == len(blamed)


@pytest.mark.parametrize(
    ("generation", "member", "part"),
    [
        ("illumos", "cr_zone", "zones"),
        ("illumos", "zone_name", "zones"),
        ("illumos", "conn_cred", "zones"),
        ("illumos", "tcps_propinfo_tbl", "q0_limit"),
        ("illumos", "mod_propval_ucur", "q0_limit"),
        ("illumos", "tcp_eager_last_q", "streams"),
        ("solaris10", "cr_zone", "zones"),
        ("solaris10", "zone_name", "zones"),
        ("solaris10", "tcp_cred", "zones"),
        ("solaris10", "tcp_param_val", "q0_limit"),
        ("solaris10", "tcp_eager_last_q", "tli_accepts"),
        *((one, "pr_name", "jails") for one in FREEBSD),
        *((one, "cr_prison", "jails") for one in FREEBSD),
        *((one, "sc_cred", "evictions") for one in FREEBSD),
        *((one, "sol_accept_filter", "enqueue") for one in ("freebsd14",)),
        *((one, "sol_qlen", "") for one in FREEBSD),
        ("illumos", "tcp_conn_req_cnt_q", ""),
        ("solaris10", "tcp_conn_req_cnt_q", ""),
    ],
)
def test_missing_types(generation: str, member: str, part: str) -> None:
    """If the kernel's types lack a member, the parts that need it are left out."""
    blamed, why = run_as_a_session(generation, partial(Host, generation, missing=[member]))
    lacks = [*LACKS.get(generation, ())]
    if part:
        assert (sorted(blamed), why) == (sorted([*lacks, part]), "")
    else:
        assert {*blamed} <= {*lacks}
        assert member in why


@each_generation
def test_spare(generation: str) -> None:
    """If the kernel accepts smaller and smaller programs, spare parts go in their order."""
    chosen = _loaded(generation)
    spare = chosen.family.spare
    lacks = LACKS.get(generation, ())
    gone: list[str] = []
    for _ in spare:
        with Host(generation) as host:
            size = host.engine.start(text(generation, without=gone)).dof_size
        blamed, why = run_as_a_session(generation, partial(Host, generation, dof_maxsize=size))
        blamed = [part for part in blamed if part not in lacks]
        gone = [part for part in spare if part in chosen.with_dependents(blamed)]
        assert (blamed, why) == ([part for part in spare if part in blamed], "")
        assert gone == [*spare[: len(gone)]]
    blamed, why = run_as_a_session(generation, partial(Host, generation, dof_maxsize=1000))
    assert tuple(part for part in blamed if part not in lacks) == spare
    assert "DIF program exceeds maximum program size" in why


# Its needs, and what its head says


@each_generation
def test_sizes(generation: str) -> None:
    """Every program fits into old kernels, and needs little memory on many CPUs."""
    with Host(generation, cpus=64) as host:
        for port in (0, 80):
            for is_trace in (False, True):
                session = host.engine.start(text(generation, port, trace=is_trace))
                assert session.dof_size < DOF_MOST
                options = session.options
                # Without aggregations there are no aggregation buffers.
                buffers = options.bufsize + (0 if is_trace else options.aggsize)
                assert 2 * buffers <= MEMORY_MOST
                session.stop()


EXAMPLE = ("syn L count 3", "ack L count 2", "syn L count 2")
FREEBSD_EXAMPLE = ("syn L count 3", "ack L count 3", "syn L")


def example(generation: str) -> list[str]:
    """Return a session's output for a small backlog, some clients and two accepts."""
    is_freebsd = generation in FREEBSD
    backlog, lines = (1, FREEBSD_EXAMPLE) if is_freebsd else (2, EXAMPLE)
    with Watch(generation, cpus=1) as watch:
        watch.advance(300_000_000)
        opened = f"listen L zone 0 address 192.0.2.1 port 8080 backlog {backlog}"
        watch.library.run(opened, *lines)
        watch.advance(26_501_100)
        watch.library.run("accept L")
        watch.advance(318_000_000)
        watch.library.run("accept L")
        watch.seconds()
        assert watch.differences() == []
        rows, address = watch.rows, "f80003a1c000" if is_freebsd else "ff01d3b2ac80"
        for word in [line.split()[1] for line in rows if line.startswith("listener")]:
            rows = [line.replace(word[:-4], address) for line in rows]
        # The addresses look like the kernel's.
        return [line.replace("limit ", "limit ffff") for line in rows]


@each_generation
def test_example(generation: str) -> None:
    """The program prints the output that its head shows."""
    head = (PROGRAMS / f"{BUILDS[generation].family}.d").read_text()
    shown = [line[5:] for line in head.partition("*/")[0].splitlines() if line[:5] == " *   "]
    assert shown == example(generation)
    assert 6 <= len(shown) <= 12
