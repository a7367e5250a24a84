"""What cannot work gives a clear error, in check and in the service."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lab.compiling import compiled
from lab.exporter import UP, StartExporter, run
from lab.traffic import Clients, Listen
from lab.waiting import until

from dtrace_exporter.tracing.program import load
from dtrace_exporter.tracing.rendering import render, window

NOBODY = 65534
BROKEN = "fbt::tcp_conn_request:entry { @ = no_such_function(); }\n"
MISSING = "BEGIN { trace(1); } fbt::no_such_kernel_function:entry { trace(2); }\n"


def check(config: Any, **options: Any) -> tuple[int, str]:
    """Run the command check with a configuration."""
    return run("check", config=config, **options)


def test_check() -> None:
    """If all is well, check says so for every optional part, and exits with 0."""
    status, text = check({"source": "dtrace"})
    assert status == 0, text
    for feature in ("syn_drops", "established", "accepts", "accept_wait", "half_open_end"):
        assert feature in text, text


def test_no_dtrace(exporter: StartExporter) -> None:
    """If dtrace(1) is missing, the error names it, and its session is down."""
    config = {"source": "dtrace", "dtrace": {"command": ["/nowhere/dtrace"]}}
    status, text = check(config)
    assert (status, "/nowhere/dtrace" in text) == (1, True), text
    assert "Traceback" not in text
    running = exporter(config, ready=False)
    running.wait_answers()
    running.wait(UP, 0, session="all")
    assert running.get("/-/ready")[0] == 503
    until(lambda: "/nowhere/dtrace" in running.log(), "the reason is in the log")


def test_no_dtrace_auto(exporter: StartExporter) -> None:
    """With source auto and no dtrace(1), the exporter uses sock_diag."""
    running = exporter({"dtrace": {"command": ["/nowhere/dtrace"]}})
    info = running.metrics().select("dtrace_exporter_source_info")
    assert [labels["source"] for labels, _ in info] == ["sock_diag"]
    assert "sock_diag" in running.log()


def test_not_permitted() -> None:
    """For a user who may not trace, check says that permissions are missing."""
    status, text = check({"source": "dtrace"}, user=NOBODY, group=NOBODY, extra_groups=[])
    assert status == 1
    assert any(word in text.lower() for word in ("root", "permi", "privilege")), text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("program", "said"),
    [(BROKEN, "no_such_function"), (MISSING, "no_such_kernel_function")],
    ids=["does not compile", "missing function"],
)
def test_program(program: str, said: str, tmp_path: Path, exporter: StartExporter) -> None:
    """A program that DTrace refuses gives an error with DTrace's own reason."""
    file = tmp_path / "own.d"
    file.write_text(program)
    config = {"source": "dtrace", "dtrace": {"program": str(file)}}
    status, text = check(config)
    assert (status, said in text) == (1, True), text
    running = exporter(config, ready=False)
    running.wait_answers()
    running.wait(UP, 0, session="all")
    until(lambda: said in running.log(), "the reason is in the log", 90)
    assert running.get("/-/ready")[0] == 503


@pytest.mark.parametrize("flags", [[], ["-w"], ["-x", "destructive"]], ids=["", "-w", "-x"])
def test_destructive(flags: list[str], tmp_path: Path) -> None:
    """No program can run a command on the host, whatever its text and the command line allow."""
    file, done = tmp_path / "own.d", tmp_path / "done"
    file.write_text(f'#pragma D option destructive\nBEGIN {{ system("touch {done}"); }}\n')
    keys = {"command": ["dtrace", *flags], "program": str(file)}
    status, text = check({"source": "dtrace", "dtrace": keys})
    assert (status, "Destructive actions not allowed" in text) == (1, True), text
    assert not done.exists()


@pytest.mark.parametrize(
    ("member", "part", "gone", "stays"),
    [
        ("rcvq_space.time", "accept_wait", "accept_wait_seconds", "handshake_seconds"),
        ("srtt_us", "handshake", "handshake_seconds", "accept_wait_seconds"),
    ],
)
def test_missing_parts(
    member: str,
    part: str,
    gone: str,
    stays: str,
    port: int,
    tmp_path: Path,
    exporter: StartExporter,
    listen: Listen,
    clients: Clients,
) -> None:
    """A member that the kernel lacks removes only the series that need it."""
    file = tmp_path / "linux.d"
    file.write_text(load("linux").text.replace(member, "no_such_member"))
    config = {
        "source": "dtrace",
        "dtrace": {"program": str(file), "handshake": True},
        "listeners": [{"port": port}],
    }
    running = exporter(config)
    listener = listen(port, 4)
    clients.connect(2, port)
    listener.accept(2)
    metrics = running.settle()
    here = {"port": port, "address": "127.0.0.1"}
    assert metrics.value("dtrace_tcp_listen_syns_total", **here) == 2
    assert metrics.value("dtrace_tcp_listen_established_total", **here) == 2
    assert metrics.value("dtrace_tcp_listen_accepts_total", **here) == 2
    assert metrics.value(f"dtrace_tcp_listen_{gone}_count", **here) is None
    assert metrics.value(f"dtrace_tcp_listen_{stays}_count", **here) == 2
    features = {
        labels["feature"]: value
        for labels, value in metrics.select("dtrace_session_feature_enabled")
    }
    assert features == {each: float(each != part) for each in features}
    assert part in features


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("linux", ["established"]),
        ("linux", ["established", "half_open_end"]),
        ("linux", load("linux").parts),
        ("linux_calls", ["refused"]),
        ("linux_calls", load("linux_calls").parts),
        ("linux_unix", ["unix_io_uring"]),
        ("linux_unix", load("linux_unix").parts),
    ],
)
def test_less_some_parts(name: str, without: Sequence[str]) -> None:
    """DTrace compiles the rest of a program that lacks some parts."""
    text = render(load(name), window(1.0), without=without)
    assert compiled(text) == (0, "")


def test_bad_configuration() -> None:
    """A configuration with an error starts nothing, and one line names file, line and key."""
    status, text = run(config="listeners:\n  - port: 70000\n")
    assert status != 0
    assert "config.yml:2: listeners[0].port" in text, text
