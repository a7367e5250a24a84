"""Listeners and clients, well-behaved and otherwise."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from lab.waiting import until
from lab.witness import SynCounter, listen_queues

SYNLOAD = "/opt/dtrace-exporter/synload"
HERE4 = "192.0.2.1"
HERE6 = "2001:db8:ffff::1"
"""Addresses of this machine that packets with a foreign source reach; see ``nowhere``."""

_numbers = itertools.count(step=100_000)


class Span(NamedTuple):
    """Two readings of time.monotonic(), before and after something."""

    start: float
    end: float


class Listener:
    """A listening socket whose application does nothing by itself.

    Args:
        port: the port.
        backlog: as for listen(2).
        address: the address to bind, which decides the family; ``::`` accepts IPv4 as well.
        reuseport: whether it shares the port with others that do the same.
        v6only: whether it accepts IPv6 only.
        netns: a named network namespace, None for the initial one.
        fast_open: whether it accepts TCP Fast Open.
    """

    def __init__(
        self,
        port: int,
        backlog: int,
        address: str = "127.0.0.1",
        *,
        reuseport: bool = False,
        v6only: bool = False,
        netns: str | None = None,
        fast_open: bool = False,
    ) -> None:
        self.port = port
        self.accepted: list[socket.socket] = []
        self.socket = _socket(address, netns)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuseport:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if self.socket.family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6only))
        self.socket.bind((address, port))
        if fast_open:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
        self.socket.listen(backlog)
        self.socket.settimeout(10)

    def accept(self, count: int, every: float = 0.0) -> list[Span]:
        """Accept connections at a pace; return the time that each accept took.

        Args:
            count: how many.
            every: seconds to wait before each.
        """
        times = []
        for _ in range(count):
            time.sleep(every)
            before = time.monotonic()
            self.accepted.append(self.socket.accept()[0])
            times.append(Span(before, time.monotonic()))
        return times

    def close(self) -> None:
        """Close it and the connections that it has accepted."""
        for each in (self.socket, *self.accepted):
            each.close()


Listen = Callable[..., Listener]
"""The fixture ``listen``: takes what Listener takes."""
Ports = Callable[[int], list[int]]
"""The fixture ``ports``."""


class Clients:
    """Makes connections that are not used for data."""

    def __init__(self) -> None:
        self._connected: list[socket.socket] = []
        self._knocking: list[socket.socket] = []

    def connect(
        self, count: int, port: int, address: str = "127.0.0.1", netns: str | None = None
    ) -> list[Span]:
        """Make connections one by one; return the time that each took."""
        times = []
        for _ in range(count):
            client = _socket(address, netns)
            self._connected.append(client)
            client.settimeout(10)
            before = time.monotonic()
            client.connect((address, port))
            times.append(Span(before, time.monotonic()))
        return times

    def fill(self, count: int, port: int, address: str = "127.0.0.1") -> None:
        """Make connections, each after the previous one is in Q; no accept() may run meanwhile."""

        def in_q() -> int:
            return sum(queue.q for queue in listen_queues(port))

        def arrived(number: int) -> bool:
            return in_q() == before + number

        before = in_q()
        for number in range(1, count + 1):
            self.connect(1, port, address)
            until(partial(arrived, number), "Q")

    def knock(
        self, count: int, port: int, address: str = "127.0.0.1", netns: str | None = None
    ) -> None:
        """Start to connect without waiting; the kernel sends a SYN now and more of them later."""
        for _ in range(count):
            client = _socket(address, netns)
            self._knocking.append(client)
            client.setblocking(False)
            client.connect_ex((address, port))

    @property
    def source_ports(self) -> list[int]:
        """The local ports of the connected clients."""
        return [client.getsockname()[1] for client in self._connected]

    def give_up(self) -> None:
        """End all attempts to connect, so that they send no more SYNs."""
        for client in self._knocking:
            client.close()
        self._knocking.clear()

    def insist(
        self,
        count: int,
        port: int,
        syns: SynCounter,
        address: str = "127.0.0.1",
        netns: str | None = None,
    ) -> None:
        """Try to connect until the counter has each client's SYN twice, and then give up."""
        before = syns[port]
        self.knock(count, port, address, netns)
        until(lambda: syns[port] >= before + 2 * count, "every client sends its SYN again")
        self.give_up()

    def close(self) -> None:
        """End all connections and attempts."""
        self.give_up()
        for client in self._connected:
            client.close()
        self._connected.clear()


