"""Sessions: probes, buffers, and what dtrace(1) does with them."""

from __future__ import annotations

import pytest

from sun.engine import Engine
from sun.small import Ram, engine, refusal, run, types

SECOND = 1_000_000_000
COUNTS = """
#pragma D option quiet
fbt:ip:f:entry { @n[arg0] = count(); }
tick-1s, END { printf("tick\\n"); printa("%d %@d\\n", @n); trunc(@n); }
"""


def test_begin_end_and_ticks() -> None:
    """BEGIN fires at once, ticks fire at their times, and END fires when the session stops."""
    host = engine()
    session = host.start(
        'BEGIN { printf("begin\\n"); } tick-1s { printf("1s %d\\n", timestamp); }'
        'profile:::tick-400ms, tick-5hz { printf("%s\\n", probename); } END { printf("end\\n"); }'
    )
    assert session.output == "begin\n"
    host.advance(SECOND)
    # dtrace(1) has done a round, in which it printed all records so far.
    ticks = [*["tick-5hz"] * 5, *["tick-400ms"] * 2, "1s 1001000000000"]
    assert sorted(session.output.split("\n")) == sorted(["", "begin", *ticks])
    session.stop()
    session.stop()
    host.advance(SECOND)
    assert session.output.endswith("end\n")
    assert not session.is_running
    assert session.errors == []


