"""Certificates without OpenSSL: when they are valid, and what is no certificate."""

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
    """Return certificates that end then, as PEM."""
    issued = (AUTHORITY.issue_cert("localhost", not_before=BEGIN, not_after=end) for end in ends)
    return "".join(cert.cert_chain_pems[0].bytes().decode() for cert in issued)


@pytest.mark.parametrize(
    "end",
    [
        datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC),
        # The last one that has two digits for the year, and the first that has four.
        datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC),
        datetime(2050, 1, 1, tzinfo=UTC),
        # What RFC 5280 has for a certificate without an end.
        datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC),
    ],
)
def test_validity(end: datetime) -> None:
    """Both ends are those that the certificate was issued with, however it writes them."""
    found = validity(certificates(issued(end)))
    assert found == (BEGIN.timestamp(), end.timestamp())


def test_chain() -> None:
    """A chain is valid as long as the first of it that ends."""
    early, late = (datetime(year, 1, 1, tzinfo=UTC) for year in (2030, 2040))
    for order in ((early, late), (late, early)):
        assert validity(certificates(issued(*order))).end == early.timestamp()


def test_last_century() -> None:
    """Two digits from 50 on are a year of the last century."""
    begun = datetime(1999, 1, 1, tzinfo=UTC)
    cert = AUTHORITY.issue_cert("localhost", not_before=begun, not_after=BEGIN)
    chain = certificates(cert.cert_chain_pems[0].bytes().decode())
    assert validity(chain) == (begun.timestamp(), BEGIN.timestamp())


def hostile(text: str) -> None:
    """Read a text as both, for which no other exception may be raised."""
    with suppress(UnfitError):
        validity(certificates(text))
    with suppress(UnfitError):
        expect_key(text)


@given(st.integers(0, len(DER) - 1), st.binary(max_size=4), st.integers(0, 4))
def test_any_bytes(at: int, put: bytes, instead: int) -> None:
    """Whatever stands in a certificate, it is one or damaged."""
    hostile(ssl.DER_cert_to_PEM_cert(DER[:at] + put + DER[at + instead :]))


@given(st.integers(0, len(CHAIN)), st.text(max_size=4), st.integers(0, 100))
def test_any_text(at: int, put: str, instead: int) -> None:
    """Whatever stands in a file, it is taken or said to be something else."""
    hostile(CHAIN[:at] + put + CHAIN[at + instead :])


@given(
    st.lists(
        st.sampled_from(
            ["-----BEGIN ", "-----END ", "-----", "CERTIFICATE", "PRIVATE KEY", "\n", "MIIB", "="]
        )
    ).map("".join)
)
def test_anything_like_pem(text: str) -> None:
    """So it is with whatever PEM's own signs are put together to."""
    hostile(text)
