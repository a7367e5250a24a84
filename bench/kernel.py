"""The measurements that need a kernel: the cost of a SYN, losses, memory and starts.

Each part boots its own guest: one whose clock counts instructions, and one whose TCP is flooded.
The programs that run in them are in guest/.
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

KERNEL = "6.12"
BOOT_SECONDS = 240
SILENT_SECONDS = 600
MB = 1_000_000
MOST = 1_000_000
"""The number of SYNs in the largest burst."""
OURS = "linux.d"
NO_SYNS = "reports no SYNs"
ICOUNT = ("-icount", "shift=0,sleep=off")
"""With these options QEMU's clock counts instructions, one for each ns, and nothing else."""

UNTRACED, BAREST = "untraced", "barest clause"
SHARED, PER_PORT = "linux.d, shared", "linux.d, per-port"
FALSE = "clause whose predicate is false"
FALSE_PORT = "clause whose predicate reads the port"
ACCEPTS, BACKLOGS = "tcpaccept.bt", "tcpsynbl.bt"
# The events and the pieces of programs, with the names in guest/instructions.py.
SYNS = ("taken", "taken, 50 listeners in turn", "answered by a cookie", "dropped, Q full")
UNWATCHED, CONNECTION = "of an unwatched port", "a whole connection"
NOTHING, NOTHING_LEFT = "a probe at entry whose clause does nothing", "a probe at return"
BEFORE = {
    "taken": 6_312.0,
    "answered by a cookie": 6_962.0,
    "dropped, Q full": 6_318.0,
    CONNECTION: 24_294.0,
}
"""Instructions of the former linux.d on its long way, which was the one of worst cases."""
CALLS = (
    "linux_calls.d has a dtrace(1) of its own, one for each host: the functions that it looks at "
    "are called with softirqs on, and in the process of linux.d it would make linux.d miss packets."
)
BEFORE_NAME = "linux.d of the former version, the long way"
PROGRAMS = "In the tool's own BPF programs, Linux, instructions"
WHOLE = "In total, with the way into the programs, Linux, instructions"

Messages = list[dict[str, Any]]
Figures = list[dict[str, Any]]
Lines = dict[str, list[tuple[float, float]]]


def instructions() -> dict[str, Any]:
    """Count on Linux what SYNs, connections and nginx cost; takes about ten minutes.

    Returns:
        The results, as for report.py; so do the other parts.

    Raises:
        guest.UnavailableError: this machine cannot build or run the guests.
    """
    return summary_of_instructions(boot("instructions", [guest.BENCH], ICOUNT))


def linux() -> dict[str, Any]:
    """Measure losses, memory and starts on Linux; takes about ten minutes."""
    return summary_of_linux(boot("linux", [guest.BENCH]))


def boot(module: str, extras: Sequence[str], options: Sequence[str] = ()) -> Messages:
    """Run a module of guest/ in a guest; return its messages.

    Args:
        module: the name of the module.
        extras: what the guest needs besides the base, as for guest.build().
        options: further options of QEMU.
    """
    made = guest.build(KERNEL, extras)
    with tempfile.TemporaryDirectory(prefix="guest-", ignore_cleanup_errors=True) as scratch:
        initrd, told = Path(scratch) / "initrd", Path(scratch) / "told"
        console = Path(scratch) / "console"
        guest.initrd(made, [module], initrd)
        ports = ("-serial", f"file:{console}", "-serial", f"file:{told}")
        command = [*guest.qemu(made, initrd, "bench"), *options, *ports]
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
    """Return the messages in a guest's output, which are lines of JSON."""
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def summary_of_instructions(messages: Messages) -> dict[str, Any]:
    """Return the results of the guest whose clock counts instructions."""
    programs = by_tool_and_event(messages, "programs")
    whole = by_tool_and_event(messages, "whole")
    over = {message["tool"]: message["over"] for message in of(messages, "over")}
    figures: Figures = []
    for (tool, what), values in programs.items():
        if tool not in over:
            figures.append(_figure(PROGRAMS, tool, what, values))
    if figures:
        figures += [_figure(PROGRAMS, BEFORE_NAME, what, [ns]) for what, ns in BEFORE.items()]
    for (tool, what), values in by_tool_and_event(messages, "programs", "runs").items():
        if tool not in over and what == CONNECTION:
            figures.append(_figure(PROGRAMS, tool, f"programs run for {what}", values))
    for (tool, what), values in whole.items():
        if tool in over or (UNTRACED, what) not in whole:
            continue
        base = statistics.median(whole[UNTRACED, what])
        shown = values if tool == UNTRACED else [value - base for value in values]
        named = f"{tool}: all that the kernel does" if tool == UNTRACED else f"{tool}: added"
        figures.append(_figure(WHOLE, named, what, shown))
    table = "What a D program is made of, in its BPF programs, Linux, instructions"
    for tool, without in over.items():
        values, others = (programs.get((name, SYNS[0]), []) for name in (tool, without))
        if values and (others or not without):
            base = statistics.median(others or [0.0])
            figures.append(_figure(table, tool, "takes", [value - base for value in values]))
    for tool, rates in nginx_rates(messages).items():
        table = "nginx, a connection for each request, 1,000,000,000 instructions to a second"
        figures.append(_figure(table, tool, "requests a second", rates))
    return {
        "software": _software(messages),
        "figures": figures,
        "reach": reach_in_instructions(messages),
        "plots": [],
        "not_measured": _not_measured(messages),
    }


