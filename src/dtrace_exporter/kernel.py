"""Finds out without dtrace(1) whether a Linux host can have DTrace."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from dtrace_exporter import capabilities

_CAPABILITIES = {capabilities.SYS_ADMIN: "CAP_SYS_ADMIN", capabilities.SYSLOG: "CAP_SYSLOG"}
_EVERYBODY = "4294967295"

# The first of these that exists. Other containers are known by their cgroup (version 1).
_CONTAINER_FILES = {"run/.containerenv": "podman", ".dockerenv": "docker"}
_CONTAINER_CGROUP = re.compile(r"\b(docker|kubepods|libpod|lxc)\b")


@dataclass(frozen=True, slots=True)
class Host:
    """The facts about a Linux host that DTrace depends on.

    Attributes:
        kernel: the release that uname(1) prints.
        btf: whether the kernel has its type information.
        lockdown: the mode that is in force: none, integrity or confidentiality. Empty if the kernel
            has no lockdown or does not show it.
        tracefs: where this file system is mounted; empty if it is not, None if the kernel does not
            have it.
        uid: this process's effective user.
        missing: the capabilities that dtrace(1) needs and this process lacks.
        user_namespace: whether this process is in a user namespace other than the host's.
        container: the kind of container that this process is in, empty for none.
    """

    kernel: str
    btf: bool
    lockdown: str
    tracefs: str | None
    uid: int
    missing: tuple[str, ...]
    user_namespace: bool
    container: str

    @property
    def obstacles(self) -> list[str]:
        """Why no dtrace(1) can work with this kernel, as keys of reasons.REASONS."""
        found = {
            "no_btf": not self.btf,
            "lockdown": self.lockdown == "confidentiality",
            "no_tracefs": self.tracefs is None,
        }
        return [word for word, is_so in found.items() if is_so]


def look(root: Path = Path("/")) -> Host:
    """Look at the host that this process runs on. Files that cannot be read count as missing.

    The sources are Documentation/bpf/btf.rst in Linux for BTF, kernel_lockdown(7), proc(5) for
    capabilities, and user_namespaces(7). Containers are recognized as by systemd-detect-virt(1),
    and by the files that Docker and Podman create in them.

    Args:
        root: the root of the host's file system.
    """
    mode = re.search(r"\[(\w+)\]", _read(root / "sys/kernel/security/lockdown"))
    effective = re.search(
        r"^CapEff:\s*([0-9a-f]+)$", _read(root / "proc/self/status"), re.MULTILINE
    )
    held = int(effective[1], 16) if effective else 0
    missing = (name for bit, name in _CAPABILITIES.items() if not held >> bit & 1)
    owners = _read(root / "proc/self/uid_map").split()
    return Host(
        kernel=_read(root / "proc/sys/kernel/osrelease").strip(),
        btf=(root / "sys/kernel/btf/vmlinux").exists(),
        lockdown=mode[1] if mode else "",
        tracefs=_tracefs(root),
        uid=os.geteuid(),
        missing=tuple(missing),
        user_namespace=owners not in ([], ["0", "0", _EVERYBODY]),
        container=_container(root),
    )


def _tracefs(root: Path) -> str | None:
    for line in _read(root / "proc/self/mounts").splitlines():
        fields = line.split()
        if len(fields) > 2 and fields[2] == "tracefs":
            return fields[1]
    return "" if re.search(r"\btracefs$", _read(root / "proc/filesystems"), re.MULTILINE) else None


def _container(root: Path) -> str:
    # What systemd has written down, else the environment of the first process.
    named = _read(root / "run/systemd/container") or _read(root / "run/host/container-manager")
    told = re.search(r"(?:^|\0)container=(\w+)", _read(root / "proc/1/environ"))
    if named.strip() or told:
        return named.strip() or (told[1] if told else "")
    for file, kind in _CONTAINER_FILES.items():
        if (root / file).exists():
            return kind
    cgroup = _CONTAINER_CGROUP.search(_read(root / "proc/1/cgroup"))
    return cgroup[1] if cgroup else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
