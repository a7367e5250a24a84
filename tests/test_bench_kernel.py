"""What the guests of the bench tell becomes tables, figures to reach, and plots."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import kernel

MB = 1_000_000
ILLUMOS = {"where": "illumos"}
MODEL = [
    # Two rounds of each, by turns.
    {"event": "cost", "tool": "untraced", "ns": [100.0, 110.0]} | ILLUMOS,
    {"event": "cost", "tool": "barest clause", "ns": [700.0, 690.0, 710.0]} | ILLUMOS,
    {"event": "cost", "tool": "illumos.d, shared", "ns": [1100.0]} | ILLUMOS,
    {"event": "cost", "tool": "illumos.d, per-port", "ns": [1110.0, 1090.0]} | ILLUMOS,
    {"event": "cost", "tool": "bpftrace, keyed count", "ns": [600.0]} | ILLUMOS,
    {"event": "cost", "tool": "untraced", "ns": [90.0]} | ILLUMOS,
    {"event": "cost", "tool": "illumos.d, shared", "ns": [1200.0, 1000.0]} | ILLUMOS,
    {"event": "cost", "tool": "illumos.d, per-port", "ns": [1600.0]} | ILLUMOS,
    {"event": "dropped", "tool": "untraced", "ns": [80.0]} | ILLUMOS,
    {"event": "cost", "where": "solaris10", "tool": "untraced", "ns": [300.0]},
    {"event": "cost", "where": "solaris10", "tool": "barest clause", "ns": [5000.0]},
    {"event": "cost", "where": "solaris10", "tool": "solaris10.d, shared", "ns": [9000.0]},
    {"event": "piece", "piece": "nothing", "tool": "a clause", "ns": [550.0]},
    {"event": "piece", "piece": "queues", "tool": "and three reads", "ns": [800.0, 820.0]},
    {"event": "piece", "piece": "count", "tool": "and a count", "ns": [900.0]},
    *(
        {"event": "loss", "tool": tool, "syns": 1_000_000, "made": 1_000_000, "seen": seen}
        | {"ns": [ns]}
        | ILLUMOS
        for tool, seen, ns in (
            ("untraced", None, 100.0),
            ("illumos.d, shared", 1_000_000, 2000.0),
            ("printf per SYN", 20_000, 5000.0),
            ("bpftrace, keyed count", 1_000_000, 99.0),
        )
    ),
    *(
        {"event": "rate", "tool": tool, "asked": 1000, "rate": 998.04, "made": 3000, "seen": seen}
        | {"ns": [ns, ns, 9 * ns]}
        | ILLUMOS
        for tool, seen, ns in (
            ("untraced", None, 200.0),
            ("printf per SYN", 1500, 6200.0),
            ("bpftrace, keyed count", 3000, 199.0),
        )
    ),
    {"event": "idle", "seconds": 30, "cpu": 0.3},
    {"event": "user", "tool": "exporter and dtrace(1)", "cpu": 0.5, "made": 1_000_000},
    {"event": "user", "tool": "printf and wc -l", "cpu": 2.0, "made": 20_000},
]
ON_LINUX = {"where": "Linux"}
LINUX = [
    {"event": "version", "name": "Linux", "version": "6.12.1"},
    {"event": "flood", "tool": "untraced", "ns": [30_000.0]} | ON_LINUX,
    {"event": "flood", "tool": "linux.d, shared", "ns": [38_000.0]} | ON_LINUX,
    *(
        {"event": "programs", "tool": "linux.d, shared", "what": what, "ns": [ns]} | ON_LINUX
        for what, ns in (("a SYN", 5_000.0), ("a connection", 9_000.0), ("a SYN", 6_000.0))
    ),
    {"event": "cookies", "tool": "linux.d, shared", "ns": [28_000.0]} | ON_LINUX,
    {"event": "connection", "tool": "linux.d, shared", "ns": [90_000.0]} | ON_LINUX,
    {"event": "loss", "tool": "linux.d, shared", "syns": 1000, "made": 1000, "seen": 1000}
    | {"ns": [38_000.0]}
    | ON_LINUX,
    {"event": "loss", "tool": "tcpaccept.bt", "syns": 1000, "made": 0, "seen": None, "ns": []}
    | ON_LINUX,
    {"event": "failed", "what": "bcc tcpsynbl", "why": "no headers"},
    {"event": "memory", "listeners": 1, "seen": 1, "exporter": MB, "dtrace": [MB], "seconds": 7.0},
    {
        "event": "memory",
        "listeners": 1000,
        "seen": 1000,
        "exporter": 60 * MB,
        "dtrace": [90 * MB],
        "seconds": 8.0,
    },
    {"event": "start", "sessions": 1, "seconds": 7.0, "exporter": MB, "dtrace": [MB]},
    {"event": "start", "sessions": 4, "seconds": 9.0, "exporter": MB, "dtrace": [MB] * 4},
]


def cells(title: str) -> dict[tuple[str, str], list[float] | str]:
    """Return the values, or the text, of a table's cells by row and column."""
    return {
        (one["row"], one["column"]): one.get("text") or one["values"]
        for one in kernel.summary(MODEL, LINUX)["figures"]
        if one["table"].startswith(title)
    }


