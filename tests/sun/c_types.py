"""C types in D: those in the type information (BTF) of a kernel or a library, and D's own.

The format is that of Documentation/bpf/btf.rst in Linux.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

POINTER_SIZE = 8
_INTEGERS = {
    "char": (1, True),
    "signed char": (1, True),
    "unsigned char": (1, False),
    "short": (2, True),
    "unsigned short": (2, False),
    "int": (4, True),
    "unsigned int": (4, False),
    "long": (8, True),
    "unsigned long": (8, False),
    "long long": (8, True),
    "unsigned long long": (8, False),
}
_TYPEDEFS = {
    "int8_t": "signed char",
    "uint8_t": "unsigned char",
    "int16_t": "short",
    "uint16_t": "unsigned short",
    "int32_t": "int",
    "uint32_t": "unsigned int",
    "int64_t": "long",
    "uint64_t": "unsigned long",
    "intptr_t": "long",
    "uintptr_t": "unsigned long",
    "size_t": "unsigned long",
    "ssize_t": "long",
    "ptrdiff_t": "long",
    "uchar_t": "unsigned char",
    "ushort_t": "unsigned short",
    "uint_t": "unsigned int",
    "ulong_t": "unsigned long",
    "pid_t": "int",
    "zoneid_t": "int",
    "processorid_t": "int",
    "ipaddr_t": "unsigned int",
}


class TypeInformationError(ValueError):
    """Type information that is malformed or of an unknown kind."""


@dataclass(eq=False, slots=True)
class Member:
    """A member of a struct or union; ``bits`` is not 0 for a bit-field."""

    name: str
    type: Type
    offset: int
    bits: int = 0


@dataclass(eq=False, slots=True)
class Type:
    """A type.

    Args:
        kind: int, enum, pointer, array, struct, union, forward, typedef, function, void or string.
        name: the tag of a struct, or the name of a typedef or integer.
        size: in bytes; 0 if there is none.
        signed: whether an int is signed.
        to: what a pointer points to, an array consists of, or a typedef stands for.
        count: the number of elements of an array.
        members: the members of a struct or union.
        values: the values of an enum, by name.
    """

    kind: str
    name: str = ""
    size: int = 0
    signed: bool = False
    to: Type | None = None
    count: int = 0
    members: list[Member] = field(default_factory=list)
    values: dict[str, int] = field(default_factory=dict)

    @property
    def target(self) -> Type:
        """The type that this one points to, consists of or stands for."""
        assert self.to is not None
        return self.to

    @property
    def base(self) -> Type:
        """The type behind typedefs."""
        base = self
        while base.kind == "typedef":
            base = base.target
        return base

    @property
    def by_reference(self) -> bool:
        """Whether a value of this type is passed as its address."""
        return self.base.kind in {"struct", "union", "array", "function", "forward", "string"}

    def __str__(self) -> str:
        if self.kind == "pointer":
            to = str(self.target)
            return f"{to}*" if to.endswith("*") else f"{to} *"
        if self.kind == "array":
            return f"{self.target} [{self.count}]"
        if self.kind in {"struct", "union", "enum"}:
            return f"{self.kind} {self.name}"
        if self.kind == "typedef" and not self.name:
            return str(self.target)
        return f"struct {self.name}" if self.kind == "forward" else self.name

    def byte_size(self) -> int:
        """Return the size of the type, also of arrays and typedefs."""
        base = self.base
        return base.target.byte_size() * base.count if base.kind == "array" else base.size

    def member(self, name: str) -> Member | None:
        """Look up a member of a struct or union, also in anonymous ones within it."""
        for member in self.base.members:
            if member.name == name:
                return member
            if not member.name and (inner := member.type.member(name)):
                return Member(name, inner.type, member.offset + inner.offset, inner.bits)
        return None


def pointer(to: Type) -> Type:
    """Return the type of a pointer to a type."""
    return Type("pointer", size=POINTER_SIZE, to=to)


def compatible(one: Type, other: Type) -> bool:
    """Tell whether two types are the same apart from their names."""
    one, other = one.base, other.base
    if one is other:
        return True
    if one.kind == "pointer" and other.kind == "pointer":
        return compatible(one.target, other.target)
    if one.kind == "array" and other.kind == "array":
        return one.count == other.count and compatible(one.target, other.target)
    if one.kind == "int" and other.kind == "int":
        return (one.size, one.signed) == (other.size, other.signed)
    tagged = {"struct", "union", "enum", "forward"}
    if one.kind in tagged and other.kind in tagged:
        return bool(one.name) and one.name == other.name
    return one.kind == other.kind


class Types:
    """All types that a program can name.

    Args:
        btf: a .BTF section; without it there are only D's own types.
    """

    def __init__(self, btf: bytes = b"") -> None:
        self.void = Type("void", "void")
        self.string = Type("string", "string")
        self._named: dict[str, Type] = {"void": self.void, "string": self.string}
        self.variables: dict[str, Type] = {}
        self._pointed: set[int] = set()
        for name, (size, signed) in _INTEGERS.items():
            self._named[name] = Type("int", name, size, signed)
        for name, of in _TYPEDEFS.items():
            self._named[name] = Type("typedef", name, to=self._named[of])
        if btf:
            self._pointed = _Reader(btf, self._named, self.variables, self.void).pointed
        byte = Type("array", to=self._named["uint8_t"], count=16)
        own = {
            "kthread_t": Type("struct", "_kthread", 1),
            "in6_addr_t": Type("struct", "in6_addr", 16, members=[Member("_S6_u8", byte, 0)]),
        }
        for name, of_own in own.items():
            self._named.setdefault(name, Type("typedef", name, to=of_own))

    def find(self, name: str) -> Type | None:
        """Look up a type by a name such as ``tcp_t``, ``struct tcp_s`` or ``unsigned int``."""
        found = self._named.get(name)
        if found is None or found.kind != "forward":
            return found
        return next(
            (t for kind in ("struct", "union") if (t := self._named.get(f"{kind} {found.name}"))),
            found,
        )

    def pointer_to(self, type_: Type) -> Type:
        """Return a pointer, to what a typedef stands for if only that has a pointer type."""
        base = type_.base
        if id(type_) not in self._pointed and id(base) in self._pointed:
            return pointer(base)
        return pointer(type_)

    def get(self, name: str) -> Type:
        """Return a type that is known to exist, such as D's own."""
        return self._named[name]

    def whole(self, type_: Type) -> Type:
        """Return what a forward declaration declares if that is known, or else the type itself."""
        return (
            (self.find(f"struct {type_.base.name}") or type_)
            if type_.base.kind == "forward"
            else type_
        )


