"""The measurements that need no kernel: scrapes, ticks and memory of the exporter.

The exporter runs as usual, on a stand-in for dtrace(1) that prints the rows of many listeners.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from bench import bare, client, scripts
from bench.dtrace import FIRST_PORT, rows, sun_rows
from dtrace_exporter import sock_diag
from dtrace_exporter.collector import Collector
from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.limits import Limits
from dtrace_exporter.listeners import Capabilities, ListenerTable, SessionId
from dtrace_exporter.sock_diag import SockDiagSource
from dtrace_exporter.sockets import Queues
from dtrace_exporter.state import SessionStatus, State
from dtrace_exporter.tracing.rows import Tick
from dtrace_exporter.tracing.tally import Tally
from dtrace_exporter.watched import Watched, named
from dtrace_exporter.web import handlers
from dtrace_exporter.web.exposition import Texts
from dtrace_exporter.web.server import bind

HERE = Path(__file__).resolve().parent
SIZES = (1, 10, 100, 1000)

_REPETITIONS = 15
_PATIENCE = 120.0
_BEAT = 0.02
_CROWD = 200
_SESSION = SessionId("", "all")
_TEXT, _OPENMETRICS = "text/plain;version=0.0.4", "application/openmetrics-text;version=1.0.0"
_FORMATS = {
    "text": {"Accept": _TEXT},
    "text, gzip": {"Accept": _TEXT, "Accept-Encoding": "gzip"},
    "OpenMetrics": {"Accept": _OPENMETRICS},
    "OpenMetrics, gzip": {"Accept": _OPENMETRICS, "Accept-Encoding": "gzip"},
}
_BUSY, _SOCK_DIAG = "dtrace, every listener busy", "sock_diag"
_QMAX = 128
_OURS, _NODE, _BARE = "dtrace-exporter", "node exporter", "bare prometheus_client"

_NODE_COMMAND = "prometheus-node-exporter"
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dtrace-exporter/bench"


def measure(sizes: Sequence[int] = SIZES, repetitions: int = _REPETITIONS) -> dict[str, Any]:
    """Measure everything in one run.

    Args:
        sizes: numbers of listeners; growth is from the last but one to the last.
        repetitions: how often each measurement is repeated, for medians.

    Returns:
        The results, as for report.py.
    """
    figures = _Figures()
    versions = software()
    for size in sizes:
        _say(f"{size} listeners")
        _rendering(figures, size, repetitions)
        _scrapes(figures, size, repetitions, versions)
        _ticks(figures, size, repetitions)
    _say("the first scrape")
    _first_scrape(figures, 10 * sizes[-1], min(repetitions, 5))
    _say("rows")
    _parsing(figures, sizes[-1], repetitions)
    _say("scripts")
    _scripts(figures, repetitions)
    _say("one session for each port")
    for size in sizes:
        if size <= 100:
            _per_port(figures, size)
    _say("heartbeats")
    asyncio.run(_heartbeats(figures, sizes[-1], repetitions))
    return {
        "software": versions,
        "figures": figures.list,
        "reach": _reach(figures, sizes),
        "plots": [],
    }


def software() -> dict[str, str]:
    """Return the versions of the software that is always measured."""
    names = ("dtrace-exporter", "prometheus-client", "tornado")
    return {"Python": platform.python_version()} | {name: version(name) for name in names}


class _Figures:
    def __init__(self) -> None:
        self.list: list[dict[str, Any]] = []

    def add(self, table: str, row: str, column: str, values: Sequence[float]) -> None:
        self.list.append(
            {"table": table, "row": row, "column": column, "values": [round(v, 6) for v in values]}
        )

    def median(self, table: str, row: str, column: str) -> float | None:
        for figure in self.list:
            if (figure["table"], figure["row"], figure["column"]) == (table, row, column):
                return float(statistics.median(figure["values"]))
        return None


TIME = "Time of a scrape over HTTP, ms, by listeners"
CPU = "CPU of a scrape over HTTP, ms, by listeners"
SAMPLES = "Samples of a scrape, by listeners"
RATE = "Samples rendered in a second of CPU, thousands, by listeners"
RATIO = "Rendering: dtrace-exporter compared with bare prometheus_client, times, by listeners"
TICK = "CPU of a tick in the exporter, every listener busy, ms, by listeners"
MEMORY = "Resident memory of the exporter, MB, by listeners"
FIRST = "CPU of the first scrape, rendered, ms, by listeners"
PARSING = "CPU of reading a row into the listener table, with the most listeners, us"
SCRIPTS = f"CPU of {scripts.ROWS} rows of a tick, and of a sample of a scrape, all of them changed"
HEARTBEAT = "The event loop while scrapes of the most listeners are rendered, ms"


def _reach(figures: _Figures, sizes: Sequence[int]) -> list[dict[str, Any]]:
    before, most = map(_column, sizes[-2:])
    first = _column(10 * sizes[-1])

    def growth(what: str, table: str, row: str) -> dict[str, Any]:
        small, large = figures.median(table, row, before), figures.median(table, row, most)
        return {
            "figure": f"growth of {what} from {before} to {most} listeners",
            "at_most": 10.5,
            "unit": "times",
            "value": large / small if small and large else None,
        }

    def rate(form: str) -> dict[str, Any]:
        return {
            "figure": "samples rendered per second, compared with bare prometheus_client, "
            f"{most} listeners, all samples changed: {form}",
            "at_least": 1.0,
            "unit": "times",
            "value": figures.median(RATIO, f"{form}, all changed", most),
        }

    def script(what: str, column: str, most_times: float) -> dict[str, Any]:
        ours = figures.median(SCRIPTS, scripts.NAMES[scripts.COUNTS], column)
        other = figures.median(SCRIPTS, scripts.LISTENERS, column)
        return {
            "figure": f"{what} of a script's counts, compared with that of listen queues",
            "at_most": most_times,
            "unit": "times",
            "value": ours / other if ours and other else None,
        }

    return [
        script(f"a tick of {scripts.ROWS} rows", "a tick, ms", 2.0),
        script("a sample in a scrape", "a sample of a scrape, us", 1.0),
        {
            "figure": f"resident memory for {most} listeners, exporter alone",
            "at_most": 80.0,
            "unit": "MB",
            "value": figures.median(MEMORY, "one session for all", most),
        },
        rate("text"),
        rate("OpenMetrics"),
        {
            "figure": "the same, all samples new: text",
            "at_least": 1.0,
            "unit": "times",
            "value": figures.median(RATIO, "text, all new", most),
        },
        *(
            {
                "figure": f"CPU of the first scrape of {first} listeners, {source}",
                "at_most": 2000.0,
                "unit": "ms",
                "value": figures.median(FIRST, source, first),
            }
            for source in (_BUSY, _SOCK_DIAG)
        ),
        growth("a scrape's CPU, text", CPU, f"{_OURS}, text"),
        growth("a scrape's CPU, OpenMetrics, gzip", CPU, f"{_OURS}, OpenMetrics, gzip"),
        growth("tick handling", TICK, _OURS),
        growth("memory", MEMORY, "one session for all"),
    ]


# Rendering, in this process


def _rendering(figures: _Figures, size: int, repetitions: int) -> None:
    """Render the same samples by turns: ours, all changed or none, and the library's."""
    state = _state(size)
    collector, texts, nothing = Collector(state), Texts(), CollectorRegistry()
    column = _column(size)
    for form, encode in (("text", generate_latest), ("OpenMetrics", generate_openmetrics)):
        library = CollectorRegistry()
        bare.register(Collector(state).collect(), library)
        ours = b"".join(texts.render(collector.read(), nothing, encode))
        count = _same_samples(ours, encode(library))
        rates: dict[str, list[float]] = {
            "all changed": [],
            "none changed": [],
            "all new": [],
            _BARE: [],
        }
        for repetition in range(repetitions):
            _change(state, repetition)
            for what, found in rates.items():
                began = time.thread_time()
                if what == _BARE:
                    encode(library)
                elif what == "all new":
                    b"".join(Texts().render(Collector(state).read(), nothing, encode))
                else:
                    b"".join(texts.render(collector.read(), nothing, encode))
                found.append(count / (time.thread_time() - began))
        for what, values in rates.items():
            row = f"{form}, {what}"
            figures.add(RATE, row, column, [value / 1000 for value in values])
            if what != _BARE:
                pairs = zip(values, rates[_BARE], strict=True)
                figures.add(RATIO, row, column, [value / other for value, other in pairs])


