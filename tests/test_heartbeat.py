"""When a session has been silent for too long, and when its rows come too late."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from dtrace_exporter.tracing.heartbeat import SLICE, START_SECONDS, Heartbeat

PATIENCE = 10.0

Wait = Callable[[float], None]


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Wait:
    """Return a function that lets time pass."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def seconds(count: float) -> None:
        now[0] += count

    return seconds


def tick() -> int:
    """Return the time of a heartbeat at this moment."""
    return round(time.monotonic() * 1e9)


def looks(heartbeat: Heartbeat, wait: Wait, *, is_up: bool) -> tuple[float, str]:
    """Look once each slice until there is a complaint; return the seconds and the complaint."""
    began = time.monotonic()
    while not (late := heartbeat.look([], is_up=is_up)):
        wait(SLICE)
    return time.monotonic() - began, late


@pytest.mark.parametrize(
    ("is_up", "limit", "said"),
    [
        (True, PATIENCE, f"no heartbeat for {PATIENCE:g} s"),
        (False, START_SECONDS, f"not ready after {START_SECONDS:g} s"),
    ],
)
def test_silence(is_up: bool, limit: float, said: str, wait: Wait) -> None:
    """Silence is reported at the first look after the limit; a session that starts has its own."""
    after, late = looks(Heartbeat(PATIENCE), wait, is_up=is_up)
    assert late == said
    assert limit < after <= limit + SLICE


def test_a_sign_of_life(wait: Wait) -> None:
    """Silence is measured from the last heartbeat."""
    heartbeat = Heartbeat(PATIENCE)
    for _ in range(5):
        wait(PATIENCE - SLICE)
        assert not heartbeat.look([tick()], is_up=True)
    assert looks(heartbeat, wait, is_up=True)[0] > PATIENCE


def test_our_own_sleep(wait: Wait) -> None:
    """Time in which this process itself slept, as on a suspended machine, is not silence."""
    heartbeat = Heartbeat(PATIENCE)
    wait(3600)
    assert not heartbeat.look([], is_up=True)
    wait(SLICE)
    assert not heartbeat.look([tick()], is_up=True)


@pytest.mark.parametrize(("late", "said"), [(PATIENCE, ""), (PATIENCE + 1, "rows come 11 s late")])
def test_late_rows(late: float, said: str, wait: Wait) -> None:
    """Rows may lag behind the promptest one by the limit of silence, and no more."""
    heartbeat = Heartbeat(PATIENCE)
    wait(5)
    prompt = tick()
    wait(2)
    # The clocks of two hosts differ, so rows are compared with the promptest one.
    assert not heartbeat.look([prompt], is_up=True)
    then = tick()
    wait(late + 2)
    assert heartbeat.look([then], is_up=True) == said
