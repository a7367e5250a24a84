"""The half of the measurements that needs a kernel: what a SYN costs, what is lost, what it takes.

Two guests are booted, one after the other: one with the models of Solaris' TCP, where a burst of
calls is timed by the kernel itself, and one whose own TCP is flooded. What runs in them is in
guest/.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/kernel"))

import guest  # noqa: E402

KERNEL = guest.MODEL_KERNEL
BOOT_SECONDS = 240
SILENT_SECONDS = 600
MB = 1_000_000
UNSTEADY = 0.25
"""What is between the quartiles, of the median, where a figure is not to be relied on."""
OURS = ("illumos.d", "linux.d", "solaris10.d")
NO_SYNS = "tells no SYNs"
PROGRAMS = "Time in the tool's own BPF programs, Linux, as the kernel tells, ns"
SYSTEMS = {"illumos": "model of illumos", "solaris10": "model of Solaris 10", "Linux": "Linux"}

UNTRACED, BAREST, KEYED = "untraced", "barest clause", "bpftrace, keyed count"
BESIDE = (UNTRACED, BAREST, KEYED)
OURS_ILLUMOS = ("illumos.d, shared", "illumos.d, per-port")

Messages = list[dict[str, Any]]
Figures = list[dict[str, Any]]
Lines = dict[str, list[tuple[float, float]]]


def measure() -> dict[str, Any]:
    """Measure everything, in two guests one after the other; takes about half an hour.

    Returns:
        As report.py takes it.

    Raises:
        guest.UnavailableError: this machine cannot build or run the guests.
    """
    model = boot("model", [guest.BENCH, guest.MODEL])
    linux = boot("linux", [guest.BENCH])
    return summary(model, linux)


def boot(module: str, extras: Sequence[str]) -> Messages:
    """Run a module of guest/ in a guest; return what it told.

    Args:
        module: its name.
        extras: what the guest shall have besides the base, as guest.build takes it.
    """
    made = guest.build(KERNEL, extras)
    with tempfile.TemporaryDirectory(prefix="guest-", ignore_cleanup_errors=True) as scratch:
        initrd, told = Path(scratch) / "initrd", Path(scratch) / "told"
        console = Path(scratch) / "console"
        guest.initrd(made, [module], initrd)
        ports = ("-serial", f"file:{console}", "-serial", f"file:{told}")
        command = [*guest.qemu(made, initrd, "bench"), *ports]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            _wait(process, told)
        finally:
            process.kill()
            process.wait()
        messages = read(told.read_text(errors="replace") if told.exists() else "")
        if not any(message["event"] == "end" for message in messages):
            tail = console.read_text(errors="replace")[-2000:]
            _say(f"the guest of {module} ended before its time\n{tail}")
        return messages


def read(text: str) -> Messages:
    """Return the messages in what a guest told, a line of JSON each."""
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def summary(model: Messages, linux: Messages) -> dict[str, Any]:
    """Return what both guests told as report.py takes it."""
    both = [*model, *linux]
    software = {message["name"]: message["version"] for message in of(linux, "version")}
    for tool, values in costs(both, "cost", "illumos").items():
        low, middle, high = quartiles(values)
        if tool in (*BESIDE, *OURS_ILLUMOS) and high - low > UNSTEADY * middle:
            _say(
                f"{tool}: {low:,.0f} to {high:,.0f} ns: this machine had more to do than the bench"
            )
    for message in of(both, "failed"):
        _say(f"not measured: {message['what']}: {_in_a_line(message['why'])}")
    return {
        "software": software,
        "figures": [
            *_cost_figures(both),
            *_loss_figures(both),
            *_memory_figures(linux),
            *_user_figures(model),
        ],
        "reach": reach(both),
        "plots": plots(both),
        "not_measured": {
            message["what"]: _in_a_line(message["why"]) for message in of(both, "failed")
        },
    }


def _cost_figures(messages: Messages) -> Figures:
    figures: Figures = []
    for where in ("illumos", "solaris10"):
        for event, title in (
            ("cost", "A SYN in the kernel"),
            ("dropped", "A SYN that is dropped as Q is full"),
        ):
            table = f"{title}, {SYSTEMS[where]}, bursts of 20,000, ns"
            figures += _added_figures(table, costs(messages, event, where))
        if where == "illumos":
            whole, parts = costs(messages, "cost", where), costs(messages, "piece")
            shown = {tool: whole[tool] for tool in (*BESIDE, *OURS_ILLUMOS) if tool in whole}
            table = "What a SYN on the short way is made of, each with those above it, ns"
            order = (*BESIDE, *parts, *OURS_ILLUMOS)
            made = {tool: (shown | parts)[tool] for tool in order if tool in shown | parts}
            if parts:
                figures += _added_figures(table, made)
    for event, title in (
        ("flood", "A SYN that its listener keeps, Linux, floods of 1,000, ns"),
        ("cookies", "A SYN that a SYN cookie answers, Linux, floods of 1,000, ns"),
        ("connection", "A connection, from SYN to accept(), Linux, ns"),
    ):
        figures += _low_figures(title, costs(messages, event))
    programs = of(messages, "programs")
    for what in dict.fromkeys(message["what"] for message in programs):
        found = costs([message for message in programs if message["what"] == what], "programs")
        for tool, values in found.items():
            figures.append(_figure(PROGRAMS, tool, what, values))
    return figures


def _low_figures(table: str, found: Mapping[str, Sequence[float]]) -> Figures:
    """Return the time with each tool, and what it adds, both from the lower quartiles.

    A flood takes longer than others for all that the machine does beside it, and never less.
    """
    figures = []
    base = lower_quartile(found.get(UNTRACED, [0.0]))
    for tool, values in found.items():
        figures.append(_figure(table, tool, "with it", values))
        if tool != UNTRACED:
            more = lower_quartile(values) - base
            figures.append(_figure(table, tool, "added, of the lower quartiles", [more]))
    return figures


def _added_figures(table: str, found: Mapping[str, Sequence[float]]) -> Figures:
    """Return the time with each tool, and what it adds to that without any."""
    figures = []
    base = statistics.median(found.get(UNTRACED, [0.0]))
    for tool, values in found.items():
        figures.append(_figure(table, tool, "with it", values))
        if tool != UNTRACED:
            figures.append(_figure(table, tool, "added", [value - base for value in values]))
    return figures


def _loss_figures(messages: Messages) -> Figures:
    figures = []
    for where, system in SYSTEMS.items():
        for message in of(messages, "loss", where):
            table, row = f"SYNs told of those in one burst, share, {system}", message["tool"]
            column = f"{message['syns']:,}"
            if message["seen"] is not None:
                figures.append(_figure(table, row, column, [message["seen"] / message["made"]]))
            elif row != UNTRACED:
                figures.append(_figure(table, row, column, []) | {"text": NO_SYNS})
    return figures


def _memory_figures(messages: Messages) -> Figures:
    figures = []
    memory, first_row = "Memory resident, MB", "From exec to the first row of the last session, s"
    rows = [
        (f"{_count(message['listeners'], 'listener')}, shared", message)
        for message in of(messages, "memory")
    ] + [
        (f"{_count(message['sessions'], 'session')}, per-port", message)
        for message in of(messages, "start")
    ]
    for row, message in rows:
        figures += [
            _figure(memory, row, "exporter", [message["exporter"] / MB]),
            _figure(memory, row, "dtrace(1)", [sum(message["dtrace"]) / MB]),
            _figure(memory, row, "dtrace(1) processes", [len(message["dtrace"])]),
        ]
    for row, message in rows:
        figures.append(_figure(first_row, row, "seconds", [message["seconds"]]))
    return figures


def _user_figures(messages: Messages) -> Figures:
    table = "CPU time in user space, s"
    figures = [
        _figure(table, message["tool"], "a million SYNs", [message["cpu"] * 1e6 / message["made"]])
        for message in of(messages, "user")
    ]
    for message in of(messages, "idle"):
        # Measured for some tens of seconds.
        column = f"an idle hour (from {message['seconds']} s)"
        cpu = message["cpu"] * 3600 / message["seconds"]
        figures.append(_figure(table, "exporter and dtrace(1)", column, [cpu]))
    return figures


def _figure(table: str, row: str, column: str, values: Sequence[float]) -> dict[str, Any]:
    values = [round(value, 3) for value in values]
    return {"table": table, "row": row, "column": column, "values": values}


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def reach(messages: Messages) -> list[dict[str, Any]]:
    """Return the figures to reach, and those reached."""
    cost = added(costs(messages, "cost", "illumos"))
    mine = max((cost[tool] for tool in OURS_ILLUMOS if tool in cost), default=None)
    barest, keyed = cost.get(BAREST), cost.get(KEYED)
    losses = [
        message["made"] - message["seen"]
        for message in of(messages, "loss")
        if message["tool"].startswith(OURS)
    ]
    cpu = {message["tool"]: message["cpu"] / message["made"] for message in of(messages, "user")}
    most = max(of(messages, "memory"), key=lambda message: message["listeners"], default=None)
    exporter = most["exporter"] / MB if most else None
    dtrace = sum(most["dtrace"]) / MB if most else None
    return [
        {
            "figure": "SYN in the kernel, illumos.d over the barest clause",
            "unit": "times",
            "at_most": 2.0,
            "value": _ratio(mine, barest),
            "reason": floor(messages, "Twice the barest clause", 2.0, barest),
        },
        {
            "figure": "SYN in the kernel, illumos.d over bpftrace's keyed count",
            "unit": "times",
            "at_most": 1.5,
            "value": _ratio(mine, keyed),
            "reason": floor(messages, "1.5 times bpftrace's count", 1.5, keyed),
        },
        {
            "figure": "SYNs lost of a burst of up to 1,000,000",
            "unit": "SYNs",
            "at_most": 0,
            "value": max(map(abs, losses)) if losses else None,
        },
        {
            "figure": "user-space CPU per SYN, ours over a printf per SYN read by wc -l",
            "unit": "times",
            "at_most": 0.01,
            "value": _ratio(cpu.get("exporter and dtrace(1)"), cpu.get("printf and wc -l")),
        },
        {
            "figure": "dtrace(1) processes of 1,000 listeners, shared",
            "unit": "processes",
            "at_most": 1,
            "value": len(most["dtrace"]) if most else None,
        },
        {
            "figure": "memory of the exporter, 1,000 listeners, shared",
            "unit": "MB",
            "at_most": 80,
            "value": exporter,
        },
        {
            "figure": "the same with its dtrace(1)",
            "unit": "MB",
            "at_most": 180,
            "value": exporter + dtrace if exporter is not None and dtrace is not None else None,
        },
    ]


def floor(messages: Messages, what: str, times: float, under: float | None) -> str:
    """Say what a limit is in nanoseconds, and what the pieces take that no such program can spare.

    Args:
        messages: what the guests told.
        what: the limit in words.
        times: how many times ``under`` it is.
        under: what it is a multiple of, in nanoseconds added to a SYN, None if not measured.
    """
    names = {message["piece"]: message["tool"] for message in of(messages, "piece")}
    found = costs(messages, "piece")
    untraced = costs(messages, "cost", "illumos").get(UNTRACED)
    if under is None or untraced is None or not names.keys() >= {"nothing", "queues", "count"}:
        return ""
    base = statistics.median(untraced)
    nothing, queues, count = (
        f"{statistics.median(found[names[piece]]) - base:,.0f} ns"
        for piece in ("nothing", "queues", "count")
    )
    return (
        f"{what} is {times * under:,.0f} ns. In a D program a clause that does nothing takes "
        f"{nothing}, one that reads whether it is a SYN, Q0 and Q, and counts nothing, {queues}, "
        f"and with a count by one word {count}: see what a SYN on the short way is made of."
    )


def plots(messages: Messages) -> list[dict[str, Any]]:
    """Return plots against the rate of SYNs: of a processor's time, and of what is lost."""
    found = []
    for where, typical in (("illumos", statistics.median), ("Linux", lower_quartile)):
        bursts = of(messages, "loss", where)
        most = max((message["syns"] for message in bursts), default=0)
        # At rates, and as fast as can be.
        points = of(messages, "rate", where) + [
            message | {"asked": most, "rate": 1e9 / message["ns"][0]}
            for message in bursts
            if message["syns"] == most and message["ns"]
        ]
        points.sort(key=lambda point: float(point["rate"]))
        base = {
            point["asked"]: typical(point["ns"]) for point in points if point["tool"] == UNTRACED
        }
        tools = [tool for tool in dict.fromkeys(m["tool"] for m in bursts) if tool != UNTRACED]
        cost: Lines = {tool: [] for tool in tools}
        lost: Lines = {tool: [] for tool in tools}
        for point in points:
            tool, asked, rate = point["tool"], point["asked"], round(point["rate"])
            if math.isclose(rate, asked, rel_tol=0.02):
                rate = asked
            # What is less than what differs from one burst to the next has no place on a scale.
            if tool in cost and asked in base and (more := typical(point["ns"]) - base[asked]) > 0:
                cost[tool].append((rate, round(rate * more / 1e7, 4)))
            if tool in lost and point["seen"] is not None:
                lost[tool].append((rate, round(100 * (1 - point["seen"] / point["made"]), 3)))
        for title, lines in (("CPU in the kernel", cost), ("SYNs not told", lost)):
            found.append(
                {
                    "title": f"{title}, {SYSTEMS[where]}",
                    "x": "SYNs a second",
                    "y": "%",
                    "lines": {tool: line for tool, line in lines.items() if line},
                }
            )
    return found


