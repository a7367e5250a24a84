"""Basic authentication: which passwords are right, what a try costs, and what is kept of it."""

from __future__ import annotations

import asyncio
import secrets
from base64 import b64encode
from threading import Semaphore

import bcrypt
import pytest

from dtrace_exporter.web import auth
from dtrace_exporter.web.auth import Authenticator

USERS = {
    name: bcrypt.hashpw(password, bcrypt.gensalt(4))
    for name, password in ((b"prometheus", b"right"), (b"other", b"different"))
}


def basic(name: str | bytes, password: str | bytes) -> str:
    """Return the value of the Authorization header for a user and password."""
    parts = (part.encode() if isinstance(part, str) else part for part in (name, password))
    return "Basic " + b64encode(b":".join(parts)).decode()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return the hashes that bcrypt really computes against, in order."""
    against: list[bytes] = []
    whole = auth._matches

    def matches(password: bytes, hashed: bytes) -> bool:
        against.append(hashed)
        return whole(password, hashed)

    monkeypatch.setattr(auth, "_matches", matches)
    return against


def ask(*headers: str, users: dict[bytes, bytes] = USERS) -> list[bool]:
    """Return for each header in turn whether it is allowed."""

    async def run() -> list[bool]:
        authenticator = Authenticator()
        return [await authenticator.allows(users, header, "192.0.2.1") for header in headers]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        (basic("prometheus", "right"), True),
        (basic("prometheus", "right").replace("Basic", "bAsIc"), True),
        (basic("other", "different"), True),
        (basic("prometheus", "different"), False),
        (basic("prometheus", ""), False),
        (basic("prometheus", "right\0"), False),
        (basic("nobody", "right"), False),
        (basic("nobody", "different"), False),
        (basic("", ""), False),
        (basic(b"\xff", b"\xfe"), False),
        (basic("Prometheus", "right"), False),
        ("", False),
        ("Basic", False),
        ("Basic =", False),
        ("Basic " + b64encode(b"prometheus").decode(), False),
        ("Basic \u00e9", False),
        (basic("prometheus", "right") + "," + basic("prometheus", "right"), False),
        (basic("prometheus", "right").replace("Basic", "Bearer"), False),
    ],
)
def test_who_is_let_in(header: str, allowed: bool) -> None:
    """Only a known user with the right password is allowed."""
    assert ask(header) == [allowed]


def test_long_password() -> None:
    """Only the first 72 bytes of a password count, as everywhere with bcrypt."""
    users = {b"a": bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4))}
    assert ask(basic("a", "x" * 100), basic("a", "x" * 71), users=users) == [True, False]


def test_right_password_is_computed_once(computed: list[bytes]) -> None:
    """A right password costs bcrypt only once; a wrong one costs it every time."""
    right, wrong = basic("prometheus", "right"), basic("prometheus", "wrong")
    assert ask(right, right, wrong, wrong, right) == [True, True, False, False, True]
    assert len(computed) == 3


def test_unknown_user_costs_as_much(computed: list[bytes]) -> None:
    """An unknown user costs one bcrypt against a real hash, always the same one for that user."""
    assert ask(basic("nobody", "x"), basic("nobody", "y"), basic("nobody", "right")) == [False] * 3
    assert len(computed) == 3
    assert len(set(computed)) == 1
    assert computed[0] in USERS.values()
    computed.clear()
    ask(*(basic(f"nobody{number}", "x") for number in range(40)))
    assert set(computed) == set(USERS.values())


def test_password_that_was_changed(computed: list[bytes]) -> None:
    """After a user's hash has changed in the configuration, the old password is refused."""

    async def run() -> list[bool]:
        authenticator = Authenticator()
        changed = USERS | {b"prometheus": bcrypt.hashpw(b"new", bcrypt.gensalt(4))}
        headers = basic("prometheus", "right"), basic("prometheus", "new")
        return [
            await authenticator.allows(users, header, "192.0.2.1")
            for users in (USERS, changed, {b"other": USERS[b"other"]})
            for header in headers
        ]

    assert asyncio.run(run()) == [True, False, False, True, False, False]
    assert len(computed) == 6


def test_nothing_readable_is_kept() -> None:
    """The cache has no password, nor anything that can be computed from a password alone."""

    async def kept() -> dict[bytes, bytes]:
        authenticator = Authenticator()
        await authenticator.allows(USERS, basic("prometheus", "right"), "192.0.2.1")
        return authenticator._right

    first, second = asyncio.run(kept()), asyncio.run(kept())
    assert b"right" not in b"".join(first.values())
    assert first.keys() == second.keys()
    assert first != second


