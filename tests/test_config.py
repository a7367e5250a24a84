"""The configuration file: what is taken, and the one line that is said about anything else."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtrace_exporter import config
from dtrace_exporter.config import (
    Config,
    ConfigError,
    DTraceConfig,
    HostConfig,
    ListenerConfig,
    load,
)
from dtrace_exporter.limits import Limits

EXAMPLE = Path(__file__).parents[1] / "config" / "dtrace_exporter.yml"
COMMENTED = re.compile(r"^(\s*)#(?=[a-z_]+:|  +(?:- )?[a-z]+:)")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file that a test may write."""
    return tmp_path_factory.mktemp("config") / "c.yml"


def read(file: Path, content: str | bytes) -> Config:
    """Load a file of that content."""
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return load(file)


def complaint(file: Path, content: str | bytes) -> str:
    """Return what is said about a file of that content, from after its name on."""
    with pytest.raises(ConfigError) as caught:
        read(file, content)
    message = caught.value.in_full
    assert message.isprintable()
    assert message.startswith(str(file))
    said = str(caught.value)
    assert said.isprintable()
    # The same line and expectation, whatever it leaves out.
    assert said.startswith(message.split(" ", 1)[0])
    assert "expected " in said
    return message.removeprefix(str(file))


def local(**dtrace: Any) -> Config:
    """Return a configuration that says this about dtrace."""
    return Config(local=HostConfig(dtrace=DTraceConfig(**dtrace)))


def listening(*listeners: ListenerConfig) -> Config:
    """Return a configuration of these listeners."""
    return Config(local=HostConfig(listeners=listeners))


def test_no_file_means_the_defaults() -> None:
    """Without a file, every listener of the local host is watched by what is found there."""
    assert load(None) == Config(
        source="auto",
        local=HostConfig(
            name="",
            dtrace=DTraceConfig(
                command=("dtrace",),
                program="auto",
                session="per-port",
                interval=1.0,
                accept_wait=True,
                options={},
                offsets={},
            ),
            listeners=(),
        ),
        hosts=(),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", Config()),
        ("---\n{}\n...\n", Config()),
        ("\ufeffsource: dtrace", Config(source="dtrace")),
        ("source: dtrace\r\n", Config(source="dtrace")),
        ("source: 'sock_diag'", Config(source="sock_diag")),
        ("dtrace: {}", Config()),
        ("listeners: []", Config()),
        ("hosts: []", Config()),
        ("dtrace: {command: [sudo, -n, dtrace]}", local(command=("sudo", "-n", "dtrace"))),
        ("dtrace: {program: illumos}", local(program="illumos")),
        ("dtrace: {session: shared}", local(session="shared")),
        ("dtrace: {interval: 100ms}", local(interval=0.1)),
        ("dtrace: {interval: 10s}", local(interval=10.0)),
        ("dtrace: {interval: 1s500ms}", local(interval=1.5)),
        ("dtrace: {interval: 0m2s}", local(interval=2.0)),
        ("dtrace: {accept_wait: off}", local(accept_wait=False)),
        ("dtrace: {options: {aggsize: 8m}}", local(options={"aggsize": "8m"})),
        ("dtrace: {options: {nspec: 4}}", local(options={"nspec": "4"})),
        ("dtrace: {options: {bufsize: 0x1000}}", local(options={"bufsize": "0x1000"})),
        ("dtrace: {options: {zdefs: true}}", local(options={"zdefs": ""})),
        ("dtrace: {options: {quiet: no}}", local(options={"quiet": "unset"})),
        ("dtrace: {options: {quiet: 'no'}}", local(options={"quiet": "no"})),
        ("dtrace: {offsets: {conn_tcp: 0x28}}", local(offsets={"conn_tcp": 40})),
        (
            "dtrace: {offsets: {conn_tcp: 0, conn_lport: 65535}}",
            local(offsets={"conn_tcp": 0, "conn_lport": 65535}),
        ),
        ("dtrace: {limits: {listeners: 5, rows: 10000000}}", local(limits=Limits(5, rows=10**7))),
        ("listeners: [{port: 1}]", listening(ListenerConfig(1))),
        ("listeners: [{port: 65535, name: a b}]", listening(ListenerConfig(65535, "a b"))),
        ("listeners: [{port: 0x16}]", listening(ListenerConfig(22))),
        (
            "listeners: [{port: 1, name: ''}, {port: 2, name: ''}]",
            listening(ListenerConfig(1), ListenerConfig(2)),
        ),
        ("listeners: [{port: 1, name: schlüssel}]", listening(ListenerConfig(1, "schlüssel"))),
        (
            "hosts: [{name: a, listeners: &all [{port: 1, name: x}]}, {name: b, listeners: *all}]",
            Config(
                hosts=(
                    HostConfig("a", listeners=(ListenerConfig(1, "x"),)),
                    HostConfig("b", listeners=(ListenerConfig(1, "x"),)),
                )
            ),
        ),
        (
            "hosts:\n- name: sol10\n  dtrace: {command: [ssh, sol10], program: solaris10}\n",
            Config(
                hosts=(HostConfig("sol10", DTraceConfig(("ssh", "sol10"), program="solaris10")),)
            ),
        ),
    ],
)
def test_takes(file: Path, text: str, expected: Config) -> None:
    """A right file is read as what it says, and defaults for what it does not say."""
    assert read(file, text) == expected


NAME = "expected a name of at most 128 printable characters"
INTERVAL = "expected a duration from 100ms to 10s, such as 1s or 500ms"
HARMLESS_OPTION = "an option by which nothing is changed, run or written"
OPTION = "expected a number, a size such as 8m, a rate such as 10hz, a word, true or false"
PROGRAM = "expected auto, illumos, linux, solaris10 or the path of a D program"
LONG = "x" * 129


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # The whole of it.
        ("- a", ":1: expected keys and values (found a list)"),
        ("hello", ':1: expected keys and values (found "hello")'),
        ("---\n", ":2: expected keys and values (found nothing)"),
        (
            "!!python/object:os {}",
            ":1: expected keys and values (found the tag tag:yaml.org,2002:python/object:os)",
        ),
        ("dtrace: !!set {a}", ":1: dtrace: expected keys and values (found the tag tag:yaml.org"),
        # Keys.
        ("\nlistner: 1", ":2: listner: expected the key listeners (found an unknown one)"),
        (
            "colour: 1",
            (
                ":1: colour: expected the key source or dtrace or listeners or hosts "
                "(found an unknown one)"
            ),
        ),
        ("name: x", None),
        ("listner:\n- port: 1", ":1: listner: expected the key listeners (found an unknown one)"),
        (
            "listeners:\n- port: 1\n  nmae: x",
            ":3: listeners[0].nmae: expected the key name (found an unknown one)",
        ),
        (
            "hosts:\n- name: a\n  dtrace:\n    intervall: 1s",
            ":4: hosts[0].dtrace.intervall: expected the key interval (found an unknown one)",
        ),
        ("x: &a {}\n<<: *a", None),
        ("<<: {source: auto}", None),
        ("=: 1", None),
        ("1: 2", ":1: expected a word as the key (found 1)"),
        ("on: 2", ":1: expected a word as the key (found on)"),
        ("? [a]\n: 2", ":1: expected a word as the key (found a list)"),
        (
            "listeners: [{port: 1, {a: b}: c}]",
            ":1: listeners[0]: expected a word as the key (found keys and values)",
        ),
        (
            "source: auto\n\n'source': dtrace",
            ":3: source: expected the key only once (found it in line 1 too)",
        ),
        (
            "listeners:\n- port: 1\n  port: 2",
            ":3: listeners[0].port: expected the key only once (found it in line 2 too)",
        ),
        ("{'a\\nb': 1}".replace("'", '"'), None),
        (f"{LONG}: 1", None),
        # source
        ("source: Auto", ':1: source: expected auto or dtrace or sock_diag (found "Auto")'),
        ("source:", ":1: source: expected auto or dtrace or sock_diag (found nothing)"),
        ("source: [auto]", ":1: source: expected auto or dtrace or sock_diag (found a list)"),
        ("source: !x auto", ":1: source: expected auto or dtrace or sock_diag (found the tag !x)"),
        # listeners
        ("listeners:", ":1: listeners: expected a list (found nothing)"),
        ("listeners: {port: 1}", ":1: listeners: expected a list (found keys and values)"),
        ("listeners: [22]", ":1: listeners[0]: expected keys and values (found 22)"),
        (
            "listeners:\n- port: 1\n- name: x",
            ":3: listeners[1]: expected the key port (found none)",
        ),
        *[
            (
                f"listeners:\n- port: 1\n- port: {port}",
                f":3: listeners[1].port: expected a port from 1 to 65535 (found {found})",
            )
            for port, found in [
                ("0", "0"),
                ("-1", "-1"),
                ("65536", "65536"),
                ("70000", "70000"),
                ("true", "true"),
                ("22.0", "22.0"),
                ("'22'", '"22"'),
                ("ssh", '"ssh"'),
                ("022", "022"),
                ("2_2", "2_2"),
                ("0:22", '"0:22"'),
                ("1:22", "1:22"),
                ("0b1", "0b1"),
                ("", "nothing"),
                ("[1]", "a list"),
                ("1999-12-31", "1999-12-31"),
                ("9" * 5000, "9" * 40 + "..."),
                ("!!int x", "x"),
            ]
        ],
        (
            "listeners:\n- port: 22\n- port: 80\n- port: 0x16",
            (
                ":4: listeners[2].port: expected a port that no other entry has "
                "(found 0x16, as in line 2)"
            ),
        ),
        (
            "listeners:\n- port: 1\n  name: x\n- port: 2\n  name: x",
            (
                ":5: listeners[1].name: expected a name that no other entry has "
                '(found "x", as in line 3)'
            ),
        ),
        ("listeners: [{port: 1, name: 80}]", f":1: listeners[0].name: {NAME} (found 80)"),
        ("listeners: [{port: 1, name: }]", f":1: listeners[0].name: {NAME} (found nothing)"),
        (
            'listeners: [{port: 1, name: "a\\tb"}]',
            f':1: listeners[0].name: {NAME} (found "a\\tb")',
        ),
        (f"listeners: [{{port: 1, name: {LONG}}}]", None),
        ('listeners: [{port: 1, name: "\\uD800"}]', None),
        # hosts
        ("hosts: [{}]", ":1: hosts[0]: expected the key name (found none)"),
        ("hosts: [{name: ''}]", ':1: hosts[0].name: expected a name that is not empty (found "")'),
        ("hosts: [{name: [a]}]", f":1: hosts[0].name: {NAME} (found a list)"),
        (
            "hosts:\n- {name: a}\n- {name: a}",
            ':3: hosts[1].name: expected a name that no other entry has (found "a", as in line 2)',
        ),
        (
            "hosts:\n- name: a\n  listeners:\n  - port: 1\n  - port: 1",
            (
                ":5: hosts[0].listeners[1].port: expected a port that no other entry has "
                "(found 1, as in line 4)"
            ),
        ),
        ("hosts: [{name: a, source: auto}]", None),
        # dtrace
        ("dtrace:", ":1: dtrace: expected keys and values (found nothing)"),
        ("dtrace: {command: dtrace}", ':1: dtrace.command: expected a list (found "dtrace")'),
        (
            "dtrace: {command: []}",
            ":1: dtrace.command: expected a command and its arguments (found an empty list)",
        ),
        (
            "dtrace: {command: [a, 1]}",
            ":1: dtrace.command[1]: expected a word of the command (found 1)",
        ),
        (
            "dtrace: {command: ['']}",
            ':1: dtrace.command[0]: expected a word of the command (found "")',
        ),
        (
            'dtrace: {command: ["a\\0b"]}',
            ':1: dtrace.command[0]: expected a word of the command (found "a\\x00b")',
        ),
        ('dtrace: {command: ["\\udfff"]}', None),
        ("dtrace: {program: solaris}", f':1: dtrace.program: {PROGRAM} (found "solaris")'),
        ("dtrace: {program: 10}", f":1: dtrace.program: {PROGRAM} (found 10)"),
        ("dtrace: {program: ''}", f':1: dtrace.program: {PROGRAM} (found "")'),
        (
            "dtrace: {program: /no/such}",
            ":1: dtrace.program: expected a readable file (found /no/such)",
        ),
        ("dtrace: {program: /}", ":1: dtrace.program: expected a readable file (found /)"),
        (f"dtrace: {{program: /{LONG * 4}}}", None),
        ("dtrace: {session: both}", ':1: dtrace.session: expected per-port or shared (found "both'),
        *[
            (f"dtrace:\n  interval: {value}", f":2: dtrace.interval: {INTERVAL} (found {found})")
            for value, found in [
                ("1", "1"),
                ("1.5", "1.5"),
                ("0s", '"0s"'),
                ("99ms", '"99ms"'),
                ("11s", '"11s"'),
                ("10s1ms", '"10s1ms"'),
                ("1m", '"1m"'),
                ("1h", '"1h"'),
                ("-1s", '"-1s"'),
                ("1 s", '"1 s"'),
                ("0.5s", '"0.5s"'),
                ("500ms1s", '"500ms1s"'),
                ("s", '"s"'),
                ("''", '""'),
                ("\uff11s", '"\uff11s"'),
                ("9" * 5000 + "s", '"' + "9" * 40 + '..."'),
                ("true", "true"),
                ("", "nothing"),
            ]
        ],
        ("dtrace: {accept_wait: 1}", ":1: dtrace.accept_wait: expected true or false (found 1)"),
        ("dtrace: {accept_wait: !!bool x}", ":1: dtrace.accept_wait: expected true or false"),
        ("dtrace: {options: [a]}", ":1: dtrace.options: expected keys and values (found a list)"),
        (
            "dtrace: {options: {Agg: 1}}",
            ':1: dtrace.options.Agg: expected the name of a D option, all lower case (found "Agg")',
        ),
        *[
            (
                f"dtrace: {{options: {{{name}: {value}}}}}",
                f':1: dtrace.options.{name}: expected {HARMLESS_OPTION} (found "{name}")',
            )
            for name, value in [
                ("destructive", "true"),
                ("destructive", "false"),
                ("destructive", "set"),
                ("cpp", "true"),
                ("cpphdrs", "true"),
                ("cpppath", "/tmp/x"),
                ("cppargs", "-o/etc/passwd"),
                ("ctypes", "/etc/passwd"),
                ("dtypes", "/etc/passwd"),
                ("ldpath", "/tmp/x"),
            ]
        ],
        ("dtrace: {options: {a b: 1}}", None),
        ("dtrace: {options: {'': 1}}", None),
        ("dtrace: {options: {a: }}", f":1: dtrace.options.a: {OPTION} (found nothing)"),
        ("dtrace: {options: {a: 1.5}}", f":1: dtrace.options.a: {OPTION} (found 1.5)"),
        ("dtrace: {options: {a: ''}}", f':1: dtrace.options.a: {OPTION} (found "")'),
        ("dtrace: {options: {a: 8 m}}", f':1: dtrace.options.a: {OPTION} (found "8 m")'),
        ("dtrace: {options: {a: $(id)}}", f':1: dtrace.options.a: {OPTION} (found "$(id)")'),
        ("dtrace: {options: {a: !!bool x}}", None),
        (
            "dtrace: {offsets: {conn_tpc: 1}}",
            ":1: dtrace.offsets.conn_tpc: expected the key conn_tcp (found an unknown one)",
        ),
        (
            "dtrace: {offsets: {conn_tcp: 65536}}",
            ":1: dtrace.offsets.conn_tcp: expected an offset from 0 to 65535 (found 65536)",
        ),
        ("dtrace: {offsets: {conn_tcp: -1}}", None),
        (
            "dtrace: {limits: {places: 0}}",
            ":1: dtrace.limits.places: expected a limit from 1 to 10000000 (found 0)",
        ),
        ("dtrace: {limits: {places: none}}", None),
        ("dtrace: {limits: {ports: 5}}", None),
        # Not YAML, or not text.
        ("", ":1: expected a configuration (found an empty file)"),
        ("# nothing\n", ":1: expected a configuration (found an empty file)"),
        ("source: auto\ndtrace: {a: b", ":2: expected YAML (while parsing a flow mapping, "),
        ("source: auto\n\tdtrace:", ":2: expected YAML ("),
        ("source: *a", ":1: expected YAML (found undefined alias 'a')"),
        (
            "source: auto\n---\nsource: auto\n",
            (
                ":2: expected YAML (expected a single document in the stream, "
                "but found another document)"
            ),
        ),
        (b"source: auto\n\n# \xff", ":3: expected UTF-8 (found byte 0xff)"),
        (b"\xff\xfes\0o\0", ":1: expected UTF-8 (found byte 0xff)"),
        (b"\xe2\x82", ":1: expected UTF-8 (found byte 0xe2)"),
        (b"source: auto\n\0", ":2: expected printable text (found character 0x00)"),
        (b"a\n\n\x1b[2J", ":3: expected printable text (found character 0x1b)"),
        ('\nsource: "\\UFFFFFFFF"', ":2: expected YAML ("),
        (f"%YAML {'1' * 5000}.1\n--- {{}}", ":1: expected YAML ("),
    ],
)
def test_refuses(file: Path, text: str | bytes, message: str | None) -> None:
    """Each mistake is told in one line, with the file, the line, the key and what was expected."""
    told = complaint(file, text)
    if message is None:
        assert re.match(r":[1-9]\d*: .*expected .+ \(found .+\)$", told)
        assert len(told) < 700
    elif message.endswith(")"):
        assert told == message
    else:
        assert message in told


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "- " * 100_000,
        "{a: " * 100_000,
        "? " * 100_000,
        "".join(" " * n + f"k{n}:\n" for n in range(1000)),
        "[" * 30 + "]" * 30,
    ],
    ids=["lists", "block lists", "mappings", "keys", "indented", "closed"],
)
def test_deep_nesting(file: Path, text: str) -> None:
    """However deep a file is nested, it ends in an error that names the line."""
    assert re.fullmatch(r":\d+: expected YAML \(nested too deeply\)", complaint(file, text))


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 40)),
        "listeners: &l\n"
        + "".join(f"- {{port: {n}}}\n" for n in range(1, 5000))
        + "hosts:\n"
        + "".join(f"- {{name: h{n}, listeners: *l}}\n" for n in range(5000)),
        "command: [" + "a, " * 200_000 + "]",
    ],
    ids=["exponential", "quadratic", "plain"],
)
def test_alias_bomb(file: Path, text: str) -> None:
    """A file that stands for more values than a configuration can have is refused at once."""
    assert re.fullmatch(r":\d+: expected YAML \(more than \d+ values\)", complaint(file, text))


@pytest.mark.parametrize(
    "text",
    [
        "&r [*r]",
        "&r {source: *r}",
        "dtrace: &r {options: *r}",
        "dtrace: {command: &r [*r]}",
        "listeners: &r [*r, *r]",
        "hosts: &r [{name: a, listeners: *r}]",
        "&r {*r : 1}",
        "listeners: !!str &r [*r]",
    ],
)
def test_alias_of_itself(file: Path, text: str) -> None:
    """A value that contains itself is refused like any other wrong value."""
    assert "expected" in complaint(file, text)


def test_large_file(file: Path) -> None:
    """A file is not read beyond a size that no configuration has, not even an endless one."""
    assert (
        complaint(file, "#" * (1 << 20) + "\n") == ": expected at most 1048576 bytes (found more)"
    )
    with pytest.raises(ConfigError, match=r"^/dev/zero: expected at most 1048576 bytes"):
        load(Path("/dev/zero"))


def test_many_listeners(file: Path) -> None:
    """Thousands of listeners are not too many."""
    text = "listeners:\n" + "".join(f"- {{port: {n}, name: p{n}}}\n" for n in range(1, 3001))
    assert read(file, text).local.listeners == tuple(
        ListenerConfig(n, f"p{n}") for n in range(1, 3001)
    )


def test_unreadable_paths(tmp_path: Path) -> None:
    """A file that is not there, is a directory, or cannot be a file is named with the reason."""
    for path, reason in [
        (tmp_path / "none.yml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "c.yml" / "d", "No such file or directory"),
        (tmp_path / LONG / LONG, "No such file or directory"),
        (tmp_path / (LONG * 3), "File name too long"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert str(caught.value) == f"{path}: expected a readable file ({reason})"
    with pytest.raises(ConfigError, match=r"expected a file's name \(embedded null byte\)$"):
        load(Path("a\0b"))


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that may not be read is named with the reason."""

    def refuse(*_: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refuse)  # root, who often runs tests, may read every file
    with pytest.raises(ConfigError, match=r"expected a readable file \(Permission denied\)$"):
        load(tmp_path / "c.yml")


def test_path_with_control_characters(tmp_path: Path) -> None:
    """A file's odd name does not break the message's one line."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "a\nb\x1b")
    assert str(caught.value).startswith(f"{tmp_path}/a\\nb\\x1b: expected")


def test_program_path(file: Path) -> None:
    """A program's path is relative to the file that names it, wherever the exporter runs."""
    program = file.parent / "my.d"
    program.write_text("BEGIN { exit(0); }")
    for text in ("my.d", "./my.d", str(program)):
        assert read(file, f"dtrace: {{program: {text}}}") == local(program=str(program))
    program.unlink()
    assert complaint(file, "dtrace:\n  program: my.d") == (
        f":2: dtrace.program: expected a readable file (found {program})"
    )


SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (f"dtrace: {{command: sshpass -p {SECRET} ssh a dtrace}}", "dtrace.command: expected a li"),
        (f"dtrace: {{command: [sshpass, {{-p: {SECRET}}}]}}", "dtrace.command[1]: expected a word"),
        (f'dtrace: {{command: [sshpass, "{SECRET}\\0"]}}', "dtrace.command[1]: expected a word"),
        (f"dtrace: {{command: {{{SECRET}: 1}}}}", "dtrace.command: expected a list"),
        (f"dtrace: {{{SECRET}: 1}}", "dtrace: expected the key"),
        (f"dtrace: {{{SECRET}: 1, {SECRET}: 1}}", "dtrace: expected the key"),
        (f"dtrace: {{options: {{bufsize: '{SECRET} x'}}}}", "dtrace.options: expected a number"),
        (f"dtrace: {{options: {{{SECRET}: 1}}}}", "dtrace.options: expected the name"),
        (
            f"dtrace: {{options: {{a: 1, {SECRET}: 1, {SECRET}: 1}}}}",
            "dtrace.options: expected the",
        ),
        (f"dtrace: {{program: {SECRET}}}", "dtrace.program: expected auto"),
        (f"dtrace: {{program: ./{SECRET}}}", "dtrace.program: expected a readable file"),
        (f"dtrace: {{interval: {SECRET}}}", "dtrace.interval: expected a duration"),
        (f"source: {SECRET}", "source: expected auto"),
        (f"source: !{SECRET} a", "source: expected auto"),
        (f"source: *{SECRET}", "expected YAML"),
        (f"source: '{SECRET}", "expected YAML"),
        (f"{SECRET}: 1", "expected the key source or"),
        (f"listeners: [{{port: {SECRET}}}]", "listeners[0].port: expected a port"),
        (f"listeners: [{{port: 1, name: {SECRET * 50}}}]", "listeners[0].name: expected a name"),
        (f"hosts: [{{name: {SECRET}}}, {{name: {SECRET}}}]", "hosts[1].name: expected a name"),
        (SECRET, "expected keys and values"),
    ],
)
def test_no_value_is_told(file: Path, text: str, where: str) -> None:
    """What a file says in the wrong place is in no complaint but the one in full, at any place."""
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(file)
    said = str(caught.value)
    assert SECRET not in said
    assert said.startswith(f"{file}:1: {where}")


def test_configurations_do_not_change() -> None:
    """A configuration is frozen, so that an old and a new one can be told apart at a reload."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(None).source = "dtrace"  # type: ignore[misc]


def uncomment(text: str, blocks: set[int] | None = None) -> tuple[str, int]:
    """Return the example with some of its blocks of commented-out keys in use, and their number."""
    lines, block, inside = [], -1, False
    for line in text.splitlines():
        commented = COMMENTED.match(line) is not None
        if commented and not inside:
            block += 1
        inside = commented
        use = commented and (blocks is None or block in blocks)
        lines.append(COMMENTED.sub(r"\1", line) if use else line)
    return "\n".join(lines) + "\n", block + 1


def test_example_loads() -> None:
    """The example file, as it is, watches every listener of any machine."""
    assert load(EXAMPLE) == Config()


def test_example_uncommented(file: Path) -> None:
    """Every key that the example has commented out is taken when it is not, alone or with all."""
    example = EXAMPLE.read_text()
    _, blocks = uncomment(example, set())
    assert blocks == 9
    for block in range(blocks):
        text, _ = uncomment(example, {block})
        assert text != example
        read(file, text)
    text, _ = uncomment(example)
    assert read(file, text) == Config(
        local=HostConfig(
            dtrace=DTraceConfig(
                options={"aggsize": "8m", "bufsize": "4m"},
                offsets={"conn_tcp": 0x28, "conn_lport": 0x10A},
            ),
            listeners=(ListenerConfig(22, "ssh"), ListenerConfig(443)),
        ),
        hosts=(
            HostConfig(
                "sol10-u9",
                DTraceConfig(
                    ("ssh", "-oBatchMode=yes", "sol10-u9", "/usr/sbin/dtrace"), "solaris10"
                ),
                (ListenerConfig(80, "web"),),
            ),
        ),
    )


def test_example_has_every_key() -> None:
    """The example shows every key there is, so it has to be extended with the configuration."""
    shown = yaml.safe_load(uncomment(EXAMPLE.read_text())[0])
    names = {field.name for field in dataclasses.fields(Config)}
    assert set(shown) == names - {"local"} | {"dtrace", "listeners"}
    assert set(shown["dtrace"]) == {field.name for field in dataclasses.fields(DTraceConfig)}
    assert set(shown["hosts"][0]) == {field.name for field in dataclasses.fields(HostConfig)}
    assert set(shown["listeners"][0]) == {
        field.name for field in dataclasses.fields(ListenerConfig)
    }


def loads_or_complains(file: Path, content: bytes) -> None:
    """Check that a file of that content loads, or is told off in one line, and nothing else."""
    file.write_bytes(content)
    told = None
    try:
        loaded = load(file)
    except ConfigError as error:
        told = str(error)
    if told is not None:
        assert told.isprintable()
        assert re.match(re.escape(str(file)) + r":[1-9]\d*: .*expected ", told)
        return
    for host in (loaded.local, *loaded.hosts):
        assert 0.1 <= host.dtrace.interval <= 10
        assert all(0 < listener.port < 65536 for listener in host.listeners)
        assert len({listener.port for listener in host.listeners}) == len(host.listeners)


hostile = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))

WORDS = sorted(
    {
        "source",
        "listeners",
        "hosts",
        "port",
        "name",
        "auto",
        "shared",
        "1s",
        "22",
        "true",
        "conn_tcp",
    }
    | {field.name for field in dataclasses.fields(DTraceConfig)}
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
    | st.text()
    | st.binary()
    | st.sampled_from(WORDS)
)
structures = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=15,
)


@hostile
@given(st.binary())
def test_any_bytes(file: Path, content: bytes) -> None:
    """Whatever bytes a file has, it loads or is complained about."""
    loads_or_complains(file, content)


@hostile
@given(
    st.lists(
        st.sampled_from(
            [*WORDS, *"{}[]:,-?&*!|>%@`'\"#\n\t \\", ": ", "\n  ", "- ", "&a ", "*a", "<<: "]
        )
        | st.text(max_size=3)
    )
)
def test_anything_like_yaml(file: Path, tokens: list[str]) -> None:
    """Whatever YAML's own signs are put together to, it loads or is complained about."""
    loads_or_complains(file, "".join(tokens).encode("utf-8", "surrogatepass"))


@hostile
@given(structures)
def test_any_structure(file: Path, structure: object) -> None:
    """Whatever values stand under whatever keys, the file loads or is complained about."""
    loads_or_complains(file, yaml.safe_dump(structure, allow_unicode=True).encode())


names = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=128)
listeners = st.lists(
    st.builds(ListenerConfig, st.integers(1, 65535), names),
    max_size=5,
    unique_by=(lambda item: item.port, lambda item: item.name or item.port),
).map(tuple)
dtraces = st.builds(
    DTraceConfig,
    command=st.lists(names.filter(bool), min_size=1, max_size=4).map(tuple),
    program=st.sampled_from(config.PROGRAMS),
    session=st.sampled_from(["per-port", "shared"]),
    interval=st.integers(100, 10_000).map(lambda number: number / 1000),
    accept_wait=st.booleans(),
    options=st.dictionaries(
        st.from_regex(r"\A[a-z]{1,12}\Z"), st.from_regex(r"\A[a-z0-9.:]{1,9}\Z"), max_size=3
    ),
    offsets=st.dictionaries(st.sampled_from(["conn_tcp", "conn_lport"]), st.integers(0, 65535)),
    limits=st.builds(Limits, *[st.integers(1, 10**7)] * 4),
)
configs = st.builds(
    Config,
    source=st.sampled_from(["auto", "dtrace", "sock_diag"]),
    local=st.builds(HostConfig, st.just(""), dtraces, listeners),
    hosts=st.lists(
        st.builds(HostConfig, names.filter(bool), dtraces, listeners),
        max_size=3,
        unique_by=lambda host: host.name,
    ).map(tuple),
)


def written(wanted: Config) -> dict[str, Any]:
    """Return a configuration as a file has it."""
    file = dataclasses.asdict(wanted)
    for host in (file["local"], *file["hosts"]):
        host["dtrace"]["interval"] = f"{round(host['dtrace']['interval'] * 1000)}ms"
        host["dtrace"]["command"] = list(host["dtrace"]["command"])
        host["listeners"] = list(host["listeners"])
    file["hosts"] = list(file["hosts"])
    this = file.pop("local")
    return file | {"dtrace": this["dtrace"], "listeners": this["listeners"]}


@hostile
@given(configs, st.booleans())
def test_round_trip(file: Path, wanted: Config, flow: bool) -> None:
    """Every configuration there can be is read back from a file that says it."""
    text = yaml.safe_dump(written(wanted), default_flow_style=flow, allow_unicode=True)
    assert read(file, text) == wanted
