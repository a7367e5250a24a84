"""Reads the rows that a D program prints, and makes records of them.

The heads of the programs explain the rows. No other module knows their format; the records are the
same for all kernels. They have what happened since the row before, and what was observed at which
time. On Linux the rows of counts are cumulative since their set of aggregations was last emptied,
so the next row makes up for one that is lost or garbled. Sun's engine prints each count once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache, partial
from ipaddress import ip_address
from typing import Any, NamedTuple

from dtrace_exporter.limits import LimitError, Limits
from dtrace_exporter.listeners import SYN_BUCKETS, WAIT_BUCKETS

PROTOCOL = 5
"""The version of the rows, which the ``ready`` row has."""

_U64 = (1 << 64) - 1
_INT = (1 << 31) - 1
_PAIR = 10_000_000
# zonecfg(8): at most 63 letters, digits, and _ - .; empty if the program does not know it.
_PLACE = re.compile(r"[A-Za-z0-9_.-]{0,63}")
# RFC 4291, 2.2: the longest one is an IPv6 address that ends in IPv4's notation. None has a zone.
_ADDRESS_LENGTH = 45
_MOST_PORT = 0xFFFF
_LISTEN = 10
_SETS = 2
# What strchr2esc() of libdtrace makes of bytes for %S; a byte of 0 is behind a name.
_ESCAPED = re.compile(r"\\([0-3][0-7]{2}|[abfnrtv\"\\0])")
_BYTES = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, '"': 34, "\\": 92, "0": 0}
# A longer one has been cut: strsize of the programs.
_NAME_LENGTH = 127
_HEX = re.compile(r"[0-9a-f]*")


class Ready(NamedTuple):
    """All probes are enabled; ``own_place`` is the place of the host itself."""

    version: int
    own_place: str


class Tick(NamedTuple):
    """A heartbeat. As in all records, ``time`` is in nanoseconds of the host's monotonic clock."""

    time: int


class Listening(NamedTuple):
    """The identity of a listener, and its queues at a time.

    Attributes:
        id: its name in other records.
        socket: the kernel's address of the socket.
        time: when it was observed.
        open: whether it still listens.
        place: empty if the program does not know it.
        cookie: differs for each use of a place's number; 0 if unknown.
        address: the address that it is bound to, ``*`` for the wildcard.
        port: its TCP port.
        q0: half-open connections; None if the kernel has no such queue.
        q: connections that wait for accept().
        qmax: the limit of Q.
        q0max: the limit of Q0, if the kernel has one.
        told: whether the later records have what enters and leaves its queues, instead of their
            lengths.
        syn: whether a SYN that no other record counts caused this row.
    """

    id: int
    socket: int
    time: int
    open: bool
    place: str
    cookie: int
    address: str
    port: int
    q0: int | None
    q: int
    qmax: int
    q0max: int | None = None
    told: bool = False
    syn: bool = False


class Syns(NamedTuple):
    """SYNs that found Q/Qmax in one bucket.

    ``reason`` is why they were dropped, or None. ``total`` is the sum of the lengths of Q that they
    found.
    """

    id: int
    reason: str | None
    qmax: int
    bucket: int
    events: int
    total: int


class Found(NamedTuple):
    """SYNs that found ``q`` connections in Q."""

    id: int
    q: int
    events: int


class Drops(NamedTuple):
    """Drops. SYNs among them are counted by another record as well."""

    id: int
    reason: str
    events: int


class Evicted(NamedTuple):
    """Half-open connections thrown out of a cache that a place's listeners share."""

    place: str
    address: str
    port: int
    events: int


class Opened(NamedTuple):
    """Connections put into Q0."""

    id: int
    events: int


class Established(NamedTuple):
    """Connections put into Q. On Sun's kernels they leave Q0.

    ``bucket`` is that of the time that the handshakes took, None if it was not measured.
    ``nanoseconds`` is the sum of these times.
    """

    id: int
    events: int
    bucket: int | None = None
    nanoseconds: int = 0


class Resent(NamedTuple):
    """SYN-ACKs that were sent again."""

    id: int
    events: int


class Left(NamedTuple):
    """Connections that left Q, or Q0 if ``half_open``, without accept()."""

    id: int
    half_open: bool
    events: int


class Accepts(NamedTuple):
    """Connections that accept() took out of Q.

    ``bucket`` is that of their time in Q, None if it is not measured. ``nanoseconds`` is the sum of
    these times.
    """

    id: int
    bucket: int | None
    events: int
    nanoseconds: int


class Queue(NamedTuple):
    """The queues of a listener at a time; None for what was not observed."""

    id: int
    time: int
    q0: int | None = None
    q: int | None = None
    qmax: int | None = None


class Limit(NamedTuple):
    """The Qmax that listen() gave to a socket, and the backlog that was requested, if seen."""

    socket: int
    time: int
    qmax: int
    requested: int | None = None


