"""The log writes one event on one line, whatever it contains."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter import log as log_module
from dtrace_exporter.log import FORMATS, LEVELS, fields, setup

log = logging.getLogger("dtrace_exporter.test")

PAIR = re.compile(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|[^\s"=\\]+)(?: |$)')
values = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Restore the root logger, which setup() changes."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def logfmt(line: str) -> dict[str, object]:
    """Parse a line as a logfmt reader does; a bare word stays text."""
    pairs, end = {}, 0
    for match in PAIR.finditer(line):
        assert match.start() == end
        end = match.end()
        pairs[match[1]] = json.loads(match[2]) if match[2].startswith('"') else match[2]
    assert end == len(line)
    return pairs


def started(form: str, level: str = "debug") -> io.StringIO:
    """Set up the log and return the stream that it writes to."""
    stream = io.StringIO()
    setup(level, form, stream)
    return stream


def test_logfmt() -> None:
    """A line has time, level and message, and then the fields in their order."""
    stream = started("logfmt")
    log.info("session %s", "up", extra=fields(session="port-22", pid=7, ratio=0.5, ok=True))
    ts, _, rest = stream.getvalue().partition(" ")
    assert re.fullmatch(r"ts=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", ts)
    assert rest == 'level=info msg="session up" session=port-22 pid=7 ratio=0.5 ok=true\n'


def test_json() -> None:
    """A line of JSON is an object with the same fields; numbers and booleans keep their type."""
    stream = started("json")
    log.info("session up", extra=fields(session="port-22", pid=7, ratio=0.5, ok=True, why=None))
    event = json.loads(stream.getvalue())
    assert datetime.fromisoformat(event.pop("ts")).tzinfo == UTC
    assert event == {
        "level": "info",
        "msg": "session up",
        "session": "port-22",
        "pid": 7,
        "ratio": 0.5,
        "ok": True,
        "why": None,
    }


@pytest.mark.parametrize("form", FORMATS)
def test_time_is_of_the_event(form: str) -> None:
    """The time is that of the event, in UTC with milliseconds."""
    stream = started(form)
    record = log.makeRecord(log.name, logging.INFO, "", 0, "x", (), None)
    record.created = 86400.0625
    log.handle(record)
    assert "1970-01-02T00:00:00.062Z" in stream.getvalue()
    record.created = 86400.0
    log.handle(record)
    assert "1970-01-02T00:00:00.000Z" in stream.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain/word-1.2:3", "plain/word-1.2:3"),
        ("", '""'),
        ("two words", '"two words"'),
        ("a=b", '"a=b"'),
        ('say "x"', r'"say \"x\""'),
        ("back\\slash", r'"back\\slash"'),
        ("line\nfeed\r\t", r'"line\nfeed\r\t"'),
        ("\0\x1b[2J\x7f\x9b", r'"\u0000\u001b[2J\u007f\u009b"'),
        ("\u2028\u2029\u202e\u00a0", r'"\u2028\u2029\u202e\u00a0"'),
        ("\ud800", r'"\ud800"'),
        ("\U000e0001", r'"\udb40\udc01"'),
        ("grün", "grün"),
        (None, "null"),
        (False, "false"),
        (-3, "-3"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
        (["a", 1], "\"['a', 1]\""),
        (ValueError("no\nport"), r'"no\nport"'),
    ],
)
def test_logfmt_values(value: object, text: str) -> None:
    """Words and numbers are bare; other values are quoted, with unprintable characters escaped."""
    stream = started("logfmt")
    log.info("x", extra=fields(value=value))
    assert stream.getvalue().partition(" value=")[2] == text + "\n"


@pytest.mark.parametrize("form", FORMATS)
@given(message=st.text(), details=st.dictionaries(st.sampled_from(["a", "b", "cd"]), values))
def test_one_line_whatever_is_logged(form: str, message: str, details: dict[str, object]) -> None:
    """Any event is one printable line, and its values can be read back."""
    stream = started(form)
    log.warning("%s", message, extra=fields(**details))
    line = stream.getvalue()
    assert line.endswith("\n")
    line = line[:-1]
    assert line.isprintable()
    event = json.loads(line) if form == "json" else logfmt(line)
    assert list(event) == ["ts", "level", "msg", *details]
    assert joined(event["msg"]) == joined(message)
    for key, value in details.items():
        if isinstance(value, str):
            assert joined(event[key]) == joined(value)


def joined(text: object) -> str:
    """Return a text with its surrogate pairs combined, as JSON does not distinguish them."""
    return str(text).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


@pytest.mark.parametrize("form", FORMATS)
def test_exception_is_one_field(form: str) -> None:
    """An exception is one field of the event's line, with its traceback."""
    stream = started(form)
    try:
        raise ValueError("first line\nsecond line")
    except ValueError:
        log.exception("failed", extra=fields(port=22), stack_info=True)
    (line,) = stream.getvalue().splitlines()
    event = json.loads(line) if form == "json" else logfmt(line)
    assert list(event) == ["ts", "level", "msg", "port", "exception", "stack"]
    assert event["level"] == "error"
    assert str(event["exception"]).startswith("Traceback (most recent call last):\n")
    assert str(event["exception"]).endswith("ValueError: first line\nsecond line")
    assert "test_exception_is_one_field" in str(event["stack"])


