"""The front door against an engine that misbehaves on the wire, byte by byte."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.support.front_door import NAME, FrontDoor, comments, events, front_door, until

pytestmark = pytest.mark.anyio
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EMPTY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Wire:
    """One request that reached the engine, and the connection to answer it on."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.number = number
        """How many requests this connection carried before."""

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def chunk(self, data: bytes) -> None:
        await self.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def request(self) -> bool:
        """Read one request; say whether there was one."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return False
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await self._reader.readexactly(length)
        return True


Script = Callable[[Wire], Awaitable[None]]


@asynccontextmanager
async def scripted(
    script: Script, *, by_hand: bool = False
) -> AsyncIterator[tuple[FrontDoor, list[int]]]:
    """Serve an engine that answers each request with the script; an exception closes."""
    requests: list[int] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = Wire(reader, writer, 0)
        try:
            while await wire.request():
                requests.append(wire.number)
                await script(wire)
                wire.number += 1
        except (EOFError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with front_door(port, by_hand=by_hand) as door:
            yield door, requests


async def test_a_reused_connection_that_breaks_before_any_byte_is_replaced_once() -> None:
    async def script(wire: Wire) -> None:
        if wire.number == 1:
            raise EOFError
        await wire.send(EMPTY)

    async with scripted(script) as (door, requests):
        for _ in range(2):
            assert (await door.post()).status == 200
        assert requests == [0, 1, 0]


async def test_a_new_connection_that_breaks_before_any_byte_is_an_error_at_once() -> None:
    async def script(_: Wire) -> None:
        raise EOFError

    async with scripted(script) as (door, requests):
        answer = await door.post()
        assert answer.status == 502
        assert (await answer.json())["error"]["code"] == "upstream_error"
        assert requests == [0]


async def test_an_answer_that_is_not_http_is_an_error_object() -> None:
    async def script(wire: Wire) -> None:
        await wire.send(b"hello?\r\n\r\n")

    async with scripted(script) as (door, _):
        assert (await door.post()).status == 502


async def test_half_a_body_is_never_passed_off_as_a_whole_one() -> None:
    async def script(wire: Wire) -> None:
        await wire.send(EMPTY.replace(b"Length: 2", b"Length: 20"))
        await asyncio.sleep(0.05)
        raise EOFError

    async with scripted(script) as (door, _):
        answer = await door.post()
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
        assert (await door.until_ended()).outcome == "upstream_error"


async def test_no_comment_falls_inside_an_event() -> None:
    go_on = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.send(STREAM)
        await wire.chunk(b'data: {"a"')
        await go_on.wait()
        await wire.chunk(b":1}\r\n\r")
        await wire.chunk(b"\n")

    async with scripted(script) as (door, _):
        answer = await door.post(stream=True)
        body = await answer.content.readany()
        door.scheduler.admission.suspended(door.scheduler.granted[0])
        await asyncio.sleep(0.3)
        go_on.set()
        while comments(body) < 2:
            body += await answer.content.readany()
        assert body.startswith(b'data: {"a":1}\r\n\r\n: waiting')
        answer.close()


async def test_an_event_broken_off_by_a_crash_does_not_swallow_the_error() -> None:
    on = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.send(STREAM)
        await wire.chunk(b'data: {"a":1}\n\ndata: {"b"')
        await on.wait()
        raise EOFError

    async with scripted(script) as (door, _):
        answer = await door.post(stream=True)
        body = await answer.content.readany()
        on.set()
        data = events(body + await answer.read())
        assert data[0] == '{"a":1}'
        assert json.loads(data[-2])["error"]["code"] == "upstream_error"
        assert data[-1] == "[DONE]"


async def test_a_whole_answer_after_early_headers_becomes_one_event() -> None:
    async def script(wire: Wire) -> None:
        await wire.send(EMPTY)

    async with scripted(script, by_hand=True) as (door, _):
        answer = await door.post(stream=True)
        door.scheduler.grant(await door.scheduler.next_waiting())
        assert events(await answer.read()) == ["{}", "[DONE]"]


async def test_closing_idle_connections_leaves_nothing_in_the_kernel() -> None:
    async def script(wire: Wire) -> None:
        await wire.send(EMPTY)

    async with scripted(script) as (door, _):
        port = door.places[NAME].port

        def sockets() -> int:
            lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
            ends = [line.split()[1:4] for line in lines]
            ours = f"0100007F:{port:04X}"
            return sum(ours in (local, peer) and state != "0A" for local, peer, state in ends)

        await (await door.post()).read()
        assert sockets() == 2
        await door.proxy.close_idle(NAME)
        await until("both ends are gone", lambda: sockets() == 0)


async def test_a_lease_suspended_while_the_connection_failed_is_served_on_return() -> None:
    async def script(wire: Wire) -> None:
        await wire.send(EMPTY)

    async with scripted(script, by_hand=True) as (door, requests):
        place = door.places.pop(NAME)
        door.places[NAME] = type(place)(host="127.0.0.1", port=1)  # refused
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(door.post())
            lease = await door.scheduler.next_waiting()
            door.scheduler.grant(lease)
            await asyncio.sleep(0)  # the request is on its way
            door.scheduler.admission.suspended(lease)
            await asyncio.sleep(0.1)
            assert not asked.done()
            door.places[NAME] = place
            door.scheduler.admission.resumed(lease)
        assert asked.result().status == 200
        assert requests == [0]


async def test_a_client_that_leaves_between_return_and_resumption_is_not_forgotten() -> None:
    closed = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.send(STREAM)
        await wire.chunk(b"data: 1\n\n")
        await wire.request()
        closed.set()
        raise EOFError

    async with scripted(script) as (door, _):
        answer = await door.post(stream=True)
        door.scheduler.admission.suspended(door.scheduler.granted[0])
        door.proxy.engine_back(NAME)
        answer.close()
        await until("the engine sees the end", closed.is_set)
        assert door.proxy.orphans(NAME) == 0
