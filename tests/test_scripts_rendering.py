"""The text that runs: the script with its lines, final rows, own rows, no destructive action."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.d_programs import Program, programs

from dtrace_exporter.scripts.conversions import conversions
from dtrace_exporter.scripts.reader import Script, ScriptError, read
from dtrace_exporter.scripts.rendering import LINUX, SUN, Conversions, new_token, question, render

HARMLESS = "#pragma D option destructive=unset"


def rendered(text: str, *letters: str, engine: str = LINUX) -> str:
    """Return the text that runs; ``letters`` are the conversions of each aggregation's keys."""
    script = read("x.d", text)
    given = tuple(map(tuple, letters)) or ((),) * len(script.aggregations)
    return render(script, given, engine=engine, interval=0.5, token="T")


def body(text: str, *letters: str, engine: str = LINUX) -> str:
    """Return what the script's own lines become."""
    return rendered(text, *letters, engine=engine).partition("\n\nBEGIN\n{\n\tprintf(")[0]


def test_all() -> None:
    """The script is followed by a ready row, rows at each tick and at the end, and the options."""
    text = "#!/usr/sbin/dtrace -Cs\nBEGIN { @a[execname, ustack()] = count(); @ = avg(1); }"
    assert rendered(text, "Sk", "", engine=SUN) == (
        "\nBEGIN { @a[execname, ustack()] = count(); @ = avg(1); }\n\n"
        'BEGIN\n{\n\tprintf("\\n\\036T ready\\036\\n");\n}\n'
        "tick-500ms\n{\n"
        '\tprinta("\\n\\036T row 0\\037%S\\037%k\\037%@d\\036\\n", @a);\n'
        '\tprinta("\\n\\036T row 1\\037%@d\\036\\n", @);\n'
        '\tprintf("\\n\\036T tick %d\\036\\n", timestamp);\n}\n'
        "END\n{\n"
        '\tprinta("\\n\\036T row 0\\037%S\\037%k\\037%@d\\036\\n", @a);\n'
        '\tprinta("\\n\\036T row 1\\037%@d\\036\\n", @);\n'
        '\tprintf("\\n\\036T tick %d\\036\\n", timestamp);\n}\n'
        f"#pragma D option quiet\n{HARMLESS}\n"
    )


FINAL = 'printa("\\n\\036T final 0\\037%@d\\036\\n", @a); '


@pytest.mark.parametrize(
    ("function", "statement", "linux", "sun"),
    [
        ("count()", "clear(@a)", "", f"{FINAL}clear(@a)"),
        ("sum(1)", "clear ( @a )", "", f"{FINAL}clear(@a)"),
        ("quantize(1)", "clear(@a)", "", f"{FINAL}clear(@a)"),
        ("count()", "trunc(@a)", f"{FINAL}trunc(@a)", f"{FINAL}trunc(@a)"),
        ("max(1)", "clear(@a)", f"{FINAL}trunc(@a)", f"{FINAL}trunc(@a)"),
        ("stddev(1)", "clear(@a)", f"{FINAL}trunc(@a)", f"{FINAL}trunc(@a)"),
        ("count()", "trunc(@a, 10)", "", ""),
        ("max(1)", "trunc(@a,\n10)", "\n", "\n"),
        ("count()", "trunc(@a, $1)", *["normalize(@a, 1 + 0 * ($1))"] * 2),
        ("count()", "clear(@elsewhere)", *["clear(@elsewhere)"] * 2),
        ("count()", "printa(@a)", *["printa(@a)"] * 2),
    ],
)
def test_emptied(function: str, statement: str, linux: str, sun: str) -> None:
    """A statement that empties an aggregation gets a final row before it, or goes; lines stay."""
    text = "BEGIN {{ @a = {}; }}\ntick-1s {{ printa(@a); {}; }}"
    assert body(text.format(function, statement)) == text.format(function, linux)
    assert body(text.format(function, statement), engine=SUN) == text.format(function, sun)


def test_average_on_linux() -> None:
    """On Linux an average's values are counted too, because its sign is not visible otherwise."""
    text = "BEGIN { x = 1; @a[pid,\n f(2)] = avg(1); @b = avg(-1); }\ntick-1s { clear(@a); }"
    found = rendered(text, "dd", "")
    assert (
        "x = 1; @T_0[pid, f ( 2 )] = count(); @a[pid,\n f(2)] = avg(1); @T_1 = count(); @b" in found
    )
    assert 'printa("\\n\\036T row 0\\037%d\\037%d\\037%@d\\037%@d\\036\\n", @a, @T_0);' in found
    assert "@a, @T_0); trunc(@a); trunc(@T_0); }" in found
    assert "@T_" not in rendered(text, "dd", "", engine=SUN)


