"""The web configuration file: what is accepted, and the one-line error for anything else."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtrace_exporter import background
from dtrace_exporter.web import auth, configuration, tls
from dtrace_exporter.web.configuration import RateLimit, WebConfig, WebConfigFile, load
from dtrace_exporter.yaml_reader import ConfigError
from host_tools import require

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "config" / "web-config.yml"
HASH = "$2b$04$Jf5JLZ8r0f1eeSC8Xl5V6uEmsK4mcYC39ygAvQmBgJVcw5DFmcx5W"
SECRET = "hunter2-is-no-bcrypt-hash"

# The files are in the directory of the configuration; these are the valid ones.
SERVER = "cert_file: server.pem, key_file: server.key"
CLIENTS = "client_ca_file: ca.pem, client_auth_type: RequireAndVerifyClientCert"


def cut(pem: bytes, lines: slice) -> bytes:
    """Return a PEM text without some of its lines."""
    whole = pem.splitlines(keepends=True)
    del whole[lines]
    return b"".join(whole)


def small() -> bytes:
    """Return a certificate with a key that is too short for OpenSSL."""
    key = rsa.generate_private_key(65537, 1024)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    cert = builder.sign(key, hashes.SHA256())
    return cert.public_bytes(Encoding.PEM) + key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with certificates, their keys, and files that only look like them."""
    place = tmp_path_factory.mktemp("web")
    authority, other = trustme.CA(), trustme.CA()
    between = authority.create_child_ca()
    server = between.issue_cert("localhost", "127.0.0.1")
    key, cert = server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes()
    chain = b"".join(blob.bytes() for blob in server.cert_chain_pems)
    loaded = load_pem_private_key(key, None)
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    traditional = PrivateFormat.TraditionalOpenSSL
    request = x509.CertificateSigningRequestBuilder(x509.Name([])).sign(loaded, hashes.SHA256())
    files = {
        "server.key": key,
        "server.pem": chain,
        "both.pem": key + chain,
        "ca.pem": authority.cert_pem.bytes(),
        "other.key": other.issue_cert("localhost").private_key_pem.bytes(),
        "rsa.key": rsa.generate_private_key(65537, 2048).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        ),
        "empty.pem": b"",
        "text.pem": b"no certificate\n",
        "binary.pem": b"\xff\xfe",
        "bom.pem": b"\xef\xbb\xbf" + chain,
        "crlf.pem": "Subjekt: M\u00fcnchen\n".encode("latin-1") + chain.replace(b"\n", b"\r\n"),
        "server.der": ssl.PEM_cert_to_DER_cert(cert.decode()),
        "broken.pem": b"-----BEGIN CERTIFICATE-----\nbm9uc2Vuc2U=\n-----END CERTIFICATE-----\n",
        "locked.key": loaded.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
        ),
        "locked-traditional.key": loaded.private_bytes(
            Encoding.PEM, traditional, BestAvailableEncryption(b"secret")
        ),
        "traditional.key": loaded.private_bytes(Encoding.PEM, traditional, NoEncryption()),
        "ssh.key": loaded.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        "public.key": loaded.public_key().public_bytes(
            Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
        ),
        "request.pem": request.public_bytes(Encoding.PEM),
        "cut.pem": cut(chain, slice(-5, None)),
        "cut-inside.pem": cut(cert, slice(4, 6)) + between.cert_pem.bytes(),
        "cut-second.pem": cert + cut(between.cert_pem.bytes(), slice(4, 6)),
        "garbled.pem": cert.replace(b"MII", b"!II", 1),
        "order.pem": between.cert_pem.bytes() + cert,
        "cut.key": cut(key, slice(-2, None)),
        "cut-inside.key": cut(key, slice(2, 3)),
        "garbled.key": key.replace(b"\n", b"\n!", 1),
        "small.pem": small(),
    }
    for name, content in files.items():
        (place / name).write_bytes(content)
    os.mkfifo(place / "fifo.pem")
    return place


def read(place: Path, text: str) -> WebConfig:
    """Load a web configuration with this text."""
    path = place / "web.yml"
    path.write_text(text, encoding="utf-8")
    return load(path)


def complaint(place: Path, text: str) -> str:
    """Return the full error for a file with this text, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        read(place, text)
    message = caught.value.in_full
    assert message.isprintable()
    return message.removeprefix(f"{place}/web.yml")


def secured(place: Path, keys: str) -> ssl.SSLContext:
    """Return the TLS context of a configuration with these keys and the server's files."""
    context = read(place, f"tls_server_config: {{{SERVER}, {keys}}}").tls
    assert context is not None
    return context


def test_nothing_said(place: Path) -> None:
    """A file that configures nothing leaves the server open, and so do empty sections."""
    sections = ("tls_server_config", "http_server_config", "basic_auth_users", "rate_limit")
    for text in ("{}", "", "# all of it a comment", "---", "~"):
        assert read(place, text) == WebConfig(), text
    for section in sections:
        for text in ("{}", "", "# nothing yet"):
            assert read(place, f"{section}: {text}") == WebConfig(), section
    for keys in ("http2: false", "http2: true", "headers: {}", "headers: "):
        assert read(place, f"http_server_config: {{{keys}}}") == WebConfig(), keys


