"""A PREEMPT_RT kernel, whose softirqs can be interrupted: counts may lack, and this is shown."""

from __future__ import annotations

from lab.exporter import StartExporter, run
from lab.traffic import Clients, Listen

CONNECTIONS = 20


def test_said(exporter: StartExporter, port: int, listen: Listen, clients: Clients) -> None:
    """The program runs on PREEMPT_RT, and the feature exact is 0."""
    running = exporter({"source": "dtrace", "listeners": [{"port": port}]})
    feature = "dtrace_session_feature_enabled"
    assert running.value(feature, session=f"port-{port}", feature="exact") == 0
    listener = listen(port, CONNECTIONS)
    clients.connect(CONNECTIONS, port)
    listener.accept(CONNECTIONS)
    metrics = running.settle()
    for name in ("syns", "established", "accepts"):
        counted = metrics.value(f"dtrace_tcp_listen_{name}_total", port=port)
        assert counted is not None
        assert 0 < counted <= CONNECTIONS


def test_check(port: int) -> None:
    """The check command shows that counters may miss events, with the reason."""
    status, said = run("check", config={"source": "dtrace", "listeners": [{"port": port}]})
    assert status == 0
    (line,) = (line for line in said.splitlines() if "exact" in line.split()[1:2])
    assert line.startswith("no ")
    assert "PREEMPT_RT" in line
    assert "under load the counters may miss" in said
