"""The web server, over real connections to 127.0.0.1."""

from __future__ import annotations

import asyncio
import errno
import gc
import gzip
import os
import re
import resource
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from socket import gethostname
from typing import Any
from urllib.parse import urljoin

import pytest
import trustme
from lab.waiting import eventually
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from tornado.iostream import IOStream

from dtrace_exporter import reasons
from dtrace_exporter.listeners import SessionId
from dtrace_exporter.reloads import Reloads
from dtrace_exporter.state import SessionStatus, Source, State
from dtrace_exporter.watched import Watched
from dtrace_exporter.web import handlers, paths
from dtrace_exporter.web import server as web_server
from dtrace_exporter.web.configuration import WebConfigFile
from dtrace_exporter.web.paths import Mount
from dtrace_exporter.web.server import Server
from web_serving import HOSTILE, Response, fetch, get, no_reload, one_port, port_of, serving

LARGE = 2 * web_server.MAX_HEADER_BYTES
POST = b"POST /-/reload HTTP/1.1\r\nHost: x\r\n"
CHUNK = b"x" * 0x800
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PAGES = ("/metrics", "/", "/api/v1/listeners", "/-/healthy", "/-/ready")


def openmetrics(response: Response) -> dict[str, Metric]:
    """Return the metric families of an OpenMetrics answer by name."""
    parsed = parse_openmetrics(response.body.decode())  # type: ignore[no-untyped-call]
    return {family.name: family for family in parsed}


def peers(server: Server) -> list[int]:
    """Return the clients' ports of the open connections."""
    sockets = (each.socket if isinstance(each, IOStream) else each for each in server._open)
    return [each.getpeername()[1] for each in sockets]


def secured(place: Path) -> WebConfigFile:
    """Return a web configuration with TLS."""
    cert = trustme.CA().issue_cert("localhost")
    cert.cert_chain_pems[0].write_to_path(str(place / "server.pem"))
    cert.private_key_pem.write_to_path(str(place / "server.key"))
    file = place / "web.yml"
    file.write_text(
        "tls_server_config: {cert_file: server.pem, key_file: server.key}", encoding="utf-8"
    )
    return WebConfigFile(file)


def trusting(place: Path) -> ssl.SSLContext:
    """Return a client's context that trusts the certificate of secured()."""
    context = ssl.create_default_context(cafile=place / "server.pem")
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def reload_after(go: asyncio.Event) -> Callable[[], Awaitable[None]]:
    """Return a reload that lasts until an event is set."""

    async def reload() -> None:
        await go.wait()

    return reload


