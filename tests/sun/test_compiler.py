"""Types, sizes and errors are those of Sun's compiler."""

from __future__ import annotations

import pytest

from sun.c_types import TypeInformationError, Types, section
from sun.engine import Engine
from sun.rules import Rules
from sun.small import Ram, engine, printed, refusal, run, types

CLAUSE = "fbt:ip:f:entry {{ {} }}"


def refused(statements: str, system: str = "illumos") -> str:
    """Return the error for a clause with these statements."""
    return refusal(lambda: engine(system=system).start(CLAUSE.format(statements)))


def dof_size(text: str, system: str = "illumos") -> int:
    """Return the size of a program."""
    return engine(system=system).start(text).dof_size


def test_type_information() -> None:
    """Structures, unions, enums, typedefs and variables are read from an object file."""
    thing = types().get("thing_t")
    assert str(thing) == "thing_t"
    assert thing.byte_size() == 128
    in_union = thing.member("in_union")
    assert in_union
    assert (in_union.offset, in_union.type.byte_size()) == (32, 4)
    bits = thing.member("bits")
    assert bits
    assert bits.bits == 3
    assert types().get("enum color").values == {"RED": 0, "GREEN": 5, "BLUE": -1}
    assert str(types().variables["things"]) == "thing_t [2]"
    assert types().find("struct nothing") is None


def test_type_information_is_malformed() -> None:
    """Malformed type information is an error, and an ELF file may have none."""
    with pytest.raises(TypeInformationError, match="no BTF header"):
        Types(b"something else, and long enough")
    with pytest.raises(TypeInformationError, match="unknown kind of type 31"):
        Types(
            b"\x9f\xeb\x01\0"
            + b"".join(n.to_bytes(4, "little") for n in (24, 0, 12, 12, 1))
            + (0).to_bytes(4, "little")
            + (31 << 24).to_bytes(4, "little")
            + bytes(5)
        )
    assert section(b"\x7fELF".ljust(64, b"\0"), ".BTF") == b""


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        # No operation widens small types; a printed value is cut to its type.
        ("((thing_t *)arg0)->flags + ((thing_t *)arg0)->flags", "144"),
        ("((thing_t *)arg0)->flags << 4", "128"),
        ("256 * ((thing_t *)arg0)->flags", "51200"),
        ("(uint16_t)((thing_t *)arg0)->flags << 4", "3200"),
        # A register is not cut before that.
        ("((thing_t *)arg0)->flags << 4 == 3200", "1"),
        # The greater rank wins; unsigned counts for more.
        ("((thing_t *)arg0)->count + 1", "-2"),
        ("((thing_t *)arg0)->count + 1UL", "18446744073709551614"),
        ("((thing_t *)arg0)->count < 1U", "0"),
        ("((thing_t *)arg0)->count < 1", "1"),
        ("((thing_t *)arg0)->tiny", "-7"),
        ("(unsigned char)((thing_t *)arg0)->tiny", "249"),
        ("((thing_t *)arg0)->as_unsigned", "4294967295"),
        ("((thing_t *)arg0)->in_union", "-1"),
        # A printed enum has no sign, and its names are known in a comparison.
        ("((thing_t *)arg0)->color", "5"),
        ("((thing_t *)arg0)->color == GREEN", "1"),
        # Constants.
        ("-8L >> 1", "9223372036854775804"),
        ("-8L / 2", "-4"),
        ("-7L % 4", "-3"),
        ("1 << 40", "0"),
        ("1L << 40", "1099511627776"),
        ("0xffffffff", "4294967295"),
        ("-1 < 0U", "0"),
        ("1 ? 2 : 3", "2"),
        ("(uint8_t)300", "44"),
        ("(int8_t)200", "-56"),
        ("~0", "-1"),
        ("!5", "0"),
        ("1 || 0 && 0", "1"),
        ("sizeof (thing_t)", "128"),
        ('sizeof ("abc")', "4"),
        ("sizeof (((thing_t *)arg0)->list)", "24"),
        ("5 == 5 ^^ 1 != 1", "1"),
        # Pointers count in what they point to.
        ("(uint64_t)((thing_t *)0x1000 + 2) - 0x1000", "256"),
        ("(thing_t *)0x1300 - (thing_t *)0x1000", "6"),
        ("(uint64_t)&((thing_t *)0x1000)->list[1].bytes[2] - 0x1000", "50"),
    ],
)
def test_values(expression: str, value: str) -> None:
    """Expressions have the values that they have with Sun's compiler and kernel."""
    ram = Ram()
    thing = ram.thing(flags=200, count=-3, tiny=-7, in_union=-1, color=5)
    assert printed(expression, thing, ram=ram) == value


