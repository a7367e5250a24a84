"""The command trace --top: who sends SYNs to a port, and whose SYNs are dropped."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
from collections import Counter
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.waiting import until

from dtrace_exporter import senders
from dtrace_exporter.senders import HEADER, OTHERS, Board, Senders
from exporter_process import EXPORTER, run, write
from fake_steps import FakeDTrace
from pseudo_terminal import on_terminal

FIRST = ["set 10", "syn 0 0 ffffc0a80102 5", "drop 0 0 ffffc0a80102 q_full 2", "set 11"]
FIRST += ["tick 1000000000"]
SECOND = ["set 10", "syn 0 0 ffffc0a80102 6", "drop 0 0 ffffc0a80102 q_full 2", "syn 1 0 0 7"]
SECOND += ["set 11", "syn 0 20010db800000000 1 3", "drop 0 20010db800000000 1 other 1"]
SECOND += ["tick 2000000000"]
# The first set has been emptied and is in use again.
THIRD = ["set 30", "syn 0 0 ffffc0a80102 1", "set 11", "syn 0 20010db800000000 1 4"]
THIRD += ["drop 0 20010db800000000 1 other 1", "tick 3000000000"]
V4, V6 = "192.168.1.2", "2001:db8::1"


def read(made: Senders, *lines: str) -> list[dict[str, dict[str, int]]]:
    """Read lines, and return the counts at each heartbeat."""
    found = [made.read(line) for line in lines]
    return [
        {sender: dict(counts) for sender, counts in fresh.items()}
        for fresh in found
        if fresh is not None
    ]


def test_sets() -> None:
    """Rows of a set give all events since it began, and each event is counted once."""
    made = Senders()
    assert read(made, *FIRST) == [{V4: {"": 5, "q_full": 2}}]
    assert read(made, *SECOND) == [{V4: {"": 1}, OTHERS: {"": 7}, V6: {"": 3, "other": 1}}]
    assert read(made, *THIRD) == [{V4: {"": 1}, V6: {"": 1}}]
    assert made.totals == {
        V4: {"": 7, "q_full": 2},
        V6: {"": 4, "other": 1},
        OTHERS: {"": 7},
    }
    assert (made.bad_rows, made.late) == (0, False)


def test_each_set_in_its_turn() -> None:
    """Whichever set starts again, old rows of the other set are not counted again."""
    made = Senders()
    row = "syn 0 0 ffffc0a80102"
    for tick, (first, one, second, other) in enumerate(
        [
            (10, 5, 11, 0),
            (10, 5, 20, 1),
            (10, 5, 20, 2),
            (10, 0, 20, 2),
            (30, 1, 20, 2),
            (30, 4, 20, 0),
            (30, 4, 40, 3),
        ]
    ):
        for number, events in ((first, one), (second, other)):
            rows = [f"{row} {events}"] if events else []
            read(made, f"set {number}", *rows)
        read(made, f"tick {tick}")
    assert made.totals[V4][""] == 5 + 2 + 4 + 3
    assert len(made._sets) == 2


def test_without_sets() -> None:
    """Without sets, as with Sun's programs, each row counts once."""
    made = Senders(networks=True)
    lines = ["syn 0 0 ffffc0a80100 5", "drop 0 0 ffffc0a80100 q0_full 2", "tick 1"]
    assert read(made, *lines, *lines) == [{"192.168.1.0/24": {"": 5, "q0_full": 2}}] * 2
    lines = ["syn 0 20010db800010000 0 5", "tick 900000000000"]
    assert read(made, *lines) == [{"2001:db8:1::/48": {"": 5}}]
    assert not made.late


def test_late() -> None:
    """A heartbeat that comes after a set's rest is over is noticed: events may be lost."""
    made = Senders()
    read(made, *FIRST, "set 10", "set 11", f"tick {8 * 10**9}")
    assert not made.late
    read(made, f"tick {17 * 10**9}")
    assert made.late