def reach_in_instructions(messages: Messages) -> list[dict[str, Any]]:
    """Return the goals that are counted in instructions, the worst case first."""
    found = medians(by_tool_and_event(messages, "programs"))
    worst = [found.get((tool, what)) for tool in (SHARED, PER_PORT) for what in SYNS]
    barest, false = found.get((BAREST, SYNS[0])), found.get((FALSE, UNWATCHED))
    both = [found.get((tool, CONNECTION)) for tool in (ACCEPTS, BACKLOGS)]
    ours = [found.get((tool, CONNECTION)) for tool in (SHARED, PER_PORT)]
    rates = {tool: statistics.median(values) for tool, values in nginx_rates(messages).items()}
    top: dict[str, Any] = {"headline": True, "unit": "times"}
    return [
        top
        | {
            "figure": "the worst SYN (any listener, taken, dropped or answered by a cookie), "
            "linux.d compared with the barest clause",
            "at_most": 3.5,
            "value": _ratio(_most(worst), barest),
            "reason": _worst_syn(messages),
        },
        top
        | {
            "figure": "a whole connection, linux.d compared with tcpaccept.bt and tcpsynbl.bt "
            "together",
            "at_most": 4.0,
            "value": _ratio(_most(ours), sum(filter(None, both)) if all(both) else None),
            "reason": _whole_connection(messages),
        },
        top
        | {
            "figure": "a SYN of an unwatched port, linux.d compared with a clause with a false "
            "predicate",
            "at_most": 1.5,
            "value": _ratio(found.get((PER_PORT, UNWATCHED)), false),
            "reason": _unwatched(messages),
        },
        top
        | {
            "figure": "nginx, short connections, requests a second with dtrace-exporter, compared "
            "with none",
            "at_least": 0.85,
            "value": _ratio(rates.get("dtrace-exporter"), rates.get(UNTRACED)),
        },
    ]


def pieces(messages: Messages) -> dict[str, float]:
    """Return the cost of each piece of a D program, compared with the program without it."""
    found = medians(by_tool_and_event(messages, "programs"))
    return {
        message["tool"]: found[message["tool"], SYNS[0]] - found.get((message["over"], SYNS[0]), 0)
        for message in of(messages, "over")
        if (message["tool"], SYNS[0]) in found
        and (not message["over"] or (message["over"], SYNS[0]) in found)
    }


def _worst_syn(messages: Messages) -> str:
    """Say which SYN costs most, and what its cost consists of."""
    found = medians(by_tool_and_event(messages, "programs"))
    made = {
        (tool, what): found[tool, what]
        for tool in (SHARED, PER_PORT)
        for what in SYNS
        if (tool, what) in found
    }
    parts, barest = pieces(messages), found.get((BAREST, SYNS[0]))
    wanted = [NOTHING, f"{NOTHING_LEFT} whose clause does nothing", "@[four words] = sum()"]
    if not made or barest is None or not parts.keys() >= {*wanted}:
        return ""
    tool, what = max(made, key=lambda key: made[key])
    others = "; ".join(
        f"{one} ({tool}) {ns / barest:.2f} times" for (tool, one), ns in made.items()
    )
    return (
        f"It takes {made[tool, what]:,.0f} instructions, {tool}, {what}; the limit is "
        f"{3.5 * barest:,.0f}. One by one: {others}. Two probes whose clauses do nothing and one "
        f"sum() by four words take {sum(parts[name] for name in wanted):,.0f} together."
    )


