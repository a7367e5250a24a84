"""The exporter before a model of FreeBSD's TCP: what it exports against what the model counted."""

from __future__ import annotations

from typing import Any

from lab.solaris import Sun


class FreeBSD(Sun):
    """A loaded model of FreeBSD and an exporter that watches it."""

    def drops(self, totals: dict[str, Any]) -> dict[str, int]:
        """Return the drops that should be exported, by reason.

        On 14 the program does not see that a connection which has a socket gets no more memory.
        """
        return {
            "q_full_ack": totals["q_full_ack"],
            "q0_evicted": totals["q0_evicted"],
            "other": totals["no_memory"] - totals["no_inpcb"] + totals["overflown"],
        }

    def queues(self, totals: dict[str, Any]) -> tuple[int | None, ...]:
        """Return Q, Qmax and the backlog that was asked for; a listener has no Q0."""
        return None, totals["q"], None, totals["qmax"], totals["asked"]

    def labels(self, name: str) -> dict[str, Any]:
        """Return the labels that tell a listener's series from all others."""
        totals = self.model.totals(name)
        jail = totals["zone_name"] if totals["zone"] else ""
        return {"jail": jail, "address": totals["address"], "port": totals["port"]}
