"""A real Prometheus server, and queries to it."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from lab.exporter import free_port
from lab.waiting import until

Labels = dict[str, str]


class Prometheus:
    """A Prometheus server on loopback, with a data directory of its own.

    Args:
        config: its configuration, as YAML would give it.
        command: the server's program.
        files: further files that the configuration names, by their names.
        options: further options of the command.
    """

    def __init__(
        self,
        config: Any,
        command: str = "prometheus",
        files: dict[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._directory = TemporaryDirectory(prefix="prometheus-", ignore_cleanup_errors=True)
        directory = Path(self._directory.name)
        for name, text in {**(files or {}), "prometheus.yml": yaml.safe_dump(config)}.items():
            (directory / name).write_text(text)
        self._log_file = directory / "log"
        self._address = f"127.0.0.1:{free_port()}"
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    command,
                    f"--config.file={directory}/prometheus.yml",
                    f"--storage.tsdb.path={directory}/data",
                    f"--web.listen-address={self._address}",
                    *options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(lambda: self._get("/-/ready") is not None, "Prometheus is ready", 120)

    def query(self, text: str) -> list[dict[str, Any]]:
        """Return the result of an instant query: the series of a vector.

        Raises:
            AssertionError: Prometheus refuses the query.
        """
        found: list[dict[str, Any]] = self._ask("query", {"query": text})
        return found

    def query_range(
        self, text: str, start: float, end: float, step: float
    ) -> list[tuple[Labels, list[tuple[float, float]]]]:
        """Return labels of each series and its samples, time and value; seconds since 1970."""
        times = {"start": f"{start}", "end": f"{end}", "step": f"{step}"}
        return [
            (series["metric"], [(at, float(value)) for at, value in series["values"]])
            for series in self._ask("query_range", {"query": text, **times})
        ]

    def ask(self, path: str, parameters: Iterable[tuple[str, str]] = ()) -> Any:
        """Return the data of a path of the API, such as ``labels``."""
        return self._ask(path, list(parameters))

    def _ask(self, path: str, parameters: Any) -> Any:
        answer = self._get(f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        assert answer is not None, f"Prometheus does not answer {path}\n{self.log()}"
        result = json.loads(answer)
        assert result["status"] == "success", f"{parameters}: {result['error']}"
        data = result["data"]
        return data["result"] if isinstance(data, dict) and "result" in data else data

    def _get(self, path: str) -> str | None:
        assert self._process.poll() is None, self.log()
        try:
            with urllib.request.urlopen(f"http://{self._address}{path}", timeout=30) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            return error.read().decode() if error.code in (400, 422) else None
        except OSError:
            return None

    def log(self) -> str:
        """Return the end of the server's log."""
        return self._log_file.read_text(errors="replace")[-4000:]

    def stop(self) -> None:
        """Stop the server and remove its files."""
        self._process.terminate()
        self._process.wait()
        self._directory.cleanup()


def hasten(rules: str, times: int) -> str:
    """Return rules whose alerts wait only a fraction of their ``for`` and ``keep_firing_for``.

    Their expressions do not change. Nothing waits less than a second.

    Args:
        rules: the text of a file of rules.
        times: how many times faster.
    """
    units = {"s": 1, "m": 60, "h": 3600}

    def shorter(found: re.Match[str]) -> str:
        seconds = int(found[2]) * units[found[3]]
        return f"{found[1]}{max(seconds // times, 1)}s"

    return re.sub(r"(?m)^( +(?:for|keep_firing_for): )(\d+)([smh])$", shorter, rules)


def shorten(rules: str, times: int) -> str:
    """Return rules that look back over shorter times: ranges, offsets, and ``>= 600``.

    Args:
        rules: the text of a file of rules.
        times: the factor; no range becomes shorter than a second.
    """

    def shorter(found: re.Match[str]) -> str:
        seconds = int(found[0][:-1]) * {"s": 1, "m": 60}[found[0][-1]]
        return f"{max(seconds // times, 1)}s"

    inside = re.sub(
        r"\[[\dsm:]+\]|offset \d+[sm]", lambda one: re.sub(r"\d+[sm]", shorter, one[0]), rules
    )
    return inside.replace(">= 600", f">= {600 // times}")
