"""Reloads of the configuration."""

from __future__ import annotations

import signal

from lab.exporter import UP, StartExporter
from lab.traffic import Clients, Listen, Ports
from lab.waiting import until

SYNS = "dtrace_tcp_listen_syns_total"
SUCCESS = "dtrace_exporter_config_last_reload_successful"


def config(**names: str) -> dict[str, object]:
    """Return a configuration with a listener for each port_NAME."""
    listeners = [{"port": int(port[1:]), "name": name} for port, name in names.items()]
    return {"source": "dtrace", "listeners": listeners}


def test_reload(
    exporter: StartExporter,
    ports: Ports,
    listen: Listen,
    clients: Clients,
) -> None:
    """If ports are added, removed and renamed, the other sessions keep process and counters."""
    kept, renamed, removed, added = ports(4)
    for port in (kept, renamed, removed, added):
        listen(port, 20)
    running = exporter(config(**{f"p{kept}": "a", f"p{renamed}": "b", f"p{removed}": "c"}))
    for port in (kept, renamed, removed):
        clients.connect(2, port)
    before = running.settle()
    processes = set(running.pids())
    assert len(processes) == 4

    running.configure(config(**{f"p{kept}": "a", f"p{renamed}": "bb", f"p{added}": "d"}))
    assert running.reload() == 200
    running.wait(UP, 1, session=f"port-{added}", seconds=120)
    until(lambda: len(running.pids()) == 4, "the removed session has ended")
    for port in (kept, renamed, added):
        clients.connect(1, port)
    after = running.settle()
    assert len(processes & set(running.pids())) == 3
    assert after.value(SYNS, port=kept, listener="a") == 3
    assert after.value(SYNS, port=renamed, listener="bb") == 3
    assert after.value(SYNS, port=added, listener="d") == 1
    assert after.select(SYNS, port=removed) == []
    assert after.select(UP, session=f"port-{removed}") == []
    assert after.value("dtrace_session_restarts_total", session=f"port-{kept}") == 0
    assert after.value(SUCCESS) == 1
    assert before.value(SYNS, port=renamed, listener="b") == 2


def test_bad_file(
    exporter: StartExporter,
    port: int,
    listen: Listen,
    clients: Clients,
) -> None:
    """A reload of a bad file changes nothing but the metric that reports the failure."""
    listen(port, 20)
    good = config(**{f"p{port}": "a"})
    running = exporter(good)
    clients.connect(2, port)
    before = running.settle()
    processes = running.pids()

    running.configure("listeners: [{port: 0}]\n")
    assert running.reload() >= 400
    running.wait(SUCCESS, 0)
    clients.connect(1, port)
    after = running.settle()
    assert after.value(SYNS, port=port, listener="a") == 3
    assert not after.fell_since(before)
    assert running.pids() == processes
    assert "listeners[0].port" in running.log()

    running.configure(good)
    running.process.send_signal(signal.SIGHUP)
    running.wait(SUCCESS, 1)
    assert running.pids() == processes
