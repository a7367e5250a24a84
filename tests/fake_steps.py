"""The steps that most tests give to the fake dtrace(1), and the type of its fixture."""

from __future__ import annotations

from collections.abc import Callable

FakeDTrace = Callable[..., list[str]]

READY = {"ready": "1"}
FOREVER = {"tick": True}
