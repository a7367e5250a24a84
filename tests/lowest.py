"""Prints pip's constraints: the lowest versions of the dependencies, and the tests' own tools."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def constraints() -> list[str]:
    """Return a constraint for each dependency; one without a lowest version is an error."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = []
    for line in (*project["dependencies"], *project["optional-dependencies"]["auth"]):
        name, _, version = line.partition(";")[0].partition(">=")
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", version):
            raise SystemExit(f"expected NAME>=VERSION (found {line})")
        found.append(f"{name}=={version}")
    ours = {line.partition("==")[0].replace("-", "_") for line in found}
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return found + [line for line in pinned if line.partition("==")[0].lower() not in ours]


if __name__ == "__main__":
    print("\n".join(constraints()))  # noqa: T201