def test_casts() -> None:
    """A cast to another sign keeps the bits on Solaris 10, and the sign on illumos."""
    ram = Ram()
    thing = ram.thing(count=-3)
    expression = "(uint64_t)((thing_t *)arg0)->count"
    assert printed(expression, thing, ram=ram) == "18446744073709551613"
    assert printed(expression, thing, ram=ram, system="solaris10") == "4294967293"


def test_inlines() -> None:
    """A constant inline is its value, and any other is computed where it is used."""
    text = """
    inline int LISTEN = -3;
    inline int64_t minute = arg1 / 60 + 1;
    fbt:ip:f:entry / ((thing_t *)arg0)->count == LISTEN / { printf("%d", minute); }
    """
    ram = Ram()
    assert run(text, ("f", (ram.thing(count=-3), 125)), ram=ram).output == "3"


def test_symbols() -> None:
    """A variable of the kernel is read by its name, with its type in the kernel."""
    ram = Ram()
    first, second = ram.thing(count=1), ram.thing(count=2)
    assert second - first == 128
    symbols = {"things": first, "answer": ram.put((42).to_bytes(4, "little")), "opaque": 1}
    host = Engine(types(), symbols, load=ram.load)
    text = (
        'BEGIN { printf("%d %d %d", `answer, `things[1].count, ((thing_t *)&`things)[1].count); }'
    )
    assert host.start(text).output == "42 2 2"
    assert refusal(lambda: host.start("BEGIN { `opaque; }")) == (
        "line 1: no symbolic type information is available for `opaque: Unknown type name"
    )


