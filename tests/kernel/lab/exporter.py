"""A running exporter, and reading what it exports."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from prometheus_client.parser import text_string_to_metric_families

from lab.waiting import until

READY_SECONDS = 400
LEFT_SECONDS = 15
"""How long consumers may live on, in seconds. They notice within a second that their output is not
read; an emulated kernel then needs 2 to 4 seconds for each to detach its probes.
"""
UP = "dtrace_session_up"
LAST_RECORD = "dtrace_session_last_record_timestamp_seconds"
COMMAND = [sys.executable, "-m", "dtrace_exporter"]

Config = dict[str, Any] | str


class Metrics:
    """The samples of a scrape, by name and labels."""

    def __init__(self, text: str) -> None:
        self._samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def names(self) -> set[str]:
        """Return the names of all samples."""
        return {sample.name for sample in self._samples}

    def select(self, name: str, **labels: object) -> list[tuple[dict[str, str], float]]:
        """Return labels and value of each sample with a name and some labels."""
        wanted = {(key, str(value)) for key, value in labels.items()}
        return [
            (dict(sample.labels), sample.value)
            for sample in self._samples
            if sample.name == name and wanted <= sample.labels.items()
        ]

    def value(self, name: str, **labels: object) -> float | None:
        """Return the value of the only sample that fits, or None if none does."""
        found = self.select(name, **labels)
        assert len(found) <= 1, f"{name}{labels} fits {len(found)} samples: {found}"
        return found[0][1] if found else None

    def drops(self, **labels: object) -> dict[str, float]:
        """Return a listener's drops by reason, without those that are 0."""
        found = self.select("dtrace_tcp_listen_drops_total", **labels)
        reasons = {have["reason"]: value for have, value in found if value}
        assert len(reasons) == sum(value > 0 for _, value in found), f"{labels}: several listeners"
        return reasons

    def buckets(self, name: str, **labels: object) -> dict[float, float]:
        """Return a histogram's counts by upper bound, cumulative as exported."""
        found = self.select(f"{name}_bucket", **labels)
        bounds = {float(have["le"]): value for have, value in found}
        assert len(bounds) == len(found), f"{name}{labels} fits several histograms"
        return bounds

    def fell_since(self, before: Metrics) -> dict[str, tuple[float, float | None]]:
        """Return dtrace_ counters that fell or disappeared: the value before and the value now."""
        now = self._counters()
        return {
            f"{name}{sorted(labels)}": (was, now.get((name, labels)))
            for (name, labels), was in before._counters().items()
            if now.get((name, labels), -1.0) < was
        }

    def _counters(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for sample in self._samples
            if sample.name.startswith("dtrace_")
            and sample.name.endswith(("_total", "_bucket", "_sum", "_count"))
        }


