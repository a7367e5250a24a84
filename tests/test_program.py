"""The D programs as text: the numbers filled in, the parts left out, and the part to blame."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import dtrace_exporter
from dtrace_exporter import config
from dtrace_exporter.families import families
from dtrace_exporter.families import parts as all_parts
from dtrace_exporter.trace import HEADER
from dtrace_exporter.tracing import btf, program, rows
from dtrace_exporter.tracing.program import (
    Program,
    ProgramError,
    capabilities,
    load,
    load_senders,
    load_trace,
)
from dtrace_exporter.tracing.refusal import blame
from dtrace_exporter.tracing.rendering import render, window

FILES = {
    file.stem: load(file.stem)
    for file in Path(dtrace_exporter.__file__).with_name("programs").glob("*.d")
}
"""All programs: those that count, and those that print a line for each event."""
NAMES = sorted(families())
SUNS = sorted({*NAMES} - {"linux"})
TRACES = sorted(name for name in FILES if name.endswith("_trace"))
SENDERS = sorted(name for name in FILES if name.endswith("_senders"))
CALLS = sorted(name for name in FILES if name.endswith("_calls"))
UNIX = sorted(name for name in FILES if name.endswith("_unix"))
LINUX = FILES["linux"]
OF_ZONES = Program("own.d", 'BEGIN\n{\n\tprintf("ready 1 0\\n");\t/* place zone */\n}\n')

COUNTERS = {"LISTENOVERFLOWS": 20, "LISTENDROPS": 21, "TCPREQQFULLDROP": 76}
TIMING = {"PORT", "TURN"}
ONE_PORT = "one_port"
NOT_ENABLED = "dtrace: could not enable tracing: Failed to enable {}: Operation not supported"
NO_MATCH = "dtrace: invalid probe specifier {0}: probe description {0} does not match any probes"
TOO_LARGE = [
    "dtrace: could not enable tracing: DIF program exceeds maximum program size",
    "dtrace: failed to enable '/dev/stdin': DIF program content is invalid",
    "dtrace: failed to compile script /dev/stdin: Insufficient registers to generate code",
    "dtrace: failed to compile script /dev/stdin: Insufficient tuple registers to generate code",
]
HARMLESS = "#pragma D option destructive=unset"
END = f"\n{HARMLESS}\n"
IN_SCRIPT = "dtrace: failed to compile script /dev/stdin: line {}: {}"

PROBE = r"BEGIN|END|ERROR|tick-\w+|\w+:\w*:[\w.]*:[\w-]+"
DECLARATION = r"^(#!|#pragma |inline |this |self |(struct )?\w+ \*?\w+(\[[\w *,]+\])?[;,]).*$"
each_sun = pytest.mark.parametrize("name", SUNS)
each_of_zones = pytest.mark.parametrize("name", [name for name in SUNS if name != "freebsd"])
each_program = pytest.mark.parametrize("name", NAMES)
each_trace = pytest.mark.parametrize("name", TRACES)
each_senders = pytest.mark.parametrize("name", SENDERS)
each_file = pytest.mark.parametrize("name", sorted(FILES))


def rendered(name: str, without: Iterable[str] = ()) -> str:
    """Return a program for a tick of one second, without some parts."""
    return render(FILES[name], window(1.0), without=[*without])


def inlines(text: str) -> dict[str, int]:
    """Return the numbers in a program's inline declarations."""
    found = re.findall(r"^inline \w+ (\w+) = ([-\w]+);", text, flags=re.MULTILINE)
    return {name: int(value, 0) for name, value in found}


def without_comments(text: str) -> str:
    """Return a program's text with its comments blanked."""
    return re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)


def code(text: str) -> str:
    """Return only the clauses of a program."""
    return re.sub(DECLARATION, "", without_comments(text), flags=re.MULTILINE)


def clauses(text: str) -> list[tuple[list[str], str]]:
    """Split a program into clauses: the probe descriptions of each, and its body.

    Raises:
        AssertionError: the text between two bodies is not a probe list with at most a predicate.
    """
    found = []
    for head, body in re.findall(r"([^{}]*)\{([^{}]*)\}", code(text)):
        probes, *predicate = re.split(r"(?<=\s)/", head.strip(), maxsplit=1)
        assert not predicate or predicate[0].endswith("/"), head
        names = [name.strip() for name in probes.split(",")]
        assert all(re.fullmatch(PROBE, name) for name in names), f"no probe list: {head}"
        found.append((names, body))
    return found


def lines(text: str) -> list[tuple[str, str]]:
    """Return a program's lines, each with its optional part, or an empty string for the core.

    Raises:
        AssertionError: a part begins within another one, or ends without having begun.
    """
    found = []
    part = ""
    for line in text.splitlines():
        if begin := re.search(r"/\* begin (\w+) \*/", line):
            assert not part, f"{begin[1]} begins within {part}"
            part = begin[1]
        only = re.search(r"/\* only (\w+) \*/", line)
        found.append((line, only[1] if only else part))
        if end := re.search(r"/\* end (\w+) \*/", line):
            assert end[1] == part
            part = ""
    assert not part, f"{part} does not end"
    return found


def owners(text: str) -> dict[str, set[str]]:
    """Return for each probe the optional parts that name it; the core is an empty string."""
    found: dict[str, set[str]] = {}
    for line, owner in lines(text):
        if re.match(rf"({PROBE})(?=[,\s]|$)", line):
            for probe in re.findall(rf"(?:^|, *)({PROBE})(?=[,\s]|$)", line.partition("{")[0]):
                found.setdefault(probe, set()).add(owner)
    return found


