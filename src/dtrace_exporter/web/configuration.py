"""The web configuration file: TLS, users, headers and a limit of requests.

Its schema is that of exporter-toolkit 0.15, https://github.com/prometheus/exporter-toolkit,
docs/web-configuration.md.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from dtrace_exporter import regular, yaml_reader
from dtrace_exporter.background import keep_at
from dtrace_exporter.log import fields
from dtrace_exporter.regular import Look, unseen
from dtrace_exporter.state import WebStatus
from dtrace_exporter.web import certificates, tls
from dtrace_exporter.web.auth import MAX_COST
from dtrace_exporter.web.certificates import UnfitError, Validity
from dtrace_exporter.yaml_reader import (
    EmptyError,
    Reader,
    Value,
    boolean,
    choice,
    duration,
    integer,
    mapping,
)

_log = logging.getLogger(__name__)

FOLLOW_SECONDS = 1.0
"""How often the files are checked for changes, in seconds."""

_HIDDEN = "a value that is not shown here"
_BCRYPT = re.compile(r"\$2[aby]\$(0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}")
_HEADER_VALUE = re.compile(r"[\x20-\x7e]*")
_HEADERS = {
    "Content-Security-Policy": None,
    "Strict-Transport-Security": None,
    "X-Content-Type-Options": ("nosniff",),
    "X-Frame-Options": ("deny", "sameorigin"),
    "X-XSS-Protection": None,
}
_VERIFYING = {"VerifyClientCertIfGiven": False, "RequireAndVerifyClientCert": True}
# With these no certificate is verified, so the server does not ask for one: all are admitted.
_ADMITTING = ("NoClientCert", "RequestClientCert")
_UNVERIFIED = ("RequireAnyClientCert", "RequireClientCert")

# The keys that Go's TLSConfig.IsEnabled() ignores, without client_allowed_sans, which would have no
# effect here and is therefore an error.
_WITHOUT_TLS = {
    "cipher_suites",
    "curve_preferences",
    "max_version",
    "min_version",
    "prefer_server_cipher_suites",
}
_T = TypeVar("_T")

Signature = tuple[int, ...] | None
"""A value that changes when a file does; None if there is no file."""


@dataclass(frozen=True, slots=True)
class RateLimit:
    """One request in ``interval`` seconds on average, and ``burst`` of them at once."""

    interval: float = 0.0
    burst: int = 0


@dataclass(frozen=True, slots=True)
class WebConfig:
    """The contents of a web configuration file.

    Attributes:
        tls: the TLS context, None for plain HTTP.
        served: when all certificates that the server sends are valid.
        authorities: when at least one of the authorities of client certificates is valid.
        client_names: if not empty, a client's certificate must have one of these names.
        headers: headers of all answers. One with an empty value is not sent.
        users: bcrypt hashes by users' names; if empty, no password is needed.
        rate_limit: the limit of requests.
    """

    tls: ssl.SSLContext | None = None
    served: Validity | None = None
    authorities: Validity | None = None
    client_names: frozenset[str] = frozenset()
    headers: Mapping[str, str] = field(default_factory=dict)
    users: Mapping[bytes, bytes] = field(default_factory=dict)
    rate_limit: RateLimit = RateLimit()


def load(
    path: Path,
    seen: dict[Path, Signature] | None = None,
    look: Look = unseen,
    *,
    empty: bool = True,
) -> WebConfig:
    """Read a web configuration file and the files that it names.

    Args:
        path: the file. Paths in it are relative to its directory.
        seen: for each file that is read, its signature from before it is added to this dict.
        look: raises a ConfigError for a file that must not be read.
        empty: whether an empty file is valid.

    Raises:
        ConfigError: there is an error in the file, or in one that it names.
    """
    seen = {} if seen is None else seen
    seen[path] = signature(path)
    try:
        value = yaml_reader.load(path, quote=False, look=look)
    except EmptyError:
        if not empty:
            raise
        return WebConfig()
    keys = _section(
        {
            "tls_server_config": partial(_tls, _Files(seen, look)),
            "http_server_config": _http,
            "basic_auth_users": _users,
            "rate_limit": _rate_limit,
        },
        value,
    )
    context, served, authorities, names = keys.get("tls_server_config", _NO_TLS)
    return WebConfig(
        context,
        served,
        authorities,
        names,
        keys.get("http_server_config", {}),
        keys.get("basic_auth_users", {}),
        keys.get("rate_limit", RateLimit()),
    )


def signature(path: Path) -> Signature:
    """Return a value that changes when a file changes."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class WebConfigFile:
    """A web configuration that follows changes of its files.

    Args:
        path: the file, or None for an empty configuration.
        look: raises a ConfigError for a file that must not be used.

    Raises:
        ConfigError: there is an error in the file, or it must not be used.

    Attributes:
        config: the last configuration that had no errors.
        status: its status, None without a file.
    """

    def __init__(self, path: Path | None, look: Look = unseen) -> None:
        self._path = path
        self._look = look
        self._seen: dict[Path, Signature] = {}
        self.config = load(path, self._seen, look) if path else WebConfig()
        self.status = WebStatus() if path else None
        self._tell(successful=True)

    def _tell(self, *, successful: bool) -> None:
        if self.status is not None:
            served = self.config.served
            self.status.last_reload_successful = successful
            self.status.certificate_end = served.end if served else None

    @property
    def files(self) -> list[Path]:
        """The file, and those that it names."""
        return list(self._seen)

    def follow(self, changed: Callable[[], None]) -> asyncio.Task[None]:
        """Follow changes of the files until cancelled. Errors are logged once and change nothing.

        Args:
            changed: called after each change without errors.
        """
        return keep_at(partial(self._follow, changed))

    async def _follow(self, changed: Callable[[], None]) -> None:
        before: dict[Path, Signature] = {}
        while self._path:
            await asyncio.sleep(FOLLOW_SECONDS)
            now = await asyncio.to_thread(lambda: {path: signature(path) for path in self._seen})
            if now == self._seen:
                continue
            if now != before:
                # Wait until the writer has finished.
                before = now
                continue
            seen: dict[Path, Signature] = {}
            # An empty file, perhaps because of a full disk, must not remove TLS or passwords.
            empty = not (self.config.tls or self.config.users)
            try:
                config = await asyncio.to_thread(load, self._path, seen, self._look, empty=empty)
            except Exception as error:
                why = fields(why=str(error))
                _log.error(
                    "web configuration changed to a bad one, the last good one is kept", extra=why
                )
                self._seen = now | seen
                self._tell(successful=False)
            else:
                _log.info("web configuration changed", extra=fields(file=str(self._path)))
                self.config, self._seen = config, seen
                self._tell(successful=True)
                changed()


