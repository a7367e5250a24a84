"""TLS with the names that Go, and therefore web configuration files, use for its parts."""

from __future__ import annotations

import math
import os
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from threading import Thread
from typing import Any

from dtrace_exporter.yaml_reader import ConfigError

VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}

REFUSED_VERSIONS = ("SSL30", "TLS10", "TLS11")
"""Today's OpenSSL does not have them, and RFC 8996 forbids them."""

# The cipher suites that Go's crypto/tls calls secure, with OpenSSL's names.
CIPHERS = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA": "ECDHE-ECDSA-AES128-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA": "ECDHE-ECDSA-AES256-SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA": "ECDHE-RSA-AES128-SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA": "ECDHE-RSA-AES256-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
}

TLS13_CIPHERS = (
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
)
"""With TLS 1.3 all of them are always enabled, as in Go."""

CURVES = {
    "CurveP256": "prime256v1",
    "CurveP384": "secp384r1",
    "CurveP521": "secp521r1",
    "X25519": "X25519",
}


_DESCRIPTORS = ("/dev/fd", "/proc/self/fd")

# The first two are in X509_check_private_key(3). The third comes if the certificate and the key are
# of different kinds: OpenSSL then has no certificate for this key.
_MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")


class MismatchError(Exception):
    """A private key does not belong to the certificate."""


def context(cert: str, key: str) -> ssl.SSLContext:
    """Return a server's TLS context.

    Args:
        cert: its certificate and the intermediate ones, as PEM.
        key: its private key as PEM, not encrypted.

    Raises:
        MismatchError: they do not belong together. Without memfd_create(2) other errors raise this
            as well.
        ssl.SSLError: OpenSSL rejects one of them.
        ConfigError: there is no way to pass them to OpenSSL.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    made.set_alpn_protocols(["http/1.1"])
    # Scrapers keep their connections, so they need no tickets, which would cost memory.
    made.num_tickets = 0
    # OpenSSL's default has ffdhe8192, too, which takes 0.1 s of processor time, and Python sets no
    # list of curves before 3.15. Every client of TLS 1.3 has this one (RFC 8446, 9.1).
    made.set_ecdh_curve(CURVES["CurveP256"])
    with _as_file(cert) as cert_file, _as_file(key) as key_file:
        try:
            # Without a password here, OpenSSL would ask for one on the terminal.
            made.load_cert_chain(cert_file, key_file, password="")
        except OSError as error:
            # If OpenSSL has read a pipe, the error only says that one cannot seek in a pipe.
            if not isinstance(error, ssl.SSLError) or error.reason in _MISMATCHES:
                raise MismatchError from None
            raise
    return made


@contextmanager
def _as_file(text: str) -> Iterator[str]:
    """Give a text a file name, which Python's ssl needs, without writing it to a file system."""
    data = text.encode(errors="replace")
    if not hasattr(os, "memfd_create"):
        with _as_pipe(data) as descriptor:
            yield _name(descriptor)
        return
    descriptor = os.memfd_create("pem")
    with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123
        file.write(data)
        yield _name(descriptor)


@contextmanager
def _as_pipe(data: bytes) -> Iterator[int]:
    reading, writing = os.pipe()
    thread = Thread(target=_pour, args=(data, writing))
    thread.start()
    try:
        yield reading
    finally:
        os.close(reading)
        thread.join()


def _pour(data: bytes, descriptor: int) -> None:
    with suppress(BrokenPipeError), open(descriptor, "wb") as file:
        file.write(data)


def _name(descriptor: int) -> str:
    for directory in _DESCRIPTORS:
        path = Path(directory, str(descriptor))
        if path.exists():
            return str(path)
    raise ConfigError(
        f"OpenSSL reads certificate and key by their descriptors: expected {_DESCRIPTORS[0]}, which"
        " on Linux needs /proc to be mounted (found none)"
    )


def expect_certificate(certificate: bytes) -> None:
    """Check that OpenSSL accepts a certificate.

    Args:
        certificate: the certificate as DER.

    Raises:
        ssl.SSLError: it does not.
    """
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=certificate)


def verify_clients(made: ssl.SSLContext, authorities: Sequence[bytes], *, required: bool) -> None:
    """Verify the certificates of clients.

    Args:
        made: the context.
        authorities: the certificates, as DER, of the authorities that may issue theirs. If there
            are none, each certificate of a client is rejected.
        required: whether clients without a certificate are rejected.

    Raises:
        ssl.SSLError: a certificate is damaged.
    """
    if authorities:
        made.load_verify_locations(cadata=b"".join(authorities))
    made.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL


def use_ciphers(made: ssl.SSLContext, names: Sequence[str]) -> None:
    """Restrict the cipher suites of TLS 1.2; if none of them is named, allow TLS 1.3 only.

    Args:
        made: the context.
        names: keys of CIPHERS, or names in TLS13_CIPHERS.

    Raises:
        ValueError: no version of TLS is left.
    """
    older = [CIPHERS[name] for name in names if name in CIPHERS]
    if older:
        made.set_ciphers(":".join(older))
    elif made.maximum_version == ssl.TLSVersion.TLSv1_2:
        raise ValueError("no cipher suite of TLS 1.2")
    else:
        made.minimum_version = ssl.TLSVersion.TLSv1_3


def use_curves(made: ssl.SSLContext, names: Sequence[str]) -> None:
    """Restrict the key exchange to some curves.

    Args:
        made: the context.
        names: keys of CURVES, the preferred one first.

    Raises:
        NotImplementedError: this Python's ssl takes only one.
    """
    curves = [CURVES[name] for name in names]
    if hasattr(made, "set_groups"):
        made.set_groups(":".join(curves))
    elif len(curves) > 1:
        raise NotImplementedError("several, which Python takes only from 3.15 on")
    else:
        made.set_ecdh_curve(curves[0])


def expiry(certificate: Any) -> float:
    """Return when a verified certificate expires, in seconds since 1970; infinity without one.

    Args:
        certificate: as SSLSocket.getpeercert() returns it.
    """
    return ssl.cert_time_to_seconds(certificate["notAfter"]) if certificate else math.inf


def alternative_names(certificate: Any) -> set[str]:
    """Return the subject alternative names of a verified certificate, in Go's notation.

    Args:
        certificate: as SSLSocket.getpeercert() returns it.
    """
    names = set()
    for kind, name in (certificate or {}).get("subjectAltName", ()):
        if kind in ("DNS", "email", "URI"):
            names.add(name)
        elif kind == "IP Address":
            names.add(str(ip_address(name.strip())))
    return names
