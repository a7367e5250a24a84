"""Output that a person reads: whether it goes to a terminal, how wide that is, and in colour."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TextIO

_CODES = {"bold": "1", "dim": "2", "red": "1;31", "green": "32", "yellow": "1;33", "cyan": "36"}

Paint = Callable[[str, str], str]
"""Takes a text and the name of a style, and returns the text in that style."""


def width(out: TextIO) -> int:
    """Return the columns of the terminal that an output goes to, 0 where it goes elsewhere.

    A terminal that does not know its own width is taken for one of 80 columns.
    """
    try:
        return (os.get_terminal_size(out.fileno()).columns or 80) if out.isatty() else 0
    except (OSError, ValueError):
        return 0


def painter(out: TextIO) -> Paint:
    """Return what paints for an output: nothing but a terminal has colours.

    Nor has one that is dumb, or whose user does not want any and has set NO_COLOR
    (https://no-color.org).
    """
    if not width(out) or os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb":
        return lambda text, _style: text
    return lambda text, style: f"\x1b[{_CODES[style]}m{text}\x1b[0m" if style else text


def printable(text: str) -> str:
    """Return a text without what a terminal would take for a command."""
    return "".join(char if char.isprintable() else " " for char in text)
