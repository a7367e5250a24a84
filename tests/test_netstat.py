"""The source netstat: the output of FreeBSD's netstat(1), and the service with this source."""

from __future__ import annotations

import gc
import io
import json
import os
import time
from contextlib import suppress
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.waiting import eventually, until

import zone_rows
from dtrace_exporter import config, inet_diag, netstat, service, untraced
from dtrace_exporter.check import check
from dtrace_exporter.config import Config, DTraceConfig, HostConfig, ListenerConfig
from dtrace_exporter.inet_diag import ListeningSocket
from dtrace_exporter.listeners import ListenerTable, SessionId
from dtrace_exporter.sock_diag import SockDiagSource
from dtrace_exporter.sockets import Queues
from dtrace_exporter.tracing import rows
from dtrace_exporter.watched import Watched
from exporter_process import serving
from fake_steps import FOREVER, READY, FakeDTrace
from zone_rows import syns, told

SESSION = SessionId("", "untraced")


def entry(protocol: str, sizes: str, address: str, port: int | str) -> dict[str, Any]:
    """Return a socket as usr.bin/netstat/inet.c prints it with libxo's JSON."""
    local = {"address": address, "port": str(port)}
    return {"protocol": protocol, "listen-queue-sizes": sizes, "local": local}


def unix(sizes: str, path: str) -> dict[str, Any]:
    """Return a UNIX-domain socket as usr.bin/netstat/unix.c prints it under -L."""
    return {"protocol": "unix", "listen-queue-sizes": sizes, "path": path}


BOTH = [
    entry("tcp4", "0/0/128", "127.0.0.1", 25),
    entry("tcp4", "3/0/10", "*", 80),
    entry("tcp6", "1/0/12", "*", 80),
    entry("tcp46", "2/0/5", "*", 8080),
    entry("tcp6", "0/0/128", "2001:db8:1:2:3:4:5:6", 443),
    entry("tcp6", "0/0/128", "fe80::1%lo0", 22),
    entry("tcp6", "0/0/128", "::1", 22),
    entry("toe4", "7/0/8", "192.0.2.1", 81),
    {**entry("sctp4", "0/0/1", "*", 9), "address": "x"},
    unix("0/0/128", "/var/run/devd.pipe"),
]


def printed(sockets: list[dict[str, Any]]) -> bytes:
    """Return netstat(1)'s output about some sockets; without any, it has no list."""
    statistics = {"socket": sockets} if sockets else {}
    return json.dumps({"__version": "1", "statistics": statistics}).encode()


