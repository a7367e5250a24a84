"""Dates a release, checks whether it can be made, and tags it."""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess

from distribution import ROOT, VERSION

CHANGELOG = ROOT / "CHANGELOG.md"


def git(*words: str) -> str:
    """Run git; return its output without the end of the last line."""
    done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.rstrip("\n")


def dated(text: str, day: str) -> str:
    """Return the changelog with a section for this version, of what was unreleased.

    Args:
        text: the changelog.
        day: the date of the release, as 2026-01-31.

    Raises:
        SystemExit: nothing is unreleased, or this version has a section already.
    """
    if f"\n## {VERSION} " in text:
        raise SystemExit(f"CHANGELOG.md: {VERSION} is there already")
    head, found, rest = text.partition("\n## Unreleased\n")
    if not found or not rest.partition("\n## ")[0].strip():
        raise SystemExit("CHANGELOG.md: expected something below Unreleased")
    return f"{head}\n## Unreleased\n\n## {VERSION} - {day}\n{rest}"


def section(text: str) -> str:
    """Return the section of this version in the changelog.

    Raises:
        SystemExit: it has no dated section for this version, or Unreleased is not empty.
    """
    found = re.search(
        rf"^## Unreleased\n\s*^## {re.escape(VERSION)} - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)",
        text,
        re.DOTALL | re.MULTILINE,
    )
    if not found:
        raise SystemExit(
            f"CHANGELOG.md: expected '## {VERSION} - DATE' below an empty Unreleased:"
            " python packages/release.py date"
        )
    return found[1].strip()


def check() -> str:
    """Check whether a tag can be made; return the changelog's section of this version.

    Raises:
        SystemExit: something is missing; the text says what.
    """
    said = section(CHANGELOG.read_text(encoding="utf-8"))
    if changed := git("status", "--porcelain"):
        raise SystemExit(f"expected a tree without changes, found:\n{changed}")
    if git("tag", "--list", f"v{VERSION}"):
        raise SystemExit(f"the tag v{VERSION} is there already")
    return said


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["date", "check", "tag"])
    command = parser.parse_args().command
    if command == "date":
        day = datetime.datetime.now(datetime.UTC).date().isoformat()
        text = dated(CHANGELOG.read_text(encoding="utf-8"), day)
        CHANGELOG.write_text(text, encoding="utf-8")
        return
    said = check()
    if command == "tag":
        # With this --cleanup a line of the changelog that begins with # is not a comment.
        git(
            "tag",
            "--annotate",
            "--cleanup=whitespace",
            f"v{VERSION}",
            f"--message={VERSION}\n\n{said}",
        )
        print(f"tagged v{VERSION}: git push origin v{VERSION}")


if __name__ == "__main__":
    main()
