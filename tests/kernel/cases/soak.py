"""A long run with traffic, reloads, kills and scrapes, in which nothing grows."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from itertools import cycle
from pathlib import Path

import pytest
from lab.exporter import UP, Exporter, Metrics, StartExporter
from lab.report import SOAK_SECONDS, note
from lab.traffic import HERE4, Clients, Listen, Ports, send_syns
from lab.witness import CountSyns, Netstat

pytestmark = pytest.mark.usefixtures("foreign")
SYNS = "dtrace_tcp_listen_syns_total"
ESTABLISHED = "dtrace_tcp_listen_established_total"
ACCEPTS = "dtrace_tcp_listen_accepts_total"
BURST, CONNECTIONS = 400, 20
"""In each round: unanswered SYNs to one port, and connections to the other."""
RELOAD_SECONDS, KILL_SECONDS = 4, 20
GROWTH = 6 << 20
"""Bytes of resident memory that may vary, for the buffers of a scrape and of the allocator."""


MOST_THREADS = 8
"""The event loop's thread, and those that render scrapes: by default two processors' and one."""


class Process:
    """The resources that a process holds, followed over time.

    Args:
        pid: the process.
    """

    def __init__(self, pid: int) -> None:
        self._proc = Path(f"/proc/{pid}")
        self.resident: list[int] = []
        self.descriptors: list[int] = []
        self.threads: list[int] = []

    def look(self) -> None:
        """Record the current resources."""
        pages = (self._proc / "statm").read_text().split()[1]
        self.resident.append(int(pages) * os.sysconf("SC_PAGE_SIZE"))
        self.descriptors.append(len(list((self._proc / "fd").iterdir())))
        self.threads.append(len(list((self._proc / "task").iterdir())))

    @property
    def growth(self) -> int:
        """The growth of memory in bytes: the least of the last third minus the least of the second.

        The least of each is taken, because memory that was needed for a moment is not kept.
        """
        third = len(self.resident) // 3
        return min(self.resident[-third:]) - min(self.resident[third : 2 * third])

    def megabytes(self) -> str:
        """Return the least and the most memory after the first third."""
        later = self.resident[len(self.resident) // 3 :]
        return f"{min(later) / 1e6:.1f} to {max(later) / 1e6:.1f} MB"


class Scraper(threading.Thread):
    """Scrapes all the time, and remembers each counter that fell.

    Args:
        exporter: the exporter to scrape.
    """

    def __init__(self, exporter: Exporter) -> None:
        super().__init__()
        self._exporter = exporter
        self._over = threading.Event()
        self.scrapes = 0
        self.wrong: list[object] = []
        self.start()

    def run(self) -> None:
        """Scrape until end() is called."""
        before: Metrics | None = None
        while not self._over.wait(0.5):
            try:
                now = self._exporter.metrics()
                if before and (fell := now.fell_since(before)):
                    self.wrong.append(fell)
                before = now
            except Exception as error:
                self.wrong.append(error)
            self.scrapes += 1

    def end(self) -> None:
        """Stop scraping."""
        self._over.set()
        self.join()


def consumer(running: Exporter, session: str) -> int:
    """Return the process ID of a session, as in the log."""
    return int(re.findall(rf'msg="session up" session={session} pid=(\d+)', running.log())[-1])


def test_soak(exporter: StartExporter, ports: Ports, listen: Listen, count_syns: CountSyns) -> None:
    """Memory stays flat, no descriptor or thread is added, no counter falls, totals are exact."""
    flooded, used = ports(2)
    listen(flooded, 64, HERE4)
    server = listen(used, 64, HERE4)
    running = exporter({"source": "dtrace", "listeners": [{"port": flooded}, {"port": used}]})
    syns, netstat = count_syns(flooded, used), Netstat()
    sent = dict.fromkeys((flooded, used), 0)
    watched, kept = Process(running.process.pid), Process(consumer(running, f"port-{used}"))
    scraper = Scraper(running)
    kills = reloads = rounds = 0
    # A killed process has no output, and a stopped one no heartbeat.
    ways = cycle([signal.SIGKILL, signal.SIGSTOP])
    began = reloaded = killed = time.monotonic()
    try:
        while time.monotonic() - began < SOAK_SECONDS:
            rounds += 1
            assert send_syns(flooded, BURST, HERE4) == BURST
            sent[flooded] += BURST
            clients = Clients()
            clients.connect(CONNECTIONS, used, HERE4)
            server.accept(CONNECTIONS)
            sent[used] += CONNECTIONS
            for each in server.accepted:
                each.close()
            server.accepted.clear()
            clients.close()
            if time.monotonic() - reloaded > RELOAD_SECONDS:
                assert running.reload() == 200
                reloads += 1
                reloaded = time.monotonic()
            if time.monotonic() - killed > KILL_SECONDS:
                # A kill loses all events since the last tick, so there must be none.
                running.settle()
                os.kill(consumer(running, f"port-{flooded}"), next(ways))
                kills += 1
                running.wait(UP, 0, session=f"port-{flooded}")
                running.wait(UP, 1, session=f"port-{flooded}", seconds=120)
                killed = time.monotonic()
            watched.look()
            kept.look()
    finally:
        scraper.end()
    metrics = running.settle()
    assert not scraper.wrong, scraper.wrong[:3]
    assert [metrics.value(SYNS, port=port) for port in sent] == [*sent.values()]
    assert [syns[port] for port in sent] == [*sent.values()]
    assert metrics.value(ESTABLISHED, port=used) == sent[used]
    assert metrics.value(ACCEPTS, port=used) == sent[used]
    dropped = sum(sum(metrics.drops(port=port).values()) for port in sent)
    assert dropped == netstat["ListenDrops"]
    restarts = metrics.select("dtrace_session_restarts_total")
    assert {have["session"]: int(count) for have, count in restarts} == {
        f"port-{flooded}": kills,
        f"port-{used}": 0,
        "calls": 0,
    }
    assert len(running.pids()) == 3
    figures = (
        f"{time.monotonic() - began:.0f} s: {sum(sent.values())} SYNs exact in {rounds} rounds,"
        f" {scraper.scrapes} scrapes, {reloads} reloads, {kills} kills; resident"
        f" {watched.megabytes()}, its dtrace {kept.megabytes()}, descriptors"
        f" {min(watched.descriptors)} to {max(watched.descriptors)}, threads up to"
        f" {max(watched.threads)}"
    )
    note(f"soak of {figures}")
    assert max(watched.growth, kept.growth) < GROWTH, figures
    half = len(watched.descriptors) // 2
    assert max(watched.descriptors[half:]) <= max(watched.descriptors[:half]) + 2, figures
    assert max(watched.threads[half:]) <= MOST_THREADS, figures
