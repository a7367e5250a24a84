"""What a release does, and what the forge's workflow and templates contain."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import distribution
import pytest
import release
import yaml

from dtrace_exporter import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FORGE = ROOT / ".github"
TEXT = (
    "# Changelog\n\n## Unreleased\n\n### Added\n\n- Something.\n\n## 0.0.1 - 2020-01-01\n\n- Old.\n"
)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a clone that has only a changelog."""
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release, "CHANGELOG", tmp_path / "CHANGELOG.md")
    for key, value in {"NAME": "A", "EMAIL": "a@example.org"}.items():
        monkeypatch.setenv(f"GIT_AUTHOR_{key}", value)
        monkeypatch.setenv(f"GIT_COMMITTER_{key}", value)
    (tmp_path / "CHANGELOG.md").write_text(TEXT, encoding="utf-8")
    release.git("init", "--quiet")
    commit()
    return tmp_path


def commit() -> None:
    """Commit all files."""
    release.git("add", "--all")
    release.git("commit", "--quiet", "--message=All")


def does(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of release.py."""
    monkeypatch.setattr(sys, "argv", ["release.py", command])
    release.main()


def test_release(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unreleased changes get a version and a date, and then a tag with them as its message."""
    does("date", monkeypatch)
    text = (tree / "CHANGELOG.md").read_text(encoding="utf-8")
    new = rf"## Unreleased\n\n## {re.escape(__version__)} - 20\d\d-\d\d-\d\d\n\n### Added\n\n- Some"
    assert re.search(new, text)
    assert text.endswith("\n## 0.0.1 - 2020-01-01\n\n- Old.\n")
    commit()
    does("check", monkeypatch)
    does("tag", monkeypatch)
    message = release.git("tag", "--list", "--format=%(contents)", f"v{__version__}")
    assert message == f"{__version__}\n\n### Added\n\n- Something."


def test_what_is_not_in_place(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release is not tagged if it is not dated, not committed or tagged already."""
    with pytest.raises(SystemExit, match=r"CHANGELOG.md: expected '## .* - DATE'"):
        does("tag", monkeypatch)
    does("date", monkeypatch)
    with pytest.raises(SystemExit, match=r"(?s)expected a tree without changes.*CHANGELOG.md"):
        does("tag", monkeypatch)
    assert release.git("tag") == ""
    commit()
    does("tag", monkeypatch)
    for command in ("check", "tag"):
        with pytest.raises(SystemExit, match=f"the tag v{__version__} is there already"):
            does(command, monkeypatch)
    with pytest.raises(SystemExit, match="is there already"):
        does("date", monkeypatch)
    text = (
        (tree / "CHANGELOG.md")
        .read_text(encoding="utf-8")
        .replace("Unreleased\n", "Unreleased\n\n- More.\n")
    )
    with pytest.raises(SystemExit, match="below an empty Unreleased"):
        release.section(text)
    with pytest.raises(SystemExit, match="expected something below Unreleased"):
        release.dated(TEXT.replace("### Added\n\n- Something.\n", ""), "2020-01-02")


def test_metadata() -> None:
    """The licence is an SPDX expression, the version has one source, and there is a home page."""
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["dynamic"] == ["version"]
    assert __version__ == distribution.VERSION
    assert PROJECT["urls"]["Homepage"].startswith("https://")


def test_tools_are_pinned() -> None:
    """Each library and each tool of the tests is pinned in constraints.txt, which make uses."""
    wanted = [
        *PROJECT["dependencies"],
        *(line for name in ("auth", "dev") for line in PROJECT["optional-dependencies"][name]),
    ]
    names = {re.split(r"[><=]", line)[0].lower() for line in wanted}
    assert names <= {*distribution.PINNED}
    assert not [line for line in wanted if "==" in line]
    assert (ROOT / "Makefile").read_text(encoding="utf-8").count(
        "--constraint=constraints.txt"
    ) == 1


def test_templates_are_filled() -> None:
    """Package templates have a placeholder for each version, and each placeholder is filled."""
    for path in (ROOT / "packages").rglob("*"):
        if path.is_file() and path.suffix not in {".py", ".pyc", ".sh"} and path.name != "launcher":
            filled = distribution.fill(path.read_text(encoding="utf-8"))
            assert not re.search(r"@[A-Z]{2}", filled), path
            assert __version__ not in path.read_text(encoding="utf-8"), path


def test_workflow() -> None:
    """The workflow runs make targets that exist, on each Python from the oldest on."""
    workflow = yaml.safe_load((FORGE / "workflows/tests.yml").read_text(encoding="utf-8"))
    jobs = workflow["jobs"]
    assert {*jobs} == {"lint", "unit", "lowest", "kernel"}
    pythons = jobs["unit"]["strategy"]["matrix"]["python"]
    assert pythons == ["3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    made = [line for line in commands if line.startswith("make ")]
    for line in made:
        subprocess.run([*line.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)
    targets = {target for line in made for target in line.split()[1:]}
    ci = set(
        re.findall(r"^make (\w+)$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert targets == (ci - {"test"}) | {"unit", "kernel"}


def test_templates_of_the_forge() -> None:
    """Issue templates have a name and a description; the pull request template names make lint."""
    for path in (FORGE / "ISSUE_TEMPLATE").iterdir():
        _, head, body = path.read_text(encoding="utf-8").split("---\n", 2)
        assert {*yaml.safe_load(head)} == {"name", "about"}
        assert body.strip()
    request = (FORGE / "PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8")
    assert "make lint" in request
    for name in re.findall(r"\b[A-Z]+\.md\b", request):
        assert (ROOT / name).exists()
