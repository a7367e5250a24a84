"""The commands besides the service."""

from __future__ import annotations

import csv
import socket
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from lab.compiling import compiled
from lab.exporter import Exporter, run
from lab.tracing import HEADER, rows_of, tracing
from lab.traffic import HERE4, HERE6, SYNLOAD, Clients, Listen
from lab.waiting import until
from lab.witness import CountSyns, Netstat, listen_queues


def test_program() -> None:
    """DTrace enables the printed program as it is."""
    status, text = run("program")
    assert status == 0, text
    assert compiled(text) == (0, "")


def test_top(everything: Exporter, port: int, listen: Listen, clients: Clients) -> None:
    """Without a terminal, top prints CSV of a service or of its own, equal to ss(8)."""
    listen(port, 5)
    clients.fill(3, port)
    everything.settle()
    (queue,) = listen_queues(port)
    for words, config in (
        ([f"--url=http://127.0.0.1:{everything.port}"], None),
        ([], {"source": "sock_diag"}),
        ([], {"source": "dtrace", "listeners": [{"port": port}]}),
    ):
        status, text = run("top", *words, config=config)
        assert status == 0, text
        (row,) = (row for row in csv.DictReader(text.splitlines()) if row["port"] == str(port))
        if config is None:
            assert [row[f"{what}_total"] for what in ("syns", "established", "accepts")] == [
                *("3", "3", "0")
            ]
        if config is None or "listeners" not in config:
            found = row["address"], row["q_length"], row["q_limit"], row["drops_total"]
            assert found == ("127.0.0.1", str(queue.q), str(queue.qmax), "0")
        else:
            # Its session is younger than all events of that port.
            assert (row["syns_total"], row["q_length"]) == ("0", "")


def sent(output: Path, column: str) -> Counter[str]:
    """Return the sums of a column in the output of ``trace --top`` so far, by sender."""
    found = Counter[str]()
    for row in rows_of(output):
        # The last line may be incomplete.
        if row["other"]:
            found[row["Source"]] += int(row[column])
    return found


@pytest.mark.usefixtures("foreign")
def test_trace_top(
    port: int, listen: Listen, clients: Clients, count_syns: CountSyns, tmp_path: Path
) -> None:
    """Each sender has as many SYNs and drops as it sent, and no SYN of a crowd is lost."""
    listen(port, 3, "::")
    syns, netstat = count_syns(port), Netstat()
    loads = {(HERE4, 0): 300, (HERE4, 300_000): 500, (HERE6, 60_000): 700}
    crowd = [f"127.1.{at // 250}.{at % 250 + 1}" for at in range(4000)]
    top = ("--top",)
    with (
        tracing(port, tmp_path, None, *top, header="Date,Source") as output,
        tracing(port, tmp_path, None, *top, "--networks", header="Date,Source") as networks,
    ):
        clients.fill(4, port)
        for (address, first), count in loads.items():
            words = [SYNLOAD, address, port, first, count]
            subprocess.run([str(word) for word in words], check=True, capture_output=True)
        for address in crowd:
            # Q is full: the SYN is dropped, and the client does not wait to send it again.
            with socket.socket() as client:
                client.bind((address, 0))
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", port))

        def all_counted() -> bool:
            return all(sent(each, "SYNs").total() == syns[port] for each in (output, networks))

        until(all_counted, "both have every SYN")
    assert syns[port] == 4 + sum(loads.values()) + len(crowd)
    found, dropped = sent(output, "SYNs"), sent(output, "q_full")
    few = {"198.18.0.1": 300, "198.18.0.6": 500, "2001:db8::1:0:1": 700}
    assert {sender: found[sender] for sender in (*few, "127.0.0.1")} == {**few, "127.0.0.1": 4}
    assert {sender: dropped[sender] for sender in few} == few
    assert "127.0.0.1" not in +dropped
    single = {sender: count for sender, count in found.items() if sender.startswith("127.1.")}
    assert {*single.values()} == {1}
    assert len(single) + found["others"] == len(crowd)
    # A slow machine needs several turns, of 1,024 senders each.
    assert found["others"]
    assert dropped.total() == syns[port] - 4 == netstat["ListenDrops"]

    found = sent(networks, "SYNs")
    assert found["2001:db8::/48"] == 700
    assert found == {
        "127.0.0.0/24": 4,
        "198.18.0.0/24": 800,
        "2001:db8::/48": 700,
        **Counter(f"{address.rpartition('.')[0]}.0/24" for address in crowd),
    }
    assert sent(networks, "q_full").total() == netstat["ListenDrops"]


@pytest.mark.usefixtures("foreign")
def test_trace(port: int, listen: Listen, clients: Clients, tmp_path: Path) -> None:
    """Each SYN is a row with the client's address and port and the lengths of the queues."""
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
