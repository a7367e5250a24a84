"""The half of the measurements that needs a kernel: what a SYN costs, what is lost, what it takes.

Two guests are booted, one after the other: one with the model of illumos' TCP, where a burst of
calls is timed by the kernel itself, and one whose own TCP is flooded. What runs in them is in
guest/.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/kernel"))

import guest  # noqa: E402

KERNEL = guest.MODEL_KERNEL
BOOT_SECONDS = 240
SILENT_SECONDS = 600
MB = 1_000_000
OURS = ("illumos.d", "linux.d")
FLOOR = (
    "What it is made of is in a table of its own: what it is compared with reads no field, while "
    "this takes five reads (is it a SYN, Q, Q0), and clauses for other SYNs cost a little at each."
)

Messages = list[dict[str, Any]]


def measure() -> dict[str, Any]:
    """Measure everything, in two guests one after the other; takes about twenty minutes.

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
    figures: list[dict[str, Any]] = []

    def add(table: str, row: str, column: str, values: Sequence[float]) -> None:
        figures.append(
            {"table": table, "row": row, "column": column, "values": [round(v, 3) for v in values]}
        )

    for event, title in (
        ("cost", "A SYN in the kernel, model of illumos, bursts of 20,000, ns"),
        ("dropped", "A SYN that is dropped as Q is full, model of illumos, bursts of 20,000, ns"),
        ("piece", "What a SYN on the short way is made of, each with those above it, ns"),
        ("flood", "A SYN of a flood, Linux, floods of 5,000, ns"),
    ):
        base = added(both, event)
        for tool, values in base["all"].items():
            add(title, tool, "with it", values)
            if tool != "untraced":
                add(title, tool, "added", [value - base["untraced"] for value in values])
    for message in of(both, "loss"):
        add(
            "SYNs told of those in one burst, share",
            message["tool"],
            f"{message['made']:,}",
            [message["seen"] / message["made"]],
        )
    for message in of(both, "memory"):
        row = f"{message['listeners']:,} listeners, shared"
        memory = "Memory resident, MB"
        add(memory, row, "exporter", [message["exporter"] / MB])
        add(memory, row, "dtrace(1)", [sum(message["dtrace"]) / MB])
        add(memory, row, "dtrace(1) processes", [len(message["dtrace"])])
    for message in of(both, "start"):
        row = f"{message['sessions']} sessions, one for each port"
        add("From exec to the first row of the last session, s", row, "", [message["seconds"]])
        add("Memory resident, MB", row, "exporter", [message["exporter"] / MB])
        add("Memory resident, MB", row, "dtrace(1)", [sum(message["dtrace"]) / MB])
        add("Memory resident, MB", row, "dtrace(1) processes", [len(message["dtrace"])])
    user = {message["tool"]: message for message in of(model, "user")}
    for tool, message in user.items():
        made = message["made"]
        add("CPU time in user space, s", tool, "a million SYNs", [message["cpu"] * 1e6 / made])
    for message in of(model, "idle"):
        # Measured for some tens of seconds.
        add(
            "CPU time in user space, s",
            "exporter and dtrace(1)",
            f"an idle hour (from {message['seconds']} s)",
            [message["cpu"] * 3600 / message["seconds"]],
        )
    for message in of(both, "failed"):
        _say(f"not measured: {message['what']}: {_in_a_line(message['why'])}")
    software = {message["name"]: message["version"] for message in of(linux, "version")}
    return {
        "software": software,
        "figures": figures,
        "reach": reach(both),
        "plots": plots(both),
        "not_measured": {
            message["what"]: _in_a_line(message["why"]) for message in of(both, "failed")
        },
    }


def reach(messages: Messages) -> list[dict[str, Any]]:
    """Return the figures to reach, and those reached."""
    cost = added(messages, "cost")["added"]
    ours = [cost[tool] for tool in cost if tool.startswith(OURS)]
    mine = max(ours) if ours else None
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
            "value": _ratio(mine, cost.get("barest clause")),
            "reason": FLOOR,
        },
        {
            "figure": "SYN in the kernel, illumos.d over bpftrace's keyed count",
            "unit": "times",
            "at_most": 1.5,
            "value": _ratio(mine, cost.get("bpftrace, keyed count")),
            "reason": FLOOR,
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


def plots(messages: Messages) -> list[dict[str, Any]]:
    """Return plots against the rate of SYNs: of a processor's time, and of what is lost."""
    rates = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000)
    cost = added(messages, "cost")["added"]
    lost: dict[str, list[tuple[float, float]]] = {}
    for message in of(messages, "rate"):
        share = 100 * (1 - message["seen"] / message["made"])
        lost.setdefault(message["tool"], []).append((message["rate"], share))
    return [
        {
            "title": "Time of one processor, in the kernel",
            "x": "SYNs a second",
            "y": "%",
            "lines": {
                tool: [(rate, 100 * rate * nanoseconds / 1e9) for rate in rates]
                for tool, nanoseconds in cost.items()
            },
        },
        {"title": "SYNs that are not told", "x": "SYNs a second", "y": "%", "lines": lost},
    ]


def of(messages: Messages, event: str) -> Messages:
    """Return the messages of one kind."""
    return [message for message in messages if message["event"] == event]


def added(messages: Messages, event: str) -> dict[str, Any]:
    """Return a kind of cost.

    Returns:
        ``all``, tool to each repetition's nanoseconds; ``untraced``, their median without a tool;
        ``added``, tool to the median beyond that.
    """
    everything: dict[str, list[float]] = {}
    for message in of(messages, event):
        everything.setdefault(message["tool"], []).extend(message["ns"])
    untraced = statistics.median(everything.get("untraced", [0.0]))
    return {
        "all": everything,
        "untraced": untraced,
        "added": {
            tool: statistics.median(values) - untraced
            for tool, values in everything.items()
            if tool != "untraced"
        },
    }


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