class Closed(NamedTuple):
    """A socket has stopped listening."""

    socket: int
    time: int


class Accepted(NamedTuple):
    """Who accepted a connection at a socket.

    Attributes:
        socket: the kernel's address of the socket.
        time: when, as in all records.
        kind: what the name is of: ``program`` or ``fmri``.
        name: the name of the process's program or service.
    """

    socket: int
    time: int
    kind: str
    name: str


class Refused(NamedTuple):
    """SYNs to a port of the host's own place at which nobody listened.

    Attributes:
        port: the port, None for several that have no row of their own.
        events: how many.
    """

    port: int | None
    events: int


class UnixRefused(NamedTuple):
    """connect()s that a UNIX socket refused because its queue was full.

    Attributes:
        cookie: the cookie of the socket's network namespace.
        name: its name in the kernel, as for unix_diag.written().
        events: how many.
    """

    cookie: int
    name: bytes
    events: int


class Unattributed(NamedTuple):
    """Events of which the program does not know whose they are."""

    events: int


Counts = Syns | Found | Drops | Opened | Established | Accepts | Left | Resent
Record = (
    Ready
    | Tick
    | Listening
    | Queue
    | Limit
    | Closed
    | Accepted
    | Evicted
    | Refused
    | UnixRefused
    | Unattributed
    | Counts
)


class RowError(ValueError):
    """A line is not a row; the text says why."""


_SYNS = {10: None, 11: "q_full", 12: "q0_full", 13: "other"}
_ACKS = {21: "q_full_ack", 23: "other"}
_DROPS = {1: "q_full", 2: "q0_full", 3: "q0_evicted", 4: "q_full_ack", 5: "other"}
_NO_Q0 = "-"
_OTHERS = "other"
_UNIX = ("unix", "more")
_ESTABLISHED = 30
_MEASURED = 31
_ACCEPTED = 40
_RESENT = 50
_NOT_LOOKED_AT = WAIT_BUCKETS
_LEFT_Q0 = WAIT_BUCKETS + 2
_NAMES = ("program", "fmri")
# Of a struct sockaddr_un: how many bytes the family has, and the whole with a 0 behind 108 of the
# path; how many of its bytes the row of a UNIX socket has, and each further row of a longer one.
_FAMILY, _SOCKADDR = 2, 111
_BEGIN, _PART = 40, 48
_PARTS = (1, 2)


class _Told(NamedTuple):
    """The last value of a row of counts, and a function that makes a record of the next one."""

    text: str
    value: int
    record: Callable[[int, int], Record | None]


