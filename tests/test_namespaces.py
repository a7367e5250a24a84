"""Other network namespaces: their listeners are read as ss shows them, and none is kept alive."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from lab.waiting import until

from dtrace_exporter import capabilities as possible
from dtrace_exporter import inet_diag, namespace_finder, namespaces
from dtrace_exporter.capabilities import SYS_ADMIN, SYS_PTRACE
from dtrace_exporter.listeners import ListenerTable, SessionId
from dtrace_exporter.namespace_finder import END, MOST_FILES, REFUSED, THERE, Finder
from dtrace_exporter.namespaces import Namespaces
from dtrace_exporter.sock_diag import CAPABILITIES, SockDiagSource, read
from dtrace_exporter.watched import Watched
from exporter_process import EXPORTER, SECONDS, Exporter, is_alive, serving
from host_tools import require

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux' own")

SESSION = SessionId("", "sock_diag")
_NOBODY = 65534
_names = count(1)

# It listens on a port, holds clients that nobody accepts, and says when it is ready.
_LISTEN = """
import socket, subprocess, sys
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
port, q, more, half_open = map(int, sys.argv[1:])
listener = socket.create_server(("127.0.0.1", port), backlog=max(q - 1, 0))
clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(q)]
for _ in range(more):
    clients.append(socket.socket())
    clients[-1].setblocking(False)
    clients[-1].connect_ex(("127.0.0.1", port))
# With TCP_DEFER_ACCEPT a connection without data stays half open, see tcp(7).
deferring = socket.create_server(("127.0.0.1", port + 1))
deferring.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 60)
clients += [socket.create_connection(("127.0.0.1", port + 1)) for _ in range(half_open)]
print("ready", flush=True)
sys.stdin.read()
"""


class Container:
    """A process in its own network namespace, with listeners on 127.0.0.1."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.place = str(Path(f"/proc/{process.pid}/ns/net").stat().st_ino)

    def ss(self, port: int) -> list[tuple[int, int, int]]:
        """Return Q, Qmax and drops of a port, as ss shows them in the namespace."""
        output = self._ss("-lntmH", port)
        found = re.findall(r"LISTEN\s+(\d+)\s+(\d+)[^\n]*\n?[^\n]*\bd(\d+)\)", output)
        return [(int(q), int(qmax), int(drops)) for q, qmax, drops in found]

    def half_open(self, port: int) -> int:
        """Return the half-open connections of a port, as ss shows them in the namespace."""
        return self._ss("-tnH", "state", "syn-recv", port).count("\n")

    def listen_drops(self) -> int:
        """Return ListenDrops, as nstat shows it in the namespace."""
        output = self._run(require("nstat", "iproute2"), "-asz", "TcpExtListenDrops")
        return int(re.findall(r"^TcpExtListenDrops +(\d+)", output, re.MULTILINE)[0])

    def _ss(self, *arguments: str | int) -> str:
        *flags, port = arguments
        return self._run(require("ss", "iproute2"), *map(str, flags), f"sport = :{port}")

    def _run(self, *command: str) -> str:
        enter = ["nsenter", f"--target={self.process.pid}", "--net"]
        done = subprocess.run([*enter, *command], capture_output=True, text=True, check=True)
        return done.stdout

    def end(self) -> None:
        """End the process, and with it the namespace."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def container() -> Iterator[Callable[..., Container]]:
    """Return a function that starts a container with clients in Q, dropped, or half open."""
    unshare = [require("unshare", "util-linux"), "--net"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no network namespace can be made here")
    with ExitStack() as stack:

        def start(port: int = 7200, q: int = 1, more: int = 0, half_open: int = 0) -> Container:
            numbers = map(str, (port, q, more, half_open))
            command = [*unshare, sys.executable, "-c", _LISTEN, *numbers]
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            return Container(process)

        yield start


@pytest.fixture
def mount() -> Iterator[Callable[[int], Path]]:
    """Return a function that mounts a process's network namespace, as ip-netns(8) does."""
    mounted = []

    def at(pid: int) -> Path:
        path = Path(f"/run/netns/a b{os.getpid()}-{next(_names)}")
        path.parent.mkdir(exist_ok=True)
        path.touch()
        subprocess.run(["mount", "--bind", f"/proc/{pid}/ns/net", path], check=True)
        mounted.append(path)
        return path

    yield at
    for path in mounted:
        subprocess.run(["umount", path], capture_output=True)
        path.unlink()


