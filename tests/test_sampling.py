"""Accept queues are sampled between scrapes, at a steady pace, while the configuration says so."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.waiting import eventually

from dtrace_exporter import sock_diag
from dtrace_exporter.collector import Collector
from dtrace_exporter.config import load
from dtrace_exporter.inet_diag import ListeningSocket, queues
from dtrace_exporter.listeners import ListenerTable, SessionId
from dtrace_exporter.sampling import Placed, Sampler, next_beat, take
from dtrace_exporter.service import Service
from dtrace_exporter.state import State
from dtrace_exporter.watched import Watched

SESSION = SessionId("", "sock_diag")
linux = pytest.mark.skipif(sys.platform != "linux", reason="sock_diag is an interface of Linux")


def seen(*ports: int) -> ListenerTable:
    """Return a table with listeners on these ports."""
    table = ListenerTable()
    table.watch(SESSION, Watched(), replace(sock_diag.CAPABILITIES, sampled=True))
    for port in ports:
        table.listener(SESSION, "", "*", port)
    return table


def of(port: int, q: int, qmax: int = 10, cookie: int = 1, place: str = "") -> Placed:
    """Make up a socket."""
    return place, ListeningSocket("*", port, q, qmax, None, cookie)


def sampled(table: ListenerTable) -> dict[int, dict[int, int]]:
    """Return for each port how many samples are in which bucket."""
    return {
        one.identity.port: {bucket: count for bucket, count in enumerate(one.sampled) if count}
        for one in table
    }


def test_by_time() -> None:
    """Each sample counts once, in the bucket of its Q/Qmax; a Qmax of 0 counts as 1."""
    table = seen(80, 81)
    for q in (0, 1, 3, 10, 11):
        list(take(table, SESSION, [of(80, q), of(81, q, 0)]))
    assert sampled(table) == {
        80: {0: 1, 1: 1, 3: 1, 10: 1, 11: 1},
        81: {0: 1, 10: 1, 11: 3},
    }
    (first, _) = table
    assert first.sampled_sum == pytest.approx(2.5)
    state = State(table=table)
    found = {
        (sample.name, sample.labels.get("le")): sample.value
        for family in Collector(state).collect()
        if family.name == "dtrace_tcp_listen_q_sampled_ratio"
        for sample in family.samples
        if sample.labels["port"] == "80"
    }
    name = "dtrace_tcp_listen_q_sampled_ratio"
    assert found[f"{name}_count", None] == 5
    assert found[f"{name}_bucket", "0.0"] == 1
    assert found[f"{name}_bucket", "1.0"] == 4
    assert found[f"{name}_sum", None] == pytest.approx(2.5)
    assert not any(key[0].startswith("dtrace_tcp_listen_q_saturation") for key in found)


def test_fullest_socket() -> None:
    """The sample of several sockets is the fullest one, not the one with the longest queue."""
    table = seen(80)
    list(take(table, SESSION, [of(80, 9, 100, 1), of(80, 4, 5, 2), of(80, 0, 1, 3)]))
    assert sampled(table) == {80: {8: 1}}


def test_places_are_told_apart() -> None:
    """Listeners of one port in two network namespaces are sampled separately."""
    table = seen(80)
    table.listener(SESSION, "4026", "*", 80)
    list(take(table, SESSION, [of(80, 9), of(80, 2, place="4026"), of(80, 1, place="4027")]))
    assert {one.identity.place: one.sampled_sum for one in table} == {"": 0.9, "4026": 0.2}


def test_others_are_left_out() -> None:
    """A sample of a listener that is not in the table is ignored."""
    table = seen(80)
    list(take(table, SESSION, [of(81, 1), of(80, 1, place="4026")]))
    assert sampled(table) == {80: {}}
    table.unwatch(SESSION)
    list(take(table, SESSION, [of(80, 1)]))
    assert sampled(table) == {}


@given(st.floats(0, 1e6), st.floats(0.01, 10), st.floats(0, 1e3))
def test_beats(due: float, interval: float, late: float) -> None:
    """A missed beat is skipped and not caught up with; later beats keep their times."""
    after = due + late
    beat = next_beat(due, interval, after)
    assert beat >= due + interval * 0.999
    assert after - 1e-6 <= beat <= max(after, due) + interval * 1.001
    assert (beat - due) / interval == pytest.approx(round((beat - due) / interval), abs=1e-6)


class Kernel:
    """A kernel whose reads can take as long as a test wants."""

    def __init__(self) -> None:
        self.reads = 0
        self.free = threading.Event()
        self.free.set()
        self.refuses = False

    def read(self) -> Iterator[Placed]:
        """Read the sockets, one at a time."""
        self.reads += 1
        self.free.wait()
        if self.refuses:
            raise OSError("no")
        yield of(80, 5)

    def sockets(self) -> list[Placed]:
        """Read all sockets."""
        return list(self.read())


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """Return a Kernel, and let all its reads end after the test."""
    kernel = Kernel()
    yield kernel
    kernel.free.set()


async def test_on_and_off(kernel: Kernel) -> None:
    """Sampling goes on until it is switched off, and starts again when it is switched on."""
    table = seen(80)
    sampler = Sampler(table, SESSION, kernel.sockets)
    sampler.every(0)
    assert kernel.reads == 0
    sampler.every(0.01)
    await eventually(lambda: sampled(table)[80].get(5, 0) >= 3)
    sampler.every(0)
    reads = kernel.reads
    await asyncio.sleep(0.05)
    assert kernel.reads <= reads + 1
    before = sampled(table)[80][5]
    sampler.every(0.02)
    await eventually(lambda: sampled(table)[80][5] > before)
    sampler.every(0)


async def test_no_burst_after_a_pause(kernel: Kernel) -> None:
    """A read that takes many beats is one sample, and a pause of the same length follows."""
    table = seen(80)
    times: list[float] = []

    def read() -> list[Placed]:
        times.append(monotonic())
        found = kernel.sockets()
        times.append(monotonic())
        return found

    kernel.free.clear()
    sampler = Sampler(table, SESSION, read)
    sampler.every(0.01)
    await eventually(lambda: kernel.reads == 1)
    await asyncio.sleep(0.2)
    assert kernel.reads == 1
    kernel.free.set()
    await eventually(lambda: len(times) >= 4)
    sampler.every(0)
    began, ended, next_began, _ = times[:4]
    assert next_began - ended >= ended - began


async def test_refusal(kernel: Kernel) -> None:
    """If the kernel refuses a read, there is no sample; sampling goes on once it accepts."""
    table = seen(80)
    kernel.refuses = True
    sampler = Sampler(table, SESSION, kernel.sockets)
    sampler.every(0.01)
    await eventually(lambda: kernel.reads >= 3)
    assert sampled(table) == {80: {}}
    kernel.refuses = False
    await eventually(lambda: sampled(table)[80].get(5, 0) >= 1)
    sampler.every(0)


@linux
def test_what_is_read() -> None:
    """The sampler reads the address and Qmax of a real listener."""
    with socket.create_server(("127.0.0.1", 0), backlog=7) as server:
        port = server.getsockname()[1]
        with socket.create_connection(server.getsockname()):
            (found,) = (one for one in queues() if one.port == port)
            assert (found.address, found.qmax) == ("127.0.0.1", 7)


@linux
async def test_service(tmp_path: Path) -> None:
    """The configuration turns sampling on, off and to another pace; the service stops at once."""
    file = tmp_path / "c.yml"

    def configure(interval: str | int) -> None:
        server_port = {"port": port, "name": "web"}
        keys = {"source": "sock_diag", "sock_diag": {"sample_interval": interval}}
        file.write_text(json.dumps(keys | {"listeners": [server_port]}), encoding="utf-8")

    def samples() -> int | None:
        for family in Collector(one.state).collect():
            if family.name == "dtrace_tcp_listen_q_sampled_ratio":
                (found,) = (each for each in family.samples if each.name.endswith("_count"))
                return int(found.value)
        return None

    with socket.create_server(("127.0.0.1", 0), backlog=4) as server:
        port = server.getsockname()[1]
        configure(0)
        one = Service(file, load(file))
        await one.start()
        await one.state.refresh()
        assert samples() is None
        configure("10ms")
        await one.reload()
        assert samples() is not None
        await eventually(lambda: (samples() or 0) >= 3)
        configure("50ms")
        await one.reload()
        before = samples() or 0
        assert before >= 3
        await eventually(lambda: (samples() or 0) > before)
        configure(0)
        await one.reload()
        assert samples() is None
        configure("10s")
        await one.reload()
        async with asyncio.timeout(5):
            await one.stop()
    await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()})
