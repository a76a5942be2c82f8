"""Run the application on a socket until a signal: uvicorn, with limits on connections and slow clients."""

import asyncio
import errno
import os
import resource
import signal
import socket
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import InputError
from .app import Server

HEADER_S = 20.0  # for a client to send a request's headers
CONNECTIONS = 4096  # at once, if the system allows twice as many open files
BACKLOG = 2048  # connections that wait in the system
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b'content-length: 115\r\n\r\n{"error":{"message":"the server has too many connections",'
    b'"type":"server_error","param":null,"code":"connections"}}'
)


class Protocol(H11Protocol):
    """HTTP/1.1 with two limits: too many connections get status 503, and those whose headers do not arrive are closed."""

    most = CONNECTIONS
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection, or refuse it."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.write(REFUSAL)
            transport.close()
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take data, and wait at most HEADER_S seconds for the rest of a request's headers."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        super().connection_lost(exc)
        if self._late is not None:
            self._late.cancel()

    def _watch(self) -> None:
        waits = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        if waits and self._late is None:
            self._late = self.loop.call_later(HEADER_S, self.transport.close)
        elif not waits and self._late is not None:
            self._late.cancel()
            self._late = None


class _Uvicorn(uvicorn.Server):
    """A server whose signals the event loop handles."""

    def capture_signals(self) -> Any:
        return nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or []:
            listening.listen(BACKLOG)  # asyncio has set the number that it accepts at once, which is smaller


def listen(host: str, port: int, uds: str | None) -> socket.socket:
    """Return a listening socket: a Unix socket at the path `uds`, else TCP. Raises InputError if the system refuses."""
    try:
        if uds is not None:
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(uds) == errno.ECONNREFUSED:  # a dead server left its socket
                    os.unlink(uds)
            return socket.create_server(uds, family=socket.AF_UNIX, backlog=BACKLOG)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = socket.create_server((host, port), family=family, backlog=BACKLOG)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio sets it only on a socket that names its protocol
        return made
    except (OSError, OverflowError) as error:
        where = uds if uds is not None else f"{host} port {port}"
        raise InputError(f"cannot listen at {where}: {getattr(error, 'strerror', None) or error}; choose another") from None


def run(server: Server, listening: socket.socket, *, grace_s: float, started: Callable[[], None]) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status, 0 or 130. started() is called once it serves.

    After the signal, running requests have grace_s seconds to end. A second signal ends them at once."""
    serving, status = embedded(server, grace_s), [0]

    def stop(number: int) -> None:
        serving.force_exit = server.draining
        server.draining = serving.should_exit = True
        if number == signal.SIGINT:
            status[0] = 130

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number)
        started()
        await serving.serve(sockets=[listening])

    asyncio.run(main())
    return status[0]


def embedded(server: Server, grace_s: float) -> uvicorn.Server:
    """Return a uvicorn server for the application, without signal handlers."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 4 * CONNECTIONS if files == resource.RLIM_INFINITY else files
    Protocol.most = min(CONNECTIONS, files // 2)
    quiet: dict[str, Any] = {"log_config": None, "log_level": "critical", "access_log": False, "server_header": False}
    limits: dict[str, Any] = {"timeout_graceful_shutdown": grace_s, "h11_max_incomplete_event_size": 32768}
    limits["backlog"] = max(1, min(BACKLOG, files // 16))  # accepted at once: several times as many are open meanwhile
    return _Uvicorn(uvicorn.Config(server, http=Protocol, ws="none", lifespan="on", **quiet, **limits))
