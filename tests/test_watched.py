"""The configuration entry of a listener, and the listeners that are at 0 from the start."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import zone_rows
from dtrace_exporter import config, namespaces
from dtrace_exporter.config import HostConfig, ListenerConfig
from dtrace_exporter.listeners import Capabilities, ListenerTable, SessionId
from dtrace_exporter.tracing import plan
from dtrace_exporter.tracing.tally import Tally
from dtrace_exporter.watched import FEW, Wanted, Watched

SESSION = SessionId("", "all")


def one(port: int, name: str = "", place: str | None = None, address: str | None = None) -> Wanted:
    """Return an entry for one port."""
    return Wanted((range(port, port + 1),), name, address, place)


def name(watched: Watched, place: str, address: str, port: int = 80) -> str | None:
    """Return the name of a listener; None if it is not watched."""
    entry = watched.find(place, address, port)
    return None if entry is None else entry.name


def test_the_most_specific_entry_counts() -> None:
    """An entry with a place precedes one with an address, which precedes one without either."""
    entries = [
        one(80, "all"),
        one(80, "at", address="a"),
        one(80, "in", "z"),
        one(80, "both", "z", "a"),
    ]
    for some in (entries, entries[::-1]):
        watched = Watched(some)
        where = [("z", "a"), ("z", "b"), ("y", "a"), ("y", "b")]
        assert [name(watched, *each) for each in where] == ["both", "in", "at", "all"]
        assert name(watched, "z", "a", 81) is None
    assert name(Watched(entries[:3]), "z", "a") == "in"


def test_elsewhere_is_not_watched() -> None:
    """If every entry of a port has a place or an address, other listeners on it are not watched."""
    watched = Watched([one(80, "in", "z"), one(80, "at", address="a")])
    assert name(watched, "y", "b") is None
    assert name(watched, "z", "b") == "in"


def test_ranges() -> None:
    """A range includes both of its ends, and no other port."""
    watched = Watched([Wanted((range(10, 12), range(20, 21)), "x")])
    assert [port for port in range(30) if name(watched, "", "*", port)] == [10, 11, 20]


def test_excluded() -> None:
    """All ports of a host are watched except the excluded ones, which are watched in no place."""
    watched = Watched(None, [range(10, 13)])
    assert [port for port in range(8, 16) if name(watched, "z", "*", port) is None] == [10, 11, 12]
    assert not watched.is_every
    assert Watched().is_every
    assert [*watched.expected("")] == []


def expected(table: ListenerTable) -> set[tuple[str, str, int]]:
    """Return place, address and port of all listeners of a table."""
    return {one.identity[1:] for one in table}


def test_expected() -> None:
    """Every entry has a listener at 0 until a real one exists, except long ranges of ports."""
    table = ListenerTable()
    many = Wanted((range(1000, 1000 + FEW + 1),))
    few = Wanted((range(2000, 2002),))
    entries = [one(80, "all"), one(80, "in", "z"), one(80, "at", address="10.0.0.1"), many, few]
    table.watch(SESSION, Watched(entries), Capabilities("zone", "global"))
    ranges = {("global", "*", 2000), ("global", "*", 2001)}
    in_zone, at = ("z", "*", 80), ("global", "10.0.0.1", 80)
    assert expected(table) == {("global", "*", 80), in_zone, at} | ranges
    table.listener(SESSION, "y", "10.0.0.2", 80)
    assert expected(table) == {("y", "10.0.0.2", 80), in_zone, at} | ranges
    table.listener(SESSION, "z", "10.0.0.1", 80)
    assert expected(table) == {("y", "10.0.0.2", 80), ("z", "10.0.0.1", 80), at} | ranges


def test_zones_of_one_port() -> None:
    """Two zones with the same port have separate names, and a reload can change one of them."""
    table = ListenerTable()
    zones = Capabilities("zone", "global")
    table.watch(SESSION, Watched([one(80, "web", "global"), one(80, "shop", "z1")]), zones)
    tally = Tally(table, SESSION)
    for line in (
        "ready 5 global",
        *(zone_rows.told(80, zone=zone) for zone in ("global", "z1", "z2")),
    ):
        tally.feed(line)
    assert {each.identity.place: table.name(each) for each in table} == {
        "global": "web",
        "z1": "shop",
    }
    counted = [each for each in table if each.identity.place == "z1"]
    table.watch(SESSION, Watched([one(80, "web", "global"), one(80, "store", "z1")]), zones)
    assert [each for each in table if table.name(each) == "store"] == counted
    table.watch(SESSION, Watched([one(80, "web", "global")]), zones)
    assert {each.identity.place for each in table} == {"global"}


def test_netns(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry's namespace is an inode, a name on this host, or the exporter's own namespace."""
    monkeypatch.setattr(namespaces, "own", lambda: "7")
    ports = (range(80, 81),)
    listeners = [
        ListenerConfig(ports, name, netns=netns)
        for name, netns in (("own", "7"), ("number", "8"), ("known", "blue"), ("unknown", "red"))
    ]
    watched = plan.watched(HostConfig(listeners=tuple(listeners)), {"blue": "9"})
    assert [name(watched, place, "*") for place in ("", "7", "8", "9", "red")] == [
        "own",
        None,
        "number",
        "known",
        None,
    ]
    far = plan.watched(HostConfig("far", listeners=tuple(listeners)), {})
    assert [name(far, place, "*") for place in ("", "7", "8")] == [None, "own", "number"]


def test_a_session_for_each_port(tmp_path: Path) -> None:
    """Each port of the entries has one session, which covers all entries with that port."""
    file = tmp_path / "c.yml"
    file.write_text(
        "listeners:\n"
        "- {ports: [80, 8000-8001], name: web}\n"
        "- {port: 80, address: '::1', name: local}\n"
        "- {port: 8001, netns: nowhere, name: never}\n",
        encoding="utf-8",
    )
    plans = plan.sessions(config.load(file), {})
    found = {session.name: watched for session, (_, watched) in plans.items()}
    assert {*found} - {"calls"} == {"port-80", "port-8000", "port-8001"}
    assert [name(found["port-80"], "", address) for address in ("*", "::1")] == ["web", "local"]
    assert name(found["port-80"], "", "*", 8000) is None
    assert name(found["port-8001"], "", "*", 8001) == "web"


places = st.sampled_from(["", "y", "z"])
addresses = st.sampled_from(["*", "a", "b"])
entries = st.lists(
    st.builds(
        one, st.integers(80, 82), st.text(max_size=2), st.none() | places, st.none() | addresses
    ),
    max_size=6,
)


@given(entries, places, addresses, st.integers(80, 82))
def test_like_a_search(entries: list[Wanted], place: str, address: str, port: int) -> None:
    """The entry that is found is the first of the most specific ones that fit."""
    fitting = [
        entry
        for entry in entries
        if port in entry.ports[0]
        and entry.place in (None, place)
        and entry.address in (None, address)
    ]
    best = max(
        fitting,
        key=lambda entry: (entry.place is not None, entry.address is not None),
        default=None,
    )
    assert Watched(entries).find(place, address, port) is best
