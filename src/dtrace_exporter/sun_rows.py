"""The rows that the programs for Solaris and illumos print, and how to read one.

They print these kinds of row, one to a line:

``ready VERSION HOME``
    Once, when every probe is enabled. HOME is the place (netns or zone) of the host itself. Behind
    an empty line, for what a far login shell has printed may lack its end.
``place PLACE NAME``
    What a place is called, where places have names. A row of one whose name has not come yet waits
    for the next tick.
``tick GENERATION TIME``
    The heartbeat, before the rows of one set; GENERATION says which use of that set they belong to.
    TIME in nanoseconds of a clock that nobody sets.
``row SET SOCKET WHO HIGH LOW LIMITS COUNT SUM LAST``
    What happened at one listening socket: COUNT events of one kind since the set was last emptied,
    SUM of their values, and LAST, the newest observation of the queues among them. WHO is 32 bits
    of place, 16 of port, 16 of the kind, WHAT; LIMITS are 32 bits of Q0max, 32 of Qmax.
``calm HOW COUNT``
    COUNT more SYNs of the short way, for which a program spares itself all but this, in one term:
    the time in which one listener has the short way, with one Qmax. HOW is the term, then 9 bits of
    the Q that they found. Which listener that is is told by a row with 256 plus the term as WHAT.

SET is the parity of the generation. HIGH and LOW are the two halves of the bound address in network
order, IPv4 as ::ffff:a.b.c.d. Q0max is 0 where Q0 has no limit of its own. COUNT, SUM and LAST are
decimal, and so are places elsewhere; all else that is packed is hexadecimal.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv6Address
from typing import NamedTuple

from dtrace_exporter.listeners import SYN_BUCKETS
from dtrace_exporter.rows import Ready, RowError

PROTOCOL = 3
"""Version of the row format, printed in the ready row."""

TERMS = 1 << 13
"""How many numbers there are for terms; after the last one comes 0 again."""

OLD_TERMS = 64
"""A term that lies so many before another one has nothing more to tell: programs throw away what
they counted in the terms so far after about half as many.
"""

_U64 = (1 << 64) - 1
_QUEUE_BITS = 17
_QUEUE_MASK = (1 << _QUEUE_BITS) - 1


class What(IntEnum):
    """Kinds of event. A SYN's outcome is added to SYN times 16, a bucket to SYN and ACCEPT.

    A term is added to CALM, an observation of the listener whose SYNs may go the short way.

    A program that learns later what became of a SYN counts it as TAKEN first and then as SYN_*.
    """

    SYN = 0
    ESTABLISHED = 128
    ACK_Q_FULL = 129
    ACK_OTHER = 130
    OBSERVED = 131
    CLOSED = 132
    SYN_Q_FULL = 133
    SYN_Q0_FULL = 134
    SYN_Q0_EVICTED = 135
    ACCEPT = 144
    ACCEPT_UNTIMED = 158
    CALM = 256


class Outcome(IntEnum):
    """What became of a SYN."""

    TAKEN = 0
    Q_FULL = 1
    Q0_FULL = 2
    OTHER = 3


class Place(NamedTuple):
    """What a place is called."""

    place: str
    name: str


class Tick(NamedTuple):
    """Heartbeat; ``time`` in nanoseconds of the host's monotonic clock."""

    generation: int
    time: int


class Row(NamedTuple):
    """Events of one kind at one listening socket; see the module's text for the fields."""

    parity: int
    socket: int
    place: str
    port: int
    address: str
    qmax: int
    q0max: int
    what: int
    events: int
    total: int
    last: int


class Calm(NamedTuple):
    """SYNs that went the short way; see the module's text for the fields."""

    term: int
    q: int
    events: int


def parse(line: str) -> Ready | Place | Tick | Row | Calm:
    """Read one line of a program's output.

    Args:
        line: the line without its end.

    Raises:
        RowError: it is no row, or a number in it is out of its field's range.
    """
    words = line.split()
    try:
        if len(words) == 10 and words[0] == "row":
            return _row(words)
        if len(words) == 3 and words[0] == "calm":
            return _calm(words)
        if len(words) == 3 and words[0] == "tick":
            return Tick(_number(words[1]), _number(words[2]))
        if len(words) == 3 and words[0] == "place":
            return Place(words[1], words[2])
        if len(words) == 3 and words[0] == "ready":
            return Ready(_number(words[1]), words[2])
    except ValueError as error:
        raise RowError(str(error)) from None
    raise RowError("not a row")


def queues(last: int) -> tuple[int, int | None, int | None]:
    """Unpack a LAST field.

    Returns:
        When, in units that only order observations of one generation; Q0; Q. A queue longer than
        the field can hold is None.
    """
    q0 = (last >> _QUEUE_BITS) & _QUEUE_MASK
    q = last & _QUEUE_MASK
    when = last >> (2 * _QUEUE_BITS)
    return when, q0 if q0 < _QUEUE_MASK else None, q if q < _QUEUE_MASK else None


def is_known(what: int) -> bool:
    """Tell whether a WHAT field is one this exporter knows."""
    if what < What.ESTABLISHED:
        return what >> 4 <= Outcome.OTHER and what & 15 < SYN_BUCKETS
    if what <= What.SYN_Q0_EVICTED or What.ACCEPT <= what <= What.ACCEPT_UNTIMED:
        return True
    return What.CALM <= what < What.CALM + TERMS


def bucket(q: int, qmax: int) -> int:
    """Return the bucket of Q/Qmax that a SYN belongs to: tenths, rounded up; 11 for more than 1."""
    qmax = max(qmax, 1)
    return min((10 * q + qmax - 1) // qmax, SYN_BUCKETS - 1)


def _row(words: list[str]) -> Row:
    who = _number(words[3], _U64, 16)
    limits = _number(words[6], _U64, 16)
    row = Row(
        parity=_number(words[1], 1),
        socket=_number(words[2], _U64, 16),
        place=str(who >> 32),
        port=who >> 16 & 0xFFFF,
        address=_address(_number(words[4], _U64, 16), _number(words[5], _U64, 16)),
        qmax=limits & 0xFFFFFFFF,
        q0max=limits >> 32,
        what=who & 0xFFFF,
        events=_number(words[7]),
        total=_number(words[8]),
        last=_number(words[9]),
    )
    if not is_known(row.what):
        raise RowError(f"unknown event {row.what}")
    return row


def _calm(words: list[str]) -> Calm:
    how = _number(words[1], (TERMS << 9) - 1, 16)
    return Calm(term=how >> 9, q=how & 0x1FF, events=_number(words[2]))


def _number(word: str, limit: int = _U64, base: int = 10) -> int:
    # int() also takes signs, underscores and digits of other scripts, which no program prints.
    if not (word.isascii() and word.isalnum()) or len(word) > 20:
        raise RowError(f"not a number: {word[:24]!r}")
    value = int(word, base)
    if value > limit:
        raise RowError(f"number out of range: {word}")
    return value


@lru_cache(maxsize=4096)
def _address(high: int, low: int) -> str:
    mapped = high == 0 and low >> 32 == 0xFFFF
    if (high == 0 and low == 0) or (mapped and not low & 0xFFFFFFFF):
        return "*"
    address = IPv6Address(high << 64 | low)
    return str(address.ipv4_mapped) if mapped else str(address)
