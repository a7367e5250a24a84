"""The rules in config/prometheus are right, tested, and explained in docs/runbooks.md."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from lab.exporter import Exporter, free_port
from lab.prometheus import Prometheus, hasten
from lab.waiting import until

import host_tools
from dtrace_exporter.collector import Collector
from dtrace_exporter.state import State

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "config/prometheus"
CONSOLE = "consoles/dtrace-exporter-runbooks.html"
RUNBOOKS = (ROOT / "docs/runbooks.md").read_text(encoding="utf-8")
BLOCKS = re.findall(
    r"```sh\n(.*?)```", (ROOT / "docs/prometheus.md").read_text(encoding="utf-8"), re.DOTALL
)
"""The commands of the guide: one block to install, and one to see an alert."""


_spec = importlib.util.spec_from_file_location("runbooks", CONFIG / "runbooks.py")
assert _spec is not None
assert _spec.loader is not None
runbooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runbooks)


def rules(name: str) -> list[dict[str, Any]]:
    """Return the rules of a file."""
    groups = yaml.safe_load((CONFIG / name).read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = rules("dtrace_exporter.alerts.yml")
RECORDED = rules("dtrace_exporter.rules.yml")
TESTS: list[dict[str, Any]] = yaml.safe_load(
    (CONFIG / "tests/alerts_test.yml").read_text(encoding="utf-8")
)["tests"]
NAMES = [alert["alert"] for alert in ALERTS]
VERDICTS = [rule["labels"]["verdict"] for rule in RECORDED if "labels" in rule]


@pytest.fixture(scope="module")
def promtool() -> str:
    """Return the path of promtool."""
    return host_tools.require("promtool", "prometheus")


def run(directory: Path, *command: str) -> None:
    """Run a command that must not complain about the files."""
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_configuration(promtool: str) -> None:
    """The tool promtool accepts the configuration and the rules that it names."""
    run(CONFIG, promtool, "check", "config", "prometheus.yml")


def test_configuration_with_everything(promtool: str, tmp_path: Path) -> None:
    """The commented parts of prometheus.yml are right once the # is removed."""
    text = (CONFIG / "prometheus.yml").read_text(encoding="utf-8")
    whole = re.sub(r"^( *)#(?=[\w ])(?! )|^#(?=  )", r"\1", text, flags=re.MULTILINE)
    (scrape,) = yaml.safe_load(whole)["scrape_configs"]
    assert {"scheme", "tls_config", "basic_auth"} <= {*scrape}
    assert yaml.safe_load(whole)["alerting"]["alertmanagers"]
    (tmp_path / "prometheus.yml").write_text(whole, encoding="utf-8")
    run(tmp_path, promtool, "check", "config", "--syntax-only", "prometheus.yml")


def test_alerts(promtool: str) -> None:
    """Every alert fires when it should, stays silent when it should not, and resolves."""
    run(CONFIG, promtool, "test", "rules", "tests/alerts_test.yml")


@pytest.mark.parametrize("name", NAMES)
def test_every_alert_is_tested(name: str) -> None:
    """The tests have each alert pending, firing and resolved, and check its texts."""
    states = set()
    fires: dict[str, int] = {}
    resolved = False
    (mine,) = (test for test in TESTS if test["alert_rule_test"][0]["alertname"] == name)
    for each in mine["promql_expr_test"]:
        assert f'alertname="{name}"' in each["expr"]
        minute = int(each["eval_time"].removesuffix("m"))
        if each["exp_samples"]:
            (sample,) = each["exp_samples"]
            states.add(sample["labels"])
            if "firing" in sample["labels"]:
                fires[each["expr"]] = minute
        elif minute > fires.get(each["expr"], minute):
            resolved = True
    assert states == {'{alertstate="pending"}', '{alertstate="firing"}'}
    assert resolved
    (texts,) = mine["alert_rule_test"]
    assert texts["exp_alerts"]


