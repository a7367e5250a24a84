"""docs/operations.md: its messages, statuses, times and units are those of the project."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
from pathlib import Path

import pytest

from dtrace_exporter import cli
from dtrace_exporter.tracing import heartbeat, supervision
from dtrace_exporter.tracing.process import ENVIRONMENT
from dtrace_exporter.tracing.rendering import window
from dtrace_faults import FAULTS
from host_tools import require

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
TABLE = re.compile(r"(?:^\|.*\|\n)+", re.MULTILINE)
UNIT = ROOT / "systemd/dtrace-exporter.service"


def table(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its head."""
    found = TABLE.search(GUIDE, GUIDE.index(f"\n## {heading}\n"))
    assert found
    lines = found[0].splitlines()[2:]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def logged() -> dict[str, set[str]]:
    """Return the messages that the package logs, with their levels, from its source."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "src/dtrace_exporter").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func.value) == "_log"
                and node.func.attr in {"info", "warning", "error", "exception", "log"}
            ):
                text = node.args[node.func.attr == "log"]
                assert isinstance(text, ast.Constant)
                assert isinstance(text.value, str)
                levels = {"warning": "warn", "exception": "error", "log": "warn"}
                level = levels.get(node.func.attr, node.func.attr)
                found.setdefault(text.value.replace("%d", "N"), set()).add(level)
    return found


def test_log_messages() -> None:
    """The page explains every message that is logged at info and above, with its level."""
    rows = {cells[0].strip("`"): {cells[1]} for cells in table("What the log says")}
    assert rows == logged()


def test_exit_statuses() -> None:
    """The exit statuses are the command line's, and systemd treats them as the page says."""
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    prevented = unit["Service"]["RestartPreventExitStatus"].split()
    rows = {cells[0]: cells[2] for cells in table("Exit statuses")}
    known = {0, cli.FAILURE, 2, cli.ADDRESS_IN_USE, cli.NO_PERMISSION, cli.BAD_CONFIGURATION}
    assert {int(status) for status in rows} == known
    assert sorted(status for status, does in rows.items() if does == "leaves it ended") == prevented
    assert unit["Service"]["Restart"] == "on-failure"
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert f"after {unit['Service']['RestartSec'].removesuffix('s')} s, for ever" in rows["75"]


def test_times() -> None:
    """The times on the page are those of the code."""
    assert f"`no heartbeat for {window(1.0).patience:g} s`" in GUIDE
    assert f"`not ready after {heartbeat.START_SECONDS:g} s`" in GUIDE
    assert supervision._FIRST_DELAY == 1.0
    assert supervision._LONGEST_DELAY == 60.0


def test_unit_and_guide_agree() -> None:
    """The unit has the capabilities that dtrace(1) and sock_diag need at least."""
    unit = UNIT.read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| \*\*root\*\* \| \*\*(.*?)\*\* \|", GUIDE, re.MULTILINE)
    assert f"CapabilityBoundingSet={row.replace(',', '')} CAP_SYS_PTRACE\n" in unit
    assert "EnvironmentFile=-/etc/default/dtrace-exporter\n" in unit
    arguments = (ROOT / "systemd/dtrace-exporter.default").read_text(encoding="utf-8")
    assert 'ARGS="--config.file=/etc/dtrace-exporter/dtrace_exporter.yml"' in arguments
    assert set(ENVIRONMENT) <= set(re.findall(r"`(\w+)`", GUIDE))


def test_faults_are_tests() -> None:
    """The page lists all faults that are tested."""
    told = "\n".join(cells[0] for cells in table("Faults that were tested"))
    words = (
        *("killed", "stopped", "exits at once", "without end", "nothing at all", "stdout only"),
        *("stderr only", "unresponsiveness", "descriptors", "full disk", "clock", "50 reloads"),
        *("SIGHUP", "SIGTERM", "scrapes", "FIN", "unloaded"),
    )
    assert [word for word in words if word not in told] == []
    assert len(FAULTS) >= 7


def test_units_are_valid(tmp_path: Path) -> None:
    """systemd-analyze(1) finds no fault in the units."""
    analyze = require("systemd-analyze", "systemd")
    units = []
    for source in (UNIT, UNIT.with_suffix(".socket")):
        text = source.read_text(encoding="utf-8")
        # The program is not installed here.
        text = text.replace("/usr/local/bin/dtrace-exporter", "/bin/true")
        units.append(tmp_path / source.name)
        units[-1].write_text(text, encoding="utf-8")
    done = subprocess.run(
        [analyze, "verify", "--man=no", *map(str, units)], capture_output=True, text=True
    )
    said = [line for line in done.stderr.splitlines() if "dtrace-exporter" in line]
    assert said == []


@pytest.mark.parametrize("path", sorted((ROOT / "systemd").glob("*.service")))
def test_hardening_is_there(path: Path) -> None:
    """The units keep their hardening."""
    text = path.read_text(encoding="utf-8")
    for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=yes", "PrivateTmp=yes",
                 "MemoryDenyWriteExecute=yes", "RestrictNamespaces=net", "UMask=0077",
                 "SystemCallArchitectures=native", "Type=notify"):  # fmt: skip
        assert f"\n{line}\n" in text
    lines = re.findall(r"^InaccessiblePaths=(.*)$", text, re.MULTILINE)
    hidden = [path.removeprefix("-") for path in " ".join(lines).split()]
    for path_of_root in ("/run/dbus", "/run/systemd/private", "/run/docker.sock", "/run/libvirt",
                         "/etc/shadow", "/etc/ssh/ssh_host_rsa_key"):  # fmt: skip
        assert path_of_root in hidden