class TestMetrics:
    def test_text(self) -> None:
        """Without an Accept header the answer is the text format."""
        response = get(one_port(), "/metrics")
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = response.body.decode()
        assert (
            'dtrace_tcp_listen_syns_total{address="*",listener="ssh",netns="",port="22"} 3.0'
            in (text.splitlines())
        )
        assert {"dtrace_session_up", "python_info"} <= {f.name for f in parse_text(text)}

    def test_openmetrics(self) -> None:
        """A scraper that accepts OpenMetrics gets it, and the strict parser accepts the answer."""
        response = get(one_port(), "/metrics", headers={"Accept": OPENMETRICS})
        said = response.headers["Content-Type"]
        assert said == f"{OPENMETRICS}; escaping=underscores"
        families = openmetrics(response)
        assert families["dtrace_tcp_listen_syns"].samples[0].value == 3

    @pytest.mark.parametrize(
        "accept", ["text/plain;version=x", "application/openmetrics-text;version=1.x"]
    )
    def test_odd_accept(self, accept: str) -> None:
        """An invalid version in the Accept header gets an answer, not an error."""
        assert get(one_port(), "/metrics", headers={"Accept": accept}).status == 200

    @pytest.mark.parametrize("escaping", ["underscores", "allow-utf-8", "values", "dots"])
    @pytest.mark.parametrize("kind", ["text/plain", "application/openmetrics-text"])
    def test_escaping(self, kind: str, escaping: str) -> None:
        """In each escaping, samples have the names of their TYPE line and of the plain text."""
        accept = f"{kind};version=1.0.0;escaping={escaping}"
        response = get(one_port(), "/metrics", headers={"Accept": accept})
        said = escaping if escaping != "dots" else "underscores"
        assert response.headers["Content-Type"].endswith(f"; escaping={said}")
        text = response.body.decode()
        parse = parse_text if kind == "text/plain" else parse_openmetrics
        families = {family.name: family for family in parse(text)}
        assert families["dtrace_tcp_listen_syns"].type == "counter"
        assert families["dtrace_tcp_listen_syns"].samples[0].name == "dtrace_tcp_listen_syns_total"
        assert families["python_gc_collections"].type == "counter"

    def test_refused(self) -> None:
        """A client that refuses both formats gets 406."""
        accept = "text/plain;q=0, application/openmetrics-text;q=0.0"
        assert get(one_port(), "/metrics", headers={"Accept": accept}).status == 406

    def test_gzip(self) -> None:
        """The answer is compressed only for a client that accepts gzip."""
        compressed = get(one_port(), "/metrics", headers={"Accept-Encoding": "br, gzip;q=0.5"})
        assert compressed.headers["Content-Encoding"] == "gzip"
        assert b"dtrace_tcp_listen_syns_total" in gzip.decompress(compressed.body)
        for refusing in (None, "", "br", "gzip;q=0", "GZIP ; q=0.000", "x-gzip", "gzip;q=0, br"):
            headers: dict[str, str] = {} if refusing is None else {"Accept-Encoding": refusing}
            answer = get(one_port(), "/metrics", headers=headers)
            assert "Content-Encoding" not in answer.headers

    def test_many_listeners(self) -> None:
        """A long answer arrives complete and with its length, compressed or not."""
        state = one_port()
        session = SessionId("", "port-22")
        state.table.watch(session, Watched())
        for port in range(1000, 1300):
            state.table.listener(session, "", "*", port)
        for coding in ("identity", "gzip"):
            response = get(state, "/metrics", headers={"Accept-Encoding": coding})
            assert response.headers["Content-Length"] == str(len(response.body))
            body = gzip.decompress(response.body) if coding == "gzip" else response.body
            assert len(body) > 500_000
            (family,) = (f for f in parse_text(body.decode()) if f.name == "dtrace_tcp_listen_syns")
            assert len(family.samples) == 301

    def test_name_filter(self) -> None:
        """name[] selects samples, and an empty one selects all, as in prometheus_client."""
        target = "/metrics?name[]=dtrace_session_up&name[]=dtrace_tcp_listen_syns_total"
        lines = get(one_port(), target).body.decode().splitlines()
        assert [line.split("{")[0] for line in lines if not line.startswith("#")] == [
            "dtrace_tcp_listen_syns_total",
            "dtrace_session_up",
        ]
        assert b"python_info" in get(one_port(), "/metrics?name[]=").body

    @pytest.mark.parametrize("accept", ["", OPENMETRICS])
    @pytest.mark.parametrize(
        "name", ["python_info", "process_cpu_seconds_total", "python_gc_collections_total"]
    )
    def test_name_filter_of_others(self, name: str, accept: str) -> None:
        """name[] also selects samples of the process, the platform and the garbage collector."""
        headers = {"Accept": accept}
        text = get(one_port(), f"/metrics?name[]={name}", headers=headers).body.decode()
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert lines
        assert {line.split("{")[0].split(" ")[0] for line in lines} == {name}
        both = f"/metrics?name[]=dtrace_session_up&name[]={name}"
        found = get(one_port(), both).body
        assert b"\ndtrace_session_up{" in found
        assert f"\n{name}".encode() in found

    def test_path(self) -> None:
        """The metrics are only at the configured path, even if it has unusual characters."""

        async def both() -> list[int]:
            async with serving(one_port(), path="/a.b+c") as server:
                paths = ("/a.b+c", "/aXb+c", "/metrics")
                return [(await fetch(server, path)).status for path in paths]

        assert asyncio.run(both()) == [200, 404, 404]

    def test_hostile_name(self) -> None:
        """A listener's name with quotes, a backslash and a newline is exported unchanged."""
        response = get(one_port(HOSTILE), "/metrics", headers={"Accept": OPENMETRICS})
        families = openmetrics(response)
        assert families["dtrace_tcp_listen_syns"].samples[0].labels["listener"] == HOSTILE

    def test_keep_alive(self) -> None:
        """One connection serves several scrapes."""

        async def twice() -> list[bytes]:
            async with serving(one_port()) as server:
                reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
                answers = []
                for _ in range(2):
                    writer.write(b"HEAD /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    answers.append(await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10))
                writer.close()
                await writer.wait_closed()
                return answers

        assert [answer.split()[1] for answer in asyncio.run(twice())] == [b"200", b"200"]


class TestHealth:
    def test_healthy(self) -> None:
        """The exporter is healthy while it answers, even if its sessions are down."""
        state = one_port()
        state.sessions[SessionId("", "port-22")].up = False
        assert get(state, "/-/healthy").status == 200

    def test_ready(self) -> None:
        """The exporter is ready if all sessions are up."""
        assert get(one_port(), "/-/ready").status == 200

    def test_not_ready_before_the_configuration_is(self) -> None:
        """Without any session, the exporter is ready once the configuration is applied."""
        assert get(State(), "/-/ready").status == 503
        assert get(State(last_reload_success=1.5e9), "/-/ready").status == 200

    def test_ready_without_dtrace(self) -> None:
        """If sock_diag is used, a second line says why, what is missing, and what to do."""
        state = State(last_reload_success=1.5e9, source=Source("sock_diag", reason="not_found"))
        answer = get(state, "/-/ready")
        assert (answer.status, answer.body) == (
            200,
            f"ready\n{reasons.told('not_found', 'sock_diag')}\n".encode(),
        )
        assert get(one_port(), "/-/ready").body == b"ready\n"

    def test_not_ready(self) -> None:
        """If sessions are down, the answer is 503, with one line for each that says why."""
        state = one_port()
        state.sessions[SessionId("", "port-80")] = SessionStatus(reason="no\nprobes \udcff")
        state.sessions[SessionId("sol10", "all")] = SessionStatus()
        response = get(state, "/-/ready")
        assert response.status == 503
        assert response.body == b"port-80: no probes ?\nsol10/all: starting\n"


class TestReload:
    def test_reload(self) -> None:
        """POST /-/reload reloads the configuration."""
        calls = []

        async def reload() -> None:
            calls.append(1)

        assert get(one_port(), "/-/reload", "POST", reload=reload).status == 200
        assert calls == [1]

    def test_failure(self) -> None:
        """A failed reload is a 500 that refers to the log and shows nothing of the file."""

        async def reload() -> None:
            raise ValueError("exporter.yml:3: listeners: want a list")

        response = get(one_port(), "/-/reload", "POST", reload=reload)
        assert response.status == 500
        assert response.body == b"reload failed: see the log\n"

    def test_many_who_hang_up(self) -> None:
        """Clients that ask for a reload and hang up cause none; those that stay share the next."""
        began = 0
        go = asyncio.Event()

        async def reload() -> None:
            nonlocal began
            began += 1
            await go.wait()

        async def run() -> list[bytes]:
            reloads = Reloads(reload)
            async with serving(one_port(), reloads.ask) as server:

                async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
                    both = await asyncio.open_connection("127.0.0.1", port_of(server))
                    both[1].write(
                        b"POST /-/reload HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                    )
                    return both

                async def busy(number: int) -> None:
                    # The server does not report when it has read a request or noticed a hang-up.
                    await eventually(lambda: len(server._busy) == number)

                first = await connect()
                await busy(1)
                crowd = [await connect() for _ in range(200)]
                await busy(201)
                for _, writer in crowd:
                    writer.close()
                await busy(1)
                go.set()
                answers = [await asyncio.wait_for(first[0].read(), 10)]
                assert reloads._working is not None
                await reloads._working
                assert began == 1
                go.clear()
                staying = [await connect()]
                await busy(1)
                staying += [await connect() for _ in range(3)]
                await busy(4)
                go.set()
                answers += [await asyncio.wait_for(reader.read(), 10) for reader, _ in staying]
                for _, writer in (first, *staying):
                    writer.close()
                return answers

        answers = asyncio.run(run())
        assert [answer[:12] for answer in answers] == [b"HTTP/1.1 200"] * 5
        assert began == 3

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "http://localhost:1"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": "http://[evil"}, 403),
            ({"Sec-Fetch-Site": "cross-site"}, 403),
            ({"Sec-Fetch-Site": "same-site", "Origin": "http://localhost"}, 403),
            ({"Sec-Fetch-Site": "same-origin", "Origin": "http://evil.example"}, 403),
            ({"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost"}, 200),
            ({"Sec-Fetch-Site": "none"}, 200),
            ({"Origin": "http://LOCALHOST"}, 200),
            ({"Origin": "http://127.0.0.1:9748", "Host": "127.0.0.1:9748"}, 200),
            ({"Origin": "http://[::1]:9748", "Host": "[::1]:9748"}, 200),
            ({"Origin": f"http://{gethostname()}", "Host": gethostname()}, 200),
            # The name of another site that resolves to this host, so that its page has our origin.
            ({"Origin": "http://evil.example", "Host": "evil.example"}, 403),
            ({"Origin": "http://localhost.evil.example", "Host": "localhost.evil.example"}, 403),
            ({"Origin": "http://127.0.0.1.evil.example", "Host": "127.0.0.1.evil.example"}, 403),
            ({"Host": "any.example"}, 200),
        ],
    )
    def test_origin(self, headers: dict[str, str], status: int) -> None:
        """The page of another site cannot cause a reload in its visitor's browser."""
        calls = []

        async def reload() -> None:
            calls.append(1)

        assert get(one_port(), "/-/reload", "POST", headers, reload).status == status
        assert len(calls) == (status == 200)


