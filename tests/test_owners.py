"""The owner of a listener, found by its socket's cgroup and by processes with the socket open."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.waiting import until

from dtrace_exporter import cgroups, holders, namespaces, owners
from dtrace_exporter.cgroups import names
from dtrace_exporter.inet_diag import OwnedSocket
from dtrace_exporter.listeners import Owner
from dtrace_exporter.namespace_finder import MOST_NAMES
from dtrace_exporter.namespaces import Namespaces
from dtrace_exporter.owners import AGAIN_SECONDS, SHARE, WALK_SECONDS, Owners, Placed
from exporter_process import serving
from host_tools import require

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc and cgroups are Linux's own")
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may be somebody else")

ID = "0123456789abcdef" * 4
POD = "11111111-2222-3333-4444-555555555555"
SLICE = POD.replace("-", "_")
_NOBODY = 65534


# The names in a cgroup's path.


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", ("", "")),
        ("/init.scope", ("init.scope", "")),
        ("/system.slice/ssh.service", ("ssh.service", "")),
        ("/system.slice/system-getty.slice/getty@tty1.service", ("getty@tty1.service", "")),
        ("/system.slice/door.socket", ("door.socket", "")),
        ("/system.slice/web.service/workers/one", ("web.service", "")),
        ("/system.slice/_cpu.service", ("cpu.service", "")),
        ("/system.slice", ("", "")),
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/a.service",
            ("user@1000.service", ""),
        ),
        (f"/system.slice/docker-{ID}.scope", (f"docker-{ID}.scope", ID)),
        (f"/docker/{ID}", ("", ID)),
        (f"/docker/{'f' * 64}/docker/{ID}", ("", ID)),
        (f"/machine.slice/libpod-{ID}.scope/container", (f"libpod-{ID}.scope", ID)),
        (
            f"/kubepods.slice/kubepods-pod{SLICE}.slice/cri-containerd-{ID}.scope",
            (f"cri-containerd-{ID}.scope", ID),
        ),
        (f"/kubepods.slice/kubepods-besteffort-pod{SLICE}.slice", ("", POD)),
        (f"/kubepods/besteffort/pod{POD}/{ID}", ("", ID)),
        (f"/kubepods/besteffort/pod{POD}", ("", POD)),
        (
            f"/system.slice/containerd.service/kubepods:cri-containerd:{ID}",
            ("containerd.service", ID),
        ),
        (
            "/machine.slice/machine-web\\x2dfront.scope/payload",
            ("machine-web\\x2dfront.scope", "web-front"),
        ),
        ("/machine.slice/systemd-nspawn@db.service/payload", ("systemd-nspawn@db.service", "db")),
        ("/lxc.payload.mail/system.slice/postfix.service", ("", "mail")),
        (f"/system.slice/{ID[:12]}", ("", "")),
    ],
)
def test_names(path: str, expected: tuple[str, str]) -> None:
    """Unit and container have the names that systemd and each container runtime give them."""
    assert names(path) == expected


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=())))
def test_any_name(path: str) -> None:
    """Any name of a cgroup is accepted, whoever made it."""
    assert all(isinstance(each, str) for each in names(path))


@pytest.fixture
def hierarchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of a made-up hierarchy of cgroups."""
    mounts = tmp_path / "mountinfo"
    top = tmp_path / "c g"
    top.mkdir()
    point = str(top).replace(" ", "\\040")
    mounts.write_text(
        "24 30 0:22 / /sys rw shared:7 - sysfs sysfs rw\n"
        f"31 24 0:27 / {point} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    )
    monkeypatch.setattr(cgroups, "_MOUNTS", mounts)
    return top


def test_paths(hierarchy: Path) -> None:
    """A cgroup is found by its number, at the top and below; a missing one has no path."""
    unit = hierarchy / "system.slice/a.service"
    unit.mkdir(parents=True)
    (hierarchy / "cgroup.procs").touch()
    top, below, file = (
        path.stat().st_ino for path in (hierarchy, unit, hierarchy / "cgroup.procs")
    )
    found = cgroups.paths({top, below, file})
    assert found == {top: "/", below: "/system.slice/a.service", file: ""}
    unit.rmdir()
    assert cgroups.paths({below}) == {below: ""}
    assert cgroups.paths({}) == {}


def test_very_many_cgroups(hierarchy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If somebody makes cgroups without end, only a limited number of them is read."""
    monkeypatch.setattr(cgroups, "_MOST_DIRECTORIES", 10)
    looked: list[str] = []
    scan = os.scandir

    def counting(path: str) -> Any:
        looked.append(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", counting)
    for number in range(30):
        (hierarchy / str(number)).mkdir()
    assert cgroups.paths({1 << 60}) == {}
    assert len(looked) == 10


def test_a_crowd_of_cgroups(hierarchy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crowded directory is read last, so the cgroups of others are still found."""
    monkeypatch.setattr(cgroups, "_MOST_DIRECTORIES", 20)
    monkeypatch.setattr(cgroups, "_CROWD", 10)
    pod = hierarchy / "kubepods.slice/kubepods-burstable.slice/kubepods-pod1.slice/a.scope"
    pod.mkdir(parents=True)
    for number in range(30):
        (hierarchy / "a.slice/b.slice/c.service" / str(number) / "below").mkdir(parents=True)
    number = pod.stat().st_ino
    assert cgroups.paths({number}) == {number: f"/{pod.relative_to(hierarchy)}"}


def test_cgroups_with_long_paths(hierarchy: Path) -> None:
    """Very many cgroups far below, where each has a path of 3 KB, take no memory for each path."""
    directory = os.open(hierarchy, os.O_RDONLY)
    for _ in range(12):
        os.mkdir("x" * 250, dir_fd=directory)
        above, directory = directory, os.open("x" * 250, os.O_RDONLY, dir_fd=directory)
        os.close(above)
    for number in range(2000):
        os.mkdir(str(number), dir_fd=directory)
    os.close(directory)
    tracemalloc.start()
    assert cgroups.paths({1 << 60}) == {1 << 60: ""}
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2 << 20


@linux
def test_no_hierarchy(hierarchy: Path, tmp_path: Path) -> None:
    """Without a visible hierarchy, no cgroup has a path."""
    (tmp_path / "mountinfo").write_text("24 30 0:22 / /sys rw shared:7 - sysfs sysfs rw\n")
    number = hierarchy.stat().st_ino
    assert cgroups.paths({number}) == {number: ""}


# Processes with an open socket.

# It holds an inherited socket until its input ends, under another name and perhaps user.
_HOLD = """
import os, sys
with open("/proc/self/comm", "wb") as file:
    file.write(sys.argv[1].encode("latin-1"))
if len(sys.argv) > 2:
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
os.write(1, b"ready\\n")
sys.stdin.read()
"""

Hold = Callable[..., None]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Return a function that starts a process with a socket, a name and perhaps a user's ID."""
    started = []

    def start(held: socket.socket, name: str, *user: int) -> None:
        words = [sys.executable, "-c", _HOLD, name, *map(str, user)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(words, stdin=pipe, stdout=pipe, pass_fds=[held.fileno()])
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"

    yield start
    for process in started:
        process.communicate(timeout=60)


@pytest.fixture
def looking() -> Iterator[Namespaces]:
    """Return the namespaces, whose finder process searches for holders."""
    made = Namespaces()
    made.begin(1000)
    yield made
    made.close()


def inode(of: socket.socket) -> int:
    """Return a socket's inode."""
    return os.fstat(of.fileno()).st_ino


@linux
@root
def test_holders(looking: Namespaces, hold: Hold) -> None:
    """Every program that has a socket open is found, of any user; an unknown socket has none.

    The finder is root, but has no capability that opens the directories of other users.
    """
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("", 0)) as other:
        hold(one, "first")
        hold(one, "second", _NOBODY)
        hold(other, "third", _NOBODY)
        mine = Path("/proc/self/comm").read_bytes().strip()
        found, cost = looking.holders({inode(one), inode(other), 1 << 40})
        assert found == {
            inode(one): {mine, b"first", b"second"},
            inode(other): {mine, b"third"},
        }
        assert 0 < cost < 60
        looking.look()
        assert looking.why_not == ""


@linux
@root
def test_very_many_programs(looking: Namespaces, hold: Hold) -> None:
    """If very many programs have a socket open, only a limited number of them is reported."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        for number in range(12):
            hold(one, f"0{number:02}")
        found, _ = looking.holders({inode(one)})
        assert found == {inode(one): {b"0%02d" % number for number in range(MOST_NAMES)}}


@linux
def test_very_many_sockets(looking: Namespaces) -> None:
    """Any number of sockets can be searched for."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        found, _ = looking.holders([*range(1 << 40, (1 << 40) + 50_000), inode(one)])
        assert {*found} == {inode(one)}


@linux
def test_another_file_system(tmp_path: Path) -> None:
    """A file with a socket's number is not taken for the socket."""
    with (tmp_path / "file").open("w") as file, socket.socket() as one:
        numbers = {os.fstat(file.fileno()).st_ino, inode(one)}
        here = "/proc/self/fdinfo"
        found = holders._numbers(f"{here}/{one.fileno()}")
        assert found is not None
        mount, number = found
        assert number == inode(one)
        assert [*holders._by_numbers(here, numbers, mount)] == [inode(one)]


@linux
def test_nobody_looks(looking: Namespaces) -> None:
    """Without a running finder, a search raises OSError and does not wait."""
    assert looking.pid is not None
    os.kill(looking.pid, 9)
    with pytest.raises(OSError, match=r"ended|pipe|reset|process"):
        looking.holders({1})
    looking.close()
    with pytest.raises(ProcessLookupError):
        looking.holders({1})


# Cgroups and processes together.


class World:
    """Made-up cgroups and processes, and a clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.asked: list[set[int]] = []
        self.holding: dict[int, set[bytes]] = {}
        self.cost = 0.1
        self.paths: dict[int, str] = {}
        self.missed = set[int]()
        self.looked_up: list[set[int]] = []
        self.error: OSError | None = None
        self.owners = Owners(self._holders)

    def _holders(self, inodes: object) -> tuple[dict[int, set[bytes]], float]:
        assert isinstance(inodes, frozenset)
        self.asked.append({*inodes})
        if self.error:
            raise self.error
        return {each: self.holding[each] for each in inodes if each in self.holding}, self.cost

    def find(self, *sockets: OwnedSocket, place: str = "", name: str = "") -> dict[int, Owner]:
        """Find owners, and return them by port."""
        found = self.owners.find([Placed(place, [*sockets], name)])
        assert {(who.host, who.place) for who in found} <= {("", place)}
        return {who.port: owner for who, owner in found.items()}

    def walks(self, seconds: float) -> bool:
        """Return whether there is a walk so many seconds later."""
        self.now += seconds
        return self.owners.walk()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Return a world."""
    made = World()

    def paths(wanted: set[int]) -> dict[int, str]:
        made.looked_up.append({*wanted})
        return {each: made.paths.get(each, "") for each in wanted - made.missed}

    monkeypatch.setattr(cgroups, "paths", paths)
    monkeypatch.setattr(time, "monotonic", lambda: made.now)
    return made


def at(port: int, inode: int = 0, cgroup: int | None = 1, address: str = "*") -> OwnedSocket:
    """Return a socket."""
    return OwnedSocket(address, port, inode, cgroup)


def test_cgroups_first(world: World) -> None:
    """Unit and container are known at once, and programs after a walk; several sockets add up."""
    world.paths = {7: "/system.slice/a.service", 8: f"/system.slice/docker-{ID}.scope", 1: "/"}
    sockets = at(80, 11, 7), at(80, 12, 8), at(22, 13, 9), at(25, 0, None)
    assert world.find(*sockets) == {
        80: Owner("", f"a.service,docker-{ID}.scope", ID),
        22: Owner(),
        25: Owner(),
    }
    world.holding = {11: {b"nginx", b"haproxy"}, 12: {b"nginx"}}
    assert world.owners.walk()
    found = world.find(*sockets)
    assert found[80].program == "haproxy,nginx"
    assert (found[22], found[25]) == (Owner(), Owner())
    assert world.asked == [{11, 12, 13}]
    # A number that was not found is not searched for again.
    assert world.find(*sockets, at(23, 14, 10)).keys() == {80, 22, 25, 23}
    assert world.looked_up == [{7, 8, 9}, {10}]
    # A number that the search did not reach is searched for again.
    world.missed.add(11)
    world.paths[11] = "/system.slice/late.service"
    assert world.find(at(24, 15, 11))[24] == Owner()
    world.missed.clear()
    assert world.find(at(24, 15, 11), at(25, 12, 10))[24].unit == "late.service"


def test_pace(world: World) -> None:
    """New sockets are searched for once a minute at most, and known ones every five minutes."""
    assert not world.walks(0)
    world.find(at(80, 11))
    assert world.walks(0)
    assert not world.walks(WALK_SECONDS + 1)
    world.find(at(80, 11), at(81, 12))
    assert world.walks(0)
    world.find(at(80, 11), at(81, 12), at(82, 13))
    assert not world.walks(WALK_SECONDS - 1)
    assert world.walks(1)
    assert not world.walks(AGAIN_SECONDS - 1)
    assert world.walks(1)
    assert world.asked[-1] == {11, 12, 13}


def test_share(world: World) -> None:
    """Walks take no more than their share of the time."""
    world.cost = 2.0
    world.find(at(80, 11))
    assert world.walks(0)
    world.find(at(80, 11), at(81, 12))
    assert not world.walks(2.0 * SHARE - 1)
    assert world.walks(1)


def test_it_cannot_be_looked(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """If no walk is possible, that is logged once, and units and containers are still found."""
    world.paths = {7: "/system.slice/a.service"}
    world.error = OSError(errno.ESRCH, os.strerror(errno.ESRCH))
    world.find(at(80, 11, 7))
    for _ in range(3):
        assert not world.walks(AGAIN_SECONDS)
    assert len(world.asked) == 3
    assert world.find(at(80, 11, 7)) == {80: Owner("", "a.service")}
    assert [each.message for each in caplog.records] == ["programs of listeners not known"]


def test_names_of_programs(world: World) -> None:
    """Programs' names are made printable, and a long list of them is cut."""
    world.find(at(80, 11), at(81, 12))
    world.holding = {11: {b"\x1b[31m", b"a\xff"}, 12: {b"p%02d" % number for number in range(20)}}
    assert world.owners.walk()
    found = world.find(at(80, 11), at(81, 12))
    assert found[80].program == "a\N{REPLACEMENT CHARACTER},\N{REPLACEMENT CHARACTER}[31m"
    assert found[81].program == "p00,p01,p02,p03,p04,p05,p06,p07,..."


def test_names_of_places(world: World) -> None:
    """A network namespace has its own name, or else that of the unit or container that listens."""
    world.paths = {7: "/system.slice/a.service", 8: f"/docker/{ID}"}
    here = at(80, 11, 7)
    assert world.find(here)[80].place_name == ""
    assert world.find(here, place="4026532001")[80].place_name == "a.service"
    assert world.find(here, at(81, 12, 8), place="4026532001")[80].place_name == ID
    assert world.find(here, place="4026532001", name="blue")[80].place_name == "blue"
    world.paths = {9: "/lxc.payload.a\x1b\udcff"}
    shown = world.find(at(80, 11, 9), place="4026532001")[80]
    assert (
        shown.container == shown.place_name == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    )


def test_nothing_new(world: World) -> None:
    """If nothing has changed, the same result is returned."""
    world.find(at(80, 11))
    world.owners.walk()
    first = world.owners.find([Placed("", [at(80, 11)])])
    assert world.owners.find([Placed("", [at(80, 11)])]) is first
    assert world.owners.find([Placed("", [at(80, 12)])]) is not first


@pytest.mark.parametrize(
    ("owner", "text"),
    [
        (Owner(), ""),
        (Owner("nginx"), "nginx"),
        (Owner("nginx", "web.service"), "nginx (web.service)"),
        (Owner("", "web.service"), "web.service"),
        (Owner("node", f"docker-{ID}.scope", ID), "node (container 0123456789ab)"),
        (Owner("node", "", f"{ID},web-front"), "node (container 0123456789ab,web-front)"),
        (Owner("sshd", fmri="svc:/network/ssh:default"), "sshd (svc:/network/ssh:default)"),
    ],
)
def test_for_people(owner: Owner, text: str) -> None:
    """The text for people has the program and its best owner, with an ID as Docker shows it."""
    assert str(owner) == text


@linux
def test_read() -> None:
    """A listener of this process has its own inode, and the cgroup that ss shows."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        (placed,) = owners.read(namespaces.own(), ())
        assert placed.place == ""
        (found,) = [each for each in placed.sockets if each.inode == inode(one)]
        assert (found.address, found.port) == one.getsockname()
        ss = [require("ss", "iproute2"), "-Hltn", "--cgroup", f"sport = :{found.port}"]
        done = subprocess.run(ss, capture_output=True, text=True, check=True)
        shown = done.stdout.partition("cgroup:")[2].strip()
        assert found.cgroup is not None
        assert cgroups.paths({found.cgroup}) == {found.cgroup: shown}


@linux
def test_one_that_cannot_be_read() -> None:
    """A namespace that cannot be read does not affect the owners in the others."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as netlink:
        netlink.close()
        others = [namespaces.Namespace("7", 1, netlink)]
        assert [placed.place for placed in owners.read("1", others)] == [namespaces.own()]


@linux
def test_the_service(tmp_path: Path) -> None:
    """The service shows the program of a listener in its metrics, on its page and by its filter."""
    path = tmp_path / "c.yml"
    path.write_text("source: sock_diag", encoding="utf-8")
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        serving(f"--config.file={path}") as exporter,
    ):
        port = one.getsockname()[1]
        comm = Path("/proc/self/comm").read_text(encoding="utf-8").strip()
        wanted = f'netns="",port="{port}",program="{comm}"'
        until(lambda: wanted in exporter.get("/metrics?name[]=dtrace_tcp_listen_info"))
        found = exporter.get(f"/api/v1/listeners?port={port}&owner={comm.upper()}")
        assert f'"program": "{comm}"' in found
        assert exporter.get(f"/api/v1/listeners?port={port}&owner=nobody") == "[]\n"
        assert f'<small class="owner">{comm}' in exporter.get(f"/?port={port}")
