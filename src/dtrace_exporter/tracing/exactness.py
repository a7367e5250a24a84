"""Whether this host's kernel lets a session of ours see everything.

On Linux that rests on softirqs that nothing interrupts, and on probes that hide no others: see
docs/how-it-works.md.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

REALTIME = Path("/sys/kernel/realtime")
KPROBES = Path("/sys/kernel/tracing/kprobe_events")


def why_not(pid: int) -> str:
    """Return why the session with a process may miss events; an empty string if it does not.

    Args:
        pid: the process of its dtrace(1), which has enabled its probes.
    """
    with contextlib.suppress(OSError):
        # PREEMPT_RT, kernel/ksysfs.c: softirqs are threads then, which others preempt.
        if REALTIME.read_text().strip() == "1":
            return "softirqs can be interrupted in this kernel (PREEMPT_RT)"
    with contextlib.suppress(OSError):
        # bpf_prog_active keeps a kprobe from running while any other one runs on its CPU; DTrace 2
        # names its probes by its process (libdtrace's dt_provider_tp.h).
        if f"dt_{pid}_fbt" in KPROBES.read_text():
            return "dtrace(1) has to use kprobes here, of which one can hide another"
    return ""
