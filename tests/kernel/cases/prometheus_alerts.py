"""The alerts of config/prometheus on a real Prometheus, exporter and kernel."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml
from lab.exporter import Exporter
from lab.prometheus import Prometheus, hasten
from lab.traffic import Clients, Listener
from lab.waiting import until
from lab.witness import Netstat, listen_queues

CONFIG = Path(__file__).resolve().parents[3] / "config/prometheus"
PORT = 6990
BACKLOG = 64
HELD = BACKLOG + 1
FASTER = 60
"""The factor by which the rules' waiting times are shortened: minutes become seconds."""
NEAR = "TcpListenQueueNearLimit"
PREDICTED = "TcpListenQueuePredictedFull"
STOPPED = "TcpListenAcceptStopped"
WAITED = "TcpListenAcceptWaitLong"


@pytest.fixture
def watched() -> Iterator[Exporter]:
    """Return an exporter of one listener."""
    made = Exporter({"source": "dtrace", "listeners": [{"port": PORT, "name": "web"}]})
    try:
        made.wait_ready()
        yield made
    finally:
        made.stop()


@pytest.fixture
def server(watched: Exporter) -> Iterator[Prometheus]:
    """Return a Prometheus with the rules of config/prometheus, sped up, for this exporter."""
    config = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (scrape,) = config["scrape_configs"]
    scrape["static_configs"] = [{"targets": [f"127.0.0.1:{watched.port}"]}]
    rules = {name: hasten((CONFIG / name).read_text(), FASTER) for name in config["rule_files"]}
    made = Prometheus(config, files=rules)
    try:
        until(lambda: made.query('up{job="dtrace"} == 1'), "the scrape works", 90)
        yield made
    finally:
        made.stop()


def alerts(server: Prometheus, state: str) -> set[str]:
    """Return the names of the listener's alerts in a state."""
    found = server.query(f'ALERTS{{port="{PORT}", alertstate="{state}"}}')
    return {series["metric"]["alertname"] for series in found}


def first_seen(server: Prometheus, query: str, since: float) -> float:
    """Return the first time at which a query had a result."""
    # The newest sample may be younger than the current second.
    series = server.query_range(query, since, time.time() + 1, 1)
    return min(at for _, samples in series for at, _ in samples)


def test_slow_fill(server: Prometheus) -> None:
    """If a queue fills slowly, alerts fire before its first drop, and then resolve."""
    begin = time.time()
    netstat, listener, clients = Netstat(), Listener(PORT, BACKLOG), Clients()
    try:
        clients.fill(BACKLOG // 2, PORT)
        while len(clients.source_ports) < 0.8 * HELD:
            clients.fill(1, PORT)
            time.sleep(0.5)
        while NEAR not in alerts(server, "firing"):
            assert len(clients.source_ports) < HELD, f"full before {NEAR} fires"
            clients.fill(1, PORT)
            length = len(clients.source_ports)
            query = f'dtrace_tcp_listen_q_length{{port="{PORT}"}} == {length}'
            until(partial(server.query, query), "Prometheus has that Q", 60)
        assert netstat["ListenDrops"] == 0
        assert {PREDICTED, NEAR, STOPPED} <= alerts(server, "firing") | alerts(server, "pending")
        until(lambda: STOPPED in alerts(server, "firing"), f"{STOPPED} fires", 60)

        clients.fill(HELD - len(clients.source_ports), PORT)
        clients.knock(1, PORT)
        dropped = f'dtrace_tcp_listen_drops_total{{port="{PORT}", reason="q_full"}} > 0'
        until(lambda: server.query(dropped), "Prometheus has the first drop", 60)
        clients.give_up()
        assert netstat["ListenDrops"] > 0
        drop = first_seen(server, dropped, begin)
        for name in (PREDICTED, NEAR):
            at = {
                state: first_seen(
                    server, f'ALERTS{{alertname="{name}", alertstate="{state}"}}', begin
                )
                for state in ("pending", "firing")
            }
            assert at["pending"] < at["firing"] < drop, name

        listener.accept(HELD)
        (queue,) = listen_queues(PORT)
        assert queue.q == 0
        until(lambda: not {NEAR, PREDICTED, STOPPED} & alerts(server, "firing"), "all resolve", 90)
        # This alert looks at the last ten minutes, in which all connections had waited.
        until(lambda: WAITED in alerts(server, "firing"), f"{WAITED} fires", 60)
    finally:
        clients.close()
        listener.close()


def test_rules() -> None:
    """The alerts pass their tests with this Prometheus too, which is newer than the hosts'."""
    done = subprocess.run(
        ["promtool", "test", "rules", "tests/alerts_test.yml"],
        cwd=CONFIG,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
