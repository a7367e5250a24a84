"""Whether a session on this host can miss events.

On Linux none is missed if softirqs are not interrupted and probes do not hide each other: see
docs/how-it-works.md.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

REALTIME = Path("/sys/kernel/realtime")
KPROBES = Path("/sys/kernel/tracing/kprobe_events")


def why_not(pid: int) -> str:
    """Return why a session may miss events, or an empty string if it cannot.

    Args:
        pid: the process of its dtrace(1), which has enabled its probes.
    """
    with contextlib.suppress(OSError):
        # kernel/ksysfs.c. With PREEMPT_RT softirqs run in threads, which can be preempted.
        if REALTIME.read_text().strip() == "1":
            return "softirqs can be interrupted in this kernel (PREEMPT_RT)"
    with contextlib.suppress(OSError):
        # Because of bpf_prog_active a kprobe does not run while another one runs on the same CPU.
        # DTrace 2 has its process in the names of its probes (libdtrace's dt_provider_tp.h).
        if f"dt_{pid}_fbt" in KPROBES.read_text():
            return "dtrace(1) has to use kprobes here, and one can hide another"
    return ""
