"""The front door with real sockets, a real engine process and a scheduler on strings."""

import asyncio
import json
import socket

import aiohttp
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from swapserve.config.schema import ApiKey, ServerConfig
from swapserve.errors import EngineCrashed, QueueFull, StartFailed
from swapserve.testing.engine import expected_tokens
from tests.support.front_door import (
    ALIAS,
    NAME,
    FrontDoor,
    comments,
    events,
    fake_engine,
    front_door,
    until,
)

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def text_of(body: bytes) -> str:
    """Return the text of a completions stream, which must be whole."""
    data = events(body)
    assert data[-1] == "[DONE]"
    return "".join(json.loads(one)["choices"][0]["text"] for one in data[:-1])


def greedy(count: int) -> str:
    return "".join(expected_tokens("p", None, count))


async def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --------------------------------------------------------------- the plain way


async def test_a_stream_arrives_whole_and_untouched() -> None:
    async with fake_engine() as engine, front_door(engine.port) as door:
        answer = await door.post(stream=True, max_tokens=40)
        assert answer.content_type == "text/event-stream"
        body = await answer.read()
        assert text_of(body) == greedy(40)
        assert comments(body) == 0
        ended = await door.until_ended()
        assert (ended.outcome, ended.status, ended.stream) == ("ok", 200, True)
        assert ended.bytes_out == len(body)
        assert ended.ttft_s is not None
        assert door.scheduler.began == door.scheduler.granted
        assert door.scheduler.ended == door.scheduler.granted


async def test_chunks_come_as_the_engine_writes_them() -> None:
    async with fake_engine("--delay-per-token=0.05") as engine, front_door(engine.port) as door:
        answer = await door.post(stream=True, max_tokens=10)
        first = await answer.content.readany()
        assert len(events(first)) < 5
        assert door.ended == []
        await answer.read()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
async def test_each_endpoint_answers_without_a_stream(path: str) -> None:
    async with fake_engine() as engine, front_door(engine.port) as door:
        answer = await door.post(path, messages=[{"role": "user", "content": "x"}], input="x")
        assert answer.status == 200
        assert (await answer.json())["model"] == NAME
        assert (await door.until_ended()).endpoint == path


async def test_an_alias_is_replaced_by_the_name_that_the_engine_knows() -> None:
    async with fake_engine() as engine, front_door(engine.port) as door:
        await door.post(metadata={"model": ALIAS}, user=f'"model": "{ALIAS}"')
        body = (await engine.stats())["last_body"]
        assert body["model"] == NAME
        assert body["metadata"] == {"model": ALIAS}
        assert body["user"] == f'"model": "{ALIAS}"'


async def test_secrets_and_hop_by_hop_headers_stay_here() -> None:
    server = ServerConfig(api_keys=(ApiKey(secret="k1", name="a"),))
    async with fake_engine() as engine, front_door(engine.port, server=server) as door:
        sent = {
            "Authorization": "Bearer k1",
            "x-api-key": "k1",
            "Cookie": "a=b",
            "Connection": "keep-alive, X-Hop",
            "X-Hop": "1",
            "X-Request-Id": "kept",
            "x-swapserve-priority": "batch",
            "x-swapserve-deadline": "60",
        }
        assert (await door.post(headers=sent)).status == 200
        seen = {
            name.lower(): value for name, value in (await engine.stats())["last_headers"].items()
        }
        assert seen["x-request-id"] == "kept"
        assert seen["accept-encoding"] == "identity"
        assert not seen.keys() & {"authorization", "x-api-key", "cookie", "x-hop", "connection"}
        assert not any(name.startswith("x-swapserve") for name in seen)


async def test_a_golden_engine_gets_a_fresh_seed_for_sampled_requests_only() -> None:
    async with (
        fake_engine() as engine,
        front_door(engine.port, fresh_seed=True, takes_seed=True) as door,
    ):
        texts = []
        for _ in range(2):
            answer = await door.post(temperature=1)
            texts.append((await answer.json())["choices"][0]["text"])
        assert texts[0] != texts[1]
        await door.post(temperature=1, seed=7)
        assert (await engine.stats())["last_body"]["seed"] == 7
        await door.post(temperature=0)
        assert "seed" not in (await engine.stats())["last_body"]
        await door.post("/v1/embeddings", input="x", temperature=None)
        assert "seed" not in (await engine.stats())["last_body"]


async def test_an_engine_that_takes_no_seed_gets_none() -> None:
    async with fake_engine() as engine, front_door(engine.port, fresh_seed=True) as door:
        await door.post(temperature=1)
        assert "seed" not in (await engine.stats())["last_body"]


