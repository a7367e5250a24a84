"""The messages of dtrace(1) on standard error are classified by their meaning."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter.state import LOST_KINDS
from dtrace_exporter.tracing.diagnostics import MAX_TEXT, Diagnostic, classify

U64 = (1 << 64) - 1

LOST = [
    ("dtrace: 186893 drops on CPU 0", "principal", 186893),
    ("dtrace: 1 drop on CPU 127", "principal", 1),
    ("dtrace: 2 aggregation drops on CPU 3", "aggregation", 2),
    ("dtrace: 1 aggregation drop on CPU 0", "aggregation", 1),
    ("dtrace: 7 dynamic variable drops", "dynamic_variable", 7),
    ("dtrace: 1 dynamic variable drop with non-empty rinsing list", "dynamic_variable", 1),
    ("dtrace: 9 dynamic variable drops with non-empty dirty list", "dynamic_variable", 9),
    ("dtrace: 4 speculative drops", "speculation", 4),
    ("dtrace: 1 failed speculation (available buffer(s) still busy)", "speculation", 1),
    ("dtrace: 3 failed speculations (no speculative buffer available)", "speculation", 3),
    (f"dtrace: {U64} drops on CPU 0", "principal", U64),
]


@pytest.mark.parametrize("tag", ["", "[DTRACEDROP_PRINCIPAL] ", "[DTRACEDROP_UNKNOWN] "])
@pytest.mark.parametrize(("line", "lost", "count"), LOST)
def test_losses(line: str, lost: str, count: int, tag: str) -> None:
    """Each form of loss has its kind and number, with and without a drop tag."""
    line = line.replace("dtrace: ", f"dtrace: {tag}")
    assert classify(line + "\n") == Diagnostic("lost", lost, count, line)
    assert lost in LOST_KINDS


FAULTS = [
    (
        "dtrace: error on enabled probe ID 2 (ID 14571: fbt:ip:tcp_conn_request:entry): "
        "invalid address (0x0) in action #1 at DIF offset 16"
    ),
    "dtrace: error on enabled probe ID 9 (ID 1: dtrace:::BEGIN): divide-by-zero in predicate",
    (
        "dtrace: error on enabled probe ID 3 (ID 1: dtrace:::BEGIN): invalid address (0x0) "
        "in action #1 at BPF pc 142"
    ),
    (
        "dtrace: error in dt_clause_8 for probe ID 1 (dtrace:::BEGIN): "
        "invalid address (0x40) at BPF pc 271"
    ),
    (
        "dtrace: error in dt_clause_0 for probe ID 77 (fbt:vmlinux:tcp_conn_request:entry): "
        "[DTRACEFLT_BADADDR] invalid address"
    ),
]


@pytest.mark.parametrize("line", FAULTS)
def test_faults(line: str) -> None:
    """An error inside a clause is one fault, in illumos' and in Linux' wording."""
    assert classify(line) == Diagnostic("fault", "", 1, line)


def test_faults_in_the_error_probe() -> None:
    """Faults inside an ERROR clause are reported as a number."""
    line = "dtrace: [DTRACEDROP_DBLERROR] 5 errors in ERROR probe enabling"
    assert classify(line) == Diagnostic("fault", "", 5, line)


FATAL = [
    "dtrace: processing aborted: Abort due to systemic unresponsiveness",
    "dtrace: processing aborted: Abort due to drop",
    "dtrace: failed to initialize dtrace: DTrace requires additional privileges",
    "dtrace: failed to compile script /dev/stdin: line 3: no symbol tcp_conn_req",
    "dtrace: failed to enable '/dev/stdin': Out of memory",
    "dtrace: failed to set -x agsize: Invalid option name",
    "dtrace: could not enable tracing: Failed to enable fbt:vmlinux:x: Operation not supported",
    "dtrace: couldn't stop tracing: Interrupted system call",
    (
        "dtrace: invalid probe specifier bogus:::x: probe description bogus:::x "
        "does not match any probes"
    ),
    "dtrace: no probes matched",
    "dtrace: no probes specified",
    "dtrace: run as root for tracing and listing probes",
    "dtrace: extraneous argument '22' ($1 is not referenced)",
]


@pytest.mark.parametrize("line", FATAL)
def test_fatal(line: str) -> None:
    """A message with which dtrace(1) gives up is fatal."""
    assert classify(line) == Diagnostic("fatal", "", 0, line)


NOTICES = [
    "",
    "dtrace: buffer size lowered to 1m",
    "dtrace: aggregation size lowered to 524288 bytes",
    "dtrace: cleaning rate reduced to 11 hz",
    "dtrace: script '/dev/stdin' matched 12 probes",
    "dtrace: allowing destructive actions",
    "dtrace: 3 jstack()/ustack() string table overflows",
    f"dtrace: {U64 + 1} drops on CPU 0",
    f"dtrace: {10**30} aggregation drops on CPU 0",
    "dtrace: -1 drops on CPU 0",
    "dtrace: \u0661 drops on CPU 0",
    "dtrace: 5 drops on CPU 0, or so",
    "5 drops on CPU 0",
    "ssh: connect to host sol10-u9 port 22: Connection refused",
    "the program says: dtrace: no probes matched",
]


@pytest.mark.parametrize("line", NOTICES)
def test_notices(line: str) -> None:
    """Any other line is a notice, also lines of other programs and impossible numbers."""
    assert classify(line) == Diagnostic("notice", "", 0, line)


def test_text_is_fit_to_log() -> None:
    """Control characters and lone surrogates are removed, and a long message is cut."""
    assert classify("dtrace: a\x1b[31mb\x00\u202ec\udc80\r\n").text == "dtrace: a [31mb  c"
    long = classify("dtrace: failed to " + "x" * 10_000)
    assert long.kind == "fatal"
    assert long.text == ("dtrace: failed to " + "x" * 10_000)[: MAX_TEXT - 3] + "..."


pieces = st.sampled_from(
    ["dtrace: ", "[DTRACEDROP_X] ", "5 ", "aggregation ", "drop", "s", " on CPU ", "error in ", "("]
)


@given(st.text(st.characters()) | st.lists(pieces | st.text(max_size=3)).map("".join))
def test_any_line(line: str) -> None:
    """Any text is classified, and every result is within bounds."""
    diagnostic = classify(line)
    assert (diagnostic.kind == "lost") == (diagnostic.lost in LOST_KINDS)
    assert 0 <= diagnostic.count <= U64
    assert diagnostic.text.isprintable()
    assert len(diagnostic.text) <= MAX_TEXT
