"""The packages can be built, are complete, and install as the guide says on a bare system."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen
from xml.etree import ElementTree

import pytest
from lab.exporter import free_port
from lab.waiting import until

from dtrace_exporter import __version__, config, extras

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
SOLARIS = (ROOT / "docs/install-solaris.md").read_text(encoding="utf-8")
DATA = f"dtrace_exporter-{__version__}.data/data/share/"
INDEX = {name: os.environ[name] for name in os.environ if name.startswith("PIP_")}
"""The settings of the machine that say where pip gets packages from."""

pytestmark = [
    pytest.mark.xdist_group("packages"),
    pytest.mark.skipif(
        sys.platform != "linux", reason="the guide to installing with pipx is for Linux"
    ),
]


def run(*command: str | Path, **options: object) -> str:
    """Run a command and return its output; if it fails, the test fails with that output."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return str(done.stdout)


def sources(pattern: str) -> set[str]:
    """Return the files of the tree that match, by their paths in it."""
    return {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)}


def test_source_distribution(packages: Path) -> None:
    """The source distribution has all files that it takes to run, to test and to read the docs."""
    (file,) = packages.glob("dtrace_exporter-*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for pattern in ("src/**/*.py", "src/**/*.d", "src/**/*.html", "docs/*.md", "man/*.8",
                    "freebsd/*", "freebsd/files/*",
                    "smf/*", "systemd/*", "config/*.yml", "tests/**/*.py", "tests/kernel/model/*.c",
                    "bench/**/*.py", "packages/**/*.*", "packages/debian/*", "Makefile",
                    "constraints.txt", "SECURITY.md", ".github/**/*.*", ".ci/*", "CHANGELOG.md",
                    "CONTRIBUTING.md", "LICENSE",
                    ".editorconfig", ".pre-commit-config.yaml"):  # fmt: skip
        wanted = sources(pattern)
        assert wanted
        assert not {name for name in wanted if "__pycache__" not in name} - names, pattern


def test_wheel(packages: Path) -> None:
    """The wheel has the package with its D programs and templates, and the files for a host."""
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
    share = "dtrace_exporter/share/"
    assert sorted(name for name in names if name.startswith(share)) == [
        share + name for name in extras.names()
    ]
    assert not {name for name in names if name.startswith("tests")}


def test_install(packages: Path, tmp_path: Path) -> None:
    """The commands of the guide install the exporter on a bare system, and it runs from there."""
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
    script = re.sub(r"(?<![\w$.])/(opt|usr|etc)/", rf"{root}/\1/", block)
    script = script.replace("'.[auth]'", f"'{wheel}[auth]'")
    environment = {"PATH": f"{bin_}:/usr/bin:/bin", "HOME": str(tmp_path), **INDEX}
    run("sh", "-euc", script, env=environment, cwd=tmp_path)
    told_lines = told.read_text(encoding="utf-8").splitlines()
    assert told_lines == ["daemon-reload", "enable --now dtrace-exporter"]

    exporter = root / "usr/local/bin/dtrace-exporter"
    clean = {"PATH": "/usr/bin:/bin"}
    assert run(exporter, "--version", env=clean).startswith(f"dtrace-exporter {__version__} ")
    for name in ("linux", "illumos", "solaris10", "freebsd"):
        text = run(exporter, "program", name, env=clean)
        assert "inline int" in text
    assert (root / "usr/local/share/man/man8/dtrace-exporter.8").exists()
    config = root / "etc/dtrace-exporter/dtrace_exporter.yml"
    assert run(exporter, "program", "linux", f"--config.file={config}", env=clean)
    unit = (root / "etc/systemd/system/dtrace-exporter.service").read_text(encoding="utf-8")
    python = root / "opt/pipx/venvs/dtrace-exporter/bin/python"
    assert f"ExecStart={python} -I {exporter} $ARGS\n" in unit
    where = run(python, "-c", "import dtrace_exporter; print(dtrace_exporter.__file__)", env=clean)
    assert Path(where.strip()).is_relative_to(root)
    run(python, "-c", "import bcrypt, tornado, yaml", env=clean)


def pythons() -> list[str]:
    """Return the Pythons that this host has, those of pyenv too."""
    places = os.environ["PATH"].split(":")
    places += map(str, Path("~/.pyenv/versions").expanduser().glob("*/bin"))
    found = {
        path.resolve()
        for place in places
        for path in Path(place).glob("python*")
        if re.fullmatch(r"python[23](\.\d+)?", path.name)
    }
    return sorted(str(path) for path in found if path.parent.name == "bin")


def test_one_file(packages: Path, tmp_path: Path) -> None:
    """The .pyz runs on each Python from 3.11 on; older ones get an error. Units name the Python."""
    (built,) = packages.glob("*.pyz")
    file = tmp_path / built.name
    shutil.copy(built, file)
    assert os.access(built, os.X_OK)
    ran = 0
    for python in pythons():
        clean = {"PATH": "/usr/bin:/bin"}
        found = run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
        if tuple(map(int, found.split("."))) < (3, 11):
            done = subprocess.run([python, file], env=clean, capture_output=True, text=True)
            assert done.returncode == 1
            assert done.stderr.startswith("dtrace-exporter: Python 3.11 or newer is needed, this")
            continue
        ran += 1
        said = run(python, "-I", file, "--version", env=clean)
        assert said.startswith(f"dtrace-exporter {__version__} (Python {found}.")
    assert ran
    assert "inline int" in run(sys.executable, file, "program", "linux")
    assert run(sys.executable, file, "files").splitlines() == extras.names()
    run(sys.executable, file, "files", tmp_path / "share")
    unit = (tmp_path / "share/systemd/dtrace-exporter.service").read_text(encoding="utf-8")
    assert f"\nExecStart={sys.executable} -I {file} $ARGS\n" in unit
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    assert len([name for name in names if re.search(r"dist-info/.*LICEN[CS]E", name)]) >= 4
    port = free_port()
    serving = [sys.executable, "-I", str(file), f"--web.listen-address=127.0.0.1:{port}"]
    with subprocess.Popen(serving) as process:
        try:
            until(lambda: f'port="{port}"' in scraped(port), seconds=60)
        finally:
            process.terminate()
    assert process.returncode == 0


def scraped(port: int) -> str:
    """Return the metrics of an exporter, or nothing while it does not serve."""
    with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return str(answer.read().decode())
    return ""


def test_install_on_solaris(packages: Path, tmp_path: Path) -> None:
    """The guide's commands for a wheel put all files where the manifest and man(1) look."""
    (block,) = re.findall(r"^```sh\n(python3.11 -m venv.*?)^```", SOLARIS, re.DOTALL | re.MULTILINE)
    prefix = tmp_path / "dtrace-exporter"
    (wheel,) = packages.glob("*.whl")
    shutil.copy(wheel, tmp_path)
    script = block.replace(extras.ENVIRONMENT, str(prefix)).replace("python3.11", sys.executable)
    clean = {"PATH": "/usr/bin:/bin"}
    run("sh", "-euc", script, env={**clean, **INDEX}, cwd=tmp_path)

    manifest = ElementTree.parse(prefix / "lib/svc/manifest/dtrace-exporter.xml").getroot()

    def attributes(path: str) -> dict[str, str]:
        found = manifest.find(f".//{path}")
        assert found is not None
        return found.attrib

    method = Path(attributes("exec_method[@name='start']")["exec"].removesuffix(" %m"))
    configuration = Path(attributes("propval[@name='config_file']")["value"])
    document = Path(attributes("doc_link")["uri"].removeprefix("file://"))
    page = attributes("manpage")
    manual = Path(page["manpath"], "man8", f"{page['title']}.{page['section']}")
    for file in (method, configuration, document, manual):
        assert file.is_file()
        assert file.is_relative_to(prefix)
    assert method.stat().st_mode & 0o777 == 0o555
    config.load(configuration)
    # What the method starts, the way the method finds it.
    started = Path(str(method).partition("/lib/svc/method/")[0], "bin/dtrace-exporter")
    said = run(started.with_name("python"), "-I", started, "--version", env=clean)
    assert said.startswith(f"dtrace-exporter {__version__} ")
