"""Expressions are evaluated on memory, and missing memory faults, as in the kernel."""

from __future__ import annotations

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun.c_types import Types
from sun.engine import Engine
from sun.evaluate import Fault, Memory
from sun.small import Ram, engine, printed, run

S64 = st.integers(-(1 << 63), (1 << 63) - 1)
U64 = (1 << 64) - 1


def errors(statements: str, *args: int, ram: Ram | None = None, probes: int = 1) -> list[str]:
    """Return the ends of dtrace(1)'s messages about a clause's faults, after the probe's name."""
    events = [("f", args)] * probes
    session = run(f"fbt:ip:f:entry {{ {statements} }}", *events, ram=ram)
    return [line.partition("f:entry): ")[2] for line in session.errors]


def test_loads() -> None:
    """Members are read with their size and sign, through pointers and arrays."""
    ram = Ram()
    inner = (7).to_bytes(4, "little") + bytes([1, 2, 3, 250])
    second = ram.thing(count=-5, port=0xFFFE, tiny=-1, list=inner * 3)
    first = ram.thing(next=second, wide=-(1 << 40), bytes=ram.put(b"\x11\x22\x33\x44"))
    for expression, value in (
        ("((thing_t *)arg0)->wide", -(1 << 40)),
        ("((thing_t *)arg0)->next->count", -5),
        ("((thing_t *)arg0)->next->port", 0xFFFE),
        ("((thing_t *)arg0)->next->tiny", -1),
        ("((thing_t *)arg0)->next->list[2].number", 7),
        ("((thing_t *)arg0)->next->list[1].bytes[3]", 250),
        ("(*((thing_t *)arg0)->next).list[0].number", 7),
        ("*((thing_t *)arg0)->bytes", 0x11),
        ("((thing_t *)arg0)->bytes[2]", 0x33),
        ("*(((thing_t *)arg0)->bytes + 3)", 0x44),
        ("*(uint16_t *)((thing_t *)arg0)->bytes", 0x2211),
        ("*(int *)&((thing_t *)arg0)->next->list[0]", 7),
        ("*(uint64_t *)arg0 == (uint64_t)((thing_t *)arg0)->next", 1),
    ):
        assert printed(expression, first, ram=ram) == str(value), expression


def test_strings() -> None:
    """Strings end at a zero byte or at their size, whatever their source is."""
    ram = Ram()
    text = ram.put(b"global\0more")
    thing = ram.thing(text=text, name=b"zone\0x")
    for expression, value in (
        ("stringof(((thing_t *)arg0)->text)", "global"),
        ("stringof(((thing_t *)arg0)->name)", "zone"),
        ("(string)((thing_t *)arg0)->text", "global"),
        ("stringof(arg1)", "global"),
    ):
        assert printed(expression, thing, text, ram=ram) == value
    assert printed("strlen(((thing_t *)arg0)->text)", thing, ram=ram) == "6"
    for expression, value in (
        ('((thing_t *)arg0)->text == (string)"global"', "1"),
        ('"zone" != stringof(((thing_t *)arg0)->name)', "0"),
        ('probename == "entry" && probefunc == "f" && probemod == "ip"', "1"),
        ('probeprov < "fbu"', "1"),
        ('execname == "sched"', "1"),
    ):
        assert printed(expression, thing, ram=ram) == value, expression


def test_long_strings() -> None:
    """A string is cut to strsize, in variables and when it is printed."""
    ram = Ram()
    text = ram.put(b"x" * 40)
    program = """
    #pragma D option strsize=8
    fbt:ip:f:entry {
        self->s = stringof(arg0);
        printf("%s %s %s", stringof(arg0), self->s, "abcdefghi");
    }
    """
    assert run(program, ("f", [text]), ram=ram).output == "xxxxxxxx xxxxxxxx abcdefgh"


