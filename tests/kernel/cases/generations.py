"""Sets of aggregations take turns: a change loses nothing and leaves nothing behind."""

from __future__ import annotations

from functools import partial

import pytest
from lab.consumer import consumer
from lab.traffic import HERE4, Clients, Listen, Ports, send_syns


@pytest.mark.usefixtures("foreign")
def test_exact_across_generations(port: int, listen: Listen) -> None:
    """During several changes of sets, each SYN of an endless stream is counted once."""
    with consumer() as running:
        listen(port, 8, HERE4)
        sent = 0
        first = running.generation
        while running.generation < first + 3:
            sent += send_syns(port, 500)
            running.until(running.caught_up, "rows are taken")
        errors = running.end()
    (listener,) = [one for one in running.table if one.identity.port == port]
    assert listener.syns == sum(listener.saturation) == sent
    assert "drop" not in errors


def test_listeners_come_and_go(ports: Ports, listen: Listen, clients: Clients) -> None:
    """Closed listeners leave no keys: more listeners than fit at one time are all counted."""
    # Room for some 1,500 keys per CPU; each listener here makes up to 15.
    with consumer("-x", "aggsize=128k") as running:

        def later(before: int) -> bool:
            return running.generation > before

        used = []
        first = running.generation
        while running.generation < first + 5:
            before = running.generation
            for port in ports(30):
                used.append(port)
                opened = listen(port, 4)
                clients.connect(1, port)
                opened.accept(1)
                opened.close()
            clients.close()
            running.until(partial(later, before), "the next generation")
        quiet = running.generation + 2
        running.until(lambda: running.generation >= quiet, "two quiet generations")
        running.until(lambda: running.rows_of_tick == 0, "a tick without rows")
        errors = running.end()
    counted = {one.identity.port: (one.syns, one.established, one.accepts) for one in running.table}
    assert {port: counted.get(port) for port in used} == dict.fromkeys(used, (1, 1, 1))
    assert "drop" not in errors
