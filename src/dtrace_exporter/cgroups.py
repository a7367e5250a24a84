"""Linux's cgroups: finds their paths, and the unit and container that a path names."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

_MOUNTS = Path("/proc/self/mountinfo")
# Root and mount point of version 2, see proc_pid_mountinfo(5). Sockets are in no other hierarchy.
_MOUNT = re.compile(r"\S+ \S+ \S+ (\S+) (\S+) .* - cgroup2 ")
_OCTAL = re.compile(r"\\([0-7]{3})")
_MOST_DIRECTORIES = 100_000
_CROWD = 1_000

# systemd.unit(5): the types of units that have a cgroup. Slices contain the others.
_UNIT = re.compile(r"[\w:.@\\-]+\.(?:service|scope|socket|mount|swap)", re.ASCII)
_SLICE = re.compile(r"[\w:.@\\-]+\.slice", re.ASCII)
# How Docker, containerd, CRI-O and Podman name containers, and two forms of Kubernetes' pods.
_ID = re.compile(r"(?:.*[-:])?([0-9a-f]{64})(?:\.scope)?")
_POD = re.compile(
    r"(?:kubepods.*-)?pod([0-9a-f]{32}|[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})(?:\.slice)?"
)
# systemd-nspawn(1), and lxc.container.conf(5).
_MACHINE = re.compile(r"machine-(.+)\.scope|systemd-nspawn@(.+)\.service|lxc\.payload\.(.+)")
_ESCAPED = re.compile(r"\\x([0-9a-f]{2})")


class Names(NamedTuple):
    """The unit and the container that a cgroup is named after, empty for none."""

    unit: str = ""
    container: str = ""


def paths(wanted: Collection[int]) -> dict[int, str]:
    """Return the paths of cgroups by number, as /proc/PID/cgroup has them; it blocks.

    The number is the inode of the cgroup's directory (on 64-bit kernels: fs/kernfs/dir.c). Numbers
    are not reused. Users may have cgroups of their own, and make very many. So the search ends
    after 100,000, and cgroups that have a crowd beside them are looked at last.

    Args:
        wanted: the numbers.

    Returns:
        The paths. The path of a cgroup that has ended, or that this process cannot see, is empty.
        A cgroup to which the search did not come is missing.
    """
    left = {*wanted}
    found: dict[int, str] = {}
    mount, root, number = _mount()
    # The path of the cgroup above, which many share because it may be long; name and number.
    directories, crowds = deque([("", "", number)]), deque[tuple[str, str, int]]()
    looked = 0
    while left and (directories or crowds):
        if looked == _MOST_DIRECTORIES:
            return found
        above, name, number = (directories or crowds).popleft()
        looked += 1
        path = f"{above}/{name}" if name else ""
        if number in left:
            left.remove(number)
            found[number] = f"{root}{path}" or "/"
        # Nobody listens in a cgroup that ends meanwhile.
        with suppress(OSError), os.scandir(f"{mount}{path}") as entries:
            inside = (each for each in entries if each.is_dir(follow_symlinks=False))
            # The search does not come to more than these.
            below = [(path, one.name, one.inode()) for one in islice(inside, _MOST_DIRECTORIES)]
            queue = crowds if len(below) > _CROWD else directories
            queue.extend(below[: _MOST_DIRECTORIES - len(queue)])
    return found | dict.fromkeys(left, "")


def _mount() -> tuple[str, str, int]:
    """Return where the hierarchy is mounted, its root there, and the inode; empty if nowhere."""
    with _MOUNTS.open(encoding="utf-8", errors="surrogateescape") as mounts:
        for mount in filter(None, map(_MOUNT.match, mounts)):
            root, point = (
                _OCTAL.sub(lambda octal: chr(int(octal[1], 8)), each) for each in mount.groups()
            )
            with suppress(OSError):
                return point, root.rstrip("/"), os.stat(point).st_ino  # noqa: PTH116
    return "", "", 0


def names(path: str) -> Names:
    """Return the unit and the container that a cgroup is named after.

    The unit is what ps(1) shows as ``unit``: the first one in the path that is not a slice
    (systemd's cg_path_get_unit()). It is a unit of the system's manager, not of a user's. The
    container is the innermost one; in a pod, but in none of its containers, it is the pod.

    Args:
        path: the path of the cgroup, as paths() returns it.
    """
    parts = path.strip("/").split("/")
    inner = [part for part in parts if not _SLICE.fullmatch(part)]
    # systemd adds an underscore to names that would clash with files of the kernel.
    unit = inner[0].removeprefix("_") if inner else ""
    unit = unit if _UNIT.fullmatch(unit) else ""
    return Names(unit, _container(parts))


def _container(parts: list[str]) -> str:
    for part in reversed(parts):
        if found := _ID.fullmatch(part):
            return found[1]
    for part in reversed(parts):
        if found := _POD.fullmatch(part):
            return found[1].replace("_", "-")
        if found := _MACHINE.fullmatch(part):
            name = next(filter(None, found.groups()))
            return _ESCAPED.sub(lambda escaped: chr(int(escaped[1], 16)), name)
    return ""
