"""The fuzzer's seeds and findings do no harm."""

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
    """Each input that the fuzzer starts with or has found is read without an error."""
    fuzz.TARGETS[seed.parent.name]()(seed.read_bytes())
