"""The whole daemon with engines that can rest by their own calls, on the stand-in driver."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from swapserve.status import SwapSummary
from swapserve.swap.mechanisms import TRIES
from swapserve.testing.cuda_engine import expected_tokens
from tests.support.daemon import Daemon
from tests.support.gpu_daemon import MIB, GpuSite, gpu_site
from tests.support.oracle import completion

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
TOKENS = 8
FLAGS: Mapping[str, tuple[list[str], dict[str, str]]] = {
    "vllm": (["--enable-sleep-mode"], {"VLLM_SERVER_DEV_MODE": "1"}),
    "sglang": (["--enable-memory-saver", "--enable-weights-cpu-backup"], {}),
    "ollama": ([], {}),
}
SLOW_CALLS = {"/sleep": 0.8, "/release_kv_cache_memory": 0.8}
ALL = ["checkpoint", "lean", "sleep", "deep_sleep", "restart"]


@contextmanager
def engines_of(
    dialect: str,
    directory: Path,
    *,
    mechanism: str = "auto",
    ns_per_byte: float = 0.0,
    seconds: Mapping[str, float] | None = None,
) -> Iterator[tuple[GpuSite, Daemon]]:
    """Run a daemon with two engines that speak the dialect and do not fit together."""
    args, env = FLAGS[dialect]
    changes: dict[str, Any] = {"adapter": dialect, "gpu_args": args, "gpu_env": env}
    model = {
        "tiers": ["host"],
        "sandbox": False,
        "keep_cache": "never",
        "mechanism": mechanism,
    }
    with gpu_site(
        directory,
        gpus=(96 * MIB,),
        recipe_changes={**changes, "mechanisms": ALL},
        args=[f"--dialect={dialect}", f"--habits={json.dumps({'seconds': seconds or {}})}"],
        model=model,
        standing={
            "checkpoint_ns_per_byte": ns_per_byte,
            "restore_ns_per_byte": ns_per_byte,
            "context_bytes": MIB,
        },
    ) as here:
        yield here, here.start()


def ask(daemon: Daemon, model: str) -> None:
    """Let the engine answer, in which each byte went through GPU memory."""
    body = completion(model, TOKENS)
    answer = httpx.post(daemon.completions, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    text = "".join(expected_tokens(body["prompt"], None, TOKENS))
    assert answer.json()["choices"][0]["text"] == text


def out_and_in(daemon: Daemon, model: str) -> list[tuple[SwapSummary, SwapSummary]]:
    """Return the moves of an engine since its first start, in pairs."""
    _, *moves = [move for move in daemon.swaps(model) if move.error is None]
    pairs = list(zip(moves[::2], moves[1::2], strict=False))
    assert {out.kind for out, _ in pairs} == {"swap_out"}
    return pairs


@pytest.mark.parametrize(
    ("dialect", "mechanism", "back"),
    [
        ("vllm", "lean", "resume"),
        ("vllm", "sleep", "wake"),
        ("vllm", "deep_sleep", "wake"),
        ("sglang", "lean", "resume"),
        ("sglang", "sleep", "wake"),
        ("ollama", "deep_sleep", "wake"),
    ],
)
def test_engines_take_turns_by_their_own_means(
    dialect: str, mechanism: str, back: str, tmp_path: Path
) -> None:
    with engines_of(dialect, tmp_path, mechanism=mechanism) as (here, daemon):
        for model in ("a", "b", "a", "b", "a"):
            ask(daemon, model)
        moves = out_and_in(daemon, "a")
        assert [(out.mechanism, into.mechanism) for out, into in moves] == [(mechanism, back)] * 2
        a, b = daemon.engine("a"), daemon.engine("b")
        assert (a.state, b.state, b.tier) == ("ready", "swapped_out", "host")
        here.check()


def test_a_sleeping_engine_is_found_and_woken_by_the_next_daemon(tmp_path: Path) -> None:
    with engines_of("vllm", tmp_path, mechanism="deep_sleep") as (here, daemon):
        for model in ("a", "b"):
            ask(daemon, model)
        pid = daemon.pid("a")
        daemon.kill()
        again = here.start()
        ask(again, "a")
        assert again.pid("a") == pid


@pytest.mark.parametrize(
    ("ns_per_byte", "seconds", "best"),
    [
        pytest.param(8.0, {}, {"sleep", "deep_sleep"}, id="slow driver"),
        pytest.param(0.0, SLOW_CALLS, {"checkpoint"}, id="slow calls"),
    ],
)
def test_auto_finds_the_mechanism_that_is_cheapest_here(
    ns_per_byte: float, seconds: Mapping[str, float], best: set[str], tmp_path: Path
) -> None:
    with engines_of("vllm", tmp_path, ns_per_byte=ns_per_byte, seconds=seconds) as (here, daemon):
        for _ in range(14):
            for model in ("a", "b"):
                ask(daemon, model)
        moves = out_and_in(daemon, "a")
        assert len(moves) >= 12
        costs: dict[str, list[float]] = {}
        for out, into in moves:
            costs.setdefault(out.mechanism, []).append(out.seconds + into.seconds)
        assert len(costs) >= 4, costs
        assert all(len(costs[dear]) <= TRIES for dear in costs.keys() - best), costs
        assert {out.mechanism for out, _ in moves[-3:]} <= best, costs
        here.check()
