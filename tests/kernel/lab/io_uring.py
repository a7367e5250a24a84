"""A ring of io_uring(7), for one connect() at a time."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from types import TracebackType
from typing import Self

# include/uapi/linux/io_uring.h, and the numbers of the system calls, which all machines share.
_SETUP, _ENTER = 425, 426
_PARAMS = 120
_SQ_OFFSETS, _CQ_OFFSETS = 40, 80
_SQ_RING, _CQ_RING, _SQES = 0, 0x8000000, 0x10000000
_GETEVENTS = 1
_CONNECT = 16
_SQE = struct.Struct("=BBHiQQIIQ24x")
_CQE = struct.Struct("=QiI")

_libc = ctypes.CDLL(None, use_errno=True)


class Ring:
    """A ring with one entry, which is closed at the end."""

    def __init__(self) -> None:
        params = ctypes.create_string_buffer(_PARAMS)
        self._fd = _call(_SETUP, 1, params)
        sq, cq = (struct.unpack_from("=8I", params, at) for at in (_SQ_OFFSETS, _CQ_OFFSETS))
        self._sq_tail, self._sq_array = sq[1], sq[6]
        self._cq_head, self._cqes = cq[0], cq[5]
        self._sq = mmap.mmap(self._fd, mmap.PAGESIZE, offset=_SQ_RING)
        self._cq = mmap.mmap(self._fd, mmap.PAGESIZE, offset=_CQ_RING)
        self._entries = mmap.mmap(self._fd, mmap.PAGESIZE, offset=_SQES)
        self._address = ctypes.create_string_buffer(0)
        self._done = 0

    def connect(self, fd: int, name: bytes) -> None:
        """Begin to connect a UNIX socket to a path."""
        address = struct.pack("=H", 1) + name + b"\0"
        self._address = ctypes.create_string_buffer(address, len(address))
        where = ctypes.addressof(self._address)
        _SQE.pack_into(self._entries, 0, _CONNECT, 0, 0, fd, len(address), where, 0, 0, 0)
        struct.pack_into("=I", self._sq, self._sq_array, 0)
        struct.pack_into("=I", self._sq, self._sq_tail, self._done + 1)
        _call(_ENTER, self._fd, 1, 0, 0, None, 0)

    def wait(self) -> int:
        """Wait until it is over; return 0 or the negative errno."""
        _call(_ENTER, self._fd, 0, 1, _GETEVENTS, None, 0)
        mask_of_two = self._done & 1
        _, result, _ = _CQE.unpack_from(self._cq, self._cqes + _CQE.size * mask_of_two)
        self._done += 1
        struct.pack_into("=I", self._cq, self._cq_head, self._done)
        return int(result)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Close it."""
        for each in (self._sq, self._cq, self._entries):
            each.close()
        os.close(self._fd)


def _call(*words: object) -> int:
    done = int(_libc.syscall(*words))
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return done
