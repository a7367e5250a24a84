"""Which listeners of a host are watched, and what the configuration says about each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

FEW = 16
"""In a range of at most so many ports, each port is expected to have a listener."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """An entry of the configuration. Without a place or an address it matches any."""

    ports: tuple[range, ...] = ()
    name: str = ""
    address: str | None = None
    place: str | None = None
    histograms: bool = True


_ANY = Wanted()


class Watched:
    """The listeners that some entries match, or all listeners of a host but excluded ports.

    Args:
        wanted: the entries; None for all listeners. If two match the same, the first one counts.
        excluded: the ports that are left out.
    """

    def __init__(
        self, wanted: Iterable[Wanted] | None = None, excluded: Iterable[range] = ()
    ) -> None:
        self._wanted = None if wanted is None else tuple(wanted)
        self._excluded = {port for ports in excluded for port in ports}
        self._known = defaultdict[tuple[str | None, str | None], dict[int, Wanted]](dict)
        for entry in self._wanted or ():
            known = self._known[entry.place, entry.address]
            for ports in entry.ports:
                for port in ports:
                    known.setdefault(port, entry)

    @property
    def is_every(self) -> bool:
        """Whether it is every listener of the host."""
        return self._wanted is None and not self._excluded

    def find(self, place: str, address: str, port: int) -> Wanted | None:
        """Return the most specific entry that matches a listener, None if none does.

        An entry with a place is more specific than one with an address.
        """
        if self._wanted is None:
            return None if port in self._excluded else _ANY
        for key in ((place, address), (place, None), (None, address), (None, None)):
            # get(), unlike [], does not add a key to a defaultdict.
            if (entry := self._known.get(key, {}).get(port)) is not None:
                return entry
        return None

    def expected(self, own_place: str) -> Iterator[tuple[Wanted, tuple[str, str, int]]]:
        """Yield each listener that should exist: its entry, and its place, address and port.

        Args:
            own_place: the place for an entry that does not have one.
        """
        for entry in self._wanted or ():
            place = own_place if entry.place is None else entry.place
            address = entry.address or "*"
            for port in _expected(entry):
                if self.find(place, address, port) is entry:
                    yield entry, (place, address, port)

    def is_expected(self, place: str, address: str, port: int) -> bool:
        """Return whether a listener is expected to exist, not only in a large range of ports."""
        entry = self.find(place, address, port)
        return entry is not None and any(
            port in ports for ports in entry.ports if len(ports) <= FEW
        )


def matches(path: str, patterns: Collection[str]) -> bool:
    """Return whether a UNIX socket is watched.

    Args:
        path: its path as unix_diag.written() returns it.
        patterns: patterns of fnmatch.
    """
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def named(names: Mapping[int, str]) -> Watched:
    """Return a Watched of some ports at all places and addresses.

    Args:
        names: the names of their listeners, by port.
    """
    return Watched(Wanted((range(port, port + 1),), name) for port, name in names.items())


def _expected(entry: Wanted) -> Iterator[int]:
    return (port for ports in entry.ports if len(ports) <= FEW for port in ports)
