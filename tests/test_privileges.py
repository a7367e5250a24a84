"""The capabilities that the real service gives up once it has started, as the kernel shows them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lab.waiting import until

from dtrace_exporter import privileges
from dtrace_exporter.capabilities import EVERY
from dtrace_exporter.config import Config, ConfigError, DTraceConfig, HostConfig
from dtrace_exporter.privileges import DTRACE, NONE, needed
from dtrace_exporter.scripts import reader
from dtrace_exporter.scripts.configuration import ScriptConfig
from exporter_process import SECONDS, serving, write
from fake_steps import FakeDTrace

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux' own")

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to give up")
Sets = dict[str, int]


def sets(pid: int | str) -> list[Sets]:
    """Return the capability sets of each thread, and whether it can be given more."""
    texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    fields = re.compile(r"^(CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs):\s(\w+)$", re.MULTILINE)
    return [{name: int(value, 16) for name, value in fields.findall(text)} for text in texts]


def only(*numbers: int) -> list[Sets]:
    """Return what sets() returns if all threads have just these capabilities and get no more."""
    mask = sum(1 << number for number in numbers)
    have = dict.fromkeys(("CapPrm", "CapEff", "CapBnd"), mask)
    return [{"CapInh": 0, "CapAmb": 0, "NoNewPrivs": 1, **have}]


def called_dtrace(place: Path, command: list[str]) -> list[str]:
    """Return a command that runs a fake dtrace(1) under the name dtrace."""
    script = place / "dtrace"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return [str(script)]


@root
def test_sock_diag(tmp_path: Path) -> None:
    """With source sock_diag, no thread of the service has any capability or can get one."""
    path = tmp_path / "c.yml"
    path.write_text("source: sock_diag", encoding="utf-8")
    with serving(f"--config.file={path}") as exporter:
        until(lambda: "dtrace_exporter_source_info" in exporter.get())
        # A scrape runs in a thread.
        assert len(sets(exporter.process.pid)) > 1
        assert [each for each in sets(exporter.process.pid) if [each] != only()] == []
        exporter.process.terminate()


@root
def test_falls_back(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """If dtrace(1) refuses, the service uses sock_diag but keeps the capabilities for DTrace."""
    command = called_dtrace(tmp_path, fake_dtrace({"unprivileged": True}))
    path = tmp_path / "c.yml"
    config: dict[str, Any] = {"source": "auto", "dtrace": {"command": command}}
    path.write_text(json.dumps(config), encoding="utf-8")
    with serving(f"--config.file={path}") as exporter:
        until(lambda: 'reason="not_permitted",source="sock_diag"' in exporter.get())
        for each in sets(exporter.process.pid):
            assert each["CapPrm"] in (0, only(*DTRACE)[0]["CapPrm"])
        config["source"] = "dtrace"
        path.write_text(json.dumps(config), encoding="utf-8")
        exporter.process.send_signal(signal.SIGHUP)
        until(lambda: 'dtrace_session_up{session="all"} 0.0' in exporter.get())
        exporter.process.terminate()


@root
def test_no_way_back(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """A service that started with sock_diag needs a restart before it can use or try DTrace."""
    command = called_dtrace(tmp_path, fake_dtrace())
    path = tmp_path / "c.yml"
    config: dict[str, Any] = {"source": "sock_diag", "dtrace": {"command": command}}
    path.write_text(json.dumps(config), encoding="utf-8")
    with serving(f"--config.file={path}") as exporter:
        until(lambda: 'reason="configured",source="sock_diag"' in exporter.get())
        for source in ("dtrace", "auto"):
            config["source"] = source
            path.write_text(json.dumps(config), encoding="utf-8")
            exporter.process.send_signal(signal.SIGHUP)
            until(lambda: "_last_reload_successful 0.0" in exporter.get())
            config["source"] = "sock_diag"
            path.write_text(json.dumps(config), encoding="utf-8")
            exporter.process.send_signal(signal.SIGHUP)
            until(lambda: "_last_reload_successful 1.0" in exporter.get())
        exporter.process.terminate()
        _, said = exporter.process.communicate(timeout=SECONDS)
    assert said.count("given up at the start: restart the service") == 2


@root
def test_dtrace(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """The service keeps two capabilities and gives them to dtrace(1); some threads have none."""
    saved = tmp_path / "start.json"
    steps = ({"save": str(saved)}, {"ready": "1"}, {"tick": True})
    command = called_dtrace(tmp_path, fake_dtrace(*steps))
    with serving(f"--config.file={write(tmp_path / 'c.yml', command)}") as exporter:
        until(lambda: 'session_up{session="port-22"} 1.0' in exporter.get())
        pid = exporter.process.pid
        found = sets(pid)
        assert [each for each in found if each["CapPrm"] and [each] != only(*DTRACE)] == []
        assert [each for each in found if not each["CapPrm"]]
        assert {each["CapBnd"] for each in found} == {only(*DTRACE)[0]["CapBnd"]}
        consumer = int(json.loads(saved.read_text(encoding="utf-8"))["pid"])
        assert sets(consumer) == only(*DTRACE)
        # After a kill, dtrace(1) starts again with the same.
        saved.unlink()
        os.kill(consumer, signal.SIGKILL)
        until(saved.exists)
        # After a change to sock_diag, the service has none either.
        (tmp_path / "c.yml").write_text("source: sock_diag", encoding="utf-8")
        exporter.process.send_signal(signal.SIGHUP)
        until(lambda: not any(each["CapPrm"] for each in sets(pid)))
        assert "_last_reload_successful 1.0" in exporter.get()
        exporter.process.terminate()


@root
def test_a_refused_reload_leaves_nothing(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """A reload that needs capabilities already given up fails and starts no process."""
    command = called_dtrace(tmp_path, fake_dtrace({"ready": "1"}, {"tick": True}))
    path = write(tmp_path / "c.yml", command)
    with serving(f"--config.file={path}") as exporter:
        until(lambda: 'session_up{session="port-22"} 1.0' in exporter.get())
        pid = exporter.process.pid

        def processes() -> list[str]:
            """Return the child processes of the exporter."""
            text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
            return text.split()

        # Two dtrace(1), and the process that looks for namespaces and for who has sockets open.
        until(lambda: len(processes()) == 3)
        before = processes()
        host = {"name": "far", "dtrace": {"command": ["sudo", "dtrace"], "program": "linux"}}
        path.write_text(json.dumps({"source": "auto", "hosts": [host]}), encoding="utf-8")
        exporter.process.send_signal(signal.SIGHUP)
        until(lambda: "config_last_reload_successful 0.0" in exporter.get())
        assert processes() == before
        exporter.process.terminate()


@root
def test_no_program_gives_anything_back() -> None:
    """A program that root starts gets only the capabilities that the service has kept."""
    code = (
        "import subprocess\n"
        "from dtrace_exporter.privileges import DTRACE, give_up\n"
        "give_up(DTRACE)\n"
        "give_up()\n"
        "subprocess.run(['cat', '/proc/self/status'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith(("CapPrm", "CapEff"))]
    assert found == ["CapPrm:\t0000000000000000", "CapEff:\t0000000000000000"], done.stderr


@root
def test_another_command(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """A command whose needs are not known gets all capabilities that the service has."""
    with serving(f"--config.file={write(tmp_path / 'c.yml', fake_dtrace())}") as exporter:
        until(lambda: 'session_up{session="port-22"} 1.0' in exporter.get())
        before = sets("self")[0]
        assert before in sets(exporter.process.pid)
        exporter.process.terminate()


def configured(local: str, *far: str, source: Any = "dtrace", scripts: bool = False) -> Config:
    """Return a configuration with these commands, and perhaps with a script on this host."""
    one, *hosts = (HostConfig(dtrace=DTraceConfig((name, "-x"))) for name in (local, *far))
    if scripts:
        script = reader.read("/x.d", "BEGIN { @a = count(); }")
        one = dataclasses.replace(one, scripts=(ScriptConfig(script, ()),))
    return Config(source, one, tuple(hosts))


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (configured("dtrace"), DTRACE),
        (configured("/usr/sbin/dtrace", source="auto"), DTRACE),
        (configured("dtrace", "ssh", source="auto"), DTRACE),
        (configured("dtrace", source="sock_diag"), NONE),
        (configured("dtrace", source="sock_diag", scripts=True), DTRACE),
        (configured("dtrace", "ssh"), DTRACE),
        (configured("sudo", "/usr/bin/ssh", source="sock_diag"), NONE),
        (configured("dtrace", "ssh", "sudo"), EVERY),
        (configured("sudo", source="auto"), EVERY),
        (configured("/opt/dtrace/run"), EVERY),
    ],
)
def test_needed(config: Config, kept: frozenset[int]) -> None:
    """The capabilities that are kept follow from the source and from the commands."""
    assert needed(config) == kept


def test_nothing_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capabilities that were given up cannot be kept later; those that were kept can."""
    given: list[Any] = []
    monkeypatch.setattr(privileges, "give_up", given.append)
    kept = privileges.Kept()
    for wanted in (EVERY, DTRACE, DTRACE, NONE, NONE):
        kept.keep(wanted)
    with pytest.raises(ConfigError, match="restart the service"):
        kept.keep(DTRACE)
    assert given == [EVERY, DTRACE, DTRACE, NONE, NONE]
