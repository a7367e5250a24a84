"""Commands on a terminal that a test controls."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SECONDS = 60


class Screen:
    """The terminal of a command: its output in ``text``, and what a test types.

    The terminal puts a carriage return before each line feed.
    """

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self.text = ""
        self._master = master
        self._process = process

    def wait(self, pattern: str) -> None:
        """Wait until the text matches a pattern."""
        self._read(lambda: re.search(pattern, self.text) is not None)
        assert re.search(pattern, self.text), self.text

    def type(self, text: str) -> None:
        """Type a text; the third character of ASCII is Ctrl-C."""
        os.write(self._master, text.encode())

    @property
    def drawn(self) -> list[str]:
        """The lines of the newest complete drawing of a redrawn screen, without escapes."""
        drawing = self.text.rpartition("\x1b[J")[0].rpartition("\x1b[H")[2]
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawing).split("\r\n")

    def wait_drawn(self, pattern: str) -> None:
        """Wait until the newest drawing matches a pattern."""
        self._read(lambda: re.search(pattern, "\n".join(self.drawn)) is not None)
        assert re.search(pattern, "\n".join(self.drawn)), self.drawn

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of the terminal."""
        termios.tcsetwinsize(self._master, (rows, columns))

    def modes(self) -> list[object]:
        """Return the settings of the terminal, such as echo."""
        return termios.tcgetattr(self._master)

    def state(self) -> str:
        """Return the letter of the command's state, as ps(1) shows it."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8")
        return stat.rpartition(")")[2].split()[0]

    def signal(self, number: int) -> None:
        """Send the command a signal."""
        self._process.send_signal(number)

    def end(self) -> int:
        """Wait for the command's end and return its status."""
        self._read(lambda: False)
        return self._process.wait(SECONDS)

    def _read(self, enough: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not enough() and time.monotonic() < deadline:
            if select.select([self._master], [], [], 1)[0]:
                try:
                    data = os.read(self._master, 1 << 16)
                except OSError:
                    # Linux reports in this way that nobody has the terminal open any more.
                    return
                if not data:
                    return
                self.text += data.decode()


@contextmanager
def on_terminal(command: Sequence[str], columns: int, **environment: str) -> Iterator[Screen]:
    """Run a command on a terminal of its own with this width."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (25, columns))
    with subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm", "NO_COLOR": "", **environment},
        start_new_session=True,
        # Ctrl-C becomes a signal only on the controlling terminal of a session.
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
    ) as process:
        os.close(slave)
        try:
            yield Screen(master, process)
        finally:
            if process.poll() is None:
                process.kill()
            os.close(master)
