"""Builds packages into dist/, in each format that this machine has the tools for.

Everything is built from the source distribution, so a release contains all that is needed for it.
The recipes have placeholders: @VERSION@ is from the package, @FLOOR NAME@ and @URL@ from
pyproject.toml, @PINNED NAME@ from constraints.txt.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipapp
from collections.abc import Callable, Iterable
from email.utils import formatdate
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
(VERSION,) = re.findall(
    r'^__version__ = "(.*)"$',
    (ROOT / "src/dtrace_exporter/__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
)
FLOORS: dict[str, str] = {
    name: version
    for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["auth"])
    for name, version in [line.split(">=")]
}
LIBRARIES = [name for name in FLOORS if name != "bcrypt"]
"""The libraries that it always needs. bcrypt is compiled, and only needed for passwords."""
PINNED: dict[str, str] = {
    name.lower().replace("_", "-"): version
    for name, version in re.findall(
        r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
}


class Build(NamedTuple):
    """The directories of a build."""

    python: Path
    """The source distribution and the wheel."""
    tree: Path
    """The unpacked source distribution. Each format has its own, and may change it."""
    work: Path
    """An empty directory."""
    out: Path
    """The directory for the results."""


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """Run a command; if it fails, show its output and end the build."""
    done = subprocess.run(
        command,
        check=False,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{command[0]} failed with status {done.returncode}")


def fill(text: str) -> str:
    """Return a text with its placeholders filled in."""
    known = {
        "VERSION": VERSION,
        "URL": PROJECT["urls"]["Homepage"],
        "DATE": formatdate(),
        "RPM DATE": time.strftime("%a %b %d %Y"),
        **{f"FLOOR {name}": version for name, version in FLOORS.items()},
        **{f"PINNED {name}": version for name, version in PINNED.items()},
    }
    return re.sub(r"@([A-Z]{2}[A-Za-z0-9 -]*)@", lambda match: known[match[1]], text)


def vendor(directory: Path, *names: str | Path) -> None:
    """Put libraries into a directory, without compiled modules, so that all machines can use them.

    Args:
        directory: the directory.
        names: their names for pip; constraints.txt has their versions.
    """
    constraint = f"--constraint={ROOT / 'constraints.txt'}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    run(*pip, constraint, f"--target={directory}", *names)
    for path in (*directory.rglob("*.so"), *directory.rglob("*.pyi")):
        path.unlink()
    for name in ("bin", "share", "tornado/test"):
        shutil.rmtree(directory / name, ignore_errors=True)


def wheel(build: Build) -> None:
    """Copy the source distribution and the wheel, which all other formats are built from."""
    for path in build.python.iterdir():
        shutil.copy(path, build.out)


def one_file(build: Build) -> None:
    """Build the zipapp, a single file that runs on any host with Python."""
    (made,) = build.python.glob("*.whl")
    inside = build.work / "inside"
    vendor(inside, made, *LIBRARIES)
    shutil.copy(build.tree / "packages/one_file.py", inside / "__main__.py")
    target = build.out / f"dtrace-exporter-{VERSION}.pyz"
    zipapp.create_archive(inside, target, "/usr/bin/env python3", compressed=True)
    target.chmod(0o755)


def deb(build: Build) -> None:
    """Build the Debian package, and check it with lintian."""
    debian = build.tree / "debian"
    shutil.copytree(build.tree / "packages/debian", debian)
    for name in ("control", "changelog"):
        (debian / name).write_text(fill((debian / name).read_text("utf-8")), encoding="utf-8")
    vendor(build.tree / "vendor", "tornado")
    # Tornado's licence is in debian/copyright.
    shutil.rmtree(next((build.tree / "vendor").glob("*.dist-info")))
    # Nothing is compiled, so build-essential is not needed.
    run("dpkg-buildpackage", "--build=binary", "--no-sign", "--no-check-builddeps", cwd=build.tree)
    (changes,) = build.tree.parent.glob("*.changes")
    run("lintian", "--allow-root", "--fail-on=error,warning", changes)
    (made,) = build.tree.parent.glob("*.deb")
    shutil.copy(made, build.out)


def rpm(build: Build) -> None:
    """Build the rpm, and check it with rpmlint."""
    spec = build.work / "dtrace-exporter.spec"
    spec.write_text(
        fill((build.tree / "packages/dtrace-exporter.spec").read_text("utf-8")), encoding="utf-8"
    )
    sources = build.work / "SOURCES"
    sources.mkdir()
    shutil.copy(next(build.python.glob("*.tar.gz")), sources)
    vendor(build.work / "vendor", *LIBRARIES)
    _archive(build.work / "vendor", sources / "vendor.tar.gz")
    run("rpmbuild", "-bb", f"--define=_topdir {build.work}", spec)
    (made,) = build.work.glob("RPMS/*/*.rpm")
    run("rpmlint", "--config", build.tree / "packages/rpmlint.toml", made)
    shutil.copy(made, build.out)


def pkgsrc(build: Build) -> None:
    """Fill in the skeleton of a package for pkgsrc, and archive it."""
    skeleton = build.work / "dtrace-exporter"
    skeleton.mkdir()
    for path in (build.tree / "packages/pkgsrc").iterdir():
        (skeleton / path.name).write_text(fill(path.read_text("utf-8")), encoding="utf-8")
    _archive(skeleton, build.out / f"dtrace-exporter-{VERSION}-pkgsrc.tar.gz")


IPS_FILES = {
    "opt/dtrace-exporter/bin/dtrace-exporter": ("packages/launcher", "mode=0555"),
    "opt/dtrace-exporter/lib/svc/method/dtrace-exporter": ("smf/dtrace-exporter", "mode=0555"),
    "opt/dtrace-exporter/etc/dtrace_exporter.yml": (
        "config/dtrace_exporter.yml",
        "mode=0644 preserve=renamenew",
    ),
    "opt/dtrace-exporter/share/man/man8/dtrace-exporter.8": (
        "man/dtrace-exporter.8",
        "mode=0444",
    ),
    "opt/dtrace-exporter/share/doc/install-solaris.md": ("docs/install-solaris.md", "mode=0444"),
    "lib/svc/manifest/network/dtrace-exporter.xml": (
        "smf/dtrace-exporter.xml",
        "mode=0444 restart_fmri=svc:/system/manifest-import:default",
    ),
}
"""The files on Solaris and illumos: for each its source, and the attributes of its action."""


def ips(build: Build) -> None:
    """Archive the files for Solaris 11 and illumos, with a manifest for pkgsend(1)."""
    whole = build.work / f"dtrace-exporter-{VERSION}-ips"
    manifest = [fill((build.tree / "packages/dtrace-exporter.p5m").read_text("utf-8"))]
    libraries = whole / "opt/dtrace-exporter/share/dtrace-exporter"
    vendor(libraries, next(build.python.glob("*.whl")), *LIBRARIES)
    actions = {
        path.relative_to(whole).as_posix(): "mode=0444"
        for path in libraries.rglob("*")
        if path.is_file()
    }
    for name, (source, attributes) in IPS_FILES.items():
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build.tree / source, whole / name)
        actions[name] = attributes
    launcher = whole / "opt/dtrace-exporter/bin/dtrace-exporter"
    text = launcher.read_text("utf-8").replace("/usr/bin/python3", "@PREFIX@/bin/python")
    launcher.write_text(text.replace("@PREFIX@", "/opt/dtrace-exporter"), encoding="utf-8")
    shutil.copy(build.tree / "LICENSE", whole)
    for name, attributes in sorted(actions.items()):
        manifest.append(f"file {name} path={name} owner=root group=bin {attributes}\n")
    (whole / "dtrace-exporter.p5m").write_text("".join(manifest), encoding="utf-8")
    _archive(whole, build.out / f"{whole.name}.tar.gz")


def daemonset(build: Build) -> None:
    """Fill in the manifest for Kubernetes."""
    text = (build.tree / "packages/daemonset.yaml").read_text("utf-8")
    path = build.out / f"dtrace-exporter-{VERSION}-daemonset.yaml"
    path.write_text(fill(text), encoding="utf-8")


def _archive(directory: Path, file: Path) -> None:
    with tarfile.open(file, "w:gz") as archive:
        archive.add(directory, directory.name)


class Format(NamedTuple):
    """A kind of package."""

    make: Callable[[Build], None]
    tools: dict[str, str]
    """The commands that it needs, and the Debian packages that have them."""


FORMATS = {
    "wheel": Format(wheel, {}),
    "zipapp": Format(one_file, {}),
    "ips": Format(ips, {}),
    "pkgsrc": Format(pkgsrc, {}),
    "daemonset": Format(daemonset, {}),
    "rpm": Format(rpm, {"rpmbuild": "rpm", "rpmlint": "rpmlint"}),
    "deb": Format(deb, {"dpkg-buildpackage": "dpkg-dev", "dh": "debhelper",
                        "dh_python3": "dh-python", "lintian": "lintian"}),
}  # fmt: skip


def checkout(directory: Path) -> None:
    """Copy this tree without generated files; links stay links."""
    if not (ROOT / ".git").exists():
        made = shutil.ignore_patterns(
            "__pycache__",
            "*.egg-info",
            ".venv*",
            ".git",
            ".*_cache",
            ".hypothesis",
            "build",
            "dist",
        )
        shutil.copytree(ROOT, directory, symlinks=True, ignore=made)
        return
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).exists():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name, follow_symlinks=False)


def build(formats: Iterable[str], out: Path, work: Path) -> None:
    """Build some formats. Those without tools on this machine are left out, and this is printed.

    Args:
        formats: their names in FORMATS.
        out: the directory for the results.
        work: an empty directory.
    """
    python = work / "python"
    checkout(work / "checkout")
    run(sys.executable, "-m", "build", "--outdir", python, work / "checkout")
    (source,) = python.glob("*.tar.gz")
    out.mkdir(parents=True, exist_ok=True)
    for name in formats:
        missing = {tool: package for tool, package in FORMATS[name].tools.items()
                   if not shutil.which(tool)}  # fmt: skip
        if missing:
            print(f"{name}: left out, without {', '.join(missing)}"
                  f" (Debian: {' '.join(missing.values())})")  # fmt: skip
            continue
        directory = work / name
        with tarfile.open(source) as archive:
            archive.extractall(directory / "source", filter="data")
        (tree,) = (directory / "source").iterdir()
        before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
        (directory / "work").mkdir()
        FORMATS[name].make(Build(python, tree, directory / "work", out))
        for path in sorted(out.iterdir()):
            if before.get(path) != path.stat().st_mtime_ns:
                print(f"{name}: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="(dist)")
    arguments = parser.parse_args()
    if unknown := {*arguments.formats} - {*FORMATS}:
        parser.error(f"expected {', '.join(FORMATS)} (found {', '.join(unknown)})")
    with tempfile.TemporaryDirectory() as scratch:
        build(arguments.formats or FORMATS, arguments.out.absolute(), Path(scratch))
