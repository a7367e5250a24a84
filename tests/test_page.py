"""The landing page: what it shows, and how it looks and behaves in a real Chromium."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from html import unescape
from html.parser import HTMLParser
from itertools import count, groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from axe_core_python.base import AXE_SCRIPT
from hypothesis import example, given
from hypothesis import strategies as st
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from browser import Served, chromium, console, served, use
from dtrace_exporter import __version__, reasons
from dtrace_exporter.listeners import Capabilities, Owner, SessionId
from dtrace_exporter.sockets import QCapacity, Queues
from dtrace_exporter.state import SessionStatus, Source, State
from dtrace_exporter.watched import Watched, named
from dtrace_exporter.web import page, rates, views
from dtrace_exporter.web.rates import Change, History, Point
from dtrace_exporter.web.selection import FIELDS, Selection
from web_serving import HOSTILE, get, one_port

DASH = "\N{EN DASH}"
SCREENSHOTS = os.environ.get("DTRACE_EXPORTER_SCREENSHOTS", "")
"""The directory that the screenshots for the documentation are copied to; empty for none."""


class Page(HTMLParser):
    """The page's elements, and the text of every cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self._in_cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def ports(self) -> list[str]:
        """The ports of the listeners, in the order of the page."""
        return [cell for cell in self.cells if cell.isdigit() and 1000 <= int(cell) < 65536]


def rendered(
    state: State, history: History | None = None, path: str = "/metrics", **options: Any
) -> str:
    """Return the page."""
    return page.render(state, history or History(), path, "n", page.View(**options)).decode()