@pytest.mark.parametrize("level", LEVELS)
def test_levels(level: str) -> None:
    """Events below the level are left out, and the others have the name of their level."""
    stream = started("json", level)
    for name in LEVELS.values():
        log.log(name, "x")
    log.critical("x")
    shown = [json.loads(line)["level"] for line in stream.getvalue().splitlines()]
    names = list(LEVELS)
    assert shown == [*names[names.index(level) :], "error"]


def test_libraries_are_logged_alike() -> None:
    """An event that a library logs is a line of the same form."""
    stream = started("logfmt")
    logging.getLogger("some.library").warning("it\nis %d", 5)
    assert stream.getvalue().endswith(' level=warn msg="it\\nis 5"\n')


def test_setup_again() -> None:
    """A second setup replaces the first, and no event is written twice."""
    first = started("json")
    second = started("logfmt", "error")
    log.warning("x")
    log.error("y")
    assert first.getvalue() == ""
    assert second.getvalue().count("\n") == 1


def test_standard_error_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a stream, the lines go to standard error."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    setup("info", "logfmt")
    log.info("x")
    assert ' msg="x"' in stream.getvalue()


@pytest.mark.parametrize(
    ("level", "form", "message"),
    [
        ("warning", "json", "level: expected debug or info or warn or error (found 'warning')"),
        ("info", "xml", "format: expected logfmt or json (found 'xml')"),
    ],
)
def test_unknown_level_or_format(level: str, form: str, message: str) -> None:
    """An unknown level or format is refused, with a list of the known ones."""
    with pytest.raises(ValueError, match=re.escape(message)):
        setup(level, form)


def repeated(stream: io.StringIO) -> list[dict[str, object]]:
    """Return the events that were written."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_events_of_one_kind_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that recurs often is suppressed for the rest of the minute, and counted."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = started("json")
    for number in range(500):
        log.warning("refused %d", number, extra=fields(client=number))
    events = repeated(stream)
    assert len(events) == log_module.MOST
    assert events[-1]["left_out"] == "more of these in this minute"
    assert "left_out" not in events[-2]
    now += 59.0
    log.warning("refused %d", 1)
    assert len(repeated(stream)) == log_module.MOST
    now += 1.0
    for number in range(2):
        log.warning("refused %d", number, extra=fields(client=number))
    *_, first, second = repeated(stream)
    assert len(repeated(stream)) == log_module.MOST + 2
    assert first["left_out_before"] == 501 - log_module.MOST
    assert first["client"] == 0
    assert "left_out_before" not in second


def test_as_many_as_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a minute without suppressed events, the next event mentions none."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = started("json")
    for _ in range(log_module.MOST):
        log.warning("refused")
    now += 60.0
    log.warning("refused")
    assert "left_out_before" not in repeated(stream)[-1]


def test_other_kinds_are_not_limited_with_it() -> None:
    """Each message, level, session and host has its own limit; debug events have none."""
    stream = started("json")
    for number in range(500):
        log.info("up", extra=fields(session=f"port-{number}"))
        log.info("up", extra=fields(session="all", host=f"host-{number}"))
        log.debug("looking")
    log.error("up", extra=fields(session="port-1"))
    log.info("down", extra=fields(session="port-1"))
    assert len(repeated(stream)) == 1502


def test_what_is_kept_of_kinds_is_bounded() -> None:
    """The memory for kinds of events is bounded, even if all messages differ."""
    stream = started("json")
    for number in range(5000):
        log.info(f"kind {number}")
    assert len(repeated(stream)) == 5000
    (handler,) = logging.getLogger().handlers
    (limit,) = handler.filters
    assert isinstance(limit, log_module._Limit)
    assert len(limit._kinds) <= log_module._MAX_KINDS
