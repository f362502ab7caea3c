"""The whole daemon with engines that have GPU state: real ctypes, pynvml and NVML code, real
processes, streams and CRIU, on the stand-in for NVIDIA's driver."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from swapserve.testing.cuda_engine import expected_tokens
from tests.support.daemon import Daemon, needs_criu
from tests.support.gpu_daemon import MIB, GpuSite, gpu_site, settled
from tests.support.leaks import wait_for
from tests.support.oracle import Answer, completion, stream

pytestmark = [pytest.mark.anyio]
needs_images = needs_criu[-1]
LONG = 400
SHORT = 8
HOST_ONLY = {"tiers": ["host"], "sandbox": False, "mechanism": "checkpoint"}
PACE = ("--delay-per-token=0.005",)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuSite]:
    """Two engines of 60 % of one GPU, without disk tier."""
    with gpu_site(tmp_path_factory.mktemp("gpu"), args=PACE, model=HOST_ONLY) as site:
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
    gpus = (64 * MIB,)
    with gpu_site(tmp_path, args=PACE, gpus=gpus, model=HOST_ONLY, scheduling=scheduling) as here:
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


async def test_requests_wait_while_something_else_uses_the_gpu(
    here: GpuSite, daemon: Daemon
) -> None:
    settle(daemon, "b")
    uuid, size = here.gpus.uuids[0], here.gpus.config.memory[0]
    daemon.command("swap-out", "b")
    here.gpus.set_config(foreign=((uuid, 1, size // 2),))
    async with daemon.http() as http, asyncio.TaskGroup() as tasks:
        try:
            waiting = tasks.create_task(stream(http, daemon.completions, completion("a", SHORT)))
            await asyncio.to_thread(
                wait_for,
                "the move in is refused",
                lambda: "device_busy" in here.site.log.read_text(),
            )
            assert not waiting.done()
            assert daemon.engine("a").state in {"swapped_out", "swapping_in"}
            assert "NVML" in str(daemon.engine("a").error)
        finally:
            here.gpus.set_config(foreign=())
    assert waiting.result().text == text_of("a", SHORT)
    assert daemon.engine("a").error is None
    here.check()


async def test_an_engine_that_dies_while_it_is_suspended_starts_again(
    here: GpuSite, daemon: Daemon
) -> None:
    settle(daemon, "b")
    rank = here.record("a").cuda[0].pid
    os.kill(rank, signal.SIGKILL)
    front = daemon.engine("a").pid
    assert front is not None
    os.kill(front, signal.SIGKILL)
    daemon.wait_for_state("a", "failed")
    ram = next(device for device in daemon.status().devices if device.kind == "host")
    assert ram.committed_bytes == 0
    assert ask(daemon, "a").json()["choices"][0]["text"] == text_of("a", SHORT)
    assert daemon.swaps("a")[-1].mechanism == "cold"
    here.check()


async def test_a_stream_whose_state_is_lost_ends_with_an_error_and_the_next_is_served(
    here: GpuSite, daemon: Daemon
) -> None:
    settle(daemon, "a")
    here.gpus.fault("checkpoint", "failed")
    answer = await preempted(daemon)
    assert not answer.text.endswith(text_of("a", LONG)[-20:])
    assert answer.error is not None
    assert answer.error["code"] == "cuda_failed"
    settled(daemon)
    assert ask(daemon, "a").json()["choices"][0]["text"] == text_of("a", SHORT)
    assert not here.gpus.illegal()


async def test_a_lock_that_times_out_costs_nothing(here: GpuSite, daemon: Daemon) -> None:
    settle(daemon, "a")
    here.gpus.fault("lock", "timeout")
    answer = await preempted(daemon)
    assert answer.error is None
    assert answer.text == text_of("a", LONG)
    failed = [move for move in daemon.swaps("a") if move.error]
    assert "lock" in str(failed[-1].error)
    assert not here.gpus.illegal()


async def test_engines_outlive_a_killed_daemon_with_their_gpu_state(tmp_path: Path) -> None:
    with gpu_site(tmp_path, model=HOST_ONLY) as here:
        daemon = here.start()
        assert ask(daemon, "a").status_code == 200
        assert ask(daemon, "b").status_code == 200
        pids = {name: daemon.pid(name) for name in ("a", "b")}
        daemon.kill()
        daemon = here.start()
        daemon.wait_for_state("b", "ready")
        a = daemon.engine("a")
        assert (a.state, a.tier) == ("swapped_out", "host")
        assert a.host_bytes == next(
            one.committed_bytes for one in daemon.status().devices if one.kind == "host"
        )
        assert ask(daemon, "a").json()["choices"][0]["text"] == text_of("a", SHORT)
        assert {name: daemon.pid(name) for name in ("a", "b")} == pids
        assert daemon.swaps("a")[-1].mechanism == "resume"
        assert daemon.stop() == 0
        here.check()


@pytest.mark.criu
@needs_images
async def test_what_host_memory_has_no_room_for_goes_to_disk(tmp_path: Path) -> None:
    devices = {"host": {"memory": "200MiB"}}  # for one of them
    model = {"mechanism": "checkpoint", "keep_cache": "always"}
    with gpu_site(tmp_path, "abc", args=PACE, model=model, devices=devices) as here:
        daemon = here.start()
        for name in "cba":
            assert ask(daemon, name).json()["choices"][0]["text"] == text_of(name, SHORT)
        answer = await preempted(daemon)
        assert answer.error is None
        assert answer.text == text_of("a", LONG)
        for name in "cb":
            assert ask(daemon, name).json()["choices"][0]["text"] == text_of(name, SHORT)
        moves = daemon.swaps()
        assert not [move.error for move in moves if move.error]
        assert {move.to_tier for move in moves if move.kind == "swap_out"} == {"host", "disk"}
        ram = next(one for one in daemon.status().devices if one.kind == "host")
        assert ram.committed_bytes + ram.reserved_bytes <= ram.capacity_bytes
        here.check()


@pytest.mark.criu
@needs_images
async def test_a_stream_goes_on_from_disk_with_the_very_same_tokens(tmp_path: Path) -> None:
    with gpu_site(tmp_path, args=PACE, model={"tiers": ["disk"]}) as here:
        daemon = here.start()
        assert ask(daemon, "b").status_code == 200
        assert ask(daemon, "a").status_code == 200
        before, pid = len(daemon.swaps("a")), daemon.pid("a")
        answer = await preempted(daemon)
        assert answer.error is None
        assert answer.text == text_of("a", LONG)
        assert [move.mechanism for move in daemon.swaps("a")[before:]] == ["live", "live"]
        assert {"dump.lock", "dump.checkpoint", "dump"} <= {*daemon.swaps("a")[-2].phases}
        assert {"restore", "restore.gpu_restore", "restore.unlock"} <= {
            *daemon.swaps("a")[-1].phases
        }
        assert daemon.pid("a") != pid
        here.check()


@pytest.mark.criu
@needs_images
async def test_an_idle_engine_comes_back_from_its_golden_image_with_gpu_state(
    tmp_path: Path,
) -> None:
    with gpu_site(tmp_path, model={"tiers": ["disk"], "keep_cache": "never"}) as here:
        daemon = here.start()
        for _ in range(2):
            for name in ("a", "b"):
                assert ask(daemon, name).json()["choices"][0]["text"] == text_of(name, SHORT)
        ways = [move.mechanism for move in daemon.swaps("a")]
        assert ways[:3] == ["cold", "discard", "golden"]
        assert daemon.engine("a").golden_image
        here.check()


async def test_when_the_keeper_dies_who_waits_hears_it_at_once(tmp_path: Path) -> None:
    with gpu_site(tmp_path, args=PACE, model=HOST_ONLY, scheduling={"quantum": "2s"}) as here:
        daemon = here.start()
        assert ask(daemon, "b").status_code == 200
        long = 2000
        keeper = here.site.keeper_pid()
        assert keeper is not None
        async with daemon.http() as http, asyncio.TaskGroup() as tasks:
            at = asyncio.Event()

            def watch(answer: Answer) -> None:
                if len(answer.pieces) == 60:
                    at.set()

            suspended = tasks.create_task(
                stream(http, daemon.completions, completion("a", long), on_piece=watch)
            )
            await at.wait()
            serving = tasks.create_task(stream(http, daemon.completions, completion("b", LONG)))
            await asyncio.to_thread(daemon.wait_for_state, "b", "ready")
            waiting = tasks.create_task(stream(http, daemon.completions, completion("a", SHORT)))
            await asyncio.to_thread(
                wait_for,
                "it waits",
                lambda: daemon.engine("a").waiting + daemon.engine("a").suspended == 2,
            )
            os.kill(keeper, signal.SIGKILL)
            killed = time.monotonic()
            for task in (suspended, waiting):
                error = (await task).error
                assert error is not None
                assert error["code"] in {"engine_unavailable", "shutting_down"}
            assert time.monotonic() - killed < 1
        answer = serving.result()
        assert answer.done
        assert answer.text == text_of("b", LONG), "its engine serves, so it may finish"
        assert daemon.process.wait(30) == 1
        assert text_of("a", long).startswith(suspended.result().text)
        daemon = here.start()
        assert ask(daemon, "a").json()["choices"][0]["text"] == text_of("a", SHORT)
        assert ask(daemon, "b").json()["choices"][0]["text"] == text_of("b", SHORT)
        here.check()
