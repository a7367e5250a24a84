"""Checks who can change a file, because files decide which commands root runs.

The rules are those of sshd's StrictModes and of sudo. They hold for the file and for each directory
on the way to it, including those of symbolic links.
"""

from __future__ import annotations

import grp
import logging
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dtrace_exporter.log import fields
from dtrace_exporter.yaml_reader import ConfigError

_log = logging.getLogger(__name__)

FLAG = "--allow-insecure-files"
"""The option with which root uses files that others can change."""

_MOST_LINKS = 40


def faults(path: Path, descriptor: int | None = None) -> list[str]:
    """Return who can change a file, other than root and this process's user, and where.

    A sticky directory that everybody can write to, such as /tmp, is no fault; then the owner of the
    entry in it counts. But if the directory is the file, or the file is missing in it, everybody
    can add what will be found there. Other files that cannot be examined have no faults.

    Args:
        path: the file, or a directory in which files are searched.
        descriptor: its descriptor if it is open. This file is checked as well.
    """
    found = []
    shared = False
    directory = ""
    step = path
    with suppress(OSError):
        for step in _way(path):
            state = step.lstat()
            link = stat.S_ISLNK(state.st_mode)
            if shared or not link:
                found += _foreign(step, state)
            if link:
                continue
            shared = stat.S_ISDIR(state.st_mode) and bool(state.st_mode & stat.S_ISVTX)
            shared = shared and _writable(state)
            if shared:
                directory = f"{step} can be written by {_others(state)}"
            else:
                found += _open(step, state)
    if shared:
        found.append(directory)
    if descriptor is not None:
        state = os.fstat(descriptor)
        found += [*_foreign(step, state), *_open(step, state)]
    return list(dict.fromkeys(found))


def _foreign(step: Path, state: os.stat_result) -> list[str]:
    trusted = state.st_uid in (0, os.geteuid())
    return [] if trusted else [f"{step} belongs to {_user(state.st_uid)}"]


def _open(step: Path, state: os.stat_result) -> list[str]:
    return [f"{step} can be written by {_others(state)}"] if _writable(state) else []


def _writable(state: os.stat_result) -> bool:
    return bool(state.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _way(path: Path) -> Iterator[Path]:
    """Yield all directories and links on the way to a file, from the root on, and the file.

    Raises:
        OSError: one of them cannot be examined.
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
    """Return whether this process refuses files that others can change.

    Args:
        allowed: whether the option FLAG is set.
    """
    return os.geteuid() == 0 and not allowed


class Guard:
    """Refuses files with faults, or logs each fault once.

    Args:
        refuse: whether files with faults are refused.
    """

    def __init__(self, *, refuse: bool) -> None:
        self._refuse = refuse
        self._said: set[str] = set()

    def look(self, file: Path, descriptor: int | None = None) -> None:
        """Check a file that is about to be used.

        Args:
            file: the file.
            descriptor: its descriptor if it is open.

        Raises:
            ConfigError: the file is refused.
        """
        for fault in faults(file, descriptor):
            if self._refuse:
                expected = "expected a file that nobody but root can change"
                raise ConfigError(f"{file}: {expected} (found that {fault}); see {FLAG}")
            if fault not in self._said:
                self._said.add(fault)
                _log.warning("others can change a file", extra=fields(file=file, why=fault))
