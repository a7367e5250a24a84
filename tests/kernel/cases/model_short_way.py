"""The short way of a SYN on Solaris and illumos: as exact as the long one."""

from __future__ import annotations

import pytest
from lab.consumer import MOST_TERMS, Consumer, consumer
from lab.model import DTRACE, GENERATIONS, Model

TOTALS = ("syns", "established", "accepts")


def counted(running: Consumer, port: int) -> tuple[list[int], list[int]]:
    """Return what was counted at a port: totals as in TOTALS, and SYNs by their Q/Qmax."""
    (found,) = [one for one in running.table if one.identity.port == port]
    return [getattr(found, name) for name in TOTALS], found.saturation


def happened(model: Model, *names: str) -> tuple[list[int], list[int]]:
    """Return the same from the model, of listeners of one port."""
    totals = [model.totals(name) for name in names]
    sums = [sum(one[name] for one in totals) for name in TOTALS]
    return sums, [
        sum(tenths) for tenths in zip(*(one["saturation"] for one in totals), strict=True)
    ]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_short_way(generation: str) -> None:
    """SYNs are exact on it: at a change of sets, beside other listeners, with memory used again."""
    with Model(generation) as model, consumer(name=generation, command=[DTRACE]) as running:
        model.run("q0max 0 100000", "zone 3 www")
        model.run("listen a zone 0 address * port 80 backlog 128")
        model.run("listen b zone 3 address 192.0.2.1 port 81 backlog 100")
        names = ["c0"]
        model.run("listen c0 zone 0 address * port 90 backlog 128")
        first = running.generation
        while running.generation < first + 3 or len(names) < 12:
            # On the port of the one before it, or on another: where its memory was.
            model.run(f"syn {names[-1]} count 3", f"close {names[-1]}")
            names.append(f"c{len(names)}")
            port = 90 + len(names) % 2
            model.run(f"listen {names[-1]} zone 0 address * port {port} backlog 128")
            model.run(f"syn {names[-1]} count 30")
            # Now and then another has the short way.
            if len(names) % 7:
                model.run_on_both("syn a count 300", f"syn {names[-1]} count 7", "syn b count 20")
                model.run("ack a count 5", "syn a count 10", "accept a count 4")
            running.until(lambda before=running.ticks: running.ticks > before, "a heartbeat")
        model.run("syn b count 7")
        quiet = running.ticks + 6
        running.until(lambda: running.ticks > quiet, "some quiet heartbeats")
        (seen,) = [one for one in running.table if one.identity.port == 80]
        queues = seen.queues
        errors = running.end()
        assert queues is not None
        assert (queues.q0, queues.q) == (model.totals("a")["q0"], model.totals("a")["q"])
        assert counted(running, 80) == happened(model, "a")
        assert counted(running, 81) == happened(model, "b")
        assert counted(running, 90) == happened(model, names[0], *names[1::2])
        assert counted(running, 91) == happened(model, *names[2::2])
        assert sum(running.calm.values()) > model.totals("a")["syns"] / 8
        # More terms than are counted before it is all thrown away.
        assert max(calm.term for calm in running.calm) > MOST_TERMS
        assert "drop" not in errors