def test_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """If there are too many senders, the smallest are summed as others, and no event is lost."""
    monkeypatch.setattr(senders, "_MOST_SENDERS", 10)
    made = Senders()
    for second in range(1, 41):
        read(made, f"syn 0 0 ffff{second:08x} {second}", "syn 1 0 0 1", f"tick {second}")
        assert len(made.totals) <= 2 * 10 + 1
    assert sum(counts[""] for counts in made.totals.values()) == sum(range(1, 41)) + 40
    assert made.totals["0.0.0.40"][""] == 40


WORDS = st.lists(st.sampled_from(["syn", "drop", "set", "tick", "0", "1", "ffff", "q_full", "9"]))


@given(st.lists(st.one_of(WORDS.map(" ".join), st.text(), st.sampled_from(FIRST + SECOND))))
@settings(max_examples=200, deadline=None)
def test_hostile_lines(lines: list[str]) -> None:
    """Lines of dtrace(1) that are not rows are counted, and only printable text is drawn."""
    made = Senders()
    board = Board(made, 22, "")
    for number, line in enumerate(lines):
        if (fresh := made.read(line)) is not None:
            board.tick(float(number), fresh)
    for drawn in board.draw(100, 24):
        assert "".join(text for text, _ in drawn).isprintable()


@pytest.mark.parametrize("line", ["set {}", "syn 0 0 {:x} 1"])
def test_no_end_of_lines(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More lines than a program prints between two heartbeats are bad, and are not stored."""
    monkeypatch.setattr(senders, "_MOST_LINES", 100)
    made = Senders()
    assert read(made, *(line.format(number) for number in range(300))) == []
    assert made.bad_rows == 200
    assert len(read(made, "tick 1")) == 1
    assert max(len(made.totals), len(made._sets)) in (2, 100)
    read(made, *FIRST)
    assert made.bad_rows == 200


def test_no_end_of_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a set grow without end from one heartbeat to the next; its known rows go on."""
    monkeypatch.setattr(senders, "_MOST_LINES", 100)
    made = Senders()
    for tick in range(10):
        rows = (f"syn 0 {tick:x} {number:x} 1" for number in range(98))
        read(made, "set 1", *rows, f"tick {tick}")
    assert [*map(len, made._sets.values())] == [100]
    assert made.bad_rows == 980 - 100
    assert read(made, "set 1", "syn 0 0 0 5", "tick 10") == [{"::": {"": 4}}]


def test_no_end_of_heartbeats_in_a_moment() -> None:
    """The table keeps 60,000 heartbeats and senders at most, however many come in a moment."""
    board = Board(Senders(), 22, "")
    for at in range(1000):
        board.tick(at / 1000, {f"{at}-{number}": Counter({"": 1}) for number in range(1000)})
    assert sum(1 + len(fresh) for _, fresh in board._ticks) == 59 * 1001


def test_board() -> None:
    """Rates are over the last seconds, and the busiest sender comes first."""
    made = Senders()
    board = Board(made, 22, "")
    for at, lines in enumerate((FIRST, SECOND, THIRD), 100):
        for line in lines:
            if (fresh := made.read(line)) is not None:
                board.tick(float(at), fresh)
    head, title, *rows, _ = ["".join(text for text, _ in line) for line in board.draw(100, 24)]
    assert head[9:] == "3 senders, by syns downwards; port 22"
    assert title.split() == ["SENDER", "SYN/s", "DROP/s", "SYNS", "DROPS", "Q_FULL", "OTHER"]
    assert [row.split() for row in rows] == [
        [OTHERS, "3.5", "0", "7", "0", "-", "-"],
        [V6, "2.0", "0.5", "4", "1", "-", "1"],
        [V4, "1.0", "0", "7", "2", "2", "-"],
    ]
    assert len(board.draw(20, 3)) == 3


def rows_of(text: str) -> list[dict[str, str]]:
    """Return the rows of a CSV text, by column name."""
    return [*csv.DictReader(StringIO(text))]


def test_csv(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """Without a terminal the output is CSV: what each sender sent in each second."""
    saved = tmp_path / "start.json"
    steps = [{"save": str(saved)}, {"print": [*FIRST, *SECOND, *THIRD]}, {"exit": 0}]
    path = write(tmp_path / "c.yml", fake_dtrace(*steps))
    done = run("--config.file", path, "trace", "22", "--top", "--networks")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == ",".join(HEADER)
    found = Counter[str]()
    for row in rows_of(done.stdout):
        found[row["Source"]] += int(row["SYNs"])
    assert found == {"192.168.1.2/24": 7, "2001:db8::1/48": 4, OTHERS: 7}
    text = json.loads(saved.read_text(encoding="utf-8"))["program"]
    assert "linux_senders.d - who sends SYNs" in text
    for line in ("int PORT = 22;", "int NETS = 1;", "int64_t TURN = 10000000000;"):
        assert f"inline {line}" in text


def test_lines_that_are_no_rows(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """The first line that is not a row is shown, and the rest are only counted."""
    steps = [{"print": ["nonsense\x1b[2J", "more", *FIRST]}, {"exit": 0}]
    done = run(
        "--config.file", write(tmp_path / "c.yml", fake_dtrace(*steps)), "trace", "22", "--top"
    )
    assert done.stderr == "dtrace-exporter: not a row: nonsense [2J\n"
    assert done.stdout.endswith(f",{V4},5,2,0,0\n")


def test_until_a_signal(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """A signal ends the command, and what dtrace(1) had printed is shown."""
    path = write(tmp_path / "c.yml", fake_dtrace({"print": FIRST}, {"sleep": 60}))
    command = [*EXPORTER, "--config.file", str(path), "trace", "22", "--top"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == ",".join(HEADER) + "\n"
        assert process.stdout.readline().endswith(f",{V4},5,2,0,0\n")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_on_a_terminal(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """A terminal shows a table, redrawn, with dtrace(1)'s messages in its head; q ends it."""
    more = tmp_path / "more"
    steps = [{"print": FIRST}, {"wait": str(more)}, {"print": SECOND}]
    steps += [{"stderr": "dtrace: 5 aggregation drops on CPU 0"}, {"sleep": 60}]
    path = write(tmp_path / "c.yml", fake_dtrace(*steps))
    with on_terminal([*EXPORTER, "--config.file", str(path), "trace", "22", "--top"], 100) as seen:
        before = seen.modes()
        seen.wait_drawn("1 senders, by syns downwards; port 22")
        more.touch()
        seen.wait_drawn("3 senders.*dtrace: 5 aggregation drops on CPU 0")
        seen.type("<")
        seen.wait_drawn("by sender upwards")
        assert [line.split()[0] for line in seen.drawn[2:5]] == [V4, V6, OTHERS]
        seen.type("q")
        seen.wait(r"\x1b\[\?25h\x1b\[\?1049l")
        until(lambda: seen.modes() == before, "the terminal is as it was")
        assert seen.end() == 0
    # The message is printed again after the table is gone.
    assert "dtrace: 5 aggregation drops on CPU 0" in seen.text.rpartition("\x1b[?1049l")[2]


def test_that_ends(tmp_path: Path, fake_dtrace: FakeDTrace) -> None:
    """If dtrace(1) may not trace, the command ends with the reason and status 2."""
    path = write(tmp_path / "c.yml", fake_dtrace({"unprivileged": True}))
    with on_terminal([*EXPORTER, "--config.file", str(path), "trace", "22", "--top"], 100) as seen:
        assert seen.end() == 2
    assert "run as root" in seen.text.rpartition("\x1b[?1049l")[2]
    done = run("--config.file", path, "trace", "22", "--top")
    assert done.returncode == 2
    assert "run as root" in done.stderr


def test_networks_needs_top() -> None:
    """An option that only --top has is an error without --top."""
    done = run("trace", "22", "--networks")
    assert done.returncode == 2
    assert "--networks needs --top" in done.stderr
