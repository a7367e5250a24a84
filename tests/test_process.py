"""What a child process gets from the exporter, and what it does not get."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab.waiting import eventually, until

from dtrace_exporter.tracing import process
from dtrace_exporter.tracing.process import ENVIRONMENT, child, resolve, send_signal
from exporter_process import SECONDS, serving, write
from fake_steps import FakeDTrace

pytestmark = pytest.mark.usefixtures("no_child_left")


def says(*argv: str) -> str:
    """Return the output of a child."""

    async def ask() -> str:
        async with child(argv) as one:
            assert one.stdin is not None
            assert one.stdout is not None
            one.stdin.close()
            output = await one.stdout.read()
            await one.wait()
            return output.decode()

    return asyncio.run(ask())


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child has exactly the documented variables, with the exporter's values."""
    secrets = {"NOTIFY_SOCKET": "/run/x", "LISTEN_FDS": "1", "LD_PRELOAD": "", "SECRET": "s3cret"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("TZ", "Europe/Berlin")
    monkeypatch.delenv("KRB5CCNAME", raising=False)
    has = dict(line.split("=", 1) for line in says("env").splitlines())
    ours = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    assert has == {**ours, "LC_ALL": "C"}
    assert (has["SSH_AUTH_SOCK"], has["TZ"]) == ("/run/agent", "Europe/Berlin")


def test_signal_to_one_that_has_just_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit status of a child is known even if a signal is sent before it is waited for."""
    asked = threading.Event()

    def slow(pid: int, options: int, ask: Callable[..., Any] = os.waitpid) -> Any:
        if not options:
            asked.wait()
        return ask(pid, options)

    async def test() -> int:
        async with child(["sleep", "600"]) as one:
            os.kill(one.pid, signal.SIGKILL)
            os.waitid(os.P_PID, one.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222
            send_signal(one, signal.SIGTERM)
            asked.set()
            return await one.wait()

    monkeypatch.setattr(os, "waitpid", slow)
    assert asyncio.run(test()) == -signal.SIGKILL


def test_environment_is_documented() -> None:
    """The operator's guide lists exactly these variables."""
    guide = Path(__file__).parents[1] / "docs/operations.md"
    (line,) = (
        line for line in guide.read_text(encoding="utf-8").splitlines() if "`LC_ALL=C`" in line
    )
    named = [word.strip("`,.") for word in line.split() if word.startswith("`")]
    assert sorted(named) == sorted([*ENVIRONMENT, "LC_ALL=C"])


def test_output_ends_with_the_process() -> None:
    """All output of a child is read when it ends, though another process keeps its pipes open.

    An ssh(1) with a ControlPersist master does that; the master is not waited for.
    """
    script = "setsid sleep 1000 & echo $!; head -c 300000 /dev/zero | tr '\\0' x; echo end >&2"

    async def ask() -> tuple[bytes, bytes, int]:
        async with child(["sh", "-c", script]) as one:
            assert one.stdout is not None
            assert one.stderr is not None
            return await one.stdout.read(), await one.stderr.read(), await one.wait()

    output, errors, status = asyncio.run(asyncio.wait_for(ask(), SECONDS))
    pid, _, rest = output.partition(b"\n")
    os.kill(int(pid), signal.SIGKILL)
    assert (rest, errors, status) == (b"x" * 300_000, b"end\n", 0)


def test_input_that_nobody_reads() -> None:
    """If a child has ended, its input is dropped, though another process has the pipe open."""

    async def write() -> tuple[bytes, int]:
        async with child(["sh", "-c", "exec 3<&0; setsid sleep 1000 <&3 & echo $!"]) as one:
            assert one.stdout is not None
            await process.hand_over(one, "x" * 1_000_000)
            return await one.stdout.read(), await one.wait()

    pid, status = asyncio.run(asyncio.wait_for(write(), SECONDS))
    os.kill(int(pid), signal.SIGKILL)
    assert status == 0


async def test_given_up_again_and_again() -> None:
    """If a task is cancelled several times while it ends a child, the child still ends."""
    pids = []

    async def run() -> None:
        async with child(["sleep", "1000"]) as one:
            pids.append(one.pid)
            await one.wait()

    running = asyncio.create_task(run())
    await eventually(lambda: pids)
    while not running.done():
        running.cancel()
        await asyncio.sleep(0)
    assert running.cancelled()
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into Linux' /proc")
def test_descriptors() -> None:
    """A child has only standard input, output and error, whatever files the exporter has open."""
    ours = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(ours, True)
    try:
        # ls has a descriptor of the directory itself.
        numbers = says("ls", "/proc/self/fd").split()
    finally:
        os.close(ours)
    assert numbers == ["0", "1", "2", "3"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into Linux' /proc")
def test_signals() -> None:
    """A child blocks no signal and does not ignore SIGPIPE."""
    masks = dict(line.split(":\t") for line in says("cat", "/proc/self/status").splitlines())
    # glibc has the first two of the real-time signals for itself.
    assert int(masks["SigBlk"], 16) == 0
    assert not int(masks["SigIgn"], 16) & (1 << signal.SIGPIPE - 1)


def test_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command is looked up in the absolute directories of PATH and run by its full path."""
    here, there = tmp_path / "here", tmp_path / "there"
    for directory in (here, there):
        directory.mkdir()
        script = directory / "dtrace"
        script.write_text("#!/bin/sh\ncat /proc/$$/cmdline\n", encoding="utf-8")
        script.chmod(0o755)
    monkeypatch.chdir(here)
    monkeypatch.setenv("PATH", f":.:../here:{there}:/usr/bin:/bin")
    assert resolve("dtrace") == str(there / "dtrace")
    assert str(there / "dtrace") in says("dtrace").split("\0")
    assert resolve("./dtrace") == str(here / "dtrace")
    assert resolve(str(there / "dtrace")) == str(there / "dtrace")


@pytest.mark.parametrize("path", ["", ":", ".", "/nowhere:bin"])
def test_not_found(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command outside PATH is not found, even in the current directory; the error names PATH."""
    script = tmp_path / "dtrace"
    script.write_text("#!/bin/sh\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "_SBIN", ("/nowhere",))
    monkeypatch.setenv("PATH", path)
    with pytest.raises(FileNotFoundError) as caught:
        resolve("dtrace")
    assert caught.value.errno == errno.ENOENT
    assert "PATH" in str(caught.value.strerror)


def script_in(directory: Path, text: str) -> Path:
    """Write a script that is named dtrace."""
    directory.mkdir(exist_ok=True)
    script = directory / "dtrace"
    script.write_text(text, encoding="utf-8")
    script.chmod(0o755)
    return script


SYSTEMTAP = """#!/usr/bin/python3
# This handles the systemtap equivalent of
# $(DTRACE) $(DTRACEFLAGS) -G -s $^ -o $@
"""


def test_what_users_do_not_have_in_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command is found in the sbin directories, which only root has in PATH."""
    script = script_in(tmp_path / "sbin", "#!/bin/sh\n")
    monkeypatch.setattr(process, "_SBIN", (str(tmp_path / "sbin"),))
    monkeypatch.setenv("PATH", "/nowhere")
    assert resolve("dtrace") == str(script)


def test_systemtap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SystemTap's dtrace is skipped; the error says so if there is no other."""
    script_in(tmp_path / "bin", SYSTEMTAP)
    monkeypatch.setattr(process, "_SBIN", (str(tmp_path / "sbin"),))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(FileNotFoundError, match="only SystemTap's program of that name"):
        resolve("dtrace")
    script = script_in(tmp_path / "sbin", "#!/bin/sh\n# not that of systemd-tap\n")
    assert resolve("dtrace") == str(script)


def test_no_shell() -> None:
    """No shell interprets the words of a command."""
    words = ["$HOME", "`id`", "a;b", "*", "$(id)", "a b", "'", '"', "\n"]
    assert says("printf", "%s\\0", *words).split("\0")[:-1] == words


AUDITED = """
import json, os, sys
events = open(sys.argv.pop(1), "w")
def audit(event, args):
    if event in ("open", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.mkdir",
                 "os.rename", "os.link", "os.symlink", "tempfile.mkstemp", "tempfile.mkdtemp",
                 "shutil.copyfile", "socket.bind"):
        print(json.dumps([event, *map(repr, args)]), file=events, flush=True)
sys.addaudithook(audit)
from dtrace_exporter.cli import main
raise SystemExit(main())
"""


def test_files_and_programs(
    tmp_path: Path, fake_dtrace: FakeDTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service writes no file, uses no directory that everybody can write, and runs no shell.

    An audit hook sees all that Python opens and starts, from the first import to the end.
    """
    audited = [sys.executable, "-B", "-c", AUDITED, f"{tmp_path}/events"]
    monkeypatch.setattr("exporter_process.EXPORTER", audited)
    config = write(tmp_path / "c.yml", fake_dtrace())
    with serving("--config.file", config) as exporter:
        until(lambda: exporter.get("/-/ready"))
        assert "dtrace_session_up" in exporter.get("/metrics")
        assert "<html" in exporter.get("/")
        exporter.process.send_signal(signal.SIGHUP)
        exporter.process.terminate()
        exporter.process.communicate(timeout=20)
    lines = (tmp_path / "events").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    opened = [event[1:] for event in events if event[0] == "open"]
    assert any("c.yml" in name for name, *_ in opened)
    for name, _mode, flags in opened:
        if name.isdecimal():
            # A descriptor that the process has, such as a pipe's.
            continue
        path = Path(name.strip("b'\""))
        writes = int(flags) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        assert not writes or path == Path(os.devnull), name
        # pytest chooses where the tests' own files are.
        if path.is_absolute() and path.exists() and not path.is_relative_to(tmp_path):
            above = path.parent.stat()
            assert not stat.S_IMODE(above.st_mode) & stat.S_IWOTH, name
    started = [event[1] for event in events if event[0] == "subprocess.Popen"]
    # The other process looks at other namespaces.
    assert {path.strip("'") for path in started} == {"/usr/bin/env", sys.executable}
    assert {event[0] for event in events} <= {"open", "subprocess.Popen", "socket.bind"}
    assert not [event for event in events if event[0] == "socket.bind" and "/" in event[2]]


def test_the_only_place_where_programs_are_started() -> None:
    """Only these modules of the package can start a process, and none makes a temporary file."""
    sources = Path(process.__file__).parents[1].rglob("*.py")
    found = {
        (path.name, word)
        for path in sources
        for word in ("subprocess_exec", "subprocess_shell", "import subprocess", "os.system",
                     "tempfile", "popen", "shell=True", "os.exec", "posix_spawn")
        if word in path.read_text(encoding="utf-8")
    }  # fmt: skip
    # namespaces.py starts this package itself to look for network namespaces, and netstat.py reads
    # FreeBSD's netstat(1); both do so in a thread.
    assert found == {
        ("process.py", "subprocess_exec"),
        ("namespaces.py", "import subprocess"),
        ("netstat.py", "import subprocess"),
    }


def test_secrets_of_a_command_are_not_told(tmp_path: Path) -> None:
    """The arguments of a command, such as a password, appear in no log, page or metric."""
    argv = ["/nowhere/sshpass", "-p", "s3cret-word", "ssh", "far", "dtrace"]
    config = write(tmp_path / "c.yml", argv, options={"aggsize": "4m"})
    with serving("--config.file", config, "--log.level=debug") as exporter:
        until(lambda: "cannot start /nowhere/sshpass" in exporter.get("/"))
        told = [exporter.get(path) for path in ("/", "/metrics")]
        exporter.process.terminate()
        _, log = exporter.process.communicate(timeout=20)
    assert "cannot start /nowhere/sshpass: No such file or directory" in log
    assert not [text for text in (*told, log) if "s3cret-word" in text]


def test_dtrace_sees_no_secret(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """The service's own variables are not passed to the processes that it starts."""
    out = tmp_path / "environment"
    command = ["sh", "-c", f'env > {out}; exec "$@"', "sh", *fake_dtrace()]
    environment = {**os.environ, "S3CRET": "s3cret-word", "INVOCATION_ID": "1"}
    config = write(tmp_path / "c.yml", command)
    arguments = ["--web.listen-address=127.0.0.1:0", f"--config.file={config}"]
    words = [sys.executable, "-m", "dtrace_exporter", *arguments]
    with subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL) as running:
        until(lambda: out.exists() and "LC_ALL=C" in out.read_text(encoding="utf-8"))
        running.terminate()
        running.wait(20)
    text = out.read_text(encoding="utf-8")
    assert "s3cret" not in text.lower()
    assert "INVOCATION_ID" not in text
