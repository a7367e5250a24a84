"""The landing page: what it says, and how it looks and behaves in a real Chromium."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from axe_core_python.base import AXE_SCRIPT
from hypothesis import example, given
from hypothesis import strategies as st
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from browser import Served, chromium, console, served, use
from dtrace_exporter import __version__
from dtrace_exporter.listeners import Capabilities, SessionId
from dtrace_exporter.sockets import Queues
from dtrace_exporter.state import SessionStatus, Source, State
from dtrace_exporter.web import page, rates
from dtrace_exporter.web.rates import Change, History
from web_serving import HOSTILE, get, one_port

DASH = "\N{EN DASH}"
SCREENSHOTS = os.environ.get("DTRACE_EXPORTER_SCREENSHOTS", "")
"""A directory that the pictures of the documentation are copied to; none without it."""


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
        """The ports of the listeners, in their order."""
        return [cell for cell in self.cells if cell.isdigit() and 1000 <= int(cell) < 65536]


def rendered(
    state: State, history: History | None = None, path: str = "/metrics", **options: Any
) -> str:
    """Return the page."""
    return page.render(state, history or History(), path, "n", page.View(**options)).decode()


def fleet(rows: int = 0) -> State:
    """A busy web server with a neighbour and a host that cannot be reached, or many listeners."""
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
    state.table.watch(here, names, Capabilities(reasons=reasons))
    state.table.watch(away, {5432: "postgres"}, Capabilities(reasons=reasons))
    for number, (port, (q, q_limit)) in enumerate(queues.items()):
        address = "::1" if port == 9090 else "*"
        listener = state.table.listener(here, "", address, port)
        listener.sockets[number] = Queues(q // 8, q, None, q_limit)
    state.table.listener(away, "4026532281", "10.0.3.7", 5432).sockets[9] = Queues(0, 2, None, 4096)
    if not rows:
        silent = SessionId("sol10-u9", "all")
        reason = "dtrace(1) ended: exit status 255: ssh: connect to host sol10-u9: timed out"
        state.sessions[silent] = SessionStatus(reason=reason, restarts=12)
        zones = Capabilities(place_label="zone", own_place="global", reasons=("q_full", "q0_full"))
        state.table.watch(silent, {80: "intranet"}, zones)
    work(state)
    return state


def work(state: State) -> None:
    """Let 15 seconds go by."""
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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the page be new every second, and 15 seconds go by between two looks."""
    seconds = count(1_000_000_000.0, 15)
    monkeypatch.setattr(page, "REFRESH_SECONDS", 1)
    monkeypatch.setattr(page, "History", lambda: History(lambda: next(seconds)))


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
        """Eight SYNs, one of them dropped, and two accepts, up to some row's time."""
        ssh = next(iter(state.table))
        ssh.count_syns(0, 4, 7, 0)
        ssh.count_syns(10, 4, 1, 4)
        ssh.drop("q_full", 1)
        ssh.count_accepts(6, 1, 4**10)
        ssh.count_accepts(5, 1, 4**10 - 576)
        state.sessions[SessionId("", "port-22")].last_record = record

    def test_rates(self) -> None:
        """Rates are those between the rows that were the newest at the two looks."""
        ago, change = self.two_looks(self.work)
        assert ago == 10
        assert change == Change(2.0, 0.25, 0.5, (4**10 - 288) / 1e9, 4**11 / 1e9)

    def test_no_newer_row(self) -> None:
        """Between two looks without a row between them nothing is known."""
        assert self.two_looks(lambda state: self.work(state, 500.0))[1] == Change()

    def test_down(self) -> None:
        """Of a session that is down nothing is known."""

        def down(state: State) -> None:
            self.work(state)
            state.sessions[SessionId("", "port-22")].up = False

        assert self.two_looks(down)[1] == Change()

    def test_unwatched_and_watched_again(self) -> None:
        """Counters that begin anew are no negative rate."""

        def again(state: State) -> None:
            session = SessionId("", "port-22")
            state.table.unwatch(session)
            state.table.watch(session, {22: "ssh"})
            state.table.listener(session, "", "*", 22)
            state.sessions[session].last_record = 504.0

        assert self.two_looks(again)[1] == Change()

    @pytest.mark.parametrize("seconds", [-1.0, 0.0, 121.0])
    def test_no_use(self, seconds: float) -> None:
        """A look in the future, at the same moment or long ago is not compared with."""
        assert self.two_looks(self.work, seconds) == (None, Change())

    def test_longest_wait(self) -> None:
        """A wait beyond the last bound has none."""

        def wait(state: State) -> None:
            next(iter(state.table)).count_accepts(13, 1, 20 * 10**9)
            state.sessions[SessionId("", "port-22")].last_record = 504.0

        change = self.two_looks(wait)[1]
        assert (change.wait, change.longest) == (20.0, float("inf"))
        assert page._longest(change.longest) == "> 17.2 s"

    def test_without_a_session(self) -> None:
        """What the kernel is asked for in the moment of the look is of that moment."""
        times = iter((1000.0, 1004.0))
        history = History(lambda: next(times))
        state = State()
        source = SessionId("", "sock_diag")
        nothing = Capabilities(syns=False, reasons=("other",), accepts=False, accept_wait=False)
        state.table.watch(source, None, nothing)
        listener = state.table.listener(source, "", "*", 22)
        history.look(state)
        listener.drop("other", 6)
        assert history.look(state)[1] == {listener.identity: Change(drops=1.5)}

    @given(st.lists(st.floats(0, 60, allow_nan=False), max_size=60))
    def test_window(self, steps: list[float]) -> None:
        """However often somebody looks little is kept, and never more than needed is compared."""
        now = 1000.0
        history = History(lambda: now)
        first = now
        for step in steps:
            now += step
            ago, _ = history.look(one_port())
            assert ago is None or 0 < ago <= min(rates._OLDEST_LOOK, now - first + 1e-6)
            assert len(history._looks) <= rates.WINDOW_SECONDS / rates._LOOKS_APART + 2


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
            *("22", "ssh", "*", "3 / 4", "7", DASH, DASH, DASH, "q_full 1", DASH, DASH)
        ]
        assert shown.attributes("rect") == [{"class": "mid", "width": "75.0", "height": "1"}]
        assert __version__ in response.body.decode()
        assert "dtrace, program linux, DTrace 2.0.1" in response.body.decode()
        assert "come with the next look" in response.body.decode()

    def test_rates(self) -> None:
        """The second look shows what happened since the first, and over how long."""
        times = iter((0.0, 15.0))
        history = History(lambda: next(times))
        state = fleet()
        rendered(state, history)
        work(state)
        text = rendered(state, history)
        cells = Page(text).cells
        row = cells.index("8080")
        # 30 * 130 * 3 = 11,700 SYNs were taken, and a tenth as many dropped.
        assert cells[row + 4 : row + 11] == [
            *("129 / 128", "16", "858", "780", "78", "q_full 2,340", "447.4 ms"),
        ]
        assert cells[row + 11] == "\N{LESS-THAN OR EQUAL TO} 1.1 s"
        assert "those of the last 15 s" in text
        assert cells[cells.index("sol10-u9", row) + 5 :][:6] == [DASH] * 2 + [DASH] * 3 + ["0"]

    def test_accessible(self) -> None:
        """The page names its language, every table has a caption and every header a scope."""
        shown = Page(get(one_port(), "/").body.decode())
        assert shown.attributes("html") == [{"lang": "en"}]
        assert len(shown.attributes("caption")) == len(shown.attributes("table")) == 2
        assert {th["scope"] for th in shown.attributes("th")} == {"col", "row"}
        assert {"http-equiv": "refresh", "content": "5"} in shown.attributes("meta")
        assert [(bar["role"], bar["aria-label"]) for bar in shown.attributes("svg")] == [
            ("img", "75 %")
        ]

    def test_gzip(self) -> None:
        """The page is compressed for a browser that takes gzip."""
        answer = get(one_port(), "/?refresh=off", headers={"Accept-Encoding": "gzip, br"})
        assert answer.headers["Content-Encoding"] == "gzip"
        assert b"port-22" in gzip.decompress(answer.body)

    def test_policy(self) -> None:
        """The policy allows the page's own style and script only, anew for each answer."""
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
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
        policy = second.headers["Content-Security-Policy"]
        assert first.headers["Content-Security-Policy"] != policy
        assert not any(name.startswith("on") for _, each in shown.tags for name in each)

    def test_down_session(self) -> None:
        """A session that is down says why, on top of the page and in its title too."""
        state = one_port()
        state.sessions[SessionId("", "port-80")] = SessionStatus(reason="no <probes>")
        body = get(state, "/").body.decode()
        assert "▲ down: no <probes>" in Page(body).cells
        assert "<strong>port-80</strong>: no &lt;probes&gt;" in body
        assert "<title>1 down · dtrace-exporter</title>" in body
        assert "<probes>" not in body

    def test_many_sessions_down(self) -> None:
        """Of many sessions that are down the first ten are named above the listeners."""
        state = State()
        for number in range(12):
            state.sessions[SessionId(f"host{number:02}", "all")] = SessionStatus()
        text = rendered(state)
        assert text.count("<li>") == 11
        assert "2 more</a>" in text
        assert "12 sessions are down" in text

    def test_no_sessions(self) -> None:
        """Without sessions, as with sock_diag, nothing is said of any."""
        assert "Sessions" in rendered(one_port())
        assert "Sessions" not in rendered(State(source=Source("sock_diag")))

    def test_failed_reload(self) -> None:
        """A configuration that could not be read again is said on top."""
        state = one_port()
        assert "could not be read again" not in rendered(state)
        state.last_reload_successful = False
        assert "could not be read again" in rendered(state)

    def test_columns(self) -> None:
        """Hosts, names and places have a column where there is one, and only then."""
        state = one_port("")
        cells = Page(rendered(state)).cells
        assert {"Host", "Name", "Zone or netns"} & {*cells} == set()
        remote = SessionId("sol10", "all")
        state.sessions[remote] = SessionStatus()
        state.table.watch(remote, {80: "web"}, Capabilities(place_label="zone", syns=False))
        state.table.listener(remote, "zone1", "::1", 80)
        cells = Page(rendered(state)).cells
        assert cells.count("Host") == cells.count("sol10") == 2
        assert {"Name", "web", "Zone or netns", "zone1"} <= {*cells}

    def test_unknown_numbers(self) -> None:
        """What the source cannot know is a dash, and a backlog of 0 divides nothing by 0."""
        state = State()
        session = SessionId("", "all")
        state.sessions[session] = SessionStatus()
        nothing = Capabilities(syns=False, established=False, accepts=False, accept_wait=False)
        state.table.watch(session, None, nothing)
        state.table.listener(session, "", "*", 22).sockets[1] = Queues(None, 2, None, 0)
        state.table.listener(session, "", "*", 23)
        cells = Page(rendered(state)).cells
        row = cells.index("22")
        assert cells[row : row + 20] == [
            *("22", "*", "2 / 0", DASH, DASH, DASH, DASH, DASH, DASH, DASH),
            *("23", "*", DASH, DASH, DASH, DASH, DASH, DASH, DASH, DASH),
        ]

    def test_order(self) -> None:
        """The fullest come first unless another order is asked for, which the links keep."""
        state = fleet(100)
        fullest = [port for port in Page(rendered(state)).ports if port != "5432"][:100]
        queues = {str(one.identity.port): one.queues for one in state.table}
        q = {port: found.q for port, found in queues.items() if found and found.q is not None}
        assert [q[port] for port in fullest] == sorted((q[port] for port in fullest), reverse=True)
        text = rendered(state, sort="port", paused=True)
        assert Page(text).ports[:100] == [str(port) for port in range(1000, 1100)]
        assert 'aria-sort="ascending"><a id="by-port" href="?sort=port&amp;refresh=off"' in text
        assert rendered(state, sort="nonsense") == rendered(state)
        for sort in page.SORTS:
            assert {*Page(rendered(state, sort=sort)).ports} >= {*fullest}

    def test_query(self) -> None:
        """The query says how to sort and whether to stand still; nonsense in it does no harm."""
        text = get(one_port(), "/?sort=port&refresh=off").body.decode()
        assert "Resume" in text
        assert "<script" not in text
        assert "http-equiv" not in text
        assert get(one_port(), "/?sort=%00%22%3E&sort=port&x[]=1").status == 200

    def test_many_listeners(self) -> None:
        """A page has at most so many rows, and says how many more there are."""
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
        """No text from outside, whatever is in it, adds an element or an attribute to the page."""
        plain = Page(rendered(self.state_of("x")))
        shown = Page(rendered(self.state_of(f"x{hostile}"), path=f"/{hostile}", sort=f"x{hostile}"))
        assert [(tag, set(attributes)) for tag, attributes in shown.tags] == [
            (tag, set(attributes)) for tag, attributes in plain.tags
        ]

    @staticmethod
    def state_of(text: str) -> State:
        """A state with one text wherever there can be any."""
        state = State(source=Source(text, text, text))
        session = SessionId("host" + text, text)
        state.sessions[session] = SessionStatus(reason=text, lost={text: 1})
        state.table.watch(session, {22: text}, Capabilities(reasons=(text,)))
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
        """A rate has as many digits as say something."""
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
    """Text has a contrast of 4.5 on what it stands on, a bar one of 3, as WCAG 2 AA wants."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    colours = palette(scheme)
    for text in ("ink", "muted", "link", "good", "bad"):
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
    """Serve a state, and show that the browser has nothing to complain of while the block runs."""
    with served(state) as site:
        try:
            yield site
        finally:
            # A page that is still there when the server is not would complain later.
            browser.get("about:blank")
            complaints = console(browser)
    assert complaints == []


def wait(browser: Chrome, what: Callable[[Chrome], object]) -> None:
    """Wait until something is so."""
    WebDriverWait(browser, 60, 0.1, ignored_exceptions=[Exception]).until(what)


def cell(browser: Chrome, port: int, column: str) -> str:
    """Return the text of a listener's cell."""
    heads = [head.text for head in browser.find_elements(By.CSS_SELECTOR, "#listeners thead th")]
    at = next(n for n, head in enumerate(heads, 1) if head.startswith(column))
    row = f"//table[@id='listeners']/tbody/tr[th='{port}']/*[{at}]"
    return browser.find_element(By.XPATH, row).text