@contextmanager
def looking(most: int = 1000) -> Iterator[Namespaces]:
    """Yield namespaces after their first look."""
    found = Namespaces()
    try:
        found.begin(most)
        found.look()
        yield found
    finally:
        found.close()


def places(found: Namespaces) -> set[str]:
    """Look again, and return the namespaces that were found."""
    found.look()
    return {one.place for one in found}


def descriptors() -> int:
    """Return the number of descriptors that this process has open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_same_as_ss(container: Callable[..., Container]) -> None:
    """Two namespaces have the same port: each has the Q, Qmax and drops that ss shows there."""
    both = [container(q=2, more=5), container(q=4)]
    table, source = ListenerTable(), SockDiagSource()
    table.watch(SESSION, Watched(), CAPABILITIES)

    def same() -> bool:
        before = [one.ss(7200) for one in both]
        list(source.update(table, SESSION, read(found, source.open)))
        ours = {
            one.identity.place: [(queues.q, queues.q_limit, one.drops["unknown"])]
            for one in table
            if one.identity.port == 7200 and (queues := one.queues)
        }
        mine = [ours[one.place] for one in both]
        # The kernel may drop repeated SYNs between the two readings.
        return before == mine == [one.ss(7200) for one in both]

    with looking() as found:
        until(same)
        until(lambda: both[0].ss(7200)[0][2] > 5, "a SYN is sent again")
        until(same)
    assert [one.ss(7200)[0][:2] for one in both] == [(2, 1), (4, 3)]


def test_drops_are_what_the_namespace_has_dropped(container: Callable[..., Container]) -> None:
    """Only discards that ListenDrops of the namespace has as well are counted as drops."""
    both = [container(q=2, more=5), container(q=2, half_open=4)]
    table, source = ListenerTable(), SockDiagSource()
    table.watch(SESSION, Watched(), CAPABILITIES)

    def counted() -> list[list[int]]:
        list(source.update(table, SESSION, read(found, source.open)))
        drops = {one.identity[1:]: one.drops["unknown"] for one in table}
        return [[drops[one.place, "127.0.0.1", port] for port in (7200, 7201)] for one in both]

    def same() -> bool:
        before = both[0].listen_drops()
        # The kernel may drop repeated SYNs between the two readings.
        return counted() == [[before, 0], [0, 0]] and before == both[0].listen_drops()

    with looking() as found:
        until(same)
        least = both[0].listen_drops() + 1
        until(lambda: both[0].listen_drops() >= least, "a SYN is sent again")
        until(same)
    assert both[1].ss(7201)[0][2] >= 4


def test_half_open(container: Callable[..., Container]) -> None:
    """Q0 of a listener has only the connections of its own namespace, as ss shows them there."""
    both = [container(half_open=2), container(half_open=3)]
    table, source = ListenerTable(), SockDiagSource()
    table.watch(SESSION, Watched(), CAPABILITIES)
    with looking() as found:
        list(source.update(table, SESSION, read(found, source.open)))
    q0 = {
        one.identity.place: queues.q0
        for one in table
        if one.identity.port == 7201 and (queues := one.queues)
    }
    assert [q0[one.place] for one in both] == [one.half_open(7201) for one in both] == [2, 3]


def test_ends_with_its_last_process(container: Callable[..., Container]) -> None:
    """A namespace that only our socket keeps alive is released, and ends."""
    one, other = container(), container()
    link = f"w{os.getpid()}"
    pair = ["ip", "link", "add", link, "type", "veth", "peer", "name", "inner"]
    paired = subprocess.run([*pair, "netns", str(one.process.pid)], capture_output=True).returncode
    with looking() as found:
        assert {one.place, other.place} <= places(found)
        [ours] = [each for each in found if each.place == one.place]
        assert ours.netstat is not None
        was = os.fstat(ours.netstat)
        one.end()
        assert one.place not in places(found)
        assert other.place in places(found)
        assert ours.netlink.fileno() < 0
        # Its number may be another file's by now.
        with suppress(OSError):
            assert not os.path.samestat(os.fstat(ours.netstat), was)
        # The interfaces of a namespace end with it, and so do their peers.
        if not paired:
            until(lambda: not Path("/sys/class/net", link).exists())


def test_mounted(container: Callable[..., Container], mount: Callable[[int], Path]) -> None:
    """A namespace without a process exists as long as it is mounted, as by ip-netns(8)."""
    one = container()
    path = mount(one.process.pid)
    with looking() as found:
        assert one.place in places(found)
        one.end()
        assert one.place in places(found)
        subprocess.run(["umount", path], check=True)
        assert one.place not in places(found)


def test_more_than_there_is_room_for(
    container: Callable[..., Container], caplog: pytest.LogCaptureFixture
) -> None:
    """Namespaces beyond the limit are left out, which is logged once; an ended one makes room."""
    both = {one.place: one for one in (container(), container())}
    # This host may have other namespaces, too.
    with looking() as found:
        there = len(places(found))
    with looking(most=there - 1) as found:
        for _ in range(3):
            assert len(places(found)) == there - 1
        assert "dtrace.limits.places" in found.why_not
        assert [record.message for record in caplog.records] == ["network namespaces left out"]
        first = next(one for one in found if one.place in both)
        both.pop(first.place).end()
        until(lambda: next(iter(both)) in places(found))
        assert found.why_not == ""


def test_cookies(container: Callable[..., Container]) -> None:
    """Each use of an inode has its own cookie, so the table starts the counters again."""
    with looking() as found:
        seen = []
        for _ in range(3):
            one = container()
            assert one.place in places(found)
            seen += [other.cookie for other in found if other.place == one.place]
            one.end()
            assert one.place not in places(found)
    assert len(set(seen)) == 3


def test_an_answer_given_up(container: Callable[..., Container]) -> None:
    """An answer that was only partly read does not spoil the next one on the same socket."""
    one = container(q=3)
    with looking() as found:
        [netlink] = [other.netlink for other in found if other.place == one.place]
        for _ in range(2):
            next(inet_diag._dump(netlink, 10))
            sample, _ = sorted(inet_diag.listeners(netlink=netlink))
            assert sample[:4] == ("127.0.0.1", 7200, 3, 2)


def test_one_that_cannot_be_read(
    container: Callable[..., Container], caplog: pytest.LogCaptureFixture
) -> None:
    """A namespace that cannot be read does not affect the numbers of the others."""
    one, other = container(), container()
    with looking() as found:
        [netlink] = [each.netlink for each in found if each.place == one.place]
        netlink.close()
        there = {reading.place for reading in read(found, {})}
    assert other.place in there
    assert "" in there
    assert one.place not in there
    assert [record.message for record in caplog.records] == ["network namespace not read"]


def test_what_looks_ends(
    container: Callable[..., Container], caplog: pytest.LogCaptureFixture
) -> None:
    """If the finder process ends, all namespaces are released, which is logged once."""
    container()
    before = descriptors()
    with looking() as found:
        assert len(found)
        assert found.pid is not None
        os.kill(found.pid, signal.SIGKILL)
        for _ in range(2):
            found.look()
            assert len(found) == 0
        assert found.why_not
    assert descriptors() == before
    assert [record.message for record in caplog.records] == ["network namespaces left out"]


def test_no_descriptor_is_left(container: Callable[..., Container]) -> None:
    """If not all files of a namespace can be received, that is reported, and none stays open."""
    one = container()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = Namespaces()
    found.begin(1000)
    with ExitStack() as stack:
        stack.callback(found.close)
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        most = max(map(int, os.listdir("/proc/self/fd"))) + 9  # noqa: PTH208
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
        with ExitStack() as files:
            with suppress(OSError):
                while True:
                    last = files.enter_context(Path(os.devnull).open())
            last.close()
            found.look()
            assert len(found) == 0
            assert found.why_not == os.strerror(errno.EMFILE)
            # None of the received files stays open.
            Path(os.devnull).open().close()
        assert one.place not in {other.place for other in found}


def test_netstat_of_another_namespace(container: Callable[..., Container]) -> None:
    """If the kernel opens another namespace's netstat, the finder does not pass it on."""
    one = container()
    with pytest.MonkeyPatch.context() as patched:
        # As before Linux 5.0, where the path led to the namespace that was entered before.
        patched.setattr(namespace_finder, "_NETSTAT", f"/proc/{one.process.pid}/net/netstat")
        finder = Finder(1000)
        counts = [len(opened) for _, opened in finder.look() if opened]
    assert {*counts} == {1}
    assert {len(opened) for _, opened in Finder(1000).look() if opened} == {MOST_FILES}


