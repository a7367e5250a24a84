"""The models of other kernels' TCP decide as these do: by their own totals, without any DTrace.

What that of FreeBSD decides is tested in ../../sun. Here both CPUs are in it at once.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lab.model import FREEBSD, SOLARIS, Model

Q0MAX_MORE = 4
"""What Q0 may hold beyond Qmax, in these cases."""
DEFERRING = (
    *(("illumos", "streams"), ("illumos", "tli")),
    *(("solaris10", ""), ("solaris10", "tli")),
)
"""Generation and kind of the listeners that leave completed connections in Q0 while Q is full."""
NO_COUNTS = {"zone", "port", "closed", "qmax", "q0max", "listens", "wait_ns"}


@pytest.fixture(params=SOLARIS)
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    """Return each model in turn, with a zone 1 of its own stack and Q0MAX_MORE in both stacks."""
    with loaded(request.param) as made:
        yield made


@pytest.fixture
def illumos() -> Iterator[Model]:
    """Return the model of illumos, for what Solaris 10 has not."""
    with loaded("illumos") as made:
        yield made


@pytest.fixture(params=DEFERRING, ids="-".join)
def deferring(request: pytest.FixtureRequest) -> Iterator[tuple[Model, str]]:
    """Return a model and a kind of listener that defers connections while Q is full."""
    generation, kind = request.param
    with loaded(generation) as made:
        yield made, kind


@contextmanager
def loaded(generation: str) -> Iterator[Model]:
    """Have a model with a zone 1 of its own stack and Q0MAX_MORE in both stacks."""
    with Model(generation) as made:
        made.run("zone 1 web exclusive", f"q0max 0 {Q0MAX_MORE}", f"q0max 1 {Q0MAX_MORE}")
        yield made


def listen(model: Model, name: str = "L", backlog: int = 3, more: str = "") -> None:
    """Have a listener on any address."""
    model.run(f"listen {name} zone 0 address * port 80 backlog {backlog} {more}")


def counts(model: Model, name: str = "L") -> dict[str, int]:
    """Return a listener's totals that are not 0, but for the sum of Q."""
    found = totals_and_sum(model, name)
    found.pop("q_sum", None)
    return found


def totals_and_sum(model: Model, name: str = "L") -> dict[str, int]:
    """Return a listener's totals that are not 0; its tcp_t has to agree with them."""
    totals = model.totals(name)
    if not totals["closed"]:
        assert (totals.pop("tcp_q0"), totals.pop("tcp_q")) == (totals["q0"], totals["q"])
    return {
        key: value
        for key, value in totals.items()
        if isinstance(value, int) and value and key not in NO_COUNTS
    }


def test_q_full(model: Model) -> None:
    """Qmax connections in Q make it full; what Q was at each SYN is in the totals."""
    listen(model)
    model.run("syn L count 3", "ack L count 2", "syn L", "ack L", "syn L count 5")
    expected = {"syns": 9, "created": 4, "established": 3, "q": 3, "q0": 1, "q_full": 5}
    assert counts(model) == expected
    assert model.totals("L")["q_sum"] == 2 + 5 * 3
    assert model.totals("L")["saturation"] == [3, 0, 0, 0, 0, 0, 0, 1, 0, 0, 5, 0]
    model.run("accept L", "syn L")
    assert counts(model) == {**expected, "syns": 10, "created": 5, "q": 2, "q0": 2, "accepts": 1}


def test_q0_full(model: Model) -> None:
    """Without one that has timed out a full Q0 refuses a SYN; its limit is Qmax and the tunable."""
    listen(model)
    limit = 3 + Q0MAX_MORE
    model.run("syn L count 10")
    assert model.totals("L")["q0max"] == limit
    assert counts(model) == {"syns": 10, "created": limit, "q0": limit, "q0_full": 10 - limit}


def test_q_before_q0(model: Model) -> None:
    """When both are full it is Q that a SYN is dropped for, and nothing is thrown out of Q0."""
    model.run("q0max 0 1")
    listen(model, backlog=1)
    model.run("syn L count 2", "ack L", "backlog L 2", "syn L count 2", "timeout L", "backlog L 1")
    model.run("syn L count 4")
    expected = {"syns": 8, "created": 4, "established": 1, "q": 1, "q0": 3, "q_full": 4}
    assert counts(model) == expected


