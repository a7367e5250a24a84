"""Who owns each listener of this host: the unit, the container and the programs that have it open.

The kernel reports in which cgroup each listening socket was opened. The processes that have it open
can only be found in /proc, by a walk through the descriptors of all processes.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

from dtrace_exporter import cgroups, inet_diag, namespaces
from dtrace_exporter.cgroups import Names
from dtrace_exporter.inet_diag import OwnedSocket
from dtrace_exporter.listeners import Identity, Owner, joined, printable
from dtrace_exporter.log import fields
from dtrace_exporter.namespaces import Namespace

_log = logging.getLogger(__name__)

WALK_SECONDS = 60.0
"""The shortest time between two walks through /proc, in seconds."""
AGAIN_SECONDS = 300.0
"""The time until a walk if no socket is new, in seconds; other processes may have opened one."""
SHARE = 250
"""Walks take at most 1/250 of a processor's time, and so do other look-ups."""

_MOST_CGROUPS = 100_000

_Programs = Mapping[int, frozenset[str]]

Holders = Callable[[Collection[int]], tuple[Mapping[int, Collection[bytes]], float]]
"""As Namespaces.holders(): the programs that have each socket open, and the cost of the look-up."""


class Placed(NamedTuple):
    """The listening sockets of a place, and the name of the place if it has one."""

    place: str
    sockets: list[OwnedSocket]
    name: str = ""


def read(home: str, others: Iterable[Namespace]) -> list[Placed]:
    """Read the owners of listening sockets in this network namespace and others; it blocks.

    Args:
        home: the inode of the network namespace whose place is the empty string.
        others: the others. Those that cannot be read are left out.

    Raises:
        OSError: this network namespace cannot be read.
    """
    called = namespaces.names()
    found = [(namespaces.own(), inet_diag.owned())]
    for place, _, netlink, _ in others:
        # If sock_diag is the source, its reader gets the same error, and logs it.
        with suppress(OSError):
            found.append((place, inet_diag.owned(netlink)))
    return [
        Placed("" if place == home else place, sockets, called.get(place, ""))
        for place, sockets in found
    ]


class Owners:
    """Finds the owners of sockets. All methods block.

    Args:
        holders: finds out which programs have sockets open.
    """

    def __init__(self, holders: Holders) -> None:
        self._holders = holders
        # The number of a cgroup is never reused, and its name never changes.
        self._cgroups: dict[int, Names] = {}
        self._programs: _Programs = {}
        self._sockets: frozenset[int] = frozenset()
        self._walked: float | None = None
        self._cost = 0.0
        self._basis: tuple[list[Placed], _Programs] = [], self._programs
        self._found: dict[Identity, Owner] = {}
        self._said = ""

    def walk(self) -> bool:
        """Find out which programs have the sockets of the last find() open, if this is due.

        Returns:
            Whether a walk was due and successful.
        """
        now = time.monotonic()
        wait = max(WALK_SECONDS, SHARE * self._cost)
        if self._sockets <= self._programs.keys():
            wait = max(AGAIN_SECONDS, wait)
        if not self._sockets or (self._walked is not None and now < self._walked + wait):
            return False
        sockets = self._sockets
        self._walked = now
        try:
            found, self._cost = self._holders(sockets)
        except OSError as error:
            self._say(f"cannot see which programs have sockets open: {error.strerror or error}")
            self._cost = time.monotonic() - now
            return False
        # Equal sets are one, or the garbage collector would go through one for each socket.
        sets: dict[frozenset[str], frozenset[str]] = {}
        programs = {}
        for inode in sockets:
            names = frozenset(name.decode(errors="replace") for name in found.get(inode, ()))
            programs[inode] = sets.setdefault(names, names)
        # Replaced, not changed: find() may use the old one in another thread.
        self._programs = programs
        return True

    def find(self, places: Iterable[Placed]) -> dict[Identity, Owner]:
        """Return the owners of this host's listeners; of several sockets, those of all.

        Args:
            places: the sockets that listen, as read() returns them.
        """
        basis = [*places], self._programs
        if basis[0] == self._basis[0] and basis[1] is self._basis[1]:
            return self._found
        places, programs = basis
        sockets = [socket for placed in places for socket in placed.sockets]
        self._sockets = frozenset(socket.inode for socket in sockets if socket.inode)
        self._look_up({socket.cgroup for socket in sockets if socket.cgroup is not None})
        found: dict[Identity, Owner] = {}
        for placed in places:
            by_listener = defaultdict[tuple[str, int], list[OwnedSocket]](list)
            for socket in placed.sockets:
                by_listener[socket.address, socket.port].append(socket)
            name = self._place_name(placed, programs)
            for where, ones in by_listener.items():
                found[Identity("", placed.place, *where)] = self._owner(ones, programs, name)
        self._basis, self._found = basis, found
        return found

    def _place_name(self, placed: Placed, programs: _Programs) -> str:
        """Return the name of a place, or if it has none, of the owner of its sockets."""
        if not placed.place or placed.name:
            return printable(placed.name) if placed.place else ""
        owner = self._owner(placed.sockets, programs)
        return owner.container or owner.unit

    def _owner(
        self, sockets: list[OwnedSocket], programs: _Programs, place_name: str = ""
    ) -> Owner:
        names = [self._cgroups.get(socket.cgroup or 0, Names()) for socket in sockets]
        return Owner(
            joined(name for socket in sockets for name in programs.get(socket.inode, ())),
            joined(each.unit for each in names),
            joined(each.container for each in names),
            place_name=place_name,
        )

    def _look_up(self, numbers: Collection[int]) -> None:
        if new := {*numbers} - self._cgroups.keys():
            where = cgroups.paths(new)
            self._cgroups |= {number: cgroups.names(path) for number, path in where.items()}
        if len(self._cgroups) > _MOST_CGROUPS:
            self._cgroups = {
                number: names for number, names in self._cgroups.items() if number in numbers
            }

    def _say(self, why: str) -> None:
        if why != self._said:
            self._said = why
            _log.warning("programs of listeners not known", extra=fields(why=why))
