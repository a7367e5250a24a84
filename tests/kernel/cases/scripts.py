"""Scripts with every kind of construct under the real DTrace, compared with witnesses.

The witness is this process: it makes system calls, counts them, and gives them values that a model
aggregates too. Other processes' calls are not counted. Because dtrace(1) starts slowly here, most
scripts run together, joined into one text.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lab.d_programs import LINEAR, LOGARITHMIC, MODELS, Program, programs
from lab.scripts import Told, counts, run

ME = os.getpid()
MINE = f"/pid == {ME}/"

CALL = f"syscall::getpriority:entry {MINE}"
BURSTS, BURST = 200, 10
CALLS = BURSTS * BURST

PUT = f"syscall::sched_get_priority_max:entry {MINE}"
NUMBER = "(int64_t)(int)arg0"
VALUES = [-123456, -200, -15, -1, 0, 0, 1, 5, 16, 99, 100, 2000, 123456]

FORKS = 5
ODD_NAME = b'a"b\\c\n\t\x1e\xff'
ODD_PATH = b'/no\n\x1et row 0\x1f5\x1e\n"\\0\\101\xc3\xa9\xff%d'
LONG_PATH = b"/" + b"x" * 900
DISK_BYTES = 1 << 20

SCRIPTS: list[str] = []
"""The scripts that run together, in this order."""


def script(text: str) -> None:
    """Add a script to those that run together."""
    SCRIPTS.append(text)


def call(times: int) -> None:
    """Make some system calls that CALL counts."""
    for _ in range(times):
        os.getpriority(os.PRIO_PROCESS, 0)


def put(*values: int) -> None:
    """Make a system call for each value, as its argument, which PUT aggregates."""
    for value in values:
        # No policy has this number.
        with suppress(OSError):
            os.sched_get_priority_max(value)


@contextmanager
def named(name: bytes) -> Iterator[None]:
    """Change this process's name for a while, as execname sees it."""
    comm = Path("/proc/self/comm")
    before = comm.read_bytes().removesuffix(b"\n")
    comm.write_bytes(name)
    try:
        yield
    finally:
        comm.write_bytes(before)


def switches() -> int:
    """Return how often this thread has left a CPU, by the kernel's count."""
    status = Path("/proc/thread-self/status").read_text()
    return sum(map(int, re.findall(r"voluntary_ctxt_switches:\s+(\d+)", status)))


def sectors_read(device: str) -> int:
    """Return how many sectors of a block device were read, by the kernel's count."""
    return int(Path("/sys/block", Path(device).name, "stat").read_text().split()[2])


@contextmanager
def disk(directory: Path) -> Iterator[str]:
    """Return a block device with DISK_BYTES of data."""
    file = directory / "disk"
    file.write_bytes(b"x" * DISK_BYTES)
    subprocess.run(["modprobe", "loop"], check=True)
    command = ["losetup", "-f", "--show", str(file)]
    made = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield made
    finally:
        subprocess.run(["losetup", "-d", made], check=True)


@dataclass
class Witness:
    """The kernel's own counts while the scripts ran."""

    device: str = ""
    sectors: int = 0
    switches: int = 0


@dataclass
class Together:
    """The output of the scripts that ran together, and the counts of the witness."""

    told: Told
    witness: Witness


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Together:
    """Run the scripts that run together, and do what they count."""
    witness = Witness()

    def during() -> None:
        switched, read = switches(), sectors_read(witness.device)
        with named(ODD_NAME):
            for _ in range(BURSTS):
                call(BURST)
                time.sleep(0.01)
        put(*VALUES)
        for _ in range(FORKS):
            subprocess.run(["true"], check=True)
        for path in (ODD_PATH, ODD_PATH, LONG_PATH):
            with suppress(OSError):
                os.rmdir(path)  # noqa: PTH106
        Path(witness.device).read_bytes()
        witness.switches = switches() - switched
        witness.sectors = sectors_read(witness.device) - read

    with disk(tmp_path_factory.mktemp("disk")) as witness.device:
        told = run("\n".join(SCRIPTS), during, ME)
    return Together(told, witness)