def fleet(rows: int = 0) -> State:
    """A web server, a database and a host that is down; or ``rows`` listeners and the database."""
    state = State(source=Source("dtrace", "linux", "2.0.7"), last_reload_success=1.5e9)
    here, away = SessionId("", "all"), SessionId("", "port-5432")
    state.sessions[here] = SessionStatus(up=True, reason="", pid=4242, last_record=1e9)
    state.sessions[away] = SessionStatus(up=True, reason="", pid=4250, last_record=1e9, restarts=1)
    reasons = ("q_full", "q0_full", "q_full_ack", "other")
    names = {443: "web", 80: "redirect", 8080: "app", 22: "ssh", 9090: "prometheus"}
    queues = {443: (96, 128), 80: (3, 511), 8080: (129, 128), 22: (0, 128), 9090: (0, 4096)}
    if rows:
        queues = {1000 + n: (n * 7 % 129, 128) for n in range(rows)}
        names = {port: f"service-{port}" for port in queues}
    state.table.watch(here, named(names), Capabilities(reasons=reasons))
    state.table.watch(away, named({5432: "postgres"}), Capabilities(reasons=reasons))
    for number, (port, (q, q_limit)) in enumerate(queues.items()):
        address = "::1" if port == 9090 else "*"
        listener = state.table.listener(here, "", address, port)
        listener.sockets[number] = Queues(q // 8, q, None, q_limit)
        state.owners = {**state.owners, listener.identity: Owner(names[port], f"{port}.service")}
    state.table.listener(away, "4026532281", "10.0.3.7", 5432).sockets[9] = Queues(0, 2, None, 4096)
    if not rows:
        silent = SessionId("sol10-u9", "all")
        reason = "dtrace(1) ended: exit status 255: ssh: connect to host sol10-u9: timed out"
        state.sessions[silent] = SessionStatus(reason=reason, restarts=12)
        zones = Capabilities(place_label="zone", own_place="global", reasons=("q_full", "q0_full"))
        state.table.watch(silent, named({80: "intranet"}), zones)
    work(state)
    return state


def work(state: State) -> None:
    """Add 15 seconds of work to all listeners and sessions."""
    for status in state.sessions.values():
        if status.last_record is not None:
            status.last_record += 15
    for listener in state.table:
        queues = listener.queues
        if queues is None or queues.q is None or queues.q_limit is None:
            continue
        calls = 30 * (1 + queues.q) * (listener.identity.port % 7 + 1)
        full = queues.q > queues.q_limit
        dropped = calls // 10 if full else 0
        listener.count_syns(1, queues.q_limit, calls, calls * queues.q)
        listener.count_syns(11, queues.q_limit, dropped, dropped * queues.q)
        listener.drop("q_full", dropped)
        listener.established += calls
        bucket = 5 + (queues.q > 2) + 3 * (queues.q > 90) + full
        wait = 4 ** (bucket + 4) * 5 // 3
        listener.count_accepts(bucket, calls, calls * wait)


def pass_by(state: State, left: int) -> None:
    """Add 15 seconds in which the queues of a fleet grow towards their final lengths."""
    ends = {443: (96, 128), 8080: (129, 128), 80: (3, 511)}
    for port, (q, q_limit) in ends.items():
        listener = next(one for one in state.table if one.identity.port == port)
        length = q if left < 15 else max(0, q - left - left * port % 11)
        (socket,) = listener.sockets
        listener.sockets[socket] = Queues(q // 8, length, None, q_limit)
    work(state)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the page refresh every second, and let each look be a point of the history later."""
    seconds = count(1_000_000_000.0, rates.POINT_SECONDS)
    monkeypatch.setattr(page, "REFRESH_SECONDS", 1)
    monkeypatch.setattr(views, "History", lambda: History(lambda: next(seconds)))


class TestHistory:
    @staticmethod
    def two_looks(
        change: Callable[[State], object], seconds: float = 10.0
    ) -> tuple[float | None, Change]:
        """Look at port 22 before and after a change."""
        times = iter((1000.0, 1000.0 + seconds))
        history = History(lambda: next(times))
        state = one_port()
        state.sessions[SessionId("", "port-22")].last_record = 500.0
        assert history.look(state) == (None, {})
        change(state)
        ago, changes = history.look(state)
        return ago, changes.get(next(iter(state.table)).identity, Change())

    @staticmethod
    def work(state: State, record: float = 504.0) -> None:
        """Count eight SYNs, one of them dropped, and two accepts, until the row at a given time."""
        ssh = next(iter(state.table))
        ssh.count_syns(0, 4, 7, 0)
        ssh.count_syns(10, 4, 1, 4)
        ssh.drop("q_full", 1)
        ssh.count_accepts(6, 1, 4**10)
        ssh.count_accepts(5, 1, 4**10 - 576)
        state.sessions[SessionId("", "port-22")].last_record = record

    def test_rates(self) -> None:
        """Rates are computed between the newest rows at the two looks."""
        ago, change = self.two_looks(self.work)
        assert ago == 10
        assert change == Change(2.0, 0.25, 0.5, (4**10 - 288) / 1e9, 4**11 / 1e9)

    def test_no_newer_row(self) -> None:
        """If no row comes between two looks, the change is unknown."""
        assert self.two_looks(lambda state: self.work(state, 500.0))[1] == Change()

    def test_down(self) -> None:
        """If the session is down, the change is unknown."""

        def down(state: State) -> None:
            self.work(state)
            state.sessions[SessionId("", "port-22")].up = False

        assert self.two_looks(down)[1] == Change()

    def test_unwatched_and_watched_again(self) -> None:
        """Counters that start again at 0 do not give a negative rate."""

        def again(state: State) -> None:
            session = SessionId("", "port-22")
            state.table.unwatch(session)
            state.table.watch(session, named({22: "ssh"}))
            state.table.listener(session, "", "*", 22)
            state.sessions[session].last_record = 504.0

        assert self.two_looks(again)[1] == Change()

    @pytest.mark.parametrize("seconds", [-1.0, 0.0, 121.0])
    def test_no_use(self, seconds: float) -> None:
        """A look is not compared with one in the future, at the same moment or long ago."""
        assert self.two_looks(self.work, seconds) == (None, Change())

    def test_longest_wait(self) -> None:
        """A wait beyond the last bucket has no upper bound."""

        def wait(state: State) -> None:
            next(iter(state.table)).count_accepts(13, 1, 20 * 10**9)
            state.sessions[SessionId("", "port-22")].last_record = 504.0

        change = self.two_looks(wait)[1]
        assert (change.wait, change.longest) == (20.0, float("inf"))
        assert page._longest(change.longest) == "> 17.2 s"

    def test_without_a_session(self) -> None:
        """Without a session, rates are over the time between the two looks themselves."""
        times = iter((1000.0, 1004.0))
        history = History(lambda: next(times))
        state = State()
        source = SessionId("", "sock_diag")
        nothing = Capabilities(syns=False, reasons=("other",), accepts=False, accept_wait=False)
        state.table.watch(source, Watched(), nothing)
        listener = state.table.listener(source, "", "*", 22)
        history.look(state)
        listener.drop("other", 6)
        assert history.look(state)[1] == {listener.identity: Change(drops=1.5)}

    @given(st.lists(st.floats(0, 60, allow_nan=False), max_size=60))
    def test_window(self, steps: list[float]) -> None:
        """However often somebody looks, the history stays small and compares with no older look."""
        now = 1000.0
        history = History(lambda: now)
        first = now
        for step in steps:
            now += step
            ago, _ = history.look(one_port())
            assert ago is None or 0 < ago <= min(rates._OLDEST_LOOK, now - first + 1e-6)
            assert len(history._looks) <= rates.WINDOW_SECONDS / rates._LOOKS_APART + 2
            assert len(history._points) <= rates.POINTS

    def test_rates_after_a_second(self) -> None:
        """A session that came up between two samples has rates from its first rows on."""
        now = 1000.0
        history = History(lambda: now)
        state = one_port()
        status = state.sessions[SessionId("", "port-22")]
        status.last_record = None
        assert history.look(state) == (None, {})
        for at in (1006.0, 1007.0):
            now, status.last_record = at, at - 500
            next(iter(state.table)).count_syns(0, 4, 3, 0)
            ago, changes = history.look(state)
        assert ago == 7
        assert [change.syns for change in changes.values()] == [3.0]

    def test_line(self) -> None:
        """The history has the highest fullness of Q and the drops of each five seconds."""
        now = 1000.0
        history = History(lambda: now)
        state = one_port()
        status = state.sessions[SessionId("", "port-22")]
        ssh = next(iter(state.table))
        q = {1001: 5, 1003: 0, 1006: 2, 1017: 1, 1018: None}
        for at, length in q.items():
            now = status.last_record = float(at)
            ssh.sockets[1] = Queues(0, length, None, 4)
            ssh.drop("q_full", 2)
            for _ in history.sampling(state):
                pass
        # The first sample has nothing to compare with; nobody looked between 1010 and 1015.
        expected = [(1.0, 2.0), (0.4, 2.0), (None, 0.0), (0.2, 4.0)]
        assert history.line(ssh.identity) == [Point(*each) for each in expected]
        now = 2000.0
        history.look(state)
        assert not any(point.drops for point in history.line(ssh.identity))

    def test_line_is_bounded(self) -> None:
        """However long the history runs, it has no more points than the page draws."""
        now = 1000.0
        history = History(lambda: now)
        state = one_port()
        for _ in range(400):
            now += 1.3
            history.look(state)
        line = history.line(next(iter(state.table)).identity)
        assert len(line) == rates.POINTS
        assert {point.fullness for point in line} == {0.6}
        now = 10.0
        history.look(state)
        assert len(history.line(next(iter(state.table)).identity)) == 1

    def test_slot_of_another(self) -> None:
        """A listener that gets the slot of a forgotten listener inherits none of its history."""
        now = 1000.0
        history = History(lambda: now)
        state = State()
        session = SessionId("", "all")
        state.sessions[session] = SessionStatus(up=True, reason="", last_record=1.0)
        state.table.watch(session, Watched(), Capabilities(reasons=("q_full",)))
        for port in range(1000, 1020):
            now += rates.POINT_SECONDS
            state.sessions[session].last_record = now
            listener = state.table.listener(session, "", "*", port)
            listener.sockets[1] = Queues(0, 6, None, 5)
            listener.drop("q_full", 10 * port)
            _, changes = history.look(state)
            assert changes.get(listener.identity, Change()) == Change()
            line = history.line(listener.identity)
            assert not any(point.drops for point in line)
            assert [point for point in line[:-1] if point.fullness] == []
            now += rates.POINT_SECONDS
            state.sessions[session].last_record = now
            listener.drop("q_full", 1)
            history.look(state)
            assert history.line(listener.identity)[-1] == Point(1.0, 1.0)
            state.table.unwatch(session)
            state.table.watch(session, Watched(), Capabilities(reasons=("q_full",)))
        assert history._most <= 2
        assert history.line(listener.identity)
        history.look(state)
        assert history.line(listener.identity) == []

    def test_numbers_without_bounds(self) -> None:
        """A hostile host that sends counters no kernel can have causes no error."""
        now = 1000.0
        history = History(lambda: now)
        state = one_port()
        status = state.sessions[SessionId("", "port-22")]
        ssh = next(iter(state.table))
        for at in range(3):
            now = status.last_record = 1000.0 + at
            ssh.count_syns(0, 4, 10**30, 0)
            ssh.count_accepts(3, 10**25, 10**40)
            ssh.sockets[at] = Queues(10**20, 10**20, None, 0)
            rendered(state, history)

    def test_memory(self) -> None:
        """The full history of a busy listener takes between 300 and 1,000 bytes."""
        state = State()
        session = SessionId("", "all")
        state.sessions[session] = SessionStatus(up=True, reason="", last_record=1.0)
        state.table.watch(session, Watched(), Capabilities(reasons=("q_full",)))
        listeners = [
            state.table.listener(session, "", f"10.0.{n >> 8}.{n & 255}", 80) for n in range(1000)
        ]
        now = 1000.0
        history = History(lambda: now)
        tracemalloc.start()
        try:
            for step in range(6):
                for listener in listeners:
                    listener.count_syns(0, 4, 1_000_003, 0)
                    listener.count_accepts(step, 1_000_003, 1_000_003)
                now += rates.POINT_SECONDS
                state.sessions[session].last_record = now
                for _ in history.sampling(state):
                    pass
            # The last sample completes all of the points before it.
            now += rates.POINTS * rates.POINT_SECONDS - 30
            for _ in history.sampling(state):
                pass
            own = tracemalloc.take_snapshot().filter_traces(
                [tracemalloc.Filter(True, rates.__file__)]
            )
        finally:
            tracemalloc.stop()
        assert len(history._points) == rates.POINTS
        kept = sum(trace.size for trace in own.traces)
        assert 300 < kept / len(listeners) < 1000


class TestLanding:
    def test_tables(self) -> None:
        """The page shows each session and listener with its numbers."""
        response = get(one_port(), "/")
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        shown = Page(response.body.decode())
        session = shown.cells.index("port-22")
        assert shown.cells[session:] == ["port-22", "● up", "4242", "5", "0", "0"]
        row = shown.cells.index("22")
        assert shown.cells[row : row + 11] == [
            *("22", "ssh", "3 / 4", "", DASH, DASH, DASH, "7", "*", "q_full 1", DASH)
        ]
        # Linux has room for five where Qmax is four.
        assert shown.attributes("rect") == [{"class": "mid", "width": "60.0", "height": "1"}]
        assert __version__ in response.body.decode()
        assert "dtrace, program linux, DTrace 2.0.1" in response.body.decode()
        assert "come with the next update" in response.body.decode()

    def test_open_and_closed(self) -> None:
        """The page counts the open listeners, those that have closed, and those not seen yet."""
        state, session = State(), SessionId("", "all")
        state.table.watch(session, named({80: "web", 81: "", 82: "", 443: ""}))
        for port in (80, 81, 82):
            listener = state.table.listener(session, "", "*", port)
            state.table.sockets("").listening(port, 1, listener)
        assert "<dd>3 <small>open, 1 not seen</small></dd>" in rendered(state)
        state.table.sockets("").closed(81, 2)
        assert "<dd>2 <small>open, 1 closed, 1 not seen</small></dd>" in rendered(state)

    def test_rates(self) -> None:
        """The second look shows the rates since the first, and over how many seconds they are."""
        times = iter((0.0, 15.0))
        history = History(lambda: next(times))
        state = fleet()
        rendered(state, history)
        work(state)
        text = rendered(state, history)
        cells = Page(text).cells
        row = cells.index("8080")
        # 30 * 130 * 3 = 11,700 SYNs were taken, and a tenth as many dropped.
        assert cells[row + 2 : row + 8] == ["129 / 128", "", "78", "858", "780", "16"]
        assert cells[row + 10 : row + 12] == ["q_full 2,340", "447.4 ms"]
        assert cells[row + 12] == "\N{LESS-THAN OR EQUAL TO} 1.1 s"
        assert "those of the last 15 s" in text
        away = cells.index("sol10-u9", row)
        assert cells[away + 3 : away + 8] == [DASH, "", DASH, DASH, DASH]

    def test_accessible(self) -> None:
        """The page names its language, every table has a caption and every header a scope."""
        shown = Page(get(one_port(), "/").body.decode())
        assert shown.attributes("html") == [{"lang": "en"}]
        assert len(shown.attributes("caption")) == len(shown.attributes("table")) == 2
        assert {th["scope"] for th in shown.attributes("th")} == {"col", "row"}
        assert {"http-equiv": "refresh", "content": "5"} in shown.attributes("meta")
        assert [(svg["role"], svg["aria-label"]) for svg in shown.attributes("svg")] == [
            *(("img", "60 %"), ("img", "up to 60 % full, 0 drops"))
        ]

    def test_gzip(self) -> None:
        """The page is compressed for a browser that takes gzip."""
        answer = get(one_port(), "/?refresh=off", headers={"Accept-Encoding": "gzip, br"})
        assert answer.headers["Content-Encoding"] == "gzip"
        assert b"port-22" in gzip.decompress(answer.body)

    def test_policy(self) -> None:
        """The policy allows only the page's own style and script, by a nonce of this answer."""
        first, second = get(one_port(), "/"), get(one_port(), "/")
        shown = Page(first.body.decode())
        (style,), (script,) = shown.attributes("style"), shown.attributes("script")
        nonce = style["nonce"]
        assert nonce == script["nonce"]
        assert first.headers["Content-Security-Policy"].split("; ") == [
            "default-src 'none'",
            f"style-src 'nonce-{nonce}'",
            f"script-src 'nonce-{nonce}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        ]
        policy = second.headers["Content-Security-Policy"]
        assert first.headers["Content-Security-Policy"] != policy
        assert not any(name.startswith("on") for _, each in shown.tags for name in each)

    def test_down_session(self) -> None:
        """The page says why a session is down, above the tables, and its title counts it."""
        state = one_port()
        state.sessions[SessionId("", "port-80")] = SessionStatus(reason="no <probes>")
        body = get(state, "/").body.decode()
        assert "▲ down: no <probes>" in Page(body).cells
        assert "<strong>port-80</strong>: no &lt;probes&gt;" in body
        assert "<title>1 down · dtrace-exporter</title>" in body
        assert "<probes>" not in body

    def test_many_sessions_down(self) -> None:
        """If many sessions are down, the page names the first ten above the listeners."""
        state = State()
        for number in range(12):
            state.sessions[SessionId(f"host{number:02}", "all")] = SessionStatus()
        text = rendered(state)
        assert text.count("<li>") == 11
        assert "2 more</a>" in text
        assert "12 sessions are down" in text

    def test_no_sessions(self) -> None:
        """Without sessions, as with sock_diag, the page has no table of sessions."""
        assert "Sessions" in rendered(one_port())
        assert "Sessions" not in rendered(State(source=Source("sock_diag")))

    def test_failed_reload(self) -> None:
        """The page says if the configuration could not be read again."""
        state = one_port()
        assert "could not be read again" not in rendered(state)
        state.last_reload_successful = False
        assert "could not be read again" in rendered(state)

    def test_columns(self) -> None:
        """Hosts, names and places have a column only if some listener has one."""
        state = one_port("")
        cells = Page(rendered(state)).cells
        assert {"Host", "Name", "Zone, netns or jail"} & {*cells} == set()
        remote = SessionId("sol10", "all")
        state.sessions[remote] = SessionStatus()
        state.table.watch(remote, named({80: "web"}), Capabilities(place_label="zone", syns=False))
        state.table.listener(remote, "zone1", "::1", 80)
        cells = Page(rendered(state)).cells
        assert cells.count("Host") == cells.count("sol10") == 2
        assert {"Name", "web", "Zone, netns or jail", "zone1"} <= {*cells}

    def test_owners(self) -> None:
        """The page shows each listener's owner and its namespace's name, and searches both."""
        state = one_port("")
        assert "Name" not in Page(rendered(state)).cells
        (session,) = state.sessions
        there = state.table.listener(session, "4026532001", "*", 22)
        there.sockets[2] = Queues(0, 0, None, 8)
        state.owners = {there.identity: Owner("sshd", "ssh.service", place_name="blue")}
        text = rendered(state)
        assert {"Name", "sshd (ssh.service)"} <= {*Page(text).cells}
        assert "blue <small>4026532001</small>" in text
        for selection, found in (
            (Selection(owner="SSH.serv"), 1),
            (Selection(owner="web"), 0),
            (Selection(netns="blue"), 1),
            (Selection(netns="4026532001"), 1),
        ):
            shown = rendered(state, selection=selection)
            assert shown.count("sshd (ssh.service)</small>") == found
        there.sockets.clear()
        assert "sshd" not in rendered(state)

    def test_unknown_numbers(self) -> None:
        """What the source cannot know is a dash, and a backlog of 0 causes no division by 0."""
        state = State()
        session = SessionId("", "all")
        state.sessions[session] = SessionStatus()
        nothing = Capabilities(syns=False, established=False, accepts=False, accept_wait=False)
        state.table.watch(session, Watched(), nothing)
        state.table.listener(session, "", "*", 22).sockets[1] = Queues(None, 2, None, 0)
        state.table.listener(session, "", "*", 23)
        cells = Page(rendered(state)).cells
        row = cells.index("22")
        assert cells[row : row + 20] == [
            *("22", "2 / 0", "", DASH, DASH, DASH, DASH, "*", DASH, DASH),
            *(DASH, "23", DASH, "", DASH, DASH, DASH, DASH, "*", DASH),
        ]

    def test_order(self) -> None:
        """The fullest queues come first unless another order is chosen, and the links keep it."""
        state = fleet(100)
        fullest = [port for port in Page(rendered(state)).ports if port != "5432"][:100]
        queues = {str(one.identity.port): one.queues for one in state.table}
        q = {port: found.q for port, found in queues.items() if found and found.q is not None}
        assert [q[port] for port in fullest] == sorted((q[port] for port in fullest), reverse=True)
        text = rendered(state, sort="port", paused=True)
        assert Page(text).ports[:100] == [str(port) for port in range(1000, 1100)]
        assert 'aria-sort="ascending"><a id="by-port"' in text
        assert 'id="by-syns" href="?sort=syns&amp;refresh=off"' in text
        assert rendered(state, sort="nonsense") == rendered(state)
        for sort in page.SORTS:
            assert {*Page(rendered(state, sort=sort)).ports} >= {*fullest}

    def test_numbers_in_texts(self) -> None:
        """Sessions, hosts, names and places are sorted by the numbers in their names."""
        state = State()
        order = ["9", "22", "080", "1000"]
        for text in ("22", "1000", "9", "080"):
            state.sessions[SessionId("", f"port-{text}")] = SessionStatus(up=True)
            state.sessions[SessionId(f"web{text}", "all")] = SessionStatus(up=True)
            session = SessionId(f"web{text}", "all")
            zone = Capabilities(place_label="zone")
            state.table.watch(session, named({80: f"app {text} x"}), zone)
            state.table.listener(session, f"db-{text}", "*", 80)
        cells = Page(rendered(state)).cells
        assert [cell for cell in cells if cell.startswith("port-")] == [f"port-{n}" for n in order]
        for sort, form in (("host", "web{}"), ("name", "app {} x"), ("place", "db-{}")):
            for reverse in (False, True):
                cells = Page(rendered(state, sort=sort, reverse=reverse)).cells
                wanted = [form.format(n) for n in (order[::-1] if reverse else order)]
                # Sessions are a table of their own.
                assert [cell for cell in cells if cell in wanted][:4] == wanted

    @pytest.mark.parametrize("sort", page.SORTS)
    def test_reverse(self, sort: str) -> None:
        """The head of the sorted column reverses the order; unknown values stay at the end."""
        state = fleet()
        times = iter((0.0, 15.0, 15.5, 16.0))
        history = History(lambda: next(times))
        rendered(state, history)
        work(state)
        plain = rendered(state, history, sort=sort)
        turned = rendered(state, history, sort=sort, reverse=True)
        again = {"sort": sort} if sort != "full" else {}
        for text, query in ((plain, again | {"order": "reverse"}), (turned, again)):
            href = f"?{urlencode(query)}".replace("&", "&amp;")
            assert f'<a id="by-{sort}" href="{href}">' in text
        ascends = [f'aria-sort="{word}ending"' in plain for word in ("asc", "desc")]
        assert [f'aria-sort="{word}ending"' in turned for word in ("desc", "asc")] == ascends
        rows, other = (self.rows_of(text) for text in (plain, turned))
        assert sorted(rows) == sorted(other)
        if sort == "full":
            # The host that does not answer comes last in both.
            assert rows[1][1] == other[-2][1] == "8080"
            assert rows[-1][0] == other[-1][0] == "sol10-u9"
            return
        at = next(n for n, head in enumerate(rows[0]) if head.startswith(page._SORTED[sort].title))
        nothing = (DASH, "") if sort == "name" else (DASH,)
        known = [row[at] for row in rows[1:] if row[at] not in nothing]
        behind = [row[at] for row in rows[1 + len(known) :]]
        assert {*behind} <= {*nothing}
        # Equal values keep their order.
        known, turned_known = (
            [value for value, _ in groupby(values)]
            for values in (known, [row[at] for row in other[1 : 1 + len(known)]])
        )
        assert turned_known == known[::-1]

    @staticmethod
    def rows_of(text: str) -> list[list[str]]:
        """Return the cells of the table of listeners, without the arrows that show the order."""
        (table,) = re.findall(r'<table id="listeners".*?</table>', text, re.DOTALL)
        rows = re.findall(r"<tr>.*?</tr>", table, re.DOTALL)
        return [[cell.rstrip(" \xa0▲▼") for cell in Page(row).cells] for row in rows]

    def test_full(self) -> None:
        """Full is the capacity: 6 at Qmax 5 on Linux is 100 %, and so is 5 on Solaris."""
        state = State()
        for host, plus, q in (("linux", 1, 6), ("sun", 0, 5), ("idle", 1, 0)):
            session = SessionId(host, "all")
            state.sessions[session] = SessionStatus(up=True)
            limit = 0 if host == "idle" else 5
            state.table.watch(session, Watched(), Capabilities(q_capacity=QCapacity(plus=plus)))
            state.table.listener(session, "", "*", 80).sockets[1] = Queues(0, q, None, limit)
        text = rendered(state)
        bars = [svg["aria-label"] for svg in Page(text).attributes("svg")]
        assert bars[::2] == ["100 %", "100 %", "0 %"]
        assert '<dd><span class="high">100 %</span>' in text

    @pytest.mark.parametrize(("q", "level"), [(0, "low"), (3, "mid"), (4, "high"), (5, "high")])
    def test_fullest(self, q: int, level: str) -> None:
        """The fullness of the fullest queue has the same colour as its bar and its cell."""
        state = one_port()
        next(iter(state.table)).sockets[1] = Queues(0, q, None, 4)
        text = rendered(state)
        assert f'<dd><span class="{level}">{q * 20} %</span>' in text
        assert f'<td class="queue {level}">' in text
        assert f'<rect class="{level}"' in text

    def test_drawn(self) -> None:
        """The history is drawn in steps: an area for Q, and a mark above each point with drops."""
        points = [
            *(Point(None, 0.0), Point(0.0, 0.0), Point(0.0, 3.0), Point(1.0, 2.0)),
            *(Point(0.5, 0.0), Point(None, 0.0), Point(0.5, 0.0)),
        ]
        drawn = page._line(points)
        assert drawn.text == "up to 100 % full, 5 drops"
        assert drawn.full == "M54 10V10H56V1H57V5.5H58V10M59 10V5.5H60V10"
        assert drawn.drops == "M55 .5h1M56 .5h1"
        assert page._line([Point(None, 0.0)]).text == page._line([]).text == ""

    def test_form(self) -> None:
        """A form without JavaScript selects listeners, and keeps the order and the pause."""
        text = get(fleet(), "/?name=po&sort=port&order=reverse&refresh=off").body.decode()
        shown = Page(text)
        assert "Listeners: 1 of 7" in text
        assert [row[1] for row in self.rows_of(text)[1:]] == ["5432"]
        inputs = {each["name"]: each for each in shown.attributes("input")}
        words = ["port", "name", "host", "zone", "netns", "owner"]
        assert [*inputs] == [*words, "sort", "order", "refresh"]
        assert inputs["name"]["value"] == "po"
        hidden = {name: one["value"] for name, one in inputs.items() if one.get("type") == "hidden"}
        assert hidden == {"sort": "port", "order": "reverse", "refresh": "off"}
        assert 'id="everything" href="?sort=port&amp;order=reverse&amp;refresh=off"' in text
        assert 'id="by-name" href="?name=po&amp;sort=name&amp;refresh=off"' in text
        assert "No listener matches." in get(fleet(), "/?port=1").body.decode()

    def test_query(self) -> None:
        """The query chooses the order and the pause; nonsense in it does no harm."""
        text = get(one_port(), "/?sort=port&refresh=off").body.decode()
        assert "Resume" in text
        assert "<script" not in text
        assert "http-equiv" not in text
        assert get(one_port(), "/?sort=%00%22%3E&sort=port&x[]=1").status == 200

    def test_many_listeners(self) -> None:
        """A page has at most MAX_LISTENERS rows, and says how many listeners it leaves out."""
        state = fleet(page.MAX_LISTENERS + 2)
        text = rendered(state)
        assert len(Page(text).attributes("rect")) == page.MAX_LISTENERS
        assert "3 more listeners" in text

    @example(HOSTILE)
    @example("\ud800")
    @example('"onload=x x="')
    @example("'onload=x x='")
    @given(
        st.text(st.sampled_from("<>\"'&;=/ax {}%!-\n"))
        | st.text(st.characters(exclude_categories=()))
    )
    def test_everything_is_escaped(self, hostile: str) -> None:
        """No text from outside adds an element or an attribute to the page."""
        plain = Page(rendered(self.state_of("x")))
        shown = Page(rendered(self.state_of(f"x{hostile}"), path=f"/{hostile}", sort=f"x{hostile}"))
        chosen = {field: hostile for field in FIELDS if field != "port"}
        page_of_chosen = rendered(
            self.state_of(f"x{hostile}"), selection=Selection("22", **chosen), path=f"/{hostile}"
        )
        # A search adds a link to all listeners, and fields for what has no column.
        assert {tag for tag, _ in Page(page_of_chosen).tags} <= {tag for tag, _ in plain.tags}
        assert not any(
            name.startswith("on") for _, each in Page(page_of_chosen).tags for name in each
        )
        assert [(tag, set(attributes)) for tag, attributes in shown.tags] == [
            (tag, set(attributes)) for tag, attributes in plain.tags
        ]

    @staticmethod
    def state_of(text: str) -> State:
        """A state with the same text in every place that can have one."""
        state = State(source=Source(text, text, text))
        session = SessionId("host" + text, text)
        state.sessions[session] = SessionStatus(reason=text, lost={text: 1})
        state.table.watch(session, named({22: text}), Capabilities(reasons=(text,)))
        listener = state.table.listener(session, text, text, 22)
        listener.drops[text] = 1
        listener.sockets[1] = Queues(1, 1, 1, 1)
        return state

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            *((None, DASH), (0.0, "0"), (0.001, "< 0.01"), (0.25, "0.25"), (3.0, "3")),
            *((12.34, "12.3"), (99.96, "100.0"), (1234.5, "1,234"), (2e6, "2,000,000")),
        ],
    )
    def test_rate(self, value: float | None, text: str) -> None:
        """A rate has as many digits as are useful."""
        assert page._rate(value) == text


def palette(scheme: str) -> dict[str, str]:
    """Return the colours of the style sheet by name."""
    css = Path(page.__file__).with_name("templates").joinpath("index.html").read_text("utf-8")
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6});", rule)) for rule in css.split("@media")[:2]
    )
    assert light.keys() == dark.keys()
    return light if scheme == "light" else dark


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG 2 defines it, from 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return sum(w * part for w, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str) -> None:
    """Text has a contrast of 4.5 to its background and a bar one of 3, as WCAG 2 AA wants."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    colours = palette(scheme)
    for text in ("ink", "muted", "link", "good", "bad", "low", "mid"):
        for ground in ("paper", "panel"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["ink"], colours["alarm"]) >= 4.5
    for bar in ("low", "mid", "high"):
        assert contrast(colours[bar], colours["track"]) >= 3, bar


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Return a browser, the same one for all tests."""
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


