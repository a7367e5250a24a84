"""Collection of the kernel tests: the cases themselves run inside the guests only."""

from __future__ import annotations

import guest
import pytest

collect_ignore = ["cases", "lab"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Give the cases' figures, and say which guests had to be booted again."""
    for note in guest.notes:
        terminalreporter.write_line(note)
    for death in guest.deaths:
        terminalreporter.write_line(f"booted again after a death: {death}")
