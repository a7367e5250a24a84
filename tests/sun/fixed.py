"""Fixed scripts that contain every event once; a program's error shows in one of them.

Each is a function from a host's options to a list of what is wrong; an empty list means success.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from sun.library import Nested
from sun.watching import SECOND, Watch, listener_of

Start = Callable[..., Watch]
COUNTS = ("syn ", "drop ", "opened ", "established ", "left ")
KINDS = ("", "streams", "tli")


def open_line(name: str, kind: str = "", port: int = 80, backlog: int = 2, zone: int = 0) -> str:
    """Return the line that opens a listener."""
    line = f"listen {name} zone {zone} address * port {port} backlog {backlog} {kind}"
    return line.strip()


def wrong(watch: Watch, gauges: str = "all") -> list[str]:
    """Return all that is wrong once all rows are printed."""
    watch.seconds(2)
    found = watch.differences(gauges) + watch.messages
    found += [row for row in watch.rows if row.startswith(COUNTS) and row.endswith(" 0")]
    return found if watch.limits() or gauges != "all" else [*found, "limits of Q0"]


def decisions(start: Start) -> list[str]:
    """Every decision of the kernel, at each kind of listener."""
    with start() as watch:
        watch.run("zone 1 www", "zone 2 db exclusive", "q0max 0 2", "q0max 2 2")
        for port, kind in enumerate(KINDS, 80):
            name = f"L{port}"
            syn, ack, accept = f"syn {name}", f"ack {name}", f"accept {name}"
            watch.run(open_line(name, kind, port, zone=port - 80))
            watch.play(f"{syn} count 4", syn, ack, ack, syn, ack, accept, f"abort {name} q")
            watch.play(f"abort {name} deferred", f"abort {name} q0", accept, accept, accept)
            # A flood that evicts the oldest, and SYNs that the kernel drops silently.
            watch.play(f"{syn} count 9", f"timeout {name}", f"{syn} count 3", "alloc_fail 2")
            watch.play(f"timeout {name} count 1", syn, f"segment {name} a", f"segment {name} sa")
            watch.play(f"reclaim {port - 80} 1", syn, f"reclaim {port - 80} 0", f"{ack} refused")
            watch.play(f"backlog {name} 4", syn, f"{ack} count 2", accept, f"backlog {name} 3", syn)
        return wrong(watch)


def limit(start: Start) -> list[str]:
    """A listener's own limit of connections, where the kernel has one."""
    with start() as watch:
        watch.play(f"{open_line('L', backlog=9)} limit 2", "syn L count 4", "ack L", "accept L")
        watch.play("syn L", "finish L", "syn L", "ack L")
        return wrong(watch)


def lifes(start: Start) -> list[str]:
    """Memory that is used again at once, for another port or for the same."""
    with start() as watch:
        for number in range(4):
            for kind in KINDS:
                watch.run(open_line("L", kind, 80 + number % 2), "syn L count 2", "ack L")
                watch.run("syn L", "close L")
        watch.run(open_line("L"), "syn L", "unlisten L")
        watch.play("syn L", "backlog L 3", "syn L", "ack L")
        return wrong(watch)


def drift(start: Start) -> list[str]:
    """One event a second for a long time, each of which makes a new row of its listener."""
    found = []
    with start() as watch:
        watch.run(open_line("L", "streams", backlog=9))
        for line in ("syn L", "ack L", "accept L"):
            for _ in range(9):
                watch.seconds()
                watch.library.run(line)
            watch.seconds()
            found += watch.differences()
        told = sum(row.startswith("listener") for row in watch.rows)
        # On Solaris 10 an accept makes no new row.
        expected = 28 if watch.generation == "illumos" else 19
        return [*found, *([] if told == expected else [f"told {told} times"]), *wrong(watch)]


def idle(start: Start) -> list[str]:
    """Nothing happens for minutes, and then each possible first event does."""
    with start() as watch:
        for port, kind in enumerate(KINDS, 80):
            name = f"L{port}"
            watch.run(
                open_line(name, kind, port, backlog=9), f"syn {name} count 4", f"ack {name} count 3"
            )
        for line in ("accept {}", "syn {}", "abort {} q", "ack {}", "syn {}"):
            watch.seconds(90)
            watch.run(*(line.format(f"L{port}") for port, _ in enumerate(KINDS, 80)))
        return wrong(watch)