class Reader:
    """Reads the rows of one run of a program.

    Most rows have come before, and only their last number changes. So the words before this number
    are parsed once, and the result is kept while the row's set of aggregations is in use.

    Args:
        most: how many different rows of counts may be in use.
    """

    def __init__(self, most: int = Limits().rows) -> None:
        self._most = most
        self._sets: dict[int, dict[str, _Told]] = {}
        self._began = -1
        self._told: dict[str, _Told] = {}
        # The ends of long names of UNIX sockets, by the socket's inode, of each set.
        self._ends: dict[int, dict[int, dict[int, bytes]]] = {}

    @property
    def held(self) -> list[dict[Any, Any]]:
        """What is kept for each set of aggregations."""
        return [*self._sets.values(), *self._ends.values()]

    def read(self, line: str) -> Record | None:
        """Return the record of what is new in a line, None if nothing is.

        Args:
            line: the line without its end.

        Raises:
            RowError: it is not a row, or a number is out of its field's range.
            LimitError: it is a new row of counts, and there are too many already.
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
        if words[0] in _NAMES:
            return _accepted(line)
        if words == ["set"]:
            self._begin(_number(text))
            return None
        if self._began < 0:
            raise RowError("not a row")
        if sum(map(len, self._sets.values())) >= self._most:
            raise LimitError("rows")
        make = self._unix(words) if words[0] in _UNIX else _counted(words, self._began)
        if make is None:
            return None
        value = _number(text, signed=True)
        record = make(value, 0)
        self._told[key] = _Told(text, value, make)
        return record

    def _begin(self, began: int) -> None:
        # The newest set is the last one. Only the last two are still printed.
        self._sets[began] = self._told = self._sets.pop(began, {})
        self._began = began
        self._ends.setdefault(began, {})
        for old in [*self._sets][:-_SETS]:
            del self._sets[old], self._ends[old]

    def _unix(self, words: list[str]) -> Callable[[int, int], Record | None] | None:
        """Read all words but the last of a row about a UNIX socket.

        Returns:
            What makes a record, or None as long as the rest of its name has not been told. The
            kernel may have been read before that was in it; the row will come again.
        """
        ends = self._ends[self._began]
        if words[0] == "more" and len(words) == 4:
            part = _number(words[2])
            if part not in _PARTS:
                raise RowError(f"not a part of a name: {part}")
            ends.setdefault(_number(words[1]), {})[part] = _bytes(words[3], _PART)
            return _nothing
        if words[0] != "unix" or len(words) != 5:
            raise RowError("not a row")
        cookie, inode, length = (_number(word) for word in words[1:4])
        name = _bytes(words[4], _BEGIN)
        if inode == 0:
            return _unattributed
        if not _FAMILY < length <= _SOCKADDR:
            raise RowError(f"not the length of a name: {length}")
        for part in _PARTS:
            if len(name) < length:
                end = ends.get(inode, {}).get(part)
                if end is None:
                    return None
                name += end
        return partial(_unix_refused, cookie, name[_FAMILY:length])


def _counted(words: list[str], began: int) -> Callable[[int, int], Record | None]:
    """Read all words of a row but the last; return what makes a record of two of its values."""
    if words[0] == "count" and len(words) == 5:
        listener = _number(words[1], base=16)
        what, qmax, part = (_number(word) for word in words[2:])
        if what in _SYNS and part < SYN_BUCKETS:
            return partial(_syns, listener, _SYNS[what], qmax, part)
        if what in _ACKS:
            return partial(_drops, listener, _ACKS[what])
        if what == _ESTABLISHED:
            return partial(_established, listener)
        if what == _MEASURED and part < WAIT_BUCKETS:
            return partial(_measured, listener, part)
        if what == _ACCEPTED and part <= _NOT_LOOKED_AT:
            return partial(_accepts, listener, part if part < _NOT_LOOKED_AT else None)
        if what == _RESENT:
            return partial(_resent, listener)
        raise RowError(f"unknown event {what} {part}")
    if words[0] == "q" and len(words) == 3:
        return partial(_q, _number(words[1], base=16), began, _number(words[2]))
    if words[0] == "q0" and len(words) == 2:
        return partial(_q0, _number(words[1], base=16), began)
    if words[0] == "refused" and len(words) == 2:
        return partial(_refused, None if words[1] == _OTHERS else _port(words[1]))
    raise RowError("not a row")


def _more(value: int, before: int) -> tuple[int, int]:
    """Return by how much a pair of sums, which are in one number, has grown."""
    return divmod(_growth(value, before), _PAIR)


def _growth(value: int, before: int) -> int:
    """Return by how much a sum has grown."""
    # The kernel's sum wraps at 64 bits, and is printed with a sign.
    more = (value - before) & _U64
    if more >> 63:
        raise RowError("a count that has fallen")
    return more


def _syns(
    listener: int, reason: str | None, qmax: int, bucket: int, value: int, before: int
) -> Syns:
    total, events = _more(value, before)
    return Syns(listener, reason, qmax, bucket, events, total)


def _drops(listener: int, reason: str, value: int, before: int) -> Drops:
    return Drops(listener, reason, _more(value, before)[1])


def _established(listener: int, value: int, before: int) -> Established:
    return Established(listener, _more(value, before)[1])


def _measured(listener: int, bucket: int, value: int, before: int) -> Established:
    microseconds, events = _more(value, before)
    return Established(listener, events, bucket, microseconds * 1000)


def _accepts(listener: int, bucket: int | None, value: int, before: int) -> Accepts:
    microseconds, events = _more(value, before)
    return Accepts(listener, bucket, events, microseconds * 1000)


def _resent(listener: int, value: int, before: int) -> Resent:
    return Resent(listener, _more(value, before)[1])


def _refused(port: int | None, value: int, before: int) -> Refused:
    return Refused(port, _growth(value, before))


def _unix_refused(cookie: int, name: bytes, value: int, before: int) -> UnixRefused:
    return UnixRefused(cookie, name, _growth(value, before))


def _unattributed(value: int, before: int) -> Unattributed:
    return Unattributed(_growth(value, before))


def _nothing(_: int, __: int) -> None:
    return None


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
    # Only an address has dots or colons. On Linux it comes after more numbers.
    if "." in words[4] or ":" in words[4]:
        return _told(words, value)
    numbers = [_number(word) for word in (*words[2:6], *words[7:], value)]
    time, state, place, cookie, port, q0, q, qmax = numbers
    identity = _number(words[1], base=16)
    address = _address(words[6])
    listening = state == _LISTEN
    socket = _linux_socket(identity)
    return Listening(
        identity, socket, time, listening, str(place), cookie, address, port, q0, q, qmax
    )


def _told(words: list[str], value: str) -> Listening:
    time, port, q, qmax, syn, *q0max = [
        _number(word) for word in (words[2], words[5], *words[7:], value)
    ]
    q0 = None if words[6] == _NO_Q0 else _number(words[6])
    identity = _number(words[1], base=16)
    address = _address(words[4])
    return Listening(
        identity,
        _socket(identity),
        time,
        # Without Q0 (FreeBSD) the limit may be 0, and a closed socket has a row of its own.
        qmax > 0 or q0 is None,
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


def _linux_socket(identity: int) -> int:
    """Return the address in an ID of linux.d.

    With five levels of page tables an address of the kernel has 57 bits (Linux,
    Documentation/arch/x86/x86_64/5level-paging.rst); the others are set. A struct sock begins at a
    cache line (net/core/sock.c, proto_register()), so 6 bits are 0.
    """
    return identity >> 13 << 6 | 0x7F << 57


def _socket(identity: int) -> int:
    """Return the address in an ID. Its 16 highest bits are copies of the next one."""
    address = identity >> 16
    return address | 0xFFFF << 48 if address >> 47 else address


def _found(words: list[str], value: str) -> Found | None:
    listener, events = _number(words[1], base=16), _number(value)
    # Segments that came to a listener and are not SYNs.
    if words[2] == "-1":
        return None
    q = _number(words[2])
    return Found(listener, q, events) if _is_told(listener) else None


def _dropped(words: list[str], value: str) -> Drops | None:
    listener, reason, events = _number(words[1], base=16), _number(words[2]), _number(value)
    if reason not in _DROPS:
        raise RowError(f"unknown reason {reason}")
    return Drops(listener, _DROPS[reason], events) if _is_told(listener) else None


def _evicted(words: list[str], value: str) -> Evicted:
    return Evicted(_place(words[1]), _address(words[2]), _number(words[3]), _number(value))


def _opened(words: list[str], value: str) -> Opened | None:
    listener, events = _number(words[1], base=16), _number(value)
    return Opened(listener, events) if _is_told(listener) else None


def _is_told(listener: int) -> bool:
    """Return whether a program for Sun's engine has printed a listener with this ID.

    Number 0 is a listener of another port, one that has stopped listening, or a SYN that the next
    row of the listener counts.
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


