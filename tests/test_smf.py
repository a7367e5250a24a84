"""SMF: the manifest against the rules of its DTD, and the method with a fake SMF around it."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from lab.exporter import free_port
from lab.waiting import until

from dtrace_exporter import cli, log
from fake_smf import members, quoted
from fake_steps import FakeDTrace
from host_tools import require

HERE = Path(__file__).parent
SMF = HERE.parent / "smf"
MANIFEST = SMF / "dtrace-exporter.xml"
METHOD = SMF / "dtrace-exporter"

FMRI = "svc:/network/dtrace-exporter:default"
INCLUDE = "/lib/svc/share/smf_include.sh"
SCRATCH = "/tmp/dtrace-exporter."
OK, FATAL, CONFIG, NO_SMF, PERM = 0, 95, 96, 99, 100
OTHER = 1
SECONDS = 20.0

# The grammar of the elements in the manifest, after the DTD service_bundle, version 1, of illumos:
# each element's content in the DTD's own notation, and its attributes. A ! marks those that it must
# have, and = comes before their possible values.
TYPES = (
    "count integer opaque host hostname net_address_v4 net_address_v6 time astring ustring boolean "
    "fmri uri"
).replace(" ", "|")
LISTS = "|".join(f"{name}_list" for name in TYPES.split("|"))
VALUES = "(propval|property)*"
BOOLEAN = "true|false"
GROUPINGS = "require_all|require_any|exclude_all|optional_all"
EVENTS = "error|restart|refresh|none"
STABILITIES = "Standard|Stable|Evolving|Unstable|External|Obsolete"
SERVICE = (
    "create_default_instance?, single_instance?, restarter?, dependency*, dependent*, "
    "method_context?, exec_method*, property_group*, instance*, stability?, template?"
)
PROPERTY = (
    "common_name?, description?, units?, visibility?, cardinality?, internal_separators?, values?, "
    "constraints?, choices?"
)
GRAMMAR: dict[str, tuple[str, str]] = {
    "service_bundle": ("service_bundle*|service*|xi:include*", "type! name!"),
    "service": (SERVICE, "name! version! type!=service|restarter|milestone"),
    "create_default_instance": ("EMPTY", f"enabled!={BOOLEAN}"),
    "single_instance": ("EMPTY", ""),
    "dependency": (
        f"service_fmri*, stability?, {VALUES}",
        f"name! grouping!={GROUPINGS} restart_on!={EVENTS} type! delete={BOOLEAN}",
    ),
    "service_fmri": ("EMPTY", "value!"),
    "method_context": (
        "(method_profile|method_credential)?, method_environment?",
        "working_directory project resource_pool",
    ),
    "method_credential": ("EMPTY", "user! group supp_groups privileges limit_privileges"),
    "exec_method": (
        f"method_context?, stability?, {VALUES}",
        f"type!=method|monitor name! exec! timeout_seconds! delete={BOOLEAN}",
    ),
    "property_group": (f"stability?, {VALUES}", f"name! type! delete={BOOLEAN}"),
    "propval": ("EMPTY", f"name! type!={TYPES} value! override={BOOLEAN}"),
    "property": (f"({LISTS})?", f"name! type!={TYPES} override={BOOLEAN}"),
    "astring_list": ("value_node+", ""),
    "value_node": ("EMPTY", "value!"),
    "stability": ("EMPTY", f"value!={STABILITIES}"),
    "template": ("common_name, description?, documentation?, pg_pattern*", ""),
    "common_name": ("loctext+", ""),
    "description": ("loctext+", ""),
    "loctext": ("#PCDATA", "lang!"),
    "documentation": ("(doc_link|manpage)*", ""),
    "doc_link": ("EMPTY", "name! uri!"),
    "manpage": ("EMPTY", "title! section! manpath"),
    "pg_pattern": (
        "common_name?, description?, prop_pattern*",
        f"name type required={BOOLEAN} target=this|instance|delegate|all",
    ),
    "prop_pattern": (PROPERTY, f"name! type={TYPES} required={BOOLEAN}"),
    "cardinality": ("EMPTY", "min max"),
    "constraints": ("value*, range*", ""),
    "choices": ("value*, range*, include_values*", ""),
    "value": ("common_name?, description?", "name!"),
    "include_values": ("EMPTY", "type!=constraints|values"),
}
XML = "{http://www.w3.org/XML/1998/namespace}"


def faults(element: Element) -> Iterator[str]:
    """Yield each breach of the grammar in an element and in its content."""
    if element.tag not in GRAMMAR:
        yield f"{element.tag}: not an element"
        return
    model, attributes = GRAMMAR[element.tag]
    texts = [element.text, *(child.tail for child in element)]
    if model != "#PCDATA" and any(text and text.strip() for text in texts):
        yield f"{element.tag}: text"
    model = "" if model in ("EMPTY", "#PCDATA") else model
    content = re.sub(r"[\w:]+", r"(?:\g<0> )", model).replace(", ", "")
    children = "".join(f"{child.tag} " for child in element)
    if not re.fullmatch(content, children):
        yield f"{element.tag}: holds {children}"
    given = {name.replace(XML, ""): value for name, value in element.attrib.items()}
    allowed = {}
    for attribute in attributes.split():
        name, _, values = attribute.partition("=")
        allowed[name.rstrip("!")] = values
        if name.endswith("!") and name.rstrip("!") not in given:
            yield f"{element.tag}: lacks {name.rstrip('!')}"
    for name, value in given.items():
        if name not in allowed or not re.fullmatch(allowed[name] or ".*", value, re.DOTALL):
            yield f"{element.tag}: {name}={value}"
    for child in element:
        yield from faults(child)


@pytest.fixture
def manifest() -> Element:
    """The manifest."""
    return ElementTree.parse(MANIFEST).getroot()


def one(element: Element, path: str) -> Element:
    """Return the only element at a path."""
    (found,) = element.findall(path)
    return found


def test_manifest_is_valid(manifest: Element) -> None:
    """The manifest conforms to the DTD."""
    assert list(faults(manifest)) == []


def _without(name: str) -> Callable[[Element], object]:
    return lambda element: element.attrib.pop(name)


BREACHES: dict[str, tuple[str, Callable[[Element], object]]] = {
    "no name": ("service", _without("name")),
    "no language": (".//loctext", _without(XML + "lang")),
    "an unknown element": ("service", lambda element: ElementTree.SubElement(element, "nonsense")),
    "an unknown attribute": ("service", lambda element: element.set("nonsense", "1")),
    "a wrong value": (".//dependency", lambda element: element.set("grouping", "all")),
    "a wrong order": ("service", lambda element: element.insert(0, element[-1])),
    "text": ("service", lambda element: setattr(element, "text", "nonsense")),
    "nothing in a list": (".//astring_list", lambda element: element.clear()),
    "two of one": (".//template", lambda element: element.insert(0, copy.copy(element[0]))),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_breaches_are_found(breach: str, manifest: Element) -> None:
    """The grammar rejects what the DTD rejects."""
    path, change = BREACHES[breach]
    element = manifest.findall(path)[0]
    change(element)
    assert list(faults(manifest)) != []


def test_manifest_names_the_dtd() -> None:
    """The manifest has the DTD's path where svccfg(8) looks for it."""
    text = MANIFEST.read_text(encoding="utf-8")
    dtd = "/usr/share/lib/xml/dtd/service_bundle.dtd.1"
    assert f'<!DOCTYPE service_bundle SYSTEM "{dtd}">' in text


