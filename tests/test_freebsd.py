"""freebsd/: the rc.d script, and the port, which agrees with the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dtrace_exporter import __version__
from fake_steps import FakeDTrace
from markdown_page import blocks

ROOT = Path(__file__).resolve().parents[1]
PORT = ROOT / "freebsd"
SCRIPT = PORT / "files" / "dtrace_exporter.in"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (PORT / "Makefile").read_text(encoding="utf-8")
VARIABLES = dict(re.findall(r"^([A-Z_]+)=\t+(.*)$", MAKEFILE.replace("\\\n", " "), re.MULTILINE))
ORDER = (
    *("PORTNAME", "DISTVERSION", "CATEGORIES", "MASTER_SITES", "MAINTAINER", "COMMENT", "LICENSE"),
    *("LICENSE_FILE", "BUILD_DEPENDS", "RUN_DEPENDS", "USES", "USE_PYTHON", "USE_RC_SUBR"),
    *("SUB_LIST", "NO_ARCH"),
)
"""The Porter's Handbook's order of the variables in use."""

RC_SUBR = """\
# As much of FreeBSD's rc.subr as the script needs.
load_rc_config() { . {root}/rc.conf; }
checkyesno() { eval "case \\$$1 in [Yy][Ee][Ss]) return 0 ;; esac"; return 1; }
load_kld() { echo "load_kld $*" >>{root}/did; [ ! -e {root}/jail ]; }
warn() { echo "warning: $*" >&2; }
run_rc_command() {
	checkyesno "$rcvar" || { echo "Set $rcvar to YES" >&2; return 1; }
	case " start stop status $extra_commands " in
	*" $1 "*) ;;
	*) echo "unknown directive '$1'" >&2; return 1 ;;
	esac
	for file in $required_files; do
		[ -r "$file" ] || { echo "$file is not readable" >&2; return 1; }
	done
	case $1 in
	start)
		$start_precmd || return 1
		eval "$command $command_args"
		;;
	check) $check_cmd ;;
	esac
}
"""
DAEMON = """\
#!/bin/sh
echo "daemon $*" >>{root}/did
while [ "$1" != -- ]; do shift; done
shift
ulimit -c >>{root}/did
exec "$@"
"""


class Host:
    """A directory with the parts of FreeBSD that the script uses, and its rc.conf."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "bin").mkdir()
        self.program = root / "bin" / "dtrace-exporter"
        self.program.write_text("from dtrace_exporter.cli import main\nmain()\n", encoding="utf-8")
        self._write("rc.subr", RC_SUBR)
        self._write("bin/daemon", DAEMON).chmod(0o755)
        text = SCRIPT.read_text(encoding="utf-8")
        for there, here in (
            ("/etc/rc.subr", root / "rc.subr"),
            ("/usr/sbin/daemon", root / "bin" / "daemon"),
            ("/var/run", root),
            ("%%PREFIX%%", root),
            ("%%PYTHON_CMD%%", sys.executable),
            # The exporter may be run from a checkout, which -I would exclude.
            (" -I ", " "),
        ):
            assert there in text
            text = text.replace(there, str(here))
        self._write("dtrace_exporter", text)
        self.set(enable="YES", user=self._user())

    def _write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.write_text(text.replace("{root}", str(self.root)), encoding="utf-8")
        return path

    @staticmethod
    def _user() -> str:
        return subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout[:-1]

    def set(self, **variables: str) -> None:
        """Add variables to rc.conf, as sysrc(8) does."""
        with (self.root / "rc.conf").open("a", encoding="utf-8") as file:
            file.writelines(
                f'dtrace_exporter_{name}="{value}"\n' for name, value in variables.items()
            )

    def run(self, command: str) -> tuple[int, str]:
        """Run the script, and return its status and its output."""
        argv = ["sh", str(self.root / "dtrace_exporter"), command]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    @property
    def did(self) -> list[str]:
        """Return what the script has done to the system."""
        file = self.root / "did"
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """Return a host."""
    return Host(tmp_path)


def test_start(host: Host) -> None:
    """The script starts the service under daemon(8), with DTrace's modules and without cores."""
    host.set(args="--version")
    status, said = host.run("start")
    assert status == 0, said
    assert f"dtrace-exporter {__version__} " in said
    pidfile = host.root / "dtrace_exporter.pid"
    load, daemon, cores = host.did
    assert (load, cores) == ("load_kld dtraceall", "0")
    run = f"{sys.executable} {host.program} --version"
    assert daemon == f"daemon -f -p {pidfile} -T dtrace-exporter -- {run}"
    assert pidfile.stat().st_mode & 0o777 == 0o600


