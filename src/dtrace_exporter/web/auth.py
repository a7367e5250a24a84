"""Basic authentication against bcrypt hashes."""

from __future__ import annotations

import asyncio
import binascii
import hmac
import secrets
from base64 import b64decode
from collections.abc import Mapping
from typing import NamedTuple

from dtrace_exporter import threads

MAX_COST = 14
"""The highest cost of a hash that is computed. It takes 1.2 s, and each step doubles this. All
other hashes, and the end of the service, have to wait for it."""

_MOST_GONE = 256
# bcrypt ignores the bytes after these; newer versions of the package bcrypt refuse them.
_MAX_PASSWORD = 72


class _Try(NamedTuple):
    users: Mapping[bytes, bytes]
    name: bytes
    password: bytes
    hashed: bytes
    digest: bytes
    right: asyncio.Future[bool]


class Authenticator:
    """Checks the users and passwords of requests.

    The hash of a correct password is computed once, and then the user is known. All other hashes
    are computed one at a time in a thread, so that guessing stays slow and does not delay known
    users.

    Guesses of others do not keep out a user who is not known yet: client addresses take turns. An
    address may be that of a proxy, so in half of its turns its oldest request is checked, and in
    the other half a random one. No more requests wait than there are connections, and besides one
    for each of some addresses whose client has hung up. So a scraper that has hung up is known when
    it tries again.
    """

    def __init__(self) -> None:
        # Without it, a fast dictionary attack on the digests would be possible.
        self._secret = secrets.token_bytes(32)
        self._right: dict[bytes, bytes] = {}
        self._waiting: dict[str, list[_Try]] = {}
        self._working: asyncio.Task[None] | None = None
        self._one_at_a_time = threads.executor(1, "bcrypt")

    async def allows(self, users: Mapping[bytes, bytes], authorization: str, client: str) -> bool:
        """Return whether a request has a correct user and password.

        Args:
            users: the bcrypt hashes by the users' names.
            authorization: the header Authorization.
            client: the address that the request came from.
        """
        credentials = _credentials(authorization)
        if credentials is None:
            return False
        name, password = credentials
        known = name in users
        # An unknown user is checked against the hash of another one, always the same, so that it
        # takes the same time as a wrong password.
        others = list(users.values())
        decoy = others[int.from_bytes(self._digest(name)[:8]) % len(others)]
        hashed = users.get(name, decoy)
        digest = self._digest(name, hashed, password)
        if hmac.compare_digest(self._right.get(name, b""), digest):
            return known
        right = asyncio.get_running_loop().create_future()
        this = _Try(users, name, password, hashed, digest, right)
        self._waiting.setdefault(client, []).append(this)
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        try:
            return await right and known
        except asyncio.CancelledError:
            if len(self._waiting.get(client, ())) > 1:
                self._forget(client, this)
            elif len(self._waiting) > _MOST_GONE:
                self._forget_newest_gone()
            raise

    async def _work(self) -> None:
        while self._waiting:
            client = next(iter(self._waiting))
            # Its next turn is after that of all others.
            self._waiting[client] = self._waiting.pop(client)
            tries = self._waiting[client]
            # The oldest, so that each is checked at last, or a random one, because some clients do
            # not wait so long.
            this = secrets.choice((tries[0], secrets.choice(tries)))
            self._forget(client, this)
            right = await asyncio.get_running_loop().run_in_executor(
                self._one_at_a_time, _matches, this.password, this.hashed
            )
            alike = [this]
            if right and this.name in this.users:
                self._remember(this)
                # The same client may have tried again.
                alike += [one for one in self._waiting.get(client, ()) if one.digest == this.digest]
            for one in alike:
                self._forget(client, one)
                if not one.right.done():
                    one.right.set_result(right)

    def _remember(self, this: _Try) -> None:
        self._right = {name: kept for name, kept in self._right.items() if name in this.users}
        self._right[this.name] = this.digest

    def _forget(self, client: str, this: _Try) -> None:
        tries = self._waiting.get(client, [])
        if this in tries:
            tries.remove(this)
            if not tries:
                del self._waiting[client]

    def _forget_newest_gone(self) -> None:
        """If too many addresses have hung up, forget the one whose turn is last.

        Otherwise new guesses would take the places of those who have waited.
        """
        gone = [
            client
            for client, tries in self._waiting.items()
            if all(one.right.done() for one in tries)
        ]
        if len(gone) > _MOST_GONE:
            del self._waiting[gone[-1]]

    def _digest(self, *parts: bytes) -> bytes:
        lengths = b"".join(len(part).to_bytes(8) for part in parts)
        return hmac.digest(self._secret, lengths + b"".join(parts), "sha256")


def _credentials(authorization: str) -> tuple[bytes, bytes] | None:
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        name, colon, password = b64decode(encoded.strip(), validate=True).partition(b":")
    except (binascii.Error, ValueError):
        return None
    return (name, password) if colon else None


def _matches(password: bytes, hashed: bytes) -> bool:
    import bcrypt

    try:
        return bool(bcrypt.checkpw(password[:_MAX_PASSWORD], hashed))
    except ValueError:
        # There is a NUL in it, which no password has.
        return False