def test_it_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the finder cannot be started, that is reported, and only this namespace is read."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    before = descriptors()
    with looking() as found:
        assert len(found) == 0
        assert [reading.place for reading in read(found, {})] == [""]
        assert found.why_not.startswith("cannot start")
    assert descriptors() == before
    assert len(caplog.records) == 1


_UNPRIVILEGED = """
import logging
from dtrace_exporter.namespaces import Namespaces
from dtrace_exporter.watched import Watched
logging.basicConfig(format="%(message)s")
found = Namespaces()
found.begin(1000)
for _ in range(3):
    found.look()
print(len(found), found.why_not)
found.close()
"""


def test_no_permission(container: Callable[..., Container], mount: Callable[[int], Path]) -> None:
    """A lack of permission to enter namespaces is logged once, and only our own one is read."""
    mount(container().process.pid)
    without = [require("setpriv", "util-linux"), "--bounding-set=-all", "--inh-caps=-all"]
    done = subprocess.run(
        [*without, sys.executable, "-c", _UNPRIVILEGED], capture_output=True, text=True, check=True
    )
    assert done.stdout == "0 Operation not permitted\n"
    assert done.stderr == "network namespaces left out\n"


def test_check(
    container: Callable[..., Container], mount: Callable[[int], Path], tmp_path: Path
) -> None:
    """The command check reports the number of readable namespaces, or why others cannot be read."""
    mount(container().process.pid)
    path = tmp_path / "c.yml"
    path.write_text("source: sock_diag", encoding="utf-8")
    command = [*EXPORTER, "check", f"--config.file={path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert re.search(
        r"^ok +sock_diag .* of \d+ sockets in \d+ network namespaces$", done.stdout, re.MULTILINE
    )
    without = [require("setpriv", "util-linux"), "--bounding-set=-all", "--inh-caps=-all"]
    done = subprocess.run([*without, *command], capture_output=True, text=True, timeout=SECONDS)
    assert re.search(r"^ok +sock_diag .* of \d+ sockets$", done.stdout, re.MULTILINE)
    assert re.search(r"^no +other namespaces +Operation not permitted$", done.stdout, re.MULTILINE)
    assert done.returncode == 0
    assert done.stderr == ""


