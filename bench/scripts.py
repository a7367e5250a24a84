"""What a user's own script costs the exporter, compared with listen queues."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from bench.dtrace import rows as listener_rows
from dtrace_exporter.collector import Collector
from dtrace_exporter.listeners import Capabilities, SessionId
from dtrace_exporter.scripts import reader, rendering
from dtrace_exporter.scripts.families import families
from dtrace_exporter.scripts.metrics import ScriptMetrics
from dtrace_exporter.scripts.rows import Row, Splitter
from dtrace_exporter.scripts.rows import Tick as ScriptTick
from dtrace_exporter.state import SessionStatus, State
from dtrace_exporter.tracing.lines import LineSplitter
from dtrace_exporter.tracing.rows import Tick
from dtrace_exporter.tracing.tally import Tally
from dtrace_exporter.watched import Watched, named
from dtrace_exporter.web.exposition import Texts

ROWS = 1000
"""The number of rows in a tick, and of the script's series."""

COUNTS = "BEGIN { @calls[execname, pid] = count(); }"
TABLES = "BEGIN { @times[execname, pid] = quantize(arg0); }"
LISTENERS = "listen queues"
IDLE = "an idle script"
NAMES = {LISTENERS: LISTENERS, COUNTS: "a script's counts", TABLES: "a script's histograms"}

_SESSION = SessionId("", "all")
_SCRIPT = SessionId("", "script-bench")
_TOKEN = rendering.new_token()
_CHUNK = 1 << 16
_HEAD = "\n           value  ------------- Distribution ------------- count    \n"
_LINES = 8


def ticks(repetitions: int) -> dict[str, list[float]]:
    """Measure ticks of ROWS rows, each with a new value, and of no rows, by turns.

    Returns:
        The CPU seconds of each, by the source of the rows.
    """
    takes = {LISTENERS: _listeners(), COUNTS: _script(COUNTS), TABLES: _script(TABLES)}
    takes[IDLE] = _idle, takes[COUNTS][1]
    took: dict[str, list[float]] = {name: [] for name in takes}
    # The first two ticks add the listeners and the series.
    for repetition in range(-2, repetitions):
        for name, (written, take) in takes.items():
            chunks = _chunks(written(repetition + 3))
            began = time.thread_time()
            take(chunks)
            used = time.thread_time() - began
            if repetition >= 0:
                took[name].append(used)
    return took


def scrapes(repetitions: int) -> dict[str, list[float]]:
    """Measure, by turns, the text of scrapes in which all samples have new values.

    Returns:
        The CPU seconds for each sample, by the source of the samples.
    """
    states = {LISTENERS: _queues(), COUNTS: State(), TABLES: State()}
    feeds = {name: _script(name, states[name]) for name in (COUNTS, TABLES)}
    texts = {name: Texts() for name in states}
    collectors = {name: Collector(state) for name, state in states.items()}
    took: dict[str, list[float]] = {name: [] for name in states}
    for repetition in range(-2, repetitions):
        for name, state in states.items():
            if name == LISTENERS:
                _change(state)
            else:
                written, take = feeds[name]
                take(_chunks(written(repetition + 3)))
            began = time.thread_time()
            collector = collectors[name]
            text = b"".join(
                texts[name].render(
                    collector.read(), CollectorRegistry(), generate_latest, collector.families
                )
            )
            used = time.thread_time() - began
            if repetition >= 0:
                took[name].append(used / sum(line[:1] != b"#" for line in text.splitlines()))
    return took


def ratio(took: dict[str, list[float]], name: str) -> float:
    """Return the ratio of a source's cost to that of listen queues, by the medians."""
    return statistics.median(took[name]) / statistics.median(took[LISTENERS])


Written = Callable[[int], bytes]
Take = Callable[[Sequence[bytes]], None]


def _chunks(text: bytes) -> list[bytes]:
    """Return a text in chunks, as they are read."""
    return [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]


def _listeners() -> tuple[Written, Take]:
    state = State()
    state.table.watch(_SESSION, Watched())
    tally, splitter = Tally(state.table, _SESSION), LineSplitter()

    def written(tick: int) -> bytes:
        lines = list(listener_rows(ROWS // 11, tick, 1 if tick == 1 else 0, tick * 10**9))
        return "\n".join([f"tick {tick * 10**9}", "set 1", *lines[:ROWS], ""]).encode()

    def take(chunks: Sequence[bytes]) -> None:
        for chunk in chunks:
            for line in splitter.feed(chunk):
                record = tally.feed(line)
                if isinstance(record, Tick):
                    deque(tally.settle(record), maxlen=0)

    return written, take


def _script(text: str, state: State | None = None) -> tuple[Written, Take]:
    script = reader.read("/bench.d", text)
    metrics = ScriptMetrics(script.path, families(script, {}), ROWS)
    if state is not None:
        state.scripts[_SCRIPT] = metrics
        state.sessions[_SCRIPT] = SessionStatus()
    splitter = Splitter(script, (("S", "d"),), rendering.LINUX, _TOKEN)

    def value(tick: int, number: int) -> str:
        if text == COUNTS:
            return str(tick * 1000 + number)
        lines = (
            f"{1 << line + 3:16} |@@@@@@                                   {tick + line:<8}\n"
            for line in range(_LINES)
        )
        return _HEAD + "".join(lines)

    def written(tick: int) -> bytes:
        rows = (
            f"\n\x1e{_TOKEN} row 0\x1fprogram-{n}\x1f{1000 + n}\x1f{value(tick, n)}\x1e\n"
            for n in range(ROWS)
        )
        return ("".join(rows) + f"\n\x1e{_TOKEN} tick {tick * 10**9}\x1e\n").encode()

    def take(chunks: Sequence[bytes]) -> None:
        for chunk in chunks:
            for record in splitter.feed(chunk):
                if isinstance(record, Row):
                    metrics.feed(record)
                elif isinstance(record, ScriptTick):
                    metrics.tick()

    return written, take


def _idle(tick: int) -> bytes:
    return f"\n\x1e{_TOKEN} tick {tick * 10**9}\x1e\n".encode()


def _queues() -> State:
    state = State()
    ports = {10_000 + number: f"service-{number}" for number in range(ROWS)}
    state.table.watch(_SESSION, named(ports), Capabilities(reasons=("q_full", "q0_full", "other")))
    state.sessions[_SESSION] = SessionStatus()
    return state


def _change(state: State) -> None:
    for listener in list(state.table):
        mine = state.table.listener(_SESSION, "", "*", listener.identity.port)
        mine.count_syns(0, 128, 900, 0)
        mine.drop("q_full", 10)
        mine.drop("q0_full", 10)
        mine.drop("other", 10)
        mine.established += 990
        mine.count_accepts(0, 400, 20_000_000)


if __name__ == "__main__":
    for what, measure in (("a tick", ticks), ("a sample", scrapes)):
        found = measure(15)
        for each in found:
            median = statistics.median(found[each])
            print(f"{what}: {each}: {1e6 * median:.2f} us, {ratio(found, each):.2f} times")
