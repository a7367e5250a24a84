"""Stands in for the tools that an SMF method uses: svcprop(1), pkill(1), process contracts.

A process is in the contract whose number is LOGNAME in its environment: every child inherits it,
and nothing that a method does removes it. FAKE_SMF names a JSON file with the properties:
{"GROUP/NAME": [TYPE, [VALUE, ...]]}. The first argument is the name of the command.
"""

from __future__ import annotations

import contextlib
import getopt
import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

# As quote_for_shell() of illumos' svcprop.c has them.
_SPECIAL = ";&()|^<>\n \t\\\"'`"


def members(contract: int) -> list[int]:
    """Return the processes of a contract, the oldest first."""
    found = []
    token = f"LOGNAME={contract}".encode()
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):
                if token in (directory / "environ").read_bytes().split(b"\0"):
                    stat = (directory / "stat").read_text(encoding="utf-8", errors="replace")
                    started = int(stat.rpartition(")")[2].split()[19])
                    found.append((started, int(directory.name)))
    return [pid for _, pid in sorted(found)]


def quoted(value: str) -> str:
    """Return a value in the form that svcprop(1) prints."""
    return "".join("\\" * (letter in _SPECIAL) + letter for letter in value) or '""'


def _fail(text: str, status: int) -> NoReturn:
    sys.stderr.write(f"{text}\n")
    sys.exit(status)


def _svcprop(arguments: list[str]) -> None:
    options, operands = getopt.getopt(arguments, "p:")
    if len(options) != 1 or operands != [os.environ["SMF_FMRI"]]:
        _fail("Usage: svcprop -p NAME FMRI", 2)
    name = options[0][1]
    properties = json.loads(Path(os.environ["FAKE_SMF"]).read_text(encoding="utf-8"))
    if "/" in name:
        lines = [values for full, (_, values) in properties.items() if full == name]
        heads = [""] * len(lines)
    else:
        own = {full: kept for full, kept in properties.items() if full.split("/")[0] == name}
        lines = [values for _, values in own.values()]
        heads = [f"{full} {kind} " for full, (kind, _) in own.items()]
    if not lines:
        _fail(f"svcprop: Couldn't find property group `{name}' for instance `{operands[0]}'.", 1)
    for head, values in zip(heads, lines, strict=True):
        sys.stdout.write(head + " ".join(map(quoted, values)) + "\n")


def _pkill(arguments: list[str]) -> None:
    if not arguments or not arguments[0].startswith("-") or "-o" not in arguments:
        _fail("this pkill knows but -SIGNAL -o -c CONTRACT", 2)
    number = signal.Signals[f"SIG{arguments[0][1:]}"]
    options, patterns = getopt.getopt(arguments[1:], "oc:")
    contract = dict(options)["-c"]
    if patterns or not contract.isdigit():
        _fail(f"pkill: invalid argument for option 'c' -- {contract}", 2)
    matching = members(int(contract))
    if not matching:
        sys.exit(1)
    os.kill(matching[0], number)


if __name__ == "__main__":
    {"svcprop": _svcprop, "pkill": _pkill}[sys.argv[1]](sys.argv[2:])
