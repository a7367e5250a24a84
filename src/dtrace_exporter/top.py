"""The top command: shows all listeners and their rates, updated every second."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import http.client
import json
import re
import time
import urllib.request
from collections import deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TextIO
from urllib.error import HTTPError, URLError

from dtrace_exporter import screen, terminal
from dtrace_exporter.columns import Column, Sorted, rate
from dtrace_exporter.config import Config
from dtrace_exporter.families import families
from dtrace_exporter.listeners import Owner
from dtrace_exporter.screen import Line
from dtrace_exporter.service import Service
from dtrace_exporter.state import State, unchanged
from dtrace_exporter.web import api
from dtrace_exporter.web.selection import Selection

URL = "http://localhost:9748"
"""The default URL of this host's service."""

LABELS = ("host", *dict.fromkeys(family.place for family in families().values()))
LABELS = (*LABELS, "address", "port", "listener")
GAUGES = ("q0_length", "q_length", "q_limit", "q_capacity")
COUNTERS = ("syns_total", "established_total", "accepts_total", "drops_total")
OWNER = ("program", "unit", "container", "fmri")
HEADER = (*LABELS, *GAUGES, *COUNTERS, *OWNER)
"""The columns of the CSV: labels, and names of metrics."""

_PATH = "/api/v1/listeners"
_ANSWER_SECONDS = 5
_WHOLE_SECONDS = 30
_PIECE = 1 << 16
_MOST_BYTES = 1 << 28
_READY_SECONDS = 120
_RATE_SECONDS = 5.0
_MOST = 1 << 64
_PORT = re.compile(r"[0-9]{1,5}")

Values = Mapping[str, str | float]
"""What is known of a listener, by the names in HEADER; and sum and count of its accept waits."""


class TopError(Exception):
    """The listeners cannot be read; the text says why."""


@dataclass
class Source:
    """Where the listeners come from.

    Attributes:
        what: describes the source in words.
        read: reads the listeners.
        up: waits until the source is complete, or raises a TopError.
    """

    what: Callable[[], str]
    read: Callable[[], Awaitable[list[Values]]]
    up: Callable[[], Awaitable[None]] = unchanged


async def top(out: TextIO, url: str, service: Callable[[], Service], by: str = "full") -> int:
    """Show the listeners until q, Ctrl-C or a signal. If ``out`` is no terminal, print CSV once.

    Args:
        out: the output.
        url: that of a running service. If it is empty, it is URL, and if nobody listens there, an
            own service is started.
        service: makes this own service.
        by: the column that the listeners are sorted by, one of KEYS.

    Returns:
        The exit status.

    Raises:
        OSError: ``out`` cannot be written to.
        TopError: the listeners cannot be read.
    """
    async with _source(url, service) as source:
        if not screen.can_show(out):
            await source.up()
            write_csv(out, await source.read())
            return 0
        table = Table(by)
        failed = ""

        async def renew() -> None:
            nonlocal failed
            try:
                rows, failed = await source.read(), ""
            except (TopError, ConnectionRefusedError) as error:
                # If the service is restarted, it will answer again in a moment.
                failed = str(error)
            else:
                table.take(time.monotonic(), rows)

        def draw(columns: int, lines: int) -> list[Line]:
            return table.draw(columns, lines, failed or source.what(), bad=bool(failed))

        await screen.show(out, draw, table.press, renew)
    return 0


@contextlib.asynccontextmanager
async def _source(url: str, service: Callable[[], Service]) -> AsyncIterator[Source]:
    async def read() -> list[Values]:
        return values(await asyncio.to_thread(fetch, url or URL))

    try:
        await read()
    except ConnectionRefusedError as error:
        if url:
            raise TopError(f"{url}: {error.strerror}") from None
    else:
        yield Source(lambda: url or URL, read)
        return
    own = service()
    try:
        await own.start()

        async def look() -> list[Values]:
            await own.state.refresh()
            return values([*api.rows(own.state, Selection())])

        yield Source(lambda: _of_own(own.state), look, partial(_until_up, own))
    finally:
        await own.stop()


