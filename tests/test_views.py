"""Views of the whole state: the samples of the history, the JSON, and the selection."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.waiting import eventually

from dtrace_exporter.collector import Collector
from dtrace_exporter.listeners import Capabilities, SessionId
from dtrace_exporter.sockets import QCapacity, Queues
from dtrace_exporter.state import SessionStatus, State
from dtrace_exporter.turns import Precedence
from dtrace_exporter.watched import Watched, named
from dtrace_exporter.web import api, handlers, page, views
from dtrace_exporter.web.rates import History
from dtrace_exporter.web.selection import FIELDS, Selection, fits
from dtrace_exporter.web.server import bind
from dtrace_exporter.web.views import Views
from step_meter import metered
from web_serving import fetch, get, one_port, port_of, serving

PREFIX = "dtrace_tcp_listen_"
STEP_MS = 50
"""Like the limit in turns.py, but in processor time, so that other processes do not count."""


def zones() -> State:
    """Return two hosts: Linux with a container, and Solaris with zones."""
    state = one_port()
    here, away = SessionId("", "port-22"), SessionId("sol10", "all")
    state.table.listener(here, "4026532281", "127.0.0.1", 22)
    sun = Capabilities("zone", "global", QCapacity(plus=0), reasons=("q_full", "q0_evicted"))
    state.table.watch(away, named({22: "ssh", 5432: "postgres", 15432: "Postgres-2"}), sun)
    state.sessions[away] = SessionStatus(up=True, reason="")
    for zone, port in (("global", 22), ("db-1", 22), ("db-1", 5432), ("db-2", 15432)):
        state.table.listener(away, zone, "*", port).sockets[port] = Queues(0, 5, 1024, 5)
    return state


def listeners(state: State, query: str = "") -> list[dict[str, Any]]:
    """Return the answer of the API."""
    answer = get(state, f"/api/v1/listeners{query}")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    found: list[dict[str, Any]] = json.loads(answer.body)
    return found


class TestAPI:
    def test_row(self) -> None:
        """An object has the labels, and each number under its metric's name without the prefix."""
        (row,) = listeners(one_port())
        histograms = {key: row.pop(key) for key in [*row] if key.endswith("_bucket")}
        assert row == {
            "port": "22",
            "address": "*",
            "listener": "ssh",
            "netns": "",
            "syns_total": 3,
            "drops_total": {"q_full": 1, "q0_full": 0},
            "established_total": 17,
            "handshake_seconds_count": 0,
            "handshake_seconds_sum": 0,
            "accepts_total": 2,
            "synack_retransmits_total": 0,
            "q_saturation_ratio_count": 3,
            "q_saturation_ratio_sum": 1,
            "accept_wait_seconds_count": 2,
            "accept_wait_seconds_sum": 0.003,
            "q0_length": 7,
            "q_length": 3,
            "q_limit": 4,
            "q_capacity": 5,
        }
        assert histograms["q_saturation_ratio_bucket"]["0.0"] == 2
        assert histograms["accept_wait_seconds_bucket"]["+Inf"] == 2

    def test_as_the_metrics(self) -> None:
        """The API has every sample of each listener that the metrics have, and no others."""
        state = zones()
        expected: dict[str, dict[str, Any]] = {}
        for family in Collector(state).collect():
            for sample in family.samples:
                if sample.name.startswith(PREFIX):
                    labels = dict(sample.labels)
                    own = labels.pop("reason", None) or labels.pop("le", None)
                    row = expected.setdefault(json.dumps(labels, sort_keys=True), dict(labels))
                    key = sample.name.removeprefix(PREFIX)
                    if own:
                        row.setdefault(key, {})[own] = sample.value
                    else:
                        row[key] = sample.value
        order = str
        assert sorted(listeners(state), key=order) == sorted(
            (json.loads(json.dumps(row)) for row in expected.values()), key=order
        )

    def test_unknown(self) -> None:
        """A number that the source does not have is absent."""
        state = State()
        session = SessionId("", "sock_diag")
        nothing = Capabilities(
            syns=False,
            established=False,
            accepts=False,
            accept_wait=False,
            handshake=False,
            synack_retransmits=False,
        )
        state.table.watch(session, Watched(), nothing)
        assert get(state, "/api/v1/listeners").body == b"[]\n"
        state.table.listener(session, "", "*", 80)
        assert listeners(state) == [{"port": "80", "address": "*", "listener": "", "netns": ""}]

    def test_gzip(self) -> None:
        """The answer is compressed for clients that accept gzip."""
        answer = get(one_port(), "/api/v1/listeners", headers={"Accept-Encoding": "gzip"})
        assert json.loads(gzip.decompress(answer.body))[0]["port"] == "22"

    @pytest.mark.parametrize(
        ("query", "expected"),
        [
            ("?port=22", ["22", "22", "22", "22"]),
            ("?port=2", []),
            ("?port=x", []),
            ("?name=POSTGRES", ["5432", "15432"]),
            ("?zone=db", ["22", "5432", "15432"]),
            ("?zone=db-1&port=5432", ["5432"]),
            ("?netns=40265", ["22"]),
            ("?host=sol&name=ssh", ["22", "22"]),
            ("?port=&name=", ["22", "22", "22", "5432", "15432", "22"]),
            ("?zone=%00%22%3E", []),
        ],
    )
    def test_chosen(self, query: str, expected: list[str]) -> None:
        """The query selects listeners by port, and by words in names and places."""
        assert sorted(row["port"] for row in listeners(zones(), query)) == sorted(expected)
        shown = page.render(
            zones(),
            History(),
            "/metrics",
            "n",
            page.View(selection=Selection(**dict(_pairs(query)))),
        ).decode()
        assert shown.count('<th scope="row" class="number">') == len(expected)


