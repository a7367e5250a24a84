"""The top command: a table of all listeners, redrawn each second, or CSV once."""

from __future__ import annotations

import asyncio
import csv
import json
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.exporter import free_port
from lab.waiting import until

from dtrace_exporter import screen, top
from dtrace_exporter.config import load
from dtrace_exporter.service import Service
from dtrace_exporter.top import KEYS, Table, TopError
from exporter_process import EXPORTER, run, serving, write
from fake_steps import FOREVER, READY, FakeDTrace
from linux_rows import TAKEN, counted, told
from pseudo_terminal import Screen, on_terminal

CTRL_C = "\x03"
ROWS: list[dict[str, Any]] = [
    {
        "port": "80",
        "address": "*",
        "listener": "web",
        "netns": "",
        "q0_length": 1,
        "q_length": 9,
        "q_limit": 9,
        "q_capacity": 10,
        "syns_total": 100,
        "established_total": 90,
        "accepts_total": 80,
        "drops_total": {"q_full": 5, "other": 1},
        "accept_wait_seconds_sum": 1.0,
        "accept_wait_seconds_count": 80,
        "q_saturation_ratio_bucket": {"0.0": 1},
        "program": "nginx\x07",
        "unit": "nginx.service",
        "container": "",
        "fmri": "",
    },
    {
        "port": "443",
        "address": "::1",
        "listener": "\x1b[2Jtls",
        "netns": "4026532201",
        "q_length": 0,
        "q_limit": 128,
        "q_capacity": 129,
        "drops_total": {"unknown": 0},
    },
    # This listener is closed, so it has only counters.
    {"port": "8080", "address": "*", "listener": "", "netns": "", "drops_total": {"unknown": 7}},
]
LATER = [
    {
        **ROWS[0],
        "syns_total": 120,
        "accepts_total": 81,
        "drops_total": {"q_full": 6, "other": 1},
        "accept_wait_seconds_sum": 1.25,
        "accept_wait_seconds_count": 81,
    },
    *ROWS[1:],
]


def table(*samples: tuple[float, list[dict[str, Any]]], by: str = "full") -> Table:
    """Return a table with some samples."""
    made = Table(by)
    for at, rows in samples:
        made.take(at, top.values(rows))
    return made


def lines(drawn: list[screen.Line]) -> list[str]:
    """Return the text of lines without their styles."""
    return ["".join(text for text, _ in line).rstrip() for line in drawn]


def test_figures() -> None:
    """Rates and waits are the growth of counters, and unknown figures are absent."""
    first, second, closed = table((100.0, ROWS), (102.0, LATER)).figures()
    assert first == {
        "name": "web",
        "owner": "nginx  (nginx.service)",
        "address": "*",
        "port": 80,
        "q0": 1,
        "q": 9,
        "qmax": 9,
        "full": 0.9,
        "syns": 10.0,
        "accepts": 0.5,
        "drops": 0.5,
        "wait": 0.25,
    }
    assert second == {
        "name": " [2Jtls",
        "address": "::1",
        "port": 443,
        "q": 0,
        "qmax": 128,
        "full": 0.0,
        "place": "4026532201",
        "drops": 0.0,
    }
    assert closed == {"address": "*", "port": 8080, "drops": 0.0}


def test_rates_are_of_the_last_seconds() -> None:
    """A rate is over the last five seconds, and a counter that fell has none."""
    made = table(*((float(at), ROWS) for at in range(10)), (10.0, LATER))
    assert made.figures()[0]["syns"] == 20 / 5
    assert "syns" not in table((0.0, LATER), (1.0, ROWS)).figures()[0]
    (alone,) = table((0.0, ROWS[:1])).figures()
    assert not {"syns", "accepts", "drops", "wait"} & {*alone}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("backwards", [False, True])
def test_sorted(key: str, backwards: bool) -> None:
    """The table can be sorted by each column in both ways, and rows without a value come last."""
    made = table((0.0, ROWS), (2.0, LATER), by=key)
    made.sorted.backwards = backwards
    ports = [int(port) for port in re.findall(r"\b(?:80|443|8080)\b", "\n".join(_body(made)))]
    found = {row["port"]: row.get(key) for row in made.figures()}
    order = [found[port] for port in ports]
    known = [value for value in order if value is not None]
    assert order == [*known, *([None] * (len(order) - len(known)))]
    upwards = (key in ("host", "place", "address", "port", "name")) != backwards
    assert known == sorted(known, reverse=not upwards)


def _body(made: Table) -> list[str]:
    """Return the ports of the drawn rows, without what stands to their right."""
    title, *rows = lines(made.draw(200, 24, ""))[1:-1]
    at = title.index("PORT") + len("PORT")
    return [row[:at].rpartition(" ")[2] for row in rows]


