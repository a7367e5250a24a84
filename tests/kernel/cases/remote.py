"""Remote hosts that are watched through a real ssh and sshd."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from lab.exporter import UP, Exporter, Metrics, StartExporter, run, runs
from lab.far import (
    ALIVE_SECONDS,
    DTRACE,
    Far,
    MakeFar,
    gone_after,
    near_ends,
    note,
    settle,
)
from lab.tracing import rows_of, tracing
from lab.traffic import Clients, Listen, Ports
from lab.waiting import until
from lab.witness import CountSyns, Netstat, listen_queues

HOSTS = ("", "east", "west")
SYNS = "dtrace_tcp_listen_syns_total"
Q = "dtrace_tcp_listen_q_length"
WAITS = "dtrace_tcp_listen_accept_wait_seconds"
RESTARTS = "dtrace_session_restarts_total"
FEATURE = "dtrace_session_feature_enabled"
UP_SECONDS = 360
"""For a start on an emulated machine, which may start several sessions at once."""
REFUSAL_SECONDS = 90.0
"""For nine failures, one of which is a time-out."""
FAR_SECONDS = 20.0
"""A remote dtrace(1) ends at its next tick; an emulated one takes seconds to detach its probes."""


@pytest.fixture
def far() -> Iterator[MakeFar]:
    """Return a function that creates a remote host, which is removed at the end of the case."""
    with ExitStack() as stack:

        def start(*args: str, **options: str) -> Far:
            made = Far(*args, **options)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture(scope="module")
def east() -> Iterator[Far]:
    """Return a remote host that most cases share."""
    made = Far("east")
    yield made
    made.close()


@pytest.fixture(scope="module")
def west() -> Iterator[Far]:
    """Return a second remote host."""
    made = Far("west")
    yield made
    made.close()


@pytest.fixture(scope="module")
def watched(ports: Ports) -> tuple[int, int]:
    """Return two ports: all hosts watch the first, and east does not watch the second."""
    shared, partly = ports(2)
    return shared, partly


@pytest.fixture(scope="module")
def running(east: Far, west: Far, watched: tuple[int, int]) -> Iterator[Exporter]:
    """Return an exporter that watches this host and two others."""
    both = [{"port": watched[0], "name": "front"}, {"port": watched[1]}]
    made = Exporter(
        {
            "source": "auto",
            "dtrace": {"session": "shared"},
            "listeners": both,
            "hosts": [
                {
                    "name": "east",
                    "dtrace": {"command": east.command(), "options": {"aggsize": "4m"}},
                    "listeners": both[:1],
                },
                {
                    "name": "west",
                    "dtrace": {
                        "command": west.command(),
                        "program": "linux",
                        "session": "shared",
                    },
                    "listeners": both,
                },
            ],
        }
    )
    try:
        made.wait_ready()
        yield made
    finally:
        made.stop()


def value(metrics: Metrics, host: str, name: str, **labels: object) -> float | None:
    """Return the value of a host's only sample that fits; the local host's name is empty.

    Of a host's sessions, it is that of the one that counts.
    """
    fit = [
        v
        for have, v in metrics.select(name, **labels)
        if have.get("host", "") == host and have.get("session") != "calls"
    ]
    assert len(fit) <= 1, f"{host} {name}{labels} fits {len(fit)} samples"
    return fit[0] if fit else None


def of_host(metrics: Metrics, host: str, name: str) -> list[tuple[dict[str, str], float]]:
    """Return the labels and value of each sample of one name and one host."""
    return [(have, v) for have, v in metrics.select(name) if have.get("host", "") == host]


def command_line(pid: int) -> str:
    """Return a process's command line as words separated by spaces."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


def host_config(host: Far, port: int, **dtrace: object) -> dict[str, object]:
    """Return a configuration that watches one port of a remote host, and uses no DTrace here."""
    command = {"command": host.command(), "program": "linux", **dtrace}
    return {
        "source": "sock_diag",
        "hosts": [{"name": host.name, "dtrace": command, "listeners": [{"port": port}]}],
    }


