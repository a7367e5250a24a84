"""Fixed scripts for FreeBSD's listeners that contain every event once, as in fixed.py."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product

from sun.fixed import Start, open_line, same_thread, waits, wrong
from sun.library import Nested
from sun.watching import SECOND

KINDS = ("", "filter")


def decisions(start: Start) -> list[str]:
    """Every decision of the kernel, at each kind of listener."""
    with start() as watch:
        watch.run("zone 1 www", "zone 2 db exclusive", "bucketlimit 0 4", "bucketlimit 2 4")
        for port, kind in enumerate(("", "filter", "family 4"), 80):
            name = f"L{port}"
            syn, ack, accept, data = f"syn {name}", f"ack {name}", f"accept {name}", f"data {name}"
            watch.run(open_line(name, kind, port, zone=port - 80, backlog=1))
            watch.play(f"{syn} count 4", f"{ack} count 4", data, data, data, accept, f"poll {name}")
            watch.play(syn, f"again {name}", ack, data, f"abort {name} q", accept, accept, accept)
            # A flood that evicts the oldest, and evicted ones that return with a cookie.
            watch.play(f"{syn} count 9", f"cookie {name} count 2", f"timeout {name}", data, data)
            # No memory for the syncache, for a socket, and for an inpcb.
            watch.play(accept, accept, accept, syn, "alloc_fail 1", ack, syn, "alloc_fail 1", syn)
            watch.play("alloc_fail 2", syn, f"{ack} count 2", accept, data, accept, "local 3")
            # An accept filter holds more than its limit.
            watch.play(f"{syn} count 4", f"{ack} count 4", f"{data} count 2", f"backlog {name} 3")
            watch.play(syn, ack, f"backlog {name} -1", syn, f"backlog {name} 0", syn, ack, data)
        return wrong(watch)


def capacity(start: Start) -> list[str]:
    """Final ACKs when Q has one place left, and none; Q holds 3 * limit / 2 + 1."""
    found = []
    for backlog, most in ((0, 1), (1, 2), (2, 4), (3, 5), (5, 8), (128, 193)):
        with start() as watch:
            watch.run("bucketlimit 0 1000", open_line("L", "", backlog=backlog))
            watch.run(f"syn L count {most + 2}", f"ack L count {most - 1}")
            # Without memory for a socket, while one place is left.
            watch.run("syn L", "alloc_fail 1", "ack L")
            watch.library.run("ack L")
            watch.run("ack L", "ack L", "accept L", "syn L", "ack L", "syn L", "ack L")
            totals = watch.library.totals("L")
            if (totals["q"], totals["q_full_ack"]) != (most, 3):
                found.append(f"the model's Q of {backlog} is {totals}")
            found += wrong(watch)
    return found


def evictions(start: Start) -> list[str]:
    """Half-open connections that another listener's SYNs evict, with every kind of address."""
    with start() as watch:
        watch.run("bucketlimit 0 3", "zone 1 www")
        kinds = {
            "A": "address *",
            "B": "address * family 4",
            "C": "address 192.0.2.1",
            "D": "address 192.0.2.1 family 6",
            "E": "address 2001:db8::7",
            "F": "address * v6only",
        }
        for port, (name, address) in enumerate(kinds.items(), 80):
            watch.run(f"listen {name} zone {port % 2} {address} port {port} backlog 3")
        for _ in range(2):
            for name in "ABCDEFA":
                watch.play(f"syn {name} count 2", f"syn {name} from 2001:db8::5", f"syn {name}")
        # Two listeners of one port and process; the address decides whose a connection is.
        watch.run("listen G zone 0 address 192.0.2.1 port 90 backlog 3")
        watch.run("listen H zone 0 address * v6only port 90 backlog 3")
        watch.run("syn G count 2", "syn H count 2", "syn A count 3", "syn G count 2", "close G")
        # Evictions of closed listeners are not counted.
        watch.run("syn H count 2", "syn A count 3")
        return wrong(watch)


def balanced(start: Start) -> list[str]:
    """Several sockets of one address and port, as with SO_REUSEPORT_LB, each with its queue."""
    with start() as watch:
        watch.run("bucketlimit 0 3", open_line("N", port=81))
        for name in ("L", "M"):
            watch.run(open_line(name, "", backlog=2))
        watch.run("syn L count 3", "ack L count 2", "syn M count 2", "ack M", "accept L", "syn L")
        watch.run("ack L count 2", "close M", "syn L", "ack L", open_line("M"), "syn M", "ack M")
        watch.run("accept M", "syn L count 2", "syn M", "close M", "syn N count 2", "syn L count 2")
        # Evictions are not counted once all listeners of an address and port are closed.
        watch.run("close L", "syn N count 4")
        return wrong(watch)


