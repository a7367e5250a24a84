"""The paths of the endpoints, on this server and on a proxy in front of it."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import urlsplit

# The characters that need no encoding in a path, RFC 3986, 3.3. Clients would encode, remove or
# misunderstand all else, so they could never request it.
_PATH = re.compile(r"(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._~!$&'()*+,;=:@-]+)+/?")
_LETTERS = "letters, digits and -._~!$&'()*+,;=:@"
_URL = re.compile(r"https?://[^/?#@\s\"'<>\\^`{|}\x00-\x20\x7f-\U0010ffff]+(/[^?#]*)?")


class Mount(NamedTuple):
    """The path in front of all endpoints, empty or such as ``/sub``, and its URL if known."""

    prefix: str = ""
    external: str = ""


def mount(external_url: str, route_prefix: str) -> Mount:
    """Return where the endpoints are. The options mean the same as those of blackbox_exporter.

    Args:
        external_url: the URL on the proxy, or its path alone; empty without a proxy.
        route_prefix: the path on this server; if empty, that of the external URL.

    Raises:
        ValueError: one of them is malformed.
    """
    path = external_url if external_url.startswith("/") else _path_of(external_url)
    path = path.rstrip("/")
    if path and not _PATH.fullmatch(path):
        raise ValueError(f"--web.external-url: expected a path of {_LETTERS} (found {path!r})")
    prefix = f"/{route_prefix.strip('/')}" if route_prefix else path
    if prefix not in ("", "/") and not _PATH.fullmatch(prefix):
        raise ValueError(
            f"--web.route-prefix: expected a path such as /dtrace, of {_LETTERS}"
            f" (found {route_prefix!r})"
        )
    return Mount(prefix.rstrip("/"), external_url.rstrip("/"))


def _path_of(url: str) -> str:
    if not url:
        return ""
    match = _URL.fullmatch(url)
    try:
        if match and urlsplit(url).port != 0:
            return match[1] or ""
    except ValueError:
        # The port or the address in brackets is malformed.
        pass
    raise ValueError(
        "--web.external-url: expected http(s)://HOST[:PORT][/PATH] or /PATH, "
        "without a user, query or fragment"
    )


def telemetry(path: str, others: frozenset[str]) -> str:
    """Return the path of the metrics, without the prefix.

    Args:
        path: the path that the user has chosen.
        others: the paths of the other endpoints.

    Raises:
        ValueError: no client could request it, or another endpoint has it.
    """
    if path in others:
        raise ValueError(
            f"--web.telemetry-path: expected a path that no other page has (found {path!r})"
        )
    if not _PATH.fullmatch(path):
        raise ValueError(
            f"--web.telemetry-path: expected a path such as /metrics, of {_LETTERS}"
            f" (found {path!r})"
        )
    return path
