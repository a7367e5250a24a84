"""The web server's sockets and connections, with limits on what clients can cost."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import re
import resource
import socket
import ssl
import stat
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from ipaddress import IPv6Address
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPMessageDelegate,
    HTTPServerRequest,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.netutil import bind_sockets
from tornado.web import Application

from dtrace_exporter.log import fields
from dtrace_exporter.turns import Doorkeeper
from dtrace_exporter.web import tls
from dtrace_exporter.web.configuration import WebConfig, WebConfigFile
from dtrace_exporter.web.handshakes import Handshakes
from dtrace_exporter.web.secure_socket import SecureSocket
from dtrace_exporter.web.streams import SecureStream, Stream, refusal

_log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
"""Many times what scrapers need. So many idle TLS connections take 30 MB of memory."""

MAX_HEADER_BYTES = 16 << 10
MAX_BODY_BYTES = 4 << 10
# Above the usual scrape intervals, so that Prometheus finds its connection open.
_IDLE_SECONDS = 75.0
_BODY_SECONDS = 10.0
_HANDSHAKE_SECONDS = 10.0
_NO_ROOM_SECONDS = 1.0
# How long a refused client has to read the answer, and how much it may send meanwhile.
_LINGER_SECONDS = 1.0
_LINGER_BYTES = 1 << 20

# How many handshakes or requests go on in a turn. A handshake takes 2 ms.
_ADMITTED = 4
# How many connections are accepted in a turn. If there were more, they would wait here, where each
# takes memory, instead of in the kernel.
_ACCEPTS = _ADMITTED
# A SYN that finds the queue full is sent again only after a second. Linux limits it to somaxconn.
_BACKLOG = 4096
_BUFFER_BYTES = 64 << 10
_CHUNK_BYTES = 8 << 10
_DISCARD_BYTES = 64 << 10
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_ADDRESS = re.compile(r"(?:\[([^\[\]\s]+)\]|([^\[\]:/\s]*)):([0-9]{1,5})")
_FIRST_PASSED = 3

# How many characters of a certificate's names are logged; it may have thousands of names.
_MOST_SHOWN = 300

# RFC 8446, 5.1: the first byte of a handshake.
_TLS = 0x16
_DIGITS = re.compile(r"[0-9]+")

_Connection = socket.socket | SecureSocket | Stream


@dataclass(eq=False, slots=True)
class _Client:
    """The client of a connection: its address, whether it has been let in, and for how long."""

    host: str
    let_in: bool = False
    ending: bool = False
    expires: float = math.inf


def let_in(request: HTTPServerRequest) -> None:
    """Record that a request's client has been let in, so that others are closed before it."""
    connection: Any = request.connection
    connection.context.client.let_in = True


