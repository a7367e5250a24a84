"""A full accept queue, and the application that empties it."""

from __future__ import annotations

import pytest
from lab.exporter import Exporter
from lab.traffic import Clients, Listen
from lab.waiting import until
from lab.witness import CountSyns, Netstat, listen_queues

BACKLOG = 3
HELD = BACKLOG + 1
"""Linux puts one connection more than the backlog into Q."""
WAITS = "dtrace_tcp_listen_accept_wait_seconds"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_q_full(
    address: str,
    everything: Exporter,
    port: int,
    listen: Listen,
    clients: Clients,
    count_syns: CountSyns,
) -> None:
    """With a full queue, SYNs, Q, Qmax and drops are those that the kernel counts."""
    netstat, syns = Netstat(), count_syns(port)
    listen(port, BACKLOG, address)
    clients.fill(HELD, port, address)
    clients.insist(4, port, syns, address)

    metrics = everything.settle()
    here = {"port": port, "address": address, "listener": "", "netns": ""}
    (queue,) = listen_queues(port)
    assert metrics.value("dtrace_tcp_listen_syns_total", **here) == syns[port]
    assert metrics.value("dtrace_tcp_listen_q_length", **here) == queue.q == HELD
    assert metrics.value("dtrace_tcp_listen_q_limit", **here) == queue.qmax == BACKLOG
    assert metrics.value("dtrace_tcp_listen_q0_length", **here) == 0
    assert metrics.drops(**here) == {"q_full": netstat["ListenDrops"]}
    assert netstat["ListenDrops"] == queue.drops == syns[port] - HELD
    assert metrics.value("dtrace_tcp_listen_established_total", **here) == HELD
    assert metrics.value("dtrace_tcp_listen_accepts_total", **here) == 0
    # Q is 0, 1, 2 and 3 of 3 at the first SYNs, and 4 of 3 at each later one.
    ratio = "dtrace_tcp_listen_q_saturation_ratio"
    fit = dict(enumerate([1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]))
    expected = {tenths / 10: float(count) for tenths, count in fit.items()}
    assert metrics.buckets(ratio, **here) == {**expected, float("inf"): syns[port]}
    assert metrics.value(f"{ratio}_sum", **here) == pytest.approx(
        (0 + 1 + 2 + 3 + 4 * (syns[port] - HELD)) / BACKLOG
    )


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_accept(
    address: str,
    everything: Exporter,
    port: int,
    listen: Listen,
    clients: Clients,
) -> None:
    """Without another SYN, Q falls to 0, and the wait is the time from connect to accept."""
    listener = listen(port, BACKLOG, address)
    made = clients.connect(HELD, port, address)
    until(lambda: listen_queues(port)[0].q == HELD, "all are in Q")
    everything.wait("dtrace_tcp_listen_q_length", HELD, port=port)
    taken = listener.accept(HELD, every=0.4)

    metrics = everything.settle()
    assert metrics.value("dtrace_tcp_listen_q_length", port=port) == 0 == listen_queues(port)[0].q
    assert metrics.value("dtrace_tcp_listen_syns_total", port=port) == HELD
    assert metrics.value("dtrace_tcp_listen_accepts_total", port=port) == HELD
    assert metrics.value(f"{WAITS}_count", port=port) == HELD
    pairs = list(zip(made, taken, strict=True))
    least = [accept.start - connect.end for connect, accept in pairs]
    most = [accept.end - connect.start for connect, accept in pairs]
    assert min(least) > 0.4
    total = metrics.value(f"{WAITS}_sum", port=port)
    assert total is not None
    assert sum(least) <= total <= sum(most)
    buckets = metrics.buckets(WAITS, port=port)
    assert list(buckets) == [4**n / 1e9 for n in range(5, 18)] + [float("inf")]
    for bound, count in buckets.items():
        assert sum(t <= bound for t in most) <= count <= sum(t <= bound for t in least), bound


def test_many_accepts(everything: Exporter, port: int, listen: Listen, clients: Clients) -> None:
    """If the application keeps up, each connection counts as a SYN, a completion and an accept."""
    listener = listen(port, 16)
    for _ in range(100):
        clients.connect(3, port)
        listener.accept(3)
    metrics = everything.settle()
    for name in ("syns_total", "established_total", "accepts_total", "accept_wait_seconds_count"):
        assert metrics.value(f"dtrace_tcp_listen_{name}", port=port) == 300, name
    assert metrics.drops(port=port) == {}
    assert metrics.value("dtrace_tcp_listen_q_length", port=port) == 0


def test_long_wait(everything: Exporter, port: int, listen: Listen, clients: Clients) -> None:
    """A wait that is longer than 32 bits of nanoseconds is exact."""
    listener = listen(port, BACKLOG)
    (connect,) = clients.connect(1, port)
    (accept,) = listener.accept(1, every=5)
    metrics = everything.settle()
    total = metrics.value(f"{WAITS}_sum", port=port)
    assert total is not None
    assert 5 <= accept.start - connect.end <= total <= accept.end - connect.start
