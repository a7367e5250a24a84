"""Fixtures of the cases; they run inside a guest, see ../guest.py."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

pytest.register_assert_rewrite("lab")

from lab.exporter import Exporter  # noqa: E402
from lab.traffic import (  # noqa: E402
    Clients,
    HeldBack,
    Listener,
    network_namespace,
    nowhere,
)
from lab.witness import SynCounter  # noqa: E402

_ports = itertools.count(7001)


@pytest.fixture
def port() -> int:
    """Return a port that no other case uses."""
    return next(_ports)


@pytest.fixture(scope="session")
def ports() -> Callable[[int], list[int]]:
    """Return a function that gives ports no other case uses."""
    return lambda count: list(itertools.islice(_ports, count))


@pytest.fixture(scope="session")
def kernel() -> tuple[int, int]:
    """Return the kernel's version, such as (6, 12)."""
    major, minor = platform.release().split(".")[:2]
    return int(major), int(minor)


@pytest.fixture
def exporter() -> Iterator[Callable[..., Exporter]]:
    """Return a function that starts an exporter and waits until it is ready."""
    with ExitStack() as stack:

        def start(config: Any = None, *, ready: bool = True, **options: Any) -> Exporter:
            made = Exporter(config, **options)
            stack.callback(made.stop)
            if ready:
                made.wait_ready()
            return made

        yield start


@pytest.fixture(scope="session")
def everything() -> Iterator[Exporter]:
    """Return an exporter that watches every listener of the host; all cases share it."""
    made = Exporter({"source": "dtrace", "dtrace": {"handshake": True}})
    try:
        made.wait_ready()
        yield made
    finally:
        made.stop()


@pytest.fixture
def listen() -> Iterator[Callable[..., Listener]]:
    """Return a function that opens a listener; closed at the end of the case."""
    with ExitStack() as stack:

        def start(*args: Any, **options: Any) -> Listener:
            made = Listener(*args, **options)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture
def clients() -> Iterator[Clients]:
    """Return clients; closed at the end of the case."""
    made = Clients()
    yield made
    made.close()


@pytest.fixture
def held_back() -> Iterator[Callable[..., HeldBack]]:
    """Return a function that makes a client whose last segment is held back."""
    with ExitStack() as stack:

        def start(*args: Any) -> HeldBack:
            made = HeldBack(*args)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture
def count_syns() -> Iterator[Callable[..., SynCounter]]:
    """Return a function that starts counting the SYNs to some ports."""
    with ExitStack() as stack:

        def start(*ports: int, **options: Any) -> SynCounter:
            made = SynCounter(*ports, **options)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture(scope="session")
def foreign() -> Iterator[None]:
    """Route the answers to ``send_syns`` to nowhere."""
    with nowhere():
        yield


@pytest.fixture(scope="session")
def away() -> Iterator[str]:
    """Return the name of a second network namespace."""
    with network_namespace("away") as name:
        yield name
