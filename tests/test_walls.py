"""The limits to imports between the package's modules, and between the tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dtrace_exporter

PACKAGE = Path(dtrace_exporter.__file__).parent
TABLES = {"limits", "sockets", "listeners", "state", "unix_drops", "watched"}
"""The modules of the listener table, which do not know how rows or packets are written."""
COMMANDS = {"check", "cli", "senders", "service", "top", "trace", "__main__"}
"""The modules that connect the sides."""
SERIES = {"scripts.metrics"}
"""The tables of scripts, which know only what the scripts' text says."""
LANGUAGE = {f"scripts.{name}" for name in ("reader", "lexer", "labels", "rendering", "rows")}
LANGUAGE |= {"scripts.conversions", "scripts.families"}
"""The language and the output of scripts; these modules know only each other, and ``terminal``."""
SCRIPTS = {("config", "scripts.configuration"), ("state", "scripts.metrics")}
SCRIPTS |= {("collector", "scripts.metrics")}
"""What modules at the top know of scripts: their configuration and their metrics."""


def name(path: Path) -> str:
    """Return a module's name within the package, such as ``web.page``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> Iterator[str]:
    """Yield the package's modules that one imports, anywhere in its text."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(each.name.startswith("dtrace_exporter") for each in node.names), path
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            package, _, rest = (node.module or "").partition(".")
            if package == "dtrace_exporter":
                for each in node.names:
                    inner = f"{rest}.{each.name}".strip(".")
                    yield inner if inner in MODULES else rest or "__init__"


IMPORTS = {module: {*imported(path)} for module, path in MODULES.items()}


def side(module: str) -> str:
    """Return the subpackage that a module is in; an empty string for the top."""
    return module.rpartition(".")[0]


def test_there_are_walls() -> None:
    """All sides exist, and the imports are found."""
    assert {side(module) for module in MODULES} == {"", "scripts", "tracing", "web"}
    assert "tracing.session" in IMPORTS["service"]
    assert "web.page" in IMPORTS["web.handlers"]


def test_no_circle() -> None:
    """No module imports, directly or through others, one that imports it."""
    [*TopologicalSorter(IMPORTS).static_order()]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("web", "tracing"), ("tracing", "web"), ("web", "scripts"), ("scripts", "web")),
        *(("tracing", "scripts"), ("scripts", "tracing")),
    ],
)
def test_the_sides_do_not_know_each_other(one: str, other: str) -> None:
    """The web and sessions do not import each other, and only scripts.session imports tracing."""
    for module in MODULES:
        if side(module) == one and module != "scripts.session":
            assert not {each for each in IMPORTS[module] if side(each) == other}, module


def test_only_commands_know_both_sides() -> None:
    """Modules at the top import from no side, except those that connect the sides."""
    for module in MODULES:
        if side(module) == "" and module not in COMMANDS:
            known = {each for each in IMPORTS[module] if side(each)}
            assert {(module, each) for each in known} <= SCRIPTS, module


def test_tables_know_themselves_alone() -> None:
    """The listener table and the state import no module that knows rows, netlink or HTTP."""
    for module in TABLES:
        assert IMPORTS[module] <= TABLES | SERIES, module
    for module in SERIES | LANGUAGE:
        assert IMPORTS[module] <= LANGUAGE | {"terminal"}, module


def words(path: Path) -> Iterator[str]:
    """Yield the words in a module's imports: names of modules and of what it takes from them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (word for each in node.names for word in each.name.split("."))
        if isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")


def test_tests_do_not_know_each_other() -> None:
    """No module of the tests imports one named test_*; what several need has its own module."""
    tests = [*Path(__file__).parent.rglob("*.py")]
    taken = {path: {*words(path)} for path in tests}
    assert "exporter_process" in taken[Path(__file__).with_name("test_cli.py")]
    modules = {path.stem for path in tests if path.stem.startswith("test_")}
    assert {path: found for path in tests if (found := taken[path] & modules)} == {}


@pytest.mark.parametrize("module", MODULES)
def test_first_lines(module: str) -> None:
    """The first line of each module says what it is for."""
    text = ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))
    assert text
    first = text.partition("\n")[0]
    assert 20 < len(first) < 100
    assert first.endswith((".", ":"))
