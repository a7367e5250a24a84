"""Finds out what a file of certificates or keys has, and for how long a certificate is valid.

For most files that OpenSSL cannot read it does not say why. An operator needs to know what the file
is instead. The format of PEM is in RFC 7468, and in RFC 1421 for keys in OpenSSL's old encryption;
that of certificates is in RFC 5280, section 4.1.
"""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

_BEGIN = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----")

# The labels that OpenSSL takes, see PEM_read_bio_X509(3) and PEM_read_bio_PrivateKey(3).
_CERTIFICATES = ("CERTIFICATE", "X509 CERTIFICATE", "TRUSTED CERTIFICATE")
_KEYS = ("PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY", "DSA PRIVATE KEY")
_ENCRYPTED_KEY = "ENCRYPTED PRIVATE KEY"
_ENCRYPTED = "an encrypted private key"
_NAMES = {
    **dict.fromkeys(_CERTIFICATES, "a certificate"),
    **dict.fromkeys(_KEYS, "a private key"),
    _ENCRYPTED_KEY: _ENCRYPTED,
    "OPENSSH PRIVATE KEY": "a private key in ssh's format",
    "CERTIFICATE REQUEST": "a request for a certificate",
    "NEW CERTIFICATE REQUEST": "a request for a certificate",
    "PUBLIC KEY": "a public key",
    "RSA PUBLIC KEY": "a public key",
    "X509 CRL": "a list of revoked certificates",
    "PKCS7": "PKCS #7",
}

_SEQUENCE, _INTEGER, _VERSION = 0x30, 0x02, 0xA0
_TIMES = {0x17: "%y%m%d%H%M%SZ", 0x18: "%Y%m%d%H%M%SZ"}
_UTC_TIME = 0x17


class UnfitError(Exception):
    """A text is not what was expected.

    Args:
        expected: what was expected.
        found: what was found, without quotations of the text.
    """

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected} (found {found})")
        self.expected = expected
        self.found = found


class Validity(NamedTuple):
    """A period of validity: its begin and its end, in seconds since 1970."""

    begin: float
    end: float


class _Block(NamedTuple):
    label: str
    lines: Sequence[str]

    @property
    def name(self) -> str:
        # OpenSSL's old way to encrypt keys.
        if self.label in _KEYS and any(line.startswith("Proc-Type: 4,ENC") for line in self.lines):
            return _ENCRYPTED
        return _NAMES.get(self.label, "something else")

    def decode(self) -> bytes:
        """Return its contents.

        Raises:
            ValueError: they are not base64.
        """
        return b64decode("".join(self.lines), validate=True)


def certificates(text: str) -> list[bytes]:
    """Return the certificates in a PEM text, in their order, as DER.

    Raises:
        UnfitError: there are none, or one is damaged.
    """
    blocks = _blocks(text, "certificates in PEM")
    found = [block for block in blocks if block.label in _CERTIFICATES]
    if not found:
        raise UnfitError("a certificate", _named(blocks))
    try:
        decoded = [block.decode() for block in found]
        for each in decoded:
            _validity(each)
    except (ValueError, IndexError, OverflowError):
        raise UnfitError("certificates", "a damaged one") from None
    return decoded


def expect_key(text: str) -> None:
    """Check that a PEM text has a private key that is not encrypted.

    Raises:
        UnfitError: it has none, or the key is encrypted or damaged.
    """
    blocks = _blocks(text, "a private key in PEM")
    found = [block for block in blocks if block.label in (*_KEYS, _ENCRYPTED_KEY)]
    if not found:
        raise UnfitError("a private key", _named(blocks))
    if found[0].name == _ENCRYPTED:
        raise UnfitError("a private key that is not encrypted", _ENCRYPTED)
    try:
        _element(found[0].decode(), 0, _SEQUENCE)
    except (ValueError, IndexError):
        raise UnfitError("a private key", "a damaged one") from None


def validity(chain: Sequence[bytes]) -> Validity:
    """Return when all certificates of a chain are valid.

    Args:
        chain: the certificates, as certificates() returns them.
    """
    each = [_validity(certificate) for certificate in chain]
    return Validity(max(one.begin for one in each), min(one.end for one in each))


def _blocks(text: str, expected: str) -> list[_Block]:
    blocks = []
    label = ""
    lines: list[str] = []
    for line in text.splitlines():
        bare = line.rstrip()
        begin = _BEGIN.fullmatch(bare)
        if label and begin:
            break
        if begin:
            label, lines = begin[1], []
        elif label and bare == f"-----END {label}-----":
            blocks.append(_Block(label, lines))
            label = ""
        else:
            lines.append(bare)
    if label:
        raise UnfitError(expected, f"{_Block(label, lines).name} that is cut off")
    if not blocks:
        raise UnfitError(expected, "no PEM" if text.strip() else "nothing")
    return blocks


def _named(blocks: Sequence[_Block]) -> str:
    return " and ".join(dict.fromkeys(block.name for block in blocks))


def _validity(certificate: bytes) -> Validity:
    """Return the validity of a certificate.

    Raises:
        ValueError, IndexError: it is damaged.
    """
    _, at, _ = _element(certificate, 0, _SEQUENCE)
    _, at, _ = _element(certificate, at, _SEQUENCE)
    if certificate[at] == _VERSION:
        *_, at = _element(certificate, at)
    # The serial number, the signature's algorithm and the issuer.
    for tag in (_INTEGER, _SEQUENCE, _SEQUENCE):
        *_, at = _element(certificate, at, tag)
    _, at, _ = _element(certificate, at, _SEQUENCE)
    begin, at = _time(certificate, at)
    end, _ = _time(certificate, at)
    return Validity(begin, end)


def _time(data: bytes, at: int) -> tuple[float, int]:
    tag, begin, end = _element(data, at)
    text = data[begin:end].decode("ascii")
    time = datetime.strptime(text, _TIMES.get(tag, "")).replace(tzinfo=UTC)
    if tag == _UTC_TIME and time.year >= 2050:
        time = time.replace(year=time.year - 100)
    return time.timestamp(), end


def _element(data: bytes, at: int, tag: int | None = None) -> tuple[int, int, int]:
    """Return the tag of the DER element at a position, and where its contents begin and end."""
    if tag is not None and data[at] != tag:
        raise ValueError("another element")
    length, begin = data[at + 1], at + 2
    if length & 0x80:
        more = length & 0x7F
        length, begin = int.from_bytes(data[begin : begin + more]), begin + more
    if begin + length > len(data):
        raise ValueError("cut off")
    return data[at], begin, begin + length
