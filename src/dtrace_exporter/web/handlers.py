"""The web server: metrics, landing page, health, readiness and reload."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from http import HTTPStatus
from ipaddress import ip_address
from socket import gethostname, socket
from typing import Any, ClassVar, TypeVar
from urllib.parse import parse_qs, urlsplit

from tornado.iostream import StreamClosedError
from tornado.web import Application, Finish, HTTPError, RequestHandler

from dtrace_exporter.state import State
from dtrace_exporter.turns import by_turns
from dtrace_exporter.web import page, server
from dtrace_exporter.web.auth import Authenticator
from dtrace_exporter.web.configuration import RateLimit, WebConfig, WebConfigFile
from dtrace_exporter.web.exposition import Exposition, chunks
from dtrace_exporter.web.rates import History

_log = logging.getLogger(__name__)

_SEND_SECONDS = 30.0
_MOST_UNSENT = 128 << 20
_NO_QUALITY = re.compile(r"q\s*=\s*0(?:\.0*)?")
_T = TypeVar("_T")
_OWN_NAMES = {"localhost", gethostname().lower(), gethostname().partition(".")[0].lower()}


def application(
    state: State,
    reload: Callable[[], Awaitable[None]] | None,
    telemetry_path: str = "/metrics",
    web_config: WebConfigFile | None = None,
) -> Application:
    """Return the web application over a state.

    Args:
        state: what it shows.
        reload: reads the configuration again, as Reloads.ask(); raises an exception where it could
            not, and logs why. None if that cannot be asked for over the web.
        telemetry_path: where the metrics are.
        web_config: who may use it and what headers its answers have, else everybody and none.
    """
    return Application(
        [
            (re.escape(telemetry_path), _Metrics, {"exposition": Exposition(state)}),
            (
                "/",
                _Landing,
                {
                    "state": state,
                    "history": History(),
                    "one_at_a_time": asyncio.Lock(),
                    "telemetry_path": telemetry_path,
                },
            ),
            ("/-/healthy", _Healthy),
            ("/-/ready", _Ready, {"state": state}),
            ("/-/reload", _Reload, {"reload": reload}),
        ],
        default_handler_class=_NotFound,
        log_function=_log_request,
        web_config=web_config or WebConfigFile(None),
        authenticator=Authenticator(),
        bucket=_Bucket(),
        answers=_Answers(),
    )


def serve(app: Application, sockets: Iterable[socket]) -> server.Server:
    """Serve an application to whoever it lets in.

    Args:
        app: as application() returns it, in the running event loop.
        sockets: the listening ones, as server.bind() or server.from_systemd() returns them.
    """
    serving = server.Server(app, app.settings["web_config"])
    serving.add_sockets(sockets)
    return serving


class _Handler(RequestHandler):
    """What all answers have in common: short plain text, no hint at versions."""

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
        """Let in whom the web configuration lets in; only then is it a request for its limit."""
        config = None
        # It may change while a password waits.
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
        """Wait for something for as long as the client does.

        Raises:
            Finish: it has gone, and what was waited for has been cancelled.
        """
        awaited = asyncio.ensure_future(work)
        self._awaited = awaited
        await asyncio.wait([awaited])
        if awaited.cancelled():
            raise Finish
        return awaited.result()

    def on_connection_close(self) -> None:
        """Wait no more."""
        if self._awaited is not None:
            self._awaited.cancel()

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """Log what is wrong with us and not what is with the request, which may hold secrets."""
        if not isinstance(value, HTTPError):
            _log.error("request failed", exc_info=(typ, value, tb))

    def compute_etag(self) -> None:
        """Make none: no two answers are the same."""

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
        """Send a body that may be large, and hang up on a client that does not read it."""
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
        compress = _accepts_gzip(headers.get("Accept-Encoding", ""))
        answer = self._exposition.answer(
            headers.get("Accept", ""),
            parse_qs(self.request.query).get("name[]", ()),
            compress=compress,
        )
        content_type, body = await self.while_connected(answer)
        self.set_header("Content-Type", content_type)
        if compress:
            self.set_header("Content-Encoding", "gzip")
        await self.send(body)

    head = get


def _accepts_gzip(accepted: str) -> bool:
    """Tell whether a client takes gzip; prometheus_client misses that ``q=0`` refuses it."""
    for coding in accepted.lower().split(","):
        name, *parameters = (word.strip() for word in coding.split(";"))
        if name == "gzip":
            return not any(_NO_QUALITY.fullmatch(word) for word in parameters)
    return False


class _Landing(_Handler):
    def initialize(
        self,
        state: State,
        history: History,
        one_at_a_time: asyncio.Lock,
        telemetry_path: str,
    ) -> None:
        self._state = state
        self._history = history
        self._one_at_a_time = one_at_a_time
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
        view = page.View(
            self.get_query_argument("sort", ""), self.get_query_argument("refresh", "") == "off"
        )
        await self.while_connected(self._one_at_a_time.acquire())
        try:
            await self._state.refresh()
            # Thousands of listeners take longer than others should wait.
            shown = replace(
                self._state,
                table=await by_turns(self._state.table.copying()),
                sessions={id_: replace(status) for id_, status in self._state.sessions.items()},
            )
            body = await asyncio.to_thread(
                page.render, shown, self._history, self._telemetry_path, nonce, view
            )
        finally:
            self._one_at_a_time.release()
        if _accepts_gzip(self.request.headers.get("Accept-Encoding", "")):
            self.set_header("Content-Encoding", "gzip")
            body = page.compress(body)
        await self.send([body])

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
            # Why has been logged, and may be nothing for everybody who can ask.
            self.set_status(HTTPStatus.INTERNAL_SERVER_ERROR)
            self.finish("reload failed: see the log\n")
        else:
            self.finish("reloaded\n")

    def _same_origin(self) -> bool:
        # Without either header it is no browser that asks.
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
    """Tell whether a host in a URL cannot be a stranger's name that leads here.

    A page of any other name may be a stranger's whose name server now gives our address for it:
    such a page has the same origin as we have.
    """
    try:
        ip_address(host)
    except ValueError:
        return host in _OWN_NAMES
    return True


class _NotFound(_Handler):
    allow = ""


def _line(text: str) -> bytes:
    # Output that was no UTF-8 has lone surrogates in it, which cannot be encoded.
    return " ".join(text.split()).encode(errors="replace") + b"\n"


class _Answers:
    """The large answers that are being sent, of which no more are kept than some memory holds.

    Who reads slowly, or not at all, gives way: the oldest one first.
    """

    def __init__(self) -> None:
        self._sending: dict[_Handler, tuple[int, int]] = {}

    def begin(self, handler: _Handler, body: list[bytes], size: int) -> None:
        """Note that a body, which others may have as well, is sent from now on."""
        self._sending[handler] = id(body), size
        while sum(dict(self._sending.values()).values()) > max(_MOST_UNSENT, size):
            oldest = next(iter(self._sending))
            self.end(oldest)
            connection: Any = oldest.request.connection
            connection.stream.close()

    def end(self, handler: _Handler) -> None:
        """Note that an answer is sent, or will not be."""
        self._sending.pop(handler, None)


class _Bucket:
    """Holds as many tokens as requests may come at once, and gets new ones at a steady pace."""

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
        # What follows it, or stands before it in a target that is a whole URL, may be a secret.
        request.path if request.path.startswith("/") else "(no path)",
        request.remote_ip,
        handler.get_status(),
        1000 * request.request_time(),
    )
