"""Builds and boots the guests: Debian with a real DTrace under the kernels of its releases.

By hand: ``python tests/kernel/guest.py build`` and ``python tests/kernel/guest.py shell 6.12``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# The recipe. Whatever here changes, changes the name under which the result is cached.
KERNELS = {"6.12": ("trixie", "cloud"), "6.1": ("bookworm", "cloud"), "6.12-rt": ("trixie", "rt")}
"""The Debian suite and flavour of each Linux; the first two are before and after 6.10."""
FIVE_LEVELS = "6.1"
"""The kernel with five levels of page tables, as on newer servers: its addresses have 57 bits."""
REALTIME = "6.12-rt"
"""The kernel with PREEMPT_RT, and the beginning of the names of its cases."""
REALTIME_CASES = "realtime::"
USERLAND = "sid"
PACKAGES = (
    "dtrace",
    "iproute2",
    "kmod",
    "nftables",
    "openssh-client",
    "openssh-server",
    "procps",
    "python3",
    "python3-hypothesis",
    "python3-prometheus-client",
    "python3-pytest",
    "python3-tornado",
    "python3-yaml",
)
LEFT_OUT = (
    "boot",
    "usr/include",
    "usr/lib/python3.*/test",
    "usr/lib/udev",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/zoneinfo",
    "var/cache",
    "var/lib/apt",
)
SYSTEMD = "systemd"
SYSTEMD_FILES = "usr/lib/systemd"
"""The files that a machine with systemd has in addition to the base."""
EXTRAS = {"prometheus": ("prometheus", "promtool")}
"""The packages whose usr/bin some cases need, by the beginning of the case's name."""

BENCH = "bench"
BENCH_PACKAGES = ("apache2-utils", "bpftrace", "bpfcc-tools", "nginx")
"""The tools that ../../bench compares with, in a guest with BENCH among its extras."""

MODEL = "model"
MODEL_KERNEL = "6.12"
"""The kernel that can load the models of other kernels' TCP."""
MODEL_CASES = ("model_", "illumos", "solaris", "freebsd")
"""The beginning of the names of the cases that need it."""
GENERATIONS = {
    "illumos": ("illumos",),
    "solaris10": ("solaris10",),
    "freebsd13": ("freebsd", "FREEBSD=13"),
    "freebsd14": ("freebsd", "FREEBSD=14"),
}
"""The modules of the model: the directory of each, and what make is told of it."""
TOOLCHAIN = (
    *("coreutils", "dash", "dwarves", "findutils", "gcc", "grep", "libc6-dev", "make", "mawk"),
    "sed",
)
"""The packages that build a kernel module, besides the kernel's headers."""

HOST_PACKAGES = {
    "apt-get": "apt",
    "cpio": "cpio",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "gcc": "gcc libc6-dev",
    "mmdebstrap": "mmdebstrap",
    "qemu-system-x86_64": "qemu-system-x86",
    "zstd": "zstd",
}
"""The Debian packages that each command needs."""

deaths: list[str] = []
"""Guests that ended too early, for the summary of a test run."""
left_out: list[str] = []
"""Why kernels were not booted at all, for the same summary."""
late: list[str] = []
"""The cases that were not run because there was no time left, for the same summary."""
notes: list[str] = []
"""Figures that cases report, for the same summary."""

SOAK_SECONDS = 60
"""How long the soak lasts, in seconds, unless the environment sets another time."""

HERE = Path(__file__).resolve().parent
TREE = HERE.parents[1]
APT = {
    # An archive that holds some past day's state is past its Release file's date.
    "Acquire::Check-Valid-Until": "false",
    # The cache may lie where apt's own user cannot go.
    "APT::Sandbox::User": "root",
}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class UnavailableError(Exception):
    """This machine cannot build or run the guests; the text says what is missing."""


@dataclass(frozen=True)
class Guest:
    """The files that boot a kernel in QEMU; ``archives`` are unpacked over each other, in order."""

    kernel: str
    vmlinuz: Path
    archives: tuple[Path, ...]


