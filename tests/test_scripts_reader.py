"""The reader of D: what it finds in scripts, and what it refuses."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.d_programs import Program, programs

from dtrace_exporter.scripts.labels import RESERVED
from dtrace_exporter.scripts.reader import Aggregation, Script, ScriptError, read

EVERYTHING = """\
#!/usr/sbin/dtrace -CZqs
/*
 * @comment[pid] = count(); it's "odd"
 */
#pragma D option defaultargs
#define STEP 0x10
#define MAIL "me@here"
#if defined(__never__) && \\
    1
#endif
inline int LOW = -100;
inline string WORD = "a, b]";

syscall::read*:entry,
syscall::*write*:entry
/execname != "a@b[\\"c\\"];" && arg0 != '"' && (a / 2) == 1//* "comment" behind a predicate */
{
	self->ts = timestamp;    // don't
	@reads[execname, stringof(args[0]->name), ustack(5)] = count();
	@ = quantize(timestamp - self->ts); @_ = quantize(1);
	@lat[this->a ? "x,y" : "z", f(a, b[1, 2])] = lquantize(arg0, LOW, 1010, STEP);
}
tick-1s { normalize(@reads, 10); printa(@reads); trunc(@reads, $1); clear(@lat); }
END { @reads [ "total", $$1,
  caller ] = count(); @z = llquantize(x, 10, -1, 07, 10); }
