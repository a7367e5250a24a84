"""A real Alertmanager with the example configuration sends one message for one bad listener."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from lab.exporter import free_port
from lab.waiting import until

import host_tools

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "config/alertmanager/alertmanager.yml"
CONFIG = yaml.safe_load(FILE.read_text(encoding="utf-8"))
RULES = yaml.safe_load(
    (ROOT / "config/prometheus/dtrace_exporter.alerts.yml").read_text(encoding="utf-8")
)
SEVERITY = {
    rule["alert"]: rule["labels"]["severity"]
    for group in RULES["groups"]
    for rule in group["rules"]
}
PACKAGE = "prometheus-alertmanager"

Labels = dict[str, str]


def of_listener(name: str, port: int, **more: str) -> Labels:
    """Return the labels of an alert about a listener."""
    where = {"job": "dtrace", "instance": "web1:9748", "address": "*", "port": str(port)}
    return {"alertname": name, "severity": SEVERITY[name], **where, **more}


def of_session(name: str, session: str, **more: str) -> Labels:
    """Return the labels of an alert about a session."""
    where = {"job": "dtrace", "instance": "web1:9748", "session": session}
    return {"alertname": name, "severity": SEVERITY[name], **where, **more}


class Alertmanager:
    """A running Alertmanager; ``messages`` has the labels of the alerts of each message it sent."""

    def __init__(self, directory: Path, command: str) -> None:
        self.messages: list[list[Labels]] = []
        self._address = f"127.0.0.1:{free_port()}"
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server = server
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = json.loads(json.dumps(CONFIG))
        config["route"] |= {"group_wait": "1s", "group_interval": "1s"}
        url = f"http://127.0.0.1:{server.server_port}/"
        config["receivers"] = [
            {"name": "operators", "webhook_configs": [{"url": url, "send_resolved": False}]}
        ]
        file = directory / "alertmanager.yml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        self._log = (directory / "log").open("wb")
        self._process = subprocess.Popen(
            [
                command,
                f"--config.file={file}",
                f"--storage.path={directory}/data",
                f"--web.listen-address={self._address}",
                "--cluster.listen-address=",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

        def ready() -> bool:
            assert self._process.poll() is None, (directory / "log").read_text(errors="replace")
            try:
                return self._ask("status") is not None
            except OSError:
                return False

        until(ready, "Alertmanager answers", 60)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        messages = self.messages

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                messages.append([alert["labels"] for alert in body["alerts"]])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def _ask(self, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            f"http://{self._address}/api/v2/{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def fire(self, *alerts: Labels) -> None:
        """Fire alerts, all at once, and wait until Alertmanager has processed each."""
        self._ask("alerts", [{"labels": labels} for labels in alerts])

        def looked_at() -> bool:
            states = [alert["status"]["state"] for alert in self._ask("alerts")]
            return len(states) >= len(alerts) and "unprocessed" not in states

        until(looked_at, "the alerts are processed", 60)

    def inhibited(self) -> set[str]:
        """Return the names of the alerts that others inhibit."""
        return {
            alert["labels"]["alertname"]
            for alert in self._ask("alerts")
            if alert["status"]["inhibitedBy"]
        }

    def stop(self) -> None:
        """Stop Alertmanager and the receiver."""
        self._process.terminate()
        self._process.wait()
        self._log.close()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def running(directory: Path) -> Iterator[Alertmanager]:
    """Run Alertmanager with the example, but with short intervals and a receiver on this host."""
    made = Alertmanager(directory, host_tools.require("prometheus-alertmanager", PACKAGE))
    try:
        yield made
    finally:
        made.stop()


def test_configuration() -> None:
    """The command amtool finds no error in the file."""
    amtool = host_tools.require("amtool", PACKAGE)
    done = subprocess.run([amtool, "check-config", FILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_names() -> None:
    """Every alert name in the file is one of our alerts, and every pattern matches at least one."""
    for rule in CONFIG["inhibit_rules"]:
        for matcher in (*rule["source_matchers"], *rule["target_matchers"]):
            label, operator, value = re.split(r" (=~|=) ", matcher)
            if label == "alertname":
                value = value.strip('"')
                alternatives = value.split("|") if "(" not in value else [value]
                for one in alternatives if operator == "=~" else [re.escape(value)]:
                    assert [name for name in SEVERITY if re.fullmatch(one, name)], one


BAD = [
    of_listener("TcpListenQueueNearLimit", 80),
    of_listener("TcpListenQueueBursts", 80),
    of_listener("TcpListenDrops", 80, reason="q_full"),
    of_listener("TcpListenDropsMany", 80),
    of_listener("TcpListenAcceptWaitLong", 80),
    of_listener("TcpListenAcceptStopped", 80),
]
"""The alerts of a listener whose application has stopped accepting."""

REASONS = [
    ("stopped", BAD, {"TcpListenAcceptStopped"}),
    ("drops", BAD[:5], {"TcpListenDropsMany"}),
    ("drops without SYNs", BAD[:3], {"TcpListenDrops"}),
    ("near the limit", BAD[:2], {"TcpListenQueueNearLimit"}),
    (
        "flood",
        [
            of_listener("TcpListenHalfOpenFilling", 80),
            of_listener("TcpListenDrops", 80, reason="q0_full"),
        ],
        {"TcpListenHalfOpenFilling"},
    ),
    (
        "flood, and stopped",
        [BAD[5], of_listener("TcpListenDrops", 80, reason="q0_full")],
        {"TcpListenAcceptStopped", "TcpListenDrops"},
    ),
    (
        "session down",
        [
            of_session("DTraceSessionDown", "port-80"),
            of_session("DTraceSessionRestarts", "port-80"),
            of_session("DTraceDataLost", "port-80", kind="principal"),
        ],
        {"DTraceSessionDown"},
    ),
    (
        "exporter down",
        [
            of_session("DTraceExporterDown", ""),
            of_session("DTraceSessionDown", "port-80"),
            BAD[0],
            BAD[5],
        ],
        {"DTraceExporterDown"},
    ),
]


@pytest.mark.parametrize(
    ("alerts", "told"), [case[1:] for case in REASONS], ids=[case[0] for case in REASONS]
)
def test_one_reason(alerts: list[Labels], told: set[str], tmp_path: Path) -> None:
    """Of alerts that have one cause Alertmanager sends one, and inhibits the others."""
    with running(tmp_path) as alertmanager:
        alertmanager.fire(*alerts)
        names = {alert["alertname"] for alert in alerts}
        until(lambda: alertmanager.inhibited() == names - told, "inhibited", 30)
        until(lambda: alertmanager.messages, "a message is sent", 30)
        sent = {labels["alertname"] for message in alertmanager.messages for labels in message}
    assert sent == told


def test_groups(tmp_path: Path) -> None:
    """Each bad listener gives a message of its own, and none inhibits another's alerts."""
    zone = of_listener("TcpListenQueueNearLimit", 80, zone="db")
    host = of_listener("TcpListenQueueNearLimit", 80, host="sol10")
    other = of_listener("TcpListenQueueNearLimit", 81)
    session = of_session("DTraceSessionRestarts", "port-81")
    with running(tmp_path) as alertmanager:
        alertmanager.fire(*BAD, zone, host, other, session)
        until(lambda: len(alertmanager.messages) >= 5, "five messages", 30)
    expected = [[BAD[5]], [zone], [host], [other], [session]]
    order = partial(json.dumps, sort_keys=True)
    assert sorted(alertmanager.messages, key=order) == sorted(expected, key=order)