@pytest.mark.parametrize("program", ["auto", "linux"])
def test_refused(program: str, exporter: StartExporter, east: Far, far: MakeFar, port: int) -> None:
    """Each failure of ssh or of the remote dtrace(1) is named, and nothing prompts or hangs."""
    asking = far("asking", sshd="PasswordAuthentication yes\n")
    other = far("other")
    other.trust(east.directory / "host.pub")
    dark = far("dark")
    unprivileged = ("setpriv", "--reuid=1", "--clear-groups", DTRACE)
    no_key = ("-oPubkeyAuthentication=no", "-oBatchMode=no")
    expected = {
        "other-key": (other.command(), "Host key verification failed"),
        "wrong-user": (east.command("-l", "intruder"), "Permission denied (publickey)"),
        "closed": (east.command("-p", "9"), "port 9: Connection refused"),
        "nameless": (east.command("-oHostName=nowhere.invalid"), "Could not resolve hostname"),
        "dark": (dark.command(), "timed out"),
        "asking": (asking.command(*no_key), "Permission denied"),
        "bare": (east.command(dtrace=("/opt/dtrace",)), "/opt/dtrace: No such file"),
        "unprivileged": (east.command(dtrace=unprivileged), "run as root"),
        "no-ssh": (["/opt/ssh", "east", DTRACE], "cannot start /opt/ssh: No such file"),
    }
    hosts = [
        {
            "name": name,
            "dtrace": {"command": command, "program": program},
            "listeners": [{"port": port}],
        }
        for name, (command, _) in expected.items()
    ]
    found: dict[str, str] = {}

    with dark.cut():
        running = exporter({"source": "sock_diag", "hosts": hosts}, ready=False)

        def all_told() -> bool:
            status, text = running.get("/-/ready")
            assert status == 503
            for line in text.splitlines():
                name, told, reason = line.partition(f"/port-{port}: ")
                if told and reason != "starting":
                    found[name] = reason
            return found.keys() == expected.keys()

        running.wait_answers()
        began = time.monotonic()
        until(all_told, "all are down", REFUSAL_SECONDS)
    note(f"nine refusals told after {time.monotonic() - began:.1f} s")
    for name, (_, words) in expected.items():
        note(f"{name}: {found[name]}")
        assert words.lower() in found[name].lower(), name
    metrics = running.metrics()
    assert {have["host"] for have, up in metrics.select(UP) if not up} == set(expected)
    # Counters exist from the start, and gauges of a session that is down do not.
    assert {have["host"] for have, _ in metrics.select(SYNS, port=port)} == set(expected)
    assert metrics.select(Q, port=port) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_near_end_gone(
    number: signal.Signals, exporter: StartExporter, far: MakeFar, port: int
) -> None:
    """However the exporter ends, ssh and the remote dtrace(1) end soon after."""
    host = far("north")
    running = exporter(host_config(host, port))
    near, consumers = near_ends(running), host.consumers()
    assert len(near) == len(consumers) == 2
    running.process.send_signal(number)
    began = time.monotonic()
    running.process.wait(10)
    note(f"exporter ended {time.monotonic() - began:.1f} s after {number.name}")
    gone_after(near, FAR_SECONDS)
    note(f"ssh gone {time.monotonic() - began:.1f} s after {number.name}")
    gone_after(consumers, FAR_SECONDS)
    note(f"far dtrace gone {time.monotonic() - began:.1f} s after {number.name}")


def test_near_end_gone_early(exporter: StartExporter, far: MakeFar, port: int) -> None:
    """If the exporter is killed while a remote dtrace(1) compiles, that ends once it is done."""
    host = far("north")
    running = exporter(host_config(host, port), ready=False)
    consumers = until(host.consumers, "the far dtrace(1) is started")
    running.process.kill()
    seconds = gone_after(consumers, UP_SECONDS)
    note(f"far dtrace gone {seconds:.1f} s after the exporter, which it was started by, was killed")


def test_cut_for_good(exporter: StartExporter, far: MakeFar, port: int) -> None:
    """If the exporter and its link disappear, the remote dtrace(1) ends when TCP there gives up."""
    lost = far("lost")
    lost.give_up_soon()
    running = exporter(host_config(lost, port))
    consumers = lost.consumers()
    assert len(consumers) == 2
    with lost.cut():
        running.process.kill()
        seconds = gone_after(consumers, 30 + FAR_SECONDS)
        assert "Connection timed out" in lost.log_file.read_text()
    note(f"far dtrace gone {seconds:.1f} s after a cut for good")


def test_slow_link(
    exporter: StartExporter,
    far: MakeFar,
    port: int,
    listen: Listen,
    clients: Clients,
    count_syns: CountSyns,
) -> None:
    """Over a slow link, a session starts, stays up and is exact."""
    slow = far("slow")
    syns = count_syns(port)
    listener = listen(port, 16)
    with slow.slow(milliseconds=300, kilobytes=20):
        began = time.monotonic()
        running = exporter(host_config(slow, port))
        note(f"up {time.monotonic() - began:.1f} s after the start, over a slow link")
        for _ in range(5):
            clients.connect(5, port)
            listener.accept(5)
            metrics = settle(running)
            assert value(metrics, "slow", SYNS, port=port) == syns[port]
    assert value(metrics, "slow", SYNS, port=port) == syns[port] == 25
    for name in ("established_total", "accepts_total", "accept_wait_seconds_count"):
        series = f"dtrace_tcp_listen_{name}"
        assert value(metrics, "slow", series, port=port) == syns[port], name
    assert value(metrics, "slow", UP) == 1
    assert value(metrics, "slow", RESTARTS) == 0


