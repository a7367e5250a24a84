"""The D programs as text: what is filled in, what is left out, and who is to blame."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter import btf, program
from dtrace_exporter.program import Program, ProgramError, blame, choose, exports, render, window

LINUX = choose("linux")
TRACE = choose("linux_trace")
COUNTERS = {"LISTENOVERFLOWS": 20, "LISTENDROPS": 21, "TCPREQQFULLDROP": 76}
NOT_ENABLED = (
    "dtrace: could not enable tracing: Failed to enable fbt:vmlinux:{}: Operation not supported"
)
NO_MATCH = "dtrace: invalid probe specifier {0}: probe description {0} does not match any probes"
EVERY_SUBSET = [
    subset for size in range(len(LINUX.parts) + 1) for subset in combinations(LINUX.parts, size)
]


def rendered(without: tuple[str, ...] = ()) -> str:
    """Return the Linux program for a tick of a second, less some parts."""
    return render(LINUX, window(1.0), counters=COUNTERS, without=without)


def inlines(text: str) -> dict[str, int]:
    """Return the numbers in a program's inline declarations."""
    found = re.findall(r"^inline int (\w+) = (\d+);$", text, flags=re.MULTILINE)
    return {name: int(value) for name, value in found}


def without_comments(text: str) -> str:
    """Return a program's text with its comments blanked."""
    return re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)


def clauses(text: str) -> list[tuple[list[str], str]]:
    """Take a program apart: each clause's probe descriptions, and its body.

    Raises:
        AssertionError: the text between two bodies is no probe list with a predicate at most.
    """
    code = re.sub(
        r"^(#!|#pragma|inline |this |self |\w+ \w+\[int\];).*$", "", text, flags=re.MULTILINE
    )
    found = []
    for head, body in re.findall(r"([^{}]*)\{([^{}]*)\}", without_comments(code)):
        probes, *predicate = re.split(r"(?<=\s)/", head.strip(), maxsplit=1)
        assert not predicate or predicate[0].endswith("/"), head
        names = [name.strip() for name in probes.split(",")]
        assert all(re.fullmatch(r"BEGIN|END|tick-\w+|fbt::\w+:(entry|return)", n) for n in names), (
            f"no probe list: {head}"
        )
        found.append((names, body))
    return found


@given(st.integers(100, 10_000))
def test_window_of_every_interval(milliseconds: int) -> None:
    """Times fit their 29 bits though ticks be skipped, no finer clock would do, patience is short.

    A set is emptied half a generation after its last use; whoever is silent until then has lost
    counts, so patience has to end well before, and yet has to bear some ticks that are late.
    """
    chosen = window(milliseconds / 1000)
    generation = chosen.ticks * milliseconds * 1_000_000
    assert (generation * 4) >> chosen.clock <= 1 << 29
    assert (generation * 4) >> (chosen.clock - 1) > (1 << 29) - 1
    assert 5 * chosen.interval <= chosen.patience <= generation / 1e9 / 2 * 0.6
    assert generation / 1e9 >= 60 or chosen.ticks == 30


def test_choose_reads_the_programs() -> None:
    """The Linux program is there by name and by auto, with its optional parts in their order."""
    assert choose("auto") == LINUX
    assert LINUX.name == "linux"
    assert LINUX.parts == (
        "syn_drops",
        "ack_drops",
        "established",
        "accepts",
        "accept_wait",
        "half_open_end",
        "open_close",
    )


def test_choose_a_path(tmp_path: Path) -> None:
    """A path is read as it is."""
    file = tmp_path / "own.d"
    file.write_text("BEGIN { exit(0); }\n", encoding="utf-8")
    assert choose(str(file)) == Program(str(file), "BEGIN { exit(0); }\n")


def test_choose_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be had is named with the reason: no file, no text, no program for the system."""
    missing = str(tmp_path / "missing.d")
    with pytest.raises(ProgramError, match=re.escape(missing) + ": No such file or directory"):
        choose(missing)
    with pytest.raises(ProgramError, match="Is a directory"):
        choose(str(tmp_path))
    binary = tmp_path / "binary.d"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ProgramError, match=r"binary\.d: not UTF-8"):
        choose(str(binary))
    with pytest.raises(ProgramError, match="the D program nonsense: No such file"):
        choose("nonsense")
    monkeypatch.setattr("sys.platform", "plan9")
    with pytest.raises(ProgramError, match=r"no D program for plan9.*dtrace\.program"):
        choose("auto")


def test_render_fills_the_numbers() -> None:
    """Ports, timing and the kernel's counters stand in their inlines, the period in every tick."""
    text = render(LINUX, window(0.25), (22, 80), COUNTERS)
    assert inlines(text) == {
        "FIRST_PORT": 22,
        "LAST_PORT": 80,
        "TICKS": window(0.25).ticks,
        "CLOCK": window(0.25).clock,
        **COUNTERS,
    }
    ticks = re.findall(r"^tick-\w+", text, flags=re.MULTILINE)
    assert set(ticks) == {"tick-250ms"}
    assert len(ticks) == len(re.findall(r"^tick-", LINUX.text, flags=re.MULTILINE))