def test_eviction(model: Model) -> None:
    """A full Q0 throws out the oldest, one for each SYN, as long as its SYN-ACK was sent again."""
    listen(model)
    model.run("syn L count 7", "timeout L count 2", "syn L count 3")
    expected = {"syns": 10, "created": 9, "q0": 7, "q0_evicted": 2, "q0_full": 1}
    assert counts(model) == expected
    # One that completes is no candidate any more.
    model.run("timeout L count 1", "ack L", "syn L count 2")
    found = counts(model)
    assert (found["q0_evicted"], found["q0_full"], found["created"]) == (2, 2, 10)


def test_limit(illumos: Model) -> None:
    """The limit of a listener's connections counts accepted ones until they end."""
    listen(illumos, backlog=8, more="limit 3")
    illumos.run("syn L count 5")
    assert counts(illumos) == {"syns": 5, "created": 3, "q0": 3, "limit": 2}
    illumos.run("ack L count 2", "accept L count 2", "syn L")
    assert counts(illumos)["limit"] == 3
    illumos.run("finish L count 1", "abort L q0", "syn L count 3")
    assert (counts(illumos)["created"], counts(illumos)["limit"]) == (5, 4)
    # A failed allocation gives its place back.
    illumos.run("finish L", "alloc_fail 2", "syn L count 4")
    found = counts(illumos)
    assert (found["alloc"], found["created"], found["limit"]) == (2, 6, 5)


def test_alloc(model: Model) -> None:
    """A SYN whose connection cannot be allocated is gone, without a trace in Q0."""
    listen(model)
    model.run("alloc_fail 2", "syn L count 3")
    assert counts(model) == {"syns": 3, "alloc": 2, "created": 1, "q0": 1}


def test_reclaim(illumos: Model) -> None:
    """Under memory pressure a SYN is taken only where nothing waits; each stack has its own."""
    illumos.run("reclaim 0 1")
    listen(illumos, backlog=1)
    illumos.run("syn L count 3", "ack L", "syn L")
    assert counts(illumos) == {"syns": 4, "created": 1, "reclaim": 3, "established": 1, "q": 1}
    illumos.run("reclaim 0 0", "syn L")
    assert counts(illumos)["q_full"] == 1
    illumos.run("reclaim 1 1", "listen W zone 1 address * port 80 backlog 1", "syn W count 2")
    assert counts(illumos, "W") == {"syns": 2, "created": 1, "reclaim": 1, "q0": 1}
    illumos.run("accept L", "syn L count 2")
    assert counts(illumos)["reclaim"] == 3


def test_other_segments(model: Model) -> None:
    """A segment without SYN is no SYN; more than SYN does not come so far on Solaris 10."""
    listen(model)
    plain = ["a", "r", "f", "u", "p", "ra", "fa", "pau"]
    model.run(*(f"segment L {flags} count 2" for flags in plain))
    assert counts(model) == {"segments": 16}
    model.run(*(f"segment L {flags} count 2" for flags in ("sa", "sr", "su")))
    reached = {"segments": 16, "syns": 6, "created": 6, "q0": 6}
    assert counts(model) == (reached if model.generation == "illumos" else {"segments": 22})


def test_beyond_qmax(illumos: Model) -> None:
    """A socket's handshakes complete into a full Q, until the socket layer refuses."""
    listen(illumos, backlog=2)
    illumos.run("syn L count 6", "ack L count 6")
    assert counts(illumos) == {"syns": 6, "created": 6, "established": 6, "q": 6}
    # That layer's limit is Qmax and Q0's tunable, 6.
    illumos.run("accept L count 5", "syn L count 6", "ack L count 6")
    found = counts(illumos)
    assert (found["established"], found["refused"], found["q"]) == (12, 1, 6)
    illumos.run("accept L count 5", "syn L", "ack L refused", "accept L")
    found = counts(illumos)
    assert (found["established"], found["refused"], found["accepts"]) == (13, 2, 11)


def test_deferred(deferring: tuple[Model, str]) -> None:
    """What completes stays in Q0 while Q is full; an accept moves the first of them on."""
    model, kind = deferring
    listen(model, backlog=2, more=kind)
    model.run("syn L count 6", "ack L count 5")
    full = {"syns": 6, "created": 6, "established": 2, "q": 2, "deferred": 3, "waiting": 3, "q0": 4}
    assert counts(model) == full
    model.run("accept L")
    assert counts(model) == {**full, "accepts": 1, "established": 3, "waiting": 2, "q0": 3}
    assert model.refuses("accept L count 5")
    model.run("accept L count 4")
    expected = {"syns": 6, "created": 6, "established": 5, "deferred": 3, "accepts": 5, "q0": 1}
    assert counts(model) == expected
    assert model.refuses("accept L")


