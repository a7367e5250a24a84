#!/usr/bin/env python3
"""Stands in for dtrace(1) in unit tests, and behaves as the real one was seen to behave.

It accepts -s FILE, -x OPTION, -C, -I DIRECTORY, -p PID, -q, -Z, -w, -e and -V, or -l and -n PROBE.
FAKE_DTRACE is, or names a file with, a JSON list of steps that it runs when the program would
start. Without FAKE_DTRACE the steps are ready, and then ticks.

    {"ready": HOME}             print the ready row; HOME is a string
    {"tick": N}                 N heartbeats, one each interval of the tick probe; true: for ever
    {"generation": G}           Linux: start one of the sets, 0 or 1, again, without rows
    {"rows": [ROW, ...]}        Linux: the content of the sets from now on, as "SET ROW", SET 0 or
                                1; Solaris and illumos: rows that the next heartbeat prints, once,
                                where {now} is the time in the form of heartbeats
    {"print": LINE}             print a line on standard output, or a list of lines
    {"stderr": LINE}            print the same on standard error
    {"raw": BASE64}             print bytes on standard output
    {"sleep": SECONDS}
    {"wait": PATH}              wait until the file exists
    {"save": PATH}              write {"argv": [...], "program": TEXT, "pid": N} to the file
    {"once": {"mark": PATH, "steps": [STEP, ...]}}
                                if the file does not exist, create it and run these steps instead
    {"calls": [STEP, ...]}      the steps if the program is a NAME_calls.d; the default is ready,
                                and then ticks; such a program is not saved
    {"unix": [STEP, ...]}       the same for linux_unix.d
    {"script": [STEP, ...]}     the steps if the program is a user's own script; the default is
                                ready, and then ticks. In these steps rows are those that each
                                heartbeat prints, as "INDEX;KEY;...;VALUE"
    {"final": [ROW, ...]}       print these rows of a script at once, as for an aggregation that
                                the script empties
    {"abort": true}             die of a failed assertion
    {"exit": CODE}              exit at once
    {"become": SCRIPT}          become a shell that runs a script
    {"forever": LINE}           print a line on standard output again and again, without a pause;
                                {now} in it is the time in the form of heartbeats
    {"ignore": SIGNAL}          ignore "SIGINT" or "SIGTERM" from the start
    {"refuse": PROBE}           fail as Linux 6.1 does if the program has that probe; not with -e
    {"lacks": [TEXT, WHY]}      fail to compile a program with that text, for this reason
    {"functions": [["ip", "tcp_input_listener"]]}
                                the kernel's functions with their modules, for -l; the default is
                                Linux's tcp_conn_request
    {"unprivileged": true}      fail as for any user but root

It prints as its program does. With a program that has sets, such as Linux's, a heartbeat is a tick
line and both sets, set 0 first, each after a line with the time when it started. With any other
program a heartbeat is the new rows and a tick line.

After the last step it waits for a signal. SIGTERM or SIGINT ends it as END does: a blank line, a
heartbeat, a blank line, exit 0. Before the program would start, either of them just kills it.

A program that is only BEGIN { exit(N); } ends with N before all of these steps. -l lists the
entries and returns of the functions that match each -n.
"""

from __future__ import annotations

import binascii
import getopt
import json
import os
import re
import signal
import sys
import time
from itertools import repeat
from pathlib import Path
from typing import Any, NoReturn

_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "msec": 1e-3, "s": 1.0, "sec": 1.0, "": 1.0}
_DEFAULT = '[{"ready": "4026531840"}, {"tick": true}]'
_AT_START = {"functions", "ignore", "lacks", "once", "refuse", "save", "unprivileged"}
_USAGE = 2
_LINUX = [["vmlinux", "tcp_conn_request"]]
_FBT_NAMES = ("entry", "return")
_SETS = "set %d"
# A program of ours about processes, whichever of its parts are left out.
_CALLS = re.compile(r'\A(?!.*"listener %x).*\bready 5 ', re.DOTALL)
_UNIX = re.compile(r"^ \* linux_unix\.d ", re.MULTILINE)
_SCRIPT = re.compile(r"\\036(t[0-9a-f]{16}) ready")
_DESTRUCTIVE = re.compile(r"\b(?:system|copyout|panic|breakpoint|chill|stop|raise) ?\(")
_PRAGMA = re.compile(r"^#pragma D option destructive(=unset)?$", re.MULTILINE)
_EXIT = re.compile(r"BEGIN\s*\{\s*exit\(([0-9]+)\);\s*\}")