def test_too_slow_link(
    exporter: StartExporter, far: MakeFar, ports: Ports, listen: Listen, clients: Clients
) -> None:
    """If a link is too slow for the rows, the session ends and says that they come late."""
    slow = far("slow")
    many = ports(200)
    command = slow.command("-oCompression=no")
    config = host_config(slow, many[0], command=command, session="shared")
    config["hosts"][0]["listeners"] = [{"port": port} for port in many]  # type: ignore[index]
    running = exporter(config)
    for port in many:
        listen(port, 5)
        clients.connect(1, port)
    settle(running)
    with slow.slow(milliseconds=300, kilobytes=10):
        running.wait(UP, 0, 120, host="slow", session="all")
        assert re.search("rows come [0-9]+ s late", running.log())


def test_chatty_host(
    exporter: StartExporter, far: MakeFar, port: int, listen: Listen, clients: Clients
) -> None:
    """Output of a remote login shell counts as bad rows and does no harm."""
    host = far("north")
    profile = Path("/root/.bashrc")
    kept = profile.read_text()
    try:
        profile.write_text(
            "echo '*** Welcome to north ***'; echo 'ready or not'; head -c 40000 /dev/urandom\n"
            "echo; echo 'dtrace: is fun, says root' >&2; head -c 40000 /dev/urandom >&2; echo >&2\n"
            "printf 'no end of line'\n"
        )
        running = exporter(host_config(host, port))
    finally:
        profile.write_text(kept)
    listen(port, 20)
    clients.connect(3, port)
    metrics = settle(running)
    assert value(metrics, "north", SYNS, port=port) == 3
    bad = value(metrics, "north", "dtrace_session_bad_rows_total")
    assert bad is not None
    assert bad >= 3
    assert value(metrics, "north", RESTARTS) == 0
    # One for each session.
    assert running.log().count("bad row") == 2
    for near in near_ends(running):
        os.kill(near, signal.SIGKILL)
    running.wait(UP, 0, host="north", session=f"port-{port}")
    assert 'why="dtrace(1) ended: killed by SIGKILL"' in running.log()


def test_restricted_key(
    exporter: StartExporter, far: MakeFar, port: int, listen: Listen, clients: Clients
) -> None:
    """A key that may only run dtrace(1) on standard input is enough for any program."""
    forced = f"{DTRACE} -x aggsize=4m -s /dev/stdin"
    restricted = far(
        "restricted",
        sshd="PermitRootLogin forced-commands-only\n",
        key_options=f'restrict,command="{forced}"',
    )
    long = restricted.directory / "long.d"
    text = run("program", "linux")[1]
    long.write_text(text + "/* A pipe holds 64 KiB. */\n" * 10_000)
    running = exporter(host_config(restricted, port, program=str(long)))
    # The getopt of dtrace(1) removes the =.
    lines = {command_line(consumer) for consumer in restricted.consumers()}
    assert lines == {forced.replace("=", " ")}
    listen(port, 20)
    clients.connect(3, port)
    metrics = settle(running)
    assert value(metrics, "restricted", SYNS, port=port) == 3
    assert value(metrics, "restricted", Q, port=port) == 3


def test_program_of_its_own(
    exporter: StartExporter, far: MakeFar, ports: Ports, listen: Listen, clients: Clients
) -> None:
    """A host that runs only a program stored there is counted too."""
    file = Path("/run/dtrace-exporter.d")
    file.write_text(run("program", "linux")[1])
    pinned = far("pinned", key_options=f'restrict,command="{DTRACE} -s {file}"')
    port, other = ports(2)
    listen(port, 20)
    listen(other, 20)
    running = exporter(host_config(pinned, port))
    # Gauges need the first heartbeat of the session calls.
    settle(running)
    clients.connect(3, port)
    clients.connect(2, other)
    metrics = settle(running)
    assert value(metrics, "pinned", SYNS, port=port) == 3
    assert value(metrics, "pinned", Q, port=port) == 3
    assert metrics.select(SYNS, port=other) == []


