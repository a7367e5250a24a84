"""The web server, over real connections to 127.0.0.1."""

from __future__ import annotations

import asyncio
import gc
import gzip
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from socket import gethostname
from typing import Any

import pytest
import trustme
from lab.waiting import eventually
from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from tornado.iostream import IOStream

from dtrace_exporter.listeners import SessionId
from dtrace_exporter.reloads import Reloads
from dtrace_exporter.state import SessionStatus, State
from dtrace_exporter.web import handlers
from dtrace_exporter.web import server as web_server
from dtrace_exporter.web.configuration import WebConfigFile
from dtrace_exporter.web.server import Server
from web_serving import HOSTILE, Response, fetch, get, no_reload, one_port, port_of, serving

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def openmetrics(response: Response) -> dict[str, Metric]:
    """Return the families of an OpenMetrics answer by name."""
    parsed = parse_openmetrics(response.body.decode())  # type: ignore[no-untyped-call]
    return {family.name: family for family in parsed}


def peers(server: Server) -> list[int]:
    """Return the clients' ports of the connections that are open."""
    sockets = (each.socket if isinstance(each, IOStream) else each for each in server._open)
    return [each.getpeername()[1] for each in sockets]


def reload_after(go: asyncio.Event) -> Callable[[], Awaitable[None]]:
    """Return a reload that lasts until an event."""

    async def reload() -> None:
        await go.wait()

    return reload


class TestMetrics:
    def test_text(self) -> None:
        """Without an Accept header the answer is the text format."""
        response = get(one_port(), "/metrics")
        assert response.status == 200
        assert response.headers["Content-Type"] == choose_encoder("")[1]
        text = response.body.decode()
        assert (
            'dtrace_tcp_listen_syns_total{address="*",listener="ssh",netns="",port="22"} 3.0'
            in (text.splitlines())
        )
        assert {"dtrace_session_up", "python_info"} <= {f.name for f in parse_text(text)}

    def test_openmetrics(self) -> None:
        """A scraper that accepts OpenMetrics gets it, and it parses by the strict parser."""
        response = get(one_port(), "/metrics", headers={"Accept": OPENMETRICS})
        assert response.headers["Content-Type"] == choose_encoder(OPENMETRICS)[1]
        families = openmetrics(response)
        assert families["dtrace_tcp_listen_syns"].samples[0].value == 3

    @pytest.mark.parametrize(
        "accept", ["text/plain;version=x", "application/openmetrics-text;version=1.x"]
    )
    def test_odd_accept(self, accept: str) -> None:
        """A version that is no version is answered, not failed on."""
        assert get(one_port(), "/metrics", headers={"Accept": accept}).status == 200

    def test_gzip(self) -> None:
        """The answer is compressed for a client that takes gzip, and for no other."""
        compressed = get(one_port(), "/metrics", headers={"Accept-Encoding": "br, gzip;q=0.5"})
        assert compressed.headers["Content-Encoding"] == "gzip"
        assert b"dtrace_tcp_listen_syns_total" in gzip.decompress(compressed.body)
        for refusing in (None, "", "br", "gzip;q=0", "GZIP ; q=0.000", "x-gzip", "gzip;q=0, br"):
            headers: dict[str, str] = {} if refusing is None else {"Accept-Encoding": refusing}
            answer = get(one_port(), "/metrics", headers=headers)
            assert "Content-Encoding" not in answer.headers

    def test_many_listeners(self) -> None:
        """An answer of many pieces comes whole, with its length, compressed or not."""
        state = one_port()
        session = SessionId("", "port-22")
        state.table.watch(session, None)
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
        """name[] picks samples; an empty one is as none, as prometheus_client has it."""
        target = "/metrics?name[]=dtrace_session_up&name[]=dtrace_tcp_listen_syns_total"
        lines = get(one_port(), target).body.decode().splitlines()
        assert [line.split("{")[0] for line in lines if not line.startswith("#")] == [
            "dtrace_tcp_listen_syns_total",
            "dtrace_session_up",
        ]
        assert b"python_info" in get(one_port(), "/metrics?name[]=").body

    def test_path(self) -> None:
        """The metrics are at the path asked for and only there, also when it has odd characters."""

        async def both() -> list[int]:
            async with serving(one_port(), path="/a.b+c") as server:
                paths = ("/a.b+c", "/aXb+c", "/metrics")
                return [(await fetch(server, path)).status for path in paths]

        assert asyncio.run(both()) == [200, 404, 404]

    def test_hostile_name(self) -> None:
        """A listener name with quotes, a backslash and a newline comes back whole."""
        response = get(one_port(HOSTILE), "/metrics", headers={"Accept": OPENMETRICS})
        families = openmetrics(response)
        assert families["dtrace_tcp_listen_syns"].samples[0].labels["listener"] == HOSTILE

    def test_keep_alive(self) -> None:
        """One connection carries one scrape after the other."""

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
        """The exporter is healthy while it answers, whatever its sessions do."""
        state = one_port()
        state.sessions[SessionId("", "port-22")].up = False
        assert get(state, "/-/healthy").status == 200

    def test_ready(self) -> None:
        """It is ready with all sessions up."""
        assert get(one_port(), "/-/ready").status == 200

    def test_not_ready_before_the_configuration_is(self) -> None:
        """Without any session it is not ready either, until the configuration is applied."""
        assert get(State(), "/-/ready").status == 503
        assert get(State(last_reload_success=1.5e9), "/-/ready").status == 200

    def test_not_ready(self) -> None:
        """A session that is down makes it 503, with one line for each that says why."""
        state = one_port()
        state.sessions[SessionId("", "port-80")] = SessionStatus(reason="no\nprobes \udcff")
        state.sessions[SessionId("sol10", "all")] = SessionStatus()
        response = get(state, "/-/ready")
        assert response.status == 503
        assert response.body == b"port-80: no probes ?\nsol10/all: starting\n"


