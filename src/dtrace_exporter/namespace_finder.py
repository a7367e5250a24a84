"""A separate process that opens a socket in each network namespace for the service.

To enter a namespace, or to see who has a socket open, takes privileges that a network service
should not have. This process can only be asked to look. It hands over sockets and counters of
namespaces that exist anyway, and names of programs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import signal
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from dtrace_exporter import capabilities
from dtrace_exporter.holders import holders

NETLINK_SOCK_DIAG = 4
"""The protocol of sock_diag(7), from linux/netlink.h."""

LOOK = b"look"
"""The request to look for namespaces."""

WHO = b"who?"
"""The request to find out who has sockets open. A socket of SOCK_SEQPACKET comes with it. On this
the client sends messages of INODE until the end. The answer is a message for each program that has
one of them open, of INODE and the program's name, and a last one of inode 0 and COST."""
MOST_NAMES = 9
"""How many programs of a socket are reported, in the order of their names."""
INODE = struct.Struct("=Q")
COST = struct.Struct("=Q")
"""The processor time that the answer has cost, in nanoseconds."""

ANSWER = struct.Struct("=BQQ")
"""A message of the answer to LOOK: its kind, a namespace's inode, and a number."""
THERE, REFUSED, END = range(3)
"""The kinds. THERE comes with the namespace's files if they were not handed over before. The number
of REFUSED is an errno. END is the last message, and its number how many namespaces were left out
because of the limit. Inode 0 stands for processes whose namespaces cannot be seen."""
MOST_FILES = 2
"""How many files of a namespace are handed over: a socket of sock_diag, and /proc/net/netstat if it
can be opened."""

_CLONE_NEWNET = 0x40000000
_PROC = Path("/proc")
_NETSTAT = "/proc/thread-self/net/netstat"
# The root and the mount point of a bind mount of a namespace, see proc_pid_mountinfo(5).
_MOUNT = re.compile(r"\S+ \S+ \S+ net:\[(\d+)\] (\S+) .* - nsfs ")
_OCTAL = re.compile(r"\\([0-7]{3})")
_GONE = (errno.ENOENT, errno.ESRCH)
# One in so many descriptors is how many namespaces take a quarter of these.
_SHARE = 4 * MOST_FILES
_NICE = 10


