"""Finds the other files that a script consists of: those it includes, and its D libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from dtrace_exporter import regular
from dtrace_exporter.scripts.reader import Script, included


def files(script: Script) -> list[Path]:
    """Return the files and directories that dtrace(1) reads for a script, beside the script itself.

    These are the directories of ``-I`` and ``-L``, the libraries in those of ``-L``, and with
    ``-C`` the headers that the script includes, also indirectly, and the directories of files that
    include others. The system's own directories are not among them.
    """
    named = [*pairwise(script.flags)]
    libraries = [Path(word).absolute() for flag, word in named if flag == "-L"]
    directories = [Path(word).absolute() for flag, word in named if flag == "-I"]
    found = [*libraries, *(file for each in libraries for file in sorted(each.glob("*.d")))]
    if "-C" in script.flags:
        found += directories
        # In a session, the preprocessor also searches the directory of the script.
        found += _headers(script.text, [*directories, Path(script.path).parent])
    return [*dict.fromkeys(found)]


def _headers(text: str, directories: list[Path]) -> Iterator[Path]:
    """Yield the headers that a text includes, and those that these include."""
    read: set[Path] = set()
    # Texts, each with the directory that is searched first for its headers.
    left = [(text, directories[-1])]
    while left:
        text, own = left.pop()
        names = [*filter(None, included(text))]
        if names:
            # Whoever can add files to it decides what is found.
            yield own
        for name in names:
            for header in (each / name for each in (own, *directories)):
                if not os.path.lexists(header):
                    # Whoever can add it there decides what is found.
                    yield header.parent
                    continue
                yield header
                if (file := header.resolve()) not in read:
                    read.add(file)
                    # If it cannot be read, the preprocessor will report it.
                    with suppress(OSError):
                        content = regular.read(header).decode("utf-8", "replace")
                        left.append((content, header.parent))