class TestReload:
    def test_reload(self) -> None:
        """POST reads the configuration again."""
        calls = []

        async def reload() -> None:
            calls.append(1)

        assert get(one_port(), "/-/reload", "POST", reload=reload).status == 200
        assert calls == [1]

    def test_failure(self) -> None:
        """A reload that fails is a 500 that says where to look, and shows nothing of the file."""

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
                    # Nobody tells when a server has heard a request or a hang-up.
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
            # A stranger's name that leads here: its page has our origin.
            ({"Origin": "http://evil.example", "Host": "evil.example"}, 403),
            ({"Origin": "http://localhost.evil.example", "Host": "localhost.evil.example"}, 403),
            ({"Origin": "http://127.0.0.1.evil.example", "Host": "127.0.0.1.evil.example"}, 403),
            ({"Host": "any.example"}, 200),
        ],
    )
    def test_origin(self, headers: dict[str, str], status: int) -> None:
        """Another site's page cannot reload through its visitor's browser."""
        calls = []

        async def reload() -> None:
            calls.append(1)

        assert get(one_port(), "/-/reload", "POST", headers, reload).status == status
        assert len(calls) == (status == 200)


class TestMethodsAndPaths:
    @pytest.mark.parametrize("path", ["/metrics", "/", "/-/healthy", "/-/ready"])
    def test_head(self, path: str) -> None:
        """HEAD has the status and headers of GET, and no body."""

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
        """A method that a path does not have is a 405 that names those it has."""
        response = get(one_port(), path, method)
        assert (response.status, response.headers["Allow"]) == (405, allow)
        assert response.body == b"405 Method Not Allowed\n"

    @pytest.mark.parametrize("method", ["GET", "POST", "BREW"])
    @pytest.mark.parametrize("path", ["/nonsense", "/metrics/", "//", "/-/", "/-/healthyx"])
    def test_not_found(self, method: str, path: str) -> None:
        """Every other path is a 404, whatever the method."""
        response = get(one_port(), path, method)
        assert (response.status, response.body) == (404, b"404 Not Found\n")
        assert "Allow" not in response.headers

    @pytest.mark.parametrize("path", ["/metrics", "/", "/-/healthy", "/-/ready", "/no"])
    def test_headers(self, path: str) -> None:
        """No answer names the server's software or lets a browser guess its type."""
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
        """A client that does not finish its request is hung up on."""
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
        """A client that asks for a large answer and reads none of it is hung up on."""
        monkeypatch.setattr(handlers, "_SEND_SECONDS", 0.05)

        async with serving(one_port("x" * 400_000)) as server:
            with socket.create_connection(("127.0.0.1", port_of(server))) as client:
                client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
                # Nobody tells when a server lets go of a connection.
                await eventually(lambda: server._connections)
                await eventually(lambda: not server._connections)

    def test_answers_that_nobody_reads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of answers of which each is another one the oldest goes, so that few are kept."""
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
                    # Who reads has all of it.
                    response = await fetch(server, "/metrics")
                    assert len(response.body) > 8_000_000

        asyncio.run(run())

    def test_who_gives_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """For a new connection the host with most loses its longest idle one, none that is busy."""
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

    @pytest.mark.parametrize("speaking", [False, True])
    def test_ties_fall_on_strangers(
        self, monkeypatch: pytest.MonkeyPatch, *, speaking: bool
    ) -> None:
        """Of hosts with one connection each, those that come last lose theirs, no older scraper."""
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
        """A client that keeps its connection busy has its answer and no other under old rules."""
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
        """Once its certificate has expired a client gets nothing, on its connection or another."""
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

    def test_large_header(self) -> None:
        """A header beyond the limit gets the connection closed, not stored."""

        async def send() -> bytes:
            async with serving(one_port()) as server:
                reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
                writer.write(b"GET / HTTP/1.1\r\nX: " + b"x" * (2 * web_server.MAX_HEADER_BYTES))
                try:
                    return await asyncio.wait_for(reader.read(), 10)
                except ConnectionResetError:
                    return b""
                finally:
                    writer.close()

        assert asyncio.run(send()) == b""

    def test_large_body(self) -> None:
        """A body beyond the limit is refused before it is read."""
        length = {"Content-Length": str(web_server.MAX_BODY_BYTES + 1)}
        assert get(one_port(), "/-/reload", "POST", length).status in (400, 413)


class TestListen:
    @pytest.mark.parametrize(
        "address",
        [
            *("", "9748", "localhost", "::1:9748", "127.0.0.1:", ":65536", ":-1", ":\u0661"),
            *("[]:1", "vsock://:9748", "[::1]9748", ":9748\n", "a b:1"),
        ],
    )
    def test_malformed(self, address: str) -> None:
        """An address that is none is refused by name, before anything is listened on."""
        with pytest.raises(ValueError, match="malformed listen address") as caught:
            web_server.bind(["127.0.0.1:0", address])
        assert repr(address) in str(caught.value)

    @pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
    async def test_in_use(self) -> None:
        """An address in use is an error that names it; those before it are let go again."""
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
        # Tornado leaves the socket that it could not bind to the collector, and to its warning.
        del caught
        gc.collect()

    def test_unknown_host(self) -> None:
        """A host that cannot be looked up is named in the error."""
        with pytest.raises(OSError, match=r"^cannot listen on a\.\.b:1: not a host name$"):
            web_server.bind(["a..b:1"])

    def test_ipv6(self) -> None:
        """An IPv6 address in brackets is served."""

        async def run() -> int:
            async with serving(one_port(), address="[::1]:0") as server:
                return (await fetch(server, "/-/healthy", host="::1")).status

        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")
        assert asyncio.run(run()) == 200

    async def test_where_it_listens_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        """The log says where it serves, and whether by TLS."""
        with caplog.at_level("INFO"):
            async with serving(one_port()) as server:
                address = f"127.0.0.1:{port_of(server)}"
        (event,) = (r for r in caplog.records if r.getMessage() == "listening")
        assert vars(event)["fields"] == {"address": address, "tls": False}

    def test_every_address(self) -> None:
        """A port alone means every address of IPv4 and IPv6; several addresses are all served."""
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
