"""The packages: built, complete, and installed as the guide says, where nothing else is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from dtrace_exporter import __version__

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
PARTS = (".editorconfig", ".pre-commit-config.yaml", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE",
         "MANIFEST.in", "Makefile", "README.md", "pyproject.toml",
         "bench", "config", "docs", "man", "smf", "src", "systemd", "tests")  # fmt: skip
DATA = f"dtrace_exporter-{__version__}.data/data/share/"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the guide to installing with pipx is for Linux"
)


def run(*command: str | Path, **options: object) -> str:
    """Run a command; a failure of it is one of the test's, with what it said."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the source distribution and the wheel that was built from it."""
    tree = tmp_path_factory.mktemp("tree")
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / part, tree / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, tree / part)
    out = tmp_path_factory.mktemp("packages")
    run(sys.executable, "-m", "build", "--outdir", out, tree)
    return out


def sources(pattern: str) -> set[str]:
    """Return the files of the tree that match, by their paths in it."""
    return {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)}


def test_source_distribution(packages: Path) -> None:
    """The source distribution has all that it takes to run, to test and to read."""
    (file,) = packages.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for pattern in ("src/**/*.py", "src/**/*.d", "src/**/*.html", "docs/*.md", "man/*.8",
                    "smf/*", "systemd/*", "config/*.yml", "tests/**/*.py", "tests/kernel/model/*.c",
                    "bench/**/*.py", "Makefile", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE",
                    ".editorconfig", ".pre-commit-config.yaml"):  # fmt: skip
        wanted = sources(pattern)
        assert wanted
        assert not wanted - names, pattern


def test_wheel(packages: Path) -> None:
    """The wheel has the package with D programs and templates, and what a host needs besides."""
    (file,) = packages.glob("*.whl")
    assert file.name == f"dtrace_exporter-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        assert "Requires-Python: >=3.11" in archive.read(metadata).decode()
    for pattern in ("*.py", "web/*.py", "py.typed", "programs/*.d", "web/templates/*.html"):
        wanted = {name.removeprefix("src/") for name in sources(f"src/dtrace_exporter/{pattern}")}
        assert wanted
        assert not wanted - names, pattern
    assert f"{DATA}man/man8/dtrace-exporter.8" in names
    for name in sources("systemd/*"):
        assert f"{DATA}dtrace-exporter/{name}" in names
    assert f"{DATA}dtrace-exporter/dtrace_exporter.yml" in names
    assert not {name for name in names if name.startswith("tests")}


def test_install(packages: Path, tmp_path: Path) -> None:
    """The guide's lines install it where nothing else is, and it runs from there."""
    (block,) = re.findall(r"^```sh\n(export PIPX_HOME.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    (wheel,) = packages.glob("*.whl")
    root = tmp_path / "root"
    for directory in ("etc/default", "etc/systemd/system", "usr/local/bin"):
        (root / directory).mkdir(parents=True)
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    told = tmp_path / "told"
    (bin_ / "systemctl").write_text(f'#!/bin/sh\necho "$@" >> {told}\n', encoding="utf-8")
    (bin_ / "systemctl").chmod(0o755)
    (bin_ / "pipx").write_text(f'#!/bin/sh\nexec {sys.executable} -m pipx "$@"\n', encoding="utf-8")
    (bin_ / "pipx").chmod(0o755)
    script = re.sub(r"(?<=[= ])/(opt|usr|etc)/", rf"{root}/\1/", block)
    script = script.replace("'.[auth]'", f"'{wheel}[auth]'")
    environment = {"PATH": f"{bin_}:/usr/bin:/bin", "HOME": str(tmp_path)}
    # Where packages come from is the machine's own affair.
    environment |= {name: os.environ[name] for name in os.environ if name.startswith("PIP_")}
    run("sh", "-euc", script, env=environment, cwd=tmp_path)
    told_lines = told.read_text(encoding="utf-8").splitlines()
    assert told_lines == ["daemon-reload", "enable --now dtrace-exporter"]

    exporter = root / "usr/local/bin/dtrace-exporter"
    with exporter.open(encoding="utf-8") as installed:
        assert installed.readline().endswith("/python -I\n")
    clean = {"PATH": "/usr/bin:/bin"}
    assert run(exporter, "--version", env=clean).startswith(f"dtrace-exporter {__version__} ")
    for name in ("linux", "illumos", "solaris10"):
        text = run(exporter, "program", name, env=clean)
        assert "inline int" in text
    assert (root / "usr/local/share/man/man8/dtrace-exporter.8").exists()
    config = root / "etc/dtrace-exporter/dtrace_exporter.yml"
    assert run(exporter, "program", "linux", f"--config.file={config}", env=clean)
    unit = (root / "etc/systemd/system/dtrace-exporter.service").read_text(encoding="utf-8")
    assert "ExecStart=/usr/local/bin/dtrace-exporter $ARGS\n" in unit
    python = root / "opt/pipx/venvs/dtrace-exporter/bin/python"
    where = run(python, "-c", "import dtrace_exporter; print(dtrace_exporter.__file__)", env=clean)
    assert Path(where.strip()).is_relative_to(root)
    run(python, "-c", "import bcrypt, tornado, yaml", env=clean)