def test_aborts(model: Model) -> None:
    """A reset takes a half-open one away; one in Q stays there, dead, until it is accepted."""
    listen(model)
    model.run("syn L count 5", "ack L count 2", "abort L q0 count 2", "abort L q")
    found = {"syns": 5, "created": 5, "established": 2, "q": 2, "q0": 1}
    assert counts(model) == {**found, "aborts_q0": 2, "aborts_q": 1}
    assert model.refuses("abort L q count 2")
    model.run("accept L count 2")
    assert (counts(model)["accepts"], counts(model)["accepts_dead"]) == (2, 1)
    assert "q" not in counts(model)


def test_deferred_abort(deferring: tuple[Model, str]) -> None:
    """A reset while deferred: illumos keeps it as one in Q, Solaris 10 lets it go at once."""
    model, kind = deferring
    listen(model, backlog=1, more=kind)
    kept = int(model.generation == "illumos")
    model.run("syn L count 3", "ack L count 3", "abort L deferred")
    assert counts(model)["waiting"] == 1 + kept
    model.run("accept L", "accept L")
    assert counts(model).get("waiting", 0) == 0
    assert counts(model).get("accepts_dead", 0) == kept
    assert counts(model)["established"] == 2 + kept


def test_unlisten(model: Model) -> None:
    """Without listen(3) all that waited is gone, and SYNs are dropped; listen(3) starts anew."""
    listen(model)
    model.run("syn L count 4", "ack L count 2", "unlisten L")
    killed = {"syns": 4, "created": 4, "established": 2, "killed": 4}
    assert counts(model) == killed
    assert model.refuses("unlisten L")
    assert model.refuses("ack L")
    model.run("syn L count 3")
    assert counts(model) == {**killed, "not_listening": 3}
    model.run("backlog L 5", "syn L")
    assert model.totals("L")["qmax"] == 5
    assert counts(model)["q0"] == 1


def test_close(model: Model) -> None:
    """What waits goes with its listener; the totals stay, and the name is free."""
    listen(model)
    model.run("syn L count 4", "ack L count 2", "abort L q", "close L")
    assert model.totals("L")["closed"]
    assert counts(model)["killed"] == 4
    assert model.eagers() == 0
    assert model.refuses("syn L")
    listen(model)
    assert counts(model) == {}
    assert len(model.all_totals()) == 2


def test_backlog(model: Model) -> None:
    """A second listen(3) changes Qmax at once and leaves the queues."""
    listen(model, backlog=4)
    model.run("syn L count 4", "ack L count 3", "backlog L 2", "syn L")
    assert counts(model)["q_full"] == 1
    model.run("backlog L 9", "syn L")
    assert model.totals("L")["qmax"] == 9
    assert counts(model)["q0"] == 2


def test_packets(model: Model) -> None:
    """Every kind of packet reaches a listener that its address fits, and no other."""
    model.run(
        "listen any zone 0 address * port 80 backlog 99",
        "listen four zone 0 address * family 4 port 81 backlog 99",
        "listen here4 zone 1 address 192.0.2.9 port 80 backlog 99",
        "listen mapped zone 1 address 192.0.2.9 family 6 port 81 backlog 99",
        "listen here6 zone 1 address 2001:db8::9 port 80 backlog 99",
        "q0max 0 99",
        "q0max 1 99",
    )
    for name in ("any", "four", "here4", "mapped"):
        model.run(f"syn {name}", f"syn {name} from 198.51.100.7 port 7", f"syn {name} options 40")
    for name in ("any", "here6"):
        model.run(*(f"syn {name} from 2001:db8::7 extension {n}" for n in (0, 8, 16, 1024)))
    created = {name: counts(model, name)["created"] for name in ("any", "four", "here4", "mapped")}
    assert created == {"any": 7, "four": 3, "here4": 3, "mapped": 3}
    assert counts(model, "here6")["created"] == 4
    for line in (
        "syn four from 2001:db8::7",
        "syn here4 from 2001:db8::7",
        "syn here6 from 192.0.2.7",
        "syn here6 to 2001:db8::8",
        "syn here4 options 6",
        "syn here4 options 44",
        "syn here6 extension 4",
        "syn here4 extension 8",
        "syn here6 options 4",
    ):
        assert model.refuses(line), line