def test_service(manifest: Element) -> None:
    """There is one instance, which an administrator must enable and which needs the network."""
    service = one(manifest, "service")
    assert f"svc:/{service.get('name')}:default" == FMRI
    assert one(service, "create_default_instance").get("enabled") == "false"
    assert one(service, "single_instance").attrib == {}
    required = {
        each.get("value")
        for dependency in service.findall("dependency[@grouping='require_all']")
        for each in dependency
    }
    assert required == {"svc:/system/filesystem/local:default", "svc:/milestone/network:default"}


def test_least_privileges(manifest: Element) -> None:
    """The service is not root, and its only privilege beyond a user's is dtrace_kernel."""
    assert one(manifest, ".//method_credential").attrib == {
        "user": "dtexport",
        "group": "dtexport",
        "privileges": "basic,dtrace_kernel",
    }
    # Solaris 10 and 11 do not shorten names of up to eight letters.
    assert len(one(manifest, ".//method_credential").attrib["user"]) <= 8


def test_methods(manifest: Element) -> None:
    """SMF starts and refreshes with the method, and stops with a signal to the whole contract."""
    methods = {each.get("name"): each for each in manifest.iter("exec_method")}
    assert methods.keys() == {"start", "refresh", "stop"}
    assert methods["stop"].get("exec") == ":kill"
    for name in ("start", "refresh"):
        assert methods[name].get("exec", "").endswith("/lib/svc/method/dtrace-exporter %m")
    # service.choose_source() may ask dtrace(1) three things.
    assert int(methods["start"].get("timeout_seconds", "")) > 3 * 120
    assert METHOD.stat().st_mode & 0o111


