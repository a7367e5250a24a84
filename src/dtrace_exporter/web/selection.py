"""Selects listeners by their port and by words in their other labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from dtrace_exporter.listeners import Listener, Owner
from dtrace_exporter.state import State

FIELDS = ("port", "name", "host", "zone", "netns", "jail", "owner")
"""The parameters of a query that select listeners."""


class Selection(NamedTuple):
    """Conditions for listeners; an empty one matches all.

    ``port`` is the whole number. The others are parts of a listener's name, label or owner; case
    does not matter.
    """

    port: str = ""
    name: str = ""
    host: str = ""
    zone: str = ""
    netns: str = ""
    jail: str = ""
    owner: str = ""

    @property
    def query(self) -> dict[str, str]:
        """The parameters of a query for this selection."""
        return {field: text for field, text in self._asdict().items() if text}

    @property
    def folded(self) -> dict[str, str]:
        """The conditions in lower case, made once for all listeners because they may be long."""
        return {
            field: text if field == "port" else text.casefold()
            for field, text in self.query.items()
        }

    def of(self, listeners: Iterable[Listener], state: State) -> Iterator[Listener]:
        """Yield the listeners that match, among some of a state's table."""
        asked = self.folded
        for listener in listeners:
            identity = listener.identity
            owner = state.owner(listener) or Owner()
            values = {
                "port": str(identity.port),
                "name": state.table.name(listener),
                "host": identity.host,
                state.table.capabilities(listener).place_label: (
                    f"{identity.place} {owner.place_name}".strip()
                ),
                "owner": " ".join(owner[:-1]),
            }
            if fits(values, asked):
                yield listener


def fits(values: Mapping[str, str], asked: Mapping[str, str]) -> bool:
    """Return whether a listener matches.

    Args:
        values: its values of FIELDS; a missing one is empty.
        asked: the conditions, as Selection.folded.
    """
    return all(
        text == values.get("port") if field == "port" else text in values.get(field, "").casefold()
        for field, text in asked.items()
    )
