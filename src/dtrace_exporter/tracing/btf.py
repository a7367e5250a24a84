"""Reads values of enumerators from the kernel's own type information (BTF).

The format is that of Documentation/bpf/btf.rst and include/uapi/linux/btf.h in Linux.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Collection
from pathlib import Path
from typing import Final

_MAGIC = 0xEB9F
_HEADER = 24
_ENUM: Final = 6
_ENUM64: Final = 19

# By kind, how many 32-bit words follow the three of struct btf_type: once, and for each member.
_KINDS: Final = {
    1: (1, 0),  # INT
    2: (0, 0),  # PTR
    3: (3, 0),  # ARRAY
    4: (0, 3),  # STRUCT
    5: (0, 3),  # UNION
    _ENUM: (0, 2),
    7: (0, 0),  # FWD
    8: (0, 0),  # TYPEDEF
    9: (0, 0),  # VOLATILE
    10: (0, 0),  # CONST
    11: (0, 0),  # RESTRICT
    12: (0, 0),  # FUNC; its vlen is the linkage, not the number of members
    13: (0, 2),  # FUNC_PROTO
    14: (1, 0),  # VAR
    15: (0, 3),  # DATASEC
    16: (0, 0),  # FLOAT
    17: (1, 0),  # DECL_TAG
    18: (0, 0),  # TYPE_TAG
    _ENUM64: (0, 3),
}


class BTFError(ValueError):
    """A file is not well-formed BTF."""


def enumerators(path: Path, names: Collection[str]) -> dict[str, int]:
    """Look up the values of enumerators by name.

    Args:
        path: a BTF file of either byte order, such as /sys/kernel/btf/vmlinux.
        names: the enumerators wanted.

    Returns:
        The values of those that were found; if several have the same name, the first. A 32-bit
        value is signed only if its enum says so, which before Linux 6.0 none did.

    Raises:
        OSError: the file cannot be read.
        BTFError: the part of it that was read is malformed.
    """
    words, strings = _sections(path.read_bytes())
    wanted = _offsets(strings, names)
    missing = set(wanted.values())
    found: dict[str, int] = {}
    at = 0
    try:
        while missing and at < len(words):
            info = words[at + 1]
            kind = info >> 24 & 0x1F
            once, each = _KINDS[kind]
            members = at + 3 + once
            at = members + each * (info & 0xFFFF)
            if kind in (_ENUM, _ENUM64):
                for member in range(members, at, each):
                    name = wanted.get(words[member])
                    if name in missing:
                        found[name] = _value(words[member + 1 : member + each], info >> 31)
                        missing.remove(name)
    except KeyError:
        raise BTFError(f"{path}: unknown kind of type {kind}") from None
    except IndexError:
        at = len(words) + 1
    if at > len(words):
        raise BTFError(f"{path}: truncated type")
    return found


def _sections(blob: bytes) -> tuple[array[int], bytes]:
    """Return the type section as words, and the string section."""
    order = {b"\x9f\xeb": "<", b"\xeb\x9f": ">"}.get(blob[:2])
    if order is None or len(blob) < _HEADER:
        raise BTFError("no BTF header")
    version, header, type_at, type_size, string_at, string_size = struct.unpack_from(
        order + "BxIIIII", blob, 2
    )
    if version != 1:
        raise BTFError(f"BTF version {version}")
    types = blob[header + type_at : header + type_at + type_size]
    strings = blob[header + string_at : header + string_at + string_size]
    if header < _HEADER or len(types) != type_size or len(strings) != string_size:
        raise BTFError("a section is not inside the file")
    if type_size % 4:
        raise BTFError("truncated type")
    words = array("I", types)
    if (order == "<") != (sys.byteorder == "little"):
        words.byteswap()
    return words, strings


def _offsets(strings: bytes, names: Collection[str]) -> dict[int, str]:
    """Find all offsets of some names; a name may be the end of a longer string."""
    offsets = {}
    for name in filter(None, names):
        at = -1
        while (at := strings.find(name.encode() + b"\0", at + 1)) >= 0:
            offsets[at] = name
    return offsets


def _value(words: array[int], signed: int) -> int:
    value = words[0] | (words[1] << 32 if len(words) > 1 else 0)
    bits = 32 * len(words)
    return value - (1 << bits) if signed and value >> (bits - 1) else value
