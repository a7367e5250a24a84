"""The packages for Linux are installed, run, upgraded and removed in a plain Debian."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import debian_root
from dtrace_exporter import __version__
from host_tools import require

SUITES = os.environ.get("DTRACE_EXPORTER_DEBIAN", "").split()
"""Other suites to test in, such as trixie: each needs its own root, and some minutes."""
CONFIGURATION = "/etc/dtrace-exporter/dtrace_exporter.yml"

pytestmark = [
    pytest.mark.xdist_group("packages"),
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0,
        reason="needs root, to have another root directory",
    ),
]


@pytest.fixture(params=["bookworm", *SUITES])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return the root of a Debian with the package's dependencies."""
    if request.param == "bookworm":
        return Path(request.getfixturevalue("debian_12"))
    debian_root.make(request.param, [*debian_root.dependencies(), "curl"], tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def package(packages: Path) -> Path:
    """Return the Debian package."""
    require("dpkg-deb", "dpkg")
    (found,) = packages.glob("*.deb")
    return found


def files(root: Path) -> dict[str, bytes]:
    """Return the files of a root by path, without those that dpkg itself writes."""

    def found() -> Iterator[tuple[str, bytes]]:
        for directory, directories, names in os.walk(root):
            for name in (*directories, *names):
                path = Path(directory, name)
                inside = str(path.relative_to(root))
                if not re.match(
                    r"(proc|dev|tmp|exporter|wheels|var/(lib/dpkg|log|cache))/", inside
                ):
                    regular = path.is_file() and not path.is_symlink()
                    yield inside, path.read_bytes() if regular else b""

    return dict(found())


def next_release(package: Path, directory: Path) -> Path:
    """Return a later version of a package, with another file of arguments."""
    tree, later = directory / "later", directory / "later.deb"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    control = tree / "DEBIAN/control"
    text = control.read_text(encoding="utf-8").replace(f"Version: {__version__}", "Version: 99")
    control.write_text(text, encoding="utf-8")
    with (tree / "etc/default/dtrace-exporter").open("a", encoding="utf-8") as file:
        file.write("# Of release 99.\n")
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, later], check=True)
    return later


def test_debian_package(root: Path, package: Path, tmp_path: Path) -> None:
    """The installed package serves, an upgrade keeps the settings, and a purge leaves nothing."""

    def inside(script: str) -> str:
        status, said = debian_root.run(root, script, tmp_path / "said")
        assert status == 0, said
        return said

    before = files(root)
    (root / "tmp/first.deb").write_bytes(package.read_bytes())
    (root / "tmp/later.deb").write_bytes(next_release(package, tmp_path).read_bytes())
    said = inside(
        """
        dpkg --install /tmp/first.deb
        command -v dtrace-exporter
        dtrace-exporter --version
        dtrace-exporter files
        . /etc/default/dtrace-exporter
        eval "$(sed -n "s/^ExecStart=//p" /lib/systemd/system/dtrace-exporter.service) &"
        until curl --silent --fail localhost:9748/-/ready; do sleep 1; done
        curl --silent localhost:9748/metrics
        """
    )
    assert f"/usr/bin/dtrace-exporter\ndtrace-exporter {__version__} (Python 3." in said
    assert "\nconfig/grafana/fleet.json\n" in said
    assert 'dtrace_tcp_listen_q_limit{address="*",listener="",netns="",port="9748"} 4096.0' in said
    new = files(root).keys() - before.keys()
    for path in (
        *(
            "lib/systemd/system/dtrace-exporter.service",
            "lib/systemd/system/dtrace-exporter.socket",
        ),
        *("etc/default/dtrace-exporter", "usr/share/man/man8/dtrace-exporter.8.gz"),
        *(CONFIGURATION[1:], "usr/share/doc/dtrace-exporter/examples"),
        "etc/systemd/system/multi-user.target.wants/dtrace-exporter.service",
    ):
        assert path in new or f"usr/{path}" in new, path
    assert "etc/systemd/system/sockets.target.wants/dtrace-exporter.socket" not in new

    configuration = root / CONFIGURATION[1:]
    configuration.write_text("listeners:\n  - port: 22\n", encoding="utf-8")
    arguments = (root / "etc/default/dtrace-exporter").read_text(encoding="utf-8")
    inside("dpkg --install /tmp/later.deb </dev/null")
    assert configuration.read_text(encoding="utf-8") == "listeners:\n  - port: 22\n"
    now = (root / "etc/default/dtrace-exporter").read_text(encoding="utf-8")
    assert now == f"{arguments}# Of release 99.\n"

    inside("dpkg --purge dtrace-exporter")
    assert files(root) == before


def test_rpm(debian_12: Path, packages: Path, tmp_path: Path) -> None:
    """The package installs where Python is, runs with its own libraries, and is removed again.

    There is no Fedora here, so the names of its requirements are not tested.
    """
    rpm = require("rpm", "rpm")
    (package,) = packages.glob("*.rpm")
    before = files(debian_12)
    manager = [rpm, f"--root={debian_12}", "--dbpath=/tmp/rpm"]

    def run(*words: str | Path) -> str:
        done = subprocess.run([*manager, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("--install", "--nodeps", package)
    status, said = debian_root.run(
        debian_12,
        """
        export PYTHONPATH=/nowhere
        dtrace-exporter --version
        python3 -I - <<END
import runpy, sys
sys.argv = ["dtrace-exporter", "--version"]
try:
    runpy.run_path("/usr/bin/dtrace-exporter")
except SystemExit:
    import tornado, prometheus_client, yaml
    print(tornado.__file__, prometheus_client.__file__, yaml.__file__)
END
        """,
        tmp_path / "said",
    )
    assert status == 0, said
    version, _, libraries = said.splitlines()
    assert version.startswith(f"dtrace-exporter {__version__} (Python 3.")
    assert [path.split("/")[:4] for path in libraries.split()] == [
        ["", "usr", "share", "dtrace-exporter"]
    ] * 3
    configured = set(run("--query", "--configfiles", "dtrace-exporter").split())
    assert configured == {CONFIGURATION, "/etc/default/dtrace-exporter"}
    assert not [
        line for line in run("--verify", "--nodeps", "dtrace-exporter").splitlines() if line
    ]

    changed = debian_12 / CONFIGURATION[1:]
    changed.write_text("listeners:\n  - port: 22\n", encoding="utf-8")
    run("--upgrade", "--nodeps", "--force", package)
    assert changed.read_text(encoding="utf-8") == "listeners:\n  - port: 22\n"

    run("--erase", "dtrace-exporter")
    # A file that somebody has changed is kept under another name.
    kept = changed.with_name(f"{changed.name}.rpmsave")
    assert kept.read_text(encoding="utf-8") == "listeners:\n  - port: 22\n"
    kept.unlink()
    kept.parent.rmdir()
    # A directory of a package that each Fedora has.
    (debian_12 / "usr/share/licenses").rmdir()
    assert files(debian_12) == before
