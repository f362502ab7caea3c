"""NVIDIA's `cuda-checkpoint` for a driver without calls of its own, on the stand-in's program."""

import asyncio
import stat
from pathlib import Path
from typing import Any

import psutil
import pytest

from swapserve.errors import CudaError
from swapserve.keeper.cuda.calls import (
    CudaCallFailed,
    CudaOutcomeUnknown,
    CudaState,
    CudaUnavailable,
)
from swapserve.keeper.phases import Phases
from tests.support.cuda_bench import bench, eventually, hurry
from tests.support.cuda_target import target
from tests.support.gpu import libraries

pytestmark = pytest.mark.anyio
OLD: dict[str, Any] = {"api": False, "driver": "565.57.01", "cuda": 12070}


def by_program() -> list[tuple[str, Path]]:
    return [("cuda_checkpoint", libraries(api=False) / "cuda-checkpoint")]


async def test_an_older_driver_is_served_by_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, keeper=by_program(), **OLD) as here:
        features = await here.workers.features()
        assert (features.api, features.driver, features.remaps) == ("binary", "565.57.01", False)
        with (
            target(here.gpu.env) as one,
            target(here.gpu.env) as two,
            target(here.gpu.env, init=False) as idle,
        ):
            moved = await here.suspended(one, two, idle)
            assert len(moved.processes) == 2
            assert here.gpu.used(here.gpu.uuids[0]) == 0
            await here.resumed(moved, one, two, idle)
            assert await here.running(one, two)
            async with here.workers.lease() as worker:
                assert await worker.state(idle.ref) is None
                assert await worker.restore_thread(idle.ref) is None


async def test_the_programs_words_become_the_drivers_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, keeper=by_program(), legal=False, **OLD) as here:
        with target(here.gpu.env) as one:
            async with here.workers.lease() as worker:
                for code in (2, 304, 600, 801):
                    here.gpu.fault("lock", "error", code=code)
                    with pytest.raises(CudaCallFailed) as failed:
                        await worker.lock(one.ref, timeout_s=1)
                    assert failed.value.code == code
                with pytest.raises(CudaCallFailed, match="CUDA_ERROR_ILLEGAL_STATE"):
                    await worker.unlock(one.ref, deadline_s=10)
                here.gpu.fault("state", "error", code=304)
                with pytest.raises(CudaCallFailed, match="CUDA_ERROR_OPERATING_SYSTEM"):
                    await worker.state(one.ref)


async def test_a_lock_of_the_program_has_its_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, keeper=by_program(), **OLD) as here:
        with target(here.gpu.env) as one:
            here.gpu.fault("lock", "timeout")
            with pytest.raises(CudaError, match=r"keeper\.cuda_lock_timeout") as error:
                await here.suspended(one)
            assert not error.value.lost
            assert await here.running(one)


async def test_a_program_that_hangs_ends_with_its_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, keeper=by_program(), **OLD) as here:
        hurry(monkeypatch)
        with target(here.gpu.env) as one:
            here.gpu.fault("checkpoint", "hang_before")
            async with here.workers.lease() as worker:
                await worker.lock(one.ref, timeout_s=1)
                asking = asyncio.get_running_loop().create_task(
                    worker.checkpoint(one.ref, deadline_s=1)
                )
                await here.under_way("checkpoint")
                (program,) = psutil.Process(worker.pid).children()
                with pytest.raises(CudaOutcomeUnknown):
                    await asking
            await eventually(lambda: not program.is_running())
            assert await here.states(one) == [CudaState.LOCKED]
            settled = await here.tree(one).settle({}, Phases())
            assert settled.state == "running"


@pytest.mark.parametrize(
    ("driver", "reason"), [("565.57.01", "there is no cuda-checkpoint"), ("550.90.07", "no cuda")]
)
async def test_without_the_program_an_older_driver_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, reason: str
) -> None:
    async with bench(tmp_path, monkeypatch, **OLD | {"driver": driver}) as here:
        monkeypatch.setenv("SWAPSERVE_PREFIX", str(tmp_path))
        why_not = (await here.workers.features()).why_not
        assert reason in why_not
        assert driver in why_not
        assert "keeper.cuda_checkpoint" in why_not
        with pytest.raises(CudaUnavailable):
            async with here.workers.lease():
                pass


async def test_a_driver_that_can_only_toggle_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = OLD | {"driver": "550.90.07"}
    async with bench(tmp_path, monkeypatch, keeper=by_program(), **machine) as here:
        why_not = (await here.workers.features()).why_not
        assert "driver 550.90.07 can only toggle" in why_not
        assert "555 is the first" in why_not


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo '--toggle --pid <pid>'", "too old: it has no --action"),
        ("echo broken >&2; exit 3", "cannot be used: broken"),
    ],
)
async def test_a_program_that_will_not_do_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    program = script(tmp_path / "tool", text)
    async with bench(tmp_path, monkeypatch, keeper=[("cuda_checkpoint", program)], **OLD) as here:
        assert reason in (await here.workers.features()).why_not


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("echo noise; echo 0", "no thread id"),
        ("echo 'Could not: \"gone fishing\"' >&2; exit 1", "CUDA_ERROR_UNKNOWN"),
    ],
)
async def test_what_the_program_says_otherwise_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str
) -> None:
    program = script(
        tmp_path / "tool", f'case "$*" in *--help*) echo --action ;; *) {text} ;; esac'
    )
    async with bench(tmp_path, monkeypatch, keeper=[("cuda_checkpoint", program)], **OLD) as here:
        with target(here.gpu.env) as one:
            async with here.workers.lease() as worker:
                with pytest.raises(CudaCallFailed, match=name):
                    await worker.restore_thread(one.ref)


async def test_the_driver_is_preferred_to_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = script(tmp_path / "tool", f"touch {tmp_path}/called")
    async with bench(tmp_path, monkeypatch, keeper=[("cuda_checkpoint", program)]) as here:
        assert (await here.workers.features()).api == "driver"
        assert not (tmp_path / "called").exists()
