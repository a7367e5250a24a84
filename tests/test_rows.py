"""Rows are read exactly, and each count once; any other line is an error."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from itertools import count as count_up
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter.listeners import SYN_BUCKETS, WAIT_BUCKETS
from dtrace_exporter.tracing.lines import LineSplitter
from dtrace_exporter.tracing.program import load
from dtrace_exporter.tracing.rows import (
    PROTOCOL,
    Accepted,
    Accepts,
    Closed,
    Drops,
    Established,
    Evicted,
    Found,
    Left,
    Limit,
    Listening,
    Opened,
    Queue,
    Reader,
    Ready,
    Record,
    RowError,
    Syns,
    Tick,
)
from sun.output import escaped

U64 = (1 << 64) - 1
PAIR = 10_000_000
LISTENER = "listener ffc56d7937f44003 604107924061158 10 4026531840 7 ::ffff:127.0.0.1 8080 3 2 128"
ZONE = "listener ffffff0102000007 604107924061158 db-1.x 2001:db8:0:0:0:0:0:1 8080 3 2 128 0 1152"
ID = 0xFF0102000007
HEADS = {name: load(name).text.partition("*/")[0] for name in ("linux", "linux_calls")}


def read(*lines: str) -> list[Record]:
    """Return the records that a new reader makes of some lines, without those that give none."""
    reader = Reader()
    return [record for line in lines if (record := reader.read(line)) is not None]


def count(what: int, number: int, *, qmax: int = 0, part: int = 0, id_: str = "a") -> str:
    """Return a row of counts."""
    return f"count {id_} {what} {qmax} {part} {number}"


# Each kind


def test_ready() -> None:
    """The ready row gives the version of the rows and the host's own place."""
    assert read("ready 5 4026531840") == [Ready(5, "4026531840")]


def test_tick() -> None:
    """The heartbeat gives the time."""
    assert read("tick 604108327768568") == [Tick(604108327768568)]


def test_listening() -> None:
    """Each field of a listener's row is read correctly, and the socket is an address."""
    assert read(LISTENER) == [
        Listening(
            id=0xFFC56D7937F44003,
            socket=0xFFFF8ADAF26FE880,
            time=604107924061158,
            open=True,
            place="4026531840",
            cookie=7,
            address="127.0.0.1",
            port=8080,
            q0=3,
            q=2,
            qmax=128,
        )
    ]
    (closing,) = read(LISTENER.replace(" 10 ", " 7 "))
    assert isinstance(closing, Listening)
    assert not closing.open
    # With five levels of page tables.
    (far,) = read(LISTENER.replace("ffc56d7937f44003", "88800091a2b3c003"))
    assert isinstance(far, Listening)
    assert far.socket == 0xFF11000123456780


def test_calls() -> None:
    """The rows of linux_calls.d are limits and closed sockets, each with its time."""
    rows = (
        "limit ffff8adaf26fe880 604107924061158 11",
        "limit ffff8adaf26fe880 604107924061159 4096 65535",
        "limit ffff8adaf26fe880 604107924061160 4096 -1",
        "closed ffff8adaf26fe880 604107924061161",
    )
    assert read(*rows) == [
        Limit(0xFFFF8ADAF26FE880, 604107924061158, 11, None),
        Limit(0xFFFF8ADAF26FE880, 604107924061159, 4096, 65535),
        Limit(0xFFFF8ADAF26FE880, 604107924061160, 4096, -1),
        Closed(0xFFFF8ADAF26FE880, 604107924061161),
    ]


def test_acceptors() -> None:
    """The rows of Sun's calls programs give who accepts, without trailing zero bytes."""
    rows = (
        r"program ffffff01d3b2ac80 5 sshd\0\0\0",
        r"program ffffff01d3b2ac80 6 my sshd \0",
        r"fmri ffffff01d3b2ac80 7 svc:/network/ssh:default",
        r"program 1 8 a\n\\0\"\t\303\251\377\001b\0\0",
        "program 1 9 \\8\\",
    )
    assert read(*rows) == [
        Accepted(0xFFFFFF01D3B2AC80, 5, "program", "sshd"),
        Accepted(0xFFFFFF01D3B2AC80, 6, "program", "my sshd "),
        Accepted(0xFFFFFF01D3B2AC80, 7, "fmri", "svc:/network/ssh:default"),
        Accepted(1, 8, "program", 'a\n\\0"\t\xe9\ufffd\x01b'),
        Accepted(1, 9, "program", "\\8\\"),
    ]