def build(kernel: str, extras: Iterable[str] = ()) -> Guest:
    """Return the guest of a kernel, building the parts that the cache does not have.

    Args:
        kernel: a key of KERNELS.
        extras: what the guest needs: keys of EXTRAS, or BENCH, MODEL or SYSTEMD.

    Raises:
        UnavailableError: a command, the archive's address or the network is missing.
    """
    require_host()
    base = _cached("base", [USERLAND, *PACKAGES, *LEFT_OUT, SYSTEMD_FILES], _build_base)
    suite, flavour = KERNELS[kernel]
    linux = _cached(f"linux-{kernel}", [suite, flavour], partial(_build_linux, suite, flavour))
    archives = [base / "base.cpio.zst", linux / "modules.cpio.zst"]
    for extra in extras:
        if extra == SYSTEMD:
            archives.append(base / "systemd.cpio.zst")
            continue
        if extra == MODEL:
            archives.append(_model(suite, _release(linux / "vmlinuz")))
            continue
        if extra == BENCH:
            recipe = [USERLAND, *BENCH_PACKAGES, *LEFT_OUT]
            archives.append(_cached(BENCH, recipe, _build_bench) / "bench.cpio.zst")
            continue
        packages = EXTRAS[extra]
        made = _cached(extra, [USERLAND, *packages], partial(_build_extra, packages))
        archives.append(made / "extra.cpio.zst")
    return Guest(kernel, linux / "vmlinuz", tuple(archives))


def extras_of(kernel: str, cases: Iterable[str] | None = None) -> list[str]:
    """Return what a kernel's guest needs in addition to the base.

    Args:
        kernel: a key of KERNELS.
        cases: such as ``backlog::test_q_full``; None for all cases.
    """
    names = [*EXTRAS, *([MODEL] if kernel == MODEL_KERNEL else [])]
    if cases is None:
        return names
    wanted = {MODEL if wants_model(case) else case.partition("::")[0] for case in cases}
    return [name for name in (*names, SYSTEMD) if any(case.startswith(name) for case in wanted)]


def machine(case: str) -> str:
    """Return the machine that a case needs on its kernel: MODEL, SYSTEMD or an empty string."""
    if case.startswith(f"{SYSTEMD}::"):
        return SYSTEMD
    return MODEL if wants_model(case) else ""


def wants_model(case: str) -> bool:
    """Return whether a case needs the model."""
    return case.startswith(MODEL_CASES)


def require_host() -> None:
    """Find the commands that building and booting need; install them if that is possible.

    Raises:
        UnavailableError: it is not possible.
    """
    missing = _missing()
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        packages = sorted({word for command in missing for word in HOST_PACKAGES[command].split()})
        print(f"installing {' '.join(packages)}", file=sys.stderr)  # noqa: T201
        # Another installation may be under way, on a new machine above all.
        wait = ["-o", "DPkg::Lock::Timeout=600"]
        apt = ["apt-get", *wait, "-q", "-y", "--no-install-recommends", "install", *packages]
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        if subprocess.run(apt, env=quiet, stdout=subprocess.DEVNULL).returncode:
            subprocess.run(["apt-get", "-q", "update"], stdout=subprocess.DEVNULL)
            subprocess.run(apt, env=quiet, stdout=subprocess.DEVNULL)
        missing = _missing()
    if missing:
        raise UnavailableError(
            "the guests need "
            + ", ".join(f"{command} (package {HOST_PACKAGES[command]})" for command in missing)
        )
    if not KEYRING.exists():
        raise UnavailableError(f"the guests need {KEYRING} (package debian-archive-keyring)")


