"""A real vLLM's calls for memory: what the adapter makes of them, and that the stand-in is alike.

On a CPU they move no memory; everything else about them is as on a GPU, deep sleep's reading of the
weights from disk included.
"""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest

from swapserve.engines.base import Adapter, Canary, Rest
from swapserve.engines.registry import adapter_for
from swapserve.errors import QuiesceFailed
from tests.support.engines import model, running
from tests.support.vllm_server import VLLM, running_vllm

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.engines,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(VLLM is None, reason="no vLLM; run scripts/setup --engines"),
]

SLEEPS: tuple[Rest, ...] = ("sleep", "deep_sleep")
RPC = "/collective_rpc"
WEIGHTS_LOST = re.compile(r'^vllm:engine_sleep_state\{.*sleep_state="(\w+)".*\} (\S+)$', re.M)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_vllm(tmp_path_factory.mktemp("vllm")) as address:
        yield address


@pytest.fixture
def adapter() -> Adapter:
    return adapter_for(model("vllm"))


async def answer(adapter: Adapter, address: str) -> Canary:
    canary = await adapter.warm_up(address)
    assert canary is not None
    return canary


@pytest.mark.parametrize("how", SLEEPS)
async def test_it_sleeps_and_wakes_with_the_same_answers(
    how: Rest, address: str, adapter: Adapter
) -> None:
    before = await answer(adapter, address)
    assert await adapter.resting(address) is False
    for wakes in (adapter, adapter_for(model("vllm"))):  # itself, and one that knows nothing
        await adapter.rest(address, how)
        assert await wakes.resting(address) is True
        await wakes.wake(address)
        assert await wakes.resting(address) is False
        before.check("model", await answer(adapter, address))


async def test_it_is_awake_already(address: str, adapter: Adapter) -> None:
    await adapter.wake(address)
    assert await adapter.resting(address) is False


async def test_a_release_that_fails_is_taken_back(address: str, adapter: Adapter) -> None:
    # A CPU build cannot drop its cache, but counts it as dropped all the same.
    before = await answer(adapter, address)
    with pytest.raises(QuiesceFailed, match="not supported on CPU") as failed:
        await adapter.rest(address, "release")
    assert failed.value.left_awake is True
    assert not failed.value.unsupported
    assert await adapter.resting(address) is False
    before.check("model", await answer(adapter, address))


@asynccontextmanager
async def stream(address: str, tokens: int) -> AsyncIterator[httpx.Response]:
    body = {"model": "model", "prompt": "once", "max_tokens": tokens, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    url = f"http://{address}/v1/completions"
    async with (
        httpx.AsyncClient(timeout=60.0) as http,
        http.stream("POST", url, json=body) as answer,
    ):
        yield answer


async def test_a_request_that_comes_with_the_sleep_is_served_before_or_after(
    address: str, adapter: Adapter
) -> None:
    for how in SLEEPS:
        async with stream(address, 200) as answered:
            await adapter.rest(address, how)
            assert await adapter.resting(address) is True
            await adapter.wake(address)
            assert b'"completion_tokens":200}' in await answered.aread()


async def test_a_request_that_does_not_end_keeps_it_awake_and_is_not_harmed(
    address: str, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swapserve.engines.vllm.IDLE_TIMEOUT_S", 0.3)
    async with stream(address, 1800) as answered:
        pieces = answered.aiter_bytes()
        await anext(pieces)
        with pytest.raises(QuiesceFailed) as failed:
            await adapter.rest(address, "sleep")
        assert failed.value.left_awake is True
        assert await adapter.resting(address) is False
        assert b'"completion_tokens":1800}' in b"".join([piece async for piece in pieces])
    # The pause that was given up does not come true when the engine is idle again.
    assert await adapter.resting(address) is False
    assert (await answer(adapter, address)).tokens


CALLS: list[tuple[str, str, object]] = [
    ("GET", "/is_sleeping", None),
    ("GET", "/is_paused", None),
    ("GET", "/sleep", None),
    ("POST", "/sleep?level=7", None),
    ("POST", "/pause?mode=soon", None),
    ("POST", "/release_kv_cache_memory", None),
    ("POST", "/pause?mode=wait", None),
    ("GET", "/is_paused", None),
    ("GET", "/is_sleeping", None),
    ("POST", "/resume", None),
    ("GET", "/is_sleeping", None),
    ("GET", "/metrics", None),
    ("POST", "/sleep", None),
    ("GET", "/metrics", None),
    ("GET", "/is_paused", None),
    ("POST", "/wake_up?tags=nonsense", None),
    ("POST", "/wake_up?tags=weights", None),
    ("GET", "/is_sleeping", None),
    ("POST", "/wake_up?tags=weights", None),
    ("POST", "/wake_up?tags=kv_cache", None),
    ("GET", "/is_paused", None),
    ("POST", "/wake_up", None),
    ("POST", "/pause?mode=keep", None),
    ("POST", "/sleep?level=2", None),
    ("GET", "/metrics", None),
    ("POST", "/wake_up?tags=weights", None),
    ("GET", "/metrics", None),
    ("POST", RPC, {"method": "reload_weights"}),
    ("POST", "/wake_up?tags=kv_cache", None),
    ("POST", "/reset_prefix_cache", None),
    ("GET", "/metrics", None),
    ("POST", RPC, {"method": "nonsense"}),
    ("POST", RPC, {}),
    ("POST", RPC, [1]),
    ("POST", "/sleep?level=0", None),
    ("GET", "/is_paused", None),
    ("POST", "/wake_up?tags=scheduling", None),
    ("GET", "/is_paused", None),
]


async def transcript(address: str) -> list[tuple[str, int, object]]:
    """Make all the calls; return each one's status and, if it is a success, its answer."""
    said: list[tuple[str, int, object]] = []
    # After an error vLLM closes the connection.
    close = {"Connection": "close"}
    async with httpx.AsyncClient(base_url=f"http://{address}", timeout=60.0, headers=close) as http:
        for method, path, body in CALLS:
            # `json=None` sends no body at all.
            answer = await http.request(method, path, json=body)
            content: object = None
            if path == "/metrics":
                content = {name: float(value) for name, value in WEIGHTS_LOST.findall(answer.text)}
            elif answer.is_success:
                content = answer.json()
            said.append((f"{method} {path} {body or ''}", answer.status_code, content))
    return said


async def test_the_stand_in_answers_as_it_does(address: str) -> None:
    async with running("vllm") as engine:
        assert await transcript(engine.address) == await transcript(address)
