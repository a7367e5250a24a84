"""The metrics of a script's aggregations, and the sums of its rows over all runs."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter.listeners import SessionId
from dtrace_exporter.scripts import reader
from dtrace_exporter.scripts.families import Family, FamilyError, Settings, families, stem
from dtrace_exporter.scripts.metrics import BadValueError, ScriptMetrics, SeriesError
from dtrace_exporter.scripts.rows import Row
from dtrace_exporter.state import SessionStatus, State
from dtrace_exporter.web.exposition import Exposition

KINDS = ["count()", "sum(arg0)", "min(arg0)", "max(arg0)", "avg(arg0)", "stddev(arg0)"]
COUNT, SUM, MIN, MAX, AVG, STDDEV = range(len(KINDS))
ALL = "BEGIN { " + " ".join(f"@{f.partition('(')[0]}[pid] = {f};" for f in KINDS) + " }"


def of(text: str, settings: Mapping[str, Settings] | None = None) -> tuple[Family, ...]:
    """Return the metrics of a script /x/io.d."""
    return families(reader.read("/x/io.d", text), settings or {})


def metrics(text: str = ALL, limit: int = 1000, **settings: Settings) -> ScriptMetrics:
    """Return the empty metrics of a script."""
    return ScriptMetrics("/x/io.d", of(text, settings), limit)


def samples(found: ScriptMetrics) -> dict[str, float]:
    """Return all samples, as Prometheus writes them."""
    said = {}
    for _, (name, layout, values) in found.blocks():
        for (suffix, labels), value in zip(layout, values, strict=True):
            inside = ",".join(f'{label}="{text}"' for label, text in labels)
            assert f"{name}{suffix}{{{inside}}}" not in said
            said[f"{name}{suffix}{{{inside}}}"] = value
    return said


def row(aggregation: int, value: Any, *keys: str, final: bool = False) -> Row:
    """Return a row."""
    return Row(aggregation, keys or ("7",), value, final)


def test_names_and_types() -> None:
    """A family has the name of the file and the aggregation, and the type of the function."""
    found = [(each.name, each.kind, each.labels) for each in of(ALL)]
    assert found == [
        ("dtrace_io_count", "counter", ("pid",)),
        ("dtrace_io_sum", "counter", ("pid",)),
        ("dtrace_io_min", "gauge", ("pid",)),
        ("dtrace_io_max", "gauge", ("pid",)),
        ("dtrace_io_avg", "gauge", ("pid",)),
        ("dtrace_io_stddev", "gauge", ("pid",)),
    ]
    (bare,) = of("BEGIN { @ = quantize(arg0); }")
    assert (bare.name, bare.kind, bare.labels) == ("dtrace_io", "histogram", ())
    assert of("BEGIN { @bytes_total = sum(1); }")[0].samples == ("dtrace_io_bytes_total",)


@pytest.mark.parametrize(
    ("path", "name"),
    [("/a/io.d", "io"), ("/a/my-io.2.d", "my_io_2"), ("/a/x", "x"), ("/a/é.d", "_")],
)
def test_stem(path: str, name: str) -> None:
    """A script's name is its file's name, made fit for a metric."""
    assert stem(path) == name


def test_settings() -> None:
    """The configuration's settings of an aggregation override the script's."""
    said = Settings("disk_seconds", "Help.", ("device",), 1e-9, (1024, 4096))
    (found,) = of("BEGIN { @t[pid] = quantize(arg0); }", {"t": said})
    assert (found.name, found.help, found.labels) == ("disk_seconds", "Help.", ("device",))
    assert found.bounds == ("1.023e-06", "2.047e-06", "4.095e-06")
    (gauge,) = of("BEGIN { @t = sum(arg0); }", {"t": Settings(type="gauge")})
    assert gauge.samples == ("dtrace_io_t",)


@pytest.mark.parametrize(
    ("function", "settings", "key"),
    [
        ("count()", {"type": "histogram"}, "type"),
        ("max(1)", {"type": "counter"}, "type"),
        ("quantize(1)", {"type": "gauge"}, "type"),
        ("count()", {"buckets": (1, 2)}, "buckets"),
        ("quantize(1)", {"buckets": (3, 4)}, "buckets"),
        ("quantize(1)", {"buckets": (4, 4)}, "buckets"),
        ("quantize(1)", {"buckets": (0, 4)}, "buckets"),
        ("quantize(1)", {"buckets": (1, 2, 4)}, "buckets"),
        ("lquantize(1, 0, 100000, 1)", {}, "buckets"),
        ("lquantize(1, -0x7fffffffffffffff, 0x7fffffffffffffff, 1)", {}, "buckets"),
        ("lquantize(1, 0, $1, 1)", {}, "buckets"),
        ("lquantize(1, 0, 10, 1)", {"buckets": (0, 10, 1, 1)}, "buckets"),
        ("llquantize(1, 10, 0, 6, 20)", {"buckets": (10, 0, 99, 20)}, "buckets"),
        ("llquantize(1, 2, 0, 0x7fffffffffffffff, 20)", {}, "buckets"),
        ("count()", {"labels": ("a", "b")}, "labels"),
        ("count()", {"name": "dtrace_tcp_x"}, "name"),
        ("count()", {"name": "process_x"}, "name"),
    ],
)
def test_wrong_settings(function: str, settings: dict[str, Any], key: str) -> None:
    """Settings that a kind of aggregation cannot have are refused, with the wrong key."""
    with pytest.raises(FamilyError) as caught:
        of(f"BEGIN {{ @t[pid] = {function}; }}", {"t": Settings(**settings)})
    assert (caught.value.aggregation, caught.value.key) == ("t", key)


def test_one_bucket_for_each_cpu() -> None:
    """An lquantize() with 1,024 buckets, as public scripts have it, is accepted."""
    (found,) = of("inline int MAX = 1024; BEGIN { @ = lquantize(cpu, 0, MAX, 1); }")
    assert (found.bounds[0], found.bounds[-1], len(found.bounds)) == ("-1.0", "1023.0", 1025)


def test_one_name_twice() -> None:
    """Two aggregations whose samples would have the same name are refused."""
    with pytest.raises(FamilyError, match="gives, too"):
        of("BEGIN { @a = count(); @a_total = sum(1); }")
    with pytest.raises(FamilyError, match="gives, too"):
        of("BEGIN { @a = quantize(1); @a_count = max(1); }")


def test_bounds_of_quantize() -> None:
    """quantize() has bounds one below each power of two, and one bucket for negative values."""
    (found,) = of("BEGIN { @ = quantize(arg0); }")
    assert found.bounds[:5] == ("-1.0", "0.0", "1.0", "3.0", "7.0")
    assert float(found.bounds[-1]) == 2**62 - 1.0
    assert len(found.bounds) == 64


@pytest.mark.parametrize(
    ("function", "edges"),
    [
        ("lquantize(1, -2, 7, 3)", (-2, 1, 4, 7)),
        ("lquantize(1, 0, 10, 4)", (0, 4, 8)),
        ("lquantize(1, 0, 3)", (0, 1, 2, 3)),
        ("llquantize(1, 10, 0, 1, 10)", (*range(1, 10), *range(10, 101, 10))),
        ("llquantize(1, 2, 0, 3, 4)", (1, 2, 3, 4, 6, 8, 12, 16)),
    ],
)
def test_bounds_of_others(function: str, edges: tuple[int, ...]) -> None:
    """The bounds of lquantize() and llquantize() follow from their arguments."""
    (found,) = of(f"BEGIN {{ @ = {function}; }}")
    assert found.edges == edges
    assert found.bounds == tuple(repr(float(edge - 1)) for edge in edges)


def test_counters_go_on() -> None:
    """A counter is the sum of all runs; it keeps what the script empties and what ended."""
    found = metrics()
    found.feed(row(COUNT, 5))
    found.feed(row(COUNT, 9, final=True))
    found.feed(row(COUNT, 2))
    found.tick()
    assert samples(found) == {'dtrace_io_count_total{pid="7"}': 11.0}
    found.end()
    found.end()
    found.feed(row(COUNT, 1))
    assert samples(found) == {'dtrace_io_count_total{pid="7"}': 12.0}
    found.tick()
    found.tick()
    assert samples(found) == {'dtrace_io_count_total{pid="7"}': 12.0}


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from("ab"), st.integers(0, 9)),
            st.sampled_from(["clear", "tick", "end"]),
        )
    )
)
def test_counters_are_exact(events: list[Any]) -> None:
    """However a script counts, empties and ends, the exported number is what it counted."""
    found = metrics()
    counted: dict[str, int] = {}
    held: dict[str, int] = {}
    for event in events:
        if event == "tick" or event == "end":
            for key, value in held.items():
                found.feed(row(COUNT, value, key))
            found.tick()
            if event == "end":
                found.end()
                held.clear()
        elif event == "clear":
            for key, value in held.items():
                found.feed(row(COUNT, value, key, final=True))
            held.clear()
        else:
            key, more = event
            counted[key] = counted.get(key, 0) + more
            held[key] = held.get(key, 0) + more
    for key, value in held.items():
        found.feed(row(COUNT, value, key))
    wanted = {f'dtrace_io_count_total{{pid="{key}"}}': float(n) for key, n in counted.items()}
    assert samples(found) == wanted


def test_a_sum_that_falls() -> None:
    """A counter cannot fall: a row that falls is an error, unless the metric is a gauge."""
    found = metrics()
    found.feed(row(SUM, 5))
    with pytest.raises(BadValueError, match="falls"):
        found.feed(row(SUM, 4))
    with pytest.raises(BadValueError, match="falls"):
        found.feed(row(SUM, -1, "8"))
    assert samples(found)['dtrace_io_sum_total{pid="7"}'] == 5.0
    gauge = metrics(sum=Settings(type="gauge"))
    gauge.feed(row(SUM, 5))
    gauge.feed(row(SUM, -4))
    assert samples(gauge) == {'dtrace_io_sum{pid="7"}': -4.0}


def test_gauges_pass() -> None:
    """A gauge exists while rows have its key, and goes at the first heartbeat without it."""
    found = metrics(avg=Settings(scale=1e-3))
    found.feed(row(AVG, 5))
    found.feed(row(AVG, 9, "8"))
    found.tick()
    found.feed(row(AVG, 6, final=True))
    found.tick()
    assert samples(found) == {'dtrace_io_avg{pid="7"}': 0.006}
    found.feed(row(AVG, 1, "9"))
    found.tick()
    assert samples(found) == {'dtrace_io_avg{pid="9"}': 0.001}
    found.end()
    assert samples(found) == {}
    assert len(found) == 0


STACKS = """BEGIN { @n[ustack()] = count(); @s[umod(arg0)] = sum(1); @min[ustack(1)] = min(1);
    @avg[sym(arg0)] = avg(1); @t[stack()] = quantize(1); @q[stack(1)] = max(1); }"""


def test_keys_written_alike() -> None:
    """If several keys are printed as the same text, their sum is exported."""
    found = metrics(STACKS)
    assert all(family.alike for family in found.families)
    assert not any(family.alike for family in metrics().families)
    for of_one, of_other in ((2, 3), (2, 4)):
        for number, final in ((0, False), (1, False), (2, False), (5, False)):
            found.feed(row(number, of_one, "a", final=final))
            found.feed(row(number, of_other, "a", final=final))
        found.feed(row(4, ((0, of_one), (1, 1)), "a"))
        found.feed(row(4, ((0, of_other),), "a"))
        found.feed(row(3, 5, "b"))
        found.feed(row(3, 5, "a"))
        with pytest.raises(BadValueError, match="avg of several keys that look alike"):
            found.feed(row(3, 6, "a"))
        assert found.tick() == []
    said = samples(found)
    assert said['dtrace_io_n_total{ustack="a"}'] == said['dtrace_io_s_total{umod="a"}'] == 6.0
    assert (said['dtrace_io_min{ustack="a"}'], said['dtrace_io_q{stack="a"}']) == (2.0, 4.0)
    assert said['dtrace_io_t_bucket{stack="a",le="0.0"}'] == 6.0
    assert said['dtrace_io_t_count{stack="a"}'] == 7.0
    assert {name for name in said if "_avg" in name} == {'dtrace_io_avg{sym="b"}'}


def test_of_keys_written_alike_one_goes() -> None:
    """If one of several keys with the same text goes, the counter of the others goes on."""
    found = metrics(STACKS)
    for value in (2, 3):
        found.feed(row(0, value, "a"))
        found.feed(row(4, ((1, value),), "a"))
        found.feed(row(1, value, "a"))
    assert found.tick() == []
    later: list[tuple[int, Any]] = [(0, 4), (4, ((1, 4),))]
    for number, told in later:
        found.feed(row(number, told, "a"))
    assert found.tick() == []
    # The row does not say which of them went, so what the other counted meanwhile is unknown.
    assert samples(found)['dtrace_io_n_total{ustack="a"}'] == 5.0
    later = [(0, 6), (4, ((1, 6),))]
    for number, told in later:
        found.feed(row(number, told, "a"))
    assert found.tick() == []
    assert samples(found)['dtrace_io_n_total{ustack="a"}'] == 7.0
    assert samples(found)['dtrace_io_t_count{stack="a"}'] == 7.0
    found.feed(row(1, 4, "a"))
    (wrong,) = found.tick()
    assert "a sum that falls" in str(wrong)


@given(
    st.lists(st.one_of(st.integers(0, 2), st.sampled_from(["trunc", "tick", "end"]))),
)
def test_keys_written_alike_are_exact(events: list[Any]) -> None:
    """However keys with the same text are counted, emptied and printed, their sum is exact."""
    found = metrics(STACKS)
    held: dict[int, int] = {}
    for event in [*events, "tick"]:
        if event in ("tick", "end"):
            for value in held.values():
                found.feed(row(0, value, "a"))
            assert found.tick() == []
            if event == "end":
                found.end()
                held.clear()
        elif event == "trunc":
            for value in held.values():
                found.feed(row(0, value, "a", final=True))
            held.clear()
        else:
            held[event] = held.get(event, 0) + 1
    counted = sum(isinstance(event, int) for event in events)
    assert samples(found).get('dtrace_io_n_total{ustack="a"}', 0.0) == counted


def test_last_values_of_a_run_that_ends() -> None:
    """Counts that a script has emptied stay if its run ends before the next heartbeat."""
    found = metrics(STACKS)
    for value in (2, 3):
        found.feed(row(0, value, "a", final=True))
    found.feed(row(0, 1, "a"))
    found.end()
    assert samples(found) == {'dtrace_io_n_total{ustack="a"}': 5.0}


def test_histogram() -> None:
    """A histogram has all of its bounds from the start, and goes on over runs as counters do."""
    found = metrics("BEGIN { @t[pid] = lquantize(arg0, 0, 4, 2); }", t=Settings(scale=0.5))
    found.feed(row(0, ((None, 1), (0, 2), (2, 0), (4, 3))))
    wanted = {
        'dtrace_io_t_bucket{pid="7",le="-0.5"}': 1.0,
        'dtrace_io_t_bucket{pid="7",le="0.5"}': 3.0,
        'dtrace_io_t_bucket{pid="7",le="1.5"}': 3.0,
        'dtrace_io_t_bucket{pid="7",le="+Inf"}': 6.0,
        'dtrace_io_t_count{pid="7"}': 6.0,
    }
    assert samples(found) == wanted
    found.end()
    found.feed(row(0, ((0, 1),), final=True))
    found.feed(row(0, ((2, 1),)))
    assert samples(found)['dtrace_io_t_count{pid="7"}'] == 8.0
    with pytest.raises(BadValueError, match="falls"):
        found.feed(row(0, ((0, 1),)))
    assert samples(found).keys() == wanted.keys()


def test_coarser_bounds() -> None:
    """With coarser bounds in the configuration, each row is in the bucket that contains it."""
    script = "BEGIN { @ = quantize(arg0); }"
    found = ScriptMetrics("/x/io.d", of(script, {"": Settings(buckets=(4, 16))}), 10)
    rows = ((-8, 1), (0, 1), (2, 1), (4, 1), (8, 1), (16, 1), (1 << 62, 1))
    found.feed(Row(0, (), rows, final=False))
    assert samples(found) == {
        'dtrace_io_bucket{le="3.0"}': 3.0,
        'dtrace_io_bucket{le="7.0"}': 4.0,
        'dtrace_io_bucket{le="15.0"}': 5.0,
        'dtrace_io_bucket{le="+Inf"}': 7.0,
        "dtrace_io_count{}": 7.0,
    }


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_le_is_exact(values: list[int]) -> None:
    """Each bucket has the values up to its bound, as exactly as floats can tell."""
    found = metrics("BEGIN { @ = quantize(arg0); }")
    edges: dict[int, int] = {}
    for value in values:
        power = 1 << (abs(value).bit_length() - 1) if value else 0
        # A negative row is the mirror of a positive one.
        edge = power if value >= 0 else -power
        edges[edge] = edges.get(edge, 0) + 1
    found.feed(Row(0, (), tuple(sorted(edges.items())), final=False))
    for name, count in samples(found).items():
        if "_bucket" in name:
            bound = float(name.split('"')[1])
            at_most = math.inf if bound == math.inf else round(bound)
            # Where floats are not exact, a bound is rounded up by one.
            at_most -= bound >= 2**53 and bound != math.inf
            assert count == sum(value <= at_most for value in values)


def test_limit() -> None:
    """Series beyond the limit are refused, and those that exist stay."""
    found = metrics(limit=2)
    found.feed(row(COUNT, 1, "1"))
    found.feed(row(MAX, 1, "1"))
    with pytest.raises(SeriesError, match="more than 2 series"):
        found.feed(row(COUNT, 1, "2"))
    found.feed(row(COUNT, 2, "1"))
    assert len(found) == 2
    # A gauge that goes makes room for another series.
    found.tick()
    found.tick()
    found.feed(row(COUNT, 1, "2"))
    assert samples(found) == {
        'dtrace_io_count_total{pid="1"}': 2.0,
        'dtrace_io_count_total{pid="2"}': 1.0,
    }


def test_literal_keys_are_no_labels() -> None:
    """A key that is always the same text is not a label."""
    found = metrics('BEGIN { @t["reads", pid] = count(); }')
    found.feed(row(0, 3, "reads", "7"))
    assert samples(found) == {'dtrace_io_t_total{pid="7"}': 3.0}


def test_many_series_are_in_pieces() -> None:
    """If a series changes, only its piece is rendered again."""
    found = metrics("BEGIN { @t[pid] = quantize(arg0); }")
    for pid in range(200):
        found.feed(row(0, ((1, pid),), str(pid)))
    before = dict(found.blocks())
    assert len(before) > 2
    assert len(samples(found)) == 200 * 66
    found.feed(row(0, ((1, 1000),), "0"))
    after = dict(found.blocks())
    assert {piece for piece in after if after[piece] is not before[piece]} == {
        "0.0_bucket",
        "0.0_count",
    }


def test_reload() -> None:
    """After a reload, unchanged metrics go on, and changed ones start again."""
    before = metrics("BEGIN { @a = count(); @b = count(); }")
    before.feed(Row(0, (), 5, final=False))
    before.feed(Row(1, (), 6, final=False))
    before.end()
    new = of("BEGIN { @c = count(); @a = count(); @b = max(1); }")
    after = ScriptMetrics("/x/io.d", new, 10, before)
    after.feed(Row(1, (), 1, final=False))
    assert samples(after) == {"dtrace_io_a_total{}": 6.0}


def test_a_name_that_is_no_text() -> None:
    """A file name that is not UTF-8 does not make a scrape fail."""
    path = "/x/\udcff.d"
    script = reader.read(path, "BEGIN { @n[pid] = count(); }")
    state = State()
    session = SessionId("", "script-_")
    state.sessions[session] = SessionStatus()
    found = state.scripts[session] = ScriptMetrics(path, families(script, {}), 10)
    found.feed(row(0, 3))
    body = asyncio.run(Exposition(state).answer())
    assert b'dtrace___n_total{pid="7"} 3.0\n' in b"".join(body)
    assert b'dtrace_script_info{file="/x/?.d",script="_"} 1.0\n' in b"".join(body)


def test_many_that_look_alike() -> None:
    """Endless rows whose keys have the same text take no more memory than one of them."""
    family = Family("a", "quantize", "x", "histogram", "h", ("k",), edges=(0,), alike=True)
    found = ScriptMetrics("f", (family,), 10)
    for _ in range(1000):
        found.feed(Row(0, ("k",), tuple((edge, 1) for edge in range(-100, 4000)), False))
    assert found.tables[0]._rows[0] == [100_000, 4_000_000]


def test_labels_too_long() -> None:
    """What a scrape has of a script has a bound: a long key counts for each bucket."""
    family = Family("a", "quantize", "x", "histogram", "h", ("k",), edges=(0,) * 98, alike=True)
    found = ScriptMetrics("f", (family,), 1000)
    rows = (Row(0, (f"{number:16000}",), ((0, 1),), False) for number in range(1000))
    with pytest.raises(SeriesError, match="names and labels of more than 32 MB"):
        deque(map(found.feed, rows), 0)
    assert len(found) == 1000 * (32 << 10) // (100 * 16_001)


def test_labels_of_series_that_have_gone_do_not_count() -> None:
    """A gauge that is forgotten gives back what it took."""
    family = Family("a", "max", "x", "gauge", "h", ("k",))
    found = ScriptMetrics("f", (family,), 10_000)
    for number in range(3):
        for key in range(1000):
            found.feed(Row(0, (f"{number}{key:16000}",), 1, False))
        found.tick()
    assert found.tables[0].size == 1000 * 16_002
    found.end()
    assert found.tables[0].size == 0
