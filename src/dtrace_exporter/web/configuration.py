"""The web configuration file: who may use the web server, and over what.

Its schema is that of exporter-toolkit 0.15, https://github.com/prometheus/exporter-toolkit,
docs/web-configuration.md.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dtrace_exporter import yaml_reader
from dtrace_exporter.log import fields
from dtrace_exporter.web import tls
from dtrace_exporter.yaml_reader import (
    ConfigError,
    Value,
    boolean,
    choice,
    duration,
    integer,
    mapping,
)

_log = logging.getLogger(__name__)

FOLLOW_SECONDS = 1.0
"""How often the files are looked at."""

_HIDDEN = "a value that is not shown here"
_BCRYPT = re.compile(r"\$2[aby]\$(?:0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}")
_HEADER_VALUE = re.compile(r"[\x20-\x7e]*")
_HEADERS = {
    "Content-Security-Policy": None,
    "Strict-Transport-Security": None,
    "X-Content-Type-Options": ("nosniff",),
    "X-Frame-Options": ("deny", "sameorigin"),
    "X-XSS-Protection": None,
}
_VERIFYING = {"VerifyClientCertIfGiven": False, "RequireAndVerifyClientCert": True}
_UNVERIFIED = {
    "RequestClientCert": "NoClientCert, which admits the same clients",
    "RequireAnyClientCert": "RequireAndVerifyClientCert",
    "RequireClientCert": "RequireAndVerifyClientCert",
}

Signature = tuple[int, ...] | None
"""What changes when a file does; None where there is none."""


@dataclass(frozen=True, slots=True)
class RateLimit:
    """One request each ``interval`` seconds on average, and ``burst`` of them at once."""

    interval: float = 0.0
    burst: int = 0


@dataclass(frozen=True, slots=True)
class WebConfig:
    """What a web configuration file says.

    ``tls`` is None for plain HTTP. With ``client_names`` a client's certificate has to be for one
    of them. ``users`` are names and bcrypt hashes; without any, everybody may come in. A header
    whose value is empty is not sent.
    """

    tls: ssl.SSLContext | None = None
    client_names: frozenset[str] = frozenset()
    headers: Mapping[str, str] = field(default_factory=dict)
    users: Mapping[bytes, bytes] = field(default_factory=dict)
    rate_limit: RateLimit = RateLimit()


def load(path: Path, seen: dict[Path, Signature] | None = None) -> WebConfig:
    """Read a web configuration file and the files that it names.

    Args:
        path: the file. Others are relative to its directory.
        seen: gets a signature, as it was before it was read, for each file that was.

    Raises:
        ConfigError: the file, or one that it names, is bad.
    """
    seen = {} if seen is None else seen
    seen[path] = signature(path)
    keys = mapping(
        yaml_reader.load(path, quote=False),
        {
            "tls_server_config": partial(_tls, seen),
            "http_server_config": _http,
            "basic_auth_users": _users,
            "rate_limit": _rate_limit,
        },
    )
    context, names = keys.get("tls_server_config", (None, frozenset()))
    return WebConfig(
        context,
        names,
        keys.get("http_server_config", {}),
        keys.get("basic_auth_users", {}),
        keys.get("rate_limit", RateLimit()),
    )


def signature(path: Path) -> Signature:
    """Return what tells a file from what it will be after a change."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class WebConfigFile:
    """A web configuration that follows its files; ``config`` is the last good one.

    Args:
        path: the file, or None for a configuration that never asks for anything.
        admit: raises a ConfigError for files that are not to be used.

    Raises:
        ConfigError: the file is bad, or not to be used.
    """

    def __init__(
        self, path: Path | None, admit: Callable[[Iterable[Path]], None] = lambda _: None
    ) -> None:
        self._path = path
        self._admit = admit
        self._seen: dict[Path, Signature] = {}
        self.config = load(path, self._seen) if path else WebConfig()
        admit(self._seen)

    @property
    def files(self) -> list[Path]:
        """The file and those that it names."""
        return list(self._seen)

    async def follow(self, changed: Callable[[], None]) -> None:
        """Take changes over until cancelled; bad ones are logged once and change nothing.

        Args:
            changed: called after each good one.
        """
        before: dict[Path, Signature] = {}
        while self._path:
            await asyncio.sleep(FOLLOW_SECONDS)
            now = await asyncio.to_thread(lambda: {path: signature(path) for path in self._seen})
            if now == self._seen:
                continue
            if now != before:
                # Whoever writes it may not be done.
                before = now
                continue
            seen: dict[Path, Signature] = {}
            try:
                config = await asyncio.to_thread(load, self._path, seen)
                self._admit(seen)
            except Exception as error:
                why = fields(why=str(error))
                _log.error("web configuration changed to a bad one, the last one kept", extra=why)
                self._seen = now | seen
            else:
                _log.info("web configuration changed", extra=fields(file=str(self._path)))
                self.config, self._seen = config, seen
                changed()


class _Pem(NamedTuple):
    value: Value
    text: str


def _inline(value: Value) -> _Pem:
    if not value.is_a("str") or "-----BEGIN " not in value.node.value:
        value.fail("PEM", _HIDDEN)
    return _Pem(value, value.node.value)


def _file(seen: dict[Path, Signature], value: Value) -> _Pem:
    path = (value.path.parent / yaml_reader.text(value, "a file's name")).absolute()
    seen[path] = signature(path)
    if not path.is_file():
        value.fail("a readable file", "none", str(path))
    try:
        text = yaml_reader.read(path)
    except ConfigError as error:
        value.fail("a readable file of PEM", "another", str(error))
    if "-----BEGIN " not in text:
        value.fail("a file of PEM", "another", str(path))
    return _Pem(value, text)


