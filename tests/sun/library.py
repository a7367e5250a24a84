"""The models of TCP listeners as libraries of this process; see ../kernel/model.

They have the kernel module's C sources, and native/ has what these need of Linux. A script drives
a library as it drives the module. Functions that the module offers to DTrace call a hook here, at
their entries and returns, and so do the mib probes.

Threads are simulated: each is a Python thread, but only one runs at a time. Another can run only
when one meets a hook, waits for a lock or a squeue, or is between two events.
"""

from __future__ import annotations

import _ctypes
import ctypes
import errno
import functools
import hashlib
import json
import os
import platform
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

NATIVE = Path(__file__).with_name("native")
MODEL = NATIVE.parents[1] / "kernel/model"


class Build(NamedTuple):
    """How the library of a generation is built."""

    family: str
    """The family whose programs fit it."""
    directory: str
    """The directory of its sources; shared ones are beside it."""
    unit: tuple[str, ...]
    """The sources that are compiled as one unit, so that all types are in one place."""
    module: str
    """DTrace's name for the part of the kernel that contains the functions."""
    flags: tuple[str, ...] = ()


_SOLARIS = (
    *("kernel.h", "tcp.c", "queues.c", "services.c", "packet.c", "words.c", "script.c"),
    *("model.c", "solaris.c", "lines.c"),
)
_FREEBSD = (
    *("kernel.h", "socket.c", "syncache.c", "words.c", "script.c"),
    *("model.c", "freebsd.c", "lines.c"),
)
BUILDS = {
    "illumos": Build("illumos", "illumos", _SOLARIS, "ip"),
    "solaris10": Build("solaris10", "solaris10", _SOLARIS, "ip"),
    "freebsd13": Build("freebsd", "freebsd", _FREEBSD, "kernel", ("-DFREEBSD=13",)),
    "freebsd14": Build("freebsd", "freebsd", _FREEBSD, "kernel", ("-DFREEBSD=14",)),
}
GENERATIONS = tuple(BUILDS)
SOLARIS = tuple(name for name, build in BUILDS.items() if build.unit is _SOLARIS)
FREEBSD = tuple(name for name, build in BUILDS.items() if build.unit is _FREEBSD)
CFLAGS = ("-std=gnu11", "-D_GNU_SOURCE", "-O2", "-fPIC", "-fcf-protection=none")
# As in ../kernel/model/Kbuild, with calls of __fentry__ and with types.
MODEL_CFLAGS = (
    *("-fno-ipa-sra", "-fno-ipa-cp", "-fno-ipa-icf", "-fno-partial-inlining"),
    *("-fno-optimize-sibling-calls", "-fno-inline-functions-called-once"),
    *("-pg", "-mfentry", "-gbtf", "-fno-eliminate-unused-debug-types"),
)
LEAST_GCC = 12
"""The first version that writes BTF."""
SWITCH_ODDS = 0.5
WAITS_MOST = 100_000

Callback = Callable[[int, "list[int]"], object]
_HOOK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64))
_YIELD = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_NO_YIELD = _YIELD()


class Nested(NamedTuple):
    """A line with other lines inside."""

    line: str
    at: int
    """The number of the hook, counted from the beginning of the line; 1 is the first."""
    inner: tuple[str, ...]


Line = str | Nested


class UnavailableError(Exception):
    """The library cannot be built here; the text is the reason."""


class Symbol(NamedTuple):
    """A global variable of the model."""

    address: int
    size: int
    type: int | None
    """The number of its type in the BTF, if it has one."""


