"""The text of a D program is parsed as Sun's compiler does."""

from __future__ import annotations

import pytest

from sun.syntax import Clause, Declaration, Inline, ProgramError, Tree, TypeName, parse

TYPES = frozenset({"conn_t", "uint64_t", "uint8_t", "int64_t", "size_t"})
PROGRAM = """#!/usr/sbin/dtrace -s
/* What it does:
 * count. */
#pragma D option quiet
#pragma D option aggsize=512k

inline int TH_SYN = 2;
uint64_t life[conn_t *, int];
self conn_t *listener;
this unsigned long sum;

BEGIN { printf("ready\\n"); }

fbt:ip:tcp_accept:entry,
mib:::tcpListenDrop		/* only drops */
/ arg0 != 0 && self->listener /
{
	life[(conn_t *)arg0, 1] = 2;
	@n[arg0 / 2] = count()
}

tick-1s, END { ; }
"""


def text_of(tree: Tree) -> str:
    """Return an expression with all of its brackets."""
    kids = [text_of(kid) for kid in tree.kids]
    name = tree.text or (f"{tree.type.name}{'*' * tree.type.stars}" if tree.type else "")
    return f"{tree.op}({', '.join(filter(None, [name, *kids]))})"


def expression(text: str) -> str:
    """Return the tree of an expression, as text."""
    program = parse(f"BEGIN {{ {text}; }}", TYPES.__contains__, comment_refused=False)
    clause = program.parts[0]
    assert isinstance(clause, Clause)
    return text_of(clause.statements[0])


def error(text: str, comment_refused: bool = False) -> tuple[int, str]:
    """Return the line of an error, and its text."""
    with pytest.raises(ProgramError) as caught:
        parse(text, TYPES.__contains__, comment_refused)
    return caught.value.line, str(caught.value)


def test_program() -> None:
    """Options, declarations and clauses are parsed in their order, each with its lines."""
    program = parse(PROGRAM, TYPES.__contains__, comment_refused=True)
    assert program.options == {"quiet": "", "aggsize": "512k"}
    inline, life, listener, sum_, begin, accept, end = program.parts
    assert isinstance(inline, Inline)
    assert (inline.line, inline.type, inline.name, inline.value.value) == (
        *(7, TypeName("int", 0), "TH_SYN", 2),
    )
    assert life == Declaration(
        *(8, "global", TypeName("uint64_t", 0), "life"),
        [TypeName("conn_t", 1), TypeName("int", 0)],
    )
    assert listener == Declaration(9, "self", TypeName("conn_t", 1), "listener")
    assert sum_ == Declaration(10, "this", TypeName("unsigned long", 0), "sum")
    for part, probes in (
        (begin, [("BEGIN", 12)]),
        (accept, [("fbt:ip:tcp_accept:entry", 14), ("mib:::tcpListenDrop", 15)]),
        (end, [("tick-1s", 22), ("END", 22)]),
    ):
        assert isinstance(part, Clause)
        assert part.probes == probes
    assert isinstance(accept, Clause)
    assert accept.predicate
    assert [statement.line for statement in accept.statements] == [18, 19]


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("1 + 2 * 3", "+(number(1), *(number(2), number(3)))"),
        ("a = b = c", "=(name(a), =(name(b), name(c)))"),
        ("a - b - c", "-(-(name(a), name(b)), name(c))"),
        ("a || b && c | d", "||(name(a), &&(name(b), |(name(c), name(d))))"),
        ("a == 1 << 2", "==(name(a), <<(number(1), number(2)))"),
        ("a ? b : c ? d : e", "?:(name(a), name(b), ?:(name(c), name(d), name(e)))"),
        ("a, b, c", ",(,(name(a), name(b)), name(c))"),
        ("*p->q", "deref(->(q, name(p)))"),
        ("-x++", "neg(x++(name(x)))"),
        ("--x", "--x(name(x))"),
        ("&a.b[2]", "address(index(.(b, name(a)), number(2)))"),
        ("(conn_t *)arg0", "cast(conn_t*, name(arg0))"),
        ("((conn_t *)arg0)->x", "->(x, cast(conn_t*, name(arg0)))"),
        ("(arg0) + 1", "+(name(arg0), number(1))"),
        ("(uint8_t)a << 8", "<<(cast(uint8_t, name(a)), number(8))"),
        ("(unsigned long int)a", "cast(unsigned long, name(a))"),
        ("(struct inner **)a", "cast(struct inner**, name(a))"),
        ("sizeof (conn_t *) + 1", "+(sizeof(conn_t*), number(1))"),
        ("sizeof x", "sizeof(name(x))"),
        ("sizeof (x)->y", "sizeof(->(y, name(x)))"),
        ("stringof(x)", "stringof(name(x))"),
        ("ip`hz + `hz", "+(name(ip`hz), name(`hz))"),
        ('f(a, "b\\n")', "call(f, name(a), string(b\n))"),
        (
            "@a[1, 2] = sum(x)",
            "=(index(aggregation(@a), number(1), number(2)), call(sum, name(x)))",
        ),
        ("x /= 2", "/=(name(x), number(2))"),
        ("self->x >>= 1", ">>=(->(x, name(self)), number(1))"),
    ],
)
def test_expressions(text: str, tree: str) -> None:
    """Operators bind as in C, and a type's name in brackets makes a cast."""
    assert expression(text) == tree