def needs(name: str) -> dict[str, set[str]]:
    """Return for each part of a program the parts that it needs."""
    found = re.findall(r"/\* (\w+) needs (.+?) \*/", FILES[name].text)
    facts = {part: {*one.needs} for part, one in FILES[name].family.parts.items() if one.needs}
    return facts | {part: set(words.split(", ")) for part, words in found}


def gone_with(name: str, without: Iterable[str]) -> set[str]:
    """Return all parts that go with some parts of a program: those that need them, and so on."""
    gone = {*without}

    def lacks(on: set[str]) -> bool:
        return any({*each.split("|")} <= gone for each in on)

    while more := {part for part, on in needs(name).items() if lacks(on)} - gone:
        gone |= more
    return gone


def read_and_written(text: str) -> tuple[set[str], set[str]]:
    """Return the variables and aggregations that a program's clauses read, and those they write."""
    arrays = re.findall(r"^(?:struct )?\w+ \*?(\w+)\[[\w *,]+\];", text, flags=re.MULTILINE)
    names = "|".join(["(?:this|self)->\\w+", *(rf"(?<!@)\b{array}(?=\[)" for array in arrays)])
    read, written = set(), set()
    for name, index, change in re.findall(
        rf"({names})(\[[^\]]*\])?\s*(=(?!=)|[-+&|]=|\+\+)?", code(text)
    ):
        read |= {*re.findall(rf"{names}", index), *([] if change == "=" else [name])}
        written |= {name} if change else set()
        written |= {*re.findall(r"(this->\w+) = ", index)}
    for name, keys in re.findall(r"(?<!%)(@\w+)(\[)?", code(text)):
        (written if keys else read).add(name)
    return read, written


def printed(text: str) -> list[str]:
    """Return the lines that a program prints, with a 1 in place of every number."""
    formats = re.findall(r'\bprint[af]\("([^"]*)"', code(text))
    padded = re.sub(r"%0(\d+)x", lambda found: "1".zfill(int(found[1])), "".join(formats))
    return re.sub(r"%@?[dx]", "1", padded).replace("%s", "name").split("\\n")


@given(st.integers(100, 10_000))
def test_window_of_every_interval(milliseconds: int) -> None:
    """A set is emptied one turn before its next use, and patience ends well before that.

    A session that is silent for longer loses counts; yet patience allows for some late ticks.
    """
    chosen = window(milliseconds / 1000)
    assert chosen.interval == milliseconds / 1000
    assert 5 * chosen.interval <= chosen.patience < 0.9 * chosen.turn / 1e9
    assert chosen.turn >= 30e9


# Which programs exist


def test_the_programs_there_are() -> None:
    """The configuration knows each program, and the programs of Linux and illumos exist."""
    assert {"linux", "illumos"} <= {*NAMES} <= {*config.PROGRAMS} - {"auto"}
    assert {name.removesuffix("_trace") for name in TRACES} <= {*NAMES}
    assert {name.removesuffix("_senders") for name in SENDERS} <= {*NAMES}
    assert {name.removesuffix("_calls") for name in CALLS} <= {*NAMES}
    assert {name.removesuffix("_unix") for name in UNIX} <= {*NAMES}
    assert FILES.keys() == {*NAMES, *TRACES, *SENDERS, *CALLS, *UNIX}
    assert all(file.name == name for name, file in FILES.items())


def test_parts_of_linux() -> None:
    """The optional parts of Linux are listed in their order."""
    assert LINUX.parts == (
        "syn_drops",
        "ack_drops",
        "established",
        "handshake",
        "accepts",
        "accept_wait",
        "mptcp",
        "half_open_end",
        "synack_retransmits",
    )


@pytest.mark.parametrize("name", [*TRACES, *CALLS])
def test_family_of_a_program(name: str) -> None:
    """The programs that trace and that watch calls have the facts of their family."""
    assert FILES[name].family.name == name.rpartition("_")[0]
    assert FILES[name].place_label == FILES[name].family.place


@pytest.mark.parametrize(
    ("platform", "name"),
    [("linux", "linux"), ("freebsd14", "freebsd"), ("sunos5", ""), ("darwin", "")],
)
def test_local(platform: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux and FreeBSD have one program; on Solaris and illumos the kernel decides."""
    monkeypatch.setattr("sys.platform", platform)
    assert program.local(["dtrace"]) == name


def test_load_a_path(tmp_path: Path) -> None:
    """A program given by path is read as it is, and is also its own program for traces."""
    file = tmp_path / "own.d"
    file.write_text("BEGIN { exit(0); }\n", encoding="utf-8")
    assert load(str(file)) == Program(str(file), "BEGIN { exit(0); }\n")
    assert load_trace(str(file)) == load(str(file))


@each_trace
def test_load_trace(name: str) -> None:
    """The trace program of a family is the one that is named after it."""
    assert load_trace(name.removesuffix("_trace")) == FILES[name]


@each_senders
def test_load_senders(name: str, tmp_path: Path) -> None:
    """The senders program of a family counts by sender, for a program of one's own too."""
    family = name.removesuffix("_senders")
    assert load_senders(family) == FILES[name]
    assert FILES[name].family.name == family
    own = tmp_path / "own.d"
    text = f"/* made of {family}.d */ /* place {FILES[family].place_label} */"
    own.write_text(text, encoding="utf-8")
    assert load_senders(str(own)) == FILES[name]
    with pytest.raises(ProgramError, match="the D program nonsense_senders: No such file"):
        load_senders("nonsense")


def test_load_errors(tmp_path: Path) -> None:
    """A program that cannot be read gives an error with its name and the reason."""
    missing = str(tmp_path / "missing.d")
    with pytest.raises(ProgramError, match=re.escape(missing) + ": No such file or directory"):
        load(missing)
    with pytest.raises(ProgramError, match="it is a directory and not a regular file"):
        load(str(tmp_path))
    binary = tmp_path / "binary.d"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ProgramError, match=r"binary\.d: not UTF-8"):
        load(str(binary))
    # Sun's DTrace would stop there, before the line that forbids destructive actions.
    binary.write_bytes(b'#pragma D option destructive\nBEGIN { system("id"); }\n\0')
    with pytest.raises(ProgramError, match=r"binary\.d: a zero byte in it"):
        load(str(binary))
    with pytest.raises(ProgramError, match="the D program nonsense: No such file"):
        load("nonsense")
    with pytest.raises(ProgramError, match="the D program nonsense_trace: No such file"):
        load_trace("nonsense")


