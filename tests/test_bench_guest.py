"""The code that runs in the guests of the bench, as far as it can be tested without a guest."""

from __future__ import annotations

import socket
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench/guest"))

import flood
import instructions
import tools
import tracing
import turns


def words(data: bytes) -> int:
    """Return the folded sum of the 16-bit words, as a receiver does to check a checksum."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@pytest.mark.parametrize("number", [0, 1, 49_999, 50_000, 123_456])
@pytest.mark.parametrize("flags", [2, 4])
def test_packet(number: int, flags: int) -> None:
    """A packet goes to the listener's port and has a correct checksum."""
    made = flood.packet(number, "192.0.2.1", 7001, flags)
    assert len(made) == 40
    assert made[16:20] == socket.inet_aton("192.0.2.1")
    source, target = struct.unpack("!HH", made[20:24])
    assert source >= 1024
    assert target == 7001
    assert made[33] == flags
    assert words(made[12:20] + struct.pack("!HH", 6, 20) + made[20:]) == 0xFFFF


def test_packets_of_a_client() -> None:
    """A reset has its SYN's client and next sequence number; each SYN has its own client."""
    syn, reset = (flood.packet(70_000, "192.0.2.1", 80, flags) for flags in (2, 4))
    assert syn[12:22] == reset[12:22]
    sequences = [int.from_bytes(one[24:28], "big") for one in (syn, reset)]
    assert sequences[1] == sequences[0] + 1
    clients = {flood.packet(number, "192.0.2.1", 80, 2)[12:22] for number in range(60_000)}
    assert len(clients) == 60_000


def test_what_tools_tell() -> None:
    """If a tool reports a key again and again, the last report counts."""
    assert tools.counted("ready\ncount 1\n\ncount 12\n") == 12
    assert tools.counted("ready\n") == 0
    text = "Attached 2 probes\n@[-9]: 1\n@[7]: 5\n\n@[-9]: 3\n@[7]: 5\n"
    assert tools.sum_of_keys(text) == 8


def test_what_rows_tell() -> None:
    """Of repeated rows the last counts, so each SYN counts once; an incomplete row is ignored."""
    output = (
        "ready 5 9\nlistener 8880000000000001 1 10 9 1 0.0.0.0 80 0 0 8\ntick 2\nset 1\n"
        "count 8880000000000001 10 8 0 40\ncount 8880000000000001 10 8 0 41\ncount 88 10"
    )
    assert tools.rows_seen(output) == 41


def test_of_one_port() -> None:
    """A program is marked if it reports the SYNs of one port only."""
    assert tools.ours("dtrace", "linux", 80).port_only
    shared = tools.ours("dtrace", "linux")
    assert not shared.port_only
    assert "inline int PORT = 0;" in (shared.text or "")


def test_pieces() -> None:
    """Each piece of a program differs from the others, and is compared with one of them."""
    texts = {name: text for name, text, _ in instructions.pieces()}
    assert len(set(texts.values())) == len(texts)
    assert {over for _, _, over in instructions.pieces()} <= {"", *texts}


def test_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tool is measured, even if one before it fails; the failure is reported."""
    said: list[Any] = []
    monkeypatch.setattr(turns, "complain", lambda what, error: said.append((what, str(error))))
    many = [tools.Tool(name, (), None, "") for name in "abc"]
    measured = []

    def measure(tool: tools.Tool, _tracer: object) -> None:
        measured.append(tool.name)
        if tool.name == "b":
            raise RuntimeError("no headers")

    turns.by_turns(many, measure)
    assert measured == ["a", "b", "c"]
    assert said == [("b", "no headers")]


class Load:
    """A load that makes no SYNs."""

    total = 100

    def burst(self, syns: int) -> float:
        """Count SYNs as made."""
        self.total += syns
        return 1.0

    def made(self) -> int:
        """Return how many SYNs were made."""
        return self.total


class Output(tracing.Tracer):
    """A tracer that reports the next count each time the test waits for it."""

    def __init__(self, told: list[int]) -> None:
        self.left, self.now = told, 0

    def wait(self, _seconds: float) -> None:
        """Go on to the next count."""
        self.now = self.left.pop(0) if self.left else self.now

    def text(self) -> str:
        """Return the report of the current count."""
        return f"count {self.now}\n"


@pytest.mark.parametrize(
    ("told", "seen"),
    [
        pytest.param([0, 0, 700, 1000, 1000, 1000], 1000, id="late"),
        pytest.param([1000, 1001, 1001, 1001], 1001, id="too many"),
        pytest.param([700], 700, id="lost"),
    ],
)
def test_account(told: list[int], seen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The account waits until a tool's report is complete, or until no more comes."""
    monkeypatch.setattr(turns, "PATIENCE", 0.5)
    load, output = Load(), Output(told)
    tool = tools.Tool("one", ("true",), None, "", tools.counted)
    account = turns.Account(load, tool, output, load.made())
    load.burst(1000)
    assert account.balance() == (1000, seen)
    load.burst(7)
    output.left = [seen + 7]
    assert account.balance() == (7, 7)