def deferred(start: Start) -> list[str]:
    """Connections that wait in Q0 for room in Q, longer than a second."""
    found = []
    for kind in KINDS:
        with start() as watch:
            watch.run(open_line("L", kind, backlog=1), "syn L count 3")
            for line in ("ack L", "ack L", "accept L", "ack L", "accept L", "accept L"):
                watch.play(line)
                watch.seconds()
                found += watch.differences()
            found += wrong(watch)
    return found


def older(start: Start) -> list[str]:
    """Listeners older than the session, each with another kind of first event."""
    opened = [open_line(f"L{port}", port=port, backlog=3) for port in range(80, 86)]
    before = [f"syn L{port} count 3" for port in range(80, 86)]
    before += [line for port in range(80, 86) for line in (f"ack L{port}", f"ack L{port}")]
    with start(before=[*opened, *before]) as watch:
        watch.run(
            "syn L80", "ack L81", "accept L82", "abort L83 q", "backlog L84 4", "segment L85 a"
        )
        watch.run("syn L80", "ack L80", "accept L80", "accept L81", "syn L81", "ack L82", "syn L83")
        watch.run("syn L84", "ack L84", "syn L85", "close L81")
        return wrong(watch)


def closed(start: Start) -> list[str]:
    """Closes of a listener older than the session, and of one with a fresh row."""
    with start(before=[open_line("L"), open_line("M", port=81), "syn L", "ack L"]) as watch:
        watch.run(
            "syn L", "close L", "unlisten M", open_line("N", port=82), "syn N", "ack N", "close N"
        )
        return wrong(watch)


def waits(start: Start) -> list[str]:
    """Times in Q on both sides of every bucket's limit."""
    with start() as watch:
        watch.run(open_line("L", backlog=60))
        expected = [0] * 14
        for power in range(5, 18):
            for step, bucket in ((-100, power - 5), (100, power - 4)):
                watch.run("syn L", "ack L")
                watch.advance(4**power + step)
                watch.library.run("accept L")
                expected[bucket] += 1
        found = wrong(watch)
        ours = listener_of(watch.table, 80).waits
        return found if ours == expected else [*found, f"waits: {ours}, not {expected}"]


def saturation(start: Start) -> list[str]:
    """SYNs that find Q at every length, also beyond its limit."""
    with start() as watch:
        watch.run("q0max 0 40", open_line("L", backlog=10), "syn L count 13")
        for _ in range(12):
            watch.play("syn L", "ack L")
        watch.run("backlog L 3", "syn L", "accept L", "syn L")
        return wrong(watch)


def nested(start: Start) -> list[str]:
    """Events that interrupt others of the same and of another listener, wherever they can."""
    found = []
    for kind in KINDS:
        with start() as watch:
            watch.run("q0max 0 1")
            for at in range(1, 10):
                watch.run(open_line("L", kind), open_line("M", kind, 81))
                inner = ("syn L", "syn M", "ack M", "ack L", "accept M", "syn M")
                watch.play(Nested("syn L count 3", at, inner), Nested("ack L count 2", at, inner))
                watch.play("timeout L", "timeout M", Nested("syn L", at, inner))
                watch.play(Nested("accept L", at, inner), Nested("abort L q0", at, inner))
                watch.play(
                    Nested("close M", at, ("syn L", "ack L")), open_line("M", kind, 82), "syn M"
                )
                watch.play("close L", "close M")
            found += wrong(watch)
    return found


def same_thread(start: Start) -> list[str]:
    """A SYN in the thread of another, after its decisions, as answers on loopback are."""
    with start() as watch:
        watch.library.is_interrupted = False
        watch.run(
            open_line("L", backlog=1), open_line("M", port=81), "syn L", "syn M", "syn L", "ack L"
        )
        # The hooks of each further SYN are its entry, its outcome and its return.
        watch.play(*[Nested("syn M", 2, ("syn L", "syn L"))] * 3, "syn L", "syn M")
        return wrong(watch)