def test_impossible(model: Model) -> None:
    """A line that cannot be is refused and changes nothing."""
    listen(model)
    model.run("syn L count 5", "ack L count 2")
    lines = IMPOSSIBLE.strip().splitlines()
    if model.generation == "solaris10":
        lines += ["reclaim 0 1", "listen M zone 0 address * port 81 backlog 1 limit 3"]
        lines += ["ack L refused"]
    before = model.all_totals()
    for line in lines:
        assert model.refuses(line), line
        assert model.all_totals() == before, line


IMPOSSIBLE = """
syn nobody
ack L count 4
ack L please
accept L count 3
abort L q count 3
abort L q0 count 4
abort L deferred
abort L nowhere
timeout L count 4
finish L
close nobody
unlisten nobody
listen L zone 0 address * port 81 backlog 1
listen M zone 7 address * port 81 backlog 1
listen M zone 0 address 1.2.3 port 81 backlog 1
listen M zone 0 address * port 81
listen M zone 0 address * port 65536 backlog 1
listen M zone 0 address * port 81 backlog 1 streams tli
listen M zone 0 address 2001:db8::1 family 4 port 81 backlog 1
listen M zone 0 address * port 81 backlog 1 colour green
backlog L 0
zone 0 again
zone two two
q0max 9 4
reclaim 9 1
alloc_fail -1
syn L count minus
syn L port 70000
segment L x
segment L
frobnicate L
"""


def test_lines_before(model: Model) -> None:
    """In a write of several lines those before the impossible one have happened."""
    listen(model)
    assert model.refuses("syn L\n\nsyn L count 2\naccept L\nsyn L")
    assert counts(model)["syns"] == 3


def test_million(model: Model) -> None:
    """1,000,000 SYNs, kept or dropped, are counted to the last one, and freed with the listener."""
    model.run("q0max 0 400000")
    listen(model, backlog=100_000)
    model.run("syn L count 1000000")
    half = 500_000
    assert counts(model) == {"syns": 2 * half, "created": half, "q0": half, "q0_full": half}
    assert model.eagers() == half
    model.run("ack L count 100000", "accept L count 50000", "close L")
    assert counts(model)["killed"] == half - 50_000
    assert model.eagers() == 0


def test_both_cpus(model: Model) -> None:
    """SYNs on both CPUs at once are all counted, and Q0 keeps to its limit."""
    listen(model, backlog=20)
    model.run("listen M zone 1 address * port 80 backlog 20")
    model.run_on_both("syn L count 50000", "burst M 50000")
    limit = 20 + Q0MAX_MORE
    for name in "LM":
        found = counts(model, name)
        assert found["syns"] == 100_000
        assert found["created"] + found["q0_full"] == 100_000
        # To find room and to take it are two steps: a CPU may be one SYN ahead of the other.
        assert limit <= found["q0"] <= limit + 1
    model.run("close L", "close M")
    assert model.eagers() == 0


def test_all_on_both_cpus(model: Model) -> None:
    """Evictions, completions, accepts and resets on both CPUs at once lose nothing."""
    rounds = 200
    model.run("q0max 0 500")
    listen(model, backlog=5000)
    model.run("syn L count 8000", "timeout L")
    some = ("syn L count 100", "ack L count 10", "abort L q0 count 5", "accept L count 8")
    model.run_on_both(*[*some, "timeout L"] * rounds)
    found = counts(model)
    assert found["syns"] == 8000 + 2 * rounds * 100
    assert found["established"] == 2 * rounds * 10
    assert found["accepts"] == 2 * rounds * 8
    assert found["aborts_q0"] == 2 * rounds * 5
    assert found["q"] == found["established"] - found["accepts"]
    assert found["created"] + found["q0_full"] == found["syns"]
    left = found["q0_evicted"] + found["aborts_q0"] + found["established"]
    assert found["q0"] == found["created"] - left
    assert model.eagers() == found["q"] + found["q0"]
    model.run("close L")
    assert counts(model)["killed"] == found["q"] + found["q0"]
    assert model.eagers() == 0


