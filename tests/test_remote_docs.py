"""docs/remote-hosts.md: its configurations, commands and numbers match the code and the tests."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dtrace_exporter import config, families
from dtrace_exporter.tracing import program, rendering, session
from dtrace_exporter.tracing.plan import Plan

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "remote-hosts.md"
TEXT = GUIDE.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the texts of all fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def lab_constant(name: str) -> object:
    """Return a constant of tests/kernel/lab/far.py, which the guest cases use for remote hosts."""
    source = (ROOT / "tests/kernel/lab/far.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise KeyError(name)


def test_there_are_no_other_blocks() -> None:
    """Each code block has a language that is checked here or that needs no check."""
    kinds = set(re.findall(r"^```(.*)$", TEXT, re.MULTILINE))
    assert kinds == {"", "sh", "yaml", "console", "text", "ssh_config"}


@pytest.mark.parametrize("number", range(len(blocks("yaml"))))
def test_configurations(number: int, tmp_path: Path) -> None:
    """Every configuration is valid, and its hosts are those of the ssh_config."""
    file = tmp_path / "c.yml"
    file.write_text(blocks("yaml")[number], encoding="utf-8")
    loaded = config.load(file)
    (ssh_config,) = blocks("ssh_config")
    for host in loaded.hosts or [loaded.local]:
        ssh, option, _, name, command = host.dtrace.command
        assert (ssh, option, command) == ("ssh", "-F", "/usr/sbin/dtrace")
        assert f"Host {name}\n" in ssh_config
        # A forced command answers no questions, so program: auto would fail.
        assert program.load(host.dtrace.program).parts


def test_ssh_config_is_the_tested_one() -> None:
    """The ssh options for all hosts are those that the cases with a real sshd use."""
    (block,) = blocks("ssh_config")
    assert block[block.index("Host *") :] == lab_constant("SSH_CONFIG")


def test_ssh_config_is_explained() -> None:
    """The table explains the ssh_config's options, and the times in the text follow from them."""
    (block,) = blocks("ssh_config")
    options = dict(re.findall(r"^    (\w+) (.+)$", block[block.index("Host *") :], re.MULTILINE))
    table = TEXT[TEXT.index("| | why |") :].partition("\n\n")[0]
    explained = {
        name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert explained == {*options} - {"IdentityFile", "IdentitiesOnly", "UserKnownHostsFile"}
    alive = int(options["ServerAliveInterval"]) * (int(options["ServerAliveCountMax"]) + 1)
    assert f"silent for {alive} s" in table
    assert f"after {options['ConnectTimeout']} s" in table
    # ssh gives its reason before the exporter's patience ends.
    patience = rendering.window(1.0).patience
    assert alive < patience
    assert f"heartbeat after {patience:g} s" in table
    assert f"no heartbeat for {patience:g} s" in TEXT
    interval, seconds = re.findall(r"with `interval: (\d+)s` .* after (\d+) s", TEXT)[0]
    assert rendering.window(float(interval)).patience == float(seconds)


def test_forced_commands() -> None:
    """Each forced command runs dtrace(1) on its standard input, or on a file copied before."""
    forced = re.findall(r'^restrict,command="([^"]+)" ssh-', TEXT, re.MULTILINE)
    scripts = [shlex.split(command) for command in forced]
    assert [words[:2] for words in scripts] == [["/usr/sbin/dtrace", "-s"]] * 2
    plan = Plan(config.DTraceConfig(command=("/usr/sbin/dtrace",)), None, 1, {})
    assert plan.argv == scripts[0]
    assert f"'cat >{scripts[1][2]}'" in TEXT


def test_check_output() -> None:
    """The shown output of check describes parts of the program in the exporter's own words."""
    (output,) = blocks("console")
    shown = dict(re.findall(r"^(?:ok|no)      (\w+) +(.+)$", output, re.MULTILINE))
    assert {*shown} <= {*families.parts()}
    assert shown["established"] == families.parts()["established"].what
    source = Path(session.__file__).read_text(encoding="utf-8")
    assert f'"{shown["syn_drops"]}"' in source


@pytest.mark.parametrize("number", range(len(blocks("sh"))))
def test_shell(number: int) -> None:
    """A shell can parse every block of commands."""
    done = subprocess.run(["sh", "-n"], input=blocks("sh")[number], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_links() -> None:
    """Every relative link leads to an existing file, and to an existing heading if it names one."""
    links = re.findall(r"\]\((?!https?://)([^)#]+)(?:#([^)]+))?\)", TEXT)
    assert links
    for file, anchor in links:
        text = (GUIDE.parent / file).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs
    assert "(#slow-links)" in TEXT
    assert "## Slow links\n" in TEXT
