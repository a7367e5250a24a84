"""The rows that a D program prints, and how they become records.

The programs' heads say what each row means. No other module knows how it is written; what comes out
is the same for all kernels: what has happened since the last time, and what was seen when. On Linux
a row of counts tells all since its set of aggregations was last emptied, so one that is lost or
garbled is made up for by the next. On Sun's engine each count is printed once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache, partial
from ipaddress import ip_address
from typing import NamedTuple

from dtrace_exporter.limits import LimitError, Limits
from dtrace_exporter.listeners import SYN_BUCKETS, WAIT_BUCKETS

PROTOCOL = 5
"""Version of the rows, printed in the ready row."""

_U64 = (1 << 64) - 1
_PAIR = 10_000_000
# zonecfg(8): letters, digits, and _ - . of at most 63; empty where the program cannot tell it.
_PLACE = re.compile(r"[A-Za-z0-9_.-]{0,63}")
# RFC 4291, 2.2: what is longest is an IPv6 address whose end is written as IPv4. None has a zone.
_ADDRESS_LENGTH = 45
_LISTEN = 10
_SETS = 2


class Ready(NamedTuple):
    """Every probe is enabled; ``own_place`` is the place of the host itself."""

    version: int
    own_place: str


class Tick(NamedTuple):
    """Heartbeat; ``time`` in nanoseconds of the host's monotonic clock, as in all records."""

    time: int


class Listening(NamedTuple):
    """Who a listener is, and its queues at a time.

    ``id`` is how other records name it, ``socket`` the kernel's address. ``cookie`` tells the uses
    of a place's number apart. ``open`` is whether it still listens. ``place`` is empty where the
    program could not tell it. ``told`` is whether its queues are from now on told by what comes and
    goes, not by further observations; ``syn`` is whether it was told for a SYN that no other record
    has.
    """

    id: int
    socket: int
    time: int
    open: bool
    place: str
    cookie: int
    address: str
    port: int
    q0: int
    q: int
    qmax: int
    q0max: int | None = None
    told: bool = False
    syn: bool = False


class Syns(NamedTuple):
    """SYNs that found Q/Qmax in one bucket; ``reason`` is why they were dropped, or None.

    ``total`` is the sum of the Q that they found.
    """

    id: int
    reason: str | None
    qmax: int
    bucket: int
    events: int
    total: int


class Found(NamedTuple):
    """SYNs that found so many connections in Q."""

    id: int
    q: int
    events: int


class Drops(NamedTuple):
    """Drops, the SYNs among which have been counted as such."""

    id: int
    reason: str
    events: int


class Opened(NamedTuple):
    """Connections put into Q0."""

    id: int
    events: int


class Established(NamedTuple):
    """Connections put into Q, on Sun's kernels out of Q0."""

    id: int
    events: int


class Left(NamedTuple):
    """Connections that left Q, or Q0, but not by an accept."""

    id: int
    half_open: bool
    events: int


class Accepts(NamedTuple):
    """Connections taken out of Q; ``bucket`` is None where their time in Q is not looked at.

    ``nanoseconds`` is the sum of these times.
    """

    id: int
    bucket: int | None
    events: int
    nanoseconds: int


class Queue(NamedTuple):
    """What a listener's queues were at a time, as far as it was looked at; else None."""

    id: int
    time: int
    q0: int | None = None
    q: int | None = None
    qmax: int | None = None


class Limit(NamedTuple):
    """What listen() has made of a socket's Qmax."""

    socket: int
    time: int
    qmax: int


class Closed(NamedTuple):
    """A socket that listens no more."""

    socket: int
    time: int


Counts = Syns | Found | Drops | Opened | Established | Accepts | Left
Record = Ready | Tick | Listening | Queue | Limit | Closed | Counts


class RowError(ValueError):
    """A line that is not a row."""


_SYNS = {10: None, 11: "q_full", 12: "q0_full", 13: "other"}
_ACKS = {21: "q_full_ack", 23: "other"}
_DROPS = {1: "q_full", 2: "q0_full", 3: "q0_evicted"}
_ESTABLISHED = 30
_ACCEPTED = 40
_NOT_LOOKED_AT = WAIT_BUCKETS
_LEFT_Q0 = WAIT_BUCKETS + 2


class _Told(NamedTuple):
    """What a row of counts told when it last came, and what makes a record of its next value."""

    text: str
    value: int
    record: Callable[[int, int], Record]


