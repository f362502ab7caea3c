"""What the keeper relies on in the CUDA driver, by its own binding, on engines that use a GPU."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from swapserve.keeper.cuda.calls import ILLEGAL_STATE, NO_CUDA, NOT_READY, CudaCallFailed, CudaState
from swapserve.system.process import ProcessRef
from swapserve.testing.cuda_engine import expected_tokens
from tests.gpu.conftest import Machine
from tests.support.cuda import EngineOnGpu, stranger
from tests.support.gpu import MIB

pytestmark = pytest.mark.anyio

VRAM_MB = 48
SMALL = (f"--vram-mb={VRAM_MB}", "--cache-mb=8")
CYCLES = 20
Step = Callable[[ProcessRef], Awaitable[None]]


def ref_of(engine: EngineOnGpu) -> ProcessRef:
    return ProcessRef.of(engine.rank)


def steps(machine: Machine) -> dict[str, Step]:
    return {
        "lock": machine.lock,
        "checkpoint": machine.checkpoint,
        "restore": machine.restore,
        "unlock": machine.unlock,
    }


async def test_a_process_goes_through_the_documented_states(machine: Machine) -> None:
    async with machine.engine(*SMALL) as engine:
        ref = ref_of(engine)
        assert await machine.worker.state(ref) is CudaState.RUNNING
        for op, after in {
            "lock": CudaState.LOCKED,
            "checkpoint": CudaState.CHECKPOINTED,
            "restore": CudaState.LOCKED,
            "unlock": CudaState.RUNNING,
        }.items():
            await steps(machine)[op](ref)
            assert await machine.worker.state(ref) is after, op


async def test_a_lock_can_be_taken_back(machine: Machine) -> None:
    async with machine.engine(*SMALL) as engine:
        ref = ref_of(engine)
        await machine.lock(ref)
        await machine.unlock(ref)
        assert await machine.worker.state(ref) is CudaState.RUNNING
        assert engine.is_whole()


@pytest.mark.parametrize(
    ("before", "allowed"),
    [((), "lock"), (("lock",), "checkpoint unlock"), (("lock", "checkpoint"), "restore")],
    ids=["running", "locked", "checkpointed"],
)
async def test_what_the_state_does_not_allow_is_refused_and_harmless(
    machine: Machine, before: tuple[str, ...], allowed: str
) -> None:
    async with machine.engine(*SMALL) as engine:
        ref = ref_of(engine)
        for op in before:
            await steps(machine)[op](ref)
        state = await machine.worker.state(ref)
        for op, step in steps(machine).items():
            if op in allowed.split():
                continue
            with pytest.raises(CudaCallFailed) as failed:
                await step(ref)
            assert failed.value.code == ILLEGAL_STATE
            assert await machine.worker.state(ref) is state
        for op in ("lock", "checkpoint", "restore", "unlock")[len(before) :]:
            await steps(machine)[op](ref)
        assert engine.is_whole()


async def test_memory_is_the_same_after_many_cycles(machine: Machine) -> None:
    async with machine.engine(*SMALL) as engine:
        ref = ref_of(engine)
        expected = "".join(expected_tokens("p", None, 50))
        for _ in range(CYCLES):
            await machine.suspend(ref)
            await machine.resume(ref)
            assert engine.text(50) == expected
        assert engine.is_whole()


async def test_its_memory_leaves_the_gpu_for_its_own_host_memory(machine: Machine) -> None:
    async with machine.engine(*SMALL) as engine:
        [uuid] = engine.get("/weights")["devices"]
        ref = ref_of(engine)
        resident, free = host_bytes(ref.pid), machine.free(uuid)
        await machine.suspend(ref)
        assert machine.free(uuid) >= free + VRAM_MB * MIB
        assert host_bytes(ref.pid) >= resident + (VRAM_MB - 8) * MIB
        if machine.standin:  # NVIDIA's tells pids of the first namespace, which may not be ours
            assert machine.ask(f"nvml.used_by({[ref.pid]!r})") == {}
        await machine.resume(ref)
        assert abs(machine.free(uuid) - free) <= 16 * MIB


def host_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_a_lock_that_cannot_be_had_in_time_changes_nothing(machine: Machine) -> None:
    async with machine.engine(*SMALL) as engine, asyncio.TaskGroup() as tasks:
        ref = ref_of(engine)
        kernel = tasks.create_task(asyncio.to_thread(engine.http.post, "/kernel?seconds=3"))
        code = 0
        while code == 0:  # until the kernel runs
            assert not kernel.done()
            code = await lock_result(machine, ref)
        assert code == NOT_READY
        assert await machine.worker.state(ref) is CudaState.RUNNING
        (await kernel).raise_for_status()
        await machine.lock(ref)
        await machine.unlock(ref)


async def lock_result(machine: Machine, ref: ProcessRef) -> int:
    """Try to lock for a moment; a lock that was had is given back."""
    try:
        await machine.worker.lock(ref, timeout_s=0.3)
    except CudaCallFailed as failed:
        return failed.code
    await machine.unlock(ref)
    return 0


async def test_its_calls_wait_while_it_is_locked_and_go_on_with_the_same_text(
    machine: Machine,
) -> None:
    async with machine.engine(*SMALL, "--delay-per-token=0.01") as engine:
        ref = ref_of(engine)
        expected = "".join(expected_tokens("p", None, 150))
        async with asyncio.TaskGroup() as tasks:
            asked = tasks.create_task(asyncio.to_thread(engine.text, 150))
            while engine.get("/stats")["running"] == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await machine.suspend(ref)
            with pytest.raises(httpx.ReadTimeout):
                engine.http.get("/weights", timeout=1)
            assert not asked.done()
            await machine.resume(ref)
            assert await asked == expected


async def test_ranks_are_restored_side_by_side(machine: Machine) -> None:
    async with machine.engine(*SMALL, "--ranks=2") as engine:
        refs = [ProcessRef.of(pid) for pid in engine.ranks]
        text = engine.text(50)
        for _ in range(3):
            await machine.suspend(*refs)
            async with machine.workers.lease() as other, asyncio.TaskGroup() as tasks:
                for ref, worker in zip(refs, (machine.worker, other), strict=True):
                    tasks.create_task(machine.restore(ref, worker))
            for ref in refs:
                await machine.unlock(ref)
            assert engine.is_whole()
            assert engine.text(50) == text


async def test_state_may_be_told_to_come_back_to_the_same_gpu(machine: Machine) -> None:
    features = await machine.workers.features()
    if not features.remaps:
        pytest.skip(f"driver {features.driver} takes no pairs of GPUs")
    async with machine.engine(*SMALL) as engine:
        ref = ref_of(engine)
        before = engine.get("/weights")
        await machine.suspend(ref)
        await machine.restore(ref, pairs=[(uuid, uuid) for uuid in machine.uuids])
        await machine.unlock(ref)
        assert engine.get("/weights") == before == {**before, "whole": True}


async def test_the_thread_of_the_driver_is_one_of_the_process(machine: Machine) -> None:
    async with machine.engine(*SMALL) as engine:
        ref = ref_of(engine)
        for step in (machine.lock, machine.checkpoint, machine.restore, machine.unlock):
            tid = await machine.worker.restore_thread(ref)
            assert Path(f"/proc/{ref.pid}/task/{tid}/comm").exists()
            await step(ref)


async def test_a_process_without_cuda_is_recognised_and_refused(machine: Machine) -> None:
    async with machine.engine(*SMALL) as engine:
        with stranger() as other:
            for pid in (other.pid, engine.process.pid):
                ref = ProcessRef.of(pid)
                assert await machine.worker.state(ref) is None
                assert await machine.worker.restore_thread(ref) is None
                with pytest.raises(CudaCallFailed) as failed:
                    await machine.lock(ref)
                assert failed.value.code in NO_CUDA
            assert other.poll() is None
        assert engine.is_whole()
