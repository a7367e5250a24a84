"""Giving up for good what a Linux kernel lets this process do beyond what it needs.

Numbers and structures are those of linux/capability.h and linux/prctl.h; see capabilities(7).
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from dtrace_exporter.config import Config, ConfigError
from dtrace_exporter.log import fields

_log = logging.getLogger(__name__)

EVERY = frozenset(range(64))
DTRACE = frozenset({21, 34})
"""CAP_SYS_ADMIN and CAP_SYSLOG: without either DTrace 2 does not run, see docs/operations.md."""
NONE = frozenset[int]()

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


def needed(config: Config, source: str) -> frozenset[int]:
    """Return the capabilities that the processes of a configuration need.

    ssh(1) needs none. Of a command that is neither that nor dtrace(1), such as sudo(8) or a script,
    nobody knows: it is EVERY.

    Args:
        config: the configuration.
        source: that of the local host; all but sock_diag may take dtrace(1).
    """
    hosts = config.hosts if source == "sock_diag" else (config.local, *config.hosts)
    names = {Path(host.dtrace.command[0]).name for host in hosts}
    if names - {"dtrace", "ssh"}:
        return EVERY
    return DTRACE if "dtrace" in names else NONE


class Kept:
    """What this process has kept for the processes that it starts, and does not get back."""

    def __init__(self) -> None:
        self._numbers = EVERY

    def keep(self, wanted: frozenset[int]) -> None:
        """Give up all capabilities but some.

        Raises:
            ConfigError: they have been given up already.
        """
        if wanted - self._numbers:
            raise ConfigError(
                "this configuration needs privileges that were given up at the start: restart the"
                " service"
            )
        self._numbers = wanted
        give_up(wanted)


def give_up(kept: Collection[int] = NONE) -> None:
    """Give up all capabilities but some, and that any program could give them back.

    It holds for the calling thread, and for the threads and processes that it starts from then on.
    A refusal of the kernel's is logged. On systems other than Linux, and with EVERY, nothing
    happens.
    """
    if sys.platform != "linux" or {*kept} >= EVERY:
        return
    if {*kept} >= DTRACE:
        # DTrace's buffers are locked memory, and CAP_IPC_LOCK lets it have more than the limit.
        with suppress(ValueError, OSError):
            unlimited = resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (unlimited, unlimited))
    try:
        _reduce({*kept})
    except OSError as error:
        _log.warning("cannot give up privileges", extra=fields(why=error.strerror))


def _reduce(kept: set[int]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
    for number in EVERY - kept:
        # Not all numbers are capabilities, and without CAP_SETPCAP it is refused. Once no program
        # gives any back, that makes no difference.
        libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header, sets = _Header(_VERSION_3, 0), (_Sets * 2)()
    _checked(libc.capget(ctypes.byref(header), sets))
    for word, each in enumerate(sets):
        mask = sum(1 << number % 32 for number in kept if number // 32 == word)
        each.effective &= mask
        each.permitted &= mask
        each.inheritable = 0
    _checked(libc.capset(ctypes.byref(header), sets))
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
