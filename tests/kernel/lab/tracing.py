"""The trace command while it runs, and its output."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from lab.exporter import COMMAND, READY_SECONDS, Config
from lab.waiting import until

HEADER = "TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax"


@contextmanager
def tracing(
    port: int,
    directory: Path,
    config: Config | None = None,
    *options: str,
    header: str = HEADER,
) -> Iterator[Path]:
    """Run ``trace PORT`` with its output in a file; the block starts once it traces.

    Args:
        port: the port.
        directory: where to put the output, and the configuration if there is one.
        config: the configuration; None for none.
        options: options of the command.
        header: the first line of the output.
    """
    output = directory / f"{'-'.join(['trace', *options])}.csv"
    given = []
    if config is not None:
        file = directory / "config.yml"
        file.write_text(yaml.safe_dump(config))
        given = [f"--config.file={file}"]
    with output.open("wb") as out:
        process = subprocess.Popen([*COMMAND, "trace", *given, *options, str(port)], stdout=out)
    try:
        until(lambda: header in output.read_text(), "the header is printed", READY_SECONDS)
        yield output
    finally:
        process.terminate()
        process.wait(30)


def rows_of(output: Path) -> list[dict[str, str]]:
    """Return the rows of a trace, each by the names of its columns."""
    with output.open() as lines:
        return list(csv.DictReader(lines))