@each_program
def test_place(name: str) -> None:
    """The place is a network namespace on Linux, a jail on FreeBSD, and a zone elsewhere."""
    assert FILES[name].place_label == {"linux": "netns", "freebsd": "jail"}.get(name, "zone")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("", "netns"),
        ("/* place netns */", "netns"),
        ("/* place zone */", "zone"),
        ("/* place nowhere */", "netns"),
        ("/* place zones */", "netns"),
        ("/* in place of a zone */", "netns"),
    ],
)
def test_place_of_an_own_program(text: str, label: str) -> None:
    """A program that names no place, or an unknown one, is taken to have network namespaces."""
    own = Program("own.d", text)
    assert own.place_label == label
    assert capabilities(own, {}).place_label == label


@each_file
def test_drop_counters_needed(name: str) -> None:
    """Only the programs for Linux that see drops need the kernel's drop counters."""
    assert FILES[name].needs_drop_counters == (name in {"linux", "linux_trace", "linux_senders"})


# Filling in


@each_program
def test_render_fills_port_and_timing(name: str) -> None:
    """The port and the timing are in their inlines, and the period is in every tick."""
    text = render(FILES[name], window(0.25), 22)
    timing = {"TURN": window(0.25).turn} if name == "linux" else {}
    assert inlines(text) == inlines(FILES[name].text) | {"PORT": 22} | timing
    ticks = re.findall(r"^tick-\w+", text, flags=re.MULTILINE)
    assert set(ticks) == {"tick-250ms"}
    assert len(ticks) == len(re.findall(r"^tick-", FILES[name].text, flags=re.MULTILINE))


@each_file
def test_lines_of_one_port(name: str) -> None:
    """Lines for one port are present only if a port is given, and are not an optional part."""
    own = [line for line, owner in lines(FILES[name].text) if owner == ONE_PORT]
    assert bool(own) <= (name in SUNS)
    shared, one = (render(FILES[name], window(1.0), port) for port in (0, 22))
    assert {*own} <= {*one.splitlines()}
    assert not {*own} & {*shared.splitlines()}
    assert ONE_PORT not in FILES[name].parts
    assert ONE_PORT not in all_parts()
    if own:
        # The clauses are the same with these lines and without them.
        assert [probes for probes, _ in clauses(shared)] == [probes for probes, _ in clauses(one)]


def test_one_port_of_an_own_program() -> None:
    """The one_port markers work in a user's own program too, around several lines and on one."""
    text = "/* begin one_port */\na\n/* end one_port */\nb\t/* only one_port */\nc\n"
    own = Program("own.d", text)
    assert own.parts == ()
    assert render(own, window(1.0)) == f"c\n{END}"
    assert render(own, window(1.0), 80) == text + END


@each_file
def test_render_fills_the_kernels_numbers(name: str) -> None:
    """Each number of a kernel can be filled in by its name; an unknown name changes nothing."""
    found = inlines(FILES[name].text)
    numbers = {each: 1000 + n for n, each in enumerate(found) if found[each] >= 0}
    text = render(FILES[name], window(1.0), numbers={**numbers, "NONSENSE": 7})
    assert inlines(text) == {**found, **numbers}
    assert "NONSENSE" not in text


@each_file
def test_render_leaves_other_numbers(name: str) -> None:
    """Numbers that are not given stay as they are in the file."""
    before, after = inlines(FILES[name].text), inlines(rendered(name))
    assert {each: after[each] for each in after.keys() - TIMING} == {
        each: before[each] for each in before.keys() - TIMING
    }


def test_drop_counters_are_filled_in() -> None:
    """Each program that needs the kernel's drop counters has inlines that are filled with them."""
    for file in FILES.values():
        numbers = inlines(render(file, window(1.0), numbers=COUNTERS))
        own = {name: COUNTERS[name] for name in COUNTERS if name in inlines(file.text)}
        assert own.items() <= numbers.items()
        assert ({"LISTENOVERFLOWS", "LISTENDROPS"} <= own.keys()) == file.needs_drop_counters


def test_offsets() -> None:
    """The configuration's offsets are in lower case, and the inlines in upper case."""
    assert program.offsets({}) == {}
    assert program.offsets({"conn_tcp": 0x20, "conn_lport": 0x102}) == {
        "CONN_TCP": 0x20,
        "CONN_LPORT": 0x102,
    }


@each_program
def test_by_hand_it_is_the_default(name: str) -> None:
    """The file itself watches every port, with the timing of the default interval."""
    numbers = inlines(FILES[name].text)
    default = window(config.DTraceConfig().interval)
    assert numbers["PORT"] == 0
    assert numbers.get("TURN", default.turn) == default.turn
    assert ("TURN" in numbers) == (name == "linux")