def initrd(guest: Guest, selection: Iterable[str], path: Path) -> None:
    """Write a boot's initramfs: the guest's archives, the working tree and the cases to run.

    Args:
        guest: the guest to boot.
        selection: pytest arguments for the guest, from the directory of the cases.
        path: the file to write.
    """
    with _scratch(path.parent) as root:
        shutil.copy(HERE / "init.sh", root / "init")
        (root / "init").chmod(0o755)
        inside = root / "opt/dtrace-exporter"
        parts = (
            "src",
            "config",
            "docs",
            "systemd",
            "pyproject.toml",
            "tests/kernel",
            "bench/guest",
        )
        for part in parts:
            source, target = TREE / part, inside / part
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(
                    source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
                )
            elif source.exists():
                shutil.copy(source, target)
        (inside / "selection").write_text("".join(f"{line}\n" for line in selection))
        (inside / "soak").write_text(str(soak_seconds()))
        synload = HERE / "traffic/synload.c"
        subprocess.run(["gcc", "-O2", "-static", "-o", inside / "synload", synload], check=True)
        _archive(root, path.with_suffix(".tree"))
    with path.open("wb") as whole:
        for archive in (*guest.archives, path.with_suffix(".tree")):
            with archive.open("rb") as part_file:
                shutil.copyfileobj(part_file, whole)


def soak_seconds() -> int:
    """Return how long the soak lasts, in seconds; ``make soak`` sets it."""
    return int(os.environ.get("SOAK_SECONDS", SOAK_SECONDS))


def qemu(guest: Guest, initrd_file: Path, mode: str) -> list[str]:
    """Return the command that boots a guest; the caller adds the serial ports.

    Args:
        guest: the guest to boot.
        initrd_file: the file that ``initrd`` wrote.
        mode: ``cases``, ``bench`` or ``shell``; init.sh reads it.
    """
    levels = ",+la57" if guest.kernel == FIVE_LEVELS else ""
    return [
        "qemu-system-x86_64",
        *("-M", "q35", "-smp", "2", "-m", "4096"),
        # Hardware virtualisation is rare in CI. Without -cx16, QEMU 7.2 sometimes emulates
        # cmpxchg16b wrongly, and the kernel dies in its allocator. With a thread for each CPU, one
        # may still run code that the other has patched, and the kernel dies of int3.
        *("-accel", "tcg,thread=single", "-cpu", f"Nehalem,-cx16{levels}"),
        *("-no-reboot", "-nic", "none", "-display", "none"),
        *("-kernel", str(guest.vmlinuz), "-initrd", str(initrd_file)),
        *("-append", f"console=ttyS0 quiet panic=-1 mitigations=off mode={mode}"),
    ]


def shell(kernel: str) -> int:
    """Boot a guest with its console on this terminal; Ctrl-A X ends it."""
    guest = build(kernel, extras_of(kernel))
    with _scratch(Path(tempfile.gettempdir())) as scratch:
        initrd(guest, [], scratch / "initrd")
        return subprocess.call([*qemu(guest, scratch / "initrd", "shell"), "-serial", "mon:stdio"])


def mirror() -> str:
    """Return the address of the Debian archive that this machine's own apt uses.

    Raises:
        UnavailableError: its sources name none.
    """
    fields = "$(REPO_URI) $(COMPONENT)"
    listed = _run("apt-get", "indextargets", "--format", fields, "Created-By: Packages")
    for line in listed.splitlines():
        address, _, component = line.partition(" ")
        if component == "main" and address.rstrip("/").endswith("/debian"):
            return address
    raise UnavailableError("the apt sources of this machine name no Debian archive")


def _missing() -> list[str]:
    return [command for command in HOST_PACKAGES if shutil.which(command) is None]


def _cached(name: str, recipe: Iterable[str], make: Callable[[Path], None]) -> Path:
    """Return the cache's directory for a recipe; ``make`` fills it if it does not exist yet."""
    default = Path.home() / ".cache/dtrace-exporter/guest"
    cache = Path(os.environ.get("DTRACE_EXPORTER_CACHE", default))
    digest = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:16]
    final = cache / f"{name}-{digest}"
    if final.is_dir():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    print(f"building {final}", file=sys.stderr)  # noqa: T201
    with _scratch(cache) as scratch:
        result = scratch / "result"
        result.mkdir()
        make(result)
        try:
            result.rename(final)
        except OSError:
            # Another run was faster.
            if not final.is_dir():
                raise
    return final


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(
        dir=parent, prefix="guest-", ignore_cleanup_errors=True
    ) as path:
        yield Path(path)


