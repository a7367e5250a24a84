"""The verdicts of config/prometheus on a real Prometheus, a real kernel and four applications."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from lab.exporter import Exporter
from lab.prometheus import Prometheus, hasten, shorten
from lab.report import SOAK_SECONDS
from lab.traffic import Clients, Ports
from lab.waiting import until

CONFIG = Path(__file__).resolve().parents[3] / "config/prometheus"
FASTER = 1 if SOAK_SECONDS >= 900 else 20
"""Ten minutes take half a minute, or ten minutes under make soak; waits keep their length."""
VERDICT = "listener:dtrace_tcp_listen_q:verdict10m"
ENOUGH, BACKLOG, APPLICATION = "enough", "backlog_too_small", "application_too_slow"

APPLICATION_TEXT = """
import socket, sys, time
port, backlog, several, pause = map(float, sys.argv[1:])
listener = socket.create_server(("127.0.0.1", int(port)), backlog=int(backlog))
listener.setblocking(False)
print("ready", flush=True)
while True:
    time.sleep(pause)
    try:
        while True:
            listener.accept()[0].close()
            if not several:
                break
    except BlockingIOError:
        pass
"""
"""It accepts one connection, or all that wait, at a fixed pace."""


@pytest.fixture
def application() -> Iterator[Callable[..., None]]:
    """Return a function that runs an application: port, backlog, whether it takes all, and pace."""
    with ExitStack() as stack:

        def start(port: int, backlog: int, several: bool, pause: float) -> None:
            words = [sys.executable, "-c", APPLICATION_TEXT, port, backlog, int(several), pause]
            process = subprocess.Popen(
                [str(word) for word in words], stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"

        yield start


def server_of(watched: Exporter) -> Prometheus:
    """Return a Prometheus with the rules of config/prometheus, sped up, for this exporter."""
    config = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
    if FASTER > 1:
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (scrape,) = config["scrape_configs"]
    scrape["static_configs"] = [{"targets": [f"127.0.0.1:{watched.port}"]}]
    rules = {
        name: shorten(hasten((CONFIG / name).read_text(), FASTER), FASTER)
        for name in config["rule_files"]
    }
    return Prometheus(config, files=rules)


def test_verdicts(application: Callable[..., None], ports: Ports) -> None:
    """A quick application, a short queue with bursts and a slow application get their verdicts."""
    quick, bursts, slow, idle = own = ports(4)
    application(quick, 128, True, 0.05)
    application(bursts, 16, True, 0.05)
    application(slow, 8, False, 0.5)
    application(idle, 128, True, 0.05)
    expected = {str(quick): ENOUGH, str(bursts): BACKLOG, str(slow): APPLICATION}
    with ExitStack() as stack:
        watched = Exporter({"source": "dtrace", "listeners": [{"port": port} for port in own]})
        stack.callback(watched.stop)
        watched.wait_ready()
        server = server_of(watched)
        stack.callback(server.stop)
        begin = time.time()
        visitors, crowd, pile = Clients(), Clients(), Clients()
        for clients in (visitors, crowd, pile):
            stack.callback(clients.close)
        rounds = 0

        def judged() -> bool:
            nonlocal rounds
            visitors.connect(1, quick)
            visitors.close()
            # The burst before was partly refused and retried after a second. One minute of the
            # rules has one such burst.
            if rounds % (320 // FASTER) == 0:
                crowd.give_up()
                crowd.knock(24, bursts)
            # Connections that clients give up stay in Q until the application accepts them.
            if rounds % 80 == 0:
                pile.give_up()
            if rounds % 4 == 0:
                pile.knock(4, slow)
            rounds += 1
            found = server.query(VERDICT)
            return {one["metric"]["port"]: one["metric"]["verdict"] for one in found} == expected

        until(judged, f"{VERDICT} is {expected}", 300 + 1200 / FASTER, every=0.2)
        # There was no other verdict at any time. The range must end after the newest verdict.
        ever = server.query_range(VERDICT, begin, time.time() + 1, 1)
        assert {(labels["port"], labels["verdict"]) for labels, _ in ever} == {*expected.items()}
        metrics = watched.settle()
        refused = {port: sum(metrics.drops(port=port).values()) for port in own}
    assert refused[quick] == refused[idle] == 0
    assert refused[bursts] > 5
    assert refused[slow] > 5
