"""Fixtures for all unit tests."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from fake_steps import FakeDTrace

# A shell's background job begins with SIGINT ignored, and so would every process of the tests.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says more about the machine's other work than about this package.
settings.register_profile("dtrace-exporter", deadline=None)
settings.load_profile("dtrace-exporter")


@pytest.fixture(autouse=True)
def _signal_mask() -> Iterator[None]:
    """Give the signal mask back as it was: a service that fails to start holds SIGHUP back."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


FAKE_DTRACE = Path(__file__).with_name("fake_dtrace.py")


@pytest.fixture
def fake_dtrace(tmp_path: Path) -> FakeDTrace:
    """Return a function that makes the command of a fake dtrace(1) from the steps given to it.

    See fake_dtrace.py for the steps; none are ready and then heartbeats. Several commands with
    different steps can run at a time.
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
