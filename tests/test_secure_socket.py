"""TLS connections within this process, with clients that do what no honest client does."""

from __future__ import annotations

import asyncio
import hmac
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import bcrypt
import pytest
import trustme
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from lab.waiting import eventually

from dtrace_exporter.web import server as web_server
from dtrace_exporter.web.configuration import WebConfigFile
from hard_keys import certificate
from secured_service import Pki, basic
from step_meter import metered
from web_serving import one_port, port_of, serving

UPDATES = 50_000
STEP_MS = 100
HARD = 5
"""It takes half a second to decode so many certificates with hard keys."""
CROWD = 60
TURN_MS = 40
"""All at once would take a hundred milliseconds."""
PASSWORD = "correct horse battery staple"
HASH = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
REQUEST = b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    """An authority and the server's certificate."""
    return Pki(tmp_path)


@pytest.fixture
def web(tmp_path: Path, pki: Pki) -> WebConfigFile:  # noqa: ARG001
    """A web configuration with TLS."""
    file = tmp_path / "web.yml"
    file.write_text(
        "tls_server_config: {cert_file: server.pem, key_file: server.key}", encoding="ascii"
    )
    return WebConfigFile(file)


def derived(secret: bytes, label: str, size: int) -> bytes:
    """Return what HKDF-Expand-Label of RFC 8446, 7.1, derives from a secret of SHA-384."""
    name = f"tls13 {label}".encode()
    info = size.to_bytes(2) + bytes([len(name)]) + name + b"\0"
    return hmac.digest(secret, info + b"\1", "sha384")[:size]


def record(secret: bytes, kind: int, content: bytes) -> bytes:
    """Return the first record under a client's secret, for TLS_AES_256_GCM_SHA384."""
    head = b"\x17\x03\x03" + (len(content) + 17).to_bytes(2)
    key, nonce = derived(secret, "key", 32), derived(secret, "iv", 12)
    return head + AESGCM(key).encrypt(nonce, content + bytes([kind]), head)


def updates(secret: bytes, number: int) -> Iterator[bytes]:
    """Yield updates of a client's key, and after them a request under the last one."""
    for _ in range(number):
        yield record(secret, 22, b"\x18\0\0\1\0")
        secret = derived(secret, "traffic upd", 48)
    yield record(secret, 23, REQUEST)


def shaken(port: int, pki: Pki, keys: Path) -> tuple[socket.socket, bytes]:
    """Return a raw connection after a TLS handshake, and the client's secret."""
    tls = pki.trusting()
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    tls.keylog_filename = str(keys)
    raw = socket.create_connection(("127.0.0.1", port), 30)
    secure = tls.wrap_socket(raw, server_hostname="localhost")
    assert secure.cipher() == ("TLS_AES_256_GCM_SHA384", "TLSv1.3", 256)
    (line,) = (
        line
        for line in keys.read_text(encoding="ascii").splitlines()
        if line.startswith("CLIENT_TRAFFIC_SECRET_0 ")
    )
    raw = socket.socket(fileno=secure.detach())
    raw.settimeout(60)
    return raw, bytes.fromhex(line.split()[2])


