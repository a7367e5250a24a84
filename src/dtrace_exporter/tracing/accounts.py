"""Queues by account: what a listener's were when it was told, and what has come and gone since.

Programs for Sun's engine tell a listener once in every second in which something happens to it,
each time under a new ID, and count what enters and leaves its queues by these IDs. So its queues
are known at any time, and each telling but the first says whether that is right. A telling may
itself be one off, when another CPU is between a change and its count; so it counts for more than
the account only if the next one says the same.
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
"""After so many ticks all rows of an ID that is no longer used have come, but for the odd one."""
_KEPT = 32
"""So many of an account's IDs are known after that."""
_LOSS_TICKS = 2
"""So many ticks after a loss was told, a row may still tell of a listener as it was before."""
_FORGET_TICKS = 30
"""So many ticks after a socket has closed, no row tells what it was before."""
_PATIENCE = 3
"""For so many ticks in a row an account may be below zero, as CPUs are read one after the other."""
_MOST_TELLINGS = 64
"""So often a listener may be told in those ticks; listen() again and again makes it more often."""


@dataclass(slots=True)
class _Telling:
    """What a row told of a listener, and what has come since, under its ID, of Q0 and of Q."""

    record: Listening
    tick: int
    moves: list[int] = field(default_factory=lambda: [0, 0])


@dataclass(slots=True)
class _Account:
    """A listening socket: ``base`` are its queues when the first of its tellings was made."""

    listener: Listener
    tellings: list[_Telling]
    base: list[int]
    by_id: dict[int, _Telling] = field(default_factory=dict)
    folded: deque[int] = field(default_factory=lambda: deque(maxlen=_KEPT))
    off: list[int] | None = None
    below: int = 0
    known: bool = True


class Accounts:
    """The accounts of one run of a session.

    Args:
        sockets: where the queues go, of each at the times of heartbeats.
        most: how many tellings are kept, besides one of each account.
    """

    def __init__(self, sockets: Sockets, most: int = Limits().rows) -> None:
        self._sockets = sockets
        self._most = most
        self._kept = 0
        self.held: dict[int, _Account] = {}
        """The accounts by socket."""
        # The one that was told first is the first to be forgotten.
        self._closed = OrderedDict[int, tuple[int, int]]()
        self._touched: set[int] = set()
        self._known: set[int] = set()
        self._tick = 0
        self._losing = 0
        self._lost = -1

    def tell(self, record: Listening, listener: Listener) -> None:
        """Take what a row told of a listener's queues; rows come in any order."""
        closed, _ = self._closed.get(record.socket, (-1, 0))
        if record.time <= closed:
            return
        is_sure = not self._losing and record.time > self._lost
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
                # Not all that is forgotten of a socket is told here.
                if len(self.held) >= self._sockets.most:
                    self._forget(next(iter(self.held)))
                self._touched.add(record.socket)
                self._kept += 1
                base = [record.q0, record.q]
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
            account.base = [record.q0, record.q]

    def move(self, socket: int, id: int, q0: int, q: int) -> None:  # noqa: A002
        """Take by how much the queues of a socket have grown, or shrunk, under an ID."""
        account = self.held.get(socket)
        if account is None:
            return
        self._touched.add(socket)
        if telling := account.by_id.get(id):
            telling.moves[0] += q0
            telling.moves[1] += q
        elif id in account.folded:
            account.base = [account.base[0] + q0, account.base[1] + q]

    def close(self, socket: int, time: int) -> None:
        """Note that a socket had stopped listening at a time."""
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
        account.base, account.off = [first.q0, first.q], None
        account.folded.clear()

    def lose(self) -> None:
        """Note that rows or counts were lost: no account is known until its listener is told.

        The notice and the rows come by ways of their own, so a row behind it may be from before.
        """
        self._losing = _LOSS_TICKS
        for socket in self._known:
            self.held[socket].known = False
            self._sockets.unsee(socket)
        self._known.clear()

    def settle(self, time: int, q0_counted: bool, q_counted: bool) -> Iterator[str]:
        """Give all queues that may have changed, as they were at a heartbeat, one by one.

        Rows of later heartbeats must not be taken before it has come to its end.

        Args:
            time: the heartbeat's.
            q0_counted: whether all that enters and leaves Q0 is counted; else it is as told.
            q_counted: likewise for Q.

        Yields:
            An empty text before each account, and what is wrong with one that is known no more
            until its listener is told anew.
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
            account.below = account.below + 1 if min(q0, q) < 0 else 0
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
        """Close the books on tellings of which all rows have come."""
        while len(account.tellings) > 1 and account.tellings[1].tick + _SETTLED < self._tick:
            first, second = account.tellings[:2]
            end = [base + moves for base, moves in zip(account.base, first.moves, strict=True)]
            told = [second.record.q0, second.record.q]
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
