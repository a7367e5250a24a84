"""A user's own script under the real DTrace, run as the exporter runs it, but without it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from tempfile import TemporaryFile

from dtrace_exporter.scripts.conversions import conversions
from dtrace_exporter.scripts.reader import Script, read
from dtrace_exporter.scripts.rendering import ADDING, LINUX, new_token, render
from dtrace_exporter.scripts.rows import BadRow, Histogram, Ready, Record, Row, Splitter, Tick
from lab.waiting import until

SECONDS = 400.0
"""The longest that a start or an end may take in a slow guest."""

INTERVAL = 0.5
"""Seconds between two ticks."""

Value = int | Histogram


@dataclass
class Told:
    """The records of one run of a script; values by the aggregation's name and the keys."""

    values: dict[tuple[str, tuple[str, ...]], Value] = field(default_factory=dict)
    finals: int = 0
    ticks: int = 0
    bad: list[BadRow] = field(default_factory=list)
    status: int = 0
    errors: str = ""

    def of(self, name: str) -> dict[tuple[str, ...], Value]:
        """Return the values of an aggregation by its keys."""
        return {keys: value for (found, keys), value in self.values.items() if found == name}


def counts(value: Value) -> Histogram:
    """Return the lines of a table that are not 0."""
    assert isinstance(value, tuple)
    return tuple((low, count) for low, count in value if count)


def compiled(script: Script, arguments: Iterable[str] = ()) -> tuple[tuple[str, ...], ...]:
    """Return the conversions of a script's keys by asking dtrace(1), as the exporter does."""
    command = ["dtrace", *script.flags, "-e", "-s", "/dev/stdin", *arguments]

    async def ask(text: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=STDOUT
        )
        output, _ = await process.communicate(text.encode())
        return process.returncode or 0, output.decode()

    return asyncio.run(conversions(script, ask))


def likely(script: Script) -> tuple[tuple[str, ...], ...]:
    """Return the conversions of a script if its keys have the types that they seem to have."""

    async def ask(_: str) -> tuple[int, str]:
        return 0, ""

    return asyncio.run(conversions(script, ask))


def run(
    text: str,
    during: Callable[[], object],
    *arguments: object,
    options: Iterable[str] = (),
    ask: bool = False,
    ends_itself: bool = False,
) -> Told:
    """Run a script.

    Args:
        text: the script.
        during: is called while it runs; the tick after that ends it.
        arguments: the script's arguments.
        options: more words for dtrace(1).
        ask: whether to ask dtrace(1) for the types of keys, and not to guess them.
        ends_itself: whether the script ends by itself after that.
    """
    script = read("script.d", text)
    words = [str(each) for each in arguments]
    letters = compiled(script, words) if ask else likely(script)
    token = new_token()
    program = render(script, letters, engine=LINUX, interval=INTERVAL, token=token)
    splitter = Splitter(script, letters, LINUX, token)
    command = ["dtrace", *script.flags, *options, "-s", "/dev/stdin", *words]
    with TemporaryFile() as errors:
        process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=errors)
        assert process.stdin is not None
        process.stdin.write(program.encode())
        process.stdin.close()
        told, ready = Told(), threading.Event()
        names = [each.name for each in script.aggregations]
        adding = [each.function in ADDING for each in script.aggregations]
        base: dict[tuple[str, tuple[str, ...]], int] = {}

        def take(record: Record) -> None:
            match record:
                case Ready():
                    ready.set()
                case Tick():
                    told.ticks += 1
                case BadRow():
                    told.bad.append(record)
                case Row(aggregation, keys, value, final):
                    each = names[aggregation], keys
                    total = value + base.get(each, 0) if isinstance(value, int) else value
                    told.values[each] = total
                    told.finals += final
                    if final and adding[aggregation] and isinstance(total, int):
                        base[each] = total

        def read_all() -> None:
            assert process.stdout is not None
            while chunk := os.read(process.stdout.fileno(), 1 << 16):
                for record in splitter.feed(chunk):
                    take(record)

        def ended() -> bool:
            return process.poll() is not None

        reader = threading.Thread(target=read_all)
        reader.start()
        try:
            until(lambda: ready.is_set() or ended(), "it begins", SECONDS)
            if not ended():
                during()
            if not ends_itself:
                ticks = told.ticks
                until(lambda: told.ticks > ticks or ended(), "a tick comes", SECONDS)
                process.terminate()
            told.status = process.wait(SECONDS)
        finally:
            process.kill()
            process.wait()
            reader.join()
        errors.seek(0)
        told.errors = errors.read().decode(errors="replace")
        assert ready.is_set(), told.errors
        return told
