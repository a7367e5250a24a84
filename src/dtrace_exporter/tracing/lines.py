"""Splits a stream of bytes, which may be hostile, into lines."""

from __future__ import annotations

MAX_LINE = 16 << 10
"""The length of the longest line, in bytes. Honest rows and messages are much shorter."""


class LineSplitter:
    """Splits chunks into lines, and truncates lines that are too long."""

    def __init__(self) -> None:
        self._rest = b""
        self._too_long = False

    def feed(self, chunk: bytes) -> list[str]:
        """Return the lines that a chunk completes; bytes that are not UTF-8 become U+FFFD.

        Of a line longer than MAX_LINE only the beginning is returned.
        """
        *whole, rest = (self._rest + chunk).split(b"\n")
        if whole and self._too_long:
            del whole[0]
            self._too_long = False
        if len(rest) > MAX_LINE:
            if not self._too_long:
                whole.append(rest)
            self._too_long, rest = True, b""
        self._rest = rest
        return [line[:MAX_LINE].decode("utf-8", "replace") for line in whole if line.strip()]

    def end(self) -> list[str]:
        """Return the last line if the stream has stopped in the middle of it."""
        return self.feed(b"\n")
