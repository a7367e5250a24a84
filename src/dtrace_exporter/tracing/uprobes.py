"""What a dtrace(1) that was killed leaves behind in the kernel of Linux.

DTrace 2 begins and ends by uprobes on itself, dt_PID_dtrace/BEGIN and END in the kernel's list
(libdtrace's dt_prov_dtrace.c); who is killed by SIGKILL cannot take them back.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

EVENTS = Path("/sys/kernel/tracing/uprobe_events")

_LEFTOVER = re.compile(r"^p:(dt_(\d+)_dtrace/\w+) ", re.MULTILINE)


def remove_leftovers() -> None:
    """Remove the uprobes of every dtrace(1) whose process is gone, if this kernel has such."""
    with contextlib.suppress(OSError):
        for event, pid in _LEFTOVER.findall(EVENTS.read_text(errors="replace")):
            if not Path(f"/proc/{pid}").exists():
                # One still in use stays, with an error: another's.
                with contextlib.suppress(OSError):
                    _append(f"-:{event}\n")


def _append(line: str) -> None:
    # Not by open(): in mode "a" it looks for the end, which such a file does not have, and in mode
    # "w" it would remove the probes of everybody.
    descriptor = os.open(EVENTS, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