def _build_base(directory: Path) -> None:
    with _scratch(directory.parent) as scratch:
        root = scratch / "root"
        _run(
            *("mmdebstrap", "--quiet", "--variant=minbase"),
            *(f'--aptopt={key} "{value}"' for key, value in APT.items()),
            *("--keyring", KEYRING, f"--include={','.join(PACKAGES)}", USERLAND, root, mirror()),
        )
        for pattern in LEFT_OUT:
            for path in root.glob(pattern):
                shutil.rmtree(path)
        apart = scratch / "systemd" / SYSTEMD_FILES
        apart.parent.mkdir(parents=True)
        (root / SYSTEMD_FILES).rename(apart)
        _archive(root, directory / "base.cpio.zst")
        _archive(scratch / "systemd", directory / "systemd.cpio.zst")


def _build_linux(suite: str, flavour: str, directory: Path) -> None:
    with _scratch(directory.parent) as scratch:
        apt = _private_apt(suite, scratch)
        depends = _run("apt-cache", *apt, "depends", f"linux-image-{flavour}-amd64").split()
        package = next(word for word in depends if word.startswith("linux-image-6"))
        tree = _unpack(package, apt, scratch)
        shutil.copy(next(tree.glob("boot/vmlinuz-*")), directory / "vmlinuz")
        # usr/lib since trixie, lib before.
        have = next(
            path for path in (tree / "usr/lib/modules", tree / "lib/modules") if path.exists()
        )
        root = scratch / "root"
        shutil.copytree(have, root / "usr/lib/modules", symlinks=True)
        (release,) = (root / "usr/lib/modules").iterdir()
        # Guests have no hardware, and drivers are most of some flavours.
        for drivers in release.glob("kernel/drivers/*"):
            if drivers.name not in ("block", "net", "virtio"):
                shutil.rmtree(drivers)
        for drivers in release.glob("kernel/drivers/net/*/"):
            shutil.rmtree(drivers)
        _run("depmod", "-b", root / "usr", release.name)
        _archive(root, directory / "modules.cpio.zst")


def _build_extra(packages: Iterable[str], directory: Path) -> None:
    with _scratch(directory.parent) as scratch:
        apt = _private_apt(USERLAND, scratch)
        root = scratch / "root"
        for package in packages:
            tree = _unpack(package, apt, scratch)
            shutil.copytree(tree / "usr/bin", root / "usr/bin", dirs_exist_ok=True)
        _archive(root, directory / "extra.cpio.zst")


def _build_bench(directory: Path) -> None:
    with _scratch(directory.parent) as scratch:
        root = scratch / "root"
        _run(
            *("mmdebstrap", "--quiet", "--variant=extract"),
            *(f'--aptopt={key} "{value}"' for key, value in APT.items()),
            *("--keyring", KEYRING, f"--include={','.join(BENCH_PACKAGES)}", USERLAND, root),
            mirror(),
        )
        for pattern in LEFT_OUT:
            for path in root.glob(pattern):
                shutil.rmtree(path)
        # Only the new files: nothing is configured here, and the base is.
        for path in root.iterdir():
            if path.name != "usr":
                path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
        _archive(root, directory / "bench.cpio.zst")


def _release(vmlinuz: Path) -> str:
    """Return a kernel's release from the header of its image, such as 6.12.9-cloud-amd64."""
    head = vmlinuz.read_bytes()[:0x10000]
    start = int.from_bytes(head[0x20E:0x210], "little") + 0x200
    return head[start : head.index(b" ", start)].decode()


def _model(suite: str, release: str) -> Path:
    """Return the archive of the model, both generations, for a kernel's release."""
    sources = sorted(
        path
        for pattern in ("Kbuild", "*.[ch]", "*/*.[ch]")
        for path in (HERE / "model").glob(pattern)
    )
    texts = [text for path in sources for text in (path.name, path.read_text())]
    recipe = [release, repr(GENERATIONS), *texts]
    return _cached(MODEL, recipe, partial(_build_model, suite, release)) / "model.cpio.zst"


