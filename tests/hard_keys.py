"""Certificates with keys that OpenSSL decodes slowly: anybody can make them."""

from __future__ import annotations

import ssl

# The points of this curve are compressed, so OpenSSL computes square roots modulo a prime of which
# a high power of two divides the predecessor. That takes long (Tonelli and Shanks).
_TWOS = 600
PRIME = (576460752303424833 << _TWOS) + 1
_A, _B = 5, 7
_EC_KEY = bytes.fromhex("06072a8648ce3d0201")
_PRIME_FIELD = bytes.fromhex("06072a8648ce3d0101")
_ECDSA = bytes.fromhex("06082a8648ce3d040302")
_INTEGER, _BITS, _BYTES, _UTC_TIME, _SEQUENCE = 0x02, 0x03, 0x04, 0x17, 0x30


def _der(tag: int, *contents: bytes) -> bytes:
    """Return a DER element, whose length is always in three bytes."""
    content = b"".join(contents)
    return bytes([tag, 0x82]) + len(content).to_bytes(2) + content


def _number(value: int) -> bytes:
    return _der(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1))


def certificate() -> str:
    """Return such a certificate as PEM; nobody has signed it."""
    size = (PRIME.bit_length() + 7) // 8
    x = next(x for x in range(1, 100) if pow(x**3 + _A * x + _B, PRIME >> 1, PRIME) == 1)
    point = b"\x02" + x.to_bytes(size)
    curve = _der(
        _SEQUENCE,
        _number(1),
        _der(_SEQUENCE, _PRIME_FIELD, _number(PRIME)),
        _der(_SEQUENCE, *(_der(_BYTES, number.to_bytes(size)) for number in (_A, _B))),
        _der(_BYTES, point),
        _number(PRIME - 2),
        _number(1),
    )
    key = _der(_SEQUENCE, _der(_SEQUENCE, _EC_KEY, curve), _der(_BITS, b"\0", point))
    ecdsa, nobody = _der(_SEQUENCE, _ECDSA), _der(_SEQUENCE)
    times = (_der(_UTC_TIME, when) for when in (b"200101000000Z", b"400101000000Z"))
    signed = _der(_SEQUENCE, _number(1), ecdsa, nobody, _der(_SEQUENCE, *times), nobody, key)
    return ssl.DER_cert_to_PEM_cert(_der(_SEQUENCE, signed, ecdsa, _der(_BITS, b"\0")))
