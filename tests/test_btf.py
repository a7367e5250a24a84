"""BTF enumerators are read in either byte order, and malformed files are refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtrace_exporter.tracing.btf import BTFError, enumerators

VMLINUX = Path("/sys/kernel/btf/vmlinux")
both_orders = pytest.mark.parametrize("order", ["<", ">"])
SIGNED = 1 << 31
ENUM, ENUM64 = 6, 19


class Blob:
    """A BTF file under construction."""

    def __init__(self, order: str) -> None:
        self.order = order
        self.types = b""
        self.strings = b"\0"

    def string(self, text: str) -> int:
        """Add a string and return its offset."""
        self.strings += text.encode() + b"\0"
        return len(self.strings) - len(text) - 1

    def type(self, kind: int, vlen: int = 0, words: tuple[int, ...] = (), flag: int = 0) -> Blob:
        """Add a type without a name, and the words that follow it."""
        values = (0, flag | kind << 24 | vlen, 4, *words)
        self.types += struct.pack(f"{self.order}{len(values)}I", *(v & 0xFFFFFFFF for v in values))
        return self

    def enum(self, members: dict[str, int], flag: int = 0) -> Blob:
        """Add an enum of 32 bits."""
        words = [word for name, value in members.items() for word in (self.string(name), value)]
        return self.type(ENUM, len(members), tuple(words), flag)

    def enum64(self, members: dict[str, int], flag: int = 0) -> Blob:
        """Add an enum of 64 bits."""
        words: list[int] = []
        for name, value in members.items():
            words += self.string(name), value, value >> 32
        return self.type(ENUM64, len(members), tuple(words), flag)

    def bytes(self, magic: int = 0xEB9F, version: int = 1, header: int = 24) -> bytes:
        """Return the whole file."""
        sections = (0, len(self.types), len(self.types), len(self.strings))
        head = struct.pack(self.order + "HBBIIIII", magic, version, 0, header, *sections)
        return head.ljust(header, b"\0") + self.types + self.strings


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., dict[str, int]]:
    """Return a function that looks names up in the bytes of a file."""

    def lookup(blob: bytes, *names: str) -> dict[str, int]:
        path = tmp_path / "btf"
        path.write_bytes(blob)
        return enumerators(path, names)

    return lookup


def every_kind(blob: Blob) -> Blob:
    """Add one type of every kind except enums, with members if the kind has any."""
    for kind, vlen, words in (
        (1, 0, 1), (2, 0, 0), (3, 0, 3), (4, 2, 6), (5, 1, 3), (7, 0, 0), (8, 0, 0), (9, 0, 0),
        (10, 0, 0), (11, 0, 0), (12, 2, 0), (13, 3, 6), (14, 0, 1), (15, 2, 6), (16, 0, 0),
        (17, 0, 1), (18, 0, 0),
    ):  # fmt: skip
        blob.type(kind, vlen, tuple(range(words)))
    return blob


@both_orders
def test_values(read: Callable[..., dict[str, int]], order: str) -> None:
    """Enums of both widths are found after types of every kind; unknown names are absent."""
    blob = every_kind(Blob(order)).enum({"A": 0, "LISTENDROPS": 24, "B": 0xFFFFFFFF})
    blob = every_kind(blob).enum64({"C": 1 << 40, "D": (1 << 64) - 1})
    expected = {"LISTENDROPS": 24, "B": 0xFFFFFFFF, "C": 1 << 40, "D": (1 << 64) - 1}
    found = read(blob.bytes(), "LISTENDROPS", "B", "C", "D", "NOWHERE", "", "LISTEN")
    assert found == expected


@both_orders
def test_signed(read: Callable[..., dict[str, int]], order: str) -> None:
    """Values are negative if their enum is marked as signed."""
    blob = Blob(order).enum({"A": -1, "B": 1}, SIGNED).enum64({"C": -2, "D": -(1 << 40)}, SIGNED)
    assert read(blob.bytes(), *"ABCD") == {"A": -1, "B": 1, "C": -2, "D": -(1 << 40)}


def test_header_of_another_length(read: Callable[..., dict[str, int]]) -> None:
    """A longer header, as later kernels may write, is skipped."""
    assert read(Blob("<").enum({"A": 5}).bytes(header=27), "A") == {"A": 5}


def test_shared_string_ends(read: Callable[..., dict[str, int]]) -> None:
    """A name may be the end of a longer string, and is not taken for the longer one."""
    blob = Blob("<")
    whole = blob.string("TCP_LISTEN")
    blob.type(ENUM, 2, (whole, 10, whole + 4, 7))
    assert read(blob.bytes(), "LISTEN") == {"LISTEN": 7}
    assert read(blob.bytes(), "TCP_LISTEN") == {"TCP_LISTEN": 10}


def test_first_of_one_name(read: Callable[..., dict[str, int]]) -> None:
    """If two enumerators have one name, the first counts."""
    twice = Blob("<").enum({"A": 1}).enum({"A": 2})
    assert read(twice.bytes(), "A") == {"A": 1}
    assert read(twice.enum({"B": 3}).bytes(), "A", "B") == {"A": 1, "B": 3}


def test_no_names(read: Callable[..., dict[str, int]]) -> None:
    """Without wanted names the answer is empty."""
    assert read(Blob("<").enum({"A": 1}).bytes()) == {}


GOOD = Blob("<").enum({"A": 1}).bytes()


def bad(kind: int, vlen: int = 0, words: tuple[int, ...] = ()) -> bytes:
    """Return a file with one type, and with the string A, so that the type has to be read."""
    blob = Blob("<")
    blob.string("A")
    return blob.type(kind, vlen, words).bytes()


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\x9f\xeb",
        b"\x7fELF" + GOOD[4:],
        Blob("<").bytes(version=2),
        Blob("<").bytes(magic=0x9FEC),
        GOOD[:4] + struct.pack("<I", 8) + GOOD[8:],
        GOOD[:4] + struct.pack("<I", 0xFFFFFFFF) + GOOD[8:],
        GOOD[:8] + struct.pack("<I", 0xFFFFFFFF) + GOOD[12:],
        GOOD[:12] + struct.pack("<I", 0xFFFFFFFF) + GOOD[16:],
        GOOD[:12] + struct.pack("<I", 19) + GOOD[16:],
        GOOD[:20] + struct.pack("<I", 0xFFFFFFFF) + GOOD[24:],
        bad(0),
        bad(20),
        bad(31),
        bad(1),
        bad(4, 0xFFFF),
        bad(ENUM, 2, (9, 9, 9)),
        bad(ENUM64, 1, (1, 1)),
    ],
)
def test_malformed(read: Callable[..., dict[str, int]], blob: bytes) -> None:
    """A file that does not fit the format raises BTFError."""
    with pytest.raises(BTFError):
        read(blob, "A")


def test_missing_file(tmp_path: Path) -> None:
    """A missing file raises FileNotFoundError, an OSError."""
    with pytest.raises(FileNotFoundError):
        enumerators(tmp_path / "vmlinux", ["A"])


@both_orders
def test_truncated_anywhere(read: Callable[..., dict[str, int]], order: str) -> None:
    """A file cut short anywhere raises BTFError."""
    whole = every_kind(Blob(order).enum({"A": 1})).enum64({"B": 2}).bytes()
    for size in range(len(whole)):
        with pytest.raises(BTFError):
            read(whole[:size], "B")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.sampled_from("<>"),
    types=st.lists(
        st.tuples(
            st.integers(0, 0xFFFFFFFF),
            st.builds(
                lambda kind, vlen, flag: flag | kind << 24 | vlen,
                st.integers(0, 21),
                st.integers(0, 4) | st.integers(0, 0xFFFF),
                st.sampled_from([0, SIGNED]),
            ),
            st.integers(0, 40),
        )
    ),
    tail=st.binary(max_size=40),
    strings=st.sampled_from([b"\0A\0", b"\0", b"", b"A", b"\0A\0A\0AA\0"]),
)
def test_random_files(
    read: Callable[..., dict[str, int]],
    order: str,
    types: list[tuple[int, int, int]],
    tail: bytes,
    strings: bytes,
) -> None:
    """Random types either give values of the wanted names or raise BTFError."""
    blob = Blob(order)
    blob.types = b"".join(struct.pack(order + "III", *words) for words in types) + tail
    blob.strings = strings
    try:
        found = read(blob.bytes(), "A")
    except BTFError:
        return
    assert set(found) <= {"A"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(), st.sampled_from([b"", b"\x9f\xeb\x01\x00", b"\xeb\x9f\x01\x00"]))
def test_random_bytes(read: Callable[..., dict[str, int]], junk: bytes, magic: bytes) -> None:
    """Random bytes raise BTFError or give an empty answer."""
    with suppress(BTFError):
        assert read(magic + junk, "LINUX_MIB_LISTENDROPS") == {}


@pytest.mark.skipif(not VMLINUX.exists(), reason=f"this kernel has no {VMLINUX}")
def test_this_kernel() -> None:
    """The running kernel's BTF has TCP_LISTEN, whose value is part of the kernel's interface."""
    found = enumerators(VMLINUX, ["TCP_LISTEN", "TCP_SYN_RECV", "NO_SUCH_ENUMERATOR"])
    assert found == {"TCP_LISTEN": 10, "TCP_SYN_RECV": 3}
