"""A tiny run of the measurements, and the page of results."""

from __future__ import annotations

import importlib
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import report, run, user  # noqa: E402

DOCS = ROOT / "docs"
PAGE = (DOCS / "performance.md").read_text(encoding="utf-8")
RESULTS = json.loads((DOCS / "performance.json").read_text(encoding="utf-8"))

KERNEL: dict[str, Any] = {
    "machine": "a guest",
    "date": "2026-11-24",
    "software": {"DTrace": "2.0.7"},
    "figures": [
        {"table": "Cost, us", "row": "a|b", "column": "taken", "values": [3.0, 1.0, 2.0]},
        {"table": "Cost, us", "row": "<none>", "column": "dropped", "values": [12345.678]},
    ],
    "reach": [
        {"figure": "good", "at_most": 2.0, "unit": "times", "value": 1.5},
        {"figure": "bad", "at_most": 2.0, "unit": "times", "value": 2.5, "reason": "A floor."},
        {"figure": "slow", "at_least": 1.0, "unit": "times", "value": 0.5, "reason": "Too slow."},
        {"figure": "unknown", "at_least": 1.0, "unit": "times", "value": None},
    ],
    "plots": [
        {
            "title": "Loss & more",
            "x": "SYNs a second",
            "y": "%",
            "lines": {
                "ours": [[1000, 0], [1000000, 0]],
                'the "seed"': [[1000, 0], [1000000, 93.4]],
            },
        }
    ],
}


def test_tiny_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run with a few listeners measures and records all that needs no virtual machine."""
    # A test downloads nothing.
    monkeypatch.setattr(user, "_node_exporter", lambda: None)
    measure = user.measure
    monkeypatch.setattr(user, "measure", lambda: measure((1, 3), 1))
    (tmp_path / "performance.md").write_text(f"Before\n{report.BEGIN}{report.END}After\n")
    assert run.main(["user"], tmp_path) == 0
    page = (tmp_path / "performance.md").read_text(encoding="utf-8")
    results = json.loads((tmp_path / "performance.json").read_text(encoding="utf-8"))
    assert page.startswith("Before\n")
    assert page.endswith("After\n")
    for table in (
        user.TIME,
        user.CPU,
        user.RATE,
        user.TICK,
        user.PARSING,
        user.MEMORY,
        user.HEARTBEAT,
        user.SCRIPTS,
    ):
        values = [f["values"] for f in results["user"]["figures"] if f["table"] == table]
        assert values
        assert all(value > 0 for each in values for value in each if table != user.HEARTBEAT)
    assert all(target["value"] is not None for target in results["user"]["reach"])
    samples = [f["values"] for f in results["user"]["figures"] if f["table"] == user.SAMPLES]
    assert samples[1][0] > samples[0][0] > 40


def test_page_is_what_was_measured() -> None:
    """The page's tables and plots are those that the raw numbers give."""
    assert report.insert(PAGE, RESULTS) == PAGE
    assert PAGE.count(report.BEGIN) == PAGE.count(report.END) == 1
    drawn = DOCS / "performance.svg"
    plots = report.plots(RESULTS)
    assert drawn.exists() == bool(plots)
    if plots:
        assert report.svg(plots) == drawn.read_text(encoding="utf-8")
        assert "performance.svg" in PAGE


def test_links() -> None:
    """Every file that the page links to exists."""
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links
    assert [link for link in links if not (DOCS / link).exists()] == []


def test_reach_table() -> None:
    """A missed target is marked with its reason; a target without a value is "not measured"."""
    lines = report.tables({"linux": KERNEL}).splitlines()
    assert "![Each tool by the rate of SYNs](performance.svg)" in lines
    assert "| good | at most 2 times | 1.5 times |" in lines
    assert "| bad | at most 2 times | **2.5 times: not reached.** A floor. |" in lines
    assert "| slow | at least 1 times | **0.5 times: not reached.** Too slow. |" in lines
    assert "| unknown | at least 1 times | not measured |" in lines


def test_figures_table() -> None:
    """A cell shows the median and the quartiles; a cell without a figure is empty."""
    lines = report.tables({"linux": KERNEL}).splitlines()
    assert lines[lines.index("### Cost, us") :][2:6] == [
        "|  | taken | dropped |",
        "| --- | --- | --- |",
        "| a\\|b | 2 (1.5 to 2.5) |  |",
        "| <none> |  | 12,346 |",
    ]