@pytest.fixture
def prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a netstat(1) into PATH that prints a file, and checks its arguments."""
    file, program = tmp_path / "printed.json", tmp_path / "bin" / "netstat"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n[ "$*" = "-LanW --libxo json" ] || exit 64\nexec cat {file}\n',
        encoding="utf-8",
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    file.write_bytes(printed(BOTH))
    return file


def read() -> list[ListeningSocket]:
    """Read the sockets."""
    [reading] = netstat.read((), {})
    assert (reading.half_open, reading.place, reading.cookie) == (None, "", None)
    return reading.samples


def test_both_families(prints: Path) -> None:
    """TCP sockets of both families are read, and no others; all wildcards become one address."""
    assert read() == [
        ListeningSocket("127.0.0.1", 25, 0, 128, None, 0),
        ListeningSocket("*", 80, 3, 10, None, 0),
        ListeningSocket("*", 80, 1, 12, None, 1),
        ListeningSocket("*", 8080, 2, 5, None, 0),
        ListeningSocket("2001:db8:1:2:3:4:5:6", 443, 0, 128, None, 0),
        ListeningSocket("fe80::1", 22, 0, 128, None, 0),
        ListeningSocket("::1", 22, 0, 128, None, 0),
        ListeningSocket("192.0.2.1", 81, 7, 8, None, 0),
    ]
    for nothing in (printed([]), printed([BOTH[-1]])):
        prints.write_bytes(nothing)
        assert read() == []


@given(st.integers(0, (1 << 128) - 1))
def test_addresses_as_in_rows(number: int) -> None:
    """An address is read in the same form as in the rows of a D program."""
    address = str(IPv6Address(number))
    record = rows.Reader().read(told(22, bound=address))
    assert isinstance(record, rows.Listening)
    shown = "*" if number == 0 else address
    [sample] = netstat.sockets(printed([entry("tcp6", "0/0/1", shown, 22)]))
    assert sample.address == record.address


@pytest.mark.parametrize(
    "output",
    [
        *(b"", b"{", b"[]", b"{}", b"null", b'{"statistics": 1}', b'{"statistics": {"socket": 1}}'),
        *(
            b'{"statistics": {"socket": [1]}}',
            b"[" * 100_000,
            b'{"statistics": {"socket": ' + b"[" * 100_000,
        ),
        *(printed(BOTH)[:-3], b'{"statistics": {"socket": [,'),
        *(b"\xff\xfe", b"usage: netstat [-46AaLnRSTWx]\n"),
        *(
            printed([one])
            for one in (
                {"protocol": "tcp4"},
                {"protocol": 4},
                entry("tcp4", "0/0", "*", 22),
                entry("tcp4", "a/b/c", "*", 22),
                entry("tcp4", "0/0/1", "localhost", 22),
                entry("tcp4", "0/0/1", "*", "ssh"),
                {**entry("tcp4", "0/0/1", "*", 22), "local": None},
                {**entry("tcp4", "0/0/1", "*", 22), "listen-queue-sizes": 1},
            )
        ),
    ],
)
def test_something_else(output: bytes) -> None:
    """Output that no netstat(1) of FreeBSD prints is refused as a whole."""
    with pytest.raises(OSError, match=r"cannot read netstat.*something else"):
        list(netstat.sockets(output))


@pytest.mark.parametrize(
    "odd",
    [
        *(1, [], {"protocol": 4}, entry("tcp4", "0/0", "*", 22), entry("tcp4", "0/0/1", "x", 22)),
        entry("tcp4", f"0/0/{'9' * 5000}", "*", 22),
    ],
)
def test_an_odd_socket(odd: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A socket that cannot be read is left out and logged; the others are read."""
    good = entry("tcp4", "3/0/10", "*", 80)
    found = [*netstat.sockets(printed([odd, good, odd]))]
    assert found == [ListeningSocket("*", 80, 3, 10, None, 0)]
    [record] = caplog.records
    assert record.message == "sockets of netstat(1) left out"
    assert record.fields["sockets"] == 2  # type: ignore[attr-defined]
    assert len(record.fields["why"]) <= 300  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "path", [b"a\tb", b"\x1b[2J", b"\xff\xfe", b'"statistics": {"socket": [', b""]
)
@pytest.mark.parametrize("first", [False, True])
def test_a_path_of_a_user(path: bytes, first: bool) -> None:
    """Whatever path a user binds a UNIX socket to, the TCP sockets are read."""
    good = entry("tcp4", "3/0/10", "*", 80)
    both = [unix("0/0/1", "PATH"), good][:: 1 if first else -1]
    # libxo escapes these, and control characters only since 2020.
    told = path.replace(b"\\", rb"\\").replace(b'"', rb"\"")
    found = [*netstat.sockets(printed(both).replace(b"PATH", told))]
    assert found == [ListeningSocket("*", 80, 3, 10, None, 0)]


