"""Scripts in the configuration: what is accepted, and the error for anything else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dtrace_exporter import config
from dtrace_exporter.config import Config, ConfigError, files, load
from dtrace_exporter.scripts.families import RESERVED

SCRIPT = "BEGIN { @time[execname] = quantize(arg0); @n[pid, cpu] = count(); }\n"


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """Return a directory that has a script io.d, where a test can write a configuration."""
    (tmp_path / "io.d").write_text(SCRIPT, encoding="utf-8")
    return tmp_path


def read(where: Path, content: str) -> Config:
    """Load a configuration with this content."""
    file = where / "c.yml"
    file.write_text(content, encoding="utf-8")
    return load(file)


def complaint(where: Path, content: str) -> str:
    """Return the error for a configuration with this content, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        read(where, content)
    said = str(caught.value)
    assert said.isprintable()
    assert "expected " in said
    assert said.split(" ", 1)[0] == caught.value.in_full.split(" ", 1)[0]
    return said.removeprefix(str(where / "c.yml"))


def test_two_lines(where: Path) -> None:
    """A script needs only a path, which is relative to the configuration's directory."""
    (script,) = read(where, "scripts:\n  - script: io.d\n").local.scripts
    assert script.script.path == str(where / "io.d")
    assert (script.name, script.args, script.pid, script.limit) == ("io", (), None, 1000)
    assert [each.name for each in script.families] == ["dtrace_io_time", "dtrace_io_n"]
    assert files(None, Config(local=config.HostConfig(scripts=(script,)))) == [where / "io.d"]


def test_everything(where: Path) -> None:
    """All keys of a script are accepted, on this host and on others."""
    said = """
  - script: io.d
    args: [3306, /dev/sda]
    pid: 77
    limit: 50
    metrics:
      time: {name: disk_seconds, help: Time., labels: [program], scale: 1e-9, buckets: [1024, 4096]}
      n: {type: gauge}
"""
    remote = said.replace("\n", "\n    ")
    content = f"scripts:{said}hosts:\n  - name: far\n    scripts:{remote}"
    found = read(where, content)
    ((far,), (here,)) = found.hosts[0].scripts, found.local.scripts
    assert far == here
    assert (here.args, here.pid, here.limit) == (("3306", "/dev/sda"), 77, 50)
    time, number = here.families
    assert (time.name, time.help, time.labels) == ("disk_seconds", "Time.", ("program",))
    assert time.bounds == ("1.023e-06", "2.047e-06", "4.095e-06")
    assert (number.name, number.kind, number.labels) == ("dtrace_io_n", "gauge", ("pid", "cpu"))


@pytest.mark.parametrize("scale", ["1000", "0.5", "1e-9", "1E3", "1.5e-3"])
def test_scales(where: Path, scale: str) -> None:
    """A scale is a number, whatever type YAML gives it."""
    content = f"scripts: [{{script: io.d, metrics: {{n: {{scale: {scale}}}}}}}]"
    assert read(where, content).local.scripts[0].families[1].scale == float(scale)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("{}", r":1: scripts\[0\]: expected the key script \(found none\)"),
        ("{script: no.d}", r": scripts\[0\].script: expected a readable file"),
        ("{script: .}", r": scripts\[0\].script: expected a readable file"),
        ("{script: io.d, limit: 0}", r": scripts\[0\].limit: expected a limit from 1"),
        ("{script: io.d, pid: 0}", r": scripts\[0\].pid: expected a process's number"),
        ("{script: io.d, args: 1}", r": scripts\[0\].args: expected a list"),
        ("{script: io.d, args: [-w]}", r": scripts\[0\].args\[0\]: expected a number or a word"),
        ("{script: io.d, args: [-1]}", r": scripts\[0\].args\[0\]: expected a number or a word"),
        ("{script: io.d, args: [a b]}", r": scripts\[0\].args\[0\]: expected a number or a word"),
        ("{script: io.d, args: ['$(x)']}", r"args\[0\]: expected a number or a word"),
        ("{script: io.d, metrics: {x: {}}}", r"expected the name of an aggregation"),
        ("{script: io.d, metrics: {n: {scale: 0}}}", r"metrics.n.scale: expected a number above 0"),
        ("{script: io.d, metrics: {n: {scale: .inf}}}", r"scale: expected a number above 0"),
        ("{script: io.d, metrics: {n: {scale: -1}}}", r"scale: expected a number above 0"),
        ("{script: io.d, metrics: {n: {name: a-b}}}", r"metrics.n.name: expected a metric name"),
        ("{script: io.d, metrics: {n: {name: dtrace_tcp_x}}}", r"name: expected a name that does"),
        ("{script: io.d, metrics: {n: {labels: [a]}}}", r"metrics.n.labels: expected 2 labels"),
        ("{script: io.d, metrics: {n: {labels: [a, a]}}}", r"labels: expected labels that are dif"),
        ("{script: io.d, metrics: {n: {labels: [le, a]}}}", r"labels\[0\]: expected a label name"),
        ("{script: io.d, metrics: {n: {labels: [__a, b]}}}", r"labels\[0\]: expected a label"),
        ("{script: io.d, metrics: {n: {type: summary}}}", r"type: expected counter or gauge or"),
        ("{script: io.d, metrics: {n: {type: histogram}}}", r"metrics.n.type: expected counter or"),
        ("{script: io.d, metrics: {n: {buckets: [1, 2]}}}", r"metrics.n.buckets: expected no buck"),
        ("{script: io.d, metrics: {time: {buckets: [1, 3]}}}", r"buckets: expected \[low, high\]"),
        ("{script: io.d, metrics: {time: {buckets: [x, 3]}}}", r"buckets\[0\]: expected a whole"),
        ("{script: io.d, metrics: {n: {help: ''}}}", r"metrics.n.help: expected a printable text"),
        ("{script: io.d, metrics: {n: {colour: red}}}", r"expected the key name or"),
        ("{script: io.d}, {script: io.d}", r":1: scripts\[1\]: expected metrics that no other"),
    ],
)
def test_mistakes(where: Path, said: str, expected: str) -> None:
    """An error names the file, the line, the key and what was expected."""
    assert re.search(expected, complaint(where, f"scripts: [{said}]"))


