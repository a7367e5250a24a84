"""UNIX sockets that listen, in two network namespaces: Q and Qmax are those of ss."""

from __future__ import annotations

import errno
from contextlib import ExitStack
from pathlib import Path

from lab.exporter import StartExporter
from lab.traffic import unix_socket
from lab.waiting import until
from lab.witness import netns_inode, unix_queues


def test_values(exporter: StartExporter, away: str, tmp_path: Path) -> None:
    """Each kind of name has what ss shows: a path, one of two namespaces, an abstract one; full."""
    path, abstract = f"{tmp_path}/a.sock", "@dtrace-exporter-case"
    running = exporter({"source": "sock_diag", "unix": {"paths": [path, "@dtrace-exporter-*"]}})
    wanted = [(path, None, 4, 2), (path, away, 0, 3), (abstract, None, 1, 1)]
    with ExitStack() as stack:
        for name, netns, backlog, clients in wanted:
            address = name.replace("@", "\0", 1)
            Path(path).unlink(missing_ok=True)
            listener = stack.enter_context(unix_socket(netns))
            listener.bind(address)
            listener.listen(backlog)
            for number in range(clients):
                client = stack.enter_context(unix_socket(netns))
                client.setblocking(False)
                full = number > backlog
                assert client.connect_ex(address) == (errno.EAGAIN if full else 0)

        def queues(name: str, netns: str | None) -> list[float | None]:
            labels = {"path": name, "netns": netns_inode(netns) if netns else ""}
            metrics = running.metrics()
            return [
                metrics.value(f"dtrace_unix_listen_{what}", **labels)
                for what in ("q_length", "q_limit", "q_capacity")
            ]

        until(lambda: queues(path, away) == [1, 0, 1], "the namespace is found")
        for name, netns, _, _ in wanted:
            q, qmax = unix_queues(name, netns)
            assert queues(name, netns) == [q, qmax, qmax + 1]
        assert queues(path, None) == [2, 4, 5]
    assert running.metrics().value("dtrace_unix_listen_left_out") == 0
    for name, netns, _, _ in wanted:
        assert queues(name, netns) == [None, None, None]
