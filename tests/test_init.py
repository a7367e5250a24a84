"""The service as the first process of a container."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lab.exporter import free_port
from lab.waiting import until

from exporter_process import EXPORTER, SECONDS, Exporter, write
from fake_steps import FOREVER, READY, FakeDTrace


def below(pid: int) -> dict[int, str]:
    """Return the states of all descendants of a process."""
    found: dict[int, str] = {}
    parents = {pid}
    for stat in sorted(Path("/proc").glob("[0-9]*/stat"), key=lambda path: int(path.parent.name)):
        try:
            text = stat.read_text(encoding="utf-8")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent = text.rpartition(")")[2].split()[:2]
        if int(parent) in parents:
            parents.add(int(text.split()[0]))
            found[int(text.split()[0])] = state
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="process 1 of a PID namespace is Linux'")
def test_first_process(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """As process 1, it drops privileges, reaps orphans, and passes signals and the status on."""
    unshare = [shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--pid", "--fork"]
    unshare.append("--kill-child")
    trial = subprocess.run([*unshare, "true"], capture_output=True, text=True)
    if trial.returncode:
        pytest.skip(f"no PID namespace may be made here: {trial.stderr.strip()}")
    command = fake_dtrace(READY, FOREVER)
    wrapper = tmp_path / "wrapper"
    # Its orphan ends at once.
    wrapper.write_text(f'#!/bin/sh\n(sleep 0 &)\nexec {" ".join(command)} "$@"\n')
    wrapper.chmod(0o755)
    path = write(tmp_path / "c.yml", [str(wrapper)])
    port = free_port()
    reading, writing = os.pipe()
    with subprocess.Popen(
        [*unshare, "--mount-proc", *EXPORTER, f"--web.listen-address=127.0.0.1:{port}",
         f"--config.file={path}"],
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[writing],
        env={**os.environ, "DTRACE_EXPORTER_READY_FD": str(writing)},
    ) as process:  # fmt: skip
        os.close(writing)
        try:
            with open(reading, "rb") as end:  # noqa: PTH123
                assert end.readline() == b"ready\n"
            exporter = Exporter(process, port)
            until(lambda: exporter.get("/-/ready") == "ready\n")
            first = min(below(process.pid))
            until(lambda: "Z" not in below(process.pid).values())
            rights = Path(f"/proc/{first}/status").read_text(encoding="utf-8")
            assert int(re.findall(r"CapPrm:\s*(\w+)", rights)[0], 16) == 0
            assert "NoNewPrivs:\t1" in rights
            path.write_text(json.dumps({**json.loads(path.read_text()), "source": "no"}))
            os.kill(first, signal.SIGHUP)
            failed = "dtrace_exporter_config_last_reload_successful 0.0"
            until(lambda: failed in exporter.get())
            os.kill(first, signal.SIGTERM)
            _, errors = process.communicate(timeout=SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
    assert process.returncode == 0
    assert "Traceback" not in errors
