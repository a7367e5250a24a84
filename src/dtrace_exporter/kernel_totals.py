"""Reads the kernel's own totals over all listeners of a network namespace."""

from __future__ import annotations

import os
from pathlib import Path

KINDS = {"drops": ("TcpExt", "ListenDrops"), "established": ("Tcp", "PassiveOpens")}
"""What is counted, and the kernel's counter for it: include/uapi/linux/snmp.h."""

SNMP, NETSTAT = Path("/proc/self/net/snmp"), Path("/proc/self/net/netstat")
"""The files with the counters of this process's network namespace."""

_MOST = 1 << 16


def read() -> dict[str, int]:
    """Read the kernel's totals of this process's network namespace, by kind.

    Raises:
        OSError: they cannot be read.
    """
    text = SNMP.read_bytes() + NETSTAT.read_bytes()
    return {kind: _find(text, kind) for kind in KINDS}


def dropped(netstat: int | None = None) -> int:
    """Read how many connections all listeners of a network namespace have dropped.

    Args:
        netstat: a descriptor of /proc/net/netstat that was opened in the namespace; without one it
            is that of this process.

    Raises:
        OSError: there is no such number.
    """
    text = NETSTAT.read_bytes() if netstat is None else os.pread(netstat, _MOST, 0)
    return _find(text, "drops")


def _find(text: bytes, kind: str) -> int:
    """Find a counter; each line with the names of a group is followed by one with the values."""
    group, name = KINDS[kind]
    rows = [line.split() for line in text.decode().splitlines() if line.startswith(f"{group}:")]
    try:
        names, values = rows
        return int(dict(zip(names, values, strict=True))[name])
    except (KeyError, ValueError) as error:
        raise OSError(f"cannot find the kernel's totals any more: {error}") from None
