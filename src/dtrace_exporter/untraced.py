"""The sources other than DTrace: what each system tells any user about its listeners."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from dtrace_exporter import netstat, sock_diag
from dtrace_exporter.listeners import Capabilities
from dtrace_exporter.namespaces import Namespace
from dtrace_exporter.sampling import Placed
from dtrace_exporter.sock_diag import Reading


class Untraced(NamedTuple):
    """A source without DTrace.

    Attributes:
        name: its name in the configuration.
        system: what sys.platform begins with where it is used instead of DTrace.
        gives: what it has, for people.
        wants: what it needs, for people.
        capabilities: which series it fills.
        read: as sock_diag.read().
        queues: as sock_diag.queues(); None if Q cannot be sampled between scrapes.
        namespaces: whether it reads other network namespaces.
    """

    name: str
    system: str
    gives: str
    wants: str
    capabilities: Capabilities
    read: Callable[[Iterable[Namespace], Mapping[str, set[int]]], list[Reading]]
    queues: Callable[[Iterable[Namespace]], Iterable[Placed]] | None = None
    namespaces: bool = False


SOURCES = {
    source.name: source
    for source in (
        Untraced(
            "sock_diag",
            "linux",
            "Q0, Q, Qmax and drops",
            "it needs Linux with its modules inet_diag and tcp_diag, and netlink sockets that no"
            " filter forbids (seccomp; RestrictAddressFamilies of the unit); elsewhere use source:"
            " dtrace",
            sock_diag.CAPABILITIES,
            sock_diag.read,
            sock_diag.queues,
            namespaces=True,
        ),
        Untraced(
            "netstat",
            "freebsd",
            "Q and Qmax",
            "it needs FreeBSD's netstat(1) on PATH; elsewhere use source: dtrace",
            netstat.CAPABILITIES,
            netstat.read,
        ),
    )
}
"""All of them by name. The names are values of ``source`` in the configuration."""


def here() -> Untraced | None:
    """Return the source that this system has instead of DTrace, None if there is none."""
    found = (each for each in SOURCES.values() if sys.platform.startswith(each.system))
    return next(found, None)
