"""A pytest plugin that reports the result of each case to the host, as a line of JSON."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PORT = Path("/dev/ttyS1")
SOAK_SECONDS = int(Path("/opt/dtrace-exporter/soak").read_text())
"""How long the soak lasts, in seconds."""
CASE_SECONDS = 480 + SOAK_SECONDS

_left: Counter[str] = Counter()
_outcome: dict[str, dict[str, Any]] = {}


def case_of(node: str) -> str:
    """Return the name of a case, ``backlog::test_q_full``, from a pytest node id."""
    file, _, function = node.partition("::")
    return f"{Path(file).stem}::{function.partition('[')[0]}"


def _send(**fields: Any) -> None:
    with PORT.open("a") as port:
        port.write(json.dumps(fields) + "\n")


def note(text: str) -> None:
    """Report something of interest about a case that passes."""
    _send(event="note", text=text)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Report that the cases start."""
    _left.update(case_of(item.nodeid) for item in session.items)
    _send(event="start", cases=len(_left))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Report that a file of cases is broken."""
    if report.failed:
        _send(event="broken", text=report.longreprtext)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a phase of one function to its case."""
    case = _outcome.setdefault(
        case_of(report.nodeid), {"outcome": "passed", "text": "", "seconds": 0.0}
    )
    case["seconds"] += report.duration
    if report.failed:
        case["outcome"] = "failed"
        case["text"] += f"{report.nodeid}, {report.when}\n{report.longreprtext}\n"
        case["text"] += "".join(f"--- {name}\n{text}\n" for name, text in report.sections)
    elif report.skipped and case["outcome"] == "passed":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        case.update(outcome="skipped", text=reason)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Report a case's result once all of its parameters are done, and until then a sign of life."""
    name = case_of(nodeid)
    _left[name] -= 1
    if _left[name]:
        _send(event="alive")
    else:
        _send(event="case", case=name, **_outcome[name])


def pytest_sessionfinish() -> None:
    """Report that no more results come."""
    _send(event="end")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Fail a case that hangs, so that those after it still run."""

    def late(*_: object) -> None:
        raise TimeoutError(f"the case takes longer than {CASE_SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(CASE_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
