import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from aiohttp import ClientSession, web

from swapserve.api.errors import explain
from swapserve.errors import ShuttingDown
from swapserve.router.downstream import ClientLeft, Downstream

pytestmark = pytest.mark.anyio
Work = Callable[[Downstream], Coroutine[Any, Any, None]]


async def after_the_client_left(work: Work) -> BaseException | None:
    """Return what an answer raises that begins when its client is gone."""
    outcome: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    async def handler(request: web.Request) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        while not transport.is_closing():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        try:
            await work(Downstream(request, stream=True, explain=explain))
        except Exception as error:
            outcome.set_result(error)
            raise
        outcome.set_result(None)
        return web.Response()

    app = web.Application()
    app.router.add_get("/", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        _, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await writer.drain()
        writer.close()
        async with asyncio.timeout(10):
            return await outcome
    finally:
        await runner.cleanup()


async def test_a_first_comment_to_a_client_that_has_left_is_no_failure_of_ours() -> None:
    assert isinstance(await after_the_client_left(lambda down: down.comment()), ClientLeft)


async def test_a_first_chunk_to_a_client_that_has_left_is_no_failure_of_the_engine() -> None:
    async def engine(_request: web.Request) -> web.Response:
        return web.Response(text="data: x\n\n", content_type="text/event-stream")

    app = web.Application()
    app.router.add_get("/", engine)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]

        async def relay(down: Downstream) -> None:
            async with ClientSession() as http, http.get(f"http://{host}:{port}/") as upstream:
                await down.relay(upstream)

        assert isinstance(await after_the_client_left(relay), ClientLeft)
    finally:
        await runner.cleanup()


async def test_an_error_for_a_client_that_has_left_is_nobody_s_business() -> None:
    async def fail(down: Downstream) -> None:
        with pytest.raises(ClientLeft):
            await down.comment()
        await down.fail(ShuttingDown())

    assert await after_the_client_left(fail) is None
