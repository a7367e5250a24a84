"""Divides D into tokens, as dtrace(1) itself does (libdtrace's dt_lex.l)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_TOKEN = re.compile(
    r"""
      (?P<comment> /\*.*?\*/ | //(?!\*)[^\n]* )
    | (?P<control> ^[ \t\f\v]*\#(?: /\*.*?\*/ | \\\n | [^\n] )* )
    | (?P<string> "(?: [^"\\\n] | \\. )*" )
    | (?P<character> '(?: [^'\\\n] | \\. )*' )
    | (?P<aggregation> @(?:[A-Za-z_]\w*)? )
    | (?P<macro> \$\$?\w+ )
    | (?P<name> [A-Za-z_`][\w`]* )
    | (?P<number> \d[\w`]* )
    | (?P<space> \n | [^\S\n]+ )
    | (?P<unended> /\*(?!/) | ["'] )
    | (?P<mark> -> | <<= | >>= | << | >> | && | \|\| | \^\^ | \+\+ | -- | [=!<>*/%+&|^-]= | . )
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE | re.ASCII,
)
_SILENT = ("comment", "control", "space")
OPENING, CLOSING = "([{", ")]}"


class Token(NamedTuple):
    """A token: ``kind`` is the name of a group in the pattern, or ``end``."""

    kind: str
    text: str
    start: int
    end: int


def tokens(text: str) -> Iterator[Token]:
    """Yield all tokens of a text, including comments and control lines."""
    for match in _TOKEN.finditer(text):
        yield Token(match.lastgroup or "", match[0], match.start(), match.end())


def significant(text: str) -> list[Token]:
    """Return the tokens of statements and probes, and a last one of the kind ``end``."""
    end = Token("end", "the end", len(text), len(text))
    return [*(token for token in tokens(text) if token.kind not in _SILENT), end]


def closing(given: Sequence[Token], opening: int) -> int:
    """Return the index of the bracket that closes another one, or of the last token if none does.

    Args:
        given: the tokens.
        opening: the index of the opening bracket. If it is another token, it is returned.
    """
    depth = 0
    for at in range(opening, len(given)):
        if given[at].kind == "mark":
            depth += (given[at].text in OPENING) - (given[at].text in CLOSING)
        if not depth:
            return at
    return len(given) - 1


def separated(given: Sequence[Token]) -> list[tuple[Token, ...]]:
    """Divide tokens at commas that are not in brackets; without tokens there are no parts."""
    found: list[tuple[Token, ...]] = []
    begin = at = 0
    while at < len(given):
        if given[at].text == ",":
            found.append(tuple(given[begin:at]))
            begin = at + 1
        at = closing(given, at) + 1
    return [*found, tuple(given[begin:])] if given else found


def written(given: Sequence[Token]) -> str:
    """Return tokens as a text of one line."""
    return " ".join(token.text for token in given)
