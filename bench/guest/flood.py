"""SYNs to listeners of this machine, as fast as its kernel accepts them.

The packets are made beforehand and sent by sendmmsg(2), a thousand in a call. The loopback
interface delivers each packet while it is being sent, on the same CPU, so a burst is over when the
call returns. So the time has neither the start of a process nor the making of packets in it.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import time
from collections.abc import Sequence
from ipaddress import IPv4Address
from pathlib import Path

PACKETS = 10_000
_AT_ONCE = 1_000
_FIRST_SOURCE = int(IPv4Address("198.18.0.1"))
_FIRST_PORT = 1_024
_PORTS = 50_000
_SYN, _RST = 0x02, 0x04


class _Part(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """struct msghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("parts", ctypes.POINTER(_Part)),
        ("count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    """struct mmsghdr."""

    _fields_ = (("header", _Header), ("sent", ctypes.c_uint))


class Flood:
    """SYNs of many clients, which do not answer the SYN-ACKs.

    Args:
        address: the IPv4 address of the listeners.
        ports: their ports, which get SYNs in turn.
    """

    def __init__(self, address: str, ports: Sequence[int]) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self._socket.connect((address, 0))
        self._sendmmsg = ctypes.CDLL(None, use_errno=True).sendmmsg
        self._syns = _Packets(address, ports, _SYN)
        self._resets = _Packets(address, ports, _RST)
        self._made = 0
        self.keeps = True
        """Whether the listener keeps SYNs; then each burst is taken back at its end."""
        self.dropped = False
        """Whether the listener drops all SYNs."""

    def burst(self, syns: int) -> float:
        """Send SYNs, at most PACKETS if they are kept; return the time of one, in nanoseconds.

        Raises:
            RuntimeError: the kernel's own counters differ.
        """
        took = self.arrive(syns)
        self.take_back(syns)
        return took

    def arrive(self, syns: int) -> float:
        """Do the same as ``burst``, but leave SYNs that are kept until ``take_back``."""
        if self.keeps and syns > PACKETS:
            raise ValueError(f"{syns} SYNs at once")
        before = counters()
        began = time.monotonic_ns()
        self._send(self._syns, syns)
        took = time.monotonic_ns() - began
        after = counters()
        taken = after["InSegs"] - before["InSegs"]
        dropped = after["ListenDrops"] - before["ListenDrops"]
        if taken != syns or dropped != (syns if self.dropped else 0):
            raise RuntimeError(f"sent {syns}, taken in {taken}, dropped {dropped}")
        self._made += syns
        return took / syns

    def take_back(self, syns: int) -> None:
        """Send a reset for each of the SYNs that are kept."""
        if self.keeps:
            self._send(self._resets, syns)

    def send(self, syns: int) -> None:
        """Send SYNs without checks."""
        self._send(self._syns, syns)

    def made(self) -> int:
        """Return how many SYNs the kernel has received so far."""
        return self._made

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _send(self, packets: _Packets, count: int) -> None:
        sent = 0
        while sent < count:
            at = sent % PACKETS
            most = min(_AT_ONCE, count - sent, PACKETS - at)
            done = self._sendmmsg(
                self._socket.fileno(), ctypes.byref(packets.messages[at]), most, 0
            )
            if done < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            sent += done


class _Packets:
    """The packets of PACKETS clients, ready to be sent."""

    def __init__(self, address: str, ports: Sequence[int], flags: int) -> None:
        self._data = [
            ctypes.create_string_buffer(
                packet(number, address, ports[number % len(ports)], flags), 40
            )
            for number in range(PACKETS)
        ]
        self._parts = (_Part * PACKETS)()
        self.messages = (_Message * PACKETS)()
        for data, part, message in zip(self._data, self._parts, self.messages, strict=True):
            part.base, part.length = ctypes.addressof(data), 40
            message.header.parts, message.header.count = ctypes.pointer(part), 1


def packet(number: int, address: str, port: int, flags: int) -> bytes:
    """Return a segment of a client, IPv4's header and TCP's, 40 bytes.

    Args:
        number: the number of the client.
        address: the destination address.
        port: the destination port.
        flags: the flags of TCP; a segment that is not a SYN is the one after it.
    """
    source = struct.pack("!I", _FIRST_SOURCE + number // _PORTS)
    target = socket.inet_aton(address)
    sequence = (number * 2654435761 + (not flags & _SYN)) & 0xFFFFFFFF
    head = struct.pack("!HHIIBB", _FIRST_PORT + number % _PORTS, port, sequence, 0, 5 << 4, flags)
    tcp = head + struct.pack("!HHH", 65535, 0, 0)
    pseudo = source + target + struct.pack("!HH", socket.IPPROTO_TCP, len(tcp))
    tcp = head + struct.pack("!HHH", 65535, checksum(pseudo + tcp), 0)
    # The kernel fills in IPv4's own checksum.
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, socket.IPPROTO_TCP, 0)
    return ip + source + target + tcp


def checksum(data: bytes) -> int:
    """Return the internet checksum of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def counters() -> dict[str, int]:
    """Return the kernel's counters of TCP."""
    found: dict[str, int] = {}
    for file in ("snmp", "netstat"):
        lines = Path(f"/proc/net/{file}").read_text().splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            if names.startswith(("Tcp:", "TcpExt:")):
                found |= dict(zip(names.split()[1:], map(int, values.split()[1:]), strict=True))
    return found