def test_very_many() -> None:
    """While 100,000 sockets are read, no step is long, so other threads get their turn."""
    sockets = [entry("tcp4", "0/0/128", f"127.0.{at >> 8}.{at & 255}", 80) for at in range(50_000)]
    output = printed(sockets + sockets)
    del sockets
    gc.collect()
    gc.disable()
    longest, read, last = 0.0, 0, time.thread_time()
    try:
        for _ in netstat.sockets(output):
            now = time.thread_time()
            longest, read, last = max(longest, now - last), read + 1, now
    finally:
        gc.enable()
    print(f"\n    the longest piece took {1000 * longest:.0f} ms")  # noqa: T201
    assert read == 100_000
    assert longest < 0.05


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=5) | st.just("statistics"),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["statistics", "socket", "protocol", "local"]), inner)
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_anything(output: bytes) -> None:
    """Any output gives sockets or an OSError."""
    with suppress(OSError):
        list(netstat.sockets(output))


@pytest.mark.usefixtures("prints")
def test_a_netstat_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says why netstat(1) failed: it is another system's, it hangs, or it is missing."""
    program = tmp_path / "bin" / "netstat"
    program.write_text("#!/bin/sh\necho invalid option: L >&2; exit 4\n", encoding="utf-8")
    with pytest.raises(OSError, match=r"^\[Errno 5\] cannot read netstat\(1\): invalid option: L$"):
        read()
    program.write_text("#!/bin/sh\nexit 3\n", encoding="utf-8")
    with pytest.raises(OSError, match="exit status 3"):
        read()
    program.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    monkeypatch.setattr(netstat, "_PATIENCE", 0.1)
    with pytest.raises(OSError, match=r"did not end within 0\.1 s"):
        read()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="No such file"):
        read()


def test_table(prints: Path) -> None:
    """Listeners have Q and its limit but no Q0; each keeps its own sockets until they go."""
    source, table = SockDiagSource(), ListenerTable()
    table.watch(SESSION, Watched(), netstat.CAPABILITIES)

    def take(*sockets: dict[str, Any]) -> dict[tuple[str, int], list[Queues]]:
        prints.write_bytes(printed([*sockets]))
        list(source.update(table, SESSION, netstat.read((), source.open)))
        return {(one.identity.address, one.identity.port): [*one.sockets.values()] for one in table}

    web = ("*", 80)
    four, six = entry("tcp4", "3/0/10", *web), entry("tcp6", "1/0/12", *web)
    assert take(four, six) == {web: [Queues(None, 3, None, 10), Queues(None, 1, None, 12)]}
    [listener] = table
    # A limit of 10 lets in 16.
    assert listener.q_capacity.of(10) == 16
    assert take(four) == {web: [Queues(None, 3, None, 10)]}
    assert take() == {web: []}
    assert listener.closed is not None
    assert take(six) == {web: [Queues(None, 1, None, 12)]}
    assert listener.closed is None


def test_service(prints: Path, tmp_path: Path) -> None:
    """The service exports only Q, its limit and capacity, by jail, and reads them each time."""
    path = tmp_path / "dtrace_exporter.yml"
    path.write_text("{source: netstat, listeners: [{port: 80, name: web}]}", encoding="utf-8")
    with serving("--config.file", path) as exporter:
        until(lambda: "dtrace_tcp_listen_q_length{" in exporter.get())
        page = exporter.get()
        labels = 'address="*",jail="",listener="web",port="80"'
        # These are of the fuller one of its two sockets.
        for name, value in (("q_length", 3), ("q_limit", 10), ("q_capacity", 16)):
            assert f"dtrace_tcp_listen_{name}{{{labels}}} {value}.0\n" in page
        names = {line.partition("{")[0] for line in page.splitlines()}
        named = {name for name in names if name.startswith("dtrace_tcp_listen_")}
        assert named == {f"dtrace_tcp_listen_q_{end}" for end in ("length", "limit", "capacity")}
        assert 'reason="configured",source="netstat"' in page
        prints.write_bytes(printed([entry("tcp4", "9/0/10", "*", 80)]))
        until(lambda: f"dtrace_tcp_listen_q_length{{{labels}}} 9.0\n" in exporter.get())
        assert "Missing: half-open connections, drops, SYNs" in exporter.get("/-/ready")
        # After a failure, the old values are not exported.
        prints.write_bytes(b"")
        until(lambda: "dtrace_tcp_listen_q_length{" not in exporter.get())