def _out(text: str) -> None:
    os.write(1, text.encode() + b"\n")


def _say(text: str) -> None:
    os.write(2, f"dtrace: {text}\n".encode())


def _fail(text: str, code: int = 1) -> NoReturn:
    _say(text)
    sys.exit(code)


def _steps() -> list[dict[str, Any]]:
    """Return the steps that FAKE_DTRACE has or names."""
    text = os.environ.get("FAKE_DTRACE", "") or _DEFAULT
    if text[0] not in "[{":
        text = Path(text).read_text(encoding="utf-8")
    steps: list[dict[str, Any]] = json.loads(text)
    return steps


def _values(steps: list[dict[str, Any]], name: str) -> list[Any]:
    return [step[name] for step in steps if name in step]


def _interval(program: str) -> float:
    """Return the seconds between two heartbeats."""
    tick = re.search(r"\btick-(\d+)(hz|[a-z]*)", program)
    if not tick:
        return 0.05
    number = int(tick[1])
    return 1 / number if tick[2] == "hz" else number * _UNITS[tick[2]]


class _EndedError(Exception):
    """SIGTERM or SIGINT has arrived."""


class _Consumer:
    def __init__(self, program: str, ignored: set[signal.Signals]) -> None:
        self._interval = _interval(program)
        self._has_sets = program.count(_SETS) > 1
        found = _SCRIPT.search(program)
        self._token = found[1] if found else ""
        self._held: list[str] = []
        self._began = [time.monotonic_ns(), time.monotonic_ns() + 1]
        self._sets: tuple[list[str], list[str]] = ([], [])
        self._new: list[str] = []
        self._signals = {signal.SIGTERM, signal.SIGINT}
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            self._signals.remove(signal.SIGINT)
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        self._signals -= ignored

    def run(self, steps: list[dict[str, Any]]) -> None:
        try:
            for step in steps:
                ((name, value),) = step.items()
                getattr(self, f"_do_{name}")(value)
                self._pause(0)
            while True:
                self._pause(3600)
        except _EndedError:
            _out("")
            self._beat()
            _out("")

    def _pause(self, seconds: float) -> None:
        if signal.sigtimedwait(self._signals, seconds):
            raise _EndedError

    def _tell(self, what: str, *fields: str) -> None:
        """Print a row of a script."""
        _out("\n\x1e" + "\x1f".join((f"{self._token} {what}", *fields)) + "\x1e")

    def _beat(self) -> None:
        if self._token:
            for row in self._held:
                index, *fields = row.split(";")
                self._tell(f"row {index}", *fields)
            self._tell(f"tick {time.monotonic_ns()}")
            return
        for row in self._new:
            _out(row.replace("{now}", str(time.monotonic_ns())))
        self._new.clear()
        _out(f"tick {time.monotonic_ns()}")
        for began, rows in zip(self._began, self._sets, strict=True) if self._has_sets else ():
            _out(f"set {began}")
            for row in rows:
                _out(row)

    def _do_final(self, rows: list[str]) -> None:
        for row in rows:
            index, *fields = row.split(";")
            self._tell(f"final {index}", *fields)

    def _do_abort(self, _: bool) -> None:
        os.abort()

    def _do_ready(self, home: str) -> None:
        if self._token:
            self._tell("ready")
            return
        _out(f"ready 5 {home}")

    def _do_tick(self, times: int) -> None:
        for _ in repeat(None) if times is True else range(times):
            self._pause(self._interval)
            self._beat()

    def _do_generation(self, generation: int) -> None:
        self._sets[generation].clear()
        self._began[generation] = time.monotonic_ns()

    def _do_rows(self, rows: list[str]) -> None:
        if self._token:
            self._held = rows
            return
        if not self._has_sets:
            self._new += rows
            return
        for number, held in enumerate(self._sets):
            held[:] = [row[2:] for row in rows if row.startswith(f"{number} ")]

    def _do_print(self, lines: str | list[str]) -> None:
        for line in [lines] if isinstance(lines, str) else lines:
            _out(line)

    def _do_stderr(self, lines: str | list[str]) -> None:
        for line in [lines] if isinstance(lines, str) else lines:
            os.write(2, line.encode() + b"\n")

    def _do_raw(self, data: str) -> None:
        os.write(1, binascii.a2b_base64(data))

    def _do_sleep(self, seconds: float) -> None:
        self._pause(seconds)

    def _do_wait(self, path: str) -> None:
        while not Path(path).exists():
            self._pause(0.01)

    def _do_become(self, script: str) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
        os.execv("/bin/sh", ["sh", "-c", script])

    def _do_forever(self, line: str) -> None:
        while True:
            _out(line.format(now=time.monotonic_ns()))
            self._pause(0)

    def _do_exit(self, code: int) -> None:
        sys.exit(code)


