"""Computes the queues of a listener from one observation and what entered and left them since.

The programs for Sun's engine print the row of a listener once in each second in which something
happens to it, each time under a new ID. They count by these IDs what enters and leaves its queues.
So the queues are known at any time, and each further row of the listener checks them. Such a row
may be off by one, if another CPU is between a change and its count. So it corrects the account only
if the next one differs in the same way.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from dtrace_exporter.limits import Limits
from dtrace_exporter.listeners import Listener
from dtrace_exporter.sockets import Sockets
from dtrace_exporter.tracing.rows import Listening

_SETTLED = 3
"""The ticks after which nearly all rows of an old ID have come."""
_KEPT = 32
"""How many older IDs of an account are remembered for late rows."""
_LOSS_TICKS = 2
"""The ticks after a loss in which a row may still be from before it."""
_FORGET_TICKS = 30
"""The ticks after which no row is from before the close of a socket."""
_PATIENCE = 3
"""How many ticks in a row an account may be below zero; CPUs are read one after the other."""
_MOST_TELLINGS = 64
"""How many rows of a listener an account keeps; many calls of listen() cause more."""


@dataclass(slots=True)
class _Telling:
    """A row of a listener, and by how much Q0 and Q have grown since, by the counts of its ID."""

    record: Listening
    tick: int
    moves: list[int] = field(default_factory=lambda: [0, 0])


@dataclass(slots=True)
class _Account:
    """A listening socket; ``base`` has the lengths of its queues at the first of its rows."""

    listener: Listener
    tellings: list[_Telling]
    base: list[int]
    by_id: dict[int, _Telling] = field(default_factory=dict)
    folded: deque[int] = field(default_factory=lambda: deque(maxlen=_KEPT))
    off: list[int] | None = None
    below: int = 0
    known: bool = True


def _lengths(record: Listening) -> list[int]:
    """Return the queues that a row has; Q0 is 0 if the kernel has none."""
    return [record.q0 or 0, record.q]


class Accounts:
    """The accounts of one run of a session.

    Args:
        sockets: gets the queues of each socket at each heartbeat.
        most: how many rows of listeners are kept, beside one for each account.
    """

    def __init__(self, sockets: Sockets, most: int = Limits().rows) -> None:
        self._sockets = sockets
        self._most = most
        self._kept = 0
        self.held: dict[int, _Account] = {}
        """The accounts by socket."""
        # The oldest ones are forgotten first.
        self._closed = OrderedDict[int, tuple[int, int]]()
        self._touched: set[int] = set()
        self._known: set[int] = set()
        self._tick = 0
        self._losing = 0
        self._lost = -1

    def tell(self, record: Listening, listener: Listener) -> None:
        """Take the row of a listener. Rows may come in any order.

        Args:
            record: the row.
            listener: the listener that it is of.
        """
        closed, _ = self._closed.get(record.socket, (-1, 0))
        if record.time <= closed:
            return
        is_sure = self.is_sure(record.time)
        telling = _Telling(record, self._tick)
        account = self.held.get(record.socket)
        self._touched.add(record.socket)
        if (
            account is None
            or account.listener is not listener
            or not account.known
            or len(account.tellings) >= _MOST_TELLINGS
            or self._kept >= self._most
        ):
            if account is None or record.time > account.tellings[-1].record.time:
                self._forget(record.socket)
                # Sockets may be forgotten elsewhere, without a call of close().
                if len(self.held) >= self._sockets.most:
                    self._forget(next(iter(self.held)))
                self._touched.add(record.socket)
                self._kept += 1
                base = _lengths(record)
                self.held[record.socket] = _Account(
                    listener, [telling], base, {record.id: telling}, known=is_sure
                )
                if is_sure:
                    self._known.add(record.socket)
            return
        if not is_sure:
            return
        account.tellings.append(telling)
        account.by_id[record.id] = telling
        self._kept += 1
        account.tellings.sort(key=lambda one: one.record.time)
        if account.tellings[0] is telling:
            account.base = _lengths(record)

    def move(self, socket: int, id: int, q0: int, q: int) -> None:  # noqa: A002
        """Add a change of a socket's queues.

        Args:
            socket: the kernel's address of it.
            id: the ID that it is counted under.
            q0: by how many connections Q0 has grown; negative if it has shrunk.
            q: likewise for Q.
        """
        account = self.held.get(socket)
        if account is None:
            return
        self._touched.add(socket)
        if account.tellings[-1].record.q0 is None:
            q0 = 0
        if telling := account.by_id.get(id):
            telling.moves[0] += q0
            telling.moves[1] += q
        elif id in account.folded:
            account.base = [account.base[0] + q0, account.base[1] + q]

    def close(self, socket: int, time: int) -> None:
        """Record that a socket had stopped listening.

        Args:
            socket: the kernel's address of it.
            time: when, in nanoseconds of the host's monotonic clock.
        """
        before, _ = self._closed.pop(socket, (-1, 0))
        self._closed[socket] = max(time, before), self._tick
        if len(self._closed) > self._sockets.most:
            self._closed.popitem(last=False)
        account = self.held.get(socket)
        if account is None:
            return
        later = [one for one in account.tellings if one.record.time > time]
        if not later:
            self._forget(socket)
            return
        self._kept -= len(account.tellings) - len(later)
        account.tellings = later
        account.by_id = {one.record.id: one for one in later}
        first = account.tellings[0].record
        account.base, account.off = _lengths(first), None
        account.folded.clear()

    def is_sure(self, time: int) -> bool:
        """Tell whether what a row tells of a time is newer than all that has been lost."""
        return not self._losing and time > self._lost

    def lose(self) -> None:
        """Record that rows or counts were lost: no queue is known until the listener's next row.

        dtrace(1) reports a loss on another stream than the rows, so a row that comes later may be
        from before the loss.
        """
        self._losing = _LOSS_TICKS
        for socket in self._known:
            self.held[socket].known = False
            self._sockets.unsee(socket)
        self._known.clear()

    def settle(self, time: int, q0_counted: bool, q_counted: bool) -> Iterator[str]:
        """Store the queues that may have changed, as they were at a heartbeat.

        Do not feed rows of later heartbeats before this generator has ended.

        Args:
            time: that of the heartbeat, in nanoseconds of the host's monotonic clock.
            q0_counted: whether all that enters and leaves Q0 is counted; else Q0 is that of the
                listener's last row.
            q_counted: likewise for Q.

        Yields:
            An empty string before each account, and an error for an account that is wrong. It is
            not known until the listener's next row.
        """
        self._tick += 1
        if self._losing:
            self._losing -= 1
            self._lost = time
        touched, self._touched = self._touched, set()
        while self._closed:
            socket, (_, tick) = next(iter(self._closed.items()))
            if tick + _FORGET_TICKS >= self._tick:
                break
            del self._closed[socket]
        for socket in touched:
            yield ""
            account = self.held.get(socket)
            if account is None or not account.known:
                continue
            self._fold(account)
            if len(account.tellings) > 1:
                self._touched.add(socket)
            newest = account.tellings[-1].record
            q0 = newest.q0
            if q0_counted:
                q0 = account.base[0] + sum(telling.moves[0] for telling in account.tellings)
            q = newest.q
            if q_counted:
                q = account.base[1] + sum(telling.moves[1] for telling in account.tellings)
            account.below = account.below + 1 if min(q0 or 0, q) < 0 else 0
            if account.below == 0:
                self._sockets.saw(socket, time, q0, q, newest.qmax, newest.q0max)
            elif account.below < _PATIENCE:
                self._touched.add(socket)
            else:
                account.known = False
                self._known.discard(socket)
                self._sockets.unsee(socket)
                yield f"the queues of {newest.address} port {newest.port} come to {q0} and {q}"

    def _fold(self, account: _Account) -> None:
        """Merge rows of a listener whose counts are all in."""
        while len(account.tellings) > 1 and account.tellings[1].tick + _SETTLED < self._tick:
            first, second = account.tellings[:2]
            end = [base + moves for base, moves in zip(account.base, first.moves, strict=True)]
            told = _lengths(second.record)
            off = [one - other for one, other in zip(told, end, strict=True)]
            account.base = told if off == account.off else end
            account.off = off if any(off) and off != account.off else None
            account.folded.append(first.record.id)
            del account.tellings[0]
            if account.by_id.get(first.record.id) is first:
                del account.by_id[first.record.id]
            self._kept -= 1

    def _forget(self, socket: int) -> None:
        if account := self.held.pop(socket, None):
            self._kept -= len(account.tellings)
            self._known.discard(socket)
            self._touched.discard(socket)
