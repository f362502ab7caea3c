"""Priorities, deadlines and limits through the front door, decided by the real scheduler."""

import asyncio
import time

import aiohttp
import pytest

from swapserve.states import Tier
from tests.support.front_door import until
from tests.support.two_engines import A, B, Pair, pair

pytestmark = pytest.mark.anyio
LONG = 10_000


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def refusal(answer: aiohttp.ClientResponse) -> tuple[int, str, int]:
    """Return status, code and time to retry of an answer that is an error."""
    body = await answer.json()
    return answer.status, body["error"]["code"], int(answer.headers["Retry-After"])


async def ask_as(both: Pair, priority: str) -> int:
    """Ask A for a short answer; return the status."""
    answer = await both.ask(A, headers={"x-swapserve-priority": priority}, max_tokens=2)
    await answer.read()
    return answer.status


async def until_waiting(both: Pair, count: int) -> None:
    await until("so many wait for A", lambda: both.core.counts(A)[1] == count)


async def test_who_is_more_urgent_is_served_first() -> None:
    async with pair(slots=1) as both, asyncio.TaskGroup() as group:
        running = await both.ask(A, stream=True, max_tokens=LONG)
        await running.content.readany()
        asked = []
        for number, priority in enumerate(("batch", "interactive", "batch", "urgent"), 1):
            asked.append(group.create_task(ask_as(both, priority)))
            await until_waiting(both, number)
        assert sum(both.core.queued(A).values()) == 4
        running.close()
        assert [await one for one in asked] == [200] * 4
        served = [one.priority for one in both.ended if one.outcome == "ok"]
        assert served == ["urgent", "interactive", "batch", "batch"]


async def test_no_more_requests_than_slots_are_in_an_engine() -> None:
    async with pair(slots=2) as both:
        streams = [await both.ask(A, stream=True, max_tokens=LONG) for _ in range(2)]
        for stream in streams:
            await stream.content.readany()
        waiting = await both.ask(A, stream=True, max_tokens=2)  # its headers come early
        assert both.core.counts(A) == (2, 1, 0)
        assert (await both.processes[A].stats())["running"] == 2
        streams[0].close()
        assert b"[DONE]" in await waiting.read()
        streams[1].close()
        await until("all are over", lambda: both.core.counts(A) == (0, 0, 0))


async def test_a_deadline_that_cannot_be_met_is_refused_at_once_with_the_predicted_wait() -> None:
    async with pair() as both:
        both.core.knowledge.costs.came(B, Tier.DISK, 100.0, busy=False)
        soon = {"x-swapserve-deadline": "5"}
        answer = await both.ask(B, headers=soon)
        status, code, retry_s = await refusal(answer)
        assert (status, code) == (503, "deadline_unmeetable")
        assert 100 <= retry_s <= 200
        assert both.freezer.moves == []
        # Where the engine is there, the same deadline is no matter; nor is a longer one.
        assert (await both.ask(A, headers=soon, max_tokens=1)).status == 200
        late = {"x-swapserve-deadline": "500"}
        assert (await both.ask(B, headers=late, max_tokens=1)).status == 200


async def test_a_request_whose_deadline_passes_in_the_queue_is_refused_then() -> None:
    async with pair(slots=1) as both:
        running = await both.ask(A, stream=True, max_tokens=LONG)
        await running.content.readany()
        answer = await both.ask(A, headers={"x-swapserve-deadline": "1.5"}, max_tokens=1)
        assert (await refusal(answer))[:2] == (503, "deadline_unmeetable")
        running.close()
        await until("nobody is left", lambda: both.core.counts(A) == (0, 0, 0))


async def test_the_limit_for_all_engines_together_is_a_429_of_its_own() -> None:
    async with pair(slots=1, queue_limit_total=2, quantum_s=60.0) as both:
        running = await both.ask(A, stream=True, max_tokens=LONG)
        await running.content.readany()
        waiting = [await both.ask(name, stream=True, max_tokens=1) for name in (A, B)]
        answer = await both.ask(B)
        text = (await answer.json())["error"]["message"]
        assert (await refusal(answer))[:2] == (429, "queue_full")
        assert "all models together" in text
        for stream in (*waiting, running):
            stream.close()
        await until("nobody waits", lambda: both.core.counts(B)[1] == 0)


async def test_the_scheduler_learns_from_what_was_answered() -> None:
    async with pair() as both:
        for _ in range(3):
            answer = await both.ask(A, stream=True, max_tokens=30)
            await answer.read()
        await until("all is learnt", lambda: both.core.counts(A) == (0, 0, 0))
        service = both.core.knowledge.service
        # The engine waits for 10 ms before each token.
        assert 0.009 < service.itl_s(A) < 1.0
        assert both.core.knowledge.arrivals.rate(A, time.monotonic()) > 0