def _whole_connection(messages: Messages) -> str:
    """Say which costs every program with the same results has for a connection."""
    found = medians(by_tool_and_event(messages, "programs"))
    runs = medians(by_tool_and_event(messages, "programs", "runs"))
    both = [found.get((tool, CONNECTION)) for tool in (ACCEPTS, BACKLOGS)]
    ours = {
        tool: found[tool, CONNECTION] for tool in (SHARED, PER_PORT) if (tool, CONNECTION) in found
    }
    parts, times = pieces(messages), runs.get((SHARED, CONNECTION))
    names = (NOTHING, "@[four words] = sum()", "@[two words] = max()")
    if not all(both) or not ours or not parts.keys() >= {*names}:
        return ""
    nothing, sums, most = (parts[name] for name in names)
    each = ", ".join(f"{tool} {ns:,.0f}" for tool, ns in ours.items())
    probes = (
        f" For a connection {times:.0f} of its programs run, which take {times * nothing:,.0f} "
        "even if they do nothing."
        if times
        else ""
    )
    return (
        f"The limit is {4 * sum(filter(None, both)):,.0f} instructions: {each}.{probes} Three "
        f"counts by four words (the SYN, into Q, out of Q) take {3 * sums:,.0f}, and three lengths "
        f"of queues by max() {3 * most:,.0f}."
    )


def _unwatched(messages: Messages) -> str:
    """Say what two probes cost that only read the port."""
    found = medians(by_tool_and_event(messages, "programs"))
    parts, left = pieces(messages), f"{NOTHING_LEFT} whose clause does nothing"
    false, reads = (found.get((tool, UNWATCHED)) for tool in (FALSE, FALSE_PORT))
    ours = found.get((PER_PORT, UNWATCHED))
    if ours is None or false is None or reads is None or left not in parts:
        return ""
    return (
        f"It takes {ours:,.0f} instructions; the limit is {1.5 * false:,.0f}. A predicate that "
        f"reads the port takes {reads:,.0f}. The result of a SYN is known only at the return, and "
        f"a probe there takes {parts[left]:,.0f} even if it does nothing: together "
        f"{(reads + parts[left]) / false:.2f} times."
    )


def summary_of_linux(messages: Messages) -> dict[str, Any]:
    """Return the results of the guest whose TCP was flooded."""
    bursts = [
        message["made"] - message["seen"]
        for message in of(messages, "loss")
        if message["tool"].startswith(OURS)
    ]
    interrupted = [
        message["made"] - message["seen"]
        for message in of(messages, "interrupted")
        if message["tool"].startswith(OURS)
    ]
    table = "SYNs reported while a flood interrupts the tool at its work, share, Linux"
    most = max((message["syns"] for message in of(messages, "loss")), default=MOST)
    return {
        "software": _software(messages),
        "figures": [
            *_loss_figures(messages),
            *(
                _figure(table, one["tool"], column, [value])
                for one in of(messages, "interrupted")
                for column, value in (("SYNs", one["made"]), ("share", one["seen"] / one["made"]))
            ),
            *_memory_figures(messages),
        ],
        "reach": [
            {
                "figure": f"SYNs lost in a burst of up to {most:,}, Linux",
                "headline": True,
                "unit": "SYNs",
                "at_most": 0,
                "value": max(map(abs, bursts)) if bursts else None,
            },
            {
                "figure": "SYNs lost under interrupts, Linux",
                "headline": True,
                "unit": "SYNs",
                "at_most": 0,
                "value": max(map(abs, interrupted)) if interrupted else None,
            },
            *_memory_to_reach(messages),
        ],
        "plots": plots(messages),
        "not_measured": _not_measured(messages),
    }


def _memory_to_reach(messages: Messages) -> list[dict[str, Any]]:
    most = max(of(messages, "memory"), key=lambda message: message["listeners"], default=None)
    exporter = most["exporter"] / MB if most else None
    dtrace = sum(most["dtrace"]) / MB if most else None
    return [
        {
            "figure": "dtrace(1) processes for 1,000 listeners, shared",
            "unit": "processes",
            "at_most": 1,
            "value": len(most["dtrace"]) if most else None,
            "reason": CALLS,
        },
        {
            "figure": "memory of the exporter for 1,000 listeners, shared",
            "unit": "MB",
            "at_most": 80,
            "value": exporter,
        },
        {
            "figure": "the same with its dtrace(1)",
            "unit": "MB",
            "at_most": 180,
            "value": exporter + dtrace if exporter is not None and dtrace is not None else None,
            "reason": CALLS,
        },
    ]


def _software(messages: Messages) -> dict[str, str]:
    return {message["name"]: message["version"] for message in of(messages, "version")}


def _not_measured(messages: Messages) -> dict[str, str]:
    failed = {message["what"]: _in_a_line(message["why"]) for message in of(messages, "failed")}
    for what, why in failed.items():
        _say(f"not measured: {what}: {why}")
    return failed


