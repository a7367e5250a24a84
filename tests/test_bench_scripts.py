"""What scripts cost beside listen queues, as ratios that are measured in one run."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import scripts


def test_a_tick() -> None:
    """A tick with 1,000 series takes at most twice as long as as many rows of listeners do."""
    took = scripts.ticks(9)
    assert scripts.ratio(took, scripts.COUNTS) <= 2.0
    # A table of eight lines is that many rows.
    assert scripts.ratio(took, scripts.TABLES) <= 2.0 * 8
    # Nothing measurable: less than a thousandth of a second in each.
    assert statistics.median(took[scripts.IDLE]) < 1e-3


def test_a_scrape() -> None:
    """A sample of a script is in a scrape as fast as one of a listener."""
    took = scripts.scrapes(9)
    # The bench has 1; here others may be at work between two turns.
    assert scripts.ratio(took, scripts.COUNTS) <= 1.25
    assert scripts.ratio(took, scripts.TABLES) <= 1.25
