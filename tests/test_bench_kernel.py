"""Messages from the guests of the bench become tables, targets and plots."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import kernel

MB = 1_000_000
LINUX: list[dict[str, Any]] = [
    {"event": "version", "name": "Linux", "version": "6.12.1"},
    *(
        {"event": "loss", "tool": tool, "syns": 1_000_000, "made": 1_000_000, "seen": seen}
        | {"ns": [ns]}
        for tool, seen, ns in (
            ("untraced", None, 100.0),
            ("linux.d, shared", 1_000_000, 2000.0),
            ("printf per SYN", 20_000, 5000.0),
            ("bpftrace, keyed count", 1_000_000, 99.0),
        )
    ),
    *(
        {"event": "rate", "tool": tool, "asked": 1000, "rate": 998.04, "made": 3000, "seen": seen}
        | {"ns": [ns, ns, 9 * ns, 9 * ns]}
        for tool, seen, ns in (
            ("untraced", None, 200.0),
            ("printf per SYN", 1500, 6200.0),
            ("bpftrace, keyed count", 3000, 199.0),
        )
    ),
    {"event": "loss", "tool": "tcpaccept.bt", "syns": 1000, "made": 0, "seen": None, "ns": []},
    {"event": "interrupted", "tool": "linux.d, shared", "made": 500, "seen": 500},
    {"event": "interrupted", "tool": "printf per SYN", "made": 500, "seen": 50},
    {"event": "failed", "what": "bcc tcpsynbl", "why": "no headers"},
    {"event": "memory", "listeners": 1, "seen": 1, "exporter": MB, "dtrace": [MB], "seconds": 7.0},
    {
        "event": "memory",
        "listeners": 1000,
        "seen": 1000,
        "exporter": 60 * MB,
        "dtrace": [90 * MB, 80 * MB],
        "seconds": 8.0,
    },
    {"event": "start", "sessions": 1, "seconds": 7.0, "exporter": MB, "dtrace": [MB]},
    {"event": "start", "sessions": 4, "seconds": 9.0, "exporter": MB, "dtrace": [MB] * 4},
]
SHARED, PER_PORT, CONNECTION = "linux.d, shared", "linux.d, per-port", "a whole connection"
NOTHING, LEFT = (f"a probe at {end} whose clause does nothing" for end in ("entry", "return"))
COSTS = [
    ("barest clause", "taken", [650.0, 600.0, 9000.0]),
    ("clause whose predicate is false", "of an unwatched port", [400.0]),
    ("clause whose predicate reads the port", "of an unwatched port", [450.0]),
    ("tcpaccept.bt", CONNECTION, [1700.0]),
    ("tcpsynbl.bt", CONNECTION, [500.0]),
    *((SHARED, what, [2000.0]) for what in kernel.SYNS[:-1]),
    *((PER_PORT, what, [1950.0]) for what in kernel.SYNS),
    (SHARED, "dropped, Q full", [2600.0]),
    (SHARED, CONNECTION, [9900.0]),
    (PER_PORT, CONNECTION, [9000.0]),
    (PER_PORT, "of an unwatched port", [1000.0]),
    (NOTHING, "taken", [300.0]),
    (LEFT, "taken", [550.0]),
    ("@[four words] = sum()", "taken", [900.0]),
    ("@[two words] = max()", "taken", [800.0]),
]
INSTRUCTIONS: list[dict[str, Any]] = [
    *(
        {"event": "programs", "tool": tool, "what": what, "ns": ns, "runs": [9.0]}
        for tool, what, ns in COSTS
    ),
    {"event": "whole", "tool": "untraced", "what": "taken", "ns": [12_000.0, 12_010.0]},
    {"event": "whole", "tool": SHARED, "what": "taken", "ns": [14_205.0]},
    {"event": "over", "tool": NOTHING, "over": ""},
    *(
        {"event": "over", "tool": tool, "over": NOTHING}
        for tool in (LEFT, "@[four words] = sum()", "@[two words] = max()")
    ),
    *(
        {"event": "nginx", "tool": tool, "rate": rate}
        for tool, rate in (("untraced", 1000.0), ("dtrace-exporter", 900.0), ("untraced", 1010.0))
    ),
]
SUMMARIES = [
    kernel.summary_of_linux(LINUX),
    kernel.summary_of_instructions(INSTRUCTIONS),
]


def cells(title: str) -> dict[tuple[str, str], list[float] | str]:
    """Return the values, or the text, of a table's cells by row and column."""
    return {
        (one["row"], one["column"]): one.get("text") or one["values"]
        for summary in SUMMARIES
        for one in summary["figures"]
        if one["table"].startswith(title)
    }


def reached(summary: dict[str, Any]) -> list[float | None]:
    """Return the values of the targets."""
    return [one["value"] for one in summary["reach"]]


def test_figures_to_reach() -> None:
    """The value of each target is computed from medians."""
    linux, instructions = map(reached, SUMMARIES)
    assert linux == pytest.approx([0, 0, 2, 60, 230])
    # The worst case of a SYN, and the more expensive way to run linux.d.
    assert instructions == pytest.approx([2600 / 650, 9900 / 2200, 1000 / 400, 900 / 1005])


