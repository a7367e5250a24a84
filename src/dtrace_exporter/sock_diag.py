"""Linux's own numbers about each listening socket, for hosts without DTrace."""

from __future__ import annotations

from dtrace_exporter.inet_diag import Sample, listeners
from dtrace_exporter.listeners import Exports, Listener, ListenerTable, SessionId
from dtrace_exporter.sockets import Queues

EXPORTS = Exports(
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
        self._open: set[int] = set()
        self._counted: dict[int, tuple[Listener, int]] = {}

    def update(self, table: ListenerTable, session: SessionId) -> None:
        """Read all listeners into the table, and take the gauges of those that are gone.

        A socket's drops are all counted when it is first seen, for they are its own since it was
        opened: after the first reading the counters are what ``ss -lntm`` shows.

        Args:
            table: has to have a watch of the session.
            session: whose listeners they are.

        Raises:
            OSError: as inet_diag.listeners(); the table is then as it was before.
        """
        samples = listeners(self._open)
        self._open = {sample.socket for sample in samples}
        observed = set()
        for sample in samples:
            if table.watches(session, sample.port):
                listener = table.listener(session, "", sample.address, sample.port)
                listener.sockets[sample.socket] = Queues(None, sample.q, None, sample.qmax)
                self._count_drops(listener, sample)
                observed.add((listener.identity, sample.socket))
        for listener in table:
            if listener.session == session:
                for key in list(listener.sockets):
                    if (listener.identity, key) not in observed:
                        del listener.sockets[key]
        while len(self._counted) > max(_MOST_COUNTED, len(self._open)):
            del self._counted[next(iter(self._counted))]

    def _count_drops(self, listener: Listener, sample: Sample) -> None:
        if sample.drops is None:
            return
        # The newest are last, so that what is forgotten first is what has been gone for longest.
        owner, before = self._counted.pop(sample.socket, (listener, 0))
        # A listener that the table has forgotten and made anew counts from the start again.
        increase = sample.drops - before if owner is listener else sample.drops
        # The kernel's count is of 32 bits and goes round; nothing ever sets it back.
        listener.drop("unknown", increase % (1 << 32))
        self._counted[sample.socket] = listener, sample.drops