@each_file
def test_render_changes_nothing_else(name: str) -> None:
    """Apart from the numbers and the period, a program with all parts is the same as its file."""
    *lines, empty, last = render(FILES[name], window(0.5), 1).splitlines()
    assert (empty, last) == ("", HARMLESS)
    changed = [
        (before, after)
        for before, after in zip(FILES[name].text.splitlines(), lines, strict=True)
        if before != after
    ]
    assert changed
    assert all(before.startswith(("inline int", "tick-1s")) for before, _ in changed)


@each_file
def test_options_given_outside_are_not_inside(name: str) -> None:
    """An option on the command line removes the program's own pragma for it, and no other."""
    before = re.findall(r"#pragma D option (\w+)", FILES[name].text)
    assert "quiet" in before
    for option in before:
        text = render(FILES[name], window(1.0), options=[option, "nonsense"])
        after = re.findall(r"#pragma D option (\w+)", text)
        assert after == [*(each for each in before if each != option), "destructive"]


@given(st.text(max_size=200), st.sets(st.sampled_from(["quiet", "destructive"])))
@example('#pragma D option destructive\nBEGIN { system("id"); }', set())
@example('#pragma D option destructive\n#include "x.d"', {"destructive"})
@example("BEGIN { }\n#pragma D option destructive \\", set())
@example("/* begin x */\nBEGIN { }", set())
def test_never_destructive(text: str, options: set[str]) -> None:
    """Whatever a program says, its last line unsets the option destructive.

    That line stands alone, so the end of the program's last line cannot absorb it.
    """
    made = render(Program("/own.d", text), window(1.0), options=options)
    assert made == END or made.endswith(f"\n{END}")


# What is printed


@pytest.mark.parametrize("without", [(), ("zones",), ("q0_limit",), ("zones", "q0_limit")])
@each_of_zones
def test_rows_are_those_that_are_read(name: str, without: tuple[str, ...]) -> None:
    """Every line that a program prints is a row, and the heartbeat comes after all counts.

    The first line is empty, because the text of a remote login shell before it may lack its end.
    """
    text = re.sub(r"inet_ntoa6?\(|(?=%x:%x:)", "", rendered(name, without))
    first, *all_lines, last = printed(text)
    assert (first, last) == ("", "")
    reader = rows.Reader()
    records: list[rows.Record] = []
    for line in all_lines:
        words = re.sub("(?<= )name(?= 1 1 1 )", "2001:db8:0:0:0:0:0:1", line)
        record = reader.read(words)
        # No listener was listed under the number 1.
        assert record is not None, line
        records.append(record)
    ready, *_, tick = records
    assert ready == rows.Ready(rows.PROTOCOL, "global")
    assert isinstance(tick, rows.Tick)
    kinds = [type(record) for record in records]
    assert {*kinds} == {
        *(rows.Ready, rows.Closed, rows.Listening, rows.Found, rows.Drops, rows.Opened),
        *(rows.Established, rows.Accepts, rows.Tick),
    }
    assert len(kinds) == len({*kinds})
    (told,) = (record for record in records if isinstance(record, rows.Listening))
    assert told.told
    assert told.place == ("" if "zones" in without else "name")
    assert told.q0max == (None if "q0_limit" in without else 1)


@pytest.mark.parametrize("without", [(), ("jails",)])
def test_rows_of_freebsd_are_those_that_are_read(without: tuple[str, ...]) -> None:
    """Every line that FreeBSD's program prints is a row too; it has no Q0."""
    text = re.sub(r"inet_ntoa6?\(", "", rendered("freebsd", without))
    first, *all_lines, last = printed(text)
    assert (first, last) == ("", "")
    reader = rows.Reader()
    all_lines = [line.replace(" name 1 - ", " 2001:db8::1 1 - ") for line in all_lines]
    records = [
        reader.read(line.replace("evicted name name", "evicted name 2001:db8::1"))
        for line in all_lines
    ]
    ready, *_, tick = records
    assert ready == rows.Ready(rows.PROTOCOL, "0")
    assert isinstance(tick, rows.Tick)
    assert sorted(type(record).__name__ for record in records) == sorted(
        kind.__name__
        for kind in (
            *(rows.Ready, rows.Closed, rows.Listening, rows.Found, rows.Drops, rows.Established),
            *(rows.Accepts, rows.Tick, rows.Limit),
            *(() if without else (rows.Evicted,)),
        )
    )
    (told,) = (record for record in records if isinstance(record, rows.Listening))
    assert (told.told, told.open, told.q0, told.q0max) == (True, True, None, None)
    assert told.place == ("" if without else "name")


@each_sun
def test_each_count_is_printed_once(name: str) -> None:
    """All aggregations are printed and emptied in one clause, that of the heartbeat."""
    (body,) = (body for probes, body in clauses(FILES[name].text) if probes[0] == "tick-1s")
    counted = re.findall(r"@(\w+)\[", code(FILES[name].text))
    pairs = re.findall(r'printa\("(\w+) [^"]*", @(\w+)\); trunc\(@(\w+)\);', body)
    assert sorted({*counted}) == sorted(aggregation for _, aggregation, _ in pairs)
    assert all(row == printed == emptied for row, printed, emptied in pairs)
    assert body.rindex("tick %d") > body.rindex("trunc")


