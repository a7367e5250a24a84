"""The landing page's table of scripts: state, series, last row, and a link to their metrics."""

from __future__ import annotations

import html
import re
import time

from dtrace_exporter.listeners import SessionId
from dtrace_exporter.scripts import reader
from dtrace_exporter.scripts.families import families
from dtrace_exporter.scripts.metrics import ScriptMetrics
from dtrace_exporter.scripts.rows import Row
from dtrace_exporter.state import SessionStatus, State
from web_serving import HOSTILE, get, one_port

IO = SessionId("", "script-io")


def with_script(status: SessionStatus, file: str = "/x/io.d") -> State:
    """Return a state with a listener and a script that has two series."""
    state = one_port()
    script = reader.read(file, "BEGIN { @n[pid] = count(); @t = quantize(1); }")
    state.scripts[IO] = metrics = ScriptMetrics(file, families(script, {}), 1000)
    state.sessions[IO] = status
    metrics.feed(Row(0, ("7",), 3, final=False))
    metrics.feed(Row(1, (), ((1, 2),), final=False))
    return state


def table(state: State) -> list[str]:
    """Return the cells of the table of scripts as HTML; an empty list if there is no table."""
    page = get(state, "/").body.decode()
    (part,) = re.findall(r'<div id="scripts" data-live>(.*?)<div id="sessions"', page, re.DOTALL)
    cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", part.partition("<tbody>")[2], re.DOTALL)
    return [cell.strip() for cell in cells]


def test_a_script_that_is_up() -> None:
    """The table shows a script's series, their limit, the time of its last row, and its file."""
    name, state, series, last, file = table(
        with_script(SessionStatus(up=True, reason="", last_record=time.time() - 3))
    )
    assert ">io</a>" in name
    assert state.endswith("up")
    assert series == "2 of 1,000"
    assert re.fullmatch(r"[34] s ago", last)
    assert file == "/x/io.d"


def test_a_script_that_is_down() -> None:
    """A script that is down shows why; one that has printed nothing shows no last row."""
    state = with_script(SessionStatus(reason="more than 2 series"))
    cells = table(state)
    assert cells[1].endswith("down</span>: more than 2 series")
    assert cells[3] == "\N{EN DASH}"
    assert b"script-io</strong>: more than 2 series" in get(state, "/").body


def test_link() -> None:
    """The link leads to the metrics of that script only."""
    state = with_script(SessionStatus(up=True))
    (target,) = re.findall(r'href="([^"]+)"', table(state)[0])
    answer = get(state, html.unescape(target)).body.decode()
    names = {re.split(r"[{ ]", line)[0] for line in answer.splitlines() if line[0] != "#"}
    assert names == {"dtrace_io_n_total", "dtrace_io_t_bucket", "dtrace_io_t_count"}


def test_no_scripts() -> None:
    """Without scripts the page has no table of scripts."""
    assert table(one_port()) == []


def test_hostile_names() -> None:
    """Markup in a file's name is escaped."""
    state = with_script(SessionStatus(up=True), f"/x/{HOSTILE}.d")
    assert html.escape(HOSTILE, quote=False).split("\n")[0][:20] in table(state)[-1]
    assert "<script>alert" not in get(state, "/").body.decode()
