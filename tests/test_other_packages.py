"""Packages that no system here can install, for IPS, pkgsrc and Kubernetes, are consistent.

None of them was ever installed on its own system; docs/install.md says so.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import distribution
import pytest
import yaml

from dtrace_exporter import __version__, config
from host_tools import require

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("packages")
ACTIONS = {"set", "depend", "dir", "file", "group", "license", "link", "user"}
"""The actions of pkg(5) that are used."""


def unpacked(packages: Path, kind: str, target: Path) -> Path:
    """Unpack an archive, and return its directory."""
    (archive,) = packages.glob(f"*-{kind}.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(target, filter="data")
    (directory,) = target.iterdir()
    return directory


def test_ips(packages: Path, tmp_path: Path) -> None:
    """Each line is an action of pkg(5), each file is there once, and SMF finds what it needs."""
    tree = unpacked(packages, "ips", tmp_path)
    actions: list[tuple[str, list[str], dict[str, str]]] = []
    for line in (tree / "dtrace-exporter.p5m").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, *words = shlex.split(line)
            assert name in ACTIONS
            payload = [word for word in words if "=" not in word]
            actions.append(
                (name, payload, dict(word.split("=", 1) for word in words[len(payload) :]))
            )
    assert (
        "set",
        [],
        {"name": "pkg.fmri", "value": f"pkg:/network/dtrace-exporter@{__version__}"},
    ) in actions
    files = {
        at["path"]: at
        for name, payload, at in actions
        if name == "file" and payload == [at["path"]]
    }
    assert len(files) == len([name for name, _, _ in actions if name == "file"])
    there = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    assert {*files} == there - {"dtrace-exporter.p5m", "LICENSE"}
    for at in files.values():
        assert re.fullmatch("0[0-7]{3}", at["mode"])
        assert not at["path"].startswith(("/", "usr/"))
    paths = {f"/{path}" for path in files}

    manifest = ElementTree.parse(tree / "lib/svc/manifest/network/dtrace-exporter.xml").getroot()
    assert files["lib/svc/manifest/network/dtrace-exporter.xml"]["restart_fmri"] == (
        "svc:/system/manifest-import:default"
    )
    for element in manifest.iter("exec_method"):
        if element.attrib["exec"] != ":kill":
            method = element.attrib["exec"].removesuffix(" %m")
            assert files[method[1:]]["mode"] == "0555"
            # The command that the method starts, at the path where the method looks.
            opt = method.partition("/lib/svc/method/")[0]
            assert f"{opt}/bin/dtrace-exporter" in paths
    (link,) = (at for name, _, at in actions if name == "link")
    assert f"/{link['path']}" == f"{opt}/bin/python"
    python = link["target"].removeprefix("/usr/bin/python").replace(".", "")
    assert ("depend", [], {"type": "require", "fmri": f"pkg:/runtime/python-{python}"}) in actions
    (value,) = (
        at.attrib["value"] for at in manifest.iter("propval") if at.attrib["name"] == "config_file"
    )
    assert files[value[1:]]["preserve"] == "renamenew"
    (credential,) = manifest.iter("method_credential")
    (user,) = (at for name, _, at in actions if name == "user")
    assert (user["username"], user["group"]) == (
        credential.attrib["user"],
        credential.attrib["group"],
    )

    launcher = (tree / f"{opt[1:]}/bin/dtrace-exporter").read_text(encoding="utf-8")
    assert launcher.startswith(f"#!{opt}/bin/python -IB\n")
    program = tmp_path / "launcher"
    program.write_text(launcher.replace(opt, str(tree / opt[1:])), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-I", program, "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith(f"dtrace-exporter {__version__} "), done.stderr


def test_pkgsrc(packages: Path, tmp_path: Path) -> None:
    """The make of pkgsrc can read the Makefile without pkgsrc, and its names are the release's."""
    make = require("bmake", "bmake")
    skeleton = unpacked(packages, "pkgsrc", tmp_path / "net")
    for name in ("lang/python/application.mk", "lang/python/wheel.mk", "mk/bsd.pkg.mk"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("PYPKGPREFIX?=py311\nPREFIX?=/opt/local\n", encoding="utf-8")

    def value(name: str) -> str:
        command = [make, "-V", f"${{{name}}}"]
        done = subprocess.run(command, cwd=skeleton, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert value("PKGNAME") == f"dtrace-exporter-{__version__}"
    assert list(packages.glob(f"{value('DISTNAME')}.tar.gz"))
    found = {re.split("[>:]", word)[0]: word for word in value("DEPENDS").split()}
    for name in distribution.LIBRARIES:
        module = name.removeprefix("py").replace("-", "_")
        assert f">={distribution.FLOORS[name]}:" in found[f"py311-{module}"]
    for name in value("SUBST_FILES.smf").split():
        assert (ROOT / name).exists()


def daemonset(packages: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Return the file, the configuration's object, and the DaemonSet."""
    (file,) = packages.glob("*-daemonset.yaml")
    configuration, made = yaml.safe_load_all(file.read_text(encoding="utf-8"))
    return file, configuration, made


def test_daemonset(packages: Path, tmp_path: Path) -> None:
    """The pod has exactly what sock_diag needs, and a valid configuration."""
    _, configuration, made = daemonset(packages)
    (name,) = configuration["data"]
    (tmp_path / name).write_text(configuration["data"][name], encoding="utf-8")
    assert config.load(tmp_path / name).source == "sock_diag"
    pod = made["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (pod["hostNetwork"], pod["hostPID"]) == (True, True)
    assert container["image"].endswith(f":{__version__}")
    assert container["securityContext"]["capabilities"] == {
        "drop": ["ALL"],
        "add": ["SYS_ADMIN", "SYS_PTRACE"],
    }
    (mount,) = container["volumeMounts"]
    assert mount["mountPath"].endswith(f"/{name}")
    recipe = (ROOT / "packages/Containerfile").read_text(encoding="utf-8")
    assert f'CMD ["--config.file={mount["mountPath"]}"]' in recipe


@pytest.mark.skipif(
    not importlib.util.find_spec("kubernetes_validate"),
    reason="kubernetes-validate, 100 MB of schemas, is not installed for this alone",
)
def test_kubernetes_takes_it(packages: Path) -> None:
    """The file strictly follows Kubernetes' schemas."""
    file, _, _ = daemonset(packages)
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