@pytest.mark.parametrize(("name", "sets"), [("linux", 2), ("linux_calls", 1), ("linux_unix", 2)])
def test_rows_of_linux_are_those_that_are_read(name: str, sets: int) -> None:
    """Every line that a program for Linux prints is a row, and counts come after their set."""
    text = printed(re.sub(r'" ?\n?\s*"', "", FILES[name].text))
    first, ready, *lines, last = text
    assert (first, ready.split()[:2], last) == ("", ["ready", str(rows.PROTOCOL)], "")
    began = itertools.count(1)
    lines = [f"set {next(began)}" if line.startswith("set ") else line for line in lines]
    reader = rows.Reader()
    for line in (ready, *lines):
        words = line.replace("name", "::1").replace("count 1 1 ", "count 1 10 ")
        words = words.replace("unix 1 1 1 ", "unix 1 1 14 ")
        assert (reader.read(words) is None) == line.startswith(("set ", "more "))
    assert sum(line.startswith("set ") for line in lines) == sets
    assert any(line.startswith("tick ") for line in lines)


@each_trace
def test_traces_have_the_columns(name: str) -> None:
    """A trace program prints the header first, and all other lines have its columns."""
    header, *events, alive, last = [line.split(",") for line in printed(FILES[name].text)]
    # An empty line now and then, which trace skips.
    assert alive == last == [""]
    assert ",".join(header) == HEADER
    assert {len(columns) for columns in events} == {len(header)}
    actions = re.findall(r'"(syn|drop|established|accept)[":,]', FILES[name].text)
    actions += [columns[2].partition(":")[0] for columns in events if columns[2] != "name"]
    assert {*actions} == {"syn", "drop", "established", "accept"}


# Leaving out


@each_sun
def test_markers_are_of_parts_that_there_are(name: str) -> None:
    """Each part that a line is marked with, or that another part needs, has text of its own."""
    text, parts = FILES[name].text, {*FILES[name].parts}
    assert {*re.findall(r"/\* (?:only|begin) (.*?) \*/", text)} <= parts | {ONE_PORT}
    others = {*FILES[FILES[name].calls].parts} if FILES[name].calls else set()
    assert needs(name).keys() <= parts | others
    on = [one for part, each in needs(name).items() if part in parts for one in each]
    rested_on = {part for each in on for part in each.split("|")}
    assert rested_on <= parts
    marked = [line for line in text.splitlines() if "/* only" in line]
    assert all(len(re.findall(r"/\* (?:only|begin|end) ", line)) == 1 for line in marked)


def test_parts_have_words_for_people() -> None:
    """The family facts describe exactly the parts that the programs have."""
    found = {part for name in (*NAMES, *CALLS, *UNIX) for part in FILES[name].parts}
    assert found == all_parts().keys()
    assert all(part.what and part.without for part in all_parts().values())


def check_what_is_left(name: str, port: int, without: Iterable[str]) -> None:
    """Check that the rest of a program is well formed and contains nothing of the parts left out.

    Markers, braces and comments come in pairs, and every probe list is one. A probe is traced if
    and only if the core has it, or a part that is left in. No variable is read that is never
    written, and no aggregation is written after all that reads it is left out.
    """
    text = render(FILES[name], window(1.0), port, without=[*without])
    gone = gone_with(name, without) | (set() if port else {ONE_PORT})
    left = {owner for _, owner in lines(text)} - {""}
    assert left == {owner for _, owner in lines(FILES[name].text)} - {""} - gone
    assert text.count("/*") == text.count("*/")
    assert text.count("{") == text.count("}")
    traced = {probe for probes, _ in clauses(text) for probe in probes}
    having = owners(FILES[name].text)
    expected = {probe for probe, parts in having.items() if parts - gone}
    assert traced == {re.sub("^tick-1s$", "tick-1000ms", probe) for probe in expected}
    assert {"BEGIN", "tick-1000ms" if "END" in having else "tick-5s"} <= traced
    read, written = read_and_written(text)
    # A trace program looks for an event at BEGIN too, so that its list of probes always has an end.
    assert read <= written | ({"this->eager"} if name in TRACES else set())
    read_of_all, written_of_all = read_and_written(FILES[name].text)
    assert {each for each in written - read if each.startswith("@")} <= written_of_all - read_of_all


@pytest.mark.parametrize("port", [0, 22])
@each_sun
def test_what_is_left_without_a_part_or_two(name: str, port: int) -> None:
    """Without one part, two, all but one or all of them, the rest is a valid program."""
    parts = FILES[name].parts
    few = [subset for size in (0, 1, 2) for subset in combinations(parts, size)]
    for without in (*few, *combinations(parts, len(parts) - 1), parts):
        check_what_is_left(name, port, without)


@pytest.mark.parametrize("port", [0, 22])
@pytest.mark.parametrize("name", [f"{name}_trace" for name in SUNS])
def test_what_is_left_of_a_trace(name: str, port: int) -> None:
    """The trace programs stay valid without any set of their parts."""
    parts = FILES[name].parts
    for size in range(len(parts) + 1):
        for without in combinations(parts, size):
            check_what_is_left(name, port, without)


@pytest.mark.parametrize("name", ["linux", "linux_calls", "linux_unix"])
def test_what_is_printed_without_some_parts(name: str) -> None:
    """Whichever parts are left out, each aggregation that is printed or emptied is also filled."""
    parts = FILES[name].parts
    for size in range(len(parts) + 1):
        for without in combinations(parts, size):
            text = code(render(FILES[name], window(1.0), without=without))
            filled = {*re.findall(r"@(\w+)(?:\[[^\]]*\])? = ", text)}
            assert {*re.findall(r"@(\w+)\)", text)} <= filled


