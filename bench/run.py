#!/usr/bin/env python3
"""Measure what watching listen queues costs, and write it down in docs/performance.*.

    python bench/run.py [kernel] [user]

Without an argument both halves are measured, and otherwise the other one is left as it was. The
kernel's is measured in virtual machines, and takes long.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
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


def main(halves: list[str], docs: Path = DOCS) -> int:
    """Measure, write and print.

    Args:
        halves: of report.HALVES those to measure.
        docs: where performance.md is, and the two files beside it.
    """
    raw = docs / "performance.json"
    results = json.loads(raw.read_text(encoding="utf-8")) if raw.exists() else {}
    failed = False
    for half in halves:
        if importlib.util.find_spec(f"bench.{half}") is None:
            print(f"bench/{half}.py is not there: that half is left as it was", file=sys.stderr)
            failed = True
            continue
        try:
            measured = importlib.import_module(f"bench.{half}").measure()
        except Exception:
            # What the other half takes so long to measure is not lost by it.
            traceback.print_exc()
            print(f"bench/{half}.py failed: that half is left as it was", file=sys.stderr)
            failed = True
            continue
        results[half] = describe() | measured
        write(results, docs)
    write(results, docs)
    print(report.tables(results))
    return 1 if failed else 0


def describe() -> dict[str, Any]:
    """Say what machine this is, and when; a half that measured on another one says so itself."""
    return {"machine": _machine(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}


def write(results: dict[str, Any], docs: Path) -> None:
    """Write the raw numbers, the page's tables and the plots, where there are any."""
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
    parser.add_argument("half", nargs="*", help=" or ".join(report.HALVES))
    wanted = parser.parse_args().half or list(report.HALVES)
    if odd := set(wanted) - set(report.HALVES):
        parser.error(f"no such half: {', '.join(odd)}")
    sys.exit(main(wanted))
