"""The fake engine keeps its word, because other tests rely on it."""

import asyncio
import signal
import time

import aiohttp
import pytest

from swapserve.testing.engine import CRASH_STATUS, expected_tokens
from tests.support.front_door import EngineProcess, fake_engine

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def text(engine: EngineProcess, **body: object) -> str:
    full = {"model": "fake", "prompt": "p", **body}
    url = f"http://127.0.0.1:{engine.port}/v1/completions"
    async with aiohttp.ClientSession() as session, session.post(url, json=full) as answer:
        found: str = (await answer.json())["choices"][0]["text"]
        return found


async def test_greedy_text_is_a_function_of_the_prompt_and_seeds_change_sampled_text() -> None:
    async with fake_engine(name="fake") as engine:
        assert await text(engine, temperature=0) == "".join(expected_tokens("p", None, 16))
        assert await text(engine, temperature=0, seed=5) == await text(engine, temperature=0)
        assert await text(engine, seed=5) == await text(engine, seed=5)
        assert await text(engine, seed=5) != await text(engine, seed=6)
        assert await text(engine) != await text(engine)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_logprobs_come_where_they_are_asked_for(path: str) -> None:
    async with fake_engine(name="fake") as engine, aiohttp.ClientSession() as session:
        for asked in (True, False):
            body = {"model": "fake", "messages": [], "max_tokens": 2, "logprobs": asked}
            url = f"http://127.0.0.1:{engine.port}{path}"
            async with session.post(url, json=body) as answer:
                choice = (await answer.json())["choices"][0]
            if not asked:
                assert choice["logprobs"] is None
            elif path == "/v1/completions":
                assert len(choice["logprobs"]["token_logprobs"]) == 2
            else:
                assert len(choice["logprobs"]["content"]) == 2


async def test_it_crashes_after_so_many_tokens() -> None:
    async with fake_engine("--crash-after=3", name="fake") as engine:
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await text(engine, max_tokens=4)
        assert await engine.process.wait() == CRASH_STATUS


async def test_it_ends_on_term_unless_told_to_be_deaf() -> None:
    async with fake_engine() as engine:
        engine.process.terminate()
        assert await engine.process.wait() == 0
    async with fake_engine("--ignore-term") as engine:
        engine.process.terminate()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await engine.process.wait()
        assert (await engine.stats())["running"] == 0
        engine.process.kill()
        assert await engine.process.wait() == -signal.SIGKILL


async def test_it_listens_only_after_its_startup_delay_and_holds_its_memory() -> None:
    started = time.monotonic()
    async with fake_engine("--startup-delay=0.5", "--memory-mb=64") as engine:
        assert time.monotonic() - started >= 0.5
        with open(f"/proc/{engine.process.pid}/status", encoding="ascii") as status:  # noqa: ASYNC230, PTH123
            rss = next(line for line in status if line.startswith("VmRSS"))
        assert int(rss.split()[1]) > 64 << 10