async def _until_up(service: Service) -> None:
    """Wait until every session is up, and it is known whose the listeners are.

    Raises:
        TopError: one is not up in time; the text says why.
    """
    deadline = time.monotonic() + _READY_SECONDS
    while not service.state.ready:
        if time.monotonic() > deadline:
            raise TopError(_down(service.state))
        await asyncio.sleep(0.1)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
            await service.this_host.owners_looked_for.wait()


def without_scripts(config: Config) -> Config:
    """Return a configuration without the users' own scripts."""
    hosts = tuple(replace(host, scripts=()) for host in config.hosts)
    return replace(config, local=replace(config.local, scripts=()), hosts=hosts)


def _down(state: State) -> str:
    down = (
        f"session {session.name} is down: {status.reason}"
        for session, status in state.sessions.items()
        if not status.up
    )
    return "; ".join(down)


def _of_own(state: State) -> str:
    return _down(state) or f"no service runs here: own data, source {state.source.name}"


def fetch(url: str) -> Any:
    """Return a service's listeners, as parsed JSON; it blocks.

    Args:
        url: that of the service, such as http://localhost:9748.

    Raises:
        ConnectionRefusedError: nobody listens there.
        TopError: there is no answer, or it is not one of this program.
    """
    # The environment's proxy is for other hosts. A service may not send this program elsewhere.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())
    try:
        with opener.open(url.rstrip("/") + _PATH, timeout=_ANSWER_SECONDS) as answer:
            return json.loads(b"".join(_pieces(url, answer)))
    except HTTPError as error:
        raise TopError(f"{url} answers {error.code} {terminal.printable(error.reason)}") from None
    except URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):
            raise error.reason from None
        raise TopError(f"{url}: {terminal.printable(str(error.reason))}") from None
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        said = terminal.printable(str(error)) or type(error).__name__
        raise TopError(f"{url}: not an answer of dtrace-exporter: {said}") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an HTTPError."""

    def redirect_request(self, *_: Any) -> None:
        """Return no request."""


def _pieces(url: str, answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield a service's answer piece by piece.

    Raises:
        TopError: it is too long, or takes too long.
    """
    deadline = time.monotonic() + _WHOLE_SECONDS
    size = 0
    while piece := answer.read1(_PIECE):
        size += len(piece)
        if size > _MOST_BYTES:
            raise TopError(f"{url}: the answer is too long")
        if time.monotonic() > deadline:
            raise TopError(f"{url}: the answer takes longer than {_WHOLE_SECONDS} s")
        yield piece


def values(rows: Any) -> list[Values]:
    """Return the values of each listener in an answer.

    Args:
        rows: the answer, as parsed JSON.

    Raises:
        TopError: it is not an answer of this program.
    """
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TopError("not an answer of dtrace-exporter: expected a list of listeners")
    return [_values(row) for row in rows]


def _values(row: Mapping[str, Any]) -> Values:
    found: dict[str, str | float] = {}
    for name in (*LABELS, *OWNER):
        if isinstance(value := row.get(name), str):
            found[name] = terminal.printable(value)
    for name in (*GAUGES, *COUNTERS, "accept_wait_seconds_sum", "accept_wait_seconds_count"):
        value = row.get(name)
        parts = [*value.values()] if isinstance(value, dict) else [value]
        numbers = [part for part in parts if isinstance(part, (int, float)) and abs(part) < _MOST]
        if numbers and len(numbers) == len(parts):
            found[name] = sum(numbers)
    return found


def write_csv(out: TextIO, rows: Iterable[Values]) -> None:
    """Write the labels, gauges and counters of listeners as CSV.

    Args:
        out: the output.
        rows: the listeners.
    """
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    for row in sorted(rows, key=_identity):
        writer.writerow([terminal.encodable(_plain(row.get(name, "")), out) for name in HEADER])


def _plain(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.17g}"


def _identity(row: Values) -> tuple[str, ...]:
    *labels, port, _ = (str(row.get(name, "")) for name in LABELS)
    return (*labels, port.zfill(5))


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value * 1e6:.3g}us"


def _fullness(value: float) -> str:
    return "red" if value >= 1 else "yellow" if value >= 0.8 else ""