@given(st.binary(min_size=1, max_size=127).filter(lambda name: 0 not in name))
def test_any_name(name: bytes) -> None:
    """A name of any bytes survives its escapes, and its row is one printable line."""
    row = f"fmri 1 2 {escaped(name, 128)}"
    assert row.isascii()
    assert row.isprintable()
    assert read(row) == [Accepted(1, 2, "fmri", name.decode(errors="replace"))]


@pytest.mark.parametrize(
    "line",
    [
        *("program", "program 1", "program 1 2", "program 1 2 ", r"fmri 1 2 \0\0", "fmri g 2 a"),
        *("fmri 1 x a", f"program {1 << 64:x} 2 a", f"program 1 {1 << 64} a", "owner 1 2 a"),
        "fmri 1 2 " + 128 * "x",
    ],
)
def test_nobody_accepts(line: str) -> None:
    """An acceptor's row without a name, with an impossible number or cut short is an error."""
    with pytest.raises(RowError):
        read(line)


@pytest.mark.parametrize("part", range(SYN_BUCKETS))
@pytest.mark.parametrize(
    ("what", "reason"), [(10, None), (11, "q_full"), (12, "q0_full"), (13, "other")]
)
def test_syns(what: int, reason: str | None, part: int) -> None:
    """A row of SYNs gives their outcome, their bucket, their number and the sum of their Q."""
    assert read("set 5", count(what, 12 * PAIR + 4, qmax=8, part=part)) == [
        Syns(0xA, reason, 8, part, 4, 12)
    ]


@pytest.mark.parametrize(("what", "reason"), [(21, "q_full_ack"), (23, "other")])
def test_drops(what: int, reason: str) -> None:
    """A row of dropped final ACKs gives the reason."""
    assert read("set 5", count(what, 3)) == [Drops(0xA, reason, 3)]


def test_established() -> None:
    """A row of connections put into Q gives their number."""
    assert read("set 5", count(30, 3)) == [Established(0xA, 3)]


@pytest.mark.parametrize("part", range(WAIT_BUCKETS + 1))
def test_accepts(part: int) -> None:
    """A row of accepts has a bucket, and a time in microseconds; without a wait, no bucket."""
    bucket = part if part < WAIT_BUCKETS else None
    assert read("set 5", count(40, 9 * PAIR + 2, part=part)) == [Accepts(0xA, bucket, 2, 9000)]


def test_queues() -> None:
    """The newest length of a queue has its own time, counted from the start of its set."""
    assert read("set 500", f"q a 8 {70 * PAIR + 6}", f"q0 a {71 * PAIR + 5}") == [
        Queue(0xA, 570, q=6, qmax=8),
        Queue(0xA, 571, q0=5),
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("0.0.0.0", "*"),
        ("::", "*"),
        ("::ffff:0.0.0.0", "*"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8::16", "2001:db8::16"),
        ("2001:DB8:0:0::16", "2001:db8::16"),
    ],
)
def test_address(text: str, shown: str) -> None:
    """The wildcard of either family is *, mapped IPv4 is IPv4, and others are in the usual form."""
    (record,) = read(LISTENER.replace("::ffff:127.0.0.1", text))
    assert isinstance(record, Listening)
    assert record.address == shown


@pytest.mark.parametrize("name", HEADS)
def test_every_row_of_a_program_is_read(name: str) -> None:
    """Each line that a program prints is a row, and the program's head describes each kind."""
    clauses = load(name).text.partition("#pragma")[2]
    formats = re.findall(r'\bprint[af]\("([^"]*)\\n"', clauses)
    formats = [text.strip("\\n") for text in formats]
    lines = [line for text in formats for line in text.split("\\n")]
    numbers = (str(number) for number in count_up(10))
    samples = [
        re.sub(r"%@?[dx]", "10", line.replace("set %d", f"set {next(numbers)}")).replace(
            "%s", "::1"
        )
        for line in lines
    ]
    records = read(*samples)
    kinds = {sample.split()[0] for sample in samples}
    heads = set(re.findall(r"^ \* (?:A )?(\w+) [A-Z][A-Z+0-9, ]", HEADS[name], re.MULTILINE))
    heads |= set(re.findall(r", (\w+) [A-Z][\w+ ]+:", HEADS[name]))
    assert kinds - {"ready", "set"} <= heads
    assert len(records) == len([sample for sample in samples if not sample.startswith("set ")])


