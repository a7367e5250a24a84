"""The limits of a program: its size, its kernel memory, and how records fill buffers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sun.compiler import Compiled
from sun.generate import Difo
from sun.syntax import OptionError, ProgramError

# Sizes of structures in sys/dtrace.h: headers of the file and of a section, descriptions of a
# probe, of an enabling, of an action, and of a variable.
_HEADER = 64
_SECTION = 32
_PROBE = 24
_ENABLING = 24
_ACTION = 32
_VARIABLE = 20
# Sizes in sys/dtrace_impl.h: of a key in an aggregation buffer and of the buffer itself, of a
# dynamic variable with one key, of each further key, and of a place in the hash table.
_AGGREGATION_KEY = 24
_AGGREGATION_BUFFER = 24
_DYNAMIC_VARIABLE = 48
_DYNAMIC_KEY = 16
_DYNAMIC_HASH = 64
_DYNAMIC_DEFAULT = 256
# Dynamic variables are divided among this many CPUs, even if fewer exist.
_CPUS_MOST = 64
SECOND = 1_000_000_000
_UNITS = {"k": 10, "m": 20, "g": 30}
_TIMES = {
    "ns": 1,
    "nsec": 1,
    "us": 1000,
    "usec": 1000,
    "ms": 1_000_000,
    "msec": 1_000_000,
    "s": SECOND,
    "sec": SECOND,
    "m": 60 * SECOND,
    "min": 60 * SECOND,
    "": 1,
}


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of a program or command line: sizes in bytes, rates as periods in nanoseconds."""

    bufsize: int = 4 << 20
    aggsize: int = 4 << 20
    dynvarsize: int = 1 << 20
    strsize: int = 256
    switchrate: int = SECOND
    aggrate: int = SECOND
    statusrate: int = SECOND
    cleanrate: int = SECOND // 101

    @classmethod
    def of(cls, *sets: Mapping[str, str]) -> Options:
        """Read options, of which later sets override earlier ones.

        Raises:
            ProgramError: an option is unknown, or cannot have its value.
        """
        values = {name: value for options in sets for name, value in options.items()}
        known: dict[str, int] = {}
        for name, value in values.items():
            if name.endswith("rate") and name in cls.__slots__:
                known[name] = period(value)
            elif name in cls.__slots__:
                known[name] = _size(name, value)
            elif name not in {"quiet", "defaultargs", "zdefs", "bufpolicy", "destructive"}:
                raise OptionError(name, value, "Invalid option name")
        return cls(**known)


def _size(name: str, text: str) -> int:
    digits = text.rstrip("kKmMgG")
    unit = text[len(digits) :].lower()
    if not digits.isdigit() or len(unit) > 1:
        raise OptionError(name, text, "Invalid value for specified option")
    return int(digits) << _UNITS.get(unit, 0)


def period(text: str) -> int:
    """Return the nanoseconds of a rate such as ``10hz``, ``100ms`` or ``1s``.

    Raises:
        ProgramError: the text is not a rate.
    """
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text[len(digits) :]
    if digits.isdigit() and int(digits) and unit == "hz":
        return SECOND // int(digits)
    if not digits.isdigit() or unit not in _TIMES or not int(digits):
        raise ProgramError(f"invalid rate: {text}")
    return int(digits) * _TIMES[unit]


def memory_per_cpu(options: Options, cpus: int) -> int:
    """Return the kernel memory of a session for each CPU.

    Both buffers exist twice, to be switched; all CPUs share the dynamic variables.
    """
    return 2 * (options.bufsize + options.aggsize) + options.dynvarsize // cpus


def dof_size(clauses: Iterable[Compiled]) -> int:
    """Return the size of the file (DOF) that dtrace(1) gives the kernel for a program."""
    file = _File()
    for clause in clauses:
        fields = clause.probe.split(":")
        file.strings += sum(len(word) + 1 for word in fields if word)
        file.strings += sum(len(s.format.text) + 1 for s in clause.statements if s.format)
        file.add(_PROBE, 4)
        for difo in clause.difos:
            file.add_difo(difo)
        if clause.actions:
            file.add(_ACTION * len(clause.actions), 8)
        file.add(_ENABLING, 8)
    return _HEADER + _SECTION * file.sections + file.data + file.strings