REFUSAL = "dtrace: failed to initialize dtrace: DTrace device not available on system"


def configured(source: Any, command: list[str]) -> Config:
    """Return a configuration with port 80 only."""
    dtrace = DTraceConfig(command=tuple(command), program="freebsd", interval=0.1)
    listeners = (ListenerConfig((range(80, 81),)),)
    return Config(source, HostConfig(dtrace=dtrace, listeners=listeners))


@pytest.fixture
def _freebsd(prints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace this host by a FreeBSD host, which has no sock_diag."""
    assert prints.exists()
    monkeypatch.setattr(untraced, "here", lambda: untraced.SOURCES["netstat"])


@pytest.mark.usefixtures("_freebsd")
async def test_auto(fake_dtrace: FakeDTrace) -> None:
    """Source auto uses FreeBSD's netstat(1), with the reason, only if DTrace cannot be used."""
    refusing = ["sh", "-c", f'echo "{REFUSAL}" >&2; exit 1']
    for command, name, reason in (
        (refusing, "netstat", "no_device"),
        (fake_dtrace(READY, {"print": [syns(80, 1)]}, FOREVER), "dtrace", ""),
    ):
        source, _ = await service.choose_source(configured("auto", command))
        assert (source.name, source.reason) == (name, reason)


@pytest.mark.usefixtures("_freebsd")
async def test_goes_over(
    fake_dtrace: FakeDTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service tries DTrace again, and switches to it when it works."""
    usable = tmp_path / "usable"
    script = f'[ -e {usable} ] || {{ echo "{REFUSAL}" >&2; exit 1; }}; exec "$@"'
    steps = fake_dtrace(READY, {"print": [zone_rows.told(80, zone="0"), syns(80, 5)]}, FOREVER)
    monkeypatch.setattr(service, "_RETRY_SECONDS", 0.05)
    one = service.Service(None, configured("auto", ["sh", "-c", script, "sh", *steps]))
    await one.start()
    try:
        assert one.state.source.name == "netstat"
        assert one.sessions == {}
        await one.state.refresh()
        [web] = one.state.table
        assert [queues.q for queues in web.sockets.values()] == [3, 1]
        usable.touch()
        await eventually(lambda: one.state.source.name == "dtrace")
        assert one.sessions
    finally:
        await one.stop()


@pytest.mark.usefixtures("_freebsd")
async def test_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command check reports the source in use, or why no source works."""
    monkeypatch.setattr(inet_diag, "listeners", lambda *_: [])
    refusing = ["sh", "-c", f'echo "{REFUSAL}" >&2; exit 1']
    for source in ("auto", "netstat"):
        out = io.StringIO()
        assert await check(configured(source, refusing), out, quiet=True) == 0
        assert "ok    netstat                 used: Q and Qmax of 8 sockets\n" in out.getvalue()
    monkeypatch.setenv("PATH", str(tmp_path))
    refusing = ["/bin/sh", *refusing[1:]]
    out = io.StringIO()
    assert await check(configured("auto", refusing), out, quiet=True) == 1
    assert "FAIL  netstat" in out.getvalue()
    assert "-> it needs FreeBSD's netstat(1)" in out.getvalue()
    assert "kldload dtraceall" in out.getvalue()


def test_names() -> None:
    """The sources that a configuration may name are those that exist."""
    assert tuple(untraced.SOURCES) == config.WITHOUT_DTRACE
    for name, source in untraced.SOURCES.items():
        assert source.name == name


@pytest.mark.parametrize(
    ("system", "name"),
    [("linux", "sock_diag"), ("freebsd14", "netstat"), ("sunos5", None), ("darwin", None)],
)
def test_here(system: str, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system determines which source replaces DTrace."""
    monkeypatch.setattr("sys.platform", system)
    found = untraced.here()
    assert (found.name if found else None) == name
