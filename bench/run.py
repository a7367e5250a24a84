#!/usr/bin/env python3
"""Measure what watching listen queues costs, and write the results to docs/performance.*.

    python bench/run.py [instructions] [linux] [user]

Without an argument all parts are measured. Parts that are not named stay as they are. All but the
last are measured in virtual machines, and take long.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import report  # noqa: E402

DOCS = ROOT / "docs"


MEASURES = {
    "instructions": ("bench.kernel", "instructions"),
    "linux": ("bench.kernel", "linux"),
    "user": ("bench.user", "measure"),
}
"""The functions that measure the parts, by part."""


def main(parts: list[str], docs: Path = DOCS) -> int:
    """Measure, write and print.

    Args:
        parts: those of report.PARTS to measure.
        docs: the directory of performance.md and the two files beside it.
    """
    raw = docs / "performance.json"
    results = json.loads(raw.read_text(encoding="utf-8")) if raw.exists() else {}
    failed = False
    for part in parts:
        module, function = MEASURES[part]
        try:
            measured = getattr(importlib.import_module(module), function)()
        except Exception:
            # The results of the other parts, which take long, must not be lost.
            traceback.print_exc()
            print(f"{part} failed: that part is left as it was", file=sys.stderr)
            failed = True
            continue
        results[part] = describe() | measured
        write(results, docs)
    write(results, docs)
    print(report.tables(results))
    return 1 if failed else 0


def describe() -> dict[str, Any]:
    """Return the machine and the date; a part that uses another machine adds its own."""
    return {"machine": _machine(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}


def write(results: dict[str, Any], docs: Path) -> None:
    """Write the raw numbers, the page's tables and the plots, if there are any."""
    (docs / "performance.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = docs / "performance.md"
    page.write_text(report.insert(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    if plots := report.plots(results):
        (docs / "performance.svg").write_text(report.svg(plots), encoding="utf-8")


def _machine() -> str:
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
        model = match[1] if match else model
    release = ".".join(platform.release().split(".")[:2])
    return f"{os.cpu_count()} cores of {model}, {platform.system()} {release}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="*", help=", ".join(report.PARTS))
    wanted = parser.parse_args().part or list(report.PARTS)
    if odd := set(wanted) - set(report.PARTS):
        parser.error(f"no such part: {', '.join(odd)}")
    sys.exit(main(wanted))
