"""Every page of the documentation: its links, its commands and the output of the examples."""

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

from dtrace_exporter import config, senders, top, trace
from dtrace_exporter.sockets import MORE_THAN
from dtrace_exporter.state import State
from dtrace_exporter.web import handlers, page, rates
from dtrace_exporter.web.selection import FIELDS
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
    """Every internal link leads to a file and a heading; an external one is a valid https URL."""
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
    """README links to every page of docs/, and every screenshot is on one of the pages."""
    targets = {link.target for link in links(PAGES["README.md"])}
    assert {*PAGES} - targets == {"README.md"}
    shown = {Path(link.target).name for text in PAGES.values() for link in links(text)}
    assert {path.name for path in (ROOT / "docs" / "screenshots").iterdir()} <= shown


@pytest.mark.parametrize("name", PAGES)
def test_shell(name: str) -> None:
    """A shell can parse every block of commands."""
    for block in blocks(PAGES[name], "sh"):
        done = subprocess.run(["sh", "-n"], input=block, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), block


@pytest.mark.parametrize("name", PAGES)
def test_yaml(name: str) -> None:
    """Every block of YAML can be parsed."""
    for block in blocks(PAGES[name], "yaml"):
        assert yaml.safe_load(block)


@pytest.mark.parametrize("name", PAGES)
def test_command_lines(name: str) -> None:
    """The exporter accepts the arguments of every command in a console."""
    for line in re.findall(r"^# dtrace-exporter (.*)$", PAGES[name], re.MULTILINE):
        words = line.partition(" |")[0].split()
        done = subprocess.run(
            [sys.executable, "-m", "dtrace_exporter", *words, "--help"], capture_output=True
        )
        assert done.returncode == 0, line


MPTCP = 89
"""The line of Linux' program that a kernel without MPTCP cannot resolve."""


class TestCommands:
    def test_all_blocks_are_known(self) -> None:
        """Every block is of a kind that is tested here."""
        assert languages(COMMANDS) == {"console", "sh"}
        assert len(blocks(COMMANDS, "console")) == 6

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
        """The shown outputs of check are its real ones: for a missing type, and without root."""
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
        # The kernel and the privileges are those of this host.
        assert done.stdout.partition("\nok    kernel ")[0] == shown.partition("\nok    kernel ")[0]
        own = [line.split()[1] for line in done.stdout.splitlines() if line[0] != " "]
        names = [line.split()[1] for line in shown.splitlines() if line[0] != " "]
        assert [name for name in own if name != "container"] == names
        assert done.returncode == status

    def test_top(self) -> None:
        """The shown table is what top draws of such listeners; the page names its sort keys."""
        _, head, *expected = blocks(COMMANDS, "console")[2].splitlines()
        before, after = [], []
        for address, port, name, owner, q, qmax, syns, accepts, wait in (
            ("*", 80, "web", "nginx nginx", 97, 128, 412, 391, 0.172),
            ("127.0.0.1", 5432, "db", "postgres postgresql", 0, 244, 8, 8, 41e-6),
            ("*", 22, "ssh", "sshd ssh", 0, 128, 0, 0, 0.0),
        ):
            comm, unit = owner.split()
            row: dict[str, Any] = {
                "port": f"{port}",
                "address": address,
                "listener": name,
                "program": comm,
                "unit": f"{unit}.service",
                "q0_length": 0,
            }
            row |= {"q_length": q, "q_limit": qmax, "q_capacity": qmax + 1, "drops_total": 0}
            counted: dict[str, float] = {"syns_total": syns, "accepts_total": accepts}
            counted |= {"accept_wait_seconds_count": accepts}
            counted |= {"accept_wait_seconds_sum": accepts * wait}
            before.append(row | dict.fromkeys(counted, 0))
            after.append(row | {name: 5 * value for name, value in counted.items()})
        table = top.Table()
        table.take(0.0, top.values(before))
        table.take(5.0, top.values(after))
        lines = table.draw(110, 24, top.URL)
        drawn = ["".join(text for text, _ in line).rstrip() for line in lines]
        assert [head[9:], *expected] == [drawn[0][9:], *drawn[1:]]
        (keys,) = re.findall(r"`--sort=KEY` says (.*?)\. The keys", COMMANDS, re.DOTALL)
        assert re.findall(r"`(\w+)`", keys) == [*top.KEYS]

    def test_trace(self) -> None:
        """The shown output of trace has its columns, and the shown table has the same lines."""
        lines = blocks(COMMANDS, "console")[3].splitlines()[1:]
        assert lines[0] == trace.HEADER
        assert {len(line.split(",")) for line in lines} == {9}
        row = trace.table(80, lambda text, _: text, MORE_THAN)
        assert [row(line) for line in lines] == blocks(COMMANDS, "console")[4].splitlines()[1:]
        narrow, wide = (trace.table(width, lambda text, _: text, MORE_THAN) for width in (115, 116))
        assert len(wide(trace.HEADER)) == 116 > len(narrow(trace.HEADER))
        manual = (ROOT / "man" / "dtrace-exporter.8").read_text(encoding="utf-8")
        for text in (COMMANDS, manual):
            assert "fewer than 116 columns" in " ".join(text.split())

    def test_trace_top(self) -> None:
        """The shown table is what trace --top draws of such senders."""
        _, head, *expected = blocks(COMMANDS, "console")[5].splitlines()
        told = [
            *("syn 0 0 ffffc0000207 2060", "drop 0 0 ffffc0000207 q_full 1955"),
            *("syn 0 0 ffffc0a80102 40", "syn 0 20010db800000000 1 5"),
            *("drop 0 20010db800000000 1 other 1", "syn 1 0 0 280", "drop 1 0 0 q_full 60"),
        ]
        read = senders.Senders()
        board = senders.Board(read, 7200, "")
        for at, line in ((0.0, "tick 1"), *((0.0, line) for line in told), (5.0, "tick 2")):
            if (fresh := read.read(line)) is not None:
                board.tick(at, fresh)
        drawn = ["".join(text for text, _ in line).rstrip() for line in board.draw(100, 24)]
        assert [head[9:], *expected] == [drawn[0][9:], *drawn[1:]]


