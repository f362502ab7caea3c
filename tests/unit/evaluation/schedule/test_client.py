import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from evaluation.schedule.client import Stream, ask, body, http_client
from swapserve.states import Priority


def _text(text: str, **extra: Any) -> str:
    return "data: " + json.dumps({"choices": [{"text": text}], **extra}) + "\n\n"


async def _answered(lines: list[str], *, status: int = 200) -> tuple[Stream, web.Request, int]:
    """Ask a front door that says these lines; return what came of it and how often it was told."""
    asked: list[web.Request] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(request)
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        for line in lines:
            await response.write(line.encode())
        return response

    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    told: list[Stream] = []
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        async with http_client() as http:
            stream = await ask(
                http,
                f"{host}:{port}",
                body("m0", "buku dada", 3),
                priority=Priority.BATCH,
                on_token=told.append,
            )
    finally:
        await runner.cleanup()
    return stream, asked[0], len(told)


def test_each_token_has_its_time_and_what_has_no_text_has_none() -> None:
    lines = [": keep-alive\n\n", _text(" a"), _text(" b"), _text("", usage={"prompt_tokens": 3})]
    stream, request, told = asyncio.run(_answered([*lines, "data: [DONE]\n\n"]))
    assert stream.error is None
    assert len(stream.at) == told == 2
    assert stream.sent <= stream.at[0] <= stream.at[1]
    assert stream.prompt_tokens == 3
    assert request.headers["x-swapserve-priority"] == "batch"


@pytest.mark.parametrize(
    ("lines", "status", "said"),
    [
        ([_text(" a")], 200, "ended after 1 tokens"),
        (["data: [DONE]\n\n"], 200, "ended after 0 tokens"),
        ([_text(" a"), 'data: {"error": {"code": "engine_exited"}}\n\n'], 200, "engine_exited"),
        (["queue is full"], 429, "429: queue is full"),
    ],
)
def test_what_is_no_whole_answer_is_an_error(lines: list[str], status: int, said: str) -> None:
    stream, _, _ = asyncio.run(_answered(lines, status=status))
    assert stream.error is not None
    assert said in stream.error


def test_the_front_door_learns_of_a_limit_only_if_there_is_one() -> None:
    assert "max_tokens" not in body("m0", "buku", 3)
    limited = body("m0", "buku", 3, most=100)
    assert (limited["max_tokens"], limited["n_predict"]) == (100, 3)


def test_the_longest_silence_of_a_stream() -> None:
    stream = Stream(sent=0.0, at=[1.0, 1.1, 4.0, 4.2])
    assert stream.longest_gap == (1.1, 4.0)
    assert stream.ttft_s == pytest.approx(1.0)
    assert stream.itl_s == pytest.approx(3.2 / 3)
