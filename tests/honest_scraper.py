#!/usr/bin/env python3
"""Scrapes as Prometheus does, from a process of its own, until its input ends.

Arguments: port, the CA's file or "", the Authorization header or "", the service's process ID.
It prints a line after the first scrape, and at the end a JSON object: the number of scrapes, the
longest in seconds, the most CPU time in seconds that the service used during one, and the errors
of failed ones. Every other scrape has a new connection.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import ssl
import sys
import time
from pathlib import Path


def used(process: str) -> float:
    """Return the CPU time in seconds that a process has used; see proc_pid_stat(5)."""
    stat = Path(f"/proc/{process}/stat").read_text(encoding="ascii")
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Scrape until the input ends."""
    port, authority, authorization, process = int(sys.argv[1]), *sys.argv[2:5]
    headers = {"Accept-Encoding": "gzip", "Accept": "text/plain;version=0.0.4"}
    if authorization:
        headers["Authorization"] = authorization
    scrapes, longest, most, wrong = 0, 0.0, 0.0, []
    if authority:
        tls = ssl.create_default_context(cafile=authority)
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            "localhost", port, timeout=30, context=tls
        )
    else:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        if scrapes % 2:
            connection.close()
        began, before = time.monotonic(), used(process)
        for again in (True, False):
            try:
                connection.request("GET", "/metrics", headers=headers)
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                # Try again, as Go's client does if a connection that was kept open has been closed.
                if not again or scrapes % 2:
                    wrong.append(repr(error))
                    break
            else:
                if answer.status != 200:
                    wrong.append(str(answer.status))
                break
        longest = max(longest, time.monotonic() - began)
        most = max(most, used(process) - before)
        scrapes += 1
        if scrapes == 1:
            print(flush=True)  # noqa: T201
    said = {"scrapes": scrapes, "longest": longest, "most": most, "wrong": wrong}
    print(json.dumps(said), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