def _loss_figures(messages: Messages) -> Figures:
    figures = []
    table = "SYNs of one burst that were reported, share, Linux"
    for message in of(messages, "loss"):
        row, column = message["tool"], f"{message['syns']:,}"
        if message["seen"] is not None:
            figures.append(_figure(table, row, column, [message["seen"] / message["made"]]))
        elif row != UNTRACED:
            figures.append(_figure(table, row, column, []) | {"text": NO_SYNS})
    return figures


def _memory_figures(messages: Messages) -> Figures:
    figures = []
    memory, first_row = (
        "Memory resident, MB",
        "Time from exec to the first row of the last session, s",
    )
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


def _figure(table: str, row: str, column: str, values: Sequence[float]) -> dict[str, Any]:
    values = [round(value, 3) for value in values]
    return {"table": table, "row": row, "column": column, "values": values}


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def plots(messages: Messages) -> list[dict[str, Any]]:
    """Return plots by the rate of SYNs: of the processor time, and of the losses."""
    bursts = of(messages, "loss")
    most = max((message["syns"] for message in bursts), default=0)
    # At rates, and as fast as possible.
    points = of(messages, "rate") + [
        message | {"asked": most, "rate": 1e9 / message["ns"][0]}
        for message in bursts
        if message["syns"] == most and message["ns"]
    ]
    points.sort(key=lambda point: float(point["rate"]))
    base = {
        point["asked"]: lower_quartile(point["ns"]) for point in points if point["tool"] == UNTRACED
    }
    tools = [tool for tool in dict.fromkeys(m["tool"] for m in bursts) if tool != UNTRACED]
    cost: Lines = {tool: [] for tool in tools}
    lost: Lines = {tool: [] for tool in tools}
    for point in points:
        tool, asked, rate = point["tool"], point["asked"], round(point["rate"])
        if math.isclose(rate, asked, rel_tol=0.02):
            rate = asked
        # Values below the differences between bursts are left out.
        if tool in cost and asked in base:
            more = lower_quartile(point["ns"]) - base[asked]
            if more > 0:
                cost[tool].append((rate, round(rate * more / 1e7, 4)))
        if tool in lost and point["seen"] is not None:
            lost[tool].append((rate, round(100 * (1 - point["seen"] / point["made"]), 3)))
    return [
        {
            "title": f"{title}, Linux",
            "x": "SYNs a second",
            "y": "%",
            "lines": {tool: line for tool, line in lines.items() if line},
        }
        for title, lines in (("CPU in the kernel", cost), ("SYNs not reported", lost))
    ]


def of(messages: Messages, event: str) -> Messages:
    """Return the messages of one kind."""
    return [message for message in messages if message["event"] == event]


def by_tool_and_event(
    messages: Messages, event: str, field: str = "ns"
) -> dict[tuple[str, str], list[float]]:
    """Return a field of all repetitions, by tool and event."""
    found: dict[tuple[str, str], list[float]] = {}
    for message in of(messages, event):
        if field in message:
            found.setdefault((message["tool"], message["what"]), []).extend(message[field])
    return found


def medians(found: Mapping[tuple[str, str], Sequence[float]]) -> dict[tuple[str, str], float]:
    """Return the medians of the result of ``by_tool_and_event``.

    A single repetition may cost more because of an interrupt or a timer of the tool.
    """
    return {key: statistics.median(values) for key, values in found.items()}


def nginx_rates(messages: Messages) -> dict[str, list[float]]:
    """Return the requests per second of all turns, by the tool that ran beside nginx."""
    found: dict[str, list[float]] = {}
    for message in of(messages, "nginx"):
        found.setdefault(message["tool"], []).append(message["rate"])
    return found


def lower_quartile(values: Sequence[float]) -> float:
    """Return the lower quartile of values."""
    if len(values) < 2:
        return values[0]
    return statistics.quantiles(values, n=4, method="inclusive")[0]


def _most(values: Sequence[float | None]) -> float | None:
    """Return the greatest of values, None if one of them was not measured."""
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None


def _wait(process: subprocess.Popen[bytes], told: Path) -> None:
    """Wait until a guest ends or has been silent for too long."""
    size = 0
    deadline = time.monotonic() + BOOT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
        if told.exists() and told.stat().st_size > size:
            size = told.stat().st_size
            deadline = time.monotonic() + SILENT_SECONDS


def _in_a_line(why: str) -> str:
    """Return the output of a command in one line, without internals of the command."""
    lines = [line for line in why.splitlines() if not line.startswith((" ", "Traceback"))]
    return "; ".join(lines).replace("<", "&lt;")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