class Server(HTTPServer):
    """An HTTP server that, at its limit, closes an idle connection for a new one.

    Args:
        app: the application that it serves.
        web_config: the web configuration, which has TLS.
    """

    def initialize(self, app: Application, web_config: WebConfigFile) -> None:  # type: ignore[override]
        """Initialize the server; Tornado calls this method instead of __init__."""
        super().initialize(
            app,
            max_header_size=MAX_HEADER_BYTES,
            # _RequestGate has the limit: it answers 413, where Tornado would answer 400.
            max_body_size=sys.maxsize,
            chunk_size=_CHUNK_BYTES,
            idle_connection_timeout=_IDLE_SECONDS,
            body_timeout=_BODY_SECONDS,
        )
        self.sockets: list[socket.socket] = []
        self._web_config = web_config
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # Half of the descriptors is for the sessions and all else.
        self._limit = MAX_CONNECTIONS
        if files != resource.RLIM_INFINITY:
            self._limit = max(1, min(self._limit, files // 2))
        # In the order in which they came, sent their first byte, or ended their handshake.
        self._open: dict[_Connection, _Client] = {}
        self._hosts = Counter[str]()
        self._busy: set[_Connection] = set()
        self._silent: dict[socket.socket, asyncio.TimerHandle] = {}
        self._shaking: dict[SecureSocket, asyncio.Task[None]] = {}
        self._handshakes = Handshakes()
        self._door = Doorkeeper(_ADMITTED)

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None:
        """Accept connections from listening sockets, in the running event loop."""
        for sock in sockets:
            self.sockets.append(sock)
            self._watch(sock)
            _log.info(
                "listening",
                extra=fields(address=_shown(sock), tls=bool(self._web_config.config.tls)),
            )

    def stop(self) -> None:
        """Close the listening sockets."""
        for sock in self.sockets:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        self.sockets.clear()

    async def close_all_connections(self) -> None:
        """Close all connections."""
        for connection in list(self._open):
            self._drop(connection)
        await super().close_all_connections()

    def end_connections(self) -> None:
        """Close all connections, those that wait for an answer after they have it.

        Clients may connect again.
        """
        for connection, client in list(self._open.items()):
            client.ending = True
            if connection not in self._busy:
                self._drop(connection)

    def start_request(self, server_conn: Any, request_conn: HTTPConnection) -> HTTPMessageDelegate:
        """Begin to read a request; Tornado calls this for each one."""
        stream = server_conn.stream
        stream.in_head = True
        self._busy.discard(stream)
        server_conn.context.client = client = self._open.get(stream) or _Client("")
        if client.ending:
            self._drop(stream)
        begin = partial(self._begin, stream)
        return _RequestGate(super().start_request(server_conn, request_conn), stream, begin)

    def on_close(self, server_conn: Any) -> None:
        """Forget a connection that has been closed."""
        super().on_close(server_conn)
        self._drop(server_conn.stream)

    def _begin(self, stream: Stream) -> bool:
        client = self._open.get(stream)
        if client is None or client.expires <= _now():
            self._drop(stream)
            return False
        self._busy.add(stream)
        return True

    def _drop(self, connection: _Connection) -> None:
        self._forget(connection)
        if isinstance(connection, SecureSocket):
            self._shaking[connection].cancel()
            return
        if isinstance(connection, socket.socket):
            self._silent.pop(connection).cancel()
            asyncio.get_running_loop().remove_reader(connection)
        connection.close()

    def _forget(self, connection: _Connection) -> None:
        self._busy.discard(connection)
        if (client := self._open.pop(connection, None)) is not None:
            if client.let_in and self._web_config.config.users:
                # It had a password, and perhaps no certificate.
                self._handshakes.remember(client.host)
            self._hosts[client.host] -= 1
            if not self._hosts[client.host]:
                del self._hosts[client.host]

    def _watch(self, sock: socket.socket) -> None:
        # The server may have been stopped meanwhile.
        if sock in self.sockets:
            asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(_ACCEPTS):
            if self._is_crowded:
                return
            try:
                connection, address = sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._wait_for_room(sock, error)
                    return
                # The client has gone already.
                continue
            self._take(connection, address)

    @property
    def _is_crowded(self) -> bool:
        """Whether a new connection would cost one that still waits for its turn its place.

        That is so if each is of another host. Otherwise a host that has several loses one.
        """
        is_full = len(self._open) >= self._limit
        return is_full and bool(self._door) and max(self._hosts.values()) == 1

    def _wait_for_room(self, sock: socket.socket, error: OSError) -> None:
        _log.warning("cannot accept a connection", extra=fields(why=error.strerror))
        if not self._evict():
            loop = asyncio.get_running_loop()
            loop.remove_reader(sock)
            loop.call_later(_NO_ROOM_SECONDS, self._watch, sock)

    def _evict(self) -> bool:
        """Close one connection, of the hosts that have the most connections.

        Those that have not been let in go first, beginning with the oldest, so that a new one has
        time to authenticate. Of these, those of known hosts go last: a handshake in threads takes
        longer than a flood of new connections needs to close all others. Among those that have been
        let in, the youngest goes first, because scrapers keep their connections. Idle connections
        go before those that wait for an answer.
        If more than half of all have been let in, one of these goes. Otherwise each new connection
        would be closed for the next one.
        """
        if not self._open:
            return False
        most = max(self._hosts.values())
        crowd = [each for each, client in self._open.items() if self._hosts[client.host] == most]
        known = [each for each in crowd if self._open[each].let_in]
        strangers = [each for each in crowd if not self._open[each].let_in]
        strangers.sort(key=lambda each: self._handshakes.knows(self._open[each].host))
        is_full = 2 * sum(client.let_in for client in self._open.values()) > self._limit
        candidates = known[::-1] if is_full and known else strangers or known[::-1]
        idle = (each for each in candidates if each not in self._busy)
        self._drop(next(idle, candidates[0]))
        return True

    def _take(self, connection: socket.socket, address: Any) -> None:
        while len(self._open) >= self._limit:
            self._evict()
        connection.setblocking(False)
        # A connection without any data costs hardly any memory or time, and there may be many.
        loop = asyncio.get_running_loop()
        host = address[0] if isinstance(address, tuple) else ""
        self._open[connection] = _Client(host)
        self._hosts[host] += 1
        self._silent[connection] = loop.call_later(_IDLE_SECONDS, self._drop, connection)
        loop.add_reader(connection, self._first_byte, connection, address)

    def _first_byte(self, connection: socket.socket, address: Any) -> None:
        try:
            first = connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            first = b""
        if not first:
            self._drop(connection)
            return
        self._silent.pop(connection).cancel()
        asyncio.get_running_loop().remove_reader(connection)
        config = self._web_config.config
        if not (_is_tls(first) if config.tls else _is_text(first)):
            self._refuse_protocol(connection, first)
            return
        sizes = {"max_buffer_size": _BUFFER_BYTES, "read_chunk_size": _CHUNK_BYTES}
        if config.tls is None:
            stream = Stream(connection, self._linger, MAX_HEADER_BYTES, self._door, **sizes)
            self._open[stream] = self._open.pop(connection)
            self.handle_stream(stream, address)
            return
        below = SecureSocket(connection, config.tls, self._door)
        self._open[below] = self._open.pop(connection)
        self._shaking[below] = task = asyncio.get_running_loop().create_task(
            self._shake_hands(below, address, config, **sizes)
        )
        task.add_done_callback(partial(self._shaken, below))

    def _refuse_protocol(self, connection: socket.socket, first: bytes) -> None:
        """Answer like Go's net/http; clients of either protocol understand this as an error."""
        why = ""
        who = fields(client=self._open[connection].host)
        if first[0] == _TLS:
            why = "Client sent a TLS handshake to an HTTP server."
            _log.warning("client sent a TLS handshake to an HTTP server", extra=who)
        elif self._web_config.config.tls:
            why = "Client sent an HTTP request to an HTTPS server."
            _log.warning("client sent an HTTP request to an HTTPS server", extra=who)
        with suppress(OSError):
            connection.send(refusal(HTTPStatus.BAD_REQUEST, why))
        self._listen_no_more(connection)

    def _linger(self, stream: Stream, connection: socket.socket) -> None:
        """Take over the socket of a client that has been refused."""
        self._busy.discard(stream)
        if (client := self._open.pop(stream, None)) is None:
            # It has been closed for a new one meanwhile.
            connection.close()
            return
        client.let_in = False
        self._open[connection] = client
        self._listen_no_more(connection)

    def _listen_no_more(self, connection: socket.socket) -> None:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        loop = asyncio.get_running_loop()
        self._silent[connection] = loop.call_later(_LINGER_SECONDS, self._drop, connection)
        loop.add_reader(connection, self._discard, connection, _LINGER_BYTES)

    def _discard(self, connection: socket.socket, left: int) -> None:
        try:
            size = len(connection.recv(_DISCARD_BYTES))
        except BlockingIOError:
            return
        except OSError:
            size = 0
        if 0 < size < left:
            loop = asyncio.get_running_loop()
            loop.add_reader(connection, self._discard, connection, left - size)
        else:
            self._drop(connection)

    async def _shake_hands(
        self, below: SecureSocket, address: Any, config: WebConfig, **sizes: int
    ) -> None:
        client = self._open[below]
        verifies = config.tls is not None and config.tls.verify_mode != ssl.CERT_NONE
        run = partial(self._handshakes.run, client.host) if verifies else _at_once
        try:
            async with asyncio.timeout(_HANDSHAKE_SECONDS):
                await below.shake_hands(run)
            certificate = below.getpeercert()
            # In a resumed session the certificate may have expired since it was verified.
            client.expires = tls.expiry(certificate)
            found = tls.alternative_names(certificate)
        except (OSError, ValueError) as error:
            if isinstance(error, ssl.SSLError):
                told = fields(client=client.host, why=str(error))
                _log.warning("TLS handshake failed", extra=told)
            return
        if config.client_names and not config.client_names & found:
            _log.warning(
                "client's certificate is for another name",
                extra=fields(client=client.host, names=" ".join(sorted(found))[:_MOST_SHOWN]),
            )
            return
        if certificate:
            self._handshakes.remember(client.host)
        del self._shaking[below]
        connection: Any = below
        stream = SecureStream(connection, self._linger, MAX_HEADER_BYTES, self._door, **sizes)
        self._open[stream] = self._open.pop(below)
        self.handle_stream(stream, address)

    def _shaken(self, below: SecureSocket, _: object) -> None:
        """Close the connection of a handshake that has failed or was cancelled."""
        if self._shaking.pop(below, None) is not None:
            self._forget(below)
            below.close()


async def _at_once(call: Callable[[], None]) -> None:
    call()


def _shown(sock: socket.socket) -> str:
    """Return the address of a socket, as in a URL."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return str(sock.getsockname())
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _now() -> float:
    return time.time()


def _is_tls(first: bytes) -> bool:
    # If it is neither, OpenSSL refuses it.
    return not _is_text(first)


def _is_text(first: bytes) -> bool:
    """Return whether an HTTP request may begin with a byte; an empty line may come before it."""
    return first in b"\r\n" or 0x20 < first[0] < 0x7F


class _RequestGate(HTTPMessageDelegate):
    """Asks the server, when a request has been read, whether it may be answered.

    Requests with a too large body are refused here, and those whose body comes in chunks: these may
    be so small that they take long.
    """

    def __init__(
        self, inner: HTTPMessageDelegate, stream: Stream, begin: Callable[[], bool]
    ) -> None:
        self._inner = inner
        self._stream = stream
        self._begin = begin
        self._received = 0

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        self._stream.in_head = False
        waiting = self._inner.headers_received(start_line, headers)
        length = headers.get("Content-Length", "")
        # Tornado handles other values; then the bytes of the body are counted.
        if _DIGITS.fullmatch(length) and int(length[:100]) > MAX_BODY_BYTES:
            self._stream.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        if "Transfer-Encoding" in headers:
            self._stream.refuse(HTTPStatus.LENGTH_REQUIRED)
        return waiting

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        self._received += len(chunk)
        if self._received > MAX_BODY_BYTES:
            self._stream.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return None
        return self._inner.data_received(chunk)

    def finish(self) -> None:
        if self._begin():
            self._inner.finish()
        else:
            self._inner.on_connection_close()

    def on_connection_close(self) -> None:
        self._inner.on_connection_close()


def bind(addresses: Sequence[str]) -> list[socket.socket]:
    """Listen on some addresses; if one fails, on none of them.

    Args:
        addresses: such as ``:9748`` or ``[::]:9748`` (all of IPv4 and IPv6, or of IPv4 if the host
            has no IPv6), ``0.0.0.0:9748`` (all of IPv4), ``127.0.0.1:9748``, ``[::1]:9748``.

    Raises:
        ValueError: an address is malformed.
        OSError: the server cannot listen on an address; the text says which one and why.
    """
    wanted = [(address, *split(address)) for address in addresses]
    sockets: list[socket.socket] = []
    for address, host, port in wanted:
        try:
            everywhere = not host or _is_unspecified(host)
            found = bind_sockets(port, None if everywhere else host, backlog=_BACKLOG)
            if not found:
                # Tornado skips addresses of a family that this kernel does not have.
                raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
            sockets += found
        except (OSError, UnicodeError) as error:
            for sock in sockets:
                sock.close()
            reason = error.strerror if isinstance(error, OSError) else "not a host name"
            raise OSError(f"cannot listen on {address}: {reason}") from error
    return sockets


def split(address: str) -> tuple[str, int]:
    """Return the host of an address, empty for all, and its port.

    Raises:
        ValueError: the address is malformed.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match[3]) > 65535:
        raise ValueError(f"malformed listen address {address!r}: want HOST:PORT or :PORT")
    return match[1] or match[2], int(match[3])


def _is_unspecified(host: str) -> bool:
    """Return whether a host is ``::``. As with Go's net.Listen, this is for IPv4 as well."""
    try:
        return IPv6Address(host) == IPv6Address("::")
    except ValueError:
        return False


def from_systemd() -> list[socket.socket]:
    """Return the listening sockets that systemd has opened: see sd_listen_fds(3).

    Raises:
        ValueError: there are none, or a descriptor is not a listening socket.
    """
    pid, number = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS"))
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not re.fullmatch(r"[1-9][0-9]{0,2}", number):
        raise ValueError(
            "no socket from systemd: want LISTEN_PID and LISTEN_FDS from a socket unit"
        )
    sockets = []
    for descriptor in range(_FIRST_PASSED, _FIRST_PASSED + int(number)):
        try:
            is_socket = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
            sock = socket.socket(fileno=descriptor) if is_socket else None
        except OSError:
            sock = None
        if sock is None or not _listens(sock):
            raise ValueError(
                f"descriptor {descriptor} from systemd is not a listening socket: "
                "want ListenStream= and Accept=no in the socket unit"
            )
        sock.set_inheritable(False)
        sock.setblocking(False)
        sockets.append(sock)
    return sockets


def _listens(sock: socket.socket) -> bool:
    return sock.type == socket.SOCK_STREAM and bool(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    )