async def test_key_updates(
    web: WebConfigFile, pki: Pki, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Endless key updates of a client are read in small steps, and others get their turn."""
    with metered() as meter:
        async with serving(one_port(), web=web) as server:
            port = port_of(server)
            raw, secret = await asyncio.to_thread(shaken, port, pki, tmp_path / "keys")
            with raw:
                flood = await asyncio.to_thread(lambda: b"".join(updates(secret, UPDATES)))
                meter.longest = 0.0
                used = time.thread_time()
                await asyncio.to_thread(raw.sendall, flood)
                assert await asyncio.to_thread(raw.recv, 100)
                used = time.thread_time() - used
    with capsys.disabled():
        print(  # noqa: T201
            f"\n    longest step {1000 * meter.longest:.0f} ms of {used:.2f} s", end=" "
        )
    assert 1000 * meter.longest < STEP_MS, meter.what


async def longest_turn(said: Sequence[tuple[socket.socket, bytes]]) -> float:
    """Have many clients say something at once, and wait until each has an answer.

    Returns:
        The longest turn of the event loop meanwhile, in milliseconds of processor time.
    """
    # The server does not run before all of them have said it.
    for client, data in said:
        client.sendall(data)
    loop = asyncio.get_running_loop()
    answers = loop.run_in_executor(None, lambda: [one.recv(100) for one, _ in said])
    longest, before = 0.0, time.thread_time()
    while not answers.done():
        await asyncio.sleep(0)
        now = time.thread_time()
        longest, before = max(longest, now - before), now
    assert all(await answers)
    return 1000 * longest


async def test_key_updates_of_many(
    web: WebConfigFile, pki: Pki, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of many clients that update their keys at once, only a few are read in a turn of the loop."""
    async with serving(one_port(), web=web) as server:
        with ExitStack() as stack:
            said = []
            for number in range(CROWD):
                keys = tmp_path / f"keys{number}"
                raw, secret = await asyncio.to_thread(shaken, port_of(server), pki, keys)
                said.append((stack.enter_context(raw), b"".join(updates(secret, 100))))
            turn = await longest_turn(said)
    with capsys.disabled():
        print(f"\n    longest turn {turn:.0f} ms", end=" ")  # noqa: T201
    assert turn < TURN_MS


async def test_requests_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Likewise of many requests; and one of thousands of headers is refused before it is parsed."""
    data = b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n" + b"a:b\r\n" * 2500 + b"\r\n"
    async with serving(one_port()) as server:
        with ExitStack() as stack:
            address = "127.0.0.1", port_of(server)
            clients = [
                stack.enter_context(socket.create_connection(address, 60)) for _ in range(CROWD)
            ]
            turn = await longest_turn([(client, data) for client in clients])
    with capsys.disabled():
        print(f"\n    longest turn {turn:.0f} ms", end=" ")  # noqa: T201
    assert turn < TURN_MS


async def test_many_headers() -> None:
    """A hundred headers are more than any scraper sends."""
    async with serving(one_port()) as server:
        for headers, status in ((90, b"200"), (100, b"431")):
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
            writer.write(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n" + b"a:b\r\n" * headers)
            writer.write(b"Connection: close\r\n\r\n")
            answer = await reader.read()
            assert answer.split()[1] == status
            writer.close()
            await writer.wait_closed()


@pytest.fixture
def verifying(tmp_path: Path, web: WebConfigFile, pki: Pki) -> WebConfigFile:  # noqa: ARG001
    """A web configuration that asks for clients' certificates."""
    file = tmp_path / "verifying.yml"
    file.write_text(
        "tls_server_config: {cert_file: server.pem, key_file: server.key, client_ca_file: ca.pem,"
        " client_auth_type: RequireAndVerifyClientCert}",
        encoding="ascii",
    )
    return WebConfigFile(file)


def with_chain(pki: Pki, place: Path, by: trustme.CA, more: str) -> ssl.SSLContext:
    """Return the context of a client that sends more certificates than its own."""
    own = by.issue_cert("good.example")
    (place / "chain.pem").write_text(own.cert_chain_pems[0].bytes().decode() + more, "ascii")
    own.private_key_pem.write_to_path(str(place / "client.key"))
    tls = pki.trusting()
    tls.load_cert_chain(place / "chain.pem", place / "client.key")
    return tls


def status(
    port: int, tls: ssl.SSLContext, host: str = "127.0.0.1", request: bytes = REQUEST
) -> bytes:
    """Return the status of a request from an address, empty if the client is not let in."""
    try:
        with (
            socket.create_connection(("127.0.0.1", port), 60, (host, 0)) as raw,
            tls.wrap_socket(raw, server_hostname="localhost") as client,
        ):
            client.sendall(request)
            return b"".join(client.recv(100).split()[1:2])
    except OSError:
        return b""


async def test_hard_keys(
    verifying: WebConfigFile,
    pki: Pki,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Certificates of strangers that take long to decode block neither the loop nor others."""
    monkeypatch.setattr(web_server, "_HANDSHAKE_SECONDS", 600.0)
    stranger = with_chain(pki, tmp_path, trustme.CA(), certificate() * HARD)
    with metered() as meter:
        async with serving(one_port(), web=verifying) as server:
            asked = [
                asyncio.to_thread(status, port_of(server), tls, f"127.0.0.{number}")
                for number, tls in enumerate([*[stranger] * 3, pki.trusting("good.example")], 1)
            ]
            assert await asyncio.gather(*asked) == [b"", b"", b"", b"200"]
    with capsys.disabled():
        print(f"\n    longest step {1000 * meter.longest:.0f} ms", end=" ")  # noqa: T201
    assert 1000 * meter.longest < STEP_MS, meter.what


@pytest.mark.parametrize(("more", "served"), [(5, b"200"), (40, b"")])
async def test_long_chains(
    verifying: WebConfigFile, pki: Pki, tmp_path: Path, more: int, served: bytes
) -> None:
    """A client is let in only if its handshake, with its certificates, has at most 16 KB."""
    junk = pki.authority.cert_pem.bytes().decode() * more
    tls = with_chain(pki, tmp_path, pki.authority, junk)
    async with serving(one_port(), web=verifying) as server:
        assert await asyncio.to_thread(status, port_of(server), tls) == served


async def test_a_password_is_remembered(
    tmp_path: Path,
    web: WebConfigFile,  # noqa: ARG001
    pki: Pki,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client with a password but no certificate does not wait for strangers the next time."""
    gone, forget = asyncio.Event(), web_server.Server._forget

    def forgotten(server: web_server.Server, connection: object) -> None:
        forget(server, connection)  # type: ignore[arg-type]
        gone.set()

    monkeypatch.setattr(web_server.Server, "_forget", forgotten)
    file = tmp_path / "both.yml"
    file.write_text(
        "tls_server_config: {cert_file: server.pem, key_file: server.key, client_ca_file: ca.pem,"
        f" client_auth_type: VerifyClientCertIfGiven}}\nbasic_auth_users: {{prometheus: {HASH}}}",
        encoding="ascii",
    )
    header = basic("prometheus", PASSWORD)["Authorization"].encode()
    request = REQUEST.replace(b"Host: x", b"Host: x\r\nAuthorization: " + header)
    async with serving(one_port(), web=WebConfigFile(file)) as server:
        ask = partial(status, port_of(server), pki.trusting(), "127.0.0.1", request)
        assert await asyncio.to_thread(ask) == b"200"
        await gone.wait()
        # Strangers have all places.
        server._handshakes._free = asyncio.Semaphore(0)
        assert await asyncio.to_thread(ask) == b"200"


async def test_known_hosts_have_time_to_shake_hands(verifying: WebConfigFile) -> None:
    """A connection of a host that has been let in before is not closed for those of strangers."""
    async with serving(one_port(), web=verifying) as server:
        server._limit = 3
        server._handshakes.remember("127.0.0.1")
        with ExitStack() as held:
            for number in range(1, 9):
                host = f"127.0.0.{number}"
                client = socket.create_connection(("127.0.0.1", port_of(server)), 60, (host, 0))
                held.enter_context(client)
                await eventually(partial(server._hosts.__contains__, host))
            hosts = sorted(server._hosts)
        assert hosts == ["127.0.0.1", "127.0.0.7", "127.0.0.8"]