def test_check(far: MakeFar, port: int) -> None:
    """The check command shows which host is watched, and why another is not."""
    host = far("north")
    config = host_config(host, port)
    config["source"] = "dtrace"
    closed = {"name": "closed", "dtrace": {"command": host.command("-p", "9")}}
    config["hosts"] += [closed]  # type: ignore[operator]
    status, text = run("check", config=config)
    assert status == 1, text
    assert re.search(rf"^ok +session north/port-{port} +up$", text, re.MULTILINE), text
    assert re.search(r"^FAIL +session closed/all .*Connection refused", text, re.MULTILINE), text
    assert re.search(r"^no +syn_drops ", text, re.MULTILINE), text
    gone_after(host.consumers(), FAR_SECONDS)


def test_trace(far: MakeFar, port: int, listen: Listen, clients: Clients, tmp_path: Path) -> None:
    """The trace command shows the clients of a remote host, and leaves no process there."""
    host = far("north")
    listen(port, 20)
    config = {"dtrace": {"command": host.command(), "program": "linux"}}
    with tracing(port, tmp_path, config) as output:
        consumers = host.consumers()
        clients.fill(2, port)
        until(lambda: output.read_text().count("established") == 2, "both are shown")
    gone_after(consumers, FAR_SECONDS)
    found = [row for row in rows_of(output) if row["Action"] == "syn"]
    assert [int(row["Source Port"]) for row in found] == clients.source_ports
    assert [row["Q"] for row in found] == ["0", "1"]


def test_exact(
    running: Exporter,
    watched: tuple[int, int],
    listen: Listen,
    clients: Clients,
    count_syns: CountSyns,
) -> None:
    """Each host's series exist once, with labels, and equal what independent witnesses say."""
    port, partly = watched
    netstat, syns = Netstat(), count_syns(port)
    listener = listen(port, 3)
    listen(partly, 20)
    clients.connect(3, partly)
    made = clients.connect(4, port)
    until(lambda: listen_queues(port)[0].q == 4, "all are in Q")
    clients.insist(3, port, syns)
    taken = listener.accept(2, every=0.4)

    metrics = settle(running)
    (queue,) = listen_queues(port)
    assert (queue.q, queue.qmax) == (2, 3)
    assert netstat["ListenDrops"] == queue.drops == syns[port] - 4
    pairs = list(zip(made, taken, strict=False))
    here = {"port": port, "address": "127.0.0.1", "listener": "front", "netns": ""}
    for host in HOSTS:
        expected = {
            SYNS: syns[port],
            "dtrace_tcp_listen_established_total": 4,
            "dtrace_tcp_listen_accepts_total": 2,
            Q: queue.q,
            "dtrace_tcp_listen_q_limit": queue.qmax,
            "dtrace_tcp_listen_q0_length": 0,
            f"{WAITS}_count": 2,
            "dtrace_tcp_listen_q_saturation_ratio_count": syns[port],
        }
        assert {name: value(metrics, host, name, **here) for name in expected} == expected, host
        total = value(metrics, host, f"{WAITS}_sum", **here)
        assert total is not None
        least = sum(accept.start - connect.end for connect, accept in pairs)
        assert least <= total <= sum(accept.end - connect.start for connect, accept in pairs), host
    assert len(metrics.select(SYNS, port=port)) == len(HOSTS)
    # Host east does not watch the other port.
    assert [value(metrics, host, SYNS, port=partly) for host in HOSTS] == [3, None, 3]
    for name in ("lost_total", "probe_errors_total", "bad_rows_total", "restarts_total"):
        assert not any(v for _, v in metrics.select(f"dtrace_session_{name}")), name
    # The numbers of another host's drop counters are unknown, so its drops are not exported.
    assert metrics.drops(port=port) == {"q_full": queue.drops}
    local, east, west = (
        {have["feature"] for have, on in of_host(metrics, host, FEATURE) if on} for host in HOSTS
    )
    assert east == west == local - {"syn_drops", "ack_drops", "exact"} != local