def test_operators_in_keys() -> None:
    """The count of an average's values has the same keys, whatever operators they contain."""
    key = "a != b ? c << 2 : d >= 1 && ! e || f ^^ g <= 3 ? h -> i : j -- - ++ k"
    assert f"@T_0[{key}] = count(); @a" in rendered(f"BEGIN {{ @a[{key}] = avg(1); }}", "d")


def test_raw_values() -> None:
    """A normalized aggregation is printed as it was counted, in final rows too."""
    text = (
        "BEGIN { @a = sum(1); @b = sum(1); normalize(@a, 10); } tick-1s { trunc(@a); trunc(@b); }"
    )
    found = rendered(text)
    assert found.count("denormalize(@a); printa(") == found.count(", @a);") == 3
    assert "denormalize(@b)" not in found


def test_bare_aggregation() -> None:
    """The aggregation ``@_`` is the bare one, under the name that libdtrace gives it."""
    assert '036\\n", @); trunc(@); }' in body("BEGIN { @ = sum(1); } tick-1s { trunc(@_); }")


@pytest.mark.parametrize(
    "text", ["BEGIN { @ = sum(1); } END { if (x) clear(@); }", "clear(@); @ = sum(1)"]
)
def test_no_room(text: str) -> None:
    """If no final row fits before the statement that empties, the script is refused at its line."""
    with pytest.raises(ScriptError, match=r"^x\.d:1: clear behind .+, expected it behind { or ;"):
        rendered(text, engine=SUN)


def test_user_symbols() -> None:
    """Keys that make Linux' dtrace(1) end when they are printed are refused with a remedy."""
    text = "BEGIN { @m[umod(1)] = count(); }\nEND { @[pid, usym(1)] = count(); }"
    says = r"^x\.d:2: the key usym\(1\), expected umod\(\) or ustack\(1\)"
    with pytest.raises(ScriptError, match=says):
        rendered(text, "A", "dA")
    assert "%d\\037%A" in rendered(text, "A", "dA", engine=SUN)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("#pragma D option destructive\n", []),
        ("#pragma D option bufpolicy=ring\n", ["bufpolicy=switch"]),
        ("#!dtrace -xaggpack -s\n#pragma D option aggzoom\n", ["aggpack=unset", "aggzoom=unset"]),
        ("/* aggpack */", []),
    ],
)
def test_options(text: str, options: list[str]) -> None:
    """The exporter sets each option that matters last, and unsets destructive at the very end."""
    lines = rendered(f"{text}BEGIN {{ @ = count(); }}").splitlines()
    wanted = [f"#pragma D option {option}" for option in (*options, "quiet", "destructive=unset")]
    assert lines[-len(wanted) :] == wanted


def test_token() -> None:
    """Each run has a token of its own, which may follow an octal escape."""
    found = {new_token() for _ in range(100)}
    assert len(found) == 100
    assert all(re.fullmatch(r"t[0-9a-f]{16}", each) for each in found)


@given(programs(), st.sampled_from([LINUX, SUN]))
def test_generated(program: Program, engine: str) -> None:
    """The rendered text of a generated program has its aggregations and the exporter's own."""
    script = read("x.d", program.text)
    letters = tuple(("d",) * len(each.keys) for each in script.aggregations)
    again = read("x.d", render(script, letters, engine=engine, interval=1, token="T"))
    assert (
        tuple(each for each in again.aggregations if "T_" not in each.name) == script.aggregations
    )


@given(st.text(), st.sampled_from([LINUX, SUN]))
def test_anything(text: str, engine: str) -> None:
    """If a text can be read, so can its rendered text, and its lines stay where they were."""
    text += "\nBEGIN { @ok = avg(1); } tick-1s { trunc(@ok); }"
    try:
        script = read("x.d", text)
    except ScriptError:
        return
    letters = tuple(("d",) * len(each.keys) for each in script.aggregations)
    found = render(script, letters, engine=engine, interval=1, token="T")
    assert read("x.d", found).aggregations[-1 if engine == SUN else -2 :]
    assert found.splitlines()[-1] == HARMLESS
    for before, after in zip(text.split("\n"), found.split("\n"), strict=False):
        assert before == after or "@" in before or before.startswith("#!")


