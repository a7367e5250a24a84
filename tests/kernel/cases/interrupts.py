"""Packets that arrive by interrupts, as from a network interface, lose no counts."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from lab import bpf
from lab.exporter import Exporter, StartExporter
from lab.load import finish, segments, start, steered
from lab.traffic import (
    HERE4,
    Clients,
    HoldBack,
    Listen,
    network_namespace,
    send_syns,
    sysctl,
)
from lab.waiting import until
from lab.witness import CountSyns, Netstat, half_open, passive_opens

from dtrace_exporter.tracing import program

CONNECTIONS = 16_000
PACKETS = 100_000


def totals(exporter: Exporter, port: int) -> dict[str, float | None]:
    """Return the counters of a port's connections once all rows have come."""
    metrics = exporter.settle()
    names = ("syns_total", "established_total", "accepts_total", "accept_wait_seconds_count")
    return {name: metrics.value(f"dtrace_tcp_listen_{name}", port=port) for name in names}


def test_steered_connections(everything: Exporter, port: int, count_syns: CountSyns) -> None:
    """With client and server on two CPUs and packets by interrupts, all is counted."""
    syns, before = count_syns(port), segments()
    with steered("lo", 0):
        server = start("serve", port, CONNECTIONS, 0)
        client = start("connect", "127.0.0.1", port, CONNECTIONS, 1)
        assert finish(client) == finish(server) == CONNECTIONS
    assert segments() - before > PACKETS
    assert totals(everything, port) == {
        "syns_total": syns[port],
        "established_total": CONNECTIONS,
        "accepts_total": CONNECTIONS,
        "accept_wait_seconds_count": CONNECTIONS,
    }
    assert syns[port] >= CONNECTIONS


def test_steered_between_namespaces(everything: Exporter, port: int) -> None:
    """Connections between two network namespaces over virtual interfaces are counted too."""
    with network_namespace("near") as near, network_namespace("far") as far:
        for words in (
            f"link add near0 netns {near} type veth peer name far0 netns {far}",
            f"-n {near} address add 10.99.0.1/24 dev near0",
            f"-n {far} address add 10.99.0.2/24 dev far0",
            f"-n {near} link set near0 up",
            f"-n {far} link set far0 up",
        ):
            subprocess.run(["ip", *words.split()], check=True)
        with steered("near0", 0, near):
            server = start("serve", port, CONNECTIONS, 0, netns=near)
            client = start("connect", "10.99.0.1", port, CONNECTIONS, 1, netns=far)
            assert finish(client) == finish(server) == CONNECTIONS
        opens = passive_opens(near)
        counted = totals(everything, port)
    assert counted["established_total"] == counted["accepts_total"] == opens == CONNECTIONS
    assert (counted["syns_total"] or 0) >= CONNECTIONS