def test_text_in_a_cell() -> None:
    """A cell without values shows its text instead."""
    figure = {
        "table": "Loss",
        "row": "other",
        "column": "1,000",
        "values": [],
        "text": "tells none",
    }
    part = KERNEL | {"figures": [*KERNEL["figures"], figure]}
    lines = report.tables({"linux": part}).splitlines()
    assert "| other | tells none |" in lines


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1"),
        (0.012345, "0.0123"),
        (99.96, "100"),
        (1234.5, "1,234"),
        (1e6, "1,000,000"),
    ],
)
def test_number(value: float, text: str) -> None:
    """Numbers have three significant digits, and all digits before the decimal point."""
    assert report.number(value) == text


def test_plots() -> None:
    """The plot is well-formed, has each line, each name once, and both axes."""
    root = ET.fromstring(report.svg(KERNEL["plots"] * 2))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("ours") == texts.count('the "seed"') == 1
    assert texts.count("Loss & more") == texts.count("SYNs a second") == 2
    assert {"1,000", "1,000,000", "100"} <= set(texts)
    lines = [path for path in root.iter() if path.get("class") == "line"]
    # Two in each plot, and two in the legend.
    assert len(lines) == 6
    assert "prefers-color-scheme: dark" in report.svg(KERNEL["plots"])


def test_many_lines() -> None:
    """Plots are two to a row, and all tools look different, however many there are."""
    lines = {f"tool {number}": [[1000, number], [10000, number]] for number in range(12)}
    plots = [
        KERNEL["plots"][0] | {"title": f"Plot {number}", "lines": lines} for number in range(4)
    ]
    root = ET.fromstring(report.svg(plots))
    titles = [element for element in root.iter() if element.get("class") == "title"]
    assert len({element.get("x") for element in titles}) == 2
    assert len({element.get("y") for element in titles}) == 2
    drawn = [path for path in root.iter() if path.get("class") == "line"][-12:]
    assert len({(path.get("stroke"), path.get("stroke-dasharray")) for path in drawn}) == 12


def test_what_was_not_measured() -> None:
    """What could not be measured is listed with the reason; a plot without points is omitted."""
    empty = {"title": "Nothing", "x": "x", "y": "y", "lines": {"ours": []}}
    part = KERNEL | {"plots": [empty], "not_measured": {"tcpsynbl": "bcc is not in the guest"}}
    assert "- tcpsynbl: bcc is not in the guest" in report.tables({"linux": part}).splitlines()
    assert report.plots({"linux": part}) == []


def test_failed_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If one part fails, the results of the other parts are kept."""

    def fail() -> None:
        raise OSError("no guest")

    modules = {"bench.kernel": SimpleNamespace(linux=fail)}
    modules["bench.user"] = SimpleNamespace(measure=lambda: KERNEL)
    monkeypatch.setattr(importlib, "import_module", modules.__getitem__)
    (tmp_path / "performance.md").write_text(f"{report.BEGIN}{report.END}")
    assert run.main(["linux", "user"], tmp_path) == 1
    assert "no guest" in capsys.readouterr().err
    assert set(json.loads((tmp_path / "performance.json").read_text())) == {"user"}
    assert (tmp_path / "performance.svg").exists()


def test_other_parts_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier results of other parts stay as they are, in the order of the parts."""
    module = SimpleNamespace(instructions=lambda: KERNEL)
    monkeypatch.setattr(importlib, "import_module", lambda _name: module)
    (tmp_path / "performance.md").write_text(f"{report.BEGIN}{report.END}")
    (tmp_path / "performance.json").write_text(json.dumps({"linux": KERNEL}))
    assert run.main(["instructions"], tmp_path) == 0
    results = json.loads((tmp_path / "performance.json").read_text())
    assert results["linux"] == KERNEL
    lines = capsys.readouterr().out.splitlines()
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## On ")]
    assert headings == [report.PARTS["instructions"], report.PARTS["linux"]]


def test_every_part_is_measured() -> None:
    """Each part of the page has a function that measures it."""
    assert run.MEASURES.keys() == report.PARTS.keys()
    for module, function in run.MEASURES.values():
        assert callable(getattr(importlib.import_module(module), function))


def test_headline() -> None:
    """The headline figures come first, whichever part they belong to."""
    top = {"figure": "worst", "at_most": 2.0, "unit": "times", "value": 1.0, "headline": True}
    results = {"linux": KERNEL, "user": KERNEL | {"reach": [top]}}
    lines = report.tables(results).splitlines()
    assert lines[lines.index("## Goals, and what was reached") :][4].startswith("| worst |")
