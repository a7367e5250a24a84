"""Lines out of a stream of bytes that may be hostile."""

from __future__ import annotations

MAX_LINE = 16 << 10
"""Longest line in bytes; no row or message comes near it."""


class LineSplitter:
    """Cuts chunks into lines, and cuts short a line that does not end."""

    def __init__(self) -> None:
        self._rest = b""
        self._too_long = False

    def feed(self, chunk: bytes) -> list[str]:
        """Return the lines that a chunk completes; bytes that are no text become U+FFFD.

        A line longer than MAX_LINE appears once, as its beginning.
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
        """Return the line without an end that the stream stopped in, if any."""
        return self.feed(b"\n")