def test_keys() -> None:
    """Keys choose the next or the previous column, and reverse the order."""
    made = table((0.0, ROWS), (2.0, LATER), by="port")
    there = [key for key in KEYS if key != "host"]
    seen = []
    for _ in there:
        seen.append(made.sorted.by)
        made.press(">")
    assert seen == [*there[there.index("port") :], *there[: there.index("port")]]
    made.press(screen.LEFT)
    made.press(screen.RIGHT)
    made.press("<")
    assert made.sorted.by == "address"
    made.press("r")
    assert made.sorted.backwards
    made.press("x")
    assert (made.sorted.by, made.sorted.backwards) == ("address", True)


@pytest.mark.parametrize("columns", [10, 20, 30, 40, 60, 80, 100, 200])
def test_narrow(columns: int) -> None:
    """At any width, the table has the port, Q, Qmax and the column that sorts it."""
    title = lines(table((0.0, ROWS), (2.0, LATER), by="wait").draw(columns, 24, "source"))[1]
    assert {"PORT", "Q", "QMAX", "FULL", "WAIT"} <= {*title.split()}
    assert len(title) <= max(columns, 36)
    assert ("ADDRESS" in title) == (columns >= 80)


def test_more_than_fit() -> None:
    """If there are more listeners than lines, the head says how many there are and are shown."""
    many = [{**ROWS[1], "port": str(port)} for port in range(1, 101)]
    drawn = lines(table((0.0, many), by="port").draw(80, 10, "source"))
    assert len(drawn) == 10
    assert "100 listeners, 7 shown, by port upwards; source" in drawn[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(top.HEADER), inner),
)
ROW = st.fixed_dictionaries({}, optional={name: JSON | st.text() for name in top.HEADER})
ANSWER = st.lists(ROW, max_size=4)


@given(answer=ANSWER | JSON, later=ANSWER, by=st.sampled_from(KEYS))
@settings(max_examples=60, deadline=None)
def test_hostile_answers(answer: Any, later: Any, by: str) -> None:
    """Any answer is drawn without terminal commands, or is an error."""
    made = Table(by)
    try:
        made.take(0.0, top.values(answer))
        made.take(1.0, top.values(later))
    except TopError:
        return
    for columns in (1, 30, 80):
        for text in lines(made.draw(columns, 5, "source")):
            assert text.isprintable()
    out = StringIO()
    top.write_csv(out, top.values(later))
    assert len([*csv.reader(StringIO(out.getvalue()))]) == 1 + len(later)


# With a terminal and a service


class Answers(BaseHTTPRequestHandler):
    """A service that sends its server's answer."""

    def do_GET(self) -> None:
        """Send the answer."""
        assert isinstance(self.server, Serving)
        assert self.path == "/api/v1/listeners"
        self.send_response(self.server.status)
        if self.server.location:
            self.send_header("Location", self.server.location)
        self.end_headers()
        self.wfile.write(self.server.answer)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class Serving(ThreadingHTTPServer):
    """A server whose ``answer``, ``status`` and ``location`` may change."""

    status = 200
    location = ""
    answer = json.dumps(ROWS).encode()

    @property
    def url(self) -> str:
        """The server's URL."""
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def service() -> Iterator[Serving]:
    """Return a service that has three listeners."""
    with Serving(("127.0.0.1", 0), Answers) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@contextmanager
def shown(url: str, *arguments: str, columns: int = 100) -> Iterator[Screen]:
    """Run the command on a terminal, and check that it restores the terminal."""
    command = [*EXPORTER, "top", f"--url={url}", *arguments]
    # This shell keeps the terminal open after the command.
    holding = ["sh", "-c", '"$@"; status=$?; read -r line; exit $status', "sh", *command]
    with on_terminal(holding, columns) as seen:
        before = seen.modes()
        yield seen
        seen.wait(r"\x1b\[\?25h\x1b\[\?1049l$")
        until(lambda: seen.modes() == before, "the terminal is as it was")
        seen.type("\n")
        assert seen.end() == 0


