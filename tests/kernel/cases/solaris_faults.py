"""The module that the probes are in goes away, on the model."""

from __future__ import annotations

import os
import re
import signal
import subprocess

from lab.exporter import UP, Exporter, StartExporter
from lab.model import DTRACE, MODULES, Model
from lab.report import note
from lab.solaris import Sun
from lab.waiting import until

FEATURES = "dtrace_session_feature_enabled"
NAME = "unloaded"


def reason(running: Exporter) -> str:
    """Return what /-/ready says."""
    return running.get("/-/ready")[1]


def unload() -> int:
    """Try to unload the module; return rmmod(8)'s status."""
    return subprocess.run(["rmmod", "ip"], capture_output=True).returncode


def test_module_unloaded(exporter: StartExporter, port: int) -> None:
    """The kernel does not let go of a module that is probed, and counting goes on.

    Should it be gone when a session starts, the session is down and says why, and it comes back
    when the module does.
    """
    config = {
        "source": "dtrace",
        "dtrace": {"command": [DTRACE], "program": "illumos", "interval": "200ms"},
    }
    listen = f"listen {NAME} zone 0 address * port {port} backlog 8"
    with Model("illumos") as model:
        model.run(listen)
        running = exporter(config)
        sun = Sun(model, running)
        model.run(f"syn {NAME} count 3")
        sun.agrees(NAME)
        assert unload() != 0
        model.run(f"syn {NAME} count 2")
        before = sun.agrees(NAME)
        assert before.value("dtrace_session_restarts_total", session="all") == 0
        # That for processes probes it, too.
        for pid in running.pids():
            os.kill(pid, signal.SIGKILL)
        until(lambda: unload() == 0, "the module is unloaded while the session is down")
        try:
            running.wait(UP, 0, session="all")
            # It says why in dtrace(1)'s words.
            why = until(
                lambda: re.findall(r"all: (dtrace\(1\) ended: exit status 1: .+)", reason(running)),
                "a start without the module has failed",
                120,
            )
            note(f"without the module: {why[0]}")
        finally:
            subprocess.run(["insmod", MODULES / "illumos/ip.ko"], check=True)
        running.wait(UP, 1, seconds=180, session="all")
        after = running.metrics()
        assert not after.fell_since(before)
        # What the kernel lacked for a while is not held against it for ever.
        features = [each.select(FEATURES, session="all") for each in (after, before)]
        assert features[0] == features[1]
        assert running.stop() == 0