def of(messages: Messages, event: str, where: str | None = None) -> Messages:
    """Return the messages of one kind, and of one system where one is given."""
    return [
        message
        for message in messages
        if message["event"] == event and where in (None, message.get("where"))
    ]


def costs(messages: Messages, event: str, where: str | None = None) -> dict[str, list[float]]:
    """Return each tool's nanoseconds in every repetition of all rounds."""
    found: dict[str, list[float]] = {}
    for message in of(messages, event, where):
        found.setdefault(message["tool"], []).extend(message["ns"])
    return found


def added(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return each tool's median less that without any, of times as ``costs`` returns them."""
    base = statistics.median(found.get(UNTRACED, [0.0]))
    return {
        tool: statistics.median(values) - base for tool, values in found.items() if tool != UNTRACED
    }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile of values, their median and the upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def lower_quartile(values: Sequence[float]) -> float:
    """Return what a quarter of values do not exceed."""
    return quartiles(values)[0]


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None


def _wait(process: subprocess.Popen[bytes], told: Path) -> None:
    """Wait until a guest ends, or has been silent too long."""
    size = 0
    deadline = time.monotonic() + BOOT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
        if told.exists() and told.stat().st_size > size:
            size = told.stat().st_size
            deadline = time.monotonic() + SILENT_SECONDS


def _in_a_line(why: str) -> str:
    """Return what a command said, less what it says of its own insides."""
    lines = [line for line in why.splitlines() if not line.startswith((" ", "Traceback"))]
    return "; ".join(lines).replace("<", "&lt;")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