# Rows with zones


def test_told() -> None:
    """Each field of a zone's listener row is read correctly, and ``told`` is true."""
    assert read(ZONE) == [
        Listening(
            id=0xFFFFFF0102000007,
            socket=0xFFFFFFFFFF010200,
            time=604107924061158,
            open=True,
            place="db-1.x",
            cookie=0,
            address="2001:db8::1",
            port=8080,
            q0=3,
            q=2,
            qmax=128,
            q0max=1152,
            told=True,
        )
    ]


@pytest.mark.parametrize("syn", [0, 1])
def test_told_without_parts(syn: int) -> None:
    """If the program cannot give Q0's limit or the zone, they are None and an empty string."""
    (record,) = read(f"listener a0007 1  192.0.2.1 80 0 0 8 {syn}")
    assert isinstance(record, Listening)
    assert (record.place, record.q0max, record.syn, record.socket) == ("", None, bool(syn), 10)


@pytest.mark.parametrize("zone", ["global", "a", "Z9", "a_b-c.d", "z" * 63])
def test_zones(zone: str) -> None:
    """A zone's name may have the characters that zonecfg(8) allows."""
    (record,) = read(ZONE.replace("db-1.x", zone))
    assert isinstance(record, Listening)
    assert record.place == zone


@pytest.mark.parametrize(
    "zone",
    [
        "a/b",
        "a b",
        "a\tb",
        "a:b",
        "a{",
        'a"b',
        "a\\b",
        "a\n",
        "\x1b[2J",
        "\u00e4",
        "%s",
        "z" * 64,
        "*",
    ],
)
def test_no_zones(zone: str) -> None:
    """Any other name is refused, because it would become a label."""
    with pytest.raises(RowError):
        read(ZONE.replace("db-1.x", zone))


@pytest.mark.parametrize(
    ("identity", "socket"),
    [
        ("ffffff0102000007", 0xFFFFFFFFFF010200),
        ("800000000000ffff", 0xFFFF800000000000),
        ("7fffffffffff0001", 0x7FFFFFFFFFFF),
        ("3000ab120001", 0x3000AB12),
    ],
)
def test_address_in_an_id(identity: str, socket: int) -> None:
    """A kernel's address is restored from its 48 bits by extending the highest of them."""
    (record,) = read(ZONE.replace("ffffff0102000007", identity))
    assert isinstance(record, Listening)
    assert record.socket == socket


def test_counts() -> None:
    """A count with zones gives only what is new, at a listener that has a row."""
    assert read(
        *("syn ff0102000007 3 5", "drop ff0102000007 1 4", "drop ff0102000007 2 3"),
        *("drop ff0102000007 3 2", "opened ff0102000007 6", "established ff0102000007 7"),
    ) == [
        Found(ID, 3, 5),
        *(Drops(ID, "q_full", 4), Drops(ID, "q0_full", 3), Drops(ID, "q0_evicted", 2)),
        *(Opened(ID, 6), Established(ID, 7)),
    ]


def test_evicted() -> None:
    """Evictions from a cache of many listeners have a place, an address and a port."""
    assert read("evicted 0 :: 80 3", "evicted web 192.0.2.1 81 4", "evicted  0.0.0.0 82 5") == [
        Evicted("0", "*", 80, 3),
        Evicted("web", "192.0.2.1", 81, 4),
        Evicted("", "*", 82, 5),
    ]


def test_counts_are_told_each_time() -> None:
    """Two equal rows are two counts, in any of Linux' sets."""
    rows = ["syn ff0102000007 3 5"] * 2
    assert read(*rows, "set 5", *rows) == [Found(ID, 3, 5)] * 4


def test_segments_that_are_no_syns() -> None:
    """A segment without a SYN that reaches a listener is not counted."""
    assert read("syn ff0102000007 -1 5", "syn ff0102000007 3 5") == [Found(ID, 3, 5)]


