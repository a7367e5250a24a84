"""The verdicts of config/prometheus, for queues whose need of a longer Q is known."""

from __future__ import annotations

import json
import random
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import host_tools
from queue_model import Queue, Series

RULES = Path(__file__).resolve().parents[1] / "config/prometheus/dtrace_exporter.rules.yml"
GRAFANA = RULES.parents[1] / "grafana"
VERDICT = "listener:dtrace_tcp_listen_q:verdict10m"
ENOUGH, BACKLOG, APPLICATION = "enough", "backlog_too_small", "application_too_slow"
SCRAPE, END = 15, 20 * 60
RETRANSMISSION = 1.0


def steady(rate: float, begin: float = 0.0, end: float = END) -> list[float]:
    """Return arrivals at a steady pace."""
    return [begin + number / rate for number in range(int((end - begin) * rate))]


def chance(rate: float, seed: int = 18, begin: float = 0.0, end: float = END) -> list[float]:
    """Return arrivals at random times, as of many independent clients."""
    source = random.Random(seed)
    times, now = [], begin
    while (now := now + source.expovariate(rate)) < end:
        times.append(now)
    return times


def bursts(size: int, every: float, begin: float = 0.0, end: float = END) -> list[float]:
    """Return bursts of arrivals at regular times, which do not coincide with the scrapes."""
    count = int((end - begin) / every)
    return [begin + number * every + 0.3 for number in range(count) for _ in range(size)]


Arrivals = list[float]
Make = Callable[[], tuple[Queue, Arrivals]]

# Verdicts that are certain from the tenth minute on.
CERTAIN: dict[str, tuple[str | None, Make]] = {
    "quick": (ENOUGH, lambda: (Queue(128, 0.001), chance(5))),
    "busy": (ENOUGH, lambda: (Queue(128, 0.005), chance(60))),
    "small bursts": (ENOUGH, lambda: (Queue(128, 0.0005), bursts(50, 7))),
    "bursts that half fill Q": (None, lambda: (Queue(128, 0.0005), bursts(100, 7))),
    "bursts": (BACKLOG, lambda: (Queue(64, 0.0001), bursts(200, 7))),
    "bursts of impatient": (
        BACKLOG,
        lambda: (Queue(64, 0.0001, patient=False), bursts(300, 7)),
    ),
    "bursts on load": (
        BACKLOG,
        lambda: (Queue(32, 0.0002), sorted(chance(30) + bursts(50, 9))),
    ),
    "a small backlog": (BACKLOG, lambda: (Queue(1, 0.001), bursts(4, 11))),
    "too many": (APPLICATION, lambda: (Queue(64, 0.05), chance(40))),
    "too many for a short Q": (APPLICATION, lambda: (Queue(8, 0.05), chance(40))),
    "too many for a long Q": (APPLICATION, lambda: (Queue(4096, 0.05), chance(24))),
    "too many impatient": (APPLICATION, lambda: (Queue(8, 0.05, patient=False), chance(40))),
    "stopped": (APPLICATION, lambda: (Queue(128, 0.001, [(60, END * 2)]), chance(0.2))),
    "stopped and full": (APPLICATION, lambda: (Queue(16, 0.001, [(60, END * 2)]), chance(1))),
    "idle": (None, lambda: (Queue(128, 0.001), [])),
    "nearly idle": (None, lambda: (Queue(128, 0.001), steady(0.05))),
    # Q has room for all, but one in twenty connections waits for a quarter of a second or longer.
    "pauses": (
        None,
        lambda: (Queue(128, 0.001, [(at, at + 0.5) for at in range(3, END, 5)]), chance(5)),
    ),
    # A longer Q would only make more connections wait until the application goes on.
    "stands still now and then": (
        None,
        lambda: (Queue(64, 0.0001, [(at, at + 4) for at in range(40, END, 45)]), chance(50)),
    ),
    "stands still, seldom, under load": (
        None,
        lambda: (Queue(64, 0.0001, [(at, at + 2) for at in range(60, END, 120)]), chance(90)),
    ),
    # Again and again, far more arrive for half a minute than the application can take.
    "overload of half a minute": (
        None,
        lambda: (
            Queue(8, 0.01),
            sorted(sum((steady(200, at, at + 30) for at in range(20, END, 150)), steady(1))),
        ),
    ),
    "overload of half a minute, of impatient": (
        None,
        lambda: (
            Queue(8, 0.01, patient=False),
            sorted(sum((steady(200, at, at + 30) for at in range(20, END, 150)), steady(1))),
        ),
    ),
    "nearly too many": (None, lambda: (Queue(8, 0.05), chance(18))),
    "bursts that a slow application takes": (None, lambda: (Queue(64, 0.05), bursts(100, 30))),
}


