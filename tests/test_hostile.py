"""Hostile web clients against the real process, while an honest client scrapes.

Each attack prints its cost: the honest client's longest scrape and the service's largest
resident memory, beside the values without an attack.
"""

from __future__ import annotations

import json
import re
import resource
import select
import selectors
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import bcrypt
import pytest
from lab.waiting import until

from dtrace_exporter.log import MOST
from fake_steps import FakeDTrace
from linux_rows import ACCEPTED, ESTABLISHED, Q_FULL, TAKEN, counted, told
from secured_service import Pki, Service, basic, running

SCRAPER = Path(__file__).with_name("honest_scraper.py")
CROWD = 200
IDLE = 10_000
HANDSHAKES = 1000
LISTENERS = 10
MANY = 5000
LONGEST = 3.0
ATTACK_SECONDS = 2.0
"""An attack is repeated for at least so long, so that scrapes happen during it."""
GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n"
BODY = b"POST /-/reload HTTP/1.1\r\nHost: x\r\n"
POST = BODY + b"Content-Length: 4\r\n"

ROWS = [
    row
    for number in range(1, LISTENERS + 1)
    for row in (
        "0 " + told(22, place=4026531840, socket=number, bound=f"127.0.0.{number}", qmax=8),
        *(
            "0 " + counted(22, 5, what, place=4026531840, socket=number, part=part, value=3)
            for what, part in (
                (TAKEN, 0),
                (Q_FULL, 0),
                (ESTABLISHED, 0),
                (ACCEPTED, 0),
                (ACCEPTED, 6),
            )
        ),
    )
]


def fake_with_listeners(fake_dtrace: FakeDTrace) -> FakeDTrace:
    """Return a fake dtrace(1) that reports a few listeners."""
    return lambda: fake_dtrace({"ready": "4026531840"}, {"rows": ROWS}, {"tick": True})


