"""Handshakes in threads: whom others keep waiting."""

from __future__ import annotations

import asyncio
import threading

import pytest

from dtrace_exporter.web import handshakes
from dtrace_exporter.web.handshakes import Handshakes

STRANGERS = [f"192.0.2.{number}" for number in range(32)]
"""Twice as many as there are places."""


async def test_who_was_costly_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts that have had a costly handshake do not take the places of new hosts."""
    running = Handshakes()
    monkeypatch.setattr(handshakes, "_COSTLY_SECONDS", -1.0)
    for host in STRANGERS:
        await running.run(host, lambda: None)
    end = threading.Event()

    def call() -> None:
        end.wait()

    costly = [asyncio.create_task(running.run(host, call)) for host in STRANGERS]
    try:
        await asyncio.wait_for(running.run("198.51.100.1", lambda: None), 60)
    finally:
        end.set()
    await asyncio.gather(*costly)
