"""The module that the probes are in goes away, on the model."""

from __future__ import annotations

import os
import signal
import subprocess

from lab.exporter import UP, StartExporter
from lab.model import DTRACE, Model
from lab.solaris import Sun
from lab.waiting import until

NAME = "unloaded"


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
        assert before.value("dtrace_session_restarts_total") == 0
        (session,) = running.pids()
        os.kill(session, signal.SIGSTOP)
        os.kill(session, signal.SIGKILL)
        until(lambda: unload() == 0, "the module is unloaded while the session is down")
        running.wait(UP, 0)
        until(lambda: "tcp_input_listener" in running.get("/-/ready")[1], "it says why", 120)
        with Model("illumos"):
            running.wait(UP, 1, seconds=180)
            assert not running.metrics().fell_since(before)
            assert running.stop() == 0
        # For the outer block to unload.
        subprocess.run(["insmod", "/usr/lib/solaris-model/illumos/ip.ko"], check=True)