def memory(service: Service, name: str) -> float:
    """Return VmRSS, the resident memory, or VmHWM, its peak, in megabytes."""
    status = Path(f"/proc/{service.process.pid}/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def forget_peak(service: Service) -> None:
    """Reset the peak of the resident memory."""
    Path(f"/proc/{service.process.pid}/clear_refs").write_text("5", encoding="ascii")


@contextmanager
def scraping(service: Service, ca: str = "", authorization: str = "") -> Iterator[dict[str, Any]]:
    """Scrape honestly until the block ends, and then fill the yielded dict with the results."""
    words = [str(service.port), ca, authorization, str(service.process.pid)]
    command = [sys.executable, str(SCRAPER), *words]
    seen: dict[str, Any] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as scraper:
        assert scraper.stdout is not None
        assert scraper.stdout.readline() == b"\n"
        yield seen
        out, _ = scraper.communicate(timeout=60)
    seen.update(json.loads(out))


def endure(
    service: Service,
    attack: Callable[[], object],
    capsys: pytest.CaptureFixture[str],
    ca: str = "",
    authorization: str = "",
    again: bool = True,
) -> None:
    """Attack while an honest client scrapes: it is served and the memory does not double.

    A scrape should take less than a second. This time is only printed; the limit is on the CPU time
    that the service uses for a scrape, because the machine may be busy with other processes.
    """
    with scraping(service, ca, authorization) as quiet:
        time.sleep(1)
    before = memory(service, "VmRSS")
    forget_peak(service)
    began = time.monotonic()
    with scraping(service, ca, authorization) as hostile:
        attack()
        while again and time.monotonic() - began < ATTACK_SECONDS:
            attack()
    took = time.monotonic() - began
    peak = memory(service, "VmHWM")
    with capsys.disabled():
        print(  # noqa: T201
            f"\n    {took:.1f} s of it: {hostile['scrapes']} scrapes, longest "
            f"{hostile['longest']:.3f} s (quiet {quiet['longest']:.3f} s) with "
            f"{hostile['most']:.2f} s of processor time, memory at most "
            f"{peak:.0f} MB (quiet {before:.0f} MB)",
            end=" ",
        )
    assert quiet["wrong"] == hostile["wrong"] == []
    assert hostile["most"] < LONGEST
    assert peak < 2 * before
    assert service.process.poll() is None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory for the services of this module."""
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture
def service(tmp_path: Path, fake_dtrace: FakeDTrace) -> Iterator[Service]:
    """Run the service over plain HTTP, with a few listeners."""
    with running(tmp_path, "{}", fake_with_listeners(fake_dtrace)) as service:
        until(lambda: b'address="127.0.0.1"' in scrape(service))
        yield service


@pytest.fixture
def secure(
    tmp_path: Path, fake_dtrace: FakeDTrace
) -> Iterator[tuple[Service, ssl.SSLContext, str]]:
    """Run the service over TLS, and yield it, a client's context and the file of its CA."""
    pki = Pki(tmp_path)
    web = "tls_server_config: {cert_file: server.pem, key_file: server.key}"
    with running(tmp_path, web, fake_with_listeners(fake_dtrace)) as service:
        yield service, pki.trusting(), str(tmp_path / "ca.pem")


def connect(service: Service) -> socket.socket:
    """Return a connection to the service from another address than the honest client's."""
    address = "127.0.0.1", service.port
    return socket.create_connection(address, timeout=30, source_address=("127.0.0.2", 0))


def exchange(service: Service, request: bytes) -> bytes:
    """Send bytes, and return the answer up to its end, which may be empty."""
    with connect(service) as client:
        with suppress(ConnectionError):
            client.sendall(request)
        answer = b""
        with suppress(ConnectionError):
            while chunk := client.recv(1 << 16):
                answer += chunk
        return answer


def scrape(service: Service) -> bytes:
    """Return the answer of a scrape."""
    return exchange(service, GET + b"Connection: close\r\n\r\n")


def test_slow_headers(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Many clients that send their headers byte by byte do not delay scrapes or cost memory."""

    def attack() -> None:
        with ExitStack() as stack:
            clients = [stack.enter_context(connect(service)) for _ in range(CROWD)]
            for byte in GET:
                for client in clients:
                    with suppress(ConnectionError):
                        client.send(bytes([byte]))

    endure(service, attack, capsys)


def test_endless_headers(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """A client whose headers do not end is disconnected at a limit."""

    def attack() -> None:
        for start in (b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nX: ", b"GET /"):
            for _ in range(50):
                with connect(service) as client, suppress(ConnectionError):
                    client.sendall(start)
                    for _ in range(10_000):
                        client.sendall(b"X: y\r\n" * 1000 if start.endswith(b"\n") else b"x" * 6000)
                    raise AssertionError("it takes headers without end")

    endure(service, attack, capsys)


def idle(service: Service, number: int, *, handshake: ssl.SSLContext | None, shaken: int) -> None:
    """Open and hold connections that send nothing, some of them after a TLS handshake."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < number + 200:
        pytest.skip(f"the hard limit of open files is {hard}: too low for {number} connections")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number + 200), hard))
    try:
        with ExitStack() as stack, selectors.DefaultSelector() as connecting:
            for _ in range(shaken):
                client = stack.enter_context(connect(service))
                with suppress(OSError):
                    assert handshake
                    stack.enter_context(handshake.wrap_socket(client, server_hostname="localhost"))
            for _ in range(number - shaken):
                client = stack.enter_context(socket.socket())
                client.bind(("127.0.0.2", 0))
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", service.port))
                connecting.register(client, selectors.EVENT_WRITE)
            end = time.monotonic() + 10
            while connecting.get_map() and time.monotonic() < end:
                for key, _ in connecting.select(1):
                    connecting.unregister(key.fileobj)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_idle_connections(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten thousand idle connections do not keep other clients out."""
    endure(service, lambda: idle(service, IDLE, handshake=None, shaken=0), capsys, again=False)


def test_idle_tls_connections(
    secure: tuple[Service, ssl.SSLContext, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten thousand idle connections over TLS, most without a handshake, keep nobody out."""
    service, tls, ca = secure
    attack = lambda: idle(service, IDLE, handshake=tls, shaken=HANDSHAKES)  # noqa: E731
    endure(service, attack, capsys, ca, again=False)


def test_pipelining(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Clients that send many requests and read no answer get few answers, and delay nobody."""
    request = GET + b"\r\n"

    def attack() -> None:
        with ExitStack() as stack:
            clients = [stack.enter_context(connect(service)) for _ in range(20)]
            for client in clients:
                client.setblocking(False)
            end = time.monotonic() + 3
            for client in cycle(clients):
                with suppress(BlockingIOError, ConnectionError):
                    client.send(request * 1000)
                if time.monotonic() > end:
                    break

    endure(service, attack, capsys)


def test_pipelining_is_answered_in_order(service: Service) -> None:
    """Requests that arrive together are answered in their order."""
    targets = [b"/-/healthy", b"/nonsense", b"/-/healthy"]
    requests = [b"GET %s HTTP/1.1\r\nHost: x\r\n" % target for target in targets]
    answer = exchange(service, b"\r\n".join(requests) + b"Connection: close\r\n\r\n")
    assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"200", b"404", b"200"]


def test_huge_bodies(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Bodies that are too large are refused, with and without a Content-Length."""
    start = b"POST /-/reload HTTP/1.1\r\nHost: x\r\n"

    def attack() -> None:
        for _ in range(CROWD):
            big = exchange(service, start + b"Content-Length: 99999999999\r\n\r\n" + b"x" * 10_000)
            assert big.split()[1:2] == [b"413"]
        for _ in range(20):
            with connect(service) as client, suppress(ConnectionError):
                client.sendall(start + b"Transfer-Encoding: chunked\r\n\r\n")
                for _ in range(10_000):
                    client.sendall(b"2000\r\n" + b"x" * 0x2000 + b"\r\n")
                raise AssertionError("it takes a body without end")

    endure(service, attack, capsys)


def test_wrong_protocol(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Clients that speak TLS to a plain port get status 400, and do not fill the log."""
    said = "client sent a TLS handshake to an HTTP server"

    def attack() -> None:
        for _ in range(CROWD):
            assert exchange(service, b"\x16\x03\x01" + bytes(500)).split()[1:2] == [b"400"]

    endure(service, attack, capsys)
    # Meanwhile one minute may end and another begin.
    assert 1 <= service.log().count(said) <= 2 * MOST


def test_many_scrapes_at_once(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Two hundred simultaneous scrapes, repeated, are all answered."""
    request = GET + b"Accept-Encoding: gzip\r\nConnection: close\r\n\r\n"
    statuses: list[bytes] = []

    def attack() -> None:
        for _ in range(3):
            with ExitStack() as stack, selectors.DefaultSelector() as selector:
                for _ in range(CROWD):
                    client = stack.enter_context(connect(service))
                    client.sendall(request)
                    selector.register(client, selectors.EVENT_READ, bytearray())
                while selector.get_map():
                    for key, _ in selector.select():
                        chunk = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                        key.data.extend(chunk)
                        if not chunk:
                            statuses.append(bytes(key.data).split()[1])
                            selector.unregister(key.fileobj)

    endure(service, attack, capsys)
    assert set(statuses) == {b"200"}
    assert len(statuses) % (CROWD * 3) == 0


def test_clients_that_do_not_read(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Clients that request the metrics and do not read them cost little."""

    def attack() -> None:
        with ExitStack() as stack:
            for _ in range(CROWD):
                client = socket.socket()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                stack.enter_context(client)
                client.bind(("127.0.0.2", 0))
                client.connect(("127.0.0.1", service.port))
                client.sendall(GET + b"\r\n")
            time.sleep(2)

    endure(service, attack, capsys)


@pytest.mark.parametrize("target", ["/metrics?name[]=%d", "/?sort=%d"])
def test_scrapes_that_are_given_up(
    service: Service, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clients that request something different each and hang up leave no work behind."""
    numbers = count()

    def attack() -> None:
        for number in islice(numbers, CROWD):
            with connect(service) as client:
                client.sendall(f"GET {target % number} HTTP/1.1\r\nHost: x\r\n\r\n".encode("ascii"))

    endure(service, attack, capsys)


@pytest.mark.parametrize("target", ["/api/v1/listeners?netns=4&name=%s", "/?netns=4&name=%s"])
def test_many_views(
    tmp_path: Path, fake_dtrace: FakeDTrace, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Requests for many different views of 5,000 listeners do not delay scrapes."""
    rows = (
        f"0 listener {(1 << 47 | n) << 13:x} 1 10 4026531840 1 10.0.{n >> 8}.{n & 255} 22 0 0 8"
        for n in range(MANY)
    )
    steps = {"ready": "4026531840"}, {"rows": [*rows]}, {"tick": True}
    statuses: set[bytes] = set()
    with running(tmp_path, "{}", lambda: fake_dtrace(*steps)) as service:
        until(lambda: scrape(service).count(b"\ndtrace_tcp_listen_syns_total{") >= MANY)

        def attack() -> None:
            with ExitStack() as stack, selectors.DefaultSelector() as answered:
                for number in range(20):
                    client = stack.enter_context(connect(service))
                    answered.register(client, selectors.EVENT_READ)
                    wanted = target % "name"[: number % 4]
                    head = f"GET {wanted}&x={number} HTTP/1.1\r\nHost: x\r\n"
                    client.sendall(f"{head}Accept-Encoding: gzip\r\n\r\n".encode())
                for key, _ in answered.select(60):
                    assert isinstance(key.fileobj, socket.socket)
                    statuses.add(key.fileobj.recv(100).split()[1])

        endure(service, attack, capsys)
    assert statuses == {b"200"}


def test_guessing(
    tmp_path: Path, fake_dtrace: FakeDTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flood of wrong passwords does not keep out the right one."""
    hashed = bcrypt.hashpw(b"right", bcrypt.gensalt(10)).decode()
    web = f"basic_auth_users: {{a: {hashed}}}"
    wrong = b"".join(f"{k}: {v}\r\n".encode() for k, v in basic("a", "wrong").items())
    request = GET + b"" + wrong + b"\r\n"
    right = basic("a", "right")["Authorization"]
    with running(tmp_path, web, fake_with_listeners(fake_dtrace)) as service:

        def attack() -> None:
            with ExitStack() as stack:
                clients = [stack.enter_context(connect(service)) for _ in range(CROWD)]
                for client in clients:
                    client.sendall(request)
                for client in select.select(clients, [], [], 30)[0]:
                    with suppress(ConnectionError):
                        assert client.recv(1000).split()[1:2] in ([b"401"], [])

        endure(service, attack, capsys, authorization=right)


@pytest.mark.parametrize(
    ("addresses", "connections", "cost"),
    [(120, 2, 8), (1, 240, 4)],
    ids=["from everywhere", "through a proxy"],
)
def test_guessing_after_a_restart(
    tmp_path: Path,
    fake_dtrace: FakeDTrace,
    capsys: pytest.CaptureFixture[str],
    addresses: int,
    connections: int,
    cost: int,
) -> None:
    """Guesses from many addresses do not lock out a client whose password is not yet known."""
    hashed = bcrypt.hashpw(b"right", bcrypt.gensalt(cost)).decode()
    web = f"basic_auth_users: {{a: {hashed}}}"
    wrong, right = (
        GET + f"Authorization: {basic('a', word)['Authorization']}\r\n".encode()
        for word in ("wrong", "right")
    )
    with (
        running(tmp_path, web, fake_with_listeners(fake_dtrace)) as service,
        ExitStack() as stack,
        selectors.DefaultSelector() as answered,
    ):
        for number in range(addresses * connections):
            source = f"127.0.0.{2 + number % addresses}", 0
            address = "127.0.0.1", service.port
            client = stack.enter_context(socket.create_connection(address, 30, source))
            answered.register(client, selectors.EVENT_READ)
            client.sendall(wrong + b"\r\n")
        began = time.monotonic()
        source = "127.0.0.2" if addresses == 1 else "127.0.0.1", 0
        address = "127.0.0.1", service.port
        honest = stack.enter_context(socket.create_connection(address, 30, source))
        answered.register(honest, selectors.EVENT_READ)
        honest.sendall(right + b"\r\n")
        guesses = 0
        while True:
            readable = [key.fileobj for key, _ in answered.select(30)]
            assert readable
            if honest in readable:
                break
            for guesser in readable:
                assert isinstance(guesser, socket.socket)
                assert guesser.recv(1 << 16).split()[1] == b"401"
                guesser.sendall(wrong + b"\r\n")
                guesses += 1
        took = time.monotonic() - began
        assert honest.recv(100).split()[1] == b"200"
        with capsys.disabled():
            print(f"\n    served after {took:.1f} s and {guesses} guesses", end=" ")  # noqa: T201


def test_reloads(
    tmp_path: Path, fake_dtrace: FakeDTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clients that request reloads and hang up leave at most one reload running."""
    fake = fake_with_listeners(fake_dtrace)
    with running(tmp_path, "{}", fake, "--web.enable-lifecycle") as service:

        def attack() -> None:
            with ExitStack() as stack:
                clients = [stack.enter_context(connect(service)) for _ in range(250)]
                for client in clients:
                    client.sendall(POST + b"\r\nxxxx")
            # This scrape shows that all requests were received.
            assert scrape(service)

        endure(service, attack, capsys)
        # A later client is answered after at most one reload that already runs.
        before = service.log().count('msg="reloaded"')
        assert exchange(service, POST + b"Connection: close\r\n\r\nxxxx").split()[1] == b"200"
        assert 1 <= service.log().count('msg="reloaded"') <= before + 2


@pytest.mark.parametrize(
    ("request_", "statuses"),
    [
        (b"\x00\xff\xfe\x16\x03\x01", (400,)),
        (b"\x16\x03\x01\x02\x00", (400,)),
        (b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"x" * 20_000), (414,)),
        (GET + b"Cookie: %s\r\n\r\n" % (b"x" * 20_000), (431,)),
        (BODY + b"Content-Length: 5000\r\n\r\n" + b"x" * 5000, (413,)),
        (b"\r\n\r\n", (400,)),
        (b"GET /metrics\r\n\r\n", (400,)),
        (b"GET /metrics HTTP/9.9\r\nHost: x\r\n\r\n", (400,)),
        (b"GET /metrics HTTP/1.1\r\n\r\n", (400,)),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", (400,)),
        (GET + b"no colon\r\n\r\n", (400,)),
        (GET + b"X: a\x00b\r\n\r\n", (400,)),
        (GET + b"Transfer-Encoding: x\r\n\r\n", (411,)),
        (BODY + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", (411,)),
        (BODY + b"Transfer-Encoding: chunked, x\r\n\r\n0\r\n\r\n", (411,)),
        (BODY + b"Transfer-Encoding: chunked\r\n\r\n+1\r\nx\r\n0\r\n\r\n", (411,)),
        (BODY + b"Content-Length: +5\r\n\r\nxxxxx", (400,)),
        (BODY + b"Content-Length: 1_0\r\n\r\nxxxxxxxxxx", (400,)),
        (BODY + b"Content-Length : 5\r\n\r\nxxxxx", (400,)),
        (BODY + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nxxxxxx", (400,)),
        (GET + b"Host: y\r\n\r\n", (400,)),
        (GET + b"X\x00: a\r\n\r\n", (400,)),
        (b"GET /metrics\x00 HTTP/1.1\r\nHost: x\r\n\r\n", (400,)),
        (b"GET /metrics HTTP/1.1\r\nHost: x\x00\r\n\r\n", (400,)),
        (GET + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", (411,)),
        (GET + b"Content-Length: -1\r\n\r\n", (400,)),
        (GET + b"Content-Length: 1, 2\r\n\r\n", (400,)),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400,)),
        (b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", (405,)),
        (b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", (405,)),
        (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: x\r\n\r\n", (400, 404, 405)),
        (b"get /metrics HTTP/1.1\r\nHost: x\r\n\r\n", (400, 405)),
        (b"%s /metrics HTTP/1.1\r\nHost: x\r\n\r\n" % (b"A" * 5000), (400, 405)),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", (404,)),
        (b"GET /metrics/../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", (404,)),
        (b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", (404,)),
        (b"GET /..%c0%af..%c0%afetc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", (404,)),
        (b"GET //etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", (404,)),
        (b"GET /templates/index.html HTTP/1.1\r\nHost: x\r\n\r\n", (404,)),
        (b"GET /metrics%00 HTTP/1.1\r\nHost: x\r\n\r\n", (404,)),
        (b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", (400, 404)),
        (b"GET /%ff%fe HTTP/1.1\r\nHost: x\r\n\r\n", (400, 404)),
        (b"GET /metrics?name[]=%ff%fe&\xff HTTP/1.1\r\nHost: x\r\n\r\n", (200, 400)),
        (
            b"GET /metrics?name[]=" + b"x&name[]=" * 1500 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            (200, 400),
        ),
        (b"GET /metrics HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n", (200, 400)),
        (GET + b"Accept: \xff\xfe\r\n\r\n", (200, 400)),
        (GET + b"Accept: " + b"a/b;q=" * 2000 + b"\r\n\r\n", (200,)),
        (GET + b"Accept: ;;,=;version=;\r\n\r\n", (200,)),
        (
            GET + b"Accept: application/openmetrics-text;version=" + b"9" * 5000 + b"\r\n\r\n",
            (200,),
        ),
        (GET + b"Accept: image/png\r\n\r\n", (200,)),
        (GET + b"Accept-Encoding: gzip;q=0\r\n\r\n", (200,)),
        (GET + b"Accept-Encoding: \xff;q=x\r\n\r\n", (200, 400)),
        (GET + b"Range: bytes=0-,0-,0-\r\n\r\n", (200,)),
        (GET + b"Expect: 100-continue\r\n\r\n", (100, 200)),
        (
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n",
            (200,),
        ),
        (b"GET / HTTP/1.1\r\nHost: x\r\nCookie: " + b"a=b;" * 3000 + b"\r\n\r\n", (200, 400)),
        (POST + b"Content-Type: multipart/form-data; boundary=\xff\r\n\r\n\xff\xfe--", (200, 400)),
        (POST + b"Content-Type: multipart/form-data; boundary=a\r\n\r\n--a\n\xff", (200, 400)),
        (POST + b"Content-Encoding: gzip\r\n\r\n\x1f\x8b\x08\x00", (200, 400)),
        (POST + b"X-HTTP-Method-Override: GET\r\n\r\nxxxx", (200,)),
    ],
)
def test_odd_requests(odd: Service, request_: bytes, statuses: tuple[int, ...]) -> None:
    """Each malformed or odd request gets a proper status, and does no harm."""
    if b"Connection: " not in request_:
        request_ = request_.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    with connect(odd) as client:
        client.sendall(request_)
        answer = b""
        with suppress(ConnectionError):
            while chunk := client.recv(1 << 16):
                answer += chunk
    assert int(answer.split()[1]) in statuses
    if b"Accept-Encoding: gzip;q=0" in request_:
        assert b"\ndtrace_tcp_listen_syns_total" in answer
    assert b"root:" not in answer
    assert scrape(odd).startswith(b"HTTP/1.1 200")


@pytest.fixture(scope="module")
def odd(place: Path) -> Iterator[Service]:
    """Run one service for all odd requests; it logs no error."""
    fake = [sys.executable, "-I", "-S", str(Path(__file__).with_name("fake_dtrace.py"))]
    with running(place, "{}", lambda: fake, "--web.enable-lifecycle") as service:
        yield service
    assert "level=error" not in service.log()


def cpu_seconds(service: Service) -> float:
    """Return the CPU time in seconds that the service has used."""
    stat = Path(f"/proc/{service.process.pid}/stat").read_text(encoding="utf-8")
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / 100


def open_files(service: Service) -> int:
    """Return the number of descriptors that the service has open."""
    return len(list(Path(f"/proc/{service.process.pid}/fd").iterdir()))


def test_out_of_descriptors(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a free descriptor the service waits, without a busy loop, until there is one."""
    pid = service.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    until(lambda: scrape(service))
    # Only the service's own descriptors are left, none of connections.
    until(lambda: len({open_files(service) for _ in range(20)}) == 1)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_files(service), limits[1]))
    clients = [connect(service) for _ in range(20)]
    until(lambda: 'msg="cannot accept a connection"' in service.log())
    before = cpu_seconds(service)
    time.sleep(2)
    used = cpu_seconds(service) - before
    with capsys.disabled():
        print(f"\n    {used:.2f} s of processor time in 2 s", end=" ")  # noqa: T201
    assert used < 1
    # Room for two connections: the idle ones give way.
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_files(service) + 2, limits[1]))
    until(lambda: scrape(service).startswith(b"HTTP/1.1 200"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    for client in clients:
        client.close()
    assert scrape(service).startswith(b"HTTP/1.1 200")
    assert service.log().count("cannot accept a connection") < 61
