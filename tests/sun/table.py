"""The table of small D texts with the results of Sun's engine: how it is read and played.

Each line of a text's events is one of

    f 1 -2 thing+8      fbt:ip:f:entry fires, with arg0, arg1 and so on
    f:return 0 5        another probe of f; mib:::name works too
    f 1 cpu 1 thread 7  where it fires, if not on CPU 0 as thread 1
    20 times f n 8*n    for each n from 0 to 19
    wait 2s             time passes, in ms or s
    stall, go           dtrace(1) does nothing until go

A text's memory consists of named blocks: ``thing_t count=-3 next=&other``, ``text words``,
``hex 00 ff``, or numbers, ``uint32 1 2 3``; each begins at a multiple of 64.
"""

from __future__ import annotations

import functools
import re
import shutil
import struct
import subprocess
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest

from sun.c_types import Types, section
from sun.engine import Engine, Refused, Session
from sun.rules import Rules

TABLE = Path(__file__).with_name("table.toml")
BASE = 0x100_0000_0000
"""Where a text's memory begins."""
MEMORY = 1 << 16
"""The size of memory: zeros after the blocks; other addresses do not exist."""
SIZES_DIFFER_MOST = 0.1
ALL = Rules()
_NUMBERS = {
    "uint8": "B",
    "uint16": "H",
    "uint32": "I",
    "uint64": "Q",
    "int8": "b",
    "int16": "h",
    "int32": "i",
    "int64": "q",
}
_FIRE = re.compile(r"(?:(\d+) times )?(\S+)(.*)")


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a text.

    Args:
        refused: why dtrace(1) did not start; empty if it did.
        output: on stdout, without the newline that dtrace(1) adds at its end.
        errors: lines on stderr, without the numbers of probes.
        dof: the size of the compiled program; 0 if it was not compiled.
        register: the highest register that its code uses, given where the kernel refuses it.
    """

    refused: str = ""
    output: str = ""
    errors: tuple[str, ...] = ()
    dof: int = 0
    register: int = 0


@dataclass(frozen=True, slots=True)
class Text:
    """A text of the table.

    Args:
        about: what it shows.
        d: the D text.
        events: the lines of events; see above.
        memory: the blocks by name; see above.
        rules: names of the rules without which it behaves differently.
        results: the results by system.
        unlike: what is not simulated in it; empty if all is.
    """

    about: str
    d: str
    events: tuple[str, ...] = ()
    memory: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[str, ...] = ()
    results: Mapping[str, Result] = field(default_factory=dict)
    unlike: str = ""


class Host(Protocol):
    """A host that plays a text: the simulator, or Sun's engine."""

    def fire(self, probe: str, args: list[int], cpu: int, thread: int) -> None:
        """Let a probe fire."""

    def wait(self, nanoseconds: int) -> None:
        """Let time pass."""

    def stall(self, on: bool) -> None:
        """Let dtrace(1) do nothing, or continue."""


def difference(told: Result, got: Result) -> str:
    """Return how a result differs from that in the table; an empty string if it does not."""
    for name in ("refused", "output", "errors"):
        if getattr(told, name) != getattr(got, name):
            return f"{name}: {getattr(got, name)!r}, and not {getattr(told, name)!r}"
    if abs(told.dof - got.dof) > SIZES_DIFFER_MOST * told.dof:
        return f"dof: {got.dof}, and not about {told.dof}"
    if told.register and told.register != got.register:
        return f"register: {got.register}, and not {told.register}"
    return ""


def read(path: Path = TABLE) -> tuple[str, list[Text]]:
    """Return the C types that the texts use, and the texts."""
    table = tomllib.loads(path.read_text())
    return table["types"], [_text(entry) for entry in table["text"]]


def _text(entry: Mapping[str, Any]) -> Text:
    return Text(
        *(entry["about"], entry["d"], tuple(entry.get("events", ())), entry.get("memory", {})),
        *(tuple(entry.get("rules", ())),),
        results={
            system: Result(**{**entry[system], "errors": tuple(entry[system].get("errors", ()))})
            for system in ("illumos", "solaris10")
            if system in entry
        },
        unlike=entry.get("unlike", ""),
    )


@functools.cache
def types_of(source: str) -> Types:
    """Compile C types; without gcc, a test that needs them is skipped."""
    if not shutil.which("gcc"):
        pytest.skip("there is no gcc to make type information")
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "types.o"
        command = ["gcc", "-gbtf", "-c", "-x", "c", "-", "-o", str(target)]
        subprocess.run(command, input=source, text=True, check=True, capture_output=True)
        return Types(section(target.read_bytes(), ".BTF"))


