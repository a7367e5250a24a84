"""The service as a container's first process, which has to wait for orphans."""

from __future__ import annotations

import os
import signal

from dtrace_exporter import privileges

_OURS = ("LISTEN_PID", "WATCHDOG_PID")
"""The variables with which systemd addresses a process."""

_MOST_DESCRIPTORS = 1 << 20


def be_below() -> None:
    """Continue in a child process if this is process 1; otherwise do nothing.

    Orphans become children of process 1, and are zombies until it waits for them: see wait(2).
    Process 1 passes signals on to its first child, and ends with it and with its exit status.
    """
    if os.getpid() != 1:
        return
    # Before there is a child, so that no signal of it is missed.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    first = os.fork()
    if first == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for name in _OURS:
            if os.environ.get(name) == "1":
                os.environ[name] = str(os.getpid())
        return
    # Whoever waits for one of them to be closed waits for the end of the service.
    os.closerange(3, _MOST_DESCRIPTORS)
    # Sending signals to a process of the same user needs no privileges.
    privileges.give_up()
    while True:
        number = signal.sigwait(signal.valid_signals())
        if number == signal.SIGCHLD:
            _bury(first)
        else:
            os.kill(first, number)


def _bury(first: int) -> None:
    """Wait for all children that have ended; exit if the first one has."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid == first:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