def test_jail(host: Host) -> None:
    """If the modules cannot be loaded, the script warns and starts; loading can be switched off."""
    (host.root / "jail").touch()
    host.set(args="--version")
    status, said = host.run("start")
    assert status == 0
    assert "warning: without DTrace's modules" in said
    host.set(load="NO")
    status, said = host.run("start")
    assert status == 0
    assert "warning" not in said
    assert len([line for line in host.did if line.startswith("load_kld")]) == 1


def test_not_enabled(host: Host) -> None:
    """A service that is not enabled is not started, and nothing is done."""
    host.set(enable="NO")
    assert host.run("start")[0] == 1
    assert host.did == []


def test_check(host: Host, fake_dtrace: FakeDTrace) -> None:
    """The script's check runs the exporter's, with the service's file and arguments."""
    path = host.root / "dtrace_exporter.yml"
    host.set(config=str(path))
    status, said = host.run("check")
    assert (status, said) == (1, f"{path} is not readable\n")
    command = ", ".join(f'"{word}"' for word in fake_dtrace())
    path.write_text(f"dtrace: {{command: [{command}], program: freebsd}}", encoding="utf-8")
    host.set(args="--allow-insecure-files")
    status, said = host.run("check")
    assert "ok    dtrace(1)" in said
    assert host.did == []


def test_guide(tmp_path: Path) -> None:
    """The guide's commands install the script without gaps, and name variables that it has."""
    guide = (ROOT / "docs/install-freebsd.md").read_text(encoding="utf-8")
    (block,) = (block for block in blocks(guide, "sh") if "sysrc" in block)
    local = tmp_path / "local"
    (local / "etc" / "rc.d").mkdir(parents=True)
    script = block.replace(">/usr/local/", f">{local}/").replace(" /usr/local/etc", f" {local}/etc")
    script = f"sysrc() {{ printf '%s\\n' \"$@\"; }}\n{script}"
    done = subprocess.run(
        ["sh", "-euc", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    made = local / "etc" / "rc.d" / "dtrace_exporter"
    assert os.access(made, os.X_OK)
    assert (local / "etc" / "dtrace_exporter.yml").exists()
    text = made.read_text(encoding="utf-8")
    assert "%%" not in text
    named = {line.partition("=")[0] for line in done.stdout.splitlines()}
    assert named == {"dtrace_exporter_enable", "dtrace_exporter_config"}
    rows = set(re.findall(r"^\| `(dtrace_exporter_\w+)` \|", guide, re.MULTILINE))
    assert rows == set(re.findall(r'^: "\$\{(\w+):=', text, re.MULTILINE))


def test_what_it_is() -> None:
    """The script has the keywords for rcorder(8), and its head explains every variable."""
    text = SCRIPT.read_text(encoding="utf-8")
    head, _, body = text.partition("\n. /etc/rc.subr\n")
    for keyword in ("PROVIDE: dtrace_exporter", "REQUIRE: LOGIN", "KEYWORD: shutdown"):
        assert f"\n# {keyword}\n" in head
    told = set(re.findall(r"^# (dtrace_exporter_\w+) ", head, re.MULTILINE))
    assert told == set(re.findall(r'^: "\$\{(\w+):=', body, re.MULTILINE))
    known = {"PREFIX"} | {entry.partition("=")[0] for entry in VARIABLES["SUB_LIST"].split()}
    assert set(re.findall(r"%%(\w+)%%", text)) == known
    assert VARIABLES["USE_RC_SUBR"] == SCRIPT.stem


@pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
def test_syntax(shell: str) -> None:
    """Shells can parse the script."""
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell}")
    subprocess.run([shell, "-n", SCRIPT], check=True)


def test_shellcheck() -> None:
    """shellcheck(1) finds no fault in the script."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip("there is no shellcheck: it comes with the extra dev")
    done = subprocess.run([shellcheck, "--shell=sh", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_port() -> None:
    """The port has this version, the package's dependencies, and the usual order of variables."""
    assert tuple(VARIABLES) == ORDER
    assert VARIABLES["PORTNAME"] == PROJECT["name"]
    assert VARIABLES["DISTVERSION"] == __version__
    assert len(VARIABLES["COMMENT"]) <= 70
    assert VARIABLES["COMMENT"][0].isupper()
    assert not VARIABLES["COMMENT"].endswith(".")
    wanted = re.findall(r"\$\{PYTHON_PKGNAMEPREFIX\}([\w.>=-]+):", VARIABLES["RUN_DEPENDS"])
    assert wanted == PROJECT["dependencies"]
    assert VARIABLES["USES"] == f"python:{PROJECT['requires-python'].removeprefix('>=')}+"
    assert MAKEFILE.endswith("\n\n.include <bsd.port.mk>\n")
    assert not re.search(r" +$|^ ", MAKEFILE, re.MULTILINE)
    description = (PORT / "pkg-descr").read_text(encoding="utf-8").splitlines()
    assert 2 < len(description) < 25
    assert max(map(len, description)) < 80
