"""How printf() and printa() parse their formats, and what they print."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from sun.c_types import Type
from sun.expressions import is_integer, is_pointer, is_signed, is_string
from sun.syntax import ProgramError

Value = int | bytes
_CONVERSION = re.compile(r"%([-+ 0#@]*)(\d*)(?:\.(\d+))?(@?)((?:h|ll|l)?)(.)", re.DOTALL)
_ESCAPES = {0: "0", 7: "a", 8: "b", 9: "t", 10: "n", 11: "v", 12: "f", 13: "r", 34: '"', 92: "\\"}
_INTEGERS = "char, short, int, long, or long long"
_PROTOTYPES = {
    **dict.fromkeys("diouxX", _INTEGERS),
    "c": "char, short, or int",
    "p": "pointer or integer",
    **dict.fromkeys("sS", "char [] or string (or use stringof)"),
    "Y": "int64_t",
}


@dataclass(frozen=True, slots=True)
class _Conversion:
    letter: str
    flags: str
    width: str
    is_value: bool
    size: int = 0
    signed: bool = False
    precision: str | None = None


class Format:
    """A format string that fits the types of its arguments.

    Args:
        text: the format.
        function: printf or printa, for messages.
        types: the types of the arguments or keys.
        value: the type of an aggregation's value, which ``%@d`` prints; None for printf.
        line: the line of the program.
        string_size: the size of strings, to which ``%S`` pads.
        small_unsigned: whether ``%d`` prints types smaller than int without a sign.

    Raises:
        ProgramError: the format does not fit.
    """

    def __init__(
        self,
        text: str,
        function: str,
        types: Sequence[Type],
        value: Type | None,
        line: int,
        small_unsigned: bool = False,
        string_size: int = 0,
    ) -> None:
        if not text:
            raise ProgramError(f"{function}( ) format string is empty", line)
        self.text = text
        self._pieces: list[str | _Conversion] = []
        at = number = 0
        rest = list(types)
        for found in _CONVERSION.finditer(text):
            self._pieces.append(text[at : found.start()])
            at = found.end()
            flags, width, precision, aggregate, _, letter = found.groups()
            aggregate = aggregate or "@" in flags
            flags = flags.replace("@", "")
            number += 1
            if letter == "%":
                self._pieces.append("%")
                continue
            if letter not in _PROTOTYPES:
                message = f"format conversion #{number} is undefined: {found[0]}"
                if letter == "h":
                    message += text[at : at + 1]
                raise ProgramError(message, line)
            if aggregate and value is None:
                message = (
                    f"%@ conversion requires an aggregation and is not for use with {function}( )"
                )
                raise ProgramError(message, line)
            if not aggregate and not rest:
                message = (
                    f"{function}( ) prototype mismatch: conversion #{number} (%{letter}) is missing"
                )
                raise ProgramError(f"{message} a corresponding value argument", line)
            type_ = value if aggregate and value else rest.pop(0)
            if not _fits(letter, type_):
                what = (
                    "aggregating action" if aggregate else f"argument #{len(types) - len(rest) + 1}"
                )
                message = (
                    f"{function}( ) {what} is incompatible with conversion #{number} prototype:"
                )
                message += f"\n\tconversion: %{letter}\n\t prototype: {_PROTOTYPES[letter]}"
                raise ProgramError(f"{message}\n\t  argument: {type_}", line)
            self._pieces.append(
                _Conversion(
                    *(letter, flags, width, bool(aggregate)),
                    string_size if is_string(type_) else type_.byte_size(),
                    signed=is_signed(type_) and not (small_unsigned and type_.byte_size() < 4),
                    precision=precision,
                )
            )
        self._pieces.append(text[at:])
        if value is None and rest:
            message = f"{function}( ) prototype mismatch: only {len(types) - len(rest)} arguments"
            raise ProgramError(f"{message} required by this format string", line)

    def fill(self, values: Sequence[Value], results: Sequence[int] = ()) -> str:
        """Return the text that the format prints.

        Args:
            values: the arguments or keys, as they were recorded.
            results: the values of the aggregations.
        """
        rest = iter(values)
        # The last result is repeated if there are more conversions.
        of = chain(results, repeat(results[-1] if results else 0))
        return "".join(
            piece if isinstance(piece, str) else _text(piece, next(of if piece.is_value else rest))
            for piece in self._pieces
        )


def _fits(letter: str, type_: Type) -> bool:
    if letter in "sS":
        return is_string(type_) or (
            type_.base.kind == "array" and type_.base.target.base.name == "char"
        )
    if letter == "Y":
        return is_integer(type_) and type_.byte_size() == 8
    if letter == "c":
        return is_integer(type_) and type_.byte_size() <= 4
    return is_integer(type_) or (letter == "p" and is_pointer(type_))


def _text(piece: _Conversion, value: Value) -> str:
    flags, width, letter = piece.flags, piece.width, piece.letter
    if isinstance(value, bytes):
        precision = "" if piece.precision is None else f".{piece.precision}"
        is_escaped = letter == "S"
        text = escaped(value, piece.size) if is_escaped else value.decode("utf-8", "replace")
        return f"%{flags}{width}{precision}s" % text
    if letter == "Y":
        # UTC, so that a test is the same everywhere.
        return time.strftime("%Y %b %e %H:%M:%S", time.gmtime(value // 1_000_000_000))
    if letter == "c":
        return f"%{flags}{width}s" % chr(value & 0xFF)
    if letter == "i" or (letter == "d" and piece.signed):
        bits = 8 * piece.size or 64
        value &= (1 << bits) - 1
        value -= (value >> (bits - 1) & 1) << bits
    letter = {"i": "d", "u": "d", "p": "x"}.get(letter, letter)
    if letter == "o" and "#" in flags:
        return f"%{flags.replace('#', '')}{width}s" % f"0{value:o}"
    return f"%{flags}{width}{letter}" % value


def escaped(value: bytes, size: int) -> str:
    """Write a whole record as strchr2esc() does, including the zeros after the string's end."""
    return "".join(
        f"\\{_ESCAPES[byte]}"
        if byte in _ESCAPES
        else chr(byte)
        if 32 <= byte < 127
        else f"\\{byte:03o}"
        for byte in value.ljust(size, b"\0")
    )
