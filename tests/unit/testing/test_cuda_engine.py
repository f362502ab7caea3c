"""The engine on a GPU keeps its word: its text comes from device memory, and shows losses."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from swapserve.testing.cuda_engine import expected_tokens, token_of
from swapserve.testing.engine import CRASH_STATUS
from tests.support.cuda import PATIENCE_S, EngineOnGpu, cuda_engine
from tests.support.gpu import MIB, StandIn, standin
from tests.support.leaks import wait_for


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[StandIn]:
    with standin(tmp_path / "gpu", gpus=[64 * MIB, 64 * MIB]) as here:
        yield here


def text_of(*words: Any) -> str:
    return "".join(expected_tokens(*words))


def test_text_is_a_function_of_prompt_and_seed_on_any_number_of_ranks(gpu: StandIn) -> None:
    assert len({text_of("p", None, 9), text_of("p", 5, 9), text_of("q", None, 9)}) == 3
    for ranks in ("1", "2"):
        with cuda_engine(gpu, "--vram-mb=8", "--cache-mb=1", f"--ranks={ranks}") as engine:
            assert engine.text(100) == text_of("p", None, 100)
            assert engine.text(9, temperature=1, seed=5) == text_of("p", 5, 9)
            assert engine.text(9, temperature=1) != engine.text(9, temperature=1)


def test_each_rank_has_a_device_of_its_own(gpu: StandIn) -> None:
    with cuda_engine(gpu, "--vram-mb=8", "--cache-mb=1", "--ranks=2") as engine:
        assert engine.get("/weights") == {"whole": True, "devices": list(gpu.uuids)}
        both = [8 * MIB + gpu.config.context_bytes] * 2
        assert [gpu.used(uuid) for uuid in gpu.uuids] == both
        assert len(set(engine.ranks)) == 2


def test_the_word_of_a_token_tells_ranks_that_do_not_agree() -> None:
    state, other = bytes(range(32)), bytes(range(1, 33))
    assert token_of(state, 0) != token_of(state + other, 0)


def stream(engine: EngineOnGpu, tokens: int) -> str:
    """Return the lines of a streamed chat."""
    body = {"model": "fake", "messages": [], "temperature": 0, "stream": True}
    answer = engine.http.post("/v1/chat/completions", json={**body, "max_tokens": tokens})
    return answer.text


def test_chat_is_streamed_a_token_at_a_time(gpu: StandIn) -> None:
    with cuda_engine(gpu, "--vram-mb=4", "--cache-mb=1") as engine:
        lines = stream(engine, 5).split("\n\n")
        for token, line in zip(expected_tokens("[]", None, 5), lines, strict=False):
            assert f'"{token}"' in line
        assert lines[5] == "data: [DONE]"


def test_a_client_that_leaves_ends_its_sequence(gpu: StandIn) -> None:
    with cuda_engine(gpu, "--vram-mb=4", "--cache-mb=1", "--delay-per-token=0.05") as engine:
        with pytest.raises(httpx.ReadTimeout):
            engine.http.post(
                "/v1/completions",
                json={"model": "fake", "prompt": "p", "max_tokens": 10_000},
                timeout=0.3,
            )
        wait_for("it was aborted", lambda: engine.get("/stats")["aborted"] == 1)
        assert engine.get("/stats")["running"] == 0


def test_a_child_may_initialise_cuda_when_told_to(gpu: StandIn, tmp_path: Path) -> None:
    trigger = tmp_path / "now"
    args = ("--vram-mb=4", "--cache-mb=1", "--late-mb=3", f"--late-trigger={trigger}")
    with cuda_engine(gpu, *args) as engine:
        alone = 4 * MIB + gpu.config.context_bytes
        assert not engine.get("/stats")["late"]["has_cuda"]
        assert gpu.used(gpu.uuids[0]) == alone
        trigger.touch()
        wait_for("it has come", lambda: engine.get("/stats")["late"]["has_cuda"])
        late = 3 * MIB + MIB + gpu.config.context_bytes
        assert gpu.used(gpu.uuids[0]) == alone + late


def test_it_ends_with_any_of_its_ranks_and_they_with_it(gpu: StandIn) -> None:
    with cuda_engine(gpu, "--vram-mb=4", "--cache-mb=1", "--ranks=2") as engine:
        first, second = engine.ranks
        os.kill(first, signal.SIGKILL)
        assert engine.process.wait(PATIENCE_S) == CRASH_STATUS
        wait_for("the other has ended", lambda: not Path(f"/proc/{second}").exists())
    with cuda_engine(gpu, "--vram-mb=4", "--cache-mb=1") as engine:
        rank = engine.rank
        engine.process.terminate()
        assert engine.process.wait(PATIENCE_S) == 0
        assert not Path(f"/proc/{rank}").exists()


def test_it_does_not_start_without_room_or_driver(gpu: StandIn) -> None:
    with pytest.raises(AssertionError, match="did not start"), cuda_engine(gpu, "--vram-mb=64"):
        pass
    with (
        pytest.raises(AssertionError, match="did not start"),
        cuda_engine(gpu, LD_LIBRARY_PATH="/"),
    ):
        pass
    assert gpu.sweep() == dict.fromkeys(gpu.uuids, 0)


def post(engine: EngineOnGpu, path: str) -> httpx.Response:
    return engine.http.post(path).raise_for_status()


@pytest.mark.parametrize("level", [1, 2])
def test_its_memory_can_be_released_and_taken_again(gpu: StandIn, level: int) -> None:
    with cuda_engine(gpu, "--vram-mb=16", "--cache-mb=4", "--dialect=vllm") as engine:
        text = engine.text(20)
        post(engine, "/pause")
        post(engine, f"/sleep?level={level}")
        assert gpu.used(gpu.uuids[0]) == gpu.config.context_bytes
        post(engine, "/wake_up")
        assert gpu.used(gpu.uuids[0]) == 16 * MIB + gpu.config.context_bytes
        if level == 2:
            assert not engine.is_whole()
            assert engine.text(20) != text
            engine.http.post("/collective_rpc", json={"method": "reload_weights"})
        assert engine.is_whole()
        assert engine.text(20) == text


def test_released_memory_is_missed(gpu: StandIn) -> None:
    with cuda_engine(gpu, "--vram-mb=8", "--cache-mb=2", "--dialect=sglang") as engine:
        body = {"tags": ["weights"]}
        engine.http.post("/release_memory_occupation", json=body).raise_for_status()
        with pytest.raises(httpx.RemoteProtocolError):
            engine.text(1)
        assert engine.process.wait(PATIENCE_S) == CRASH_STATUS
