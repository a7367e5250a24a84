"""Reading certificates without OpenSSL: their validity, and text that is no certificate."""

from __future__ import annotations

import ssl
from contextlib import suppress
from datetime import UTC, datetime

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter.web.certificates import UnfitError, certificates, expect_key, validity

AUTHORITY = trustme.CA()
BEGIN = datetime(2000, 1, 1, tzinfo=UTC)
CERT = AUTHORITY.issue_cert("localhost")
CHAIN = CERT.cert_chain_pems[0].bytes().decode() + AUTHORITY.cert_pem.bytes().decode()
(DER,) = certificates(CERT.cert_chain_pems[0].bytes().decode())


def issued(*ends: datetime) -> str:
    """Return certificates in PEM with these ends of validity."""
    issued = (AUTHORITY.issue_cert("localhost", not_before=BEGIN, not_after=end) for end in ends)
    return "".join(cert.cert_chain_pems[0].bytes().decode() for cert in issued)


@pytest.mark.parametrize(
    "end",
    [
        datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC),
        # The last year that is written with two digits, and the first with four.
        datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC),
        datetime(2050, 1, 1, tzinfo=UTC),
        # The end that RFC 5280 gives to a certificate without one.
        datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC),
    ],
)
def test_validity(end: datetime) -> None:
    """Both ends of the validity are those of the issue, in either notation of the year."""
    found = validity(certificates(issued(end)))
    assert found == (BEGIN.timestamp(), end.timestamp())


def test_chain() -> None:
    """A chain is valid until the first of its certificates expires."""
    early, late = (datetime(year, 1, 1, tzinfo=UTC) for year in (2030, 2040))
    for order in ((early, late), (late, early)):
        assert validity(certificates(issued(*order))).end == early.timestamp()


def test_last_century() -> None:
    """A year of two digits from 50 on is in the last century."""
    begun = datetime(1999, 1, 1, tzinfo=UTC)
    cert = AUTHORITY.issue_cert("localhost", not_before=begun, not_after=BEGIN)
    chain = certificates(cert.cert_chain_pems[0].bytes().decode())
    assert validity(chain) == (begun.timestamp(), BEGIN.timestamp())


def hostile(text: str) -> None:
    """Read a text as certificates and as a key; neither may raise anything but UnfitError."""
    with suppress(UnfitError):
        validity(certificates(text))
    with suppress(UnfitError):
        expect_key(text)


@given(st.integers(0, len(DER) - 1), st.binary(max_size=4), st.integers(0, 4))
def test_any_bytes(at: int, put: bytes, instead: int) -> None:
    """A certificate with arbitrary changed bytes is read, or raises UnfitError."""
    hostile(ssl.DER_cert_to_PEM_cert(DER[:at] + put + DER[at + instead :]))


@given(st.integers(0, len(CHAIN)), st.text(max_size=4), st.integers(0, 100))
def test_any_text(at: int, put: str, instead: int) -> None:
    """A file with arbitrary changed text is read, or raises UnfitError."""
    hostile(CHAIN[:at] + put + CHAIN[at + instead :])


@given(
    st.lists(
        st.sampled_from(
            ["-----BEGIN ", "-----END ", "-----", "CERTIFICATE", "PRIVATE KEY", "\n", "MIIB", "="]
        )
    ).map("".join)
)
def test_anything_like_pem(text: str) -> None:
    """Arbitrary combinations of PEM's own elements are read, or raise UnfitError."""
    hostile(text)
