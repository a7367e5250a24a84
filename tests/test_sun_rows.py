"""A program's lines are read exactly, and nothing else is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter.listeners import SYN_BUCKETS, WAIT_BUCKETS
from dtrace_exporter.rows import Ready, RowError
from dtrace_exporter.sun_rows import (
    TERMS,
    Calm,
    Outcome,
    Place,
    Row,
    Tick,
    What,
    bucket,
    is_known,
    parse,
    queues,
)

U64 = (1 << 64) - 1
ROW = "row 1 ffff888101234567 f000000000160090 0 ffff7f000001 48000000080 7 4096 120259084293"
FIELDS = ROW.split()


def with_field(number: int, value: str) -> str:
    """Return ROW with one of its fields replaced."""
    return " ".join([*FIELDS[:number], value, *FIELDS[number + 1 :]])


def test_ready() -> None:
    """The ready row tells the version of the rows and the home place, a number or a zone's name."""
    assert parse("ready 1 4026531840") == Ready(1, "4026531840")
    assert parse("ready 1 global") == Ready(1, "global")


def test_place() -> None:
    """A place row tells what a place is called."""
    assert parse("place 3 web-1.example") == Place("3", "web-1.example")


def test_tick() -> None:
    """The heartbeat tells its generation and the time."""
    assert parse("tick 0 1700000000123456789") == Tick(0, 1700000000123456789)


def test_row() -> None:
    """Every field of a row is where it belongs."""
    assert parse(ROW) == Row(
        parity=1,
        socket=0xFFFF888101234567,
        place="4026531840",
        port=22,
        address="127.0.0.1",
        qmax=128,
        q0max=1152,
        what=What.ACCEPT,
        events=7,
        total=4096,
        last=120259084293,
    )


def test_close_without_an_identity() -> None:
    """A socket that closes may have given its port and address back: they are read as they are."""
    row = parse("row 0 ffff888101234567 f000000000000084 0 0 80 1 0 17179869183")
    assert isinstance(row, Row)
    assert (row.socket, row.port, row.address) == (0xFFFF888101234567, 0, "*")
    assert (row.what, row.events, row.total) == (What.CLOSED, 1, 0)


@pytest.mark.parametrize(
    ("high", "low", "address"),
    [
        ("0", "0", "*"),
        ("0", "ffff00000000", "*"),
        ("0", "ffff7f000001", "127.0.0.1"),
        ("0", "ffffffffffff", "255.255.255.255"),
        ("0", "1", "::1"),
        ("0", "fffe7f000001", "::fffe:7f00:1"),
        ("20010db800000000", "16", "2001:db8::16"),
        ("ffffffffffffffff", "ffffffffffffffff", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    ],
)
def test_address(high: str, low: str, address: str) -> None:
    """The wildcard of either family is *, mapped IPv4 is IPv4, the rest is IPv6."""
    row = parse(with_field(4, high).replace(" ffff7f000001 ", f" {low} "))
    assert isinstance(row, Row)
    assert row.address == address


@pytest.mark.parametrize(
    ("field", "largest", "beyond"),
    [
        (1, "1", "2"),
        (2, f"{U64:x}", f"{U64 + 1:x}"),
        (3, f"ffffffffffff{What.CALM + TERMS - 1:x}", f"ffffffffffff{What.CALM + TERMS:x}"),
        (3, "ffffffffffff0000", "10000000000000000"),
        (4, f"{U64:x}", f"{U64 + 1:x}"),
        (5, f"{U64:x}", f"{U64 + 1:x}"),
        (6, f"{U64:x}", f"{U64 + 1:x}"),
        (7, str(U64), str(U64 + 1)),
        (8, str(U64), str(U64 + 1)),
        (9, str(U64), str(U64 + 1)),
    ],
)
def test_limits(field: int, largest: str, beyond: str) -> None:
    """The largest number that a field can hold is taken, the next one is not."""
    assert isinstance(parse(with_field(field, largest)), Row)
    for number in (beyond, "9" * 21, "9" * 100_000):
        with pytest.raises(RowError):
            parse(with_field(field, number))


@pytest.mark.parametrize("field", range(1, 10))
@pytest.mark.parametrize(
    "word", ["-1", "+1", "1_0", "1.0", "\u0661", "\u00b2", "zz", "1x1", "\x00", "1\x00", "'1'"]
)
def test_not_a_number(field: int, word: str) -> None:
    """Signs, underscores, digits of other scripts and such are no numbers."""
    with pytest.raises(RowError):
        parse(with_field(field, word))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "row",
        "tick",
        "ready",
        "ready 1",
        "ready 1 a b",
        "ready x global",
        f"ready {U64 + 1} global",
        "place",
        "place 3",
        "place 3 web 1",
        "placed 3 web",
        "tick 1",
        "tick 1 2 3",
        "tick -1 2",
        f"tick {U64 + 1} 1",
        f"tick 1 {U64 + 1}",
        "calm ffff",
        "calm ffff 1 1",
        "calm -1 1",
        f"calm {TERMS << 9:x} 1",
        f"calm ffff {U64 + 1}",
        "Row" + ROW[3:],
        ROW + " 0",
        ROW.rpartition(" ")[0],
        ROW.replace(" 48000000080 ", " "),
        "rowtick 1 2",
        ROW + ROW,
    ],
)
def test_not_a_row(line: str) -> None:
    """Lines cut short, run together or of another kind are errors."""
    with pytest.raises(RowError):
        parse(line)


