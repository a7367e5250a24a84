"""Without DTrace: the kernel's own numbers of each listener, read at each scrape."""

from __future__ import annotations

import shutil
from pathlib import Path

from lab.exporter import UP, StartExporter
from lab.traffic import Clients, HoldBack, Listen, Ports
from lab.waiting import until
from lab.witness import CountSyns, half_open, listen_queues, netns_inode


def test_values(
    exporter: StartExporter,
    ports: Ports,
    listen: Listen,
    clients: Clients,
    count_syns: CountSyns,
    held_back: HoldBack,
) -> None:
    """Q0, Q, Qmax and drops are those of ss, and what the kernel does not have is absent."""
    full, six = ports(2)
    syns = count_syns(full)
    running = exporter({"source": "sock_diag"})
    listen(full, 2)
    listen(six, 5, "::1")
    clients.connect(3, full)
    clients.connect(4, six, "::1")
    for _ in range(2):
        held_back(six, "::1")
    clients.insist(2, full, syns)
    metrics = running.metrics()
    for port, address in ((full, "127.0.0.1"), (six, "::1")):
        here = {"port": port, "address": address, "netns": ""}
        (queue,) = listen_queues(port)
        assert metrics.value("dtrace_tcp_listen_q_length", **here) == queue.q
        assert metrics.value("dtrace_tcp_listen_q0_length", **here) == half_open(port)
        assert metrics.value("dtrace_tcp_listen_q_limit", **here) == queue.qmax
        drops = metrics.value("dtrace_tcp_listen_drops_total", **here, reason="unknown")
        assert drops == queue.drops
    assert half_open(six) == 2
    ours = {name for name in metrics.names() if name.startswith("dtrace_tcp_")}
    # The owners are known some time after the sockets are opened.
    ours.discard("dtrace_tcp_listen_info")
    assert ours == {
        "dtrace_tcp_listen_q0_length",
        "dtrace_tcp_listen_q_length",
        "dtrace_tcp_listen_q_limit",
        "dtrace_tcp_listen_q_capacity",
        "dtrace_tcp_listen_drops_total",
    }
    assert running.pids() == []


def test_network_namespaces(
    exporter: StartExporter,
    port: int,
    away: str,
    listen: Listen,
    clients: Clients,
    count_syns: CountSyns,
) -> None:
    """A port in two network namespaces is two listeners, each with the numbers of ss there."""
    syns = count_syns(port, netns=away)
    running = exporter(
        {
            "source": "sock_diag",
            "listeners": [
                {"port": port, "name": "here"},
                {"port": port, "netns": away, "name": "away"},
            ],
        }
    )
    listen(port, 5)
    listen(port, 1, netns=away)
    clients.connect(3, port)
    clients.connect(2, port, netns=away)
    clients.insist(3, port, syns, netns=away)
    where = {"here": (None, ""), "away": (away, netns_inode(away))}

    def found() -> bool:
        return running.metrics().value("dtrace_tcp_listen_q_limit", port=port, listener="away") == 1

    until(found, "the namespace is found")
    metrics = running.metrics()
    for name, (netns, inode) in where.items():
        (queue,) = listen_queues(port, netns)
        labels = {"port": port, "netns": inode, "listener": name}
        assert metrics.value("dtrace_tcp_listen_q_length", **labels) == queue.q
        assert metrics.value("dtrace_tcp_listen_q_limit", **labels) == queue.qmax
        drops = metrics.value("dtrace_tcp_listen_drops_total", **labels, reason="unknown")
        assert drops == queue.drops
    assert [queue.drops > 0 for queue in listen_queues(port, away)] == [True]


def test_a_dtrace_that_comes_later(
    exporter: StartExporter,
    port: int,
    listen: Listen,
    clients: Clients,
    count_syns: CountSyns,
    tmp_path: Path,
) -> None:
    """After a reload DTrace counts if it has become available, and drops count exactly once."""
    syns = count_syns(port)
    command = tmp_path / "dtrace"
    running = exporter({"dtrace": {"command": [str(command)]}, "listeners": [{"port": port}]})
    listen(port, 1)
    clients.connect(2, port)
    clients.insist(2, port, syns)
    (queue,) = listen_queues(port)
    assert running.metrics().drops(port=port) == {"unknown": queue.drops}
    installed = shutil.which("dtrace")
    assert installed is not None
    command.symlink_to(installed)
    assert running.reload() == 200
    running.wait(UP, 1, session=f"port-{port}")
    before = syns[port]
    clients.insist(3, port, syns)
    metrics = running.settle()
    (now,) = listen_queues(port)
    assert now.drops > queue.drops > 0
    new = now.drops - queue.drops
    assert metrics.drops(port=port) == {"unknown": queue.drops, "q_full": new}
    assert metrics.value("dtrace_tcp_listen_syns_total", port=port) == syns[port] - before
    assert metrics.value("dtrace_tcp_listen_q_length", port=port) == now.q
    log = running.log()
    assert [log.count(f"source={name}") for name in ("sock_diag", "dtrace")] == [1, 1]