def test_check_where_nobody_listens(
    container: Callable[..., Container], mount: Callable[[int], Path], tmp_path: Path
) -> None:
    """Check looks for a port in its entry's namespace, and gives no hint if it may not look."""
    away = container()
    name = mount(away.process.pid).name
    listeners = [
        {"ports": [7200, 7300], "netns": name, "name": "by name"},
        {"ports": [7201, 7301], "netns": away.place, "name": "by inode"},
        {"port": 7201, "netns": namespaces.own(), "name": "here"},
        {"port": 7200, "netns": "1", "name": "nowhere"},
    ]
    path = tmp_path / "c.yml"
    path.write_text(json.dumps({"source": "sock_diag", "listeners": listeners}), encoding="utf-8")
    command = [*EXPORTER, "check", "--format=json", f"--config.file={path}"]

    def hints(*before: str) -> set[str]:
        done = subprocess.run([*before, *command], capture_output=True, text=True, timeout=SECONDS)
        findings = json.loads(done.stdout)["findings"]
        return {
            one["found"]
            for one in findings
            if one["result"] == "hint" and one["what"].startswith(("listener", "netns"))
        }

    here = f"nobody listens at port 7201 in the network namespace {namespaces.own()}"
    assert hints() == {
        f"nobody listens at port 7300 in the network namespace {name}",
        f"nobody listens at port 7301 in the network namespace {away.place}",
        here,
        "no network namespace has the inode 1 now",
    }
    without = [require("setpriv", "util-linux"), "--bounding-set=-all", "--inh-caps=-all"]
    assert hints(*without) == {here}


