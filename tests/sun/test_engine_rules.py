"""Each rule of the engine matters: without it, some program behaves differently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest

from sun.engine import Engine, Refused, Session
from sun.rules import Rules
from sun.small import BASE, Ram, types

SECOND = 1_000_000_000
Drive = Callable[[Engine, Session], None]


def fire(*events: tuple[str, int], advance: int = 1) -> Drive:
    """Return a function that fires these probes, with an argument each, and waits some seconds."""

    def drive(host: Engine, _: Session) -> None:
        for probe, arg in events:
            host.fire(f"fbt:ip:{probe}:entry", [arg])
        host.advance(advance * SECOND)

    return drive


def on_cpus(host: Engine, _: Session) -> None:
    """Fire on CPU 1, and then on CPU 0."""
    for cpu in (1, 0):
        host.fire("fbt:ip:f:entry", cpu=cpu)
    host.advance(SECOND)


ONCE = fire(("f", 0))


@dataclass(frozen=True)
class Case:
    """A program to which a rule matters.

    Args:
        text: the program.
        result: its output, followed by the beginning of dtrace(1)'s messages.
        drive: fires its probes.
        system: the system that runs it.
        dof_maxsize: the size limit of that kernel.
    """

    text: str
    result: str
    drive: Drive = ONCE
    system: str = "illumos"
    dof_maxsize: int | None = None


def byte_terms(count: int) -> str:
    """Return a clause with some bytes in one expression."""
    terms = " | ".join(f"(uint64_t)this->p[{n}]" for n in range(count))
    return (
        f'fbt:ip:f:entry {{ this->p = (uint8_t *)arg0; this->x = {terms}; printf("%d", this->x); }}'
    )


THING = BASE
FLAGS = "((thing_t *)arg0)->flags"
TWENTY = fire(*[("f", n) for n in range(20)])
CASES = {
    "alignment_checked": Case(
        'fbt:ip:f:entry { printf("%d", *(uint64_t *)(arg0 + 20)); }',
        "|dtrace: error on enabled probe ID 1 (ID 2: fbt:ip:f:entry): invalid alignment "
        "(0xffffff0000001014) in action #1 at DIF offset 12",
        fire(("f", THING)),
    ),
    "fault_ends_clause_only": Case(
        'fbt:ip:f:entry { *(int *)arg0; } fbt:ip:f:entry { printf("second"); }',
        "second|dtrace: error on enabled probe ID 1",
    ),
    "errors_fire": Case(
        'fbt:ip:f:entry { x = 1; *(int *)arg0; } fbt:ip:f:entry { printf("%d", x); }'
        "ERROR { x = 2; }",
        "2|dtrace: error on enabled probe ID 1",
    ),
    "drop_ends_clause": Case(
        "#pragma D option dynvarsize=1000\nfbt:ip:f:entry { t[arg0] = 1; x++; }"
        'END { printf("%d", x); }',
        "8|dtrace: 12 dynamic variable drops",
        TWENTY,
    ),
    "faults_told_each_time": Case(
        "fbt:ip:f:entry / *(int *)arg0 / { }",
        "|dtrace: error on enabled probe ID 1 (ID 2: fbt:ip:f:entry): invalid address (0x0) in "
        "predicate at DIF offset 4|dtrace: error on enabled probe ID 1",
        fire(("f", 0), ("f", 0)),
    ),
    "this_kept": Case(
        'fbt:ip:f:entry { this->x = 5; } fbt:ip:g:entry { printf("%d", this->x); }',
        "5",
        fire(("f", 0), ("g", 0)),
    ),
    "lazy": Case('fbt:ip:f:entry { printf("%d", arg0 ? *(int *)arg0 : 7); }', "7"),
    "shifts_narrow": Case(
        f'fbt:ip:f:entry {{ printf("%d", {FLAGS} << 4); }}', "128", fire(("f", THING))
    ),
    "shifts_folded_unsigned": Case(
        'fbt:ip:f:entry { printf("%d", -8L >> 1); }', "9223372036854775804"
    ),
    "small_types_stay": Case(
        f'fbt:ip:f:entry {{ printf("%d", {FLAGS} + {FLAGS}); }}', "144", fire(("f", THING))
    ),
    "small_unsigned": Case(
        'fbt:ip:f:entry { printf("%d", (short)arg0); }', "65535", fire(("f", -1)), "solaris10"
    ),
    "records_truncated": Case('fbt:ip:f:entry { printf("%x", 1 << 40); }', "0"),
    "constants_cut": Case(
        'short s; fbt:ip:f:entry { s = -1; printf("%d %d", s, s == -1); }', "-1 0"
    ),
    "constants_signed": Case(
        'inline int X = -3; fbt:ip:f:entry { printf("%d", ((thing_t *)arg0)->count == X); }',
        "1",
        fire(("f", THING)),
    ),
    "old_casts": Case(
        'fbt:ip:f:entry { printf("%d", (uint64_t)((thing_t *)arg0)->count); }',
        "4294967293",
        fire(("f", THING)),
        "solaris10",
    ),
    "clause_per_probe": Case(
        "fbt:ip:f:entry, fbt:ip:g:entry { x = 1; }",
        "|dtrace: failed to enable '/dev/stdin': DIF program exceeds maximum program size",
        dof_maxsize=700,
    ),
    "comment_refused": Case(
        "fbt:ip:f:entry / 1 / /* always */ { }",
        '|dtrace: failed to compile script /dev/stdin: line 1: syntax error near "{"',
        system="solaris10",
    ),
    "registers_leak": Case(
        byte_terms(6),
        "|dtrace: failed to compile script /dev/stdin: Insufficient registers to generate code",
        system="solaris10",
    ),
    "registers_limited": Case(
        f"fbt:ip:f:entry {{ x = {'arg0 + (' * 7}arg0{')' * 7}; }}",
        "|dtrace: failed to enable '/dev/stdin': DIF program content is invalid",
        system="solaris10",
    ),
    "versions_differ": Case(
        'fbt:ip:f:entry { printf("%d", ntohs(arg0)); }',
        "|dtrace: failed to compile script /dev/stdin: line 1: undefined function name: ntohs",
        system="solaris10",
    ),
    "program_limited": Case(
        "fbt:ip:f:entry { x = 1; }",
        "|dtrace: failed to enable '/dev/stdin': DIF program exceeds maximum program size",
        dof_maxsize=100,
    ),
    "room_first": Case(
        '#pragma D option bufsize=64\nfbt:ip:f:entry { x++; printf("x"); }'
        'END { printf(" %d", x); }',
        "xx 2|dtrace: 18 drops on CPU 0",
        TWENTY,
    ),
    "keys_need_room": Case(
        '#pragma D option bufsize=64\nfbt:ip:f:entry { printf("x"); }'
        'fbt:ip:f:entry { @n = count(); } END { printa(" %@d", @n); }',
        "xx 1|dtrace: 37 drops on CPU 0",
        TWENTY,
    ),
    "buffers_limited": Case(
        '#pragma D option bufsize=64\nfbt:ip:f:entry { printf("x"); }',
        "xx|dtrace: 18 drops on CPU 0",
        TWENTY,
    ),
    "aggregations_limited": Case(
        "#pragma D option aggsize=512\nfbt:ip:f:entry { @n[arg0] = count(); }"
        'END { printa("x%@d", @n); }',
        "x1x1x1x1x1x1x1|dtrace: 13 aggregation drops on CPU 0",
        TWENTY,
    ),
    "dynvars_limited": Case(
        "#pragma D option dynvarsize=1000\nuint64_t t[uint64_t]; fbt:ip:f:entry { t[arg0] = 1; }"
        'END { printf("%d %d", t[7], t[8]); }',
        "1 0|dtrace: 12 dynamic variable drops",
        TWENTY,
    ),
    "freed_later": Case(
        "#pragma D option dynvarsize=1000\nfbt:ip:f:entry { t[arg0] = 1; t[arg0] = 0; }",
        "|dtrace: 12 dynamic variable drops with non-empty dirty list",
        TWENTY,
    ),
    "buffers_grow": Case(
        "#pragma D option bufsize=16\nfbt:ip:f:entry { @n[arg0] = count(); }"
        'END { printa("x%@d", @n); }',
        "x1",
    ),
    "zero_frees": Case(
        "#pragma D option dynvarsize=1000\n"
        "fbt:ip:f:entry { self->x = 1; t[arg0] = 1; t[arg0] = 0; }"
        'tick-1s { t[20] = 5; printf("%d", t[20]); }',
        "5",
        TWENTY,
    ),
    "snapshot_first": Case(
        'fbt:ip:f:entry { @n = count(); } tick-1s { printa("%@d", @n); trunc(@n); }', "1"
    ),
    "trunc_on_copy": Case(
        "#pragma D option aggrate=3s\nfbt:ip:f:entry { @n = count(); }"
        'tick-1s { printa("%@d", @n); trunc(@n); }',
        "1",
        fire(("f", 0), advance=4),
    ),
    "rows_by_cpu": Case('fbt:ip:f:entry { printf("%d", cpu); }', "01", on_cpus),
    "rows_merged": Case(
        "fbt:ip:f:entry { @n[1] = count(); } fbt:ip:g:entry { @n[1L] = count(); }"
        'END { printa("%d=%@d ", @n); }',
        "1=2 ",
        fire(("f", 0), ("g", 0)),
    ),
    "sorted_by_value": Case(
        'fbt:ip:f:entry { @n[arg0] = count(); } END { printa("%d=%@d ", @n); }',
        "2=1 1=2 ",
        fire(("f", 1), ("f", 2), ("f", 1)),
    ),
}


def result(case: Case, rules: Rules) -> str:
    """Return the output of a case's program, and dtrace(1)'s messages."""
    ram = Ram()
    assert ram.thing(count=-3, flags=200) == THING
    host = Engine(
        *(types(), None, 2, rules, case.system, ram.load, case.dof_maxsize),
    )
    try:
        session = host.start(case.text)
    except Refused as refused:
        return f"|{refused}"
    case.drive(host, session)
    session.stop()
    return "|".join([session.output, *session.errors])


def test_every_rule_has_a_case() -> None:
    """There is a case for each rule."""
    assert list(CASES) == [field.name for field in fields(Rules)]


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    """A rule has its effect, and without it the program behaves differently."""
    case = CASES[name]
    with_rule = result(case, Rules())
    assert with_rule.startswith(case.result)
    assert result(case, replace(Rules(), **{name: False})) != with_rule


@pytest.mark.parametrize("system", ["illumos", "solaris10"])
def test_other_rules_do_not_matter(system: str) -> None:
    """A program that needs none of the rules behaves the same without them."""
    text = 'fbt:ip:f:entry { @n = count(); } END { printa("%@d", @n); }'
    none = Rules(**{field.name: False for field in fields(Rules)})
    assert result(Case(text, "", system=system), none) == "1"
