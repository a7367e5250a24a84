"""Why a host does not use DTrace: a word for each reason, what is missing, and what to do."""

from __future__ import annotations

import re
from typing import NamedTuple

from dtrace_exporter.kernel import Host

GUIDE = "docs/getting-dtrace.md"
MISSING = (
    "SYNs, completed handshakes, accepts, why connections are dropped, how full Q is at each SYN,"
    " and the time in Q"
)
"""What a host without DTrace has no series for."""
MISSING_TOO = {"netstat": "half-open connections, drops"}
"""What it lacks besides, by its source."""


class Reason(NamedTuple):
    """A reason, as text that follows the word "because", and advice on what to do."""

    because: str
    advice: str


REASONS = {
    "configured": Reason(
        "the configuration says source: {source}",
        f"to use DTrace set source: auto and restart the service; {GUIDE} says how to get it",
    ),
    "not_found": Reason(
        "dtrace(1) is not installed",
        f"install DTrace, as {GUIDE} says for each system, or set its path in dtrace.command",
    ),
    "systemtap": Reason(
        "the only dtrace here is SystemTap's script, which traces nothing",
        f"install DTrace beside it, as {GUIDE} says for each system",
    ),
    "not_permitted": Reason(
        "dtrace(1) may not trace as this user",
        "run as root (on Linux with CAP_SYS_ADMIN and CAP_SYSLOG), or on Solaris and illumos with"
        " the privilege dtrace_kernel",
    ),
    "no_btf": Reason(
        "the kernel has no type information (/sys/kernel/btf/vmlinux)",
        f"boot a kernel with CONFIG_DEBUG_INFO_BTF: {GUIDE} says which have it",
    ),
    "lockdown": Reason(
        "the kernel is locked down (confidentiality)",
        "boot without lockdown=confidentiality; integrity, as with Secure Boot, is fine",
    ),
    "no_tracefs": Reason(
        "the kernel has no tracefs",
        f"boot a kernel with CONFIG_FTRACE and CONFIG_KPROBE_EVENTS: {GUIDE} says which have it",
    ),
    "no_device": Reason(
        "this system has no DTrace device",
        "on FreeBSD run kldload dtraceall on the host; a jail has no DTrace",
    ),
    "refused": Reason(
        "dtrace(1) is installed but refuses to trace",
        "run dtrace-exporter check, or read the log, to see what dtrace(1) says",
    ),
}
"""The values of the label ``reason`` of dtrace_exporter_source_info."""

FAR = (
    r"publickey|[Hh]ost key|Connection (refused|timed out|closed)|No route|resolve hostname"
    r"|not responding"
)
"""A refusal in which this is found is from ssh."""

_SAID = {
    FAR: "refused",
    r"SystemTap": "systemtap",
    r"No such file|not found|not in any directory": "not_found",
    r"run as root|[Pp]rivilege": "not_permitted",
    r"device not available": "no_device",
}
# DTrace says the same if the kernel lacks something. Without CAP_SYSLOG addresses are 0.
_UNCLEAR = {
    r"Permission denied|not permitted|invalid address \(0x0\)": "not_permitted",
    r"": "refused",
}


def classify(refusal: str, host: Host | None) -> str:
    """Return the key of REASONS for why dtrace(1) refused to run.

    Args:
        refusal: as dtrace.attempt() returns it.
        host: the facts about the host, None if they are not known.
    """
    obstacles = {"": host.obstacles[0]} if host and host.obstacles else {}
    for patterns in (_SAID, obstacles, _UNCLEAR):
        for pattern, word in patterns.items():
            if re.search(pattern, refusal):
                return word
    return "refused"


def told(word: str, source: str) -> str:
    """Return in one line what a host without DTrace lacks, why, and what to do.

    The text quotes neither dtrace(1) nor the configuration, so anybody may see it.

    Args:
        word: a key of REASONS.
        source: the name of the source that is used instead.
    """
    because, advice = REASONS[word]
    missing = ", ".join(filter(None, (MISSING_TOO.get(source, ""), MISSING)))
    return (
        f"This host's source is {source}, as {because.format(source=source)}. Missing: {missing}."
        f" What to do: {advice}" + ("" if GUIDE in advice else f"; see {GUIDE}") + "."
    )