@pytest.mark.parametrize("row", ["syn {} 3 5", "drop {} 1 4", "opened {} 6"])
@pytest.mark.parametrize("id_", ["0", "ff0102000000"])
def test_counts_of_nobody(row: str, id_: str) -> None:
    """Counts at number 0 are ignored, because no listener has that number."""
    assert read(row.format(id_)) == []


@pytest.mark.parametrize("how", range(WAIT_BUCKETS + 1))
def test_left_by_accept(how: int) -> None:
    """An accept has a bucket, and a time in microseconds; without a wait, no bucket."""
    bucket = how if how < WAIT_BUCKETS else None
    assert read(f"left ff0102000007 {how} {9 * PAIR + 2}") == [Accepts(ID, bucket, 2, 9000)]


def test_left_otherwise() -> None:
    """A connection that leaves Q or Q0 in another way is not an accept."""
    assert read("left ff0102000007 15 3", "left ff0102000007 16 2") == [
        Left(ID, half_open=False, events=3),
        Left(ID, half_open=True, events=2),
    ]


@pytest.mark.parametrize(
    "line",
    [
        ZONE + " 1",
        ZONE.rpartition(" ")[0].rpartition(" ")[0],
        ZONE.replace(" 0 1152", " -1 1152"),
        ZONE.replace("8080", "-8080"),
        ZONE.replace(":1 ", ":g "),
        ZONE.replace("2001:db8:0:0:0:0:0:1", "2001"),
        *("syn a0001 1", "syn a0001 1 2 3", "syn a0001 -2 2", "syn a0001 1 -2", "syn g 1 2"),
        *("drop a0001 0 1", "drop a0001 6 1", "drop a0001 1", "drop a0001 1 x", "drop 0 9 1"),
        *("evicted 0 :: 80", "evicted 0 :: x 1", "evicted 0 x 80 1", "evicted a/b :: 80 1"),
        *("opened a0001", "opened a0001 1 2", "opened a0001 -1", "opened x 1"),
        *("established a0001", "established a0001 -1", f"established a0001 {U64 + 1}"),
        *("left a0001 17 1", "left a0001 15 -1", "left a0001 15", "left a0001 -1 1"),
        *("place 3 web", "tick 0 1", "calm 1 2", "syn", "left", "opened", "established", "drop"),
    ],
)
def test_not_a_row_of_zones(line: str) -> None:
    """Rows that are cut short, of an unknown kind or with an impossible number are errors."""
    reader = Reader()
    for before in ("", "set 5"):
        if before:
            reader.read(before)
        with pytest.raises(RowError):
            reader.read(line)


@pytest.mark.parametrize("name", ["illumos", "solaris10", "freebsd"])
def test_heads_of_zones(name: str) -> None:
    """A program's head describes each kind of row that it prints, and it prints this version."""
    head, _, text = load(name).text.partition("*/")
    kinds = set(re.findall(r'"(?:\\n)?([a-z]+) [^"]*%@?d', text))
    is_freebsd = name == "freebsd"
    assert kinds == {
        *("listener", "syn", "drop", "established", "left", "closed", "tick"),
        *(("evicted", "limit") if is_freebsd else ("opened",)),
    }
    assert kinds == set(re.findall(r"^ \* (\w+) [A-Z]\w+[-A-Z0-9 +]*:", head, re.MULTILINE))
    assert f"ready {PROTOCOL} {'0' if is_freebsd else 'global'}" in text


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("illumos_calls", {"program", "fmri", "tick"}), ("solaris10_calls", {"program", "tick"})],
)
def test_heads_of_acceptors(name: str, kinds: set[str]) -> None:
    """The head of a calls program describes each kind of row too."""
    head, _, text = load(name).text.partition("*/")
    assert set(re.findall(r'"(?:\\n)?([a-z]+) [^"]*%@?d', text)) == kinds
    assert set(re.findall(r"^ \* (\w+) [A-Z][A-Z ]*:", head, re.MULTILINE)) == kinds
    assert f"ready {PROTOCOL} global" in text


# Changes since the last row


