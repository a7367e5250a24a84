"""Collection of the kernel tests; the cases themselves run only inside the guests."""

from __future__ import annotations

import guest
import pytest

collect_ignore = ["cases", "lab"]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the cases' figures, and which guests were booted again or not at all."""
    for note in guest.notes:
        terminalreporter.write_line(note)
    for death in guest.deaths:
        terminalreporter.write_line(f"booted again after a death: {death}")
    if guest.late:
        terminalreporter.section("NO TIME WAS LEFT FOR", sep="!", red=True, bold=True)
        for cases in guest.late:
            terminalreporter.write_line(cases, red=True)
    if guest.left_out:
        terminalreporter.section("NOTHING WAS TESTED ON A KERNEL", sep="!", red=True, bold=True)
        for reason in sorted({*guest.left_out}):
            terminalreporter.write_line(reason, red=True)
