"""The text of a scrape, compared with prometheus_client's text of the same state."""

from __future__ import annotations

import asyncio
import gzip
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from dtrace_exporter.collector import Collector
from dtrace_exporter.listeners import Capabilities, Listener, SessionId
from dtrace_exporter.sockets import Queues
from dtrace_exporter.state import SessionStatus, Source, State
from dtrace_exporter.turns import Precedence
from dtrace_exporter.watched import Watched, named
from dtrace_exporter.web import exposition
from dtrace_exporter.web.exposition import Exposition, Texts

ENCODERS: tuple[exposition.Encode, ...] = (generate_latest, generate_openmetrics)
LOCAL = SessionId("", "all")
FAR = SessionId("far", "port-22")
NOTHING = CollectorRegistry()

texts = st.text(st.characters(exclude_categories=()), max_size=8) | st.sampled_from(
    ["%s", "%", "\\n", '"', "\n", "\r", "\u2028", "0.0", " 0.0", "{}", "# EOF"]
)
numbers = st.integers(0, 2**70)
sizes = st.none() | st.integers(0, 2**32)
sessions = st.sampled_from([LOCAL, FAR])
reasons = st.sampled_from(["q_full", "q0_full", "other"])


def uncached(state: State, encode: exposition.Encode) -> bytes:
    """Return prometheus_client's text from a collector that has no earlier scrape."""
    registry = CollectorRegistry()
    registry.register(Collector(state))
    return encode(registry)


class Scrapes(RuleBasedStateMachine):
    """Two hosts whose listeners and sessions change at random between two scrapes."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State()
        self.collector = Collector(self.state)
        self.texts = Texts()
        for session in (LOCAL, FAR):
            self.state.table.watch(session, named({22: "ssh", 80: "web"}))
            self.state.sessions[session] = SessionStatus()

    def listener(self, session: SessionId, address: str) -> Listener:
        return self.state.table.listener(session, "", address, 22)

    @rule(
        session=sessions,
        address=texts,
        bucket=st.integers(0, 11),
        reason=reasons,
        count=numbers,
        total=numbers,
    )
    def count(
        self, session: SessionId, address: str, bucket: int, reason: str, count: int, total: int
    ) -> None:
        listener = self.listener(session, address)
        listener.count_syns(bucket, 4, count, total)
        listener.drop(reason, count)
        listener.established += count
        listener.count_accepts(bucket, count, total)

    @rule(session=sessions, address=texts, q0=sizes, q=sizes, q0_limit=sizes, q_limit=sizes)
    def observe(self, session: SessionId, address: str, **lengths: int | None) -> None:
        self.listener(session, address).sockets[1] = Queues(**lengths)

    @rule(session=sessions)
    def close(self, session: SessionId) -> None:
        self.state.table.clear_queues(session)

    @rule(session=sessions, ports=st.dictionaries(st.integers(22, 24), texts) | st.none())
    def reload(self, session: SessionId, ports: dict[int, str] | None) -> None:
        self.state.table.watch(session, Watched() if ports is None else named(ports))

    @rule(
        session=sessions,
        capabilities=st.builds(
            Capabilities,
            place_label=st.sampled_from(["zone", "netns"]),
            reasons=st.lists(reasons, unique=True).map(tuple),
        ),
    )
    def start(self, session: SessionId, capabilities: Capabilities) -> None:
        self.state.table.watch(session, self.state.table.watched(session), capabilities)

    @rule(
        session=sessions, restarts=numbers, last=st.floats(0.5, 1e10), name=texts, up=st.booleans()
    )
    def session(self, session: SessionId, restarts: int, last: float, name: str, up: bool) -> None:
        status = self.state.sessions[session]
        status.restarts, status.last_record, status.up = restarts, last, up
        status.features = {name: up}
        self.state.source = Source(name)

    @rule(session=sessions, address=texts, odd=st.sampled_from(["x", 10**400]))
    def spoil(self, session: SessionId, address: str, odd: Any) -> None:
        self.listener(session, address).sockets[1] = Queues(None, None, odd, None)

    @invariant()
    def same(self) -> None:
        for encode in ENCODERS:
            shown = self.texts.render(self.collector.read(), NOTHING, encode)
            assert b"".join(shown) == uncached(self.state, encode)


TestScrapes = Scrapes.TestCase
TestScrapes.settings = settings(deadline=None, max_examples=15, stateful_step_count=20)


def busy() -> State:
    """Return port 22 with something in every family."""
    state = State(source=Source("dtrace", "linux", "2.0.7"))
    state.table.watch(LOCAL, named({22: "ssh"}), Capabilities(reasons=("q_full",)))
    ssh = state.table.listener(LOCAL, "", "*", 22)
    ssh.established += 3
    ssh.sockets[1] = Queues(7, 3, None, 4)
    state.sessions[LOCAL] = SessionStatus(last_record=1.5)
    return state


def lines(body: bytes) -> list[bytes]:
    """Return the lines about listeners and sessions, without those about this process."""
    return [line for line in body.splitlines() if b"dtrace_" in line]


async def test_openmetrics() -> None:
    """Each of two equal scrapes gives prometheus_client's text with a single # EOF."""
    state = busy()
    answers = Exposition(state)
    for _ in range(2):
        body = b"".join(await answers.answer(openmetrics=True))
        assert lines(body) == lines(uncached(state, generate_openmetrics))
        assert body.endswith(b"# EOF\n")
        assert body.count(b"# EOF\n") == 1


