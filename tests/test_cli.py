"""The command line: tests of the real process over a fake dtrace(1)."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from lab.exporter import free_port
from lab.waiting import until

from dtrace_exporter import __version__, cli
from dtrace_exporter.config import Config, DTraceConfig, HostConfig
from dtrace_exporter.trace import HEADER, csv
from dtrace_exporter.tracing import program, rendering
from dtrace_exporter.tracing.dtrace import DTraceError
from dtrace_exporter.web import server
from exporter_process import EXPORTER, SECONDS, Exporter, is_alive, pid_in, run, serving, write
from fake_steps import FOREVER, READY, FakeDTrace
from linux_rows import syns
from pseudo_terminal import on_terminal


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return the file in which the fake dtrace(1) records its process ID."""
    return tmp_path / "start.json"


def test_serves_and_ends(tmp_path: Path, saved: Path, fake_dtrace: FakeDTrace) -> None:
    """The service logs its address and exports counts; SIGTERM ends it and its dtrace(1)."""
    rows = {"print": syns(22, 5)}
    command = fake_dtrace({"save": str(saved)}, READY, rows, FOREVER)
    with serving("--config.file", write(tmp_path / "c.yml", command)) as exporter:
        until(lambda: exporter.get("/-/ready"))
        sample = 'dtrace_tcp_listen_syns_total{address="*",listener="name",netns="",port="22"} 5.0'
        until(lambda: sample in exporter.get())
        assert 'dtrace_session_up{session="port-22"} 1.0' in exporter.get()
        began = time.monotonic()
        exporter.process.terminate()
        _, errors = exporter.process.communicate(timeout=SECONDS)
        assert time.monotonic() - began < 5
        assert exporter.process.returncode == 0
        assert not is_alive(pid_in(saved))
        assert "Traceback" not in errors
        where = re.escape(f'msg="listening" address=127.0.0.1:{exporter.port} tls=false')
        for what in (f"{where}$", 'msg="session up" session=port-22 '):
            assert re.search(rf"^ts=\S+ level=info {what}", errors, re.MULTILINE)


def test_sigint_ends_it_too(tmp_path: Path, saved: Path, fake_dtrace: FakeDTrace) -> None:
    """SIGINT ends the service normally, even if dtrace(1) still compiles and ignores everything."""
    command = fake_dtrace({"save": str(saved)}, {"sleep": 60})
    with serving("--config.file", write(tmp_path / "c.yml", command)) as exporter:
        pid = pid_in(saved)
        exporter.process.send_signal(signal.SIGINT)
        _, errors = exporter.process.communicate(timeout=SECONDS)
        assert (exporter.process.returncode, "Traceback" in errors) == (0, False)
        assert not is_alive(pid)


def test_sigterm_while_the_source_is_tried(tmp_path: Path) -> None:
    """SIGTERM ends the service while it has not yet decided on its source."""
    started = tmp_path / "started"
    command = ["sh", "-c", f"touch {started}; sleep 60; true"]
    with serving("--config.file", write(tmp_path / "c.yml", command)) as exporter:
        until(started.exists)
        exporter.process.terminate()
        _, errors = exporter.process.communicate(timeout=SECONDS)
        assert (exporter.process.returncode, "Traceback" in errors) == (0, False)


