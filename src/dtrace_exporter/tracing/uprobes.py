"""Removes what a killed dtrace(1) leaves behind in the Linux kernel.

DTrace 2 has uprobes on itself for its probes BEGIN and END, dt_PID_dtrace/BEGIN and END in the
kernel's list (libdtrace's dt_prov_dtrace.c). After SIGKILL it cannot remove them.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

EVENTS = Path("/sys/kernel/tracing/uprobe_events")

# A dtrace(1) has it mapped. Another process that has the same number by now does not.
_LIBRARY = b"/libdtrace."
_LEFTOVER = re.compile(r"^p:(dt_(\d+)_dtrace/\w+) ", re.MULTILINE)


def remove_leftovers() -> None:
    """Remove the uprobes of each dtrace(1) that has ended, if the kernel has a list of them."""
    with contextlib.suppress(OSError):
        for event, pid in _LEFTOVER.findall(EVENTS.read_text(errors="replace")):
            if _is_gone(Path("/proc", pid)):
                # The kernel refuses this with an error if a probe is still in use.
                with contextlib.suppress(OSError):
                    _append(f"-:{event}\n")


def _is_gone(process: Path) -> bool:
    """Return whether a process is certainly not a running dtrace(1)."""
    try:
        return _LIBRARY not in (process / "maps").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False


def _append(line: str) -> None:
    # Not by open(): mode "a" seeks to the end, which such a file does not have, and mode "w" would
    # remove all probes, also those of others.
    descriptor = os.open(EVENTS, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
