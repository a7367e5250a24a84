"""The units of systemd/ under a real systemd, which also runs these cases; see ../systemd.sh."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from lab.exporter import COMMAND, Metrics, free_port, runs
from lab.far import DTRACE, Far
from lab.report import note
from lab.traffic import Clients, Listen
from lab.waiting import until

UNIT = "dtrace-exporter.service"
SOCKET = "dtrace-exporter.socket"
CONFIG = Path("/etc/dtrace-exporter/dtrace_exporter.yml")
ARGUMENTS = Path("/etc/default/dtrace-exporter")
GUIDE = Path("/opt/dtrace-exporter/docs/operations.md")
READY_SECONDS = 200
SYNS = "dtrace_tcp_listen_syns_total"


def systemctl(*words: str) -> str:
    """Run systemctl, which must succeed, and return its output."""
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{words}: {done.stderr}{journal()}"
    return done.stdout.strip()


def show(name: str) -> str:
    """Return a property of the service."""
    return systemctl("show", "--value", "-p", name, UNIT)


def journal() -> str:
    """Return the service's lines in the journal."""
    command = ["journalctl", "--no-pager", "-o", "cat", "-u", UNIT]
    return subprocess.run(command, capture_output=True, text=True).stdout


def get(path: str) -> tuple[int, str]:
    """Return the status and body of a request; status 0 if there is no answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:9748{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return 0, ""


def wait_ready() -> None:
    """Wait until the sessions are up and systemd shows it."""
    try:
        until(lambda: get("/-/ready")[0] == 200, "/-/ready answers 200", READY_SECONDS, every=0.5)
        until(lambda: "2 of 2 sessions up" in show("StatusText"), "the status says it")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{journal()}") from None


def processes() -> dict[str, int]:
    """Return the processes of the service by name."""
    group = Path("/sys/fs/cgroup") / show("ControlGroup").lstrip("/") / "cgroup.procs"
    found = {}
    for pid in group.read_text().split():
        found[Path(f"/proc/{pid}/comm").read_text().strip()] = int(pid)
    return found


def counts(port: int, listen: Listen, clients: Clients) -> None:
    """Check that a listener's SYNs are counted."""
    listen(port, 8)
    clients.connect(3, port)
    until(
        lambda: Metrics(get("/metrics")[1]).value(SYNS, port=port) == 3,
        "three SYNs are counted",
        every=0.5,
    )


def test_boot(port: int, listen: Listen, clients: Clients) -> None:
    """The enabled service starts at boot, counts, and has only the rights that its unit leaves."""
    assert systemctl("is-enabled", UNIT) == "enabled"
    wait_ready()
    assert show("NRestarts") == "0"
    assert 'source=dtrace why="dtrace(1) is there and may be used"' in journal()
    counts(port, listen, clients)
    main, consumer = int(show("MainPID")), processes()["dtrace"]
    for pid in (main, consumer):
        status = Path(f"/proc/{pid}/status").read_text()
        # CAP_SYS_ADMIN is 21, CAP_SYSLOG 34. Without CAP_SETPCAP the unit's bounding set stays,
        # with CAP_SYS_PTRACE, 19, which no program can get any more.
        for kind, more in (("Prm", 0), ("Eff", 0), ("Bnd", 1 << 19)):
            assert f"Cap{kind}:\t{1 << 21 | 1 << 34 | more:016x}\n" in status
        assert "NoNewPrivs:\t1\n" in status
        assert "Seccomp:\t2\n" in status
    # A path that the unit hides is an empty file or directory without permissions.
    for secret in ("etc/shadow", "etc/wireguard", "run/systemd/private"):
        state = Path(f"/proc/{main}/root/{secret}").stat()
        assert (stat.S_IMODE(state.st_mode), state.st_uid) == (0, 0), secret
        assert stat.S_IMODE(Path(f"/{secret}").stat().st_mode), secret
    variables = Path(f"/proc/{consumer}/environ").read_text().split("\0")
    names = {line.partition("=")[0] for line in variables} - {""}
    assert names <= {"HOME", "LOGNAME", "PATH", "TZ", "USER", "LC_ALL"}
    assert "LC_ALL=C" in variables
    assert not Path(f"/proc/{consumer}/exe").readlink().name.endswith("sh")
    written = Path("/tmp").glob("systemd-private-*dtrace-exporter*/**/*")
    assert [path for path in written if path.is_file()] == []


