"""Who else can change a file: what decides which command root runs has to be safe from all others.

The rules are those of sshd's StrictModes and of sudo, for the file and for each directory on the
way to it, those of symbolic links too.
"""

from __future__ import annotations

import grp
import logging
import os
import pwd
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from dtrace_exporter.log import fields
from dtrace_exporter.yaml_reader import ConfigError

_log = logging.getLogger(__name__)

FLAG = "--allow-insecure-files"
"""What has root take such a file as it is."""

_MOST_LINKS = 40


def faults(path: Path) -> list[str]:
    """Return by whom else than root and this process's user a file can be changed, and where.

    In a directory in which everybody may put files and nobody may take those of others away, as
    /tmp, only what is there counts. What cannot be looked at has no faults.
    """
    trusted = (0, os.geteuid())
    found = []
    shared = False
    with suppress(OSError):
        for step in _way(path):
            state = step.lstat()
            link = stat.S_ISLNK(state.st_mode)
            if state.st_uid not in trusted and (shared or not link):
                found.append(f"{step} belongs to {_user(state.st_uid)}")
            if link:
                continue
            shared = False
            if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                shared = stat.S_ISDIR(state.st_mode) and bool(state.st_mode & stat.S_ISVTX)
                if not shared:
                    found.append(f"{step} can be written by {_others(state)}")
    return list(dict.fromkeys(found))


def _way(path: Path) -> Iterator[Path]:
    """Yield what decides which file a path names, from the root on: directories, links, the file.

    Raises:
        OSError: one of them cannot be looked at.
    """
    at = Path("/")
    yield at
    names = [*path.absolute().parts[:0:-1]]
    links = 0
    while names:
        name = names.pop()
        step = at.parent if name == ".." else at / name
        yield step
        if not step.is_symlink():
            at = step
            continue
        links += 1
        if links > _MOST_LINKS:
            return
        target = step.readlink()
        names += reversed(target.parts)
        if target.is_absolute():
            at = Path(names.pop())
            yield at


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _others(state: os.stat_result) -> str:
    if state.st_mode & stat.S_IWOTH:
        return "everybody"
    try:
        return f"the group {grp.getgrgid(state.st_gid).gr_name}"
    except KeyError:
        return f"the group {state.st_gid}"


def refused(*, allowed: bool) -> bool:
    """Tell whether this process does nothing with a file that others can change.

    Args:
        allowed: whether that is what root asked for.
    """
    return os.geteuid() == 0 and not allowed


class Guard:
    """Warns once of each fault of the files in use, or refuses them.

    Args:
        refuse: whether one with a fault is refused.
    """

    def __init__(self, *, refuse: bool) -> None:
        self._refuse = refuse
        self._said: set[str] = set()

    def admit(self, files: Iterable[Path]) -> None:
        """Look at the files of a configuration that has been read and is not in force yet.

        Raises:
            ConfigError: one is refused.
        """
        for file in files:
            for fault in faults(file):
                if self._refuse:
                    expected = "expected a file that nobody but root can change"
                    raise ConfigError(f"{file}: {expected} (found that {fault}); see {FLAG}")
                if fault not in self._said:
                    self._said.add(fault)
                    _log.warning("others can change a file", extra=fields(file=file, why=fault))