def stall(start: Start) -> list[str]:
    """Seconds in which dtrace(1) does not run, during a listener's life."""
    with start() as watch:
        watch.run(open_line("L", "streams", backlog=3), "syn L count 2")
        watch.session.stall()
        for line in ("ack L", "syn L", "ack L", "accept L", "syn L count 4", "ack L", "ack L"):
            watch.library.run(line)
            watch.advance(2 * SECOND)
        watch.session.go()
        return wrong(watch)


def together(start: Start) -> list[str]:
    """Concurrent threads on all CPUs, in several orders."""
    found = []
    for seed in range(2):
        for kind in KINDS:
            with start(seed=seed) as watch:
                watch.run("q0max 0 2", open_line("L", kind, backlog=3), open_line("M", kind, 81))
                one = ["syn L count 3", "ack L", "ack L", "accept L", "syn L count 2", "accept L"]
                two = ["syn M", "ack M", "syn L", "accept M", "ack L", "timeout L", "syn L count 3"]
                three = ["syn L", "syn M", "abort L q0", "ack M", "abort L q", "syn M", "accept M"]
                four = ["ack L", "accept L", "close M", open_line("M", kind, 81), "syn M", "ack M"]
                watch.concurrently(one * 2, two * 2, three * 2, four, seed=seed)
                found += wrong(watch, "new")
    return found


def quick(start: Start) -> list[str]:
    """Accepts and resets before the return of the function that puts a connection into Q."""
    found = []
    with start(cpus=3) as watch:
        for seed in range(16):
            for kind in KINDS[1:]:
                watch.run(open_line("L", kind, backlog=1), "syn L count 5")
                others = ["accept L"] * 6, ["accept L", "abort L deferred"] * 3
                watch.concurrently(["ack L"] * 4, *others, seed=seed)
                watch.seconds(2)
                found += watch.differences()
                watch.run("close L")
        return found + wrong(watch)


def full(start: Start) -> list[str]:
    """A principal buffer without room for the heartbeat, while nothing else happens."""
    with start(options={"bufsize": "2k"}) as watch:
        cpu = watch.session.kernel.cpus[0]
        tick = next(e for e in watch.session.kernel.enablings if e.pattern[3].startswith("tick"))
        watch.library.cpu = 1
        watch.library.run(open_line("L"), "syn L count 3", "ack L", "accept L")
        watch.library.cpu = 0
        watch.advance(SECOND * 3 // 4)
        # Fill the buffer until small records fit, but not the heartbeat.
        while cpu.used + tick.room.needed <= watch.session.options.bufsize:
            watch.library.run(open_line("F", port=81), "close F")
        watch.library.cpu = 1
        watch.seconds(2)
        found = [] if watch.errors["principal"] else ["nothing was lost"]
        return found + [one for one in watch.differences("none") if " 80)" in one]


def one_port(start: Start) -> list[str]:
    """A session of one port, while other ports have SYNs, drops and closes."""
    with start(port=81) as watch:
        watch.run("q0max 0 1", open_line("L", backlog=1), open_line("M", port=81, backlog=1))
        for name in ("M", "L", "M"):
            syn = f"syn {name}"
            watch.run(f"{syn} count 3", f"timeout {name}", syn, f"ack {name}", syn)
        watch.run("accept L", "accept M", "syn M", "syn L", "ack L", "syn L", "close L", "syn M")
        found = wrong(watch)
        told = [row for row in watch.rows if row.startswith("listener")]
        return found + [row for row in told if " 81 " not in row]


CASES: tuple[Callable[[Start], list[str]], ...] = (
    *(
        decisions,
        limit,
        lifes,
        drift,
        idle,
        deferred,
        older,
        closed,
        waits,
        saturation,
        stall,
        full,
        one_port,
    ),
    *(same_thread, nested, quick, together),
)


def starting(generation: str, **options: Any) -> Start:
    """Return the function with which the cases start a host."""
    return partial(Watch, generation, **options)


def first_wrong(start: Start, cases: Iterable[Callable[[Start], list[str]]] = CASES) -> str:
    """Return the first case with an error, and the error; an empty string if there is none."""
    for case in cases:
        if found := case(start):
            return f"{case.__name__}: {found[0]}"
    return ""