class Slow:
    """A bcrypt that computes only when the test says so, and the passwords it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passwords: list[bytes] = []
        self._go = Semaphore(0)
        monkeypatch.setattr(auth, "_matches", self._matches)

    def _matches(self, password: bytes, _hashed: bytes) -> bool:
        self.passwords.append(password)
        self._go.acquire()
        return password == b"right"

    def compute(self, times: int) -> None:
        """Let some more computations proceed."""
        self._go.release(times)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """Replace bcrypt by one that waits for the test."""
    return Slow(monkeypatch)


def guess(
    authenticator: Authenticator, *clients: str, password: str = "wrong"
) -> list[asyncio.Task[bool]]:
    """Try a password once from each of some addresses."""
    header = basic("prometheus", password)
    return [asyncio.create_task(authenticator.allows(USERS, header, client)) for client in clients]


async def test_who_is_known_waits_for_no_guess(slow: Slow) -> None:
    """While many guesses wait, a password that is known to be right is allowed at once."""
    authenticator = Authenticator()
    slow.compute(1)
    assert await guess(authenticator, "192.0.2.1", password="right")[0]
    guesses = guess(authenticator, *["192.0.2.66"] * 200)
    await asyncio.sleep(0)
    assert await guess(authenticator, "192.0.2.66", password="right")[0]
    assert not any(each.done() for each in guesses)
    slow.compute(200)
    assert await asyncio.gather(*guesses) == [False] * 200
    assert not authenticator._waiting


async def test_addresses_take_turns(slow: Slow) -> None:
    """A new client waits for at most one guess of each other address, however many wait."""
    authenticator = Authenticator()
    strangers = [f"192.0.2.{number}" for number in range(100, 220)]
    guesses = guess(authenticator, *strangers * 20)
    await asyncio.sleep(0)
    honest = guess(authenticator, "192.0.2.1", password="right")[0]
    await asyncio.sleep(0)
    slow.compute(122)
    assert await honest
    assert slow.passwords.index(b"right") <= 121
    for each in guesses:
        each.cancel()
    slow.compute(10)
    await asyncio.wait(guesses)


async def test_one_address_of_many(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the tries of one address the next is drawn at random, not the first in line."""
    monkeypatch.setattr(secrets, "choice", lambda tries: tries[-1])
    authenticator = Authenticator()
    guesses = guess(authenticator, *["192.0.2.66"] * 200)
    honest = guess(authenticator, "192.0.2.66", password="right")[0]
    slow.compute(2)
    assert await honest
    slow.compute(200)
    assert await asyncio.gather(*guesses) == [False] * 200


async def test_who_has_gone_is_forgotten(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tries of clients that have gone, the queue keeps one per address, and few in all."""
    authenticator = Authenticator()
    guesses = guess(authenticator, *["192.0.2.66", "192.0.2.67"] * 100)
    monkeypatch.setattr(auth, "_MOST_GONE", 20)
    guesses += guess(authenticator, *(f"198.51.100.{n}" for n in range(100)))
    await asyncio.sleep(0)
    for each in guesses:
        each.cancel()
    await asyncio.wait(guesses)
    assert [len(tries) for tries in authenticator._waiting.values()] == [1] * 20
    slow.compute(1000)
    assert await guess(authenticator, "192.0.2.1", password="right")[0]
    assert len(slow.passwords) <= 22
    assert not authenticator._waiting


async def test_who_gives_up_is_known_the_next_time(slow: Slow) -> None:
    """A scraper that times out in the queue is allowed at a later try, after one bcrypt."""
    authenticator = Authenticator()
    strangers = [f"192.0.2.{number}" for number in range(100, 220)]
    guesses = guess(authenticator, *strangers)
    (first,) = guess(authenticator, "192.0.2.1", password="right")
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    (second,) = guess(authenticator, "192.0.2.1", password="right")
    slow.compute(122)
    assert await second
    assert slow.passwords.count(b"right") == 1
    assert await guess(authenticator, "192.0.2.1", password="right")[0]
    await asyncio.wait(guesses)


async def test_hanging_up_takes_no_place(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many addresses guess and hang up, one that gave up before them is checked."""
    monkeypatch.setattr(auth, "_MOST_GONE", 20)
    authenticator = Authenticator()
    staying = guess(authenticator, *(f"192.0.2.{number}" for number in range(100, 130)))
    (first,) = guess(authenticator, "192.0.2.1", password="right")
    leaving = guess(authenticator, *(f"198.51.100.{number}" for number in range(200)))
    await asyncio.sleep(0)
    for each in (first, *leaving):
        each.cancel()
    await asyncio.wait([first, *leaving])
    assert len(authenticator._waiting) <= 50
    slow.compute(300)
    assert authenticator._working is not None
    await asyncio.wait([*staying, authenticator._working])
    assert slow.passwords.count(b"right") == 1
    assert await guess(authenticator, "192.0.2.1", password="right")[0]
    assert slow.passwords.count(b"right") == 1