@given(st.sampled_from(SUNS), st.sampled_from([0, 22]), st.data())
def test_what_is_left_without_some_parts(name: str, port: int, data: st.DataObject) -> None:
    """A program stays valid without any random set of its parts."""
    check_what_is_left(name, port, data.draw(st.sets(st.sampled_from(FILES[name].parts))))


@each_program
def test_with_dependents(name: str) -> None:
    """Leaving out a part also leaves out all that need it; doing so again changes nothing."""
    file = FILES[name]
    assert file.with_dependents(()) == set()
    for size in (1, 2, 3):
        for subset in combinations(file.parts, size):
            gone = file.with_dependents(subset)
            assert gone == gone_with(name, subset) == file.with_dependents(gone)
    assert "accept_wait" in file.with_dependents({"accepts"})


def test_with_dependents_of_several() -> None:
    """A part may need several others, and parts that are unknown here are accepted."""
    parts = "".join(f"/* begin {part} */\n/* end {part} */\n" for part in "ad")
    needs = "/* a needs b, c */ x /* d needs c */\n/* nonsense needs */\n"
    own = Program("own.d", needs + parts)
    assert own.with_dependents({"b"}) == {"a", "b"}
    assert own.with_dependents(["c", "e"]) == {"a", "c", "d", "e"}
    assert own.with_dependents({"a"}) == {"a"}


# Who is to blame


def culprits(name: str) -> dict[str, set[str]]:
    """Return for each probe the parts that may be blamed for it; none if the core has it."""
    having = owners(FILES[name].text)
    return {
        probe: set() if "" in parts else parts for probe, parts in having.items() if ":" in probe
    }


@each_sun
def test_blame_by_probe(name: str) -> None:
    """An error about a probe blames an optional part that has the probe, unless the core has it.

    dtrace(1) names the probe as the program does, or with the name of the module filled in.
    """
    text = rendered(name)
    blamed = set()
    for probe, parts in culprits(name).items():
        full = re.sub(r"^(\w+)::(?=\w)", r"\1:vmlinux:", probe)
        for message in (NO_MATCH.format(probe), NOT_ENABLED.format(full), NO_MATCH.format(full)):
            for said in (message, f"dtrace(1) ended: exit status 1: {message} / dtrace: more"):
                part = blame(said, text, families()[name])
                assert part in parts if parts else part is None, probe
                blamed.add(part)
    with_probes = {part for parts in culprits(name).values() for part in parts}
    own = set() if name == "freebsd" else {"departures"}
    assert own | {"established", "accepts", "open_close"} <= blamed
    assert blamed <= with_probes | {None}


@each_sun
def test_blame_by_line(name: str) -> None:
    """An error at a line blames the part that the line belongs to."""
    text = rendered(name)
    for number, (line, owner) in enumerate(lines(text), 1):
        if owner:
            assert (
                blame(
                    IN_SCRIPT.format(number, "x is not a member of struct y"),
                    text,
                    families()[name],
                )
                == owner
            )
            assert (
                blame(
                    IN_SCRIPT.format(number, f'syntax error near "{line}"'), text, families()[name]
                )
                == owner
            )
        else:
            assert (
                blame(
                    IN_SCRIPT.format(number, "x is not a member of struct y"),
                    text,
                    families()[name],
                )
                is None
            )


@each_sun
def test_blame_by_line_and_probe(name: str) -> None:
    """At a line of the core the named probe decides; at a line of a part, that part is blamed."""
    text = rendered(name)
    core, *_ = (n for n, (line, owner) in enumerate(lines(text), 1) if line and not owner)
    own, part = next((n, owner) for n, (_, owner) in enumerate(lines(text), 1) if owner)
    for probe, parts in culprits(name).items():
        error = f"probe description {probe} does not match any probes"
        found = blame(IN_SCRIPT.format(core, error), text, families()[name])
        assert found in parts if parts else found is None
        assert blame(IN_SCRIPT.format(own, error), text, families()[name]) == part


@pytest.mark.parametrize(
    "message",
    [
        "",
        "dtrace: run as root for tracing and listing probes",
        "dtrace: failed to compile script /dev/stdin: line 999999: syntax error",
        "dtrace: failed to compile script /dev/stdin: line 0: syntax error",
        "dtrace: failed to initialize dtrace: DTrace device not available on system",
        NO_MATCH.format("fbt::nonsense:entry"),
        NO_MATCH.format("mib:::tcpListen"),
        NO_MATCH.format("dtrace:::BEGIN"),
        NO_MATCH.format(":::"),
        "no heartbeat for 15 s",
        *(
            f"/root/.ssh/config line {line}: Bad configuration option: x"
            for line in (120, 200, 240)
        ),
        *(f"dtrace(1) ended: exit status 127: bash: line {line}: no" for line in (120, 200, 240)),
        "bash: line 200: hello: not found / dtrace: run as root for tracing and listing probes",
    ],
)
@each_program
def test_blame_nobody(name: str, message: str) -> None:
    """An error in the core, or without a place, blames no optional part."""
    assert blame(message, rendered(name), families()[name]) is None


@each_program
def test_blame_nobody_for_a_line_of_another_file(name: str) -> None:
    """An error at a line of one of DTrace's own libraries blames no part of the program."""
    text = rendered(name)
    for line in range(1, len(text.splitlines()) + 1):
        message = (
            f'dtrace: failed to compile script /dev/stdin: "/usr/lib64/dtrace/6.10/io.d",'
            f" line {line}: b_end_io is not a member of struct buffer_head"
        )
        assert blame(message, text, families()[name]) is None