@contextmanager
def on_cpu(cpu: int) -> Iterator[None]:
    """Run on one CPU, and so do all processes that are started meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("foreign")
def test_flood_of_an_accepting_cpu(
    everything: Exporter, port: int, listen: Listen, count_syns: CountSyns, ports: object
) -> None:
    """A flood on a CPU that calls accept() all the time loses no SYN and no drop.

    By the kernel's own count, the programs at the entry and at the return of tcp_conn_request()
    ran as often as there were SYNs.
    """
    netstat, syns = Netstat(), count_syns(port)
    listen(port, 64, HERE4)
    (other,) = ports(1)  # type: ignore[operator]
    spinning = start("spin", other, 0)
    try:
        with bpf.statistics():
            before = bpf.programs()
            with steered("lo", 0), steered("nowhere", 0), sysctl("net.ipv4.tcp_syncookies", 0):
                with on_cpu(1):
                    assert send_syns(port, PACKETS) == PACKETS
                syns.wait(port, PACKETS)
            after = bpf.programs()
    finally:
        spinning.kill()
        spinning.wait()
    called = [after[one].runs - before[one].runs for one in after.keys() & before.keys()]
    metrics = everything.settle()
    assert metrics.value("dtrace_tcp_listen_syns_total", port=port) == PACKETS
    assert called.count(PACKETS) >= 2, called
    assert sum(metrics.drops(port=port).values()) == netstat["ListenDrops"] > PACKETS / 2


def test_full_queue_beside_an_accepting_process(
    everything: Exporter, port: int, listen: Listen, clients: Clients, ports: object
) -> None:
    """150 clients at a full listener are counted while accept() spins on another port."""
    netstat = Netstat()
    (other,) = ports(1)  # type: ignore[operator]
    spinning = start("spin", other, 0)
    try:
        with steered("lo", 0):
            listen(port, 4)
            clients.fill(5, port)
            clients.knock(150, port)
            until(lambda: netstat["ListenDrops"] >= 450, "every client knocks again", 120)
            clients.give_up()
    finally:
        spinning.kill()
        spinning.wait()
    metrics = everything.settle()
    assert metrics.drops(port=port) == {"q_full": netstat["ListenDrops"]}


def test_blocked_in_accept(
    exporter: StartExporter, port: int, listen: Listen, clients: Clients
) -> None:
    """Accepts of threads that waited in accept() before the session started are counted."""
    listener = listen(port, 16)
    listener.socket.settimeout(None)
    taken: list[socket.socket] = []
    threads = [
        threading.Thread(target=lambda: taken.append(listener.socket.accept()[0]), daemon=True)
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    running = exporter({"source": "dtrace", "listeners": [{"port": port}]})
    clients.connect(3, port)
    for thread in threads:
        thread.join(30)
    assert len(taken) == 3
    counted = totals(running, port)
    assert counted == dict.fromkeys(counted, 3)
    assert running.value("dtrace_tcp_listen_q_length", port=port) == 0
    for one in taken:
        one.close()


@contextmanager
def probing(probes: list[str]) -> Iterator[dict[str, set[bool]]]:
    """Record for each probe whether softirqs are off when it fires."""
    symbol = re.search(
        r"(?m)^([0-9a-f]+) A (pcpu_hot|__preempt_count)$", Path("/proc/kallsyms").read_text()
    )
    assert symbol is not None
    # In struct pcpu_hot the count follows a pointer; SOFTIRQ_MASK is in linux/preempt.h.
    offset = int(symbol[1], 16) + (8 if symbol[2] == "pcpu_hot" else 0)
    text = "#pragma D option quiet\nthis int count, key;\nthis uint64_t here;\n"
    text += 'BEGIN { printf("ready\\n"); }\n'
    for number, probe in enumerate(probes):
        text += (
            f"fbt::{probe} {{ this->here = *((uint64_t *)&`__per_cpu_offset + cpu);"
            f" this->count = *(int *)(this->here + {offset:#x}) & 0xff00;"
            f" this->key = this->count ? {2 * number + 1} : {2 * number};"
            " @[this->key] = count(); }\n"
        )
    text += 'END { printa("fired %d %@d\\n", @); }\n'
    process = subprocess.Popen(
        ["dtrace", "-s", "/dev/stdin"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(text)
    process.stdin.close()
    said = []
    while (line := process.stdout.readline()) and line != "ready\n":
        said.append(line)
    assert line, "".join(said)[-2000:]
    found: dict[str, set[bool]] = {probe: set() for probe in probes}
    yield found
    process.terminate()
    for fired in re.finditer(r"^fired (\d+) \d+$", process.stdout.read(), re.MULTILINE):
        number, off = divmod(int(fired[1]), 2)
        found[probes[number]].add(off == 1)
    process.wait(60)


@pytest.mark.usefixtures("foreign")
def test_contexts(port: int, listen: Listen, held_back: HoldBack, clients: Clients) -> None:
    """Each probe of linux.d fires in this traffic, and only while softirqs are off."""
    text = program.load("linux").text.replace("tcp_v*", "tcp_v4") + program.load(
        "linux"
    ).text.replace("tcp_v*", "tcp_v6")
    probes = [probe for each, _ in program.clauses(text) for probe in each]
    with ExitStack() as stack:
        found = stack.enter_context(probing([*dict.fromkeys(probes)]))
        for name, value in (("tcp_fastopen", 3), ("tcp_synack_retries", 1)):
            stack.enter_context(sysctl(f"net.ipv4.{name}", value))
        for address, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
            opened = listen(port, 4, address, fast_open=True)
            clients.connect(2, port, address)
            for _ in range(2):
                with socket.socket(family) as client:
                    client.sendto(b"x", socket.MSG_FASTOPEN, opened.socket.getsockname()[:2])
                opened.accept(1)
            opened.accept(2)
            with sysctl("net.ipv4.tcp_syncookies", 2):
                clients.connect(1, port, address)
            # Closing the listener gives up what is in Q.
            opened.close()
        opened = listen(port, 1, HERE4)
        send_syns(port, 2)
        until(lambda: half_open(port) == 0, "the timers give them up")
        held = held_back(port, HERE4)
        held.close()
        subprocess.run(["ss", "-K", "-lnt", "sport", "=", f":{port}"], capture_output=True)
    assert {probe for probe, off in found.items() if off != {True}} == set()