def test_the_service(container: Callable[..., Container], tmp_path: Path) -> None:
    """The service has no capabilities; only its finder has two, and ends with the service."""
    one = container(q=2)
    path = tmp_path / "c.yml"
    path.write_text("source: sock_diag", encoding="utf-8")
    wanted = f'q_length{{address="127.0.0.1",listener="",netns="{one.place}",port="7200"}} 2.0'
    with serving(f"--config.file={path}") as exporter:
        until(lambda: wanted in exporter.get())
        pid = exporter.process.pid
        threads = [*Path(f"/proc/{pid}/task").glob("*/status")]
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert [capabilities(path) for path in threads] == [(0, 1)] * len(threads)
        [finder] = [int(child) for child in children]
        two = 1 << SYS_ADMIN | 1 << SYS_PTRACE
        assert capabilities(Path(f"/proc/{finder}/status")) == (two, 1)
        opened = [str(each.readlink()) for each in Path(f"/proc/{finder}/fd").iterdir()]
        assert len([each for each in opened if each.startswith("socket:")]) == 1
        one.end()
        until(lambda: wanted not in exporter.get())
        exporter.process.kill()
        exporter.process.wait(SECONDS)
        until(lambda: not is_alive(finder))


def test_nobody_scrapes(container: Callable[..., Container], tmp_path: Path) -> None:
    """Without scrapes, too, a namespace ends within seconds of its last process."""
    one = container()
    path = tmp_path / "c.yml"
    path.write_text("source: sock_diag", encoding="utf-8")
    with serving(f"--config.file={path}") as exporter:
        until(lambda: f'netns="{one.place}"' in exporter.get())
        sockets = Path(f"/proc/{exporter.process.pid}/fd")
        before = len([*sockets.iterdir()])
        one.end()
        until(lambda: len([*sockets.iterdir()]) < before)
        exporter.process.terminate()
        assert exporter.process.wait(SECONDS) == 0


def test_sampled(container: Callable[..., Container], tmp_path: Path) -> None:
    """Q is also sampled in other namespaces, and is the Q of the listener there."""
    one = container(q=2)
    path = tmp_path / "c.yml"
    path.write_text("{source: sock_diag, sock_diag: {sample_interval: 20ms}}", encoding="utf-8")
    labels = f'address="127.0.0.1",listener="",netns="{one.place}",port="7200"'

    def sampled() -> tuple[float, float]:
        """Return the number of samples and their sum."""
        name = "dtrace_tcp_listen_q_sampled_ratio"
        text = exporter.get()
        found = [
            float(value)
            for suffix in ("count", "sum")
            for value in re.findall(f"^{name}_{suffix}{{{labels}}} (.+)$", text, re.MULTILINE)
        ]
        return (found[0], found[1]) if len(found) == 2 else (0.0, 0.0)

    with serving(f"--config.file={path}") as exporter:
        until(lambda: sampled()[0] >= 3)
        # Q is 2 and Qmax is 1.
        count, total = sampled()
        assert total == 2 * count


def test_page(container: Callable[..., Container], tmp_path: Path) -> None:
    """After the finder has ended, the page says that namespaces are left out, and why."""
    one = container()
    path = tmp_path / "c.yml"
    path.write_text("source: sock_diag", encoding="utf-8")
    with serving(f"--config.file={path}") as exporter:
        until(lambda: f'netns="{one.place}"' in exporter.get())
        assert "may be missing:" not in exporter.get("/")
        pid = exporter.process.pid
        finder = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
        os.kill(int(finder), signal.SIGKILL)
        until(
            lambda: (
                "may be missing: the process that looks for them has failed" in exporter.get("/")
            )
        )


def names(exporter: Exporter) -> dict[str, str]:
    """Scrape, and return the name of each listener on port 7200, by its namespace."""
    labels = re.findall(
        r'^dtrace_tcp_listen_drops_total{(.*port="7200".*)}', exporter.get(), re.MULTILINE
    )
    found = [dict(re.findall(r'(\w+)="([^"]*)"', text)) for text in labels]
    return {each["netns"]: each["listener"] for each in found}


