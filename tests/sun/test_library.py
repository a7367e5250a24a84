"""The library of a model behaves like the module, and its hooks see all events."""

from __future__ import annotations

import errno
import inspect
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cases import model_itself
from hypothesis import given, settings

from sun.events import Script, scripts
from sun.library import FREEBSD, SOLARIS, Library, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

NOT_HERE = ("test_kernel_log",)
"""The cases of the module that look at the kernel's log."""
FIRST = {"illumos": "tcp_input_listener", "solaris10": "tcp_conn_request"}


def _cases() -> Iterator[tuple[str, str, str]]:
    """Yield the name, the generation and the kind of each of the module's cases."""
    for name, case in inspect.getmembers(model_itself, inspect.isfunction):
        if not name.startswith("test_") or name in NOT_HERE:
            continue
        parameters = inspect.signature(case).parameters
        if "model" in parameters:
            yield from ((name, generation, "") for generation in SOLARIS)
        elif "illumos" in parameters:
            yield name, "illumos", ""
        elif "freebsd" in parameters:
            yield from ((name, generation, "") for generation in FREEBSD)
        elif "deferring" in parameters:
            yield from ((name, *pair) for pair in model_itself.DEFERRING)
        else:
            pairs = [("illumos", ""), *model_itself.DEFERRING]
            yield from ((name, *pair) for pair in pairs)