def _first_scrape(figures: _Figures, size: int, repetitions: int) -> None:
    """Read and render listeners that have not been rendered before."""
    busy = _state(size)
    sockets = [
        ListeningSocket(f"127.0.{number >> 8}.{number & 255}", FIRST_PORT, 1, _QMAX, 0, number)
        for number in range(size)
    ]
    readings = [sock_diag.Reading(sockets, Counter())]
    took: dict[str, list[float]] = {_BUSY: [], _SOCK_DIAG: []}
    for _ in range(repetitions):
        for source, found in took.items():
            state = busy
            began = time.thread_time()
            if source == _SOCK_DIAG:
                state = State()
                state.table.watch(_SESSION, Watched(), sock_diag.CAPABILITIES)
                state.table.limit("", Limits(listeners=size))
                deque(SockDiagSource().update(state.table, _SESSION, readings), 0)
            b"".join(Texts().render(Collector(state).read(), CollectorRegistry(), generate_latest))
            found.append(1000 * (time.thread_time() - began))
    for source, values in took.items():
        figures.add(FIRST, source, _column(size), values)


def _state(size: int) -> State:
    state = State()
    ports = {FIRST_PORT + number: f"service-{number}" for number in range(size)}
    reasons = ("q_full", "q0_full", "q_full_ack", "other")
    state.table.watch(_SESSION, named(ports), Capabilities(reasons=reasons))
    state.sessions[_SESSION] = SessionStatus(up=True, last_record=time.time())
    _change(state, 0)
    return state