def test_names(
    container: Callable[..., Container], mount: Callable[[int], Path], tmp_path: Path
) -> None:
    """Listeners on one port in different namespaces have the names of their entries; others none.

    A reload changes the names, and so does a mount that moves to another namespace.
    """
    first, second, third = container(), container(), container()
    path = mount(second.process.pid)
    file = tmp_path / "c.yml"

    def write(*names: str) -> None:
        one, other = names
        file.write_text(
            "source: sock_diag\nlisteners:\n"
            f"- {{port: 7200, netns: {first.place}, name: {one}}}\n"
            f"- {{port: 7200, netns: {path.name}, name: {other}}}\n",
            encoding="utf-8",
        )

    write("web", "shop")
    with serving(f"--config.file={file}") as exporter:
        until(lambda: names(exporter) == {first.place: "web", second.place: "shop"})
        write("site", "store")
        exporter.process.send_signal(signal.SIGHUP)
        until(lambda: names(exporter) == {first.place: "site", second.place: "store"})
        subprocess.run(["umount", path], check=True)
        subprocess.run(["mount", "--bind", f"/proc/{third.process.pid}/ns/net", path], check=True)
        until(lambda: names(exporter) == {first.place: "site", third.place: "store"})
        subprocess.run(["umount", path], check=True)
        until(lambda: names(exporter) == {first.place: "site"})
        exporter.process.terminate()
        _, said = exporter.process.communicate(timeout=SECONDS)
    assert "level=error" not in said


def capabilities(status: Path) -> tuple[int, int]:
    """Return a thread's capabilities, and whether it can get no others."""
    text = status.read_text()
    masks = {int(mask, 16) for mask in re.findall(r"^Cap(?:Prm|Eff):\s(\w+)$", text, re.MULTILINE)}
    (mask,) = masks
    (no_new,) = re.findall(r"^NoNewPrivs:\s(\d)$", text, re.MULTILINE)
    return mask, int(no_new)


class Proc:
    """A made-up /proc with mounts, and with processes whose namespaces are files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        (path / "self").mkdir()
        self.mounts()

    def process(self, pid: int, namespace: Path) -> None:
        """Add a process."""
        (self._path / f"{pid}/ns").mkdir(parents=True)
        (self._path / f"{pid}/ns/net").symlink_to(namespace)

    def end(self, pid: int) -> None:
        """Remove a process."""
        (self._path / f"{pid}/ns/net").unlink()

    def mounts(self, *lines: str) -> None:
        """Set the mounts."""
        text = "".join(f"{line}\n" for line in lines)
        (self._path / "self/mountinfo").write_text(text, encoding="utf-8")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proc:
    """Return the /proc that a Finder reads; it may enter all namespaces there."""
    (tmp_path / "proc").mkdir()
    monkeypatch.setattr(namespace_finder, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(namespace_finder, "_enter", lambda _: None)
    return Proc(tmp_path / "proc")


def look(finder: Finder) -> list[tuple[int, int, int, bool]]:
    """Return the messages of an answer, and whether each comes with descriptors."""
    return [
        (*namespace_finder.ANSWER.unpack(message), bool(opened))
        for message, opened in finder.look()
    ]


def test_a_namespace_handed_on(proc: Proc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A namespace whose only process passes it on to a child and ends is found all the time."""
    namespace = tmp_path / "one"
    namespace.touch()
    inode = namespace.stat().st_ino
    proc.process(7, namespace)
    finder = Finder(10)
    assert look(finder) == [(THERE, inode, 0, True), (END, 0, 0, False)]
    listed = os.listdir

    def hand_on(path: Path) -> list[str]:
        names = listed(path)
        monkeypatch.undo()
        monkeypatch.setattr(namespace_finder, "_PROC", path)
        proc.end(7)
        proc.process(8, namespace)
        return names

    monkeypatch.setattr(os, "listdir", hand_on)
    assert look(finder) == [(THERE, inode, 0, False), (END, 0, 0, False)]
    proc.end(8)
    assert look(finder) == [(END, 0, 0, False)]


