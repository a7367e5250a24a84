"""The kernel's inet_diag: what it tells any user of the TCP sockets of this network namespace."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from functools import lru_cache
from ipaddress import ip_address
from typing import NamedTuple

# include/uapi/linux/netlink.h, sock_diag.h and inet_diag.h; states in include/net/tcp_states.h.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_DUMP_REQUEST = 0x301
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_TCP_SYN_RECV = 3
_TCP_LISTEN = 10
_INET_DIAG_SKMEMINFO = 7
_SK_MEMINFO_DROPS = 8

_HEADER = struct.Struct("=IHHII")
# struct inet_diag_req_v2: family, protocol, extensions, states, and a socket that is any.
_REQUEST = struct.Struct("=BBBxI48x")
# struct inet_diag_msg: family, state, timer, retransmissions, ports, addresses, interface, cookie,
# expiry, queues, user and inode.
_MESSAGE = struct.Struct("=BBBB2s2s16s16sIIIIIIII")
_ATTRIBUTE = struct.Struct("=HH")
_DROPS = struct.Struct("=I")
_BUFFER = 1 << 18
_PATIENCE = 5.0
_READINGS = 3


class ListeningSocket(NamedTuple):
    """One listening socket.

    ``socket`` is the kernel's cookie of it, never used again for another one. ``drops`` is None
    where the kernel is too old to say.
    """

    address: str
    port: int
    q: int
    qmax: int
    drops: int | None
    socket: int


def listeners(known: Collection[int] = ()) -> list[ListeningSocket]:
    """Read every TCP socket in state LISTEN of this network namespace.

    Only listening sockets are asked for, so the cost does not grow with the connections. Of many
    the kernel tells in parts (net/ipv4/inet_diag.c, inet_diag_dump_icsk()): a part begins behind as
    many sockets of a hash bucket as have been told, so one that closes meanwhile hides another.

    Args:
        known: sockets that were there before. Where one of them is missing it is asked again, and
            only what is in none of some answers has closed.

    Raises:
        OSError: the kernel refuses, or this is not Linux.
    """
    with _telling():
        found = _read()
        for _ in range(_READINGS - 1):
            if found.keys() >= set(known):
                break
            found |= _read()
        return [*found.values()]


def half_open() -> Counter[tuple[str, int]]:
    """Count the half-open connections of this network namespace, by address and port here.

    The kernel looks through all of its connections for them, and tells of these only.

    Raises:
        OSError: as listeners().
    """
    with _telling():
        return Counter(_local(message) for message in _dump(_TCP_SYN_RECV))


@contextmanager
def _telling() -> Iterator[None]:
    """Have what goes wrong say what it is about."""
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "sock_diag is an interface of Linux")
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, f"cannot read sock_diag: {reason}") from error


def _read() -> dict[int, ListeningSocket]:
    samples = map(_sample, _dump(_TCP_LISTEN, 1 << (_INET_DIAG_SKMEMINFO - 1)))
    return {sample.socket: sample for sample in samples}


def _dump(state: int, extensions: int = 0) -> Iterator[memoryview]:
    """Yield what the kernel tells of TCP's sockets in a state, a struct inet_diag_msg each.

    Raises:
        OSError: the kernel refuses, or an answer is none.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(_PATIENCE)
        netlink.bind((0, 0))
        for family in (socket.AF_INET, socket.AF_INET6):
            yield from _dump_family(netlink, family, state, extensions)


def _dump_family(
    netlink: socket.socket, family: int, state: int, extensions: int
) -> Iterator[memoryview]:
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, extensions, 1 << state)
    length = _HEADER.size + len(body)
    netlink.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _DUMP_REQUEST, 0, 0) + body)
    ended = False
    while not ended:
        ended = yield from _messages(memoryview(netlink.recv(_BUFFER)))


def _messages(data: memoryview) -> Generator[memoryview, None, bool]:
    """Yield what one part of an answer tells, and return whether it is the last one."""
    if not data:
        raise _bad(errno.EPROTO)
    while data:
        length, kind, *_ = _HEADER.unpack_from(data) if len(data) >= _HEADER.size else (0, 0)
        if not _HEADER.size <= length <= len(data):
            raise _bad(errno.EPROTO)
        body = data[_HEADER.size : length]
        if kind in (_NLMSG_ERROR, _NLMSG_DONE):
            # Both begin with an errno, negative; a dump without fault ends in DONE and 0.
            code = -struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
            if code or kind == _NLMSG_ERROR:
                raise _bad(code if code > 0 else errno.EPROTO)
            return True
        yield body
        data = data[(length + 3) & ~3 :]
    return False


def _bad(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def _local(message: memoryview) -> tuple[str, int]:
    """Return a socket's own address and port."""
    if len(message) < _MESSAGE.size:
        raise _bad(errno.EPROTO)
    family, _, _, _, port, _, source, *_ = _MESSAGE.unpack_from(message)
    packed = source if family == socket.AF_INET6 else source[:4]
    return _address(packed), int.from_bytes(port)


def _sample(message: memoryview) -> ListeningSocket:
    address, port = _local(message)
    *_, low, high, _, q, qmax, _, _ = _MESSAGE.unpack_from(message)
    return ListeningSocket(
        address=address,
        port=port,
        q=q,
        qmax=qmax,
        drops=_drops(message),
        socket=high << 32 | low,
    )


def _drops(message: memoryview) -> int | None:
    """Return what has been dropped, from the attribute with a socket's memory."""
    at = _MESSAGE.size
    while at + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        if kind == _INET_DIAG_SKMEMINFO:
            value = message[at + _ATTRIBUTE.size : at + length]
            where = _SK_MEMINFO_DROPS * _DROPS.size
            return int(_DROPS.unpack_from(value, where)[0]) if len(value) > where else None
        at += max((length + 3) & ~3, _ATTRIBUTE.size)
    return None


@lru_cache(maxsize=4096)
def _address(packed: bytes) -> str:
    """Write an address as rows does: IPv4 where it is mapped, ``*`` for the wildcard."""
    address = ip_address(packed)
    address = getattr(address, "ipv4_mapped", None) or address
    return "*" if address.is_unspecified else str(address)
