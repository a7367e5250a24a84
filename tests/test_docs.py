"""Every page of the documentation: its links, its commands, and what the examples print."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from dtrace_exporter import config, trace
from dtrace_exporter.state import State
from dtrace_exporter.web import handlers, page, rates
from markdown_page import anchors, blocks, languages, links
from web_serving import get, no_reload, one_port

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
}
FAKE_DTRACE = ROOT / "tests" / "fake_dtrace.py"
COMMANDS = PAGES["docs/commands.md"]
CONFIGURATION = PAGES["docs/configuration.md"]


@pytest.mark.parametrize("name", PAGES)
def test_links(name: str) -> None:
    """Every link leads to a file and a heading of it; of an address only the form is looked at."""
    for link in links(PAGES[name]):
        parts = urlsplit(link.target)
        if parts.scheme:
            assert (parts.scheme, bool(parts.hostname)) == ("https", True), link
            continue
        file = ((ROOT / name).parent / link.target).resolve() if link.target else ROOT / name
        assert file.exists(), link
        if link.anchor:
            assert link.anchor in anchors(file.read_text(encoding="utf-8")), link


def test_no_page_is_out_of_the_way() -> None:
    """README leads to every page of docs/, and every picture is in one of them."""
    targets = {link.target for link in links(PAGES["README.md"])}
    assert {*PAGES} - targets == {"README.md"}
    shown = {Path(link.target).name for text in PAGES.values() for link in links(text)}
    assert {path.name for path in (ROOT / "docs" / "screenshots").iterdir()} <= shown


@pytest.mark.parametrize("name", PAGES)
def test_shell(name: str) -> None:
    """Every block of commands can be read by a shell."""
    for block in blocks(PAGES[name], "sh"):
        done = subprocess.run(["sh", "-n"], input=block, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), block


@pytest.mark.parametrize("name", PAGES)
def test_yaml(name: str) -> None:
    """Every block of YAML can be read."""
    for block in blocks(PAGES[name], "yaml"):
        assert yaml.safe_load(block)


@pytest.mark.parametrize("name", PAGES)
def test_command_lines(name: str) -> None:
    """Every command line in a console is one that the command line takes."""
    for line in re.findall(r"^# dtrace-exporter (.*)$", PAGES[name], re.MULTILINE):
        words = line.partition(" |")[0].split()
        done = subprocess.run(
            [sys.executable, "-m", "dtrace_exporter", *words, "--help"], capture_output=True
        )
        assert done.returncode == 0, line


MPTCP = 93
"""The line of the program for Linux that a kernel without MPTCP is at a loss about."""


class TestCommands:
    def test_all_blocks_are_known(self) -> None:
        """Each block is of a kind that is looked at here."""
        assert languages(COMMANDS) == {"console", "sh"}
        assert len(blocks(COMMANDS, "console")) == 4

    @pytest.mark.parametrize(
        ("number", "steps", "status"),
        [
            (
                0,
                [
                    {
                        "lacks": [
                            "mptcp_sock",
                            f"line {MPTCP}: failed to resolve type struct mptcp_sock",
                        ]
                    },
                    {"ready": "1"},
                    {"tick": True},
                ],
                0,
            ),
            (1, [{"unprivileged": True}], 1),
        ],
    )
    def test_check(
        self, number: int, steps: list[dict[str, Any]], status: int, tmp_path: Path
    ) -> None:
        """The output of check is what it prints where a type is missing and who is not root."""
        file, played = tmp_path / "config.yml", tmp_path / "steps.json"
        played.write_text(json.dumps(steps), encoding="utf-8")
        command = ["env", f"FAKE_DTRACE={played}", sys.executable, "-I", "-S", str(FAKE_DTRACE)]
        settings = {"command": command, "program": "linux"}
        listeners = [{"port": 7200, "name": "web"}]
        whole = {"source": "dtrace", "dtrace": settings, "listeners": listeners}
        file.write_text(json.dumps(whole), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "dtrace_exporter", "check", f"--config.file={file}"],
            capture_output=True,
            text=True,
        )
        shown = blocks(COMMANDS, "console")[number].partition("\n")[2]
        assert done.stdout == shown
        assert done.returncode == status

    def test_trace(self) -> None:
        """The output of trace has the columns of the command, its table is of the same lines."""
        lines = blocks(COMMANDS, "console")[2].splitlines()[1:]
        assert lines[0] == trace.HEADER
        assert {len(line.split(",")) for line in lines} == {9}
        row = trace.table(80, lambda text, _: text)
        assert [row(line) for line in lines] == blocks(COMMANDS, "console")[3].splitlines()[1:]
        narrow, wide = (trace.table(width, lambda text, _: text) for width in (115, 116))
        assert len(wide(trace.HEADER)) == 116 > len(narrow(trace.HEADER))
        manual = (ROOT / "man" / "dtrace-exporter.8").read_text(encoding="utf-8")
        for text in (COMMANDS, manual):
            assert "fewer than 116 columns" in " ".join(text.split())


class TestConfiguration:
    def test_example(self, tmp_path: Path) -> None:
        """The example is a configuration, and names every key."""
        file = tmp_path / "example.yml"
        (example,) = blocks(CONFIGURATION, "yaml")
        file.write_text(example, encoding="utf-8")
        loaded = config.load(file)
        names = [(one.port, one.name) for one in loaded.local.listeners]
        assert names == [(22, "ssh"), (443, "web")]
        assert loaded.local.dtrace.options == {"aggsize": "16m"}
        for key in self.keys():
            assert re.search(rf"\b{key.rpartition('.')[2]}:", example), key

    def test_keys(self) -> None:
        """The table has every key, and no other."""
        shown = set(re.findall(r"^\| `([a-z_.]+)` \|", CONFIGURATION, re.MULTILINE))
        assert shown == self.keys()

    @staticmethod
    def keys() -> set[str]:
        """Return the keys of a file, those of dtrace with that before them."""
        dtrace = {f"dtrace.{each.name}" for each in fields(config.DTraceConfig)}
        return dtrace | {"source", "listeners", "hosts"}

    def test_pages(self) -> None:
        """The table of pages has all that are served, and what it says of the first is so."""
        shown = set(re.findall(r"^\| `(/\S*)` \|", CONFIGURATION, re.MULTILINE))
        served = {
            path.rstrip("$").replace("\\", "")
            for rule in handlers.application(State(), no_reload).wildcard_router.rules
            if (path := getattr(rule.matcher, "regex", re.compile("")).pattern)
        }
        assert shown == {path for path in served if path.startswith("/")}
        assert "port" in page.SORTS
        assert "Resume" in get(one_port(), "/?sort=port&refresh=off").body.decode()
        assert f"{rates.WINDOW_SECONDS:g} s when somebody has looked" in CONFIGURATION

    def test_reload(self) -> None:
        """A reload by POST answers what the console shows."""
        (console,) = blocks(CONFIGURATION, "console")
        command, answer = console.splitlines()
        assert command == "# curl -X POST http://localhost:9748/-/reload"
        assert get(one_port(), "/-/reload", "POST").body.decode() == f"{answer}\n"
