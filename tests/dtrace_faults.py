"""Faults of dtrace(1): steps for the fake one, and the reason that its session reports."""

from __future__ import annotations

from typing import Any

ABORT = "dtrace: processing aborted: Abort due to systemic unresponsiveness"
FAULTS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "exits": ([{"exit": 1}], "dtrace(1) ended: exit status 1"),
    "prints nonsense without end": ([{"become": "exec yes"}], "no heartbeat for 3 s"),
    "prints a line without end": (
        [{"become": "exec tr '\\0' A </dev/zero"}],
        "no heartbeat for 3 s",
    ),
    "prints nothing any more": ([{"sleep": 600}], "no heartbeat for 3 s"),
    "closes stdout only": (
        [{"become": "exec sleep 600 >&-"}],
        "dtrace(1) ended: it closed its output",
    ),
    "prints half a row and dies": (
        [{"become": "printf 'count ffff1600 10 8'; kill -9 $$"}],
        "dtrace(1) ended: killed by SIGKILL",
    ),
    "aborts, as the system does not respond": (
        [{"stderr": ABORT}, {"exit": 1}],
        f"dtrace(1) ended: exit status 1: {ABORT}",
    ),
}