def settings(manifest: Element) -> dict[str, list[str]]:
    """Return the properties of the group config and their values."""
    found = {}
    for each in one(manifest, ".//property_group[@name='config']"):
        values = [node.get("value", "") for node in each.iter("value_node")]
        found[each.get("name", "")] = values or [each.get("value", "")]
    return found


def test_properties(manifest: Element) -> None:
    """Each property has a pattern, is read by the method and matches the exporter's flags."""
    names = set(settings(manifest))
    assert names == {"config_file", "web_config_file", "listen_address", "log_level", "log_format"}
    patterns = one(manifest, ".//pg_pattern[@name='config']")
    assert {each.get("name") for each in patterns.findall("prop_pattern")} == names
    read = re.findall(r"config/(\w+)\\ \*\) flag=(\S+) ;;", METHOD.read_text(encoding="utf-8"))
    assert {name for name, _ in read} == names
    usage = cli._parser().format_usage()
    assert [flag for _, flag in read if f"[{flag} " not in usage] == []
    for name, choices in (("log_level", log.LEVELS), ("log_format", log.FORMATS)):
        values = patterns.findall(f"prop_pattern[@name='{name}']/constraints/value")
        assert [value.get("name") for value in values] == [*choices]
        assert settings(manifest)[name][0] in choices
    assert settings(manifest)["listen_address"] == [":9748"]


FAKE_INCLUDE = f"""\
SMF_EXIT_OK={OK}
SMF_EXIT_ERR_FATAL={FATAL}
SMF_EXIT_ERR_CONFIG={CONFIG}
SMF_EXIT_ERR_NOSMF={NO_SMF}
SMF_EXIT_ERR_PERM={PERM}
smf_clear_env() {{
    unset SMF_FMRI SMF_METHOD SMF_RESTARTER SMF_ZONENAME
}}
"""

# It saves how it was started, and then follows its steps.
FAKE_EXPORTER = """\
#!{python} -IS
import json, os, signal, sys, time
from pathlib import Path
Path({saved!r}).write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
ready = int(os.environ["DTRACE_EXPORTER_READY_FD"])
for name, value in {steps!r}:
    if name == "say":
        os.write(ready, value.encode() + b"\\n")
        os.close(ready)
    elif name == "wait":
        while not Path(value).exists():
            time.sleep(0.01)
    elif name == "signal":
        os.kill(os.getpid(), value)
    else:
        os._exit(value)
signal.pause()
"""
READY = ("say", "ready")