def test_predicate_may_make_a_variable() -> None:
    """The predicate of a clause may create a variable that its actions use."""
    assert run('BEGIN / x++ == 0 / { printf("%d", x); }').output == "1"


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        ("nothing;", "line 1: failed to resolve nothing: Unknown variable name"),
        ("`nothing;", "line 1: failed to resolve `nothing: Unknown symbol name"),
        ("this->x;", "line 1: this->x has not yet been declared or assigned"),
        ("self->x += 1;", "line 1: self->x has not yet been declared or assigned"),
        ("nothing(1);", "line 1: undefined function name: nothing"),
        ("this->x = (nothing_t *)arg0;", 'line 1: syntax error near ")"'),
        ("((thing_t *)arg0)->x;", "line 1: x is not a member of struct thing"),
        ("((thing_t *)arg0)->bits;", "line 1: bit-fields are not simulated: bits"),
        ("arg0->x;", "line 1: operator -> must be applied to a pointer"),
        (
            "((int *)arg0)->x;",
            (
                'line 1: operator -> cannot be applied to pointer to type "int"; '
                "must be applied to a struct or union pointer"
            ),
        ),
        (
            "((thing_t *)arg0)->missing->x;",
            (
                "line 1: operator -> cannot be applied to a forward declaration: "
                "no struct missing definition is available"
            ),
        ),
        ("*arg0;", "line 1: cannot dereference non-pointer type"),
        ("*(void *)arg0;", "line 1: cannot dereference pointer to void"),
        ("&arg0;", "line 1: cannot take address of dynamic variable"),
        ("&(1 + arg0);", "line 1: unacceptable operand for unary & operator"),
        ("arg0 / 0;", "line 1: expression contains division by zero"),
        ("-(thing_t *)arg0;", "line 1: operator - requires an operand of integral type"),
        ("(thing_t *)arg0 & 1;", "line 1: operator & requires operands of integral type"),
        ("(thing_t *)arg0 * 2;", "line 1: operator * requires operands of arithmetic type"),
        (
            "(thing_t *)arg0 == 5;",
            'line 1: operands have incompatible types: "struct thing *" == "int"',
        ),
        (
            "(thing_t *)arg0 + (int *)arg1;",
            'line 1: operands have incompatible types: "struct thing *" + "int *"',
        ),
        ("arg0 ? (thing_t *)arg0 : 1;", "line 1: operator ?: operands must have compatible types"),
        (
            'this->x = 1; this->x = "a";',
            'line 1: operands have incompatible types: "int" = "string"',
        ),
        ("arg0 = 1;", "line 1: operator = can only be applied to a writable variable"),
        ("1 = 2;", "line 1: operator = requires modifiable lvalue as an operand"),
        ("arg0++;", "line 1: operator ++ can only be applied to a writable variable"),
        ("a[1] = 1; a[1, 2] = 1;", "line 1: a[ ] prototype mismatch: 2 keys passed, 1 expected"),
        ("a[1] = 1; a = 2;", "line 1: associative array 'a' may not be referenced as scalar"),
        (
            'a[1] = 1; a["x"] = 1;',
            (
                "line 1: a[ ] key #1 is incompatible with prototype:\n"
                "\tprototype: int\n\t      key: string"
            ),
        ),
        (
            "this->a[1] = 1;",
            "line 1: local variables may not be used as associative arrays: a",
        ),
        ("alloca();", "line 1: alloca( ) prototype mismatch: 0 args passed, 1 expected"),
        ('x = (thing_t)"a";', 'line 1: invalid cast expression: "string" to "thing_t"'),
        (
            "@a = count(); @a = sum(1);",
            (
                "line 1: aggregation redefined: @a\n\t current: @a = sum( )"
                "\n\tprevious: @a = count( ) : line 1"
            ),
        ),
        ("@a = 5;", "line 1: @a must be assigned the result of an aggregating function"),
        ("@a[1];", "line 1: failed to resolve @a: Unknown variable name"),
        ("@a[1] = count(); @a[1];", "line 1: expression has null effect: @a"),
        ("@a = quantize(1);", "line 1: quantize( ) is not simulated"),
        ("@a = count(1);", "line 1: count( ) prototype mismatch: 1 arg passed, 0 expected"),
        ('printa("%d", @a);', "line 1: failed to resolve @a: Unknown variable name"),
        (
            "trunc(1);",
            (
                "line 1: trunc( ) argument #1 is incompatible with prototype:"
                "\n\tprototype: aggregation\n\t argument: int"
            ),
        ),
        (
            "printf(1);",
            (
                "line 1: printf( ) argument #1 is incompatible with prototype:"
                "\n\tprototype: string constant\n\t argument: int"
            ),
        ),
        (
            'printf("%d");',
            (
                "line 1: printf( ) prototype mismatch: conversion #1 (%d) is missing "
                "a corresponding value argument"
            ),
        ),
        (
            'printf("x", 1);',
            "line 1: printf( ) prototype mismatch: only 0 arguments required by this format string",
        ),
        (
            'printf("%d", (thing_t *)arg0);',
            (
                "line 1: printf( ) argument #2 is incompatible with conversion #1 prototype:"
                "\n\tconversion: %d\n\t prototype: char, short, int, long, or long long"
                "\n\t  argument: struct thing *"
            ),
        ),
        (
            'printf("%s", arg0);',
            (
                "line 1: printf( ) argument #2 is incompatible with conversion #1 prototype:"
                "\n\tconversion: %s\n\t prototype: char [] or string (or use stringof)"
                "\n\t  argument: int64_t"
            ),
        ),
        (
            'printf("%@d", 1);',
            "line 1: %@ conversion requires an aggregation and is not for use with printf( )",
        ),
        ('printf("");', "line 1: printf( ) format string is empty"),
        ("id = 5;", "line 1: operator = can only be applied to a writable variable"),
    ],
)
def test_errors(statements: str, message: str) -> None:
    """An invalid statement gives dtrace(1)'s error with its line."""
    assert refused(statements) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "int x; long x;",
            "line 1: identifier redeclared: x\n\t current: scalar long\n\tprevious: scalar int",
        ),
        ("uint_t id;", "line 1: built-in identifier redeclared: id"),
        (
            "inline int X = (thing_t *)0;",
            'line 1: inline X definition uses incompatible types: "int" = "struct thing *"',
        ),
        (
            "this int a[int];",
            "line 1: clause-local variable may not be declared as associative array: a",
        ),
        ("\n\nint x;", "line 1: empty D program translation unit"),
        ("thing_t x;", "line 1: variables of type thing_t are not simulated"),
        ("BEGIN / (thing_t)1 / { }", 'line 1: invalid cast expression: "int" to "thing_t"'),
        ('BEGIN / "a" / { }', "line 1: predicate result must be of scalar type"),
        (
            "#pragma D option bufsize=much\nBEGIN { }",
            "line 1: failed to set option 'bufsize' to 'much': Invalid value for specified option",
        ),
        (
            "#pragma D option nothing=1\nBEGIN { }",
            "line 1: failed to set option 'nothing' to '1': Invalid option name",
        ),
        ("tick-5x { }", "invalid rate: 5x"),
    ],
)
def test_program_errors(text: str, message: str) -> None:
    """Declarations and options are checked too."""
    assert refusal(lambda: engine().start(text)) == message


