"""docs/security.md: its examples are valid, and its numbers and names match the program."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import trustme
import yaml

from dtrace_exporter import cli, log, regular, turns
from dtrace_exporter.limits import Limits
from dtrace_exporter.tracing.lines import MAX_LINE
from dtrace_exporter.web import auth, configuration, handlers, server, tls
from dtrace_exporter.yaml_reader import ConfigError

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
TEXT = " ".join(PAGE.split())
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("example", [text for text in EXAMPLES if "scrape_configs" not in text])
def test_examples(example: str, tmp_path: Path) -> None:
    """Each example of a web configuration file is valid, and has the keys that it shows."""
    authority = trustme.CA()
    cert = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    cert.cert_chain_pems[0].write_to_path(str(tmp_path / "server.pem"))
    cert.private_key_pem.write_to_path(str(tmp_path / "server.key"))
    path = tmp_path / "web.yml"
    path.write_text(example, encoding="utf-8")
    config = configuration.load(path)
    assert bool(config.users) == ("basic_auth_users" in example)
    assert bool(config.tls) == ("tls_server_config" in example)
    assert bool(config.client_names) == ("client_allowed_sans" in example)


def test_example_of_prometheus() -> None:
    """The example for Prometheus is YAML with the keys that Prometheus has."""
    (example,) = (text for text in EXAMPLES if "scrape_configs" in text)
    (job,) = yaml.safe_load(example)["scrape_configs"]
    assert set(job) == {"job_name", "scheme", "tls_config", "basic_auth", "static_configs"}


@pytest.mark.parametrize("above", ["", "tls_server_config", "http_server_config", "rate_limit"])
def test_all_keys(above: str, tmp_path: Path) -> None:
    """The page explains every key that the reader knows."""
    path = tmp_path / "web.yml"
    path.write_text(f"{above}: {{\x21\x21str zzzz: 1}}" if above else "zzzz: 1", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        configuration.load(path)
    known = re.search(r"expected the key (.*) \(found", str(caught.value))
    assert known
    table = PAGE[PAGE.index("### All keys") :]
    for key in known[1].split(" or "):
        assert re.search(rf"`(?:\w+\.)?{key}[.`]", table), key


def test_words() -> None:
    """The page names every value of each key that has only a few values."""
    kinds = (*configuration._ADMITTING, *configuration._VERIFYING, *configuration._UNVERIFIED)
    for word in (*kinds, *tls.VERSIONS, *tls.CURVES, *configuration._HEADERS):
        assert f"`{word}`" in TEXT


def test_numbers() -> None:
    """The limits on the page are those of the program."""
    assert f"at most {server.MAX_CONNECTIONS} are held" in TEXT
    assert f"fewer than {2 * server.MAX_CONNECTIONS} descriptors" in TEXT
    assert f"after {server._IDLE_SECONDS:.0f} s it is closed" in TEXT
    assert f"{server.MAX_HEADER_BYTES >> 10} KB of headers" in TEXT
    assert f"{server.MAX_BODY_BYTES >> 10} KB of body" in TEXT
    assert f"accept queue, {server._BACKLOG} long" in TEXT
    assert f"each of at most {auth._MOST_GONE} addresses one that has hung up" in TEXT
    assert f"closed after {handlers._SEND_SECONDS:.0f} s" in TEXT
    assert f"at most {handlers._MOST_UNSENT >> 20} MB of answers" in TEXT
    assert f"A cost of more than {auth.MAX_COST} is refused" in TEXT
    assert f"of a cost from 4 to {auth.MAX_COST}" in TEXT
    assert f"at most {regular.MAX_BYTES >> 20} MiB" in TEXT
    assert f"at most {log.MOST} events of one kind in a minute" in TEXT


def test_limits() -> None:
    """The page explains every limit of the configuration, with its default."""
    for limit in fields(Limits):
        assert re.search(rf"^\| `{limit.name}` \| {limit.default:,} ", PAGE, re.MULTILINE), limit
    assert f"for {1000 * turns._SECONDS:.0f} ms at a time" in TEXT
    assert f"cut at {MAX_LINE >> 10} KB" in TEXT


def test_flags_and_files() -> None:
    """Every flag and file that the page names exists."""
    known = {flag for action in cli._parser()._actions for flag in action.option_strings}
    assert set(re.findall(r"--(?:no-)?web[\w.-]*\w", PAGE)) <= known
    for path in re.findall(r"\]\(([\w./-]+)\)", PAGE):
        assert (ROOT / "docs" / path).exists(), path
    for path in re.findall(r"\btests/\w+\.py", PAGE):
        assert (ROOT / path).exists(), path
