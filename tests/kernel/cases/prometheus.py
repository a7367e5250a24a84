"""Prometheus itself and promtool, on the exporter's metrics."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import partial

import pytest
from lab.exporter import Exporter
from lab.prometheus import Prometheus
from lab.traffic import Clients, Listener
from lab.waiting import until

PORT = 7000


@pytest.fixture(scope="module")
def watched() -> Iterator[Exporter]:
    """Return an exporter of one listener with some traffic, which has only a few metrics."""
    made = Exporter({"source": "dtrace", "listeners": [{"port": PORT, "name": "web"}]})
    listener, clients = Listener(PORT, 20), Clients()
    try:
        made.wait_ready()
        clients.connect(3, PORT)
        listener.accept(1)
        made.settle()
        yield made
    finally:
        clients.close()
        listener.close()
        made.stop()


def test_promtool(watched: Exporter) -> None:
    """The tool promtool finds no problem in the exporter's own metrics."""
    _, text = watched.get("/metrics")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True
    )
    complaints = (done.stdout + done.stderr).splitlines()
    assert [line for line in complaints if line.startswith("dtrace_")] == []
    assert done.returncode in (0, 3), complaints


@pytest.fixture
def server(watched: Exporter) -> Iterator[Prometheus]:
    """Return a Prometheus server that scrapes the exporter."""
    scrape = {
        "job_name": "dtrace",
        "scrape_interval": "1s",
        "static_configs": [{"targets": [f"127.0.0.1:{watched.port}"]}],
    }
    made = Prometheus({"scrape_configs": [scrape]})
    yield made
    made.stop()


def test_server(watched: Exporter, server: Prometheus) -> None:
    """A Prometheus server scrapes the exporter, and each metric can be queried with its value."""
    until(lambda: server.query('up{job="dtrace"} == 1'), "the scrape works", 90)
    ours = {name for name in watched.metrics().names() if name.startswith("dtrace_")}
    assert {"dtrace_tcp_listen_syns_total", "dtrace_session_up"} <= ours
    for name in sorted(ours):
        assert until(partial(server.query, name), f"{name} is there", 30)
    for name, value in (("syns_total", "3"), ("q_length", "2"), ("accepts_total", "1")):
        (series,) = server.query(f"dtrace_tcp_listen_{name}")
        assert series["value"][1] == value, name
        assert series["metric"]["listener"] == "web"
