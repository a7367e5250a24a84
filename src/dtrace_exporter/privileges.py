"""Gives up for good the Linux capabilities that this process does not need."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from dtrace_exporter import capabilities
from dtrace_exporter.capabilities import EVERY
from dtrace_exporter.config import WITHOUT_DTRACE, Config, ConfigError
from dtrace_exporter.log import fields

_log = logging.getLogger(__name__)

DTRACE = frozenset({capabilities.SYS_ADMIN, capabilities.SYSLOG})
"""DTrace 2 needs both, see docs/operations.md."""
NONE = frozenset[int]()


def needed(config: Config) -> frozenset[int]:
    """Return the capabilities that the processes of a configuration need, or may need later.

    ssh(1) and netstat(1) need none. Neither does sock_diag, because a separate process enters other
    network namespaces. What another command such as sudo(8) or a script needs is not known, so it
    is EVERY.

    Args:
        config: the configuration.
    """
    here = config.source not in WITHOUT_DTRACE or config.local.scripts
    hosts = (config.local, *config.hosts) if here else config.hosts
    names = {Path(host.dtrace.command[0]).name for host in hosts}
    if names - {"dtrace", "ssh"}:
        return EVERY
    return DTRACE if "dtrace" in names else NONE


class Kept:
    """The capabilities that this process has kept for the processes that it starts."""

    def __init__(self) -> None:
        self._numbers = EVERY

    def keep(self, wanted: frozenset[int]) -> None:
        """Give up all capabilities but some.

        Raises:
            ConfigError: some of these have been given up already.
        """
        if wanted - self._numbers:
            raise ConfigError(
                "this configuration needs privileges that were given up at the start: restart the"
                " service"
            )
        self._numbers = wanted
        give_up(wanted)


def give_up(kept: Collection[int] = NONE) -> None:
    """Give up all capabilities but some, for good: no program can give them back.

    This is for the calling thread, and the threads and processes that it starts from then on. If
    the kernel refuses, this is logged. On other systems than Linux, and with EVERY, nothing
    happens.

    Args:
        kept: the numbers of the capabilities to keep.
    """
    if sys.platform != "linux" or {*kept} >= EVERY:
        return
    if {*kept} >= DTRACE:
        # DTrace's buffers are locked memory, which is limited without CAP_IPC_LOCK.
        with suppress(ValueError, OSError):
            unlimited = resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (unlimited, unlimited))
    try:
        capabilities.keep(kept)
    except OSError as error:
        _log.warning("cannot give up privileges", extra=fields(why=error.strerror))
