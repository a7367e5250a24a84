"""The web server's sockets and connections, of which it holds no more than it can afford."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import re
import resource
import socket
import stat
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
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
from tornado.iostream import IOStream, SSLIOStream, StreamClosedError
from tornado.netutil import bind_sockets
from tornado.web import Application

from dtrace_exporter.log import fields
from dtrace_exporter.web import tls
from dtrace_exporter.web.configuration import WebConfigFile

_log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
"""Many times what scrapers need; so many that are silent after a TLS handshake cost 30 MB."""

MAX_HEADER_BYTES = 16 << 10
MAX_BODY_BYTES = 4 << 10
# Above the usual scrape intervals, so that Prometheus finds its connection open.
_IDLE_SECONDS = 75.0
_BODY_SECONDS = 10.0
_HANDSHAKE_SECONDS = 10.0
_NO_ROOM_SECONDS = 1.0

# Few enough at a time for those that are already there to be heard between them.
_ACCEPTS = 64
# A SYN that finds it full is sent again after a second; Linux makes it somaxconn if that is less.
_BACKLOG = 4096
_BUFFER_BYTES = 64 << 10
_CHUNK_BYTES = 8 << 10
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_ADDRESS = re.compile(r"(?:\[([^\[\]\s]+)\]|([^\[\]:/\s]*)):([0-9]{1,5})")
_FIRST_PASSED = 3


@dataclass(eq=False, slots=True)
class _Client:
    """Who is at the other end of a connection, and how far it is known."""

    host: str
    let_in: bool = False
    ending: bool = False
    expires: float = math.inf


def let_in(request: HTTPServerRequest) -> None:
    """Note that a request's client may come in: its connection is among the last to give way."""
    connection: Any = request.connection
    connection.context.client.let_in = True