class _File:
    def __init__(self) -> None:
        # The string table exists from the beginning, with an empty string.
        self.sections = 1
        self.data = 0
        self.strings = 1

    def add(self, size: int, alignment: int) -> None:
        self.sections += 1
        self.data = _rounded(self.data, alignment) + size

    def add_difo(self, difo: Difo) -> None:
        before = self.sections
        self.add(4 * difo.instructions, 4)
        if difo.integers:
            self.add(8 * difo.integers, 8)
        if not difo.is_constant:
            self.add(1 + sum(len(text.encode()) + 1 for text in difo.strings), 1)
        if difo.variables:
            self.add(_VARIABLE * difo.variables, 4)
        self.add(8 + 4 * (self.sections - before), 4)


@dataclass(frozen=True, slots=True)
class Room:
    """The room that a clause needs in the principal buffer.

    Args:
        size: the size of its record; 0 if it makes none.
        needed: the room for the record and for the keys of its aggregations.
        alignment: the alignment of its beginning.
    """

    size: int
    needed: int
    alignment: int


def lay_out(clause: Compiled, header: int) -> Room:
    """Lay out a clause's record, as dtrace_ecb_resize() does, with keys after the record.

    A clause that records nothing needs room for a header, too.

    Args:
        clause: the clause; its aggregating actions get the size of their records.
        header: the size of a record's header.
    """
    size, alignment = header, 4
    needed = header
    at = base = 0
    for action in clause.actions:
        own = _alignment(action.size)
        alignment = max(alignment, own)
        if action.kind == "record":
            size = _rounded(size, own) + action.size
            needed = max(needed, size)
        elif action.kind == "key":
            if not at:
                at = _rounded(size - 4, 8) + 4
                base = at - 4
            at = _rounded(at, own) + action.size
        elif action.kind == "aggregate":
            at = _rounded(at, own) + action.size
            needed = max(needed, at)
            action.record_size = _rounded(at - base, 8) + _AGGREGATION_KEY
            at = 0
    # A clause without actions records that it ran.
    has_record = size > header or not clause.actions
    return Room(_rounded(size, 4) if has_record else 0, _rounded(needed, 4), alignment)


def aggregation_room(aggsize: int) -> int:
    """Return how many bytes of an aggregation buffer hold records; the rest is a hash table."""
    buckets = (aggsize >> 3) // 8
    if buckets > 17 << 3:
        buckets -= 17
    return aggsize - 8 * buckets - _AGGREGATION_BUFFER


def dynamic_variables(clauses: Iterable[Compiled], dynvarsize: int) -> int:
    """Return how many dynamic variables a program can have; each has room for the largest."""
    largest = 0
    for clause in clauses:
        for difo in clause.difos:
            for keys, data in difo.keys:
                largest = max(largest, _DYNAMIC_VARIABLE + _DYNAMIC_KEY * (keys - 1) + data)
    chunk = _rounded(largest or _DYNAMIC_DEFAULT, 8)
    size = max(dynvarsize, chunk + _DYNAMIC_HASH)
    hashes = size // (chunk + _DYNAMIC_HASH)
    hashes -= hashes & 1 if hashes != 1 else 0
    rest = size - hashes * _DYNAMIC_HASH
    each = rest // _CPUS_MOST // chunk * chunk

    def fits(room: int) -> int:
        # The last place of each CPU's part stays free, unless it is the only one.
        return max(1, (room - 1) // chunk)

    if not each:
        return fits(rest)
    return (_CPUS_MOST - 1) * fits(each) + fits(rest - (_CPUS_MOST - 1) * each)


def _alignment(size: int) -> int:
    return next(n for n in (8, 4, 2, 1) if size % n == 0) if size else 1


def _rounded(size: int, to: int) -> int:
    return -(-size // to) * to