def _change(state: State, seed: int) -> None:
    for number, listener in enumerate(list(state.table)):
        mine = state.table.listener(_SESSION, "", "*", listener.identity.port)
        mine.count_syns(0, 128, 900 + number, 0)
        mine.count_syns(1, 128, 60 + number, 120)
        mine.count_syns(11, 128, 10 + number, 1_290)
        mine.drop("q_full", 10 + number)
        mine.established += 990
        mine.count_accepts(3, 400 + number, 20_000_000)
        mine.sockets[1] = Queues(seed % 7, (number + seed) % 5, 1024, 128)


def _same_samples(one: bytes, other: bytes) -> int:
    """Return the number of samples in two scrapes, which must have the same ones."""
    names = [
        sorted(
            line.rpartition(b" ")[0] for line in text.split(b"\n") if line and line[0] != ord("#")
        )
        for text in (one, other)
    ]
    if names[0] != names[1]:
        raise RuntimeError("prometheus_client was not given the same samples")
    return len(names[0])


# Scrapes over HTTP


@dataclass
class _Server:
    name: str
    process: subprocess.Popen[bytes]
    port: int

    @property
    def cpu(self) -> float:
        """The CPU seconds that the process has used, including those of ended threads."""
        # This is how clock_getcpuclockid(3) makes the number of a process's clock.
        return time.clock_gettime((~self.process.pid << 3) | 2)

    @property
    def memory(self) -> float:
        """Resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        (kibibytes,) = re.findall(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
        return int(kibibytes) * 1024 / 1e6

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE)

    def scrape(self) -> str:
        connection = self.connect()
        try:
            return client.scrape(connection, {"Accept": _TEXT})[2].decode()
        finally:
            connection.close()


@contextmanager
def _serving(
    name: str, argv: Sequence[str], port: int, wanted: str, count: int
) -> Iterator[_Server]:
    """Run a server until the block ends; it begins once a scrape has enough samples of a name."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
        server = _Server(name, process, port)
        deadline = time.monotonic() + _PATIENCE
        try:
            while True:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    if len(re.findall(wanted, server.scrape(), re.MULTILINE)) >= count:
                        break
                status = process.poll()
                if status is not None or time.monotonic() > deadline:
                    log.seek(0)
                    said = log.read()[-2000:].decode(errors="replace")
                    how = f"in {_PATIENCE:.0f} s" if status is None else f"and ends with {status}"
                    raise RuntimeError(f"{name} does not serve its metrics {how}: {said}")
                time.sleep(0.05)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _exporter(listeners: int, mode: str, session: str = "shared") -> Iterator[_Server]:
    """Run the exporter on a stand-in for dtrace(1) with many listeners, until the block ends."""
    port = _free_port()
    each = 1 if session == "per-port" else listeners
    fake = [sys.executable, "-I", str(HERE / "dtrace.py"), str(each), mode]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yml"
        with config.open("w", encoding="utf-8") as file:
            file.write("source: dtrace\ndtrace:\n")
            file.write(f"  {{command: {fake}, program: linux, session: {session}}}\nlisteners:\n")
            for number in range(listeners):
                file.write(f"  - {{port: {FIRST_PORT + number}, name: service-{number}}}\n")
        argv = [
            *(sys.executable, "-m", "dtrace_exporter"),
            f"--config.file={config}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ]
        wanted, count = "^dtrace_tcp_listen_q_limit{", listeners
        if session == "per-port":
            wanted = "^dtrace_session_up{.*} 1"
        with _serving(_OURS, argv, port, wanted, count) as server:
            yield server


def _scrapes(figures: _Figures, size: int, repetitions: int, versions: dict[str, str]) -> None:
    """Scrape the exporter, the node exporter and a bare prometheus_client by turns."""
    with ExitStack() as stack:
        ours = stack.enter_context(_exporter(size, "idle"))
        text = ours.scrape()
        names = {family.name for family in bare.own(text)}
        mine = [line for line in text.splitlines() if re.match("(# .* )?dtrace_", line)]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "same.prom").write_text("\n".join(mine) + "\n", encoding="utf-8")
        count = sum(not line.startswith("#") for line in mine)
        port = _free_port()
        argv = [sys.executable, str(HERE / "bare.py"), str(folder / "same.prom"), str(port)]
        servers = [ours, stack.enter_context(_serving(_BARE, argv, port, "^dtrace_", count))]
        if node := _node_exporter():
            port = _free_port()
            argv = [
                node,
                "--collector.disable-defaults",
                "--collector.textfile",
                f"--collector.textfile.directory={folder}",
                f"--web.listen-address=127.0.0.1:{port}",
            ]
            servers.append(stack.enter_context(_serving(_NODE, argv, port, "^dtrace_", count)))
            said = subprocess.run([node, "--version"], check=False, capture_output=True, text=True)
            if found := re.search(r"version (\S+)", said.stdout + said.stderr):
                versions[_NODE] = found[1]
        assert names
        measured: dict[tuple[str, str], list[tuple[float, float]]] = {}
        connections = [server.connect() for server in servers]
        for repetition in range(-1, repetitions):
            for form, headers in _FORMATS.items():
                for server, connection in zip(servers, connections, strict=True):
                    began = server.cpu
                    took, answer, _ = client.scrape(connection, headers)
                    used = server.cpu - began
                    same = ("openmetrics" in answer.headers["Content-Type"]) == (
                        "OpenMetrics" in form
                    )
                    # The first scrape also makes the names.
                    if same and repetition >= 0:
                        measured.setdefault((server.name, form), []).append((took, used))
        for connection in connections:
            connection.close()
    figures.add(SAMPLES, "of listeners, sessions and exporter", _column(size), [count])
    for (name, form), values in measured.items():
        figures.add(TIME, f"{name}, {form}", _column(size), [1000 * took for took, _ in values])
        figures.add(CPU, f"{name}, {form}", _column(size), [1000 * used for _, used in values])


