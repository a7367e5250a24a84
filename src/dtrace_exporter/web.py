"""The web server: metrics, landing page, health, readiness and reload."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import ssl
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from prometheus_client.exposition import gzip_accepted
from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler

from dtrace_exporter import page
from dtrace_exporter.exposition import Exposition, chunks
from dtrace_exporter.state import State

_log = logging.getLogger(__name__)

_MAX_HEADER_BYTES = 16 << 10
_MAX_BODY_BYTES = 4 << 10
# Above the usual scrape intervals, so that Prometheus finds its connection open.
_IDLE_SECONDS = 75.0
_BODY_SECONDS = 10.0
_SEND_SECONDS = 30.0

_ADDRESS = re.compile(r"(?:\[([^\[\]\s]+)\]|([^\[\]:/\s]*)):([0-9]{1,5})")


def application(
    state: State, reload: Callable[[], Awaitable[None]], telemetry_path: str = "/metrics"
) -> Application:
    """Return the web application over a state.

    Args:
        state: what it shows.
        reload: reads the configuration again; raises an exception that says why it could not.
        telemetry_path: where the metrics are.
    """
    return Application(
        [
            (re.escape(telemetry_path), _Metrics, {"exposition": Exposition(state)}),
            (
                "/",
                _Landing,
                {"state": state, "history": page.History(), "telemetry_path": telemetry_path},
            ),
            ("/-/healthy", _Healthy),
            ("/-/ready", _Ready, {"state": state}),
            ("/-/reload", _Reload, {"reload": reload}),
        ],
        default_handler_class=_NotFound,
        log_function=_log_request,
    )


def listen(
    app: Application, addresses: Sequence[str], *, tls: ssl.SSLContext | None = None
) -> HTTPServer:
    """Serve an application on all of some addresses, or on none of them.

    Args:
        app: what to serve, in the running event loop.
        addresses: such as ``:9748`` (all of IPv4 and IPv6), ``127.0.0.1:9748``, ``[::1]:9748``.
        tls: speak TLS by it, else plain HTTP.

    Raises:
        ValueError: an address is malformed.
        OSError: an address cannot be listened on; its text says which and why.
    """
    wanted = [(address, *_split(address)) for address in addresses]
    sockets = []
    for address, host, port in wanted:
        try:
            sockets += bind_sockets(port, host or None)
        except (OSError, UnicodeError) as error:
            for sock in sockets:
                sock.close()
            reason = error.strerror if isinstance(error, OSError) else "not a host name"
            raise OSError(f"cannot listen on {address}: {reason}") from error
    server = HTTPServer(
        app,
        ssl_options=tls,
        max_header_size=_MAX_HEADER_BYTES,
        max_body_size=_MAX_BODY_BYTES,
        idle_connection_timeout=_IDLE_SECONDS,
        body_timeout=_BODY_SECONDS,
    )
    server.add_sockets(sockets)
    return server


def _split(address: str) -> tuple[str, int]:
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match[3]) > 65535:
        raise ValueError(f"malformed listen address {address!r}: want HOST:PORT or :PORT")
    return match[1] or match[2], int(match[3])


class _Handler(RequestHandler):
    """What all answers have in common: short plain text, no hint at versions."""

    allow: ClassVar[str] = "GET, HEAD"

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.set_header("X-Content-Type-Options", "nosniff")

    def compute_etag(self) -> None:
        """Make none: no two answers are the same."""

    def write_error(self, status_code: int, **_kwargs: Any) -> None:
        if status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            if self.allow:
                self.set_header("Allow", self.allow)
            else:
                status_code = HTTPStatus.NOT_FOUND
                self.set_status(status_code)
        self.finish(f"{status_code:d} {HTTPStatus(status_code).phrase}\n")

    async def send(self, *body: bytes) -> None:
        """Send a body that may be large, and hang up on a client that does not read it."""
        self.set_header("Content-Length", str(sum(map(len, body))))
        try:
            async with asyncio.timeout(_SEND_SECONDS):
                for chunk in chunks(body):
                    self.write(chunk)
                    await self.flush()
                await self.finish()
        except StreamClosedError:
            pass
        except TimeoutError:
            self.detach().close()


class _Metrics(_Handler):
    def initialize(self, exposition: Exposition) -> None:
        self._exposition = exposition

    async def get(self) -> None:
        headers = self.request.headers
        compress = gzip_accepted(headers.get("Accept-Encoding", ""))
        content_type, body = await self._exposition.answer(
            headers.get("Accept", ""),
            parse_qs(self.request.query).get("name[]", ()),
            compress=compress,
        )
        self.set_header("Content-Type", content_type)
        if compress:
            self.set_header("Content-Encoding", "gzip")
        await self.send(*body)

    head = get


class _Landing(_Handler):
    def initialize(self, state: State, history: page.History, telemetry_path: str) -> None:
        self._state = state
        self._history = history
        self._telemetry_path = telemetry_path

    async def get(self) -> None:
        nonce = secrets.token_urlsafe(16)
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.set_header(
            "Content-Security-Policy",
            f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
            "connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        )
        sort = self.get_query_argument("sort", "")
        paused = self.get_query_argument("refresh", "") == "off"
        body = page.render(
            self._state, self._history, self._telemetry_path, nonce, sort=sort, paused=paused
        )
        if gzip_accepted(self.request.headers.get("Accept-Encoding", "")):
            self.set_header("Content-Encoding", "gzip")
            body = page.compress(body)
        await self.send(body)

    head = get


class _Healthy(_Handler):
    def get(self) -> None:
        self.finish("healthy\n")

    head = get


class _Ready(_Handler):
    def initialize(self, state: State) -> None:
        self._state = state

    def get(self) -> None:
        if self._state.ready:
            self.finish("ready\n")
            return
        self.set_status(HTTPStatus.SERVICE_UNAVAILABLE)
        for session, status in self._state.sessions.items():
            if not status.up:
                where = f"{session.host}/" if session.host else ""
                self.write(_line(f"{where}{session.name}: {status.reason}"))
        self.finish()

    head = get


class _Reload(_Handler):
    allow = "POST"

    def initialize(self, reload: Callable[[], Awaitable[None]]) -> None:
        self._reload = reload

    async def post(self) -> None:
        if not self._same_origin():
            raise HTTPError(HTTPStatus.FORBIDDEN)
        try:
            await self._reload()
        except Exception as error:
            self.set_status(HTTPStatus.INTERNAL_SERVER_ERROR)
            self.finish(_line(str(error)))
        else:
            self.finish("reloaded\n")

    def _same_origin(self) -> bool:
        # Without either header it is no browser that asks.
        headers = self.request.headers
        if headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            return False
        origin = headers.get("Origin")
        try:
            return origin is None or urlsplit(origin).netloc.lower() == self.request.host.lower()
        except ValueError:
            return False


class _NotFound(_Handler):
    allow = ""


def _line(text: str) -> bytes:
    # Output that was no UTF-8 has lone surrogates in it, which cannot be encoded.
    return " ".join(text.split()).encode(errors="replace") + b"\n"


def _log_request(handler: RequestHandler) -> None:
    request = handler.request
    _log.debug(
        "%s %s from %s: %d in %.0f ms",
        request.method,
        request.uri,
        request.remote_ip,
        handler.get_status(),
        1000 * request.request_time(),
    )