class TestMethodsAndPaths:
    @pytest.mark.parametrize(
        "path", ["/metrics", "/", "/api/v1/listeners", "/-/healthy", "/-/ready"]
    )
    def test_head(self, path: str) -> None:
        """HEAD has the status and the headers of GET, and no body."""

        async def both() -> tuple[Response, Response]:
            async with serving(one_port()) as server:
                return await fetch(server, path, "HEAD"), await fetch(server, path)

        head, full = asyncio.run(both())
        assert (head.status, head.body) == (200, b"")
        assert head.headers["Content-Type"] == full.headers["Content-Type"]
        assert int(head.headers["Content-Length"]) > 0

    @pytest.mark.parametrize(
        ("method", "path", "allow"),
        [
            ("POST", "/metrics", "GET, HEAD"),
            ("DELETE", "/", "GET, HEAD"),
            ("OPTIONS", "/-/healthy", "GET, HEAD"),
            ("BREW", "/-/ready", "GET, HEAD"),
            ("GET", "/-/reload", "POST"),
        ],
    )
    def test_not_allowed(self, method: str, path: str, allow: str) -> None:
        """A method that a path does not have is a 405 that names the allowed ones."""
        response = get(one_port(), path, method)
        assert (response.status, response.headers["Allow"]) == (405, allow)
        assert response.body == b"405 Method Not Allowed\n"

    @pytest.mark.parametrize("method", ["GET", "POST", "BREW"])
    @pytest.mark.parametrize("path", ["/nonsense", "/metrics/", "//", "/-/", "/-/healthyx"])
    def test_not_found(self, method: str, path: str) -> None:
        """Any other path is a 404, whatever the method."""
        response = get(one_port(), path, method)
        assert (response.status, response.body) == (404, b"404 Not Found\n")
        assert "Allow" not in response.headers

    @pytest.mark.parametrize(
        "path", ["/metrics", "/", "/api/v1/listeners", "/-/healthy", "/-/ready", "/no"]
    )
    def test_headers(self, path: str) -> None:
        """No answer names the server software or lets a browser guess the content's type."""
        headers = get(one_port(), path).headers
        assert "Server" not in headers
        assert "Etag" not in headers
        assert headers["X-Content-Type-Options"] == "nosniff"