WRONG = """\
dtrace: failed to compile script /dev/stdin: [D_PRINTF_ARG_TYPE] line {}: printa( ) argument #{} \
is incompatible with conversion #{} prototype:
\tconversion: %d
\t prototype: char, short, int, long, or long long
\t  argument: {}
"""


class Compiler:
    """A fake ``dtrace -e`` that knows the types of some keys."""

    def __init__(self, *types: list[str]) -> None:
        self._types = types
        self.asked = 0

    async def __call__(self, text: str) -> tuple[int, str]:
        self.asked += 1
        rows = [line for line in text.splitlines() if "printa(" in line and " row " in line]
        first = text.splitlines().index(rows[0]) + 1
        for row, (line, types) in enumerate(zip(rows, self._types, strict=True)):
            for number, (letter, name) in enumerate(
                zip(re.findall(r"\\037%(\w)", line), types, strict=True), 1
            ):
                if letter not in LETTERS[name]:
                    return 1, WRONG.format(first + row, number + 1, number, name)
        return 0, ""


LETTERS = {
    "string": "S",
    "char [16]": "S",
    "pid_t": "d",
    "struct task_struct *": "p",
    "stack": "k",
    "_symaddr": "a",
    "_usymaddr": "A",
    "struct task_struct": "",
}


async def asked(text: str, *types: list[str]) -> tuple[Conversions, int]:
    """Return the conversions found for keys of some types, and the number of questions."""
    compiler = Compiler(*types)
    return await conversions(read("x.d", text), compiler), compiler.asked


async def test_likely() -> None:
    """If the types are what they look like, one question is enough."""
    text = """BEGIN { @a[execname, pid, "x", copyinstr(arg0)] = count();
        @b[ustack(5), func(arg0), usym(arg0)] = count(); @c = count(); }"""
    types: list[list[str]]
    types = [["string", "pid_t", "string", "string"], ["stack", "_symaddr", "_usymaddr"], []]
    assert await asked(text, *types) == ((("S", "d", "S", "S"), ("k", "a", "A"), ()), 1)


async def test_unlikely() -> None:
    """DTrace's errors give the types of the other keys, whatever they are."""
    text = "BEGIN { @a[b, this->c] = count(); @d[e, f, g, execname] = count(); }\n\n"
    types: list[list[str]]
    types = [["string", "struct task_struct *"], ["char [16]", "stack", "_usymaddr", "pid_t"]]
    assert await asked(text, *types) == ((("S", "p"), ("S", "k", "A", "d")), 7)


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (
            "dtrace: failed to compile script /dev/stdin: line 3:\n syntax error",
            "line 3: syntax error",
        ),
        (WRONG.format(1, 2, 1, "pid_t"), "argument: pid_t"),
        (WRONG.format(4, 2, 3, "pid_t"), "argument: pid_t"),
        (WRONG.format("1" * 5000, 2, 3, "pid_t"), "argument: pid_t"),
        ("line 1\x1b[2J: \x9b no", "x.d: line 1 [2J: no"),
        ("", "x.d: "),
    ],
)
async def test_other_errors(output: str, says: str) -> None:
    """Any other error of the compiler is the script's, in dtrace(1)'s words, fit for a terminal."""

    async def ask(_: str) -> tuple[int, str]:
        return 1, output

    with pytest.raises(ScriptError, match=re.escape(says)):
        await conversions(read("x.d", "BEGIN { @a[pid] = count(); }"), ask)


async def test_no_conversion() -> None:
    """A type that cannot be printed ends the questions with an error."""
    with pytest.raises(ScriptError, match=r"argument: struct task_struct$"):
        await asked("BEGIN { @a[*curthread, pid] = count(); }", ["struct task_struct", "pid_t"])


def test_question() -> None:
    """A question has no final rows, so each of the exporter's lines has one aggregation."""
    script: Script = read("x.d", "BEGIN { @a = sum(1); @b = sum(1); }\ntick-1s { trunc(@a); }")
    text, first = question(script, ((), ()))
    lines = text.splitlines()
    assert "@a);" in lines[first - 1]
    assert "@b);" in lines[first]
    assert "final" not in text
    assert lines[-1] == HARMLESS
