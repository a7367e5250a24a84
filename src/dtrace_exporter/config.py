"""Reads the configuration file. Errors name the file, the line and the key."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from ipaddress import ip_address
from os import R_OK, access
from pathlib import Path
from typing import Any, Literal

from dtrace_exporter import yaml_reader
from dtrace_exporter.families import families
from dtrace_exporter.limits import Limits
from dtrace_exporter.regular import Look, unseen
from dtrace_exporter.scripts import configuration
from dtrace_exporter.scripts.configuration import ScriptConfig
from dtrace_exporter.watched import FEW
from dtrace_exporter.yaml_reader import (
    ConfigError,
    Reader,
    Value,
    boolean,
    choice,
    duration,
    integer,
    mapping,
    shown,
    string,
    text,
)

__all__ = [
    "PROGRAMS",
    "WITHOUT_DTRACE",
    "Config",
    "ConfigError",
    "DTraceConfig",
    "HostConfig",
    "ListenerConfig",
    "SockDiagConfig",
    "UnixConfig",
    "files",
    "load",
]

PROGRAMS = ("auto", *families())
WITHOUT_DTRACE = ("sock_diag", "netstat")
"""The values of ``source`` with which this host runs no dtrace(1) for listeners."""

_MAX_NAME = 128
_MAX_PATTERN = 432
_MOST = 10_000_000

_PORTS = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")
_EITHER = (("port", "ports"), ("zone", "netns"), ("zone", "jail"), ("netns", "jail"))
_INODE = re.compile(r"[1-9][0-9]{0,19}")
_OPTION_NAME = re.compile(r"[a-z]+")
# Options that permit destructive actions, or make dtrace(1) run a program or write a file.
_REFUSED_OPTIONS = (
    "destructive",
    "cpp",
    "cpphdrs",
    "cppargs",
    "cpppath",
    "ctypes",
    "dtypes",
    "ldpath",
)
# No character that has a meaning for a remote shell.
_OPTION_VALUE = re.compile(r"[A-Za-z0-9_.,:/@%+=-]+")


@dataclass(frozen=True, slots=True)
class ListenerConfig:
    """Listeners to watch. If ``zone``, ``netns`` and ``jail`` are empty, they may be in any place.

    Attributes:
        ports: their TCP ports.
        name: the label ``listener`` of their series.
        address: the address that they are bound to, empty for any.
        zone: the name of their zone.
        netns: their network namespace, as an inode or a name of ip-netns(8).
        jail: the name of their jail, 0 for the host.
        histograms: whether their histograms are exported.
    """

    ports: tuple[range, ...]
    name: str = ""
    address: str = ""
    zone: str = ""
    netns: str = ""
    jail: str = ""
    histograms: bool = True


@dataclass(frozen=True, slots=True)
class DTraceConfig:
    """How dtrace(1) is run on a host.

    ``program`` is one of PROGRAMS or an absolute path. ``interval`` is in seconds. ``options`` are
    passed with -x; an empty value stands for an option without one. ``offsets`` are those of struct
    members, in bytes. ``limits`` bounds what is stored for the host.
    """

    command: tuple[str, ...] = ("dtrace",)
    program: str = "auto"
    session: Literal["per-port", "shared"] = "per-port"
    interval: float = 1.0
    accept_wait: bool = True
    handshake: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    offsets: Mapping[str, int] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class SockDiagConfig:
    """How often sock_diag samples Q between scrapes, in seconds; 0 is never."""

    sample_interval: float = 0.0


@dataclass(frozen=True, slots=True)
class UnixConfig:
    """Which listening UNIX sockets are exported; ``paths`` are patterns of fnmatch."""

    paths: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HostConfig:
    """A host to watch; ``name`` is empty for the local one.

    Without ``listeners`` all of its listeners are watched, except those of ``exclude_ports``. The
    aggregations of ``scripts`` become metrics.
    """

    name: str = ""
    dtrace: DTraceConfig = field(default_factory=DTraceConfig)
    listeners: tuple[ListenerConfig, ...] = ()
    exclude_ports: tuple[range, ...] = ()
    scripts: tuple[ScriptConfig, ...] = ()

    def expected(self, netns: str = "") -> list[set[tuple[str, int]]]:
        """Return by entry the addresses (empty for any) and ports where listeners are expected.

        Args:
            netns: a network namespace, as in ``listeners``; empty for the host's own place.
        """
        here = (one for one in self.listeners if one.netns == netns and not (one.zone or one.jail))
        return [
            {
                (listener.address, port)
                for ports in listener.ports
                if len(ports) <= FEW
                for port in ports
            }
            for listener in here
        ]


@dataclass(frozen=True, slots=True)
class Config:
    """A whole configuration; ``source``, ``sock_diag`` and ``unix`` are about the local host.

    ``forget_closed_after`` is in seconds.
    """

    source: Literal["auto", "dtrace", "sock_diag", "netstat"] = "auto"
    local: HostConfig = field(default_factory=HostConfig)
    hosts: tuple[HostConfig, ...] = ()
    sock_diag: SockDiagConfig = field(default_factory=SockDiagConfig)
    unix: UnixConfig = field(default_factory=UnixConfig)
    forget_closed_after: float = 3600.0


def load(path: Path | None, look: Look = unseen, scripts: Collection[Path] = ()) -> Config:
    """Read a configuration file.

    Args:
        path: the file, or None for the defaults. Paths of programs and scripts in it are relative
            to its directory.
        look: raises a ConfigError for a file that must not be read; also called for D programs.
        scripts: further scripts for this host to run.

    Raises:
        ConfigError: the file cannot be read, or there is an error in it or in a script.
    """
    config = Config() if path is None else _config(yaml_reader.load(path, look=look))
    if scripts:
        more = (*config.local.scripts, *map(configuration.load, scripts))
        configuration.distinct(more)
        config = replace(config, local=replace(config.local, scripts=more))
    for program in _programs(config):
        look(program, None)
    return config


def files(path: Path | None, config: Config) -> list[Path]:
    """Return the files of a configuration: the file itself, and those of D programs.

    Directories in which dtrace(1) looks for further files are among them.
    """
    return [*([path] if path else []), *_programs(config)]


def _programs(config: Config) -> list[Path]:
    hosts = (config.local, *config.hosts)
    programs = [host.dtrace.program for host in hosts if host.dtrace.program not in PROGRAMS]
    scripts = [script.script.path for host in hosts for script in host.scripts]
    # The scripts of another host include files of that host.
    included = [path for script in config.local.scripts for path in script.included]
    return [*map(Path, programs + scripts), *included]


def _config(value: Value) -> Config:
    keys = mapping(
        value,
        {
            "source": partial(choice, ("auto", "dtrace", *WITHOUT_DTRACE)),
            "dtrace": _dtrace,
            "listeners": _listeners,
            "exclude_ports": _ranges,
            "scripts": configuration.scripts,
            "hosts": _hosts,
            "sock_diag": _sock_diag,
            "unix": _unix,
            "forget_closed_after": _forget_closed_after,
        },
    )
    local = ("dtrace", "listeners", "exclude_ports", "scripts")
    host = HostConfig(**{key: keys.pop(key) for key in local if key in keys})
    if keys.get("source") not in WITHOUT_DTRACE:
        _fits(value, host, f", or source: {' or '.join(WITHOUT_DTRACE)}")
    config = Config(local=host, **keys)
    hosts = (config.local, *config.hosts)
    configuration.one_type(value, [script for each in hosts for script in each.scripts])
    return config


def _hosts(value: Value) -> tuple[HostConfig, ...]:
    readers: dict[str, Reader] = {
        "name": _host_name,
        "dtrace": _dtrace,
        "listeners": partial(_listeners, netns=_inode),
        "exclude_ports": _ranges,
        "scripts": configuration.scripts,
    }
    hosts = [HostConfig(**mapping(item, readers, required="name")) for item in value.items()]
    _distinct(value, "name", [host.name for host in hosts])
    for item, host in zip(value.items(), hosts, strict=True):
        _fits(item, host)
    return tuple(hosts)


def _fits(value: Value, host: HostConfig, otherwise: str = "") -> None:
    """Refuse large ranges of ports if each port would get a session."""
    if host.dtrace.session == "per-port":
        for number, listener in enumerate(host.listeners):
            if sum(map(len, listener.ports)) > FEW:
                item = _entry(value, "listeners").items()[number]
                expected = f"at most {FEW} ports, or dtrace.session: shared{otherwise}"
                _entry(item, "ports").fail(expected, "more")


def _entry(value: Value, key: str) -> Value:
    """Return the value of a key of a mapping that has been read already."""
    return next(entry for name, _, entry in value.entries() if name == key).is_known(key)


def _listeners(value: Value, netns: Reader | None = None) -> tuple[ListenerConfig, ...]:
    readers: dict[str, Reader] = {
        "port": lambda value: (_range(value),),
        "ports": _ranges,
        "name": _name,
        "address": _address,
        "zone": _zone,
        "netns": netns or _netns,
        "jail": _jail,
        "histograms": boolean,
    }
    listeners = []
    for item in value.items():
        keys = mapping(item, readers)
        for one, other in _EITHER:
            if one in keys and other in keys:
                _entry(item, other).fail(f"{one} or {other}", "both")
        if "port" not in keys and "ports" not in keys:
            item.fail("the key port or ports", "none")
        ports = keys.pop("port", ()) or keys.pop("ports", ())
        if not ports:
            _entry(item, "ports").fail("one port or more", "none")
        listeners.append(ListenerConfig(ports, **keys))
    if not listeners:
        value.fail("at least one listener, or no key listeners to watch all of them", "none")
    _apart(value, listeners)
    _distinct(value, "name", [listener.name for listener in listeners])
    return tuple(listeners)


def _apart(value: Value, read: list[ListenerConfig]) -> None:
    """Refuse a port that an earlier entry has, with the same address and place."""
    lines: dict[tuple[str, str, str, str, int], int] = {}
    for item, this in zip(value.items(), read, strict=True):
        where = this.address, this.zone, this.netns, this.jail
        (key,) = {"port", "ports"} & {name for name, _, _ in item.entries()}
        entry = _entry(item, key)
        for port in (port for ports in this.ports for port in ports):
            if line := lines.get((*where, port)):
                expected = "a port that no other entry has with this address and place"
                entry.fail(expected, f"one as in line {line}", f"{port}, as in line {line}")
            lines[*where, port] = entry.line


def _distinct(value: Value, key: str, read: list[Any]) -> None:
    """Refuse a value, unless it is empty, that an earlier item of the list has."""
    lines: dict[Any, int] = {}
    for item, this in zip(value.items(), read, strict=True):
        if not this:
            continue
        entry = _entry(item, key)
        if this in lines:
            line = f"as in line {lines[this]}"
            expected = f"a {key} that no other entry has"
            entry.fail(expected, f"the same {line}", f"{shown(entry.node)}, {line}")
        lines[this] = entry.line


def _dtrace(value: Value) -> DTraceConfig:
    readers: dict[str, Reader] = {
        "command": _command,
        "program": _program,
        "session": partial(choice, ("per-port", "shared")),
        "interval": _interval,
        "accept_wait": boolean,
        "handshake": boolean,
        "options": _options,
        "offsets": _offsets,
        "limits": _limits,
    }
    return DTraceConfig(**mapping(value, readers))


def _command(value: Value) -> tuple[str, ...]:
    words = tuple(map(_word, value.items()))
    if not words:
        value.fail("a command and its arguments", "an empty list")
    return words


def _word(value: Value) -> str:
    expected = "a word of the command"
    string(value, expected)
    return text(value, expected)


def _program(value: Value) -> str:
    expected = f"{', '.join(PROGRAMS)} or the path of a D program"
    program = text(value, expected)
    if program in PROGRAMS:
        return program
    if "/" not in program and not program.endswith(".d"):
        value.fail(expected)
    path = (value.path.parent / program).absolute()
    if not access(path, R_OK):
        value.fail("a readable file", "none", str(path))
    if not path.is_file():
        value.fail("a regular file", "another kind of file", str(path))
    return str(path)


def _interval(value: Value) -> float:
    expected = "a duration from 100ms to 10s, such as 1s or 500ms"
    seconds = duration(value, expected)
    if not 0.1 <= seconds <= 10:
        value.fail(expected)
    return seconds


def _sock_diag(value: Value) -> SockDiagConfig:
    return SockDiagConfig(**mapping(value, {"sample_interval": _sample_interval}))


def _sample_interval(value: Value) -> float:
    expected = "a duration from 10ms to 10s, such as 100ms, or 0"
    if value.is_a("int") and value.node.value == "0":
        return 0.0
    seconds = duration(value, expected)
    if not 0.01 <= seconds <= 10:
        value.fail(expected)
    return seconds


def _unix(value: Value) -> UnixConfig:
    return UnixConfig(**mapping(value, {"paths": _paths}))


def _paths(value: Value) -> tuple[str, ...]:
    paths = tuple(map(_path, value.items()))
    if not paths:
        value.fail("at least one path, or no key unix for no UNIX sockets", "none")
    return paths


def _path(value: Value) -> str:
    """Read a pattern for values of the label `path`."""
    expected = "a path such as /run/php/*.sock, or an abstract name such as @app*"
    path = text(value, expected)
    if not path.isprintable() or len(path) > _MAX_PATTERN:
        value.fail(expected)
    return path


def _forget_closed_after(value: Value) -> float:
    expected = "a duration of 10m or more, such as 1h"
    seconds = duration(value, expected)
    if seconds < 600:
        value.fail(expected)
    return seconds


def _options(value: Value) -> dict[str, str]:
    options = {}
    for name, key, entry in value.entries():
        if not _OPTION_NAME.fullmatch(name):
            key.fail("the name of a D option in lower case")
        if name in _REFUSED_OPTIONS:
            key.is_known(name).fail("an option that changes, runs and writes nothing")
        if entry.is_a("bool"):
            # "unset" is how dtrace(1) turns an option off.
            options[name] = "" if boolean(entry) else "unset"
        elif entry.is_a("str", "int") and _OPTION_VALUE.fullmatch(entry.node.value):
            options[name] = entry.node.value
        else:
            entry.fail("a number, a size such as 8m, a rate such as 10hz, a word, true or false")
    return options


def _offsets(value: Value) -> dict[str, int]:
    offset = partial(integer, 0, 65535, "an offset")
    return mapping(value, {"conn_tcp": offset, "conn_lport": offset})


def _limits(value: Value) -> Limits:
    limit = partial(integer, 1, _MOST, "a limit")
    return Limits(**mapping(value, {each.name: limit for each in fields(Limits)}))


def _port(value: Value) -> int:
    return integer(1, 65535, "a port", value)


def _range(value: Value) -> range:
    port = _port(value)
    return range(port, port + 1)


def _ranges(value: Value) -> tuple[range, ...]:
    """Read a list of ports and ranges of ports."""
    expected = "a port from 1 to 65535, or a range of them such as 8000-8099"
    ranges = []
    for item in value.items():
        match = _PORTS.fullmatch(item.node.value) if item.is_a("str") else None
        if match is None and not item.is_a("int"):
            item.fail(expected)
        low, high = map(int, match.groups()) if match else (_port(item),) * 2
        if not 1 <= low <= high <= 65535:
            item.fail(expected)
        ranges.append(range(low, high + 1))
    return tuple(ranges)


def _address(value: Value) -> str:
    """Read an address; return it as the label `address` has it."""
    expected = "an IPv4 or IPv6 address, or * for all addresses"
    written = text(value, expected)
    if written == "*":
        return written
    try:
        address = ip_address(written)
    except ValueError:
        value.fail(expected)
    if getattr(address, "scope_id", None):
        value.fail(expected)
    address = getattr(address, "ipv4_mapped", None) or address
    return "*" if address.is_unspecified else str(address)


def _zone(value: Value) -> str:
    return _name(value) or value.fail("the name of a zone")


def _jail(value: Value) -> str:
    """Read the name of a jail, such as www.blue, or 0 for the host."""
    if value.is_a("int") and value.node.value == "0":
        return "0"
    return _name(value) or value.fail("the name of a jail, or 0 for the host")


def _netns(value: Value) -> str:
    """Read the inode of a network namespace, or its name in /run/netns."""
    expected = "a network namespace's inode, or its name in /run/netns"
    if value.is_a("int"):
        return _inode(value)
    name = text(value, expected)
    if "/" in name or name in (".", "..") or len(name) > _MAX_NAME or not name.isprintable():
        value.fail(expected)
    return _inode(value) if name.isdecimal() else name


def _inode(value: Value) -> str:
    expected = "the inode of a network namespace"
    if not value.is_a("int", "str") or not _INODE.fullmatch(value.node.value):
        value.fail(expected)
    return str(value.node.value)


def _name(value: Value) -> str:
    expected = f"a name of at most {_MAX_NAME} printable characters"
    name = string(value, expected)
    if len(name) > _MAX_NAME or not name.isprintable():
        value.fail(expected)
    return name


def _host_name(value: Value) -> str:
    return _name(value) or value.fail("a name that is not empty")