def total(values: Mapping[tuple[str, ...], object]) -> int:
    """Return the sum of the numbers of an aggregation."""
    return sum(value for value in values.values() if isinstance(value, int))


def shown(key: bytes) -> str:
    """Return a key as a label has it: control characters but newline and tab are escaped."""
    text = key.decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda one: f"\\x{ord(one[0]):02x}", text)


def test_all_well(together: Together) -> None:
    """The scripts run to their end, and only the expected rows are bad."""
    assert together.told.status == 0, together.told.errors
    bad = {each.why for each in together.told.bad}
    assert bad == {"the average of values whose sum is negative"}


script("syscall::getpriority:entry /pid == $1 && arg0 == 0/ { @calls[execname] = count(); }")


def test_predicate_and_argument(together: Together) -> None:
    """$1 works in a predicate, and execname may contain any bytes."""
    name = shown(ODD_NAME)
    assert together.told.of("calls") == {(name,): CALLS}


script(f"""{PUT}
{{
    @sum = sum({NUMBER}); @min["a", pid] = min({NUMBER}); @max = max({NUMBER});
    @below = max({NUMBER} - 1000000);
}}""")


def test_sum_min_max(together: Together) -> None:
    """Aggregations of one clause are read separately, with and without keys."""
    assert together.told.of("sum") == {(): sum(VALUES)}
    assert together.told.of("min") == {("a", str(ME)): min(VALUES)}
    assert together.told.of("max") == {(): max(VALUES)}
    assert together.told.of("below") == {(): max(VALUES) - 1000000}


script(f"""{PUT} {{ @avg[pid] = avg({NUMBER} + 200000); @cold = avg({NUMBER} - 200000);
    @dev = stddev({NUMBER}); }}""")


def test_average(together: Together) -> None:
    """Averages are exact; those with a negative sum, which lose their sign, are bad rows."""
    model = MODELS["avg"]([value + 200000 for value in VALUES])
    assert together.told.of("avg") == {(str(ME),): model}
    assert together.told.of("dev") == {(): MODELS["stddev"](VALUES)}
    # Only an average of one value has a sign.
    assert together.told.of("cold") in ({}, {(): VALUES[0] - 200000})


script(f"""{PUT}
{{
    @q = quantize({NUMBER});
    @l[pid] = lquantize({NUMBER}, {", ".join(map(str, LINEAR))});
    @ll = llquantize({NUMBER}, {", ".join(map(str, LOGARITHMIC))});
}}""")


def test_histograms(together: Together) -> None:
    """Tables of all three kinds have each value in the model's line, negative values too."""
    for name, function in (("q", "quantize"), ("l", "lquantize"), ("ll", "llquantize")):
        (value,) = together.told.of(name).values()
        assert counts(value) == MODELS[function](VALUES)


script(f"""{PUT} {{ @normal[pid] = sum({NUMBER}); }}
tick-100ms {{ normalize(@normal, 1000); printa(@normal); printf("in the middle of a line"); }}""")


def test_normalize(together: Together) -> None:
    """An aggregation that a script normalizes is read as it was counted, amid its output."""
    assert together.told.of("normal") == {(str(ME),): sum(VALUES)}


script(f"""{CALL} {{ self->in = 1; @[probename] = count(); }}
syscall::getpriority:return /self->in/
{{
    @[probename] = count(); self->in = 0; @_["both"] = count();
}}""")


def test_clauses(together: Together) -> None:
    """Clauses can share an aggregation, the bare one too, and use a thread-local variable."""
    assert together.told.of("") == {("entry",): CALLS, ("return",): CALLS, ("both",): CALLS}


script(f"""{CALL} {{ @kept[pid] = count(); @one = max(1); @two = stddev(5); @two = stddev(7); }}
tick-100ms {{ printa(@kept); clear(@kept); clear(@one); clear(@two); }}""")


def test_clear(together: Together) -> None:
    """clear() ten times a second loses no count, does not end the run, and resets gauges."""
    assert together.told.of("kept") == {(str(ME),): CALLS}
    assert together.told.of("one") == {(): 1}
    assert together.told.of("two") == {(): 1}


script(f"{CALL} {{ @gone[pid] = count(); }}\ntick-500ms {{ trunc(@gone); }}")


