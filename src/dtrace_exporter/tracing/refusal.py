"""Finds the optional part of a program because of which dtrace(1) refused it."""

from __future__ import annotations

import re

from dtrace_exporter.families import Family
from dtrace_exporter.tracing.program import BEGIN, END, ONLY, clauses

# A line of the program. Before a line of one of DTrace's libraries is its file's name, in quotes.
_LINE = re.compile(r'(?<!", )\bline (\d{1,9})\b')
# Sun's DTrace names no line if a program is too large for the kernel's dtrace_dof_maxsize, or needs
# more registers than its virtual machine or the compiler has.
_TOO_LARGE = re.compile(
    r"DIF program exceeds maximum program size|DIF program content is invalid"
    r"|[Ii]nsufficient (?:tuple )?registers"
)
# It begins at a word boundary, so that a hostile message cannot make the search slow.
_PROBE = re.compile(r"(?<!\w)\w*:\w*:(?:([\w.*]+):(entry|return)\b|[\w.]*:(\w+))")
# An honest message names one.
_MOST_PROBES = 10


def blame(message: str, text: str, family: Family) -> str | None:
    """Return which optional part of a rendered program an error of dtrace(1) is about.

    Args:
        message: the error, which names a line of the program or a probe.
        text: the rendered program.
        family: the kernel family, whose facts give probes to parts.

    Returns:
        The part's name, or None if the error is not about an optional part.
    """
    owners = _owners(text, family)
    # A shell or ssh may name lines as well.
    message = message[message.find("dtrace: ") :] if "dtrace: " in message else ""
    if _TOO_LARGE.search(message):
        left = {*BEGIN.findall(text), *ONLY.findall(text)}
        return next((part for part in family.spare if part in left), None)
    for number in _LINE.findall(message):
        if 0 < int(number) <= len(owners) and owners[int(number) - 1]:
            return owners[int(number) - 1]
    for function, end, name in _PROBE.findall(message)[:_MOST_PROBES]:
        for part, facts in family.parts.items():
            if any(_covers(probe, function, message) for probe in facts.probes):
                return part
        probe = re.compile(rf":{re.escape(function)}:{end}\b" if function else rf":{name}\b")
        named = [
            owner
            for owner, line in zip(owners, text.splitlines(), strict=True)
            if probe.search(line)
        ]
        if named and all(named):
            return named[0]
    return None


def _covers(probe: str, function: str, message: str) -> bool:
    """Return whether a part's probe, which may be a pattern, is the one in a message."""
    pattern, _, end = probe.partition(":")
    return (
        bool(function)
        and re.fullmatch(pattern.replace("*", ".*"), function.replace("*", "x")) is not None
        and (not end or f"{function}:{end}" in message)
    )


def _owners(text: str, family: Family) -> list[str]:
    """Return for each line of a program its optional part, or an empty string for none."""
    owners: list[str] = []
    part = ""
    for probes, lines in clauses(text):
        alone = next(
            (
                name
                for name, facts in family.parts.items()
                if probes
                and all({probe, probe.partition(":")[0]} & {*facts.probes} for probe in probes)
            ),
            "",
        )
        for line in lines:
            if begin := BEGIN.search(line):
                part = begin[1]
            only = ONLY.search(line)
            owners.append(only[1] if only else part or alone)
            if END.search(line):
                part = ""
    return owners
