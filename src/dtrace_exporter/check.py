"""The check command: what works here, what does not, and why."""

from __future__ import annotations

import sys
from typing import TextIO

from dtrace_exporter import dtrace, sock_diag
from dtrace_exporter.config import Config
from dtrace_exporter.service import Service

FEATURES = {
    "syn_drops": "drops of SYNs, by reason",
    "ack_drops": "drops of final ACKs",
    "established": "connections put into Q",
    "accepts": "connections taken by the application",
    "accept_wait": "time in Q",
    "half_open_end": "Q0 when half-open connections end",
    "open_close": "listeners that come and go",
    "q0_limit": "Q0's limit",
    "zones": "which zone a listener is in",
}
"""What the optional parts of the D programs are for."""


async def check(config: Config, out: TextIO) -> int:
    """Try out a configuration that was read without a fault, and print the findings.

    The sessions are started as the service starts them, and ended as soon as each is up or has
    said why it is not.

    Returns:
        The exit status: 0 where the service would export what the configuration asks for.
    """

    def say(what: str, good: bool, text: str) -> None:
        out.write(f"{'ok' if good else 'FAIL':<6}{what:<24}{text}\n")
        out.flush()

    say("configuration", True, "no mistakes")
    command = config.local.dtrace.command
    good = False
    if config.source != "sock_diag":
        version = await dtrace.version(command)
        refusal = await dtrace.attempt(command)
        good = not refusal
        say("dtrace(1)", good, refusal or f"version {version or 'unknown'}, may be used")
    instead = config.source == "auto" and not good and sys.platform == "linux"
    if config.source == "sock_diag" or instead:
        try:
            text = f"used instead: Q, Qmax and drops of {len(sock_diag.listeners())} sockets"
            good = True
        except (OSError, ImportError) as error:
            text = str(error)
        say("sock_diag", good, text)
        if not config.hosts:
            return 0 if good else 1
    if not (good or config.hosts):
        return 1
    running = Service(None, config)
    await running.start()
    try:
        for name, session in running.sessions.items():
            where = f"{name.host}/{name.name}" if name.host else name.name
            await session.settled.wait()
            good = good and session.status.up
            say(f"session {where}", session.status.up, session.status.reason or "up")
            for feature, enabled in session.status.features.items():
                text = FEATURES.get(feature, "") if enabled else session.left_out[feature]
                out.write(f"{'ok' if enabled else 'no':<6}  {feature:<22}{text}\n")
    finally:
        await running.stop()
    return 0 if good else 1
