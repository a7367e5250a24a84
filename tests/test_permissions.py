"""Files that others can change: found, warned about once, and refused by root."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from lab.waiting import until

import dtrace_exporter.config
from dtrace_exporter import cli
from dtrace_exporter.permissions import FLAG, Guard, faults, refused
from dtrace_exporter.web import configuration
from dtrace_exporter.yaml_reader import ConfigError
from exporter_process import SECONDS, run, serving, write
from fake_steps import FakeDTrace

STRANGER = 65534
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a private directory that has a directory with a file."""
    (tmp_path / "d").mkdir(mode=0o755)
    (tmp_path / "d/f").touch(mode=0o644)
    return tmp_path


def test_safe(place: Path) -> None:
    """A file that nobody else can write has no fault, whichever path leads to it."""
    (place / "link").symlink_to("d/../d/f")
    (place / "absolute").symlink_to(place / "d")
    for name in ("d/f", "d/../d/f", "link", "absolute/f"):
        assert faults(place / name) == [], name


@pytest.mark.parametrize(
    ("what", "mode", "who"),
    [
        ("d/f", 0o664, "the group "),
        ("d/f", 0o646, "everybody"),
        ("d/f", 0o1666, "everybody"),
        ("d", 0o775, "the group "),
        ("d", 0o777, "everybody"),
        (".", 0o777, "everybody"),
    ],
)
def test_writable(what: str, mode: int, who: str, place: Path) -> None:
    """A file or a directory above it that others can write is a fault, through links too."""
    (place / what).chmod(mode)
    (place / "link").symlink_to(place / "d")
    (fault,) = faults(place / "d/f")
    assert fault.startswith(f"{place / what} can be written by {who}")
    assert faults(place / "link/f") == [fault]


def test_directory_of_a_link(place: Path) -> None:
    """A directory that everybody can write is a fault if a link in it is on the path."""
    (place / "open").mkdir()
    (place / "open").chmod(0o777)
    (place / "open/link").symlink_to(place / "d")
    assert faults(place / "open/link/f") == [f"{place}/open can be written by everybody"]
    assert faults(place / "open/../d/f") == [f"{place}/open can be written by everybody"]


@root
def test_shared_directory(place: Path) -> None:
    """In a directory like /tmp, only a file, a directory or a link of one's own is safe."""
    (place / "d").chmod(0o1777)
    (place / "d/link").symlink_to("f")
    assert faults(place / "d/link") == []
    os.chown(place / "d/link", STRANGER, STRANGER, follow_symlinks=False)
    (fault,) = faults(place / "d/link")
    assert fault.startswith(f"{place}/d/link belongs to ")
    # Anybody can create what does not exist yet, and what is below it.
    for name in ("none", "none/f", ""):
        assert faults(place / "d" / name) == [f"{place}/d can be written by everybody"], name
    # Where nobody else can create a link, its owner does not matter.
    (place / "d").chmod(0o755)
    assert faults(place / "d/link") == []


@root
@pytest.mark.parametrize("what", ["d", "d/f"])
def test_owner(what: str, place: Path) -> None:
    """A file or directory of another user is a fault, whatever its mode is."""
    os.chown(place / what, STRANGER, STRANGER)
    (place / what).chmod(0o555)
    (fault,) = faults(place / "d/f")
    assert fault.startswith(f"{place / what} belongs to ")
    os.chown(place / what, 4_000_000_000, 0)
    assert faults(place / "d/f") == [f"{place / what} belongs to user 4000000000"]


def test_what_is_not_there(place: Path) -> None:
    """A path that does not exist or leads nowhere has no fault, and a loop of links ends."""
    (place / "loop").symlink_to("loop")
    (place / "nowhere").symlink_to("nothing/at/all")
    for name in ("nothing", "loop", "loop/f", "nowhere", "d/f/g"):
        assert faults(place / name) == [], name
    reading, writing = os.pipe()
    assert faults(Path(f"/dev/fd/{reading}")) == []
    os.close(reading)
    os.close(writing)


MODES = st.sampled_from([0o700, 0o755, 0o775, 0o757, 0o777, 0o1777, 0o1775])