def test_trunc(together: Together) -> None:
    """Final rows have what trunc() removes, except counts of that very moment."""
    assert together.told.finals > 0
    assert CALLS * 0.9 <= total(together.told.of("gone")) <= CALLS


script(f"{CALL} {{ @most[probefunc, probename] = count(); }}\ntick-100ms {{ trunc(@most, 1); }}")


def test_trunc_of_some(together: Together) -> None:
    """A trunc() that keeps some keys removes none."""
    assert together.told.of("most") == {("getpriority", "entry"): CALLS}


script(f"{CALL} {{ @kernel[stack(3)] = count(); @user[ustack(2)] = count(); }}")


def test_stacks(together: Together) -> None:
    """A stack is one line, and kernel stacks have several frames."""
    for name in ("kernel", "user"):
        assert total(together.told.of(name)) == CALLS
        assert all("\n" not in key for (key,) in together.told.of(name))
    assert any(";" in key for (key,) in together.told.of("kernel"))


script(f"""{CALL} {{ @k[sym((uint64_t)&`jiffies), mod((uint64_t)&`jiffies)] = count();
    @m[umod(uregs[R_PC])] = count(); }}""")


def test_symbols(together: Together) -> None:
    """Symbols and modules of the kernel and of a process are read by their names."""
    ((key, value),) = together.told.of("k").items()
    assert (key[0].partition("`")[0], key[1], value) == ("vmlinux", "vmlinux", CALLS)
    assert total(together.told.of("m")) == CALLS
    assert all(re.search(r"libc|ld-|python|0x", key) for (key,) in together.told.of("m"))


script(f"""#pragma D option strsize=1k
syscall::rmdir:entry {MINE} {{ @path[copyinstr(arg0)] = count(); }}""")


def test_paths(together: Together) -> None:
    """Strings of a process are read exactly: long, with newlines, quotes, or a mark of rows."""
    odd = shown(ODD_PATH)
    assert together.told.of("path") == {(odd,): 2, (LONG_PATH.decode(),): 1}


script(f"""{CALL} {{ @real = count(); }}
tick-50ms
{{
    printf("\\n\\036t0 row 0\\037999\\036\\n\\036"); printf("\\n\\036%s", "t"); printf("%c", 0);
}}""")


def test_forged_rows(together: Together) -> None:
    """Rows that a script forges are ignored."""
    assert together.told.of("real") == {(): CALLS}


script("profile-97 { @cpu[cpu] = count(); }")


def test_profile(together: Together) -> None:
    """The profile provider shows each CPU at a rate."""
    assert set(together.told.of("cpu")) <= {(str(cpu),) for cpu in range(os.cpu_count() or 1)}
    assert total(together.told.of("cpu")) > 0


script(f"""proc:::create {MINE} {{ @made[pid] = count(); }}
proc:::exit /ppid == {ME}/ {{ @ended = count(); }}""")


def test_proc(together: Together) -> None:
    """The proc provider counts children that start and end, as many as were started."""
    assert together.told.of("made") == {(str(ME),): FORKS}
    assert together.told.of("ended") == {(): FORKS}


script(f"sched:::off-cpu /tid == {threading.get_native_id()}/ {{ @off = count(); }}")


def test_sched(together: Together) -> None:
    """The sched provider counts how often a thread leaves its CPU, as the kernel does."""
    # The thread also waits before and after.
    beside = total(together.told.of("off")) - together.witness.switches
    assert together.witness.switches >= BURSTS
    assert 0 <= beside <= 100


script(f"""fbt::__x64_sys_getpriority:entry {MINE} {{ @fbt[probefunc] = count(); }}
rawtp:::sched_process_fork {MINE} {{ @rawtp = count(); }}""")


def test_fbt_and_rawtp(together: Together) -> None:
    """The fbt and rawtp providers count a kernel function's calls and a trace point's events."""
    assert together.told.of("fbt") == {("__x64_sys_getpriority",): CALLS}
    assert together.told.of("rawtp") == {(): FORKS}


script("io:::start { @io[args[1]->dev_statname] = sum(args[0]->b_bcount); }")