def test_escaped_strings() -> None:
    """The conversion %S escapes the whole record, also after the string's end."""
    ram = Ram()
    text = ram.put(b'a "\n\x01\xff\\\0rest')
    program = """
    #pragma D option strsize=10
    fbt:ip:f:entry { printf("%S|%s", stringof(arg0), "x"); @[stringof(arg0)] = max(5); }
    END { printa("%@d %S", @); }
    """
    escapes = r"a \"\n\001\377\\\0\0\0"
    assert run(program, ("f", [text]), ram=ram).output == f"{escapes}|x5 {escapes}"


def test_strings_at_the_end_of_memory() -> None:
    """A string is not read beyond its end."""
    ram = Ram()
    assert printed("stringof(arg0)", ram.put(b"end\0"), ram=ram) == "end"


@pytest.mark.parametrize(
    ("function", "value", "result"),
    [
        ("ntohs", 0x1234, 0x3412),
        ("htons", 0x51234, 0x3412),
        ("ntohl", 0x12345678, 0x78563412),
        ("htonll", 1, 1 << 56),
    ],
)
def test_byte_order(function: str, value: int, result: int) -> None:
    """ntohs() and similar functions swap as many bytes as their types have."""
    assert printed(f"{function}(arg0)", value) == str(result)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("00000000000000000000000000000000", "::"),
        ("00000000000000000000000000000001", "::1"),
        ("00000000000000000000ffffc0000201", "192.0.2.1"),
        ("000000000000000000000000c0000201", "192.0.2.1"),
        ("fe800000000000000214 4ffffe0b76c8".replace(" ", ""), "fe80::214:4fff:fe0b:76c8"),
        ("20010db8000000010000000000000001", "2001:db8:0:1::1"),
        ("20010db8000100000001000100010001", "2001:db8:1::1:1:1:1"),
        ("20010db8000000000000000000000000", "2001:db8::"),
    ],
)
def test_addresses_of_ipv6(address: str, text: str) -> None:
    """inet_ntoa6() leaves out the longest run of zeros, and writes IPv4 addresses as such."""
    ram = Ram()
    pointer = ram.put(bytes.fromhex(address))
    assert printed("inet_ntoa6((in6_addr_t *)arg0)", pointer, ram=ram) == text


def test_addresses_of_ipv4() -> None:
    """inet_ntoa() writes four bytes in network order."""
    ram = Ram()
    assert printed("inet_ntoa((ipaddr_t *)arg0)", ram.put(bytes([10, 0, 2, 255])), ram=ram) == (
        "10.0.2.255"
    )


def test_scratch() -> None:
    """What bcopy() copies into memory of alloca() can be read from there, aligned."""
    ram = Ram()
    pointer = ram.put(bytes(4) + (0x1122334455667788).to_bytes(8, "little"))
    text = """fbt:ip:f:entry {
        this->p = (uint64_t *)alloca(sizeof (uint64_t));
        bcopy((void *)(arg0 + 4), this->p, 8);
        this->q = (uint64_t *)alloca(16);
        this->q[1] = this->p[0] + 1;
        printf("%x %x", *this->p, this->q[1]);
    }"""
    assert run(text, ("f", [pointer]), ram=ram).output == "1122334455667788 1122334455667789"


def test_variables() -> None:
    """Variables of each scope keep all 64 bits of what is assigned to them."""
    text = """
    int small; uint64_t table[int, thing_t *]; self thing_t *thing;
    fbt:ip:f:entry {
        small = 1L << 40 | 5;
        this->a = this->b = ++count_;
        table[-1, (thing_t *)arg0] = 7;
        table[1, NULL] += 8;
        self->thing = (thing_t *)arg0;
        self->counts[1, "x"] = 9;
        self->counts[1, "x"]++;
        this->old = count_--;
        this->a <<= 4, this->a |= 1, this->b -= 3;
    }
    fbt:ip:f:entry {
        printf("%d %d ", small, small == (1L << 40 | 5));
        printf("%d %d %d %d ", this->a, this->b, count_, this->old);
        printf("%d %d %d ", table[-1, (thing_t *)arg0], table[1, NULL], table[2, NULL]);
        printf("%d ", self->thing == (thing_t *)arg0);
        printf("%d %d", self->counts[1, "x"], self->counts[1, "y"]);
    }
    """
    assert run(text, ("f", [16])).output == "5 0 17 -2 0 1 7 8 0 1 10 0"


