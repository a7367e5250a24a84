"""The check command on various hosts: its findings, its advice and its status."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from dtrace_exporter import capabilities, cgroups, check, inet_diag, kernel, reasons
from dtrace_exporter.config import Config, DTraceConfig, HostConfig, ListenerConfig
from dtrace_exporter.inet_diag import ListeningSocket, OwnedSocket
from dtrace_exporter.kernel import Host
from dtrace_exporter.namespaces import Namespaces
from fake_steps import FakeDTrace

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is looked at is Linux' own")

GOOD = Host("6.12.1", True, "none", "/sys/kernel/tracing", 0, (), False, "")
LACKING: dict[str, Any] = {
    "no_btf": Host("6.12.1", False, "none", "/sys/kernel/tracing", 0, (), False, ""),
    "lockdown": Host("6.12.1", True, "confidentiality", "/t", 0, (), False, ""),
    "no_tracefs": Host("6.12.1", True, "", None, 0, (), False, ""),
}


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace this host by one where only port 22 has a listener."""
    monkeypatch.setattr(kernel, "look", lambda: GOOD)
    monkeypatch.setattr(inet_diag, "listeners", lambda *_: [ListeningSocket("*", 22, 0, 8, 0, 1)])
    monkeypatch.setattr(inet_diag, "owned", lambda *_: [OwnedSocket("*", 22, 0, None)])


def config(source: Any, command: list[str], *ports: int) -> Config:
    """Return a configuration with this source, dtrace(1) and these ports."""
    dtrace = DTraceConfig(command=tuple(command), program="linux", interval=0.1)
    listeners = tuple(ListenerConfig((range(port, port + 1),)) for port in ports)
    return Config(source, HostConfig(dtrace=dtrace, listeners=listeners))


async def said(source: Any, command: list[str], *ports: int) -> tuple[int, str]:
    """Return the status and the text of a check."""
    out = io.StringIO()
    status = await check.check(config(source, command, *ports), out, quiet=True)
    return status, out.getvalue()


async def object_of(source: Any, command: list[str], *ports: int) -> tuple[int, dict[str, Any]]:
    """Return the status and the object of a check in JSON."""
    out = io.StringIO()
    status = await check.check(config(source, command, *ports), out, quiet=True, as_json=True)
    return status, json.loads(out.getvalue())


def refusing(text: str) -> list[str]:
    """Return the command of a dtrace(1) that prints this text and fails."""
    return ["sh", "-c", f'echo "{text}" >&2; exit 1']


@pytest.mark.parametrize(("source", "status"), [("auto", 0), ("dtrace", 1), ("sock_diag", 0)])
async def test_red_is_a_failure(source: Any, status: int, tmp_path: Path) -> None:
    """The output has FAIL, red on a terminal, exactly if the status is 1."""
    nowhere = [str(tmp_path / "dtrace")]
    for number, text in (
        await said(source, nowhere, 22),
        await said(source, refusing("dtrace: nonsense"), 22),
    ):
        assert number == status
        assert ("\nFAIL" in text) == bool(status)