def _with_value(read: Callable[[Value], Any], value: Value) -> tuple[Value, Any]:
    return value, read(value)


def _tls(seen: dict[Path, Signature], value: Value) -> tuple[ssl.SSLContext, frozenset[str]]:
    file = partial(_file, seen)
    keys = mapping(
        value,
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
            "cipher_suites": partial(
                _with_value, partial(_words, (*tls.CIPHERS, *tls.TLS13_CIPHERS))
            ),
            "prefer_server_cipher_suites": boolean,
            "curve_preferences": partial(_with_value, partial(_words, tls.CURVES)),
        },
    )
    cert = _one_of(value, keys, "cert") or value.fail("the key cert_file", "none")
    key = _one_of(value, keys, "key") or value.fail("the key key_file", "none")
    try:
        context = tls.context(cert.text, key.text)
    except (OSError, ValueError) as error:
        # Of a key it may only say that it could not look ahead in it.
        why = getattr(error, "reason", None) or "something else"
        cert.value.fail("a certificate and, not encrypted, the private key that belongs to it", why)
    _restrict(context, keys)
    names = _clients(context, value, keys)
    return context, names


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
            curves[0].fail("one curve, or none for OpenSSL's own choice", str(error))


def _clients(context: ssl.SSLContext, value: Value, keys: Mapping[str, Any]) -> frozenset[str]:
    _, kind = keys.get("client_auth_type", (value, "NoClientCert"))
    authorities = _one_of(value, keys, "client_ca")
    if kind in _VERIFYING:
        if not authorities:
            # Go would take those of the system, who issue certificates to everybody.
            value.fail(f"the key client_ca_file, for client_auth_type is {kind}", "none")
        try:
            tls.verify_clients(context, authorities.text, required=_VERIFYING[kind])
        except ssl.SSLError as error:
            authorities.value.fail("certificates", error.reason or str(error))
    elif authorities:
        expected = f"a client_auth_type, {' or '.join(_VERIFYING)}, to go with it"
        authorities.value.fail(expected, kind)
    if "client_allowed_sans" not in keys:
        return frozenset()
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
    kind = choice(("NoClientCert", *_VERIFYING, *_UNVERIFIED), value)
    if kind in _UNVERIFIED:
        found = f"{kind}: Python's ssl never asks for a certificate without verifying it"
        value.fail(_UNVERIFIED[kind], found)
    return kind


def _names(value: Value) -> list[str]:
    names = [yaml_reader.text(item, "a subject alternative name") for item in value.items()]
    return names or value.fail("at least one name", "an empty list")


def _version(value: Value) -> ssl.TLSVersion:
    name = choice((*tls.VERSIONS, *tls.REFUSED_VERSIONS), value)
    if name in tls.REFUSED_VERSIONS:
        value.fail(" or ".join(tls.VERSIONS), f"{name}, which nobody should use any more: RFC 8996")
    return tls.VERSIONS[name]


def _words(known: Mapping[str, str] | tuple[str, ...], value: Value) -> list[str]:
    return [choice(tuple(known), item) for item in value.items()]


def _http(value: Value) -> dict[str, str]:
    # HTTP/2 is an offer that a server need not make: this one speaks HTTP/1.1.
    keys = mapping(value, {"http2": boolean, "headers": _headers})
    headers: dict[str, str] = keys.get("headers", {})
    return headers


def _headers(value: Value) -> dict[str, str]:
    headers = mapping(value, dict.fromkeys(_HEADERS, _header_value))
    for name, _, entry in value.entries():
        allowed = _HEADERS[name]
        if allowed and headers[name] and headers[name] not in allowed:
            entry.is_known(name).fail(" or ".join(allowed))
    return headers


def _header_value(value: Value) -> str:
    if value.is_a("null"):
        return ""
    if not value.is_a("str", "int") or not _HEADER_VALUE.fullmatch(value.node.value):
        value.fail("a header's value in printable ASCII")
    return str(value.node.value)


def _users(value: Value) -> dict[bytes, bytes]:
    if value.node.tag != "tag:yaml.org,2002:map":
        value.fail("users and bcrypt hashes", _HIDDEN)
    users = {
        name.encode(errors="surrogatepass"): _hash(entry) for name, _, entry in value.entries()
    }
    if users:
        try:
            import bcrypt  # noqa: F401
        except ImportError:
            value.fail(
                "the Python package bcrypt beside it: pip install 'dtrace-exporter[auth]'", "none"
            )
    return users


def _hash(value: Value) -> bytes:
    if not value.is_a("str") or not _BCRYPT.fullmatch(value.node.value):
        value.fail("a password's bcrypt hash, as from htpasswd -nBC 10 USER", _HIDDEN)
    return str(value.node.value).encode()


def _rate_limit(value: Value) -> RateLimit:
    keys = mapping(
        value, {"interval": _interval, "burst": partial(integer, 0, 1_000_000, "a number")}
    )
    limit = RateLimit(**keys)
    if limit.interval and not limit.burst:
        value.fail("the key burst, at least 1: no request would ever be answered", "none")
    return limit


def _interval(value: Value) -> float:
    if value.is_a("int") and value.node.value == "0":
        return 0.0
    return duration(value, "a duration such as 100ms or 1s, or 0")
