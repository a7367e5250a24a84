"""The manual page describes what exists, and man(1) can show it."""

from __future__ import annotations

import argparse
import re
import subprocess
from dataclasses import fields
from pathlib import Path

from dtrace_exporter import cli, config
from dtrace_exporter.scripts.families import Settings
from dtrace_exporter.trace import HEADER
from host_tools import require

PAGE = Path(__file__).parent.parent / "man" / "dtrace-exporter.8"
SOURCE = PAGE.read_text(encoding="utf-8")


def section(name: str) -> str:
    """Return the source of a section."""
    (found,) = re.findall(rf"^\.Sh {name}\n(.*?)(?=^\.Sh|\Z)", SOURCE, re.DOTALL | re.MULTILINE)
    return str(found)


def plain(source: str) -> str:
    """Return a source without its macros, as one line."""
    lines = (re.sub(r"^\.|\b[A-Z][a-z]\b|\\&", "", line) for line in source.splitlines())
    return re.sub(r" ([,.:])(?= |$)", r"\1", " ".join(" ".join(lines).split()))


def flags(source: str) -> set[str]:
    """Return the flags that the macros of a source name."""
    found = re.findall(r"\bFl (\S+(?: [,|] (?:Fl )?\S+)*)", source)
    return {f"-{word}" for words in found for word in re.split(r" [,|] (?:Fl )?", words)}


def tagged(name: str, macro: str) -> set[str]:
    """Return the words with this macro among the items of a section."""
    items = re.findall(r"^\.It (.*)", section(name), re.MULTILINE)
    found = (re.search(rf"\b{macro} (\S+(?: [,|] \S+)*)", item) for item in items)
    return {word for match in found if match for word in re.split(r" [,|] ", match[1])}


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of the command line under an empty name, and those of its commands."""
    whole = cli._parser()
    (commands,) = (
        action for action in whole._actions if isinstance(action, argparse._SubParsersAction)
    )
    return {"": whole, **commands.choices}


def test_mandoc_finds_nothing() -> None:
    """mandoc(1) finds no fault in the page, except for other pages that are missing here."""
    mandoc = require("mandoc", "mandoc")
    done = subprocess.run([mandoc, "-T", "lint", "-W", "all", PAGE], capture_output=True, text=True)
    said = (done.stdout + done.stderr).splitlines()
    others = re.compile(r"STYLE: referenced manual not found|outdated mandoc\.db")
    assert [line for line in said if not others.search(line)] == []
    # It does find a fault in a page that has one.
    unclean = subprocess.run(
        [mandoc, "-T", "lint"], input=f"{SOURCE}.Nonsense\n", capture_output=True, text=True
    )
    assert unclean.returncode != 0


def test_man_shows_it() -> None:
    """man(1) shows the page without a warning."""
    man = require("man", "man-db")
    done = subprocess.run(
        [man, "--warnings", "-l", PAGE],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "MANWIDTH": "80"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    text = re.sub(r".\x08|\x1b\[[0-9;]*m", "", done.stdout)
    assert "dtrace-exporter [--config.file=file]" in " ".join(text.split())


def test_name() -> None:
    """The page has the name and the section that the SMF manifest gives for it."""
    assert PAGE.name == "dtrace-exporter.8"
    assert re.search(r"^\.Dt DTRACE-EXPORTER 8$", SOURCE, re.MULTILINE)


def test_flags_and_commands() -> None:
    """The page explains every flag and command, and nothing else."""
    known = {
        flag
        for parser in parsers().values()
        for action in parser._actions
        for flag in action.option_strings
    }
    names = {name for name in parsers() if name}
    items = re.findall(r"^\.It (.*)", section("DESCRIPTION"), re.MULTILINE)
    assert flags("\n".join(items)) == known
    assert tagged("DESCRIPTION", "Cm") == names
    assert flags(section("SYNOPSIS")) == {flag for flag in known if flag.startswith("--")}
    assert set(re.findall(r"^\.Cm (\w+)", section("SYNOPSIS"), re.MULTILINE)) == names


def test_choices_and_defaults() -> None:
    """The page names the values that flags and commands accept, and their defaults."""
    description = plain(section("DESCRIPTION"))
    for action in parsers()[""]._actions:
        if not isinstance(action, argparse._SubParsersAction):
            for choice in action.choices or ():
                assert re.search(rf"\b{choice}\b", description), choice
    for default in (":9748", "/metrics"):
        assert f"The default is {default}." in description
    for name in config.PROGRAMS[1:]:
        assert re.search(rf"\b{name}\b", description), name
    columns = "time stamp, date, action, source address and port, destination port, Q0, Q and Qmax"
    assert columns in description
    assert len(HEADER.split(",")) == 9


def test_keys() -> None:
    """The page explains every key of the configuration, and nothing else."""
    keys = {
        each.name
        for kind in (
            config.HostConfig,
            config.DTraceConfig,
            config.ListenerConfig,
            config.SockDiagConfig,
            config.UnixConfig,
            Settings,
        )
        for each in fields(kind)
    } | {"source", "hosts", "port", "sock_diag", "unix", "forget_closed_after"}
    keys |= {"script", "args", "pid", "limit", "metrics"}
    assert tagged("CONFIGURATION", "Cm") == keys
    text = plain(section("CONFIGURATION"))
    for program in config.PROGRAMS:
        assert re.search(rf"\b{program}\b", text), program
    assert "conn_tcp" in text
    assert "conn_lport" in text


def test_statuses() -> None:
    """The page explains every exit status, and nothing else."""
    statuses = {0, 2, cli.FAILURE, cli.ADDRESS_IN_USE, cli.NO_PERMISSION, cli.BAD_CONFIGURATION}
    explained = re.findall(r"^\.It (\d+)$", section("EXIT STATUS"), re.MULTILINE)
    assert {int(word) for word in explained} == statuses


def test_environment() -> None:
    """The page explains the variables that the service and a terminal's user need."""
    assert {cli.READY_FD, "NO_COLOR", "PATH", "TERM"} <= tagged("ENVIRONMENT", "Ev")


def test_web() -> None:
    """The page names every path that is served."""
    pages = {"/", "/metrics", "/api/v1/listeners", "/-/healthy", "/-/ready", "/-/reload"}
    assert tagged("WEB", "Pa") == pages


def test_example(tmp_path: Path) -> None:
    """The example configuration is valid."""
    (text,) = re.findall(r"^\.Bd .*\n(listeners:\n.*?)^\.Ed", SOURCE, re.DOTALL | re.MULTILINE)
    file = tmp_path / "example.yml"
    file.write_text(text, encoding="utf-8")
    loaded = config.load(file)
    assert [one.ports[0][0] for one in loaded.local.listeners] == [22, 443]
    assert [(host.name, host.dtrace.program) for host in loaded.hosts] == [
        ("sol10-u9", "solaris10")
    ]
