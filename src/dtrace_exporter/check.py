"""The check command: what works here, what does not, why, and what to do about it."""

from __future__ import annotations

import logging
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal, TextIO

from dtrace_exporter import families, inet_diag, permissions, terminal
from dtrace_exporter.config import Config
from dtrace_exporter.listeners import SessionId
from dtrace_exporter.service import Service
from dtrace_exporter.tracing import dtrace, session
from dtrace_exporter.tracing.session import Session

_EXACT = families.Part(
    what="nothing is missed, whatever interrupts",
    without="SYNs, drops, completions and accepts may be missing in the counters under load",
)

_UNSAFE = (
    "who changes it decides what the exporter runs: have it and its directories belong to root, and"
    f" chmod go-w them; root takes them as they are with {permissions.FLAG}"
)
_FAR = (
    r"publickey|[Hh]ost key|Connection (refused|timed out|closed)|No route|resolve hostname"
    r"|not responding"
)
_REMEDIES = {
    _FAR: "try the command by hand, as the exporter's user: {command}",
    r"Argument list too long": "Linux has room for 19 sessions that count SYNs, fewer where others"
    " trace the same functions: one for all ports is dtrace.session: shared",
    r"DIF program exceeds maximum program size": "the kernel takes no program of this size: let it,"
    " with set dtrace:dtrace_dof_maxsize=0x80000 in /etc/system, and boot",
    r"DIF program content is invalid|[Ii]nsufficient (tuple )?registers": "this DTrace has too few"
    " registers for the program: report it, with uname -a and dtrace -V",
    r"Destructive actions not allowed": "the program may only look: take system(), copyout()"
    " and the like out of it",
    r"run as root|[Pp]rivilege|Permission denied": "be root on Linux; on Solaris and illumos have"
    " the privilege dtrace_kernel",
    r"No such file|not found|cannot start": "install DTrace, as docs/getting-dtrace.md says for"
    " each system, or name its path in dtrace.command",
    r"": "see what dtrace(1) says by hand: dtrace-exporter program >listen.d;"
    " {command} -s /dev/stdin <listen.d",
}
"""What to do about a reason in which the pattern is found; the first that is."""

Result = Literal["ok", "no", "FAIL"]
Say = Callable[[Result, str, str, str], None]
_STYLES = {"ok": "green", "no": "yellow", "FAIL": "red"}
_INDENT = 30


async def check(
    config: Config,
    out: TextIO,
    faults: Sequence[str] = (),
    *,
    refuse: bool = False,
    quiet: bool = False,
) -> int:
    """Try out a configuration that was read without a fault, and print the findings.

    The sessions are started as the service starts them, and ended as soon as each is up or has
    said why it is not. A line has a result, ``ok``, ``no`` for an optional part that is left out,
    or ``FAIL``, then what it is about, and what was found; lines that begin with an arrow say what
    to do or what the line above costs. A terminal gets it wrapped and in colour.

    Args:
        config: what to try out.
        out: where the findings go.
        faults: by whom else files of it can be changed.
        refuse: whether the service would not start because of that; then nothing else is tried.
        quiet: log nothing of the sessions, which is said anyway.

    Returns:
        The exit status: 0 where the service would export what the configuration asks for.
    """
    say = _speaker(out)
    command = config.local.dtrace.command
    say("ok", "configuration", "no mistakes", "")
    for fault in faults:
        say("FAIL" if refuse else "no", "files", fault, _UNSAFE)
    if faults and refuse:
        return 1
    here = config.source != "sock_diag" and await _try_dtrace(say, command)
    instead = config.source == "auto" and not here and sys.platform == "linux"
    if config.source == "sock_diag" or instead:
        here = _try_sock_diag(say, command)
        tried = not config.hosts
    else:
        tried = not (here or config.hosts)
    if tried:
        return 0 if here else 1
    with _quiet() if quiet else nullcontext():
        return 0 if await _try_sessions(say, config) and here else 1


async def _try_dtrace(say: Say, command: Sequence[str]) -> bool:
    """Say whether this host's dtrace(1) may be used, and return it."""
    version = await dtrace.version(command)
    refusal = await dtrace.attempt(command)
    if refusal:
        say("FAIL", "dtrace(1)", refusal, _remedy(refusal, command))
    else:
        say("ok", "dtrace(1)", f"version {version or 'unknown'}, may be used", "")
    return not refusal


def _try_sock_diag(say: Say, command: Sequence[str]) -> bool:
    """Say what the kernel tells without DTrace, and return whether it does."""
    try:
        text = f"used instead: Q0, Q, Qmax and drops of {len(inet_diag.listeners())} sockets"
    except OSError as error:
        say("FAIL", "sock_diag", str(error), _remedy(str(error), command))
        return False
    say("ok", "sock_diag", text, "")
    return True


async def _try_sessions(say: Say, config: Config) -> bool:
    """Start the sessions as the service does, say how each does, and return whether all are up."""
    running = Service(None, config)
    try:
        await running.start()
        up: dict[SessionId, bool] = {}
        # A host that is asked which program it needs may get one more.
        while left := [one for name, one in running.sessions.items() if name not in up]:
            for each in left:
                await each.settled.wait()
                up[each.id] = _tell(say, each)
        return all(up.values())
    finally:
        await running.stop()


@contextmanager
def _quiet() -> Iterator[None]:
    """Have nothing of the sessions in the log."""
    log = logging.getLogger(session.__name__)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _tell(say: Say, tried: Session) -> bool:
    """Say how it went with a session and with its optional parts, and return whether it is up."""
    host, name = tried.id
    where = f"session {host}/{name}" if host else f"session {name}"
    status = tried.status
    if status.up:
        say("ok", where, "up", "")
    else:
        say("FAIL", where, status.reason, _remedy(status.reason, tried.plan.dtrace.command))
    parts = {**tried.parts, session.EXACT: _EXACT}
    for feature, enabled in status.features.items():
        if enabled:
            say("ok", f"  {feature}", parts[feature].what if feature in parts else "", "")
        else:
            say(
                "no",
                f"  {feature}",
                tried.left_out[feature],
                parts[feature].without if feature in parts else "",
            )
    return status.up


def _speaker(out: TextIO) -> Say:
    paint, columns = terminal.painter(out), terminal.width(out)
    if columns:
        out.write(paint(f"{'':<6}{'What':<24}Found", "bold") + "\n")

    def say(result: Result, what: str, found: str, advice: str) -> None:
        lines = _wrapped(terminal.printable(found), columns)
        out.write(f"{paint(f'{result:<6}', _STYLES[result])}{what:<23} {lines[0]}\n")
        if advice:
            first, *rest = _wrapped(terminal.printable(advice), columns - 3)
            lines += [paint(f"-> {first}", "bold"), *(paint(f"   {each}", "bold") for each in rest)]
        out.writelines(f"{'':<{_INDENT}}{line}\n" for line in lines[1:])
        out.flush()

    return say


def _wrapped(text: str, columns: int) -> list[str]:
    """Break a text between words as a terminal has room for it, and never anywhere else."""
    room = columns - _INDENT
    if room < 20:
        return [text]
    return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [text]


def _remedy(reason: str, command: Sequence[str]) -> str:
    advice = next(advice for pattern, advice in _REMEDIES.items() if re.search(pattern, reason))
    return advice.format(command=shlex.join(command))
