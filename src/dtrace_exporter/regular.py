"""Reads files that an operator names: only regular ones, up to a size.

To open a FIFO would block until its other end is open, and to read a device may never end. The
service reads its files again while it runs, so it must not block.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

MAX_BYTES = 1 << 20

Look = Callable[[Path, int | None], None]
"""Checks a file before it is read. It is given the path, and the descriptor if the file is open."""

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def unseen(_path: Path, _descriptor: int | None) -> None:
    """Check nothing."""


def read(path: Path, look: Look = unseen) -> bytes:
    """Return the contents of a file.

    Args:
        path: the file.
        look: raises an exception for a file that must not be read.

    Raises:
        OSError: it cannot be read, is not a regular file, or has more than MAX_BYTES.
        ValueError: the path has a NUL in it.
    """
    # To open a device may have side effects.
    _expect_regular(path.stat())
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        # By now it may be another file.
        _expect_regular(os.fstat(descriptor))
        look(path, descriptor)
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MAX_BYTES} bytes")
    return data


def _expect_regular(state: os.stat_result) -> None:
    if not stat.S_ISREG(state.st_mode):
        kind = _KINDS.get(stat.S_IFMT(state.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind} and not a regular file")