@contextmanager
def looked_at(browser: Chrome, state: State) -> Iterator[Served]:
    """Serve a state during the block, and check that the browser's console stays empty."""
    with served(state) as site:
        try:
            yield site
        finally:
            # A page that is still open when the server stops would complain later.
            browser.get("about:blank")
            complaints = console(browser)
    assert complaints == []


def wait(browser: Chrome, what: Callable[[Chrome], object]) -> None:
    """Wait until a condition is true."""
    WebDriverWait(browser, 60, 0.1, ignored_exceptions=[Exception]).until(what)


def cell(browser: Chrome, port: int, column: str) -> str:
    """Return the text of a listener's cell."""
    heads = [head.text for head in browser.find_elements(By.CSS_SELECTOR, "#listeners thead th")]
    at = next(n for n, head in enumerate(heads, 1) if head.startswith(column))
    row = f"//table[@id='listeners']/tbody/tr[th='{port}']/*[{at}]"
    return browser.find_element(By.XPATH, row).text


def picture(browser: Chrome, name: str, tmp_path: Path) -> None:
    """Take a screenshot, check that it is not blank, and copy it to SCREENSHOTS if that is set."""
    file = tmp_path / f"{name}.png"
    assert browser.save_screenshot(str(file))
    data = file.read_bytes()
    parts, at = b"", 8
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        parts += data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += length + 12
    # A page of one or two colours repeats a few values.
    assert len({*zlib.decompress(parts)}) > 100
    if SCREENSHOTS:
        shutil.copy(file, SCREENSHOTS)