class TestLimits:
    @pytest.mark.parametrize(
        ("timeout", "start"),
        [
            ("_IDLE_SECONDS", b""),
            ("_IDLE_SECONDS", b"GET /metrics HTTP/1.1\r\nHost: x\r\n"),
            ("_BODY_SECONDS", b"POST /-/reload HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx"),
        ],
    )
    def test_half_a_request(
        self, timeout: str, start: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The server closes the connection of a client that does not finish its request."""
        monkeypatch.setattr(web_server, timeout, 0.05)

        async def linger() -> bytes:
            async with serving(one_port()) as server:
                reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
                writer.write(start)
                rest = await asyncio.wait_for(reader.read(), 10)
                writer.close()
                await writer.wait_closed()
                return rest

        assert asyncio.run(linger()) == b""

    async def test_client_that_does_not_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The server closes the connection of a client that does not read a large answer."""
        monkeypatch.setattr(handlers, "_SEND_SECONDS", 0.05)

        async with serving(one_port("x" * 400_000)) as server:
            with socket.create_connection(("127.0.0.1", port_of(server))) as client:
                client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
                # The server does not report when it drops a connection.
                await eventually(lambda: server._connections)
                await eventually(lambda: not server._connections)

    def test_answers_that_nobody_reads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """If many answers are not read, the oldest is dropped, so that few are in memory."""
        monkeypatch.setattr(handlers, "_MOST_UNSENT", 20_000_000)

        names = [f"dtrace_tcp_listen_{one}_total" for one in ("syns", "drops")]
        names += ["dtrace_tcp_listen_q_saturation_ratio_bucket"]

        async def run() -> None:
            with ExitStack() as clients:
                async with serving(one_port("x" * 400_000)) as server:
                    app: Any = server.request_callback
                    sending = app.settings["answers"]._sending
                    for number in range(12):
                        client = socket.create_connection(("127.0.0.1", port_of(server)))
                        clients.enter_context(client)
                        client.setblocking(False)
                        wanted = "&".join(f"name[]={one}" for one in (*names, number))
                        client.send(f"GET /metrics?{wanted} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                        await asyncio.get_running_loop().sock_recv(client, 1)
                    sizes = [size for _, size in sending.values()]
                    assert 1 < len(sizes) < 12
                    assert sum(sizes) <= handlers._MOST_UNSENT
                    # A client that reads gets the whole answer.
                    response = await fetch(server, "/metrics")
                    assert len(response.body) > 8_000_000

        asyncio.run(run())

    def test_who_gives_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A new connection replaces the longest idle one of the host with the most connections."""
        monkeypatch.setattr(web_server, "MAX_CONNECTIONS", 4)
        go = asyncio.Event()

        async def run() -> list[bytes]:
            async with serving(one_port(), reload_after(go)) as server:

                async def connect(host: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
                    port = port_of(server)
                    both = await asyncio.open_connection("127.0.0.1", port, local_addr=(host, 0))
                    number = both[1].get_extra_info("sockname")[1]
                    await eventually(lambda: number in peers(server))
                    return both

                busy = await connect("127.0.0.2")
                busy[1].write(b"POST /-/reload HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                await eventually(lambda: server._busy)
                other = await connect("127.0.0.1")
                crowd = [await connect("127.0.0.2") for _ in range(4)]
                ended = [await asyncio.wait_for(reader.read(), 10) for reader, _ in crowd[:2]]
                for _, writer in (other, *crowd[2:]):
                    writer.write(b"GET /no HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                go.set()
                answers = [
                    (await asyncio.wait_for(reader.read(), 10))[:12]
                    for reader, _ in (busy, other, *crowd[2:])
                ]
                for _, writer in (busy, other, *crowd):
                    writer.close()
                return ended + answers

        served = [b"HTTP/1.1 200", *[b"HTTP/1.1 404"] * 3]
        assert asyncio.run(run()) == [b"", b"", *served]

    async def test_half_of_the_descriptors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Clients get half of the process's descriptors, because sessions need the others."""
        monkeypatch.setattr(resource, "getrlimit", lambda _: (7, 7))
        async with serving(one_port()) as server:
            clients = []
            for _ in range(3):
                clients.append(await asyncio.open_connection("127.0.0.1", port_of(server)))
                await eventually(lambda: len(peers(server)) == len(clients))
            clients.append(await asyncio.open_connection("127.0.0.1", port_of(server)))
            assert await asyncio.wait_for(clients[0][0].read(), 10) == b""
            assert len(peers(server)) == 3
            for _, writer in clients:
                writer.close()

    @pytest.mark.parametrize("speaking", [False, True])
    def test_ties_fall_on_strangers(
        self, monkeypatch: pytest.MonkeyPatch, *, speaking: bool
    ) -> None:
        """If each host has one connection, the newest hosts lose theirs, not an older scraper."""
        monkeypatch.setattr(web_server, "MAX_CONNECTIONS", 4)
        request = b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n"

        async def run() -> list[bytes]:
            async with serving(one_port()) as server:
                ours, *others = [
                    await asyncio.open_connection(
                        "127.0.0.1", port_of(server), local_addr=(f"127.0.0.{number}", 0)
                    )
                    for number in (1, 2)
                ]
                ours[1].write(request)
                answers = [await asyncio.wait_for(ours[0].readuntil(b"\r\n\r\n"), 10)]
                for number in range(3, 40):
                    others.append(
                        await asyncio.open_connection(
                            "127.0.0.1", port_of(server), local_addr=(f"127.0.0.{number}", 0)
                        )
                    )
                    if speaking:
                        others[-1][1].write(request)
                        await asyncio.wait_for(others[-1][0].readuntil(b"\r\n\r\n"), 10)
                ours[1].write(request)
                answers.append(await asyncio.wait_for(ours[0].readuntil(b"\r\n\r\n"), 10))
                for _, writer in (ours, *others):
                    writer.close()
                return answers

        assert [answer.split()[1] for answer in asyncio.run(run())] == [b"200", b"200"]

    def test_the_rules_change(self) -> None:
        """After a change of the rules, a busy connection gets its current answer and no other."""
        go = asyncio.Event()
        post = b"POST /-/reload HTTP/1.1\r\nHost: x\r\n\r\n"

        async def run() -> bytes:
            async with serving(one_port(), reload_after(go)) as server:
                reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
                writer.write(post * 3)
                await eventually(lambda: server._busy)
                server.end_connections()
                go.set()
                answer = b""
                with suppress(ConnectionError):
                    while chunk := await asyncio.wait_for(reader.read(1 << 16), 10):
                        answer += chunk
                writer.close()
                return answer

        answer = asyncio.run(run())
        assert answer.count(b"HTTP/1.1") == answer.count(b"HTTP/1.1 200") == 1
        assert answer.endswith(b"reloaded\n")

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_certificate_that_expires(
        self, version: ssl.TLSVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A client whose certificate has expired gets no answer, on old and new connections."""
        authority = trustme.CA()
        cert = authority.issue_cert("localhost")
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        cert.cert_chain_pems[0].write_to_path(str(tmp_path / "server.pem"))
        cert.private_key_pem.write_to_path(str(tmp_path / "server.key"))
        (tmp_path / "web.yml").write_text(
            "tls_server_config: {cert_file: server.pem, key_file: server.key, client_ca_file: "
            "ca.pem, client_auth_type: RequireAndVerifyClientCert}",
            encoding="utf-8",
        )
        tls = ssl.create_default_context()
        authority.configure_trust(tls)
        cert.configure_cert(tls)
        tls.maximum_version = version

        def ask(client: ssl.SSLSocket) -> bytes:
            with suppress(ConnectionError, BrokenPipeError):
                client.sendall(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n")
                return client.recv(1 << 16)[:12]
            return b""

        def connect(port: int, session: ssl.SSLSession | None = None) -> ssl.SSLSocket:
            raw = socket.create_connection(("127.0.0.1", port), 10)
            return tls.wrap_socket(raw, server_hostname="localhost", session=session)

        def client(port: int) -> list[bytes]:
            with connect(port) as first, connect(port) as second:
                answers = [ask(first), ask(second)]
                session = first.session
                monkeypatch.setattr(web_server, "_now", lambda: 1e12)
                answers.append(ask(first))
                with connect(port, session) as third:
                    resumed = third.session_reused
                    answers.append(ask(third))
                assert resumed == (version == ssl.TLSVersion.TLSv1_2)
            return answers

        async def run() -> list[bytes]:
            app = handlers.application(
                one_port(), no_reload, web_config=WebConfigFile(tmp_path / "web.yml")
            )
            server = handlers.serve(app, web_server.bind(["127.0.0.1:0"]))
            try:
                return await asyncio.to_thread(client, port_of(server))
            finally:
                server.stop()
                await server.close_all_connections()

        served = b"HTTP/1.1 200"
        assert asyncio.run(run()) == [served, served, b"", b""]

    @pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
    @pytest.mark.parametrize(
        ("request_", "status"),
        [
            (b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"x" * LARGE), 414),
            (b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"x" * (LARGE // 2)), 414),
            (b"GET /%s" % (b"x" * LARGE), 414),
            (b"\r\nGET /%s" % (b"x" * LARGE), 414),
            (b"GET / HTTP/1.1\r\nX: " + b"x" * LARGE, 431),
            (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * LARGE, 431),
            (b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\nGET /%s" % (b"x" * LARGE), 414),
            (POST + b"Content-Length: 99999\r\n\r\n" + b"x" * 99999, 413),
            (POST + b"Content-Length: 4097\r\nExpect: 100-continue\r\n\r\n", 413),
            (POST + b"Content-Length: 4097\r\n\r\n" + b"x" * 4097, 413),
            (POST + b"Content-Length: 4097, 4097\r\n\r\n" + b"x" * 4097, 413),
            (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 413),
            (POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"800\r\n%s\r\n" % CHUNK * 50, 411),
            (b"POST /-/no" + POST[14:] + b"Content-Length: 99999\r\n\r\nx", 413),
            (POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1" * LARGE, 411),
            # A client that does not speak HTTP well has time to read the answer, too.
            (POST + b"Content-Length: -1\r\n\r\n" + b"x" * 500_000, 400),
        ],
    )
    async def test_too_large(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        request_: bytes,
        status: int,
        *,
        tls: bool,
    ) -> None:
        """A request that is too large gets an answer that says so, and is not carried out."""
        # The connection ends when the client closes it.
        monkeypatch.setattr(web_server, "_LINGER_SECONDS", 3600.0)
        done = []

        async def reload() -> None:
            done.append(1)

        async with serving(one_port(), reload, web=secured(tmp_path) if tls else None) as server:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port_of(server), ssl=trusting(tmp_path) if tls else None
            )
            writer.write(request_)
            with suppress(ConnectionError):
                await writer.drain()
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            await eventually(lambda: not server._open)
        answers = re.findall(rb"HTTP/1\.1 (\d+)", answer)
        assert answers == [b"200"] * request_.count(b"healthy") + [b"%d" % status]
        assert b"\r\nConnection: close\r\n" in answer
        assert not done

    async def test_refused_without_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A refused client that keeps sending is cut off after some time or some bytes."""
        for limit, value in (("_LINGER_SECONDS", 0.05), ("_LINGER_BYTES", 1)):
            monkeypatch.setattr(web_server, "_LINGER_SECONDS", 3600.0)
            monkeypatch.setattr(web_server, limit, value)
            async with serving(one_port()) as server:
                reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
                writer.write(POST + b"Content-Length: 99999\r\n\r\n")
                assert b"413" in await asyncio.wait_for(reader.readline(), 10)
                if limit == "_LINGER_BYTES":
                    writer.write(b"xx")
                await eventually(lambda: not server._open)
                writer.close()

    async def test_refused_give_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Connections of refused clients count as held, and are replaced like others."""
        monkeypatch.setattr(web_server, "MAX_CONNECTIONS", 4)
        monkeypatch.setattr(web_server, "_LINGER_SECONDS", 3600.0)
        async with serving(one_port()) as server:
            writers = []
            for _ in range(20):
                reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
                writers.append(writer)
                writer.write(POST + b"Content-Length: 99999\r\n\r\n")
                assert b"413" in await asyncio.wait_for(reader.readline(), 10)
            assert len(server._open) == 4
            assert (await fetch(server, "/-/healthy")).status == 200
            for writer in writers:
                writer.close()

    async def test_new_ones_have_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """If all held connections have been served, a new client is not replaced by later ones."""
        monkeypatch.setattr(web_server, "MAX_CONNECTIONS", 8)
        request = b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n"

        async with serving(one_port()) as server:
            numbers = iter(range(1, 100))

            async def connected() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
                """Return a connection from a new host, once it has been accepted."""
                number = next(numbers)
                pair = await asyncio.open_connection(
                    "127.0.0.1", port_of(server), local_addr=(f"127.0.1.{number}", 0)
                )
                port = pair[1].get_extra_info("sockname")[1]
                await eventually(lambda: port in peers(server))
                return pair

            held = []
            for _ in range(8):
                reader, writer = await connected()
                writer.write(request)
                assert b"200" in await asyncio.wait_for(reader.readline(), 10)
                held.append(writer)
            reader, writer = await connected()
            others = [await connected() for _ in range(3)]
            writer.write(request)
            assert b"200" in await asyncio.wait_for(reader.readline(), 10)
            for each in (writer, *held, *(other for _, other in others)):
                each.close()


class TestProtocols:
    async def test_tls_to_a_plain_port(self, caplog: pytest.LogCaptureFixture) -> None:
        """A TLS client of a plain port gets an error at once, and the log has one line for it."""
        async with serving(one_port()) as server:
            with pytest.raises(ssl.SSLError):
                await asyncio.wait_for(
                    asyncio.open_connection(
                        "127.0.0.1", port_of(server), ssl=ssl.create_default_context()
                    ),
                    10,
                )
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
            writer.write(b"\x16\x03\x01")
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
        # From the first line, Go's client recognizes the error and reports it.
        assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert answer.endswith(b"\r\n\r\nClient sent a TLS handshake to an HTTP server.\n")
        events = [r for r in caplog.records if r.levelname != "INFO"]
        assert [r.getMessage() for r in events] == [
            "client sent a TLS handshake to an HTTP server"
        ] * 2
        assert vars(events[0])["fields"] == {"client": "127.0.0.1"}

    @pytest.mark.parametrize(
        "request_",
        [
            b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST /-/reload HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n"
            + b"x" * 500_000,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\r\n",
        ],
    )
    async def test_plain_to_a_tls_port(
        self, request_: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An HTTP client of a TLS port gets an error at once, and the log has one line for it."""
        async with serving(one_port(), web=secured(tmp_path)) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
            writer.write(request_)
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            await eventually(lambda: not server._open)
        assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert answer.endswith(b"\r\n\r\nClient sent an HTTP request to an HTTPS server.\n")
        (event,) = (r for r in caplog.records if r.levelname != "INFO")
        assert event.getMessage() == "client sent an HTTP request to an HTTPS server"

    @pytest.mark.parametrize("first", [b"\x00", b"\x80.\x01\x03\x01", b"\xff", b"\x03\x00\x00\x13"])
    async def test_neither(self, first: bytes, tmp_path: Path) -> None:
        """Other protocols, such as SSLv2 or RDP, are cut off at once on both kinds of port."""
        for web in (None, secured(tmp_path)):
            async with serving(one_port(), web=web) as server:
                reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
                writer.write(first + bytes(400))
                with suppress(ConnectionResetError):
                    answer = await asyncio.wait_for(reader.read(), 10)
                    assert answer.startswith(b"HTTP/1.1 400 ") or web
                writer.close()

    async def test_looking_in(self, caplog: pytest.LogCaptureFixture) -> None:
        """A client that only connects and disconnects, like a load balancer, leaves no log line."""
        async with serving(one_port()) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
            await eventually(lambda: server._open)
            writer.close()
            await eventually(lambda: not server._open)
        assert [r for r in caplog.records if r.levelname != "INFO"] == []


class TestPrefix:
    async def test_prefix(self) -> None:
        """All endpoints are only below the prefix, and / redirects to the page."""
        async with serving(one_port(), mount=Mount("/a.b/c")) as server:

            async def look(path: str, method: str = "GET") -> tuple[int, str | None]:
                response = await fetch(server, path, method)
                return response.status, response.headers["Location"]

            for path in ("/metrics", "/", "/-/healthy", "/-/ready"):
                assert await look(f"/a.b/c{path}") == (200, None)
            assert await look("/a.b/c/-/reload", "POST") == (200, None)
            for path in ("/metrics", "/-/healthy", "/-/ready", "/a.b/", "/aXb/c/", "/a.b/c/no"):
                assert await look(path) == (404, None)
            assert await look("/-/reload", "POST") == (404, None)
            # The redirect is relative, so that it works behind a proxy that adds a path.
            assert await look("/") == (302, "./a.b/c/")
            assert await look("/a.b/c") == (302, "./c/")
            assert await look("/", "HEAD") == (302, "./a.b/c/")
            assert (await look("/", "POST"))[0] == 405

    async def test_external_url(self) -> None:
        """With an external URL, / redirects to that URL, as in blackbox_exporter."""
        mount = paths.mount("https://proxy.example/sub/", "/here")
        async with serving(one_port(), mount=mount) as server:
            response = await fetch(server, "/", headers={"Host": "evil.example"})
            assert response.headers["Location"] == "https://proxy.example/sub/"
            assert (await fetch(server, "/here/metrics")).status == 200

    @pytest.mark.parametrize("prefix", ["", "/sub"])
    @pytest.mark.parametrize("path", ["/metrics", "/a:b/c"])
    async def test_links(self, prefix: str, path: str) -> None:
        """Each link of the page leads to an endpoint, also below a proxy's path."""
        async with serving(one_port(), mount=Mount(prefix), path=path) as server:
            page = (await fetch(server, f"{prefix}/")).body.decode()
            nav = page[page.index("<nav") : page.index("</nav>")]
            links = [
                urljoin("http://proxy/path/", link) for link in re.findall('href="(.*?)"', nav)
            ]
            assert len(links) == 3
            for link in links:
                inside = link.removeprefix("http://proxy/path")
                assert (await fetch(server, prefix + inside)).status == 200
        assert re.findall(r"""(?:href|src|action)=["']?/""", page) == []


class TestListen:
    @pytest.mark.parametrize(
        "address",
        [
            *("", "9748", "localhost", "::1:9748", "127.0.0.1:", ":65536", ":-1", ":\u0661"),
            *("[]:1", "vsock://:9748", "[::1]9748", ":9748\n", "a b:1"),
        ],
    )
    def test_malformed(self, address: str) -> None:
        """A malformed address gives an error with its name, before any socket listens."""
        with pytest.raises(ValueError, match="malformed listen address") as caught:
            web_server.bind(["127.0.0.1:0", address])
        assert repr(address) in str(caught.value)

    @pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
    async def test_in_use(self) -> None:
        """An address in use is an error that names it, and the addresses before it are freed."""
        app = handlers.application(State(), no_reload)
        with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            first = f"127.0.0.1:{free.getsockname()[1]}"
            free.close()
            second = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(OSError, match="cannot listen on") as caught:
                web_server.bind([first, second])
            assert str(caught.value) == f"cannot listen on {second}: Address already in use"
            handlers.serve(app, web_server.bind([first])).stop()
        # Tornado leaves a socket that it could not bind to the garbage collector, which warns.
        del caught
        gc.collect()

    def test_unknown_host(self) -> None:
        """An error names the host if its name cannot be resolved."""
        with pytest.raises(OSError, match=r"^cannot listen on a\.\.b:1: not a host name$"):
            web_server.bind(["a..b:1"])

    def test_ipv6(self) -> None:
        """The server listens on an IPv6 address in brackets."""

        async def run() -> int:
            async with serving(one_port(), address="[::1]:0") as server:
                return (await fetch(server, "/-/healthy", host="::1")).status

        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")
        assert asyncio.run(run()) == 200

    async def test_where_it_listens_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        """The log gives the address of the server, and whether it uses TLS."""
        with caplog.at_level("INFO"):
            async with serving(one_port()) as server:
                address = f"127.0.0.1:{port_of(server)}"
        (event,) = (r for r in caplog.records if r.getMessage() == "listening")
        assert vars(event)["fields"] == {"address": address, "tls": False}

    @pytest.mark.parametrize("address", ["[::]:0", "[0:0:0:0:0:0:0:0]:0", "[::0.0.0.0]:0", ":0"])
    async def test_dual_stack(self, address: str) -> None:
        """The address [::], in any notation, is IPv4 and IPv6, as in exporters in Go."""
        async with serving(one_port(), address=address) as server:
            assert (await fetch(server, "/-/healthy")).status == 200
            if {sock.family for sock in server.sockets} != {socket.AF_INET}:
                assert (await fetch(server, "/-/healthy", host="::1")).status == 200

    async def test_no_ipv6(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without IPv6 in the kernel, the server uses IPv4, and an IPv6 address is an error."""
        plain = socket.socket

        def without(family: int = -1, *others: Any, **named: Any) -> socket.socket:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
            return plain(family, *others, **named)

        with monkeypatch.context() as patched:
            patched.setattr(socket, "socket", without)
            sockets = web_server.bind(["[::]:0"])
            with pytest.raises(OSError, match=r"^cannot listen on \[::1\]:0: "):
                web_server.bind(["[::1]:0"])
        assert [sock.family for sock in sockets] == [socket.AF_INET]
        for sock in sockets:
            sock.close()

    def test_every_address(self) -> None:
        """A port alone means all IPv4 and IPv6 addresses, and several addresses are all used."""
        assert web_server.split(":9748") == ("", 9748)

        async def run() -> tuple[set[socket.AddressFamily], int]:
            app = handlers.application(State(), no_reload)
            both = handlers.serve(app, web_server.bind([":0"]))
            two = handlers.serve(app, web_server.bind(["127.0.0.1:0", "127.0.0.1:0"]))
            found = {sock.family for sock in both.sockets}, len(two.sockets)
            both.stop()
            two.stop()
            return found

        families, count = asyncio.run(run())
        assert socket.AF_INET in families
        assert (socket.AF_INET6 in families) == socket.has_ipv6
        assert count == 2
