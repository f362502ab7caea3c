"""The whole daemon with engines that have GPU state: real ctypes, pynvml and NVML code, real
processes, streams and CRIU, on the stand-in for NVIDIA's driver."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from swapserve.testing.cuda_engine import expected_tokens
from tests.support.daemon import Daemon
from tests.support.gpu_daemon import MIB, GpuSite, gpu_site, settled
from tests.support.oracle import Answer, completion, stream

pytestmark = [pytest.mark.anyio]
LONG = 400
SHORT = 8
PACE = ("--delay-per-token=0.005",)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuSite]:
    """Two engines of 60 % of one GPU, without disk tier."""
    with gpu_site(
        tmp_path_factory.mktemp("gpu"), args=PACE, model={"tiers": ["host"], "sandbox": False}
    ) as site:
        yield site


@pytest.fixture(scope="module")
def daemon(here: GpuSite) -> Daemon:
    return here.start()


def ask(daemon: Daemon, model: str, tokens: int = SHORT) -> httpx.Response:
    return httpx.post(daemon.completions, json=completion(model, tokens), timeout=60)


def text_of(model: str, tokens: int) -> str:
    """Return what a whole answer must say: each byte of it went through GPU memory."""
    body = completion(model, tokens)
    return "".join(expected_tokens(body["prompt"], None, tokens))


def settle(daemon: Daemon, resident: str = "a") -> None:
    for model in ("b", "a"):
        if daemon.engine(model).state == "stopped":
            daemon.command("start", model)
    if daemon.engine(resident).state != "ready":
        daemon.command("swap-in", resident)
    settled(daemon)


async def preempted(daemon: Daemon, tokens: int = LONG, *, by: str = "b") -> Answer:
    """Return a stream of `a` that was cut by a request for another engine."""
    at = asyncio.Event()

    def watch(answer: Answer) -> None:
        if len(answer.pieces) == 60:
            at.set()

    async with daemon.http() as http, asyncio.TaskGroup() as tasks:
        body = completion("a", tokens)
        long = tasks.create_task(stream(http, daemon.completions, body, on_piece=watch))
        await at.wait()
        other = await stream(http, daemon.completions, completion(by, SHORT))
        assert other.text == text_of(by, SHORT)
    return long.result()


async def test_an_engine_that_is_needed_takes_the_place_of_the_other(
    here: GpuSite, daemon: Daemon
) -> None:
    settle(daemon, "a")
    pid = daemon.pid("a")
    answer = ask(daemon, "b")
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == text_of("b", SHORT)
    a, b = daemon.engine("a"), daemon.engine("b")
    assert (a.state, a.tier, b.state, b.tier) == ("swapped_out", "host", "ready", "device")
    assert a.pid == pid, "its process is there, frozen"
    assert a.host_bytes > 100 * MIB
    assert here.record("a").gpu == "in_host_memory"
    gpu = next(device for device in daemon.status().devices if device.kind == "gpu")
    ram = next(device for device in daemon.status().devices if device.kind == "host")
    assert ram.committed_bytes == a.host_bytes
    assert here.gpus.used(here.gpus.uuids[0]) <= gpu.committed_bytes
    here.check()


async def test_a_stream_goes_on_from_gpu_memory_with_the_very_same_tokens(
    here: GpuSite, daemon: Daemon
) -> None:
    settle(daemon, "a")
    pid, before = daemon.pid("a"), len(daemon.swaps("a"))
    answer = await preempted(daemon)
    assert answer.done
    assert answer.error is None
    assert answer.text == text_of("a", LONG)
    assert answer.longest_gap()[0] >= 50
    assert daemon.pid("a") == pid
    assert [move.mechanism for move in daemon.swaps("a")[before:]] == ["checkpoint", "resume"]
    phases = daemon.swaps("a")[-2].phases
    assert {"suspend.lock", "suspend.checkpoint", "suspend.verify", "suspend.freeze"} <= {*phases}
    here.check()


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_two_engines_under_load_preempt_each_other_two_hundred_times(tmp_path: Path) -> None:
    scheduling = {"quantum": "100ms", "max_wait": "20s", "retry_backoff": "100ms"}
    model = {"tiers": ["host"], "sandbox": False}
    gpus = (64 * MIB,)
    with gpu_site(tmp_path, args=PACE, gpus=gpus, model=model, scheduling=scheduling) as here:
        daemon = here.start()
        streams = 0
        async with daemon.http() as http:

            async def keep_asking(name: str) -> None:
                nonlocal streams
                while preemptions(daemon) < 200:
                    body = completion(name, LONG)
                    answer = await stream(http, daemon.completions, body)
                    assert answer.error is None, answer.error
                    assert answer.done
                    assert answer.text == text_of(name, LONG)
                    streams += 1

            async with asyncio.TaskGroup() as tasks:
                for name in ("a", "b", "a", "b"):
                    tasks.create_task(keep_asking(name))
        assert streams >= 4
        moves = [move for move in daemon.swaps() if move.kind in {"swap_out", "swap_in"}]
        assert {move.mechanism for move in moves} == {"checkpoint", "resume"}
        assert not [move.error for move in moves if move.error]
        here.check()
        settled(daemon)
        both = {daemon.engine(name).state for name in ("a", "b")}
        assert both == {"ready", "swapped_out"}
        assert daemon.stop() == 0
        here.check()


def preemptions(daemon: Daemon) -> int:
    """Return how often a running request was suspended, by the daemon's own count."""
    lines = httpx.get(f"{daemon.url}/metrics", timeout=10).text.splitlines()
    swaps = [line for line in lines if line.startswith("swapserve_swaps_total")]
    outs = [line for line in swaps if 'kind="swap_out"' in line and 'outcome="ok"' in line]
    return sum(int(float(line.rpartition(" ")[2])) for line in outs)