def _node_exporter() -> str | None:
    """Return the path of the node exporter; if it is not installed, Debian's package is unpacked.

    It is not installed for this, because then it would be started on every address of this machine.
    """
    cached = _CACHE / "usr/bin" / _NODE_COMMAND
    if found := shutil.which(_NODE_COMMAND) or (str(cached) if cached.exists() else None):
        return found
    _CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
        for command in (["apt-get", "-q", "update"], []):
            download = ["apt-get", "-q", "download", _NODE_COMMAND]
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                subprocess.run(download, cwd=folder, check=True, capture_output=True)
                (package,) = Path(folder).glob("*.deb")
                subprocess.run(["dpkg-deb", "-x", package, _CACHE], check=True, capture_output=True)
                return str(cached)
            if command:
                with contextlib.suppress(OSError):
                    subprocess.run(command, check=False, capture_output=True)
    _say(f"no {_NODE_COMMAND} to be had: its figures are left out")
    return None


# Rows

_OF_LINUX, _OF_SUN = "linux.d", "illumos.d"
_CHANGED, _UNCHANGED = "changed since the tick before", "not changed"


def _parsing(figures: _Figures, size: int, repetitions: int) -> None:
    """Feed rows of the same events by turns, of linux.d and of illumos.d.

    Linux's rows are fed twice, the second time unchanged; those of illumos are never repeated.
    """
    readers = {name: Tally(_table(), _SESSION) for name in (_OF_LINUX, _OF_SUN)}
    took: dict[tuple[str, str], list[float]] = {}
    for repetition in range(-1, repetitions):
        tick = repetition + 2
        now = tick * 1_000_000_000
        linux = ["set 1", *rows(size, tick, 1 if repetition < 0 else 0, now)]
        sun = [*sun_rows(size, tick), f"tick {now}"]
        for name, what, lines in (
            (_OF_LINUX, _CHANGED, linux),
            (_OF_LINUX, _UNCHANGED, linux),
            (_OF_SUN, _CHANGED, sun),
        ):
            began = time.thread_time()
            for line in lines:
                record = readers[name].feed(line)
                if isinstance(record, Tick):
                    deque(readers[name].settle(record), maxlen=0)
            used = time.thread_time() - began
            # The first one adds Linux's listeners.
            if repetition >= 0:
                took.setdefault((name, what), []).append(1e6 * used / len(lines))
    for (name, what), values in took.items():
        figures.add(PARSING, name, what, values)


