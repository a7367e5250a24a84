"""The log: one event to a line, as logfmt or JSON.

Events are logged with the standard library, their details beside the message and not inside it:
``log.warning("session ended", extra=fields(session="port-22", status=1))``.
"""

from __future__ import annotations

import json
import logging
import math
import re
from datetime import UTC, datetime
from typing import Any, TextIO

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}

_BARE = re.compile(r"[^\s\"=\\]+")


def setup(level: str, format: str, stream: TextIO | None = None) -> None:  # noqa: A002
    """Send all log events from a level upwards to one stream, in place of where they went before.

    Args:
        level: one of LEVELS.
        format: one of FORMATS.
        stream: where the lines go; None is the standard error output.

    Raises:
        ValueError: there is no such level or format.
    """
    if level not in LEVELS:
        raise ValueError(f"level: expected {' or '.join(LEVELS)} (found {level!r})")
    if format not in FORMATS:
        raise ValueError(f"format: expected {' or '.join(FORMATS)} (found {format!r})")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(FORMATS[format]())
    logging.basicConfig(level=LEVELS[level], handlers=[handler], force=True)


def fields(**values: object) -> dict[str, dict[str, object]]:
    """Make the ``extra`` argument of a logging call from an event's details."""
    return {"fields": values}


class _Logfmt(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return " ".join(
            f"{key}={_quoted(value) if key == 'msg' else _logfmt(value)}"
            for key, value in _event(record, self).items()
        )


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_event(record, self))


FORMATS: dict[str, type[logging.Formatter]] = {"logfmt": _Logfmt, "json": _Json}


def _event(record: logging.LogRecord, formatter: logging.Formatter) -> dict[str, Any]:
    when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    event = {
        "ts": when.removesuffix("+00:00") + "Z",
        "level": next((name for name, no in LEVELS.items() if record.levelno <= no), "error"),
        "msg": record.getMessage(),
    }
    event |= {key: _plain(value) for key, value in getattr(record, "fields", {}).items()}
    if record.exc_info:
        event["exception"] = formatter.formatException(record.exc_info)
    if record.stack_info:
        event["stack"] = record.stack_info
    return event


def _plain(value: object) -> str | int | float | None:
    """Return a value that JSON has; it has no NaN."""
    if value is None or isinstance(value, (str, int)):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


def _logfmt(value: str | float | None) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    return value if _BARE.fullmatch(value) and value.isprintable() else _quoted(value)


def _quoted(text: str) -> str:
    letters = (
        letter if letter.isprintable() and letter not in '"\\' else json.dumps(letter)[1:-1]
        for letter in text
    )
    return f'"{"".join(letters)}"'
