"""The programs run by hand, as an administrator does, straight from the package."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path

from lab.traffic import Clients, Listen
from lab.waiting import until
from lab.witness import Netstat

import dtrace_exporter

PROGRAMS = Path(dtrace_exporter.__file__).parent / "programs"


def comparable(lines: list[str]) -> list[str]:
    """Return rows without what differs between runs."""
    found = []
    for line in lines:
        row = re.sub(r"^(\w+) [0-9a-f]{16}\b", r"\1 ID", line.strip())
        row = re.sub(r"^(listener \w+) \d+", r"\1 TIME", row)
        row = re.sub(r"^(tick|set) \d+", r"\1 TIME", row)
        row = re.sub(r"^(count ID (?:31|40) 0) \d+ \d+$", r"\1 POWER US+EVENTS", row)
        found.append(re.sub(r"^(q.*) \d+(\d{7})$", r"\1 NS\2", row))
    return found


def test_page_tables() -> None:
    """One of the kernels has five levels of page tables; the programs run on both kinds."""
    known = Path("/proc/cpuinfo").read_text().split()
    assert ("la57" in known) == os.uname().release.startswith("6.1.")


def test_linux(listen: Listen, clients: Clients) -> None:
    """linux.d prints the rows that its head shows, except for times and addresses."""
    text = (PROGRAMS / "linux.d").read_text()
    head = re.findall(r"^ \*   (\S.*)$", text, re.MULTILINE)
    assert {row.split()[0] for row in head} >= {
        "ready",
        "listener",
        "tick",
        "set",
        "count",
        "q",
        "q0",
    }
    netstat = Netstat()
    process = subprocess.Popen(
        ["dtrace", "-s", PROGRAMS / "linux.d"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    found: list[str] = []
    while not any(line.startswith("ready") for line in found):
        found = [line for line in [process.stdout.readline().strip()] if line]
    # The steps that the head describes.
    listener = listen(7001, 3)
    clients.fill(4, 7001)
    with socket.socket() as late:
        late.setblocking(False)
        late.connect_ex(("127.0.0.1", 7001))
        until(lambda: netstat["ListenDrops"] == 1, "the fifth one is dropped")
    listener.accept(2)
    while not any(line.startswith("count") and line.split()[2] == "40" for line in found):
        # Counts from before the last accept are printed again in the same or the next tick.
        found = [line for line in found if not line.startswith(("count", "q"))]
        found += until_tick(process)
    found += until_tick(process)
    process.terminate()
    process.communicate()
    expected, told = comparable(head), comparable(found)
    assert told[:2] == expected[:2]
    assert {*expected} <= {*told}


def until_tick(process: subprocess.Popen[str]) -> list[str]:
    """Return what a program prints until the last row of its next heartbeat."""
    assert process.stdout is not None
    found: list[str] = []
    while sum(line.startswith("set") for line in found) < 2:
        if line := process.stdout.readline().strip():
            found.append(line)
    return found