def _scripts(figures: _Figures, repetitions: int) -> None:
    """Read and render as many rows and samples of scripts as of listen queues, by turns."""
    for what, values in scripts.ticks(repetitions).items():
        milliseconds = [1000 * value for value in values]
        figures.add(SCRIPTS, scripts.NAMES.get(what, what), "a tick, ms", milliseconds)
    for what, values in scripts.scrapes(repetitions).items():
        microseconds = [1e6 * value for value in values]
        figures.add(SCRIPTS, scripts.NAMES[what], "a sample of a scrape, us", microseconds)


def _table() -> ListenerTable:
    table = ListenerTable()
    table.watch(_SESSION, Watched())
    return table


# Ticks and memory


def _ticks(figures: _Figures, size: int, repetitions: int) -> None:
    """Measure the exporter's CPU in each second, which has a tick; then its memory."""
    with _exporter(size, "busy") as server:
        values = []
        before = server.cpu
        due = time.monotonic()
        for _ in range(repetitions):
            due += 1.0
            time.sleep(max(0.0, due - time.monotonic()))
            now = server.cpu
            values.append(1000 * (now - before))
            before = now
        figures.add(TICK, _OURS, _column(size), values)
        figures.add(MEMORY, "one session for all", _column(size), [_memory(server)])