def test_on_a_terminal(service: Serving) -> None:
    """On a terminal the table is redrawn each second, follows keys and the size, and q ends it."""
    with shown(service.url, columns=130) as seen:
        seen.wait_drawn(r"3 listeners, by full downwards; http")
        assert seen.text.startswith("\x1b[?1049h\x1b[?25l\x1b[H")
        first, second, third = seen.drawn[2:5]
        assert first.split() == [
            *("*", "80", "web", "nginx", "(nginx.service)", "1", "9", "9", "90%")
        ]
        assert "[2Jtls" in second
        assert third.split()[:2] == ["*", "8080"]
        assert "\x1b[2J" not in seen.text
        service.answer = json.dumps(LATER).encode()
        seen.wait_drawn(r"\* +80 .*250ms")
        seen.type("r")
        seen.wait_drawn("by full upwards")
        assert seen.drawn[2].split()[:3] == ["4026532201", "::1", "443"]
        seen.type("\x1b[D")
        seen.wait_drawn("by qmax upwards")
        seen.resize(4, 30)
        seen.wait_drawn(r"3 listeners, 1 shown")
        until(lambda: max(map(len, seen.drawn)) <= 30 and len(seen.drawn) <= 4)
        seen.type("q")


def test_sort_flag(service: Serving) -> None:
    """The flag --sort chooses the first order."""
    with shown(service.url, "--sort=port") as seen:
        seen.wait_drawn("by port upwards")
        seen.type("q")
    assert run("top", "--sort=size").returncode == 2


def test_ctrl_c(service: Serving) -> None:
    """Ctrl-C ends the command and restores the terminal."""
    command = [*EXPORTER, "top", f"--url={service.url}"]
    with on_terminal(command, 80) as seen:
        seen.wait_drawn("listeners")
        seen.type(CTRL_C)
        assert seen.end() == 0
        assert seen.text.endswith("\x1b[?25h\x1b[?1049l")


def test_ctrl_z(service: Serving) -> None:
    """Ctrl-Z gives the terminal back until the process continues."""
    with on_terminal([*EXPORTER, "top", f"--url={service.url}"], 80) as seen:
        before = seen.modes()
        seen.wait_drawn("listeners")
        assert seen.modes() != before
        seen.type("\x1a")
        seen.wait(r"\x1b\[\?1049l$")
        until(lambda: seen.state() == "T", "it stands still")
        assert seen.modes() == before
        seen.signal(signal.SIGCONT)
        seen.wait(r"\x1b\[\?1049l\x1b\[\?1049h")
        seen.wait_drawn("listeners")
        seen.type("q")
        assert seen.end() == 0


def test_a_service_that_goes(service: Serving) -> None:
    """If the service fails, the head says so and the table stays; it recovers with the service."""
    with shown(service.url) as seen:
        seen.wait_drawn("listeners, by")
        service.status = 503
        seen.wait_drawn("answers 503")
        assert any(line.split()[:2] == ["*", "80"] for line in seen.drawn)
        service.status = 200
        seen.wait_drawn(r"by full downwards; http\S+\n")
        seen.type("q")


def test_dumb_terminal(service: Serving) -> None:
    """A terminal that cannot be drawn on gets CSV once."""
    with on_terminal([*EXPORTER, "top", f"--url={service.url}"], 80, TERM="dumb") as seen:
        assert seen.end() == 0
    assert seen.text.splitlines()[0] == ",".join(top.HEADER)
    assert "\x1b" not in seen.text


# Without a terminal


def rows_of(text: str) -> list[dict[str, str]]:
    """Return the rows of a CSV text, by column name."""
    return [*csv.DictReader(StringIO(text))]


def test_csv(service: Serving) -> None:
    """Without a terminal the command prints CSV once, without control characters."""
    done = run("top", f"--url={service.url}/")
    assert (done.returncode, done.stderr) == (0, "")
    first, second, third = rows_of(done.stdout)
    assert [*first] == [*top.HEADER]
    # The rows are sorted by place, address and port.
    assert (first["port"], first["drops_total"], first["syns_total"]) == ("80", "6", "100")
    assert [first[name] for name in top.OWNER] == ["nginx ", "nginx.service", "", ""]
    assert (second["port"], second["q_limit"], second["drops_total"]) == ("8080", "", "7")
    assert (third["listener"], third["netns"], third["q_capacity"]) == (
        *(" [2Jtls", "4026532201"),
        "129",
    )