async def test_neither(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If sock_diag is refused too, check fails, whatever source is configured."""

    def refuse(*_: object) -> list[ListeningSocket]:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(inet_diag, "listeners", refuse)
    for source in ("auto", "sock_diag"):
        status, text = await said(source, [str(tmp_path / "dtrace")])
        assert status == 1
        assert re.search(
            r"^FAIL  sock_diag .*not permitted\n +-> it needs Linux", text, re.MULTILINE
        )


@pytest.mark.parametrize("word", ["not_found", "systemtap", "not_permitted", *LACKING])
async def test_advice(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice fits the reason: no dtrace(1), another dtrace, no permission, or the kernel."""
    command = refusing("dtrace: could not enable tracing: Permission denied")
    if word == "not_found":
        command = [str(tmp_path / "dtrace")]
    elif word == "systemtap":
        script = tmp_path / "dtrace"
        script.write_text("#!/usr/bin/python3\n# SystemTap's dtrace\n", encoding="utf-8")
        script.chmod(0o755)
        command = [str(script)]
    monkeypatch.setattr(kernel, "look", lambda: LACKING.get(word, GOOD))
    status, text = await said("auto", command)
    advice = re.escape(reasons.REASONS[word].advice)
    assert re.search(rf"^no    dtrace\(1\) .*\n +-> {advice}$", text, re.MULTILINE), text
    *_, last = [line for line in text.splitlines() if not line.startswith(" ")]
    if word in LACKING:
        because = reasons.REASONS[word].because
        assert last.split(maxsplit=3)[3] == f"cannot have DTrace, because {because}"
        assert last.startswith("no ")
    else:
        assert last.split(maxsplit=3)[3] == f"with dtrace(1) it would also have: {reasons.MISSING}"
        assert last.startswith("hint ")
    assert status == 0
    _, whole = await object_of("auto", command)
    assert whole["reason"] == word


async def test_what_a_container_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing privileges, a missing mount and a container give advice, and are not failures."""
    one = Host("5.4.0", True, "", "", 1000, ("CAP_SYSLOG",), True, "docker")
    monkeypatch.setattr(kernel, "look", lambda: one)
    status, text = await said("auto", [str(tmp_path / "dtrace")])
    assert status == 0
    for line, advice in (
        ("no    tracefs +not mounted", "mount -t tracefs"),
        ("no    privileges +user 1000, without CAP_SYSLOG, in a user namespace", "run as root"),
        ("hint  container +docker", "the kernel is the host's"),
    ):
        assert re.search(rf"^{line}.*\n +-> {advice}", text, re.MULTILINE), text


async def test_nobody_listens(fake_dtrace: FakeDTrace) -> None:
    """A configured port without a listener is a hint, not a failure."""
    for source, command in (("auto", fake_dtrace()), ("sock_diag", ["none"])):
        status, text = await said(source, command, 22, 80)
        assert status == 0
        found = re.findall(r"^hint  listener (\d+) +(.*)$", text, re.MULTILINE)
        assert found == [("80", "nobody listens at port 80 in this network namespace")]


async def test_nobody_at_many_ports() -> None:
    """An entry with many ports without a listener gives one hint with their number."""
    ports = (range(21, 23), range(8000, 8011))
    listeners = tuple(ListenerConfig(ports, address=address) for address in ("", "192.0.2.1"))
    out = io.StringIO()
    assert await check.check(Config("sock_diag", HostConfig(listeners=listeners)), out) == 0
    found = re.findall(r"^hint  listener (\d+) +(.*)$", out.getvalue(), re.MULTILINE)
    assert found == [
        ("21", "nobody listens at 12 ports from 21 to 8010 in this network namespace"),
        ("21", "nobody listens at 13 ports from 21 to 8010 of 192.0.2.1 in this network namespace"),
    ]


async def test_nobody_where_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hints name addresses and namespaces without a listener, and an unused exclude_ports."""
    monkeypatch.setattr(Namespaces, "begin", lambda *_: None)
    listeners = (
        ListenerConfig((range(22, 23),), "any"),
        ListenerConfig((range(22, 23),), "wildcard", address="*"),
        ListenerConfig((range(22, 23),), "elsewhere", address="192.0.2.1"),
        ListenerConfig((range(22, 23),), "gone", netns="nowhere-at-all"),
        ListenerConfig((range(22, 23),), "inode", netns="4026"),
    )
    wanted = HostConfig(listeners=listeners, exclude_ports=(range(23, 24),))
    out = io.StringIO()
    assert await check.check(Config("sock_diag", wanted), out) == 0
    found = re.findall(r"^hint  (\S+)(?: \d+)? +(.*)$", out.getvalue(), re.MULTILINE)
    assert [one for one in found if one[0] in ("listener", "netns", "exclude_ports")] == [
        ("exclude_ports", "not used: the configuration names listeners, so no others are watched"),
        ("listener", "nobody listens at port 22 of 192.0.2.1 in this network namespace"),
        ("netns", "no network namespace has the inode 4026 now"),
        ("netns", "no network namespace has the name nowhere-at-all now"),
    ]
    out = io.StringIO()
    wanted = HostConfig(exclude_ports=(range(23, 24),))
    assert await check.check(Config("sock_diag", wanted), out) == 0
    assert "exclude_ports" not in out.getvalue()


async def test_json(fake_dtrace: FakeDTrace, tmp_path: Path) -> None:
    """The JSON is one object with the same findings as the text, and says if all works."""
    for source, command in (
        ("auto", fake_dtrace()),
        ("auto", [str(tmp_path / "dtrace")]),
        ("dtrace", fake_dtrace({"refuse": "fbt::tcp_conn_request:entry"})),
    ):
        status, whole = await object_of(source, command, 22)
        assert whole.keys() == {"works", "reason", "findings", "host"}
        assert whole["works"] == (status == 0)
        assert whole["host"]["kernel"] == "6.12.1"
        assert whole["host"]["obstacles"] == []
        _, text = await said(source, command, 22)
        lines = [line.split(maxsplit=1) for line in text.splitlines() if line[0] != " "]
        assert [result for result, _ in lines] == [one["result"] for one in whole["findings"]]
        for (_, rest), finding in zip(lines, whole["findings"], strict=True):
            assert rest.startswith(finding["what"])
            assert rest.endswith(finding["found"])


async def test_owners(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Check lists the owners of the watched listeners, at most 20 lines."""
    path = f"/docker/{'0123456789abcdef' * 4}"
    sockets = [OwnedSocket("*", 22, 0, 7), OwnedSocket("127.0.0.1", 80, 0, None)]
    monkeypatch.setattr(inet_diag, "owned", lambda *_: sockets)
    monkeypatch.setattr(cgroups, "paths", lambda _: {7: path})
    monkeypatch.setattr(Namespaces, "begin", lambda *_: None)
    monkeypatch.setattr(capabilities, "effective", lambda: capabilities.EVERY)
    nowhere = [str(tmp_path / "dtrace")]

    async def told(*ports: int) -> list[list[str]]:
        _, text = await said("sock_diag", nowhere, *ports)
        return [line.split(maxsplit=3) for line in text.splitlines() if "  listener " in line]

    expected = [
        ["ok", "listener", "22", "container 0123456789ab"],
        ["ok", "listener", "80", "unknown owner at 127.0.0.1"],
    ]
    assert await told() == expected
    assert await told(22) == expected[:1]
    sockets += [OwnedSocket("*", port, 0, None) for port in range(1000, 1030)]
    assert len(await told()) == 20
    _, text = await said("sock_diag", nowhere)
    assert re.search(r"^ok    listeners +and 12 more$", text, re.MULTILINE)
    assert "programs" not in text
    monkeypatch.setattr(capabilities, "effective", frozenset)
    _, text = await said("sock_diag", nowhere, 22)
    assert re.search(r"^no    programs .*\n +-> .*CAP_SYS_PTRACE", text, re.MULTILINE)
