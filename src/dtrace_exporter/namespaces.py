"""The other network namespaces of this host, with an inet_diag socket and counters of each."""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from itertools import count
from typing import NamedTuple

from dtrace_exporter.log import fields
from dtrace_exporter.namespace_finder import (
    ANSWER,
    COST,
    END,
    INODE,
    LOOK,
    MOST_FILES,
    REFUSED,
    THERE,
    WHO,
)

_log = logging.getLogger(__name__)

_OWN = "/proc/self/ns/net"
_NAMED = "/run/netns"
_SO_NETNS_COOKIE = 71
# Its start may be delayed by those that compile programs.
_PATIENCE = 30.0
_WALK_PATIENCE = 120.0
_INODES = 4096
_PROGRAM = (
    "import socket, sys; sys.path[:] = {path!r}\n"
    "from dtrace_exporter import namespace_finder\n"
    "namespace_finder.main(socket.socket(fileno={channel}), {most})\n"
)


def own() -> str:
    """Return the inode of this process's network namespace, as D programs print it, or nothing."""
    try:
        return str(os.stat(_OWN).st_ino)  # noqa: PTH116
    except OSError:
        return ""


def named(names: Iterable[str]) -> dict[str, str]:
    """Return the inodes of network namespaces by the names that ip-netns(8) gives them.

    Args:
        names: the names. Those that do not exist are missing in the result.
    """
    found = {}
    for name in names:
        with suppress(OSError):
            there = os.stat(f"{_NAMED}/{name}")  # noqa: PTH116
            # If nothing is mounted there, it is an empty file of another file system.
            if there.st_dev == os.stat(_OWN).st_dev:  # noqa: PTH116
                found[name] = str(there.st_ino)
    return found


def names() -> dict[str, str]:
    """Return the names that ip-netns(8) gives to network namespaces, by inode."""
    try:
        mounted = sorted(os.listdir(_NAMED))  # noqa: PTH208
    except OSError:
        return {}
    found: dict[str, str] = {}
    for name, place in named(mounted).items():
        found[place] = f"{found[place]},{name}" if place in found else name
    return found


def cookie(opened: socket.socket) -> int | None:
    """Return the cookie of a socket's network namespace, which the kernel gives to no other one.

    It is ``net_cookie`` of struct net. None before Linux 5.14, which does not tell it.
    """
    try:
        # SOL_SOCKET of asm-generic/socket.h, net/core/sock.c.
        told = opened.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    except OSError:
        return None
    return int.from_bytes(told, sys.byteorder)


class Namespace(NamedTuple):
    """A network namespace.

    Attributes:
        place: its inode.
        cookie: a number that differs for each use of this inode.
        netlink: an inet_diag socket in it.
        netstat: a descriptor of its /proc/net/netstat; None if that could not be opened.
    """

    place: str
    cookie: int
    netlink: socket.socket
    netstat: int | None = None

    def close(self) -> None:
        """Close its files."""
        self.netlink.close()
        if self.netstat is not None:
            os.close(self.netstat)


