"""Engines that sleep by their own calls, as the ledger and the next daemon see them."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from swapserve.testing.cuda_engine import expected_tokens
from tests.support.daemon import Daemon
from tests.support.gpu_daemon import MIB, SHARE, GpuSite, cuda, gpu_site
from tests.support.leaks import wait_for
from tests.support.oracle import Answer, completion, stream

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(200)]
GPU_BYTES = 128 * MIB
CONTEXT_BYTES = 16 * MIB
"""What an engine that sleeps keeps of its GPU: a good part of it here."""
TOKENS = 8
LONG = 300
BY_ITSELF = pytest.mark.parametrize("mechanism", ["sleep", "deep_sleep"])


@contextmanager
def engines(
    directory: Path, mechanism: str, *, big: float | None = None, **habits: Any
) -> Iterator[tuple[GpuSite, Daemon]]:
    """Run `a` and `b`, which do not fit together; `c` takes a share `big` and cannot sleep."""
    with gpu_site(
        directory,
        gpus=(GPU_BYTES,),
        recipe_changes={
            "adapter": "vllm",
            "gpu_args": ["--enable-sleep-mode"],
            "gpu_env": {"VLLM_SERVER_DEV_MODE": "1"},
            "mechanisms": ["checkpoint", "lean", "sleep", "deep_sleep", "restart"],
        },
        args=["--dialect=vllm", "--delay-per-token=0.005", f"--habits={json.dumps(habits)}"],
        model={"tiers": ["host"], "sandbox": False, "keep_cache": "never", "mechanism": mechanism},
        standing={"context_bytes": CONTEXT_BYTES},
    ) as here:
        if big is not None:
            third = cuda("c", here.gpus, "--dialect=vllm", share=big, mechanism="checkpoint")
            third |= {"tiers": ["host"], "sandbox": False}
            here.site.models = [*here.site.models, third]
            here.site.configure(here.site.models, **here.site.sections)
        yield here, here.start()


async def ask(daemon: Daemon, model: str, tokens: int = TOKENS, **more: Any) -> Answer:
    """Let an engine answer; each token went through its GPU memory."""
    body = completion(model, tokens)
    async with daemon.http() as http:
        answer = await stream(http, daemon.completions, body, **more)
    assert answer.error is None, answer.error
    assert answer.text == "".join(expected_tokens(body["prompt"], None, tokens))
    return answer


def committed(daemon: Daemon, device: str) -> int:
    found = next(one for one in daemon.status().devices if one.name == device)
    assert found.reserved_bytes == 0
    return found.committed_bytes


def check_ledger(here: GpuSite, daemon: Daemon) -> None:
    """What is promised of the GPU is what is used, but for what was rounded down to a MiB."""
    used = here.gpus.used(here.gpus.uuids[0])
    assert 0 <= committed(daemon, "gpu0") - used < MIB, daemon.status()


@BY_ITSELF
async def test_the_ledger_holds_what_an_engine_keeps_while_it_sleeps(
    mechanism: str, tmp_path: Path
) -> None:
    with engines(tmp_path, mechanism) as (here, daemon):
        size = int(GPU_BYTES * SHARE)
        for model in ("a", "b"):
            await ask(daemon, model)
        assert committed(daemon, "gpu0") == size + CONTEXT_BYTES
        check_ledger(here, daemon)
        # Only one of the two ways keeps the weights in RAM.
        in_ram = size - CONTEXT_BYTES if mechanism == "sleep" else 0
        assert committed(daemon, "host") == in_ram
        await ask(daemon, "a")
        assert daemon.swaps("a")[-1].mechanism == "wake"
        check_ledger(here, daemon)
        assert daemon.stop() == 0
        here.check()


@BY_ITSELF
async def test_a_sleeping_engine_gives_up_its_residue_to_one_that_needs_it(
    mechanism: str, tmp_path: Path
) -> None:
    with engines(tmp_path, mechanism, big=0.9) as (here, daemon):
        for model in ("a", "b"):
            await ask(daemon, model)
        pids = {name: daemon.pid(name) for name in ("a", "b")}
        in_ram = committed(daemon, "host")
        await ask(daemon, "c")
        a, b = daemon.engine("a"), daemon.engine("b")
        assert {(one.state, one.tier) for one in (a, b)} == {("swapped_out", "host")}
        assert [move.mechanism for move in daemon.swaps("a")[-1:]] == ["checkpoint"]
        check_ledger(here, daemon)
        assert committed(daemon, "host") == 2 * (in_ram + CONTEXT_BYTES)
        for model in ("a", "b"):
            await ask(daemon, model)
        assert {name: daemon.pid(name) for name in ("a", "b")} == pids, "woken, not started again"
        assert not [move.error for move in daemon.swaps() if move.error]
        check_ledger(here, daemon)
        here.check()


@BY_ITSELF
async def test_the_next_daemon_counts_an_engine_that_sleeps_and_wakes_it(
    mechanism: str, tmp_path: Path
) -> None:
    with engines(tmp_path, mechanism) as (here, daemon):
        for model in ("a", "b"):
            await ask(daemon, model)
        pid = daemon.pid("a")
        before = {device: committed(daemon, device) for device in ("gpu0", "host")}
        daemon.kill()
        again = here.start()
        again.wait_for_state("b", "ready")
        a = again.engine("a")
        assert (a.state, a.tier, a.pid) == ("swapped_out", "host", pid)
        assert {device: committed(again, device) for device in before} == before
        check_ledger(here, again)
        await ask(again, "a")
        assert again.swaps("a")[-1].mechanism == "wake"
        assert again.pid("a") == pid
        here.check()


async def test_a_stream_keeps_its_tokens_where_idle_engines_sleep(tmp_path: Path) -> None:
    with engines(tmp_path, "sleep") as (here, daemon):
        for model in ("b", "a"):
            await ask(daemon, model)
        at = asyncio.Event()

        def watch(answer: Answer) -> None:
            if len(answer.pieces) == TOKENS:
                at.set()

        async with asyncio.TaskGroup() as tasks:
            long = tasks.create_task(ask(daemon, "a", LONG, on_piece=watch))
            await at.wait()
            await ask(daemon, "b")
        assert long.result().done
        assert [move.mechanism for move in daemon.swaps("a")[-2:]] == ["checkpoint", "resume"]
        check_ledger(here, daemon)
        here.check()


async def test_an_engine_that_dies_asleep_gives_all_back_and_starts_again(tmp_path: Path) -> None:
    with engines(tmp_path, "sleep") as (here, daemon):
        for model in ("a", "b"):
            await ask(daemon, model)
        os.kill(daemon.pid("a"), signal.SIGKILL)
        daemon.wait_for_state("a", "failed")
        assert committed(daemon, "host") == 0
        wait_for(
            "its memory is free", lambda: here.gpus.used(here.gpus.uuids[0]) < GPU_BYTES * SHARE
        )
        check_ledger(here, daemon)
        await ask(daemon, "a")
        assert daemon.swaps("a")[-1].mechanism == "cold"
        assert not here.gpus.illegal()


async def test_an_engine_that_does_not_wake_starts_again(tmp_path: Path) -> None:
    with engines(tmp_path, "sleep", refused=["/wake_up"]) as (here, daemon):
        for model in ("a", "b"):
            await ask(daemon, model)
        await ask(daemon, "a")
        last = daemon.swaps("a")[-2:]
        assert [(move.mechanism, bool(move.error)) for move in last] == [
            ("wake", True),
            ("cold", False),
        ]
        check_ledger(here, daemon)
        here.check()
