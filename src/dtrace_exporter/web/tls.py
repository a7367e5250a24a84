"""TLS by the names that Go, and so every web configuration file, gives to its parts."""

from __future__ import annotations

import math
import os
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from threading import Thread
from typing import Any

VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}

REFUSED_VERSIONS = ("SSL30", "TLS10", "TLS11")
"""Of no use with today's OpenSSL, and refused by RFC 8996."""

# As crypto/tls lists them as secure, with OpenSSL's names.
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
"""TLS 1.3 always has all of them, in Go as here."""

CURVES = {
    "CurveP256": "prime256v1",
    "CurveP384": "secp384r1",
    "CurveP521": "secp521r1",
    "X25519": "X25519",
}


def context(cert: str, key: str) -> ssl.SSLContext:
    """Return a server's TLS context.

    Args:
        cert: its certificate and those between it and the root, as PEM.
        key: its private key, as PEM, not encrypted.

    Raises:
        OSError: they are no PEM, or do not belong together.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    made.set_alpn_protocols(["http/1.1"])
    # Scrapers keep their connection instead, and who only looks in should cost no memory.
    made.num_tickets = 0
    with _as_file(cert) as cert_file, _as_file(key) as key_file:
        # Without a password of its own OpenSSL asks the terminal for one.
        made.load_cert_chain(cert_file, key_file, password="")
    return made


@contextmanager
def _as_file(text: str) -> Iterator[str]:
    """Give a text a file's name, as Python's ssl wants, and keep it out of every file system."""
    reading, writing = os.pipe()
    thread = Thread(target=_pour, args=(text.encode(), writing))
    thread.start()
    try:
        yield f"/dev/fd/{reading}"
    finally:
        os.close(reading)
        thread.join()


def _pour(data: bytes, descriptor: int) -> None:
    with suppress(BrokenPipeError), open(descriptor, "wb") as file:
        file.write(data)


def verify_clients(made: ssl.SSLContext, authorities: str, *, required: bool) -> None:
    """Have clients show a certificate.

    Args:
        made: the context.
        authorities: the certificates, as PEM, of who may have issued theirs.
        required: else those that show none are admitted, too.

    Raises:
        ssl.SSLError: there is no certificate in it, or a broken one.
    """
    made.load_verify_locations(cadata=authorities)
    made.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL


def use_ciphers(made: ssl.SSLContext, names: Sequence[str]) -> None:
    """Restrict TLS 1.2 to some of CIPHERS; with none but those of TLS 1.3, only that is left.

    Raises:
        ValueError: nothing is left.
    """
    older = [CIPHERS[name] for name in names if name in CIPHERS]
    if older:
        made.set_ciphers(":".join(older))
    elif made.maximum_version == ssl.TLSVersion.TLSv1_2:
        raise ValueError("no cipher suite of TLS 1.2")
    else:
        made.minimum_version = ssl.TLSVersion.TLSv1_3


def use_curves(made: ssl.SSLContext, names: Sequence[str]) -> None:
    """Restrict the key exchange to some of CURVES, the preferred one first.

    Raises:
        NotImplementedError: this Python's ssl can be told about one only.
    """
    curves = [CURVES[name] for name in names]
    if hasattr(made, "set_groups"):
        made.set_groups(":".join(curves))
    elif len(curves) > 1:
        raise NotImplementedError("more than one curve needs Python 3.15")
    else:
        made.set_ecdh_curve(curves[0])


def expiry(certificate: Any) -> float:
    """Return when a verified certificate expires, in seconds since the epoch; without one, never.

    Args:
        certificate: as SSLSocket.getpeercert() returns it.
    """
    return ssl.cert_time_to_seconds(certificate["notAfter"]) if certificate else math.inf


def alternative_names(certificate: Any) -> set[str]:
    """Return the names that a verified certificate is for, each written as Go writes it.

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
