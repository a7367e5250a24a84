"""The commands beside the service."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab.exporter import COMMAND, run
from lab.traffic import HERE6, Clients, Listen
from lab.waiting import until

HEADER = "TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax"


def test_program() -> None:
    """The printed program is the one that runs: DTrace enables it as it is."""
    status, text = run("program")
    assert status == 0, text
    done = subprocess.run(
        ["dtrace", "-e", "-s", "/dev/stdin"], input=text, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@contextmanager
def tracing(port: int, directory: Path) -> Iterator[Path]:
    """Run ``trace PORT`` with its output in a file, from the moment that it traces."""
    output = directory / "trace.csv"
    with output.open("wb") as file:
        process = subprocess.Popen([*COMMAND, "trace", str(port)], stdout=file)
    try:
        until(lambda: HEADER in output.read_text(), "the header is printed", 120)
        yield output
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.usefixtures("foreign")
def test_trace(port: int, listen: Listen, clients: Clients, tmp_path: Path) -> None:
    """Each SYN is a row with the client's own address and port and the queues that it met."""
    listen(port, 3, "::")
    with tracing(port, tmp_path) as output:
        clients.fill(2, port, "127.0.0.1")
        clients.fill(1, port, HERE6)
        clients.fill(1, port, "::1")
        clients.knock(1, port, "::1")
        until(lambda: "drop:q_full" in output.read_text(), "the first drop")
        clients.give_up()
    header, *rows = output.read_text().splitlines()
    assert header == HEADER
    found = [dict(zip(HEADER.split(","), row.split(","), strict=True)) for row in rows]
    syns = [row for row in found if row["Action"] == "syn"]
    done = [row for row in found if row["Action"] == "established"]
    assert [int(row["Source Port"]) for row in syns[:4]] == clients.source_ports
    assert [int(row["Source Port"]) for row in done] == clients.source_ports
    for some in (syns, done):
        assert [row["Source IP"] for row in some[:4]] == ["127.0.0.1"] * 2 + [HERE6, "::1"]
    assert [row["Q"] for row in syns[:5]] == ["0", "1", "2", "3", "4"]
    assert {(row["Dest Port"], row["Qmax"]) for row in found} == {(str(port), "3")}
