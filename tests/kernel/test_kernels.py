"""Every case of cases/ on every kernel: the exporter and a real DTrace in a virtual machine."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import guest
import pytest

pytestmark = pytest.mark.kernel

HERE = Path(__file__).resolve().parent
BOOT_SECONDS = 240
SILENT_SECONDS = 600
"""Longer than lab.report lets a case and its fixtures run."""
BOOTS = 3


def all_cases() -> list[str]:
    """Return the cases as ``backlog::test_q_full``, read from the sources without running them."""
    return [
        f"{path.stem}::{node.name}"
        for path in sorted((HERE / "cases").glob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


_building = threading.Lock()
# An emulated machine keeps one processor busy; more machines would only make cases slow.
_running = threading.Semaphore(os.cpu_count() or 1)

EVERYTHING = bool(os.environ.get("EVERY_KERNEL"))
"""Whether every case runs on every kernel that can run it; ``make kernel`` says so."""
UNTIL = float(os.environ.get("KERNEL_UNTIL", "inf"))
"""After this Unix time no more cases start, and those that are left are listed."""
_TOO_LATE = "not before the time of KERNEL_UNTIL"

# Cases that depend on the kernel's implementation; all others run on one kernel.
_BY_KERNEL = (
    "addresses",
    "backlog",
    "by_hand",
    "final_ack",
    "half_open",
    "handshake",
    "interrupts",
    "kinds",
    "owners",
    "refusals",
    "refused",
    "synack_retransmits",
    "unattributed",
    "unix_drops",
)

# Cases that need only their own exporters, and a machine of their own to save time.
_ALONE = (
    "prometheus_alerts",
    "prometheus_verdicts",
    "remote",
    "script_service",
    "scripts",
    "sessions",
    "soak",
)

Group = tuple[str, str]
"""A kernel and a machine. Cases of a kernel share a machine if they need nothing special or the
same extras; some have a machine of their own.
"""


def group(kernel: str, case: str) -> Group:
    """Return the machine in which a case runs."""
    return kernel, guest.machine(case) or ("alone" if file_of(case) in _ALONE else "")


def file_of(case: str) -> str:
    """Return the file that has a case, without its suffix."""
    return case.partition("::")[0]


def runs_on(kernel: str, case: str) -> bool:
    """Tell whether a case runs on a kernel."""
    if kernel == guest.REALTIME or case.startswith(guest.REALTIME_CASES):
        return kernel == guest.REALTIME and case.startswith(guest.REALTIME_CASES)
    if kernel == guest.MODEL_KERNEL:
        return True
    if guest.machine(case) or file_of(case) in _ALONE:
        return False
    return EVERYTHING or file_of(case) in _BY_KERNEL


class Run:
    """One boot of a guest; the results arrive while it runs.

    Args:
        kernel: a key of guest.KERNELS.
        cases: the cases to run in it.
        logs: a directory for the output of the console and of the second serial port.
    """

    def __init__(self, kernel: str, cases: list[str], logs: Path) -> None:
        self._kernel = kernel
        self._cases = cases
        self._logs = logs
        self._results: dict[str, dict[str, Any]] = {}
        self._ended: dict[str, Any] | None = None
        self._change = threading.Condition()
        self._qemu: subprocess.Popen[bytes] | None = None
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, name=kernel)
        self._thread.start()

    def result(self, case: str) -> dict[str, Any]:
        """Wait for a case's result; its keys are ``outcome`` and ``text``."""
        with self._change:
            self._change.wait_for(lambda: case in self._results or self._ended)
            if case in self._results:
                return self._results[case]
            end = self._ended
            assert end is not None
            if end["outcome"] == "failed":
                # Show the console only once.
                self._ended = {"outcome": "failed", "text": end["text"].partition("\n")[0]}
            return end

    def cancel(self) -> None:
        """End the guest at any point."""
        self._cancelled = True
        if self._qemu is not None:
            self._qemu.kill()
        self._thread.join()

    def _run(self) -> None:
        end = {"outcome": "failed", "text": "the run was cancelled"}
        try:
            for _ in range(BOOTS):
                with _running:
                    end = self._boot()
                if not (end.get("died") and self._left()):
                    break
                # The emulation is not perfect: sometimes a kernel hits an int3 that it had patched
                # out, or dies before init. A real fault occurs again.
                first = end["text"].partition("\n")[0]
                guest.deaths.append(f"Linux {self._kernel}: {first}, in {self._left()[0]}")
        except guest.UnavailableError as error:
            # Where guests are known to run, it is a failure if they do not.
            outcome = "failed" if os.environ.get("CI") else "skipped"
            guest.left_out.append(f"Linux {self._kernel}: {error}")
            end = {"outcome": outcome, "text": str(error)}
        except Exception as error:
            end = {"outcome": "failed", "text": f"the harness failed: {error!r}"}
        finally:
            with self._change:
                self._ended = end
                self._change.notify_all()

    def _left(self) -> list[str]:
        return [case for case in self._cases if case not in self._results]

    def _boot(self) -> dict[str, Any]:
        if time.time() > UNTIL:
            return self._too_late()
        left = self._left()
        with _building:
            made = guest.build(self._kernel, guest.extras_of(self._kernel, left))
        console, report = self._logs / "console", self._logs / "report"
        report.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix="guest-", ignore_cleanup_errors=True) as scratch:
            initrd = Path(scratch) / "initrd"
            guest.initrd(made, [case.replace("::", ".py::") for case in left], initrd)
            if self._cancelled:
                return {"outcome": "failed", "text": "the run was cancelled"}
            ports = ("-serial", f"file:{console}", "-serial", f"file:{report}")
            command = [*guest.qemu(made, initrd, "cases"), *ports]
            self._qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            try:
                died, why = self._read(report)
            finally:
                self._qemu.kill()
                self._qemu.wait()
        if why == _TOO_LATE:
            return self._too_late()
        tail = "\n".join(console.read_text(errors="replace").splitlines()[-60:])
        return {"outcome": "failed", "text": f"{why}\n--- {console}\n{tail}", "died": died}

    def _too_late(self) -> dict[str, Any]:
        guest.late.append(f"Linux {self._kernel}: {', '.join(self._left())}")
        return {"outcome": "skipped", "text": _TOO_LATE}

    def _read(self, report: Path) -> tuple[bool, str]:
        """Read the report while it grows; return whether the guest died, and how the run ended."""
        assert self._qemu is not None
        offset = 0
        deadline = time.monotonic() + BOOT_SECONDS
        while True:
            ended = self._qemu.poll() is not None
            text = report.read_bytes()[offset:] if report.exists() else b""
            for line in text.splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                offset += len(line)
                message = json.loads(line)
                deadline = time.monotonic() + SILENT_SECONDS + guest.soak_seconds()
                if message["event"] == "case":
                    with self._change:
                        self._results[message["case"]] = message
                        self._change.notify_all()
                elif message["event"] == "note":
                    guest.notes.append(f"Linux {self._kernel}: {message['text']}")
                elif message["event"] == "broken":
                    return False, message["text"]
                elif message["event"] == "end":
                    return False, "the guest did not run this case"
            if time.time() > UNTIL:
                return False, _TOO_LATE
            if ended:
                return True, "the guest ended before its time"
            if time.monotonic() > deadline:
                return True, "the guest hangs"
            time.sleep(0.2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Create a test of every case for every kernel that can run it."""
    pairs = [
        (kernel, case) for kernel in guest.KERNELS for case in all_cases() if runs_on(kernel, case)
    ]
    metafunc.parametrize(("kernel", "case"), pairs, ids=[f"{k}-{c}" for k, c in pairs])


@pytest.fixture(scope="session")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Group, Run]]:
    """Boot each machine that a selected test needs once."""
    wanted: dict[Group, list[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.function is test_case:
            kernel, case = (str(item.callspec.params[name]) for name in ("kernel", "case"))
            wanted.setdefault(group(kernel, case), []).append(case)
    started = {
        key: Run(key[0], cases, tmp_path_factory.mktemp(f"linux-{key[0]}-"))
        for key, cases in sorted(wanted.items(), key=lambda item: item[0][1])
    }
    yield started
    for run in started.values():
        run.cancel()


def test_case(kernel: str, case: str, runs: dict[Group, Run]) -> None:
    """A case passes inside a guest."""
    result = runs[group(kernel, case)].result(case)
    if result["outcome"] == "skipped":
        pytest.skip(result["text"])
    if result["outcome"] == "failed":
        pytest.fail(result["text"], pytrace=False)
