"""What the guests of the bench tell becomes tables, figures to reach, and plots."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import kernel

MB = 1_000_000
MODEL = [
    {"event": "cost", "tool": "untraced", "ns": [100.0, 110.0, 90.0]},
    {"event": "cost", "tool": "barest clause", "ns": [700.0, 690.0, 710.0]},
    {"event": "cost", "tool": "illumos.d, shared", "ns": [1100.0, 1200.0, 1000.0]},
    {"event": "cost", "tool": "bpftrace, keyed count", "ns": [600.0]},
    {"event": "loss", "tool": "illumos.d, shared", "made": 1_000_000, "seen": 1_000_000},
    {"event": "loss", "tool": "printf per SYN", "made": 1_000_000, "seen": 20_000},
    {"event": "rate", "tool": "printf per SYN", "rate": 1000, "made": 3000, "seen": 1500},
    {"event": "idle", "seconds": 30, "cpu": 0.3},
    {"event": "user", "tool": "exporter and dtrace(1)", "cpu": 0.5, "made": 1_000_000},
    {"event": "user", "tool": "printf and wc -l", "cpu": 2.0, "made": 20_000},
]
LINUX = [
    {"event": "version", "name": "Linux", "version": "6.12.1"},
    {"event": "flood", "tool": "untraced", "ns": [30_000.0]},
    {"event": "flood", "tool": "linux.d, shared", "ns": [38_000.0]},
    {"event": "failed", "what": "bcc tcpsynbl", "why": "no headers"},
    {"event": "memory", "listeners": 1, "seen": 1, "exporter": MB, "dtrace": [MB]},
    {
        "event": "memory",
        "listeners": 1000,
        "seen": 1000,
        "exporter": 60 * MB,
        "dtrace": [90 * MB],
    },
    {"event": "start", "sessions": 4, "seconds": 9.0, "exporter": MB, "dtrace": [MB] * 4},
]


def test_figures_to_reach() -> None:
    """Each figure to reach is worked out from medians, less what the kernel takes by itself."""
    reached = [one["value"] for one in kernel.summary(MODEL, LINUX)["reach"]]
    assert reached == pytest.approx([1000 / 600, 1000 / 500, 0, 0.005, 1, 60, 150])


def test_nothing_measured() -> None:
    """Where a guest told nothing every figure is one that was not measured."""
    summary = kernel.summary([], [])
    assert {one["value"] for one in summary["reach"]} == {None}
    assert summary["figures"] == []


def test_tables() -> None:
    """Every measurement is in a table, each cell once; what could not be measured is named."""
    summary = kernel.summary(MODEL, LINUX)
    cells = [(one["table"], one["row"], one["column"]) for one in summary["figures"]]
    assert len(cells) == len(set(cells))
    rows = {row for _, row, _ in cells}
    told = {message["tool"] for message in (*MODEL, *LINUX) if "tool" in message}
    assert told <= rows
    assert summary["software"] == {"Linux": "6.12.1"}
    assert summary["not_measured"] == {"bcc tcpsynbl": "no headers"}
    assert summary["plots"][1]["lines"] == {"printf per SYN": [(1000, 50.0)]}
    json.dumps(summary)


def test_what_a_guest_told() -> None:
    """Lines that are no message, such as one cut short by the guest's end, are left out."""
    assert kernel.read('{"event": "end"}\n[ 1.0] reboot\n{"event": "co') == [{"event": "end"}]
