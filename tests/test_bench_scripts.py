"""The cost of scripts compared with that of listen queues, as ratios from one run."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import scripts


def test_a_tick() -> None:
    """A tick with 1,000 series takes at most twice as long as the same number of listener rows."""
    took = scripts.ticks(9)
    assert scripts.ratio(took, scripts.COUNTS) <= 2.0
    # A table of eight lines counts as eight rows.
    assert scripts.ratio(took, scripts.TABLES) <= 2.0 * 8
    # Idle ticks take nothing measurable: less than a thousandth of a second each.
    assert statistics.median(took[scripts.IDLE]) < 1e-3


def test_a_scrape() -> None:
    """A scrape renders a script's sample as fast as a listener's."""
    took = scripts.scrapes(9)
    # The bench's limit is 1; here other processes may run between two turns.
    assert scripts.ratio(took, scripts.COUNTS) <= 1.25
    assert scripts.ratio(took, scripts.TABLES) <= 1.25