@given(
    st.integers(0, TERMS - 1),
    st.integers(0, 511),
    st.integers(0, U64),
)
def test_calm(term: int, q: int, events: int) -> None:
    """A row of the short way is read back as a program packs it."""
    assert parse(f"calm {term << 9 | q:x} {events}") == Calm(term, q, events)


@pytest.mark.parametrize(
    ("q", "qmax", "tenths"),
    [(0, 8, 0), (1, 8, 2), (4, 8, 5), (8, 8, 10), (9, 8, 11), (99, 8, 11), (1, 0, 10), (1, 128, 1)],
)
def test_bucket(q: int, qmax: int, tenths: int) -> None:
    """A SYN counts to the tenth of Qmax that its Q does not exceed."""
    assert bucket(q, qmax) == tenths


def test_kinds_of_event() -> None:
    """Exactly the outcomes and buckets that exist are known, under the numbers programs print."""
    assert (What.SYN_Q_FULL, What.SYN_Q0_FULL, What.SYN_Q0_EVICTED) == (133, 134, 135)
    syns = {16 * outcome + bucket for outcome in Outcome for bucket in range(SYN_BUCKETS)}
    waits = {What.ACCEPT + bucket for bucket in range(WAIT_BUCKETS)}
    others = {*range(What.ESTABLISHED, What.SYN_Q0_EVICTED + 1), What.ACCEPT_UNTIMED}
    terms = {What.CALM + term for term in range(TERMS)}
    assert {what for what in range(1 << 16) if is_known(what)} == syns | waits | others | terms


@pytest.mark.parametrize("what", [what for what in range(256) if not is_known(what)])
def test_unknown_event(what: int) -> None:
    """A row of an unknown kind of event is an error."""
    with pytest.raises(RowError, match=f"unknown event {what}"):
        parse(with_field(3, f"f000000000160{what:03x}"))


@pytest.mark.parametrize(
    ("last", "unpacked"),
    [
        (0, (0, 0, 0)),
        (5 << 34 | 3 << 17 | 4, (5, 3, 4)),
        (1 << 34 | 0x1FFFE << 17 | 0x1FFFE, (1, 0x1FFFE, 0x1FFFE)),
        (1 << 34 | 0x1FFFF << 17 | 4, (1, None, 4)),
        (1 << 34 | 3 << 17 | 0x1FFFF, (1, 3, None)),
        (7 << 34 | 0x3FFFFFFFF, (7, None, None)),
        (U64, ((1 << 30) - 1, None, None)),
    ],
)
def test_queues(last: int, unpacked: tuple[int, int | None, int | None]) -> None:
    """A LAST field holds when, Q0 and Q; a full field is not a length."""
    assert queues(last) == unpacked


u64 = st.integers(0, U64)
u32 = st.integers(0, (1 << 32) - 1)


@given(
    st.tuples(st.integers(0, 1), u64, u32, st.integers(0, 65535)),
    st.tuples(u64, u64, u32, u32),
    st.tuples(st.sampled_from([what for what in range(512) if is_known(what)]), u64, u64, u64),
)
def test_all_rows(
    start: tuple[int, int, int, int],
    middle: tuple[int, int, int, int],
    end: tuple[int, int, int, int],
) -> None:
    """Whatever row a program can print is read back as it is."""
    parity, socket, place, port = start
    high, low, qmax, q0max = middle
    what, events, total, last = end
    who, limits = place << 32 | port << 16 | what, q0max << 32 | qmax
    row = parse(
        f"row {parity} {socket:x} {who:x} {high:x} {low:x} {limits:x} {events} {total} {last}"
    )
    assert isinstance(row, Row)
    assert (row.parity, row.socket, int(row.place), row.port) == start
    assert (row.what, row.events, row.total, row.last) == end
    assert (row.qmax, row.q0max) == middle[2:]


words = st.text(st.characters(), max_size=5) | st.sampled_from(
    [
        *FIELDS,
        "ready",
        "place",
        "tick",
        "-1",
        "0x",
        "\x1f",
        "\u2028",
        "1e9",
        str(U64),
        str(U64 + 1),
        "9" * 30,
    ]
)
lines = st.lists(words, max_size=11).map(" ".join) | st.builds(with_field, st.integers(0, 9), words)


@given(st.text(st.characters()) | lines)
def test_hostile_lines(line: str) -> None:
    """Any text either is a row, all of whose numbers are in range, or a RowError."""
    try:
        read = parse(line)
    except RowError:
        return
    if isinstance(read, Row):
        assert read.parity in (0, 1)
        assert 0 <= read.port <= 65535
        assert 0 <= read.qmax < 1 << 32
        assert 0 <= read.q0max < 1 << 32
        assert is_known(read.what)
        assert all(0 <= n <= U64 for n in (read.socket, read.events, read.total, read.last))
    else:
        assert all(0 <= n <= U64 for n in read if isinstance(n, int))


@given(st.integers(0, len(ROW) - 1))
def test_row_cut_short(size: int) -> None:
    """A row cut short is an error, but for one cut inside of its last number."""
    if size <= ROW.rindex(" ") + 1:
        with pytest.raises(RowError):
            parse(ROW[:size])
    else:
        assert isinstance(parse(ROW[:size]), Row)