class Host:
    """A host with SMF, as far as the method can see."""

    def __init__(self, shell: str, root: Path) -> None:
        self.shell = shell
        self.contracts: list[int] = []
        self.properties: dict[str, tuple[str, list[str]]] = {
            "config/listen_address": ("astring", [":9748"])
        }
        self.log_file = root / "log"
        # The path has a space, so that a missing quote is noticed.
        self.prefix = root / "opt dtrace-exporter"
        self.saved = root / "started.json"
        self._root = root
        self._bin = root / "bin"
        for directory in (self._bin, self.prefix / "bin", self.prefix / "lib/svc/method"):
            directory.mkdir(parents=True)
        include = root / "smf_include.sh"
        include.write_text(FAKE_INCLUDE, encoding="utf-8")
        text = METHOD.read_text(encoding="utf-8")
        self.scratch = root / "tmp"
        self.scratch.mkdir()
        for there, here in ((INCLUDE, f"'{include}'"), (SCRATCH, f"{self.scratch}/x.")):
            assert text.count(there) == 1
            text = text.replace(there, here)
        method = self.prefix / "lib/svc/method/dtrace-exporter"
        method.write_text(text, encoding="utf-8")
        for name in ("svcprop", "pkill"):
            fake = self._bin / name
            command = f"{sys.executable} -IS {HERE / 'fake_smf.py'} {name}"
            fake.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
            fake.chmod(0o755)
        self.python = self.prefix / "bin/python"
        self.python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
        self.python.chmod(0o755)

    def install_real(self) -> None:
        """Install the exporter itself."""
        script = Path(sys.executable).with_name("dtrace-exporter")
        assert script.exists()
        self._exporter.symlink_to(script)

    def install_fake(self, *steps: tuple[str, str | int]) -> None:
        """Install a fake exporter that follows some steps."""
        text = FAKE_EXPORTER.format(python=sys.executable, saved=str(self.saved), steps=steps)
        self._exporter.write_text(text, encoding="utf-8")
        self._exporter.chmod(0o755)

    def begin(self, name: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a method in a contract of its own, as svc.startd(8) does."""
        self.contracts.append(random.getrandbits(62))
        (self._root / "properties.json").write_text(json.dumps(self.properties), encoding="utf-8")
        variables = {
            "LOGNAME": str(self.contracts[-1]),
            "FAKE_SMF": str(self._root / "properties.json"),
            "PATH": f"{self._bin}:/usr/sbin:/usr/bin",
            "SMF_FMRI": FMRI,
            "SMF_METHOD": name,
            "SMF_RESTARTER": "svc:/system/svc/restarter:default",
            "SMF_ZONENAME": "global",
            **environment,
        }
        method = self.prefix / "lib/svc/method/dtrace-exporter"
        with self.log_file.open("ab") as file:
            return subprocess.Popen(
                [self.shell, str(method), name],
                cwd="/",
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

    def run(self, name: str, **environment: str) -> int:
        """Run a method to its end, and return its exit status."""
        with self.begin(name, **environment) as process:
            try:
                return process.wait(timeout=SECONDS)
            finally:
                process.kill()

    def start(self) -> int:
        """Start the service, and return its contract."""
        status = self.run("start")
        assert (status, self.log) == (OK, self.log)
        self.properties["restarter/contract"] = "count", [str(self.contracts[-1])]
        return self.contracts[-1]

    def arguments(self) -> list[str]:
        """Return the arguments that the fake exporter got."""
        return [*json.loads(self.saved.read_text(encoding="utf-8"))[0]]

    @property
    def log(self) -> str:
        """The content of the service's log."""
        return self.log_file.read_text(encoding="utf-8")

    @property
    def _exporter(self) -> Path:
        return self.prefix / "bin/dtrace-exporter"

    def end(self) -> None:
        """Kill all processes that are left."""
        for contract in self.contracts:
            while pids := members(contract):
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


@pytest.fixture(params=["dash", "ksh93"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    """Return a host with one of the shells that the method must run under."""
    shell = require(request.param, {"dash": "dash", "ksh93": "ksh"}[request.param])
    made = Host(shell, tmp_path)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def port() -> int:
    """Return a port without a listener."""
    return free_port()


def get(port: int, path: str) -> str:
    """Return what an exporter serves at a path, or an empty string if it does not."""
    url = f"http://127.0.0.1:{port}{path}"
    with suppress(URLError, ConnectionError), urlopen(url, timeout=SECONDS) as answer:
        return str(answer.read().decode())
    return ""


def configure(host: Host, command: list[str], *ports: int, at: int) -> Path:
    """Configure a real exporter to watch some ports with a fake dtrace(1)."""
    host.install_real()
    path = host.prefix / "etc of it/c.yml"
    path.parent.mkdir(exist_ok=True)
    write(path, command, *ports)
    host.properties["config/config_file"] = "astring", [str(path)]
    host.properties["config/listen_address"] = "astring", [f"127.0.0.1:{at}"]
    return path


def write(path: Path, command: list[str], *ports: int) -> None:
    """Write a configuration."""
    dtrace = {"command": command, "program": "illumos", "interval": "100ms"}
    listeners = [{"port": each} for each in ports]
    config = {"source": "dtrace", "dtrace": dtrace, "listeners": listeners}
    path.write_text(json.dumps(config), encoding="utf-8")


def test_start_and_stop(host: Host, fake_dtrace: FakeDTrace, port: int) -> None:
    """Once the method has ended, the exporter answers; SMF's signal leaves no process."""
    configure(host, fake_dtrace(), 22, 80, at=port)
    contract = host.start()
    assert get(port, "/-/healthy") == "healthy\n"
    until(lambda: get(port, "/-/ready") == "ready\n")
    exporter, *dtraces = members(contract)
    assert "dtrace-exporter" in Path(f"/proc/{exporter}/cmdline").read_text(encoding="utf-8")
    # One for each port, and one for the host's processes.
    assert len(dtraces) == 3
    for pid in (exporter, *dtraces):
        # The exporter may have ended it already.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    until(lambda: not members(contract))
    assert "Traceback" not in host.log
    # The log has only lines of the exporter, and none of the method.
    assert [line for line in host.log.splitlines() if not line.startswith("ts=")] == []


def test_method_waits(host: Host, tmp_path: Path) -> None:
    """The method does not end before the exporter says that it has started."""
    go = tmp_path / "go"
    host.install_fake(("wait", str(go)), READY)
    with host.begin("start") as process:
        try:
            until(lambda: host.saved.exists() and host.saved.stat().st_size)
            assert list(host.scratch.iterdir()) != []
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=0.3)
            go.touch()
            assert process.wait(timeout=SECONDS) == OK
        finally:
            process.kill()
    assert len(members(host.contracts[-1])) == 1


def test_nothing_is_left_behind(host: Host) -> None:
    """The method's temporary files are gone after a start, whether it succeeds or fails."""
    host.install_fake(READY)
    host.start()
    assert list(host.scratch.iterdir()) == []
    host.install_fake(("exit", 1))
    assert host.run("start") == OTHER
    assert list(host.scratch.iterdir()) == []


def test_environment(host: Host) -> None:
    """The exporter has none of the variables that SMF gives to a method."""
    host.install_fake(READY)
    host.start()
    environment = json.loads(host.saved.read_text(encoding="utf-8"))[1]
    assert [name for name in environment if name.startswith("SMF_")] == []


def test_isolation(host: Host, tmp_path: Path) -> None:
    """No variable or directory of a user makes the exporter's Python load anything."""
    (tmp_path / "trap").mkdir()
    marker = tmp_path / "loaded"
    for name in ("sitecustomize", "usercustomize", "json"):
        trap = tmp_path / "trap" / f"{name}.py"
        trap.write_text(f"open({str(marker)!r}, 'w').close()\n", encoding="utf-8")
    trapped = {**os.environ, "PYTHONPATH": str(trap.parent)}
    subprocess.run([sys.executable, "-c", ""], env=trapped, capture_output=True)
    assert marker.exists()
    marker.unlink()
    host.install_fake(READY)
    assert host.run("start", PYTHONPATH=str(trap.parent)) == OK
    assert not marker.exists()


def test_no_core(host: Host) -> None:
    """The exporter and its children leave no core file, whatever the host's limit is."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    try:
        host.install_fake(READY)
        contract = host.start()
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)
    (pid,) = members(contract)
    assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)


def test_refresh(host: Host, fake_dtrace: FakeDTrace, port: int) -> None:
    """A refresh makes the exporter, and no other process, read its file again."""
    command = fake_dtrace()
    path = configure(host, command, 22, at=port)
    contract = host.start()
    until(lambda: get(port, "/-/ready") == "ready\n")
    before = members(contract)
    write(path, command, 22, 80)
    assert host.run("refresh") == OK
    until(lambda: 'dtrace_session_up{session="port-80"} 1.0' in get(port, "/metrics"))
    assert members(contract)[:3] == before
    path.write_text("nonsense: 1\n", encoding="utf-8")
    assert host.run("refresh") == OK
    until(lambda: "_last_reload_successful 0.0" in get(port, "/metrics"))
    assert len(members(contract)) == 4
    assert 'why="' in host.log
    assert "expected the key" in host.log


def test_refresh_of_what_has_just_ended(host: Host) -> None:
    """A refresh between a crash and the restart does nothing, and does not fail."""
    host.install_fake(READY)
    contract = host.start()
    os.kill(members(contract)[0], signal.SIGKILL)
    until(lambda: not members(contract))
    assert host.run("refresh") == OK


def test_refresh_without_a_contract(host: Host) -> None:
    """A refresh fails if it cannot find the contract."""
    assert host.run("refresh") == OTHER
    host.properties["restarter/contract"] = "count", [""]
    assert host.run("refresh") == OTHER


def test_crash(host: Host, fake_dtrace: FakeDTrace, port: int) -> None:
    """If the exporter is killed, its dtrace(1) processes end too, so SMF can start it again."""
    configure(host, fake_dtrace(), 22, at=port)
    contract = host.start()
    until(lambda: get(port, "/-/ready") == "ready\n")
    exporter, *_ = members(contract)
    os.kill(exporter, signal.SIGKILL)
    until(lambda: not members(contract))
    host.start()
    until(lambda: get(port, "/-/ready") == "ready\n")


def test_bad_configuration(host: Host, fake_dtrace: FakeDTrace, port: int) -> None:
    """A wrong file puts the service into maintenance, and the log says where the mistake is."""
    path = configure(host, fake_dtrace(), 22, at=port)
    path.write_text("dtrace:\n  intervall: 1s\n", encoding="utf-8")
    assert host.run("start") == CONFIG
    said, then = host.log.splitlines()
    assert said.startswith(f"dtrace-exporter: {path}:2: dtrace: expected the key interval ")
    assert then.endswith(f"wrong configuration: correct it, then svcadm clear {FMRI}")
    assert members(host.contracts[-1]) == []


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("config_file", "/nonexistent/c.yml", "/nonexistent/c.yml"),
        ("web_config_file", "/nonexistent/w.yml", "/nonexistent/w.yml"),
        ("listen_address", "nonsense", "'nonsense'"),
        ("log_level", "nonsense", "'nonsense'"),
        ("log_format", "nonsense", "'nonsense'"),
    ],
)
def test_bad_property(name: str, value: str, says: str, host: Host) -> None:
    """A wrong property is a wrong configuration."""
    host.install_real()
    host.properties[f"config/{name}"] = "astring", [value]
    assert host.run("start") == CONFIG
    assert says in host.log
    assert f"svcadm clear {FMRI}" in host.log


@pytest.mark.skipif(
    os.geteuid() == 0 and not shutil.which("setpriv"), reason="root can read everything here"
)
def test_no_permission(host: Host, fake_dtrace: FakeDTrace, port: int) -> None:
    """A file that the service's user may not read puts the service into maintenance at once."""
    path = configure(host, fake_dtrace(), 22, at=port)
    path.chmod(0)
    if os.geteuid() == 0:
        setpriv = "setpriv --bounding-set=-dac_override,-dac_read_search"
        wrapper = host.prefix / "lib/shell"
        wrapper.write_text(f'#!/bin/sh\nexec {setpriv} {host.shell} "$@"\n', encoding="utf-8")
        wrapper.chmod(0o755)
        host.shell = str(wrapper)
    assert host.run("start") == PERM
    assert f"{path}: expected a readable file (Permission denied)" in host.log
    assert f"no permission: grant it, then svcadm clear {FMRI}" in host.log


def test_address_in_use(host: Host, fake_dtrace: FakeDTrace, port: int) -> None:
    """If the address is in use, the start fails in a way that SMF tries again."""
    configure(host, fake_dtrace(), 22, at=port)
    with socket.create_server(("127.0.0.1", port)):
        assert host.run("start") == OTHER
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in host.log
    host.start()


@pytest.mark.parametrize(
    ("steps", "status"),
    [
        ([("exit", 0)], OTHER),
        ([("exit", cli.FAILURE)], OTHER),
        ([("exit", 2)], CONFIG),
        ([("exit", cli.ADDRESS_IN_USE)], OTHER),
        ([("exit", cli.NO_PERMISSION)], PERM),
        ([("exit", cli.BAD_CONFIGURATION)], CONFIG),
        ([("signal", signal.SIGKILL.value)], OTHER),
        ([("signal", signal.SIGSEGV.value)], OTHER),
        ([("say", "nonsense"), ("exit", 3)], OTHER),
    ],
)
def test_statuses(steps: list[tuple[str, str | int]], status: int, host: Host) -> None:
    """The exporter's exit status decides the method's."""
    host.install_fake(*steps)
    assert host.run("start") == status
    assert "dtrace-exporter: " in host.log.splitlines(keepends=True)[-1]


def test_no_exporter(host: Host) -> None:
    """If the exporter does not exist or cannot run, the failure is permanent."""
    assert host.run("start") == FATAL
    assert f"there is no {host.prefix}/bin/dtrace-exporter" in host.log
    host.install_fake()
    host.python.write_text("#!/nonexistent/python\n", encoding="utf-8")
    assert host.run("start") == FATAL
    assert f"{host.python} cannot be run" in host.log
    host.python.unlink()
    assert host.run("start") == FATAL
    assert f"there is no {host.python}" in host.log


HARMLESS = [
    "/a path/with  two spaces/c.yml",
    " /leading and trailing ",
    "\t/tabs\tin\tit",
    "/$(touch pwned)/${HOME}/$HOME",
    "/`touch pwned`",
    "/;touch pwned&&x|y>z<(q)^",
    "/quotes'\"''\"\"",
    r"/back\slash\\and\n",
    "/*?[a-z]~{a,b}!#",
    "-n",
    "_",
    "END",
    "/ümlaut/\N{SNOWMAN}",
]


def test_values_are_taken_literally(host: Host) -> None:
    """Each value, whatever it contains, is exactly one argument."""
    host.install_fake(READY)
    for number, value in enumerate(HARMLESS):
        addresses = [value, "127.0.0.1:9748", HARMLESS[number - 1], "[::1]:9748"]
        host.properties = {
            "config/config_file": ("astring", [value]),
            "config/listen_address": ("astring", addresses),
        }
        host.start()
        assert host.arguments() == [
            f"--config.file={value}",
            *(f"--web.listen-address={address}" for address in addresses),
        ]
    assert list(host.prefix.parent.rglob("pwned")) == []
    assert not Path("/pwned").exists()


def test_all_that_svcprop_escapes() -> None:
    """The fake svcprop(1) prints values as the real one is documented to."""
    assert quoted("") == '""'
    assert quoted("[::1]:9748") == "[::1]:9748"
    assert quoted("a b\\$(c)") == r"a\ b\\$\(c\)"


def test_unset_properties(host: Host) -> None:
    """For a property that is missing or empty, the exporter uses its default."""
    host.install_fake(READY)
    host.properties = {
        "config/config_file": ("astring", [""]),
        "config/listen_address": ("astring", []),
        "config/log_level": ("astring", ["debug"]),
        "config/of_another_version": ("astring", ["x"]),
    }
    host.start()
    assert host.arguments() == ["--log.level=debug"]


def test_defaults_of_the_manifest(host: Host, manifest: Element) -> None:
    """The properties of the imported manifest give these arguments."""
    host.install_fake(READY)
    host.properties = {
        f"config/{name}": ("astring", values) for name, values in settings(manifest).items()
    }
    host.start()
    assert host.arguments() == [
        "--config.file=/opt/dtrace-exporter/etc/dtrace_exporter.yml",
        "--web.listen-address=:9748",
        "--log.level=info",
        "--log.format=logfmt",
    ]


def test_no_properties(host: Host) -> None:
    """If the property group cannot be read, nothing starts."""
    host.install_fake(READY)
    host.properties = {}
    assert host.run("start") == CONFIG
    assert "Couldn't find property group" in host.log
    assert not host.saved.exists()


def test_outside_smf(host: Host) -> None:
    """If it is run by hand, the method does nothing and says what to do."""
    host.install_fake(READY)
    assert host.run("start", SMF_FMRI="") == NO_SMF
    assert "svcadm" in host.log
    assert not host.saved.exists()


def test_unknown_method(host: Host) -> None:
    """An unknown method is refused."""
    for name in ("", "stop", "nonsense"):
        assert host.run(name) == FATAL
    assert host.log.count("usage: ") == 3


@pytest.mark.parametrize("option", ["-n", "-u"])
def test_every_shell_can_read_it(option: str, host: Host) -> None:
    """The method has no syntax error in any of the shells, and uses no unset variable."""
    if option == "-n":
        done = subprocess.run([host.shell, "-n", METHOD], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return
    host.install_fake(READY)
    method = host.prefix / "lib/svc/method/dtrace-exporter"
    text = method.read_text(encoding="utf-8")
    head, _, body = text.partition("\n. ")
    method.write_text(f"{head}\nset -u\n. {body}", encoding="utf-8")
    host.start()
    assert host.run("refresh") == OK
    assert "not set" not in host.log