def why_not() -> str:
    """Return why the library cannot be built here; an empty string if it can."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return f"the hooks are for Linux on x86-64, not {sys.platform} on {platform.machine()}"
    if not shutil.which("gcc"):
        return "there is no gcc"
    version = subprocess.run(["gcc", "-dumpversion"], capture_output=True, text=True).stdout
    if int(version.split(".")[0] or 0) < LEAST_GCC:
        return f"gcc {version.strip()} is older than {LEAST_GCC}, the first that writes BTF"
    return ""


@functools.cache
def built(generation: str) -> Path:
    """Build the library of a generation, unless the same sources were built before.

    Args:
        generation: one of GENERATIONS.

    Returns:
        The shared object, in a directory that other processes share.

    Raises:
        UnavailableError: there is no suitable compiler.
        RuntimeError: the compiler fails; the text has its messages.
    """
    if reason := why_not():
        raise UnavailableError(reason)
    build = BUILDS[generation]
    texts = {
        path.name: path.read_text()
        for directory in (MODEL, MODEL / build.directory, NATIVE)
        for path in sorted(directory.glob("*.[chS]"))
    }
    recipe = json.dumps([texts, build, CFLAGS, MODEL_CFLAGS, os.getuid()])
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    directory = Path(tempfile.gettempdir()) / f"listeners-model-{digest}"
    target = directory / f"{generation}.so"
    if target.exists() and target.stat().st_uid == os.getuid():
        return target
    directory.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        for name, text in texts.items():
            # kernel.h replaces Linux' own headers.
            (Path(scratch) / name).write_text(re.sub(r"(?m)^#include <linux/.*$", "", text))
        (Path(scratch) / "unit.c").write_text(
            "".join(f'#include "{name}"\n' for name in build.unit)
        )
        gcc = ["gcc", *CFLAGS]
        for command in (
            [*gcc, *MODEL_CFLAGS, *build.flags, "-c", "unit.c"],
            [*gcc, "-c", "runtime.c", "fentry.S"],
            ["gcc", "-shared", "-Wl,-Bsymbolic", "-o", "ip.so", "unit.o", "runtime.o", "fentry.o"],
        ):
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
        # Another process may have built it meanwhile.
        (Path(scratch) / "ip.so").replace(target)
    return target


class Library:
    """A separate model without listeners.

    Args:
        generation: one of GENERATIONS.

    Attributes:
        types: the types of the whole model, as BTF.
        symbols: its global variables.
        family: the name of the family whose programs fit it.
        probes: the probes for ``hook``, such as ``fbt:ip:tcp_accept:entry`` or
            ``mib:::tcpListenDrop``.
        thread: the number of the running simulated thread, from 1.
        cpu: the number of its CPU, from 0.
    """

    def __init__(self, generation: str) -> None:
        self.generation = generation
        self.family, _, _, module, _ = BUILDS[generation]
        source = built(generation)
        # A separate file, because the same file is loaded only once.
        handle, name = tempfile.mkstemp(suffix=".so")
        os.close(handle)
        try:
            shutil.copyfile(source, name)
            self._c = ctypes.CDLL(name)
        finally:
            Path(name).unlink()
        self._c.model_hook.argtypes = [ctypes.c_void_p]
        self._c.model_thread.argtypes = [ctypes.c_uint32, _YIELD]
        self._c.model_probe.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
        self._c.model_read.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t]
        self._c.model_totals.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._c.model_totals.restype = ctypes.c_long
        if generation in SOLARIS:
            self._c.model_kthread.argtypes = [ctypes.c_uint64]
            self._c.model_kthread.restype = ctypes.c_uint64
        self._time = ctypes.c_uint64.in_dll(self._c, "model_time")
        elf = _elf(source)
        self.types = elf.types
        self.symbols = {
            name: Symbol(self._address(name), size, elf.variables.get(name))
            for name, size in elf.objects.items()
        }
        self.probes = tuple(
            probe
            for name in elf.traced
            for probe in (
                [f"mib:::{name[4:]}"]
                if name.startswith("mib_")
                else [f"fbt:{module}:{name}:entry", f"fbt:{module}:{name}:return"]
            )
        )
        self.thread = 1
        self.cpu = 0
        self._callback: Callback | None = None
        self._error: BaseException | None = None
        self._nests: dict[int, list[_Nest]] = {}
        self._hook = _HOOK(self._hooked)
        self._threads: _Threads | None = None
        self._depth = 0
        self._threads_made = 1
        if self._c.start_model():
            raise MemoryError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free all memory of the model; its addresses cannot be read any more."""
        if self._c._handle:
            self.hook({}, None)
            self._c.stop_model()
            self._c.free_memory()
            _ctypes.dlclose(self._c._handle)
            self._c._handle = 0

    @property
    def now(self) -> int:
        """The time in nanoseconds, as the model sees it; it changes only when it is set."""
        return self._time.value

    @now.setter
    def now(self, nanoseconds: int) -> None:
        self._time.value = nanoseconds

    def run(self, *lines: str) -> None:
        """Let events happen, in order; in a hook they happen inside the event that met it.

        Args:
            lines: commands of ../kernel/model/script.c, such as ``syn web count 3``.

        Raises:
            OSError: EINVAL: a line is impossible; those before it have happened.
        """
        for line in "\n".join(lines).split("\n"):
            self._depth += 1
            error = self._c.model_run(line.encode())
            self._depth -= 1
            if self._error is not None:
                # The outermost line raises it.
                raise self._raised() if not self._depth and not self._threads else self._error
            if error:
                raise OSError(-error, f"{os.strerror(-error)}: {line}")

    def refuses(self, line: str) -> bool:
        """Run a line, and tell whether it is impossible."""
        try:
            self.run(line)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return True
        return False

    def play(self, line: Line) -> bool:
        """Run a line if it is possible; tell whether it ran, whatever happened to inner lines."""
        if isinstance(line, str):
            return not self.refuses(line)
        nests = self._nests.setdefault(self.thread, [])
        nests.append(_Nest(line.at, line.inner))
        try:
            return not self.refuses(line.line)
        finally:
            nests.pop()

    def all_totals(self) -> list[dict[str, Any]]:
        """Return the totals of every listener so far, oldest first."""
        size = self._c.model_totals(None, 0) + 1
        text = ctypes.create_string_buffer(size)
        self._c.model_totals(text, size)
        return [json.loads(line) for line in text.value.decode().splitlines()]

    def totals(self, name: str) -> dict[str, Any]:
        """Return the totals of the last listener with a name; see ../kernel/model/model.h."""
        return [totals for totals in self.all_totals() if totals["name"] == name][-1]

    def eagers(self) -> int:
        """Return how many connections are in memory that have not been accepted."""
        return int(self._c.model_eagers())

    def kthread(self, number: int) -> int:
        """Return the address of a thread's kthread_t, by any number of its own; 0 if it has none.

        A model with processes has some; each now belongs to the running process.
        """
        return int(self._c.model_kthread(number)) if self.generation in SOLARIS else 0

    def process(self) -> tuple[int, bytes]:
        """Return the number of the running process, and the name of its program."""
        if self.generation not in SOLARIS:
            return 0, b"sched"
        comm = ctypes.create_string_buffer(17)
        return self._c.model_process(comm), comm.value

    def read(self, address: int, size: int) -> bytes:
        """Return memory of this process.

        Raises:
            OSError: EFAULT: part of it does not exist.
        """
        found = ctypes.create_string_buffer(size)
        if self._c.model_read(address & 0xFFFF_FFFF_FFFF_FFFF, found, size):
            raise OSError(errno.EFAULT, f"nothing at {address:#x}")
        return found.raw

    def hook(self, probes: Mapping[str, int] | Iterable[str], callback: Callback | None) -> None:
        """Report these probes, and no others.

        Args:
            probes: some of ``probes``, with the numbers to report them by; without numbers, they
                are numbered in their order, from 0.
            callback: called with the number and arg0 to arg5, in the thread that met the probe.
                At a return arg1 is the value, and arg0 is 0. ``run`` or ``concurrently`` raises its
                exception after the event; until then it is not called again.
        """
        numbers = dict(probes) if isinstance(probes, Mapping) else _numbered(probes)
        wanted: dict[str, list[int]] = {}
        for probe, number in numbers.items():
            if probe not in self.probes:
                raise ValueError(f"no such probe: {probe}")
            provider, _, function, name = probe.split(":")
            if provider == "mib":
                function, name = f"mib_{name}", "entry"
            wanted.setdefault(function, [-1, -1])[name == "return"] = number
        self._c.model_hook(self._hook if numbers else None)
        self._callback = callback
        for function, pair in wanted.items():
            self._c.model_probe(self._address(function), *pair)

    def concurrently(
        self,
        *scripts: Sequence[Line],
        seed: int = 0,
        cpus: Sequence[int] | None = None,
        migrate: bool = False,
    ) -> list[list[Line]]:
        """Let several threads run their scripts concurrently, in an order that the seed decides.

        Args:
            scripts: lines for each of the threads.
            seed: the same seed gives the same order.
            cpus: the CPU of each thread; by default each has its own.
            migrate: whether threads move between these CPUs.

        Returns:
            For each thread the lines that were impossible when they came, and did nothing.
        """
        places = list(range(len(scripts)) if cpus is None else cpus)
        first = self._threads_made + 1
        self._threads_made += len(scripts)
        numbers = range(first, first + len(scripts))
        before = self.thread, self.cpu
        self._threads = _Threads(self, scripts, numbers, places, migrate, random.Random(seed))
        try:
            refused = self._threads.run()
        finally:
            self._threads = None
            self.thread, self.cpu = before
        if self._error is not None:
            raise self._raised()
        return refused

    def pause(self) -> None:
        """In a callback: perhaps let another thread run, as the seed decides.

        A thread in a probe keeps its CPU, because interrupts are off there.
        """
        if self._threads:
            self._threads.pause()

    def run_on_both(self, *lines: str) -> None:
        """Let the same events happen in two concurrent threads, each on its own CPU."""
        for refused in self.concurrently(lines, lines):
            if refused:
                raise OSError(errno.EINVAL, f"{os.strerror(errno.EINVAL)}: {refused[0]}")

    def _raised(self) -> BaseException:
        raised, self._error = self._error, None
        assert raised is not None
        return raised

    def _address(self, name: str) -> int:
        return ctypes.addressof(ctypes.c_char.in_dll(self._c, name))

    def _hooked(self, number: int, arguments: Any) -> None:
        if self._error is not None:
            return
        try:
            if self._callback is not None:
                with self._threads.in_probe() if self._threads else nullcontext():
                    self._callback(number, arguments[:6])
            for nest in self._nests.get(self.thread, [])[:]:
                nest.left -= 1
                if not nest.left:
                    for line in nest.lines:
                        self.refuses(line)
        except BaseException as error:
            self._error = self._error or error
        if self._threads:
            self._threads.pause()


