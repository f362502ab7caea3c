"""What the scheduler is told of a request: what it asks at first, what it has used in the end."""

import asyncio

import pytest

from swapserve.config.schema import ApiKey, ServerConfig
from swapserve.messages import Ask
from swapserve.states import Priority
from tests.support.front_door import NAME, fake_engine, front_door

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_the_scheduler_is_told_what_is_asked() -> None:
    key = ApiKey(secret="hush", name="nightly", priority="interactive")
    server = ServerConfig(api_keys=(ApiKey(secret="x", name="x"), key))
    headers = {
        "Authorization": "Bearer hush",
        "x-swapserve-priority": "batch",
        "x-swapserve-deadline": "2.5",
    }
    async with fake_engine() as engine, front_door(engine.port, server=server) as door:
        answer = await door.post(headers=headers, max_tokens=7, prompt="p" * 4000)
        assert answer.status == 200
        (ask,) = door.scheduler.asks
        assert (ask.priority, ask.deadline_s, ask.key) == (Priority.BATCH, 2.5, "nightly")
        assert ask.tokens_max == 7
        assert 1000 <= ask.tokens_in <= 1100
        assert ask.conversation != 0
        ended = await door.until_ended()
        assert (ended.priority, ended.key) == ("batch", "nightly")
        assert (ended.tokens_in, ended.tokens_out) == (ask.tokens_in, 7.0)


async def test_a_model_s_deadline_holds_for_who_brings_none() -> None:
    async with fake_engine() as engine, front_door(engine.port, deadline_s=9.0) as door:
        await door.post()
        await door.post(headers={"x-swapserve-deadline": "30"})
        assert [ask.deadline_s for ask in door.scheduler.asks] == [9.0, 30.0]
        assert door.scheduler.asks[0] == Ask(
            deadline_s=9.0,
            tokens_in=door.scheduler.asks[0].tokens_in,
            conversation=door.scheduler.asks[0].conversation,
        )


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("usage", [True, False])
async def test_a_stream_tells_its_tokens_and_the_time_of_both_its_parts(
    path: str, usage: bool
) -> None:
    async with fake_engine("--delay-per-token=0.02") as engine, front_door(engine.port) as door:
        answer = await door.post(
            path,
            stream=True,
            max_tokens=20,
            messages=[{"role": "user", "content": "x"}],
            stream_options={"include_usage": usage},
        )
        await answer.read()
        await door.until_ended()
        (used,) = door.scheduler.used
        assert used is not None
        assert used.tokens_out == 20
        assert used.tokens_in == door.scheduler.asks[0].tokens_in
        assert used.prefill_s is not None
        assert used.decode_s is not None
        assert used.prefill_s > 0
        assert used.decode_s >= 19 * 0.02 * 0.9


async def test_an_answer_without_a_stream_tells_its_tokens_only() -> None:
    async with fake_engine() as engine, front_door(engine.port) as door:
        await (await door.post(max_tokens=11)).read()
        await (await door.post("/v1/embeddings", input="x")).read()
        await door.until_ended(2)
        told = [(one.tokens_out, one.prefill_s, one.decode_s) for one in door.scheduler.used if one]
        assert told == [(11.0, None, None), (0.0, None, None)]


async def test_a_suspension_makes_the_time_of_the_part_it_fell_into_unknown() -> None:
    async with fake_engine("--delay-per-token=0.25") as engine, front_door(engine.port) as door:
        admission = door.scheduler.admission
        # Before the first token.
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(door.post(stream=True, max_tokens=5))
            await engine.until(running=1)
            admission.suspended(door.scheduler.granted[-1])
            admission.resumed(door.scheduler.granted[-1])
        await asked.result().read()
        # After it.
        answer = await door.post(stream=True, max_tokens=5)
        await answer.content.readuntil(b"\n\n")
        admission.suspended(door.scheduler.granted[-1])
        admission.resumed(door.scheduler.granted[-1])
        await answer.read()
        await door.until_ended(2)
        before, after = door.scheduler.used
        assert before is not None
        assert after is not None
        assert (before.prefill_s is None, before.decode_s is None) == (True, False)
        assert (after.prefill_s is None, after.decode_s is None) == (False, True)
        assert before.tokens_out == after.tokens_out == 5


async def test_an_answer_that_was_not_whole_tells_nothing() -> None:
    async with fake_engine("--delay-per-token=0.05") as engine, front_door(engine.port) as door:
        answer = await door.post(stream=True, max_tokens=10_000)
        await answer.content.readuntil(b"\n\n")
        answer.close()
        assert (await door.until_ended()).tokens_out is None
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(door.post(stream=True, max_tokens=10_000))
            await engine.until(running=1)
            engine.process.kill()
        await asked.result().read()
        await door.until_ended(2)
        assert door.scheduler.used == [None, None]


async def test_a_refusal_of_the_engine_tells_nothing() -> None:
    async with fake_engine(name="other") as engine, front_door(engine.port) as door:
        assert (await door.post(stream=True)).status == 404
        assert (await door.until_ended()).engine == NAME
        assert door.scheduler.used == [None]