def beside(start: Start) -> list[str]:
    """Sockets of one port that take each other's connections at some addresses."""
    found = []
    kinds = ("address *", "address * v6only", "address * family 4", "address 192.0.2.1")
    froms = ("to 192.0.2.1", "to 192.0.2.9", "from 2001:db8::5")
    for first, second in permutations(kinds, 2):
        with start() as watch:
            watch.run("bucketlimit 0 9", open_line("N", port=81))
            for name, kind in (("A", first), ("B", second)):
                watch.run(f"listen {name} zone 0 {kind} port 80 backlog 3")
                watch.seconds(2)
            for _ in range(2):
                watch.play(*(f"syn {name} {ends}" for ends in froms for name in "AB"))
                watch.seconds(2)
            watch.run("syn N count 5", "close B", "syn N count 2")
            watch.play(*(f"syn A {ends}" for ends in froms))
            watch.run("syn N count 7")
            watch.play(*(f"syn A {ends}" for ends in froms))
            watch.run("close A", "syn N count 9")
            found += wrong(watch)
    return found


def asked(start: Start) -> list[str]:
    """Backlogs that are granted, and others that the kernel reduces, several times."""
    found = []
    with start(before=[open_line("O", port=82)]) as watch:
        watch.run("syn O", open_line("L", backlog=200), open_line("M", port=81, backlog=7), "syn M")
        for backlog in (128, 129, -1, 3, 0):
            watch.run(f"backlog L {backlog}")
            watch.seconds()
            found += watch.differences()
        watch.run("backlog O 129", open_line("P", backlog=300))
        found += wrong(watch)
        watch.run("close L", "close P", open_line("L", backlog=5))
        return [*found, *wrong(watch)]


def lifes(start: Start) -> list[str]:
    """Memory that is used again at once, for another port or for the same."""
    with start() as watch:
        for number in range(4):
            for kind in KINDS:
                watch.run(open_line("L", kind, 80 + number % 2), "syn L count 2", "ack L", "syn L")
                watch.run("close L")
        return wrong(watch)


def drift(start: Start) -> list[str]:
    """One event a second for a long time, each of which makes a new row of its listener."""
    found = []
    with start() as watch:
        watch.run(open_line("L", backlog=9))
        for line in ("syn L", "ack L", "accept L"):
            for _ in range(9):
                watch.seconds()
                watch.library.run(line)
            watch.seconds()
            found += watch.differences()
        told = sum(row.startswith("listener") for row in watch.rows)
        return [*found, *([] if told == 28 else [f"told {told} times"]), *wrong(watch)]


def idle(start: Start) -> list[str]:
    """Nothing happens for minutes, and then each possible first event does."""
    with start() as watch:
        for port, kind in enumerate(KINDS, 80):
            watch.run(open_line(f"L{port}", kind, port, backlog=9), f"syn L{port} count 4")
            watch.run(f"ack L{port} count 3")
        watch.run("data L81 count 2")
        for line in ("accept {}", "syn {}", "data {}", "ack {}", "syn {}"):
            watch.seconds(90)
            watch.play(*(line.format(f"L{port}") for port, _ in enumerate(KINDS, 80)))
        return wrong(watch)


def older(start: Start) -> list[str]:
    """Listeners older than the session, each with another kind of first event."""
    opened = [open_line(f"L{port}", port=port, backlog=3) for port in range(80, 86)]
    before = ["bucketlimit 0 100", *opened, *[f"syn L{port} count 3" for port in range(80, 86)]]
    before += [line for port in range(80, 86) for line in (f"ack L{port}", f"ack L{port}")]
    with start(before=before) as watch:
        watch.run("syn L80", "ack L81", "accept L82", "cookie L83", "backlog L84 4", "again L85")
        watch.run("syn L80", "ack L80", "accept L80", "accept L81", "syn L81", "ack L82", "syn L83")
        watch.run("syn L84", "ack L84", "syn L85", "close L81")
        return wrong(watch)


def closed(start: Start) -> list[str]:
    """Closes of a listener older than the session, and of one with a fresh row."""
    with start(before=[open_line("L"), open_line("M", port=81), "syn L", "ack L"]) as watch:
        watch.run("syn L", "close L", "close M", open_line("N", port=82), "syn N", "ack N")
        watch.run("close N", open_line("N", port=82))
        return wrong(watch)


def saturation(start: Start) -> list[str]:
    """SYNs that find Q at every length, also beyond its limit."""
    with start() as watch:
        watch.run("bucketlimit 0 100", open_line("L", backlog=10), "syn L count 13")
        for _ in range(17):
            watch.play("syn L", "ack L")
        watch.run("backlog L 3", "syn L", "accept L", "syn L", "backlog L 0", "syn L")
        return wrong(watch)


