"""The configuration file: what it may say, and where exactly it says something else.

The YAML is read as a graph of nodes, each with its line, and not as plain values: a value's line
is then known when the value turns out to be wrong.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from os import R_OK, access
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from yaml.composer import ComposerError
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

PROGRAMS = ("auto", "linux", "illumos", "solaris10")

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 20
_MAX_NODES = 50_000
_MAX_NAME = 128
_MAX_SHOWN = 40

_TAG = "tag:yaml.org,2002:"
_SHOWN_TAGS = {"null": "nothing", "seq": "a list", "map": "keys and values"}
# YAML 1.1 also has 010, 1_000 and 22:22 as numbers, none of them what it looks like.
_INTEGER = re.compile(r"0|[1-9][0-9]{0,18}|0x[0-9a-fA-F]{1,16}")
_DURATION = re.compile(r"(?:([0-9]{1,6})m)?(?:([0-9]{1,6})s)?(?:([0-9]{1,6})ms)?")
_OPTION_NAME = re.compile(r"[a-z]+")
# Nothing that a remote shell would take apart.
_OPTION_VALUE = re.compile(r"[A-Za-z0-9_.,:/@%+=-]+")
_UNUSABLE = re.compile(r"[\0\ud800-\udfff]")


class ConfigError(Exception):
    """One line that says what is wrong with a configuration: ``FILE:LINE: KEY: ...``."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


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
    struct members in bytes.
    """

    command: tuple[str, ...] = ("dtrace",)
    program: str = "auto"
    session: Literal["per-port", "shared"] = "per-port"
    interval: float = 1.0
    accept_wait: bool = True
    options: Mapping[str, str] = field(default_factory=dict)
    offsets: Mapping[str, int] = field(default_factory=dict)


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
    return _config(_Value(path, "", _compose(path, _read(path))))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable file ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: expected a file's name ({error})") from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path}: expected at most {_MAX_BYTES} bytes (found more)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise ConfigError(f"{path}:{line}: expected UTF-8 (found byte {byte:#04x})") from None


class _Loader(yaml.SafeLoader):
    """Composes nodes while there are few enough of them, those that aliases repeat included."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._count = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        before = self._count
        self._depth += 1
        self._count += 1
        if self._depth > _MAX_DEPTH:
            raise ComposerError(None, None, "nested too deeply", event.start_mark)
        node = super().compose_node(parent, index)
        if isinstance(event, AliasEvent):
            self._count += self._sizes.get(id(node), 0)
        if self._count > _MAX_NODES:
            raise ComposerError(None, None, f"more than {_MAX_NODES} values", event.start_mark)
        self._sizes[id(node)] = self._count - before
        self._depth -= 1
        return node


def _compose(path: Path, text: str) -> Node:
    line = 1
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        except (ValueError, OverflowError):
            # PyYAML lets them through for "\UFFFFFFFF" and for a version of 5000 digits.
            line = loader.line + 1
            raise
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = f"character {error.character:#04x}"
        raise ConfigError(f"{path}:{line}: expected printable text (found {found})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else line
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{path}:{line}: expected YAML ({problem})") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path}:{line}: expected YAML ({error})") from None
    if node is None:
        raise ConfigError(f"{path}:1: expected a configuration (found an empty file)")
    return node


@dataclass(frozen=True, slots=True)
class _Value:
    """A node, and the key it stands under: ``listeners[1].port``."""

    path: Path
    key: str
    node: Node

    @property
    def line(self) -> int:
        return int(self.node.start_mark.line) + 1

    def fail(self, expected: str, found: str = "") -> NoReturn:
        where = f"{self.path}:{self.line}: " + (f"{self.key}: " if self.key else "")
        raise ConfigError(f"{where}expected {expected} (found {found or _shown(self.node)})")

    def is_a(self, *tags: str) -> bool:
        return _is_a(self.node, *tags)

    def items(self) -> list[_Value]:
        if not isinstance(self.node, SequenceNode) or self.node.tag != _TAG + "seq":
            self.fail("a list")
        return [
            _Value(self.path, f"{self.key}[{number}]", item)
            for number, item in enumerate(self.node.value)
        ]

    def entries(self) -> Iterator[tuple[str, _Value, _Value]]:
        """Yield each key's name, the key itself and its value."""
        if not isinstance(self.node, MappingNode) or self.node.tag != _TAG + "map":
            self.fail("keys and values")
        lines: dict[str, int] = {}
        for key_node, value_node in self.node.value:
            if not _is_a(key_node, "str", "merge", "value"):
                _Value(self.path, self.key, key_node).fail("a word as the key")
            name = key_node.value
            full_key = f"{self.key}.{_short(name)}" if self.key else _short(name)
            key = _Value(self.path, full_key, key_node)
            if name in lines:
                key.fail("the key only once", f"it in line {lines[name]} too")
            lines[name] = key.line
            yield name, key, _Value(self.path, full_key, value_node)


_Reader = Callable[[_Value], Any]


def _keys(value: _Value, readers: Mapping[str, _Reader], required: str = "") -> dict[str, Any]:
    """Read what a mapping says, each key with its own reader."""
    result = {}
    for name, key, entry in value.entries():
        if name not in readers:
            near = difflib.get_close_matches(_short(name), readers, n=1)
            key.fail(f"the key {' or '.join(near or readers)}", "an unknown one")
        result[name] = readers[name](entry)
    if required and required not in result:
        value.fail(f"the key {required}", "none")
    return result


def _config(value: _Value) -> Config:
    keys = _keys(
        value,
        {
            "source": partial(_choice, ("auto", "dtrace", "sock_diag")),
            "dtrace": _dtrace,
            "listeners": _listeners,
            "hosts": _hosts,
        },
    )
    host = {key: keys.pop(key) for key in ("dtrace", "listeners") if key in keys}
    return Config(local=HostConfig(**host), **keys)


