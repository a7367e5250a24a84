"""Finds the conversion of printa() for each key of a script, with the help of dtrace(1).

The type of a key is guessed from its text, and a compilation checks the guesses. If one is wrong,
the error of dtrace(1) has the type. So one compilation is enough for most scripts.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from dtrace_exporter.scripts.reader import Script, ScriptError
from dtrace_exporter.scripts.rendering import (
    NUMBER,
    POINTER,
    STACK,
    STRING,
    SYMBOL,
    USER_SYMBOL,
    Conversions,
    question,
)
from dtrace_exporter.terminal import printable

Ask = Callable[[str], Awaitable[tuple[int, str]]]
"""Compiles a text by ``dtrace -e`` with a script's options; returns exit status and output."""

_LIKELY = (
    (r'".*"|\$\$\w+', STRING),
    (r"execname|probe(func|mod|name|prov)|zonename|jailname|.*->dev_statname|.*pr_psargs", STRING),
    (r"(basename|cleanpath|copyinstr|dirname|stringof|strjoin|substr|lltostr) ?\(.*\)", STRING),
    (r"(u|j)?stack ?\(.*\)", STACK),
    (r"(func|mod|sym) ?\(.*\)", SYMBOL),
    (r"u(func|mod|sym) ?\(.*\)", USER_SYMBOL),
)
_TYPES = (
    (r"string|(signed |unsigned )?char ?\[.*\]", STRING),
    (r"stack", STACK),
    (r"_symaddr", SYMBOL),
    (r"_usymaddr", USER_SYMBOL),
    (r".*\*.*", POINTER),
)
# D_PRINTF_ARG_TYPE, from dt_printf_validate() of libdtrace's dt_printf.c. Possessive quantifiers
# keep the search of a hostile answer linear.
_WRONG = re.compile(
    r"line (\d{1,9}): printa\( \) argument #\d{1,9} is incompatible with conversion #(\d{1,9})"
    r" prototype:\s++conversion: .*+\s++prototype: .*+\s++argument: (.*)"
)
_LONGEST = 300


async def conversions(script: Script, ask: Ask) -> Conversions:
    """Return the conversions of a script's keys.

    Args:
        script: the script.
        ask: compiles a text.

    Raises:
        ScriptError: the script does not compile; the text is the error of dtrace(1).
    """
    found = [[_letter(key, _LIKELY) for key in each.keys] for each in script.aggregations]
    # Each compilation corrects one key, and each key needs at most one correction.
    for _ in range(1 + sum(map(len, found))):
        current = tuple(map(tuple, found))
        text, first = question(script, current)
        status, output = await ask(text)
        if not status:
            return current
        wrong = _WRONG.search(output)
        if not wrong:
            break
        aggregation, key = int(wrong[1]) - first, int(wrong[2]) - 1
        if not (0 <= aggregation < len(found) and 0 <= key < len(found[aggregation])):
            break
        found[aggregation][key] = _letter(wrong[3].strip(), _TYPES)
    raise ScriptError(f"{script.path}: {' '.join(printable(output).split())[-_LONGEST:]}")


def _letter(text: str, patterns: tuple[tuple[str, str], ...]) -> str:
    """Return the conversion for the first pattern that matches a text, else that of numbers."""
    for pattern, letter in patterns:
        if re.fullmatch(pattern, text, re.DOTALL):
            return letter
    return NUMBER