@pytest.mark.parametrize("alert", ALERTS, ids=NAMES)
def test_annotations(alert: dict[str, Any]) -> None:
    """Each alert has a severity, a summary, a description with figures, and its runbook."""
    name, notes = alert["alert"], alert["annotations"]
    assert alert["labels"]["severity"] in ("info", "warning", "critical")
    assert alert["for"]
    assert {*notes} == {"summary", "description", "runbook_url"}
    assert notes["runbook_url"] == f"{{{{ $externalURL }}}}/{CONSOLE}#{name.lower()}"
    (mine,) = (test for test in TESTS if test["alert_rule_test"][0]["alertname"] == name)
    for each in mine["alert_rule_test"][0]["exp_alerts"]:
        shown = each["exp_annotations"]
        assert re.search(r"\d", shown["description"])
        assert not re.search(r"<no value>|error|  |\{|\bis ,|\bis \.", " ".join(shown.values()))


def test_runbooks() -> None:
    """Each alert and each verdict has a section, in the same order, and there are no others."""
    sections = re.split(r"^## ", RUNBOOKS, flags=re.MULTILINE)[1:]
    names = [*NAMES, *(f"Verdict: {verdict}" for verdict in VERDICTS)]
    assert [section.splitlines()[0] for section in sections] == names
    for section in sections:
        assert "**Normal**" in section
        assert "**Do**" in section or "| do |" in section or " do |\n" in section, section
    assert "add workers" in RUNBOOKS.partition("\n## ")[0]


def test_installation(promtool: str, tmp_path: Path) -> None:
    """The guide's commands install every file that the configuration names."""
    assert promtool
    install, _ = BLOCKS
    (tmp_path / "consoles").mkdir()
    *steps, reload = install.replace("/etc/prometheus/", f"{tmp_path}/").splitlines()
    run(ROOT, "sh", "-e", "-c", "\n".join(steps))
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in (*CONFIG.glob("*.yml"), CONFIG / "consoles")
    }
    assert (tmp_path / CONSOLE).exists()
    assert reload == "systemctl reload prometheus"


def test_moved_runbooks(promtool: str, tmp_path: Path) -> None:
    """The command in the file's head changes the links to the runbooks."""
    path = tmp_path / "dtrace_exporter.alerts.yml"
    shutil.copy(CONFIG / path.name, path)
    (command,) = re.findall(r"^#   (sed .*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    run(tmp_path, "sh", "-c", command)
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"runbook_url: (.*)", text)
    assert len(links) == len(ALERTS)
    assert all(link.startswith("'https://wiki.example.org/runbooks#") for link in links)
    run(tmp_path, promtool, "check", "rules", path.name)


def test_console_is_made_of_the_runbooks() -> None:
    """The console is what runbooks.py makes of docs/runbooks.md, with all of its words."""
    made = (CONFIG / CONSOLE).read_text(encoding="utf-8")
    assert made == runbooks.render(RUNBOOKS)
    _, _, body = made.partition("<body>")
    shown = html.unescape(re.sub(r"<[^>]+>", " ", body))
    assert not re.search(r"`|\*\*|\]\(", shown)
    own = re.sub(r"\]\(#[^)]*\)", "]", RUNBOOKS)
    there = re.sub(r"\]\((?!\.)([^)#]+)[^)]*\)", r"](docs/\1)", own)
    assert re.findall(r"\w+", shown) == re.findall(r"\w+", there)


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("a < b & `c|d` **e `f`**", "<p>a &lt; b &amp; <code>c|d</code> <strong>e <code>f</code>"),
        ("## A b(c)", '<h2 id="a-bc">A b(c)</h2>'),
        (
            "one\ntwo\n- three\n  four\n- five",
            "<p>one two</p>\n<ul>\n<li>three four</li>\n<li>five",
        ),
        ("**x**\ny", "<p><strong>x</strong> y</p>"),
        ("{{ x }}", "<p>{<!-- -->{ x }}</p>"),
    ],
)
def test_markdown(markdown: str, expected: str) -> None:
    """Paragraphs, items, headings and their contents become HTML, and no text is a template."""
    assert expected in runbooks.render(markdown)


