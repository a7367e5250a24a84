"""The facts of a host that need no dtrace(1), and the reasons for a refusal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dtrace_exporter import reasons, untraced
from dtrace_exporter.kernel import Host, look

STATUS = "Name:\tx\nCapEff:\t{:016x}\n"
EVERY = (1 << 41) - 1
PLAIN = {
    "proc/sys/kernel/osrelease": "6.12.1-cloud-amd64\n",
    "proc/self/status": STATUS.format(EVERY),
    "proc/self/uid_map": "         0          0 4294967295\n",
    "proc/self/mounts": "sysfs /sys sysfs rw 0 0\ntracefs /sys/kernel/tracing tracefs rw 0 0\n",
    "proc/filesystems": "nodev\tsysfs\nnodev\ttracefs\n\text4\n",
    "proc/1/cgroup": "0::/\n",
    "sys/kernel/btf/vmlinux": "",
    "sys/kernel/security/lockdown": "none [integrity] confidentiality\n",
}
GOOD = Host("6.12.1-cloud-amd64", True, "integrity", "/sys/kernel/tracing", 0, (), False, "")


def host(place: Path, **changed: str | None) -> Host:
    """Return the facts of a host with these files; None removes a file."""
    for name, text in {**PLAIN, **changed}.items():
        if text is not None:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text, encoding="utf-8")
    return look(place)


def made(**changed: Any) -> Host:
    """Return a host that differs from GOOD by this."""
    return Host(**{**{name: getattr(GOOD, name) for name in GOOD.__slots__}, **changed})


def test_all_is_well(tmp_path: Path) -> None:
    """A usual host lacks nothing that DTrace needs."""
    found = host(tmp_path)
    assert found == made(uid=os.geteuid())
    assert found.obstacles == []


def test_nothing_to_read(tmp_path: Path) -> None:
    """A host without any readable file gives empty facts, and no error."""
    found = look(tmp_path)
    assert found.obstacles == ["no_btf", "no_tracefs"]
    assert found.missing == ("CAP_SYS_ADMIN", "CAP_SYSLOG")
    assert (found.kernel, found.lockdown, found.container) == ("", "", "")


@pytest.mark.parametrize(
    ("files", "attribute", "value", "obstacles"),
    [
        ({"sys/kernel/btf/vmlinux": None}, "btf", False, ["no_btf"]),
        (
            {"sys/kernel/security/lockdown": "none integrity [confidentiality]\n"},
            "lockdown",
            "confidentiality",
            ["lockdown"],
        ),
        ({"sys/kernel/security/lockdown": None}, "lockdown", "", []),
        ({"proc/self/mounts": "sysfs /sys sysfs rw 0 0\n"}, "tracefs", "", []),
        (
            {"proc/self/mounts": "", "proc/filesystems": "nodev\tsysfs\n"},
            "tracefs",
            None,
            ["no_tracefs"],
        ),
        ({"proc/self/status": STATUS.format(1 << 21)}, "missing", ("CAP_SYSLOG",), []),
        ({"proc/self/uid_map": "0 100000 65536\n"}, "user_namespace", True, []),
    ],
)
def test_what_lacks(
    files: dict[str, str | None],
    attribute: str,
    value: object,
    obstacles: list[str],
    tmp_path: Path,
) -> None:
    """Each missing feature is found, and is an obstacle if no dtrace(1) can do without it."""
    found = host(tmp_path, **files)
    assert getattr(found, attribute) == value
    assert found.obstacles == obstacles


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"run/systemd/container": "lxc\n"}, "lxc"),
        ({"run/host/container-manager": "systemd-nspawn"}, "systemd-nspawn"),
        ({"proc/1/environ": "A=b\0container=lxc\0C=d\0"}, "lxc"),
        ({"proc/1/environ": "A=b\0nocontainer=lxc\0"}, ""),
        ({"run/.containerenv": ""}, "podman"),
        ({".dockerenv": ""}, "docker"),
        ({"proc/1/cgroup": "2:cpu:/kubepods/besteffort/pod1/abc\n"}, "kubepods"),
        ({"proc/1/cgroup": "0::/init.scope\n"}, ""),
    ],
)
def test_container(files: dict[str, str | None], kind: str, tmp_path: Path) -> None:
    """A container is recognized by what its manager leaves in it."""
    assert host(tmp_path, **files).container == kind


NOT_FOUND = "cannot start dtrace: not in any directory of PATH, nor in /usr/sbin or /sbin"
DENIED = "dtrace: could not enable tracing: Failed to enable dtrace:::BEGIN: Permission denied"


NO_DEVICE = "DTrace device not available on system"


@pytest.mark.parametrize(
    ("refusal", "where", "word"),
    [
        (NOT_FOUND, GOOD, "not_found"),
        (NOT_FOUND, made(btf=False), "not_found"),
        ("cannot start /opt/dtrace: No such file or directory", None, "not_found"),
        ("sh: dtrace: command not found", None, "not_found"),
        ("cannot start dtrace: there is only SystemTap's program of that name", None, "systemtap"),
        ("dtrace: run as root for tracing and listing probes", made(btf=False), "not_permitted"),
        (DENIED, GOOD, "not_permitted"),
        (DENIED, None, "not_permitted"),
        (DENIED, made(lockdown="confidentiality"), "lockdown"),
        ("dtrace: failed to initialize", made(btf=False), "no_btf"),
        ("dtrace: failed to initialize", made(tracefs=None), "no_tracefs"),
        ("dtrace: failed to initialize", GOOD, "refused"),
        ("dtrace: failed to initialize dtrace: " + NO_DEVICE, None, "no_device"),
        ("root@a: Permission denied (publickey).", None, "refused"),
    ],
)
def test_classify(refusal: str, where: Host | None, word: str) -> None:
    """A refusal is classified by dtrace(1)'s message, and otherwise by what the kernel lacks."""
    assert reasons.classify(refusal, where) == word
    assert word in reasons.REASONS


@pytest.mark.parametrize("word", reasons.REASONS)
def test_told(word: str) -> None:
    """Each reason gives one line with the cause, what is missing, the advice and the guide."""
    for source in untraced.SOURCES:
        line = reasons.told(word, source)
        assert "\n" not in line
        assert line.endswith(".")
        because, advice = reasons.REASONS[word]
        because = because.format(source=source)
        for part in (because, advice, reasons.MISSING, reasons.GUIDE, f"source is {source}"):
            assert part in line
    assert "half-open connections" in reasons.told(word, "netstat")
    assert "half-open connections" not in reasons.told(word, "sock_diag")