def nested(start: Start) -> list[str]:
    """Events that interrupt others of the same and of another listener, wherever they can."""
    found = []
    for kind in KINDS:
        with start() as watch:
            watch.run("bucketlimit 0 3")
            for at in range(1, 10):
                watch.run(open_line("L", kind), open_line("M", kind, 81))
                inner = (
                    "syn L",
                    "syn M",
                    "ack M",
                    "data M",
                    "ack L",
                    "data L",
                    "accept M",
                    "syn M",
                )
                watch.play(Nested("syn L count 3", at, inner), Nested("ack L count 2", at, inner))
                watch.play("again M", Nested("data L", at, inner), Nested("syn L", at, inner))
                watch.play(Nested("accept L", at, inner), Nested("abort L q0", at, inner))
                watch.play(Nested("close M", at, ("syn L", "ack L")), "syn L")
                watch.play(open_line("M", kind, 82), "syn M", "close L", "close M")
            found += wrong(watch)
    return found


def stall(start: Start) -> list[str]:
    """Seconds in which dtrace(1) does not run, during a listener's life."""
    with start() as watch:
        watch.run(open_line("L", backlog=1), "syn L count 2")
        watch.session.stall()
        for line in ("ack L", "syn L", "ack L", "ack L", "accept L", "syn L count 4", "ack L"):
            watch.library.run(line)
            watch.advance(2 * SECOND)
        watch.session.go()
        return wrong(watch)


def together(start: Start) -> list[str]:
    """Concurrent threads on all CPUs, in several orders."""
    found = []
    for seed in range(3):
        for kind in KINDS:
            with start(seed=seed) as watch:
                watch.run("bucketlimit 0 4", open_line("L", kind, backlog=2))
                watch.run(open_line("M", kind, 81))
                one = ["syn L count 3", "ack L", "data L", "ack L", "accept L", "again L", "data L"]
                two = ["syn M", "ack M", "data M", "syn L", "accept M", "ack L", "syn L count 3"]
                three = ["syn L", "syn M", "abort L q0", "ack M", "abort L q", "data L", "accept M"]
                four = ["ack L", "accept L", "close M", open_line("M", kind, 81), "syn M", "ack M"]
                watch.concurrently(one * 2, two * 2, three * 2, four, seed=seed)
                found += wrong(watch, "new")
    return found


def quick(start: Start) -> list[str]:
    """Accepts before the return of the function that puts a connection into Q."""
    found = []
    with start(cpus=3) as watch:
        watch.run("bucketlimit 0 100")
        # Each has its own port, because connections that a close kills leave some counts open.
        for port, (seed, kind) in enumerate(product(range(16), KINDS), 80):
            watch.run(open_line("L", kind, port, backlog=1 + seed % 3), "syn L count 6")
            watch.run(*["ack L"] * (seed % 4))
            others = ["accept L"] * 8, ["data L", "accept L", "abort L q"] * 4
            watch.concurrently(["ack L"] * 3, *others, seed=seed)
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
        names = [f"F{number}" for number in range(100)]
        for number, name in enumerate(names):
            watch.library.run(open_line(name, port=81))
            watch.advance(SECOND // 4 if number % 4 else 0)
        watch.library.run(open_line("L"), "syn L count 3", "ack L", "accept L")
        watch.library.cpu = 0
        watch.advance(SECOND * 3 // 4)
        # Rows of closed listeners are small; they fill the buffer until the heartbeat does not fit.
        while cpu.used + tick.room.needed <= watch.session.options.bufsize:
            watch.library.run(f"close {names.pop()}")
        watch.library.cpu = 1
        watch.seconds(2)
        found = [] if watch.errors["principal"] else ["nothing was lost"]
        return found + [one for one in watch.differences("none") if " 80)" in one]


def one_port(start: Start) -> list[str]:
    """A session of one port, while other ports have SYNs, drops and closes."""
    with start(port=81) as watch:
        watch.run("bucketlimit 0 2", open_line("L", backlog=1))
        watch.run(open_line("M", port=81, backlog=1))
        for name in ("M", "L", "M"):
            watch.run(f"syn {name} count 3", f"ack {name} count 2", f"syn {name}", f"ack {name}")
        watch.run("accept L", "accept M", "syn M", "syn L", "ack L", "syn L", "close L", "syn M")
        found = wrong(watch)
        told = [row for row in watch.rows if row.startswith("listener")]
        return found + [row for row in told if " 81 " not in row]


CASES: tuple[Callable[[Start], list[str]], ...] = (
    *(
        decisions,
        capacity,
        evictions,
        balanced,
        beside,
        asked,
        lifes,
        drift,
        idle,
        older,
        closed,
        waits,
    ),
    *(saturation, stall, full, one_port, same_thread, nested, quick, together),
)
