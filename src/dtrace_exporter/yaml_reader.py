"""Reads YAML files as graphs of nodes, which have line numbers, instead of plain values.

So each error can name the file, the line and the key. Text in the file may be a secret in the wrong
place. Therefore an error's text has no values and no unknown keys; only its ``in_full`` has them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.composer import ComposerError
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from dtrace_exporter import regular
from dtrace_exporter.regular import Look, unseen

_MAX_DEPTH = 20
_MAX_NODES = 50_000
_MAX_SHOWN = 40
_MAX_COMPARED = 80
_MOST_TOLD = 4

_TAG = "tag:yaml.org,2002:"
_KINDS = {
    "null": "nothing",
    "seq": "a list",
    "map": "keys and values",
    "str": "text",
    "bool": "a boolean",
    "int": "a number",
    "float": "a number",
    "timestamp": "a date",
}
_SHOWN_TAGS = ("null", "seq", "map")
_PLAIN_TAGS = ("bool", "int", "float", "timestamp")
# In YAML 1.1, 010, 1_000 and 22:22 are numbers as well, but not those that one expects.
_INTEGER = re.compile(r"0|[1-9][0-9]{0,18}|0x[0-9a-fA-F]{1,16}")
_QUOTED = re.compile(r"'.*'|\".*\"", re.DOTALL)
# As in Go's time.ParseDuration, but without a sign, and without 0 that has no unit.
_NUMBER = r"([0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})"
_PARTS = re.compile(rf"{_NUMBER}(ns|us|\u00b5s|\u03bcs|ms|s|m|h)")
_DURATION = re.compile(rf"(?:{_PARTS.pattern})+")
_NANOSECONDS = {"ns": 1, "us": 10**3, "\u00b5s": 10**3, "\u03bcs": 10**3, "ms": 10**6}
_NANOSECONDS |= {"s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_MOST_NANOSECONDS = (1 << 63) - 1
_UNUSABLE = re.compile(r"[\0\ud800-\udfff]")


class ConfigError(Exception):
    """An error in a configuration, in one line: ``FILE:LINE: KEY: ...``.

    Args:
        message: the line, fit for a log.
        in_full: the same line with values from the file, which may be secrets.
    """

    def __init__(self, message: str, in_full: str = "") -> None:
        super().__init__(_one_line(message))
        self.in_full = _one_line(in_full or message)


class EmptyError(ConfigError):
    """A configuration file is empty."""


def load(path: Path, *, quote: bool = True, look: Look = unseen) -> Value:
    """Read a YAML file as a graph of nodes.

    Args:
        path: the file.
        quote: whether ``in_full`` of a syntax error may quote the file.
        look: raises a ConfigError for a file that must not be read.

    Raises:
        EmptyError: it is empty.
        ConfigError: it cannot be read, or is not YAML.
    """
    return Value(path, "", "", _compose(path, read(path, look), quote))


def read(path: Path, look: Look = unseen) -> str:
    """Return the text of a file.

    Args:
        path: the file.
        look: as for load().

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        data = regular.read(path, look)
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable file ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: expected a file's name ({error})") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise ConfigError(f"{path}:{line}: expected UTF-8 (found byte {byte:#04x})") from None


class _Loader(yaml.SafeLoader):
    """Composes nodes up to a limit. Nodes that aliases repeat count each time."""

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


def _compose(path: Path, text: str, quote: bool) -> Node:
    line = 1
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        except (ValueError, OverflowError):
            # PyYAML raises them for "\UFFFFFFFF" and for a version of 5000 digits.
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
        without = _QUOTED.sub("...", problem)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        problem, without = str(error), type(error).__name__
    else:
        if node is None:
            raise EmptyError(f"{path}:1: expected a configuration (found an empty file)")
        return node
    where = f"{path}:{line}: expected YAML"
    raise ConfigError(f"{where} ({without})", f"{where} ({problem if quote else without})")


