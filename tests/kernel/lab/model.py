"""The models of other kernels' TCP listeners: modules that a script drives; see ../model."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab.waiting import until

MODULES = Path("/usr/lib/listeners-model")
FILES = Path("/sys/kernel/debug/listeners")
DTRACE = str(Path(__file__).resolve().parents[1] / "model/dtrace")
"""Stands in for dtrace(1): it makes of a program for the model one that Linux' DTrace can run."""
SOLARIS = ("illumos", "solaris10")
FREEBSD = ("freebsd13", "freebsd14")


class Model:
    """The module of a generation, loaded until the block ends.

    Args:
        generation: one of SOLARIS or of FREEBSD.
    """

    def __init__(self, generation: str) -> None:
        self.generation = generation
        (self._file,) = (MODULES / generation).iterdir()

    def __enter__(self) -> Self:
        subprocess.run(["insmod", self._file], check=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A consumer that has just ended keeps its probes for some more seconds.
        until(
            lambda: subprocess.run(["rmmod", self._file.stem], capture_output=True).returncode == 0,
            "the model can be unloaded",
        )

    def run(self, *lines: str) -> None:
        """Run events in their order.

        Args:
            lines: commands of its script.c, such as ``syn web count 3 from 192.0.2.7``.

        Raises:
            OSError: EINVAL: a line is not possible; those before it have been run.
        """
        script = os.open(FILES / "script", os.O_WRONLY)
        try:
            for line in lines:
                try:
                    os.write(script, line.encode())
                except OSError as error:
                    raise OSError(error.errno, f"{error.strerror}: {line}") from None
        finally:
            os.close(script)

    def run_on_both(self, *lines: str) -> None:
        """Run the same events on both CPUs at once."""
        errors: list[OSError] = []

        def on(cpu: int) -> None:
            os.sched_setaffinity(threading.get_native_id(), {cpu})
            try:
                self.run(*lines)
            except OSError as error:
                errors.append(error)

        threads = [threading.Thread(target=on, args=[cpu]) for cpu in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def refuses(self, line: str) -> bool:
        """Run a line; return whether the model refuses it."""
        try:
            self.run(line)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return True
        return False

    def all_totals(self) -> list[dict[str, Any]]:
        """Return the totals of all listeners, also closed ones, oldest first."""
        return [json.loads(line) for line in (FILES / "totals").read_text().splitlines()]

    def totals(self, name: str) -> dict[str, Any]:
        """Return the totals of the newest listener of a name; see ../model/model.h."""
        lines = (FILES / "totals").read_text().splitlines()
        start = json.dumps({"name": name}).rstrip("}")
        found: dict[str, Any] = json.loads([line for line in lines if line.startswith(start)][-1])
        return found

    def eagers(self) -> int:
        """Return how many connections in memory have not been accepted."""
        return int((FILES / "eagers").read_text())
