"""YAML files read as a graph of nodes, each with its line, and not as plain values.

A value's line is then known when the value turns out to be wrong: every complaint names file, line
and key. What else the file says may be a secret in the wrong place: a complaint's text has no
values and no unknown keys in it, and only its ``in_full`` has.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.composer import ComposerError
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 20
_MAX_NODES = 50_000
_MAX_SHOWN = 40

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
# YAML 1.1 also has 010, 1_000 and 22:22 as numbers, none of them what it looks like.
_INTEGER = re.compile(r"0|[1-9][0-9]{0,18}|0x[0-9a-fA-F]{1,16}")
_QUOTED = re.compile(r"'.*'|\".*\"", re.DOTALL)
_DURATION = re.compile(r"(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,6})s)?(?:([0-9]{1,6})ms)?")
_UNUSABLE = re.compile(r"[\0\ud800-\udfff]")


class ConfigError(Exception):
    """One line that says what is wrong with a configuration: ``FILE:LINE: KEY: ...``.

    Args:
        message: it, fit for a log.
        in_full: the same with what the file says, where that is more.
    """

    def __init__(self, message: str, in_full: str = "") -> None:
        super().__init__(_one_line(message))
        self.in_full = _one_line(in_full or message)


def load(path: Path, *, quote: bool = True) -> Value:
    """Read a YAML file as a graph of nodes.

    Args:
        path: the file.
        quote: whether ``in_full`` of a complaint about its YAML quotes it.

    Raises:
        ConfigError: the file cannot be read, or is not YAML, or has no value.
    """
    return Value(path, "", "", _compose(path, read(path), quote))


def read(path: Path) -> str:
    """Return the text of a small file.

    Raises:
        ConfigError: it cannot be read, is too large or is no UTF-8.
    """
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


def _compose(path: Path, text: str, quote: bool) -> Node:
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
        without = _QUOTED.sub("...", problem)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        problem, without = str(error), type(error).__name__
    else:
        if node is None:
            raise ConfigError(f"{path}:1: expected a configuration (found an empty file)")
        return node
    where = f"{path}:{line}: expected YAML"
    raise ConfigError(f"{where} ({without})", f"{where} ({problem if quote else without})")


@dataclass(frozen=True, slots=True)
class Value:
    """A node, and the key it stands under: ``listeners[1].port``; ``known`` has none but ours."""

    path: Path
    key: str
    known: str
    node: Node

    @property
    def line(self) -> int:
        """The line it begins in."""
        return int(self.node.start_mark.line) + 1

    def fail(self, expected: str, found: str = "", value: str = "") -> NoReturn:
        """Raise a ConfigError: what was expected here, and what was found instead.

        Args:
            expected: nothing of the file.
            found: nothing of the file either; the node's kind by default.
            value: the same in full; the node's value by default, unless ``found`` is given.
        """
        value = value or found or shown(self.node)
        messages = (
            f"{self.path}:{self.line}: {key}{': ' if key else ''}expected {expected} (found {what})"
            for key, what in ((self.known, found or _kind(self.node)), (self.key, value))
        )
        raise ConfigError(*messages)

    def is_known(self, name: str) -> Value:
        """Return the value of an entry with the key's name, now that it is one of ours."""
        return replace(self, known=f"{self.known}.{name}" if self.known else name)

    def is_a(self, *tags: str) -> bool:
        """Tell whether it is a scalar with one of some YAML tags, such as ``str`` or ``int``."""
        return _is_a(self.node, *tags)

    def items(self) -> list[Value]:
        """Return the values of a list."""
        if not isinstance(self.node, SequenceNode) or self.node.tag != _TAG + "seq":
            self.fail("a list")
        return [
            Value(self.path, f"{self.key}[{number}]", f"{self.known}[{number}]", item)
            for number, item in enumerate(self.node.value)
        ]

    def entries(self) -> Iterator[tuple[str, Value, Value]]:
        """Yield each key's name, the key itself and its value."""
        if not isinstance(self.node, MappingNode) or self.node.tag != _TAG + "map":
            self.fail("keys and values")
        lines: dict[str, int] = {}
        for key_node, value_node in self.node.value:
            if not _is_a(key_node, "str", "merge", "value"):
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
    """Read what a mapping says, each key with its own reader."""
    result = {}
    for name, key, entry in value.entries():
        if name not in readers:
            near = difflib.get_close_matches(_short(name), readers, n=1)
            key.fail(f"the key {' or '.join(near or readers)}", "an unknown one")
        result[name] = readers[name](entry.is_known(name))
    if required and required not in result:
        value.fail(f"the key {required}", "none")
    return result


def text(value: Value, expected: str) -> str:
    """Read a string that is not empty and that the system takes as a file's name or an argument."""
    if not value.is_a("str") or not value.node.value or _UNUSABLE.search(value.node.value):
        value.fail(expected)
    return str(value.node.value)


def choice(choices: Collection[str], value: Value) -> str:
    """Read one of some words."""
    if not value.is_a("str") or value.node.value not in choices:
        value.fail(" or ".join(choices))
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
    """Read a duration such as ``1m30s`` or ``500ms``, in seconds."""
    match = _DURATION.fullmatch(text(value, expected))
    if match is None:
        value.fail(expected)
    hours, minutes, seconds, milliseconds = (int(number or 0) for number in match.groups())
    return (hours * 3_600_000 + minutes * 60_000 + seconds * 1000 + milliseconds) / 1000


def boolean(value: Value) -> bool:
    """Read a boolean, as YAML 1.1 spells it."""
    known = yaml.SafeLoader.bool_values
    if not value.is_a("bool") or value.node.value.lower() not in known:
        value.fail("true or false")
    return known[value.node.value.lower()]


def _is_a(node: Node, *tags: str) -> bool:
    return isinstance(node, ScalarNode) and node.tag in {_TAG + tag for tag in tags}


def shown(node: Node) -> str:
    """Say what a node is, in a few words and not all of its value."""
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
