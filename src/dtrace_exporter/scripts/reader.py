"""Reads a D script: finds its aggregations, their functions and their keys.

It knows only the part of D's grammar that concerns aggregations. Assignments define what an
aggregation is; how it is printed does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from dtrace_exporter.scripts.labels import labels
from dtrace_exporter.scripts.lexer import Token, closing, separated, significant, tokens

FUNCTIONS: dict[str, int] = {
    **dict.fromkeys(("count", "sum", "min", "max", "avg", "stddev", "quantize"), 0),
    "lquantize": 3,
    "llquantize": 4,
}
"""The aggregating functions, and how many integer arguments define their buckets."""

_INTEGER = re.compile(r"(0x[0-9a-f]+|[0-9]+)u?l?l?", re.IGNORECASE)
_DEFINE = re.compile(r"\s*#\s*define\s+(\w+)(.*)", re.DOTALL)
_INCLUDE = re.compile(
    r"^[ \t\f\v]*(?:#|%:|\?\?=)[ \t\f\v]*(?:include|include_next|import|embed)\b[ \t\f\v]*(.*)",
    re.MULTILINE,
)
_HEADER = re.compile(r'"([^"\n]+)"|<([^>\n]+)>')
# GCC also joins lines if there are blanks after the backslash.
_JOINED = re.compile(r"(?:\\|\?\?/)[ \t\f\v]*\n")
# Strings, which are kept, and names in angle brackets; comments.
_HIDDEN = re.compile(
    r"""("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|(?:include|import|embed)[ \t\f\v]*<[^>\n]+>)"""
    r"|/\*(?s:.*?)(?:\*/|\Z)|//[^\n]*"
)

# Options of a #! line: those without a value and those with one, those that concern only the output
# of dtrace(1), and those that no script may have.
_FLAGS, _WORDED, _MEANINGLESS = "CZ", "DILUXbx", "FSqs"
_REFUSED = {
    "A": "that is for tracing while the system boots",
    "G": "that makes an object file and runs nothing",
    "a": "that is for tracing while the system boots",
    "c": "that runs a command",
    "p": "the configuration names the process",
    "w": "that permits destructive actions",
}
# Options of -x that would run or read other files, or permit destructive actions as -w does.
_REFUSED_OPTIONS = frozenset(
    {
        *("destructive", "cpp", "cpphdrs", "cppargs", "cpppath", "ctypes", "dtypes", "ldpath"),
        # Scripts can use -I and -L instead of these.
        *("incdir", "libdir", "syslibdir"),
    }
)


class ScriptError(Exception):
    """There is an error in a script; the text has the file, the line and what was expected."""


