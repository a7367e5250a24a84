"""Small inputs for the simulator: a few C types, memory to put them in, and short programs."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sun.c_types import Types, section
from sun.engine import Engine, Session
from sun.rules import Rules

C_TYPES = """
struct inner { int number; unsigned char bytes[4]; };
enum color { RED, GREEN = 5, BLUE = -1 };
typedef struct thing {
    struct thing *next;
    const char *text;
    long wide;
    int count;
    unsigned short port;
    unsigned char flags;
    signed char tiny;
    union { int in_union; unsigned int as_unsigned; };
    struct inner list[3];
    enum color color;
    char name[8];
    unsigned int bits : 3;
    struct missing *missing;
    void *anything;
    unsigned char *bytes;
    long spare[3];
} thing_t;
thing_t things[2];
int answer = 42;
"""
BASE = 0xFFFFFF00_00001000
"""Where memory begins: an address like those of the kernel."""

ALL = Rules()

Event = tuple[str, Sequence[int]]


@functools.cache
def types() -> Types:
    """Return the types above; without gcc, a test that needs them is skipped."""
    if not shutil.which("gcc"):
        pytest.skip("there is no gcc to make type information")
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "small.o"
        command = ["gcc", "-gbtf", "-c", "-x", "c", "-", "-o", str(target)]
        subprocess.run(command, input=C_TYPES, text=True, check=True, capture_output=True)
        return Types(section(target.read_bytes(), ".BTF"))


class Ram:
    """A kernel's memory: what a test has put there; other addresses fault."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def put(self, data: bytes) -> int:
        """Put bytes at the next multiple of 16; return their address."""
        self._bytes += bytes(-len(self._bytes) % 16)
        address = BASE + len(self._bytes)
        self._bytes += data
        return address

    def thing(self, **values: int | bytes) -> int:
        """Put a ``thing_t`` with these members; return its address."""
        type_ = types().get("thing_t")
        data = bytearray(type_.byte_size())
        for name, value in values.items():
            member = type_.member(name)
            assert member
            new = value if isinstance(value, bytes) else _bytes(value, member.type.byte_size())
            data[member.offset : member.offset + len(new)] = new
        return self.put(bytes(data))

    def load(self, address: int, size: int) -> bytes:
        """Return memory, which ends at a multiple of 16."""
        at = address - BASE
        end = len(self._bytes) + -len(self._bytes) % 16
        if at < 0 or at + size > end:
            raise OSError(f"nothing at {address:#x}")
        return bytes(self._bytes[at : at + size]).ljust(size, b"\0")


def engine(
    ram: Ram | None = None, system: str = "illumos", rules: Rules = ALL, cpus: int = 2
) -> Engine:
    """Return a host whose memory is ``ram``."""
    return Engine(types(), cpus=cpus, rules=rules, system=system, load=(ram or Ram()).load)


def run(
    text: str,
    *events: Event,
    ram: Ram | None = None,
    system: str = "illumos",
    rules: Rules = ALL,
) -> Session:
    """Run a program on some events, and end it after a second; return the session."""
    host = engine(ram, system, rules)
    session = host.start(text)
    for probe, args in events:
        host.fire(f"fbt:ip:{probe}:entry", args)
    host.advance(1_000_000_000)
    session.stop()
    return session


def printed(expression: str, *args: int, ram: Ram | None = None, system: str = "illumos") -> str:
    """Return what ``%d``, or ``%s`` for a string, prints for an expression of arg0 and so on."""
    letter = "s" if expression.startswith(("stringof", "inet", "(string)")) else "d"
    text = f'fbt:ip:f:entry {{ printf("%{letter}", {expression}); }}'
    session = run(text, ("f", args), ram=ram, system=system)
    assert not session.errors, session.errors
    return session.output


def refusal(start: Callable[[], object]) -> str:
    """Return dtrace(1)'s reason for refusing a program, without the words before it."""
    with pytest.raises(Exception, match=r"^dtrace: ") as caught:
        start()
    return (
        str(caught.value)
        .removeprefix("dtrace: ")
        .removeprefix("failed to compile script /dev/stdin: ")
    )


def _bytes(value: int, size: int) -> bytes:
    return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