def test_reason_in_instructions() -> None:
    """The reason for a missed target lists pieces, each minus the program without it."""
    syn, connection, unwatched = (one["reason"] for one in SUMMARIES[1]["reach"][:3])
    assert "2,600 instructions, linux.d, shared, dropped, Q full; the limit is 2,275" in syn
    assert f"take {300 + 250 + 600:,} together" in syn
    assert "The limit is 8,800 instructions: linux.d, shared 9,900" in connection
    assert "9 of its programs run, which take 2,700 even if they do nothing" in connection
    assert "take 1,800, and three lengths of queues by max() 1,500" in connection
    assert "1,000 instructions; the limit is 600." in unwatched
    assert "reads the port takes 450." in unwatched
    assert "takes 250 even if it does nothing: together 1.75 times" in unwatched
    without = [message for message in INSTRUCTIONS if message["event"] != "over"]
    summary = kernel.summary_of_instructions(without)
    assert {one.get("reason", "") for one in summary["reach"]} == {""}
    assert reached(summary) == reached(SUMMARIES[1])


def test_instructions() -> None:
    """Programs, the whole kernel path and the pieces each have a table of their own."""
    programs = cells("In the tool's own BPF programs")
    assert programs["barest clause", "taken"] == [650, 600, 9000]
    assert programs[kernel.BEFORE_NAME, CONNECTION] == [24_294]
    assert (NOTHING, "taken") not in programs
    assert programs[SHARED, f"programs run for {CONNECTION}"] == [9]
    whole = cells("In total, with the way")
    assert whole["untraced: all that the kernel does", "taken"] == [12_000, 12_010]
    assert whole["linux.d, shared: added", "taken"] == [2200]
    assert cells("What a D program is made of")[LEFT, "takes"] == [250]
    assert cells("nginx")["untraced", "requests a second"] == [1000, 1010]


def test_not_all_measured() -> None:
    """If a candidate for the worst case was not measured, the target has no value."""
    without = [message for message in INSTRUCTIONS if message.get("what") != "dropped, Q full"]
    assert reached(kernel.summary_of_instructions(without))[0] is None


@pytest.mark.parametrize("event", ["loss", "interrupted"])
def test_loss_of_any_program_counts(event: str) -> None:
    """A single SYN that any of our programs lost, or reported twice, misses the target."""
    for seen in (999, 1001):
        more = {"event": event, "tool": "linux.d, per-port", "syns": 1000, "made": 1000}
        more |= {"seen": seen, "ns": [1.0]}
        found = reached(kernel.summary_of_linux([*LINUX, more]))
        assert found[:2] == ([1, 0] if event == "loss" else [0, 1])


def test_nothing_measured() -> None:
    """If a guest reports nothing, no target has a value, and there are no figures."""
    for make in (kernel.summary_of_linux, kernel.summary_of_instructions):
        summary = make([])
        assert set(reached(summary)) == {None}
        assert summary["figures"] == []
        assert not any(plot["lines"] for plot in summary["plots"])


def test_tables() -> None:
    """Every measurement is in one table cell; what could not be measured is named."""
    for summary, messages in zip(SUMMARIES, (LINUX, INSTRUCTIONS), strict=True):
        cells = [(one["table"], one["row"], one["column"]) for one in summary["figures"]]
        assert len(cells) == len(set(cells))
        rows = " ".join(row for _, row, _ in cells)
        tools = {one["tool"] for one in messages if "tool" in one} - {kernel.UNTRACED}
        assert {tool for tool in tools if tool not in rows} == set()
        json.dumps(summary)
    assert SUMMARIES[0]["software"] == {"Linux": "6.12.1"}
    assert SUMMARIES[0]["not_measured"] == {"bcc tcpsynbl": "no headers"}


def test_losses() -> None:
    """A tool's reports of a burst are shown as a share; a tool without SYN counts says so."""
    assert cells("SYNs of one burst that were reported, share, Linux") == {
        ("linux.d, shared", "1,000,000"): [1],
        ("printf per SYN", "1,000,000"): [0.02],
        ("bpftrace, keyed count", "1,000,000"): [1],
        ("tcpaccept.bt", "1,000"): "reports no SYNs",
    }


def test_interrupts() -> None:
    """A tool's reports of a flood that interrupts it are shown as a share."""
    table = cells("SYNs reported while a flood interrupts")
    assert table["printf per SYN", "share"] == [0.1]
    assert table["linux.d, shared", "SYNs"] == [500]


def test_one_of_a_kind() -> None:
    """A single listener or session is written in the singular."""
    rows = {row for row, _ in cells("Memory resident")}
    assert rows == {
        "1 listener, shared",
        "1,000 listeners, shared",
        "1 session, per-port",
        "4 sessions, per-port",
    }


def test_plots() -> None:
    """Plots show the added cost and the loss at each rate, up to the highest rate possible."""
    cost, lost = SUMMARIES[0]["plots"]
    assert cost["title"] == "CPU in the kernel, Linux"
    assert cost["lines"] == {
        "printf per SYN": [(1000, 0.6), (200_000, 98)],
        "linux.d, shared": [(500_000, 95)],
    }
    assert lost["lines"]["printf per SYN"] == [(1000, 50), (200_000, 98)]
    # It cost no more than running no tool, within the accuracy of the measurement.
    assert lost["lines"]["bpftrace, keyed count"] == [(1000, 0), (10_101_010, 0)]
    assert "untraced" not in lost["lines"]


def test_what_a_guest_told() -> None:
    """Lines that are not complete messages are left out."""
    assert kernel.read('{"event": "end"}\n[ 1.0] reboot\n{"event": "co') == [{"event": "end"}]