@dataclass
class _Nest:
    left: int
    lines: Sequence[str]


@dataclass
class _Thread:
    number: int
    cpu: int
    lines: Sequence[Line]
    turn: threading.Semaphore
    refused: list[Line]
    in_probe: bool = False


class _Threads:
    """Threads of which only one runs at a time.

    Args:
        library: the library whose events they run.
        scripts: a script for each thread.
        numbers: the numbers of the threads.
        cpus: the CPUs of the threads.
        migrate: whether a thread may continue on another of these CPUs.
        chance: decides which thread runs.
    """

    def __init__(
        self,
        library: Library,
        scripts: Sequence[Sequence[Line]],
        numbers: Iterable[int],
        cpus: Sequence[int],
        migrate: bool,
        chance: random.Random,
    ) -> None:
        self._library = library
        self._cpus = sorted(set(cpus)) if migrate else []
        self._chance = chance
        self._alive = [
            _Thread(number, cpu, lines, threading.Semaphore(0), [])
            for number, cpu, lines in zip(numbers, cpus, scripts, strict=True)
        ]
        self._current: _Thread | None = None
        self._waits = 0
        self._ended = threading.Semaphore(0)

    def run(self) -> list[list[Line]]:
        """Run all threads to their ends."""
        threads = list(self._alive)
        if not threads:
            return []
        workers = [threading.Thread(target=self._work, args=[thread]) for thread in threads]
        for worker in workers:
            worker.start()
        self._pass_on(self._chance.choice(self._alive))
        for worker in workers:
            worker.join()
        return [thread.refused for thread in threads]

    def pause(self) -> None:
        """Let another thread run, or the same."""
        self._waits = 0
        if self._chance.random() < SWITCH_ODDS:
            self._switch(self._ready())

    @contextmanager
    def in_probe(self) -> Iterator[None]:
        """Let the running thread keep its CPU during the block."""
        here = self._current
        assert here is not None
        before, here.in_probe = here.in_probe, True
        try:
            yield
        finally:
            here.in_probe = before

    def _work(self, thread: _Thread) -> None:
        library = self._library
        on_yield = _YIELD(self._yielded)
        thread.turn.acquire()
        library._c.model_thread(thread.number, on_yield)
        for line in thread.lines:
            try:
                if library._error is None and not library.play(line):
                    thread.refused.append(line)
            except BaseException as error:
                library._error = library._error or error
            self.pause()
        library._c.model_thread(thread.number, _NO_YIELD)
        self._alive.remove(thread)
        if self._alive:
            self._pass_on(self._chance.choice(self._ready()))

    def _yielded(self, reason: bytes | None) -> None:
        if reason is None:
            self.pause()
            return
        others = [thread for thread in self._ready() if thread is not self._current]
        self._waits += 1
        if not others or self._waits > WAITS_MOST:
            # The waiting C code cannot be left.
            os.write(2, b"every thread waits, one for " + reason + b"\n")
            os.abort()
        self._switch(others)

    def _switch(self, among: Sequence[_Thread]) -> None:
        here, there = self._current, self._chance.choice(among)
        assert here is not None
        self._place(there)
        if there is not here:
            there.turn.release()
            here.turn.acquire()

    def _pass_on(self, thread: _Thread) -> None:
        self._place(thread)
        thread.turn.release()

    def _place(self, thread: _Thread) -> None:
        if self._cpus and not thread.in_probe:
            taken = self._taken()
            thread.cpu = self._chance.choice([cpu for cpu in self._cpus if cpu not in taken])
        self._current = thread
        self._library.thread, self._library.cpu = thread.number, thread.cpu

    def _taken(self) -> set[int]:
        return {thread.cpu for thread in self._alive if thread.in_probe}

    def _ready(self) -> list[_Thread]:
        """Return the threads that have a CPU to run on."""
        taken = self._taken()
        is_any_free = any(cpu not in taken for cpu in self._cpus)
        return [
            thread
            for thread in self._alive
            if thread.in_probe or is_any_free or thread.cpu not in taken
        ]