class Namespaces:
    """The network namespaces that can be entered, as of the last call of look().

    A separate process looks for them. Call begin() while there are privileges to do so, and close()
    at the end.

    An open socket keeps its namespace alive. So call look() regularly while there are any.
    """

    def __init__(self) -> None:
        self.why_not = ""
        """Why some were left out at the last look; empty if none were."""
        self._known: dict[int, Namespace] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._looked = -_PATIENCE
        self._uses = count(1)
        self._said = set[str]()

    def __iter__(self) -> Iterator[Namespace]:
        """Iterate over them."""
        return iter([*self._known.values()])

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._known)

    @property
    def pid(self) -> int | None:
        """The number of the process that looks for them, None if there is none."""
        return self._process.pid if self._process else None

    def begin(self, most: int) -> None:
        """Start the process that looks for them, if there is none yet; only on Linux.

        Args:
            most: how many namespaces may be known at a time.
        """
        if self._channel is not None or sys.platform != "linux":
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = _PROGRAM.format(path=sys.path, channel=theirs.fileno(), most=most)
        try:
            with theirs:
                # In a session of its own it does not get Ctrl-C; it ends when this process does.
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-c", program],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    env={},
                )
        except OSError as error:
            ours.close()
            self._say(f"cannot start the process that looks for them: {error.strerror}")
            return
        ours.settimeout(_PATIENCE)
        self._channel = ours
        self._looked = -_PATIENCE

    def look(self, age: float = 0.0) -> None:
        """Look for namespaces; it blocks. Errors are logged once.

        Args:
            age: do nothing if the last look was less than so many seconds ago.
        """
        if self._channel is None or time.monotonic() - self._looked < age:
            return
        try:
            self._take(self._channel)
        except OSError as error:
            # The answer is late or incomplete, so it is not known which namespaces have ended.
            self.close()
            self._say(f"the process that looks for them has failed: {error.strerror or error}")
        self._looked = time.monotonic()

    def holders(self, inodes: Collection[int]) -> tuple[dict[int, set[bytes]], float]:
        """Find out which programs have sockets open; it blocks, perhaps for long.

        It may be called in one thread while another one calls look().

        Args:
            inodes: the inodes of the sockets.

        Returns:
            The names of the programs by socket, for the processes that can be seen; and the
            processor time that this has cost, in seconds.

        Raises:
            OSError: the process that looks is not running, or its answer is incomplete.
        """
        channel = self._channel
        if channel is None:
            raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            ours.settimeout(_WALK_PATIENCE)
            with theirs:
                socket.send_fds(channel, [WHO], [theirs.fileno()])
            wanted = [*inodes]
            for at in range(0, len(wanted), _INODES):
                ours.send(b"".join(map(INODE.pack, wanted[at : at + _INODES])))
            ours.shutdown(socket.SHUT_WR)
            found: dict[int, set[bytes]] = {}
            while message := ours.recv(INODE.size + 64):
                (inode,) = INODE.unpack_from(message)
                if inode == 0:
                    return found, COST.unpack_from(message, INODE.size)[0] / 1e9
                found.setdefault(inode, set()).add(message[INODE.size :])
        raise OSError(errno.EPIPE, "it has ended")

    def close(self) -> None:
        """Close all sockets, and end the process that looks for them."""
        for inode in [*self._known]:
            self._known.pop(inode).close()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _take(self, channel: socket.socket) -> None:
        """Ask the process, and read its answer.

        Raises:
            OSError: the answer does not come or is malformed.
        """
        channel.send(LOOK)
        there = set()
        refused = 0
        while True:
            message, files, flags, _ = socket.recv_fds(channel, ANSWER.size, MOST_FILES)
            if flags & socket.MSG_CTRUNC:
                # There were not enough free descriptors to receive them.
                while files:
                    os.close(files.pop())
            if len(message) != ANSWER.size:
                raise OSError(errno.EPIPE, "its process has ended")
            kind, inode, number = ANSWER.unpack(message)
            if files:
                netlink, *others = files
                self._add(inode, socket.socket(fileno=netlink), *others)
            if kind == END:
                break
            if kind == REFUSED:
                refused = number
            elif kind == THERE:
                there.add(inode)
                refused = refused if inode in self._known else errno.EMFILE
        for inode in self._known.keys() - there:
            self._known.pop(inode).close()
        why = "more than dtrace.limits.places, or a quarter of the descriptors, allows"
        self._say(os.strerror(refused) if refused else why if number else "")

    def _add(self, inode: int, netlink: socket.socket, netstat: int | None = None) -> None:
        # The socket keeps the namespace alive, so its inode is reused only after close().
        use = cookie(netlink) or next(self._uses)
        self._known[inode] = Namespace(str(inode), use, netlink, netstat)

    def _say(self, why: str) -> None:
        self.why_not = why
        if why and why not in self._said:
            self._said.add(why)
            _log.warning("network namespaces left out", extra=fields(why=why))