def shown_keys(text: str) -> set[str]:
    """Return the keys in a table."""
    return set(re.findall(r"^\| `([a-z_.]+)` \|", text, re.MULTILINE))


class TestConfiguration:
    def test_example(self, tmp_path: Path) -> None:
        """The example is a valid configuration and has every key."""
        file = tmp_path / "example.yml"
        (example,) = blocks(CONFIGURATION, "yaml")
        file.write_text(example, encoding="utf-8")
        (tmp_path / "iolatency.d").write_text("BEGIN { @time = count(); }", encoding="utf-8")
        loaded = config.load(file)
        names = [(one.ports[0][0], one.name) for one in loaded.local.listeners]
        assert names == [(22, "ssh"), (443, "web")]
        assert loaded.local.dtrace.options == {"aggsize": "16m"}
        for key in self.keys():
            assert re.search(rf"\b{key.rpartition('.')[2]}:", example), key

    def test_keys(self) -> None:
        """The table has exactly the keys of the configuration."""
        whole, entry = CONFIGURATION.split("\n## Which listeners\n")
        assert shown_keys(whole) == self.keys()
        keys = {each.name for each in fields(config.ListenerConfig)}
        assert shown_keys(entry) | {"name", "histograms"} == keys | {"port"}

    @staticmethod
    def keys() -> set[str]:
        """Return the keys of a file, those of dtrace with that prefix."""
        dtrace = {f"dtrace.{each.name}" for each in fields(config.DTraceConfig)}
        others = {"sock_diag.sample_interval", "unix.paths", "forget_closed_after"}
        others |= {"exclude_ports", "scripts"}
        return dtrace | others | {"source", "listeners", "hosts"}

    def test_pages(self) -> None:
        """The table lists exactly the paths that are served, and the first page is as described."""
        shown = set(re.findall(r"^\| `(/\S*)` \|", CONFIGURATION, re.MULTILINE))
        served = {
            path.rstrip("$").replace("\\", "")
            for rule in handlers.application(State(), no_reload).wildcard_router.rules
            if (path := getattr(rule.matcher, "regex", re.compile("")).pattern)
        }
        assert shown == {path for path in served if path.startswith("/")}
        assert "port" in page.SORTS
        assert "Resume" in get(one_port(), "/?sort=port&refresh=off").body.decode()
        assert f"those of the last {rates.WINDOW_SECONDS:g} s" in " ".join(CONFIGURATION.split())
        assert set(re.findall(r"`\?(\w+)=\w+`", CONFIGURATION)) == {*FIELDS, "sort", "refresh"}

    def test_json(self) -> None:
        """The shown answer has the keys of a real one, in their order."""
        console = blocks(CONFIGURATION, "console")[1]
        command, *lines = console.splitlines()
        assert command == "# curl 'http://localhost:9748/api/v1/listeners?port=22'"
        answer = get(one_port(), "/api/v1/listeners?port=22").body.decode().splitlines()
        (shown, row) = (json.loads(each[1].replace(", ...}", "}")) for each in (lines, answer))
        assert lines[0::2] == answer[0::2]
        assert shown.items() <= row.items()
        assert [key for key in row if key in shown] == [*shown]

    def test_reload(self) -> None:
        """A reload by POST answers what the console shows."""
        console = blocks(CONFIGURATION, "console")[0]
        command, answer = console.splitlines()
        assert command == "# curl -X POST http://localhost:9748/-/reload"
        assert get(one_port(), "/-/reload", "POST").body.decode() == f"{answer}\n"