class Exporter:
    """An exporter process with a configuration file of its own.

    Args:
        config: the configuration, as YAML text or what YAML would give; None for no file.
        args: further arguments.
        environment: variables to set besides the inherited ones.
    """

    def __init__(
        self,
        config: Config | None = None,
        args: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="exporter-")
        self.directory = Path(self._directory.name)
        self.config_file = self.directory / "config.yml"
        self.log_file = self.directory / "log"
        self.port = free_port()
        self._children: set[int] = set()
        given = []
        if config is not None:
            self.configure(config)
            given = [f"--config.file={self.config_file}"]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *COMMAND,
                    f"--web.listen-address=127.0.0.1:{self.port}",
                    "--web.enable-lifecycle",
                    *given,
                    *args,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
            )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it, and remove its files."""
        try:
            self.stop()
        finally:
            self._directory.cleanup()

    def configure(self, config: Config) -> None:
        """Write the configuration file; ``reload`` makes the exporter read it."""
        text = config if isinstance(config, str) else yaml.safe_dump(config)
        self.config_file.write_text(text)

    def get(self, path: str, method: str = "GET") -> tuple[int, str]:
        """Return status and body of a request; status 0 if there is no answer."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return 0, ""

    def wait_ready(self) -> None:
        """Wait until the sessions are up."""

        def ready() -> bool:
            assert self.process.poll() is None, (
                f"the exporter ended with {self.process.returncode}:\n{self.log()}"
            )
            return self.get("/-/ready")[0] == 200

        try:
            until(ready, "/-/ready answers 200", READY_SECONDS, every=0.25)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def wait_answers(self) -> None:
        """Wait until the web server answers, even if sessions are down."""
        until(lambda: self.get("/-/healthy")[0] == 200, "/-/healthy answers 200", READY_SECONDS)

    def reload(self) -> int:
        """Make the exporter read its configuration file again; return the answer's status."""
        return self.get("/-/reload", "POST")[0]

    def metrics(self, *names: str) -> Metrics:
        """Scrape all samples, or those of some names."""
        query = "&".join(f"name[]={name}" for name in names)
        status, text = self.get(f"/metrics?{query}")
        assert status == 200, f"/metrics answers {status} {text}\n{self.log()}"
        return Metrics(text)

    def value(self, name: str, **labels: object) -> float | None:
        """Scrape, and return the value of the only sample that fits, or None if none does."""
        return self.metrics(name).value(name, **labels)

    def wait(
        self, name: str, expected: float | None, seconds: float = 60.0, **labels: object
    ) -> None:
        """Wait until the only sample that fits has the expected value, or for None is absent."""
        last: list[float | None] = []

        def equal() -> bool:
            last[:] = [self.value(name, **labels)]
            return last[0] == expected

        try:
            until(equal, f"{name}{labels} is {expected}", seconds, every=0.25)
        except AssertionError as error:
            raise AssertionError(f"{error}; last value {last}\n{self.log()[-2000:]}") from None

    def settle(self) -> Metrics:
        """Wait until all events so far are in the metrics, and return the metrics."""
        since = time.time() + SETTLE_SECONDS

        def told() -> bool:
            metrics = self.metrics(UP, LAST_RECORD)
            up = [have["session"] for have, value in metrics.select(UP) if value]
            return bool(up) and all(
                (metrics.value(LAST_RECORD, session=session) or 0.0) > since for session in up
            )

        until(told, "two ticks of every session", every=0.25)
        return self.metrics()

    def pids(self) -> list[int]:
        """Return the process IDs of the sessions, oldest first."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, _, rest = stat.read_text().partition(") ")
                state, parent = rest.split()[:2]
            except (OSError, ValueError):
                continue
            if int(parent) == self.process.pid and state != "Z" and "(dtrace" in name:
                found.append(int(stat.parent.name))
        self._children.update(found)
        return sorted(found)

    def log(self) -> str:
        """Return the content of the exporter's log."""
        return self.log_file.read_text(errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and return the exit status.

        Raises:
            AssertionError: it does not end, or a session outlives it by LEFT_SECONDS.
        """
        if self.process.poll() is None:
            self.pids()
            self.process.send_signal(number)
        try:
            # An emulated machine takes a while to detach hundreds of probes.
            status = self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"does not end after signal {number}\n{self.log()}") from None
        until(
            lambda: not any(runs(pid) for pid in self._children),
            f"no process of a session is left of {self._children}",
            LEFT_SECONDS,
        )
        return status


StartExporter = Callable[..., Exporter]
"""The fixture ``exporter``: takes what Exporter takes, and ``ready=False`` not to wait."""
SETTLE_SECONDS = 2.5
"""A row printed this many seconds after an event certainly has it: two and a half ticks."""


def run(*args: str, config: Config | None = None, **options: Any) -> tuple[int, str]:
    """Run a command of the exporter to its end; return the exit status and its output."""
    with tempfile.TemporaryDirectory(prefix="exporter-") as directory:
        os.chmod(directory, 0o755)  # noqa: PTH101
        words = [*COMMAND, *args]
        if config is not None:
            file = Path(directory) / "config.yml"
            file.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
            words.append(f"--config.file={file}")
        done = subprocess.run(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            **options,
        )
        return done.returncode, done.stdout


def free_port() -> int:
    """Return a port without a listener."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def runs(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(") ")[2][0] not in "ZX"
