"""The parts of a page of the documentation."""

from __future__ import annotations

import re
from typing import NamedTuple

_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Link(NamedTuple):
    """The target of a link: a file or an address, and a heading in it; either may be empty."""

    target: str
    anchor: str


def blocks(text: str, language: str) -> list[str]:
    """Return the texts of all fenced blocks of a language."""
    return [block for name, block in _FENCE.findall(text) if name == language]


def languages(text: str) -> set[str]:
    """Return the languages of all fenced blocks."""
    return {name for name, _ in _FENCE.findall(text)}


def links(text: str) -> list[Link]:
    """Return all links and pictures."""
    prose = re.sub(r"`[^`\n]+`", "", _FENCE.sub("", text))
    found = re.findall(r"\]\(([^)\s]+)\)", prose)
    found += re.findall(r"\b(?:src|srcset|href)=\"([^\"]+)\"", prose)
    return [Link(target, anchor) for target, _, anchor in (one.partition("#") for one in found)]


def anchors(text: str) -> set[str]:
    """Return the anchors of all headings, as GitHub makes them."""
    result: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE):
        shown = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", heading)
        slug = re.sub(r"[^\w -]", "", shown.lower()).replace(" ", "-")
        number = 1
        unique = slug
        while unique in result:
            unique, number = f"{slug}-{number}", number + 1
        result.add(unique)
    return result
