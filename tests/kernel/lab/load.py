"""Thousands of connections between two CPUs, and packets that arrive in an interrupt.

On the loopback interface, the sender itself handles a packet after sending it. With receive packet
steering another CPU handles it in an interrupt, whatever that CPU is doing, as it is with a network
interface.

Run as a program: ``serve PORT COUNT CPU`` accepts and closes, ``connect ADDRESS PORT COUNT CPU``
connects and closes, ``spin PORT CPU`` calls accept() without waiting, for connections that never
come.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def steered(interface: str, cpu: int, netns: str | None = None) -> Iterator[None]:
    """Let one CPU handle all packets that an interface receives."""
    path = f"/sys/class/net/{interface}/queues/rx-0/rps_cpus"
    write = f"echo {1 << cpu:x} >{path}"
    undo = f"echo 0 >{path}"
    # sysfs has the devices of the namespace in which it was mounted.
    inside = ("ip", "netns", "exec", netns) if netns else ()
    subprocess.run([*inside, "sh", "-c", write], check=True)
    try:
        yield
    finally:
        subprocess.run([*inside, "sh", "-c", undo], check=False)


def start(*words: object, netns: str | None = None) -> subprocess.Popen[str]:
    """Start one of this module's programs, and wait until it is ready."""
    inside = ("ip", "netns", "exec", netns) if netns else ()
    command = [*inside, sys.executable, __file__, *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process: subprocess.Popen[str], seconds: float = 250) -> int:
    """Wait for the end of a program; return the number that it prints."""
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0
    return int(out)


def segments() -> int:
    """Return how many TCP segments this network namespace has received."""
    lines = Path("/proc/net/snmp").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return int(dict(zip(names, values, strict=True))["InSegs"])


def _say(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def _serve(port: str, count: str, cpu: str) -> int:
    os.sched_setaffinity(0, {int(cpu)})
    with socket.create_server(("0.0.0.0", int(port)), backlog=4096) as server:
        _say("ready")
        for _ in range(int(count)):
            server.accept()[0].close()
    return int(count)


def _connect(address: str, port: str, count: str, cpu: str) -> int:
    os.sched_setaffinity(0, {int(cpu)})
    _say("ready")
    linger = b"\1\0\0\0\0\0\0\0"
    for number in range(int(count)):
        with socket.create_connection((address, int(port)), timeout=60) as client:
            if number % 2:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.send(b"x")
    return int(count)


def _spin(port: str, cpu: str) -> int:
    os.sched_setaffinity(0, {int(cpu)})
    with socket.create_server(("127.0.0.1", int(port))) as server:
        server.setblocking(False)
        _say("ready")
        parent = os.getppid()
        tries = 0
        while os.getppid() == parent:
            for _ in range(1000):
                try:
                    server.accept()
                except BlockingIOError:
                    tries += 1
    return tries


if __name__ == "__main__":
    programs: dict[str, Callable[..., int]] = {"serve": _serve, "connect": _connect, "spin": _spin}
    _say(programs[sys.argv[1]](*sys.argv[2:]))