def test_runbook_url(tmp_path: Path) -> None:
    """The runbook_url of a firing alert, as Prometheus gives it, leads to the alert's section."""
    config = yaml.safe_load((CONFIG / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (scrape,) = config["scrape_configs"]
    scrape["static_configs"] = [{"targets": [f"127.0.0.1:{free_port()}"]}]
    files = {
        name: hasten((CONFIG / name).read_text(encoding="utf-8"), 600)
        for name in config["rule_files"]
    }
    (tmp_path / "consoles").mkdir()
    shutil.copy(CONFIG / CONSOLE, tmp_path / CONSOLE)
    command = host_tools.require("prometheus", "prometheus")
    options = [f"--web.console.templates={tmp_path}/consoles"]
    with ExitStack() as stack:
        server = Prometheus(config, command, files, options)
        stack.callback(server.stop)

        def url() -> str:
            alerts = server.ask("alerts")["alerts"]
            down = (one for one in alerts if one["labels"]["alertname"] == "DTraceExporterDown")
            return next((str(one["annotations"]["runbook_url"]) for one in down), "")

        address, _, anchor = str(until(url, "the alert is there", 60)).partition("#")
        with urllib.request.urlopen(address, timeout=30) as answer:
            page = answer.read().decode()
    assert anchor == "dtraceexporterdown"
    assert {name.lower() for name in NAMES} <= {*re.findall(r' id="([^"]+)"', page)}
    # The server returns what is in the file, so no text was taken for a template.
    assert page == (CONFIG / CONSOLE).read_text(encoding="utf-8")


def test_metrics_exist() -> None:
    """Rules use only metrics that are exported or recorded."""
    exported = {
        family.name + suffix
        for family in Collector(State()).describe()
        for suffix in {
            "counter": ["_total"],
            "gauge": [""],
            "histogram": ["_bucket", "_count", "_sum"],
        }[family.type]
    }
    recorded = {rule["record"] for rule in RECORDED}
    for rule in (*RECORDED, *ALERTS):
        texts = (rule["expr"], *rule.get("annotations", {}).values())
        named = set(re.findall(r"\b(?:listener:)?dtrace_\w+(?::\w+)?", " ".join(texts)))
        assert named <= exported | recorded, rule


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="sock_diag is an interface of Linux")
def test_see_it_fire() -> None:
    """The command in docs/prometheus.md makes the alert that it names fire, and then resolve."""
    _, command = BLOCKS
    (port,) = {*re.findall(r"\b7200\b", command)}
    free = str(free_port())
    config = yaml.safe_load((CONFIG / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    files = {
        name: hasten((CONFIG / name).read_text(encoding="utf-8"), 120)
        for name in config["rule_files"]
    }
    with ExitStack() as stack:
        exporter = stack.enter_context(Exporter({"source": "sock_diag"}))
        exporter.wait_ready()
        (scrape,) = config["scrape_configs"]
        scrape["static_configs"] = [{"targets": [f"127.0.0.1:{exporter.port}"]}]
        server = Prometheus(config, host_tools.require("prometheus", "prometheus"), files)
        stack.callback(server.stop)

        def firing() -> set[str]:
            found = server.query(f'ALERTS{{port="{free}", alertstate="firing"}}')
            return {series["metric"]["alertname"] for series in found}

        shell = ["sh", "-c", command.replace(port, free)]
        with subprocess.Popen(shell, start_new_session=True) as process:
            try:
                until(lambda: firing() == {"TcpListenQueueNearLimit"}, "the alert fires", 60)
            finally:
                os.killpg(process.pid, signal.SIGKILL)
        until(lambda: not firing(), "the alert resolves", 60)
