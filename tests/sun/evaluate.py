"""What compiled code works on: memory, variables and strings, and faults that end a clause."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sun.expressions import MASK, signed
from sun.rules import Rules

SCRATCH = 0xFFFF_FC00_0000_0000
"""The address of CPU 0's scratch memory for alloca(); the next CPU's is 4 GB higher."""
_STEP = 1 << 32
BAD_ADDRESS = "invalid address"
BAD_ALIGNMENT = "invalid alignment"
NO_SCRATCH = "out of scratch space"
BY_ZERO = "divide-by-zero"
_TEXT_CHUNK = 16


class Fault(Exception):  # noqa: N818 - it is DTrace's word
    """A fault, which ends a clause.

    Args:
        what: the kind, in dtrace(1)'s words.
        address: the address.
        offset: the offset of the instruction in its code; None without an instruction.
    """

    def __init__(self, what: str, address: int = 0, offset: int | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.address = address
        self.offset = offset


class Memory:
    """This process's own memory; missing memory faults."""

    def __init__(self) -> None:
        self._file = os.open("/proc/self/mem", os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self._file)

    def __call__(self, address: int, size: int) -> bytes:
        """Return the bytes at an address.

        Raises:
            Fault: there is no such memory.
        """
        try:
            found = os.pread(self._file, size, address)
        except (OSError, OverflowError):
            found = b""
        if len(found) < size:
            raise Fault(BAD_ADDRESS, address)
        return found


class Probe(NamedTuple):
    """A probe: its number, and the four parts of its name."""

    id: int
    provider: str
    module: str
    function: str
    name: str


NO_PROBE = Probe(0, "", "", "", "")


@dataclass(eq=False, slots=True)
class Context:
    """What a clause can see on a CPU.

    Args:
        cpu: the number of the CPU.
        this: the clause-local variables.
        scratch: the memory for alloca(), as large as the principal buffer whose rest it is.
        args: arg0 to arg9.
        probe: the probe that fired.
        epid: the number of the running enabling.
        thread: the address of the running thread.
        scratch_used: the offset of the unused part.
    """

    cpu: int
    this: list[Any]
    scratch: bytearray
    probe: Probe = NO_PROBE
    args: tuple[int, ...] = (0,) * 10
    epid: int = 0
    thread: int = 0
    pid: int = 0
    execname: bytes = b""
    time: int = 0
    wall_time: int = 0
    scratch_used: int = 0


@dataclass(eq=False, slots=True)
class Dynamic:
    """Associative arrays and ``self->`` variables, which share a number of places."""

    capacity: int
    rules: Rules
    values: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    dirty: int = 0
    drops: dict[str, int] = field(default_factory=dict)
    has_dropped: bool = False
    _state: str | None = None

    def keep(self, value: Any, key: tuple[Any, ...]) -> Any:
        """Assign a value; 0 frees the place, and without a free place the value is lost."""
        if not value and value != b"" and self.rules.zero_frees:
            if self.values.pop(key, None) is not None and self.rules.freed_later:
                self.dirty += 1
        elif key in self.values or len(self.values) + self.dirty < self.capacity:
            self.values[key] = value
        else:
            if self._state is None:
                self._state = " with non-empty dirty list" if self.dirty else ""
            self.drops[self._state] = self.drops.get(self._state, 0) + 1
            self.has_dropped = True
        return value

    def clean(self) -> None:
        """Make the freed places usable, as the kernel's cleaner does."""
        self.dirty = 0
        self._state = None