def test_comparison_of_assigned_pointers() -> None:
    """The operator ++ on a pointer adds the size of what it points to."""
    text = """fbt:ip:f:entry {
        this->p = (thing_t *)arg0; this->q = this->p++; ++this->p;
        printf("%d %d", this->p - this->q, (uint64_t)this->p - arg0);
    }"""
    assert run(text, ("f", [0x1000])).output == "2 256"


def test_branches() -> None:
    """Only the branch that is taken is evaluated, and && and || stop as soon as they can."""
    for expression in (
        "arg0 ? *(int *)arg0 : 7",
        "arg0 && *(int *)arg0 ? 1 : 7",
        "!arg0 || *(int *)arg0 ? 7 : 1",
    ):
        assert printed(expression, 0) == "7"


@pytest.mark.parametrize(
    ("statements", "address", "error"),
    [
        # A constant, three instructions to make a pointer of it, and a load.
        ("*(int *)16;", 0, "invalid address (0x10) in action #1 at DIF offset 16"),
        # arg0, 24, +, and a load.
        ("((thing_t *)arg0)->count;", 0, "invalid address (0x18) in action #1 at DIF offset 12"),
        ("1; ((thing_t *)arg0)->next;", 0, "invalid address (0x0) in action #2 at DIF offset 4"),
        ("((thing_t *)arg0)->wide;", 4, "invalid alignment (0x14) in action #1 at DIF offset 12"),
        ("*(uint16_t *)arg0;", 1, "invalid alignment (0x1) in action #1 at DIF offset 4"),
        ("@[1, 2] = sum(*(int *)arg0);", 0, "invalid address (0x0) in action #4 at DIF offset 4"),
        ("1 / arg0;", 0, "divide-by-zero in action #1 at DIF offset 8"),
        ("1 % (uint64_t)arg0;", 0, "divide-by-zero in action #1 at DIF offset 8"),
        ("alloca(1 << 30);", 0, "out of scratch space in action #1 at DIF offset 24"),
        (
            "bcopy((void *)arg0, alloca(8), 8);",
            0,
            "invalid address (0x0) in action #1 at DIF offset",
        ),
        (
            "bcopy(alloca(8), (void *)arg0, 8);",
            0,
            "invalid address (0x0) in action #1 at DIF offset",
        ),
        # The address is read when the string is recorded, by no instruction.
        ('printf("%s", stringof(arg0));', 0, "invalid address (0x0) in action #1"),
        (
            "inet_ntoa6((in6_addr_t *)arg0);",
            64,
            "invalid address (0x40) in action #1 at DIF offset",
        ),
    ],
)
def test_faults(statements: str, address: int, error: str) -> None:
    """A fault reports its kind, its address and its instruction."""
    found = errors(statements, address)
    assert len(found) == 1
    assert found[0].startswith(error)


def test_faults_in_predicates() -> None:
    """A NULL dereference in a predicate is an error at every event."""
    text = "fbt:ip:f:entry / ((thing_t *)arg0)->count == 1 / { x = 1; }"
    session = run(text, ("f", [0]), ("f", [0]))
    line = (
        "dtrace: error on enabled probe ID 1 (ID 2: fbt:ip:f:entry): "
        "invalid address (0x18) in predicate at DIF offset 12"
    )
    assert session.errors == [line, line]