def memory(text: Text, types: Types) -> tuple[bytes, dict[str, int]]:
    """Return a text's memory, and the addresses of its blocks."""
    sizes = {name: len(_block(block, types, {})) for name, block in text.memory.items()}
    addresses: dict[str, int] = {}
    at = 0
    for name, size in sizes.items():
        addresses[name] = BASE + at
        at += -(-size // 64) * 64
    data = bytearray(MEMORY)
    for name, block in text.memory.items():
        new = _block(block, types, addresses)
        start = addresses[name] - BASE
        data[start : start + len(new)] = new
    return bytes(data), addresses


def _block(block: str, types: Types, addresses: Mapping[str, int]) -> bytes:
    kind, _, rest = block.partition(" ")
    if kind == "text":
        return rest.encode() + b"\0"
    if kind == "hex":
        return bytes.fromhex(rest)
    if kind in _NUMBERS:
        numbers = [_number(word, addresses) for word in rest.split()]
        return struct.pack(f"<{len(numbers)}{_NUMBERS[kind]}", *numbers)
    type_ = types.get(kind)
    data = bytearray(type_.byte_size())
    for word in rest.split():
        name, _, value = word.partition("=")
        member = type_.member(name)
        assert member, name
        size = member.type.byte_size()
        if value.startswith("'"):
            new = value.strip("'").encode()
        else:
            new = (_number(value, addresses) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        data[member.offset : member.offset + len(new)] = new
    return bytes(data)


def _number(word: str, names: Mapping[str, int]) -> int:
    """Return the value of a number, or of a name plus an offset."""
    if word.startswith("&"):
        return names.get(word[1:], 0)
    return int(eval(word, {"__builtins__": {}}, dict(names)))


def play(text: Text, host: Host, addresses: Mapping[str, int]) -> None:
    """Play the events of a text."""
    for line in text.events:
        word, _, rest = line.partition(" ")
        if word == "wait":
            host.wait(int(rest.rstrip("ms")) * (1_000_000 if rest.endswith("ms") else 10**9))
        elif line in {"stall", "go"}:
            host.stall(line == "stall")
        else:
            _fire(line, host, addresses)


def _fire(line: str, host: Host, addresses: Mapping[str, int]) -> None:
    found = _FIRE.fullmatch(line)
    assert found
    times, probe, rest = found.groups()
    words = rest.split()
    where = {"cpu": "0", "thread": "1"}
    while len(words) > 1 and words[-2] in where:
        where[words[-2]] = words[-1]
        del words[-2:]
    if not probe.startswith(("mib:", "fbt:")):
        function, _, name = probe.partition(":")
        probe = f"fbt:ip:{function}:{name or 'entry'}"
    for n in range(int(times or 1)):
        names = {**addresses, "n": n} if times else addresses
        values = [_number(word, names) for word in words]
        host.fire(probe, values, *(_number(where[what], names) for what in ("cpu", "thread")))


def plain(errors: str) -> tuple[str, ...]:
    """Return lines of stderr without the numbers of probes."""
    return tuple(re.sub(r"\(ID \d+: ", "(", errors).splitlines())


class Simulated:
    """The simulator as a host."""

    def __init__(self, host: Engine, session: Session) -> None:
        self._host = host
        self._session = session

    def fire(self, probe: str, args: list[int], cpu: int, thread: int) -> None:
        """Let a probe fire."""
        self._host.fire(probe, args, cpu, thread)

    def wait(self, nanoseconds: int) -> None:
        """Let time pass."""
        self._host.advance(nanoseconds)

    def stall(self, on: bool) -> None:
        """Let dtrace(1) do nothing, or continue."""
        if on:
            self._session.stall()
        else:
            self._session.go()


def simulate(text: Text, system: str, source: str, rules: Rules = ALL) -> Result:
    """Return what the simulator does with a text.

    Args:
        text: the text.
        system: illumos or solaris10.
        source: the C types that the table's texts use.
        rules: the rules of the engine.
    """
    types = types_of(source)
    data, addresses = memory(text, types)

    def load(address: int, size: int) -> bytes:
        at = address - BASE
        if at < 0 or at + size > len(data):
            raise OSError(f"nothing at {address:#x}")
        return data[at : at + size]

    symbols = {name: addresses[name] for name in types.variables if name in addresses}
    probes = re.findall(r"(?:fbt|mib):\w*:\w*:\w+", text.d)
    host = Engine(types, symbols, 2, rules, system, load, probes=probes)
    try:
        session = host.start(text.d, name="x.d")
    except Refused as refused:
        message = str(refused).removeprefix("dtrace: ")
        return Result(message, dof=refused.dof_size, register=refused.registers)
    play(text, Simulated(host, session), addresses)
    session.stop()
    errors = plain("\n".join(session.errors))
    return Result("", session.output, errors, session.dof_size, session.registers)
