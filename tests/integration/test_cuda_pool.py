"""Workers for CUDA calls on the stand-in driver: leases, deadlines, deaths, identity."""

import asyncio
import os
import select
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import psutil
import pytest

from swapserve.config.schema import KeeperConfig
from swapserve.keeper.cuda.calls import (
    CudaCallFailed,
    CudaOutcomeUnknown,
    CudaState,
    CudaTargetGone,
    CudaUnavailable,
)
from swapserve.keeper.cuda.pool import Worker, Workers
from swapserve.system.process import ProcessRef
from tests.support.cuda_bench import bench, eventually
from tests.support.cuda_target import program, target
from tests.support.gpu import standin

pytestmark = pytest.mark.anyio


def workers_of(pid: int) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(pid).children()
        if child.status() != psutil.STATUS_ZOMBIE
        and "swapserve.keeper.cuda.worker" in child.cmdline()
    ]


async def test_it_says_what_the_driver_can_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, driver="580.95.05", cuda=13000) as here:
        features = await here.workers.features()
        assert (features.api, features.driver, features.cuda) == ("driver", "580.95.05", 13000)
        assert features.remaps
        assert features.why_not == ""
    async with bench(tmp_path, monkeypatch, driver="570.86.10", cuda=12080) as here:
        features = await here.workers.features()
        assert (features.api, features.remaps) == ("driver", False)


async def test_without_a_driver_there_is_a_reason_and_no_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "libcuda.so.1").write_text("not a library")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    workers = Workers(KeeperConfig())
    features = await workers.features()
    assert features.api is None
    assert "libcuda.so.1" in features.why_not
    assert "\n" not in features.why_not
    with pytest.raises(CudaUnavailable, match=r"libcuda\.so\.1"):
        async with workers.lease():
            pass
    await workers.close()
    assert workers_of(os.getpid()) == []


async def test_a_driver_without_gpus_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, gpus=()) as here:
        assert "CUDA_ERROR_NO_DEVICE (100)" in (await here.workers.features()).why_not


async def test_a_driver_that_does_not_start_is_no_lasting_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, init_s=30) as here:
        monkeypatch.setattr("swapserve.keeper.cuda.pool.START_TIMEOUT_S", 1.0)
        assert "no answer within 1 s" in (await here.workers.features()).why_not
        here.gpu.set_config(init_s=0)
        assert (await here.workers.features()).api == "driver"


async def test_a_worker_is_started_once_and_lent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        pids = set()
        for _ in range(3):
            async with here.workers.lease() as worker:
                pids.add(worker.pid)
        assert len(pids) == 1
        assert [process.pid for process in workers_of(os.getpid())] == list(pids)
    assert workers_of(os.getpid()) == []


async def test_eight_leases_at_once_have_a_worker_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one:
            async with AsyncExitStack() as leases:
                workers = [await leases.enter_async_context(here.workers.lease()) for _ in range(8)]
                assert len({worker.pid for worker in workers}) == 8
                async with asyncio.TaskGroup() as tasks:
                    asked = [tasks.create_task(worker.state(one.ref)) for worker in workers]
                assert {task.result() for task in asked} == {CudaState.RUNNING}
        # Idle ones hold a started driver each.
        await eventually(lambda: len(workers_of(os.getpid())) <= 2)


async def test_every_call_reaches_the_driver_and_its_answer_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, legal=False) as here:
        with target(here.gpu.env) as one:
            async with here.workers.lease() as worker:
                assert await worker.restore_thread(one.ref) != one.pid
                await worker.lock(one.ref, timeout_s=1)
                assert await worker.state(one.ref) is CudaState.LOCKED
                await worker.checkpoint(one.ref, deadline_s=10)
                assert here.gpu.used(here.gpu.uuids[0]) == 0
                await worker.restore(one.ref, deadline_s=10)
                await worker.unlock(one.ref, deadline_s=10)
                with pytest.raises(CudaCallFailed) as failed:
                    await worker.unlock(one.ref, deadline_s=10)
            assert (failed.value.op, failed.value.pid) == ("unlock", one.pid)
            assert (failed.value.code, failed.value.name) == (401, "CUDA_ERROR_ILLEGAL_STATE")
            assert one.told("check") == "same"


async def test_a_process_without_cuda_has_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env, init=False) as one:
            async with here.workers.lease() as worker:
                assert await worker.state(one.ref) is None
                assert await worker.restore_thread(one.ref) is None


async def test_a_pid_that_is_another_processs_now_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one:
            former = ProcessRef(one.pid, one.ref.start_ticks - 1)
            async with here.workers.lease() as worker:
                with pytest.raises(CudaTargetGone):
                    await worker.lock(former, timeout_s=1)
            assert here.made("lock") == []