class _Files(NamedTuple):
    """How files that the configuration names are read."""

    seen: dict[Path, Signature]
    look: Look


class _Pem(NamedTuple):
    value: Value
    text: str
    file: Path | None = None

    def fail(self, expected: str, found: str) -> NoReturn:
        self.value.fail(expected, found, f"{found}: {self.file}" if self.file else "")

    def read(self, reader: Callable[[str], _T]) -> _T:
        """Return the result of a reader of PEM; its errors become those of the configuration."""
        try:
            return reader(self.text)
        except UnfitError as error:
            self.fail(error.expected, error.found)


_Tls = tuple[ssl.SSLContext | None, Validity | None, Validity | None, frozenset[str]]
_NO_TLS: _Tls = None, None, None, frozenset()


def _section(readers: Mapping[str, Reader], value: Value) -> dict[str, Any]:
    """Read a mapping; as in Go, null means that it has no keys."""
    return {} if value.is_a("null") else mapping(value, readers)


def _string(value: Value, expected: str) -> str:
    """Read a string; as in Go, any scalar but null is one."""
    if not value.is_a("str", "bool", "int", "float", "timestamp"):
        value.fail(expected)
    return str(value.node.value)


def _inline(value: Value) -> _Pem:
    if not value.is_a("str") or "-----BEGIN " not in value.node.value:
        value.fail("PEM", _HIDDEN)
    return _Pem(value, value.node.value)


def _file(files: _Files, value: Value) -> _Pem:
    name = _string(value, "a file's name")
    if not name or "\0" in name:
        value.fail("a file's name")
    path = (value.path.parent / name).absolute()
    files.seen[path] = signature(path)
    try:
        data = regular.read(path, files.look)
    except OSError as error:
        found = f"none: {error.strerror}"
        value.fail("a readable file", found, f"{found}: {path}")
    if b"-----BEGIN " not in data and b"\0" in data:
        found = "binary data, as DER or PKCS #12 is"
        value.fail("a file of PEM", found, f"{found}: {path}")
    return _Pem(value, data.decode("utf-8-sig", "replace"), path)


def _with_value(read: Callable[[Value], Any], value: Value) -> tuple[Value, Any]:
    return value, read(value)