class _Elf(NamedTuple):
    """Data from the shared object itself."""

    types: bytes
    variables: dict[str, int]
    """Type numbers by name."""
    objects: dict[str, int]
    """Sizes by name."""
    traced: list[str]


@functools.cache
def _elf(path: Path) -> _Elf:
    blob = path.read_bytes()
    (at,) = struct.unpack_from("<Q", blob, 0x28)
    size, count, names = struct.unpack_from("<HHH", blob, 0x3A)
    heads = [struct.unpack_from("<IIQQQQIIQQ", blob, at + size * i) for i in range(count)]
    contents = [blob[head[4] : head[4] + head[5]] for head in heads]
    sections = {_string(contents[names], head[0]): i for i, head in enumerate(heads)}
    types = contents[sections[".BTF"]]
    strings = contents[sections[".dynstr"]]
    objects: dict[str, int] = {}
    traced: list[str] = []
    variables = _variables(types)
    for name, info, _, section, _, length in struct.iter_unpack(
        "<IBBHQQ", contents[sections[".dynsym"]]
    ):
        text = _string(strings, name)
        if info & 0xF == 1 and section and text in variables:
            objects[text] = length
        elif info & 0xF == 2 and section == sections["traced"]:
            traced.append(text)
    return _Elf(types, variables, objects, sorted(traced))