def test_render_without_counters() -> None:
    """Where the kernel does not tell its drop counters, number 0 stands for each of them."""
    numbers = inlines(render(LINUX, window(1.0)))
    assert {numbers[name] for name in COUNTERS} == {0}


def test_by_hand_it_is_the_default() -> None:
    """As it lies there the program watches every port, with the timing of the default interval."""
    numbers = inlines(LINUX.text)
    assert (numbers["FIRST_PORT"], numbers["LAST_PORT"]) == (0, 65535)
    assert (numbers["TICKS"], numbers["CLOCK"]) == (window(1.0).ticks, window(1.0).clock)


def test_render_changes_nothing_else() -> None:
    """Apart from the numbers and the period, a program with every part is the file as it lies."""
    changed = [
        (before, after)
        for before, after in zip(LINUX.text.splitlines(), rendered().splitlines(), strict=True)
        if before != after
    ]
    assert changed
    assert all(before.startswith(("inline int ", "tick-1s")) for before, _ in changed)


def test_options_given_outside_are_not_inside() -> None:
    """An option on the command line takes the place of the program's own pragma, only that one."""
    text = render(LINUX, window(1.0), options=["aggsize", "nonsense"])
    before = set(re.findall(r"#pragma D option (\w+)", LINUX.text))
    assert set(re.findall(r"#pragma D option (\w+)", text)) == before - {"aggsize"}
    assert "aggsize" in before


@pytest.mark.parametrize("without", EVERY_SUBSET, ids="+".join)
def test_every_subset_of_parts(without: tuple[str, ...]) -> None:
    """Whatever is left out, the rest is well formed and says no word of what is gone.

    Markers come in pairs, braces and comments too, every probe list is one, and no function that
    only a left-out part traces is named anywhere.
    """
    text = rendered(without)
    gone = {*without} | ({"accept_wait"} if "accepts" in without else set())
    begun = re.findall(r"/\* begin (\w+) \*/", text)
    assert begun == re.findall(r"/\* end (\w+) \*/", text)
    assert [*dict.fromkeys(begun)] == [part for part in LINUX.parts if part not in gone]
    assert not {*re.findall(r"/\* only (\w+) \*/", text)} & gone
    assert text.count("/*") == text.count("*/")
    assert text.count("{") == text.count("}")
    kept = clauses(text)
    assert sum(map(len, (body for _, body in kept))) > 0
    traced = {name for names, _ in kept for name in names}
    assert {"BEGIN", "END", "fbt::tcp_conn_request:entry", "fbt::tcp_conn_request:return"} <= traced
    owners = {
        "ack_drops": "syn_recv_sock",
        "established": "hashdance",
        "accepts": "inet_csk_accept",
        "half_open_end": "reqsk_destructor",
        "open_close": "inet_csk_listen_st",
    }
    for part, function in owners.items():
        assert any(function in name for name in traced) == (part not in gone)
    assert ("rcvq_space" in without_comments(text)) == ("accept_wait" not in gone)
    if {"syn_drops", "ack_drops"} <= gone:
        assert "this->mib" not in without_comments(text)


def test_every_probe_of_a_part_is_announced_where_all_events_meet() -> None:
    """Each clause for all events lists every probe that sets this->sk, with its marker."""
    lists = [names for names, _ in clauses(rendered()) if len(names) > 3]
    assert len(lists) == 3
    assert lists[0] == lists[1] == lists[2]


def test_the_trace_program_is_rendered_too() -> None:
    """The other program takes the same ports and counters, and has no clock."""
    text = render(TRACE, window(1.0), (22, 22), COUNTERS)
    assert inlines(text) == {"FIRST_PORT": 22, "LAST_PORT": 22, **COUNTERS}


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (NOT_ENABLED.format("tcp_v4_syn_recv_sock:return"), "ack_drops"),
        (NOT_ENABLED.format("inet_csk_complete_hashdance:entry"), "established"),
        (NOT_ENABLED.format("inet_csk_accept:return"), "accepts"),
        (NO_MATCH.format("fbt::inet_csk_listen_stop:entry"), "open_close"),
        (NO_MATCH.format("fbt::tcp_v6_reqsk_destructor:entry"), "half_open_end"),
    ],
)
def test_blame_by_probe(error: str, part: str) -> None:
    """A probe that cannot be enabled is traced to the optional part that alone has it."""
    assert blame(error, rendered()) == part
    assert blame(f"dtrace(1) ended: exit status 1: {error} / dtrace: more", rendered()) == part