class Machine:
    """The functions that a program's code calls.

    Args:
        load: returns memory by address and size, or raises Fault or OSError.
        contexts: the contexts of all CPUs.
        dynamic: the dynamic variables.
        globals_: the initial plain global variables.
        string_size: the size of a string in a variable or record.
        rules: the rules of the engine.
    """

    def __init__(
        self,
        load: Callable[[int, int], bytes],
        contexts: list[Context],
        dynamic: Dynamic,
        globals_: list[Any],
        string_size: int,
        rules: Rules,
    ) -> None:
        self._load = load
        self._contexts = contexts
        self._string_size = string_size
        loads = {
            f"{'s' if sign else 'u'}{size}": self._loader(size, sign, rules.alignment_checked)
            for size in (1, 2, 4, 8)
            for sign in (False, True)
        }
        swaps = {
            f"{to}{letter}": _swap(size)
            for letter, size in {"s": 2, "l": 4, "ll": 8}.items()
            for to in ("hton", "ntoh")
        }
        self.namespace: dict[str, Any] = {
            **loads,
            **swaps,
            "dynamic": dynamic.values,
            "keep": dynamic.keep,
            "globals_": globals_,
            "put": _put,
            "poke": self._poke,
            "signed": signed,
            "divide": _divide,
            "rest": _rest,
            "divide_signed": _divide_signed,
            "rest_signed": _rest_signed,
            "text": self.text,
            "stored": lambda value: value and self.text(value) if value != b"" else value,
            "compare": self._compare,
            "alloca": self._alloca,
            "bcopy": self._bcopy,
            "strlen": lambda _, __, value: len(self.text(value)),
            "inet_ntoa": self._inet_ntoa,
            "inet_ntoa6": self._inet_ntoa6,
        }

    def read(self, address: int, size: int) -> bytes:
        """Return memory, including scratch memory.

        Raises:
            Fault: there is no such memory.
        """
        if SCRATCH <= address < SCRATCH + _STEP * len(self._contexts):
            cpu, at = divmod(address - SCRATCH, _STEP)
            found = bytes(self._contexts[cpu].scratch[at : at + size])
            if len(found) == size:
                return found
            raise Fault(BAD_ADDRESS, address)
        try:
            return self._load(address, size)
        except OSError:
            raise Fault(BAD_ADDRESS, address) from None

    def text(self, value: int | bytes) -> bytes:
        """Return a string as it is stored: its bytes up to its end, or up to the size of a string.

        Args:
            value: the bytes themselves, or their address.
        """
        most = self._string_size
        if isinstance(value, bytes):
            return value.partition(b"\0")[0][:most]
        found = b""
        while len(found) < most:
            # Never read beyond an aligned chunk, because the next page may be missing.
            address = value + len(found)
            found += self.read(address, _TEXT_CHUNK - address % _TEXT_CHUNK)
            if b"\0" in found:
                break
        return found.partition(b"\0")[0][:most]

    def _loader(self, size: int, sign: bool, aligned: bool) -> Callable[[int, int], int]:
        wrong = size - 1 if aligned else 0
        read = self.read
        load = self._load
        decode = int.from_bytes

        def load_one(address: int, offset: int) -> int:
            if address & wrong:
                raise Fault(BAD_ALIGNMENT, address, offset)
            try:
                found = (read if address >= SCRATCH else load)(address, size)
            except (Fault, OSError):
                raise Fault(BAD_ADDRESS, address, offset) from None
            return decode(found, "little", signed=True) & MASK if sign else decode(found, "little")

        return load_one

    def _compare(self, one: int | bytes, other: int | bytes) -> int:
        first, second = (self.text(value) if value else b"" for value in (one, other))
        return (first > second) - (first < second)

    def _poke(self, context: Context, offset: int, value: int, address: int, size: int) -> int:
        self._write(
            context, offset, address, (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        )
        return value

    def _write(self, context: Context, offset: int, address: int, data: bytes) -> None:
        at = address - SCRATCH - _STEP * context.cpu
        if not 0 <= at <= context.scratch_used - len(data):
            raise Fault(BAD_ADDRESS, address, offset)
        context.scratch[at : at + len(data)] = data

    def _alloca(self, context: Context, offset: int, size: int) -> int:
        at = -(-context.scratch_used // 8) * 8
        if at + size > len(context.scratch):
            raise Fault(NO_SCRATCH, 0, offset)
        context.scratch_used = at + size
        return SCRATCH + _STEP * context.cpu + at

    def _bcopy(self, context: Context, offset: int, source: int, target: int, size: int) -> int:
        try:
            data = self.read(source, size)
        except Fault as fault:
            raise Fault(fault.what, self._first_missing(source, size), offset) from fault
        self._write(context, offset, target, data)
        return 0

    def _first_missing(self, address: int, size: int) -> int:
        for at in range(address, address + size):
            try:
                self.read(at, 1)
            except Fault:
                return at
        return address

    def _address(self, context: Context, offset: int, address: int, size: int, room: int) -> bytes:
        """Return a network address, if there is scratch memory for its text."""
        try:
            data = self.read(address, size)
        except Fault as fault:
            raise Fault(fault.what, fault.address, offset) from None
        if context.scratch_used + room > len(context.scratch):
            raise Fault(NO_SCRATCH, 0, offset)
        context.scratch_used += room
        return data

    def _inet_ntoa(self, context: Context, offset: int, address: int) -> bytes:
        return ".".join(map(str, self._address(context, offset, address, 4, 16))).encode()

    def _inet_ntoa6(self, context: Context, offset: int, address: int) -> bytes:
        data = self._address(context, offset, address, 16, 46)
        mapped = data[:12] == bytes(10) + b"\xff\xff"
        if mapped or (data[:12] == bytes(12) and int.from_bytes(data[12:], "big") > 1):
            return ".".join(map(str, data[12:])).encode()
        return _ipv6(data).encode()


def _ipv6(data: bytes) -> str:
    """Write an IPv6 address as inet_ntoa6() does, which shortens even a single group of zeros."""
    groups = [int.from_bytes(data[at : at + 2], "big") for at in range(0, 16, 2)]
    start = longest = 0
    for at in range(8):
        end = at
        while end < 8 and not groups[end]:
            end += 1
        # A run looks longer if a zero byte follows it, at the beginning of the next group.
        length = 2 * (end - at) + (end > at and end < 8 and groups[end] < 256)
        if end > at and (at == 0 or groups[at - 1]) and length > longest:
            start, longest = at, 2 * (end - at)
    words = [f"{group:x}" for group in groups]
    if not longest:
        return ":".join(words)
    return ":".join(words[:start]) + "::" + ":".join(words[start + longest // 2 :])


def _put(sequence: list[Any], at: int, value: Any) -> Any:
    sequence[at] = value
    return value


def _swap(size: int) -> Callable[[Context, int, int], int]:
    def swap(_: Context, __: int, value: int) -> int:
        return int.from_bytes((value & ((1 << 8 * size) - 1)).to_bytes(size, "little"), "big")

    return swap


def _divide(one: int, other: int, offset: int) -> int:
    if not other:
        raise Fault(BY_ZERO, 0, offset)
    return one // other


def _rest(one: int, other: int, offset: int) -> int:
    if not other:
        raise Fault(BY_ZERO, 0, offset)
    return one % other


def _divide_signed(one: int, other: int, offset: int) -> int:
    if not other:
        raise Fault(BY_ZERO, 0, offset)
    one, other = signed(one), signed(other)
    quotient = abs(one) // abs(other)
    return (quotient if (one < 0) == (other < 0) else -quotient) & MASK


def _rest_signed(one: int, other: int, offset: int) -> int:
    quotient = signed(_divide_signed(one, other, offset))
    return (signed(one) - quotient * signed(other)) & MASK