def test_only_what_is_new_is_told() -> None:
    """A row gives what is new since it was last read, and an unchanged row gives nothing."""
    rows = [count(30, number) for number in (3, 3, 5, 5, 9)]
    assert read("set 5", *rows) == [Established(0xA, n) for n in (3, 2, 4)]


def test_a_lost_row_is_made_up_for() -> None:
    """The next row contains what a lost row would have given."""
    rows = ["set 5", count(10, PAIR + 1), count(10, 2 * PAIR + 2), count(10, 9 * PAIR + 3)]
    told = [record for record in read(*rows) if isinstance(record, Syns)]
    less = [record for record in read(*rows[:2], rows[3]) if isinstance(record, Syns)]
    assert [sum(one.events for one in each) for each in (told, less)] == [3, 3]
    assert [sum(one.total for one in each) for each in (told, less)] == [9, 9]


def test_a_new_set_starts_from_nothing() -> None:
    """A set with a new start has been emptied, so all of it is new."""
    assert read("set 5", count(30, 3), "set 6", count(30, 3)) == [Established(0xA, 3)] * 2
    rows = ["set 5", count(30, 3), "set 6", count(30, 1), "set 5", count(30, 4)]
    assert read(*rows) == [Established(0xA, n) for n in (3, 1, 1)]


def test_sets_of_the_past_are_forgotten() -> None:
    """However long a program runs, the reader keeps only the sets in use."""
    reader = Reader()
    for began in range(1, 1000):
        for line in (f"set {began}", count(30, 3), f"set {began + 1}", count(30, 1)):
            reader.read(line)
    assert len(reader._sets) <= 4


def test_sets_take_turns() -> None:
    """Two sets take turns: one starts again from 0 while the other goes on."""
    reader = Reader()
    sets = {0: 10, 1: 11}
    counted, told = {0: 0, 1: 0}, 0
    for turn in range(40):
        used = turn // 2 % 2
        if turn % 2 == 0 and turn:
            # This set was emptied a turn ago, and starts again.
            sets[used], counted[used] = 100 + turn, 0
        for _ in range(3):
            counted[used] += 1
            for number in (0, 1):
                reader.read(f"set {sets[number]}")
                if counted[number]:
                    record = reader.read(count(30, counted[number]))
                    told += record.events if isinstance(record, Established) else 0
        other = 1 - used
        if turn % 2 == 1:
            counted[other] = 0
    assert told == 40 * 3


def test_rows_of_different_keys_are_counted_apart() -> None:
    """Rows that differ in listener, kind, Qmax or part are counted separately."""
    rows = [
        count(10, 1),
        count(10, 1, id_="b"),
        count(11, 1),
        count(10, 1, qmax=8),
        count(10, 1, part=3),
    ]
    assert len(read("set 5", *rows)) == len(rows)