@pytest.mark.parametrize(
    "keys",
    [
        "min_version: TLS13",
        "max_version: TLS12, cipher_suites: [TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256]",
        "prefer_server_cipher_suites: false, curve_preferences: [X25519, CurveP256]",
    ],
)
def test_no_certificate_no_tls(place: Path, keys: str) -> None:
    """Without a certificate there is no TLS, and a rule for clients is an error."""
    assert read(place, f"tls_server_config: {{{keys}}}") == WebConfig()
    assert "expected the key cert_file" in complaint(
        place, f"tls_server_config: {{{keys}, client_allowed_sans: [a]}}"
    )


def test_an_emptied_file(place: Path) -> None:
    """With empty=False, an empty file is an error, as one cut short would be."""
    path = place / "web.yml"
    for text in ("", "# nothing"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=r":1: expected a configuration \(found an empty"):
            load(path, empty=False)


def test_defaults(place: Path) -> None:
    """With only a certificate and a key, TLS is 1.2 or 1.3, without client certificates."""
    context = read(place, f"tls_server_config: {{{SERVER}}}").tls
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.verify_mode == ssl.CERT_NONE
    assert context.options & ssl.OP_CIPHER_SERVER_PREFERENCE
    assert context.options & ssl.OP_NO_RENEGOTIATION


def test_inline(place: Path) -> None:
    """The file itself can contain the certificate, the key and the client CA, even a long chain."""
    indented = {
        name: (place / file).read_text(encoding="utf-8").replace("\n", "\n    ")
        for name, file in {"cert": "server.pem", "key": "server.key", "client_ca": "ca.pem"}.items()
    }
    chain = indented["cert"] + indented["client_ca"] * 200
    text = (
        f"tls_server_config:\n  cert: |\n    {chain}\n  key: |\n    {indented['key']}\n"
        f"  client_ca: |\n    {indented['client_ca']}\n"
        "  client_auth_type: VerifyClientCertIfGiven\n"
    )
    context = read(place, text).tls
    assert context is not None
    assert len(context.get_ca_certs()) == 1
    assert len(chain) > 1 << 16


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("VerifyClientCertIfGiven", ssl.CERT_OPTIONAL),
        ("RequireAndVerifyClientCert", ssl.CERT_REQUIRED),
    ],
)
def test_clients_certificates(place: Path, kind: str, mode: ssl.VerifyMode) -> None:
    """The two policies that verify client certificates are Python's modes of verification."""
    context = secured(place, f"client_auth_type: {kind}, client_ca_file: ca.pem")
    assert context.verify_mode == mode
    assert secured(place, "client_auth_type: NoClientCert").verify_mode == ssl.CERT_NONE


def test_all_clients_admitted(place: Path) -> None:
    """A policy that requests certificates without verification behaves as if it asks for none."""
    assert secured(place, "client_auth_type: RequestClientCert").verify_mode == ssl.CERT_NONE