async def test_an_error_of_the_engine_passes_through() -> None:
    async with fake_engine(name="other") as engine, front_door(engine.port) as door:
        answer = await door.post(stream=True)
        assert answer.status == 404
        assert (await answer.json())["error"]["type"] == "NotFoundError"
        assert (await door.until_ended()).outcome == "rejected"


# ---------------------------------------------------------------- connections


async def test_connections_are_reused_until_they_are_asked_to_be_closed() -> None:
    async with fake_engine() as engine, front_door(engine.port) as door:
        for _ in range(3):
            await (await door.post()).read()
        assert (await engine.stats())["connections"] == 1
        await door.proxy.close_idle(NAME)
        await (await door.post()).read()
        assert (await engine.stats())["connections"] == 2


async def test_a_connection_in_use_when_idle_ones_are_closed_is_not_kept() -> None:
    async with fake_engine("--delay-per-token=0.02") as engine, front_door(engine.port) as door:
        answer = await door.post(stream=True, max_tokens=10)
        await answer.content.readany()
        await door.proxy.close_idle(NAME)
        assert events(await answer.read())[-1] == "[DONE]"
        await (await door.post(max_tokens=1)).read()
        assert (await engine.stats())["connections"] == 2


async def test_a_reused_connection_that_the_engine_dropped_costs_no_request() -> None:
    async with fake_engine() as engine, front_door(engine.port) as door:
        await (await door.post()).read()
        engine.process.kill()
        await engine.process.wait()
        async with fake_engine(f"--port={engine.port}"):
            assert (await door.post()).status == 200


async def test_an_engine_that_is_not_there_is_a_502() -> None:
    async with front_door(await free_port()) as door:
        answer = await door.post()
        assert answer.status == 502
        assert (await answer.json())["error"]["code"] == "upstream_error"
        assert (await door.until_ended()).outcome == "upstream_error"
        assert len(door.scheduler.ended) == 1


# ------------------------------------------------------------- waiting and away


async def test_a_stream_that_waits_is_kept_alive_and_then_served() -> None:
    async with fake_engine() as engine, front_door(engine.port, by_hand=True) as door:
        answer = await door.post(stream=True, max_tokens=20)
        assert answer.status == 200
        first = await answer.content.readuntil(b"\n\n")
        assert first.startswith(b":")
        door.scheduler.grant(await door.scheduler.next_waiting())
        assert text_of(await answer.read()) == greedy(20)


async def test_a_request_without_a_stream_is_held_open() -> None:
    async with fake_engine() as engine, front_door(engine.port, by_hand=True) as door:
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(door.post())
            lease = await door.scheduler.next_waiting()
            await asyncio.sleep(0.2)
            assert not asked.done()
            door.scheduler.grant(lease)
        assert (await asked.result().json())["choices"][0]["text"] == greedy(16)


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (QueueFull(NAME, 3), 429, "queue_full"),
        (StartFailed(NAME, "no model file"), 503, "engine_start_failed"),
    ],
)
async def test_a_refusal_is_an_error_object_with_a_time_to_retry(
    refusal: QueueFull | StartFailed, status: int, code: str
) -> None:
    async with front_door(1, refusal=refusal) as door:
        for stream in (False, True):
            answer = await door.post(stream=stream)
            assert answer.status == status
            assert int(answer.headers["Retry-After"]) > 0
            error = (await answer.json())["error"]
            assert (error["code"], error["message"]) == (code, str(refusal))
        assert door.scheduler.ended == []  # a refused lease is over without our word


async def test_a_refusal_after_the_headers_is_an_error_event() -> None:
    async with front_door(1, by_hand=True) as door:
        answer = await door.post(stream=True)
        lease = await door.scheduler.next_waiting()
        door.scheduler.admission.refused(lease, StartFailed(NAME, "no"))
        data = events(await answer.read())
        assert json.loads(data[0])["error"]["code"] == "engine_start_failed"
        assert data[1:] == ["[DONE]"]
        ended = await door.until_ended()
        assert (ended.outcome, ended.status) == ("engine_start_failed", 503)


async def test_an_error_of_the_engine_after_early_headers_is_an_error_event() -> None:
    async with fake_engine(name="other") as engine, front_door(engine.port, by_hand=True) as door:
        answer = await door.post(stream=True)
        assert answer.status == 200
        door.scheduler.grant(await door.scheduler.next_waiting())
        data = events(await answer.read())
        assert json.loads(data[0])["error"]["type"] == "NotFoundError"
        assert data[1:] == ["[DONE]"]
        assert (await door.until_ended()).outcome == "rejected"