def accessible(browser: Chrome) -> list[str]:
    """Return the problems that axe-core finds in the page."""
    run = """
        const options = { resultTypes: ["violations"] };
        return axe.run(document, options).then((found) => found.violations.map(
            (one) => `${one.id}: ${one.help}: ${one.nodes.map((node) => node.html).slice(0, 3)}`));
    """
    return list(browser.execute_script(f"{AXE_SCRIPT}\n{run}"))


@pytest.mark.usefixtures("quick")
class TestBrowser:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_looks(self, scheme: str, browser: Chrome, tmp_path: Path) -> None:
        """The page follows the reader's colour scheme, and axe-core finds no problem."""
        state = fleet()
        with looked_at(browser, state) as site:
            use(browser, scheme=scheme, size=(1280, 900))
            for left in range(rates.POINTS, 0, -1):
                site.change(partial(pass_by, state, left))
                with urlopen(site.url, timeout=60) as answer:
                    assert answer.status == 200
            site.change(lambda: work(state))
            browser.get(f"{site.url}?refresh=off")
            assert cell(browser, 8080, "SYN/s") == "858"
            width = "return document.documentElement.scrollWidth"
            assert browser.execute_script(width) == 1280
            drawn = browser.find_elements(By.CSS_SELECTOR, "#listeners svg.line path.drops")
            assert len(drawn) == 1
            assert drawn[0].rect["width"] > 10
            colour = "return getComputedStyle(document.body).backgroundColor"
            wanted = palette(scheme)["paper"]
            assert browser.execute_script(colour) == "rgb({}, {}, {})".format(
                *(int(wanted[at : at + 2], 16) for at in (1, 3, 5))
            )
            assert accessible(browser) == []
            picture(browser, f"page-{scheme}", tmp_path)

    @pytest.mark.parametrize("width", [390, 500])
    def test_queue_in_view(self, browser: Chrome, width: int) -> None:
        """On a narrow screen Q and Qmax of each listener are visible without moving the table."""
        with looked_at(browser, fleet()) as site:
            use(browser, size=(width, 844))
            browser.get(f"{site.url}?refresh=off")
            right = browser.execute_script(
                "return Math.max(...[...document.querySelectorAll('td.queue')].map("
                "(cell) => cell.getBoundingClientRect().right))"
            )
            assert right <= width

    def test_filter(self, browser: Chrome) -> None:
        """Without scripts a reader can select listeners, show all again, and reverse the order."""
        with looked_at(browser, fleet(20)) as site:
            use(browser, scripts=False, size=(1280, 800))
            browser.get(f"{site.url}?refresh=off&sort=port")
            field = browser.find_element(By.NAME, "name")
            field.send_keys("service-101", Keys.ENTER)
            wait(browser, lambda _: "name=service-101" in browser.current_url)
            ports = "#listeners tbody th"
            found = [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, ports)]
            assert found == [str(port) for port in range(1010, 1020)]
            browser.find_element(By.ID, "by-port").click()
            wait(browser, lambda _: "order=reverse" in browser.current_url)
            assert "name=service-101" in browser.current_url
            assert browser.find_element(By.CSS_SELECTOR, ports).text == "1019"
            browser.find_element(By.ID, "everything").click()
            wait(browser, lambda _: "name=" not in browser.current_url)
            assert len(browser.find_elements(By.CSS_SELECTOR, ports)) == 21
            assert browser.find_element(By.ID, "refresh").text == "Resume"

    def test_narrow(self, browser: Chrome, tmp_path: Path) -> None:
        """On a telephone only the tables scroll sideways, and axe-core finds no problem."""
        with looked_at(browser, fleet()) as site:
            use(browser, size=(390, 844))
            browser.get(f"{site.url}?refresh=off")
            width = "return document.documentElement.scrollWidth"
            assert browser.execute_script(width) == 390
            assert accessible(browser) == []
            picture(browser, "page-narrow", tmp_path)

    @staticmethod
    def updates(browser: Chrome, site: Served, state: State) -> None:
        """Check that the page shows a change and keeps its scroll position."""
        browser.execute_script("scrollTo(0, 300)")
        listener = next(one for one in state.table if one.identity.port == 1007)
        site.change(lambda: listener.sockets.update({7: Queues(1, 77, None, 78)}))
        wait(browser, lambda _: cell(browser, 1007, "Q / Qmax") == "77 / 78")
        wait(browser, lambda _: browser.execute_script("return scrollY") == 300)

    def test_updates(self, browser: Chrome) -> None:
        """With scripts the page changes in place: it is not loaded again, and the focus stays."""
        state = fleet(100)
        with looked_at(browser, state) as site:
            use(browser, size=(1280, 800))
            browser.get(site.url)
            browser.execute_script("window.same = true; document.getElementById('by-port').focus()")
            self.updates(browser, site, state)
            assert browser.execute_script("return window.same") is True
            assert browser.execute_script("return document.activeElement.id") == "by-port"

    def test_updates_without_scripts(self, browser: Chrome) -> None:
        """Without scripts the page reloads itself, and keeps the scroll position and the order."""
        state = fleet(100)
        with looked_at(browser, state) as site:
            use(browser, scripts=False, size=(1280, 800))
            browser.get(f"{site.url}?sort=port")
            self.updates(browser, site, state)
            assert browser.current_url.endswith("?sort=port")

    def test_pause_and_sort(self, browser: Chrome) -> None:
        """Without scripts a reader can sort by a column and pause the page."""
        with looked_at(browser, fleet(20)) as site:
            use(browser, scripts=False, size=(1280, 800))
            browser.get(site.url)
            browser.find_element(By.ID, "refresh").click()
            wait(browser, lambda _: browser.find_element(By.ID, "refresh").text == "Resume")
            browser.find_element(By.ID, "by-port").click()
            wait(browser, lambda _: browser.current_url.endswith("?sort=port&refresh=off"))
            first = browser.find_element(By.CSS_SELECTOR, "#listeners tbody th")
            assert first.text == "1000"

    def test_keyboard(self, browser: Chrome) -> None:
        """The tab key visits every link and field, and each shows the focus."""
        with looked_at(browser, fleet()) as site:
            use(browser, size=(1280, 800))
            browser.get(f"{site.url}?refresh=off")
            links = [link.text for link in browser.find_elements(By.TAG_NAME, "a")]
            fields = browser.find_elements(By.CSS_SELECTOR, "input:not([type=hidden]), button")
            seen = []
            for _ in range(len(links) + len(fields) + 2):
                browser.switch_to.active_element.send_keys(Keys.TAB)
                element = browser.switch_to.active_element
                seen.append(element.text if element.tag_name == "a" else "")
                assert element.value_of_css_property("outline-style") == "solid"
                assert element.value_of_css_property("outline-width") == "3px"
            assert [text for text in seen if text] == links

    def test_many_listeners(self, browser: Chrome, tmp_path: Path) -> None:
        """With 1,000 listeners the column heads stay visible, and the fullest queues come first."""
        state = fleet(page.MAX_LISTENERS - 1)
        with looked_at(browser, state) as site:
            use(browser, size=(1280, 800))
            browser.get(f"{site.url}?refresh=off")
            site.change(lambda: work(state))
            browser.get(f"{site.url}?refresh=off")
            timing = json.loads(
                browser.execute_script(
                    "return JSON.stringify(performance.getEntriesByType('navigation')[0])"
                )
            )
            nodes = browser.execute_script("return document.querySelectorAll('*').length")
            assert timing["encodedBodySize"] < 60_000
            assert nodes < 20_000
            rows = "return document.querySelectorAll('#listeners tbody tr').length"
            assert browser.execute_script(rows) == page.MAX_LISTENERS
            first = browser.find_element(By.CSS_SELECTOR, "#listeners tbody td.queue").text
            assert first == "128 / 128"
            browser.execute_script("scrollTo(0, 20000)")
            assert browser.execute_script("return scrollY") == 20000
            head = browser.find_element(By.CSS_SELECTOR, "#listeners thead th")
            assert browser.execute_script(
                "return Math.round(arguments[0].getBoundingClientRect().top)", head
            ) in (0, -1)
            browser.execute_script("scrollTo(0, 800)")
            picture(browser, "page-1000", tmp_path)

    def test_hostile(self, browser: Chrome) -> None:
        """The page shows text from outside as it is, and the text does nothing."""
        hostile = (
            "<img src=x onerror=\"document.title='bad'\"><script>document.title='bad'</script>"
        )
        with looked_at(browser, TestLanding.state_of(hostile)) as site:
            use(browser, size=(1280, 800))
            browser.get(site.url)
            before = browser.execute_script("return performance.now()")
            wait(
                browser,
                lambda _: browser.execute_script("return performance.now()") > before + 2500,
            )
            assert browser.title == "1 down · dtrace-exporter"
            assert hostile in browser.find_element(By.CSS_SELECTOR, "#sessions tbody").text

    def test_exporter_gone(self, browser: Chrome) -> None:
        """If the exporter stops answering, the page says that its numbers are old."""
        with served(fleet()) as site:
            use(browser, size=(1280, 800))
            browser.get(site.url)
            stale = browser.find_element(By.ID, "stale")
            assert not stale.is_displayed()
            site.stop()
            wait(browser, lambda _: stale.is_displayed())
            assert re.match(
                r"No newer numbers since .+ \(.+\): the numbers below are old\.", stale.text
            )
            assert cell(browser, 8080, "Q / Qmax") == "129 / 128"
            browser.get("about:blank")
            assert all("net::ERR_" in complaint for complaint in console(browser))


def test_without_dtrace() -> None:
    """With sock_diag the page says why DTrace is not used, what is missing, and what to do."""
    told = reasons.told("lockdown", "sock_diag")
    assert told not in rendered(fleet())
    state = fleet()
    state.source = Source("sock_diag", reason="lockdown")
    assert f'<p id="missing" class="hint">{told}</p>' in unescape(rendered(state))


def test_namespaces_left_out() -> None:
    """The page says why the listeners of other network namespaces are missing."""
    state = fleet()
    assert 'id="left-out"' not in rendered(state)
    state.left_out = "Operation <not> permitted"
    assert "may be missing: Operation &lt;not&gt; permitted. What to do: see" in rendered(state)
