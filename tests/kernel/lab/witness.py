"""The kernel's own reports, independent of the exporter."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab.waiting import until


@dataclass(frozen=True)
class ListenQueue:
    """A listening socket, as inet_diag reports it."""

    q: int
    qmax: int
    drops: int


def listen_queues(port: int, netns: str | None = None) -> list[ListenQueue]:
    """Return the listening sockets of a port, as in ss(8)."""
    text = _in(netns, "ss", "-Hlntm", "sport", "=", f":{port}")
    # The second line of a socket has its memory: skmem:(r0,rb131072,...,d4), d for drops.
    return [
        ListenQueue(int(found[1]), int(found[2]), int(found[3]))
        for found in re.finditer(r"LISTEN\s+(\d+)\s+(\d+)[^(]*skmem:\([^)]*,d(\d+)\)", text)
    ]


def unix_queues(path: str, netns: str | None = None) -> tuple[int, int]:
    """Return Q and Qmax of the UNIX socket that listens at a path, as in ss(8)."""
    rows = [row.split() for row in _in(netns, "ss", "-xlH").splitlines()]
    ((q, qmax),) = [row[2:4] for row in rows if row[1] == "LISTEN" and row[4] == path]
    return int(q), int(qmax)


def half_open(port: int, netns: str | None = None) -> int:
    """Return how many connections to a port are in the state SYN_RECV."""
    return len(_in(netns, "ss", "-Hnt", "state", "syn-recv", "sport", "=", f":{port}").splitlines())


class Netstat:
    """Counters of /proc/net/netstat, as increments since this object was made.

    Args:
        netns: a named network namespace, None for the initial one.
    """

    def __init__(self, netns: str | None = None) -> None:
        self._netns = netns
        self._before = self._read()

    def __getitem__(self, counter: str) -> int:
        """Return the increment of a TcpExt counter, such as ``ListenDrops``."""
        return self._read()[counter] - self._before[counter]

    def _read(self) -> dict[str, int]:
        lines = _in(self._netns, "cat", "/proc/net/netstat").splitlines()
        names, values = (line.split()[1:] for line in lines if line.startswith("TcpExt:"))
        return dict(zip(names, map(int, values), strict=True))


def passive_opens(netns: str | None = None) -> int:
    """Return how many passive opens a network namespace has counted."""
    return tcp_counter("PassiveOpens", netns)


def tcp_counter(name: str, netns: str | None = None) -> int:
    """Return a network namespace's TCP counter in /proc/net/snmp."""
    text = _in(netns, "cat", "/proc/net/snmp")
    lines = [line for line in text.splitlines() if line.startswith("Tcp:")]
    names, values = (line.split() for line in lines)
    return int(dict(zip(names, values, strict=True))[name])


def round_trips(port: int) -> list[int]:
    """Return the round-trip times in us of a port's connections, as in ss(8).

    For an unused connection this is the time of the handshake. Connections whose SYN-ACK was
    retransmitted have no such time, and are left out.
    """
    rows = _in(None, "ss", "-HntiO", "state", "established", "sport", "=", f":{port}")
    found = [
        re.search(r"\brtt:([\d.]+)/", row) for row in rows.splitlines() if "retrans:" not in row
    ]
    return [round(float(each[1]) * 1000) for each in found if each]


class SynCounter:
    """Counts the SYNs to some ports, with a rule of the packet filter.

    Args:
        ports: the ports.
        netns: a named network namespace, None for the initial one.
    """

    def __init__(self, *ports: int, netns: str | None = None) -> None:
        self._netns = netns
        self._table = f"syns_{'_'.join(map(str, ports))}"[:60]
        rules = "\n".join(
            f'tcp dport {port} tcp flags & (syn | ack | rst | fin) == syn counter comment "{port}"'
            for port in ports
        )
        self._nft(
            f"table inet {self._table} {{ chain count {{"
            f" type filter hook input priority -10;\n{rules}\n }}\n }}\n"
        )

    def __getitem__(self, port: int) -> int:
        """Return how many SYNs have arrived for a port."""
        text = _in(self._netns, "nft", "-j", "list", "table", "inet", self._table)
        for entry in json.loads(text)["nftables"]:
            rule = entry.get("rule", {})
            if rule.get("comment") == str(port):
                return next(int(e["counter"]["packets"]) for e in rule["expr"] if "counter" in e)
        raise KeyError(port)

    def wait(self, port: int, count: int) -> None:
        """Wait until ``count`` SYNs have arrived for a port."""
        until(lambda: self[port] >= count, f"{count} SYNs have arrived for port {port}")
        assert self[port] == count

    def close(self) -> None:
        """Remove the rules."""
        _in(self._netns, "nft", "delete", "table", "inet", self._table)

    def _nft(self, rules: str) -> None:
        _in(self._netns, "nft", "-f", "-", stdin=rules)


CountSyns = Callable[..., SynCounter]
"""The fixture ``count_syns``: takes what SynCounter takes."""


def netns_inode(netns: str) -> str:
    """Return the inode of a named network namespace: the value of the label ``netns``."""
    return str((Path("/run/netns") / netns).stat().st_ino)


def _in(netns: str | None, *command: str, stdin: str = "") -> str:
    prefix = ("ip", "netns", "exec", netns) if netns else ()
    done = subprocess.run([*prefix, *command], input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout
