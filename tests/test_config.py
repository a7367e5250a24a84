"""The configuration file: what is accepted, and the one-line error for anything else."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import socket
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
    SockDiagConfig,
    UnixConfig,
    load,
)
from dtrace_exporter.limits import Limits
from dtrace_exporter.scripts import configuration
from dtrace_exporter.tracing import program

EXAMPLE = Path(__file__).parents[1] / "config" / "dtrace_exporter.yml"
COMMENTED = re.compile(r"^(\s*)#(?=[a-z_]+:|  +(?:- )?[a-z]+:)")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a file that a test may write."""
    return tmp_path_factory.mktemp("config") / "c.yml"


def read(file: Path, content: str | bytes) -> Config:
    """Load a file with this content."""
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return load(file)


def complaint(file: Path, content: str | bytes) -> str:
    """Return the full error about a file with this content, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        read(file, content)
    message = caught.value.in_full
    assert message.isprintable()
    assert message.startswith(str(file))
    said = str(caught.value)
    assert said.isprintable()
    # The short form has the same line and expectation, whatever it leaves out.
    assert said.startswith(message.split(" ", 1)[0])
    assert "expected " in said
    return message.removeprefix(str(file))


def local(**dtrace: Any) -> Config:
    """Return a configuration with these keys under dtrace."""
    return Config(local=HostConfig(dtrace=DTraceConfig(**dtrace)))


def listener(port: int, name: str = "", **where: Any) -> ListenerConfig:
    """Return an entry for one port."""
    return ListenerConfig((range(port, port + 1),), name, **where)


def listening(*listeners: ListenerConfig) -> Config:
    """Return a configuration with these listeners."""
    return Config(local=HostConfig(listeners=listeners))


def test_no_file_means_the_defaults() -> None:
    """Without a file, the exporter watches every listener of the local host, by any source."""
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
                handshake=False,
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
        ("hosts: []", Config()),
        ("dtrace: {command: [sudo, -n, dtrace]}", local(command=("sudo", "-n", "dtrace"))),
        ("dtrace: {program: illumos}", local(program="illumos")),
        ("dtrace: {session: shared}", local(session="shared")),
        ("dtrace: {interval: 100ms}", local(interval=0.1)),
        ("dtrace: {interval: 10s}", local(interval=10.0)),
        ("dtrace: {interval: 0.5s}", local(interval=0.5)),
        ("dtrace: {interval: 500ms1s}", local(interval=1.5)),
        ("dtrace: {interval: .5s}", local(interval=0.5)),
        ("dtrace: {interval: 1.s}", local(interval=1.0)),
        ("dtrace: {interval: 500000us}", local(interval=0.5)),
        ("dtrace: {interval: 500000\u00b5s}", local(interval=0.5)),
        ("dtrace: {interval: 500000000ns}", local(interval=0.5)),
        ("dtrace: {interval: 0.0005h0.2s}", local(interval=2.0)),
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
        ("listeners: [{port: 1}]", listening(listener(1))),
        ("listeners: [{port: 65535, name: a b}]", listening(listener(65535, "a b"))),
        ("listeners: [{port: 0x16}]", listening(listener(22))),
        (
            "listeners: [{port: 1, histograms: false}]",
            listening(listener(1, histograms=False)),
        ),
        ("sock_diag: {}", Config()),
        ("unix: {}", Config()),
        (
            "unix: {paths: [/run/php/*.sock, '@app*']}",
            Config(unix=UnixConfig(("/run/php/*.sock", "@app*"))),
        ),
        ("sock_diag: {sample_interval: 0}", Config()),
        ("sock_diag: {sample_interval: 10ms}", Config(sock_diag=SockDiagConfig(0.01))),
        ("sock_diag: {sample_interval: 10s}", Config(sock_diag=SockDiagConfig(10.0))),
        ("forget_closed_after: 1h", Config()),
        ("forget_closed_after: 10m", Config(forget_closed_after=600.0)),
        ("forget_closed_after: 48h", Config(forget_closed_after=172800.0)),
        (
            "listeners: [{port: 1, name: ''}, {port: 2, name: ''}]",
            listening(listener(1), listener(2)),
        ),
        ("listeners: [{port: 1, name: schlüssel}]", listening(listener(1, "schlüssel"))),
        (
            "listeners: [{ports: [80, 8000-8003], name: web, address: '::ffff:10.0.0.1'}]",
            listening(
                ListenerConfig((range(80, 81), range(8000, 8004)), "web", address="10.0.0.1")
            ),
        ),
        (
            "listeners: [{port: 80, name: a}, {port: 80, address: '::'}, {port: 80, zone: z}]",
            listening(listener(80, "a"), listener(80, address="*"), listener(80, zone="z")),
        ),
        (
            "listeners: [{port: 80, netns: web}, {port: 80, netns: 17}, {port: 80, netns: '18'}]",
            listening(*(listener(80, netns=netns) for netns in ("web", "17", "18"))),
        ),
        (
            "listeners: [{port: 80, jail: www.blue}, {port: 80, jail: 0}, {port: 81, jail: '0'}]",
            listening(
                *(listener(80, jail=jail) for jail in ("www.blue", "0")), listener(81, jail="0")
            ),
        ),
        (
            "{dtrace: {session: shared}, listeners: [{ports: [1-65535]}]}",
            Config(
                local=HostConfig(
                    dtrace=DTraceConfig(session="shared"),
                    listeners=(ListenerConfig((range(1, 65536),)),),
                )
            ),
        ),
        (
            "{source: sock_diag, listeners: [{ports: [1-17]}]}",
            Config("sock_diag", HostConfig(listeners=(ListenerConfig((range(1, 18),)),))),
        ),
        (
            "exclude_ports: [22, 32768-60999]",
            Config(local=HostConfig(exclude_ports=(range(22, 23), range(32768, 61000)))),
        ),
        (
            "hosts: [{name: a, listeners: &all [{port: 1, name: x}]}, {name: b, listeners: *all}]",
            Config(
                hosts=(
                    HostConfig("a", listeners=(listener(1, "x"),)),
                    HostConfig("b", listeners=(listener(1, "x"),)),
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
    """A correct file is read as written, with defaults for the keys that it does not have."""
    assert read(file, text) == expected


APART = "a port that no other entry has with this address and place"
RANGE = "expected a port from 1 to 65535, or a range of them such as 8000-8099"
ADDRESS = "expected an IPv4 or IPv6 address, or * for all addresses"
NAME = "expected a name of at most 128 printable characters"
INTERVAL = "expected a duration from 100ms to 10s, such as 1s or 500ms"
HARMLESS_OPTION = "an option that changes, runs and writes nothing"
OPTION = "expected a number, a size such as 8m, a rate such as 10hz, a word, true or false"
PROGRAM = "expected auto, freebsd, illumos, linux, solaris10 or the path of a D program"
LONG = "x" * 129


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # The whole file.
        ("- a", ":1: expected keys and values (found a list)"),
        ("hello", ':1: expected keys and values (found "hello")'),
        ("---\n", ":2: expected keys and values (found nothing)"),
        (
            "!!python/object:os {}",
            ":1: expected keys and values (found the tag tag:yaml.org,2002:python/object:os)",
        ),
        ("dtrace: !!set {a}", ":1: dtrace: expected keys and values (found the tag tag:yaml.org"),
        # UNIX sockets.
        ("unix: {paths: []}", ":1: unix.paths: expected at least one path, or no key unix"),
        ("unix: {paths: /run/a}", ':1: unix.paths: expected a list (found "/run/a")'),
        ("unix: {paths: ['']}", ":1: unix.paths[0]: expected a path such as /run/php/*.sock"),
        ('unix: {paths: ["/a\\n"]}', ":1: unix.paths[0]: expected a path such as /run/php/*.sock"),
        ("unix: {path: [a]}", ":1: unix.path: expected the key paths (found an unknown one)"),
        # Keys.
        ("\nlistner: 1", ":2: listner: expected the key listeners (found an unknown one)"),
        (
            "colour: 1",
            (
                ":1: colour: expected the key source or dtrace or listeners or exclude_ports "
                "or scripts or hosts or sock_diag or unix or forget_closed_after "
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
        (
            "source: Auto",
            ':1: source: expected auto or dtrace or sock_diag or netstat (found "Auto")',
        ),
        ("source:", ":1: source: expected auto or dtrace or sock_diag or netstat (found nothing)"),
        (
            "source: [auto]",
            ":1: source: expected auto or dtrace or sock_diag or netstat (found a list)",
        ),
        (
            "source: !x auto",
            ":1: source: expected auto or dtrace or sock_diag or netstat (found the tag !x)",
        ),
        # listeners
        ("listeners:", ":1: listeners: expected a list (found nothing)"),
        ("listeners: {port: 1}", ":1: listeners: expected a list (found keys and values)"),
        ("listeners: [22]", ":1: listeners[0]: expected keys and values (found 22)"),
        (
            "listeners:\n- port: 1\n- name: x",
            ":3: listeners[1]: expected the key port or ports (found none)",
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
            (f":4: listeners[2].port: expected {APART} (found 22, as in line 2)"),
        ),
        (
            "listeners:\n- port: 1\n  name: x\n- port: 2\n  name: x",
            (
                ":5: listeners[1].name: expected a name that no other entry has "
                '(found "x", as in line 3)'
            ),
        ),
        (
            "listeners: []",
            (
                ":1: listeners: expected at least one listener, or no key listeners to watch"
                " all of them (found none)"
            ),
        ),
        (
            "hosts: [{name: a, listeners: []}]",
            (
                ":1: hosts[0].listeners: expected at least one listener, or no key listeners to"
                " watch all of them (found none)"
            ),
        ),
        (
            "listeners: [{port: 1, name: no}]",
            f":1: listeners[0].name: {NAME}, in quotes (found no)",
        ),
        (
            "dtrace: {command: [ssh, -o, yes]}",
            ":1: dtrace.command[2]: expected a word of the command, in quotes (found yes)",
        ),
        (
            "dtrace: {command: [ssh, 2026-01-02]}",
            ":1: dtrace.command[1]: expected a word of the command, in quotes (found 2026-01-02)",
        ),
        (
            "dtrace: {command: [ssh, ~]}",
            ":1: dtrace.command[1]: expected a word of the command (found nothing)",
        ),
        ("DTrace: {}", ":1: DTrace: expected the key dtrace (found an unknown one)"),
        (
            "dtrace: {Accept-Wait: true}",
            ":1: dtrace.Accept-Wait: expected the key accept_wait (found an unknown one)",
        ),
        (
            "listeners: [{port: 1, name: 80}]",
            f":1: listeners[0].name: {NAME}, in quotes (found 80)",
        ),
        ("listeners: [{port: 1, name: }]", f":1: listeners[0].name: {NAME} (found nothing)"),
        (
            'listeners: [{port: 1, name: "a\\tb"}]',
            f':1: listeners[0].name: {NAME} (found "a\\tb")',
        ),
        (f"listeners: [{{port: 1, name: {LONG}}}]", None),
        ('listeners: [{port: 1, name: "\\uD800"}]', None),
        # several listeners of a port
        ("listeners:\n- port: 1\n  ports: [2]", ":3: listeners[0].ports: expected port or ports ("),
        (
            "listeners: [{ports: []}]",
            ":1: listeners[0].ports: expected one port or more (found none",
        ),
        ("listeners: [{ports: 80}]", ":1: listeners[0].ports: expected a list (found 80)"),
        *(
            (
                f"listeners:\n- ports:\n  - 1\n  - {wrong}",
                f":4: listeners[0].ports[1]: {RANGE} (found",
            )
            for wrong in (
                "0-1",
                "2-1",
                "1-65536",
                "1 - 2",
                "1-",
                "x",
                "1-2-3",
                "99999-1",
                "[]",
            )
        ),
        (
            "listeners: [{ports: [1, 0]}]",
            ":1: listeners[0].ports[1]: expected a port from 1 to 65535 (found 0)",
        ),
        ("exclude_ports: [1-2, x]", f':1: exclude_ports[1]: {RANGE} (found "x")'),
        (
            "listeners:\n- ports: [80-90]\n- port: 443\n- ports: [1, 90-95]",
            f":4: listeners[2].ports: expected {APART} (found 90, as in line 2)",
        ),
        (
            "listeners: [{ports: [1-2, 2]}]",
            f":1: listeners[0].ports: expected {APART} (found 2, as",
        ),
        (
            "listeners:\n- {port: 1, address: '::'}\n- {port: 1, address: 0.0.0.0}",
            f":3: listeners[1].port: expected {APART} (found 1, as in line 2)",
        ),
        (
            "listeners:\n- port: 1\n  zone: a\n  netns: b",
            ":4: listeners[0].netns: expected zone or netns (found both)",
        ),
        (
            "listeners:\n- port: 1\n  zone: a\n  jail: b",
            ":4: listeners[0].jail: expected zone or jail (found both)",
        ),
        (
            "listeners: [{port: 1, jail: ''}]",
            ":1: listeners[0].jail: expected the name of a jail, or 0 for the host (",
        ),
        *(
            (
                f"listeners: [{{port: 1, address: {wrong}}}]",
                f":1: listeners[0].address: {ADDRESS} (found",
            )
            for wrong in ("localhost", "10.0.0.0/8", "fe80::1%eth0", "''", "7", "'**'")
        ),
        *(
            (f"listeners: [{{port: 1, netns: {wrong}}}]", ":1: listeners[0].netns: expected ")
            for wrong in ("a/b", "'..'", "''", "0", "-1", "[]", LONG, "'a\tb'", "0x10")
        ),
        (
            "listeners: [{port: 1, zone: ''}]",
            ":1: listeners[0].zone: expected the name of a zone (",
        ),
        (
            "hosts:\n- name: a\n  listeners:\n  - port: 1\n    netns: web",
            ":5: hosts[0].listeners[0].netns: expected the inode of a network namespace (",
        ),
        (
            "listeners:\n- ports: [1-9]\n- ports: [11, 13-28]",
            (
                ":3: listeners[1].ports: expected at most 16 ports, or dtrace.session: shared,"
                " or source: sock_diag or netstat"
            ),
        ),
        (
            "source: sock_diag\nhosts:\n- name: a\n  listeners:\n  - ports: [1-17]",
            (
                ":5: hosts[0].listeners[0].ports: expected at most 16 ports,"
                " or dtrace.session: shared (found more)"
            ),
        ),
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
            (f":5: hosts[0].listeners[1].port: expected {APART} (found 1, as in line 4)"),
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
            ":1: dtrace.command[1]: expected a word of the command, in quotes (found 1)",
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
        ("dtrace: {program: /}", ":1: dtrace.program: expected a regular file (found /)"),
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
                ("1.s.", '"1.s."'),
                (".s", '".s"'),
                ("1.2.3s", '"1.2.3s"'),
                ("9999999999999h", '"9999999999999h"'),
                ("1e1s", '"1e1s"'),
                ("1m", '"1m"'),
                ("1h", '"1h"'),
                ("-1s", '"-1s"'),
                ("1 s", '"1 s"'),
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
            ':1: dtrace.options.Agg: expected the name of a D option in lower case (found "Agg")',
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
    """Each mistake gives one line with the file, the line, the key and the expectation."""
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
    """A file nested too deeply gives an error that names the line."""
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
    """A file that expands to more values than a configuration can have is refused at once."""
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
    """A file larger than any configuration is refused without being read to its end."""
    expected = ": expected a readable file (it has more than 1048576 bytes)"
    assert complaint(file, "#" * (1 << 20) + "\n") == expected


def test_many_listeners(file: Path) -> None:
    """A configuration may have thousands of listeners."""
    text = "listeners:\n" + "".join(f"- {{port: {n}, name: p{n}}}\n" for n in range(1, 3001))
    assert read(file, text).local.listeners == tuple(listener(n, f"p{n}") for n in range(1, 3001))


def test_unreadable_paths(tmp_path: Path) -> None:
    """The error for a missing file, a directory or an impossible path gives the reason."""
    for path, reason in [
        (tmp_path / "none.yml", "No such file or directory"),
        (tmp_path, "it is a directory and not a regular file"),
        (Path("/dev/zero"), "it is a device and not a regular file"),
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
    """The error for a file without read permission gives the reason."""

    def refuse(*_: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "c.yml").touch()
    monkeypatch.setattr(os, "open", refuse)  # root, who often runs tests, may read every file
    with pytest.raises(ConfigError, match=r"expected a readable file \(Permission denied\)$"):
        load(tmp_path / "c.yml")


@pytest.mark.parametrize("kind", ["FIFO", "directory", "device", "socket"])
def test_no_regular_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Anything but a regular file is refused unopened, so that nobody waits for a FIFO's writer."""
    path = tmp_path / "odd"
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/tty")
        else:
            listener.bind(str(path))
        with monkeypatch.context() as patched:
            patched.setattr(os, "open", None)
            with pytest.raises(ConfigError) as caught:
                load(path)
            with pytest.raises(program.ProgramError, match=f"it is a {kind} and not a regular"):
                program.load(str(path))
        said = f"{path}: expected a readable file (it is a {kind} and not a regular file)"
        assert str(caught.value) == said
        where = f":1: dtrace.program: expected a regular file (found {path})"
        assert complaint(file, f"dtrace: {{program: {path}}}") == where


def test_fifo_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a file becomes a FIFO after the check of its type, opening it does not block."""
    path = tmp_path / "c.yml"
    path.touch()
    whole = Path.stat

    def change(*arguments: Any, **more: Any) -> os.stat_result:
        found = whole(*arguments, **more)
        path.unlink()
        os.mkfifo(path)
        return found

    monkeypatch.setattr(Path, "stat", change)
    with pytest.raises(ConfigError, match="it is a FIFO and not a regular file"):
        load(path)


def test_large_program(tmp_path: Path) -> None:
    """A D program larger than any real one is refused."""
    path = tmp_path / "large.d"
    path.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(program.ProgramError, match="it has more than 1048576 bytes"):
        program.load(str(path))


def test_path_with_control_characters(tmp_path: Path) -> None:
    """Control characters in a file's name do not break the single line of the error."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "a\nb\x1b")
    assert str(caught.value).startswith(f"{tmp_path}/a\\nb\\x1b: expected")


def test_program_path(file: Path) -> None:
    """A program's path is relative to the configuration file that names it."""
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
    """Only the error in full contains a wrong value, whatever the key."""
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(file)
    said = str(caught.value)
    assert SECRET not in said
    assert said.startswith(f"{file}:1: {where}")


def test_configurations_do_not_change() -> None:
    """A configuration is frozen, so that a reload can compare an old and a new one."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(None).source = "dtrace"  # type: ignore[misc]


def uncomment(text: str, blocks: set[int] | None = None) -> tuple[str, int]:
    """Return the example with some commented-out blocks in use, and the number of blocks."""
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
    """The example file, unchanged, watches every listener of any machine."""
    assert load(EXAMPLE) == Config()


def test_example_uncommented(file: Path) -> None:
    """Each commented-out block of the example is valid, alone and with all others."""
    example = EXAMPLE.read_text()
    script = file.with_name("syscalls.d")
    script.write_text("BEGIN { @calls = count(); }", encoding="utf-8")
    scripts = (configuration.load(script),)
    _, blocks = uncomment(example, set())
    assert blocks == 15
    for block in range(blocks):
        text, _ = uncomment(example, {block})
        assert text != example
        read(file, text)
    text, _ = uncomment(example)
    assert read(file, text) == Config(
        local=HostConfig(
            dtrace=DTraceConfig(
                handshake=True,
                options={"aggsize": "8m", "bufsize": "4m"},
                offsets={"conn_tcp": 0x28, "conn_lport": 0x10A},
            ),
            listeners=(
                listener(22, "ssh"),
                listener(443),
                ListenerConfig((range(8080, 8081), range(8000, 8010)), "app"),
                listener(443, "shop", address="192.0.2.1", netns="blue"),
                listener(443, "intranet", zone="web"),
                listener(443, "wiki", jail="wiki"),
            ),
            exclude_ports=(range(111, 112), range(32768, 61000)),
            scripts=scripts,
        ),
        hosts=(
            HostConfig(
                "sol10-u9",
                DTraceConfig(
                    ("ssh", "-oBatchMode=yes", "sol10-u9", "/usr/sbin/dtrace"), "solaris10"
                ),
                (listener(80, "web"),),
                scripts=scripts,
            ),
        ),
        unix=UnixConfig(("/run/php/*.sock", "@app*")),
    )


def test_example_has_every_key() -> None:
    """The example shows every key, so it has to be extended together with the configuration."""
    shown = yaml.safe_load(uncomment(EXAMPLE.read_text())[0])
    names = {field.name for field in dataclasses.fields(Config)}
    assert set(shown) == names - {"local"} | {"dtrace", "listeners", "exclude_ports", "scripts"}
    assert set(shown["dtrace"]) == {field.name for field in dataclasses.fields(DTraceConfig)}
    of_host = {field.name for field in dataclasses.fields(HostConfig)}
    assert set(shown["hosts"][0]) == of_host - {"exclude_ports"}
    of_listener = {field.name for field in dataclasses.fields(ListenerConfig)}
    assert {key for one in shown["listeners"] for key in one} == of_listener | {"port"}


def loads_or_complains(file: Path, content: bytes) -> None:
    """Check that a file with this content loads, or gives a one-line ConfigError."""
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
        ports = [
            (one.address, one.zone, one.netns, one.jail, port)
            for one in host.listeners
            for ports in one.ports
            for port in ports
        ]
        assert all(0 < port < 65536 for *_, port in ports)
        assert len(set(ports)) == len(ports)


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
    """A file of arbitrary bytes loads or gives a one-line error."""
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
    """Arbitrary combinations of YAML's own characters load or give a one-line error."""
    loads_or_complains(file, "".join(tokens).encode("utf-8", "surrogatepass"))


@hostile
@given(structures)
def test_any_structure(file: Path, structure: object) -> None:
    """Arbitrary values under arbitrary keys load or give a one-line error."""
    loads_or_complains(file, yaml.safe_dump(structure, allow_unicode=True).encode())


names = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=128)
listeners = st.lists(
    st.builds(
        ListenerConfig,
        st.builds(
            lambda n, more: (range(16 * n, 16 * n + more),),
            st.integers(1, 4000),
            st.integers(1, 16),
        ),
        names,
        st.sampled_from(["", "*", "10.0.0.1", "2001:db8::1"]),
        zone=st.just("") | names,
        jail=st.just(""),
        histograms=st.booleans(),
    ),
    max_size=5,
    unique_by=(lambda item: item.ports[0].start, lambda item: item.name or item.ports),
).map(tuple)
dtraces = st.builds(
    DTraceConfig,
    command=st.lists(names.filter(bool), min_size=1, max_size=4).map(tuple),
    program=st.sampled_from(config.PROGRAMS),
    session=st.sampled_from(["per-port", "shared"]),
    interval=st.integers(100, 10_000).map(lambda number: number / 1000),
    accept_wait=st.booleans(),
    handshake=st.booleans(),
    options=st.dictionaries(
        st.from_regex(r"\A[a-z]{1,12}\Z"), st.from_regex(r"\A[a-z0-9.:]{1,9}\Z"), max_size=3
    ),
    offsets=st.dictionaries(st.sampled_from(["conn_tcp", "conn_lport"]), st.integers(0, 65535)),
    limits=st.builds(Limits, *[st.integers(1, 10**7)] * 4),
)
configs = st.builds(
    Config,
    source=st.sampled_from(["auto", "dtrace", "sock_diag", "netstat"]),
    local=st.builds(HostConfig, st.just(""), dtraces, listeners),
    hosts=st.lists(
        st.builds(HostConfig, names.filter(bool), dtraces, listeners),
        max_size=3,
        unique_by=lambda host: host.name,
    ).map(tuple),
    sock_diag=st.builds(SockDiagConfig, st.integers(10, 10_000).map(lambda n: n / 1000)),
    unix=st.builds(
        UnixConfig, st.lists(st.from_regex(r"\A[/@][ -~]{1,20}\Z"), max_size=3).map(tuple)
    ),
    forget_closed_after=st.integers(600, 999_999).map(float),
)


def shown(ports: tuple[range, ...]) -> list[int | str]:
    """Return ports and ranges in the notation of the file."""
    return [one[0] if len(one) == 1 else f"{one[0]}-{one[-1]}" for one in ports]


def written(wanted: Config) -> dict[str, Any]:
    """Return a configuration in the structure of the file."""
    file = dataclasses.asdict(wanted)
    for host in (file["local"], *file["hosts"]):
        host["dtrace"]["interval"] = f"{round(host['dtrace']['interval'] * 1000)}ms"
        host["dtrace"]["command"] = list(host["dtrace"]["command"])
        host["listeners"] = [
            {key: value for key, value in one.items() if value or key == "histograms"}
            | {"ports": shown(one["ports"])}
            for one in host["listeners"]
        ]
        if not host["listeners"]:
            del host["listeners"]
        host["exclude_ports"] = shown(host["exclude_ports"])
    file["hosts"] = list(file["hosts"])
    interval = file["sock_diag"]["sample_interval"]
    file["sock_diag"]["sample_interval"] = f"{round(interval * 1000)}ms"
    file["unix"] = {"paths": list(wanted.unix.paths)} if wanted.unix.paths else {}
    file["forget_closed_after"] = f"{round(file['forget_closed_after'])}s"
    this: dict[str, Any] = file.pop("local")
    del this["name"]
    return file | this


@hostile
@given(configs, st.booleans())
def test_round_trip(file: Path, wanted: Config, flow: bool) -> None:
    """Every possible configuration is read back unchanged from a file."""
    text = yaml.safe_dump(written(wanted), default_flow_style=flow, allow_unicode=True)
    assert read(file, text) == wanted
