"""Remote hosts for the cases: each has its own sshd, at the far end of its own cable.

They share this machine's kernel, so the dtrace(1) of each of them, and the local one, see all
listeners of this machine.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp

from lab.exporter import LAST_RECORD, SETTLE_SECONDS, UP, Exporter, Metrics, runs
from lab.waiting import until

DTRACE = "/usr/sbin/dtrace"

SSH_CONFIG = """\
Host *
    IdentityFile /etc/dtrace-exporter/id_ed25519
    IdentitiesOnly yes
    UserKnownHostsFile /etc/dtrace-exporter/known_hosts
    StrictHostKeyChecking yes
    BatchMode yes
    ConnectTimeout 10
    ServerAliveInterval 4
    ServerAliveCountMax 2
    Compression yes
"""
"""The near side's ssh_config, as in docs/remote-hosts.md; a test compares the two."""
ALIVE_SECONDS = 4 * (2 + 1)
"""After this many seconds, ssh with this configuration gives up a silent server."""

_numbers = itertools.count()


class Far:
    """A host that is reached by ssh.

    Args:
        name: its name for ssh and the configuration.
        sshd: lines of sshd_config that come before its own.
        key_options: the options of the key in authorized_keys.
    """

    def __init__(self, name: str, sshd: str = "", key_options: str = "") -> None:
        self.name = name
        number = next(_numbers)
        self.near, self.address = (f"203.0.113.{4 * number + end}" for end in (1, 2))
        self._cable = f"far{number}"
        # sshd refuses files in a directory that everybody may write to, such as /tmp.
        self.directory = Path(mkdtemp(prefix=f"far-{name}-", dir="/root"))
        self._lay_cable()
        for key in ("host", "id"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.directory / key))
        self.trust(self.directory / "host.pub")
        key = (self.directory / "id.pub").read_text()
        (self.directory / "authorized_keys").write_text(f"{key_options} {key}".lstrip())
        (self.directory / "ssh_config").write_text(
            f"Host {name}\n    HostName {self.address}\n    User root\n"
            + SSH_CONFIG.replace(
                "/etc/dtrace-exporter/id_ed25519", str(self.directory / "id")
            ).replace("/etc/dtrace-exporter", str(self.directory))
        )
        (self.directory / "sshd_config").write_text(
            f"{sshd}"
            f"ListenAddress {self.address}\n"
            f"HostKey {self.directory}/host\n"
            f"AuthorizedKeysFile {self.directory}/authorized_keys\n"
            "PasswordAuthentication no\n"
            "KbdInteractiveAuthentication no\n"
            "UsePAM no\n"
            "PidFile none\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        with self.log_file.open("wb") as log:
            self._sshd = subprocess.Popen(
                # ip-netns(8) would hide the mounted tracefs.
                [
                    *("nsenter", f"--net=/run/netns/{self._cable}"),
                    *("/usr/sbin/sshd", "-D", "-e", "-f", str(self.directory / "sshd_config")),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(self._answers, f"sshd of {name} answers")

    @property
    def log_file(self) -> Path:
        """The log file of sshd."""
        return self.directory / "sshd.log"

    def command(self, *options: str, dtrace: tuple[str, ...] = (DTRACE,)) -> list[str]:
        """Return the command that runs dtrace(1) on this host; ``options`` are for ssh."""
        config = self.directory / "ssh_config"
        return ["ssh", "-F", str(config), *options, self.name, *dtrace]

    def trust(self, public_key: Path) -> None:
        """Let ssh accept only this key for the host."""
        line = f"{self.address} {public_key.read_text()}"
        (self.directory / "known_hosts").write_text(line)

    def consumers(self) -> list[int]:
        """Return the processes of dtrace(1) that sshd has started, oldest first."""
        return _descendants(self._sshd.pid, "dtrace")

    def sessions(self) -> list[int]:
        """Return the processes of sshd that serve a connection, oldest first."""
        return _descendants(self._sshd.pid, "sshd-session")

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Lose all packets, in both directions."""
        with self._emulated("loss", "100%"):
            yield

    @contextlib.contextmanager
    def slow(self, milliseconds: int, kilobytes: int) -> Iterator[None]:
        """Delay packets, and limit the kilobytes per second, in each direction."""
        with self._emulated("delay", f"{milliseconds}ms", "rate", f"{8 * kilobytes}kbit"):
            yield

    def give_up_soon(self) -> None:
        """Let the host's TCP give up a silent peer after seconds instead of 15 minutes."""
        netns = f"--net=/run/netns/{self._cable}"
        _run("nsenter", netns, "sysctl", "-q", "-w", "net.ipv4.tcp_retries2=5")

    def close(self) -> None:
        """Remove the host and everything that runs on it."""
        left = [self._sshd.pid, *_descendants(self._sshd.pid)]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._sshd.wait()
        until(lambda: not any(runs(pid) for pid in left), f"{self.name} is down")
        _run("ip", "netns", "delete", self._cable)
        _run("rm", "-r", str(self.directory))

    def _lay_cable(self) -> None:
        name = self._cable
        macs = [f"02:00:00:00:{end:02x}:{int(name[3:]):02x}" for end in (1, 2)]
        _run("ip", "netns", "add", name)
        veth = ("type", "veth", "peer", "name", name, "address", macs[1], "netns", name)
        _run("ip", "link", "add", name, "address", macs[0], *veth)
        ends = (self.near, self.address)
        for ip, this, other in ((["ip"], 0, 1), (["ip", "-n", name], 1, 0)):
            _run(*ip, "address", "add", f"{ends[this]}/30", "dev", name)
            _run(*ip, "link", "set", name, "up")
            # As behind a router, no error is sent if the host on a cut cable does not answer.
            neighbour = ("lladdr", macs[other], "dev", name, "nud", "permanent")
            _run(*ip, "neigh", "replace", ends[other], *neighbour)

    @contextlib.contextmanager
    def _emulated(self, *netem: str) -> Iterator[None]:
        ends = [["tc"], ["tc", "-n", self._cable]]
        device = ("dev", self._cable, "root")
        for tc in ends:
            _run(*tc, "qdisc", "add", *device, "netem", *netem)
        try:
            yield
        finally:
            for tc in ends:
                _run(*tc, "qdisc", "delete", *device)

    def _answers(self) -> bool:
        assert self._sshd.poll() is None, self.log_file.read_text()
        try:
            socket.create_connection((self.address, 22), timeout=1).close()
        except OSError:
            return False
        return True


MakeFar = Callable[..., Far]
"""The fixture ``far``: takes what Far takes."""


def near_ends(exporter: Exporter) -> list[int]:
    """Return the processes of ssh that an exporter has started, oldest first."""
    return _descendants(exporter.process.pid, "ssh")


def settle(exporter: Exporter) -> Metrics:
    """Wait until all events so far are in the metrics of all sessions that are up."""
    since = time.time() + SETTLE_SECONDS

    def told() -> bool:
        metrics = exporter.metrics(UP, LAST_RECORD)
        last = {frozenset(have.items()): value for have, value in metrics.select(LAST_RECORD)}
        up = [frozenset(have.items()) for have, value in metrics.select(UP) if value]
        return bool(up) and all(last.get(session, 0.0) > since for session in up)

    until(told, "two ticks of every session", every=0.25)
    return exporter.metrics()


def gone_after(pids: list[int], seconds: float) -> float:
    """Wait until processes have ended; return how many seconds it took."""
    start = time.monotonic()
    until(lambda: not any(runs(pid) for pid in pids), f"{pids} are gone", seconds)
    return time.monotonic() - start


def note(text: str) -> None:
    """Write a measurement to the guest's console, which is in the run's log."""
    Path("/dev/console").write_text(f"measured: {text}\n")


def _descendants(ancestor: int, name: str = "") -> list[int]:
    """Return the descendants of a process with a name, oldest first."""
    parents: dict[int, tuple[int, str]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = stat.read_text().rpartition(") ")
        except OSError:
            continue
        state, parent = rest.split()[:2]
        if state not in "ZX":
            parents[int(stat.parent.name)] = int(parent), head.partition(" (")[2]

    def below(pid: int) -> bool:
        parent = parents.get(pid, (0, ""))[0]
        return parent == ancestor or (parent > 1 and below(parent))

    return sorted(
        pid for pid, (_, comm) in parents.items() if (not name or comm == name) and below(pid)
    )


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"