def _tls(files: _Files, value: Value) -> _Tls:
    file = partial(_file, files)
    keys = _section(
        {
            "cert": _inline,
            "cert_file": file,
            "key": _inline,
            "key_file": file,
            "client_ca": _inline,
            "client_ca_file": file,
            "client_auth_type": partial(_with_value, _client_auth),
            "client_allowed_sans": partial(_with_value, _names),
            "min_version": partial(_with_value, _version),
            "max_version": partial(_with_value, _version),
            "cipher_suites": partial(_with_value, partial(_words, tls.CIPHERS, tls.TLS13_CIPHERS)),
            "prefer_server_cipher_suites": boolean,
            "curve_preferences": partial(_with_value, partial(_words, tls.CURVES, ())),
        },
        value,
    )
    if keys.keys() <= _WITHOUT_TLS:
        return _NO_TLS
    cert = _one_of(value, keys, "cert") or value.fail("the key cert_file", "none")
    key = _one_of(value, keys, "key") or value.fail("the key key_file", "none")
    chain = cert.read(certificates.certificates)
    context = _context(cert, key, chain)
    _restrict(context, keys)
    authorities = _clients(context, value, keys)
    return context, certificates.validity(chain), authorities, _allowed(value, keys)


def _context(cert: _Pem, key: _Pem, chain: Sequence[bytes]) -> ssl.SSLContext:
    for each in chain:
        try:
            tls.expect_certificate(each)
        except ssl.SSLError:
            cert.fail("certificates", "a damaged one")
    key.read(certificates.expect_key)
    try:
        return tls.context(cert.text, key.text)
    except tls.MismatchError:
        for number, each in enumerate(chain[1:], 2):
            with suppress(tls.MismatchError, ssl.SSLError):
                tls.context(ssl.DER_cert_to_PEM_cert(each), key.text)
                expected = "the server's certificate first, before those above it"
                cert.fail(expected, f"it as number {number}")
        key.fail("the private key of the server's certificate", "that of another")
    except ssl.SSLError as error:
        if error.reason is None:
            # For a damaged key OpenSSL gives no reason.
            key.fail("a private key", "a damaged one")
        cert.fail("a certificate that OpenSSL takes", error.reason)


def _restrict(context: ssl.SSLContext, keys: Mapping[str, Any]) -> None:
    if "min_version" in keys:
        context.minimum_version = keys["min_version"][1]
    if "max_version" in keys:
        entry, version = keys["max_version"]
        if version < context.minimum_version:
            entry.fail("a version not below min_version")
        context.maximum_version = version
    if not keys.get("prefer_server_cipher_suites", True):
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    if (suites := keys.get("cipher_suites")) and suites[1]:
        try:
            tls.use_ciphers(context, suites[1])
        except ValueError as error:
            suites[0].fail("a cipher suite for max_version", str(error))
        except ssl.SSLError:
            suites[0].fail("cipher suites that this OpenSSL has", "none")
    if (curves := keys.get("curve_preferences")) and curves[1]:
        try:
            tls.use_curves(context, curves[1])
        except NotImplementedError as error:
            curves[0].fail("one curve, or an empty list for the default", str(error))
        except ssl.SSLError:
            # For example, Python 3.11.2 cannot choose X25519.
            curves[0].fail("a curve that this Python can choose", "another")


def _clients(context: ssl.SSLContext, value: Value, keys: Mapping[str, Any]) -> Validity | None:
    entry, kind = keys.get("client_auth_type", (value, _ADMITTING[0]))
    authorities = _one_of(value, keys, "client_ca")
    if kind not in _VERIFYING:
        if authorities:
            expected = f"a client_auth_type, {' or '.join(_VERIFYING)}, to go with it"
            authorities.fail(expected, kind)
        return None
    if not authorities:
        if _VERIFYING[kind]:
            why = "because the system's authorities, Go's default, issue certificates to everybody"
            entry.fail(f"the key client_ca_file beside it, {why}", "none")
        tls.verify_clients(context, (), required=False)
        return None
    chain = authorities.read(certificates.certificates)
    try:
        tls.verify_clients(context, chain, required=_VERIFYING[kind])
    except ssl.SSLError:
        authorities.fail("certificates", "a damaged one")
    each = [certificates.validity([one]) for one in chain]
    return Validity(min(one.begin for one in each), max(one.end for one in each))


