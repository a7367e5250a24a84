"""docs/install-solaris.md: its commands, configurations and properties are valid."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from dtrace_exporter import cli, config, log
from host_tools import require

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "install-solaris.md"
TEXT = GUIDE.read_text(encoding="utf-8")
MANIFEST = ElementTree.parse(ROOT / "smf" / "dtrace-exporter.xml").getroot()


def blocks(language: str) -> list[str]:
    """Return the texts of all fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Return the words of each simple command line of the guide."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line]


def test_there_are_no_other_blocks() -> None:
    """Each block is of a kind that is tested here, or only for reading."""
    kinds = set(re.findall(r"^```(.*)$", TEXT, re.MULTILINE))
    assert kinds == {"", "sh", "yaml", "console", "text"}


@pytest.mark.parametrize("number", range(len(blocks("yaml"))))
def test_configurations(number: int, tmp_path: Path) -> None:
    """Every configuration is valid; the one for Prometheus has the service's port."""
    text = blocks("yaml")[number]
    if text.startswith("scrape_configs:"):
        (job,) = yaml.safe_load(text)["scrape_configs"]
        assert job["static_configs"][0]["targets"][0].endswith(":9748")
        return
    file = tmp_path / "c.yml"
    file.write_text(text, encoding="utf-8")
    loaded = config.load(file)
    assert loaded.local.listeners or loaded.hosts
    for host in loaded.hosts:
        # A forced command answers no query, so auto cannot find the program.
        assert host.dtrace.program == "solaris10"
        assert "-oBatchMode=yes" in host.dtrace.command


def test_offsets() -> None:
    """The offsets of older updates are in the program, too."""
    program = ROOT / "src/dtrace_exporter/programs/solaris10.d"
    text = program.read_text(encoding="utf-8")
    for name, offset in re.findall(r"(conn_tcp|conn_lport): (0x\w+)", TEXT):
        assert re.search(rf"\b{offset}\b", text), name


@pytest.mark.parametrize("shell", ["dash", "ksh93"])
def test_shell(shell: str) -> None:
    """Shells can parse every block of commands."""
    path = require(shell, {"dash": "dash", "ksh93": "ksh"}[shell])
    assert len(blocks("sh")) > 10
    for block in blocks("sh"):
        done = subprocess.run([path, "-n"], input=block, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), block


def test_the_exporter_takes_its_arguments() -> None:
    """The exporter accepts the arguments of every call."""
    calls = [words for words in commands() if any("bin/dtrace-exporter" in each for each in words)]
    assert calls
    for words in calls:
        (at,) = (index for index, word in enumerate(words) if "bin/dtrace-exporter" in word)
        cli._parser().parse_args(words[at + 1 :])


def test_properties() -> None:
    """Properties that are set exist with that type, and all are listed with their values."""
    group = MANIFEST.find(".//property_group[@name='config']")
    assert group is not None
    types = {each.attrib["name"]: each.attrib["type"] for each in group}
    for block in blocks("sh"):
        for name, kind in re.findall(r"setprop config/(\w+) = (\w+):", block):
            assert types[name] == kind
    choices: dict[str, Iterable[str]] = {"log_level": log.LEVELS, "log_format": log.FORMATS}
    rows = re.findall(r"^\| `config/(\w+)` \| (.*) \| `([^`]*)`.* \|$", TEXT, re.MULTILINE)
    assert {name for name, _, _ in rows} == set(types)
    for name, meaning, value in rows:
        (each,) = (one for one in group if one.attrib["name"] == name)
        values = [node.attrib["value"] for node in each.iter("value_node")]
        assert [value.strip('"')] == (values or [each.attrib["value"]])
        for choice in choices.get(name, ()):
            assert f"`{choice}`" in meaning


def test_user_and_privileges() -> None:
    """The user that is created is the service's, and so are the privileges."""
    credential = MANIFEST.find(".//method_credential")
    assert credential is not None
    for words in commands():
        if words[0] in ("useradd", "groupadd", "userdel", "groupdel"):
            assert words[-1] == credential.attrib["user"]
    privileges = credential.attrib["privileges"]
    assert f"ppriv -e -s A={privileges} " in TEXT
    assert f"defaultpriv={privileges} " in TEXT
    assert f'"{privileges},net_privaddr"' in TEXT


def test_manifest_for_smartos() -> None:
    """The manifest for SmartOS differs only by user and group."""
    (block,) = (block for block in blocks("sh") if "/opt/custom/smf" in block)
    (words,) = (words for words in commands() if words[0] == "sed")
    source = ROOT / "smf" / "dtrace-exporter.xml"
    done = subprocess.run(["sed", words[1], source], capture_output=True, text=True, check=True)
    before, after = source.read_text(encoding="utf-8").splitlines(), done.stdout.splitlines()
    changed = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    assert len(changed) == 1
    assert "user='daemon' group='daemon'" in changed[0][1]
    assert "svccfg import /opt/custom/smf/dtrace-exporter.xml" in block


def test_the_log_that_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The messages of the example are those of the exporter and of the method."""
    (block,) = (block for block in blocks("console") if "Executing start method" in block)
    said, then = (line for line in block.splitlines() if line.startswith("dtrace-exporter: "))
    file = tmp_path / "c.yml"
    file.write_text("dtrace:\n  intervall: 1s\n", encoding="utf-8")
    assert cli.main([f"--config.file={file}"]) == cli.BAD_CONFIGURATION
    message = capsys.readouterr().err.rstrip("\n")
    assert message.replace(str(file), "/opt/dtrace-exporter/etc/dtrace_exporter.yml") == said
    method = (ROOT / "smf" / "dtrace-exporter").read_text(encoding="utf-8")
    text, _, fmri = then.removeprefix("dtrace-exporter: ").partition(", then svcadm clear ")
    assert text in method
    assert f"svc:/{MANIFEST[0].attrib['name']}:default" == fmri


def test_links() -> None:
    """Every link within the guide leads to a heading."""
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert links
    assert [link for link in links if link not in anchors] == []