class _Reader:
    """Reads the types of a .BTF section into the two given tables."""

    def __init__(
        self, btf: bytes, named: dict[str, Type], variables: dict[str, Type], void: Type
    ) -> None:
        if btf[:2] not in (b"\x9f\xeb", b"\xeb\x9f") or len(btf) < 24:
            raise TypeInformationError("no BTF header")
        order = "<" if btf[:2] == b"\x9f\xeb" else ">"
        header, type_at, type_size, string_at, string_size = struct.unpack_from(
            order + "4xIIIII", btf
        )
        self._words = struct.unpack_from(f"{order}{type_size // 4}I", btf, header + type_at)
        self._strings = btf[header + string_at : header + string_at + string_size]
        records = list(self._records())
        self._types = [void, *(Type("void") for _ in records)]
        for type_, record in zip(self._types[1:], records, strict=True):
            self._fill(type_, *record)
        self.pointed = {id(t.target) for t in self._types if t.kind == "pointer"}
        for type_, record in zip(self._types[1:], records, strict=True):
            kind, name = record[0], self._name(record[1])
            if kind == 14:
                variables[name] = type_.target
            elif name and kind in (4, 5, 6, 19, 7):
                tag = {4: "struct", 5: "union", 7: "struct"}.get(kind, "enum")
                if kind != 7 or f"{tag} {name}" not in named:
                    named[f"{tag} {name}"] = type_
            elif name and kind in (1, 8) and name not in _INTEGERS:
                named[name] = type_

    def _records(self) -> Iterator[tuple[int, int, int, bool, int, tuple[int, ...]]]:
        """Yield each type's kind, name, size or type, flag, number of members and other words."""
        once = {1: 1, 3: 3, 14: 1, 17: 1}
        each = {4: 3, 5: 3, 6: 2, 13: 2, 15: 3, 19: 3}
        at = 0
        while at < len(self._words):
            name, info, size = self._words[at : at + 3]
            kind, count = info >> 24 & 0x1F, info & 0xFFFF
            if not 1 <= kind <= 19:
                raise TypeInformationError(f"unknown kind of type {kind}")
            end = at + 3 + once.get(kind, 0) + each.get(kind, 0) * count
            yield kind, name, size, bool(info >> 31), count, self._words[at + 3 : end]
            at = end

    def _name(self, offset: int) -> str:
        return self._strings[offset : self._strings.index(b"\0", offset)].decode()

    def _fill(
        self,
        type_: Type,
        kind: int,
        name: int,
        size: int,
        flag: bool,
        _: int,
        more: tuple[int, ...],
    ) -> None:
        type_.name = self._name(name)
        if kind == 1:
            type_.kind, type_.size, type_.signed = "int", size, bool(more[0] >> 24 & 1)
        elif kind == 2:
            type_.kind, type_.size, type_.to = "pointer", POINTER_SIZE, self._types[size]
        elif kind == 3:
            type_.kind, type_.to, type_.count = "array", self._types[more[0]], more[2]
        elif kind in (4, 5):
            type_.kind, type_.size = "struct" if kind == 4 else "union", size
            for at in range(0, len(more), 3):
                member, of, offset = more[at : at + 3]
                bits = offset >> 24 if flag else 0
                offset = (offset & 0xFFFFFF if flag else offset) // 8
                type_.members.append(Member(self._name(member), self._types[of], offset, bits))
        elif kind in (6, 19):
            type_.kind, type_.size, step = "enum", size, 2 if kind == 6 else 3
            for at in range(0, len(more), step):
                value = more[at + 1] | (more[at + 2] << 32 if step == 3 else 0)
                bits = 32 * (step - 1)
                value -= (value >> (bits - 1) & 1) << bits
                type_.values[self._name(more[at])] = value
        elif kind == 7:
            type_.kind = "forward"
        elif kind in (8, 9, 10, 11, 14, 18):
            # const and volatile have no name, and no meaning for D.
            type_.kind, type_.to = "typedef", self._types[size]
        elif kind in (12, 13):
            type_.kind = "function"


def section(elf: bytes, name: str) -> bytes:
    """Return a section of a little-endian 64-bit ELF file, or nothing if it has none.

    Args:
        elf: the file.
        name: the name of the section, such as ``.BTF``.
    """
    table, entry, count, names = (
        *struct.unpack_from("<Q", elf, 40),
        *struct.unpack_from("<HHH", elf, 58),
    )
    headers = [struct.unpack_from("<IIQQQQ", elf, table + entry * i) for i in range(count)]
    strings = headers[names][4] if headers else 0
    for at, _, _, _, offset, size in headers:
        start = strings + at
        if elf[start : elf.index(b"\0", start)].decode() == name:
            return elf[offset : offset + size]
    return b""
