"""Basic authentication against bcrypt hashes."""

from __future__ import annotations

import asyncio
import binascii
import hmac
import secrets
from base64 import b64decode
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

_MAX_WAITING = 64
_MAX_WAITING_OF_ONE = 2
# bcrypt has always ignored what comes after them; the package of that name now refuses it.
_MAX_PASSWORD = 72


class BusyError(Exception):
    """Too many unknown passwords are waiting to be looked at."""


class Authenticator:
    """Tells whether a request's user and password are right.

    A right password's bcrypt is computed once. Wrong ones are computed each time, one after the
    other and off the event loop, so that guessing stays slow and delays nobody who is known.
    """

    def __init__(self) -> None:
        # Without it what is kept could be tried against a dictionary at memory's speed.
        self._secret = secrets.token_bytes(32)
        self._right: dict[bytes, bytes] = {}
        self._waiting: Counter[str] = Counter()
        self._one_at_a_time = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bcrypt")

    async def allows(self, users: Mapping[bytes, bytes], authorization: str, client: str) -> bool:
        """Tell whether a request may come in.

        Args:
            users: names and bcrypt hashes.
            authorization: the header.
            client: the address that it came from.

        Raises:
            BusyError: it cannot be told now; it may be in a second.
        """
        credentials = _credentials(authorization)
        if credentials is None:
            return False
        name, password = credentials
        known = name in users
        # An unknown user is checked against one of the others, and always the same: it takes the
        # same time as a wrong password.
        others = list(users.values())
        decoy = others[int.from_bytes(self._digest(name)[:8]) % len(others)]
        hashed = users.get(name, decoy)
        digest = self._digest(name, hashed, password)
        if hmac.compare_digest(self._right.get(name, b""), digest):
            return known
        if self._waiting.total() >= _MAX_WAITING or self._waiting[client] >= _MAX_WAITING_OF_ONE:
            raise BusyError
        self._waiting[client] += 1
        try:
            right = await asyncio.get_running_loop().run_in_executor(
                self._one_at_a_time, _matches, password, hashed
            )
        finally:
            self._waiting[client] -= 1
            if not self._waiting[client]:
                del self._waiting[client]
        if right and known:
            self._right = {each: kept for each, kept in self._right.items() if each in users}
            self._right[name] = digest
        return right and known

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
        # A NUL, which no password has.
        return False