def test_sighup_reloads(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """SIGHUP applies a changed file; if the file is bad, the old configuration stays in use."""
    command = fake_dtrace()
    path = write(tmp_path / "c.yml", command)
    reloaded = "dtrace_exporter_config_last_reload_successful"
    with serving("--config.file", path) as exporter:
        until(lambda: exporter.get("/-/ready"))
        write(path, command, port=80)
        exporter.process.send_signal(signal.SIGHUP)
        until(lambda: 'dtrace_session_up{session="port-80"} 1.0' in exporter.get())
        assert "port-22" not in exporter.get()
        path.write_text("nonsense: 1\n", encoding="utf-8")
        exporter.process.send_signal(signal.SIGHUP)
        until(lambda: f"\n{reloaded} 0.0\n" in exporter.get())
        assert 'dtrace_session_up{session="port-80"} 1.0' in exporter.get()
        exporter.process.terminate()
        _, errors = exporter.process.communicate(timeout=SECONDS)
        assert exporter.process.returncode == 0
        assert f"{path}:1: expected the key " in errors
        assert "Traceback" not in errors


def test_only_check_on_a_terminal_shows_values(tmp_path: Path) -> None:
    """Only check on a terminal shows the wrong value; everything else describes its type."""
    path = tmp_path / "c.yml"
    path.write_text("dtrace: {command: sshpass -p hunter2 ssh a}", encoding="utf-8")
    flag = f"--config.file={path}"
    said = f"dtrace-exporter: {path}:1: dtrace.command: expected a list"
    for words in ((), ("check",), ("program",)):
        assert run(*words, flag).stderr == f"{said} (found text)\n"
    for command, found in (("check", '"sshpass -p hunter2 ssh a"'), ("program", "text")):
        with on_terminal([*EXPORTER, command, flag], 200) as screen:
            assert screen.end()
        assert screen.text == f"{said} (found {found})\r\n"


def test_kill_9_leaves_nothing(tmp_path: Path, saved: Path, fake_dtrace: FakeDTrace) -> None:
    """If the exporter is killed, its dtrace(1) ends at its next tick."""
    command = fake_dtrace({"save": str(saved)}, READY, FOREVER)
    with serving("--config.file", write(tmp_path / "c.yml", command)) as exporter:
        until(lambda: exporter.get("/-/ready"))
        pid = pid_in(saved)
        assert is_alive(pid)
        exporter.process.kill()
        until(lambda: not is_alive(pid))


def test_address_in_use(tmp_path: Path, saved: Path, fake_dtrace: FakeDTrace) -> None:
    """If the address is in use, the error names it, and no dtrace(1) is started."""
    path = write(tmp_path / "c.yml", fake_dtrace({"save": str(saved)}))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run(f"--web.listen-address={address}", "--config.file", path)
    assert result.returncode == cli.ADDRESS_IN_USE
    (line,) = result.stderr.splitlines()
    assert line.startswith("dtrace-exporter: ")
    assert address in line
    assert "in use" in line
    assert not saved.exists()


def test_malformed_address() -> None:
    """A malformed address is an error that names it."""
    result = run("--web.listen-address=nonsense")
    assert result.returncode == cli.BAD_CONFIGURATION
    (line,) = result.stderr.splitlines()
    assert "nonsense" in line


def test_address_that_is_not_of_this_host() -> None:
    """An address that this host does not have yet, as at boot, is an ordinary failure."""
    result = run("--web.listen-address=192.0.2.1:9748")
    assert result.returncode == cli.FAILURE
    assert "192.0.2.1:9748" in result.stderr


def test_privileged_port(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refused privileged port gives the status for a lack of permission."""

    def refuse(*_args: object, **_kwargs: object) -> list[socket.socket]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(server, "bind_sockets", refuse)
    assert cli.main(["--web.listen-address=:80"]) == cli.NO_PERMISSION
    assert capsys.readouterr().err == "dtrace-exporter: cannot listen on :80: Permission denied\n"


@pytest.mark.skipif(
    os.geteuid() == 0 and not shutil.which("setpriv"), reason="root can read everything here"
)
@pytest.mark.parametrize(
    ("command", "status"),
    [((), 77), (("check",), 1), (("trace", "22"), 77), (("program",), 77)],
)
def test_unreadable_configuration(command: tuple[str, ...], status: int, tmp_path: Path) -> None:
    """An unreadable file gives the status for a lack of permission; for check it is a failure."""
    path = write(tmp_path / "c.yml", ["true"])
    path.chmod(0)
    # Root may read the file anyway, unless that capability is taken away.
    powers = "-dac_override,-dac_read_search"
    without = ["setpriv", f"--bounding-set={powers}"] if os.geteuid() == 0 else []
    result = subprocess.run(
        [*without, *EXPORTER, f"--config.file={path}", *command],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (result.returncode, result.stdout) == (status, "")
    assert result.stderr == (
        f"dtrace-exporter: {path}: expected a readable file (Permission denied)\n"
    )


@pytest.mark.parametrize(
    ("command", "status"),
    [((), 78), (("check",), 1), (("trace", "22"), 78), (("program",), 78)],
)
def test_bad_configuration(command: tuple[str, ...], status: int, tmp_path: Path) -> None:
    """No command starts on a bad file; one line names the file, the line and the key."""
    path = tmp_path / "c.yml"
    path.write_text("source: auto\ndtrace:\n  intervall: 1s\n", encoding="utf-8")
    result = run("--config.file", path, *command)
    assert (result.returncode, result.stdout) == (status, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"dtrace-exporter: {path}:3: ")
    assert "dtrace: expected the key interval" in line


def test_no_program_for_it(tmp_path: Path) -> None:
    """A D program that cannot be read ends the service with a message."""
    own = tmp_path / "own.d"
    own.write_bytes(b"\xff")
    path = write(tmp_path / "c.yml", ["true"], program=str(own))
    with serving("--config.file", path) as exporter:
        _, errors = exporter.process.communicate(timeout=SECONDS)
        assert exporter.process.returncode == cli.BAD_CONFIGURATION
        assert f"dtrace-exporter: cannot read the D program {own}: not UTF-8\n" in errors


def test_statuses_are_those_of_sysexits() -> None:
    """The exit statuses are those of sysexits.h, which service managers know, on any system."""
    assert (cli.ADDRESS_IN_USE, cli.NO_PERMISSION, cli.BAD_CONFIGURATION) == (75, 77, 78)


def test_says_when_it_is_ready(tmp_path: Path, saved: Path, fake_dtrace: FakeDTrace) -> None:
    """The supervisor's descriptor gets one line when the service answers; no child inherits it."""
    command = fake_dtrace({"save": str(saved)}, READY, FOREVER)
    path = write(tmp_path / "c.yml", command)
    port = free_port()
    reading, writing = os.pipe()
    with (
        subprocess.Popen(
            [*EXPORTER, f"--web.listen-address=127.0.0.1:{port}", f"--config.file={path}"],
            env={**os.environ, cli.READY_FD: str(writing)},
            pass_fds=[writing],
            text=True,
        ) as process,
        open(reading, "rb") as end,  # noqa: PTH123
    ):
        os.close(writing)
        try:
            assert end.readline() == b"ready\n"
            assert Exporter(process, port).get("/-/healthy") == "healthy\n"
            pid_in(saved)
            assert end.read() == b""
        finally:
            process.terminate()
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/PID/fd is Linux'")
@pytest.mark.parametrize("number", [1, 2])
def test_says_it_on_a_standard_descriptor(
    number: int, tmp_path: Path, fake_dtrace: FakeDTrace
) -> None:
    """If the line goes to a standard descriptor, that stays open, and no connection takes it."""
    path = write(tmp_path / "c.yml", fake_dtrace(READY, FOREVER))
    port = free_port()
    output = [tmp_path / "1", tmp_path / "2"]
    with (
        output[0].open("wb") as out,
        output[1].open("wb") as errors,
        subprocess.Popen(
            [*EXPORTER, f"--web.listen-address=127.0.0.1:{port}", f"--config.file={path}"],
            env={**os.environ, cli.READY_FD: str(number)},
            stdout=out,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            until(lambda: "ready\n" in output[number - 1].read_text().splitlines(keepends=True))
            for each in (1, 2):
                assert Path(f"/proc/{process.pid}/fd/{each}").readlink() == output[each - 1]
            process.send_signal(signal.SIGHUP)
            until(lambda: 'msg="reloaded"' in output[1].read_text())
        finally:
            process.terminate()
    assert process.returncode == 0


def test_nobody_waits_for_its_being_ready(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """A supervisor that has closed its descriptor does not end the service."""
    path = write(tmp_path / "c.yml", fake_dtrace())
    port = free_port()
    reading, writing = os.pipe()
    os.close(reading)
    with subprocess.Popen(
        [*EXPORTER, f"--web.listen-address=127.0.0.1:{port}", f"--config.file={path}"],
        env={**os.environ, cli.READY_FD: str(writing)},
        pass_fds=[writing],
        text=True,
    ) as process:
        os.close(writing)
        try:
            until(lambda: Exporter(process, port).get("/-/ready") == "ready\n")
        finally:
            process.terminate()
    assert process.returncode == 0


def test_never_ready(tmp_path: Path) -> None:
    """A service that fails to start closes the descriptor without a line."""
    reading, writing = os.pipe()
    with (
        subprocess.Popen(
            [*EXPORTER, f"--config.file={tmp_path}/no.yml"],
            env={**os.environ, cli.READY_FD: str(writing)},
            pass_fds=[writing],
            stderr=subprocess.PIPE,
        ) as process,
        open(reading, "rb") as end,  # noqa: PTH123
    ):
        os.close(writing)
        assert end.read() == b""
        assert process.wait(timeout=SECONDS) == cli.BAD_CONFIGURATION


@pytest.mark.parametrize("found", ["x", "-1", "99999", "9" * 30, "{reading}"])
def test_no_descriptor_to_be_ready_on(found: str, tmp_path: Path) -> None:
    """A variable that names no writable descriptor is an error, found before all others."""
    reading, writing = os.pipe()
    result = subprocess.run(
        [*EXPORTER, f"--config.file={write(tmp_path / 'c.yml', ['no'])}"],
        env={**os.environ, cli.READY_FD: found.format(reading=reading)},
        pass_fds=[reading],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    os.close(reading)
    os.close(writing)
    assert result.returncode == cli.BAD_CONFIGURATION
    assert re.fullmatch(
        rf"dtrace-exporter: {cli.READY_FD}: expected .* \(found '.*'\)\n", result.stderr
    )


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_descriptors(closed: str, tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """Without standard descriptors the service and check work as usual.

    /dev/null takes their numbers, so nothing can be printed into a client's connection.
    """
    path = write(tmp_path / "c.yml", fake_dtrace(READY, FOREVER))
    port = free_port()
    flags = f"--config.file={path} --web.listen-address=127.0.0.1:{port}"
    shell = ["sh", "-c", f"exec {' '.join(EXPORTER)} {flags} --log.level=debug {closed}"]
    with subprocess.Popen(shell, text=True) as process:
        try:
            exporter = Exporter(process, port)
            until(lambda: exporter.get("/-/ready") == "ready\n")
            assert exporter.get().endswith("\n")
            leads_to = [
                str(Path(f"/proc/{process.pid}/fd/{number}").readlink()) for number in range(3)
            ]
            assert leads_to.count(os.devnull) >= closed.count("&-")
        finally:
            process.terminate()
    assert process.returncode == 0
    checking = f"{' '.join(EXPORTER)} --config.file={path} check {closed}"
    done = subprocess.run(["sh", "-c", checking], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_signals_without_meaning(tmp_path: Path, fake_dtrace: FakeDTrace, saved: Path) -> None:
    """Signals that the service does not use do not end it, and its children do not ignore them."""
    command = fake_dtrace({"save": str(saved)}, READY, FOREVER)
    with serving("--config.file", write(tmp_path / "c.yml", command)) as exporter:
        until(lambda: exporter.get("/-/ready") == "ready\n")
        for number in ("USR1", "USR2", "ALRM", "VTALRM", "PROF", "IO", "PWR", "RTMIN", "RTMAX"):
            exporter.process.send_signal(getattr(signal, f"SIG{number}"))
        assert exporter.get("/-/healthy") == "healthy\n"
        status = Path(f"/proc/{pid_in(saved)}/status").read_text(encoding="utf-8")
        ignored = int(re.findall(r"SigIgn:\s+(\w+)", status)[0], 16)
        assert not ignored & 1 << signal.SIGUSR1 - 1
        exporter.process.terminate()
        assert exporter.process.wait(SECONDS) == 0


def test_asked_to_end_again_and_again(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """Repeated SIGTERMs, up to the last instruction, do not change the exit status."""
    path = write(tmp_path / "c.yml", fake_dtrace(READY, FOREVER))
    with serving("--config.file", path) as exporter:
        until(lambda: exporter.get("/-/ready") == "ready\n")
        # Without a pause a busy machine would only handle signals, and the service never end.
        while exporter.process.returncode is None:
            exporter.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                exporter.process.wait(0.005)
        assert exporter.process.returncode == 0


def test_version() -> None:
    """--version prints the versions of the exporter and of Python."""
    result = run("--version")
    assert result.returncode == 0
    assert result.stdout.startswith(f"dtrace-exporter {__version__} (Python 3.")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--nonsense",),
        ("--config.fil=x",),
        ("check", "--nonsense"),
        ("check", "--config.fil=x"),
        ("trace",),
        ("trace", "0"),
        ("trace", "65536"),
        ("trace", "\N{ARABIC-INDIC DIGIT TWO}"),
        ("nonsense",),
        ("--log.level=nonsense",),
    ],
)
def test_bad_usage(arguments: tuple[str, ...]) -> None:
    """Wrong arguments are refused with status 2 and the usage."""
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: ")


def test_flags_before_and_after_the_command(tmp_path: Path) -> None:
    """The configuration file may be given before or after the command."""
    path = write(tmp_path / "c.yml", ["true"], interval="250ms")
    before = run("--config.file", path, "program")
    after = run("program", f"--config.file={path}")
    assert before.stdout == after.stdout != run("program", "linux").stdout
    assert "tick-250ms" in before.stdout
    assert (before.returncode, after.returncode) == (0, 0)


def test_program() -> None:
    """The program is printed complete, with a value for every number."""
    result = run("program", "linux")
    assert (result.returncode, result.stderr) == (0, "")
    numbers = re.findall(r"^inline \w+ (\w+) = (\w+);", result.stdout, re.MULTILINE)
    assert {"PORT", "TURN", "LISTENDROPS"} <= dict(numbers).keys()
    assert all(number.isdigit() for _, number in numbers)
    assert result.stdout.startswith("#!/usr/sbin/dtrace -s\n")


def test_program_of_another_system(tmp_path: Path) -> None:
    """Every program can be printed on any system, with the values of the configuration."""
    offsets = {"conn_tcp": 0x20, "conn_lport": 0x102}
    path = write(tmp_path / "c.yml", ["true"], interval="1s", offsets=offsets, accept_wait=False)
    for name in ("illumos", "solaris10", "freebsd"):
        file = program.load(name)
        plain = run("program", name)
        expected = rendering.render(file, rendering.window(1.0))
        assert (plain.returncode, plain.stdout, plain.stderr) == (0, expected, "")
        numbers = program.offsets(offsets)
        changed = rendering.render(file, rendering.window(1.0), 0, numbers, ["accept_wait"])
        assert run("program", name, "--config.file", path).stdout == changed != expected


def test_program_of_the_kernel(
    fake_dtrace: FakeDTrace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the system's name does not determine the program, the command asks dtrace(1)."""
    monkeypatch.setattr(program, "local", lambda _: "")
    command = fake_dtrace({"functions": [["ip", "tcp_conn_request"]]})
    arguments = argparse.Namespace(name=None)
    config = Config(local=HostConfig(dtrace=DTraceConfig(command=tuple(command))))
    assert cli._program(arguments, config) == 0
    expected = rendering.render(program.load("solaris10"), rendering.window(1.0))
    assert capsys.readouterr().out == expected
    refusing = DTraceConfig(command=tuple(fake_dtrace({"unprivileged": True})))
    with pytest.raises(DTraceError, match="run as root"):
        cli._program(arguments, Config(local=HostConfig(dtrace=refusing)))


def test_program_that_is_none() -> None:
    """A program that does not exist gives one line of error."""
    result = run("program", "nonsense")
    assert (result.returncode, result.stdout) == (cli.BAD_CONFIGURATION, "")
    assert result.stderr.startswith("dtrace-exporter: cannot read the D program nonsense: ")


def test_program_for_a_reader_that_has_enough() -> None:
    """If the reader closes its end, as head(1) does, the command succeeds."""
    with subprocess.Popen(
        [*EXPORTER, "program", "linux"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_check_good(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """If everything works, check ends with 0, and also lists the parts that are left out."""
    steps = [{"refuse": "fbt::tcp_v*_syn_recv_sock:return"}, READY, FOREVER]
    path = write(tmp_path / "c.yml", fake_dtrace(*steps))
    result = run("check", "--config.file", path)
    lines = result.stdout.splitlines()
    assert result.returncode == 0
    assert any(re.match(r"ok +dtrace\(1\) +version 2\.0\.7", line) for line in lines)
    assert any(re.match(r"ok +session port-22 +up", line) for line in lines)
    assert any(re.match(r"no +ack_drops +.", line) for line in lines)
    assert any(re.match(r"ok +accepts\b", line) for line in lines)
    assert not any(line.startswith("FAIL") for line in lines)


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([{"unprivileged": True}], "run as root"),
        ([{"refuse": "fbt::tcp_conn_request:entry"}], "tcp_conn_request"),
        ([{"exit": 3}], "exit status 3"),
    ],
)
def test_check_bad(
    steps: list[dict[str, Any]], says: str, tmp_path: Path, fake_dtrace: FakeDTrace
) -> None:
    """If the core does not work, check gives the reason in dtrace(1)'s words, and ends with 1."""
    path = write(tmp_path / "c.yml", fake_dtrace(*steps))
    result = run("check", "--config.file", path)
    assert result.returncode == 1
    assert any(line.startswith("FAIL") and says in line for line in result.stdout.splitlines())


def test_check_of_hosts(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """Check tries other hosts whatever the own source is, and reports the error of each."""
    host = {"listeners": [{"port": 22}], "dtrace": {"command": fake_dtrace(), "program": "linux"}}
    silent = {"command": ["sh", "-c", "echo no route >&2; exit 255"], "program": "linux"}
    hosts = [{**host, "name": "good"}, {**host, "name": "bad", "dtrace": silent}]
    path = tmp_path / "c.yml"
    for source, dtrace in (("sock_diag", {}), ("dtrace", {"command": [str(tmp_path / "none")]})):
        config = {"source": source, "dtrace": dtrace, "hosts": hosts}
        path.write_text(json.dumps(config), encoding="utf-8")
        result = run("check", "--config.file", path)
        assert result.returncode == 1
        assert re.search(r"^ok +session good/port-22 +up$", result.stdout, re.MULTILINE)
        assert re.search(r"^FAIL +session bad/port-22 +.*no route", result.stdout, re.MULTILINE)
    path.write_text(json.dumps({"source": "sock_diag", "hosts": hosts[:1]}), encoding="utf-8")
    result = run("check", "--config.file", path)
    assert result.returncode == (0 if sys.platform == "linux" else 1), result.stdout


def test_check_without_dtrace(tmp_path: Path) -> None:
    """A missing dtrace(1) is reported, and is a failure if the source is dtrace."""
    path = write(tmp_path / "c.yml", [str(tmp_path / "nowhere")])
    result = run("check", "--config.file", path)
    assert result.returncode == 1
    assert "No such file or directory" in result.stdout


def test_check_says_what_to_do(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """Each failure comes with advice, and each part left out with the metrics it costs."""
    steps = [{"refuse": "fbt::tcp_v*_syn_recv_sock:return"}, READY, FOREVER]
    result = run("check", "--config.file", write(tmp_path / "c.yml", fake_dtrace(*steps)))
    costs = 'no dtrace_tcp_listen_drops_total{reason="q_full_ack"}'
    assert re.search(rf"^no      ack_drops +.*\n +-> {costs}$", result.stdout, re.MULTILINE)
    for command, advice in (
        ([str(tmp_path / "nowhere")], "install DTrace"),
        (fake_dtrace({"unprivileged": True}), "run as root"),
        (["sh", "-c", "echo Host key verification failed; exit 255"], "try the command by hand"),
        (["sh", "-c", "echo nonsense; exit 3"], "run it by hand"),
    ):
        result = run("check", "--config.file", write(tmp_path / "c.yml", command))
        assert result.returncode == 1
        assert re.search(rf"^FAIL  dtrace.*\n {{30}}-> {advice}", result.stdout, re.MULTILINE)


def test_check_of_too_many_sessions(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """If Linux has no room for a session's programs, check says how many sessions fit."""
    refusal = "Failed to enable fbt:vmlinux:tcp_conn_request:entry: Argument list too long"
    steps = [{"stderr": f"dtrace: could not enable tracing: {refusal}"}, {"exit": 1}]
    result = run("check", "--config.file", write(tmp_path / "c.yml", fake_dtrace(*steps)))
    assert result.returncode == 1
    said = rf"^FAIL  session .*{refusal}\n {{30}}-> Linux has room for 19 sessions"
    assert re.search(said, result.stdout, re.MULTILINE), result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="terminals elsewhere end otherwise")
def test_check_on_a_terminal(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """On a terminal the output has the same text, in colour, wrapped and with headings."""
    steps = [{"refuse": "fbt::tcp_v*_syn_recv_sock:return"}, READY, FOREVER]
    path = write(tmp_path / "c.yml", fake_dtrace(*steps))
    with on_terminal([*EXPORTER, "check", "--config.file", str(path)], 90) as screen:
        assert screen.end() == 0
    assert "\x1b[32mok    \x1b[0mconfiguration" in screen.text
    assert "\x1b[1;33mno    \x1b[0m  ack_drops" in screen.text
    lines = re.sub(r"\x1b\[[0-9;]*m", "", screen.text).splitlines()
    assert lines[0].split() == ["What", "Found"]
    assert max(len(line) for line in lines) <= 90
    plain = run("check", "--config.file", path).stdout
    assert " ".join(" ".join(lines[1:]).split()) == " ".join(plain.split())


SYN4 = "100,2026 Nov 22 08:00:00,syn,0:ffffc0a80102,40000,22,0,1,8"
SYN6 = "101,2026 Nov 22 08:00:00,drop:q_full,20010db800000000:1,40001,22,0,9,8"
PLAIN4 = "100,2026 Nov 22 08:00:00,syn,192.168.1.2,40000,22,0,1,8"
PLAIN6 = "101,2026 Nov 22 08:00:00,drop:q_full,2001:db8::1,40001,22,0,9,8"


@contextmanager
def tracing(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the trace of port 22, and end it in any case."""
    with subprocess.Popen(
        [*EXPORTER, "--config.file", str(path), "trace", "22"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_trace(
    number: signal.Signals, tmp_path: Path, saved: Path, fake_dtrace: FakeDTrace
) -> None:
    """Each line is printed at once, with addresses in their usual form, until a signal comes."""
    command = fake_dtrace({"save": str(saved)}, {"print": [HEADER, SYN4, SYN6]})
    with tracing(write(tmp_path / "c.yml", command)) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().rstrip("\n") for _ in range(3)]
        assert lines == [HEADER, PLAIN4, PLAIN6]
        pid = pid_in(saved)
        process.send_signal(number)
        _, errors = process.communicate(timeout=SECONDS)
        assert (process.returncode, errors) == (0, "")
        assert not is_alive(pid)
    start = json.loads(saved.read_text(encoding="utf-8"))
    assert "inline int PORT = 22;" in start["program"]


def test_trace_for_a_reader_that_has_enough(
    tmp_path: Path, saved: Path, fake_dtrace: FakeDTrace
) -> None:
    """If the reader closes its end, as head -1 does, the trace ends without a message."""
    go = tmp_path / "go"
    steps = [{"save": str(saved)}, {"print": HEADER}, {"wait": str(go)}, {"print": [SYN4] * 5000}]
    with tracing(write(tmp_path / "c.yml", fake_dtrace(*steps))) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == HEADER + "\n"
        process.stdout.close()
        go.touch()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(timeout=SECONDS) == 0
        assert not is_alive(pid_in(saved))


def test_trace_without_dtrace(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """If dtrace(1) cannot run, the error has advice, and the exit status is not 0."""
    nowhere = str(tmp_path / "no")
    result = run("--config.file", write(tmp_path / "c.yml", [nowhere]), "trace", "22")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"dtrace-exporter: trace needs dtrace(1): cannot start {nowhere}: No such file or"
        " directory; install DTrace, as docs/getting-dtrace.md says for each system, or set its"
        " path in dtrace.command; dtrace-exporter check says what this host could have\n"
    )
    path = write(tmp_path / "c.yml", fake_dtrace({"unprivileged": True}))
    result = run("--config.file", path, "trace", "22")
    assert result.returncode == 2
    first, then = result.stderr.splitlines()
    assert first == "dtrace: run as root for tracing and listing probes"
    assert then.startswith("dtrace-exporter: run as root (on Linux")


def test_trace_heeds_sigterm_where_dtrace_does_not(
    tmp_path: Path, saved: Path, fake_dtrace: FakeDTrace
) -> None:
    """If dtrace(1) does not end, the trace kills it after a while."""
    command = fake_dtrace({"save": str(saved)}, {"ignore": "SIGTERM"}, {"print": HEADER})
    with tracing(write(tmp_path / "c.yml", command)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(timeout=SECONDS) == 0
        assert not is_alive(pid_in(saved))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (SYN4, PLAIN4),
        (SYN6, PLAIN6),
        (HEADER, HEADER),
        ("", ""),
        ("a,b,c,x:y,1,2,3,4,5", "a,b,c,x:y,1,2,3,4,5"),
        ("a,b,c,1:10000000000000000,1,2,3,4,5", "a,b,c,1:10000000000000000,1,2,3,4,5"),
        ("a,b,c,0:0,1,2,3,4,5", "a,b,c,::,1,2,3,4,5"),
        ("dtrace: 5 drops on CPU 0", "dtrace: 5 drops on CPU 0"),
        ("\x1b]0;title\x07,\x9b2J", " ]0;title , 2J"),
    ],
)
def test_csv(line: str, expected: str) -> None:
    """An address gets its usual form; any other line loses its control characters only."""
    assert csv(line) == expected