async def test_a_suspended_stream_gets_comments_and_goes_on_unchanged() -> None:
    async with fake_engine("--delay-per-token=0.02") as engine, front_door(engine.port) as door:
        answer = await door.post(stream=True, max_tokens=40)
        body = await answer.content.readuntil(b"\n\n")
        lease = door.scheduler.granted[0]
        door.scheduler.admission.suspended(lease)
        engine.freeze()
        while comments(body) < 3:
            body += await answer.content.readany()
        engine.thaw()
        door.scheduler.admission.resumed(lease)
        body += await answer.read()
        assert text_of(body) == greedy(40)
        assert (await door.until_ended()).suspensions == 1


async def test_a_slow_engine_that_is_there_causes_no_comments() -> None:
    async with fake_engine("--delay-per-token=0.3") as engine, front_door(engine.port) as door:
        body = await (await door.post(stream=True, max_tokens=3)).read()
        assert comments(body) == 0
        assert text_of(body) == greedy(3)


async def test_a_lease_suspended_before_its_request_was_sent_waits_for_the_engine() -> None:
    async with fake_engine() as engine, front_door(engine.port, by_hand=True) as door:
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(door.post())
            lease = await door.scheduler.next_waiting()
            door.scheduler.grant(lease)
            door.scheduler.admission.suspended(lease)
            await asyncio.sleep(0.1)
            assert (await engine.stats())["requests"] == 0
            door.scheduler.admission.resumed(lease)
        assert asked.result().status == 200


# -------------------------------------------------------------- clients that leave


async def leave(door: FrontDoor, answer: aiohttp.ClientResponse) -> None:
    answer.close()
    await door.until_ended()
    assert door.ended[-1].outcome == "client_left"
    assert len(door.scheduler.ended) == 1


async def test_a_client_that_leaves_while_it_waits_leaves_the_queue() -> None:
    async with fake_engine() as engine, front_door(engine.port, by_hand=True) as door:
        answer = await door.post(stream=True)
        lease = await door.scheduler.next_waiting()
        await leave(door, answer)
        door.scheduler.grant(lease)  # crosses the client's leaving
        assert (await engine.stats())["requests"] == 0


async def test_a_client_that_leaves_before_any_byte_leaves_the_queue() -> None:
    async with front_door(1, by_hand=True) as door:
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(door.post())
            await door.scheduler.next_waiting()
            asked.cancel()
        await door.until_ended()
        assert len(door.scheduler.ended) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_a_running_engine_aborts_the_generation(stream: bool) -> None:
    async with fake_engine("--delay-per-token=0.02") as engine, front_door(engine.port) as door:
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(door.post(stream=stream, max_tokens=10_000))
            await engine.until(running=1)
            if stream:
                (await asked).close()
            else:
                asked.cancel()
        await engine.until(running=0, aborted=1)
        assert len(door.scheduler.ended) == 1


@pytest.mark.parametrize("begun", [True, False])
async def test_a_client_that_leaves_while_the_engine_is_away_aborts_it_on_its_return(
    begun: bool,
) -> None:
    delay = "0.02" if begun else "0.5"
    async with fake_engine(f"--delay-per-token={delay}") as engine, front_door(engine.port) as door:
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(door.post(stream=begun, max_tokens=10_000))
            await engine.until(running=1)
            if begun:
                await (await asked).content.readany()
            door.scheduler.admission.suspended(door.scheduler.granted[0])
            engine.freeze()
            if begun:
                asked.result().close()
            else:
                asked.cancel()
        await door.until_ended()
        assert len(door.scheduler.ended) == 1, "the scheduler is told at once"
        assert door.proxy.orphans(NAME) == 1
        engine.thaw()
        stats = await engine.stats()
        assert (stats["running"], stats["aborted"]) == (1, 0), "kept open until it is back"
        door.proxy.engine_back(NAME)
        await engine.until(running=0, aborted=1)
        assert door.proxy.orphans(NAME) == 0


async def test_what_was_kept_for_an_engine_that_is_gone_is_dropped() -> None:
    async with fake_engine("--delay-per-token=0.02") as engine, front_door(engine.port) as door:
        answer = await door.post(stream=True, max_tokens=10_000)
        door.scheduler.admission.suspended(door.scheduler.granted[0])
        await leave(door, answer)
        assert door.proxy.orphans(NAME) == 1
        door.proxy.engine_gone(NAME)
        assert door.proxy.orphans(NAME) == 0