@pytest.mark.parametrize("name", ["ntohs", "ntohl", "htonl", "inet_ntoa", "inet_ntoa6"])
def test_versions(name: str) -> None:
    """Solaris 10 has an early version of D, without some functions."""
    assert refused(f"{name}(0);", system="solaris10") == f"line 1: undefined function name: {name}"
    argument = "(in6_addr_t *)0" if name == "inet_ntoa6" else "0"
    engine().start(CLAUSE.format(f"this->x = {name}({argument});"))


FAILED = "failed to enable '/dev/stdin': DIF program content is invalid"


def bytes_of(count: int) -> str:
    """Return an expression with some bytes in it."""
    return " | ".join(f"(uint64_t)this->p[{n}] << {8 * n}" for n in range(count))


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (4, ""),
        (5, ""),
        (6, "Insufficient registers to generate code"),
    ],
)
def test_registers(count: int, message: str) -> None:
    """On Solaris 10, more than five bytes in one expression need too many registers."""
    text = CLAUSE.format(f"this->p = (uint8_t *)arg0; this->x = {bytes_of(count)};")
    engine().start(text)
    if message:
        assert refusal(lambda: engine(system="solaris10").start(text)) == message
    else:
        engine(system="solaris10").start(text)


def test_registers_are_free_again() -> None:
    """Each expression can use all registers, and so can each argument of printf()."""
    text = f'printf("%d %d %d", {bytes_of(4)}, {bytes_of(4)}, {bytes_of(4)});'
    engine(system="solaris10").start(CLAUSE.format(f"this->p = (uint8_t *)arg0; {text}"))


def test_registers_of_deep_expressions() -> None:
    """Eight registers are too many: illumos' compiler or Solaris 10's kernel refuses them."""
    deep = f"this->x = {'arg0 + (' * 7}arg0{')' * 7};"
    assert refused(deep) == "line 1: Insufficient registers to generate code"
    assert refused(deep, system="solaris10") == FAILED


def test_program_size() -> None:
    """The size of a program is that of the file that the kernel gets, to the byte."""
    # Sections: strings, the probe, one instruction and its header with strings, an action, the
    # enabling. Strings: an empty one, BEGIN, the format.
    sections = 7 * 32
    data = 24 + 4 + 1 + 3 + 8 + 4 * 2 + 32 + 24
    assert dof_size('BEGIN { printf("hi"); }') == 64 + 6 * 32 + (24 + 4 + 12 + 32 + 24) + 1 + 6 + 3
    assert dof_size("BEGIN { 1; }") > 64 + sections + data


def test_program_size_by_probes() -> None:
    """A clause counts once for each of its probes, and a comma makes one expression of two."""
    one = dof_size("fbt:ip:a:entry { x = 1; y = 2; }")
    two = dof_size("fbt:ip:a:entry, fbt:ip:b:entry { x = 1; y = 2; }")
    joined = dof_size("fbt:ip:a:entry { x = 1, y = 2; }")
    assert 2 * one - 150 < two < 2 * one
    assert 100 < one - joined < 250


def test_program_too_large() -> None:
    """Solaris 10 refuses a program of more than 256 KB, which illumos accepts."""
    probes = ", ".join(f"fbt:ip:f{n}:entry" for n in range(1000))
    text = f"{probes} {{ this->x = arg0; }}"
    assert 256 << 10 < dof_size(text) < 500 << 10
    message = "failed to enable '/dev/stdin': DIF program exceeds maximum program size"
    assert refusal(lambda: engine(system="solaris10").start(text)) == message


def test_clause_per_probe_is_a_rule() -> None:
    """Without the rule clause_per_probe, more probes do not make a program larger."""
    text = "fbt:ip:a:entry, fbt:ip:b:entry { x = 1; }"
    host = engine(rules=Rules(clause_per_probe=False))
    assert host.start(text).dof_size == dof_size("fbt:ip:a:entry { x = 1; }")