@dataclass(frozen=True, slots=True)
class Aggregation:
    """An aggregation of a script.

    Attributes:
        name: its name without the ``@``; empty for the anonymous one.
        function: one of FUNCTIONS.
        keys: the expressions of its keys, as in its first assignment.
        labels: a name for each key, all different and fit for Prometheus; empty for a key that is
            always the same literal.
        arguments: for lquantize the low bound, the high bound and the step; for llquantize the
            factor, the low and the high magnitude and the steps. Empty for other functions, and if
            they are not literals.
        line: the line of its first assignment, from 1.
    """

    name: str
    function: str
    keys: tuple[str, ...]
    labels: tuple[str, ...]
    arguments: tuple[int, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Script:
    """A script; ``flags`` are the options of its #! line that are passed on to dtrace(1)."""

    path: str
    text: str
    flags: tuple[str, ...]
    aggregations: tuple[Aggregation, ...]


@dataclass(frozen=True, slots=True)
class Assignment:
    """An assignment ``@name[keys] = function(arguments)`` at position ``start`` of the text."""

    name: str
    function: str
    keys: list[tuple[Token, ...]]
    arguments: list[tuple[Token, ...]]
    start: int


class Source:
    """A script's text, and the tokens of its statements and probes."""

    def __init__(self, path: str, text: str) -> None:
        self._path = path
        self.text = text
        self.tokens = significant(text)

    def line(self, start: int) -> int:
        """Return the number of the line of a position in the text."""
        return self.text.count("\n", 0, start) + 1

    def error(self, start: int, found: str, expected: str) -> ScriptError:
        """Return an error about a position in the text."""
        return ScriptError(f"{self._path}:{self.line(start)}: {found}, expected {expected}")

    def assignments(self) -> Iterator[Assignment]:
        """Yield the assignments to aggregations.

        Raises:
            ScriptError: one of them is not the assignment of an aggregating function.
        """
        for index, token in enumerate(self.tokens):
            if token.kind != "aggregation":
                continue
            keys, at = self._bracketed(index + 1, "[")
            behind = self.tokens[at]
            if keys is None and behind.text in (",", ")"):
                # An argument, as in printa(@name).
                continue
            if behind.text != "=":
                wrong = f"{behind.text} behind {token.text}"
                raise self.error(behind.start, wrong, "= and an aggregating function")
            function = self.tokens[at + 1]
            arguments, _ = self._bracketed(at + 2, "(") if function.kind == "name" else (None, 0)
            if function.text not in FUNCTIONS or arguments is None:
                wrong = f"{token.text} = {function.text}"
                every = ", ".join(f"{each}()" for each in FUNCTIONS)
                raise self.error(function.start, wrong, f"one of {every}")
            # libdtrace's own name for the anonymous one, so scripts can use both.
            name = "" if token.text == "@_" else token.text[1:]
            yield Assignment(name, function.text, keys or [], arguments, token.start)

    def _bracketed(self, index: int, bracket: str) -> tuple[list[tuple[Token, ...]] | None, int]:
        """Return the expressions in brackets, None without brackets, and the index after them."""
        opening = self.tokens[index]
        if opening.text != bracket:
            return None, index
        end = closing(self.tokens, index)
        inner = self.tokens[index + 1 : end]
        if self.tokens[end].kind == "end" or any(each.text == ";" for each in inner):
            raise self.error(opening.start, f"a {bracket} without an end", "what closes it")
        found = separated(inner)
        if () in found or (bracket == "[" and not found):
            raise self.error(opening.start, f"nothing in a place of {bracket}", "an expression")
        return found, end + 1


def read(path: str, text: str) -> Script:
    """Read a script.

    Args:
        path: its path, for messages.
        text: its text.

    Raises:
        ScriptError: there is an error in it, it has no aggregations, its assignments contradict
            each other, or its #! line has an option that no script may have.
    """
    source = Source(path, text)
    if "\0" in text:
        # As in program.load().
        raise source.error(text.index("\0"), "a zero byte", "a text")
    for token in source.tokens:
        if token.kind == "unended":
            raise source.error(token.start, f"{token.text} without an end", f"{token.text[::-1]}")
    controls = [token for token in tokens(text) if token.kind == "control"]
    for control in controls:
        if any(token.kind == "aggregation" for token in tokens(_defined(control)[1])):
            raise source.error(control.start, "an aggregation in a macro", "it written out")
    flags = _flags(source)
    if "-C" in flags and "" in included(text):
        at = next((control.start for control in controls if "" in included(control.text)), 0)
        raise source.error(at, "a macro that is included", "a file's name")
    assigned: dict[str, list[Assignment]] = {}
    for each in source.assignments():
        assigned.setdefault(each.name, []).append(each)
    if not assigned:
        raise source.error(len(text), "no aggregation", "one such as @name[key] = count();")
    constants = _constants(controls, source.tokens)
    found = tuple(_aggregation(source, each, constants) for each in assigned.values())
    return Script(path, text, flags, found)


def _flags(source: Source) -> tuple[str, ...]:
    """Return the options of the #! line, without those that concern only the output."""
    first = source.text.partition("\n")[0]
    if not first.startswith("#!"):
        return ()
    words = first[2:].split()
    programs = [index for index, word in enumerate(words) if word.endswith("dtrace")]
    if not programs:
        raise source.error(0, f"a script for {' '.join(words) or 'nothing'}", "one for dtrace")
    flags: list[str] = []
    rest = iter(words[programs[0] + 1 :])
    for word in rest:
        letters = word.removeprefix("-") if word.startswith("-") else ""
        if not letters:
            raise source.error(0, f"{word} in the #! line", "options of dtrace(1)")
        for at, letter in enumerate(letters, 1):
            if letter in _WORDED:
                flags += [f"-{letter}", letters[at:] or next(rest, "")]
                break
            if letter in _FLAGS:
                flags.append(f"-{letter}")
            elif letter not in _MEANINGLESS:
                why = _REFUSED.get(letter, f"only -{_FLAGS}{_WORDED}{_MEANINGLESS} may be there")
                raise source.error(0, f"-{letter} in the #! line", f"it without that: {why}")
    for flag, value in pairwise(flags):
        option = value.partition("=")[0]
        if flag == "-x" and option in _REFUSED_OPTIONS:
            raise source.error(0, f"-x {option} in the #! line", "it without that: no script may")
    return tuple(flags)


def included(text: str) -> list[str]:
    """Return the names of the files that the preprocessor of C includes into a text.

    A name is empty if there is a macro in its place. The preprocessor joins lines and takes out
    comments before it looks for its own lines (ISO C, 5.1.1.2). That of GCC ignores a byte order
    mark and zero bytes, and ends lines at a carriage return, too.
    """
    text = text.removeprefix("\ufeff").replace("\0", " ").replace("\r\n", "\n").replace("\r", "\n")
    bare = _HIDDEN.sub(lambda hidden: hidden[1] or " ", _JOINED.sub("", text))
    headers = (_HEADER.match(include[1]) for include in _INCLUDE.finditer(bare))
    return [(header[1] or header[2]) if header else "" for header in headers]


def _defined(control: Token) -> tuple[str, str]:
    """Return the name and the text of a #define, empty strings for another control line."""
    define = _DEFINE.fullmatch(control.text)
    return (define[1], define[2]) if define else ("", "")


def _constants(controls: Sequence[Token], given: Sequence[Token]) -> dict[str, int]:
    """Return the named integers, from #define and inline, that have only one value."""
    values: dict[str, set[int | None]] = {}
    for name, value in map(_defined, controls):
        values.setdefault(name, set()).add(_integer(significant(value)[:-1], {}))
    for index, token in enumerate(given):
        if token.text == "inline":
            declared = [*takewhile(lambda each: each.text != ";", given[index:])]
            marks = [each.text for each in declared]
            if "=" in marks:
                at = marks.index("=")
                values.setdefault(marks[at - 1], set()).add(_integer(declared[at + 1 :], {}))
    return {
        name: value for name, (value, *others) in values.items() if value is not None and not others
    }


def _integer(expression: Sequence[Token], constants: Mapping[str, int]) -> int | None:
    """Return the value of an integer or a constant, perhaps with a sign; None for all else."""
    words = [token.text for token in expression]
    sign = -1 if words[:1] == ["-"] else 1
    if words[:1] in (["-"], ["+"]):
        del words[0]
    if len(words) != 1:
        return None
    value = constants.get(words[0])
    if literal := _INTEGER.fullmatch(words[0]):
        digits = literal[1].lower()
        try:
            value = int(digits, 16 if "x" in digits else 8 if digits.startswith("0") else 10)
        except ValueError:
            return None
    return None if value is None else sign * value


def _bounds(each: Assignment, constants: Mapping[str, int]) -> tuple[int, ...]:
    wanted = FUNCTIONS[each.function]
    values = [_integer(argument, constants) for argument in each.arguments[1 : wanted + 1]]
    if each.function == "lquantize" and len(values) == wanted - 1:
        # The step.
        values.append(1)
    known = tuple(value for value in values if value is not None)
    return known if len(known) == wanted else ()


def _aggregation(
    source: Source, assigned: Sequence[Assignment], constants: Mapping[str, int]
) -> Aggregation:
    """Return the aggregation of all assignments to one name, which must agree."""
    first, *others = assigned
    bounds = _bounds(first, constants)
    for other in others:
        differs = (
            ("function", other.function != first.function),
            ("number of keys", len(other.keys) != len(first.keys)),
            ("step or bound", _bounds(other, constants) != bounds),
        )
        for what, it_does in differs:
            if it_does:
                wrong = f"another {what} of @{first.name}"
                raise source.error(other.start, wrong, f"that of line {source.line(first.start)}")
    return Aggregation(
        first.name,
        first.function,
        tuple(source.text[key[0].start : key[-1].end] for key in first.keys),
        labels([each.keys for each in assigned]),
        bounds,
        source.line(first.start),
    )
