"""Owners of listeners as in ss and the cgroups, and the backlogs that listen() requested."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from lab.exporter import Exporter, StartExporter
from lab.traffic import Listen, Ports
from lab.waiting import until
from lab.witness import netns_inode

INFO = "dtrace_tcp_listen_info"
REQUESTED = "dtrace_tcp_listen_backlog_requested"
LIMIT = "dtrace_tcp_listen_q_limit"
CGROUPS = Path("/sys/fs/cgroup")
CONTAINER = "0123456789abcdef" * 4
PLACES = {
    "unit": "system.slice/web.service",
    "container": f"system.slice/docker-{CONTAINER}.scope",
    "pod": f"kubepods/burstable/pod11111111-2222-3333-4444-555555555555/{CONTAINER}",
}
NAMED = {
    "unit": ("web.service", ""),
    "container": (f"docker-{CONTAINER}.scope", CONTAINER),
    "pod": ("", CONTAINER),
}

# The server runs in a cgroup and possibly in a network namespace. Its workers hold the same socket
# as user nobody, each with a name of its own. It ends with its standard input.
_SERVER = """
import os, socket, sys
cgroup, netns, port, *workers = sys.argv[1:]
with open(f"{cgroup}/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
if netns:
    with open(f"/run/netns/{netns}") as there:
        os.setns(there.fileno(), os.CLONE_NEWNET)
listener = socket.create_server(("127.0.0.1", int(port)))
for worker in workers:
    if os.fork() == 0:
        with open("/proc/self/comm", "w") as file:
            file.write(worker)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        break
os.write(1, b"ready\\n")
sys.stdin.read()
"""

Serve = Callable[..., None]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function that starts a server with a port, a cgroup, a namespace and workers."""
    with ExitStack() as stack:

        def start(port: int, place: str, netns: str = "", workers: tuple[str, ...] = ()) -> None:
            cgroup = CGROUPS / PLACES[place]
            cgroup.mkdir(parents=True, exist_ok=True)
            words = [sys.executable, "-c", _SERVER, str(cgroup), netns, str(port), *workers]
            pipe = subprocess.PIPE
            process = stack.enter_context(
                subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True)
            )
            assert process.stdout is not None
            for _ in (None, *workers):
                assert process.stdout.readline() == "ready\n"

        yield start


def by_ss(port: int, netns: str | None = None) -> tuple[str, str]:
    """Return the programs that hold a port's listener and its cgroup, as in ss(8)."""
    inside = ("ip", "netns", "exec", netns) if netns else ()
    words = [*inside, "ss", "-Hltnp", "--cgroup", "sport", "=", f":{port}"]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    programs = {*re.findall(r'\("([^"]+)",pid=', text)}
    (cgroup,) = re.findall(r"cgroup:(\S+)", text) or [""]
    return ",".join(sorted(programs)), cgroup


def info(exporter: Exporter, port: int) -> dict[str, str]:
    """Return the labels that describe the owner of a port's listener; none if unknown."""
    found = exporter.metrics(INFO).select(INFO, port=port)
    assert len(found) <= 1
    return found[0][0] if found else {}


def held(exporter: Exporter, port: int) -> bool:
    """Tell whether a program is known that holds a port's listener."""
    return bool(info(exporter, port).get("program"))


def test_owners(exporter: StartExporter, ports: Ports, away: str, serve: Serve) -> None:
    """Unit, container and programs match ss, with several holders, users and namespaces."""
    unit, container, pod = ports(3)
    serve(unit, "unit", workers=("worker one", "worker two"))
    serve(container, "container", netns=away)
    serve(pod, "pod")
    running = exporter({"source": "sock_diag"})
    for port, place in ((unit, "unit"), (container, "container"), (pod, "pod")):
        until(partial(held, running, port), "it is known who has it open")
        labels = info(running, port)
        programs, cgroup = by_ss(port, away if place == "container" else None)
        assert labels["program"] == programs
        assert (labels["unit"], labels["container"]) == NAMED[place]
        # Inside ip-netns(8), ss does not see the cgroups.
        assert place == "container" or cgroup == f"/{PLACES[place]}"
    assert info(running, unit)["program"].split(",")[1:] == ["worker one", "worker two"]
    there = info(running, container)
    assert (there["netns"], there["netns_name"]) == (netns_inode(away), away)
    status, page = running.get("/?refresh=off")
    assert status == 200
    assert f"(container {CONTAINER[:12]})" in page
    assert f"{away} <small>{netns_inode(away)}</small>" in page


def test_requested(
    everything: Exporter, ports: Ports, away: str, serve: Serve, listen: Listen
) -> None:
    """The requested backlog is exported beside the one that somaxconn leaves, if it is known.

    With DTrace, owners are known too, also in another network namespace.
    """
    cut, kept, any_, far = ports(4)
    most = int(Path("/proc/sys/net/core/somaxconn").read_text())
    first = listen(cut, 65535)
    listen(kept, 7)
    # Python turns -1 into 0, but the kernel does not.
    assert ctypes.CDLL(None).listen(listen(any_, 1).socket.fileno(), -1) == 0
    serve(far, "container", netns=away)
    metrics = everything.settle()
    expected = {cut: (65535, most), kept: (7, 7), any_: (-1, most)}
    for port, (requested, granted) in expected.items():
        assert metrics.value(REQUESTED, port=port) == requested
        assert metrics.value(LIMIT, port=port) == granted
    first.socket.listen(9)
    metrics = everything.settle()
    assert (metrics.value(REQUESTED, port=cut), metrics.value(LIMIT, port=cut)) == (9, 9)
    first.close()
    assert everything.settle().value(REQUESTED, port=cut) is None
    try:
        until(lambda: info(everything, far).get("container"), "it is known whose it is", 150)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{everything.log()}") from None
    assert info(everything, far)["netns"] == netns_inode(away)
    assert info(everything, far)["container"] == CONTAINER
