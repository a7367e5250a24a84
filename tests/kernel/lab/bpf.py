"""The kernel's statistics of its BPF programs, by bpf(2) and /proc: see linux/bpf.h."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)


class Kept(NamedTuple):
    """How long and how often a program ran while statistics were enabled.

    A run counts even if it ends at once because another program of the same consumer runs on the
    CPU.
    """

    ns: int
    runs: int


@contextmanager
def statistics() -> Iterator[None]:
    """Enable statistics of BPF programs, which cost some time themselves."""
    switch = Path("/proc/sys/kernel/bpf_stats_enabled")
    switch.write_text("1")
    try:
        yield
    finally:
        switch.write_text("0")


def programs() -> dict[int, Kept]:
    """Return the statistics of each BPF program, by its number.

    Raises:
        OSError: bpf(2) fails.
    """
    found: dict[int, Kept] = {}
    number = 0
    while True:
        # BPF_PROG_GET_NEXT_ID: start_id, next_id, open_flags.
        attributes = (ctypes.c_uint32 * 3)(number, 0, 0)
        if _bpf(11, attributes) < 0:
            return found
        number = attributes[1]
        # BPF_PROG_GET_FD_BY_ID: prog_id.
        descriptor = _bpf(13, (ctypes.c_uint32 * 3)(number, 0, 0))
        if descriptor < 0:
            if ctypes.get_errno() == errno.ENOENT:
                # It has ended meanwhile.
                continue
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        try:
            text = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
        finally:
            os.close(descriptor)
        kept = dict(re.findall(r"^run_(time_ns|cnt):\s+(\d+)$", text, re.MULTILINE))
        found[number] = Kept(int(kept.get("time_ns", 0)), int(kept.get("cnt", 0)))


def totals() -> Kept:
    """Return the sums of all programs."""
    every = programs().values()
    return Kept(sum(one.ns for one in every), sum(one.runs for one in every))


def _bpf(command: int, attributes: ctypes.Array[ctypes.c_uint32]) -> int:
    """Call bpf(2), 321 on x86-64; return a descriptor or 0, or -1 for an error."""
    size = ctypes.sizeof(attributes)
    return int(_libc.syscall(321, command, ctypes.byref(attributes), size))
