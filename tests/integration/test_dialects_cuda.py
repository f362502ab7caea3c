"""The adapters and an engine whose memory is in (a stand-in's) GPU memory, in another process."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from swapserve.engines.base import Adapter, Rest
from swapserve.engines.registry import adapter_for
from swapserve.engines.sglang import SGLangAdapter
from swapserve.errors import QuiesceFailed
from swapserve.testing.dialects import Dialect
from tests.support.cuda import (
    CHECKPOINTED,
    FORWARD,
    OK,
    RUNNING,
    Caller,
    EngineOnGpu,
    bring_to,
    caller,
    cuda_engine,
)
from tests.support.engines import model
from tests.support.gpu import MIB, StandIn, standin
from tests.support.leaks import wait_for

pytestmark = pytest.mark.anyio

WEIGHTS_MB, CACHE_MB = 12, 4
PROMPT = "an engine on a GPU"


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[StandIn]:
    with standin(tmp_path / "gpu", gpus=[96 * MIB]) as here:
        yield here


@pytest.fixture
def call(gpu: StandIn) -> Iterator[Caller]:
    with caller(gpu) as one:
        yield one


@contextmanager
def engine_of(
    which: Dialect, gpu: StandIn, *args: str, **habits: object
) -> Iterator[tuple[EngineOnGpu, str, Adapter]]:
    words = [f"--vram-mb={WEIGHTS_MB + CACHE_MB}", f"--cache-mb={CACHE_MB}", "--name=model"]
    words += [f"--dialect={which}", f"--habits={json.dumps(habits)}", *args]
    with cuda_engine(gpu, *words) as engine:
        yield engine, f"127.0.0.1:{engine.port}", adapter_for(model(which))


def text(engine: EngineOnGpu, tokens: int = 12) -> str:
    return engine.text(tokens, model="model", prompt=PROMPT)


@pytest.mark.parametrize(
    ("which", "how", "freed_mb"),
    [
        ("vllm", "release", CACHE_MB),
        ("vllm", "sleep", WEIGHTS_MB + CACHE_MB),
        ("vllm", "deep_sleep", WEIGHTS_MB + CACHE_MB),
        ("sglang", "release", CACHE_MB),
        ("sglang", "sleep", WEIGHTS_MB + CACHE_MB),
        ("sglang", "deep_sleep", WEIGHTS_MB + CACHE_MB),
        ("ollama", "deep_sleep", WEIGHTS_MB + CACHE_MB),
    ],
)
async def test_memory_is_free_on_the_device_and_every_byte_comes_back(
    which: Dialect, how: Rest, freed_mb: int, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which of the two sleeps an SGLang can do is decided when it is launched.
    able = frozenset({"lean", "sleep", "deep_sleep"})
    monkeypatch.setattr(SGLangAdapter, "_able", lambda _self: able)
    habits = {"weights_backup": how != "deep_sleep"}
    with engine_of(which, gpu, **habits) as (engine, address, adapter):
        before = text(engine)
        used = gpu.used(gpu.uuids[0])
        for _ in range(3):
            await adapter.rest(address, how)
            assert gpu.used(gpu.uuids[0]) == used - freed_mb * MIB
            await adapter.wake(address)
            assert gpu.used(gpu.uuids[0]) == used
            assert engine.is_whole()
            assert text(engine) == before


async def test_what_is_left_after_a_release_is_moved_by_the_driver(
    gpu: StandIn, call: Caller
) -> None:
    with engine_of("vllm", gpu) as (engine, address, adapter):
        before = text(engine)
        used = gpu.used(gpu.uuids[0])
        await adapter.rest(address, "release")
        bring_to(CHECKPOINTED, call, engine.rank)
        assert gpu.used(gpu.uuids[0]) <= used - (WEIGHTS_MB + CACHE_MB) * MIB
        for op in FORWARD[2:]:
            assert call(op, engine.rank) == OK
        assert call.state(engine.rank) == RUNNING
        # It has not noticed; nothing is asked of it while it has no cache.
        assert await adapter.resting(address) is True
        await adapter.wake(address)
        assert text(engine) == before
    assert not gpu.illegal()


async def test_a_request_in_flight_keeps_its_memory(
    gpu: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swapserve.engines.vllm.IDLE_TIMEOUT_S", 0.2)
    with (
        engine_of("vllm", gpu, "--delay-per-token=0.1") as (engine, address, adapter),
        ThreadPoolExecutor(1) as pool,
    ):
        used = gpu.used(gpu.uuids[0])
        request = pool.submit(text, engine)
        wait_for("it runs", lambda: engine.get("/stats")["running"])
        with pytest.raises(QuiesceFailed) as failed:
            await adapter.rest(address, "sleep")
        assert failed.value.left_awake is True
        assert gpu.used(gpu.uuids[0]) == used
        assert request.result() == text(engine)


async def test_sleep_under_a_request_is_the_end_of_the_engine(gpu: StandIn) -> None:
    with (
        engine_of("vllm", gpu, "--delay-per-token=0.1") as (engine, address, adapter),
        ThreadPoolExecutor(1) as pool,
    ):
        request = pool.submit(text, engine)
        wait_for("it runs", lambda: engine.get("/stats")["running"])
        with pytest.raises(httpx.TransportError):
            engine.http.post("/sleep")
        assert isinstance(request.exception(), httpx.TransportError)
        assert engine.process.wait(10) == 70
        assert await adapter.resting(address) is None


async def test_a_deep_sleep_without_a_reload_gives_nonsense(gpu: StandIn) -> None:
    with engine_of("vllm", gpu) as (engine, _, _):
        before = text(engine)
        for path in ("/pause", "/sleep?level=2", "/wake_up"):
            engine.http.post(path).raise_for_status()
        assert not engine.is_whole()
        assert text(engine) != before
