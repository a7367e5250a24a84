"""docs/own-programs.md and config/scripts: their scripts, metrics and commands work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from dtrace_exporter import config
from dtrace_exporter.scripts import reader
from dtrace_exporter.scripts.configuration import LIMIT, ScriptConfig
from dtrace_exporter.scripts.families import RESERVED, Settings
from fake_steps import FOREVER, READY, FakeDTrace
from host_tools import require
from markdown_page import blocks

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "config" / "scripts"
# The blocks in the guide's list are indented.
GUIDE = re.sub(
    r"^   ```.*?^   ```$",
    lambda block: textwrap.dedent(block[0]),
    (ROOT / "docs" / "own-programs.md").read_text(encoding="utf-8"),
    flags=re.MULTILINE | re.DOTALL,
)


def examples() -> dict[str, ScriptConfig]:
    """Return all scripts of config/scripts, also the one that its configuration lacks."""
    found = config.load(
        SCRIPTS / "dtrace_exporter.yml", scripts=[SCRIPTS / "fsbytes.d"]
    ).local.scripts
    return {script.name: script for script in found}


def test_examples() -> None:
    """The examples are valid; one is a scaled histogram, and all labels have real names."""
    found = examples()
    assert {path.stem for path in SCRIPTS.glob("*.d")} == {*found}
    seconds, size = found["blocklatency"].families
    assert (seconds.name, seconds.kind) == ("dtrace_blocklatency_seconds", "histogram")
    assert seconds.bounds[0] == "1.023e-06"
    assert float(seconds.bounds[-1]) == pytest.approx(34.36, abs=0.01)
    assert seconds.labels == size.labels == ("device",)
    for script in found.values():
        assert all(not label.startswith("key") for each in script.families for label in each.labels)


def test_alert() -> None:
    """The alert fires, stays silent and resolves as tested, and its metric exists."""
    promtool = require("promtool", "prometheus")
    done = subprocess.run(
        [promtool, "test", "rules", "alerts_test.yml"], cwd=SCRIPTS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rules = yaml.safe_load((SCRIPTS / "alerts.yml").read_text(encoding="utf-8"))
    (rule,) = rules["groups"][0]["rules"]
    (named,) = re.findall(r"dtrace_\w+", rule["expr"])
    assert named in examples()["blocklatency"].families[0].samples
    tests = (SCRIPTS / "alerts_test.yml").read_text(encoding="utf-8")
    used = {*re.findall(r'le="([^"]+)"', tests)} - {"+Inf"}
    assert used < {*examples()["blocklatency"].families[0].bounds}


def test_the_guide_names_metrics_that_there_are() -> None:
    """Each script's metric that the guide names is one of an example's."""
    given = {name for each in examples().values() for f in each.families for name in f.samples}
    named = {*re.findall(r"\bdtrace_(?:syscalls|blocklatency|fsbytes)_\w+", GUIDE)}
    assert named
    assert named <= given
    shown = blocks(GUIDE, "console")[0]
    assert {*re.findall(r"^dtrace_\w+\{(\w+)=", shown, re.MULTILINE)} == {"execname"}


def test_the_guide_has_every_key(tmp_path: Path) -> None:
    """The guide's example of all keys is valid, and has each key."""
    shutil.copytree(SCRIPTS, tmp_path, dirs_exist_ok=True)
    short, whole = (yaml.safe_load(block) for block in blocks(GUIDE, "yaml"))
    assert short == {"scripts": [{"script": "syscalls.d"}]}
    (entry,) = whole["scripts"]
    assert {*entry} == {"script", "args", "pid", "limit", "metrics"}
    assert entry["limit"] == LIMIT
    assert {*entry["metrics"]["seconds"]} == {*Settings.__dataclass_fields__}
    file = tmp_path / "c.yml"
    file.write_text(yaml.safe_dump(whole), encoding="utf-8")
    assert config.load(file).local.scripts[0].families[0].name == "disk_latency_seconds"
    for name in RESERVED:
        assert f"`{name}`" in GUIDE
    assert {*reader.FUNCTIONS} == {*re.findall(r"`(\w+)\(\)`", GUIDE)} & {*reader.FUNCTIONS}


def run(*words: str) -> tuple[int, str]:
    """Run the command line, and return its exit status and its output."""
    done = subprocess.run(
        [sys.executable, "-m", "dtrace_exporter", *words], capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def configured(tmp_path: Path, fake_dtrace: FakeDTrace) -> Path:
    """Return a configuration of the two examples for Linux, over a fake dtrace(1)."""
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    entries = [{"script": "scripts/syscalls.d"}, {"script": "scripts/blocklatency.d"}]
    keys = {"command": fake_dtrace(), "program": "linux"}
    file = tmp_path / "config.yml"
    whole = {"source": "dtrace", "dtrace": keys, "scripts": entries}
    file.write_text(yaml.safe_dump(whole), encoding="utf-8")
    return file


def test_check(configured: Path) -> None:
    """The command check compiles each script and lists its metrics, as the guide shows."""
    status, said = run("check", f"--config.file={configured}")
    assert status == 0
    (shown,) = [block for block in blocks(GUIDE, "console") if "script syscalls" in block]
    lines = [line for line in shown.splitlines() if "yscalls" in line]
    assert len(lines) == 3
    assert "\n".join(lines) in said
    assert re.search(r"^ok +dtrace_blocklatency_seconds_bucket histogram dev", said, re.MULTILINE)
    assert not re.search(r"script-\w", said)


def test_check_of_one_that_does_not_compile(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """A script that does not compile is a failure with dtrace(1)'s message."""
    script = tmp_path / "bad.d"
    script.write_text("nothing:::here { @a = count(); }", encoding="utf-8")
    lacks = {"lacks": ["nothing:::", "line 1: probe description does not match any probes"]}
    keys = {"command": fake_dtrace(lacks, READY, FOREVER), "program": "linux"}
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump({"source": "dtrace", "dtrace": keys}), encoding="utf-8")
    status, said = run("check", f"--config.file={file}", f"--script={script}")
    assert status == 1
    assert re.search(r"^FAIL  script bad .*does not match any probes$", said, re.MULTILINE)


def test_program(configured: Path) -> None:
    """The command program prints a script as it runs, by its name or its path."""
    options = f"--config.file={configured}"
    status, said = run("program", options, "syscalls")
    assert status == 0
    text = (SCRIPTS / "syscalls.d").read_text(encoding="utf-8")
    assert text.partition("\n")[2] in said
    assert said.rstrip().endswith("#pragma D option destructive=unset")
    for path in (configured.parent / "scripts/syscalls.d", SCRIPTS / "fsbytes.d"):
        status, again = run("program", options, str(path))
        assert (status, "printa" in again) == (0, True)
    # Programs for listen queues are still printed.
    status, said = run("program", options, str(ROOT / "src/dtrace_exporter/programs/linux.d"))
    assert (status, "ready 5" in said) == (0, True)


def test_files_that_others_may_write(configured: Path) -> None:
    """As root, the exporter refuses a script that others can change; otherwise it warns."""
    (configured.parent / "scripts/syscalls.d").chmod(0o666)
    status, said = run("program", f"--config.file={configured}", "syscalls")
    if os.geteuid() == 0:
        assert status == 78
        assert "syscalls.d: expected a file that nobody but root can change" in said
    else:
        assert status == 0
        assert "others can change a file" in said
