"""The Linux capabilities of this process: which it has, and how to give them up for good.

Numbers and structures are those of linux/capability.h and linux/prctl.h; see capabilities(7).
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Collection

EVERY = frozenset(range(64))
SYS_PTRACE = 19
SYS_ADMIN = 21
SYSLOG = 34

_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_VERSION_3 = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def keep(kept: Collection[int]) -> None:
    """Give up all capabilities but some, for good: no program can give them back.

    This is for the calling thread, and the threads and processes that it starts from then on.

    Args:
        kept: the numbers of the capabilities to keep.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
    for number in EVERY.difference(kept):
        # It fails for numbers that are not capabilities, and without CAP_SETPCAP. This does not
        # matter, because PR_SET_NO_NEW_PRIVS below keeps programs from giving any back.
        libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header, sets = _Header(_VERSION_3, 0), (_Sets * 2)()
    checked(libc.capget(ctypes.byref(header), sets))
    for word, each in enumerate(sets):
        mask = sum(1 << number % 32 for number in kept if number // 32 == word)
        each.effective &= mask
        each.permitted &= mask
        each.inheritable = 0
    checked(libc.capset(ctypes.byref(header), sets))
    checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def effective() -> frozenset[int]:
    """Return the effective capabilities of the calling thread, by number.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(_VERSION_3, 0), (_Sets * 2)()
    checked(libc.capget(ctypes.byref(header), sets))
    return frozenset(number for number in EVERY if sets[number // 32].effective >> number % 32 & 1)


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that created it ends.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    checked(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def checked(result: int) -> None:
    """Check the result of a function of libc.

    Raises:
        OSError: it is not 0; with the errno that the function has set.
    """
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
