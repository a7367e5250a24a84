"""Properties of the answers to arbitrary requests, over real connections."""

from __future__ import annotations

import asyncio
import gzip
import re
from email.message import Message
from email.parser import BytesParser
from pathlib import Path
from typing import NamedTuple

import bcrypt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from dtrace_exporter.web import handlers
from dtrace_exporter.web.configuration import WebConfigFile
from dtrace_exporter.web.server import bind
from web_serving import no_reload, one_port, port_of

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW")
ALLOWED = {
    "/": {"GET", "HEAD"},
    "/metrics": {"GET", "HEAD"},
    "/api/v1/listeners": {"GET", "HEAD"},
    "/-/healthy": {"GET", "HEAD"},
    "/-/ready": {"GET", "HEAD"},
    "/-/reload": {"POST"},
}
NAMES = (
    *("Accept", "Accept-Encoding", "Authorization", "Content-Type", "Cookie"),
    *("Expect", "If-None-Match", "Origin", "Range", "Sec-Fetch-Site", "Upgrade", "X-Forwarded-For"),
)
WORDS = (
    *(
        "text/plain",
        "application/openmetrics-text",
        "version=1.0.0",
        "gzip",
        "identity",
        "q=0",
        "*",
    ),
    *("close", "keep-alive", "100-continue", "Basic", "YTpi", "http://localhost", "same-origin"),
    *(",", ";", "=", " ", '"', "\x7f", "\xff", "0", "9" * 30),
)

paths = st.one_of(
    st.sampled_from([*ALLOWED]),
    st.sampled_from([*ALLOWED]).map(lambda path: path + "/"),
    st.text(st.sampled_from("/.-%2e\\metrics\xff~"), max_size=20).map(lambda text: "/" + text),
)
queries = st.one_of(
    st.just(""),
    st.lists(
        st.sampled_from(["name[]", "=", "&", "%", "%ff", "dtrace_session_up", "\xff", ";"])
    ).map(lambda words: "?" + "".join(words)),
)
headers = st.lists(
    st.tuples(st.sampled_from(NAMES), st.lists(st.sampled_from(WORDS), max_size=5).map("".join)),
    max_size=4,
)


class Request(NamedTuple):
    method: str
    path: str
    query: str
    headers: list[tuple[str, str]]
    body: bytes

    def __bytes__(self) -> bytes:
        lines = [f"{self.method} {self.path}{self.query} HTTP/1.1", "Host: localhost"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        lines += [f"Content-Length: {len(self.body)}", "Connection: close"]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self.body


requests = st.builds(
    Request, st.sampled_from(METHODS), paths, queries, headers, st.binary(max_size=20)
)


def ask(
    all_of_it: bytes, web_config: WebConfigFile | None = None, *, to_the_end: bool = True
) -> bytes:
    """Return a server's answer until it closes the connection, or until it is silent."""

    async def run() -> bytes:
        app = handlers.application(one_port(), no_reload, web_config=web_config)
        server = handlers.serve(app, bind(["127.0.0.1:0"]))
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(all_of_it)
        answer = b""
        try:
            while chunk := await asyncio.wait_for(reader.read(1 << 16), 20 if to_the_end else 0.1):
                answer += chunk
        except ConnectionError:
            pass
        except TimeoutError:
            assert not to_the_end
        finally:
            writer.close()
            server.stop()
            await server.close_all_connections()
        return answer

    return asyncio.run(run())


def split(answer: bytes) -> tuple[int, Message, bytes]:
    """Return the status, headers and body of an answer, without a 100 before it."""
    answer = re.sub(rb"\AHTTP/1\.1 100 [^\r]*\r\n\r\n", b"", answer)
    head, _, body = answer.partition(b"\r\n\r\n")
    line, _, fields = head.partition(b"\r\n")
    match = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [ -~]+", line)
    assert match, line
    return int(match[1]), BytesParser().parsebytes(fields), body


@settings(max_examples=300)
@given(requests)
@example(Request("GET", "/metrics", "", [("Accept-Encoding", "gzip;q=0")], b""))
@example(
    Request("GET", "/metrics", "?name[]=%ff", [("Accept", "text/plain;version=" + "9" * 30)], b"")
)
def test_any_request(request: Request) -> None:
    """Every request has one complete answer, with the status of its method and path."""
    status, headers, body = split(ask(bytes(request)))
    if status == 400:
        # Characters that no header or target may have are refused first.
        raw = request.path + request.query + "".join(value for _, value in request.headers)
        assert re.search(r"[\x7f-\xff]|Cookie|%", raw + str(request.headers)), request
        return
    allowed = ALLOWED.get(request.path, set())
    if request.method in allowed:
        assert status == 200 or (request.path == "/-/reload" and status == 403)
    elif allowed:
        assert status == 405
        assert set(headers["Allow"].split(", ")) == allowed
    else:
        assert status in (404, 405)
    assert "Server" not in headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    length = int(headers["Content-Length"])
    assert len(body) == (0 if request.method == "HEAD" else length)
    if status == 200 and request.path == "/metrics" and body:
        text = (gzip.decompress(body) if headers["Content-Encoding"] else body).decode()
        openmetrics = headers["Content-Type"].startswith("application/openmetrics-text")
        parse = parse_openmetrics if openmetrics else parse_text
        list(parse(text))


@settings(max_examples=100)
@given(st.binary(max_size=200) | requests.map(bytes), st.integers(0, 200), st.binary(max_size=3))
def test_any_bytes(data: bytes, place: int, put: bytes) -> None:
    """Bytes that are not a valid request get a 4xx or no answer, never a 500."""
    broken = data[:place] + put + data[place + len(put) :]
    answer = ask(broken + b"\r\n\r\n", to_the_end=False)
    for status in re.findall(rb"^HTTP/1\.1 (\d{3}) ", answer, re.MULTILINE):
        assert status[:1] != b"5"


@pytest.fixture(scope="module")
def protected(tmp_path_factory: pytest.TempPathFactory) -> WebConfigFile:
    """A web configuration with one user."""
    path: Path = tmp_path_factory.mktemp("web") / "web.yml"
    hashed = bcrypt.hashpw(b"right", bcrypt.gensalt(4)).decode()
    path.write_text(f"basic_auth_users: {{a: {hashed}}}", encoding="utf-8")
    return WebConfigFile(path)


@settings(max_examples=100)
@given(requests)
def test_any_request_without_a_password(protected: WebConfigFile, request: Request) -> None:
    """If there are users, a request without the right password gets no data."""
    status, _, body = split(ask(bytes(request), protected))
    known = request.method not in ("TRACE", "BREW")
    assert status in ((400, 401) if known else (400, 404, 405))
    assert b"dtrace_" not in body