@pytest.mark.parametrize(("text", "value"), [("0x1F", 31), ("017", 15), ("0", 0), ("'A'", 65)])
def test_numbers(text: str, value: int) -> None:
    """Numbers are decimal, hexadecimal, octal or characters."""
    program = parse(f"BEGIN {{ {text}; }}", TYPES.__contains__, comment_refused=False)
    assert isinstance(program.parts[0], Clause)
    assert program.parts[0].statements[0].value == value


def test_variables_hide_types() -> None:
    """A variable that is declared with a type's name hides the type."""
    program = parse("int size_t; BEGIN { (size_t); }", TYPES.__contains__, comment_refused=False)
    assert isinstance(program.parts[1], Clause)
    assert text_of(program.parts[1].statements[0]) == "name(size_t)"


def test_end_of_predicate() -> None:
    """A slash ends a predicate if a brace follows it; otherwise it divides."""
    program = parse("BEGIN / 8 / 2 / { 1; }", TYPES.__contains__, comment_refused=True)
    assert isinstance(program.parts[0], Clause)
    assert program.parts[0].predicate
    assert text_of(program.parts[0].predicate) == "/(number(8), number(2))"


def test_comment_behind_a_predicate() -> None:
    """The old compiler takes a slash before a comment for a division, and the new one does not."""
    text = "BEGIN\n/ 1 / /* always */\n{ 1; }"
    parse(text, TYPES.__contains__, comment_refused=False)
    assert error(text, comment_refused=True) == (3, 'syntax error near "{"')


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("BEGIN { 1 +; }", 1, 'syntax error near ";"'),
        ("BEGIN\n{\n\tx = ;\n}", 3, 'syntax error near ";"'),
        ("BEGIN", 1, "expected predicate and/or actions following probe description"),
        (
            *("BEGIN / 1 /\n;", 1),
            "expected actions { } following probe description and predicate",
        ),
        ("BEGIN { /* }", 1, "end-of-file encountered before matching */"),
        ("#include <x.h>\nBEGIN { }", 1, "invalid control directive: #include <x.h>"),
        ("BEGIN { if (1) { } }", 1, "if is not simulated"),
        ("translator x < y > { };", 1, "translator is not simulated"),
        ("int a[5];", 1, "arrays of a fixed size are not simulated"),
        ("BEGIN { 1(2); }", 1, "function designator is not of function type"),
        ("BEGIN { x = \\ ; }", 1, 'syntax error near "\\"'),
        ("BEGIN,\n{ }", 2, 'syntax error near "{"'),
    ],
)
def test_errors(text: str, line: int, message: str) -> None:
    """An error gives its line and what was found there."""
    assert error(text) == (line, message)