# For each kind, the number of 32-bit words after the three of struct btf_type: once, and for each
# member.
_BTF_VAR = 14
_BTF_KINDS = {
    **dict.fromkeys((2, 7, 8, 9, 10, 11, 12, 16, 18), (0, 0)),
    **dict.fromkeys((1, _BTF_VAR, 17), (1, 0)),
    **dict.fromkeys((6, 13), (0, 2)),
    **dict.fromkeys((4, 5, 15, 19), (0, 3)),
    3: (3, 0),
}


def _variables(types: bytes) -> dict[str, int]:
    """Return the type numbers of the global variables in the BTF."""
    header, type_at, type_size, string_at = struct.unpack_from("<IIII", types, 4)
    strings = types[header + string_at :]
    at, end = header + type_at, header + type_at + type_size
    found = {}
    while at < end:
        name, info, target = struct.unpack_from("<III", types, at)
        kind = info >> 24 & 0x1F
        once, each = _BTF_KINDS[kind]
        if kind == _BTF_VAR:
            found[_string(strings, name)] = target
        at += 12 + 4 * (once + each * (info & 0xFFFF))
    return found


def _string(strings: bytes, at: int) -> str:
    return strings[at : strings.index(b"\0", at)].decode()


def _numbered(probes: Iterable[str]) -> dict[str, int]:
    return {probe: number for number, probe in enumerate(probes)}
