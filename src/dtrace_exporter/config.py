"""The configuration file: what it may say, and where exactly it says something else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from os import R_OK, access
from pathlib import Path
from typing import Any, Literal

from dtrace_exporter import yaml_reader
from dtrace_exporter.families import families
from dtrace_exporter.limits import Limits
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
    text,
)

__all__ = [
    "PROGRAMS",
    "Config",
    "ConfigError",
    "DTraceConfig",
    "HostConfig",
    "ListenerConfig",
    "files",
    "load",
]

PROGRAMS = ("auto", *families())

_MAX_NAME = 128
_MOST = 10_000_000

_OPTION_NAME = re.compile(r"[a-z]+")
# What lets D do more than look, and what has dtrace(1) run a program or write a file.
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
# Nothing that a remote shell would take apart.
_OPTION_VALUE = re.compile(r"[A-Za-z0-9_.,:/@%+=-]+")


@dataclass(frozen=True, slots=True)
class ListenerConfig:
    """A port to watch, and the name that its series carry."""

    port: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class DTraceConfig:
    """How dtrace(1) is run on a host.

    ``program`` is one of PROGRAMS or an absolute path. ``interval`` is in seconds. ``options`` are
    those for -x; one whose value is empty is given by its name alone. ``offsets`` are those of
    struct members in bytes. ``limits`` is how much of the host is taken in.
    """

    command: tuple[str, ...] = ("dtrace",)
    program: str = "auto"
    session: Literal["per-port", "shared"] = "per-port"
    interval: float = 1.0
    accept_wait: bool = True
    options: Mapping[str, str] = field(default_factory=dict)
    offsets: Mapping[str, int] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class HostConfig:
    """A host to watch; ``name`` is empty for the local one. No listeners: every one it has."""

    name: str = ""
    dtrace: DTraceConfig = field(default_factory=DTraceConfig)
    listeners: tuple[ListenerConfig, ...] = ()


@dataclass(frozen=True, slots=True)
class Config:
    """A whole configuration; ``source`` is that of the local host."""

    source: Literal["auto", "dtrace", "sock_diag"] = "auto"
    local: HostConfig = field(default_factory=HostConfig)
    hosts: tuple[HostConfig, ...] = ()


def load(path: Path | None) -> Config:
    """Read a configuration file.

    Args:
        path: the file, or None for a configuration of defaults. A program's path in it is relative
            to the file's directory.

    Raises:
        ConfigError: the file cannot be read, or is not a configuration.
    """
    if path is None:
        return Config()
    return _config(yaml_reader.load(path))


def files(path: Path | None, config: Config) -> list[Path]:
    """Return the files that a configuration consists of: its own, and those of D programs."""
    programs = (host.dtrace.program for host in (config.local, *config.hosts))
    return [*([path] if path else []), *(Path(each) for each in programs if each not in PROGRAMS)]


def _config(value: Value) -> Config:
    keys = mapping(
        value,
        {
            "source": partial(choice, ("auto", "dtrace", "sock_diag")),
            "dtrace": _dtrace,
            "listeners": _listeners,
            "hosts": _hosts,
        },
    )
    host = {key: keys.pop(key) for key in ("dtrace", "listeners") if key in keys}
    return Config(local=HostConfig(**host), **keys)


def _hosts(value: Value) -> tuple[HostConfig, ...]:
    readers: dict[str, Reader] = {"name": _host_name, "dtrace": _dtrace, "listeners": _listeners}
    hosts = [HostConfig(**mapping(item, readers, required="name")) for item in value.items()]
    _distinct(value, "name", [host.name for host in hosts])
    return tuple(hosts)


def _listeners(value: Value) -> tuple[ListenerConfig, ...]:
    readers = {"port": _port, "name": _name}
    listeners = [
        ListenerConfig(**mapping(item, readers, required="port")) for item in value.items()
    ]
    _distinct(value, "port", [listener.port for listener in listeners])
    _distinct(value, "name", [listener.name for listener in listeners])
    return tuple(listeners)


def _distinct(value: Value, key: str, read: list[Any]) -> None:
    """Refuse a value, other than an empty one, that an earlier item of the list has already."""
    lines: dict[Any, int] = {}
    for item, this in zip(value.items(), read, strict=True):
        if not this:
            continue
        entry = next(entry for name, _, entry in item.entries() if name == key)
        if this in lines:
            line = f"as in line {lines[this]}"
            expected = f"a {key} that no other entry has"
            entry.is_known(key).fail(expected, f"the same {line}", f"{shown(entry.node)}, {line}")
        lines[this] = entry.line


def _dtrace(value: Value) -> DTraceConfig:
    readers: dict[str, Reader] = {
        "command": _command,
        "program": _program,
        "session": partial(choice, ("per-port", "shared")),
        "interval": _interval,
        "accept_wait": boolean,
        "options": _options,
        "offsets": _offsets,
        "limits": _limits,
    }
    return DTraceConfig(**mapping(value, readers))


def _command(value: Value) -> tuple[str, ...]:
    words = tuple(text(item, "a word of the command") for item in value.items())
    if not words:
        value.fail("a command and its arguments", "an empty list")
    return words


def _program(value: Value) -> str:
    expected = f"{', '.join(PROGRAMS)} or the path of a D program"
    program = text(value, expected)
    if program in PROGRAMS:
        return program
    if "/" not in program and not program.endswith(".d"):
        value.fail(expected)
    path = (value.path.parent / program).absolute()
    if not access(path, R_OK) or not path.is_file():
        value.fail("a readable file", "none", str(path))
    return str(path)


def _interval(value: Value) -> float:
    expected = "a duration from 100ms to 10s, such as 1s or 500ms"
    seconds = duration(value, expected)
    if not 0.1 <= seconds <= 10:
        value.fail(expected)
    return seconds


def _options(value: Value) -> dict[str, str]:
    options = {}
    for name, key, entry in value.entries():
        if not _OPTION_NAME.fullmatch(name):
            key.fail("the name of a D option, all lower case")
        if name in _REFUSED_OPTIONS:
            key.is_known(name).fail("an option by which nothing is changed, run or written")
        if entry.is_a("bool"):
            # dtrace(1) has no flag that a bare name turns off.
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


def _name(value: Value) -> str:
    expected = f"a name of at most {_MAX_NAME} printable characters"
    if not value.is_a("str"):
        value.fail(expected)
    name = str(value.node.value)
    if len(name) > _MAX_NAME or not name.isprintable():
        value.fail(expected)
    return name


def _host_name(value: Value) -> str:
    return _name(value) or value.fail("a name that is not empty")
