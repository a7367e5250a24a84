"""Reads the listening UNIX sockets whose paths match the configuration."""

from __future__ import annotations

import logging
import socket
from collections.abc import Collection, Iterable
from contextlib import suppress

from dtrace_exporter import unix_diag
from dtrace_exporter.log import fields
from dtrace_exporter.namespace_finder import NETLINK_SOCK_DIAG
from dtrace_exporter.namespaces import Namespace, cookie
from dtrace_exporter.sockets import MORE_THAN
from dtrace_exporter.state import UnixQueues
from dtrace_exporter.unix_diag import UnixListener
from dtrace_exporter.watched import matches

_log = logging.getLogger(__name__)

MOST = 1_000
"""At most so many paths are exported: any user of the host can make sockets, with any names."""


class UnixSource:
    """Reads UNIX sockets. If there are too many, it keeps those that it has exported before."""

    def __init__(self) -> None:
        self._known: Collection[tuple[str, str]] = ()
        self._said = ""

    def read(self, paths: Collection[str], others: Iterable[Namespace]) -> UnixQueues:
        """Return the queues by place and path; it blocks.

        If several sockets have the same path, for example because a new server has replaced an
        older one, the queues are those of the fullest.

        Args:
            paths: patterns of fnmatch for the paths as unix_diag.written() returns them.
            others: the other network namespaces. Those that cannot be read are left out.
        """
        found: dict[tuple[str, str], UnixListener] = {}
        cookies: dict[str, int | None] = {}
        try:
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as own:
                listeners = [("", one) for one in unix_diag.listeners(own)]
                cookies[""] = cookie(own)
        except OSError as error:
            why = error.strerror or str(error)
            if why != self._said:
                self._said = why
                _log.warning("cannot read the UNIX sockets", extra=fields(why=why))
            return UnixQueues({}, {}, 0)
        for place, _, netlink, _ in others:
            # Errors are logged for this process's own namespace only.
            with suppress(OSError):
                listeners += [(place, one) for one in unix_diag.listeners(netlink)]
                cookies[place] = cookie(netlink)
        for place, one in listeners:
            if matches(one.path, paths):
                known = found.get((place, one.path), one)
                found[place, one.path] = max(known, one, key=_fullness)
        # Paths that were exported before come first.
        order = sorted(found, key=lambda where: (where not in self._known, where))
        self._known = {*order[:MOST]}
        left_out = len(order) - len(self._known)
        why = f"more than {MOST} paths match unix.paths" if left_out else ""
        if why and why != self._said:
            _log.warning("UNIX sockets left out", extra=fields(why=why))
        self._said = why
        queues = {where: (found[where].q, found[where].qmax) for where in order[:MOST]}
        return UnixQueues(queues, {at: each for at, each in cookies.items() if each}, left_out)


def _fullness(socket: UnixListener) -> tuple[float, int]:
    # net/unix/af_unix.c, unix_recvq_full(): Q holds one connection more than the backlog.
    return socket.q / MORE_THAN.of(socket.qmax), socket.q