def hello(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Do a TLS handshake without a network.

    Raises:
        ssl.SSLError: one of the sides refuses.
    """
    ways = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = (
        server.wrap_bio(*ways, server_side=True),
        client.wrap_bio(*ways[::-1], server_hostname="localhost"),
    )
    for _ in range(8):
        for side in sides:
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    # In TLS 1.3 the client learns only now whether the server accepts its certificate.
    sides[0].write(b"x")
    assert sides[1].read() == b"x"


@pytest.mark.parametrize("version", ["TLS12", "TLS13"])
def test_if_given_without_authorities(place: Path, version: str) -> None:
    """Without a client CA, a client needs no certificate, and any that it has is refused."""
    keys = f"client_auth_type: VerifyClientCertIfGiven, min_version: {version}"
    server = secured(place, f"{keys}, max_version: {version}")
    client = ssl.create_default_context(cafile=place / "ca.pem")
    hello(server, client)
    # The server's own certificate is refused too.
    client.load_cert_chain(place / "both.pem")
    with pytest.raises(ssl.SSLError, match=r"(?i)verify failed|unable to get"):
        hello(server, client)


def test_versions(place: Path) -> None:
    """Both limits of the TLS version are applied."""
    context = secured(place, "min_version: TLS13, max_version: TLS13")
    assert context.minimum_version == context.maximum_version == ssl.TLSVersion.TLSv1_3
    assert secured(place, "max_version: TLS12").maximum_version == ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize("name", tls.CIPHERS)
def test_each_cipher(place: Path, name: str) -> None:
    """Every cipher suite that Go calls secure is OpenSSL's suite with the same IANA name."""
    context = secured(place, f"cipher_suites: [{name}]")
    (cipher,) = (each for each in context.get_ciphers() if each["protocol"] != "TLSv1.3")
    exchange, _, rest = name.removeprefix("TLS_").partition("_WITH_")
    words = set(re.findall(r"[A-Z0-9]+", cipher["description"])) | {cipher["name"]}
    described = cipher["description"].replace("(", "").replace(")", "")
    assert exchange.split("_")[1] in words
    assert ("CHACHA20" in described) == ("CHACHA20" in rest)
    assert ("256" in rest.replace("SHA256", "")) == (
        cipher["strength_bits"] == 256 and "AES" in rest
    )
    assert ("GCM" in rest) == ("GCM" in described)


def test_ciphers_keep_their_order(place: Path) -> None:
    """The order of cipher suites is that of the file, and the file decides whose order counts."""
    names = ["TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"]
    for order in (names, names[::-1]):
        context = secured(place, f"cipher_suites: [{', '.join(order)}]")
        found = [each["name"] for each in context.get_ciphers() if each["name"].startswith("ECDHE")]
        assert found == [tls.CIPHERS[name] for name in order]
    context = secured(place, "prefer_server_cipher_suites: false")
    assert not context.options & ssl.OP_CIPHER_SERVER_PREFERENCE
    assert secured(place, "cipher_suites: []").minimum_version == ssl.TLSVersion.TLSv1_2


def test_ciphers_of_tls13(place: Path) -> None:
    """TLS 1.3 always has its cipher suites; if only those are listed, there is no TLS 1.2."""
    context = secured(place, "cipher_suites: [TLS_AES_128_GCM_SHA256]")
    assert context.minimum_version == ssl.TLSVersion.TLSv1_3


@pytest.mark.parametrize("name", tls.CURVES)
def test_each_curve(place: Path, name: str) -> None:
    """Every curve can be configured."""
    secured(place, f"curve_preferences: [{name}]")
    secured(place, "curve_preferences: []")


def test_a_curve_that_python_cannot_choose(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A curve that OpenSSL has but Python's ssl refuses is an error at its key."""

    def refuse(*_: object) -> None:
        raise ssl.SSLError("[EC: UNKNOWN_GROUP] unknown group")

    monkeypatch.setattr(tls, "use_curves", refuse)
    said = complaint(place, f"tls_server_config: {{{SERVER}, curve_preferences: [X25519]}}")
    assert "curve_preferences: expected a curve that this Python can choose" in said


def test_names(place: Path) -> None:
    """The allowed names of client certificates are read."""
    text = f"tls_server_config: {{{SERVER}, {CLIENTS}, client_allowed_sans: [a.example, '::1']}}"
    assert read(place, text).client_names == {"a.example", "::1"}


def test_names_of_a_certificate() -> None:
    """Each kind of name in a certificate is written as in Go."""
    names = (
        ("DNS", "a.example"),
        ("IP Address", "127.0.0.1"),
        ("IP Address", "2001:DB8:0:0:0:0:0:1"),
        ("email", "a@example.org"),
        ("URI", "spiffe://a/b"),
        ("DirName", ((("commonName", "x"),),)),
    )
    expected = {"a.example", "127.0.0.1", "2001:db8::1", "a@example.org", "spiffe://a/b"}
    assert tls.alternative_names({"subjectAltName": names}) == expected
    assert tls.alternative_names({}) == tls.alternative_names(None) == set()


def test_headers(place: Path) -> None:
    """The allowed headers are read, and an empty value means that a header is not sent."""
    text = """
http_server_config:
  headers:
    Content-Security-Policy: "default-src 'none'"
    Strict-Transport-Security: max-age=31536000
    X-Content-Type-Options: nosniff
    X-Frame-Options: deny
    X-XSS-Protection: 0
"""
    assert read(place, text).headers == {
        "Content-Security-Policy": "default-src 'none'",
        "Strict-Transport-Security": "max-age=31536000",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "deny",
        "X-XSS-Protection": "0",
    }
    empty = "http_server_config: {headers: {X-Frame-Options: '', Content-Security-Policy: }}"
    assert set(read(place, empty).headers.values()) == {""}


def test_users(place: Path) -> None:
    """Users of any name are read, with hashes of all three equivalent versions."""
    hashes = {f"üser{minor}": HASH.replace("$2b", f"$2{minor}") for minor in "aby"}
    text = "basic_auth_users:\n" + "".join(f"  {name}: {value}\n" for name, value in hashes.items())
    expected = {name.encode(): value.encode() for name, value in hashes.items()}
    assert read(place, text).users == expected


def test_plain_names(place: Path) -> None:
    """A user's name may look like a number, a date or a boolean in YAML, as in Go."""
    for name in ("1000", "007", "0x1f", "1.5", "1e3", "yes", "on", "true", "2026-01-02", "'12'"):
        users = read(place, f"basic_auth_users: {{{name}: {HASH}}}").users
        assert users == {name.strip("'").encode(): HASH.encode()}
    for name in ("~", "[a]", "{a: b}"):
        assert "a word as the key" in complaint(place, f"basic_auth_users: {{? {name} : {HASH}}}")


def test_plain_texts(place: Path) -> None:
    """File names, client names and header values may look like other YAML types, too."""
    (place / "2026").write_bytes((place / "both.pem").read_bytes())
    text = f"tls_server_config: {{cert_file: 2026, key_file: 2026, {CLIENTS}"
    assert read(place, text + ", client_allowed_sans: [10.5, no]}").client_names == {"10.5", "no"}
    text = "http_server_config: {headers: {Strict-Transport-Security: 1.5, X-XSS-Protection: off}}"
    assert [*read(place, text).headers.values()] == ["1.5", "off"]


def test_costs(place: Path) -> None:
    """A hash whose cost would delay others is an error."""
    for cost in range(4, 32):
        text = f"basic_auth_users: {{a: {HASH.replace('$04', f'${cost:02}')}}}"
        if cost <= auth.MAX_COST:
            assert read(place, text).users
            continue
        said = complaint(place, text)
        assert said.startswith(
            ":1: basic_auth_users.a: expected a bcrypt hash with a cost of at most"
        )
        assert said.endswith("(found a higher one)")


def test_users_without_bcrypt(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If bcrypt is not installed, the error says so, and how to install it."""
    monkeypatch.setitem(sys.modules, "bcrypt", None)
    assert read(place, "basic_auth_users: {}").users == {}
    said = complaint(place, f"basic_auth_users: {{a: {HASH}}}")
    assert "package bcrypt" in said
    assert "pip install 'dtrace-exporter[auth]'" in said


def test_rate_limit(place: Path) -> None:
    """Interval and burst are read; an interval of 0 means no limit."""
    assert read(place, "rate_limit: {interval: 1m500ms, burst: 3}").rate_limit == RateLimit(60.5, 3)
    assert read(place, "rate_limit: {interval: 0}").rate_limit == RateLimit()
    assert read(place, "rate_limit: {interval: 0s, burst: 1}").rate_limit == RateLimit(0, 1)
    assert read(place, "rate_limit: {interval: 1s, burst: 0}").rate_limit == RateLimit(1, 0)
    assert read(place, "rate_limit: {burst: 0}").rate_limit == RateLimit()
    for interval, seconds in (
        ("0.5s", 0.5),
        ("100us", 1e-4),
        ("100\u00b5s", 1e-4),
        ("1.5h", 5400),
        ("1h30m", 5400),
        ("500ns", 5e-7),
        ("0.1ns", 0),
    ):
        text = f"rate_limit: {{interval: {interval}, burst: 1}}"
        assert read(place, text).rate_limit == RateLimit(seconds, 1)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("[]", ":1: expected keys and values"),
        ("tls_config: {}", r":1: tls_config: expected the key tls_server_config \("),
        ("tls_server_config: {cert_file: server.pem}", "expected the key key_file"),
        ("tls_server_config: {key_file: server.key}", "expected the key cert_file"),
        ("TLS cert_fil: server.pem", r"tls_server_config.cert_fil: expected the key cert_file"),
        ("TLS min_version: TLS9", r"min_version: expected TLS12 or TLS13 \("),
        ("TLS min_version: TLS10", "min_version: expected TLS12 or TLS13 .*TLS10.*RFC 8996"),
        ("TLS max_version: TLS11", "max_version: expected TLS12 or TLS13 .*TLS11.*RFC 8996"),
        ("TLS max_version: TLS12, min_version: TLS13", "max_version: expected a version not below"),
        ("TLS max_version: 1.2", "max_version: expected TLS12 or TLS13"),
        (
            "TLS cipher_suites: [TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA265]",
            r"cipher_suites\[0\]: expected TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 \(",
        ),
        (
            "TLS cipher_suites: [tls_ecdhe_ecdsa_with_chacha20_poly1305]",
            r"cipher_suites\[0\]: expected TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256 \(",
        ),
        (
            "TLS cipher_suites: [ECDHE-RSA-AES128-GCM-SHA256]",
            r"cipher_suites\[0\]: expected TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 \(found OpenSSL's",
        ),
        ("TLS cipher_suites: [x]", rf"cipher_suites\[0\]: expected {' or '.join(tls.CIPHERS)} or"),
        ("TLS cipher_suites: [1]", rf"cipher_suites\[0\]: expected {' or '.join(tls.CIPHERS)} or"),
        (
            "TLS curve_preferences: [prime256v1]",
            r"curve_preferences\[0\]: expected CurveP256 \(found OpenSSL's name for it",
        ),
        ("TLS Min-Version: TLS13", "tls_server_config.Min-Version: expected the key min_version"),
        (
            "TLS cert_file_: server.pem",
            r"tls_server_config.cert_file_: expected the key cert_file \(found an unknown one\)",
        ),
        ("TLS cipher_suites: ECDHE", "cipher_suites: expected a list"),
        (
            "TLS max_version: TLS12, cipher_suites: [TLS_AES_128_GCM_SHA256]",
            "cipher_suites: expected a cipher suite for max_version",
        ),
        ("TLS prefer_server_cipher_suites: 1", "expected true or false"),
        ("TLS curve_preferences: [CurveP257]", r"curve_preferences\[0\]: expected CurveP256 or"),
        (
            "TLS client_auth_type: Nonsense",
            (
                "client_auth_type: expected NoClientCert or RequestClientCert or"
                r" VerifyClientCertIfGiven or RequireAndVerifyClientCert \("
            ),
        ),
        (
            "TLS client_auth_type: RequestClientCert, client_ca_file: ca.pem",
            "client_ca_file: expected a client_auth_type, VerifyClientCertIfGiven or Require",
        ),
        ("TLS client_auth_type: 1", "client_auth_type: expected NoClientCert or"),
        ("TLS client_auth_type: RequireAnyClientCert", "expected RequireAndVerifyClientCert"),
        ("TLS client_auth_type: RequireClientCert", "expected RequireAndVerifyClientCert"),
        ("TLS client_auth_type: RequireAndVerifyClientCert", "expected the key client_ca_file"),
        ("TLS client_ca_file: ca.pem", "client_ca_file: expected a client_auth_type"),
        (
            "TLS client_ca_file: ca.pem, client_auth_type: NoClientCert",
            "client_ca_file: expected a client_auth_type",
        ),
        (
            "TLS client_auth_type: RequireAndVerifyClientCert, client_ca_file: no.pem",
            "client_ca_file: expected a readable file",
        ),
        (
            "TLS client_auth_type: RequireAndVerifyClientCert, client_ca_file: text.pem",
            "client_ca_file: expected certificates in PEM",
        ),
        (
            "TLS client_auth_type: RequireAndVerifyClientCert, client_ca_file: broken.pem",
            "client_ca_file: expected certificates",
        ),
        (f"TLS {CLIENTS}, client_allowed_sans: []", "client_allowed_sans: expected at least one"),
        (f"TLS {CLIENTS}, client_allowed_sans: x", "client_allowed_sans: expected a list"),
        ("TLS client_allowed_sans: [x]", "client_allowed_sans: expected client_auth_type Require"),
        (
            f"TLS {CLIENTS.replace('RequireAndVerify', 'Verify')}IfGiven, client_allowed_sans: [x]",
            "client_allowed_sans: expected client_auth_type RequireAndVerifyClientCert",
        ),
        ("TLS cert: x", "cert: expected PEM"),
        ("http_server_config: {http3: true}", "http3: expected the key http2"),
        ("http_server_config: {http2: 1}", "http2: expected true or false"),
        ("http_server_config: {headers: {Server: x}}", "headers.Server: expected the key"),
        ("http_server_config: {headers: {x-frame-options: deny}}", "expected the key X-Frame-Opt"),
        ("http_server_config: {headers: {X-Frame-Options: maybe}}", "expected deny or sameorigin"),
        ("http_server_config: {headers: {X-Content-Type-Options: sniff}}", "expected nosniff"),
        ('http_server_config: {headers: {X-XSS-Protection: "a\\nB: c"}}', "printable ASCII"),
        ("basic_auth_users: [a]", "basic_auth_users: expected users and bcrypt hashes"),
        ("basic_auth_users: {a: }", "basic_auth_users.a: expected a password's bcrypt hash"),
        (f"basic_auth_users: {{a: {HASH}x}}", "basic_auth_users.a: expected a password's bcrypt"),
        (f"basic_auth_users: {{a: {HASH}, a: {HASH}}}", "expected the key only once"),
        ("basic_auth_users: {a: $2b$03$" + HASH[7:] + "}", "expected a password's bcrypt hash"),
        ("basic_auth_users: {a: $2x$04$" + HASH[7:] + "}", "expected a password's bcrypt hash"),
        ("rate_limit: {interval: 1s}", "rate_limit: expected the key burst"),
        ("rate_limit: {interval: 1 second, burst: 1}", "interval: expected a duration such as"),
        ("rate_limit: {interval: 5, burst: 1}", "interval: expected a duration such as"),
        ("rate_limit: {burst: -1}", "burst: expected a number from 0"),
    ],
)
def test_bad(place: Path, keys: str, says: str) -> None:
    """An error is one line with the names of the file, the line and the key."""
    if keys.startswith("TLS "):
        keys = f"tls_server_config: {{{SERVER}, {keys.removeprefix('TLS ')}}}"
    assert re.search(says, complaint(place, keys))


CERT, KEY = "2: tls_server_config.cert_file", "3: tls_server_config.key_file"
READABLE = "a readable file (found none: "
REGULAR = "and not a regular file"
CERTS, ONE_KEY = "certificates in PEM (found ", "a private key in PEM (found "
DER = "a file of PEM (found binary data, as DER or PKCS #12 is"


@pytest.mark.parametrize(
    ("cert", "key", "where", "says"),
    [
        ("no.pem", "server.key", CERT, READABLE + "No such file or directory"),
        (".", "server.key", CERT, READABLE + f"it is a directory {REGULAR}"),
        ("fifo.pem", "server.key", CERT, READABLE + f"it is a FIFO {REGULAR}"),
        ("/dev/zero", "server.key", CERT, READABLE + f"it is a device {REGULAR}"),
        ("large.pem", "server.key", CERT, READABLE + "it has more than 1048576 bytes"),
        ("empty.pem", "server.key", CERT, CERTS + "nothing"),
        ("text.pem", "server.key", CERT, CERTS + "no PEM"),
        ("binary.pem", "server.key", CERT, CERTS + "no PEM"),
        ("server.der", "server.key", CERT, DER),
        ("cut.pem", "server.key", CERT, CERTS + "a certificate that is cut off"),
        ("cut-inside.pem", "server.key", CERT, "certificates (found a damaged one"),
        ("cut-second.pem", "server.key", CERT, "certificates (found a damaged one"),
        ("broken.pem", "server.key", CERT, "certificates (found a damaged one"),
        ("garbled.pem", "server.key", CERT, "certificates (found a damaged one"),
        ("request.pem", "server.key", CERT, "a certificate (found a request for a certificate"),
        ("public.key", "server.key", CERT, "a certificate (found a public key"),
        (
            *("order.pem", "server.key", CERT),
            "the server's certificate first, before those above it (found it as number 2",
        ),
        (
            "small.pem",
            "small.pem",
            CERT,
            "a certificate that OpenSSL takes (found EE_KEY_TOO_SMALL",
        ),
        # If both are swapped, the error is about the first.
        ("server.key", "server.pem", CERT, "a certificate (found a private key"),
        ("server.pem", "server.pem", KEY, "a private key (found a certificate"),
        ("server.pem", "no.key", KEY, READABLE + "No such file or directory"),
        ("server.pem", "fifo.pem", KEY, READABLE + f"it is a FIFO {REGULAR}"),
        ("server.pem", "empty.pem", KEY, ONE_KEY + "nothing"),
        ("server.pem", "server.der", KEY, DER),
        ("server.pem", "cut.key", KEY, ONE_KEY + "a private key that is cut off"),
        ("server.pem", "cut-inside.key", KEY, "a private key (found a damaged one"),
        ("server.pem", "garbled.key", KEY, "a private key (found a damaged one"),
        ("server.pem", "public.key", KEY, "a private key (found a public key"),
        ("server.pem", "request.pem", KEY, "a private key (found a request for a certificate"),
        ("server.pem", "ssh.key", KEY, "a private key (found a private key in ssh's format"),
        *(
            (
                *("server.pem", locked, KEY),
                "a private key that is not encrypted (found an encrypted private key",
            )
            for locked in ("locked.key", "locked-traditional.key")
        ),
        *(
            (
                *("server.pem", other, KEY),
                "the private key of the server's certificate (found that of another",
            )
            for other in ("other.key", "rsa.key")
        ),
    ],
)
def test_bad_files(place: Path, cert: str, key: str, where: str, says: str) -> None:
    """The error says what is wrong with which file, and no password is asked for.

    The file's path is only in the full error, which check shows.
    """
    (place / "large.pem").write_bytes(b" " * ((1 << 20) + 1))
    path = place / "web.yml"
    path.write_text(f"tls_server_config:\n  cert_file: {cert}\n  key_file: {key}\n", "utf-8")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == f"{path}:{where}: expected {says})"
    wrong = cert if where == CERT else key
    assert caught.value.in_full == f"{path}:{where}: expected {says}: {place / wrong})"


@pytest.mark.parametrize("name", ["cert_file", "key_file"])
def test_empty_name_of_a_file(place: Path, name: str) -> None:
    """An empty file name, as from a template, is an error and does not open the server."""
    for text in ("''", "", '"a\\0b"'):
        said = complaint(place, f"tls_server_config:\n  {name}: {text}\n")
        assert said.startswith(f":2: tls_server_config.{name}: expected a file's name (found ")


@pytest.mark.parametrize(
    ("cert", "key"),
    [
        ("both.pem", "both.pem"),
        ("bom.pem", "server.key"),
        ("crlf.pem", "server.key"),
        ("server.pem", "traditional.key"),
    ],
)
def test_odd_files(place: Path, cert: str, key: str) -> None:
    """Files with certificate and key, with a BOM or CRLF, or in old formats are accepted."""
    assert read(place, f"tls_server_config: {{cert_file: {cert}, key_file: {key}}}").tls


def test_without_memfd(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memfd_create(2) a pipe is used, and a key of another certificate is found too."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert read(place, f"tls_server_config: {{{SERVER}}}").tls
    for key in ("other.key", "rsa.key"):
        said = complaint(place, f"tls_server_config: {{cert_file: server.pem, key_file: {key}}}")
        assert "expected the private key of the server's certificate (found that of" in said


def test_without_proc(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error about a missing /proc names no file; one of two ways to a descriptor is enough."""
    monkeypatch.setattr(tls, "_DESCRIPTORS", ("/no/fd", "/proc/self/fd"))
    assert read(place, f"tls_server_config: {{{SERVER}}}").tls
    monkeypatch.setattr(tls, "_DESCRIPTORS", ("/no/fd", "/nor/this"))
    said = complaint(place, f"tls_server_config: {{{SERVER}}}")
    assert re.search(r"expected /no/fd, which on Linux needs /proc to be mounted \(found", said)
    assert "_file" not in said


@pytest.mark.parametrize("name", ["cert", "key", "client_ca"])
def test_file_and_text(place: Path, name: str) -> None:
    """A file and an inline text for the same thing are an error."""
    files = {"cert_file": "server.pem", "key_file": "server.key", "client_ca_file": "ca.pem"}
    files["client_auth_type"] = "RequireAndVerifyClientCert"
    text = "tls_server_config:\n" + "".join(f"  {key}: {file}\n" for key, file in files.items())
    text += f'  {name}: "-----BEGIN X-----"\n'
    assert f"expected only one of {name} and {name}_file (found both)" in complaint(place, text)


def test_several_curves(place: Path) -> None:
    """If this Python's ssl takes only one curve, several are an error."""
    text = f"tls_server_config: {{{SERVER}, curve_preferences: [X25519, CurveP256]}}"
    if hasattr(ssl.SSLContext, "set_groups"):
        read(place, text)
    else:
        assert "curve_preferences: expected one curve" in complaint(place, text)


@pytest.mark.parametrize(
    "text",
    [
        f"basic_auth_users: {{a: {SECRET}}}",
        f"basic_auth_users: a:{SECRET}",
        f"basic_auth_users: !{SECRET} {{}}",
        f"basic_auth_users: {{a: *{SECRET}}}",
        f"basic_auth_users: {{a: !{SECRET} x}}",
        f"basic_auth_users:\n  a: '{SECRET}\n  b: c\n",
        f"basic_auth_users:\n  a: &x &y {SECRET}\n",
        f"basic_auth_users:\n  a: %{SECRET}\n",
        f"tls_server_config: {{cert_file: server.pem, key: {SECRET}}}",
        f"tls_server_config: {{cert_file: server.pem, key: '-----BEGIN {SECRET}'}}",
        f"tls_server_config: {{cert_file: server.pem, key: [{SECRET}]}}",
    ],
)
def test_no_secret_is_repeated(place: Path, text: str) -> None:
    """A value in place of a hash or a key is not repeated, even in the full error."""
    assert SECRET not in complaint(place, text)


@pytest.mark.parametrize(
    "text",
    [
        f"basic_auth_users: {{{SECRET}: prometheus}}",
        f"basic_auth_users: {{'{HASH}': {SECRET}}}",
        f"basic_auth_users: {{{SECRET}: {HASH}, {SECRET}: {HASH}}}",
        f"{{{SECRET}: 1}}",
        f"tls_server_config: {{{SECRET}: 1}}",
        f"tls_server_config: {{cert_file: {SECRET}, key_file: server.key}}",
        f"tls_server_config: {{cert_file: server.pem, key_file: {SECRET}}}",
        f"tls_server_config: {{{SERVER}, min_version: {SECRET}}}",
        f"http_server_config: {{headers: {{X-Frame-Options: {SECRET}}}}}",
        f"http_server_config: {{headers: {{{SECRET}: x}}}}",
        f"rate_limit: {{interval: {SECRET}}}",
    ],
)
def test_no_key_or_value_is_told(place: Path, text: str) -> None:
    """The short error repeats no user, hash, password or other value."""
    with pytest.raises(ConfigError) as caught:
        read(place, text)
    said = str(caught.value)
    assert SECRET not in said
    assert HASH not in said
    assert said.startswith(f"{place}/web.yml:1: ")
    assert "expected " in said


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.sampled_from(["", "x", "TLS12", "server.pem", "server.key", "ca.pem", "1s", "0", HASH]),
        lambda inner: (
            st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
            | st.dictionaries(
                st.sampled_from(
                    [
                        *(
                            "tls_server_config",
                            "http_server_config",
                            "basic_auth_users",
                            "rate_limit",
                        ),
                        *("cert", "cert_file", "key_file", "client_ca_file", "client_auth_type"),
                        *("min_version", "cipher_suites", "headers", "http2", "interval", "burst"),
                    ]
                ),
                inner,
                max_size=4,
            ).map(lambda d: "{" + ", ".join(f"{key}: {value}" for key, value in d.items()) + "}")
        ),
        max_leaves=8,
    )
)
def test_whatever_it_says(place: Path, text: str) -> None:
    """Any text is a valid configuration or gives an error."""
    with suppress(ConfigError):
        assert isinstance(read(place, text), WebConfig)


def test_example(tmp_path: Path, place: Path) -> None:
    """The example is valid as it is, and also with every commented line enabled."""
    text = EXAMPLE.read_text(encoding="utf-8")
    assert load(EXAMPLE) == WebConfig(headers={"X-Frame-Options": "deny"})
    path = tmp_path / "web-config.yml"
    for name in ("server.pem", "server.key", "ca.pem"):
        (tmp_path / name).write_bytes((place / name).read_bytes())
    path.write_text(re.sub(r"^#(?=[a-z]|  )", "", text, flags=re.MULTILINE), encoding="utf-8")
    everything = load(path)
    assert everything.tls is not None
    assert everything.users
    assert everything.headers
    assert everything.rate_limit.burst
    assert everything.client_names


@pytest.mark.parametrize(
    ("keys", "good"),
    [
        (f"tls_server_config: {{{SERVER}}}", True),
        (f"tls_server_config: {{{SERVER}, {CLIENTS}}}", True),
        (f"tls_server_config: {{{SERVER}, client_auth_type: Nonsense}}", False),
        (f"tls_server_config: {{{SERVER}, client_ca_file: ca.pem}}", False),
        (f"tls_server_config: {{{SERVER}, min_version: TLS13, max_version: TLS13}}", True),
        (f"tls_server_config: {{{SERVER}, min_version: TLS9}}", False),
        (f"tls_server_config: {{{SERVER}, cipher_suites: [{', '.join(tls.CIPHERS)}]}}", True),
        (f"tls_server_config: {{{SERVER}, cipher_suites: [ECDHE-RSA-AES128-SHA]}}", False),
        *((f"tls_server_config: {{{SERVER}, curve_preferences: [{c}]}}", True) for c in tls.CURVES),
        (f"tls_server_config: {{{SERVER}, curve_preferences: [P-256]}}", False),
        ("tls_server_config: {cert_file: server.pem}", False),
        ("tls_server_config: {cert_file: server.pem, key_file: other.key}", False),
        ("http_server_config: {http2: false, headers: {X-Frame-Options: deny}}", True),
        ("http_server_config: {headers: {X-Frame-Options: maybe}}", False),
        ("http_server_config: {headers: {Server: x}}", False),
        (f"basic_auth_users: {{a: {HASH}}}", True),
        (f"basic_auth_users: {{a: {SECRET}}}", False),
        ("basic_auth_user: {}", False),
        ("", True),
        ("tls_server_config:", True),
        ("tls_server_config: {min_version: TLS13}", True),
        ("http_server_config:", True),
        ("basic_auth_users:", True),
        (f"basic_auth_users: {{1000: {HASH}, yes: {HASH}}}", True),
        (f"tls_server_config: {{{SERVER}, client_auth_type: VerifyClientCertIfGiven}}", True),
        (f"tls_server_config: {{{SERVER}, client_auth_type: RequestClientCert}}", True),
        ("tls_server_config: {cert_file: server.pem, key_file: locked.key}", False),
        ("tls_server_config: {cert_file: server.pem, key_file: rsa.key}", False),
        ("tls_server_config: {cert_file: order.pem, key_file: server.key}", False),
        ("tls_server_config: {cert_file: request.pem, key_file: server.key}", False),
    ],
)
def test_as_prometheus_has_it(place: Path, keys: str, good: bool) -> None:
    """Prometheus' own checker accepts and refuses the same files."""
    promtool = require("promtool", "prometheus")
    path = place / "web.yml"
    path.write_text(keys, encoding="utf-8")
    done = subprocess.run([promtool, "check", "web-config", path], capture_output=True, text=True)
    assert (done.returncode == 0) == good, done.stdout + done.stderr
    if good:
        load(path)
    else:
        with pytest.raises(ConfigError):
            load(path)


async def test_what_fails_once_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is followed on after an error that has nothing to do with it."""
    monkeypatch.setattr(configuration, "FOLLOW_SECONDS", 0.0)
    monkeypatch.setattr(background, "_AGAIN_SECONDS", 0.0)
    path = tmp_path / "web.yml"
    path.touch()
    web = WebConfigFile(path)
    look, errors = configuration.signature, [RuntimeError("can't start new thread")]

    def signature(path: Path) -> configuration.Signature:
        if errors:
            raise errors.pop()
        return look(path)

    monkeypatch.setattr(configuration, "signature", signature)
    path.write_text(f"basic_auth_users: {{new: {HASH}}}", encoding="ascii")
    changed = asyncio.Event()
    following = web.follow(changed.set)
    await asyncio.wait(
        [following, asyncio.create_task(changed.wait())], timeout=60, return_when="FIRST_COMPLETED"
    )
    following.cancel()
    assert web.config.users
    assert not errors
