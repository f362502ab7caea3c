"""Connections to engines: kept for reuse, each known by itself, closed to the last when asked.

An engine must not be dumped or discarded with idle connections of ours in it, and none of them
may be used after its return. So each connection is an object of its own (aiohttp's pool cannot
close the idle ones and keep the busy ones), and a pool knows which of them are idle.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Mapping

import aiohttp
from yarl import URL

from swapserve.ids import EngineName
from swapserve.router.admission import Place

CONNECT_TIMEOUT_S = 10.0
"""Engines are on this machine: one that does not accept by then is gone or dumped."""
IDLE_S = 4.0
"""Idle connections older than this are not used. Servers here close theirs after five seconds
(uvicorn's and cpp-httplib's default), and a request must not cross that."""
UNACKED_MS = 7 * 24 * 3600 * 1000
"""TCP_USER_TIMEOUT: bytes to an engine that is away may stay unacknowledged this long; the
kernel's own limit of about 15 minutes would break the connection. Source: tcp(7)."""
NO_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_read=None, sock_connect=CONNECT_TIMEOUT_S)

AddrInfo = tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int]]


class Wire:
    """At most one connection to one engine, for one request at a time."""

    def __init__(self, place: Place, generation: int) -> None:
        self.place = place
        self.generation = generation
        self.idle_since: float | None = None
        self._socket: socket.socket | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=1, keepalive_timeout=IDLE_S, socket_factory=self._make_socket
            ),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent",),
            timeout=NO_TIMEOUT,
        )

    @property
    def reused(self) -> bool:
        """Whether it has carried a request before."""
        return self.idle_since is not None

    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse | aiohttp.ClientError | OSError:
        """Send the request; return the head of the answer, or why there is none."""
        url = URL.build(scheme="http", host=self.place.host, port=self.place.port, path=path)
        try:
            self._response = await self._session.post(
                url, data=body, headers=headers, allow_redirects=False
            )
        except (aiohttp.ClientError, OSError) as error:
            return error
        return self._response

    def kill(self, *, reset: bool = False) -> None:
        """End the connection now: the engine reads the end of the stream.

        Args:
            reset: leave nothing of the connection in either kernel (RST).
        """
        if self._socket is None:
            return
        with contextlib.suppress(OSError):  # not connected yet, or closed already
            if reset:
                self._socket.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
            else:
                self._socket.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """Release everything; returns when the socket is closed."""
        if self._response is not None:
            self._response.close()
        await self._session.close()

    def _make_socket(self, info: AddrInfo) -> socket.socket:
        made = socket.socket(info[0], info[1], info[2])
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKED_MS)
        self._socket = made
        return made


class Upstreams:
    """The connections to every engine. `tasks` outlives it and closes what was dropped."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self._tasks = tasks
        self._idle: dict[EngineName, list[Wire]] = {}
        self._generations: dict[EngineName, int] = {}

    def take(self, engine: EngineName, place: Place, *, fresh: bool) -> Wire:
        """Return the connection used last, or (always with `fresh`) one still to be made."""
        idle = self._idle.get(engine, [])
        oldest = asyncio.get_running_loop().time() - IDLE_S
        while idle and not fresh:
            wire = idle.pop()
            if wire.place == place and (wire.idle_since or 0.0) > oldest:
                return wire
            self.drop(wire)
        return Wire(place, self._generations.get(engine, 0))

    def give(self, engine: EngineName, wire: Wire) -> None:
        """Keep a connection whose answer was read to its end, unless it is of an older life."""
        if wire.generation != self._generations.get(engine, 0):
            self.drop(wire, reset=True)
            return
        now = asyncio.get_running_loop().time()
        wire.idle_since = now
        idle = self._idle.setdefault(engine, [])
        idle.append(wire)
        while (idle[0].idle_since or 0.0) <= now - IDLE_S:
            self.drop(idle.pop(0))

    def drop(self, wire: Wire, *, reset: bool = False) -> None:
        """Close a connection, whatever it is doing."""
        wire.kill(reset=reset)
        self._tasks.create_task(wire.close())

    async def close_idle(self, engine: EngineName) -> None:
        """Close the engine's idle connections; those in use now will not be kept either.

        Returns when their sockets are closed, with nothing left of them in the engine's kernel.
        """
        for wire in self._retire(engine):
            wire.kill(reset=True)
            await wire.close()

    def forget(self, engine: EngineName) -> None:
        """Close the engine's idle connections without waiting for it."""
        for wire in self._retire(engine):
            self.drop(wire)

    def _retire(self, engine: EngineName) -> list[Wire]:
        self._generations[engine] = self._generations.get(engine, 0) + 1
        return self._idle.pop(engine, [])

    async def close(self) -> None:
        """Close every idle connection of every engine."""
        for engine in tuple(self._idle):
            await self.close_idle(engine)
