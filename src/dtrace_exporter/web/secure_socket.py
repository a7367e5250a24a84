"""TLS over a socket that is read in small pieces.

OpenSSL reads from a socket until it has data for the application. A client could send key updates
without end (RFC 8446, 4.6.3) and block the event loop. So OpenSSL gets its input in pieces. Many
clients could do this at once, or shake hands, so only a few of them are read in a turn. What a
client may send until hands are shaken is limited, because its certificates may be costly.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from socket import socket
from typing import Any

from dtrace_exporter.turns import Doorkeeper

# RFC 8446, 5.1: the size of a record's header, which ends in the record's length.
_HEAD_BYTES = 5
_READ_BYTES = 2 << 10
_WRITE_BYTES = 16 << 10
_MOST_UNSENT = 64 << 10

MAX_HANDSHAKE_BYTES = 16 << 10
"""How much a client may send before its handshake is over, most of which are certificates."""


class SecureSocket:
    """The part of ssl.SSLSocket that Tornado uses; it reads one piece in a turn of the event loop.

    Args:
        connection: a non-blocking socket; it is closed with this one.
        context: the TLS context of a server.
        door: lets it read in some turns.
    """

    def __init__(self, connection: socket, context: ssl.SSLContext, door: Doorkeeper) -> None:
        self.connection = connection
        self._door = door
        self.waits = False
        """Whether it may not read before its next turn."""
        self._admitted = False
        self.family = connection.family
        self.fileno = connection.fileno
        self.getpeername = connection.getpeername
        self.getsockopt = connection.getsockopt
        self.setsockopt = connection.setsockopt
        self.setblocking = connection.setblocking
        self.close = connection.close
        self._received = 0
        self._head, self._missing = b"", _HEAD_BYTES
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.getpeercert = self._tls.getpeercert
        self._unsent = b""
        self._written = 0

    async def shake_hands(self, run: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        """Shake hands.

        Args:
            run: calls OpenSSL, which may take long.

        Raises:
            OSError: it has failed.
        """
        while True:
            try:
                await run(self._tls.do_handshake)
            except ssl.SSLWantReadError:
                await self._send_all()
                await self._receive_more()
            except ssl.SSLError:
                # The alert that tells the client why.
                with suppress(OSError):
                    self._send()
                raise
            else:
                await self._send_all()
                self._received = 0
                return

    def do_handshake(self) -> None:
        """Do nothing, because the handshake is over when Tornado calls this."""

    def recv_into(self, buffer: bytearray | memoryview, size: int) -> int:
        """Read up to ``size`` bytes into a buffer; return how many, 0 at the end.

        Raises:
            ssl.SSLError: there are none yet, or the input is not TLS.
            ConnectionResetError: the client does not read the answers of TLS.
        """
        while True:
            try:
                read: Any = self._tls.read(size, buffer)
                return int(read)
            except ssl.SSLWantReadError:
                with suppress(ssl.SSLWantWriteError):
                    self._send()
                if len(self._unsent) > _MOST_UNSENT:
                    raise ConnectionResetError(errno.ECONNRESET, "it does not read") from None
                if not self._receive():
                    raise
            except ssl.SSLEOFError:
                return 0

    def send(self, data: memoryview) -> int:
        """Send some of the bytes; return how many.

        Raises:
            ssl.SSLWantWriteError: it has to wait; call it again with the same bytes.
        """
        if not self._written:
            self._written = self._tls.write(data[:_WRITE_BYTES])
        self._send()
        written, self._written = self._written, 0
        return written

    def _receive(self) -> bool:
        """Read from the socket; return whether there is new input or the end.

        It reads the next record only after the one before it has been requested. Otherwise nobody
        would notice that it is there.
        """
        if not self._admitted:
            if not self.waits:
                self.waits = True
                self._door.call(self._admit)
            # The event loop calls again as long as there is input.
            return False
        if self._received >= _READ_BYTES:
            return False
        try:
            received = self._receive_piece()
        except BlockingIOError:
            return False
        if not received:
            self._incoming.write_eof()
        return True

    def _receive_piece(self) -> bytes:
        """Read a piece of a record and return it, empty at the end."""
        received = self.connection.recv(min(self._missing, _READ_BYTES))
        self._incoming.write(received)
        self._missing -= len(received)
        if len(self._head) < _HEAD_BYTES:
            self._head += received
            if not self._missing:
                self._missing = int.from_bytes(self._head[3:])
        if not self._missing:
            self._head, self._missing = b"", _HEAD_BYTES
        self._received += len(received)
        return received

    async def _receive_more(self) -> None:
        """Read a piece of the handshake, when there is one and it is its turn."""
        loop = asyncio.get_running_loop()
        await self._ready(loop.add_reader, loop.remove_reader)
        await self._door.wait()
        with suppress(BlockingIOError):
            if not self._receive_piece():
                raise ConnectionResetError(errno.ECONNRESET, "it has gone")
            if self._received > MAX_HANDSHAKE_BYTES:
                raise ssl.SSLError(f"it has more than {MAX_HANDSHAKE_BYTES} bytes")

    async def _send_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                self._send()
            except ssl.SSLWantWriteError:
                await self._ready(loop.add_writer, loop.remove_writer)
            else:
                return

    async def _ready(self, add: Callable[..., object], remove: Callable[..., object]) -> None:
        """Wait until the socket can be read or written."""
        ready = asyncio.Event()
        add(self.connection, ready.set)
        try:
            await ready.wait()
        finally:
            remove(self.connection)

    def _admit(self) -> bool:
        self.waits, self._admitted = False, self.fileno() >= 0
        if self._admitted:
            asyncio.get_running_loop().call_soon(self._rest)
        return self._admitted

    def _rest(self) -> None:
        self._received = 0
        self._admitted = False

    def _send(self) -> None:
        """Send all output.

        Raises:
            ssl.SSLWantWriteError: the socket cannot take all of it now.
        """
        self._unsent += self._outgoing.read()
        try:
            while self._unsent:
                self._unsent = self._unsent[self.connection.send(self._unsent) :]
        except BlockingIOError:
            raise ssl.SSLWantWriteError(ssl.SSL_ERROR_WANT_WRITE, "not all is sent") from None