def _build_model(suite: str, release: str, directory: Path) -> None:
    packages = [f"linux-headers-{release}", *TOOLCHAIN]
    toolchain = _cached("toolchain", [suite, *packages], partial(_build_toolchain, suite, packages))
    with _scratch(toolchain / "src") as work, _scratch(directory.parent) as scratch:
        for generation, (family, *variables) in GENERATIONS.items():
            sources = work / generation
            sources.mkdir()
            # What a family has of its own takes the place of what is common.
            for part in (HERE / "model", HERE / "model" / family):
                for path in part.glob("*"):
                    if path.is_file():
                        shutil.copy(path, sources)
            log = _run(
                *("chroot", toolchain, "make", "-C", f"/usr/src/linux-headers-{release}"),
                *("AWK=mawk", f"M=/{sources.relative_to(toolchain)}", *variables, "modules"),
            )
            if "BTF [M]" not in log:
                raise UnavailableError(f"the model's module got no BTF:\n{log}")
            target = scratch / "root/usr/lib/listeners-model" / generation
            target.mkdir(parents=True)
            (module,) = sources.glob("*.ko")
            shutil.copy(module, target)
        _archive(scratch / "root", directory / "model.cpio.zst")


def _build_toolchain(suite: str, packages: list[str], directory: Path) -> None:
    # Nothing in it is configured, because only a compiler is needed.
    _run(
        *("mmdebstrap", "--quiet", "--variant=extract"),
        *(f'--aptopt={key} "{value}"' for key, value in APT.items()),
        *("--keyring", KEYRING, f"--include={','.join(packages)}", suite, directory, mirror()),
    )
    for name in ("bin", "lib", "lib64", "sbin"):
        if not (directory / name).exists():
            (directory / name).symlink_to(f"usr/{name}")
    for pattern in ("usr/share/doc", "usr/share/locale", "usr/share/man", "var"):
        for path in directory.glob(pattern):
            shutil.rmtree(path)
    (directory / "src").mkdir()


def _private_apt(suite: str, scratch: Path) -> list[str]:
    """Return apt options that use only one suite, and not the machine's own lists."""
    (scratch / "lists/partial").mkdir(parents=True)
    (scratch / "cache/archives/partial").mkdir(parents=True)
    (scratch / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n")
    settings = (
        f"Dir::Etc::SourceList={scratch}/sources.list",
        "Dir::Etc::SourceParts=/dev/null",
        f"Dir::State::Lists={scratch}/lists",
        f"Dir::Cache={scratch}/cache",
        *(f"{key}={value}" for key, value in APT.items()),
    )
    options = [word for setting in settings for word in ("-o", setting)]
    _run("apt-get", *options, "-q", "update")
    return options


def _unpack(package: str, apt: list[str], scratch: Path) -> Path:
    _run("apt-get", *apt, "-q", "download", package, cwd=scratch)
    (deb,) = scratch.glob(f"{package}_*.deb")
    _run("dpkg-deb", "-x", deb, scratch / package)
    return scratch / package


def _archive(root: Path, path: Path) -> None:
    """Pack a tree as an initramfs archive."""
    # The guest's root directory gets the mode of the last archive's, and some programs in the
    # guest are not root.
    root.chmod(0o755)
    subprocess.run(
        ["sh", "-c", 'find . | cpio -o -H newc --quiet -R 0:0 | zstd -q -1 -f -o "$0"', str(path)],
        check=True,
        cwd=root,
    )


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-10:])
        raise UnavailableError(f"{' '.join(words)} failed:\n{tail}")
    return done.stdout


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Build the test guests, or boot one with a shell.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="build every guest that the cache lacks")
    boots = commands.add_parser("shell", help="boot a guest with its console here; Ctrl-A X ends")
    boots.add_argument("kernel", choices=KERNELS)
    arguments = parser.parse_args()
    try:
        if arguments.command == "shell":
            return shell(arguments.kernel)
        for kernel in KERNELS:
            guest = build(kernel, extras_of(kernel))
            for path in (guest.vmlinuz, *guest.archives):
                print(f"{path.stat().st_size >> 20:5} MiB  {path}")  # noqa: T201
    except UnavailableError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