fragments = st.sampled_from(
    [
        ":",
        "::",
        "fbt",
        "mib:::",
        "entry",
        "return",
        "tcp_accept",
        "tcpListenDrop",
        "line ",
        "7",
        "(",
    ]
)


@given(
    st.sampled_from(NAMES),
    st.text() | st.lists(fragments | st.text(max_size=3)).map("".join),
)
def test_blame_takes_any_text(name: str, message: str) -> None:
    """Any text is accepted; the result is a part that exists, or None."""
    assert blame(message, rendered(name), families()[name]) in {None, *FILES[name].parts}


@each_sun
def test_blaming_comes_to_an_end(name: str) -> None:
    """Leaving out the parts that have a probe removes the probe, so the error cannot come again."""
    for message in (NOT_ENABLED, NO_MATCH):
        without: set[str] = set()
        for probe, parts in culprits(name).items():
            for _ in parts:
                text = rendered(name, without)
                part = blame(message.format(probe), text, families()[name])
                if part is None:
                    break
                assert part not in without
                without |= FILES[name].with_dependents({part})
            assert (probe in owners(rendered(name, without))) == (not parts)
        assert without <= {*FILES[name].parts}


@pytest.mark.parametrize("message", TOO_LARGE)
@each_sun
def test_blame_for_the_size(name: str, message: str) -> None:
    """If a program is too large for the kernel or its registers, its spare parts go one by one.

    In the end no part is blamed, and no part is gone that all counters depend on.
    """
    family, file = families()[name], FILES[name]
    without: set[str] = set()
    turns = []
    while part := blame(f"dtrace(1) ended: {message}", rendered(name, without), family):
        assert part not in without
        turns.append(part)
        without |= file.with_dependents({part})
    assert turns == [*family.spare]
    assert not without & {"established", "departures", "accepts", "syn_drops", "open_close"}


@each_sun
def test_blame_for_the_size_at_a_line(name: str) -> None:
    """If a line needs too many registers, a spare part is blamed, not the part of the line."""
    text, family = rendered(name), families()[name]
    for number in range(1, len(text.splitlines()) + 1):
        message = IN_SCRIPT.format(number, "Insufficient registers to generate code")
        assert blame(message, text, family) == family.spare[0]


def test_blame_for_the_size_of_others() -> None:
    """The size of a program without spare parts, or an error of another program, blames no part."""
    for message in TOO_LARGE:
        assert blame(message, rendered("linux"), families()["linux"]) is None
        elsewhere = message.removeprefix("dtrace: ")
        assert blame(elsewhere, rendered("illumos"), families()["illumos"]) is None


# Linux: the family facts say which probes a part has


LINUX_SUBSETS = [
    pytest.param(subset, id="+".join(["linux", *subset]))
    for size in range(len(LINUX.parts) + 1)
    for subset in combinations(LINUX.parts, size)
]


def linux_probes(text: str) -> list[str]:
    """Return each probe in a program's probe lists, once for each time it appears."""
    comment_free = without_comments(text).partition("BEGIN")[2]
    return re.findall(r"\bfbt::[\w*]+:(?:entry|return)\b", comment_free)


def part_of(probe: str) -> str:
    """Return the part that a probe of Linux' program belongs to, or an empty string."""
    function, end = probe.removeprefix("fbt::").split(":")
    wanted = {function, f"{function}:{end}"}
    found = [name for name, part in families()["linux"].parts.items() if wanted & {*part.probes}]
    return found[0] if found else ""


def alone(text: str) -> list[str]:
    """Return for each line the only part that has it, by its markers or its probes."""
    found: list[str] = []
    marked = [owner for _, owner in lines(text)]
    head: list[str] = []
    inside, owner = False, ""
    for number, line in enumerate(text.splitlines()):
        if not inside and line.startswith("fbt::"):
            inside = True
            rest = "\n".join(text.splitlines()[number:])
            head = re.findall(r"fbt::[\w*]+:\w+", re.split(r"\n/ |\{", rest)[0])
            parts = {part_of(probe) for probe in head}
            owner = parts.pop() if len(parts) == 1 else ""
        found.append(marked[number] or (owner if inside else ""))
        if line.endswith("}") and (line == "}" or "{" in line):
            inside, owner = False, ""
    return found


@pytest.mark.parametrize("without", LINUX_SUBSETS)
def test_every_subset_of_parts_of_linux(without: tuple[str, ...]) -> None:
    """Without any set of parts, the rest is well formed and has nothing of the missing parts.

    All probes of the other parts and of the core are still there.
    """
    text = rendered("linux", without)
    gone = gone_with("linux", without)
    assert not {owner for _, owner in lines(text)} & gone
    assert text.count("/*") == text.count("*/")
    assert text.count("{") == text.count("}")
    expected = [probe for probe in linux_probes(LINUX.text) if part_of(probe) not in gone]
    assert linux_probes(text) == expected
    assert not re.search(r",\s*[/{]", without_comments(text).partition("BEGIN")[2])
    joined = re.sub(r",\n(?=fbt::)", ", ", text)
    for clause in re.split(r"(?m)^(?=fbt::)", joined)[1:]:
        assert re.match(r"fbt::[^{}]*?\n(/ [^{}]* /\n)?\{", clause), clause


def test_blame_by_probe_on_linux() -> None:
    """An error about a probe blames the part that has it, and no part if the core has it."""
    text = rendered("linux")
    for probe in {*linux_probes(text)}:
        full = probe.replace("fbt::", "fbt:vmlinux:")
        for message in (NO_MATCH.format(probe), NOT_ENABLED.format(full), NO_MATCH.format(full)):
            for said in (message, f"dtrace(1) ended: exit status 1: {message} / dtrace: more"):
                assert (blame(said, text, families()["linux"]) or "") == part_of(probe), probe


