"""Whether a session on this host can miss events.

On Linux none is missed if nothing interrupts the program but what it does not trace, and probes do
not hide each other: see docs/how-it-works.md.
"""

from __future__ import annotations

import contextlib
import platform
import re
from pathlib import Path

REALTIME = Path("/sys/kernel/realtime")
KPROBES = Path("/sys/kernel/tracing/kprobe_events")
PREEMPT = Path("/sys/kernel/debug/sched/preempt")
CMDLINE = Path("/proc/cmdline")


def why_not(pid: int, *, in_processes: bool = False) -> str:
    """Return why a session may miss events, or an empty string if it cannot.

    Args:
        pid: the process of its dtrace(1), which has enabled its probes.
        in_processes: whether these fire in processes, and not with softirqs off.
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
    return _preempts() if in_processes else ""


def _preempts() -> str:
    """Return how the kernel may preempt a process within it, or an empty string if it does not.

    With CONFIG_PREEMPT_DYNAMIC the model is chosen at boot; sched_dynamic_show() of kernel/sched/
    has the one in use in brackets. Else the kernel's version says it (init/Makefile).
    """
    version = platform.version()
    if "PREEMPT_DYNAMIC" not in version:
        return "the kernel may preempt processes (PREEMPT)" if "PREEMPT" in version else ""
    for path, pattern in ((PREEMPT, r"\((\w+)\)"), (CMDLINE, r"\bpreempt=(\w+)")):
        with contextlib.suppress(OSError):
            if model := re.search(pattern, path.read_text()):
                harmless = model[1] in ("none", "voluntary")
                return "" if harmless else f"the kernel may preempt processes (preempt={model[1]})"
    return f"not known whether the kernel may preempt processes: no {PREEMPT}"