NAMES = list(CERTAIN)
LABELS = {"instance": "web:9748", "job": "dtrace", "address": "*"}
SAMPLES = [float(at) for at in range(0, END + 1, SCRAPE)]


@dataclass
class Past:
    """The history of a queue, and of one that is a hundred times as long."""

    queue: Queue
    longer: Queue
    series: Series

    def refused(self, begin: float, end: float) -> int:
        """Return how many connections were refused within a period."""
        return sum(begin <= at < end for at in self.queue.drops)

    def late(self, begin: float, end: float) -> float:
        """Return the share of a period's arrivals that would wait long in a longer queue."""
        waits = [wait for at, wait in self.longer.waits if begin <= at < end]
        still = [END - at for at in self.longer.waiting if begin <= at < end]
        late = sum(wait > RETRANSMISSION for wait in [*waits, *still])
        return late / max(len(waits) + len(still), 1)


def past(make: Make) -> Past:
    """Return the history of a queue."""
    queue, arrivals = make()
    longer, _ = make()
    longer.backlog *= 100
    longer.run(arrivals, [END])
    return Past(queue, longer, queue.run(arrivals, SAMPLES))


def input_series(series: Series, port: int, **more: str) -> list[dict[str, str]]:
    """Return series in the form that promtool takes."""
    made = []
    for (name, own), values in series.items():
        labels = {**LABELS, "port": str(port), **more, **dict(own)}
        words = ", ".join(f'{key}="{value}"' for key, value in labels.items())
        texts = " ".join(f"{value:.9g}" for value in values)
        made.append({"series": f"dtrace_tcp_listen_{name}{{{words}}}", "values": texts})
    return made


def exporter(instance: str = LABELS["instance"], **changes: str) -> list[dict[str, str]]:
    """Return the series of an exporter that started long ago and misses no event.

    Args:
        instance: its label.
        changes: other values for some series, by a word in the series' name.
    """
    of = f'instance="{instance}", job="dtrace"'
    flat = {
        f"dtrace_exporter_config_last_reload_success_timestamp_seconds{{{of}}}": "-900x200",
        f'dtrace_session_lost_total{{{of}, session="all", kind="principal"}}': "3x200",
        f'dtrace_session_lost_total{{{of}, session="script-a", kind="principal"}}': "0+1x200",
        f'dtrace_session_probe_errors_total{{{of}, session="all"}}': "0x200",
        f'dtrace_session_uncounted_seconds_total{{{of}, session="all"}}': "0x200",
        f'dtrace_session_unattributed_total{{{of}, session="all", kind="drops"}}': "0x200",
        f'dtrace_session_feature_enabled{{{of}, session="all", feature="exact"}}': "1x200",
        # Nor are the losses of UNIX sockets those of listeners.
        f'dtrace_session_lost_total{{{of}, session="unix", kind="aggregation"}}': "0+1x200",
        f'dtrace_session_probe_errors_total{{{of}, session="unix"}}': "0+1x200",
        f'dtrace_session_uncounted_seconds_total{{{of}, session="unix"}}': "0+1x200",
        f'dtrace_session_unattributed_total{{{of}, session="unix", kind="drops"}}': "0+1x200",
        f'dtrace_session_feature_enabled{{{of}, session="unix", feature="exact"}}': "0x200",
    }
    for word, values in changes.items():
        flat[next(key for key in flat if word in key)] = values
    return [{"series": series, "values": values} for series, values in flat.items()]


def expect(port: int, verdict: str | None, minutes: Iterable[int]) -> list[dict[str, Any]]:
    """Return what promtool must find for a listener at some minutes."""
    found = [{"labels": f'{{verdict="{verdict}"}}', "value": 1}] if verdict else []
    return [
        {
            "expr": f'count by (verdict) ({VERDICT}{{port="{port}"}})',
            "eval_time": f"{at}m",
            "exp_samples": found,
        }
        for at in minutes
    ]