def test_rates() -> None:
    """Records are printed at the next switch of buffers."""
    host = engine()
    session = host.start('#pragma D option switchrate=4hz\nfbt:ip:f:entry { printf("x"); }')
    host.advance(SECOND)
    host.fire("fbt:ip:f:entry")
    host.advance(SECOND // 4 - 1)
    assert session.output == ""
    host.advance(1)
    assert session.output == "x"


def test_options_of_the_command_line() -> None:
    """An option of the command line overrides that of the program."""
    text = "#pragma D option bufsize=64k\n#pragma D option aggsize=1m\nBEGIN { }"
    session = engine(cpus=4).start(text, {"bufsize": "128k", "dynvarsize": "4m"})
    assert session.options.bufsize == 128 << 10
    assert session.memory_per_cpu == 2 * ((128 << 10) + (1 << 20)) + (1 << 20)


def test_probes() -> None:
    """A description matches probes by the parts that it gives, and must match at least one."""
    host = Engine(types(), probes=["fbt:ip:f:entry", "mib:ip:g:tcpListenDrop", "fbt:ip:g:return"])
    session = host.start(
        "mib:::tcpListenDrop, fbt::g:return, fbt::: {"
        '    printf("%s:%s:%s:%s %d\\n", probeprov, probemod, probefunc, probename, arg1); }'
    )
    host.fire("mib:ip:g:tcpListenDrop", (1, -1))
    host.fire("fbt:ip:g:return", (0, 5))
    host.fire("fbt:ip:h:entry")
    session.stop()
    assert session.output == (
        "mib:ip:g:tcpListenDrop -1\nfbt:ip:g:return 5\nfbt:ip:g:return 5\nfbt:ip:h:entry 0\n"
    )
    assert refusal(lambda: host.start("BEGIN { }\nfbt::nothing:entry { }")) == (
        "line 2: probe description fbt::nothing:entry does not match any probes"
    )


def test_globs() -> None:
    """Asterisks and question marks work as in a shell."""
    host = engine()
    session = host.start('fbt:ip:tcp_*:?ntry { printf("%s ", probefunc); }')
    for function in ("tcp_accept", "ip_input", "tcp_"):
        host.fire(f"fbt:ip:{function}:entry")
    session.stop()
    assert session.output == "tcp_accept tcp_ "


@pytest.mark.parametrize(("tick_cpu", "output"), [(0, "tick0 f0 f1 "), (1, "f0 f1 tick1 ")])
def test_rows_of_different_cpus(tick_cpu: int, output: str) -> None:
    """Rows are printed CPU by CPU, so a tick's row may come before much older ones."""
    host = engine()
    host.tick_cpu = tick_cpu
    session = host.start(
        'fbt:ip:f:entry { printf("f%d ", cpu); } tick-700ms { printf("tick%d ", cpu); }'
    )
    host.fire("fbt:ip:f:entry", cpu=1)
    host.advance(7 * SECOND // 10)
    host.fire("fbt:ip:f:entry", cpu=0)
    host.advance(3 * SECOND // 10)
    assert session.output == output


def test_clauses_run_in_their_order() -> None:
    """A probe's clauses run in the order of the program, if their predicates are true."""
    text = """
    fbt:ip:f:entry { printf("1 "); }
    fbt:ip:f:entry / arg0 == 2 / { printf("2 "); }
    fbt:ip:g:entry { printf("3 "); }
    fbt:ip:f:entry { printf("4 "); }
    """
    assert run(text, ("f", [1]), ("g", []), ("f", [2])).output == "1 4 3 1 2 4 "


def test_exit() -> None:
    """exit() ends a session when dtrace(1) reads it; after it only END fires."""
    host = engine()
    session = host.start('fbt:ip:f:entry { printf("x"); exit(0); } END { printf("end"); }')
    host.fire("fbt:ip:f:entry")
    host.fire("fbt:ip:f:entry")
    host.advance(SECOND)
    assert session.output == "xend"
    assert not session.is_running


def test_threads_and_cpus() -> None:
    """``self->`` belongs to a thread on any CPU, and ``this->`` to a CPU for any thread."""
    host = engine()
    session = host.start(
        "fbt:ip:set:entry { self->x = arg0; this->y = arg0; }"
        'fbt:ip:get:entry { printf("%d %d\\n", self->x, this->y); }'
    )
    host.fire("fbt:ip:set:entry", [1], cpu=0, thread=0x10)
    host.fire("fbt:ip:set:entry", [2], cpu=1, thread=0x20)
    host.fire("fbt:ip:get:entry", cpu=1, thread=0x10)
    host.fire("fbt:ip:get:entry", cpu=0, thread=0x20)
    host.fire("fbt:ip:get:entry", cpu=0, thread=0x30)
    session.stop()
    # CPU 1's records come first, as END was on CPU 0.
    assert session.output == "1 2\n2 1\n0 1\n"


def test_built_ins() -> None:
    """A clause can see its CPU and its process."""
    host = engine()
    session = host.start(
        'fbt:ip:f:entry { printf("%d %d %s %d %d", cpu, pid, execname, curthread == NULL, epid); }'
    )
    host.fire("fbt:ip:f:entry", cpu=1, pid=77, execname=b"sshd")
    session.stop()
    assert session.output == "1 77 sshd 0 1"


def test_printa_and_trunc() -> None:
    """An aggregation that is printed and truncated in one clause is counted exactly once."""
    host = engine()
    session = host.start(COUNTS)
    for second in range(3):
        for cpu in (0, 1):
            host.fire("fbt:ip:f:entry", [second], cpu=cpu)
        host.advance(SECOND)
    session.stop()
    assert session.output == "tick\n0 2\ntick\n1 2\ntick\n2 2\ntick\n"


def test_stall() -> None:
    """A stalled consumer prints later, and loses nothing while its buffers have room."""
    host = engine()
    session = host.start(COUNTS)
    session.stall()
    for _ in range(5):
        host.fire("fbt:ip:f:entry", [7])
        host.advance(SECOND)
    assert session.output == ""
    session.go()
    assert session.output == "tick\n7 5\n" + "tick\n" * 4
    assert session.errors == []


def test_two_sessions() -> None:
    """Sessions share only the probes."""
    host = engine()
    one, other = (
        host.start(f'fbt:ip:{name}:entry {{ x++; }} END {{ printf("%d", x); }}')
        for name in ("f", "*")
    )
    host.fire("fbt:ip:f:entry")
    host.fire("fbt:ip:g:entry")
    one.stop()
    host.fire("fbt:ip:f:entry")
    other.stop()
    assert (one.output, other.output) == ("1", "3")


def test_aggregations() -> None:
    """Each aggregating function works, with keys of several types, over all CPUs."""
    host = engine()
    session = host.start("""
    fbt:ip:f:entry {
        @count[arg0, probename] = count(); @sum[arg0] = sum(arg1); @min = min(arg1);
        @max = max(arg1); @avg = avg(arg1);
    }
    END {
        printa("%d %s %@d\\n", @count); printa("%d %@d\\n", @sum);
        printa("%@d ", @min); printa("%@d ", @max); printa("%@d\\n", @avg);
        printa("%d %@d %@d\\n", @sum, @sum);
    }
    """)
    for cpu, args in ((0, (1, 5)), (1, (1, -7)), (0, (2, 100)), (1, (2, 3)), (0, (2, 1))):
        host.fire("fbt:ip:f:entry", args, cpu=cpu)
    session.stop()
    assert session.output == ("1 entry 2\n2 entry 3\n1 -2\n2 104\n-7 100 20\n1 -2 -2\n2 104 104\n")


def test_trunc_keeps_the_largest() -> None:
    """trunc() keeps some of the largest or smallest values, and clear() keeps all keys."""
    text = """
    fbt:ip:f:entry { @a[arg0] = sum(arg1); @b[arg0] = sum(arg1); @c[arg0] = sum(arg1); }
    END {
        trunc(@a, 2); printa("%d ", @a); trunc(@b, -1); printa("%d ", @b);
        clear(@c); printa("%d=%@d ", @c);
    }
    """
    events = [("f", (key, 10 * key)) for key in (3, 1, 2)]
    assert run(text, *events).output == "2 3 1 1=0 2=0 3=0 "


def test_keys_of_different_sizes() -> None:
    """Keys of different sizes are the same row if their bytes are at the same place."""
    text = """
    fbt:ip:f:entry { @[1] = count(); } fbt:ip:g:entry { @[1L] = count(); }
    END { printa("%d %@d\\n", @); }
    """
    assert run(text, ("f", []), ("g", []), ("f", [])).output == "1 3\n"


def test_drops() -> None:
    """Records without room are counted by CPU, and reported when their buffer is switched."""
    host = engine()
    session = host.start('#pragma D option bufsize=64\nfbt:ip:f:entry { printf("%d ", arg0); }')
    for number in range(5):
        host.fire("fbt:ip:f:entry", [number], cpu=1)
    host.fire("fbt:ip:f:entry", [9], cpu=0)
    host.advance(SECOND)
    # A record has a header of 12 bytes, and 8 bytes at a multiple of 8.
    assert session.output == "9 0 1 "
    assert session.errors == ["dtrace: 3 drops on CPU 1"]
    host.fire("fbt:ip:f:entry", [6], cpu=1)
    host.advance(SECOND)
    assert session.output == "9 0 1 6 "
    assert session.errors == ["dtrace: 3 drops on CPU 1"]


def test_faults_need_room_too() -> None:
    """A fault takes a record, which has no room in a full buffer."""
    text = "#pragma D option bufsize=128\nfbt:ip:f:entry { *(int *)arg0; }"
    session = run(text, *[("f", [0])] * 3)
    assert len(session.errors) == 3
    assert session.errors[-1] == "dtrace: 1 drop on CPU 0"


def test_one_drop() -> None:
    """Two keys in a buffer with room for one are one aggregation drop."""
    text = "#pragma D option aggsize=120\nfbt:ip:f:entry { @[arg0] = count(); }"
    session = run(text, ("f", [1]), ("f", [2]), ("f", [1]))
    assert session.errors == ["dtrace: 1 aggregation drop on CPU 0"]


@pytest.mark.parametrize(
    ("text", "capacity"),
    [("uint64_t t[uint64_t];", 15_357), ("uint64_t t[uint64_t, uint64_t];", 13_734)],
)
def test_dynamic_variables(text: str, capacity: int) -> None:
    """Two megabytes hold some 15,400 dynamic variables, and the next status reports the losses."""
    key = "arg0, arg0" if "," in text else "arg0"
    host = engine()
    session = host.start(
        f"#pragma D option dynvarsize=2m\n{text} fbt:ip:f:entry {{ t[{key}] = 1; }}"
    )
    for number in range(capacity + 2):
        host.fire("fbt:ip:f:entry", [number])
    host.advance(SECOND)
    assert session.errors == ["dtrace: 2 dynamic variable drops"]


def test_aggregation_buffer() -> None:
    """An eighth of aggsize is a hash table, and a record of two keys takes 64 bytes of the rest."""
    text = "#pragma D option aggsize=512k\nfbt:ip:f:entry { @[arg0, (int)arg1] = count(); }"
    host = engine()
    session = host.start(text)
    for number in range(7_175):
        host.fire("fbt:ip:f:entry", [number, 1])
    host.advance(SECOND)
    assert session.errors == ["dtrace: 6 aggregation drops on CPU 0"]


def test_faults_leave_what_was_aggregated() -> None:
    """A clause that faults leaves no record, but its counts and assignments stay."""
    text = """
    fbt:ip:f:entry { x = 1; @n = count(); printf("no"); *(int *)arg0; x = 2; }
    END { printf("%d ", x); printa("%@d", @n); }
    """
    assert run(text, ("f", [0])).output == "1 1"


def test_another_cpu_goes_on_within_an_event() -> None:
    """Between two expressions of an event, another CPU may run and change shared variables."""
    host = engine()
    session = host.start(
        "fbt:ip:f:entry { x = arg0; this->y = arg0; this->z = x; }"
        'fbt:ip:f:entry { printf("%d %d %d\\n", arg0, this->y, this->z); }'
    )
    steps = 0

    def between() -> None:
        nonlocal steps
        steps += 1
        if steps == 2:
            host.fire("fbt:ip:f:entry", [2], cpu=1)

    host.between = between
    host.fire("fbt:ip:f:entry", [1], cpu=0)
    session.stop()
    assert session.output == "2 2 2\n1 1 2\n"


def test_nothing_interrupts_an_event_on_its_cpu() -> None:
    """A probe that fires within another one on the same CPU is an error of the test."""
    host = engine()

    def load(_: int, size: int) -> bytes:
        host.fire("fbt:ip:f:entry", [8])
        return bytes(size)

    host.load = load
    host.start("fbt:ip:f:entry { *(int *)arg0; }")
    with pytest.raises(RuntimeError, match="a probe fires within another on CPU 0"):
        host.fire("fbt:ip:f:entry", [8])


def test_records_hold_what_was_then() -> None:
    """A printed value is that of the memory at the event."""
    ram = Ram()
    thing = ram.thing(count=1)
    host = engine(ram)
    session = host.start('fbt:ip:f:entry { printf("%d ", ((thing_t *)arg0)->count); }')
    host.fire("fbt:ip:f:entry", [thing])
    ram._bytes[24] = 2
    host.fire("fbt:ip:f:entry", [thing])
    session.stop()
    assert session.output == "1 2 "