def _allowed(value: Value, keys: Mapping[str, Any]) -> frozenset[str]:
    if "client_allowed_sans" not in keys:
        return frozenset()
    _, kind = keys.get("client_auth_type", (value, _ADMITTING[0]))
    entry, names = keys["client_allowed_sans"]
    if not _VERIFYING.get(kind):
        entry.fail("client_auth_type RequireAndVerifyClientCert to go with it", kind)
    return frozenset(names)


def _one_of(value: Value, keys: Mapping[str, Any], name: str) -> _Pem | None:
    inline, file = keys.get(name), keys.get(f"{name}_file")
    if inline and file:
        value.fail(f"only one of {name} and {name}_file", "both")
    return inline or file


def _client_auth(value: Value) -> str:
    if value.is_a("str") and value.node.value in _UNVERIFIED:
        found = f"{value.node.value}: Python's ssl takes no certificate that it cannot verify"
        value.fail("RequireAndVerifyClientCert", found)
    return choice((*_ADMITTING, *_VERIFYING), value)


def _names(value: Value) -> list[str]:
    names = [_string(item, "a subject alternative name") for item in value.items()]
    return names or value.fail("at least one name", "an empty list")


def _version(value: Value) -> ssl.TLSVersion:
    if value.is_a("str") and value.node.value in tls.REFUSED_VERSIONS:
        found = f"{value.node.value}, which RFC 8996 deprecates"
        value.fail(" or ".join(tls.VERSIONS), found)
    return tls.VERSIONS[choice(tls.VERSIONS, value)]


def _words(known: Mapping[str, str], more: Iterable[str], value: Value) -> list[str]:
    """Read names of Go. If one of OpenSSL's is found, the error has Go's."""
    ours = {theirs: name for name, theirs in known.items() if theirs != name}
    for item in value.items():
        if item.is_a("str") and item.node.value in ours:
            item.fail(ours[item.node.value], "OpenSSL's name for it")
    return [choice((*known, *more), item) for item in value.items()]


def _http(value: Value) -> dict[str, str]:
    # http2 is accepted and ignored: a server need not offer HTTP/2, and this one has HTTP/1.1 only.
    keys = _section({"http2": boolean, "headers": _headers}, value)
    headers: dict[str, str] = keys.get("headers", {})
    return headers


def _headers(value: Value) -> dict[str, str]:
    headers = _section(dict.fromkeys(_HEADERS, _header_value), value)
    for name, _, entry in value.entries() if headers else ():
        allowed = _HEADERS[name]
        if allowed and headers[name] and headers[name] not in allowed:
            entry.is_known(name).fail(" or ".join(allowed))
    return headers


def _header_value(value: Value) -> str:
    if value.is_a("null"):
        return ""
    expected = "a header's value in printable ASCII"
    text = _string(value, expected)
    if not _HEADER_VALUE.fullmatch(text):
        value.fail(expected)
    return text


def _users(value: Value) -> dict[bytes, bytes]:
    if value.is_a("null"):
        return {}
    if value.node.tag != "tag:yaml.org,2002:map":
        value.fail("users and bcrypt hashes", _HIDDEN)
    users = {
        name.encode(errors="surrogatepass"): _hash(entry)
        for name, _, entry in value.entries(plain=True)
    }
    if users:
        try:
            import bcrypt  # noqa: F401
        except ImportError:
            value.fail(
                "the Python package bcrypt to be installed: pip install 'dtrace-exporter[auth]'",
                "none",
            )
    return users


def _hash(value: Value) -> bytes:
    match = _BCRYPT.fullmatch(value.node.value) if value.is_a("str") else None
    if match is None:
        value.fail("a password's bcrypt hash, as from htpasswd -nBC 10 USER", _HIDDEN)
    if int(match[1]) > MAX_COST:
        why = "because checking a dearer one keeps others waiting"
        value.fail(f"a bcrypt hash with a cost of at most {MAX_COST}, {why}", "a higher one")
    return match[0].encode()


def _rate_limit(value: Value) -> RateLimit:
    keys = _section(
        {"interval": _interval, "burst": partial(integer, 0, 1_000_000, "a number")}, value
    )
    limit = RateLimit(**keys)
    if limit.interval and "burst" not in keys:
        # In Go it would be 0, and no request would be answered.
        value.fail("the key burst beside interval", "none")
    return limit


def _interval(value: Value) -> float:
    if value.is_a("int") and value.node.value == "0":
        return 0.0
    return duration(value, "a duration such as 100ms or 1s, or 0")
