"""Memory that a test can make fail: the faults that a program in the kernel must survive."""

from __future__ import annotations

from sun.evaluate import BAD_ADDRESS, Fault, Memory
from sun.watching import Host


class Faulty:
    """This process's memory, from which some loads fail."""

    def __init__(self) -> None:
        self.host: Host | None = None
        self.count = 0
        self.failing: frozenset[int] = frozenset()
        self._memory = Memory()

    def __call__(self, address: int, size: int) -> bytes:
        """Return memory, or fail."""
        if self.host is not None:
            self.count += 1
            if self.count in self.failing:
                raise Fault(BAD_ADDRESS, address)
        return self._memory(address, size)