def picture(browser: Chrome, name: str, tmp_path: Path) -> None:
    """Take a picture, see that there is something in it, and copy it to where it is wanted."""
    file = tmp_path / f"{name}.png"
    assert browser.save_screenshot(str(file))
    data = file.read_bytes()
    parts, at = b"", 8
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        parts += data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += length + 12
    # A page of one colour, or two, is a few values over and over.
    assert len({*zlib.decompress(parts)}) > 100
    if SCREENSHOTS:
        shutil.copy(file, SCREENSHOTS)


def accessible(browser: Chrome) -> list[str]:
    """Return what axe-core finds wrong with the page."""
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
        """The page looks as its reader prefers, and axe-core finds nothing wrong with it."""
        state = fleet()
        with looked_at(browser, state) as site:
            use(browser, scheme=scheme, size=(1280, 900))
            browser.get(f"{site.url}?refresh=off")
            site.change(lambda: work(state))
            browser.get(f"{site.url}?refresh=off")
            assert cell(browser, 8080, "SYN/s") == "858"
            colour = "return getComputedStyle(document.body).backgroundColor"
            wanted = palette(scheme)["paper"]
            assert browser.execute_script(colour) == "rgb({}, {}, {})".format(
                *(int(wanted[at : at + 2], 16) for at in (1, 3, 5))
            )
            assert accessible(browser) == []
            picture(browser, f"page-{scheme}", tmp_path)

    def test_narrow(self, browser: Chrome, tmp_path: Path) -> None:
        """On a telephone only the tables move sideways, and every word can be read."""
        with looked_at(browser, fleet()) as site:
            use(browser, size=(390, 844))
            browser.get(f"{site.url}?refresh=off")
            width = "return document.documentElement.scrollWidth"
            assert browser.execute_script(width) == 390
            assert accessible(browser) == []
            picture(browser, "page-narrow", tmp_path)

    @staticmethod
    def updates(browser: Chrome, site: Served, state: State) -> None:
        """See that a page shows what has changed, and that one stays where one was."""
        browser.execute_script("scrollTo(0, 300)")
        listener = next(one for one in state.table if one.identity.port == 1007)
        site.change(lambda: listener.sockets.update({7: Queues(1, 77, None, 78)}))
        wait(browser, lambda _: cell(browser, 1007, "Q / Qmax") == "77 / 78")
        wait(browser, lambda _: browser.execute_script("return scrollY") == 300)

    def test_updates(self, browser: Chrome) -> None:
        """With scripts the page changes in place: nothing is loaded again and the focus stays."""
        state = fleet(100)
        with looked_at(browser, state) as site:
            use(browser, size=(1280, 800))
            browser.get(site.url)
            browser.execute_script("window.same = true; document.getElementById('by-port').focus()")
            self.updates(browser, site, state)
            assert browser.execute_script("return window.same") is True
            assert browser.execute_script("return document.activeElement.id") == "by-port"

    def test_updates_without_scripts(self, browser: Chrome) -> None:
        """Without scripts the page is loaded again by itself, where one was, as it was sorted."""
        state = fleet(100)
        with looked_at(browser, state) as site:
            use(browser, scripts=False, size=(1280, 800))
            browser.get(f"{site.url}?sort=port")
            self.updates(browser, site, state)
            assert browser.current_url.endswith("?sort=port")

    def test_pause_and_sort(self, browser: Chrome) -> None:
        """Without scripts too one can sort by a column and let the page stand still."""
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
        """The tab key goes through all that can be used, and shows where it is."""
        with looked_at(browser, fleet()) as site:
            use(browser, size=(1280, 800))
            browser.get(f"{site.url}?refresh=off")
            links = [link.text for link in browser.find_elements(By.TAG_NAME, "a")]
            seen = []
            for _ in range(len(links) + 2):
                browser.switch_to.active_element.send_keys(Keys.TAB)
                element = browser.switch_to.active_element
                seen.append(element.text if element.tag_name == "a" else "")
                assert element.value_of_css_property("outline-style") == "solid"
                assert element.value_of_css_property("outline-width") == "3px"
            assert [text for text in seen if text] == links

    def test_many_listeners(self, browser: Chrome, tmp_path: Path) -> None:
        """With 1,000 listeners the heads of the columns stay, the fullest are on top."""
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
            assert nodes < 16_000
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
        """Text from outside is shown as it is and does nothing."""
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
        """When the exporter does not answer the page says that what it shows is old."""
        with served(fleet()) as site:
            use(browser, size=(1280, 800))
            browser.get(site.url)
            stale = browser.find_element(By.ID, "stale")
            assert not stale.is_displayed()
            site.stop()
            wait(browser, lambda _: stale.is_displayed())
            assert re.match(r"No newer numbers since .+ \(.+\): what is below is old\.", stale.text)
            assert cell(browser, 8080, "Q / Qmax") == "129 / 128"
            browser.get("about:blank")
            assert all("net::ERR_" in complaint for complaint in console(browser))