class HeldBack:
    """A client that got a SYN-ACK but whose final ACK does not arrive.

    The client is connected, and on the server the connection is half open. ``release`` lets the
    client's segments through again and sends one.

    Args:
        port: the listener's port.
        address: the listener's address.
    """

    def __init__(self, port: int, address: str = "127.0.0.1") -> None:
        self.socket = _socket(address)
        self.socket.bind((address, 0))
        self.socket.settimeout(10)
        source = self.socket.getsockname()[1]
        self._table = f"held_{source}"
        _nft(
            f"table inet {self._table} {{ chain hold {{ type filter hook input priority 0;\n"
            f"tcp sport {source} tcp dport {port} tcp flags & (syn | ack) == ack drop\n }}\n }}\n"
        )
        self._held = True
        self.socket.connect((address, port))

    def release(self) -> None:
        """Let the client's segments through, and send one."""
        self._free()
        self.socket.send(b"x")

    def close(self) -> None:
        """End the connection with a reset, so that nothing is left on either side."""
        if self.socket.fileno() < 0:
            return
        self._free()
        linger = b"\1\0\0\0\0\0\0\0"
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.socket.close()

    def _free(self) -> None:
        if self._held:
            _nft(f"delete table inet {self._table}")
            self._held = False


HoldBack = Callable[..., HeldBack]
"""The fixture ``held_back``: takes what HeldBack takes."""


def send_syns(port: int, count: int, address: str = HERE4) -> int:
    """Send SYNs as fast as possible, without final ACKs; return how many were sent."""
    process = start_syns(port, count, address)
    sent, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    return int(sent)


def start_syns(port: int, count: int, address: str = HERE4) -> subprocess.Popen[str]:
    """Start a process that sends SYNs as ``send_syns`` does, and prints how many were sent."""
    words = [SYNLOAD, address, port, next(_numbers), count]
    return subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, text=True)


@contextmanager
def nowhere() -> Iterator[None]:
    """Set up addresses for SYNs, and a route to nowhere for the answers.

    Over the loopback interface the answers would reach this machine's own stack. It would send
    resets, which end the half-open connections.
    """
    ip("link", "add", "nowhere", "type", "dummy")
    try:
        ip("link", "set", "nowhere", "up")
        ip("address", "add", f"{HERE4}/32", "dev", "nowhere")
        ip("-6", "address", "add", f"{HERE6}/128", "dev", "nowhere", "nodad")
        ip("route", "add", "198.18.0.0/15", "dev", "nowhere")
        ip("-6", "route", "add", "2001:db8::/48", "dev", "nowhere")
        # However late the machine handles the packets, none may be lost before TCP.
        with sysctl("net.core.netdev_max_backlog", 1_000_000):
            yield
    finally:
        ip("link", "delete", "nowhere")


@contextmanager
def network_namespace(name: str) -> Iterator[str]:
    """Make a named network namespace with its loopback interface up; yields the name."""
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        ip("netns", "delete", name)


@contextmanager
def sysctl(name: str, value: object) -> Iterator[None]:
    """Set a kernel parameter such as ``net.ipv4.tcp_syncookies``, and restore it at the end."""
    path = Path("/proc/sys") / name.replace(".", "/")
    before = path.read_text()
    path.write_text(str(value))
    try:
        yield
    finally:
        path.write_text(before)


def unix_socket(netns: str | None = None, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Return a UNIX socket of a network namespace."""
    with _inside(netns):
        return socket.socket(socket.AF_UNIX, kind)


def _socket(address: str, netns: str | None = None) -> socket.socket:
    family = socket.AF_INET if ip_address(address).version == 4 else socket.AF_INET6
    with _inside(netns):
        return socket.socket(family, socket.SOCK_STREAM)


@contextmanager
def _inside(netns: str | None) -> Iterator[None]:
    """Let only this thread enter a network namespace; sockets stay where they were created."""
    if netns is None:
        yield
        return
    if sys.version_info < (3, 12):
        raise NotImplementedError("os.setns")
    with (
        Path("/proc/thread-self/ns/net").open() as home,
        Path(f"/run/netns/{netns}").open() as away,
    ):
        os.setns(away.fileno(), os.CLONE_NEWNET)
        try:
            yield
        finally:
            os.setns(home.fileno(), os.CLONE_NEWNET)


def ip(*words: str) -> None:
    """Run the command ip."""
    subprocess.run(["ip", *words], check=True)


def _nft(rules: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