async def test_after_a_deadline_the_worker_is_killed_and_nothing_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env) as other:
            here.gpu.fault("checkpoint", "hang_before", pid=one.pid)
            here.gpu.fault("checkpoint", "slow", seconds=5, pid=other.pid)
            async with here.workers.lease() as worker:
                pid = worker.pid
                for ref in (one.ref, other.ref):
                    await worker.lock(ref, timeout_s=1)
                unknown = []

                async def move(ref: ProcessRef, deadline_s: float) -> None:
                    with pytest.raises(CudaOutcomeUnknown) as lost:
                        await worker.checkpoint(ref, deadline_s=deadline_s)
                    unknown.append(lost.value)

                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(move(one.ref, 0.5))
                    tasks.create_task(move(other.ref, 60))
                assert {error.pid for error in unknown} == {one.pid, other.pid}
                assert "no answer within 0.5 s" in str(unknown[0])
                assert not psutil.pid_exists(pid)
                with pytest.raises(CudaOutcomeUnknown):
                    await worker.state(one.ref)
            async with here.workers.lease() as fresh:
                assert fresh.pid != pid
                assert await fresh.state(one.ref) is CudaState.LOCKED
            assert here.made("checkpoint", one) == [one.pid]


async def pids_of_next(workers: Workers) -> set[int]:
    async with workers.lease() as one, workers.lease() as other:
        return {one.pid, other.pid}


async def whole_cycle(worker: Worker, ref: ProcessRef) -> None:
    await worker.restore_thread(ref)
    await worker.lock(ref, timeout_s=1)
    await worker.checkpoint(ref, deadline_s=10)
    await worker.restore(ref, deadline_s=10)
    await worker.unlock(ref, deadline_s=10)


@pytest.mark.parametrize("op", ["thread", "lock", "checkpoint", "restore", "unlock"])
async def test_a_worker_that_dies_in_a_call_leaves_an_unknown_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    """The target carries the call out all the same."""
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one:
            here.gpu.fault(op, "kill_caller")
            async with here.workers.lease() as worker:
                with pytest.raises(CudaOutcomeUnknown, match="ended by itself") as lost:
                    await whole_cycle(worker, one.ref)
            assert "signal SIGKILL" in lost.value.reason
            assert lost.value.op == {"thread": "restore_thread"}.get(op, op)
            where = {
                "lock": CudaState.LOCKED,
                "checkpoint": CudaState.CHECKPOINTED,
                "restore": CudaState.LOCKED,
            }
            assert await here.states(one) == [where.get(op, CudaState.RUNNING)]


async def test_a_worker_killed_from_outside_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one:
            async with here.workers.lease() as worker:
                pid = worker.pid
            with os.fdopen(os.pidfd_open(pid)) as pidfd:
                os.kill(pid, signal.SIGKILL)
                # It is idle, and the event loop does not hear of its end before it is lent.
                select.select([pidfd], [], [], 10)
            assert await here.states(one) == [CudaState.RUNNING]


async def test_a_call_whose_caller_was_cancelled_goes_on_and_its_worker_is_not_lent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one:
            here.gpu.fault("lock", "slow", seconds=1)
            pids = []

            async def lock() -> None:
                async with here.workers.lease() as worker:
                    pids.append(worker.pid)
                    await worker.lock(one.ref, timeout_s=5)

            async with asyncio.TaskGroup() as tasks:
                caller = tasks.create_task(lock())
                await here.under_way("lock")
                caller.cancel()
            async with here.workers.lease() as worker:
                assert worker.pid not in pids
                # A look waits for the end of what is under way.
                assert await worker.state(one.ref) is CudaState.LOCKED
                async with asyncio.timeout(10):
                    while pids[0] not in await pids_of_next(here.workers):  # noqa: ASYNC110
                        await asyncio.sleep(0.01)


async def test_what_a_driver_prints_is_not_taken_for_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_DEBUG", "libs")  # the loader would write hundreds of lines
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    async with bench(tmp_path, monkeypatch) as here:
        assert (await here.workers.features()).api == "driver"
        (worker,) = workers_of(os.getpid())
        names = worker.environ()
        assert "LD_DEBUG" not in names
        assert "CUDA_VISIBLE_DEVICES" not in names
        assert names["LD_LIBRARY_PATH"] == str(here.gpu.libs)


KEEPER = """
import asyncio
from swapserve.config.schema import KeeperConfig
from swapserve.keeper.cuda.pool import Worker, Workers

async def main():
    workers = Workers(KeeperConfig())
    async with workers.lease() as worker:
        print(worker.pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_a_worker_ends_with_its_keeper(tmp_path: Path) -> None:
    with standin(tmp_path / "gpu") as gpu, program(KEEPER, gpu.env) as keeper:
        assert keeper.stdout is not None
        worker = ProcessRef.of(int(keeper.stdout.readline()))
        assert worker.alive()
        keeper.kill()
        await eventually(lambda: not worker.alive())