def test_a_count_that_has_fallen() -> None:
    """A garbled count that is less than before is an error, and does not affect the next."""
    reader = Reader()
    for line in ("set 5", count(30, 7)):
        reader.read(line)
    with pytest.raises(RowError):
        reader.read(count(30, 6))
    assert reader.read(count(30, 9)) == Established(0xA, 2)


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**11)), min_size=1, max_size=30),
    st.integers(0, U64) | st.integers((1 << 63) - 10**12, 1 << 63) | st.integers(U64 - 10**12, U64),
)
def test_sums_of_two_numbers(steps: list[tuple[int, int]], start: int) -> None:
    """Events and values are separated in a sum of both, even if the sum overflows 64 bits."""
    reader = Reader()
    reader.read("set 5")
    sums = [start]
    for events, value in steps:
        sums.append(sums[-1] + value * PAIR + events)
    # DTrace prints a sum as a signed number.
    rows = [count(40, (number + (1 << 63)) % (1 << 64) - (1 << 63)) for number in sums]
    told = []
    key, _, first = rows[0].rpartition(" ")
    reader.read(f"{key} 0")
    reader._told[key] = reader._told[key]._replace(text=first, value=int(first))
    for line in rows[1:]:
        record = reader.read(line)
        told.append((0, 0) if record is None else (record.events, record.nanoseconds // 1000))  # type: ignore[union-attr]
    assert told == steps


# Lines that are not rows


@pytest.mark.parametrize(
    "line",
    [
        "",
        "ready",
        "ready 5",
        "ready 5 1 2",
        "ready x 1",
        "tick",
        "tick 1 2",
        "tick -1",
        "tick x",
        f"tick {U64 + 1}",
        "set",
        "set x",
        "set 1 2",
        "listener",
        LISTENER + " 1",
        LISTENER.rpartition(" ")[0],
        LISTENER.replace("8080", "0x50"),
        LISTENER.replace("::ffff:127.0.0.1", "127.0.0.1.1"),
        LISTENER.replace("::ffff:127.0.0.1", ""),
        "limit ffff 1",
        "limit ffff 1 2 2147483648",
        "limit ffff 1 2 -2147483649",
        "limit ffff 1 2 3 4",
        "limit xyz 1 2",
        "closed ffff",
        "closed ffff 1 2",
        "Tick 1",
        " tick 1",
        "tick 1 ",
        "row 0 1 1 0 0 8 5 0 0",
        "refused 80 1",
    ],
)
def test_not_a_row(line: str) -> None:
    """Lines that are cut short, run together or of another kind are errors."""
    with pytest.raises(RowError):
        Reader().read(line)


@pytest.mark.parametrize(
    "line",
    [
        "count a 10 8 3",
        "count a 10 8 3 4 5",
        "count a 9 8 3 4",
        "count a 20 8 3 4",
        "count a 22 8 3 4",
        "count a 32 8 3 4",
        f"count a 31 0 {WAIT_BUCKETS} 4",
        "count a 51 0 0 4",
        f"count a 10 8 {SYN_BUCKETS} 4",
        f"count a 40 0 {WAIT_BUCKETS + 1} 4",
        "count a 10 8 -1 4",
        "count a 10 -8 1 4",
        "count xyz 10 8 1 4",
        "count a 10 8 1 4.0",
        "q a 8",
        "q a 8 9 9",
        "q0 a 8 9",
        "q0 a",
        "refused 65536 1",
        "refused others 1",
        "refused 80 1 2",
        "refused 1",
    ],
)
def test_not_a_row_of_a_set(line: str) -> None:
    """Rows of counts with an unknown kind or part are errors."""
    reader = Reader()
    reader.read("set 5")
    with pytest.raises(RowError):
        reader.read(line)


@pytest.mark.parametrize("line", [count(10, 1), "q a 8 9", "q0 a 9"])
def test_a_row_of_no_set(line: str) -> None:
    """A row of counts before the first set is an error, because its start is not known."""
    with pytest.raises(RowError):
        Reader().read(line)


@pytest.mark.parametrize(
    "word",
    ["+1", "1_0", "1.0", "\u0661", "\u00b2", "zz", "1x1", "\x00", "'1'", "9" * 21, "9" * 100_000],
)
@pytest.mark.parametrize(
    "row",
    [
        *(LISTENER, count(10, 1), "limit f 1 2", "closed f 1", "q a 8 9"),
        *("syn a0001 1 2", "drop a0001 1 2", "opened a0001 1", "established a0001 1"),
        "left a0001 15 1",
    ],
)
def test_not_a_number(row: str, word: str) -> None:
    """Signs, underscores, digits of other scripts and the like are not numbers, in any field."""
    words = row.split()
    for field in range(1, len(words)):
        reader = Reader()
        reader.read("set 5")
        with pytest.raises(RowError):
            reader.read(" ".join([*words[:field], word, *words[field + 1 :]]))


words = st.text(st.characters(), max_size=5) | st.sampled_from(
    [
        *LISTENER.split(),
        *ZONE.split(),
        *("syn", "drop", "opened", "established", "left", "15", "16", "17", "a/b", "z" * 64),
        *count(10, 1).split(),
        *("ready", "tick", "set", "q", "q0", "limit", "closed", "-1", "0x", "--1", "\x1f"),
        *("\u2028", "1e9", str(U64), str(U64 + 1), "9" * 30, "40", "21", "11"),
    ]
)
valid = st.builds(
    lambda name, numbers: " ".join([name, *map(str, numbers)]),
    st.sampled_from(
        [
            *("set", "tick", "count", "q", "q0", "limit", "closed"),
            *("syn", "drop", "opened", "established", "left", "listener", "evicted"),
            "refused",
        ]
    ),
    st.lists(st.integers(-5, 45) | st.integers(-U64, U64), min_size=1, max_size=5),
)
told = st.builds(
    lambda zone, address, numbers: " ".join(
        ["listener", *map(str, numbers[:2]), zone, address, *map(str, numbers[2:])]
    ),
    st.text(max_size=5) | st.sampled_from(["global", "db-1"]),
    st.sampled_from(["::1", "192.0.2.1", "1:2:3:4:5:6:7:8", "1.2", ":", "fe80::1%eth0"]),
    st.lists(st.integers(-1, 9) | st.integers(-U64, 2 * U64), min_size=6, max_size=9),
)
lines = st.text(st.characters()) | st.lists(words, max_size=12).map(" ".join) | valid | told


def in_range(record: Record) -> bool:
    """Tell whether the kernel can have all numbers of a record."""
    # A backlog, the last number of its row, may be negative.
    numbers = record[:-1] if isinstance(record, Limit) else record
    counts = [n for n in numbers if isinstance(n, int)]
    time = isinstance(record, Queue | Accepts)
    return all(0 <= n <= U64 or time for n in counts)


@given(st.lists(lines, max_size=30))
def test_hostile_lines(several: list[str]) -> None:
    """Any text is a row whose numbers are all in range, or a RowError."""
    reader = Reader()
    for line in several:
        try:
            record = reader.read(line)
        except RowError:
            continue
        assert record is None or in_range(record)


@given(st.binary(max_size=200))
def test_hostile_bytes(data: bytes) -> None:
    """Any bytes give rows or a RowError, and no other error."""
    reader = Reader()
    splitter = LineSplitter()
    for line in ["set 5", *splitter.feed(data), *splitter.end()]:
        with suppress(RowError):
            reader.read(line)


@given(told)
def test_hostile_zones(line: str) -> None:
    """A line that is read as a listener has a zone and an address that are fit for labels."""
    with suppress(RowError):
        record = Reader().read(line)
        assert isinstance(record, Listening)
        assert re.fullmatch(r"[A-Za-z0-9_.-]{0,63}", record.place)
        assert re.fullmatch(r"[0-9a-f.:%eth]+|\*", record.address)
        assert in_range(record)


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=20, unique=True))
def test_sets_in_any_order(began: list[int]) -> None:
    """Sets that start in an impossible order do no harm."""
    reader = Reader()
    for number, (first, second) in enumerate(pairwise(began), 1):
        for line in (f"set {first}", f"set {second}", count(30, number), f"set {first}"):
            assert isinstance(reader.read(line), Established | None)
        assert reader.read(count(31 - 1, 1000 + number)) is not None


