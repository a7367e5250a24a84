"""Basic authentication: who is let in, what it costs, and what is kept of it."""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable

import bcrypt
import pytest

from dtrace_exporter import auth
from dtrace_exporter.auth import Authenticator, BusyError

USERS = {
    name: bcrypt.hashpw(password, bcrypt.gensalt(4))
    for name, password in ((b"prometheus", b"right"), (b"other", b"different"))
}


def basic(name: str | bytes, password: str | bytes) -> str:
    """Return the header of a user and password."""
    parts = (part.encode() if isinstance(part, str) else part for part in (name, password))
    return "Basic " + b64encode(b":".join(parts)).decode()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return the hashes that bcrypt is computed against, as it is."""
    against: list[bytes] = []
    whole = auth._matches

    def matches(password: bytes, hashed: bytes) -> bool:
        against.append(hashed)
        return whole(password, hashed)

    monkeypatch.setattr(auth, "_matches", matches)
    return against


def ask(*headers: str, users: dict[bytes, bytes] = USERS) -> list[bool]:
    """Return whether each header in turn lets one in."""

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
    """A known user with the right password is let in, and nothing else."""
    assert ask(header) == [allowed]


def test_long_password() -> None:
    """Of a password longer than bcrypt takes, the beginning counts, as wherever bcrypt is used."""
    users = {b"a": bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4))}
    assert ask(basic("a", "x" * 100), basic("a", "x" * 71), users=users) == [True, False]


def test_right_password_is_computed_once(computed: list[bytes]) -> None:
    """The second time a right password costs no bcrypt; a wrong one always does."""
    right, wrong = basic("prometheus", "right"), basic("prometheus", "wrong")
    assert ask(right, right, wrong, wrong, right) == [True, True, False, False, True]
    assert len(computed) == 3


def test_unknown_user_costs_as_much(computed: list[bytes]) -> None:
    """An unknown user costs one bcrypt, against the hash of some user and always the same one."""
    assert ask(basic("nobody", "x"), basic("nobody", "y"), basic("nobody", "right")) == [False] * 3
    assert len(computed) == 3
    assert len(set(computed)) == 1
    assert computed[0] in USERS.values()
    computed.clear()
    ask(*(basic(f"nobody{number}", "x") for number in range(40)))
    assert set(computed) == set(USERS.values())


def test_password_that_was_changed(computed: list[bytes]) -> None:
    """With another hash in the configuration what was right before counts no more."""

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
    """Neither passwords nor anything that can be computed from them alone is in what is kept."""

    async def kept() -> dict[bytes, bytes]:
        authenticator = Authenticator()
        await authenticator.allows(USERS, basic("prometheus", "right"), "192.0.2.1")
        return authenticator._right

    first, second = asyncio.run(kept()), asyncio.run(kept())
    assert b"right" not in b"".join(first.values())
    assert first.keys() == second.keys()
    assert first != second


def crowd(
    many: Callable[[Authenticator], Awaitable[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run something while bcrypt takes long."""

    def slowly(_password: bytes, _hashed: bytes) -> bool:
        time.sleep(0.1)
        return False

    async def run() -> None:
        authenticator = Authenticator()
        await authenticator.allows(USERS, basic("prometheus", "right"), "192.0.2.1")
        monkeypatch.setattr(auth, "_matches", slowly)
        await many(authenticator)
        assert not authenticator._waiting

    asyncio.run(run())


def test_guesses_wait_in_no_long_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many guesses from one address most are turned away; who is known waits for none."""

    async def many(authenticator: Authenticator) -> None:
        guesses = [
            asyncio.ensure_future(authenticator.allows(USERS, basic("a", str(n)), "192.0.2.66"))
            for n in range(200)
        ]
        await asyncio.sleep(0)
        assert await authenticator.allows(USERS, basic("prometheus", "right"), "192.0.2.1")
        assert sum(guess.done() and not guess.cancelled() for guess in guesses) >= 198
        answers = await asyncio.gather(*guesses, return_exceptions=True)
        assert answers.count(False) == 2
        assert sum(isinstance(answer, BusyError) for answer in answers) == 198

    crowd(many, monkeypatch)


def test_guesses_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many addresses they come from, so many are heard and no more."""
    monkeypatch.setattr(auth, "_MAX_WAITING", 5)

    async def many(authenticator: Authenticator) -> None:
        answers = await asyncio.gather(
            *(
                authenticator.allows(USERS, basic("a", "b"), f"192.0.2.{number}")
                for number in range(50)
            ),
            return_exceptions=True,
        )
        assert answers.count(False) == 5

    crowd(many, monkeypatch)