def test_ends_killed(
    running: Exporter,
    east: Far,
    west: Far,
    watched: tuple[int, int],
    listen: Listen,
    clients: Clients,
) -> None:
    """If the local ssh and the remote sshd are killed, only their sessions restart."""
    port = watched[0]
    listen(port, 20)
    clients.connect(2, port)
    before = settle(running)
    near = [pid for pid in near_ends(running) if west.name in command_line(pid)]
    serving = east.sessions()
    old = east.consumers() + west.consumers()
    assert len(old) == 4

    for pid in (*near, *serving):
        os.kill(pid, signal.SIGKILL)
    sessions = {"east": f"port-{port}", "west": "all"}
    for host, session in sessions.items():
        running.wait(UP, 0, host=host, session=session)
    metrics = running.metrics()
    assert not metrics.fell_since(before)
    assert value(metrics, "", UP) == 1
    assert [value(metrics, host, Q, port=port) for host in HOSTS] == [2, None, None]
    note(f"far dtrace gone {gone_after(old, FAR_SECONDS):.1f} s after both ends were killed")

    for host, session in sessions.items():
        running.wait(UP, 1, UP_SECONDS, host=host, session=session)
    clients.connect(1, port)
    after = settle(running)
    assert not after.fell_since(before)
    assert [value(after, host, RESTARTS) for host in HOSTS] == [0, 1, 1]
    for host in HOSTS:
        was = value(before, host, SYNS, port=port)
        assert was is not None
        assert value(after, host, SYNS, port=port) == was + 1, host
    log = running.log()
    assert "killed by SIGKILL" in log
    assert "closed by remote host" in log


def test_cut(
    running: Exporter,
    east: Far,
    watched: tuple[int, int],
    listen: Listen,
    clients: Clients,
) -> None:
    """A dead connection is noticed, retried ever more rarely, and restored once the link is."""
    port = watched[0]
    listen(port, 20)
    clients.connect(2, port)
    before = settle(running)
    restarts = value(before, "east", RESTARTS)
    assert restarts is not None
    old = east.consumers()
    seen = len(running.log())

    began = time.monotonic()
    with east.cut():
        clients.connect(3, port)
        running.wait(UP, 0, ALIVE_SECONDS + 10, host="east", session=f"port-{port}")
        note(f"down {time.monotonic() - began:.1f} s after the cut")
        metrics = running.metrics()
        assert not metrics.fell_since(before)
        assert [value(metrics, host, Q, port=port) for host in HOSTS] == [5, None, 5]
        until(
            lambda: (value(running.metrics(), "east", RESTARTS) or 0) >= restarts + 2,
            "a second attempt",
        )
        status, text = running.get("/-/ready")
        assert status == 503
        assert re.search(rf"^east/port-{port}: .*timed out", text), text
        assert "not responding" in running.log()[seen:]
        assert all(runs(pid) for pid in old)

    mended = time.monotonic()
    # The remote TCP retransmits ever more rarely, until it gets a reset.
    gone = gone_after(old, mended - began + FAR_SECONDS)
    note(f"cut for {mended - began:.1f} s; far dtrace gone {gone:.1f} s after it was mended")
    running.wait(UP, 1, UP_SECONDS, host="east", session=f"port-{port}")
    note(f"up {time.monotonic() - mended:.1f} s after the link was mended")
    # Gauges also need the session calls.
    running.wait(UP, 1, UP_SECONDS, host="east", session="calls")
    waits = re.findall(r"session=port-\d+ [^\n]*restart_in=([\d.]+)s", running.log()[seen:])
    delays = [float(seconds) for seconds in waits]
    assert len(delays) >= 2
    assert delays == sorted(delays)
    clients.connect(1, port)
    after = settle(running)
    assert not after.fell_since(before)
    assert value(after, "east", RESTARTS) == restarts + len(delays)
    # Events during the cut are not made up.
    gained = [
        (value(after, host, SYNS, port=port) or 0) - (value(before, host, SYNS, port=port) or 0)
        for host in HOSTS
    ]
    assert gained == [4, 1, 4]
    assert [value(after, host, Q, port=port) for host in HOSTS] == [6, 6, 6]
    assert running.get("/-/ready")[0] == 200


def test_reload(running: Exporter, east: Far, west: Far, watched: tuple[int, int]) -> None:
    """If a reload removes a host, its session ends, and the others are unaffected."""
    port = watched[0]
    before = settle(running)
    staying, leaving = east.consumers(), west.consumers()
    assert len(staying) == len(leaving) == 2
    config = yaml.safe_load(running.config_file.read_text())
    del config["hosts"][1]
    config["hosts"][0]["listeners"] = [{"port": port, "name": "renamed"}]
    running.configure(config)
    assert running.reload() == 200
    note(f"far dtrace gone {gone_after(leaving, FAR_SECONDS):.1f} s after the reload")
    after = settle(running)
    assert {have.get("host") for have, _ in after.select(UP)} == {None, "east"}
    assert {have.get("host") for have, _ in after.select(SYNS)} == {None, "east"}
    for host, name in (("", "front"), ("east", "renamed")):
        kept = value(before, host, SYNS, port=port)
        assert value(after, host, SYNS, port=port, listener=name) == kept
        assert value(after, host, RESTARTS) == value(before, host, RESTARTS)
    assert east.consumers() == staying