def _hosts(value: _Value) -> tuple[HostConfig, ...]:
    readers: dict[str, _Reader] = {"name": _host_name, "dtrace": _dtrace, "listeners": _listeners}
    hosts = [HostConfig(**_keys(item, readers, required="name")) for item in value.items()]
    _distinct(value, "name", [host.name for host in hosts])
    return tuple(hosts)


def _listeners(value: _Value) -> tuple[ListenerConfig, ...]:
    readers = {"port": _port, "name": _name}
    listeners = [ListenerConfig(**_keys(item, readers, required="port")) for item in value.items()]
    _distinct(value, "port", [listener.port for listener in listeners])
    _distinct(value, "name", [listener.name for listener in listeners])
    return tuple(listeners)


def _distinct(value: _Value, key: str, read: list[Any]) -> None:
    """Refuse a value, other than an empty one, that an earlier item of the list has already."""
    lines: dict[Any, int] = {}
    for item, this in zip(value.items(), read, strict=True):
        if not this:
            continue
        entry = next(entry for name, _, entry in item.entries() if name == key)
        if this in lines:
            found = f"{_shown(entry.node)}, as in line {lines[this]}"
            entry.fail(f"a {key} that no other entry has", found)
        lines[this] = entry.line


def _dtrace(value: _Value) -> DTraceConfig:
    readers: dict[str, _Reader] = {
        "command": _command,
        "program": _program,
        "session": partial(_choice, ("per-port", "shared")),
        "interval": _interval,
        "accept_wait": _boolean,
        "options": _options,
        "offsets": _offsets,
    }
    return DTraceConfig(**_keys(value, readers))


def _command(value: _Value) -> tuple[str, ...]:
    words = tuple(_text(item, "a word of the command") for item in value.items())
    if not words:
        value.fail("a command and its arguments", "an empty list")
    return words


def _program(value: _Value) -> str:
    expected = f"{', '.join(PROGRAMS)} or the path of a D program"
    program = _text(value, expected)
    if program in PROGRAMS:
        return program
    if "/" not in program and not program.endswith(".d"):
        value.fail(expected)
    path = (value.path.parent / program).absolute()
    if not access(path, R_OK) or not path.is_file():
        value.fail("a readable file", str(path))
    return str(path)


def _interval(value: _Value) -> float:
    expected = "a duration from 100ms to 10s, such as 1s or 500ms"
    match = _DURATION.fullmatch(_text(value, expected))
    if match is None:
        value.fail(expected)
    minutes, seconds, milliseconds = (int(number or 0) for number in match.groups())
    duration = (minutes * 60_000 + seconds * 1000 + milliseconds) / 1000
    if not 0.1 <= duration <= 10:
        value.fail(expected)
    return duration


def _options(value: _Value) -> dict[str, str]:
    options = {}
    for name, key, entry in value.entries():
        if not _OPTION_NAME.fullmatch(name):
            key.fail("the name of a D option, all lower case")
        if entry.is_a("bool"):
            # dtrace(1) has no flag that a bare name turns off.
            options[name] = "" if _boolean(entry) else "unset"
        elif entry.is_a("str", "int") and _OPTION_VALUE.fullmatch(entry.node.value):
            options[name] = entry.node.value
        else:
            entry.fail("a number, a size such as 8m, a rate such as 10hz, a word, true or false")
    return options


def _offsets(value: _Value) -> dict[str, int]:
    offset = partial(_integer, 0, 65535, "an offset")
    return _keys(value, {"conn_tcp": offset, "conn_lport": offset})


def _port(value: _Value) -> int:
    return _integer(1, 65535, "a port", value)


def _name(value: _Value) -> str:
    expected = f"a name of at most {_MAX_NAME} printable characters"
    if not value.is_a("str"):
        value.fail(expected)
    name = str(value.node.value)
    if len(name) > _MAX_NAME or not name.isprintable():
        value.fail(expected)
    return name


def _host_name(value: _Value) -> str:
    return _name(value) or value.fail("a name that is not empty")


def _text(value: _Value, expected: str) -> str:
    if not value.is_a("str") or not value.node.value or _UNUSABLE.search(value.node.value):
        value.fail(expected)
    return str(value.node.value)


def _choice(choices: tuple[str, ...], value: _Value) -> str:
    if not value.is_a("str") or value.node.value not in choices:
        value.fail(" or ".join(choices))
    return str(value.node.value)


def _integer(low: int, high: int, what: str, value: _Value) -> int:
    expected = f"{what} from {low} to {high}"
    if not value.is_a("int") or not _INTEGER.fullmatch(value.node.value):
        value.fail(expected)
    number = int(value.node.value, 0)
    if not low <= number <= high:
        value.fail(expected)
    return number


def _boolean(value: _Value) -> bool:
    known = yaml.SafeLoader.bool_values
    if not value.is_a("bool") or value.node.value.lower() not in known:
        value.fail("true or false")
    return known[value.node.value.lower()]


def _is_a(node: Node, *tags: str) -> bool:
    return isinstance(node, ScalarNode) and node.tag in {_TAG + tag for tag in tags}


def _shown(node: Node) -> str:
    """Say what a node is, in a few words and not all of its value."""
    tag = node.tag.removeprefix(_TAG)
    if tag in _SHOWN_TAGS:
        return _SHOWN_TAGS[tag]
    if _is_a(node, "str"):
        return f'"{_short(node.value)}"'
    if _is_a(node, "bool", "int", "float", "timestamp", "merge", "value"):
        return _short(node.value)
    return f"the tag {_short(node.tag)}"


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _one_line(text: str) -> str:
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