class Reader:
    """Reads the rows of one run of a program.

    Most rows have come before and differ in their last number alone; so what the words before that
    say is read once, and kept for as long as the row's set of aggregations is in use.

    Args:
        most: how many different rows of counts may be in use.
    """

    def __init__(self, most: int = Limits().rows) -> None:
        self._most = most
        self._sets: dict[int, dict[str, _Told]] = {}
        self._began = -1
        self._told: dict[str, _Told] = {}

    @property
    def held(self) -> list[dict[str, _Told]]:
        """What is kept of each set."""
        return [*self._sets.values()]

    def read(self, line: str) -> Record | None:
        """Return what a line tells that was not told before; None where that is nothing.

        Args:
            line: the line without its end.

        Raises:
            RowError: it is no row, or a number in it is out of its field's range.
            LimitError: it is a row of counts that was not there before, and too many are.
        """
        key, _, text = line.rpartition(" ")
        if told := self._told.get(key):
            if told.text == text:
                return None
            value = _number(text, signed=True)
            record = told.record(value, told.value)
            self._told[key] = _Told(text, value, told.record)
            return record
        words = key.split(" ")
        if row := _ROWS.get((words[0], len(words))):
            return row(words, text)
        if words == ["set"]:
            self._begin(_number(text))
            return None
        if self._began < 0:
            raise RowError("not a row")
        make = _counted(words, self._began)
        if sum(map(len, self._sets.values())) >= self._most:
            raise LimitError("rows")
        value = _number(text, signed=True)
        record = make(value, 0)
        self._told[key] = _Told(text, value, make)
        return record

    def _begin(self, began: int) -> None:
        # The newest is the last; what is not among the last two is printed no more.
        self._sets[began] = self._told = self._sets.pop(began, {})
        self._began = began
        for old in [*self._sets][:-_SETS]:
            del self._sets[old]


def _counted(words: list[str], began: int) -> Callable[[int, int], Record]:
    """Read a row's words but for the last; return what makes a record of its value and the last."""
    if words[0] == "count" and len(words) == 5:
        listener = _number(words[1], base=16)
        what, qmax, part = (_number(word) for word in words[2:])
        if what in _SYNS and part < SYN_BUCKETS:
            return partial(_syns, listener, _SYNS[what], qmax, part)
        if what in _ACKS:
            return partial(_drops, listener, _ACKS[what])
        if what == _ESTABLISHED:
            return partial(_established, listener)
        if what == _ACCEPTED and part <= _NOT_LOOKED_AT:
            return partial(_accepts, listener, part if part < _NOT_LOOKED_AT else None)
        raise RowError(f"unknown event {what} {part}")
    if words[0] == "q" and len(words) == 3:
        return partial(_q, _number(words[1], base=16), began, _number(words[2]))
    if words[0] == "q0" and len(words) == 2:
        return partial(_q0, _number(words[1], base=16), began)
    raise RowError("not a row")


def _more(value: int, before: int) -> tuple[int, int]:
    """Return what came to a pair of sums since its value before."""
    # The kernel's sum goes round at 64 bits, and is printed with a sign.
    more = (value - before) & _U64
    if more >> 63:
        raise RowError("a count that has fallen")
    return divmod(more, _PAIR)


def _syns(
    listener: int, reason: str | None, qmax: int, bucket: int, value: int, before: int
) -> Syns:
    total, events = _more(value, before)
    return Syns(listener, reason, qmax, bucket, events, total)


def _drops(listener: int, reason: str, value: int, before: int) -> Drops:
    return Drops(listener, reason, _more(value, before)[1])


def _established(listener: int, value: int, before: int) -> Established:
    return Established(listener, _more(value, before)[1])


def _accepts(listener: int, bucket: int | None, value: int, before: int) -> Accepts:
    microseconds, events = _more(value, before)
    return Accepts(listener, bucket, events, microseconds * 1000)


def _q(listener: int, began: int, qmax: int, value: int, _: int) -> Queue:
    after, length = divmod(value, _PAIR)
    return Queue(listener, began + after, None, length, qmax)


def _q0(listener: int, began: int, value: int, _: int) -> Queue:
    after, length = divmod(value, _PAIR)
    return Queue(listener, began + after, length)


def _ready(words: list[str], value: str) -> Ready:
    return Ready(_number(words[1]), _place(value))


def _tick(_: list[str], value: str) -> Tick:
    return Tick(_number(value))


