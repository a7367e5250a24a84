"""Linux's own numbers about each listening socket, for hosts without DTrace."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Generator

from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.limits import LimitError
from dtrace_exporter.listeners import Capabilities, Listener, ListenerTable, SessionId
from dtrace_exporter.log import fields
from dtrace_exporter.sockets import Queues

_log = logging.getLogger(__name__)

CAPABILITIES = Capabilities(
    syns=False, reasons=("unknown",), established=False, accepts=False, accept_wait=False
)
"""The series that this source fills: the kernel does not say why it has dropped."""

_MOST_COUNTED = 100_000


class SockDiagSource:
    """Fills the listener table from sock_diag.

    Keep one for as long as the table: it remembers which of a socket's drops are counted already,
    of one that is not there now too, should it only have been missing in the kernel's answer.
    """

    def __init__(self) -> None:
        self.open: set[int] = set()
        """The sockets that were there at the last update."""
        self._counted: dict[int, tuple[Listener, int]] = {}
        self._refused = ""

    def update(
        self,
        table: ListenerTable,
        session: SessionId,
        samples: list[ListeningSocket],
        half_open: Counter[tuple[str, int]],
    ) -> Generator[None, None, None]:
        """Take all listeners into the table, and take the gauges of those that are gone.

        A socket's drops are all counted when it is first seen, for they are its own since it was
        opened: after the first reading the counters are what ``ss -lntm`` shows. Half-open
        connections are of the listener of their address, or else of the wildcard's; of several
        sockets of one listener the kernel does not say whose they are, so each has them all.

        Args:
            table: where they go as long as it has a watch of the session.
            session: whose listeners they are.
            samples: as inet_diag.listeners() gives them, by what was open before.
            half_open: as inet_diag.half_open() gives them.

        Yields:
            After each of them.
        """
        open_now = set()
        open_ = set()
        bound = set()
        for sample in samples:
            yield
            open_now.add((sample.address, sample.port, sample.socket))
            open_.add(sample.socket)
            bound.add((sample.address, sample.port))
        self.open = open_
        q0 = Counter[tuple[str, int]]()
        for (address, port), count in half_open.items():
            yield
            q0[(address, port) if (address, port) in bound else ("*", port)] += count
        held = 0
        for listener in table.seen(session):
            yield
            address, port = listener.identity.address, listener.identity.port
            for key in [*listener.sockets]:
                if (address, port, key) not in open_now:
                    del listener.sockets[key]
            held += len(listener.sockets)
            if not listener.sockets and listener.identity in table:
                table.idle(listener)
        refused = ""
        for sample in samples:
            yield
            if not table.is_watched(session):
                return
            if table.watches(session, sample.port):
                try:
                    listener = table.listener(session, "", sample.address, sample.port)
                except LimitError as error:
                    refused = str(error)
                    continue
                self._count_drops(listener, sample)
                if sample.socket not in listener.sockets:
                    if held >= table.limits(session.host).sockets:
                        refused = str(LimitError("sockets"))
                        continue
                    held += 1
                listener.sockets[sample.socket] = Queues(
                    q0[sample.address, sample.port], sample.q, None, sample.qmax
                )
        while len(self._counted) > max(_MOST_COUNTED, len(self.open)):
            del self._counted[next(iter(self._counted))]
        if refused and not self._refused:
            _log.warning("listeners left out", extra=fields(why=refused))
        self._refused = refused

    def _count_drops(self, listener: Listener, sample: ListeningSocket) -> None:
        if sample.drops is None:
            return
        # The newest are last, so that what is forgotten first is what has been gone for longest.
        owner, before = self._counted.pop(sample.socket, (listener, 0))
        # A listener that the table has forgotten and made anew counts from the start again.
        increase = sample.drops - before if owner is listener else sample.drops
        # The kernel's count is of 32 bits and goes round; nothing ever sets it back.
        listener.drop("unknown", increase % (1 << 32))
        self._counted[sample.socket] = listener, sample.drops