@pytest.mark.parametrize(("name", "generation", "kind"), list(_cases()))
def test_as_the_module(
    name: str, generation: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every case that the module passes in a kernel also holds for the library."""
    monkeypatch.setattr(model_itself, "Model", Library)
    case = getattr(model_itself, name)
    parameters = inspect.signature(case).parameters
    if "freebsd" in parameters:
        case(generation)
        return
    if "kind" in parameters:
        case(generation, kind)
        return
    with model_itself.loaded(generation) as model:
        case((model, kind) if "deferring" in parameters else model)


@pytest.fixture(params=SOLARIS)
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    """Return the library of each generation, with a listener L."""
    with Library(request.param) as made:
        made.run("listen L zone 0 address * port 80 backlog 2")
        yield made


class Seen:
    """The events that the hooks of a library see.

    Args:
        library: the library.
        probes: the probes to hook; all by default.
    """

    def __init__(self, library: Library, *probes: str) -> None:
        self.names = probes or library.probes
        self.events: list[tuple[str, list[int]]] = []
        library.hook(self.names, self.add)

    def add(self, number: int, arguments: list[int]) -> None:
        self.events.append((self.names[number].replace("fbt:ip:", ""), arguments))

    def take(self) -> list[str]:
        """Return the names of the events since the last call."""
        names = [name for name, _ in self.events]
        self.events.clear()
        return names

    def arguments(self, name: str) -> list[int]:
        """Return the arguments of the last event with a name."""
        return [arguments for have, arguments in self.events if have == name][-1]


def test_probes(library: Library) -> None:
    """The hooks see a connection's whole life, in the order of Solaris' own functions."""
    seen = Seen(library)
    library.run("syn L")
    first = FIRST[library.generation]
    assert seen.take() == [
        *(f"{first}_unbound:entry", f"{first}:entry", "mib:::tcpPassiveOpens"),
        *(f"{first}:return", f"{first}_unbound:return"),
    ]
    library.run("ack L", "accept L")
    into, out = {
        "illumos": ("tcp_newconn_notify", "tcp_accept"),
        "solaris10": ("tcp_send_conn_ind", "tcp_wput_accept"),
    }[library.generation]
    assert seen.take() == [
        *(f"{into}:entry", f"{into}:return", f"{out}:entry"),
        *("tcp_eager_unlink:entry", "tcp_eager_unlink:return", f"{out}:return"),
    ]
    library.run("syn L", "close L")
    assert seen.take()[3:] == [
        *("tcp_closei_local:entry", "tcp_closei_local:return", "tcp_eager_kill:entry"),
        *("tcp_eager_unlink:entry", "tcp_eager_unlink:return"),
        *("tcp_closei_local:entry", "tcp_closei_local:return", "tcp_eager_kill:return"),
    ]


@pytest.mark.parametrize("generation", SOLARIS)
def test_every_probe(generation: str) -> None:
    """A script can reach every probe."""
    with Library(generation) as library:
        seen = Seen(library)
        library.run("q0max 0 1")
        for kind in ("", "streams", "tli"):
            library.run(f"listen L zone 0 address * port 80 backlog 2 {kind}")
            library.run("syn L count 3", "ack L count 3", "syn L", "accept L count 3")
            library.run("syn L count 4", "timeout L", "syn L", "unlisten L", "close L")
        met = {name.replace(":", ":ip:", 1) if name[:3] == "fbt" else name for name in seen.take()}
        missing = {probe.replace("fbt:ip:", "") for probe in library.probes} - met
        assert not missing


def test_arguments(library: Library) -> None:
    """A hook gets a function's arguments, or a counter's increment and address."""
    first = FIRST[library.generation]
    looked: list[bytes] = []

    def look(_: int, arguments: list[int]) -> None:
        # The memory is valid only while the function runs.
        (start,) = struct.unpack("<Q", library.read(arguments[1] + 24, 8))
        looked.append(library.read(start, 22))
        if library.generation == "illumos":
            looked.append(library.read(arguments[3] + 60, 2))

    library.hook([f"fbt:ip:{first}:entry"], look)
    library.run("syn L from 192.0.2.7 port 1234 options 4")
    assert looked[0][:1] == b"\x46"
    assert looked[0][12:16] == bytes([192, 0, 2, 7])
    if library.generation == "illumos":
        assert looked[1] == (24).to_bytes(2, "little")
    seen = Seen(library)
    library.run("syn L")
    listener = seen.arguments(f"{first}:entry")[0]
    increment, counter = seen.arguments("mib:::tcpPassiveOpens")[:2]
    assert increment & 0xFFFF_FFFF == 1
    assert library.read(counter, 4) == (2).to_bytes(4, "little")
    library.run("ack L", "accept L", "close L")
    if library.generation == "illumos":
        assert seen.arguments("tcp_accept:entry")[0] == listener
        assert seen.arguments("tcp_newconn_notify:return")[1] & 0xFFFF_FFFF == 1


def test_returns(library: Library) -> None:
    """A return's hook gets the value after all events in the function, even without its entry."""
    if library.generation == "illumos":
        seen = Seen(library, "fbt:ip:tcp_accept:return", "fbt:ip:tcp_eager_unlink:entry")
        library.run("syn L count 2", "ack L count 2", "abort L q", "accept L count 2")
        values = [arguments[1] for name, arguments in seen.events if name.endswith("return")]
        assert values == [errno.ECONNABORTED, 0]
        assert seen.take() == ["tcp_eager_unlink:entry", "tcp_accept:return"] * 2
    else:
        seen = Seen(library, "fbt:ip:tcp_wput_accept:return", "fbt:ip:tcp_eager_unlink:return")
        library.run("syn L count 2", "ack L count 2", "accept L count 2")
        assert seen.take() == ["tcp_eager_unlink:return", "tcp_wput_accept:return"] * 2


def test_nested(library: Library) -> None:
    """An event can happen inside another's hook, and the hooks see both completely."""
    library.run("listen M zone 0 address * port 81 backlog 2")
    passive = "mib:::tcpPassiveOpens"
    seen: list[str] = []
    depth = 0

    def met(number: int, _: list[int]) -> None:
        nonlocal depth
        seen.append(probes[number].rpartition(":")[2])
        if probes[number] == passive and depth < 2:
            depth += 1
            library.run("syn M" if depth == 1 else "syn N")
            seen.append("inner done")

    library.run("listen N zone 0 address * port 82 backlog 2")
    first = FIRST[library.generation]
    probes = [f"fbt:ip:{first}:entry", passive, f"fbt:ip:{first}:return"]
    library.hook(probes, met)
    library.run("syn L")
    inner = ["entry", "tcpPassiveOpens", "return", "inner done"]
    assert seen == [
        *("entry", "tcpPassiveOpens", "entry", "tcpPassiveOpens", *inner),
        *("return", "inner done", "return"),
    ]
    assert [totals["q0"] for totals in library.all_totals()] == [1, 1, 1]


def test_nested_that_cannot_be(library: Library) -> None:
    """A line that would have to wait for the event around it is refused, and changes nothing."""
    library.run("syn L count 2", "ack L")
    tried: list[tuple[str, bool]] = []

    def inside(*lines: str) -> Callable[[int, list[int]], None]:
        return lambda _number, _: tried.extend((line, library.refuses(line)) for line in lines)

    library.hook([f"fbt:ip:{FIRST[library.generation]}:entry"], inside("syn L", "close L", "ack L"))
    library.run("syn L")
    # A plain socket completes in its own squeue, and a STREAMS listener's in the listener's.
    waits = library.generation == "solaris10"
    assert tried == [("syn L", True), ("close L", True), ("ack L", waits)]
    tried.clear()
    library.hook(["fbt:ip:tcp_eager_unlink:entry"], inside("syn L", "abort L q0", "accept L"))
    library.run("accept L")
    assert [refused for _, refused in tried] == [True] * 3


def test_error_in_a_hook(library: Library) -> None:
    """An exception in a hook leaves run(), and the event is still completed."""

    def broken(number: int, _: list[int]) -> None:
        raise LookupError(f"{number}")

    library.hook(["mib:::tcpPassiveOpens"], broken)
    with pytest.raises(LookupError):
        library.run("syn L count 2")
    assert library.totals("L")["created"] == 2
    with pytest.raises(LookupError):
        library.concurrently(["syn L"], ["ack L"], ["syn L"])
    library.hook([], None)
    library.run("syn L")


def test_memory_is_used_again(library: Library) -> None:
    """A new listener gets the memory of the listener or connection that closed last."""
    first = FIRST[library.generation]
    seen = Seen(library, f"fbt:ip:{first}:entry", "fbt:ip:tcp_eager_unlink:entry")
    library.run("syn L")
    address = seen.arguments(f"{first}:entry")[0]
    library.run("close L", "listen M zone 0 address * port 81 backlog 2", "syn M")
    assert seen.arguments(f"{first}:entry")[0] == address
    library.run("ack M", "accept M")
    eager = seen.arguments("tcp_eager_unlink:entry")[0]
    library.run("listen N zone 0 address * port 82 backlog 2", "syn N")
    listener = seen.arguments(f"{first}:entry")[0]
    assert 0 < eager - listener < 1024


def test_read(library: Library) -> None:
    """Reading missing memory raises OSError."""
    for address in (0, 8, 1 << 63, (1 << 64) - 8):
        with pytest.raises(OSError, match="nothing at"):
            library.read(address, 8)


def test_symbols() -> None:
    """Solaris 10's tunables are found by name, with their type's number."""
    with Library("solaris10") as library:
        found = library.symbols["tcp_param_arr"]
        assert found.type
        assert struct.unpack_from("<I", library.read(found.address + 2 * 24 + 8, 4)) == (1024,)
        assert library.read(library.symbols["hz"].address, 4) == (100).to_bytes(4, "little")


@pytest.mark.parametrize("generation", SOLARIS)
def test_types(generation: str) -> None:
    """All types that a D program names exist in the library."""
    names = (
        *("conn_t", "tcp_t", "mblk_t", "queue_t", "squeue_t", "kthread_t", "in6_addr_t", "ipha_t"),
        *("ip6_t", "tcph_t", "tcpha_t", "cred_t", "zone_t", "T_conn_ind", "T_conn_res"),
        *(["ip_recv_attr_t", "mod_prop_info_t"] if generation == "illumos" else ["tcpparam_t"]),
    )
    with Library(generation) as library:
        strings = library.types.split(b"\0")
        assert [name for name in names if name.encode() not in strings] == []


def test_time(library: Library) -> None:
    """Time is what the test sets, so a wait is known to the nanosecond."""
    library.run("syn L", "ack L")
    library.now += 12_345
    library.run("accept L")
    assert library.totals("L")["wait_ns"] == 12_345


def test_fresh() -> None:
    """Several libraries have separate states."""
    with Library("illumos") as one, Library("illumos") as other, Library("solaris10") as third:
        for number, library in enumerate((one, other, third), 1):
            library.run(f"listen L zone 0 address * port 80 backlog {number}")
        assert [library.totals("L")["qmax"] for library in (one, other, third)] == [1, 2, 3]
        with pytest.raises(ValueError, match="no such probe"):
            third.hook(["fbt:ip:tcp_input_listener:entry"], None)


def order(library: Library, *threads: list[str], **how: Any) -> list[tuple[int, int, str]]:
    """Return the thread, CPU and probe of each event, in order; threads are numbered from 0."""
    found: list[tuple[int, int, str]] = []

    def met(number: int, _: list[int]) -> None:
        found.append((library.thread, library.cpu, library.probes[number]))

    library.hook(library.probes, met)
    library.concurrently(*threads, **how)
    library.hook([], None)
    first = min(thread for thread, _, _ in found)
    return [(thread - first, cpu, probe) for thread, cpu, probe in found]


def test_order(library: Library) -> None:
    """Threads switch at hooks, in an order that the seed decides, and each keeps its own order."""
    scripts_of_three = [["syn L", "ack L"], ["syn L count 2"], ["accept L", "syn L"]]

    def of(seed: int) -> list[tuple[int, int, str]]:
        found = order(library, *scripts_of_three, seed=seed)
        library.run("close L", "listen L zone 0 address * port 80 backlog 2")
        return found

    orders = [of(seed) for seed in range(20)]
    assert orders == [of(seed) for seed in range(20)]
    assert len({str(found) for found in orders}) > 5
    assert all(thread == cpu for found in orders for thread, cpu, _ in found)
    entry = f"fbt:ip:{FIRST[library.generation]}:entry"
    # Only one thread at a time is in a listener's squeue.
    assert all(
        found[at + 1][2] == "mib:::tcpPassiveOpens" or found[at + 1][0] != found[at][0]
        for found in orders
        for at, (_, _, probe) in enumerate(found[:-1])
        if probe == entry
    )


def test_cpus(library: Library) -> None:
    """Threads share CPUs or move between them, as the test asks."""
    lines = [["syn L", "segment L r", "syn L"]] * 3
    assert {cpu for _, cpu, _ in order(library, *lines, cpus=[5, 5, 7])} == {5, 7}
    moved = order(library, *lines, cpus=[0, 1, 2], migrate=True)
    assert len({(thread, cpu) for thread, cpu, _ in moved}) > 3


def test_pause(library: Library) -> None:
    """A thread in a probe lets threads on other CPUs run, but none on its own CPU."""
    busy: dict[int, int] = {}
    beside = 0

    def met(_number: int, _arguments: list[int]) -> None:
        nonlocal beside
        cpu = library.cpu
        assert cpu not in busy
        busy[cpu] = library.thread
        for _ in range(5):
            library.pause()
            assert busy[cpu] == library.thread
        beside += int(len(busy) > 1)
        del busy[cpu]

    library.hook(library.probes, met)
    lines = ["listen M zone 0 address * port 81 backlog 2", "syn M", "ack M", "close M"]
    for seed in range(10):
        library.concurrently(["syn L"] * 3, lines, ["ack L"], cpus=[0, 1, 0], seed=seed)
        library.concurrently(["syn L"] * 3, lines, ["ack L"], seed=seed, migrate=True)
    assert beside > 10


def test_syn_in_flight(library: Library) -> None:
    """A SYN that waits for the squeue of a closing listener reaches a closed one.

    The listener's memory stays until that SYN is handled, and then goes to the next listener.
    """
    first = FIRST[library.generation]
    late = 0
    for seed in range(40):
        seen = Seen(library, f"fbt:ip:{first}:entry", "fbt:ip:tcp_closei_local:return")
        library.run("syn L")
        address = seen.arguments(f"{first}:entry")[0]
        library.concurrently(["syn L", "syn L"], ["close L"], ["syn L"], seed=seed)
        late += library.totals("L")["not_listening"]
        library.run("forget", "listen L zone 0 address * port 80 backlog 2", "syn L")
        assert seen.arguments(f"{first}:entry")[0] == address
        consistent(library)
    assert late > 3


def test_locks(library: Library) -> None:
    """A thread that waits for a lock lets its holder run, and all events are counted once."""
    library.hook(library.probes, lambda _number, _: None)
    library.run("q0max 0 100", "backlog L 50")
    for seed in range(10):
        library.concurrently(
            *[["syn L count 4", "ack L count 2", "accept L", "abort L q0", "abort L q"]] * 4,
            seed=seed,
        )
    consistent(library)
    totals = library.totals("L")
    assert totals["syns"] == totals["created"] == 160
    assert totals["aborts_q0"] > 10
    library.run("close L")
    assert library.eagers() == 0


def consistent(library: Library) -> None:
    """Check that a model's queues match its totals and its own counts."""
    left = 0
    for totals in library.all_totals():
        assert min(totals["saturation"] + [totals[name] for name in ("q", "q0", "waiting")]) >= 0
        there = totals["q0"] + totals["q"]
        ended = totals["accepts"] + totals["refused"] + totals["killed"]
        gone = totals["created"] - there - ended - totals["aborts_q0"] - totals["q0_evicted"]
        # On Solaris 10 a reset removes a deferred connection, unless an accept has moved it to Q.
        assert 0 <= gone <= (totals["aborts_deferred"] if library.generation != "illumos" else 0)
        assert totals["syns"] == sum(totals["saturation"]), totals
        drops = ("reclaim", "q_full", "q0_full", "limit", "alloc")
        assert totals["syns"] == totals["created"] + sum(totals[drop] for drop in drops), totals
        if not totals["closed"]:
            assert (totals["tcp_q0"], totals["tcp_q"]) == (totals["q0"], totals["q"])
            left += there
        else:
            assert not there
    assert library.eagers() == left


@pytest.mark.parametrize("generation", SOLARIS)
@pytest.mark.parametrize("threads", [1, 3])
def test_any_script(generation: str, threads: int) -> None:
    """In any script, with nested or concurrent events, totals and queues stay consistent."""

    @settings(max_examples=200, derandomize=True)
    @given(scripts(generation, threads=threads))
    def run(script: Script) -> None:
        with Library(generation) as library:
            library.hook(library.probes, lambda _number, _arguments: None)
            script.play(library)
            consistent(library)
            for totals in library.all_totals():
                if not totals["closed"]:
                    library.run(f"close {totals['name']}")
            consistent(library)
            assert not library.eagers()

    run()
