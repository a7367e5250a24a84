"""The log: one line for each event, as logfmt or JSON.

Events are logged with the standard library. Their details are separate from the message:
``log.warning("session ended", extra=fields(session="port-22", status=1))``.

At most MOST events in a minute with the same message about the same session are logged, so that a
client or a dtrace(1) that keeps failing does not fill the disk. The level debug has no limit.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from datetime import UTC, datetime
from typing import Any, TextIO

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}

MOST = 60
"""How many events of one kind are logged in a minute."""

_MINUTE = 60.0
_MAX_KINDS = 1000

_BARE = re.compile(r"[^\s\"=\\]+")


def setup(level: str, format: str, stream: TextIO | None = None) -> None:  # noqa: A002
    """Send all log events from a level upwards to one stream, and to no other.

    Args:
        level: a key of LEVELS.
        format: a key of FORMATS.
        stream: where the lines go; None is the standard error.

    Raises:
        ValueError: there is no such level or format.
    """
    if level not in LEVELS:
        raise ValueError(f"level: expected {' or '.join(LEVELS)} (found {level!r})")
    if format not in FORMATS:
        raise ValueError(f"format: expected {' or '.join(FORMATS)} (found {format!r})")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(FORMATS[format]())
    handler.addFilter(_Limit())
    # At lower levels it quotes requests, which may have passwords.
    logging.getLogger("tornado.general").setLevel(logging.WARNING)
    logging.basicConfig(level=LEVELS[level], handlers=[handler], force=True)


def fields(**values: object) -> dict[str, dict[str, object]]:
    """Return the details of an event as the argument ``extra`` of a logging call."""
    return {"fields": values}


class _Limit(logging.Filter):
    """Passes MOST events of a kind in each minute, which begins with the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[tuple[object, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.DEBUG:
            return True
        details = getattr(record, "fields", {})
        about = (str(details.get(key, "")) for key in ("host", "session"))
        kind = (record.name, record.levelno, str(record.msg), *about)
        now = time.monotonic()
        began, count = self._kinds.get(kind, (now, 0))
        if now - began >= _MINUTE:
            if count > MOST:
                record.fields = {**details, "left_out_before": count - MOST}
            began, count = now, 0
        elif count == MOST - 1:
            record.fields = {**details, "left_out": "more of these in this minute"}
        if len(self._kinds) >= _MAX_KINDS and kind not in self._kinds:
            del self._kinds[next(iter(self._kinds))]
        self._kinds[kind] = began, count + 1
        return count < MOST


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
    """Return a value that JSON can represent; it has no NaN."""
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
