#!/usr/bin/env python3
"""A scraper in a process of its own, so that it takes no time from the server.

client.py PORT TIMES AT_ONCE requests /metrics from 127.0.0.1 as Prometheus does, over connections
that stay open, and prints how many seconds each answer took.
"""

from __future__ import annotations

import http.client
import sys
import threading
import time

PROMETHEUS = {
    "Accept": "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3",
    "Accept-Encoding": "gzip",
}


def scrape(
    connection: http.client.HTTPConnection, headers: dict[str, str]
) -> tuple[float, http.client.HTTPResponse, bytes]:
    """Make a request; return the seconds until the last byte, the answer and its body."""
    began = time.perf_counter()
    connection.request("GET", "/metrics", headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    took = time.perf_counter() - began
    if answer.status != http.HTTPStatus.OK:
        raise RuntimeError(f"/metrics answered {answer.status}")
    return took, answer, body


def main(port: int, times: int, at_once: int) -> None:
    """Make requests ``times`` times, each time over ``at_once`` connections."""

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.connect()
        for _ in range(times):
            together.wait()
            took.append(scrape(connection, PROMETHEUS)[0])

    took: list[float] = []
    together = threading.Barrier(at_once)
    threads = [threading.Thread(target=ask) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(took) < times * at_once:
        sys.exit("not every scrape was answered")
    print(*took, sep="\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
