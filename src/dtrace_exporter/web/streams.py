"""Connections that tell a client why they are closed, and give it time to read that.

If a server closes a connection while the client still sends, the client gets a reset and may lose
the answer. So the server reads and discards for a while what the client sends: RFC 9112, 9.6.
"""

from __future__ import annotations

from asyncio import Future
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from socket import socket
from typing import Any

from tornado.ioloop import IOLoop
from tornado.iostream import IOStream, SSLIOStream, StreamClosedError, UnsatisfiableReadError

from dtrace_exporter.turns import Doorkeeper

# Tornado's answer to everything that is not HTTP.
_TORNADO_SAYS = b"HTTP/1.1 400 Bad Request\r\n\r\n"

# Many times what scrapers send. To parse as many as fit into a head takes 6 ms.
_MOST_LINES = 100


def refusal(status: HTTPStatus, why: str = "") -> bytes:
    """Return the answer to a client whose request is not even parsed.

    Args:
        status: the status of the answer.
        why: the text of the answer, by default the status.
    """
    body = f"{why or f'{status:d} {status.phrase}'}\n"
    return (
        f"HTTP/1.1 {status:d} {status.phrase}\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        "Connection: close\r\n"
        f"\r\n{body}"
    ).encode()


class Stream(IOStream):
    """A connection without TLS.

    Args:
        connection: its socket.
        linger: called after a client has been refused, with the stream and its open socket.
        max_head: the longest request line with headers, in bytes.
        door: lets it go on with a request in some turns of the event loop.
    """

    def __init__(
        self,
        connection: socket,
        linger: Callable[[Stream, socket], None],
        max_head: int,
        door: Doorkeeper,
        **sizes: int,
    ) -> None:
        self.in_head = True
        """Whether the head of a request is being read, and not its body."""
        self.refused = False
        self._linger = linger
        self._max_head = max_head
        self._door = door
        super().__init__(connection, **sizes)

    def refuse(self, status: HTTPStatus) -> None:
        """Send an error, and read no more requests."""
        if not self.refused and not self.closed():
            self.write(refusal(status))
            self.refused = True
            self.close()

    async def _head(self, reading: Awaitable[bytes]) -> bytes:
        head = await reading
        await self._door.wait()
        if head.count(b"\n") > _MOST_LINES:
            self.refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        if self.closed():
            raise StreamClosedError
        return head

    def read_until_regex(self, regex: bytes, max_bytes: int | None = None) -> Any:
        """Read the head of a request, which Tornado reads by this method, when it is its turn."""
        return self._head(super().read_until_regex(regex, max_bytes))

    def write(self, data: bytes | memoryview) -> Future[None]:
        """Write data, but replace Tornado's error by one with a text."""
        if data == _TORNADO_SAYS:
            self.refused = True
            data = refusal(HTTPStatus.BAD_REQUEST)
        return super().write(data)

    def close(self, exc_info: Any = False) -> None:
        """Close the connection; if the head of the request is too long, send an error first."""
        if isinstance(exc_info, UnsatisfiableReadError):
            self.refuse(self._too_long())
        super().close(exc_info)

    def close_fd(self) -> None:
        """Close the socket, which Tornado calls at last; that of a refused client lingers."""
        if not self.refused:
            super().close_fd()
            return
        connection, self.socket = self._below, None  # type: ignore[assignment]
        self._linger(self, connection)

    @property
    def _below(self) -> socket:
        """The socket of the TCP connection."""
        return self.socket

    def _too_long(self) -> HTTPStatus:
        if not self.in_head:
            return HTTPStatus.BAD_REQUEST
        head = bytes(self._read_buffer[: self._max_head])
        line, end, _ = head.lstrip(b"\r\n").partition(b"\n")
        if end:
            return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        return HTTPStatus.REQUEST_URI_TOO_LONG if line else HTTPStatus.BAD_REQUEST


class SecureStream(Stream, SSLIOStream):
    """A connection with TLS, whose socket is a SecureSocket."""

    def _handle_events(self, fd: Any, events: int) -> None:
        secure: Any = self.socket
        # Hundreds of connections may wait, and Tornado would ask each of them in each turn.
        if events != IOLoop.READ or secure is None or not secure.waits:
            super()._handle_events(fd, events)

    @property
    def _below(self) -> socket:
        secure: Any = self.socket
        below: socket = secure.connection
        return below
