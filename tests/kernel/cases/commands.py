"""The commands beside the service."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from lab.exporter import run
from lab.tracing import HEADER, rows_of, tracing
from lab.traffic import HERE6, Clients, Listen
from lab.waiting import until


def test_program() -> None:
    """The printed program is the one that runs: DTrace enables it as it is."""
    status, text = run("program")
    assert status == 0, text
    done = subprocess.run(
        ["dtrace", "-e", "-s", "/dev/stdin"], input=text, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


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
    assert output.read_text().startswith(HEADER)
    found = rows_of(output)
    syns = [row for row in found if row["Action"] == "syn"]
    done = [row for row in found if row["Action"] == "established"]
    assert [int(row["Source Port"]) for row in syns[:4]] == clients.source_ports
    assert [int(row["Source Port"]) for row in done] == clients.source_ports
    for some in (syns, done):
        assert [row["Source IP"] for row in some[:4]] == ["127.0.0.1"] * 2 + [HERE6, "::1"]
    assert [row["Q"] for row in syns[:5]] == ["0", "1", "2", "3", "4"]
    assert {(row["Dest Port"], row["Qmax"]) for row in found} == {(str(port), "3")}