def test_figures_to_reach() -> None:
    """Each figure to reach is worked out from medians, less what the kernel takes by itself."""
    reached = [one["value"] for one in kernel.summary(MODEL, LINUX)["reach"]]
    # Of the two ways to run illumos.d the one that costs more.
    assert reached == pytest.approx([1010 / 600, 1010 / 500, 0, 0.005, 1, 60, 150])


def test_reason() -> None:
    """Why a figure is not reached is told in nanoseconds that were measured."""
    reasons = [one["reason"] for one in kernel.summary(MODEL, LINUX)["reach"][:2]]
    assert "Twice the barest clause is 1,200 ns." in reasons[0]
    assert "1.5 times bpftrace's count is 750 ns." in reasons[1]
    for reason in reasons:
        assert "does nothing takes 450 ns" in reason
        assert "counts nothing, 710 ns" in reason
        assert "one word 800 ns" in reason
    without = [message for message in MODEL if message["event"] != "piece"]
    assert kernel.summary(without, LINUX)["reach"][0]["reason"] == ""


def test_unsteady(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever runs it is told when what a ratio rests on differed much from time to time."""
    steady = {"event": "cost", "tool": "barest clause", "ns": [700.0, 710.0, 720.0]} | ILLUMOS
    kernel.summary([steady], [])
    assert capsys.readouterr().err == ""
    kernel.summary([steady | {"ns": [700.0, 1500.0, 1900.0]}], [])
    assert "barest clause: 1,100 to 1,700 ns" in capsys.readouterr().err


def test_loss_of_any_program_counts() -> None:
    """One SYN that one of our programs lost anywhere, or told twice, is a figure not reached."""
    for seen in (999, 1001):
        more = {"event": "loss", "tool": "linux.d, per-port", "syns": 1000, "made": 1000}
        more |= {"where": "Linux", "seen": seen, "ns": [1.0]}
        assert kernel.summary(MODEL, [*LINUX, more])["reach"][2]["value"] == 1


def test_nothing_measured() -> None:
    """Where a guest told nothing every figure is one that was not measured."""
    summary = kernel.summary([], [])
    assert {one["value"] for one in summary["reach"]} == {None}
    assert summary["figures"] == []
    assert [plot["lines"] for plot in summary["plots"]] == [{}] * 4


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
    json.dumps(summary)


def test_rounds_are_pooled() -> None:
    """A cell has the repetitions of all rounds, and what is added is beyond the median of all."""
    table = cells("A SYN in the kernel, model of illumos")
    assert table["illumos.d, shared", "with it"] == [1100, 1200, 1000]
    assert table["illumos.d, shared", "added"] == [1000, 1100, 900]
    assert table["untraced", "with it"] == [100, 110, 90]
    assert cells("A SYN in the kernel, model of Solaris 10")["solaris10.d, shared", "added"] == [
        8700
    ]


def test_pieces() -> None:
    """The pieces of a SYN stand between what they are compared with and the whole program."""
    rows = list(dict.fromkeys(row for row, _ in cells("What a SYN on the short way")))
    assert rows == [
        "untraced",
        "barest clause",
        "bpftrace, keyed count",
        "a clause",
        "and three reads",
        "and a count",
        "illumos.d, shared",
        "illumos.d, per-port",
    ]


def test_linux() -> None:
    """What a flood takes longer is between lower quartiles; programs have a column of their own."""
    table = cells("A SYN that its listener keeps")
    assert table["linux.d, shared", "added, of the lower quartiles"] == [8000]
    assert cells("Time in the tool's own BPF programs") == {
        ("linux.d, shared", "a SYN"): [5000, 6000],
        ("linux.d, shared", "a connection"): [9000],
    }


def test_losses() -> None:
    """What each system's tools told is in a table of its own; one that tells no SYNs says so."""
    assert cells("SYNs told of those in one burst, share, model of illumos") == {
        ("illumos.d, shared", "1,000,000"): [1],
        ("printf per SYN", "1,000,000"): [0.02],
        ("bpftrace, keyed count", "1,000,000"): [1],
    }
    assert cells("SYNs told of those in one burst, share, Linux") == {
        ("linux.d, shared", "1,000"): [1],
        ("tcpaccept.bt", "1,000"): "tells no SYNs",
    }


def test_one_of_a_kind() -> None:
    """One listener and one session are not several."""
    rows = {row for row, _ in cells("Memory resident")}
    assert rows == {
        "1 listener, shared",
        "1,000 listeners, shared",
        "1 session, per-port",
        "4 sessions, per-port",
    }


def test_plots() -> None:
    """Plots have what each rate cost beyond no tool and what was lost, up to as fast as can be."""
    cost, lost, on_linux, _ = kernel.summary(MODEL, LINUX)["plots"]
    assert cost["title"] == "CPU in the kernel, model of illumos"
    assert cost["lines"] == {
        "printf per SYN": [(1000, 0.6), (200_000, 98)],
        "illumos.d, shared": [(500_000, 95)],
    }
    assert lost["lines"]["printf per SYN"] == [(1000, 50), (200_000, 98)]
    # It cost no more than no tool did, as far as that can be told.
    assert lost["lines"]["bpftrace, keyed count"] == [(1000, 0), (10_101_010, 0)]
    assert "untraced" not in lost["lines"]
    assert on_linux["title"].endswith("Linux")


def test_what_a_guest_told() -> None:
    """Lines that are no message, such as one cut short by the guest's end, are left out."""
    assert kernel.read('{"event": "end"}\n[ 1.0] reboot\n{"event": "co') == [{"event": "end"}]