class Server(HTTPServer):
    """An HTTP server that makes room for a new connection at the cost of one that is idle.

    Args:
        app: what it serves.
        web_config: whether it speaks TLS, and to whom.
    """

    def initialize(self, app: Application, web_config: WebConfigFile) -> None:  # type: ignore[override]
        """Stand in for __init__, as Tornado has it."""
        super().initialize(
            app,
            max_header_size=MAX_HEADER_BYTES,
            max_body_size=MAX_BODY_BYTES,
            idle_connection_timeout=_IDLE_SECONDS,
            body_timeout=_BODY_SECONDS,
        )
        self.sockets: list[socket.socket] = []
        self._web_config = web_config
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # The other half is for the sessions and whatever else there is.
        self._limit = MAX_CONNECTIONS
        if files != resource.RLIM_INFINITY:
            self._limit = max(1, min(self._limit, files // 2))
        # In the order in which they came or, if they did, first said something.
        self._open: dict[socket.socket | IOStream, _Client] = {}
        self._hosts = Counter[str]()
        self._busy: set[socket.socket | IOStream] = set()
        self._silent: dict[socket.socket, asyncio.TimerHandle] = {}
        self._handshakes: set[asyncio.Task[None]] = set()

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None:
        """Serve those who connect to some listening sockets, in the running event loop."""
        for sock in sockets:
            self.sockets.append(sock)
            self._watch(sock)
            _log.info(
                "listening",
                extra=fields(address=_shown(sock), tls=bool(self._web_config.config.tls)),
            )

    def stop(self) -> None:
        """Listen no more."""
        for sock in self.sockets:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        self.sockets.clear()

    async def close_all_connections(self) -> None:
        """Hang up on everybody."""
        for connection in list(self._open):
            self._drop(connection)
        await super().close_all_connections()

    def end_connections(self) -> None:
        """Hang up on everybody, on those that wait for an answer once they have it.

        They may connect again.
        """
        for connection, client in list(self._open.items()):
            client.ending = True
            if connection not in self._busy:
                self._drop(connection)

    def start_request(self, server_conn: Any, request_conn: HTTPConnection) -> HTTPMessageDelegate:
        """Note that a connection waits for a request, and then for an answer."""
        stream = server_conn.stream
        self._busy.discard(stream)
        server_conn.context.client = client = self._open.get(stream) or _Client("")
        if client.ending:
            self._drop(stream)
        begin = partial(self._begin, stream)
        return _RequestGate(super().start_request(server_conn, request_conn), begin)

    def on_close(self, server_conn: Any) -> None:
        """Note that a connection is over."""
        super().on_close(server_conn)
        self._drop(server_conn.stream)

    def _begin(self, stream: IOStream) -> bool:
        client = self._open.get(stream)
        if client is None or client.expires <= _now():
            self._drop(stream)
            return False
        self._busy.add(stream)
        return True

    def _drop(self, connection: socket.socket | IOStream) -> None:
        self._forget(connection)
        if isinstance(connection, socket.socket):
            self._silent.pop(connection).cancel()
            asyncio.get_running_loop().remove_reader(connection)
        connection.close()

    def _forget(self, connection: socket.socket | IOStream) -> None:
        self._busy.discard(connection)
        if (client := self._open.pop(connection, None)) is not None:
            self._hosts[client.host] -= 1
            if not self._hosts[client.host]:
                del self._hosts[client.host]

    def _watch(self, sock: socket.socket) -> None:
        # Not if the server has been stopped meanwhile.
        if sock in self.sockets:
            asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(_ACCEPTS):
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

    def _wait_for_room(self, sock: socket.socket, error: OSError) -> None:
        _log.warning("cannot accept a connection", extra=fields(why=error.strerror))
        if not self._evict():
            loop = asyncio.get_running_loop()
            loop.remove_reader(sock)
            loop.call_later(_NO_ROOM_SECONDS, self._watch, sock)

    def _evict(self) -> bool:
        """Hang up on one connection of the hosts that have most of them.

        Who has not been let in goes first, the oldest before the others: a new one has time to say
        who it is. Of the others it is the youngest: a scraper keeps its connection. Those that wait
        for no answer go before those that do.
        """
        if not self._open:
            return False
        most = max(self._hosts.values())
        crowd = [each for each, client in self._open.items() if self._hosts[client.host] == most]
        strangers = [each for each in crowd if not self._open[each].let_in]
        candidates = strangers or crowd[::-1]
        idle = (each for each in candidates if each not in self._busy)
        self._drop(next(idle, candidates[0]))
        return True

    def _take(self, connection: socket.socket, address: Any) -> None:
        while len(self._open) >= self._limit:
            self._evict()
        connection.setblocking(False)
        # Until it says something it costs hardly any memory or time, and there may be many.
        loop = asyncio.get_running_loop()
        host = address[0] if isinstance(address, tuple) else ""
        self._open[connection] = _Client(host)
        self._hosts[host] += 1
        self._silent[connection] = loop.call_later(_IDLE_SECONDS, self._drop, connection)
        loop.add_reader(connection, self._first_byte, connection, address)

    def _first_byte(self, connection: socket.socket, address: Any) -> None:
        self._silent.pop(connection).cancel()
        asyncio.get_running_loop().remove_reader(connection)
        config = self._web_config.config
        sizes = {"max_buffer_size": _BUFFER_BYTES, "read_chunk_size": _CHUNK_BYTES}
        if config.tls is None:
            stream = IOStream(connection, **sizes)
            self._open[stream] = self._open.pop(connection)
            self.handle_stream(stream, address)
            return
        try:
            wrapped = config.tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        except OSError:
            self._forget(connection)
            connection.close()
            return
        secure = SSLIOStream(wrapped, **sizes)
        self._open[secure] = self._open.pop(connection)
        task = asyncio.get_running_loop().create_task(
            self._shake_hands(secure, address, config.client_names)
        )
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _shake_hands(self, stream: SSLIOStream, address: Any, names: frozenset[str]) -> None:
        try:
            await asyncio.wait_for(stream.wait_for_handshake(), _HANDSHAKE_SECONDS)
            if stream.closed():
                raise StreamClosedError
            certificate = stream.socket.getpeercert()
            client = self._open[stream]
            # That of a session that is resumed may have expired since it was looked at.
            client.expires = tls.expiry(certificate)
            found = tls.alternative_names(certificate)
            if names and not names & found:
                _log.warning(
                    "client's certificate is for another name",
                    extra=fields(client=client.host, names=" ".join(sorted(found))),
                )
                self._drop(stream)
                return
        except (StreamClosedError, OSError, ValueError):
            self._drop(stream)
            return
        self.handle_stream(stream, address)


def _shown(sock: socket.socket) -> str:
    """Return where a socket listens, as in a URL."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return str(sock.getsockname())
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _now() -> float:
    return time.time()


class _RequestGate(HTTPMessageDelegate):
    """Tells when a request has been read whole, and learns whether it is to be answered."""

    def __init__(self, inner: HTTPMessageDelegate, begin: Callable[[], bool]) -> None:
        self._inner = inner
        self._begin = begin

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        return self._inner.headers_received(start_line, headers)

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        return self._inner.data_received(chunk)

    def finish(self) -> None:
        if self._begin():
            self._inner.finish()
        else:
            self._inner.on_connection_close()

    def on_connection_close(self) -> None:
        self._inner.on_connection_close()


def bind(addresses: Sequence[str]) -> list[socket.socket]:
    """Listen on all of some addresses, or on none of them.

    Args:
        addresses: such as ``:9748`` (all of IPv4 and IPv6), ``127.0.0.1:9748``, ``[::1]:9748``.

    Raises:
        ValueError: an address is malformed.
        OSError: an address cannot be listened on; its text says which and why.
    """
    wanted = [(address, *split(address)) for address in addresses]
    sockets: list[socket.socket] = []
    for address, host, port in wanted:
        try:
            sockets += bind_sockets(port, host or None, backlog=_BACKLOG)
        except (OSError, UnicodeError) as error:
            for sock in sockets:
                sock.close()
            reason = error.strerror if isinstance(error, OSError) else "not a host name"
            raise OSError(f"cannot listen on {address}: {reason}") from error
    return sockets


def split(address: str) -> tuple[str, int]:
    """Return the host, empty for every one, and the port of an address.

    Raises:
        ValueError: it is malformed.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match[3]) > 65535:
        raise ValueError(f"malformed listen address {address!r}: want HOST:PORT or :PORT")
    return match[1] or match[2], int(match[3])


def from_systemd() -> list[socket.socket]:
    """Take the listening sockets that systemd has opened, as sd_listen_fds(3) says.

    Raises:
        ValueError: there are none, or they are something else.
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
                f"descriptor {descriptor} from systemd is no listening socket: "
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