def _pairs(query: str) -> list[tuple[str, str]]:
    pairs = (pair.partition("=") for pair in query.removeprefix("?").split("&"))
    return [(name, value) for name, _, value in pairs]


@given(
    st.fixed_dictionaries({}, optional={field: st.text(max_size=3) for field in FIELDS}),
    st.fixed_dictionaries({}, optional={field: st.text(max_size=3) for field in FIELDS}),
)
def test_selection(asked: dict[str, str], values: dict[str, str]) -> None:
    """An empty selection fits all, a longer one never fits more, and a listener fits itself."""
    assert fits(values, Selection().folded)
    assert fits(values, Selection(**values).folded)
    selection = Selection(**asked)
    for field in asked:
        if fits(values, selection.folded):
            assert fits(values, selection._replace(**{field: ""}).folded)
    assert Selection(**selection.query) == selection


def test_a_long_filter() -> None:
    """A long filter is folded once, and not for each listener."""
    folded = []

    class Text(str):
        def casefold(self) -> str:
            folded.append(self)
            return super().casefold()

    state = State()
    session = SessionId("", "all")
    state.table.watch(session, Watched())
    for port in range(1, 100):
        state.table.listener(session, "", "*", port)
    assert not [*Selection(name=Text("X" * 10_000)).of(state.table, state)]
    assert len(folded) == 1


async def test_rates_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look at the page has rates, because the service takes samples by itself."""
    monkeypatch.setattr(views, "SAMPLE_SECONDS", 0.01)
    state = one_port()
    status = state.sessions[SessionId("", "port-22")]
    ssh = next(iter(state.table))
    app = handlers.application(state, None)
    server = handlers.serve(app, bind(["127.0.0.1:0"]))
    sampling = asyncio.create_task(handlers.keep_sampling(app))
    history = app.settings["views"]._history
    try:
        for at in (500.0, 501.0):
            status.last_record = at
            ssh.count_syns(0, 4, 7, 0)
            count = len(history._looks), history._looks[-1].when if history._looks else 0.0

            def sampled(before: object = count) -> bool:
                looks = history._looks
                return bool(looks) and (len(looks), looks[-1].when) != before

            await eventually(sampled)
        text = (await fetch(server, "/")).body.decode()
        assert "come with the next update" not in text
        assert '<td class="number">7</td>' in text
        assert port_of(server)
    finally:
        sampling.cancel()
        with suppress(asyncio.CancelledError):
            await sampling
        server.stop()
        await server.close_all_connections()


async def test_sampling_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A failed sample is logged, the next one is taken, and the pauses are long enough."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise asyncio.CancelledError

    async def refresh() -> None:
        if not pauses:
            raise OSError("no")

    state = one_port()
    state.refresh = refresh
    one = Views(state)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await one.keep_sampling()
    assert [record.getMessage() for record in caplog.records] == ["no sample for the history"]
    assert len(one._history._looks) == 2
    assert min(pauses) > 4


def test_views_give_way() -> None:
    """The page and the JSON let a scrape go first at each listener, and else do not wait."""
    precedence, state, asked = Precedence(), zones(), []
    for render in (
        lambda: api.render(state, Selection(), lambda: asked.append("/api")),
        lambda: page.render(
            state, History(), "/metrics", "n", page.View(), lambda: asked.append("/")
        ),
    ):
        render()
    assert asked.count("/api") == len(state.table)
    assert asked.count("/") > 2 * len(state.table)
    with precedence.first():
        began = time.monotonic()
        for _ in range(20):
            precedence.give_way()
    # Even on a busy machine, a wait is not shorter.
    assert time.monotonic() - began > 0.018
    assert precedence._free.is_set()


async def test_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """With 10,000 listeners, a sample, the page and the JSON all run in short steps."""
    state = State()
    session = SessionId("", "all")
    state.sessions[session] = SessionStatus(up=True, reason="", last_record=1e9)
    state.table.watch(session, Watched(), Capabilities(reasons=("q_full", "q0_full")))
    for number in range(10_000):
        address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        listener = state.table.listener(session, "", address, 80)
        listener.sockets[number] = Queues(0, number % 130, None, 128)
    one = Views(state)
    longest = {}
    for what in ("sample", "/", "/api/v1/listeners"):
        async with serving(state) as server:
            with metered() as meter:
                if what == "sample":
                    sampling = asyncio.create_task(one.keep_sampling())
                    await eventually(lambda: one._history._looks)
                    sampling.cancel()
                else:
                    assert (await fetch(server, what, seconds=120.0)).status == 200
        longest[what] = 1000 * meter.longest
    with capsys.disabled():
        print(f"\n    longest steps, ms: {longest}", end=" ")  # noqa: T201
    assert max(longest.values()) < STEP_MS