def _requested(words: list[str], value: str) -> Limit:
    requested = _number(value, signed=True)
    if not -_INT - 1 <= requested <= _INT:
        raise RowError(f"not a backlog: {requested}")
    return Limit(*_limit(words[:3], words[3])[:3], requested)


def _closed(words: list[str], value: str) -> Closed:
    return Closed(_number(words[1], base=16), _number(value))


def _accepted(line: str) -> Accepted:
    kind, *words = line.split(" ", 3)
    # The name is the last, and may have spaces.
    if len(words) < 3:
        raise RowError("not a row")
    return Accepted(_number(words[0], base=16), _number(words[1]), kind, _name(words[2]))


def _name(word: str) -> str:
    def unescaped(found: re.Match[str]) -> str:
        escape = found[1]
        return chr(_BYTES[escape] if len(escape) == 1 else int(escape, 8))

    # What comes behind its end is not it.
    text = _ESCAPED.sub(unescaped, word).partition("\0")[0]
    if not text or len(text) > _NAME_LENGTH:
        raise RowError(f"not a name, or one that was cut: {word[:64]!r}")
    return text.encode("latin-1", "replace").decode(errors="replace")


_ROWS: dict[tuple[str, int], Callable[[list[str], str], Record | None]] = {
    ("ready", 2): _ready,
    ("tick", 1): _tick,
    ("listener", 10): _listening,
    ("listener", 9): _told,
    ("limit", 3): _limit,
    ("limit", 4): _requested,
    ("closed", 2): _closed,
    ("syn", 3): _found,
    ("drop", 3): _dropped,
    ("evicted", 4): _evicted,
    ("opened", 2): _opened,
    ("established", 2): _put,
    ("left", 3): _left,
}
"""Readers of the rows that are not cumulative, by name and number of words before the last."""


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


def _bytes(word: str, size: int) -> bytes:
    """Return bytes that are written in hexadecimal."""
    if len(word) != 2 * size or not _HEX.fullmatch(word):
        raise RowError(f"not {size} bytes: {word[:24]!r}")
    return bytes.fromhex(word)


def _port(word: str) -> int:
    port = _number(word)
    if port > _MOST_PORT:
        raise RowError(f"not a port: {port}")
    return port


@lru_cache(maxsize=4096)
def _address(text: str) -> str:
    """Return an address as labels have it: a mapped one as IPv4, ``*`` for the wildcard."""
    if len(text) > _ADDRESS_LENGTH or "%" in text:
        raise RowError(f"not an address: {text[:48]!r}")
    try:
        address = ip_address(text)
    except ValueError:
        raise RowError(f"not an address: {text[:48]!r}") from None
    address = getattr(address, "ipv4_mapped", None) or address
    return "*" if address.is_unspecified else str(address)