@pytest.mark.parametrize("name", RESERVED)
def test_reserved_names(where: Path, name: str) -> None:
    """A script may not have a name that the exporter's own metrics use."""
    (where / f"{name}.d").write_text(SCRIPT, encoding="utf-8")
    said = complaint(where, f"scripts: [{{script: {name}.d}}]")
    assert said.startswith(":1: scripts[0].script: expected a script whose name is not one of ")
    with pytest.raises(ConfigError, match="whose name is not"):
        load(None, scripts=[where / f"{name}.d"])


def test_what_is_no_script(where: Path) -> None:
    """A file that is not D is quoted only in the full error, which strangers do not see."""
    (where / "io.d").write_text("root:secret:1::\n", encoding="utf-8")
    said = complaint(where, "\nscripts: [{script: io.d}]")
    assert said.startswith(":2: scripts[0].script: expected a D script with aggregations")
    assert "secret" not in said
    with pytest.raises(ConfigError) as caught:
        load(where / "c.yml")
    assert str(where / "io.d:") in caught.value.in_full


def test_line_of_a_metric(where: Path) -> None:
    """An error in a metric has the line of that metric."""
    content = "scripts:\n- script: io.d\n  metrics:\n    n:\n      scale: 2\n      type: x\n"
    assert complaint(where, content).startswith(":6: scripts[0].metrics.n.type: ")


def test_no_bounds(where: Path) -> None:
    """An lquantize() without literal bounds needs bounds in the configuration."""
    (where / "io.d").write_text("BEGIN { @l = lquantize(arg0, 0, $1, 10); }", encoding="utf-8")
    said = complaint(where, "scripts: [{script: io.d, args: [100]}]")
    assert "expected metrics of @l with buckets: [low, high, step], because line 1" in said
    content = "scripts: [{script: io.d, args: [100], metrics: {l: {buckets: [0, 100, 10]}}}]"
    assert len(read(where, content).local.scripts[0].families[0].edges) == 11


def test_types_on_hosts(where: Path) -> None:
    """A metric has the same type on every host."""
    (where / "far").mkdir()
    (where / "far" / "io.d").write_text("BEGIN { @n[pid] = max(1); }", encoding="utf-8")
    hosts = "hosts: [{name: far, scripts: [{script: far/io.d}]}]"
    # A counter dtrace_io_n_total on this host cannot be a gauge dtrace_io_n on the other.
    assert "of the same type" in complaint(where, f"scripts: [{{script: io.d}}]\n{hosts}")
    assert read(where, hosts).hosts[0].scripts[0].families[0].kind == "gauge"


def test_flag(where: Path) -> None:
    """A script of the command line belongs to this host, like those of the file."""
    (where / "two.d").write_text(SCRIPT, encoding="utf-8")
    (where / "c.yml").write_text("scripts: [{script: io.d}]", encoding="utf-8")
    found = load(where / "c.yml", scripts=[where / "two.d"])
    assert [script.name for script in found.local.scripts] == ["io", "two"]
    assert [script.name for script in load(None, scripts=[where / "io.d"]).local.scripts] == ["io"]
    with pytest.raises(ConfigError, match="metrics that no other script gives"):
        load(where / "c.yml", scripts=[where / "io.d"])
    with pytest.raises(ConfigError, match="readable file"):
        load(None, scripts=[where / "none.d"])
