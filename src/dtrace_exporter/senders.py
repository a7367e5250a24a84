"""The command trace --top: shows who sends SYNs to a port, and whose SYNs are dropped."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, TextIO

from dtrace_exporter import screen, trace
from dtrace_exporter.columns import Column, Sorted, rate
from dtrace_exporter.config import DTraceConfig, HostConfig
from dtrace_exporter.screen import Line
from dtrace_exporter.tracing import program
from dtrace_exporter.tracing.plan import Plan, needed

TURN_SECONDS = 10.0
"""How long a sender keeps its row if there are too many senders, in seconds."""
REASONS = ("q_full", "q0_full", "other")
HEADER = ("Date", "Source", "SYNs", *REASONS)
"""The columns of the CSV."""
OTHERS = "others"

_ROW = re.compile(
    r"(?:syn|(?P<drop>drop)) (?P<others>[01]) (?P<high>[0-9a-f]{1,16}) (?P<low>[0-9a-f]{1,16})"
    r"(?(drop) (?P<reason>q_full|q0_full|other)) (?P<events>[0-9]{1,19})"
)
_MARK = re.compile(r"(set|tick) ([0-9]{1,19})")
_LATEST = TURN_SECONDS * 5 / 6
"""If a heartbeat is later than this, in seconds, Linux's program may have emptied a set unread."""
_MOST_SENDERS = 10_000
_MOST_LINES = 20_000
"""More lines than a program can print between two heartbeats: 1,024 senders, four kinds, twice. For
the same reason a set has no more rows."""
_SETS = 2
_RATE_SECONDS = 5.0
_MOST_RECENT = 60_000
"""More heartbeats and senders of theirs than a program can print in _RATE_SECONDS: 50 of 1,024."""
_MOST_SAID = 100

Sender = str
"""An address or a network in the usual form, or OTHERS."""
Counts = Counter[str]
"""Drops by reason; the key of SYNs is an empty string."""


class Senders:
    """Reads the rows of the program, and sums up its counts by sender.

    If there are too many senders, those with the fewest SYNs are merged into OTHERS.

    Args:
        networks: whether the program counts by network.
    """

    def __init__(self, *, networks: bool = False) -> None:
        self.totals: dict[Sender, Counts] = {}
        self.bad_rows = 0
        self.late = False
        self._networks = networks
        self._fresh: dict[Sender, Counts] = {}
        self._sets: dict[int, Counter[tuple[str, ...]]] = {}
        self._set: Counter[tuple[str, ...]] | None = None
        self._ticked: int | None = None
        self._lines = 0

    def read(self, line: str) -> dict[Sender, Counts] | None:
        """Read a line of the program.

        Returns:
            For a heartbeat the counts since the last one, None for other lines.
        """
        self._lines += 1
        mark = _MARK.fullmatch(line)
        if self._lines > _MOST_LINES and not (mark and mark[1] == "tick"):
            self.bad_rows += 1
        elif row := _ROW.fullmatch(line):
            self._count(row)
        elif mark:
            number = int(mark[2])
            if mark[1] == "tick":
                return self._tick(number)
            # The newest set is the last one. No others than the last two are still printed.
            self._sets[number] = self._set = self._sets.pop(number, Counter())
            for old in [*self._sets][:-_SETS]:
                del self._sets[old]
        elif line:
            self.bad_rows += 1
        return None

    def _count(self, row: re.Match[str]) -> None:
        events = int(row["events"])
        if self._set is not None:
            # The rows of a set are cumulative.
            key = tuple(row.groupdict("").values())[:-1]
            if key not in self._set and len(self._set) >= _MOST_LINES:
                self.bad_rows += 1
                return
            events, self._set[key] = events - self._set[key], events
        sender = (
            OTHERS
            if row["others"] == "1"
            else self._name(int(row["high"], 16), int(row["low"], 16))
        )
        counts = self._fresh.setdefault(sender, Counter())
        counts[row["reason"] or ""] += events

    def _name(self, high: int, low: int) -> Sender:
        text = trace.address(high, low)
        if not self._networks:
            return text
        return f"{text}/48" if ":" in text else f"{text}/24"

    def _tick(self, now: int) -> dict[Sender, Counts]:
        if self._sets and self._ticked is not None and now - self._ticked > _LATEST * 1e9:
            self.late = True
        self._ticked = now
        self._lines = 0
        fresh = {sender: +counts for sender, counts in self._fresh.items() if +counts}
        self._fresh = {}
        for sender, counts in fresh.items():
            self.totals.setdefault(sender, Counter()).update(counts)
        if len(self.totals) > 2 * _MOST_SENDERS:
            order = sorted(self.totals, key=lambda sender: self.totals[sender][""])
            others = self.totals.setdefault(OTHERS, Counter())
            for sender in order[:-_MOST_SENDERS]:
                if sender != OTHERS:
                    others.update(self.totals.pop(sender))
        return fresh


COLUMNS = {
    "sender": Column("SENDER", is_text=True),
    "syns": Column("SYN/s", rate),
    "drops": Column("DROP/s", rate, lambda value: "red" if value else ""),
    "all_syns": Column("SYNS"),
    "all_drops": Column("DROPS", style=lambda value: "red" if value else ""),
    **{reason: Column(reason.upper()) for reason in REASONS},
}
_FIRST_TO_GO = ("other", "q0_full", "q_full", "drops", "syns")