def test_crowd_shares_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 concurrent scrapes all but the first share one answer, made after their requests."""
    state = busy()
    made = []
    began, go_on = threading.Event(), threading.Event()
    plain = exposition._body

    def slowly(*args: Any) -> list[bytes]:
        made.append(args)
        began.set()
        assert go_on.wait(30)
        return plain(*args)

    monkeypatch.setattr(exposition, "_body", slowly)

    async def crowd() -> list[bytes]:
        answers = Exposition(state)
        first = asyncio.create_task(answers.answer(compress=True))
        assert await asyncio.to_thread(began.wait, 30)
        state.table.listener(LOCAL, "", "*", 22).established += 1
        others = [asyncio.create_task(answers.answer(compress=True)) for _ in range(199)]
        await asyncio.sleep(0)
        go_on.set()
        return [gzip.decompress(b"".join(body)) for body in await asyncio.gather(first, *others)]

    first, *others = asyncio.run(crowd())
    assert len(made) == 2
    assert b'_established_total{address="*",listener="ssh",netns="",port="22"} 3.0' in first
    assert all(
        b'established_total{address="*",listener="ssh",netns="",port="22"} 4.0' in other
        for other in others
    )


@pytest.mark.parametrize("openmetrics", [False, True])
async def test_the_usual_does_not_wait_for_much_else(*, openmetrics: bool) -> None:
    """An ordinary scrape waits for at most one of the many scrapes with chosen names."""
    scrapes = Exposition(busy())
    odd = [asyncio.create_task(scrapes.answer(names=[f"name_{number}"])) for number in range(20)]
    await asyncio.sleep(0)
    await scrapes.answer(openmetrics=openmetrics)
    assert sum(one.done() for one in odd) <= 2
    await asyncio.gather(*odd)


@pytest.mark.parametrize("names", [(), ("x",)], ids=["all", "some"])
async def test_only_the_usual_goes_first(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    """A scrape of all names has precedence over the page; one with chosen names has none."""
    precedence, seen = Precedence(), []
    plain = exposition._body

    def looked(*args: Any) -> list[bytes]:
        seen.append(precedence._free.is_set())
        return plain(*args)

    monkeypatch.setattr(exposition, "_body", looked)
    await Exposition(busy(), precedence).answer(names=names)
    assert seen == [bool(names)]
    assert precedence._free.is_set()


async def test_failure_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape that failed does not make the next one fail."""
    answers = []

    def fail(*_args: Any) -> bytes:
        raise OSError("no")

    scrapes = Exposition(busy())
    with monkeypatch.context() as broken:
        broken.setattr(exposition, "_body", fail)
        with pytest.raises(OSError, match="no"):
            await scrapes.answer()
    answers.append(await scrapes.answer())
    assert b"dtrace_session_up" in b"".join(answers[0])


def test_values_that_look_like_fields() -> None:
    """Labels that look like format fields are written unchanged."""
    state = State(source=Source("%s", "%(0)s", '%%\\ "\n'))
    state.table.watch(LOCAL, named({22: '%(1)s \\n "%d" \n'}))
    ours = b"".join(Texts().render(Collector(state).read(), NOTHING, generate_latest))
    assert ours == uncached(state, generate_latest)


def test_forgets_what_is_gone() -> None:
    """Neither the collector nor the text keeps a listener that the table has forgotten."""
    state = busy()
    collector, text = Collector(state), Texts()
    encode = generate_latest
    list(text.render(collector.read(), NOTHING, encode))
    known = len(text._known)
    state.table.unwatch(LOCAL)
    list(text.render(collector.read(), NOTHING, encode))
    assert collector._known == {}
    assert len(text._known) == known - 1


@given(st.lists(st.binary(max_size=9)))
def test_chunks(pieces: list[bytes]) -> None:
    """Joining pieces changes no byte, and all chunks but the last have the minimum size."""
    whole = b"".join(pieces)
    with pytest.MonkeyPatch.context() as smaller:
        smaller.setattr(exposition, "_CHUNK", 8)
        found = list(exposition.chunks(pieces))
    assert b"".join(found) == whole
    assert all(len(chunk) >= 8 for chunk in found[:-1])