# ---------------------------------------------------------------- engines that die


async def test_a_crash_in_mid_stream_is_an_error_event_with_the_reason() -> None:
    async with (
        fake_engine("--crash-after=5", "--delay-per-token=0.05") as engine,
        front_door(engine.port) as door,
    ):
        answer = await door.post(stream=True, max_tokens=50)
        await engine.process.wait()
        door.scheduler.admission.lost(door.scheduler.granted[0], EngineCrashed(NAME, "exit 70"))
        data = events(await answer.read())
        assert json.loads(data[-2])["error"]["code"] == "engine_crashed"
        assert data[-1] == "[DONE]"
        assert len(data) == 5 + 2
        assert door.scheduler.ended == []


async def test_a_crash_that_nobody_explains_is_an_error_event_too() -> None:
    async with (
        fake_engine("--crash-after=5", "--delay-per-token=0.05") as engine,
        front_door(engine.port) as door,
    ):
        data = events(await (await door.post(stream=True, max_tokens=50)).read())
        assert json.loads(data[-2])["error"]["code"] == "upstream_error"
        assert len(door.scheduler.ended) == 1


async def test_a_crash_before_the_answer_is_an_error_object() -> None:
    async with (
        fake_engine("--crash-after=5", "--delay-per-token=0.05") as engine,
        front_door(engine.port) as door,
    ):
        answer = await door.post(max_tokens=50)
        assert answer.status == 502
        assert (await answer.json())["error"]["code"] == "upstream_error"


async def test_a_suspended_stream_whose_engine_is_lost_says_so() -> None:
    async with fake_engine("--delay-per-token=0.02") as engine, front_door(engine.port) as door:
        answer = await door.post(stream=True, max_tokens=10_000)
        body = await answer.content.readuntil(b"\n\n")
        lease = door.scheduler.granted[0]
        door.scheduler.admission.suspended(lease)
        engine.freeze()  # silent: no end of stream will ever come
        door.scheduler.admission.lost(lease, EngineCrashed(NAME, "image unusable"))
        data = events(body + await answer.read())
        assert json.loads(data[-2])["error"]["code"] == "engine_crashed"


async def test_a_request_lost_before_any_answer_gets_an_error_object() -> None:
    async with fake_engine("--delay-per-token=0.5") as engine, front_door(engine.port) as door:
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(door.post(max_tokens=10_000))
            await engine.until(running=1)
            lease = door.scheduler.granted[0]
            door.scheduler.admission.lost(lease, EngineCrashed(NAME, "gone"))
        assert asked.result().status == 502
        assert (await asked.result().json())["error"]["code"] == "engine_crashed"


# ----------------------------------------------------------- the official package


async def test_the_openai_package_works_as_it_is() -> None:
    async with fake_engine() as engine, front_door(engine.port, by_hand=True) as door:
        client = openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="unused", max_retries=0)
        async with client, asyncio.TaskGroup() as group:
            grants = group.create_task(grant_slowly(door))
            chat = client.chat.completions.create
            whole = await chat(model=ALIAS, messages=HELLO, temperature=0, max_tokens=5)
            stream = await chat(
                model=ALIAS, messages=HELLO, temperature=0, max_tokens=5, stream=True
            )
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(parts) == whole.choices[0].message.content
            assert [model.id async for model in client.models.list()] == [NAME]
            vectors = await client.embeddings.create(
                model=ALIAS, input=["a", "b"], encoding_format="float"
            )
            assert len(vectors.data) == 2
            with pytest.raises(openai.NotFoundError, match="org/tiny"):
                await client.completions.create(model="org/tinny", prompt="x")
            grants.cancel()


async def grant_slowly(door: FrontDoor) -> None:
    """Grant each lease after the time at which early headers go out."""
    scheduler = door.scheduler
    while True:
        await until("one waits", lambda: len(scheduler.waiting) > len(scheduler.granted))
        await asyncio.sleep(0.15)
        scheduler.grant(scheduler.waiting[len(scheduler.granted)])


async def test_the_openai_package_sees_errors_after_early_headers() -> None:
    async with front_door(1, by_hand=True) as door:
        client = openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="unused", max_retries=0)
        async with client:
            stream = await client.completions.create(model=ALIAS, prompt="x", stream=True)
            lease = await door.scheduler.next_waiting()
            door.scheduler.admission.refused(lease, StartFailed(NAME, "no model file"))
            with pytest.raises(openai.APIError, match="no model file"):
                async for _ in stream:
                    pass
