"""Output for people: whether it goes to a terminal, the terminal's width, and colours."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TextIO

_CODES = {"bold": "1", "dim": "2", "red": "1;31", "green": "32", "yellow": "1;33", "cyan": "36"}

Paint = Callable[[str, str], str]
"""Takes a text and the name of a style, and returns the text in that style."""


def width(out: TextIO) -> int:
    """Return the width of the terminal that an output goes to, in columns; 0 if it is none.

    If a terminal does not know its own width, it is 80.
    """
    try:
        return (os.get_terminal_size(out.fileno()).columns or 80) if out.isatty() else 0
    except (OSError, ValueError):
        return 0


def painter(out: TextIO) -> Paint:
    """Return a function that adds colours for an output.

    It adds none if the output is not a terminal, if the terminal is dumb, or if the user has set
    NO_COLOR (https://no-color.org).
    """
    if not width(out) or os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb":
        return lambda text, _style: text
    return lambda text, style: f"\x1b[{_CODES[style]}m{text}\x1b[0m" if style else text


def printable(text: str) -> str:
    """Return a text with blanks for control characters, which a terminal would obey."""
    return "".join(char if char.isprintable() else " " for char in text)


def encodable(text: str, out: TextIO) -> str:
    """Return a text with question marks for characters that an output's encoding lacks."""
    encoding = out.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