@pytest.mark.parametrize(
    ("code", "error", "part"),
    [
        ("rcvq_space.time * 1000", "rcvq_space is not a member of struct tcp_sock", "accept_wait"),
        ("skc_state == 10", "skc_state is not a member of struct sock_common", "half_open_end"),
        ("->sk != NULL ? NULL :", "sk is not a member of struct request_sock", "half_open_end"),
        ("arg3 & 1 &&", "arg3 is not defined for fbt:vmlinux:x:entry", "established"),
        (
            "fbt::tcp_v4_syn_recv_sock:return,               /* only ack_drops */",
            "probe description fbt::tcp_v4_syn_recv_sock:return does not match any probes",
            "ack_drops",
        ),
        (
            "/ this->sk != NULL && generation & 1 /",
            "probe description fbt::tcp_v6_syn_recv_sock:return does not match any probes",
            "ack_drops",
        ),
        ("ns.inum", "ns is not a member of struct net", None),
        ("fbt::tcp_conn_request:entry", "probe description x does not match any probes", None),
    ],
)
def test_blame_by_line(code: str, error: str, part: str | None) -> None:
    """An error that names a line is traced to the part the line is in, or then to its probe."""
    text = rendered()
    line = next(number for number, found in enumerate(text.splitlines(), 1) if code in found)
    message = f"dtrace: failed to compile script /dev/stdin: line {line}: {error}"
    assert blame(message, text) == part


@pytest.mark.parametrize(
    "message",
    [
        "",
        "dtrace: run as root for tracing and listing probes",
        NOT_ENABLED.format("tcp_conn_request:return"),
        "dtrace: failed to compile script /dev/stdin: line 999999: syntax error",
        "dtrace: failed to compile script /dev/stdin: line 0: syntax error",
        "dtrace: failed to initialize dtrace: DTrace device not available on system",
        "no heartbeat for 15 s",
    ],
)
def test_blame_nobody(message: str) -> None:
    """An error in the core, or one of no place at all, is not laid on an optional part."""
    assert blame(message, rendered()) is None


def test_blame_nobody_for_a_line_of_another_file() -> None:
    """A line of one of DTrace's own libraries is no line of the program."""
    text = rendered()
    for line in range(1, len(text.splitlines()) + 1):
        message = (
            f'dtrace: failed to compile script /dev/stdin: "/usr/lib64/dtrace/6.10/io.d",'
            f" line {line}: b_end_io is not a member of struct buffer_head"
        )
        assert blame(message, text) is None


@given(st.text())
def test_blame_takes_any_text(message: str) -> None:
    """Any text whatever is taken; it blames a part that exists, or nobody."""
    assert blame(message, rendered()) in {None, *LINUX.parts}


def test_blaming_comes_to_an_end() -> None:
    """Leaving out the part with a probe removes the probe: the same error cannot come again."""
    without: tuple[str, ...] = ()
    for function in re.findall(r"fbt::(\w+:\w+)", LINUX.text):
        message = f"dtrace: could not enable tracing: Failed to enable fbt:vmlinux:{function}: no"
        part = blame(message, rendered(without))
        if part:
            assert part not in without
            without = (*without, part)
            assert f"fbt::{function}" not in rendered(without)
    # The other two have no probe of their own.
    assert {*without, "syn_drops", "accept_wait"} == set(LINUX.parts)


def test_exports_of_everything() -> None:
    """With every part enabled every series is filled, and every reason a drop can have."""
    features = dict.fromkeys(LINUX.parts, True)
    found = exports(LINUX, features)
    assert found.place_label == "netns"
    assert set(found.reasons) == {"q_full", "q0_full", "q_full_ack", "other"}
    assert (found.established, found.accepts, found.accept_wait) == (True, True, True)


def test_exports_of_little() -> None:
    """A part that is left out takes its series along, and drops nobody sees have no reason."""
    found = exports(LINUX, {})
    assert found.reasons == ()
    assert (found.syns, found.established) == (True, False)
    assert (found.accepts, found.accept_wait) == (False, False)
    assert set(exports(LINUX, {"ack_drops": True}).reasons) == {"q_full_ack", "other"}
    assert set(exports(LINUX, {"syn_drops": True}).reasons) == {"q_full", "q0_full", "other"}
    assert exports(Program("illumos", ""), {}).place_label == "zone"


def test_drop_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's types are asked for the counters; where they do not say all, there are none."""
    names = {
        "LINUX_MIB_LISTENOVERFLOWS": 20,
        "LINUX_MIB_LISTENDROPS": 21,
        "LINUX_MIB_TCPREQQFULLDROP": 76,
    }
    monkeypatch.setattr(btf, "enumerators", lambda *_: names)
    assert program.drop_counters() == COUNTERS
    monkeypatch.setattr(btf, "enumerators", lambda *_: {"LINUX_MIB_LISTENDROPS": 21})
    assert program.drop_counters() == {}


@pytest.mark.parametrize("error", [FileNotFoundError(), btf.BTFError("bad")])
def test_drop_counters_without_types(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the kernel's types, or with ones that cannot be read, there are none either."""

    def fail(*_: object) -> dict[str, int]:
        raise error

    monkeypatch.setattr(btf, "enumerators", fail)
    assert program.drop_counters() == {}