def judge(directory: Path, series: list[dict[str, str]], expected: list[dict[str, Any]]) -> None:
    """Check what the rules say about some series."""
    step = f"{SCRAPE}s"
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": step,
        "tests": [{"interval": step, "input_series": series, "promql_expr_test": expected}],
    }
    path = directory / "test.yml"
    path.write_text(yaml.safe_dump(test), encoding="utf-8")
    command = [host_tools.require("promtool", "prometheus"), "test", "rules", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def pasts() -> dict[str, Past]:
    """Return the history of each queue in CERTAIN."""
    return {name: past(make) for name, (_, make) in CERTAIN.items()}


def test_verdicts(tmp_path: Path, pasts: dict[str, Past]) -> None:
    """Verdicts are as expected once ten minutes of data exist, and absent before."""
    series, expected = exporter(), []
    for port, (name, (verdict, _)) in enumerate(CERTAIN.items(), 1):
        series += input_series(pasts[name].series, port)
        expected += [*expect(port, None, [5, 9]), *expect(port, verdict, range(13, 21))]
    judge(tmp_path, series, expected)


@pytest.mark.parametrize("name", [name for name in CERTAIN if CERTAIN[name][0]])
def test_what_a_longer_queue_would_change(name: str, pasts: dict[str, Past]) -> None:
    """Each verdict is true: with a longer queue nobody waits a second, or most do."""
    seen = pasts[name]
    refused, late = seen.refused(0, END), seen.late(120, END)
    assert {ENOUGH: late == 0 == refused, BACKLOG: late == 0 < refused, APPLICATION: late > 0.5}[
        CERTAIN[name][0] or ""
    ]


def at_random(seed: int) -> Make:
    """Return a function that makes a random queue and its arrivals."""

    def make() -> tuple[Queue, Arrivals]:
        source = random.Random(seed)
        service = 10 ** source.uniform(-4, -1)
        backlog = round(10 ** source.uniform(0, 2.5))
        pauses: list[tuple[float, float]] = []
        if source.random() < 0.3:
            every, lasts = source.uniform(20, 300), 10 ** source.uniform(-1, 1)
            pauses = [(at, at + lasts) for at in _times(every)]
        arrivals = chance(min(source.uniform(0, 1.3) / service, 30), seed)
        if source.random() < 0.5:
            size = round(backlog * 10 ** source.uniform(-0.5, 1))
            arrivals += bursts(size, source.uniform(5, 100))
        if source.random() < 0.3:
            rate = min(source.uniform(0.5, 3) / service, 100)
            lasts = source.uniform(1, 60)
            for at in _times(source.uniform(70, 300)):
                arrivals += chance(rate, seed, at, at + lasts)
        return Queue(backlog, service, pauses, source.random() < 0.7), arrivals

    return make


def _times(every: float) -> list[float]:
    return [number * every for number in range(1, int(END / every))]


def changed(series: Series, name: str, change: Callable[[int, float], float]) -> Series:
    """Return series with those of one name changed, by sample number and value."""
    return {
        key: [change(*each) for each in enumerate(values)] if key[0] == name else values
        for key, values in series.items()
    }


def without(series: Series, *words: str) -> Series:
    """Return series without those that have one of some words in their name or labels."""
    return {
        key: values
        for key, values in series.items()
        if not {*words} & {key[0], *dict(key[1]).values()}
    }


def test_what_a_verdict_wants(tmp_path: Path, pasts: dict[str, Past]) -> None:
    """There is no verdict if data is missing, was not counted or is too new."""
    quick, bursts_, slow = (pasts[name].series for name in ("quick", "bursts", "too many"))
    short = pasts["too many for a short Q"].series
    last = len(SAMPLES) - 1
    cases: list[tuple[str | None, Series, dict[str, str], dict[str, str]]] = [
        (ENOUGH, quick, {}, {}),
        # A reload or a start five minutes ago.
        *((None, each, {}, {"last_reload": "900x200"}) for each in (quick, bursts_, slow)),
        # Events that were not counted, and a kernel where that is possible.
        *(
            (None, each, {}, {word: f"0x{last - 20} 1x200"})
            for each in (quick, bursts_, slow)
            for word in ("lost", "probe_errors", "uncounted", "unattributed")
        ),
        (None, bursts_, {}, {"exact": "0x200"}),
        # Losses of another host.
        (
            ENOUGH,
            without(quick, "q_full_ack"),
            {"zone": "global", "host": "sol10"},
            {"lost": f"0x{last - 20} 1x200"},
        ),
        # Another Qmax than five minutes ago.
        *(
            (None, changed(each, "q_limit", lambda at, value: value + (at > last - 20)), {}, {})
            for each in (quick, bursts_, slow)
        ),
        # Drops for another reason, and a kernel on which DTrace cannot report one of the reasons.
        (None, changed(quick, "drops_total", lambda at, _: float(at > last - 20)), {}, {}),
        (None, without(quick, "q_full_ack"), {}, {}),
        (ENOUGH, without(quick, "q_full_ack"), {"zone": "global"}, {}),
        (BACKLOG, without(bursts_, "q_full_ack"), {"zone": "global"}, {}),
        # Connections that left Q without an accept may have waited for ever.
        (None, changed(bursts_, "established_total", lambda at, value: value + 10 * at), {}, {}),
        # Q has not been empty since then.
        (None, changed(bursts_, "q_length", lambda at, value: value + (at > last - 10)), {}, {}),
        (None, changed(quick, "q_length", lambda at, value: value + (at > last - 10)), {}, {}),
        # Q was empty once.
        (None, changed(slow, "q_length", lambda at, value: value * (at != last - 20)), {}, {}),
        # A port with several sockets, of which the fullest differs from the others.
        (None, changed(short, "accept_wait_seconds_sum", lambda at, _: 20.0 * at), {}, {}),
        (None, changed(short, "q_length", lambda _, value: float(value > 0)), {}, {}),
        # Parts of the program that are left out, and a port without histograms.
        *(
            (None, without(each, word, f"{word}_bucket", f"{word}_count", f"{word}_sum"), {}, {})
            for each in (quick, bursts_)
            for word in ("accept_wait_seconds", "accepts_total")
        ),
        (None, without(quick, "q_saturation_ratio_bucket", "q_saturation_ratio_count"), {}, {}),
    ]
    series, expected = [], []
    for port, (verdict, own, labels, changes) in enumerate(cases, 1):
        instance = f"web{port}:9748"
        series += [
            *exporter(instance, **changes),
            *input_series(own, port, instance=instance, **labels),
        ]
        expected += expect(port, verdict, [20])
    judge(tmp_path, series, expected)


@pytest.mark.parametrize("dashboard", ["fleet", "listener"])
def test_on_dashboards(tmp_path: Path, dashboard: str, pasts: dict[str, Past]) -> None:
    """The dashboards show the word of each verdict, and nothing without a verdict."""
    board = json.loads((GRAFANA / f"{dashboard}.json").read_text(encoding="utf-8"))
    (panel,) = (panel for panel in board["panels"] if panel["title"].startswith("Verdict"))
    (mapping,) = panel["fieldConfig"]["defaults"]["mappings"]
    words = {value: shown["text"] for value, shown in mapping["options"].items()}
    assert {*words.values()} == {ENOUGH, BACKLOG, APPLICATION}
    (target,) = panel["targets"]
    series, expected = exporter(), []
    for port, name in enumerate(("quick", "bursts", "too many", "idle"), 1):
        series += input_series(pasts[name].series, port)
        query = re.sub(r"\$\w+", ".*", target["expr"].replace("$port", str(port)))
        labels = ", ".join(f'{key}="{value}"' for key, value in {**LABELS, "port": port}.items())
        shown = [
            {"labels": f"{{{labels}}}", "value": int(value)}
            for value, word in words.items()
            if word == CERTAIN[name][0]
        ]
        expected.append({"expr": query, "eval_time": "20m", "exp_samples": shown})
    judge(tmp_path, series, expected)


def test_asked_too_seldom(tmp_path: Path, pasts: dict[str, Past]) -> None:
    """With only one scrape a minute there is no verdict."""
    series, expected = exporter(), []
    for port, name in enumerate(("quick", "bursts", "too many"), 1):
        for each in input_series(pasts[name].series, port):
            seen = [
                value if at % 4 == 0 else "_" for at, value in enumerate(each["values"].split())
            ]
            series.append({**each, "values": " ".join(seen)})
        expected += expect(port, None, range(11, 21))
    judge(tmp_path, series, expected)


@pytest.mark.parametrize("first", range(1, 61, 20))
def test_no_verdict_is_false(tmp_path: Path, first: int) -> None:
    """For random queues, no verdict contradicts what a longer queue shows."""
    series, expected = exporter(), []
    for port in range(first, first + 20):
        seen = past(at_random(port))
        series += input_series(seen.series, port)
        for minute in range(11, 21, 2):
            begin, end = 60.0 * (minute - 10), 60.0 * minute
            right = {
                ENOUGH: seen.refused(begin, end) == 0,
                BACKLOG: seen.late(begin, end - 120) == 0,
                APPLICATION: seen.late(begin, end) > 0.5,
            }
            wrong = "|".join(verdict for verdict, so in right.items() if not so)
            expr = f'{VERDICT}{{port="{port}", verdict=~"{wrong}"}}'
            expected.append({"expr": expr, "eval_time": f"{minute}m", "exp_samples": []})
            # Every queue has at most one verdict.
            expr = f'count({VERDICT}{{port="{port}"}}) > 1'
            expected.append({"expr": expr, "eval_time": f"{minute}m", "exp_samples": []})
    judge(tmp_path, series, expected)