def test_io(together: Together) -> None:
    """The io provider sums the bytes that were read from a block device, as the kernel does."""
    name = Path(together.witness.device).name
    assert together.told.of("io")[(name,)] == 512 * together.witness.sectors
    assert together.witness.sectors >= DISK_BYTES / 512


FLAGS = f"""\
#!/usr/sbin/dtrace -Zs
#pragma D option defaultargs
inline int TOP = 100;
syscall::no_such_call:entry {{ @no = count(); }}
{PUT}
{{
    @sum[$$1 == "" ? "none" : $$1, $3] = sum(2 * {NUMBER}); // don't
    @l = lquantize({NUMBER}, 0, TOP, 10);
}}
tick-100ms {{ trunc(@sum, $2); }}
"""


def test_flags() -> None:
    """A #! line's -Z, defaultargs, an inline constant and a missing probe work together."""
    told = run(FLAGS, lambda: put(*VALUES), ask=True)
    assert told.of("sum") == {("none", "0"): 2 * sum(VALUES)}
    assert counts(told.of("l")[()])[-1] == (100, sum(value >= 100 for value in VALUES))
    assert told.of("no") == {}


CALLER = """\
import os, sys
for line in sys.stdin:
    for _ in range(int(line)):
        os.getppid()
    print(flush=True)
"""


def test_target_and_arguments() -> None:
    """$target is the process that -p names, and an argument may be used only by trunc()."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", CALLER], stdin=pipe, stdout=pipe, text=True
    ) as other:
        given, answer = other.stdin, other.stdout
        assert given is not None
        assert answer is not None

        def during() -> None:
            print(555, file=given, flush=True)
            answer.readline()

        text = """syscall::getppid:entry /pid == $target/ { @[$target, $$1] = count(); }
        tick-100ms { trunc(@, $2); }"""
        told = run(text, during, "a word", 1, options=["-p", str(other.pid)])
        given.close()
    assert told.of("") == {(str(other.pid), "a word"): 555}


def test_exit() -> None:
    """A script that calls exit() still gives its last counts."""
    text = f"int n;\n{CALL} {{ @a = count(); n++; }}\n{CALL[:-1]} && n == 5/ {{ exit(0); }}"
    told = run(text, lambda: call(5), ends_itself=True)
    assert told.of("a") == {(): 5}
    assert told.status == 0


def test_types() -> None:
    """The types of keys that the text does not show are asked for, and printed correctly."""
    text = f"{CALL} {{ this->p = curthread; @[this->p, curthread->comm, (char)-5] = count(); }}"
    told = run(text, lambda: call(3), ask=True)
    ((key, value),) = told.of("").items()
    comm = Path("/proc/self/comm").read_text().strip()
    assert re.fullmatch(r"(0x)?[0-9a-f]{8,16}", key[0])
    assert (*key[1:], value) == (comm, "-5", 3)


def joined(several: list[Program]) -> Program:
    """Return one program that does the work of several, under other names."""
    names = [
        {name: f"p{number}_{name}" for name in each.functions}
        for number, each in enumerate(several)
    ]
    return Program(
        {
            new[name]: function
            for new, each in zip(names, several, strict=True)
            for name, function in each.functions.items()
        },
        tuple(
            (new[name], keys, value)
            for new, each in zip(names, several, strict=True)
            for name, keys, value in each.put
        ),
    )


@settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[*HealthCheck],
)
@given(st.lists(programs(), min_size=6, max_size=6).map(joined))
def check_programs(program: Program) -> None:
    """Run generated programs, and compare their output with their model."""
    told = run(program.text, lambda: None)
    assert told.status == 0, told.errors
    expected = program.expected()
    # Negative averages are only known if they are of one value.
    below = {
        each
        for each, value in expected.items()
        if program.functions[each[0]] == "avg" and each not in told.values
    }
    assert bool(below) == bool(told.bad)
    for name, keys in below:
        assert sum(value for at, at_keys, value in program.put if at == name) < 0 or keys
    found = {
        each: counts(value) if isinstance(value, tuple) else value
        for each, value in told.values.items()
    }
    assert found == {each: value for each, value in expected.items() if each not in below}


def test_generated() -> None:
    """Generated programs count the same as their model."""
    check_programs()