class Board:
    """The table of senders on a terminal.

    Args:
        senders: the senders.
        port: the TCP port that they send to.
        note: a remark about the counts.
    """

    def __init__(self, senders: Senders, port: int, note: str) -> None:
        self.note = note
        self.said = deque[str](maxlen=_MOST_SAID)
        self._senders = senders
        self._port = port
        self._sorted = Sorted(COLUMNS, "syns", _FIRST_TO_GO)
        self._ticks = deque[tuple[float, dict[Sender, Counts]]]()
        self._recent = 0

    def tick(self, now: float, fresh: dict[Sender, Counts]) -> None:
        """Take the counts of a heartbeat; ``now`` is in seconds of the monotonic clock."""
        self._ticks.append((now, fresh))
        self._recent += 1 + len(fresh)
        while len(self._ticks) > 1 and (
            now - self._ticks[1][0] >= _RATE_SECONDS or self._recent > _MOST_RECENT
        ):
            _, gone = self._ticks.popleft()
            self._recent -= 1 + len(gone)

    def rows(self) -> list[dict[str, Any]]:
        """Return for each sender the values of its columns."""
        recent: dict[Sender, Counts] = {}
        # The counts of the first heartbeat are from before it.
        for _, fresh in [*self._ticks][1:]:
            for sender, counts in fresh.items():
                recent.setdefault(sender, Counter()).update(counts)
        seconds = self._ticks[-1][0] - self._ticks[0][0] if self._ticks else 0.0
        found = []
        for sender, counts in self._senders.totals.items():
            row: dict[str, Any] = {"sender": sender, "all_syns": counts[""]}
            row["all_drops"] = counts.total() - counts[""]
            row |= {reason: count for reason, count in counts.items() if reason and count}
            if seconds > 0:
                newest = recent.get(sender, Counter())
                row["syns"] = newest[""] / seconds
                row["drops"] = (newest.total() - newest[""]) / seconds
            found.append(row)
        # If rates are equal, the sender of the most SYNs comes first, and OTHERS last.
        return sorted(found, key=lambda row: (row["sender"] == OTHERS, -row["all_syns"]))

    def press(self, key: str) -> None:
        """Handle a key: sort by another column, or in reverse."""
        self._sorted.press(key, self.rows())

    def draw(self, columns: int, lines: int) -> list[Line]:
        """Return the lines that a terminal of so many columns and lines shows."""
        bad = bool(self.said)
        note = self.said[-1] if self.said else f"port {self._port}{self.note}"
        return self._sorted.draw(columns, lines, "senders", self.rows(), note, bad=bad)


async def senders(config: DTraceConfig, port: int, out: TextIO, *, networks: bool) -> int:
    """Show who sends SYNs to a port, until q, a signal or the end of dtrace(1).

    If ``out`` is no terminal, print CSV: each second a row for each sender that was counted in this
    second, with these counts. The header is printed when the kernel begins to count.

    Args:
        config: how dtrace(1) is run.
        port: the TCP port.
        out: the output.
        networks: whether to count by /24 and /48 networks instead of addresses.

    Returns:
        The exit status: that of dtrace(1), or 0 if the user has ended it.

    Raises:
        OSError: ``out`` cannot be written to.
        dtrace.DTraceError: as trace.trace().
        program.ProgramError: the program cannot be read, or this kernel's family has none.
    """
    chosen = program.load_senders(await needed(HostConfig(dtrace=config)))
    plan = Plan(config, chosen, port, program.drop_counters(config.command))
    numbers = {"NETS": int(networks), "TURN": round(TURN_SECONDS * 1e9)}
    unknown = chosen.needs_drop_counters and not plan.counters
    found = Senders(networks=networks)
    board = Board(found, port, "; no drops: where this kernel counts them is not known" * unknown)
    is_drawn = screen.can_show(out)
    started = False

    def take(lines: Iterable[str]) -> None:
        nonlocal started
        for line in lines:
            late, bad, fresh = found.late, found.bad_rows, found.read(line)
            if found.bad_rows == 1 and not bad:
                say(f"dtrace-exporter: not a row: {line[:80]}")
            if fresh is None:
                continue
            board.tick(time.monotonic(), fresh)
            if found.late and not late:
                say("dtrace-exporter: dtrace(1) was late: counts of that time are too low")
            if not is_drawn:
                if not started:
                    out.write(",".join(HEADER) + "\n")
                started = True
                _write(out, fresh)

    def say(message: str) -> None:
        board.said.append(message) if is_drawn else trace.warn(message)

    stop = asyncio.Event()
    playing = asyncio.create_task(trace.play(plan, take, say, stop, numbers))
    if not is_drawn:
        if unknown:
            say(f"dtrace-exporter: port {port}{board.note}")
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        return await playing

    async def renew() -> None:
        if playing.done():
            raise _EndedError

    try:
        await screen.show(out, board.draw, board.press, renew)
    except _EndedError:
        pass
    finally:
        if not playing.done():
            stop.set()
        await asyncio.wait([playing])
    for message in board.said:
        trace.warn(message)
    return await playing


class _EndedError(Exception):
    """The program has ended."""


def _write(out: TextIO, fresh: dict[Sender, Counts]) -> None:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    for sender, counts in fresh.items():
        cells = (now, sender, *(str(counts[reason]) for reason in ("", *REASONS)))
        out.write(",".join(cells) + "\n")
    out.flush()
