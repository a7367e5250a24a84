#!/usr/bin/env python3
"""Fuzzes the readers of foreign input, guided by coverage: ``fuzz.py TARGET SECONDS``.

It starts with the inputs in tests/seeds/TARGET, ends with the first one that fails, and writes that
one there; tests/test_seeds.py tries all of them again. It needs atheris, from the extra ``fuzz``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

SEEDS = Path(__file__).with_name("seeds")


def rows_target() -> Callable[[bytes], None]:
    """Rows of any kernel: each line is a row or a RowError, and the tally counts the rows."""
    from dtrace_exporter.limits import LimitError
    from dtrace_exporter.listeners import ListenerTable, SessionId
    from dtrace_exporter.tracing import rows
    from dtrace_exporter.tracing.lines import MAX_LINE, LineSplitter
    from dtrace_exporter.tracing.tally import Tally
    from dtrace_exporter.watched import Watched

    session = SessionId("", "all")

    def split(data: bytes) -> list[str]:
        whole = LineSplitter()
        lines = whole.feed(data) + whole.end()
        assert all(len(line) <= MAX_LINE for line in lines)
        if len(data) <= MAX_LINE:
            parts = LineSplitter()
            middle = len(data) // 2
            found = parts.feed(data[:middle]) + parts.feed(data[middle:]) + parts.end()
            assert found == lines
        return lines

    def check(data: bytes) -> None:
        table = ListenerTable()
        table.watch(session, Watched())
        tally = Tally(table, session)
        for line in split(data):
            try:
                record = tally.feed(line)
            except (rows.RowError, LimitError):
                continue
            if isinstance(record, rows.Tick):
                list(tally.settle(record))
        for listener in table:
            assert 0 <= listener.identity.port < 1 << 64
            assert listener.identity.address == "*" or ip_address(listener.identity.address)
            assert listener.syns == sum(listener.saturation)
            assert all(count >= 0 for count in (*listener.saturation, *listener.waits))
            assert all(length.q is None or length.q >= 0 for length in listener.sockets.values())

    return check


def stderr_target() -> Callable[[bytes], None]:
    """Messages: each has a kind, a printable text and a count that DTrace can have."""
    from dtrace_exporter.tracing import diagnostics

    def check(data: bytes) -> None:
        found = diagnostics.classify(data.decode("utf-8", "replace"))
        assert found.text.isprintable()
        assert len(found.text) <= diagnostics.MAX_TEXT
        assert 0 <= found.count < 1 << 64
        assert bool(found.lost) == (found.kind == "lost")

    return check


def config_target(*, web: bool = False) -> Callable[[bytes], None]:
    """Files: each is a configuration, or gives one printable line that starts with its name."""
    from dtrace_exporter import config
    from dtrace_exporter.web import configuration

    load: Callable[[Path], object] = configuration.load if web else config.load
    path = Path(tempfile.mkdtemp()) / "fuzz.yml"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            load(path)
        except config.ConfigError as error:
            message = str(error)
            assert message.isprintable(), message
            assert message.startswith(str(path)), message

    return check


def web_config_target() -> Callable[[bytes], None]:
    """Web configuration files: as for configuration files."""
    return config_target(web=True)


TARGETS = {
    "rows": rows_target,
    "stderr": stderr_target,
    "config": config_target,
    "web_config": web_config_target,
}


def main() -> None:
    """Fuzz the target of the command line."""
    import atheris

    name, seconds = sys.argv[1:]
    with atheris.instrument_imports(include=["dtrace_exporter", "yaml"]):
        check = TARGETS[name]()
    seeds = SEEDS / name
    found = tempfile.mkdtemp()
    atheris.Setup(
        [
            *(sys.argv[0], f"-max_total_time={seconds}", f"-artifact_prefix={seeds}/"),
            *("-max_len=4096", "-timeout=10", "-rss_limit_mb=1024", "-verbosity=1"),
            *(found, str(seeds)),
        ],
        check,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
