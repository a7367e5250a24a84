"""Fixtures for all unit tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import distribution
import pytest
from hypothesis import settings

import debian_root
from fake_steps import FakeDTrace
from host_tools import find
from markdown_page import blocks

README = Path(__file__).parents[1] / "README.md"

# A shell starts background jobs with SIGINT ignored, and all processes would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# An example's time depends more on the machine's other work than on this package.
settings.register_profile("dtrace-exporter", deadline=None)
settings.load_profile("dtrace-exporter")


@pytest.fixture(autouse=True)
def _signal_mask() -> Iterator[None]:
    """Restore the signal mask, because a service that fails to start keeps SIGHUP blocked."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.fixture
def no_child_left() -> Iterator[None]:
    """Check that a test leaves no child process, running or zombie."""
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


FAKE_DTRACE = Path(__file__).with_name("fake_dtrace.py")


@pytest.fixture
def fake_dtrace(tmp_path: Path) -> FakeDTrace:
    """Return a function that makes the command of a fake dtrace(1) from the steps given to it.

    See fake_dtrace.py for the steps; without any it is ready and then ticks. Several commands with
    different steps can run at the same time.
    """
    numbers = count()

    def command(*steps: dict[str, Any]) -> list[str]:
        start = [sys.executable, "-I", "-S", str(FAKE_DTRACE)]
        if not steps:
            return ["/usr/bin/env", "-u", "FAKE_DTRACE", *start]
        file = tmp_path / f"fake_dtrace-{next(numbers)}.json"
        file.write_text(json.dumps(steps), encoding="utf-8")
        return ["/usr/bin/env", f"FAKE_DTRACE={file}", *start]

    return command


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with all packages whose tools this host can get."""
    for each in distribution.FORMATS.values():
        for command, package in each.tools.items():
            find(command, package)
    out = tmp_path_factory.mktemp("packages")
    done = subprocess.run(
        [sys.executable, distribution.__file__, f"--out={out}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="session")
def debian_12(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Debian 12 with the packages of README's first screen and our dependencies."""
    first = blocks(README.read_text(encoding="utf-8"), "sh")[0].splitlines()[0]
    installed = first.removeprefix("sudo apt install ").split()
    root = tmp_path_factory.mktemp("debian") / "root"
    debian_root.make("bookworm", [*installed, *debian_root.dependencies()], root)
    return root
