"""Prints pip's constraints for the lowest versions of what the package needs to run."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def constraints() -> list[str]:
    """Return a constraint for each dependency; one without a lowest version is an error."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    found = []
    for line in (*project["dependencies"], *project["optional-dependencies"]["auth"]):
        name, _, version = line.partition(";")[0].partition(">=")
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", version):
            raise SystemExit(f"expected NAME>=VERSION (found {line})")
        found.append(f"{name}=={version}")
    return found


if __name__ == "__main__":
    print("\n".join(constraints()))  # noqa: T201
