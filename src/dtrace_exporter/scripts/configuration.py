"""The configuration's key ``scripts``: the scripts and the settings of their metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from os import R_OK, access
from pathlib import Path
from typing import NoReturn

from dtrace_exporter import yaml_reader
from dtrace_exporter.scripts import includes, labels, reader
from dtrace_exporter.scripts.families import RESERVED, Family, FamilyError, Settings, families, stem
from dtrace_exporter.scripts.reader import Script, ScriptError
from dtrace_exporter.yaml_reader import ConfigError, Reader, Value, choice, integer, mapping, text

LIMIT = 1000
"""How many series a script may have by default."""

_MOST = 1_000_000
_MOST_ARGUMENTS = 100
# No character that has a meaning for a remote shell, and no minus, which would begin an option.
_ARGUMENT = re.compile(r"[A-Za-z0-9_.,:/@%+=][A-Za-z0-9_.,:/@%+=-]*")
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
_SCALE = re.compile(r"[0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,2})?")


@dataclass(frozen=True, slots=True)
class ScriptConfig:
    """A script that a host runs.

    Attributes:
        script: the script.
        families: its metrics.
        args: its arguments ``$1`` and so on.
        pid: the process ``$target``, None if there is none.
        limit: how many series it may have.
    """

    script: Script
    families: tuple[Family, ...]
    args: tuple[str, ...] = ()
    pid: int | None = None
    limit: int = LIMIT

    @property
    def name(self) -> str:
        """Its name, which is in the names of its session and its metrics."""
        return stem(self.script.path)

    @property
    def included(self) -> list[Path]:
        """The other files and directories of this host that dtrace(1) reads for it."""
        return includes.files(self.script)


def load(path: Path) -> ScriptConfig:
    """Read a script that has no entry in the configuration.

    Raises:
        ConfigError: it cannot be read, or has no metrics.
    """
    script = _read(path.absolute())
    if stem(script.path) in RESERVED:
        raise ConfigError(f"{path}: expected {_OTHER_NAME} (found {stem(script.path)})")
    try:
        return ScriptConfig(script, families(script, {}))
    except FamilyError as error:
        raise ConfigError(f"{path}: {error}") from None


def scripts(value: Value) -> tuple[ScriptConfig, ...]:
    """Read the value of the key ``scripts``.

    Raises:
        ConfigError: there is an error in it.
    """
    found: list[ScriptConfig] = []
    lines: dict[str, int] = {}
    for item in value.items():
        script = _script(item)
        for family in script.families:
            for name in {family.name, *family.samples}:
                if name in lines:
                    line = f"as in line {lines[name]}"
                    expected = "metrics that no other script gives: set name"
                    item.fail(expected, f"the same {line}", f"{name}, {line}")
        lines |= {n: item.line for each in script.families for n in {each.name, *each.samples}}
        found.append(script)
    return tuple(found)


def distinct(scripts: Iterable[ScriptConfig]) -> None:
    """Refuse scripts of one host that have the same metric.

    Raises:
        ConfigError: two of them have.
    """
    files: dict[str, str] = {}
    for script in scripts:
        path = script.script.path
        for name in {n for family in script.families for n in {family.name, *family.samples}}:
            if name in files:
                expected = "metrics that no other script gives"
                raise ConfigError(f"{path}: expected {expected} (found {name}, as {files[name]})")
        files |= {n: path for each in script.families for n in {each.name, *each.samples}}


def one_type(value: Value, scripts: Iterable[ScriptConfig]) -> None:
    """Refuse metrics of all hosts that have the same name but different types.

    Raises:
        ConfigError: there are such metrics.
    """
    types: dict[str, str] = {}
    for family in (family for script in scripts for family in script.families):
        if types.setdefault(family.name, family.kind) != family.kind:
            expected = "metrics of the same name to be of the same type on all hosts"
            value.fail(
                expected, "others", f"{family.name} as {types[family.name]} and {family.kind}"
            )


@dataclass(frozen=True, slots=True)
class _Entry:
    """The settings of an aggregation, and their place in the file."""

    value: Value
    settings: Settings


@dataclass(frozen=True, slots=True)
class _Said:
    script: Script
    args: tuple[str, ...] = ()
    pid: int | None = None
    limit: int = LIMIT
    metrics: Mapping[str, _Entry] = field(default_factory=dict)


def _script(value: Value) -> ScriptConfig:
    # The script is read first, because the other keys refer to its aggregations.
    paths = [entry for name, _, entry in value.entries() if name == "script"]
    script = _path(paths[0].is_known("script")) if paths else value.fail("the key script", "none")
    said = _Said(
        **mapping(
            value,
            {
                "script": lambda _: script,
                "args": _args,
                "pid": partial(integer, 1, (1 << 31) - 1, "a process's number"),
                "limit": partial(integer, 1, _MOST, "a limit"),
                "metrics": partial(_metrics, [each.name for each in script.aggregations]),
            },
        )
    )
    settings = {name: entry.settings for name, entry in said.metrics.items()}
    try:
        found = families(said.script, settings)
    except FamilyError as error:
        _fail(value, said, error)
    return ScriptConfig(said.script, found, said.args, said.pid, said.limit)


def _fail(value: Value, said: _Said, error: FamilyError) -> NoReturn:
    """Raise the error of an aggregation, if possible at the place of its settings in the file."""
    if error.aggregation not in said.metrics:
        expected = f"metrics of @{error.aggregation} with {error.expected}"
        value.fail(expected, "others", error.found)
    entry = said.metrics[error.aggregation].value
    for name, _, setting in entry.entries():
        if name == error.key:
            setting.is_known(name).fail(error.expected, "something else", error.found)
    entry.fail(error.expected, "something else", error.found)


_OTHER_NAME = f"a script whose name is not one of {', '.join(RESERVED)}"


def _path(value: Value) -> Script:
    path = (value.path.parent / text(value, "the path of a D script")).absolute()
    if not access(path, R_OK) or not path.is_file():
        value.fail("a readable file", "none", str(path))
    if stem(str(path)) in RESERVED:
        value.fail(_OTHER_NAME, "one of them")
    try:
        return _read(path)
    except ConfigError as error:
        # Its text may quote a file that is not a script.
        value.fail("a D script with aggregations", "one that cannot be read: see check", str(error))


def _read(path: Path) -> Script:
    content = yaml_reader.read(path)
    try:
        return reader.read(str(path), content)
    except ScriptError as error:
        raise ConfigError(str(error)) from None


def _args(value: Value) -> tuple[str, ...]:
    items = value.items()
    if len(items) > _MOST_ARGUMENTS:
        value.fail(f"at most {_MOST_ARGUMENTS} arguments", f"{len(items)}")
    for item in items:
        if not item.is_a("str", "int") or not _ARGUMENT.fullmatch(item.node.value):
            item.fail("a number or a word without spaces, quotes or a leading minus")
    return tuple(str(item.node.value) for item in items)


def _metrics(names: Collection[str], value: Value) -> dict[str, _Entry]:
    found = {}
    for name, key, entry in value.entries():
        if name not in names:
            key.fail("the name of an aggregation of the script, without its @", "none")
        known = entry.is_known(name)
        found[name] = _Entry(known, _settings(known))
    return found


def _settings(value: Value) -> Settings:
    readers: dict[str, Reader] = {
        "name": partial(_matching, _NAME, "a metric name that Prometheus accepts"),
        "help": _help,
        "labels": _labels,
        "scale": _scale,
        "buckets": _buckets,
        "type": partial(choice, ("counter", "gauge", "histogram")),
    }
    return Settings(**mapping(value, readers))


def _matching(pattern: re.Pattern[str], expected: str, value: Value) -> str:
    word = text(value, expected)
    if not pattern.fullmatch(word):
        value.fail(expected)
    return word


def _help(value: Value) -> str:
    expected = "a printable text of at most 500 characters"
    words = text(value, expected)
    if len(words) > 500 or not words.isprintable():
        value.fail(expected)
    return words


def _labels(value: Value) -> tuple[str, ...]:
    expected = "a label name that Prometheus accepts, other than host and le"
    found = tuple(_matching(_LABEL, expected, item) for item in value.items())
    for item, label in zip(value.items(), found, strict=True):
        if label in labels.RESERVED:
            item.fail(expected)
    if len({*found}) < len(found):
        value.fail("labels that are different", "one twice")
    return found


def _scale(value: Value) -> float:
    expected = "a number above 0, such as 1e-9"
    # In YAML 1.1, 1e-9 is text.
    if not value.is_a("int", "float", "str") or not _SCALE.fullmatch(value.node.value):
        value.fail(expected)
    scale = float(value.node.value)
    if not (scale > 0 and math.isfinite(scale)):
        value.fail(expected)
    return scale


def _buckets(value: Value) -> tuple[int, ...]:
    return tuple(_bucket(item) for item in value.items())


def _bucket(value: Value) -> int:
    expected = "a whole number"
    if not value.is_a("int") or not re.fullmatch(r"-?[0-9]{1,19}", value.node.value):
        value.fail(expected)
    number = int(value.node.value)
    if not -(1 << 63) <= number < 1 << 63:
        value.fail(expected)
    return number