@dataclass(frozen=True, slots=True)
class Value:
    """A node and its key.

    Attributes:
        path: the file.
        key: the full key, such as ``listeners[1].port``.
        known: the same with only keys that the exporter knows.
        node: the node.
    """

    path: Path
    key: str
    known: str
    node: Node

    @property
    def line(self) -> int:
        """The number of its first line."""
        return int(self.node.start_mark.line) + 1

    def fail(self, expected: str, found: str = "", value: str = "") -> NoReturn:
        """Raise a ConfigError that says what was expected here, and what was found.

        Args:
            expected: what was expected, without text from the file.
            found: what was found, without text from the file; by default the node's kind.
            value: what was found, for ``in_full``; by default ``found`` or the node's value.

        Raises:
            ConfigError: always.
        """
        value = value or found or shown(self.node)
        messages = (
            f"{self.path}:{self.line}: {key}{': ' if key else ''}expected {expected} (found {what})"
            for key, what in ((self.known, found or _kind(self.node)), (self.key, value))
        )
        raise ConfigError(*messages)

    def is_known(self, name: str) -> Value:
        """Return the value with ``name``, a key that the exporter knows, added to ``known``."""
        return replace(self, known=f"{self.known}.{name}" if self.known else name)

    def is_a(self, *tags: str) -> bool:
        """Return whether it is a scalar with one of some YAML tags, such as ``str`` or ``int``."""
        return _is_a(self.node, *tags)

    def items(self) -> list[Value]:
        """Return the values of a list.

        Raises:
            ConfigError: it is not a list.
        """
        if not isinstance(self.node, SequenceNode) or self.node.tag != _TAG + "seq":
            self.fail("a list")
        return [
            Value(self.path, f"{self.key}[{number}]", f"{self.known}[{number}]", item)
            for number, item in enumerate(self.node.value)
        ]

    def entries(self, *, plain: bool = False) -> Iterator[tuple[str, Value, Value]]:
        """Yield each key's name, the key itself and its value.

        Args:
            plain: whether a name may be a number, a date, yes or no for YAML.

        Raises:
            ConfigError: it is not a mapping, or a key is not a word or comes twice.
        """
        if not isinstance(self.node, MappingNode) or self.node.tag != _TAG + "map":
            self.fail("keys and values")
        lines: dict[str, int] = {}
        for key_node, value_node in self.node.value:
            if not _is_a(key_node, "str", "merge", "value", *(_PLAIN_TAGS if plain else ())):
                Value(self.path, self.key, self.known, key_node).fail("a word as the key")
            name = key_node.value
            full_key = f"{self.key}.{_short(name)}" if self.key else _short(name)
            key = Value(self.path, full_key, self.known, key_node)
            if name in lines:
                key.fail("the key only once", f"it in line {lines[name]} too")
            lines[name] = key.line
            yield name, key, Value(self.path, full_key, self.known, value_node)


Reader = Callable[[Value], Any]


def mapping(value: Value, readers: Mapping[str, Reader], required: str = "") -> dict[str, Any]:
    """Read a mapping, each key with its own reader.

    Args:
        value: the mapping.
        readers: the readers by key.
        required: a key that must be there, if any.

    Raises:
        ConfigError: a key is unknown or missing, or its reader raises it.
    """
    result = {}
    for name, key, entry in value.entries():
        if name not in readers:
            near = nearest(name, readers)
            key.fail(f"the key {near or ' or '.join(readers)}", "an unknown one")
        result[name] = readers[name](entry.is_known(name))
    if required and required not in result:
        value.fail(f"the key {required}", "none")
    return result


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the one of ``names`` that is most similar to ``name``, or an empty string."""
    alike = {_plain(each): each for each in names}
    near = difflib.get_close_matches(_plain(name[:_MAX_COMPARED]), alike, n=1)
    return alike[near[0]] if near else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def string(value: Value, expected: str) -> str:
    """Read a string; numbers, dates, yes and no must be in quotes."""
    if not value.is_a("str"):
        value.fail(f"{expected}, in quotes" if value.is_a(*_PLAIN_TAGS) else expected)
    return str(value.node.value)


def text(value: Value, expected: str) -> str:
    """Read a string that is not empty and can be a file's name or a command's argument."""
    if not value.is_a("str") or not value.node.value or _UNUSABLE.search(value.node.value):
        value.fail(expected)
    return str(value.node.value)


def choice(choices: Collection[str], value: Value) -> str:
    """Read one of some words."""
    if not value.is_a("str") or value.node.value not in choices:
        word = value.node.value if value.is_a("str") else ""
        near = nearest(word, choices) if len(choices) > _MOST_TOLD else ""
        value.fail(near or " or ".join(choices))
    return str(value.node.value)


def integer(low: int, high: int, what: str, value: Value) -> int:
    """Read a decimal or hexadecimal number within bounds."""
    expected = f"{what} from {low} to {high}"
    if not value.is_a("int") or not _INTEGER.fullmatch(value.node.value):
        value.fail(expected)
    number = int(value.node.value, 0)
    if not low <= number <= high:
        value.fail(expected)
    return number


def duration(value: Value, expected: str) -> float:
    """Read a duration such as ``1m30s``, ``0.5s`` or ``100us``; return it in seconds.

    The format is that of Go's time.ParseDuration, to the nanosecond.
    """
    read = text(value, expected)
    if not _DURATION.fullmatch(read):
        value.fail(expected)
    nanoseconds = sum(
        int(Fraction(f"0{number}") * _NANOSECONDS[unit]) for number, unit in _PARTS.findall(read)
    )
    if nanoseconds > _MOST_NANOSECONDS:
        value.fail(expected)
    return nanoseconds / 1e9


def boolean(value: Value) -> bool:
    """Read a boolean, as YAML 1.1 spells it."""
    known = yaml.SafeLoader.bool_values
    if not value.is_a("bool") or value.node.value.lower() not in known:
        value.fail("true or false")
    return known[value.node.value.lower()]


def _is_a(node: Node, *tags: str) -> bool:
    return isinstance(node, ScalarNode) and node.tag in {_TAG + tag for tag in tags}


def shown(node: Node) -> str:
    """Return a short description of a node, without all of its value."""
    tag = node.tag.removeprefix(_TAG)
    if tag in _SHOWN_TAGS:
        return _KINDS[tag]
    if _is_a(node, "str"):
        return f'"{_short(node.value)}"'
    if _is_a(node, "bool", "int", "float", "timestamp", "merge", "value"):
        return _short(node.value)
    return f"the tag {_short(node.tag)}"


def _kind(node: Node) -> str:
    return _KINDS.get(node.tag.removeprefix(_TAG), "something else")


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _one_line(text: str) -> str:
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
