"""The web server: metrics, landing page, health, readiness and reload."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from ipaddress import ip_address
from socket import gethostname, socket
from typing import Any, ClassVar, TypeVar
from urllib.parse import parse_qs, urlsplit

from tornado.iostream import StreamClosedError
from tornado.web import Application, Finish, HTTPError, RequestHandler

from dtrace_exporter import reasons
from dtrace_exporter.state import State
from dtrace_exporter.turns import Precedence
from dtrace_exporter.web import api, negotiation, page, paths, server
from dtrace_exporter.web.auth import Authenticator
from dtrace_exporter.web.configuration import RateLimit, WebConfig, WebConfigFile
from dtrace_exporter.web.exposition import Exposition, chunks
from dtrace_exporter.web.paths import Mount
from dtrace_exporter.web.rates import History
from dtrace_exporter.web.selection import FIELDS, Selection
from dtrace_exporter.web.views import Views

_log = logging.getLogger(__name__)

_SEND_SECONDS = 30.0
_MOST_UNSENT = 128 << 20
_T = TypeVar("_T")
_AT_ROOT = Mount()
_OWN_NAMES = {"localhost", gethostname().lower(), gethostname().partition(".")[0].lower()}


def application(
    state: State,
    reload: Callable[[], Awaitable[None]] | None,
    telemetry_path: str = "/metrics",
    web_config: WebConfigFile | None = None,
    mount: Mount = _AT_ROOT,
) -> Application:
    """Return the web application.

    Args:
        state: what it shows.
        reload: reads the configuration again, as Reloads.ask(); if it fails, it logs why and raises
            an exception. None if reloads over the web are disabled.
        telemetry_path: the path of the metrics.
        web_config: the web configuration, None if there is none.
        mount: the path in front of all endpoints.

    Raises:
        ValueError: the metrics cannot have this path.
    """
    web_config = web_config or WebConfigFile(None)
    state.web = web_config.status
    precedence = Precedence()
    views = Views(state, precedence)
    routes: list[tuple[str, type[_Handler], dict[str, Any]]] = [
        ("/", _Landing, {"views": views, "telemetry_path": telemetry_path}),
        ("/api/v1/listeners", _Listeners, {"views": views}),
        ("/-/healthy", _Healthy, {}),
        ("/-/ready", _Ready, {"state": state}),
        ("/-/reload", _Reload, {"reload": reload}),
    ]
    metrics = paths.telemetry(telemetry_path, frozenset(path for path, *_ in routes))
    routes.append((metrics, _Metrics, {"exposition": Exposition(state, precedence)}))
    rules: list[tuple[str, type[_Handler], dict[str, Any]]] = [
        (re.escape(mount.prefix + path), handler, how) for path, handler, how in routes
    ]
    if mount.prefix:
        here = {"to": f"./{mount.prefix.rpartition('/')[2]}/"}
        there = {"to": f"{mount.external or f'.{mount.prefix}'}/"}
        rules += [(re.escape(mount.prefix), _Redirect, here), ("/", _Redirect, there)]
    return Application(
        rules,
        default_handler_class=_NotFound,
        log_function=_log_request,
        web_config=web_config,
        authenticator=Authenticator(),
        bucket=_Bucket(),
        answers=_Answers(),
        views=views,
    )


async def keep_sampling(app: Application) -> None:
    """Take samples for the history on the pages of an application, for ever."""
    views: Views = app.settings["views"]
    await views.keep_sampling()


def serve(app: Application, sockets: Iterable[socket]) -> server.Server:
    """Serve an application in the running event loop.

    Args:
        app: the application, as application() returns it.
        sockets: the listening sockets, as server.bind() or server.from_systemd() returns them.
    """
    serving = server.Server(app, app.settings["web_config"])
    serving.add_sockets(sockets)
    return serving


class _Handler(RequestHandler):
    """The common part of all answers: short plain text, no versions."""

    allow: ClassVar[str] = "GET, HEAD"
    _awaited: asyncio.Future[Any] | None = None

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.set_header("X-Content-Type-Options", "nosniff")
        for name, value in self._config.headers.items():
            self.set_header(name, value) if value else self.clear_header(name)

    @property
    def _config(self) -> WebConfig:
        web_config: WebConfigFile = self.settings["web_config"]
        return web_config.config

    async def prepare(self) -> None:
        """Check the password, and then the limit of requests; refused passwords do not count."""
        config = None
        # The configuration may change while a password is being checked.
        while config is not self._config:
            config = self._config
            if config.users and not await self._knows_password(config):
                raise HTTPError(HTTPStatus.UNAUTHORIZED)
        limit = self._config.rate_limit
        if limit.interval and not self.settings["bucket"].take(limit):
            raise HTTPError(HTTPStatus.TOO_MANY_REQUESTS)
        server.let_in(self.request)

    async def _knows_password(self, config: WebConfig) -> bool:
        authorization = self.request.headers.get("Authorization", "")
        client = self.request.remote_ip or ""
        authenticator: Authenticator = self.settings["authenticator"]
        return await self.while_connected(authenticator.allows(config.users, authorization, client))

    async def while_connected(self, work: Awaitable[_T]) -> _T:
        """Wait for an awaitable as long as the client is connected, and return its result.

        Raises:
            Finish: the client has gone, and the awaitable has been cancelled.
        """
        awaited = asyncio.ensure_future(work)
        self._awaited = awaited
        await asyncio.wait([awaited])
        if awaited.cancelled():
            raise Finish
        return awaited.result()

    def on_connection_close(self) -> None:
        """Cancel what the request waits for."""
        if self._awaited is not None:
            self._awaited.cancel()

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """Log errors of the exporter, but not those of requests, which may have secrets."""
        if not isinstance(value, HTTPError):
            _log.error("request failed", exc_info=(typ, value, tb))

    def compute_etag(self) -> None:
        """Make no ETag, because no two answers are the same."""

    def write_error(self, status_code: int, **_kwargs: Any) -> None:
        if status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            if self.allow:
                self.set_header("Allow", self.allow)
            else:
                status_code = HTTPStatus.NOT_FOUND
                self.set_status(status_code)
        elif status_code == HTTPStatus.UNAUTHORIZED:
            self.set_header("WWW-Authenticate", 'Basic realm="dtrace-exporter", charset="UTF-8"')
        elif status_code == HTTPStatus.TOO_MANY_REQUESTS:
            self.set_header("Retry-After", "1")
        self.finish(f"{status_code:d} {HTTPStatus(status_code).phrase}\n")

    async def send(self, body: list[bytes]) -> None:
        """Send a body that may be large; close the connection if the client does not read it."""
        size = sum(map(len, body))
        self.set_header("Content-Length", str(size))
        answers: _Answers = self.settings["answers"]
        answers.begin(self, body, size)
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
        finally:
            answers.end(self)


class _Metrics(_Handler):
    def initialize(self, exposition: Exposition) -> None:
        self._exposition = exposition

    async def get(self) -> None:
        headers = self.request.headers
        format_ = negotiation.choose(headers.get("Accept", ""))
        if format_ is None:
            raise HTTPError(HTTPStatus.NOT_ACCEPTABLE)
        compress = negotiation.takes_gzip(headers.get("Accept-Encoding", ""))
        answer = self._exposition.answer(
            openmetrics=format_.openmetrics,
            names=parse_qs(self.request.query).get("name[]", ()),
            compress=compress,
        )
        body = await self.while_connected(answer)
        self.set_header("Content-Type", format_.content_type)
        if compress:
            self.set_header("Content-Encoding", "gzip")
        await self.send(body)

    head = get


class _View(_Handler):
    """The common part of views of the whole state."""

    def initialize(self, views: Views, **_more: str) -> None:
        self._views = views

    async def answer(self, make: Callable[[State, History], list[bytes]]) -> None:
        """Send the result of a function, compressed if the client accepts that."""
        compress = negotiation.takes_gzip(self.request.headers.get("Accept-Encoding", ""))

        def made(state: State, history: History) -> list[bytes]:
            body = make(state, history)
            return page.compress(body) if compress else body

        await self.while_connected(self._views.turn.acquire())
        try:
            body = await self._views.make(made)
        finally:
            self._views.turn.release()
        if compress:
            self.set_header("Content-Encoding", "gzip")
        await self.send(body)

    @property
    def _selection(self) -> Selection:
        return Selection(**{field: self.get_query_argument(field, "") for field in FIELDS})


class _Landing(_View):
    def initialize(self, views: Views, telemetry_path: str = "", **_more: str) -> None:
        super().initialize(views)
        self._telemetry_path = telemetry_path

    async def get(self) -> None:
        nonce = secrets.token_urlsafe(16)
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.set_header(
            "Content-Security-Policy",
            f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
            "connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
        )
        view = page.View(
            self.get_query_argument("sort", ""),
            self.get_query_argument("order", "") == "reverse",
            self.get_query_argument("refresh", "") == "off",
            self._selection,
        )
        path, give_way = self._telemetry_path, self._views.give_way
        await self.answer(
            lambda state, history: [page.render(state, history, path, nonce, view, give_way)]
        )

    head = get


class _Listeners(_View):
    async def get(self) -> None:
        self.set_header("Content-Type", "application/json; charset=utf-8")
        selection = self._selection
        give_way = self._views.give_way
        await self.answer(lambda state, _: api.render(state, selection, give_way))

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
            self.write("ready\n")
            source = self._state.source
            if source.reason:
                self.write(_line(reasons.told(source.reason, source.name)))
            self.finish()
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

    def initialize(self, reload: Callable[[], Awaitable[None]] | None) -> None:
        self._reload = reload

    async def post(self) -> None:
        if self._reload is None or not self._same_origin():
            raise HTTPError(HTTPStatus.FORBIDDEN)
        try:
            await self.while_connected(self._reload())
        except Finish:
            raise
        except Exception:
            # The reason is in the log only: not every client may see it.
            self.set_status(HTTPStatus.INTERNAL_SERVER_ERROR)
            self.finish("reload failed: see the log\n")
        else:
            self.finish("reloaded\n")

    def _same_origin(self) -> bool:
        # Browsers send at least one of these headers.
        headers = self.request.headers
        if headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            return False
        origin = headers.get("Origin")
        if origin is None:
            return True
        try:
            asking, asked = urlsplit(origin), urlsplit(f"//{self.request.host}")
            return asking.netloc.lower() == asked.netloc.lower() and _is_own(asked.hostname or "")
        except ValueError:
            return False


def _is_own(host: str) -> bool:
    """Return whether a host in a URL is an address or one of this host's own names.

    Any other name may be a stranger's: if the stranger's name server answers with our address, a
    page of that name has the same origin as ours (DNS rebinding).
    """
    try:
        ip_address(host)
    except ValueError:
        return host in _OWN_NAMES
    return True


class _Redirect(_Handler):
    """Redirects to the landing page."""

    def initialize(self, to: str) -> None:
        self._to = to

    def get(self) -> None:
        self.set_status(HTTPStatus.FOUND)
        self.set_header("Location", self._to)
        self.finish()

    head = get


class _NotFound(_Handler):
    allow = ""


def _line(text: str) -> bytes:
    # Output that was not UTF-8 has lone surrogates, which cannot be encoded.
    return " ".join(text.split()).encode(errors="replace") + b"\n"


class _Answers:
    """The answers that are being sent, with a limit on their memory.

    If it is exceeded, slow clients are disconnected, that of the oldest answer first.
    """

    def __init__(self) -> None:
        self._sending: dict[_Handler, tuple[int, int]] = {}

    def begin(self, handler: _Handler, body: list[bytes], size: int) -> None:
        """Record that a body is being sent; several answers may share it."""
        self._sending[handler] = id(body), size
        while sum(dict(self._sending.values()).values()) > max(_MOST_UNSENT, size):
            oldest = next(iter(self._sending))
            self.end(oldest)
            connection: Any = oldest.request.connection
            connection.stream.close()

    def end(self, handler: _Handler) -> None:
        """Record that an answer has been sent, or will not be."""
        self._sending.pop(handler, None)


class _Bucket:
    """A token bucket for the limit of requests."""

    def __init__(self) -> None:
        self._limit = RateLimit()
        self._full_at = 0.0

    def take(self, limit: RateLimit) -> bool:
        """Take a token if there is one."""
        now = time.monotonic()
        if limit != self._limit:
            self._limit, self._full_at = limit, now
        full_at = max(self._full_at, now) + limit.interval
        if full_at - now > limit.burst * limit.interval:
            return False
        self._full_at = full_at
        return True


def _log_request(handler: RequestHandler) -> None:
    request = handler.request
    _log.debug(
        "%s %s from %s: %d in %.0f ms",
        request.method,
        # The query, or the host of a target that is a whole URL, may be a secret.
        request.path if request.path.startswith("/") else "(no path)",
        request.remote_ip,
        handler.get_status(),
        1000 * request.request_time(),
    )
