"""The command files: its list is complete, and the copies have the path of the program."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

from dtrace_exporter import cli, extras

ROOT = Path(__file__).parent.parent


def test_all_that_a_host_wants() -> None:
    """The list has all files of systemd, SMF and man, and those of config for users."""
    written = {
        path.relative_to(ROOT).as_posix()
        for folder in ("config", "man", "smf", "systemd")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    ours = {name for name in written if name.startswith("config/prometheus/tests/")}
    assert ours
    names = extras.names()
    assert {*names} == (written - ours) | {"doc/install-solaris.md"}
    assert names == sorted(names)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a directory, the command only prints the names."""
    assert cli.main(["files"]) == 0
    assert capsys.readouterr().out.splitlines() == extras.names()


@pytest.mark.parametrize(
    ("started", "program"),
    [
        ("/usr/bin/dtrace-exporter", "/usr/bin/dtrace-exporter"),
        ("/opt/dtrace-exporter.pyz", "/opt/dtrace-exporter.pyz"),
        (extras.__file__.replace("extras", "__main__"), "{scripts}/dtrace-exporter"),
    ],
)
def test_copy(
    started: str,
    program: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All files are copied and listed; only the program's path in the unit differs."""
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    directory = tmp_path / "to" / "here"
    assert cli.main(["files", str(directory)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{directory}/{one}" for one in extras.names()]
    program = f"{sys.executable} -I {program.format(scripts=sysconfig.get_path('scripts'))}"
    unit = (directory / "systemd/dtrace-exporter.service").read_text(encoding="utf-8")
    assert f"\nExecStart={program} $ARGS\n" in unit
    assert unit.replace(program, extras.PROGRAM) == source("systemd/dtrace-exporter.service")
    for name in extras.names():
        if not name.startswith("systemd/"):
            assert (directory / name).read_text(encoding="utf-8") == source(name)
    assert (directory / "smf/dtrace-exporter").stat().st_mode & 0o111 == 0o111


def source(name: str) -> str:
    """Return the text of a file in the source tree."""
    return (ROOT / name.replace("doc/", "docs/")).read_text(encoding="utf-8")


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an environment with the program, SMF's manifest has the environment's path."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/dtrace-exporter").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    extras.copy(tmp_path / "share")
    manifest = (tmp_path / "share/smf/dtrace-exporter.xml").read_text(encoding="utf-8")
    assert extras.ENVIRONMENT not in manifest
    assert f"exec='{tmp_path}/lib/svc/method/dtrace-exporter %m'" in manifest


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory that is not empty, or a file, is refused and left unchanged."""
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    for place in (tmp_path, tmp_path / "mine"):
        assert cli.main(["files", str(place)]) == cli.FAILURE
        said = f"dtrace-exporter: {place}: expected a directory that is empty or not there yet\n"
        assert capsys.readouterr() == ("", said)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
