"""Who may use the service, and how: tests of the real process over a fake dtrace(1)."""

from __future__ import annotations

import json
import math
import socket
import ssl
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Protocol

import bcrypt
import pytest
import trustme
from cryptography import x509
from lab.exporter import free_port
from lab.waiting import until

from dtrace_exporter import cli
from dtrace_exporter.web import auth
from exporter_process import EXPORTER, SECONDS, is_alive, run, write
from fake_steps import FOREVER, READY, FakeDTrace
from host_tools import require
from secured_service import Pki, Service, basic, running

PASSWORD = "correct horse battery staple"
HASH = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
PATHS = (
    *("/", "/metrics", "/api/v1/listeners", "/-/healthy", "/-/ready", "/-/reload"),
    "/nonsense",
)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    """Return an authority that has issued the server's certificate."""
    return Pki(tmp_path)


TLS = "tls_server_config: {cert_file: server.pem, key_file: server.key%s}\n"
USERS = "basic_auth_users: {prometheus: %s}\n"


def test_users(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """With users in the web configuration, every path answers 401 without the right password."""
    with running(tmp_path, USERS % HASH, fake_dtrace, "--web.enable-lifecycle") as service:
        for path in PATHS:
            for headers in ({}, basic("prometheus", "wrong"), basic("nobody", PASSWORD)):
                answer = service.ask(path, headers=headers)
                assert answer.status == 401
                assert answer.headers["WWW-Authenticate"].startswith("Basic realm=")
        assert service.status(path="/-/reload", method="POST") == 401
        right = basic("prometheus", PASSWORD)
        statuses = [service.status(path=path, headers=right) for path in PATHS]
        assert statuses == [200, 200, 200, 200, 200, 405, 404]
        assert service.status(path="/-/reload", method="POST", headers=right) == 200


def test_users_are_followed(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """New users get in and old ones do not, without a restart; a bad file is logged once."""
    old, new = basic("prometheus", PASSWORD), basic("new", PASSWORD)
    with running(tmp_path, USERS % HASH, fake_dtrace) as service:
        assert service.status(headers=old) == 200
        service.web.write_text(f"basic_auth_users: {{new: {HASH}}}\n", encoding="utf-8")
        until(lambda: service.status(headers=new) == 200)
        assert service.status(headers=old) == 401
        service.web.write_text(f"basic_auth_users: {{new: {HASH}x}}\n", encoding="utf-8")
        until(lambda: "web configuration changed to a bad one" in service.log())
        assert service.status(headers=new) == 200
        service.web.unlink()
        until(lambda: service.log().count("changed to a bad one") == 2)
        assert service.status(headers=new) == 200
        # Replace the file by a rename, as an administrator should do it.
        (tmp_path / "next").write_text(USERS % HASH, encoding="utf-8")
        (tmp_path / "next").rename(service.web)
        until(lambda: service.status(headers=old) == 200)
        assert service.status(headers=new) == 401
        log = service.log()
    assert log.count("changed to a bad one") == 2
    assert f"{service.web}:1: basic_auth_users: expected a password's bcrypt hash" in log
    assert log.count('msg="web configuration changed"') == 2


def test_certificates_are_followed(tmp_path: Path, fake_dtrace: FakeDTrace, pki: Pki) -> None:
    """The server uses a new certificate without a restart, but not one whose key does not match."""
    other = trustme.CA()
    trusting_other = ssl.create_default_context()
    other.configure_trust(trusting_other)
    with running(tmp_path, TLS % "", fake_dtrace) as service:
        assert service.status(tls=pki.trusting()) == 200
        assert service.status(tls=trusting_other) == 0
        assert service.status() == 400
        pki.renew(other)
        until(lambda: service.status(tls=trusting_other) == 200)
        assert service.status(tls=pki.trusting()) == 0
        pki.renew(key=False)
        until(lambda: "changed to a bad one" in service.log())
        assert service.status(tls=trusting_other) == 200
        pki.renew()
        until(lambda: service.status(tls=pki.trusting()) == 200)
        # A change from TLS to plain HTTP closes the connections that were open.
        with socket.create_connection(("localhost", service.port)) as raw:
            client = pki.trusting().wrap_socket(raw, server_hostname="localhost")
            service.web.write_text("{}", encoding="utf-8")
            until(lambda: service.status() == 200)
            client.settimeout(SECONDS)
            assert client.recv(1) == b""
            client.close()


def test_state_of_the_web_configuration(tmp_path: Path, fake_dtrace: FakeDTrace, pki: Pki) -> None:
    """Metrics export when the certificate expires and whether the last web reload succeeded."""

    def exported(service: Service, name: str) -> float:
        connection = HTTPSConnection(
            "localhost", service.port, timeout=SECONDS, context=pki.trusting()
        )
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        except ConnectionError:
            # A change of the rules also closes connections that have not been answered yet.
            return math.nan
        finally:
            connection.close()
        return float(text.partition(f"\n{name} ")[2].split()[0])

    def end() -> float:
        text = (tmp_path / "server.pem").read_text(encoding="ascii")
        return x509.load_pem_x509_certificate(text.encode()).not_valid_after_utc.timestamp()

    expiry = "dtrace_exporter_web_certificate_expiry_timestamp_seconds"
    successful = "dtrace_exporter_web_config_last_reload_successful"
    with running(tmp_path, TLS % "", fake_dtrace) as service:
        first = end()
        assert exported(service, expiry) == first
        assert exported(service, successful) == 1
        pki.renew(end=datetime(2040, 1, 1, tzinfo=UTC), key=False)
        until(lambda: exported(service, successful) == 0)
        assert exported(service, expiry) == first != end()
        pki.renew(end=datetime(2041, 1, 1, tzinfo=UTC))
        until(lambda: exported(service, successful) == 1)
        assert exported(service, expiry) == end()
        # An emptied file does not switch TLS off.
        service.web.write_text("", encoding="utf-8")
        until(lambda: exported(service, successful) == 0)
        service.web.write_text("http_server_config:", encoding="utf-8")
        until(lambda: service.status() == 200)
        service.web.write_text("", encoding="utf-8")
        until(lambda: service.log().count('msg="web configuration changed"') == 3)


@pytest.mark.parametrize(
    ("web", "line", "status"),
    [
        (TLS % "", "ok    certificate             valid until 2040-01-02 03:04+00:00", 0),
        (
            (TLS % "").replace("server.", "ended."),
            "FAIL  certificate             expired at 2020-01-02 03:04+00:00",
            1,
        ),
        (
            (TLS % "").replace("server.", "later."),
            "FAIL  certificate             not valid before 2040-01-02 03:04+00:00",
            1,
        ),
        (
            TLS % ", client_ca_file: ended.pem, client_auth_type: RequireAndVerifyClientCert",
            "FAIL  client_ca               expired at 2020-01-02 03:04+00:00",
            1,
        ),
        (
            "rate_limit: {interval: 1s, burst: 0}",
            "FAIL  rate_limit              a burst of 0: every request is answered with 429",
            1,
        ),
    ],
)
def test_check_of_the_web_configuration(
    tmp_path: Path, fake_dtrace: FakeDTrace, web: str, line: str, status: int
) -> None:
    """The command check reports certificates' validity and settings that refuse every client."""
    authority = trustme.CA()
    past, future = (datetime(year, 1, 2, 3, 4, tzinfo=UTC) for year in (2020, 2040))
    for name, begin, end in (
        ("server", past, future),
        ("ended", past - timedelta(days=1), past),
        ("later", future, future + timedelta(days=1)),
    ):
        cert = authority.issue_cert("localhost", not_before=begin, not_after=end)
        cert.cert_chain_pems[0].write_to_path(str(tmp_path / f"{name}.pem"))
        cert.private_key_pem.write_to_path(str(tmp_path / f"{name}.key"))
    (tmp_path / "web.yml").write_text(web, encoding="utf-8")
    config = write(tmp_path / "c.yml", fake_dtrace())
    done = run(f"--config.file={config}", f"--web.config.file={tmp_path / 'web.yml'}", "check")
    assert line in done.stdout.splitlines()
    assert done.returncode == status, done.stdout


def test_a_guess_holds_up_nobody(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """While a guess is computed at the highest cost, the service answers others and can end."""
    dear = HASH.replace("$04$", f"${auth.MAX_COST}$")
    users = f"basic_auth_users: {{prometheus: {HASH}, dear: {dear}}}"
    guess = "\r\n".join(f"{name}: {text}" for name, text in basic("dear", "wrong").items())

    def spent(service: Service) -> int:
        stat = Path(f"/proc/{service.process.pid}/stat").read_text(encoding="utf-8")
        return int(stat.rpartition(")")[2].split()[11])

    with running(tmp_path, users, fake_dtrace) as service:
        before = spent(service)
        address = ("127.0.0.1", service.port)
        guessers = [socket.create_connection(address) for _ in range(2)]
        for each in guessers:
            each.sendall(f"GET / HTTP/1.1\r\nHost: localhost\r\n{guess}\r\n\r\n".encode())
        # In ticks of 10 ms: the computation of a guess has begun.
        until(lambda: spent(service) > before + 20)
        assert service.status(headers=basic("prometheus", PASSWORD)) == 200
        guessers.append(socket.create_connection(address))
        guessers[-1].sendall(f"GET / HTTP/1.1\r\nHost: localhost\r\n{guess}\r\n\r\n".encode())
        service.process.terminate()
        service.process.wait(SECONDS)
        for each in guessers:
            each.close()


def test_client_certificates(tmp_path: Path, fake_dtrace: FakeDTrace, pki: Pki) -> None:
    """A client CA admits only its clients; allowed names admit only clients so named."""
    keys = ", client_ca_file: ca.pem, client_auth_type: "
    required = TLS % f"{keys}RequireAndVerifyClientCert"
    names = TLS % f"{keys}RequireAndVerifyClientCert, client_allowed_sans: [good.example, '::1']"
    given = TLS % f"{keys}VerifyClientCertIfGiven"
    stranger = trustme.CA()
    clients = {
        "none": pki.trusting(),
        "good": pki.trusting("good.example"),
        "address": pki.trusting("::1"),
        "bad": pki.trusting("evil.example"),
        "stranger": pki.trusting("good.example", by=stranger),
    }

    def served(service: Service) -> set[str]:
        return {name for name, tls in clients.items() if service.status(tls=tls) == 200}

    with running(tmp_path, required, fake_dtrace) as service:
        assert served(service) == {"good", "address", "bad"}
        service.web.write_text(names, encoding="utf-8")
        until(lambda: served(service) == {"good", "address"})
        assert service.status(tls=clients["bad"]) == 0
        until(lambda: 'msg="client\'s certificate is for another name"' in service.log())
        # A certificate with many names still gives a short log line.
        many = pki.trusting(*(f"{number}.evil.example" for number in range(500)))
        assert service.status(tls=many) == 0
        until(lambda: "100.evil.example" in service.log())
        assert max(map(len, service.log().splitlines())) < 500
        service.web.write_text(given, encoding="utf-8")
        until(lambda: served(service) == {"none", "good", "address", "bad"})


CLIENTS = TLS % (
    ", client_ca_file: ca.pem, client_auth_type: RequireAndVerifyClientCert"
    ", client_allowed_sans: [%s]"
)


@pytest.mark.parametrize("what", ["name", "authority", "user"])
def test_withdrawn(tmp_path: Path, fake_dtrace: FakeDTrace, pki: Pki, what: str) -> None:
    """Removing a name, authority or user ends its busy connections and invalidates its ticket."""
    before = CLIENTS % "good.example"
    headers = basic("prometheus", PASSWORD) if what == "user" else {}
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    request = f"GET /-/healthy HTTP/1.1\r\nHost: x\r\n{''.join(lines)}\r\n".encode()
    with (
        running(tmp_path, USERS % HASH if what == "user" else before, fake_dtrace) as service,
        socket.create_connection(("localhost", service.port), SECONDS) as raw,
    ):
        client = raw
        if what != "user":
            tls = pki.trusting("good.example")
            tls.maximum_version = ssl.TLSVersion.TLSv1_2
            client = tls.wrap_socket(raw, server_hostname="localhost")

        def ended() -> bool:
            """Send one more request and read an answer, so that an answer is always pending."""
            try:
                client.sendall(request)
                return client.recv(1 << 16) == b""
            except (ConnectionError, ssl.SSLError):
                return True

        client.sendall(request)
        assert not any(ended() for _ in range(10))
        if what == "authority":
            other = trustme.CA()
            other.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        elif what == "name":
            service.web.write_text(CLIENTS % "other.example", encoding="utf-8")
        else:
            service.web.write_text(f"basic_auth_users: {{other: {HASH}}}", encoding="utf-8")
        until(ended)
        session = client.session if isinstance(client, ssl.SSLSocket) else None
        client.close()
        assert "web configuration changed" in service.log()
        if what == "user":
            assert service.status(headers=headers) == 401
            return
        assert session is not None
        with (
            suppress(OSError),
            socket.create_connection(("localhost", service.port), SECONDS) as plain,
            tls.wrap_socket(plain, server_hostname="localhost", session=session) as client,
        ):
            assert not client.session_reused
            client.sendall(request)
            assert client.recv(1 << 16) == b""


@pytest.mark.usefixtures("pki")
def test_old_versions(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """The server speaks TLS 1.2 and 1.3 only, and no version that the file excludes."""
    openssl = require("openssl", "openssl")

    def spoken(service: Service) -> set[str]:
        found = set()
        for version in ("-tls1", "-tls1_1", "-tls1_2", "-tls1_3"):
            done = subprocess.run(
                [
                    *(openssl, "s_client", "-connect", f"localhost:{service.port}", version),
                    *("-cipher", "ALL:@SECLEVEL=0", "-brief"),
                ],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            if "CONNECTION ESTABLISHED" in done.stderr:
                found.add(version)
        return found

    with running(tmp_path, TLS % "", fake_dtrace) as service:
        assert spoken(service) == {"-tls1_2", "-tls1_3"}
        service.web.write_text(TLS % ", min_version: TLS13", encoding="utf-8")
        until(lambda: spoken(service) == {"-tls1_3"})
        service.web.write_text(TLS % ", max_version: TLS12", encoding="utf-8")
        until(lambda: spoken(service) == {"-tls1_2"})


@pytest.mark.usefixtures("pki")
def test_costly_key_exchange(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """The server refuses finite-field key exchange, which is very slow, and accepts P-256."""
    openssl = require("openssl", "openssl")
    with running(tmp_path, TLS % "", fake_dtrace) as service:
        where = ("-connect", f"localhost:{service.port}")
        for group, is_served in (("P-256", True), ("ffdhe2048", False), ("ffdhe8192", False)):
            command = [openssl, "s_client", *where, "-groups", group, "-tls1_3"]
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS,
                check=False,
            )
            assert (b"Cipher is TLS_AES" in done.stdout) == is_served, group


def test_renegotiation(tmp_path: Path, fake_dtrace: FakeDTrace, pki: Pki) -> None:
    """The server refuses renegotiation, which is costly."""
    openssl = require("openssl", "openssl")
    with running(tmp_path, TLS % "", fake_dtrace) as service:
        done = subprocess.run(
            [openssl, "s_client", "-connect", f"localhost:{service.port}", "-tls1_2"],
            input="R\nGET /-/healthy HTTP/1.0\n\n",
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert "RENEGOTIATING" in done.stdout + done.stderr
        assert "no renegotiation" in done.stderr
        assert "healthy" not in done.stdout
        assert service.status(tls=pki.trusting()) == 200


def test_headers(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """Every answer has the configured headers, but the page keeps its own content policy."""
    text = """
http_server_config:
  headers:
    Content-Security-Policy: "default-src 'self'"
    X-Frame-Options: deny
    X-Content-Type-Options: ""
"""
    with running(tmp_path, text, fake_dtrace) as service:
        for path in PATHS:
            headers = service.ask(path).headers
            assert headers["X-Frame-Options"] == "deny"
            assert "X-Content-Type-Options" not in headers
            own = headers["Content-Security-Policy"]
            assert (
                own.startswith("default-src 'none'; style-src")
                if path == "/"
                else (own == "default-src 'self'")
            )


def test_rate_limit(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """The rate limit answers a burst of requests at once, and then one request each interval."""
    with running(tmp_path, "rate_limit: {interval: 1h, burst: 3}", fake_dtrace) as service:
        answers = [service.ask() for _ in range(5)]
        assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]
        assert answers[-1].headers["Retry-After"] == "1"
        service.web.write_text("rate_limit: {interval: 1ms, burst: 3}", encoding="utf-8")
        until(lambda: service.status() == 200)


def test_rate_limit_is_for_those_with_a_password(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """Requests without the right password do not use up the rate limit."""
    web = "rate_limit: {interval: 1h, burst: 3}\n" + USERS % HASH
    right, wrong = basic("prometheus", PASSWORD), basic("prometheus", "wrong")
    with running(tmp_path, web, fake_dtrace) as service:
        assert {service.status(headers=each) for each in ({}, wrong) * 20} == {401}
        statuses = [service.status(headers=right) for _ in range(4)]
        assert statuses == [200, 200, 200, 429]


def test_no_secret_in_the_log(tmp_path: Path, fake_dtrace: FakeDTrace, pki: Pki) -> None:
    """No password or key gets into the log, whatever clients send or the file wrongly contains."""
    secrets = [PASSWORD, "hunter2", HASH, "swordfish", "letmein"]
    key = (tmp_path / "server.key").read_text(encoding="utf-8")
    secrets += [line for line in key.splitlines() if not line.startswith("-")]
    inline = "\n".join(f"    {line}" for line in key.splitlines())
    web = f"tls_server_config:\n  cert_file: server.pem\n  key: |\n{inline}\n" + USERS % HASH
    tls = pki.trusting()
    with running(tmp_path, web, fake_dtrace, "--log.level=debug", "--log.format=json") as service:
        right = basic("prometheus", PASSWORD)
        wrong = basic("prometheus", "hunter2")
        secrets += [each["Authorization"].split()[1] for each in (right, wrong)]
        assert service.status(tls=tls, headers=right) == 200
        assert service.status(tls=tls, headers=wrong) == 401
        assert service.status(tls=tls, headers=right, path="/metrics?token=swordfish") == 200
        whole = "http://a:swordfish@x/metrics"
        assert service.status(tls=tls, headers=right, path=whole) in (400, 404)
        service.status(tls=tls, headers={"Authorization": "Basic letmein\x01"})
        assert service.status(tls=tls, headers=right, path="/?sort=%ff&token=swordfish") == 400

        def refused(before: int) -> bool:
            return service.log().count("changed to a bad one") > before

        for bad in (
            web.replace(HASH, "hunter2"),
            web.replace("key: |", "key: swordfish\n  x: |"),
            web.replace(HASH, "'letmein"),
            web.replace("prometheus", "letmein").replace(HASH, "prometheus"),
            web.replace("basic_auth_users", "letmein"),
        ):
            already = service.log().count("changed to a bad one")
            service.web.write_text(bad, encoding="utf-8")
            until(partial(refused, already))
        for line in service.log().splitlines():
            json.loads(line)
        log = service.log()
    assert "/metrics" in log
    assert [secret for secret in secrets if secret in log] == []


def test_bad_file_at_the_start(tmp_path: Path) -> None:
    """The service does not start on a bad web configuration, and check reports it as bad."""
    file = tmp_path / "web.yml"
    file.write_text("\nbasic_auth_user: {}\n", encoding="utf-8")
    for command, status in (((), cli.BAD_CONFIGURATION), (("check",), cli.FAILURE)):
        done = subprocess.run(
            [*EXPORTER, f"--web.config.file={file}", *command],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert (done.returncode, done.stdout) == (status, "")
        expected = f"dtrace-exporter: {file}:2: expected the key basic_auth_users"
        assert done.stderr.startswith(expected)
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("flags", [(), ("--no-web.enable-lifecycle",)])
def test_lifecycle_off(tmp_path: Path, fake_dtrace: FakeDTrace, flags: tuple[str, ...]) -> None:
    """Without the flag, a reload over the web is refused; SIGHUP always reloads."""
    with running(tmp_path, "{}", fake_dtrace, *flags) as service:
        assert service.status(path="/-/reload", method="POST") == 403
        assert service.status(path="/-/reload") == 405
        assert "reloaded" not in service.log()
        service.process.send_signal(1)
        until(lambda: "reloaded" in service.log())


def test_lifecycle_on(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """With --web.enable-lifecycle a POST reloads; a failed reload answers only that it failed."""
    with running(tmp_path, "{}", fake_dtrace, "--web.enable-lifecycle") as service:
        assert service.status(path="/-/reload", method="POST") == 200
        text = 'dtrace: {command: "sshpass -p hunter2 ssh a dtrace"}'
        (tmp_path / "c.yml").write_text(text, encoding="utf-8")
        connection = HTTPConnection("localhost", service.port, timeout=SECONDS)
        connection.request("POST", "/-/reload")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (500, b"reload failed: see the log\n")
        connection.close()
        assert f"{tmp_path}/c.yml:1: dtrace.command: expected a list (found text)" in service.log()
        assert "hunter2" not in service.log()


def test_several_addresses(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """The service listens on each --web.listen-address, also IPv6; errors name a taken one."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    extra = free_port()
    flag = f"--web.listen-address=[::1]:{extra}"
    with running(tmp_path, "{}", fake_dtrace, flag) as service:
        for host, port in (("127.0.0.1", service.port), ("::1", extra)):
            connection = HTTPConnection(host, port, timeout=SECONDS)
            connection.request("GET", "/-/healthy")
            assert connection.getresponse().status == 200
            connection.close()
        done = subprocess.run(
            [*EXPORTER, f"--web.listen-address=127.0.0.1:{free_port()}", flag],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == cli.ADDRESS_IN_USE
        expected = f"dtrace-exporter: cannot listen on [::1]:{extra}: Address already in use\n"
        assert done.stderr == expected


class HasFileno(Protocol):
    def fileno(self) -> int:
        """Return the descriptor."""


def activated(
    sockets: Sequence[HasFileno], *arguments: str, pid: str = "$$", number: int | None = None
) -> list[str]:
    """Return a command that starts the exporter as systemd does, with sockets from fd 3 upwards."""
    # First move the sockets away from the descriptors where they have to be.
    moves = [f"exec {20 + n}<&{sock.fileno()}" for n, sock in enumerate(sockets)]
    moves += [f"exec {3 + n}<&{20 + n} {20 + n}<&-" for n in range(len(sockets))]
    count = len(sockets) if number is None else number
    script = "; ".join([*moves, f'LISTEN_PID={pid} LISTEN_FDS={count} LISTEN_FDNAMES=x exec "$@"'])
    return ["bash", "-c", script, "sh", *EXPORTER, "--web.systemd-socket", *arguments]


def test_systemd_socket(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """The service listens on the sockets from systemd, and dtrace(1) does not inherit them."""
    saved = tmp_path / "start.json"
    config = write(tmp_path / "c.yml", fake_dtrace({"save": str(saved)}, READY, FOREVER))
    path = str(tmp_path / "socket")
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        unix.bind(path)
        unix.listen()
        port = tcp.getsockname()[1]
        command = activated([tcp, unix], f"--config.file={config}")
        fds = [tcp.fileno(), unix.fileno()]
        with subprocess.Popen(command, pass_fds=fds, stderr=subprocess.PIPE) as process:
            try:
                connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
                connection.request("GET", "/-/healthy")
                assert connection.getresponse().status == 200
                connection.close()
                with socket.socket(socket.AF_UNIX) as client:
                    client.settimeout(SECONDS)
                    client.connect(path)
                    client.sendall(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n")
                    assert client.recv(100).startswith(b"HTTP/1.1 200")
                until(saved.exists)
                pid = json.loads(saved.read_text(encoding="utf-8"))["pid"]
                environment = Path(f"/proc/{pid}/environ").read_bytes()
                links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
                assert b"LISTEN_" not in environment
                assert not [link for link in links if link.startswith("socket:")]
            finally:
                process.terminate()
                process.communicate(timeout=SECONDS)
        assert process.returncode == 0
        assert not is_alive(pid)


def test_no_systemd_socket(tmp_path: Path) -> None:
    """The service does not start without its own listening sockets from systemd."""

    def said(command: list[str], *fds: int) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, pass_fds=fds
        )
        assert done.returncode == cli.BAD_CONFIGURATION
        return done.stderr

    assert "no socket from systemd" in said([*EXPORTER, "--web.systemd-socket"])
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket() as idle:
        assert "no socket from systemd" in said(activated([tcp], pid="1"), tcp.fileno())
        assert "no socket from systemd" in said(activated([tcp], number=0), tcp.fileno())
        said_of_it = "descriptor 3 from systemd is not a listening socket"
        assert said_of_it in said(activated([idle]), idle.fileno())
        with (tmp_path / "file").open("wb") as file:
            assert said_of_it in said(activated([file]), file.fileno())
        assert "descriptor 4 from systemd" in said(activated([tcp], number=2), tcp.fileno())
    done = subprocess.run(
        [*EXPORTER, "--web.systemd-socket", "--web.listen-address=:1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "exclude each other" in done.stderr
