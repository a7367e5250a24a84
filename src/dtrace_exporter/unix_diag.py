"""Reads the kernel's unix_diag: the queues of the listening UNIX sockets of a namespace."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from dtrace_exporter import inet_diag
from dtrace_exporter.namespace_finder import NETLINK_SOCK_DIAG

# include/uapi/linux/unix_diag.h; states in include/net/tcp_states.h, which AF_UNIX has, too.
_LISTEN = 10
_SHOW_NAME = 0x01
_SHOW_RQLEN = 0x10
_NAME = 0
_RQLEN = 4

# struct unix_diag_req: family; states, inode, what to show, cookie.
_REQUEST = struct.pack("=B3xIII8x", socket.AF_UNIX, 1 << _LISTEN, 0, _SHOW_NAME | _SHOW_RQLEN)
# struct unix_diag_msg: state; the rest is not needed.
_MESSAGE = struct.Struct("=2xBx12x")
_ATTRIBUTE = struct.Struct("=HH")
# struct unix_diag_rqlen.
_QUEUES = struct.Struct("=II")


# The backslash, control characters, and bytes that are not UTF-8, which are surrogates: PEP 383.
_BYTES = {
    code: rf"\x{code & 0xFF:02x}" for code in (*range(0x20), 0x5C, 0x7F, *range(0xDC80, 0xDD00))
}


class UnixListener(NamedTuple):
    """One listening UNIX socket, SOCK_STREAM or SOCK_SEQPACKET.

    Attributes:
        path: the name that it was bound to, as written() returns it. Its file may have moved.
        q: connections that wait for accept().
        qmax: the limit of Q.
    """

    path: str
    q: int
    qmax: int


def listeners(netlink: socket.socket | None = None) -> Iterator[UnixListener]:
    """Read once all UNIX sockets in state LISTEN of a network namespace.

    For a listener the kernel reports how many connections wait for accept(), and the backlog
    (net/unix/diag.c, sk_diag_show_rqlen()). The request is for listeners only.

    Args:
        netlink: a socket of NETLINK_SOCK_DIAG that was opened in the namespace, for one reader at a
            time; without it the namespace of this thread is read.

    Raises:
        OSError: the kernel refuses, or has no unix_diag, or this is not Linux.
    """
    with inet_diag.telling():
        if netlink is None:
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as opened:
                found = [*inet_diag.dump(opened, _REQUEST)]
        else:
            found = [*inet_diag.dump(netlink, _REQUEST)]
        return filter(None, map(_listener, found))


def written(name: bytes) -> str:
    r"""Return a socket's name in printable characters; different names stay different.

    A name in the file system is a path, perhaps a relative one. An abstract name, see unix(7),
    begins with @. Characters that cannot be printed, the backslash, and an @ at the beginning of a
    path are escaped as bytes, as in ``\x0a``. So 108 bytes become at most 432 characters.

    Args:
        name: the name in the kernel: an abstract one begins with a zero byte, a path ends in one.
    """
    if name.startswith(b"\0"):
        return "@" + _printable(name[1:])
    path = _printable(name.removesuffix(b"\0"))
    return r"\x40" + path[1:] if path.startswith("@") else path


def _printable(name: bytes) -> str:
    text = name.decode(errors="surrogateescape").translate(_BYTES)
    # Any user may make very many sockets, whose names take long character by character.
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


@lru_cache(maxsize=4096)
def _escaped(character: str) -> str:
    return "".join(rf"\x{byte:02x}" for byte in character.encode(errors="surrogateescape"))


def _listener(message: memoryview) -> UnixListener | None:
    """Return the listener of a message, None if the socket does not listen any more."""
    if len(message) < _MESSAGE.size:
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
    (state,) = _MESSAGE.unpack_from(message)
    attributes = dict(_attributes(message[_MESSAGE.size :]))
    name, queues = attributes.get(_NAME), attributes.get(_RQLEN)
    if state != _LISTEN or not name or queues is None or len(queues) < _QUEUES.size:
        return None
    return UnixListener(written(bytes(name)), *_QUEUES.unpack_from(queues))


def _attributes(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind, data[_ATTRIBUTE.size : length]
        data = data[max((length + 3) & ~3, _ATTRIBUTE.size) :]
