"""A state that this process serves over real connections to 127.0.0.1."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from email.message import Message
from email.parser import BytesParser
from typing import NamedTuple

from dtrace_exporter.listeners import Capabilities, SessionId
from dtrace_exporter.sockets import Queues
from dtrace_exporter.state import SessionStatus, Source, State
from dtrace_exporter.watched import named
from dtrace_exporter.web import handlers
from dtrace_exporter.web import server as web_server
from dtrace_exporter.web.configuration import WebConfigFile
from dtrace_exporter.web.paths import Mount
from dtrace_exporter.web.server import Server

HOSTILE = '<script>alert("1")</script>\\\n&{{ 1 }}'


class Response(NamedTuple):
    status: int
    headers: Message
    body: bytes


def one_port(name: str = "ssh") -> State:
    """Return port 22 with Q 3 of 4, two SYNs taken and one dropped; its session is up."""
    state = State(source=Source("dtrace", "linux", "2.0.1"), last_reload_success=1.5e9)
    session = SessionId("", "port-22")
    state.table.watch(session, named({22: name}), Capabilities(reasons=("q_full", "q0_full")))
    ssh = state.table.listener(session, "", "*", 22)
    ssh.count_syns(0, 4, 2, 0)
    ssh.count_syns(10, 4, 1, 4)
    ssh.drop("q_full", 1)
    ssh.established += 17
    ssh.count_accepts(9, 2, 3_000_000)
    ssh.sockets[1] = Queues(7, 3, None, 4)
    state.sessions[session] = SessionStatus(up=True, reason="", pid=4242, restarts=5)
    return state


async def no_reload() -> None:
    """Do nothing at a reload."""


@asynccontextmanager
async def serving(
    state: State,
    reload: Callable[[], Awaitable[None]] = no_reload,
    path: str = "/metrics",
    address: str = "127.0.0.1:0",
    web: WebConfigFile | None = None,
    mount: Mount = Mount(),  # noqa: B008
) -> AsyncIterator[Server]:
    """Serve a state until the block ends."""
    app = handlers.application(state, reload, path, web, mount)
    server = handlers.serve(app, web_server.bind([address]))
    try:
        yield server
    finally:
        server.stop()
        await server.close_all_connections()


def port_of(server: Server) -> int:
    """Return the port of a server that was bound to port 0."""
    return int(server.sockets[0].getsockname()[1])


async def fetch(
    server: Server,
    target: str,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    host: str = "127.0.0.1",
    seconds: float = 10.0,
) -> Response:
    """Send one request and return the answer, which has to come within so many seconds."""
    reader, writer = await asyncio.open_connection(host, port_of(server))
    lines = {"Host": "localhost", "Connection": "close"} | (headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    writer.write(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1"))
    answer = await asyncio.wait_for(reader.read(), seconds)
    writer.close()
    await writer.wait_closed()
    head_bytes, _, body = answer.partition(b"\r\n\r\n")
    status, _, fields = head_bytes.partition(b"\r\n")
    return Response(int(status.split()[1]), BytesParser().parsebytes(fields), body)


def get(
    state: State,
    target: str,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    reload: Callable[[], Awaitable[None]] = no_reload,
) -> Response:
    """Return the answer to one request, for which the state is served."""

    async def once() -> Response:
        async with serving(state, reload) as server:
            return await fetch(server, target, method, headers)

    return asyncio.run(once())