def _per_port(figures: _Figures, size: int) -> None:
    with _exporter(size, "busy", "per-port") as server:
        figures.add(MEMORY, "a session for each port", _column(size), [_memory(server)])


def _memory(server: _Server) -> float:
    """Return the memory of a server after several scrapes in every format."""
    connection = server.connect()
    for _ in range(3):
        for headers in _FORMATS.values():
            client.scrape(connection, headers)
    connection.close()
    return server.memory


# Heartbeats


async def _heartbeats(figures: _Figures, size: int, repetitions: int) -> None:
    """Serve scrapes of changed listeners in a loop that handles heartbeats, and time the latter."""
    state = _state(size)

    async def no_reload() -> None:
        pass

    port = _free_port()
    server = handlers.serve(handlers.application(state, no_reload), bind([f"127.0.0.1:{port}"]))
    changing = "all changed five times a second"
    try:
        for row, times, at_once in (
            ("no scrape", 0, 0),
            (f"one scrape after the other, {changing}", repetitions, 1),
            (f"{_CROWD} scrapes at once, {changing}", max(repetitions // 5, 1), _CROWD),
        ):
            late, blocked, took = await _beats_during(state, port, times, at_once)
            figures.add(HEARTBEAT, row, "delay of a heartbeat", late)
            figures.add(HEARTBEAT, row, "longest delay", [max(late)])
            figures.add(HEARTBEAT, row, "longest block, CPU", [max(blocked)])
            if took:
                figures.add(HEARTBEAT, row, "time of an answer", took)
    finally:
        server.stop()
        await server.close_all_connections()


async def _beats_during(
    state: State, port: int, times: int, at_once: int
) -> tuple[list[float], list[float], list[float]]:
    """Return how late heartbeats and the loop's own timers were, and how long answers took, ms."""
    beat = (
        "import time\n"
        f"while True: print('tick', time.monotonic_ns(), flush=True); time.sleep({_BEAT})"
    )
    late: list[float] = []
    blocked: list[float] = []
    program = asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", beat), stdout=asyncio.subprocess.PIPE
    )
    heart = await program
    assert heart.stdout is not None
    pipe = heart.stdout
    await pipe.readline()

    beaten = asyncio.Event()

    async def listen() -> None:
        while line := await pipe.readline():
            late.append((time.monotonic_ns() - int(line.split()[1])) / 1e6)
            beaten.set()

    async def watch() -> None:
        # In CPU time of this process, because other processes also use the machine.
        while True:
            began = time.process_time()
            await asyncio.sleep(0.001)
            blocked.append(1000 * (time.process_time() - began))

    async def change() -> None:
        for seed in range(1 << 30):
            await asyncio.sleep(0.2)
            for listener in list(state.table):
                listener.established += seed + 1
                listener.count_accepts(3, 1, 50_000)

    tasks = [asyncio.create_task(job()) for job in (listen, watch, change)]
    took: list[float] = []
    try:
        if times:
            argv = [sys.executable, str(HERE / "client.py"), *map(str, (port, times, at_once))]
            scraper = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
            output, _ = await scraper.communicate()
            if scraper.returncode:
                raise RuntimeError("the scraper failed")
            took = [1000 * float(line) for line in output.split()]
        else:
            await asyncio.sleep(50 * _BEAT)
        await asyncio.wait_for(beaten.wait(), _PATIENCE)
    finally:
        heart.kill()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await heart.wait()
    return late, blocked, took


def _column(size: int) -> str:
    return f"{size:,}"


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    import json

    json.dump(measure(), sys.stdout, indent=1)