def steps_of(lines: list[str]) -> int:
    """Return how many lines of Python a new reader runs to read some lines."""
    steps = 0

    def trace(*_: object) -> object:
        nonlocal steps
        steps += 1
        return trace

    reader = Reader()
    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        for line in lines:
            reader.read(line)
    finally:
        sys.settrace(before)
    return steps


def test_cost_is_linear() -> None:
    """Twice as many rows take twice as much work, however many sets and keys there are."""

    def hostile(size: int) -> list[str]:
        rows = [count(30, n, id_=f"{n:x}") for n in range(size)]
        return [line for n, row in enumerate(rows) for line in (f"set {n}", row)]

    assert steps_of(hostile(2000)) < 2.1 * steps_of(hostile(1000))


@given(st.integers(0, len(ZONE) - 1))
def test_row_of_zones_cut_short(size: int) -> None:
    """A zone's row cut short is an error, unless the cut is just before or within Q0's limit."""
    if size < ZONE.rindex(" 0 1152") + 2 or size == ZONE.rindex(" ") + 1:
        with pytest.raises(RowError):
            Reader().read(ZONE[:size])
    else:
        assert isinstance(Reader().read(ZONE[:size]), Listening)


@given(st.integers(0, len(LISTENER) - 1))
def test_row_cut_short(size: int) -> None:
    """A listener's row cut short is an error, unless the cut is within its last number."""
    if size <= LISTENER.rindex(" ") + 1:
        with pytest.raises(RowError):
            Reader().read(LISTENER[:size])
    else:
        assert isinstance(Reader().read(LISTENER[:size]), Listening)