class Finder:
    """Finds the network namespaces that have a process or a mount, except its own.

    A socket that was handed over keeps its namespace alive, so its inode is not reused. A namespace
    that has only such a socket, but no process and no mount, is not reported any more. It ends when
    the client closes the socket.

    Args:
        most: how many namespaces may have their files open at a time. A quarter of the descriptors
            that this process may open is another limit.
    """

    def __init__(self, most: int) -> None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files != resource.RLIM_INFINITY:
            most = min(most, files // _SHARE)
        self._most = most
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._own = _number(self._home)
        self._own_netstat = os.stat(_NETSTAT).st_ino  # noqa: PTH116
        # The inode of each namespace's netstat, by the namespace's inode.
        self._handed: dict[int, int | None] = {}

    def look(self) -> Iterator[tuple[bytes, list[int]]]:
        """Yield the messages of an answer, some with descriptors, which are closed afterwards.

        Raises:
            SystemExit: this process cannot go back to its own namespace.
        """
        found, hidden = _found()
        if not self._handed.keys() <= found.keys():
            # During the walk, a process may pass its namespace on to a child and end.
            found |= _found()[0]
        found.pop(self._own, None)
        if hidden and capabilities.SYS_PTRACE not in capabilities.effective():
            # Messages about a known namespace come later, because they say more. With the
            # capability, some other rule hides the process from everybody.
            yield ANSWER.pack(REFUSED, 0, hidden), []
        self._handed = {inode: of for inode, of in self._handed.items() if inode in found}
        left_out = 0
        for inode, paths in found.items():
            if inode in self._handed:
                yield ANSWER.pack(THERE, inode, 0), []
            elif len(self._handed) >= self._most:
                left_out += 1
            else:
                opened, why = self._open(inode, paths)
                if opened:
                    self._handed[inode] = _number(opened[1]) if opened[1:] else None
                    try:
                        yield ANSWER.pack(THERE, inode, 0), opened
                    finally:
                        for file in opened:
                            os.close(file)
                elif why:
                    yield ANSWER.pack(REFUSED, inode, why), []
        yield ANSWER.pack(END, 0, left_out), []

    def _open(self, inode: int, paths: list[str]) -> tuple[list[int], int]:
        """Return a namespace's files, or the errno of why there are none; 0 if it has ended."""
        why = 0
        for path in paths:
            try:
                there = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                try:
                    # There may be another process or mount by now.
                    if _number(there) == inode:
                        return self._files(there), 0
                finally:
                    os.close(there)
            except OSError as error:
                if error.errno not in _GONE:
                    why = error.errno or errno.EIO
        return [], why

    def _files(self, namespace: int) -> list[int]:
        _enter(namespace)
        try:
            netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
            return [netlink.detach(), *self._netstat()]
        finally:
            try:
                _enter(self._home)
            except OSError as error:
                raise SystemExit(f"cannot leave a network namespace: {error.strerror}") from None

    def _netstat(self) -> list[int]:
        """Open /proc/net/netstat of the namespace that this thread is in, if that is possible."""
        try:
            file = os.open(_NETSTAT, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return []
        # Before Linux 5.0 it may be that of another namespace, where this path was opened before:
        # see the commit "proc: fix /proc/net/* after setns(2)" of fs/proc/proc_net.c.
        if _number(file) in (self._own_netstat, *self._handed.values()):
            os.close(file)
            return []
        return [file]


def _number(file: int) -> int:
    return os.fstat(file).st_ino


def _found() -> tuple[defaultdict[int, list[str]], int]:
    """Return the paths of the namespaces that can be seen, by inode.

    The second value is the errno of why those of some processes cannot be seen, 0 if all can.
    """
    found = defaultdict[int, list[str]](list)
    hidden = 0
    for name in os.listdir(_PROC):  # noqa: PTH208
        if name.isdecimal():
            path = f"{_PROC}/{name}/ns/net"
            try:
                paths = found[os.stat(path).st_ino]  # noqa: PTH116
            except OSError as error:
                if error.errno not in _GONE:
                    hidden = error.errno or errno.EIO
                continue
            if not paths:
                paths.append(path)
    with (_PROC / "self/mountinfo").open(encoding="utf-8", errors="surrogateescape") as mounts:
        for mount in filter(None, map(_MOUNT.match, mounts)):
            path = _OCTAL.sub(lambda match: chr(int(match[1], 8)), mount[2])
            found[int(mount[1])].insert(0, path)
    return found, hidden


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    capabilities.checked(libc.setns(namespace, _CLONE_NEWNET))


def main(channel: socket.socket, most: int) -> None:
    """Answer requests until the client closes the channel.

    Args:
        channel: a socket of SOCK_SEQPACKET that the requests come from.
        most: as for Finder.

    Raises:
        OSError: capabilities cannot be given up, or an answer cannot be sent.
    """
    capabilities.keep({capabilities.SYS_ADMIN, capabilities.SYS_PTRACE})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    finder = Finder(most)
    while True:
        request, files, _, _ = socket.recv_fds(channel, len(LOOK), 1)
        if not request:
            break
        if request == WHO:
            for file in files:
                with socket.socket(fileno=file) as asking:
                    _look_who(asking)
            continue
        for message, opened in finder.look():
            socket.send_fds(channel, [message], opened)


def _look_who(asking: socket.socket) -> None:
    """Answer who has sockets open, in a process of its own so that other requests need not wait."""
    if os.fork():
        return
    try:
        capabilities.end_with_parent()
        os.nice(_NICE)
        inodes: set[int] = set()
        while message := asking.recv(1 << 16):
            inodes.update(inode for (inode,) in INODE.iter_unpack(message))
        found = defaultdict[int, set[bytes]](set)
        for inode, program in holders(inodes):
            names = found[inode]
            names.add(program)
            if len(names) > MOST_NAMES:
                names.remove(max(names))
        for inode, names in found.items():
            for program in names:
                asking.send(INODE.pack(inode) + program)
        asking.send(INODE.pack(0) + COST.pack(time.process_time_ns()))
    finally:
        os._exit(0)