def _listening(words: list[str], value: str) -> Listening:
    # Only an address has dots or colons: Linux has more numbers before it.
    if "." in words[4] or ":" in words[4]:
        return _told(words, value)
    numbers = [_number(word) for word in (*words[2:6], *words[7:], value)]
    time, state, place, cookie, port, q0, q, qmax = numbers
    identity = _number(words[1], base=16)
    address = _address(words[6])
    listening = state == _LISTEN
    return Listening(
        identity, _socket(identity), time, listening, str(place), cookie, address, port, q0, q, qmax
    )


def _told(words: list[str], value: str) -> Listening:
    time, *numbers = [_number(word) for word in (words[2], *words[5:], value)]
    identity = _number(words[1], base=16)
    address = _address(words[4])
    port, q0, q, qmax, syn, *q0max = numbers
    return Listening(
        identity,
        _socket(identity),
        time,
        qmax > 0,
        _place(words[3]),
        0,
        address,
        port,
        q0,
        q,
        qmax,
        q0max[0] if q0max else None,
        told=True,
        syn=bool(syn),
    )


def _place(word: str) -> str:
    if not _PLACE.fullmatch(word):
        raise RowError(f"not a zone or network namespace: {word[:64]!r}")
    return word


def _socket(identity: int) -> int:
    """Return the address in an ID, whose sixteen highest bits are all as the next one is."""
    address = identity >> 16
    return address | 0xFFFF << 48 if address >> 47 else address


def _found(words: list[str], value: str) -> Found | None:
    listener, q, events = _number(words[1], base=16), _number(words[2]), _number(value)
    return Found(listener, q, events) if _is_told(listener) else None


def _dropped(words: list[str], value: str) -> Drops | None:
    listener, reason, events = _number(words[1], base=16), _number(words[2]), _number(value)
    if reason not in _DROPS:
        raise RowError(f"unknown reason {reason}")
    return Drops(listener, _DROPS[reason], events) if _is_told(listener) else None


def _opened(words: list[str], value: str) -> Opened | None:
    listener, events = _number(words[1], base=16), _number(value)
    return Opened(listener, events) if _is_told(listener) else None


def _is_told(listener: int) -> bool:
    """Tell whether it is a listener that a program of Sun's engine has told.

    Number 0 is none of its port, one that listens no more, or a SYN that the next telling counts.
    """
    return listener & 0xFFFF != 0


def _put(words: list[str], value: str) -> Established:
    return Established(_number(words[1], base=16), _number(value))


def _left(words: list[str], value: str) -> Accepts | Left:
    listener, how = _number(words[1], base=16), _number(words[2])
    microseconds, events = divmod(_number(value), _PAIR)
    if how > _LEFT_Q0:
        raise RowError(f"unknown way {how}")
    if how > _NOT_LOOKED_AT:
        return Left(listener, how == _LEFT_Q0, events)
    bucket = how if how < _NOT_LOOKED_AT else None
    return Accepts(listener, bucket, events, microseconds * 1000)


def _limit(words: list[str], value: str) -> Limit:
    return Limit(_number(words[1], base=16), _number(words[2]), _number(value))


def _closed(words: list[str], value: str) -> Closed:
    return Closed(_number(words[1], base=16), _number(value))


_ROWS: dict[tuple[str, int], Callable[[list[str], str], Record | None]] = {
    ("ready", 2): _ready,
    ("tick", 1): _tick,
    ("listener", 10): _listening,
    ("listener", 9): _told,
    ("limit", 3): _limit,
    ("closed", 2): _closed,
    ("syn", 3): _found,
    ("drop", 3): _dropped,
    ("opened", 2): _opened,
    ("established", 2): _put,
    ("left", 3): _left,
}
"""By name and number of words before the last: what reads a row that tells something but once."""


def _number(word: str, base: int = 10, *, signed: bool = False) -> int:
    # int() also takes underscores and digits of other scripts, which no program prints.
    digits = word.removeprefix("-") if signed else word
    if not (digits.isascii() and digits.isalnum()) or len(digits) > 20:
        raise RowError(f"not a number: {word[:24]!r}")
    try:
        value = int(word, base)
    except ValueError:
        raise RowError(f"not a number: {word!r}") from None
    if value > _U64:
        raise RowError(f"number out of range: {word}")
    return value


@lru_cache(maxsize=4096)
def _address(text: str) -> str:
    """Write an address: IPv4 where it is mapped, ``*`` for the wildcard."""
    if len(text) > _ADDRESS_LENGTH or "%" in text:
        raise RowError(f"not an address: {text[:48]!r}")
    try:
        address = ip_address(text)
    except ValueError:
        raise RowError(f"not an address: {text[:48]!r}") from None
    address = getattr(address, "ipv4_mapped", None) or address
    return "*" if address.is_unspecified else str(address)