@given(st.lists(MODES, min_size=1, max_size=4), st.sampled_from([0o600, 0o644, 0o664, 0o602]))
def test_any_modes(tmp_path_factory: pytest.TempPathFactory, modes: list[int], own: int) -> None:
    """Each step that others can write is one fault, except directories like /tmp."""
    at = top = tmp_path_factory.mktemp("modes")
    wrong = []
    for mode in modes:
        at /= "d"
        at.mkdir()
        at.chmod(mode)
        if mode & 0o022 and not mode & stat.S_ISVTX:
            wrong.append(at)
    file = at / "f"
    file.touch()
    file.chmod(own)
    if own & 0o022:
        wrong.append(file)
    assert [fault.partition(" can be ")[0] for fault in faults(file)] == [*map(str, wrong)]
    shutil.rmtree(top)


def test_guard(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A lenient guard warns of each fault once; a strict guard raises an error that says why."""
    good, bad = place / "d/f", place / "d/bad"
    bad.touch()
    bad.chmod(0o666)
    lenient, strict = Guard(refuse=False), Guard(refuse=True)
    for file in (good, bad, bad):
        lenient.look(file)
    (said,) = caplog.records
    assert said.levelname == "WARNING"
    assert vars(said)["fields"] == {"file": bad, "why": f"{bad} can be written by everybody"}
    bad.parent.chmod(0o777)
    lenient.look(bad)
    assert len(caplog.records) == 2
    bad.parent.chmod(0o755)
    strict.look(good)
    with pytest.raises(ConfigError, match=rf"^{bad}: .*can be written by everybody\); see {FLAG}$"):
        strict.look(bad)


def test_open_file(place: Path) -> None:
    """The open file is checked as well as the file that its name leads to by now."""
    (place / "d/f").chmod(0o666)
    (place / "link").symlink_to("d/f")
    with (place / "link").open() as file:
        assert faults(place / "link", file.fileno()) == [f"{place}/d/f can be written by everybody"]
        (place / "d/f").unlink()
        (place / "d/f").touch(mode=0o644)
        assert faults(place / "link") == []
        assert faults(place / "link", file.fileno()) == [f"{place}/d/f can be written by everybody"]


@root
def test_owner_of_an_open_file(place: Path) -> None:
    """The owner of an open file is checked too."""
    with (place / "d/f").open() as file:
        os.chown(place / "d/f", STRANGER, STRANGER)
        (place / "d/f").unlink()
        (place / "d/f").touch(mode=0o644)
        (fault,) = faults(place / "d/f", file.fileno())
    assert fault.startswith(f"{place}/d/f belongs to ")


@pytest.mark.parametrize("kind", ["configuration", "program", "web configuration", "certificate"])
def test_looked_at_before(kind: str, place: Path) -> None:
    """A writable file is refused before it is read, so its mistakes are not reported."""
    file, config, web = place / "d/f", place / "c.yml", place / "web.yml"
    file.write_text("{[ wrong", encoding="utf-8")
    file.chmod(0o666)
    config.write_text("dtrace: {program: d/f.d}", encoding="utf-8")
    (place / "d/f.d").symlink_to("f")
    web.write_text("tls_server_config: {cert_file: d/f, key_file: d/f}", encoding="utf-8")
    load: Any
    load, named = {
        "configuration": (dtrace_exporter.config.load, file),
        "program": (dtrace_exporter.config.load, config),
        "web configuration": (configuration.WebConfigFile, file),
        "certificate": (configuration.WebConfigFile, web),
    }[kind]
    with pytest.raises(ConfigError, match=rf"expected a file that nobody but .*{place}/d/f can be"):
        load(named, Guard(refuse=True).look)
    if kind == "program":
        assert load(named, Guard(refuse=False).look)
    else:
        with pytest.raises(ConfigError, match=r"expected YAML|no PEM"):
            load(named, Guard(refuse=False).look)


# The real process, with files of each kind that others can write

KINDS = ["configuration", "program", "web configuration", "certificate", "key", "directory"]


def prepare(kind: str, place: Path, fake_dtrace: FakeDTrace) -> tuple[Path, list[str | Path]]:
    """Write all files of a service, one writable by others; return that one and the flags."""
    cert = trustme.CA().issue_cert("localhost")
    cert.private_key_pem.write_to_path(str(place / "key.pem"))
    cert.cert_chain_pems[0].write_to_path(str(place / "cert.pem"))
    (place / "own.d").write_text("/* place netns */\nBEGIN { }\n", encoding="utf-8")
    tls = {"cert_file": "cert.pem", "key_file": "key.pem"}
    (place / "web.yml").write_text(json.dumps({"tls_server_config": tls}), encoding="utf-8")
    config = write(place / "c.yml", fake_dtrace(), program="own.d")
    files = (
        config,
        place / "own.d",
        place / "web.yml",
        place / "cert.pem",
        place / "key.pem",
        place,
    )
    file = dict(zip(KINDS, files, strict=True))[kind]
    file.chmod(file.stat().st_mode | 0o022)
    return file, [f"--config.file={config}", f"--web.config.file={place / 'web.yml'}"]


@root
@pytest.mark.parametrize("kind", KINDS)
def test_root_refuses(kind: str, tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """As root the service and trace do not start with a writable file; check says FAIL."""
    file, flags = prepare(kind, tmp_path, fake_dtrace)
    done = run(*flags)
    assert done.returncode == cli.BAD_CONFIGURATION
    assert f"(found that {file} can be written by everybody); see {FLAG}\n" in done.stderr
    assert run(*flags, "trace", "22").returncode == cli.BAD_CONFIGURATION
    done = run(*flags, "check")
    assert done.returncode == 1
    assert f": {file} can be written by everybody\n" in done.stdout
    assert all(line.startswith(("ok    conf", "FAIL  files", " " * 30)) for line in
               done.stdout.splitlines())  # fmt: skip


@root
@pytest.mark.parametrize("kind", KINDS)
def test_root_takes_it_when_told_to(kind: str, tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """With the flag, root starts; check still shows the fault, and the log warns of it."""
    file, flags = prepare(kind, tmp_path, fake_dtrace)
    done = run(*flags, "check", FLAG)
    assert done.returncode == 0
    assert f": {file} can be written by everybody\n" in done.stdout
    assert "FAIL" not in done.stdout
    log = tmp_path / "log"
    with log.open("wb") as errors, serving(FLAG, *flags, stderr=errors.fileno()) as exporter:
        until(lambda: "session up" in log.read_text(encoding="utf-8"))
        exporter.process.terminate()
    said = log.read_text(encoding="utf-8")
    assert said.count(f'why="{file} can be written by everybody"') == 1


def test_who_refuses() -> None:
    """Root refuses unless the flag allows it; other users never refuse."""
    assert refused(allowed=False) == (os.geteuid() == 0)
    assert not refused(allowed=True)
    if os.geteuid() == 0:
        os.seteuid(STRANGER)
        try:
            assert not refused(allowed=False)
        finally:
            os.seteuid(0)


@root
def test_reload(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """A reload fails if the file has become writable, and works again once the mode is mended."""
    path = write(tmp_path / "c.yml", fake_dtrace())
    with serving(f"--config.file={path}") as exporter:
        until(lambda: exporter.get("/-/ready"))
        path.chmod(0o666)
        write(path, fake_dtrace(), port=80)
        exporter.process.send_signal(signal.SIGHUP)
        until(lambda: "_last_reload_successful 0.0" in exporter.get())
        assert 'session="port-22"' in exporter.get()
        assert 'session="port-80"' not in exporter.get()
        path.chmod(0o644)
        exporter.process.send_signal(signal.SIGHUP)
        until(lambda: "_last_reload_successful 1.0" in exporter.get())
        assert 'session="port-80"' in exporter.get()
        exporter.process.terminate()
        _, said = exporter.process.communicate(timeout=SECONDS)
    assert "reload failed" in said
    assert f"{path} can be written by everybody" in said


@root
def test_web_configuration_is_followed(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """A web configuration that has become writable is not applied any more."""
    path, log = write(tmp_path / "c.yml", fake_dtrace()), tmp_path / "log"
    web = tmp_path / "web.yml"
    web.write_text("{}", encoding="utf-8")
    flags = (f"--config.file={path}", f"--web.config.file={web}")
    with log.open("wb") as errors, serving(*flags, stderr=errors.fileno()) as exporter:
        until(lambda: exporter.get("/-/ready"))
        web.chmod(0o666)
        web.write_text("rate_limit: {interval: 1h, burst: 1}", encoding="utf-8")
        until(lambda: "web configuration changed to a bad one" in log.read_text(encoding="utf-8"))
        assert "_web_config_last_reload_successful 0.0" in exporter.get()
        assert exporter.get()
        web.chmod(0o644)
        until(lambda: 'msg="web configuration changed"' in log.read_text(encoding="utf-8"))
        exporter.process.terminate()
