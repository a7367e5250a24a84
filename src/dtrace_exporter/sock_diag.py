"""Linux's own numbers about each listening socket, for hosts without DTrace.

The kernel's sock_diag interface gives Q, Qmax and drops to any user, for the network namespace of
the caller. pyroute2 knows the messages; its DiagSocket is not used, for in 0.9 it cannot be called
while an event loop runs, and it takes a refusal of the kernel for an empty answer.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import sys
from collections.abc import Generator, Iterator
from ipaddress import ip_address
from typing import Any, NamedTuple

from dtrace_exporter.limits import LimitError
from dtrace_exporter.listeners import Exports, Listener, ListenerTable, SessionId
from dtrace_exporter.log import fields
from dtrace_exporter.sockets import Queues

_log = logging.getLogger(__name__)

EXPORTS = Exports(
    syns=False, reasons=("other",), established=False, accepts=False, accept_wait=False
)
"""The series that this source fills."""

# include/uapi/linux/netlink.h, sock_diag.h and inet_diag.h; the state in include/net/tcp_states.h.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_DUMP_REQUEST = 0x301
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_TCP_LISTEN = 10
_INET_DIAG_SKMEMINFO = 7
_SK_MEMINFO_DROPS = 8

_HEADER = struct.Struct("=IHHII")
_BUFFER = 1 << 16
_PATIENCE = 5.0


class Sample(NamedTuple):
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


def listeners() -> list[Sample]:
    """Read every TCP socket in state LISTEN of this network namespace.

    Only listening sockets are asked for, so the cost does not grow with the connections.

    Raises:
        OSError: the kernel refuses, or this is not Linux.
        ImportError: pyroute2 is not installed.
    """
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "sock_diag is an interface of Linux")
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(_PATIENCE)
            netlink.bind((0, 0))
            return [
                _sample(message)
                for family in (socket.AF_INET, socket.AF_INET6)
                for message in _dump(netlink, family)
            ]
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, f"cannot read sock_diag: {reason}") from error


class SockDiagSource:
    """Fills the listener table from sock_diag.

    Keep one for as long as the table: it remembers which of a socket's drops are counted already.
    """

    def __init__(self) -> None:
        self._counted: dict[int, tuple[Listener, int]] = {}
        self._refused = ""

    def update(
        self, table: ListenerTable, session: SessionId, samples: list[Sample]
    ) -> Generator[None, None, None]:
        """Take all listeners into the table, and take the gauges of those that are gone.

        A socket's drops are all counted when it is first seen, for they are its own since it was
        opened: after the first reading the counters are what ``ss -lntm`` shows.

        Args:
            table: where they go as long as it has a watch of the session.
            session: whose listeners they are.
            samples: as listeners() gives them.

        Yields:
            After each of them.
        """
        open_now = {(sample.address, sample.port, sample.socket) for sample in samples}
        sockets = {sample.socket for sample in samples}
        self._counted = {key: known for key, known in self._counted.items() if key in sockets}
        for listener in table.seen(session):
            address, port = listener.identity.address, listener.identity.port
            for key in [*listener.sockets]:
                if (address, port, key) not in open_now:
                    del listener.sockets[key]
            if not listener.sockets:
                table.idle(listener)
        refused = ""
        for sample in samples:
            yield
            if not table.is_watched(session):
                return
            if table.watches(session, sample.port):
                try:
                    listener = table.listener(session, "", sample.address, sample.port)
                except LimitError as error:
                    refused = str(error)
                    continue
                _observe(listener, sample)
                self._count_drops(listener, sample)
        if refused and not self._refused:
            _log.warning("listeners left out", extra=fields(why=refused))
        self._refused = refused

    def _count_drops(self, listener: Listener, sample: Sample) -> None:
        if sample.drops is None:
            return
        owner, before = self._counted.get(sample.socket, (listener, 0))
        # A listener that the table has forgotten and made anew counts from the start again.
        increase = sample.drops - before if owner is listener else sample.drops
        # The kernel's count is of 32 bits and goes round; nothing ever sets it back.
        listener.drop("other", increase % (1 << 32))
        self._counted[sample.socket] = listener, sample.drops


def _observe(listener: Listener, sample: Sample) -> None:
    listener.sockets[sample.socket] = Queues(None, sample.q, None, sample.qmax)


def _dump(netlink: socket.socket, family: int) -> Iterator[Any]:
    """Ask for one family's listeners and yield the kernel's answers, an inet_diag_msg each."""
    from pyroute2.netlink.diag import inet_diag_msg, inet_diag_req

    request = inet_diag_req()
    request["header"]["type"] = _SOCK_DIAG_BY_FAMILY
    request["header"]["flags"] = _DUMP_REQUEST
    request["sdiag_family"] = family
    request["sdiag_protocol"] = socket.IPPROTO_TCP
    request["idiag_states"] = 1 << _TCP_LISTEN
    request["idiag_ext"] = 1 << (_INET_DIAG_SKMEMINFO - 1)
    request.encode()
    netlink.send(request.data)
    while True:
        data = netlink.recv(_BUFFER)
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, *_ = _HEADER.unpack_from(data, at)
            body = data[at + _HEADER.size : at + length]
            if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                # Both begin with an errno, negative; a dump without fault ends in DONE and 0.
                code = -struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
                if code or kind == _NLMSG_ERROR:
                    raise OSError(code or errno.EPROTO, os.strerror(code or errno.EPROTO))
                return
            message = inet_diag_msg(data[at : at + length])
            message.decode()
            yield message
            at += (max(length, _HEADER.size) + 3) & ~3


def _sample(message: Any) -> Sample:
    meminfo = message.get_attr("INET_DIAG_SKMEMINFO")
    words = memoryview(bytes.fromhex(meminfo.replace(":", "")) if meminfo else b"").cast("I")
    return Sample(
        address=_address(message["idiag_src"]),
        port=message["idiag_sport"],
        q=message["idiag_rqueue"],
        qmax=message["idiag_wqueue"],
        drops=words[_SK_MEMINFO_DROPS] if len(words) > _SK_MEMINFO_DROPS else None,
        socket=message["idiag_cookie"],
    )


def _address(text: str) -> str:
    """Write an address as rows does: IPv4 where it is mapped, ``*`` for the wildcard."""
    address = ip_address(text)
    address = getattr(address, "ipv4_mapped", None) or address
    return "*" if address.is_unspecified else str(address)
