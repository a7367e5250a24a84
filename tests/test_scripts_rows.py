"""The rows of a script are found and read exactly, whatever else is printed."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter.scripts.reader import FUNCTIONS, read
from dtrace_exporter.scripts.rendering import LINUX, SUN
from dtrace_exporter.scripts.rows import (
    MAX_KEYS,
    MAX_ROW,
    BadRow,
    Histogram,
    Ready,
    Record,
    Row,
    Splitter,
    Tick,
    _table,
)

TOKEN = "t0123456789abcdef"
SCRIPT = read(
    "x.d",
    """BEGIN { @a[execname, pid, ustack(), usym(arg0)] = count(); @ = sum(1); @min = min(1);
    @max = max(1); @avg = avg(1); @dev = stddev(1); @q = quantize(1); @lq = lquantize(1, 0, 10);
    @llq = llquantize(1, 10, 0, 3, 10); }""",
)
LETTERS = (("S", "d", "k", "A"), *((),) * 8)
FUNCTION_INDEX = {each.function: index for index, each in enumerate(SCRIPT.aggregations)}


def splitter(engine: str = LINUX) -> Splitter:
    """Return a splitter for the script above."""
    return Splitter(SCRIPT, LETTERS, engine, TOKEN)


def row(*fields: bytes, kind: bytes = b"row") -> bytes:
    """Return a row as printa() prints it."""
    return b"\n\x1e%s %s %s\x1e\n" % (TOKEN.encode(), kind, b"\x1f".join(fields))


def told(output: bytes, engine: str = LINUX) -> list[Record]:
    """Return the records of an output that arrives all at once."""
    return [*splitter(engine).feed(output)]


def value(function: str, text: str, *more: str, engine: str = LINUX) -> int | Histogram | str:
    """Return the value in a row of a function, or the reason why it is a bad row."""
    index = str(FUNCTION_INDEX[function])
    (found,) = told(row(*(word.encode() for word in (index, text, *more))), engine)
    assert isinstance(found, Row | BadRow)
    return found.value if isinstance(found, Row) else found.why


KEYED = row(b"0", rb"a b\0", b"-12", b"\n   libc.so.6`write+0x4\n   cat`main\n", b"cat`main", b"7")


def test_all() -> None:
    """Rows, final rows, the ready row and ticks are read in their order."""
    output = b"".join(
        (
            b"\n\x1e%s ready\x1e\n" % TOKEN.encode(),
            KEYED,
            row(b"1", b"-8", kind=b"final"),
            b"\n\x1e%s tick 123456789\x1e\n" % TOKEN.encode(),
        )
    )
    assert told(output) == [
        Ready(),
        Row(0, ("a b", "-12", "libc.so.6`write+0x4;cat`main", "cat`main"), 7, False),
        Row(1, (), -8, True),
        Tick(123456789),
    ]


@pytest.mark.parametrize(
    ("printed", "key"),
    [
        (rb"\0", ""),
        (rb"sshd\0", "sshd"),
        (rb"cut off", "cut off"),
        (rb"a\nb\tc\"d\\e\a\b\f\r\v\0", 'a\nb\tc"d\\e\\x07\\x08\\x0c\\r\\x0b'),
        (rb"caf\303\251 \036\037\177\0", r"café \x1e\x1f\x7f"),
        (b"\x1b]0;x\x07 \xc2\x9b \xe2\x80\xae", r"\x1b]0;x\x07 \x9b \u202e"),
        (rb"\377\376\0", r"\xff\xfe"),
        (rb"\\0\0", r"\0"),
        (rb"\\0", r"\0"),
        (rb"\\101\0", r"\101"),
        (b"\\303\\251" * 8000, "é" * 8000),
    ],
)
def test_strings(printed: bytes, key: str) -> None:
    """A string is read as it was before %S escaped it."""
    (found,) = told(row(b"0", printed, b"1", b"", b"", b"1"))
    assert isinstance(found, Row)
    assert found.keys == (key, "1", "", "")


NOT_OURS = [
    b"",
    b"CPU     ID                    FUNCTION:NAME\n",
    b"in the middle of a line",
    b"\x1e",
    b"\x1e\x1e\x1f\x1e",
    b"\x00\xff\xfe binary\x00",
    b"\n\x1erow 1\x1f5\x1e\n",
    b"\n\x1et0000000000000000 row 1\x1f5\x1e\n",
    b"\n\x1e" + TOKEN[:-1].encode(),
    b"x" * 100_000,
    TOKEN.encode() + b" row 1\x1f5",
]


@given(st.lists(st.one_of(st.sampled_from(NOT_OURS), st.binary())), st.data())
def test_mixed(others: list[bytes], data: st.DataObject) -> None:
    """The exporter's rows, and no others, are found in any output that is cut into any chunks."""
    output = KEYED.join((b"", *others, b""))
    reader = splitter()
    found: list[Record] = []
    while output:
        size = data.draw(st.integers(1, len(output)))
        found += reader.feed(output[:size])
        output = output[size:]
    assert found == told(KEYED) * (len(others) + 1)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (row(b"9", b"5"), "unknown kind of row"),
        (row(b"-1", b"5"), "unknown kind of row"),
        (row(b"x", b"5"), "unknown kind of row"),
        (row(b"1", b"5", kind=b"other"), "unknown kind of row"),
        (row(b"1"), "0 fields"),
        (row(b"1", b"5", b"6"), "2 fields"),
        (row(b"1", b""), "b'' is not a number"),
        (row(b"1", b"5 "), "b'5 ' is not a number"),
        (row(b"1", "٣".encode()), "is not a number"),
        (row(b"1", b"9" * 21), "is not a number"),
        (b"\x1e%s row 1\x1f5 and \x1e" % TOKEN.encode(), "b'5 and ' is not a number"),
        (b"\x1e%s \x1e" % TOKEN.encode(), "unknown kind of row"),
        (b"\x1e%s tick\x1e" % TOKEN.encode(), "unknown kind of row"),
        (row(b"6", b"\n value --- Distribution --- count\n"), "a table without lines"),
        (row(b"6", b"\n 0 |@@ x\n"), "is not a line of a table"),
        (row(b"6", b"\n 0 @@| -2\n"), "a count below 0"),
        (row(b"0", b"x" * MAX_ROW, b"1", b"", b"", b"1"), "longer than"),
    ],
)
def test_bad(bad: bytes, why: str) -> None:
    """A row with the exporter's mark that cannot be read is a bad row, and the next row is read."""
    first, second = told(bad + row(b"1", b"5"))
    assert isinstance(first, BadRow)
    assert why in first.why
    assert len(first.text) <= 200
    assert second == Row(1, (), 5, False)


