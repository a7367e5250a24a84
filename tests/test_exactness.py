"""The reasons why a session on this host may miss events."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrace_exporter.tracing import exactness

KPROBES = "p:dt_{pid}_fbt_vmlinux/tcp_conn_request tcp_conn_request\n"


@pytest.mark.parametrize(
    ("realtime", "kprobes", "words"),
    [
        (None, None, ""),
        ("0\n", "", ""),
        ("1\n", "", "PREEMPT_RT"),
        (None, KPROBES.format(pid=7), "kprobes"),
        ("0\n", KPROBES.format(pid=77), ""),
    ],
    ids=["nothing to read", "all is well", "PREEMPT_RT", "kprobes", "kprobes of another one"],
)
def test_why_not(
    realtime: str | None,
    kprobes: str | None,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PREEMPT_RT and kprobes of the session's own process are reasons; other kprobes are not."""
    for name, text in (("REALTIME", realtime), ("KPROBES", kprobes)):
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(exactness, name, path)
    why = exactness.why_not(7)
    assert (words in why, bool(why)) == (True, bool(words))
