"""Finds the processes that have sockets open, by a walk through the descriptors of all."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
_NUMBERS = re.compile(rb"^mnt_id:\t(\d+)$.*^ino:\t(\d+)$", re.MULTILINE | re.DOTALL)


def holders(inodes: set[int]) -> Iterator[tuple[int, bytes]]:
    """Yield each socket that a process has open, with the name of the program (proc_pid_comm(5)).

    Processes that cannot be seen are left out.

    Args:
        inodes: the inodes of the sockets, which are unique across network namespaces.
    """
    links = {f"socket:[{inode}]": inode for inode in inodes}
    with socket.socket() as one:
        # All sockets are on one file system, which is mounted once.
        sockets = _numbers(f"{_PROC}/self/fdinfo/{one.fileno()}")
    for name in os.listdir(_PROC):  # noqa: PTH208
        if not name.isdecimal():
            continue
        # It may have ended, or this process may not look at it.
        with suppress(OSError):
            found = {*_of(f"{_PROC}/{name}", links, inodes, sockets and sockets[0])}
            if found:
                comm = Path(f"{_PROC}/{name}/comm").read_bytes().removesuffix(b"\n")
                yield from ((inode, comm) for inode in found)


def _of(process: str, links: dict[str, int], inodes: set[int], mount: int | None) -> Iterator[int]:
    """Yield the sockets among some that a process has open.

    Raises:
        OSError: it has ended, or this process may not look at it.
    """
    try:
        directory = os.open(f"{process}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        # Only its user may read fd/. fdinfo/ has the same facts, and since Linux 5.14 whoever may
        # trace the process may read it (fs/proc/fd.c).
        yield from _by_numbers(f"{process}/fdinfo", inodes, mount)
        return
    try:
        for name in os.listdir(directory):  # noqa: PTH208
            with suppress(OSError):
                link = os.readlink(name, dir_fd=directory)
                if link in links:
                    yield links[link]
    finally:
        os.close(directory)


def _by_numbers(directory: str, inodes: set[int], mount: int | None) -> Iterator[int]:
    for name in os.listdir(directory):  # noqa: PTH208
        numbers = _numbers(f"{directory}/{name}")
        if numbers and numbers[0] == mount and numbers[1] in inodes:
            yield numbers[1]


def _numbers(path: str) -> tuple[int, int] | None:
    """Return a descriptor's mount and inode, None if it is closed or the kernel has none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = _NUMBERS.search(os.read(descriptor, 4096))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return (int(found[1]), int(found[2])) if found else None