def test_endless() -> None:
    """A row that never ends is one bad row, and takes no more memory than the longest row."""
    reader = splitter()
    found = [*reader.feed(b"\x1e%s row 1\x1f5" % TOKEN.encode())]
    tracemalloc.start()
    for _ in range(100):
        found += reader.feed(b"7" * 65536)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(each) for each in found] == [BadRow]
    assert peak < 4 * MAX_ROW
    assert [*reader.feed(KEYED)] == told(KEYED)


def table(*lines: str) -> str:
    """Return a table as DTrace prints it."""
    head = "           value  ------------- Distribution ------------- count    "
    return "\n".join(("", head, *lines, ""))


@pytest.mark.parametrize(
    ("function", "lines", "expected"),
    [
        (
            "quantize",
            [
                "            -128 |                                         0        ",
                "             -64 |@@@@@@@@@@@@@                            1        ",
                "              -1 |                                         0        ",
                "               0 |@@@@@@@@@@@@@@@@@@@@@@@@@@@              2        ",
                "               1 |                                         0        ",
            ],
            ((-255, 0), (-127, 1), (-1, 0), (0, 2), (1, 0)),
        ),
        (
            "quantize",
            [
                "-4611686018427387904 |@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@ 1        ",
                "-2305843009213693952 |                                         0        ",
            ],
            ((-(1 << 63), 1), (1 - (1 << 62), 0)),
        ),
        (
            "lquantize",
            [
                "          < -100 |@@@@@@@@@@                               1        ",
                "            -100 |@@@@@@@@@@                               5        ",
                "          >= 100 |@@@@@@@@@@@@@@@@@@@@                     3        ",
            ],
            ((None, 1), (-100, 5), (100, 3)),
        ),
        (
            "llquantize",
            [
                "      <= -100000 |@@@@@@@@                                 1        ",
                "          -90000 |@@@@@@@@                                 1        ",
                "            -200 |                                         0        ",
                "            -100 |@@@@@@@@                                 1        ",
                "     abs() < 100 |@@@@@@@@@@@@@@@@                         2        ",
                "             100 |                                         0        ",
                "       >= 100000 |@@@@@@@@                                 4        ",
            ],
            ((None, 1), (-99999, 1), (-89999, 0), (-199, 1), (-99, 2), (100, 0), (100000, 4)),
        ),
    ],
)
def test_tables(function: str, lines: list[str], expected: Histogram) -> None:
    """Each line of a table gives the lowest value that it counts, and the count."""
    assert value(function, table(*lines)) == expected