def test_deferred_on_both_cpus(deferring: tuple[Model, str]) -> None:
    """Connections that complete into a full Q and are accepted on both CPUs at once all arrive."""
    model, kind = deferring
    model.run("q0max 0 100000")
    listen(model, backlog=2, more=kind)
    model.run("syn L count 9000", "ack L count 100")
    rounds = 400
    model.run_on_both(*["ack L count 10", "accept L count 10"] * rounds)
    found = counts(model)
    assert found["accepts"] == 2 * rounds * 10
    # The model has no squeue: what an accept makes room for may come beside what an ACK brings.
    assert found["q"] >= 2
    assert found["established"] == found["accepts"] + found["q"]
    assert found["waiting"] == 100 + 2 * rounds * 10 - found["established"]
    assert found["q0"] == 9000 - found["established"]
    assert model.eagers() == found["q0"] + found["q"]
    model.run("close L")
    assert model.eagers() == 0


@pytest.mark.parametrize("freebsd", FREEBSD)
def test_freebsd_on_both_cpus(freebsd: str) -> None:
    """Whatever both CPUs do at once to FreeBSD's sockets, no connection is lost or left over."""
    with Model(freebsd) as model:
        model.run("bucketlimit 0 500")
        listen(model, backlog=100)
        model.run("listen M zone 0 address * port 81 backlog 4 filter", "syn L count 500")
        some = ("syn L count 50", "ack L count 10", "cookie L count 15", "abort L q0 count 5")
        model.run_on_both(*[*some, "again L", "accept L count 8"] * 100)
        for _ in range(50):
            # One CPU may take what the other would.
            with suppress(OSError):
                model.run_on_both("cookie M count 9", "data M count 3", "accept M count 3")
        for name in "LM":
            found = model.totals(name)
            assert found["syns"] == found["created"] + found["duplicates"]
            assert found["established"] == found["accepts"] + found["q"]
            assert found["tcp_q"] == found["q"]
        assert model.totals("L")["q_full_ack"]
        assert model.totals("M")["overflown"]
        acks = model.totals("L")["established"] + model.totals("L")["q_full_ack"]
        cookies = 2 * 100 * 15
        assert model.totals("L")["syns"] == 500 + 2 * 100 * 51
        assert model.totals("L")["accepts"] == 2 * 100 * 8
        assert acks - cookies == model.totals("L")["created"] - sum(
            model.totals("L")[way] for way in ("q0_evicted", "forgotten", "half_open")
        )
        kept = [model.totals(name)["q"] + model.totals(name)["waiting"] for name in "LM"]
        assert model.eagers() == sum(kept)
        model.run("close L", "close M")
        assert [model.totals(name)["killed"] for name in "LM"] == kept
        assert model.eagers() == 0


def test_kernel_log() -> None:
    """No model has upset the kernel, whatever the cases before this one did with it."""
    for generation in (*SOLARIS, *FREEBSD):
        with Model(generation) as model:
            listen(model)
            model.run("syn L count 3", "ack L", "abort L q")
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    # The kernel says it of the first one only.
    assert re.search(r"\b(?:ip|freebsd): loading out-of-tree module", log)
    ours = r"solaris_eager|freebsd_socket|freebsd_inpcb|freebsd_syncache"
    bad = re.findall(rf"^.*\b(?:BUG|WARNING|Oops)\b.*$|^.*(?:{ours}).*$", log, re.MULTILINE)
    assert not bad, log[-4000:]