def by_ss(port: int) -> str:
    """Return the cgroup of a port's listener, as in ss(8)."""
    command = ["ss", "-Hltn", "--cgroup", "sport", "=", f":{port}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return "".join(re.findall(r"cgroup:(\S+)", done.stdout))


def test_owners(port: int) -> None:
    """Listeners of a unit, and of a socket that systemd opened, have the unit's name."""
    wait_ready()
    server = f"import socket, time; s = socket.create_server(('', {port})); time.sleep(600)"
    run = ["systemd-run", "--quiet", "--collect"]
    subprocess.run([*run, "--unit=web", sys.executable, "-c", server], check=True)
    activated = free_port()
    listens = f"--socket-property=ListenStream=127.0.0.1:{activated}"
    subprocess.run([*run, "--unit=door", listens, "/bin/sleep", "600"], check=True)

    def units() -> list[str]:
        metrics = Metrics(get("/metrics")[1])
        found = [metrics.select("dtrace_tcp_listen_info", port=each) for each in (port, activated)]
        return [labels["unit"] for each in found for labels, _ in each]

    try:
        names = [
            systemctl("show", "--value", "-p", "Id", unit)
            for unit in ("web.service", "door.socket")
        ]
        try:
            until(lambda: units() == names, f"the units are {names}", 150, every=0.5)
        except AssertionError as error:
            seen = units(), by_ss(port), by_ss(activated)
            raise AssertionError(f"{error}; {seen}\n{journal()}") from None
        assert by_ss(port) == systemctl("show", "--value", "-p", "ControlGroup", "web.service")
        assert f"127.0.0.1:{activated} door.socket" in " ".join(systemctl("list-sockets").split())
    finally:
        systemctl("stop", "web.service", "door.socket")


def test_verify() -> None:
    """The units are valid, and the service's exposure level is the one in the guide."""
    analyze = ["systemd-analyze", "--no-pager"]
    done = subprocess.run(
        [*analyze, "verify", "--man=no", UNIT, SOCKET], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    text = subprocess.run([*analyze, "security", UNIT], capture_output=True, text=True).stdout
    (figure,) = re.findall(r"Overall exposure level for \S+: (\d+\.\d)", text)
    note(f"systemd-analyze security: {figure}")
    assert f"`systemd-analyze security` gives it {figure} " in " ".join(GUIDE.read_text().split())


def test_reload() -> None:
    """A reload keeps the process, and a bad file changes nothing."""
    wait_ready()
    main, consumer = show("MainPID"), processes()["dtrace"]
    good = CONFIG.read_text()
    systemctl("reload", UNIT)
    until(lambda: 'msg="reloaded"' in journal(), "it has reloaded")
    CONFIG.write_text("nonsense: 1\n")
    systemctl("reload", UNIT)
    until(lambda: 'msg="reload failed"' in journal(), "the reload has failed")
    CONFIG.write_text(good)
    systemctl("reload", UNIT)
    until(lambda: journal().count('msg="reloaded"') == 2, "it has reloaded again")
    assert (show("MainPID"), processes()["dtrace"]) == (main, consumer)
    assert show("ActiveState") == "active"


def test_watchdog() -> None:
    """If the event loop stops, the watchdog ends the service, and systemd restarts it."""
    wait_ready()
    had = processes()
    main = int(show("MainPID"))
    os.kill(main, signal.SIGSTOP)
    until(lambda: show("NRestarts") == "1", "it has been started again", READY_SECONDS, every=0.5)
    assert "Watchdog timeout" in journal()
    wait_ready()
    assert int(show("MainPID")) != main
    assert not any(runs(pid) for pid in had.values())


def test_stop() -> None:
    """The service stops at once and cleanly, with all of its processes."""
    wait_ready()
    had = processes()
    assert "dtrace" in had
    systemctl("stop", UNIT)
    assert (show("ActiveState"), show("Result")) == ("inactive", "success")
    assert not any(runs(pid) for pid in had.values())


def test_bad_configuration() -> None:
    """With a bad file the service does not start, says where the error is, and is not restarted."""
    good = CONFIG.read_text()
    CONFIG.write_text("listeners: [{port: 0}]\n")
    try:
        done = subprocess.run(["systemctl", "start", UNIT], capture_output=True, timeout=200)
        assert done.returncode != 0
        assert (show("ActiveState"), show("ExecMainStatus")) == ("failed", "78")
        assert show("NRestarts") == "0"
        assert f"{CONFIG}:1: listeners[0].port" in journal()
    finally:
        CONFIG.write_text(good)
        systemctl("reset-failed", UNIT)


def test_socket_and_ssh(port: int, listen: Listen, clients: Clients) -> None:
    """With the socket unit, the first connection starts the service and waits for its answer.

    The service can watch another host, because ssh runs inside the unit.
    """
    arguments, config = ARGUMENTS.read_text(), CONFIG.read_text()
    ARGUMENTS.write_text(arguments.replace('yml"', 'yml --web.systemd-socket"'))
    far = Far("east")
    try:
        # A place that the service can read, because it has no home.
        here = shutil.copytree(far.directory, CONFIG.parent / "east")
        ssh_config = (here / "ssh_config").read_text().replace(str(far.directory), str(here))
        (here / "ssh_config").write_text(ssh_config)
        command = ["ssh", "-F", str(here / "ssh_config"), "east", DTRACE]
        host = {"name": "east", "dtrace": {"command": command, "program": "linux"}}
        hosts = [{**host, "listeners": [{"port": port}]}]
        CONFIG.write_text(json.dumps({"source": "sock_diag", "hosts": hosts}))
        systemctl("start", SOCKET)
        with socket.create_connection(("127.0.0.1", 9748)) as early:
            early.settimeout(READY_SECONDS)
            early.sendall(b"GET /-/healthy HTTP/1.0\r\n\r\n")
            assert early.recv(4096).startswith(b"HTTP/1.1 200")
        wait_ready()
        counts(port, listen, clients)
        assert "ssh" in processes()
        # During the restart, connections wait.
        systemctl("restart", UNIT)
        assert get("/-/healthy") == (200, "healthy\n")
        systemctl("stop", SOCKET, UNIT)
    finally:
        ARGUMENTS.write_text(arguments)
        CONFIG.write_text(config)
        far.close()


@pytest.mark.parametrize(
    ("less", "says"),
    [
        (["--bounding-set", "-sys_admin"], "Permission denied"),
        (
            [
                *["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=+all"],
                "--ambient-caps=+all",
            ],
            "run as root for tracing and listing probes",
        ),
    ],
    ids=["CAP_SYS_ADMIN", "root"],
)
def test_privileges(less: list[str], says: str) -> None:
    """Without CAP_SYS_ADMIN, or as another user with all capabilities, dtrace(1) refuses."""
    done = subprocess.run(
        ["setpriv", *less, *COMMAND, "check"], capture_output=True, text=True, timeout=400
    )
    (line,) = (line for line in done.stdout.splitlines() if line.split()[1:2] == ["dtrace(1)"])
    assert line.startswith("no ")
    assert says in line
