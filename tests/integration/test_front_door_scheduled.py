"""Front door and scheduler together: two engines, room for one, moved by stopping processes."""

import asyncio
import json

import pytest

from swapserve.testing.engine import expected_tokens
from tests.support.front_door import events, until
from tests.support.two_engines import A, B, pair

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def whole(body: bytes, prompt: str, count: int) -> bool:
    """Say whether a stream holds every token once, in order, and its end."""
    data = events(body)
    texts = [json.loads(one)["choices"][0]["text"] for one in data[:-1]]
    return texts == expected_tokens(prompt, None, count) and data[-1] == "[DONE]"


async def test_a_long_stream_is_preempted_for_another_model_and_goes_on() -> None:
    async with pair() as both:
        long = await both.ask(A, stream=True, max_tokens=150)
        first = await long.content.readany()
        short = await both.ask(B, stream=True, max_tokens=20)
        assert whole(await short.read(), B, 20)
        assert whole(first + await long.read(), A, 150)
        await until("both are over", lambda: len(both.ended) == 2)
        assert [one.outcome for one in both.ended] == ["ok", "ok"]
        suspended = {one.engine: one.suspensions for one in both.ended}
        # Fewer if the end of an answer and the last swap out crossed on their way.
        assert 0 < suspended[A] <= both.freezer.moves.count("a out with 1")
        assert suspended[B] <= both.freezer.moves.count("b out with 1")


async def test_many_waiters_for_one_engine_cause_one_swap() -> None:
    async with pair() as both, asyncio.TaskGroup() as group:
        asked = [group.create_task(both.ask(B, max_tokens=2)) for _ in range(5)]
        answers = [await one for one in asked]
        assert [answer.status for answer in answers] == [200] * 5
        assert both.freezer.moves == ["a out with 0", "b in"]


async def test_one_waiter_too_many_gets_a_429() -> None:
    async with pair(queue_limit=2, quantum_s=60.0) as both, asyncio.TaskGroup() as group:
        busy = await both.ask(A, stream=True, max_tokens=10_000)
        waiting = [group.create_task(both.ask(B)) for _ in range(2)]
        await until("two wait", lambda: both.core.counts(B)[1] == 2)
        refused = await both.ask(B)
        assert refused.status == 429
        assert (await refused.json())["error"]["code"] == "queue_full"
        for one in waiting:
            one.cancel()
        await until("nobody waits", lambda: both.core.counts(B)[1] == 0)
        busy.close()


async def test_a_client_that_leaves_while_suspended_does_not_bring_its_engine_back() -> None:
    async with pair() as both:
        left = await both.ask(A, stream=True, max_tokens=10_000)
        await left.content.readany()
        assert (await both.ask(B, max_tokens=2)).status == 200
        left.close()
        await until("its end is known", lambda: both.core.counts(A) == (0, 0, 0))
        assert both.freezer.moves[:2] == ["a out with 1", "b in"]
        if "a in" not in both.freezer.moves:
            assert both.freezer.proxy.orphans(A) == 1
        assert (await both.ask(A, max_tokens=2)).status == 200
        await both.processes[A].until(running=0, aborted=1)
