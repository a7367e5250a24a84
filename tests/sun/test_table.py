"""The simulator handles small D texts as Sun's engine did; see table.toml."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from sun.rules import Rules
from sun.table import Result, Text, difference, read, simulate

TYPES, TEXTS = read()
PLAYED = [(text, system) for text in TEXTS for system in text.results]
TEXTS_LEAST = 150
ENGINE_RULES = {
    "a program's size grows with its clauses' probes": ["clause_per_probe", "program_limited"],
    "loads are aligned": ["alignment_checked"],
    "registers are few, and leak": ["registers_leak", "registers_limited"],
    "shifts of bytes stay bytes": ["shifts_narrow", "small_types_stay", "records_truncated"],
    "a fault ends one clause": ["fault_ends_clause_only", "this_kept", "errors_fire"],
    "the older lexer, and what each version lacks": ["comment_refused", "versions_differ"],
    "constants and their signs": ["constants_signed", "constants_cut", "shifts_folded_unsigned"],
    "casts, and what is printed of them": ["old_casts", "small_unsigned"],
    "what is not chosen is not evaluated": ["lazy"],
    "dynamic variables are limited": [
        *("dynvars_limited", "drop_ends_clause", "freed_later", "zero_frees"),
    ],
    "aggregations are limited": ["aggregations_limited"],
    "a NULL in a predicate is told for every event": ["faults_told_each_time"],
    "without room nothing is done or counted": [
        *("room_first", "keys_need_room", "buffers_limited", "buffers_grow"),
    ],
    "printa and trunc lose nothing": ["snapshot_first", "trunc_on_copy"],
    "the order of rows": ["rows_by_cpu", "sorted_by_value", "rows_merged"],
}
"""What the programs of this project rely on, with the simulator's rules for it."""
SILENT = (
    "Insufficient registers to generate code",
    "DIF program content is invalid",
    "DIF program exceeds maximum program size",
)
"""Reasons of refusals for which dtrace(1) names no line."""


def about(text: str) -> Text:
    """Return the table's text with a description."""
    return next(entry for entry in TEXTS if entry.about == text)


def caught(text: Text, rules: Rules) -> bool:
    """Tell whether a simulator with these rules differs from the table for a text."""
    return any(
        difference(result, simulate(text, system, TYPES, rules))
        for system, result in text.results.items()
    )


def test_size() -> None:
    """The table has enough texts, each with a result on some system, and none twice."""
    assert len({text.d + str(text.events) for text in TEXTS}) == len(TEXTS) >= TEXTS_LEAST
    assert len({text.about for text in TEXTS}) == len(TEXTS)
    assert all(text.results for text in TEXTS)


@pytest.mark.parametrize(
    ("text", "system"), PLAYED, ids=[f"{system}-{text.about[:60]}" for text, system in PLAYED]
)
def test_text(text: Text, system: str) -> None:
    """The simulator refuses, prints, reports and counts as Sun's engine did."""
    got = simulate(text, system, TYPES)
    if text.unlike:
        assert text.unlike in got.refused
        assert got.refused.endswith("not simulated")
    else:
        assert difference(text.results[system], got) == ""


def test_sizes() -> None:
    """Over all texts together, the predicted sizes of programs are within one percent."""
    told = predicted = 0
    for text, system in PLAYED:
        if text.results[system].dof and not text.unlike:
            told += text.results[system].dof
            predicted += simulate(replace(text, events=()), system, TYPES).dof
    assert predicted == pytest.approx(told, rel=0.01)


def test_every_rule_is_in_the_table() -> None:
    """The rules that texts depend on are exactly the simulator's rules."""
    names = {field.name for field in fields(Rules)}
    assert {name for text in TEXTS for name in text.rules} == names
    assert {name for group in ENGINE_RULES.values() for name in group} == names


@pytest.mark.parametrize("name", [field.name for field in fields(Rules)])
def test_mutant(name: str) -> None:
    """Without one of its rules, the simulator differs in each text that depends on it."""
    rules = replace(Rules(), **{name: False})
    texts = [text for text in TEXTS if name in text.rules]
    assert texts
    assert [text.about for text in texts if not caught(text, rules)] == []


def test_a_comma_joins_what_is_compiled() -> None:
    """Two assignments that a comma joins are a smaller program than two statements."""
    joined = about("The size of a program with two assignments joined by a comma.")
    apart = about("The size of a program with two assignments.")
    for system, result in joined.results.items():
        assert result.dof < apart.results[system].dof


def test_refusals_without_a_line() -> None:
    """The table has every refusal without a line, in the words that users see."""
    refusals = [result.refused for text in TEXTS for result in text.results.values()]
    for reason in SILENT:
        assert any(reason in refused and "line " not in refused for refused in refusals)


def test_a_difference_is_told() -> None:
    """Differences are named: messages, output, errors, sizes by more than a tenth, registers."""
    told = Result(output="a", dof=100)
    assert difference(told, Result(output="a", dof=110)) == ""
    assert difference(told, Result(output="b", dof=100)) == "output: 'b', and not 'a'"
    assert difference(told, Result(output="a", dof=111)) == "dof: 111, and not about 100"
    assert difference(replace(told, register=8), replace(told, register=7)).startswith("register")
    assert difference(told, replace(told, errors=("x",))) == "errors: ('x',), and not ()"
    assert difference(told, Result("no")).startswith("refused: 'no'")