COLUMNS = {
    "host": Column("HOST", is_text=True),
    "place": Column("PLACE", is_text=True),
    "address": Column("ADDRESS", is_text=True),
    "port": Column("PORT", upwards=True),
    "name": Column("NAME", is_text=True),
    "owner": Column("OWNER", is_text=True),
    "q0": Column("Q0"),
    "q": Column("Q"),
    "qmax": Column("QMAX"),
    "full": Column("FULL", lambda value: f"{value:.0%}", _fullness),
    "syns": Column("SYN/s", rate),
    "accepts": Column("ACCEPT/s", rate),
    "drops": Column("DROP/s", rate, lambda value: "red" if value else ""),
    "wait": Column("WAIT", _seconds),
}
KEYS = tuple(COLUMNS)
"""The columns that the table can be sorted by."""
_FIRST_TO_GO = (
    *("q0", "owner", "wait", "accepts", "host", "address", "place", "syns", "drops"),
    "name",
)


class Table:
    """A sorted table of listeners and their rates.

    Args:
        by: the column that it is sorted by at first, one of KEYS.
    """

    def __init__(self, by: str = "full") -> None:
        self.sorted = Sorted(COLUMNS, by, _FIRST_TO_GO)
        self._samples = deque[tuple[float, dict[tuple[str, ...], Values]]]()

    def take(self, now: float, rows: Sequence[Values]) -> None:
        """Take a sample of the listeners.

        Rates are averages over five seconds, because sessions print their rows in intervals.

        Args:
            now: the time, in seconds of the monotonic clock.
            rows: the listeners.
        """
        self._samples.append((now, {_identity(row): row for row in rows}))
        while len(self._samples) > 1 and now - self._samples[1][0] >= _RATE_SECONDS:
            self._samples.popleft()

    def figures(self) -> list[dict[str, Any]]:
        """Return for each listener the values of its columns, without those that are not known."""
        if not self._samples:
            return []
        now, rows = self._samples[-1]
        return [self._figures(identity, row, now) for identity, row in rows.items()]

    def _figures(self, identity: tuple[str, ...], row: Values, now: float) -> dict[str, Any]:
        place = " ".join(str(row[name]) for name in LABELS[1:-3] if row.get(name))
        found: dict[str, Any] = {"place": place, "name": row.get("listener", "")}
        found |= {name: row.get(name, "") for name in ("host", "address")}
        found["owner"] = str(Owner(**{name: str(row.get(name, "")) for name in OWNER}))
        found = {name: value for name, value in found.items() if value}
        port = str(row.get("port", ""))
        found |= {"port": int(port) if _PORT.fullmatch(port) else 0}
        for key, name in (("q0", "q0_length"), ("q", "q_length"), ("qmax", "q_limit")):
            if name in row:
                found[key] = int(row[name])
        if "q_length" in row and row.get("q_capacity"):
            found["full"] = float(row["q_length"]) / float(row["q_capacity"])
        before = next(((at, old[identity]) for at, old in self._samples if identity in old), None)
        assert before is not None
        seconds, old = now - before[0], before[1]

        def grown(name: str) -> float | None:
            if name not in row or name not in old:
                return None
            increase = float(row[name]) - float(old[name])
            return increase if increase >= 0 else None

        for key in ("syns", "accepts", "drops"):
            increase = grown(f"{key}_total")
            if increase is not None and seconds > 0:
                found[key] = increase / seconds
        waits = grown("accept_wait_seconds_count")
        waited = grown("accept_wait_seconds_sum")
        if waits and waited is not None:
            found["wait"] = waited / waits
        return found

    def press(self, key: str) -> None:
        """Handle a key: sort by another column, or in reverse."""
        self.sorted.press(key, self.figures())

    def draw(self, columns: int, lines: int, source: str, *, bad: bool = False) -> list[Line]:
        """Return the lines that a terminal shows.

        Args:
            columns: the width of the terminal.
            lines: its height.
            source: where the listeners come from, or why they cannot be read any more.
            bad: whether they cannot be read.
        """
        rows = sorted(self.figures(), key=lambda row: (row["port"], row.get("address", "")))
        return self.sorted.draw(columns, lines, "listeners", rows, source, bad=bad)