class Reference:
    """The decisions in Python, from the same facts and without the same code: one listener's.

    Connections are numbers; ``dead`` are those that were reset and are still there.
    """

    def __init__(self, generation: str, kind: str, qmax: int, more: int) -> None:
        self.illumos = generation == "illumos"
        self.streams = kind != "" or not self.illumos
        self.qmax, self.more = qmax, more
        self.so_limit = qmax + more
        self.half_open: list[int] = []
        self.deferred: list[int] = []
        self.q: list[int] = []
        self.dead: set[int] = set()
        self.timed: list[int] = []
        self.notified = 0
        self.totals: Counter[str] = Counter()
        self.made = 0

    def syn(self) -> None:
        self.totals["syns"] += 1
        self.totals["q_sum"] += len(self.q)
        if len(self.q) >= self.qmax:
            self.totals["q_full"] += 1
            return
        if len(self.half_open) + len(self.deferred) >= self.qmax + self.more and not self.evict():
            self.totals["q0_full"] += 1
            return
        self.totals["created"] += 1
        self.made += 1
        self.half_open.append(self.made)

    def evict(self) -> bool:
        candidates = self.timed if self.illumos else self.half_open[:1]
        if not candidates or candidates[0] not in self.timed:
            return False
        victim = candidates[0]
        self.leave(victim)
        self.totals["q0_evicted"] += 1
        return True

    def leave(self, number: int) -> None:
        self.half_open.remove(number)
        if number in self.timed:
            self.timed.remove(number)

    def ack(self, refused: bool = False) -> bool:
        if not self.half_open or (refused and self.streams):
            return False
        number = self.half_open[0]
        self.leave(number)
        if self.streams and len(self.q) >= self.qmax:
            self.deferred.append(number)
            self.totals["deferred"] += 1
            return True
        self.totals["established"] += 1
        if not self.streams and (refused or self.notified >= self.so_limit):
            self.totals["refused"] += 1
            return True
        self.notified += 1
        self.q.append(number)
        return True

    def accept(self) -> bool:
        if not self.q:
            return False
        number = self.q.pop(0)
        self.notified -= 1
        self.totals["accepts"] += 1
        self.totals["accepts_dead"] += number in self.dead
        if self.deferred:
            self.q.append(self.deferred.pop(0))
            self.totals["established"] += 1
        return True

    def abort(self, where: str) -> bool:
        if where == "q0":
            if not self.half_open:
                return False
            self.leave(self.half_open[0])
            self.totals["aborts_q0"] += 1
            return True
        queue = self.q if where == "q" else self.deferred
        living = [number for number in queue if number not in self.dead]
        if not living:
            return False
        self.totals[f"aborts_{where}"] += 1
        if where == "deferred" and not self.illumos:
            self.deferred.remove(living[0])
        else:
            self.dead.add(living[0])
        return True

    def timeout(self) -> bool:
        self.timed += [number for number in self.half_open if number not in self.timed]
        return True

    def backlog(self, qmax: int) -> bool:
        # On Solaris 10 the same backlog once more is an error, which changes nothing either.
        self.qmax = qmax
        self.so_limit = qmax + self.more
        return True

    def now(self) -> dict[str, int]:
        queues = {
            "q": len(self.q),
            "q0": len(self.half_open) + len(self.deferred),
            "waiting": len(self.deferred),
        }
        return {key: value for key, value in {**self.totals, **queues}.items() if value}


EVENTS = st.one_of(
    st.tuples(st.just("syn"), st.integers(1, 9)),
    st.tuples(st.just("ack"), st.integers(1, 9)),
    st.tuples(st.just("accept"), st.integers(1, 3)),
    st.tuples(st.just("deferred"), st.integers(1, 3)),
    st.tuples(st.sampled_from(["refused", "q0", "q", "timeout"]), st.just(1)),
    st.tuples(st.just("backlog"), st.integers(1, 5)),
)
"""What happens, so mixed that full queues, deferred and dead connections are common."""


def follow(model: Model, reference: Reference, event: str, number: int) -> None:
    """Let an event happen in both, one connection at a time; each may find it impossible."""
    if event == "syn":
        model.run(f"syn L count {number}")
        for _ in range(number):
            reference.syn()
    elif event == "backlog":
        assert not model.refuses(f"backlog L {number}")
        reference.backlog(number)
    elif event == "timeout":
        assert not model.refuses("timeout L")
        reference.timeout()
    else:
        same: Callable[[], bool]
        line, same = {
            "ack": ("ack L", reference.ack),
            "refused": ("ack L refused", lambda: reference.ack(refused=True)),
            "accept": ("accept L", reference.accept),
        }.get(event, (f"abort L {event}", lambda: reference.abort(event)))
        for _ in range(number):
            assert model.refuses(line) is not same(), line


@pytest.mark.parametrize(("generation", "kind"), [("illumos", ""), *DEFERRING])
def test_any_script(generation: str, kind: str) -> None:
    """Whatever happens, in any order, the totals are those of a second implementation."""
    tried = 0
    scripts = st.lists(EVENTS, min_size=15, max_size=50)

    with loaded(generation) as made:

        def same(backlog: int, events: list[tuple[str, int]]) -> None:
            nonlocal tried
            tried += 1
            listen(made, backlog=backlog, more=kind)
            reference = Reference(generation, kind, backlog, Q0MAX_MORE)
            try:
                for event, number in events:
                    follow(made, reference, event, number)
                    assert totals_and_sum(made) == reference.now(), (event, number)
            finally:
                made.run("close L", "forget")

        SETTINGS(given(backlog=st.integers(1, 4), events=scripts)(same))()
        assert made.eagers() == 0
    assert tried >= SETTINGS.max_examples


SETTINGS = settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,
    # A shorter example is not worth the minutes that it takes here.
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
