"""The source of FreeBSD hosts without DTrace: what netstat(1) says about listening sockets."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from ipaddress import ip_address
from typing import Any

from dtrace_exporter.families import families
from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.listeners import Capabilities
from dtrace_exporter.log import fields
from dtrace_exporter.namespaces import Namespace
from dtrace_exporter.sock_diag import Reading

_log = logging.getLogger(__name__)

CAPABILITIES = Capabilities(
    place_label=families()["freebsd"].place,
    own_place=families()["freebsd"].own_place,
    q_capacity=families()["freebsd"].q_capacity,
    syns=False,
    established=False,
    accepts=False,
    accept_wait=False,
    handshake=False,
    synack_retransmits=False,
)
"""The series that this source fills: Q and its limit, but no counters."""

# Without W an IPv6 address is cut off after 16 characters (usr.bin/netstat/inet6.c, inet6print()).
_COMMAND = ("netstat", "-LanW", "--libxo", "json")
_PATIENCE = 10.0
_LONGEST = 300
# toe: sockets whose connections the network card handles, such as toe4.
_TCP = ("tcp", "toe")
_LIST = re.compile(r'"statistics"\s*:\s*\{\s*"socket"\s*:\s*(?=\[)')
# What comes before each socket, or after the last one.
_MARK = re.compile(r"\s*+[\[,]\s*+(?!\])|\s*+\[?\s*+(\])")


def read(_others: Iterable[Namespace], _known: Mapping[str, set[int]]) -> list[Reading]:
    """Read the output of netstat(1); it blocks. It ignores the arguments, which sock_diag needs.

    Raises:
        OSError: netstat(1) is missing, is not FreeBSD's, or fails.
    """
    # Like other children it inherits only the variables that it needs.
    known = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    try:
        done = subprocess.run(
            _COMMAND,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE,
            check=False,
            env=known,
        )
    except subprocess.TimeoutExpired:
        raise _bad(f"it did not end within {_PATIENCE:g} s") from None
    except OSError as error:
        raise _bad(error.strerror or str(error)) from error
    if done.returncode:
        said = " ".join(done.stderr.decode("utf-8", "replace").split())
        raise _bad(said[-_LONGEST:] or f"exit status {done.returncode}")
    return [Reading([*sockets(done.stdout)], None)]


def sockets(output: bytes) -> Iterator[ListeningSocket]:
    """Yield the TCP sockets that listen, from the output of netstat(1).

    The output has no numbers of sockets, so the sockets of an address and port are numbered in
    their order. The second of the three lengths, of incomplete connections, is ignored: half-open
    connections are in the kernel's syncache and belong to no socket.

    If some sockets cannot be read, they are left out, and this is logged.

    Args:
        output: what netstat(1) has printed, as JSON.

    Raises:
        OSError: it is not the output of FreeBSD's netstat(1), or no socket can be read.
    """
    there = Counter[tuple[str, int]]()
    left_out, why = 0, ""
    for found in _listed(output):
        try:
            if not found.get("protocol", "").startswith(_TCP):
                continue
            q, _, qmax = map(int, found["listen-queue-sizes"].split("/"))
            where = _address(found["local"]["address"]), int(found["local"]["port"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            left_out, why = left_out + 1, repr(error)
            continue
        yield ListeningSocket(*where, q, qmax, None, there[where])
        there[where] += 1
    if left_out and not there:
        raise _something_else(why)
    if left_out:
        why = why[:_LONGEST]
        _log.warning("sockets of netstat(1) left out", extra=fields(sockets=left_out, why=why))


def _listed(output: bytes) -> Iterator[Any]:
    """Yield the sockets that netstat(1) has printed, with those that are not TCP.

    They are parsed one by one, because Python runs no other thread while it parses a JSON text.
    Any user may bind a UNIX socket to a path with control characters, and libxo does not escape
    them all (contrib/libxo/libxo/libxo.c, xo_escape_json()).

    Raises:
        OSError: it has printed something else.
    """
    text = output.decode("utf-8", "replace")
    parse = json.JSONDecoder(strict=False).raw_decode
    try:
        begun = _LIST.search(text)
        if begun is None:
            # Without any socket there is no list.
            if parse(text)[0]["statistics"] != {}:
                raise ValueError("no list of sockets")
            return
        at = begun.end()
        while mark := _MARK.match(text, at):
            if mark[1]:
                return
            found, at = parse(text, mark.end())
            yield found
        raise ValueError("the list of sockets does not end")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _something_else(repr(error)) from error


@lru_cache(maxsize=4096)
def _address(told: str) -> str:
    """Write an address as rows does: IPv4 where it is mapped, ``*`` for the wildcard, no scope."""
    if told == "*":
        return told
    address: Any = ip_address(told.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    return "*" if address.is_unspecified else str(address)


def _something_else(why: str) -> OSError:
    return _bad(f"it printed something else than listening sockets: {why[:_LONGEST]}")


def _bad(why: str) -> OSError:
    return OSError(errno.EIO, f"cannot read netstat(1): {why}")