@pytest.mark.parametrize(
    ("function", "number", "why"),
    [
        ("min", "9223372036854775807", "the min of nothing"),
        ("min", "-5", ""),
        ("max", "-9223372036854775808", "the max of nothing"),
        ("max", "18446744073709551610", "the max of nothing"),
        ("max", "-6", ""),
        ("stddev", "-1", "a stddev below 0"),
        ("sum", "-8", ""),
    ],
)
def test_printed_wrong(function: str, number: str, why: str) -> None:
    """The number that DTrace prints for a value it does not have is not a value."""
    assert value(function, number) == (why or int(number))


@given(st.lists(st.integers(-(1 << 40), 1 << 40), min_size=1, max_size=5000))
def test_average_on_linux(values: list[int]) -> None:
    """On Linux an average is exported if it is right, and not if its sum has lost its sign."""
    total, count = sum(values), len(values)
    # pfprint_average(): data[1] / normal / data[0], in 64 bits without a sign, printed as %d.
    printed = total % (1 << 64) // count
    signed = printed - (1 << 64 if printed >> 63 else 0)
    right = total // count if total >= 0 else total if count == 1 else None
    found = value("avg", str(signed), str(count))
    assert found == ("the average of values whose sum is negative" if right is None else right)


def test_average() -> None:
    """On Sun's engine an average has its sign, and is printed alone."""
    assert value("avg", "-5", engine=SUN) == -5
    assert value("avg", "-5", "2", engine=SUN) == "2 fields"
    assert value("avg", "0", "0") == "the avg of nothing"


def test_functions() -> None:
    """The tests of this module cover each function."""
    assert {*FUNCTION_INDEX} == {*FUNCTIONS}


@given(st.binary(), st.sampled_from([LINUX, SUN]))
def test_anything(output: bytes, engine: str) -> None:
    """Any output, even with the exporter's mark before every piece, gives only known records."""
    marked = (
        b"\x1e%s " % TOKEN.encode() + output.replace(b"\n", b"\x1e%s " % TOKEN.encode()) + b"\x1e"
    )
    assert all(isinstance(each, Ready | Tick | Row | BadRow) for each in told(marked, engine))


@pytest.mark.parametrize(
    ("printed", "why"),
    [
        (row(b"0", b"x" * (MAX_KEYS + 1), b"1", b"", b"", b"1"), "keys longer than"),
        (row(b"0", rb"\033" * (MAX_KEYS + 1), b"1", b"", b"", b"1"), "keys longer than"),
        (row(b"0", b"\xff" * MAX_KEYS, b"1", b"", b"", b"1"), "keys longer than"),
    ],
)
def test_long_keys(printed: bytes, why: str) -> None:
    """Keys that are too long for an honest kernel are a bad row, however they are escaped."""
    (found,) = told(printed)
    assert isinstance(found, BadRow)
    assert found.why.startswith(why)


def test_lines_of_blanks() -> None:
    """A line of many blanks that is not a table's is read once, and not once for each blank."""
    began = time.thread_time()
    with pytest.raises(ValueError, match="not a line of a table"):
        _table("quantize", b" " * 200_000 + b"x")
    # Starting from each blank would take half a minute.
    assert time.thread_time() - began < 1