def test_scratch_is_what_is_left_of_the_buffer() -> None:
    """alloca() takes memory from the rest of the principal buffer, which records reduce."""
    text = "#pragma D option bufsize=64\nfbt:ip:f:entry { alloca(arg0); }"
    assert run(text, ("f", [48])).errors == []
    assert "out of scratch space" in run(text, ("f", [49])).errors[0]
    text = text.replace("{", '{ printf("x");')
    assert run(text, ("f", [40])).errors == []
    assert "out of scratch space" in run(text, ("f", [41])).errors[0]


def test_own_memory() -> None:
    """By default an engine reads this process's memory, and missing memory faults."""
    value = ctypes.c_uint32(0xDEADBEEF)
    session = Engine(Types()).start(
        f'BEGIN {{ printf("%x", *(uint32_t *){ctypes.addressof(value)}); }}'
    )
    assert session.output == "deadbeef"
    for address in (0, 8, 1 << 63, U64 - 8):
        with pytest.raises(Fault):
            Memory()(address, 8)


@given(S64, S64)
def test_arithmetic(one: int, other: int) -> None:
    """Arithmetic has 64 bits, signed or unsigned by the types, for constants and variables."""
    quotient = abs(one) // abs(other) * (-1 if (one < 0) != (other < 0) else 1) if other else 0
    shift = other & 31
    expected = {
        "{} + {}": one + other,
        "{} - {}": one - other,
        "{} * {}": one * other,
        "{} & {}": one & other,
        "{} | {}": one | other,
        "{} ^ {}": one ^ other,
        "{} < {}": one < other,
        "{} >= {}": one >= other,
        "(uint64_t){} < (uint64_t){}": (one & U64) < (other & U64),
        f"{{}} << {shift}": one << shift,
        f"(uint64_t){{}} >> {shift}": (one & U64) >> shift,
        "~{}": ~one,
        "-{}": -one,
        "{} == {}": one == other,
    }
    if other:
        expected["{} / {}"] = quotient
        expected["{} % {}"] = one - quotient * other
        expected["(uint64_t){} / (uint64_t){}"] = (one & U64) // (other & U64)
    constants = [
        f"(int64_t)({n})" if n > -(1 << 63) else "(-9223372036854775807 - 1)" for n in (one, other)
    ]
    pairs = [(text.format("arg0", "arg1"), text.format(*constants)) for text in expected]
    lines = [f'printf("%x %x\\n", (uint64_t)({a}), (uint64_t)({b}));' for a, b in pairs]
    output = run(f"fbt:ip:f:entry {{ {' '.join(lines)} }}", ("f", [one, other])).output
    for text, line in zip(expected, output.splitlines(), strict=True):
        at_run_time, folded = (int(word, 16) for word in line.split())
        assert at_run_time == expected[text] & U64, text
        assert folded == at_run_time, text


def test_signed_shift() -> None:
    """A signed value is shifted with its sign, so that a packed address can be unpacked."""
    address = 0xFFFFFF0012345678
    text = "(uint64_t)((int64_t)((uint64_t)arg0 << 16 | 7) >> 16) == (uint64_t)arg0"
    assert printed(text, address) == "1"


def test_time() -> None:
    """Both clocks are the host's, and stand still during an event."""
    host = engine()
    session = host.start('fbt:ip:f:entry { printf("%d %Y\\n", timestamp - 1, walltimestamp); }')
    host.fire("fbt:ip:f:entry")
    host.advance(61_000_000_000)
    host.fire("fbt:ip:f:entry")
    session.stop()
    assert session.output == (
        "999999999999 2023 Nov 14 22:13:20\n1060999999999 2023 Nov 14 22:14:21\n"
    )


def test_formats() -> None:
    """Conversions print with their flags and widths."""
    text = """BEGIN {
        printf("%5d|%-5d|%05x|%X|%c|%5s|", 42, 42, 42, 255, 65, "ab");
        printf("%i|%u|%o|%%|%p", -1, 7, 8, (thing_t *)16);
    }"""
    assert run(text).output == "   42|42   |0002a|FF|A|   ab|-1|7|10|%|10"
