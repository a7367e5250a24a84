"""Without DTrace: the kernel's own numbers of each listener, read at the scrape."""

from __future__ import annotations

from lab.exporter import StartExporter
from lab.traffic import Clients, HoldBack, Listen, Ports
from lab.waiting import until
from lab.witness import CountSyns, half_open, listen_queues


def test_values(
    exporter: StartExporter,
    ports: Ports,
    listen: Listen,
    clients: Clients,
    count_syns: CountSyns,
    held_back: HoldBack,
) -> None:
    """Q0, Q, Qmax and drops are those of ss; what the kernel does not keep is not made up."""
    full, six = ports(2)
    syns = count_syns(full)
    running = exporter({"source": "sock_diag"})
    listen(full, 2)
    listen(six, 5, "::1")
    clients.connect(3, full)
    clients.connect(4, six, "::1")
    for _ in range(2):
        held_back(six, "::1")
    clients.knock(2, full)
    until(lambda: syns[full] >= 3 + 2 * 2, "every client sends its SYN again")
    clients.give_up()
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
    assert ours == {
        "dtrace_tcp_listen_q0_length",
        "dtrace_tcp_listen_q_length",
        "dtrace_tcp_listen_q_limit",
        "dtrace_tcp_listen_drops_total",
    }
    assert running.pids() == []