def _list(descriptions: list[str], functions: list[list[str]]) -> None:
    probes = [
        ("fbt", module, function, name) for module, function in functions for name in _FBT_NAMES
    ]
    _out(f"{'ID':>5} {'PROVIDER':>10} {'MODULE':>17} {'FUNCTION':>33} NAME")
    for description in descriptions:
        wanted = description.split(":")
        found = [
            (number, probe)
            for number, probe in enumerate(probes, 2435)
            if all(want in ("", have) for want, have in zip(wanted, probe, strict=True))
        ]
        for number, (provider, module, function, name) in found:
            _out(f"{number:5} {provider:>10} {module:>17} {function:>33} {name}")
        if not found:
            _say(f"failed to match {description}: No probe matches description")


def _save(path: str, program: str) -> None:
    new = Path(path + ".new")
    start = {"argv": sys.argv[1:], "program": program, "pid": os.getpid()}
    new.write_text(json.dumps(start), encoding="utf-8")
    new.rename(path)


def _main() -> None:
    # As in C, a reader that has gone away ends the process at the next line.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        flags, arguments = getopt.gnu_getopt(sys.argv[1:], "s:n:x:b:I:p:CqZwelV")
    except getopt.GetoptError as error:
        _fail(str(error), _USAGE)
    options = dict(flags)
    if "-V" in options:
        _out("dtrace: D 2.0.7")
        return
    steps = _steps()
    home, *_ = [*_values(steps, "ready"), "4026531840"]
    calls, *_ = [*_values(steps, "calls"), [{"ready": home}, {"tick": True}]]
    unix, *_ = [*_values(steps, "unix"), [{"ready": home}, {"tick": True}]]
    script_steps, *_ = [*_values(steps, "script"), [{"ready": home}, {"tick": True}]]
    steps = [step for step in steps if not {"calls", "unix", "script"} & set(step)]
    if _values(steps, "unprivileged"):
        _fail("run as root for tracing and listing probes", _USAGE)
    if "-l" in options:
        functions, *_ = [*_values(steps, "functions"), _LINUX]
        _list([value for flag, value in flags if flag == "-n"], functions)
        return
    if "-s" not in options:
        _fail("no probes specified")
    script = options["-s"]
    try:
        program = Path(script).read_text(encoding="utf-8")
    except OSError as error:
        _fail(f"failed to open {script}: {error.strerror}")
    for number, argument in enumerate(arguments, 1):
        if not re.search(rf"\${number}\b", program):
            reason = f"extraneous argument '{argument}' (${number} is not referenced)"
            _fail(f"failed to compile script {script}: {reason}")
    if over := _EXIT.fullmatch(program.strip()):
        _out("")
        sys.exit(int(over[1]))
    if _CALLS.search(program):
        own = unix if _UNIX.search(program) else calls
        steps = [*(step for step in steps if {"ignore", "lacks", "refuse"} & set(step)), *own]
    if _SCRIPT.search(program):
        steps = [
            *(step for step in steps if {"ignore", "lacks", "refuse"} & set(step)),
            *script_steps,
        ]
    for once in _values(steps, "once"):
        if not Path(once["mark"]).exists():
            Path(once["mark"]).touch()
            steps = once["steps"]
    for text, why in _values(steps, "lacks"):
        if text in program:
            _fail(f"failed to compile script {script}: {why}")
    permitted = ["-w" in options, *(not unset for unset in _PRAGMA.findall(program))][-1]
    if _DESTRUCTIVE.search(program) and not permitted:
        _fail(f"failed to compile script {script}: Destructive actions not allowed")
    for path in _values(steps, "save"):
        _save(path, program)
    if "-e" in options:
        return
    for probe in _values(steps, "refuse"):
        if probe in program:
            full = probe if ":" in probe else f"fbt:vmlinux:{probe}"
            reason = f"Failed to enable {full}: Operation not supported"
            _fail(f"could not enable tracing: {reason}")
    ignored = {getattr(signal, name) for name in _values(steps, "ignore")}
    _Consumer(program, ignored).run([step for step in steps if not _AT_START & set(step)])


if __name__ == "__main__":
    _main()
