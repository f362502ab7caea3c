"""The whole daemon with engines that it does not start as its own children: attached ones, and
containers (of the stub runtime), with GPU state on the stand-in driver."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from swapserve.testing.cuda_engine import expected_tokens
from tests.support.container_runtime import installed
from tests.support.cuda import EngineOnGpu, cuda_engine
from tests.support.daemon import Daemon
from tests.support.gpu import standin
from tests.support.gpu_daemon import MIB, GpuSite, cuda, gpu_site
from tests.support.leaks import wait_for
from tests.support.oracle import Answer, completion, stream

pytestmark = [pytest.mark.anyio]
TOKENS = 300
PACE = "--delay-per-token=0.005"


def text_of(model: str, tokens: int) -> str:
    body = completion(model, tokens)
    return "".join(expected_tokens(body["prompt"], None, tokens))


def ask(daemon: Daemon, model: str, tokens: int = 8) -> str:
    answer = httpx.post(daemon.completions, json=completion(model, tokens), timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def refused(daemon: Daemon, model: str) -> httpx.Response:
    return httpx.post(daemon.completions, json=completion(model, 4), timeout=60)


async def cut_short(daemon: Daemon) -> Answer:
    """Return a stream of `a` in whose middle `b` was asked for."""
    at = asyncio.Event()

    def watch(answer: Answer) -> None:
        if len(answer.pieces) == 60:
            at.set()

    async with daemon.http() as http, asyncio.TaskGroup() as tasks:
        body = completion("a", TOKENS)
        long = tasks.create_task(stream(http, daemon.completions, body, on_piece=watch))
        await at.wait()
        other = await stream(http, daemon.completions, completion("b", 8))
        assert other.text == text_of("b", 8)
    return long.result()


@contextmanager
def attached(directory: Path) -> Iterator[tuple[GpuSite, EngineOnGpu]]:
    """A site with `b` of its own, and `a`, which others have started."""
    gpus = (256 * MIB,)
    with standin(directory / "gpu", gpus=gpus) as there:
        size = cuda("a", there)["args"][0]
        with cuda_engine(there, size, "--name=a", PACE) as engine:
            b = cuda("b", there, tiers=["host"], sandbox=False)
            a = {
                "name": "a",
                "recipe": "cuda",
                "device": "gpu0",
                "attach": f"port:{engine.port}",
                "memory": cuda("a", there)["memory"],
            }
            with gpu_site(directory, (), there=there, more=[a, b]) as site:
                yield site, engine


async def test_an_engine_that_others_have_started_takes_its_turn(tmp_path: Path) -> None:
    with attached(tmp_path) as (here, engine):
        daemon = here.start()
        daemon.wait_for_state("a", "ready")
        assert daemon.engine("a").pid == engine.process.pid
        assert ask(daemon, "a") == text_of("a", 8)
        answer = await cut_short(daemon)
        assert answer.error is None
        assert answer.text == text_of("a", TOKENS)
        assert daemon.engine("a").pid == engine.process.pid
        moves = [move.mechanism for move in daemon.swaps("a")]
        assert moves[1:3] == ["checkpoint", "resume"]
        ask(daemon, "b")
        assert daemon.engine("a").tier == "host"
        daemon.command("stop", "b")
        assert daemon.stop() == 0
        assert engine.process.poll() is None, "it is not ours to end"
        assert engine.is_whole(), "it runs, with its state on its GPU"
        here.check()


async def test_one_of_others_comes_back_when_ours_have_made_room_at_the_end(
    tmp_path: Path,
) -> None:
    """Ours leave the GPU first: they hold it while they do, and it has no room before."""
    with attached(tmp_path) as (here, engine):
        daemon = here.start()
        daemon.wait_for_state("a", "ready")
        for name in ("b", "a", "b"):
            assert ask(daemon, name) == text_of(name, 8)
        assert daemon.engine("a").tier == "host"
        assert daemon.stop() == 0
        wait_for("the keeper has ended", lambda: here.site.keeper_pid() is None)
        assert engine.is_whole(), "it runs, with its state on its GPU"
        here.check()


async def test_an_attached_engine_that_ends_is_told_and_found_again(tmp_path: Path) -> None:
    with attached(tmp_path) as (here, engine):
        daemon = here.start()
        daemon.wait_for_state("a", "ready")
        engine.process.terminate()
        engine.process.wait(20)
        daemon.wait_for_state("a", "failed")
        answer = refused(daemon, "a")
        assert answer.status_code == 503
        assert f"port:{engine.port}" in answer.json()["error"]["message"]
        size = cuda("a", here.gpus)["args"][0]
        with cuda_engine(here.gpus, size, "--name=a", f"--port={engine.port}"):
            daemon.command("start", "a")
            assert ask(daemon, "a") == text_of("a", 8)
            assert daemon.stop() == 0


@pytest.fixture
def boxed(tmp_path: Path) -> Iterator[GpuSite]:
    """Two engines in containers of a stub for podman."""
    with (
        standin(tmp_path / "gpu", gpus=(256 * MIB,)) as there,
        installed("podman", tmp_path / "podman", "engine:1") as runtime,
    ):
        runtime.add("gpus", *there.uuids)
        keeper = {"container_runtime": "podman", "container_program": str(runtime.program)}
        model: dict[str, Any] = {"mechanism": "checkpoint"}
        with gpu_site(
            tmp_path,
            there=there,
            args=[PACE],
            model=model,
            keeper=keeper,
            recipe_changes={"image": "engine:1"},
        ) as site:
            yield site


async def test_engines_in_containers_take_turns(boxed: GpuSite) -> None:
    daemon = boxed.start()
    for name in ("b", "a"):
        assert ask(daemon, name) == text_of(name, 8)
    assert daemon.engine("b").tier == "host"
    answer = await cut_short(daemon)
    assert answer.error is None
    assert answer.text == text_of("a", TOKENS)
    pid = daemon.pid("a")
    daemon.kill()
    daemon = boxed.start()
    assert ask(daemon, "a") == text_of("a", 8)
    assert daemon.pid("a") == pid, "it outlived the daemon"
    daemon.command("stop", "b")
    assert daemon.stop() == 0
    boxed.check()
    wait_for("no GPU memory is left", lambda: not boxed.gpus.used(boxed.gpus.uuids[0]))


async def test_a_container_that_is_killed_is_started_again(boxed: GpuSite) -> None:
    daemon = boxed.start()
    assert ask(daemon, "a") == text_of("a", 8)
    os.kill(daemon.pid("a"), signal.SIGKILL)
    daemon.wait_for_state("a", "failed")
    assert "SIGKILL" in str(daemon.engine("a").error) or "137" in str(daemon.engine("a").error)
    assert ask(daemon, "a") == text_of("a", 8)
    assert daemon.stop() == 0