"""


def only(text: str) -> Aggregation:
    """Return the only aggregation of a text."""
    (found,) = read("x.d", text).aggregations
    return found


def test_everything() -> None:
    """The reader finds functions, keys, labels, literal arguments and lines amid all D syntax."""
    assert read("all.d", EVERYTHING) == Script(
        "all.d",
        EVERYTHING,
        ("-C", "-Z"),
        (
            Aggregation(
                "reads",
                "count",
                ("execname", "stringof(args[0]->name)", "ustack(5)"),
                ("execname", "key2", "key3"),
                (),
                19,
            ),
            Aggregation("", "quantize", (), (), (), 20),
            Aggregation(
                "lat",
                "lquantize",
                ('this->a ? "x,y" : "z"', "f(a, b[1, 2])"),
                ("key1", "key2"),
                (-100, 1010, 16),
                21,
            ),
            Aggregation("z", "llquantize", (), (), (10, -1, 7, 10), 25),
        ),
    )


@pytest.mark.parametrize(
    ("key", "label"),
    [
        ("execname", "execname"),
        ("args[2]->cpu_id", "cpu_id"),
        ("args[1]", "args1"),
        ("arg0", "arg0"),
        ("copyinstr(arg0)", "arg0"),
        ("basename(copyinstr(self->path, 10))", "path"),
        ("stringof(this->fs)", "fs"),
        ("(string)args[0]->b.c", "c"),
        ("((struct x *)arg0)->x_name", "x_name"),
        ("*(int *)this->there", "there"),
        ("xlate <devinfo_t *>(args[1])->dev_statname", "dev_statname"),
        ("fds[arg0].fi_fs", "fi_fs"),
        ("self->name[1, 2]", "name"),
        ("`max_pid", "max_pid"),
        ("vmlinux`jiffies", "jiffies"),
        ("$target", "target"),
        ("ustack(20)", "ustack"),
        ("sym(arg0)", "sym"),
        ('self->key != NULL ? self->key : "none"', "key"),
        ('a ? "read" : "write"', "key1"),
        ("timestamp / 1000", "key1"),
        ("strjoin(a, b)", "key1"),
        ("!a", "key1"),
        ("$1", "key1"),
        ("__cpu", "cpu"),
        ("this->host", "host_1"),
        ("this->le", "le_1"),
        ('"total"', ""),
        ("0", ""),
    ],
)
def test_label(key: str, label: str) -> None:
    """A label is the best name for the key: keyN if there is none, and empty for a literal."""
    assert only(f"BEGIN {{ @a[{key}] = count(); }}").labels == (label,)


def test_labels_of_several_keys() -> None:
    """Labels differ, and are those on which all clauses agree, except for literals."""
    text = """BEGIN { @a[args[0]->x, "r", this->x, key2, pid, "w"] = count();
        @a["total", "r", this->x, key2, tid, "w"] = count(); }"""
    assert only(text).labels == ("x", "", "x_3", "key2", "key5", "")


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("lquantize(a, 0, 100)", (0, 100, 1)),
        ("lquantize(f(a, b), -0x10, 1000, 10)", (-16, 1000, 10)),
        ("lquantize(a, 0, 100, 10, increment)", (0, 100, 10)),
        ("lquantize(a, 0, $1, 10)", ()),
        ("lquantize(a, 0, ELSEWHERE, 10)", ()),
        ("lquantize(a, 0, 10 * 10, 10)", ()),
        ("lquantize(a, 0, 099, 10)", ()),
        ("lquantize(a, 0, TWICE, 10)", ()),
        ("lquantize(a, -TOP, +TOP, 100UL)", (-1000, 1000, 100)),
        ("llquantize(a, 10, 0, 6, 20)", (10, 0, 6, 20)),
        ("llquantize(a, 10, 0)", ()),
        ("quantize(a, 5)", ()),
    ],
)
def test_arguments(function: str, arguments: tuple[int, ...]) -> None:
    """Literal bounds and those that a constant names are read, and others are not guessed."""
    text = "#define TWICE 1\n#define TWICE 2\ninline uint64_t TOP = 1000;\nBEGIN { @a = %s; }"
    assert only(text % function).arguments == arguments


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "x.d:1: no aggregation, expected one such as @name[key] = count();"),
        ("BEGIN { printa(@a); }\n", "x.d:2: no aggregation"),
        ("\nBEGIN { @a = total(); }", "x.d:2: @a = total, expected one of count(), sum(), min()"),
        ("BEGIN { @a = count; }", "x.d:1: @a = count, expected one of count()"),
        ("BEGIN { @a =", "x.d:1: @a = the end, expected one of"),
        ("BEGIN { @a = count", "x.d:1: @a = count, expected one of"),
        ("BEGIN { @a[pid] += 1; }", "x.d:1: += behind @a, expected = and an aggregating function"),
        ("BEGIN { @a[pid", "x.d:1: a [ without an end, expected what closes it"),
        ("BEGIN { @a[pid = count(); }\nEND { x[1] }", "x.d:1: a [ without an end"),
        ("BEGIN { @a[] = count(); }", "x.d:1: nothing in a place of [, expected an expression"),
        ("BEGIN { @a[pid,] = count(); }", "x.d:1: nothing in a place of [, expected an expression"),
        ("\n\n/* @a = count();", "x.d:3: /* without an end, expected */"),
        ('BEGIN { @a["x] = count(); }', 'x.d:1: " without an end, expected "'),
        (
            " \t#define C @a = count()\nBEGIN { C; }",
            "x.d:1: an aggregation in a macro, expected it wr",
        ),
        (
            "BEGIN { @a = count(); }\nEND { @a = sum(1); }",
            "x.d:2: another function of @a, expected that of line 1",
        ),
        ("BEGIN { @[1] = count(); @ = count(); }", "x.d:1: another number of keys of @, expected"),
        (
            "BEGIN { @l = lquantize(a, 0, 5); @l = lquantize(a, 0, 6); }",
            "x.d:1: another step or bound of @l, expected that of line 1",
        ),
    ],
)
def test_refused(text: str, says: str) -> None:
    """A script that cannot be read gives an error with file, line, what was found and expected."""
    with pytest.raises(ScriptError, match=f"^{re.escape(says)}"):
        read("x.d", text)


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("#!/usr/sbin/dtrace -s", ()),
        ("#! /usr/sbin/dtrace -qCs", ("-C",)),
        ("#!/usr/bin/env -S dtrace -Zs", ("-Z",)),
        (
            "#!/usr/sbin/dtrace -x aggsize=8m -Zxstrsize=1k -s",
            ("-x", "aggsize=8m", "-Z", "-x", "strsize=1k"),
        ),
        ("#!/usr/sbin/dtrace -CI /usr/include -DA=1 -s", ("-C", "-I", "/usr/include", "-D", "A=1")),
        ("/* #!/usr/sbin/dtrace -ws */", ()),
    ],
)
def test_flags(line: str, flags: tuple[str, ...]) -> None:
    """The options of the #! line are kept, except those for dtrace(1)'s own output."""
    assert read("x.d", f"{line}\nBEGIN {{ @ = count(); }}").flags == flags