def test_mounts_as_the_kernel_writes_them(proc: Proc, tmp_path: Path) -> None:
    """A mount point may have any name; mounts of other kinds, or that have gone, are ignored."""
    namespace = tmp_path / "a b\\c\nd"
    namespace.touch()
    inode = namespace.stat().st_ino
    shown = str(namespace).replace("\\", "\\134").replace(" ", "\\040").replace("\n", "\\012")
    proc.mounts(
        f"36 25 0:4 net:[{inode}] {shown} rw shared:9 - nsfs nsfs rw",
        "37 25 0:4 net:[17] /gone rw shared:9 - nsfs nsfs rw",
        f"38 25 0:4 uts:[18] {shown} rw shared:9 - nsfs nsfs rw",
        "39 25 0:4 net:[19] /else rw - tmpfs tmpfs rw",
    )
    assert look(Finder(10)) == [(THERE, inode, 0, True), (END, 0, 0, False)]


def test_not_the_one_that_was_there(proc: Proc, tmp_path: Path) -> None:
    """A mount point that now has another namespace than the one that was mounted is not entered."""
    other = tmp_path / "other"
    other.touch()
    proc.mounts(f"36 25 0:4 net:[{other.stat().st_ino + 1}] {other} rw - nsfs nsfs rw")
    assert look(Finder(10)) == [(END, 0, 0, False)]


def test_refused(proc: Proc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A namespace that may not be entered is reported each time, with the reason."""
    namespace = tmp_path / "one"
    namespace.touch()
    proc.process(7, namespace)

    def refuse(_: int) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(namespace_finder, "_enter", refuse)
    finder = Finder(10)
    for _ in range(2):
        refused, end = look(finder)
        assert refused == (REFUSED, namespace.stat().st_ino, errno.EPERM, False)
        assert end == (END, 0, 0, False)


@pytest.mark.parametrize("may_see", [True, False])
def test_hidden(proc: Proc, monkeypatch: pytest.MonkeyPatch, may_see: bool) -> None:
    """Processes whose namespaces are hidden are reported only if CAP_SYS_PTRACE is missing."""
    proc.process(7, Path("/proc/self/mem/none"))
    there = os.stat

    def stat(path: Any, **keys: Any) -> os.stat_result:
        if str(path).endswith("/7/ns/net"):
            raise PermissionError(errno.EACCES, "no")
        return there(path, **keys)

    monkeypatch.setattr(os, "stat", stat)
    has = frozenset({SYS_PTRACE} if may_see else ())
    monkeypatch.setattr(possible, "effective", lambda: has)
    refused = [] if may_see else [(REFUSED, 0, errno.EACCES, False)]
    assert look(Finder(10)) == [*refused, (END, 0, 0, False)]


def test_not_seen(container: Callable[..., Container]) -> None:
    """A user who may not see processes' namespaces gets one report, even if none is mounted."""
    container()
    code = (
        f"import os, sys; sys.path[:] = {sys.path!r}\n"
        "from dtrace_exporter.namespace_finder import Finder, ANSWER\n"
        f"os.setgroups([]); os.setgid({_NOBODY}); os.setuid({_NOBODY})\n"
        "print(*(ANSWER.unpack(message) for message, _ in Finder(9).look()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"({REFUSED}, 0, {errno.EACCES})")


def test_no_way_back(proc: Proc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finder that cannot go back to its namespace ends, rather than take another for its own."""
    namespace = tmp_path / "one"
    namespace.touch()
    proc.process(7, namespace)
    entered: list[int] = []

    def enter(namespace: int) -> None:
        if entered:
            raise PermissionError(errno.EPERM, "no")
        entered.append(namespace)

    finder = Finder(10)
    monkeypatch.setattr(namespace_finder, "_enter", enter)
    monkeypatch.setattr(socket, "socket", lambda *_: None)
    with pytest.raises(SystemExit, match="cannot leave"):
        look(finder)


def test_an_answer_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finder that does not answer is ended."""
    monkeypatch.setattr(namespaces, "_PATIENCE", 0.1)
    monkeypatch.setattr(namespaces, "_PROGRAM", "import time; time.sleep(600)")
    with looking() as found:
        assert found.why_not
        assert found.pid is None
