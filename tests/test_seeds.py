"""What the fuzzer begins with and what it has found: none of it does harm."""

from __future__ import annotations

from pathlib import Path

import pytest

import fuzz


@pytest.mark.parametrize(
    "seed",
    sorted(path for name in fuzz.TARGETS for path in (fuzz.SEEDS / name).iterdir()),
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_seed(seed: Path) -> None:
    """An input that has been of interest once is read as any other is."""
    fuzz.TARGETS[seed.parent.name]()(seed.read_bytes())
