"""Reads the kernel's inet_diag: what any user may know about the TCP sockets of a namespace."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from ipaddress import ip_address
from typing import NamedTuple

from dtrace_exporter.namespace_finder import NETLINK_SOCK_DIAG

# include/uapi/linux/netlink.h, sock_diag.h and inet_diag.h; states in include/net/tcp_states.h.
_SOCK_DIAG_BY_FAMILY = 20
_DUMP_REQUEST = 0x301
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_TCP_SYN_RECV = 3
_TCP_LISTEN = 10
_INET_DIAG_SKMEMINFO = 7
_INET_DIAG_CGROUP_ID = 21
_SK_MEMINFO_DROPS = 8

_HEADER = struct.Struct("=IHHII")
# struct inet_diag_req_v2: family, protocol, extensions, states, and zeroes for any socket.
_REQUEST = struct.Struct("=BBBxI48x")
# struct inet_diag_msg: family, own port and address, cookie, queues.
_MESSAGE = struct.Struct("=B3x2s2x16s20xII4xII8x")
_ATTRIBUTE = struct.Struct("=HH")
_DROPS = struct.Struct("=I")
_CGROUP = struct.Struct("=Q")
_INODE_AT = _MESSAGE.size - 4
_BUFFER = 1 << 18
_PATIENCE = 5.0
_READINGS = 3


class ListeningSocket(NamedTuple):
    """One listening socket.

    Attributes:
        address: the address that it is bound to, ``*`` for the wildcard.
        port: its TCP port.
        q: connections that wait for accept().
        qmax: the limit of Q.
        drops: ``sk_drops``, None if the kernel is too old to report it.
        socket: the kernel's cookie of it, which is unique in its network namespace. Before Linux
            5.4 each namespace had its own (net/core/sock_diag.c, sock_gen_cookie()).
    """

    address: str
    port: int
    q: int
    qmax: int
    drops: int | None
    socket: int


class OwnedSocket(NamedTuple):
    """One listening socket, and what identifies its owner.

    Attributes:
        address: as for ListeningSocket.
        port: as for ListeningSocket.
        inode: as /proc/PID/fd shows it; 0 if no process can have a descriptor of it.
        cgroup: the cgroup that it was opened in, as the inode of its directory; None if the kernel
            does not report it, as before Linux 5.7.
    """

    address: str
    port: int
    inode: int
    cgroup: int | None


def listeners(
    known: Collection[int] = (), netlink: socket.socket | None = None
) -> list[ListeningSocket]:
    """Read every TCP socket in state LISTEN of a network namespace.

    The request is for listening sockets only, so the cost does not grow with the connections. If
    there are many, the kernel answers in parts (net/ipv4/inet_diag.c, inet_diag_dump_icsk()). A
    part skips as many sockets of a hash bucket as were reported before. So if one of these closes
    meanwhile, another socket is missing.

    Args:
        known: the sockets that were open before. If one is missing, the request is repeated; only
            what is missing in all answers has closed.
        netlink: a socket of NETLINK_SOCK_DIAG that was opened in the namespace, for one reader at a
            time; without it the namespace of this thread is read.

    Raises:
        OSError: the kernel refuses, or this is not Linux.
    """
    with telling():
        found = _read(netlink)
        for _ in range(_READINGS - 1):
            if found.keys() >= set(known):
                break
            found |= _read(netlink)
        return [*found.values()]


def silent(
    expected: Collection[tuple[str, int]], netlink: socket.socket | None = None
) -> list[tuple[str, int]]:
    """Return the expected listeners that a network namespace does not have, ordered by port.

    Args:
        expected: pairs of an address, as in ListeningSocket or empty for any, and a port.
        netlink: as for listeners().

    Raises:
        OSError: as listeners().
    """
    found = listeners((), netlink) if expected else []
    heard = {(address, sample.port) for sample in found for address in ("", sample.address)}
    return sorted(set(expected) - heard, key=lambda where: where[::-1])


def half_open(netlink: socket.socket | None = None) -> Counter[tuple[str, int]]:
    """Count the half-open connections of a network namespace, by local address and port.

    The kernel searches all of its connections for them, and reports only these.

    Args:
        netlink: as for listeners().

    Raises:
        OSError: as listeners().
    """
    with telling():
        return Counter(_local(message) for message in _dump(netlink, _TCP_SYN_RECV))


def queues(netlink: socket.socket | None = None) -> Iterator[ListeningSocket]:
    """Read once all TCP sockets in state LISTEN, without drops; of many, some may be missing.

    Args:
        netlink: as for listeners().

    Raises:
        OSError: as listeners().
    """
    with telling():
        return map(_sample, [*_dump(netlink, _TCP_LISTEN)])


def owned(netlink: socket.socket | None = None) -> list[OwnedSocket]:
    """Read once the owners of all TCP sockets in state LISTEN; of many, some may be missing.

    Args:
        netlink: as for listeners().

    Raises:
        OSError: as listeners().
    """
    with telling():
        return [*map(_owned, _dump(netlink, _TCP_LISTEN))]


@contextmanager
def telling() -> Iterator[None]:
    """Add to errors in the block that they are about sock_diag.

    Raises:
        OSError: an error in the block, or this is not Linux.
    """
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "sock_diag is an interface of Linux")
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, f"cannot read sock_diag: {reason}") from error


def _read(netlink: socket.socket | None) -> dict[int, ListeningSocket]:
    samples = map(_sample, _dump(netlink, _TCP_LISTEN, 1 << (_INET_DIAG_SKMEMINFO - 1)))
    return {sample.socket: sample for sample in samples}


def _dump(netlink: socket.socket | None, state: int, extensions: int = 0) -> Iterator[memoryview]:
    """Yield a struct inet_diag_msg for each TCP socket in a state.

    Raises:
        OSError: the kernel refuses, or its answer is malformed.
    """
    if netlink is None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as opened:
            yield from _dump(opened, state, extensions)
        return
    for family in (socket.AF_INET, socket.AF_INET6):
        yield from dump(netlink, _REQUEST.pack(family, socket.IPPROTO_TCP, extensions, 1 << state))


def dump(netlink: socket.socket, request: bytes) -> Iterator[memoryview]:
    """Yield the kernel's message for each socket that a request asks for; see sock_diag(7).

    Args:
        netlink: as for listeners().
        request: the request of a family of sockets, without the netlink header.

    Raises:
        OSError: the kernel refuses, or its answer is malformed.
    """
    length = _HEADER.size + len(request)
    # The kernel begins no new answer until an older one, which was abandoned, has been read.
    netlink.setblocking(False)
    with suppress(BlockingIOError):
        while netlink.recv(_BUFFER):
            pass
    netlink.settimeout(_PATIENCE)
    netlink.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _DUMP_REQUEST, 0, 0) + request)
    ended = False
    while not ended:
        ended = yield from _messages(memoryview(netlink.recv(_BUFFER)))


def _messages(data: memoryview) -> Generator[memoryview, None, bool]:
    """Yield the messages in one part of an answer; return whether it is the last part."""
    if not data:
        raise _bad(errno.EPROTO)
    while data:
        length, kind, *_ = _HEADER.unpack_from(data) if len(data) >= _HEADER.size else (0, 0)
        if not _HEADER.size <= length <= len(data):
            raise _bad(errno.EPROTO)
        body = data[_HEADER.size : length]
        if kind in (_NLMSG_ERROR, _NLMSG_DONE):
            # Both begin with a negative errno. A successful dump ends in DONE and 0.
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
    return _sample(message)[:2]


def _sample(message: memoryview) -> ListeningSocket:
    if len(message) < _MESSAGE.size:
        raise _bad(errno.EPROTO)
    family, port, source, low, high, q, qmax = _MESSAGE.unpack_from(message)
    address = _address(source if family == socket.AF_INET6 else source[:4])
    number = int.from_bytes(port)
    drops = _drops(message) if len(message) > _MESSAGE.size else None
    return ListeningSocket(address, number, q, qmax, drops, high << 32 | low)


def _owned(message: memoryview) -> OwnedSocket:
    address, port = _local(message)
    (inode,) = _DROPS.unpack_from(message, _INODE_AT)
    cgroup = _attribute(message, _INET_DIAG_CGROUP_ID)
    if cgroup is None or len(cgroup) < _CGROUP.size:
        return OwnedSocket(address, port, inode, None)
    return OwnedSocket(address, port, inode, _CGROUP.unpack_from(cgroup)[0])


def _drops(message: memoryview) -> int | None:
    """Return the drops of a socket, from the attribute about its memory."""
    value = _attribute(message, _INET_DIAG_SKMEMINFO)
    where = _SK_MEMINFO_DROPS * _DROPS.size
    if value is None or len(value) <= where:
        return None
    return int(_DROPS.unpack_from(value, where)[0])


def _attribute(message: memoryview, wanted: int) -> memoryview | None:
    """Return the value of an attribute of a message, None if it does not have it."""
    at = _MESSAGE.size
    while at + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        if kind == wanted:
            return message[at + _ATTRIBUTE.size : at + length]
        at += max((length + 3) & ~3, _ATTRIBUTE.size)
    return None


@lru_cache(maxsize=4096)
def _address(packed: bytes) -> str:
    """Return an address as labels have it: a mapped one as IPv4, ``*`` for the wildcard."""
    address = ip_address(packed)
    address = getattr(address, "ipv4_mapped", None) or address
    return "*" if address.is_unspecified else str(address)
