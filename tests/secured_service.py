"""The exporter's process with a web configuration file: TLS, users, and clients of both."""

from __future__ import annotations

import ssl
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any

import trustme
from lab.exporter import free_port
from lab.waiting import until

from exporter_process import EXPORTER, SECONDS, write
from fake_steps import FakeDTrace


def basic(name: str, password: str) -> dict[str, str]:
    """Return the header for a user and password."""
    return {"Authorization": "Basic " + b64encode(f"{name}:{password}".encode()).decode()}


class Service:
    """A running service with a web configuration file, and requests to it."""

    def __init__(self, process: subprocess.Popen[str], port: int, web: Path, log: Path) -> None:
        self.process = process
        self.port = port
        self.web = web
        self._log = log

    def ask(
        self,
        path: str = "/-/healthy",
        method: str = "GET",
        headers: dict[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> HTTPResponse:
        """Return the answer to one request, over TLS if a context is given."""
        connection = (
            HTTPSConnection("localhost", self.port, timeout=SECONDS, context=tls)
            if tls
            else HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        )
        try:
            connection.request(method, path, headers=headers or {})
            answer = connection.getresponse()
            answer.read()
            return answer
        finally:
            connection.close()

    def status(self, **how: Any) -> int:
        """Return the status of one request, or 0 if there is no answer."""
        try:
            return self.ask(**how).status
        except (OSError, HTTPException):
            return 0

    def log(self) -> str:
        """Return the log so far."""
        return self._log.read_text(encoding="utf-8")


@contextmanager
def running(place: Path, web: str, fake: FakeDTrace, *flags: str) -> Iterator[Service]:
    """Run the service with a web configuration of this text until the block ends."""
    file = place / "web.yml"
    file.write_text(web, encoding="utf-8")
    port, log = free_port(), place / "log"
    command = [
        *EXPORTER,
        f"--config.file={write(place / 'c.yml', fake())}",
        f"--web.config.file={file}",
        f"--web.listen-address=localhost:{port}",
        *flags,
    ]
    with log.open("wb") as errors, subprocess.Popen(command, stderr=errors, text=True) as process:
        service = Service(process, port, file, log)
        try:
            # This includes the session that watches processes.
            until(lambda: service.log().count("session up") == 2)
            yield service
        finally:
            process.terminate()
    assert process.returncode == 0
    assert "Traceback" not in service.log()


class Pki:
    """An authority, with the server's certificate in files beside the configuration."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(str(place / "ca.pem"))
        self.renew()

    def renew(
        self,
        authority: trustme.CA | None = None,
        *,
        key: bool = True,
        end: datetime | None = None,
    ) -> None:
        """Write a new certificate for the server."""
        cert = (authority or self.authority).issue_cert("localhost", not_after=end)
        cert.cert_chain_pems[0].write_to_path(str(self._place / "server.pem"))
        if key:
            cert.private_key_pem.write_to_path(str(self._place / "server.key"))

    def trusting(self, *names: str, by: trustme.CA | None = None) -> ssl.SSLContext:
        """Return a client's context, with a certificate for some names if any are given."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        if names:
            (by or self.authority).issue_cert(*names).configure_cert(context)
        return context