@pytest.mark.parametrize(
    ("status", "answer", "said"),
    [
        (401, b"", "answers 401 Unauthorized"),
        (404, b"", "answers 404 Not Found"),
        (200, b"<html>", "not an answer of dtrace-exporter"),
        (200, b"{}", "expected a list of listeners"),
        (200, b"[1]", "expected a list of listeners"),
        (200, b"[" * 100_000, "not an answer of dtrace-exporter"),
    ],
)
def test_no_service_of_ours(service: Serving, status: int, answer: bytes, said: str) -> None:
    """An answer that is not the exporter's, or that wants a password, is an error that says so."""
    service.status, service.answer = status, answer
    done = run("top", f"--url={service.url}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_redirects(service: Serving) -> None:
    """A service cannot redirect top to another server, over HTTP or FTP."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.setblocking(False)
        for scheme in ("http", "ftp"):
            service.status = 302
            service.location = f"{scheme}://127.0.0.1:{other.getsockname()[1]}/"
            with pytest.raises(TopError, match="answers 302 Found"):
                top.fetch(service.url)
            with pytest.raises(BlockingIOError):
                other.accept()


def test_a_status_line_for_the_terminal() -> None:
    """A bad status line ends the command, and its text cannot control the terminal."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with listening.accept()[0] as client:
                client.recv(1 << 16)
                client.sendall(b"\x1b]0;title\x07\x1b[2J nonsense\r\n\r\n")

        threading.Thread(target=answer).start()
        done = run("top", f"--url=http://127.0.0.1:{listening.getsockname()[1]}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "\x1b" not in done.stderr
    assert "\x07" not in done.stderr


def test_a_port_that_is_none() -> None:
    """A port with too many digits is read as 0."""
    table = Table()
    table.take(1.0, [{"port": "9" * 5000}])
    assert [row["port"] for row in table.figures()] == [0]


def test_an_answer_without_end(service: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that takes too long is an error."""
    monkeypatch.setattr(top, "_WHOLE_SECONDS", -1)
    service.answer = b"[]"
    with pytest.raises(top.TopError, match="takes longer"):
        top.fetch(service.url)


def test_nobody_there() -> None:
    """If the named service does not run, that is an error, and so is a URL without http."""
    port = free_port()
    done = run("top", f"--url=http://127.0.0.1:{port}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"dtrace-exporter: http://127.0.0.1:{port}: Connection refused\n"
    for url in ("file:///etc/passwd", "localhost:9748"):
        done = run("top", f"--url={url}")
        assert done.returncode == 2
        assert "expected a URL such as http://localhost:9748" in done.stderr


def test_our_service(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """The command shows the listeners of a real service."""
    rows = {"rows": ["0 " + told(22, qmax=3), "0 " + counted(22, 5, TAKEN, qmax=3)]}
    path = write(tmp_path / "c.yml", fake_dtrace(READY, rows, FOREVER))
    with serving("--config.file", path) as exporter:
        url = f"http://127.0.0.1:{exporter.port}"
        until(lambda: '"syns_total": 5' in exporter.get("/api/v1/listeners"))
        (row,) = rows_of(run("top", f"--url={url}").stdout)
    assert (row["port"], row["listener"], row["syns_total"]) == ("22", "name", "5")


def own(
    monkeypatch: pytest.MonkeyPatch, config: Path | None = None
) -> tuple[int, list[dict[str, str]]]:
    """Run the command without a service, and return its status and rows."""
    monkeypatch.setattr(top, "URL", f"http://127.0.0.1:{free_port()}")
    out = StringIO()
    status = asyncio.run(top.top(out, "", lambda: Service(config, load(config))))
    return status, rows_of(out.getvalue())


@pytest.mark.usefixtures("no_child_left")
def test_by_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_dtrace: FakeDTrace
) -> None:
    """Without a service the command runs the configured session itself, and ends it."""
    rows = {"rows": ["0 " + told(22, time=1, q0=1, q=2, qmax=3)]}
    path = write(tmp_path / "c.yml", fake_dtrace(READY, rows, FOREVER))
    assert own(monkeypatch, path)[0] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="sock_diag is an interface of Linux")
def test_by_itself_with_sock_diag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a service and DTrace, the command shows the kernel's numbers of a listener."""
    path = tmp_path / "c.yml"
    path.write_text("source: sock_diag\n", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0), backlog=7) as listener:
        port = listener.getsockname()[1]
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        status, rows = own(monkeypatch, path)
        for client in clients:
            client.close()
    (row,) = (row for row in rows if row["port"] == str(port))
    assert status == 0
    assert (row["address"], row["q_length"], row["q_limit"], row["q_capacity"]) == (
        *("127.0.0.1", "2", "7"),
        "8",
    )
    # A process can see its own sockets, whoever runs it.
    assert row["program"] == Path("/proc/self/comm").read_text(encoding="utf-8").strip()


@pytest.mark.usefixtures("no_child_left")
def test_by_itself_where_dtrace_may_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_dtrace: FakeDTrace
) -> None:
    """If its own session does not come up, the command fails with the reason."""
    monkeypatch.setattr(top, "_READY_SECONDS", 3)
    path = write(tmp_path / "c.yml", fake_dtrace({"unprivileged": True}))
    with pytest.raises(TopError, match=r"^session port-22 is down: .*run as root"):
        own(monkeypatch, path)