def test_zero_byte() -> None:
    """A zero byte, where Sun's DTrace would stop, cannot cut off what forbids to destroy."""
    text = '#pragma D option destructive\nBEGIN { @ = count(); system("id"); }\n\0'
    with pytest.raises(ScriptError, match=r"^x.d:3: a zero byte, expected a text$"):
        read("x.d", text)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("#!/usr/sbin/dtrace -wqs", "-w in the #! line, .* permits destructive actions"),
        ("#!/usr/sbin/dtrace -qs -c ls", "-c in the #! line, .* runs a command"),
        ("#!/usr/sbin/dtrace -Gs", "-G in the #! line, .* object file"),
        ("#!/usr/sbin/dtrace -As", "-A in the #! line, .* boots"),
        ("#!/usr/sbin/dtrace -p 1 -s", "-p in the #! line, .* the configuration names"),
        ("#!/usr/sbin/dtrace -os", "-o in the #! line, .* only -CZ"),
        ("#!/usr/sbin/dtrace -x destructive -s", "-x destructive in the #! line"),
        ("#!/usr/sbin/dtrace -Cxcpppath=/tmp/x -s", "-x cpppath in the #! line"),
        ("#!/usr/sbin/dtrace script.d", "script.d in the #! line, expected options"),
        ("#!/bin/sh", "a script for /bin/sh, expected one for dtrace"),
        ("#!", "a script for nothing, expected one for dtrace"),
    ],
)
def test_refused_flags(line: str, says: str) -> None:
    """A #! line with a forbidden option, or of another program, is refused with the reason."""
    with pytest.raises(ScriptError, match=f"^x.d:1: {says}"):
        read("x.d", f"{line}\nBEGIN {{ @ = count(); }}")


PIECES = st.sampled_from(
    [
        *(
            "@",
            "@a",
            "[",
            "]",
            "(",
            ")",
            "{",
            "}",
            ";",
            ",",
            "=",
            "==",
            "count",
            "sum",
            "pid",
            '"x"',
        ),
        *(
            "lquantize",
            "clear",
            "printa",
            "inline int X = 5;",
            "X",
            "$1",
            "/*",
            "*/",
            "//",
            '"',
            "'",
        ),
        *(
            "\n#define X @",
            "\n#!",
            "\n",
            "#!dtrace -x",
            "\\",
            "?",
            ":",
            "xlate",
            "<",
            ">",
            "->",
            "`",
        ),
        *("@a[pid] = count();", "@ = sum(1);", "5"),
    ]
)


@given(st.one_of(st.text(), st.lists(PIECES).map(" ".join)))
def test_anything(text: str) -> None:
    """Any text is read or refused, and the labels are good."""
    try:
        script = read("x.d", text)
    except ScriptError as error:
        assert re.match(r"x\.d:\d+: .+, expected .+", str(error), re.DOTALL)  # noqa: PT017
        return
    for each in script.aggregations:
        named = [label for label in each.labels if label]
        assert len(each.labels) == len(each.keys)
        assert len({*named}) == len(named)
        assert all(re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_]*", label) for label in named)
        assert not {*named} & RESERVED


@given(programs())
def test_generated(program: Program) -> None:
    """The reader finds in a generated program what the generator put in."""
    script = read("x.d", program.text)
    put = {name: keys for name, keys, _ in program.put}
    assert {each.name: each.function for each in script.aggregations} == {
        name: program.functions[name] for name in put
    }
    assert {each.name: len(each.keys) for each in script.aggregations} == {
        name: len(keys) for name, keys in put.items()
    }
