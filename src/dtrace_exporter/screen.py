"""A terminal that is redrawn every second and restored at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import termios
import tty
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TextIO

from dtrace_exporter import terminal

Line = Sequence[tuple[str, str]]
"""The texts of a line, each with the name of its style or an empty string."""
LEFT, RIGHT = "left", "right"
"""The names of the arrow keys."""

# xterm's control sequences: the alternate screen and back, and the cursor off and on.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _CLEAR_LINE, _CLEAR_REST = "\x1b[H", "\x1b[K", "\x1b[J"
_KEYS = re.compile(r"\x1b[\[O][A-Z]|.", re.DOTALL)
_NAMES = {"\x1b[D": LEFT, "\x1bOD": LEFT, "\x1b[C": RIGHT, "\x1bOC": RIGHT}
_SECONDS = 1.0
_LEAST_PAUSE = 0.1


def can_show(out: TextIO) -> bool:
    """Return whether an output is a terminal that is not dumb."""
    return terminal.width(out) > 0 and os.environ.get("TERM", "dumb") != "dumb"


async def show(
    out: TextIO,
    draw: Callable[[int, int], Sequence[Line]],
    pressed: Callable[[str], None],
    renew: Callable[[], Awaitable[None]],
) -> None:
    """Show something until q, Ctrl-C or a signal ends it. Nothing is logged meanwhile.

    Args:
        out: the terminal.
        draw: is given the terminal's columns and rows, and returns the lines. What does not fit is
            cut off.
        pressed: is given each key but q: a letter, LEFT or RIGHT.
        renew: is awaited every second before the lines are drawn. Its exceptions are passed on.

    Raises:
        OSError: the terminal is gone.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    paint = terminal.painter(out)

    def redraw() -> None:
        columns, rows = os.get_terminal_size(out.fileno())
        lines = draw(columns or 80, rows or 24)[: rows or 24]
        shown = (_CLEAR_LINE + _cut(line, columns or 80, paint) for line in lines)
        _write(out, _HOME + "\n".join(shown) + _CLEAR_REST)

    def typed() -> None:
        data = os.read(sys.stdin.fileno(), 1024)
        if not data:
            loop.remove_reader(sys.stdin.fileno())
        for key in _KEYS.findall(data.decode(errors="replace")):
            if key == "q":
                stop.set()
                return
            pressed(_NAMES.get(key, key))
        redraw()

    async def renewing() -> None:
        while True:
            began = loop.time()
            await renew()
            redraw()
            await asyncio.sleep(max(_SECONDS - (loop.time() - began), _LEAST_PAUSE))

    with _taken(out, typed) as (enter, leave):

        def suspend() -> None:
            leave()
            # Ctrl-Z: the process stops here until SIGCONT.
            signal.raise_signal(signal.SIGSTOP)
            enter()
            redraw()

        handlers = dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), stop.set)
        handlers |= {signal.SIGWINCH: redraw, signal.SIGTSTP: suspend}
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        tasks = [asyncio.create_task(stop.wait()), asyncio.create_task(renewing())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[1].done():
                await tasks[1]
        finally:
            for task in tasks:
                task.cancel()
            for number in handlers:
                loop.remove_signal_handler(number)


@contextlib.contextmanager
def _taken(
    out: TextIO, typed: Callable[[], None]
) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Take over the terminal; yields functions that take it over again, and that restore it."""
    keys = sys.stdin.fileno() if sys.stdin.isatty() else None
    modes = termios.tcgetattr(keys) if keys is not None else []

    def enter() -> None:
        if keys is not None:
            tty.setcbreak(keys)
        _write(out, _ENTER)

    def leave() -> None:
        # The terminal may be gone.
        with contextlib.suppress(OSError, termios.error):
            _write(out, _LEAVE)
        with contextlib.suppress(OSError, termios.error):
            if keys is not None:
                termios.tcsetattr(keys, termios.TCSADRAIN, modes)

    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    loop = asyncio.get_running_loop()
    try:
        enter()
        if keys is not None:
            loop.add_reader(keys, typed)
        yield enter, leave
    finally:
        if keys is not None:
            loop.remove_reader(keys)
        leave()
        logging.disable(before)


def _cut(line: Line, columns: int, paint: terminal.Paint) -> str:
    """Return a line in its styles, cut to a number of columns."""
    shown = ""
    for text, style in line:
        part = terminal.printable(text)[:columns]
        columns -= len(part)
        shown += paint(part, style)
    return shown


def _write(out: TextIO, text: str) -> None:
    out.write(terminal.encodable(text, out))
    out.flush()
