"""Understands what dtrace(1) prints on its standard error."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

MAX_TEXT = 300
"""How many characters of a message are kept."""

Kind = Literal["lost", "fault", "fatal", "notice"]

_U64 = (1 << 64) - 1
_PREFIX = re.compile(r"dtrace[\w.-]*: (?:\[\w+\] )?")
_LOST = re.compile(
    r"(?P<count>[0-9]{1,20}) (?:"
    r"(?P<source>|aggregation |dynamic variable |speculative )drops?"
    r"(?: on CPU [0-9]+| with non-empty \w+ list)?"
    r"|failed speculations? \([\w() ]+\))"
)
_LOST_KINDS = {
    "": "principal",
    "aggregation ": "aggregation",
    "dynamic variable ": "dynamic_variable",
    "speculative ": "speculation",
    None: "speculation",
}
# The first form is that of illumos, Solaris and older Linux versions, the second that of Linux.
_FAULT = re.compile(r"error (?:on enabled probe ID [0-9]+ |in \S+ for probe ID [0-9]+ )")
_ERROR_FAULTS = re.compile(r"(?P<count>[0-9]{1,20}) errors? in ERROR probe enabling")
_FATAL = re.compile(
    r"processing aborted|failed to |could not |couldn't |invalid |no probes |run as root"
    r"|extraneous argument |illegal option |only one of "
)


class Diagnostic(NamedTuple):
    """The meaning of a line.

    Attributes:
        kind: "lost" for data that DTrace could not keep; "fault" for an error inside the D program,
            which goes on; "fatal" for an error that ends dtrace(1); "notice" for all else.
        lost: what was lost, as the label ``kind`` of dtrace_session_lost_total; else empty.
        count: the number of losses or faults, else 0.
        text: the message, fit to log.
    """

    kind: Kind
    lost: str
    count: int  # type: ignore[assignment]  # nobody calls tuple.count
    text: str


def classify(line: str) -> Diagnostic:
    """Return the meaning of a line of dtrace(1)'s standard error.

    The forms are those of libdtrace's dt_handle.c and of dtrace.c, on illumos and Linux, with or
    without the option droptags. A line with a count of more than 64 bits is a notice.

    Args:
        line: the line, with or without its end.
    """
    text = "".join(char if char.isprintable() else " " for char in line).strip()
    prefix = _PREFIX.match(text)
    message = text[prefix.end() :] if prefix else ""
    text = text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."
    if (lost := _LOST.fullmatch(message)) and int(lost["count"]) <= _U64:
        return Diagnostic("lost", _LOST_KINDS[lost["source"]], int(lost["count"]), text)
    if (faults := _ERROR_FAULTS.fullmatch(message)) and int(faults["count"]) <= _U64:
        return Diagnostic("fault", "", int(faults["count"]), text)
    if _FAULT.match(message):
        return Diagnostic("fault", "", 1, text)
    return Diagnostic("fatal" if _FATAL.match(message) else "notice", "", 0, text)
