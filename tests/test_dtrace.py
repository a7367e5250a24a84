"""The exporter's questions to a host's dtrace(1), and its understanding of the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter.config import PROGRAMS
from dtrace_exporter.families import families
from dtrace_exporter.tracing import dtrace
from dtrace_exporter.tracing.dtrace import DTraceError, attempt, find_program, version
from fake_steps import FakeDTrace

pytestmark = pytest.mark.usefixtures("no_child_left")

Ask = Callable[[Sequence[str]], Awaitable[str]]

HEADER = "   ID   PROVIDER            MODULE                          FUNCTION NAME\n"
UNKNOWN = "dtrace: failed to match fbt:{}:entry: No probe matches description\n"
ILLUMOS = "12345        fbt                ip                tcp_input_listener entry\n"
SOLARIS10 = "23456        fbt                ip                  tcp_conn_request entry\n"
LINUX = " 2435        fbt           vmlinux                  tcp_conn_request entry\n"
REFUSED = "dtrace: failed to initialize dtrace: DTrace requires additional privileges\n"
NO_HOST = "ssh: Could not resolve hostname sol10-u9: Name or service not known\n"


def says(output: str = "", errors: str = "", status: int = 0) -> list[str]:
    """Return a command that prints this and ends, whatever its arguments."""
    script = 'printf %s "$1"; printf %s "$2" >&2; exit "$3"'
    return ["sh", "-c", script, "sh", output, errors, str(status)]


def found(command: Sequence[str]) -> str:
    """Return the program that a host needs."""
    return asyncio.run(find_program(command))


def why_not(command: Sequence[str]) -> str:
    """Return the reason why the program for a host cannot be determined."""
    with pytest.raises(DTraceError) as error:
        found(command)
    return str(error.value)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("dtrace: D 2.0.7\n", "2.0.7"),
        ("dtrace: Sun D 1.6.3\n", "1.6.3"),
        ("dtrace: Oracle D 1.23\r\n", "1.23"),
        ("Warning: Permanently added 'sol10' to the list.\r\ndtrace: Sun D 1.2\n", "1.2"),
        ("", ""),
        (" \n", ""),
        ("dtrace: D \x1b[31m2.0\x07\n", "[31m2.0"),
        ("v" * 10_000, "v" * 32),
    ],
)
def test_version(output: str, expected: str) -> None:
    """The version is the last word of the answer, limited in length and printable."""
    assert asyncio.run(version(says(output))) == expected


async def test_no_version(fake_dtrace: FakeDTrace, tmp_path: Path) -> None:
    """Any user can get the version; a command that fails or does not exist gives none."""
    assert await version(fake_dtrace({"unprivileged": True})) == "2.0.7"
    assert await version(says("dtrace: D 2.0.7\n", status=1)) == ""
    assert await version([str(tmp_path / "no")]) == ""


async def test_attempt(fake_dtrace: FakeDTrace, tmp_path: Path) -> None:
    """A successful trial gives no reason; a refused one gives the reason in dtrace(1)'s words."""
    assert await attempt(fake_dtrace()) == ""
    assert await attempt(["true"]) == ""
    assert await attempt(["false"]) == "false ended with exit status 1"
    reason = await attempt([str(tmp_path / "no")])
    assert reason == f"cannot start {tmp_path}/no: No such file or directory"
    reason = await attempt(fake_dtrace({"unprivileged": True}))
    assert reason == "dtrace: run as root for tracing and listing probes"
    assert await attempt(says(errors=NO_HOST, status=255)) == NO_HOST.strip()


def test_attempt_behind_a_shell(fake_dtrace: FakeDTrace, tmp_path: Path) -> None:
    """A command that passes its words through a shell, as ssh does, passes the trial unharmed."""
    script = tmp_path / "far"
    script.write_text('#!/bin/sh\nexec sh -c "$*"\n', encoding="utf-8")
    script.chmod(0o755)
    command = [str(script), *fake_dtrace({"functions": [["ip", "tcp_input_listener"]]})]
    assert asyncio.run(attempt(command)) == ""
    assert found(command) == "illumos"


async def test_reason_begins_with_what_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long PATH is, the reason starts with what is missing."""
    monkeypatch.setenv("PATH", ":".join(f"/nowhere/{number}" for number in range(100)))
    reason = await attempt(["no-such-command"])
    assert reason.startswith("cannot start no-such-command: not in any directory of PATH")


async def test_reason_is_fit_to_print() -> None:
    """The reason is one line of limited length, without control characters."""
    text = "x" * 9999 + "\n\x1b[2J\x1b[1mroot\u202e\r\n\n\x07 all  good\n"
    reason = await attempt(says(errors=text, status=1))
    assert reason.endswith("xxx [2J [1mroot all good")
    assert len(reason) == 300
    assert await attempt(says("\x1b\n", status=9)) == "sh ended with exit status 9"


def answer(ask: Ask, script: str) -> str:
    """Return the answer that a shell script gives, or the error, within a minute."""

    async def test() -> str:
        async with asyncio.timeout(60):
            try:
                return await ask(["sh", "-c", script])
            except DTraceError as error:
                return str(error)

    return asyncio.run(test())


@pytest.mark.parametrize("script", ["sleep 60; exit 0", "exec >&- 2>&-; sleep 60; exit 0"])
def test_one_that_does_not_end(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that hangs is ended with all its children, even if it has closed its output."""
    monkeypatch.setattr(dtrace, "_TRIAL_SECONDS", 0.3)
    assert answer(attempt, script) == "sh did not end within 0.3 s"
    assert answer(find_program, script) == "sh did not end within 0.3 s"
    assert answer(version, script) == ""