@pytest.mark.parametrize("version", ["4", "6"])
def test_blame_by_one_probe_of_a_pattern(version: str) -> None:
    """A probe that matches a pattern belongs to the part of the pattern."""
    text, linux = rendered("linux"), families()["linux"]
    function = f"fbt:vmlinux:tcp_v{version}_syn_recv_sock"
    assert blame(NOT_ENABLED.format(f"{function}:return"), text, linux) == "ack_drops"
    assert blame(NOT_ENABLED.format(f"{function}:entry"), text, linux) is None


def test_blame_by_line_on_linux() -> None:
    """An error at a line blames the only part that has the line, and else no part."""
    text = rendered("linux")
    owners_ = alone(text)
    assert {"ack_drops", "accepts", "accept_wait", "half_open_end", ""} <= {*owners_}
    for number, owner in enumerate(owners_, 1):
        message = IN_SCRIPT.format(number, "x is not a member of struct y")
        assert (blame(message, text, families()["linux"]) or "") == owner, number


def test_blaming_comes_to_an_end_on_linux() -> None:
    """Leaving out the part that has a probe removes the probe, so the error cannot come again."""
    for probe in {*linux_probes(LINUX.text)}:
        text = rendered("linux")
        part = blame(NO_MATCH.format(probe), text, families()["linux"])
        if part is not None:
            left = rendered("linux", LINUX.with_dependents({part}))
            assert probe not in linux_probes(left)


# What is exported


@each_program
def test_exports_of_everything(name: str) -> None:
    """With every part enabled, every series is filled, with all drop reasons of the kernel."""
    file = FILES[name]
    found = capabilities(file, dict.fromkeys(file.parts, True))
    linux = ("netns", "", {"q_full", "q0_full", "q_full_ack", "other"})
    jails = ("jail", "", {"q0_evicted", "q_full_ack", "other"})
    zones = ("zone", "global", {"q_full", "q0_full", "q0_evicted"})
    expected = {"linux": linux, "freebsd": jails}.get(name, zones)
    assert (found.place_label, found.own_place, {*found.reasons}) == expected
    assert len(found.reasons) == len({*found.reasons})
    assert found.syns
    assert (found.established, found.accepts, found.accept_wait) == (True, True, True)
    # Counted by what enters and leaves; Linux' queues are read instead, and FreeBSD has no Q0.
    assert (found.opened, found.departures) == (name in {"illumos", "solaris10"}, name != "linux")


@each_program
def test_exports_of_little(name: str) -> None:
    """A part that is left out takes its series away, and drops that nobody sees have no reason."""
    found = capabilities(FILES[name], {})
    assert found.reasons == ()
    assert (found.syns, found.established) == (True, False)
    assert (found.accepts, found.accept_wait) == (False, False)
    assert (found.opened, found.departures) == (False, False)
    assert capabilities(FILES[name], {"half_open": True}).opened
    departing = [part for part, facts in FILES[name].family.parts.items() if facts.departs]
    assert len(departing) == (name in SUNS)
    for part in departing:
        assert capabilities(FILES[name], {part: True}).departures
    assert capabilities(FILES[name], {"established": True}).established
    assert capabilities(FILES[name], {"accepts": True}).accepts
    assert capabilities(FILES[name], {"accept_wait": True}).accept_wait


def test_reasons_of_each_part() -> None:
    """On Linux, drops at the final ACK need a part of their own; with zones there are none."""
    assert {*capabilities(LINUX, {"ack_drops": True}).reasons} == {"q_full_ack", "other"}
    assert {*capabilities(LINUX, {"syn_drops": True}).reasons} == {"q_full", "q0_full", "other"}
    assert capabilities(OF_ZONES, {"ack_drops": True}).reasons == ()
    assert {*capabilities(OF_ZONES, {"syn_drops": True}).reasons} == {
        "q_full",
        "q0_full",
        "q0_evicted",
    }


def test_drop_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drop counters come from the kernel's types; if one is missing, there are none."""
    names = {
        "LINUX_MIB_LISTENOVERFLOWS": 20,
        "LINUX_MIB_LISTENDROPS": 21,
        "LINUX_MIB_TCPREQQFULLDROP": 76,
    }
    monkeypatch.setattr(btf, "enumerators", lambda *_: names)
    assert program.drop_counters(["dtrace"]) == COUNTERS
    monkeypatch.setattr(btf, "enumerators", lambda *_: {"LINUX_MIB_LISTENDROPS": 21})
    assert program.drop_counters(["dtrace"]) == {}


@pytest.mark.parametrize("error", [FileNotFoundError(), btf.BTFError("bad")])
def test_drop_counters_without_types(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel's types are missing or cannot be read, there are no drop counters."""

    def fail(*_: object) -> dict[str, int]:
        raise error

    monkeypatch.setattr(btf, "enumerators", fail)
    assert program.drop_counters(["dtrace"]) == {}


def test_another_hosts_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over ssh, neither the program nor the drop counters are taken from this host's kernel."""
    monkeypatch.setattr(btf, "enumerators", lambda *_: pytest.fail("asked this kernel"))
    monkeypatch.setattr("sys.platform", "linux")
    for command in (["ssh", "far", "dtrace"], ["/usr/bin/ssh", "far", "/usr/sbin/dtrace"]):
        assert not program.runs_here(command)
        assert program.local(command) == ""
        assert program.drop_counters(command) == {}
    assert program.runs_here(["sudo", "dtrace"])
