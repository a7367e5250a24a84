"""Collection of the kernel tests: the cases themselves run inside the guests only."""

from __future__ import annotations

import guest
import pytest

collect_ignore = ["cases", "lab"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which guests had to be booted again."""
    for death in guest.deaths:
        terminalreporter.write_line(f"booted again after a death: {death}")
