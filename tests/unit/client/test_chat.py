"""The client of the front door, against a fake engine that is a real process, and a broken one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from swapserve.client.chat import Answer, AnswerFailed, ChatClient
from swapserve.testing.engine import expected_tokens
from tests.support.front_door import NAME, fake_engine

pytestmark = pytest.mark.anyio
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@asynccontextmanager
async def answering(*parts: bytes) -> AsyncIterator[str]:
    """Serve one fixed answer to whoever asks; yield the address."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.writelines(parts)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield f"http://{host}:{port}"


async def test_a_stream_comes_token_by_token_each_with_its_time() -> None:
    seen: list[int] = []
    async with fake_engine() as engine, ChatClient(f"http://127.0.0.1:{engine.port}") as chat:
        answer = await chat.complete(
            NAME,
            "hello",
            max_tokens=5,
            on_token=lambda now: seen.append(len(now.tokens)),
            extra={"temperature": 0},
        )
    assert answer.tokens == expected_tokens("hello", None, 5)
    assert answer.text == "".join(expected_tokens("hello", None, 5))
    assert seen == [1, 2, 3, 4, 5]
    assert answer.ended
    assert sorted(answer.at) == answer.at
    assert answer.at[0] > answer.started


async def test_comments_are_counted_and_are_not_tokens() -> None:
    event = b'data: {"choices": [{"text": "x"}]}\n\n'
    async with (
        answering(HEAD, b": waiting for the engine\n\n", event, b"data: [DONE]\n\n") as url,
        ChatClient(url) as chat,
    ):
        answer = await chat.complete("m", "p", max_tokens=1)
    assert (answer.comments, answer.tokens) == (1, ["x"])


async def test_token_ids_count_where_an_engine_tells_them() -> None:
    events = b'data: {"choices": [{"text": "xy", "token_ids": [7, 8]}]}\n\ndata: [DONE]\n\n'
    async with answering(HEAD, events) as url, ChatClient(url) as chat:
        answer = await chat.complete("m", "p", max_tokens=2)
    assert answer.tokens == [7, 8]


async def test_an_error_within_the_stream_has_the_daemons_code() -> None:
    event = b'data: {"error": {"code": "engine_crashed", "message": "it ended"}}\n\n'
    async with answering(HEAD, event) as url, ChatClient(url) as chat:
        with pytest.raises(AnswerFailed, match="it ended") as caught:
            await chat.complete("m", "p", max_tokens=1)
    assert caught.value.code == "engine_crashed"


async def test_a_refusal_has_the_daemons_code() -> None:
    body = b'{"error": {"code": "queue_full", "message": "too many"}}'
    head = b"HTTP/1.1 429 Too Many\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with answering(head, body) as url, ChatClient(url) as chat:
        with pytest.raises(AnswerFailed, match="too many") as caught:
            await chat.complete("m", "p", max_tokens=1)
    assert caught.value.code == "queue_full"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (HEAD + b'data: {"choices": [{"text": "x"}]}\n\n', "cut_off"),
        (HEAD + b"data: {nonsense\n\n", "not_json"),
        (b"nonsense\r\n\r\n", "connection"),
    ],
)
async def test_what_is_no_whole_answer_is_an_error(answer: bytes, code: str) -> None:
    async with answering(answer) as url, ChatClient(url) as chat:
        with pytest.raises(AnswerFailed) as caught:
            await chat.complete("m", "p", max_tokens=1)
    assert caught.value.code == code


def test_the_longest_gap_splits_the_tokens() -> None:
    answer = Answer(started=0.0, tokens=["a", "b", "c", "d"], at=[1.0, 1.1, 1.2, 4.0])
    assert answer.ttft_s == 1.0
    assert answer.longest_gap_s == pytest.approx(2.8)
    assert answer.tokens_before_gap == 3
    assert answer.tokens_per_s == pytest.approx(1.0)