def test_one_that_does_not_stop_printing() -> None:
    """A command that prints without end is ended before the memory is full."""
    script = "exec yes dtrace: D 2.0.7"
    assert answer(attempt, script) == "sh does not stop printing"
    assert answer(find_program, script) == "sh does not stop printing"
    assert answer(version, script) == ""


@pytest.mark.parametrize(
    ("functions", "program"),
    [
        ([["ip", "tcp_input_listener"]], "illumos"),
        ([["ip", "tcp_conn_request"]], "solaris10"),
        ([["kernel", "syncache_add"]], "freebsd"),
        ([["vmlinux", "tcp_conn_request"]], "linux"),
        ([["genunix", "fop_open"], ["ip", "tcp_input_listener"], ["ip", "tcp_accept"]], "illumos"),
    ],
)
def test_find_program(functions: list[list[str]], program: str, fake_dtrace: FakeDTrace) -> None:
    """The function in which a SYN reaches its listener shows which program a kernel needs."""
    assert found(fake_dtrace({"functions": functions})) == program


def test_every_program_that_is_found_is_there() -> None:
    """Every program that can be found is one that the configuration knows."""
    assert families().keys() == {*PROGRAMS} - {"auto"}


@pytest.mark.parametrize(
    "functions",
    [
        [],
        [["ip", "tcp_input_data"], ["tcp", "tcp_input_listener"], ["ip", "xtcp_input_listener"]],
        [["ip", "tcp_input_listener_unbound"], ["vmlinux", "tcp_v4_conn_request"]],
    ],
)
def test_no_program_fits(functions: list[list[str]], fake_dtrace: FakeDTrace) -> None:
    """A kernel without these functions gives an error with advice; similar names do not count."""
    text = why_not(fake_dtrace({"functions": functions}))
    assert text == "no D program fits this kernel: set dtrace.program to the path of one"


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize(
    ("rows", "missing", "program"),
    [
        (ILLUMOS, ["ip:tcp_conn_request", "vmlinux:tcp_conn_request"], "illumos"),
        (SOLARIS10, ["ip:tcp_input_listener", "vmlinux:tcp_conn_request"], "solaris10"),
        (LINUX, ["ip:tcp_input_listener", "ip:tcp_conn_request"], "linux"),
        ("9" * 9 + ILLUMOS, [], "illumos"),
        (ILLUMOS.replace("\n", "\r\n"), [], "illumos"),
        (LINUX + SOLARIS10, [], "linux"),
        (SOLARIS10 + LINUX + ILLUMOS, [], "illumos"),
    ],
)
def test_outputs_as_they_are(rows: str, missing: list[str], program: str, status: int) -> None:
    """Real output is understood, whatever the exit status for the missing probes."""
    errors = "".join(map(UNKNOWN.format, missing))
    assert found(says(HEADER + rows, errors, status)) == program


@pytest.mark.parametrize(
    ("output", "errors", "status"),
    [
        (HEADER, UNKNOWN.format("ip:tcp_input_listener"), 0),
        (HEADER, UNKNOWN.format("ip:tcp_input_listener"), 1),
        (HEADER, "", 0),
        ("", "dtrace: probe description fbt:ip:x:entry does not match any probes\n", 1),
        ("", "", 0),
    ],
)
def test_none_matches(output: str, errors: str, status: int) -> None:
    """If dtrace(1) answers but has none of the probes, no program fits."""
    text = why_not(says(output, errors, status))
    assert text == "no D program fits this kernel: set dtrace.program to the path of one"


@pytest.mark.parametrize(
    ("errors", "status"),
    [
        (REFUSED, 1),
        ("dtrace: run as root for tracing and listing probes\n", 2),
        (NO_HOST, 255),
        ("ssh: connect to host sol10-u9 port 22: Connection refused\n", 255),
        ("Host key verification failed.\n", 255),
        ("bash: line 1: /usr/sbin/dtrace: No such file or directory\n", 127),
    ],
)
def test_it_cannot_be_asked(errors: str, status: int) -> None:
    """A refusal by dtrace(1), or by ssh on the way to it, is reported as the reason."""
    assert why_not(says(errors=errors, status=status)) == errors.strip()


def test_it_ends_without_a_word(tmp_path: Path) -> None:
    """The reason for a failure without a message is the exit status, or the missing command."""
    assert why_not(["false"]) == "false ended with exit status 1"
    missing = str(tmp_path / "no")
    assert why_not([missing]) == f"cannot start {missing}: No such file or directory"


@pytest.mark.parametrize(
    "output",
    [
        "fbt ip tcp_input_listener entry\n",
        "12345 fbt ip tcp_input_listener return\n",
        "12345 fbt ip tcp_input_listener entry more\n",
        "12345 sdt ip tcp_input_listener entry\n",
        "x12345 fbt ip tcp_input_listener entry\n",
        ILLUMOS.replace("\n", "").replace("entry", "ent\nry"),
        "\ufffd\x1b[1m" + ILLUMOS,
        HEADER + ILLUMOS.replace(" ip ", " ip\x01 "),
    ],
)
def test_hostile_output(output: str) -> None:
    """Only a whole line of a listing counts as an answer."""
    assert "no D program fits" in why_not(says(output))


@given(st.binary(max_size=2000), st.integers(0, 255))
def test_any_output(output: bytes, status: int) -> None:
    """Any bytes give the name of a program, or a printable reason of limited length."""
    with pytest.MonkeyPatch.context() as patch:

        async def run(*_: object) -> tuple[int, str]:
            return status, output.decode("utf-8", "replace")

        patch.setattr(dtrace, "run", run)
        try:
            name = asyncio.run(find_program(["dtrace"]))
        except DTraceError as error:
            name, text = "", str(error)
    assert name in families() or (0 < len(text) <= 300 and text.isprintable())
