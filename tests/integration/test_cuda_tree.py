"""An engine's CUDA processes, suspended and resumed together: the order, and every way it fails."""

import asyncio
from pathlib import Path

import pytest

from swapserve.errors import CudaError, DeviceBusy
from swapserve.keeper.cuda.calls import CudaState
from swapserve.keeper.cuda.tree import CudaTree, Settled
from swapserve.keeper.phases import Phases
from tests.support.cuda_bench import Bench, bench, hurry
from tests.support.cuda_target import Target, target

pytestmark = pytest.mark.anyio

RUNNING, LOCKED, AWAY = CudaState.RUNNING, CudaState.LOCKED, CudaState.CHECKPOINTED
MIB = 1 << 20


async def refused(here: Bench, *targets: Target) -> CudaError:
    """Suspend, which must fail; return with what."""
    with pytest.raises(CudaError) as error:
        await here.suspended(*targets)
    return error.value


async def lost(here: Bench, *targets: Target) -> CudaError:
    """Suspend and resume, which must end the engine; return with what."""
    moved = await here.suspended(*targets)
    with pytest.raises(CudaError) as error:
        await here.resumed(moved, *targets)
    assert error.value.lost
    return error.value


# ------------------------------------------------------------------- as it should be


async def test_all_are_locked_before_one_is_checkpointed_and_restored_before_one_is_unlocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env, mib=4) as two:
            phases = Phases()
            tree = here.tree(one, two)
            moved = await tree.suspend(phases)
            assert {ref.pid for ref in moved.processes} == {one.pid, two.pid}
            # What was allocated, and 4 MiB for each context.
            assert moved.device_bytes == {here.gpu.uuids[0]: (8 + 4 + 4 + 4) * MIB}
            assert here.gpu.used(here.gpu.uuids[0]) == 0
            assert await here.states(one, two) == [AWAY, AWAY]
            await tree.admit(moved.device_bytes, phases)
            await tree.resume(moved.processes, moved.device_bytes, phases)
            assert await here.running(one, two)
            done = [call.op for call in here.gpu.calls() if call.op not in {"state", "thread"}]
            assert done == [
                op for op in ("lock", "checkpoint", "restore", "unlock") for _ in (one, two)
            ]
            steps = {"find", "lock", "measure", "checkpoint", "verify"}
            assert set(phases.seconds) == steps | {"admission", "gpu_restore", "unlock"}


async def test_processes_that_do_not_use_cuda_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env, init=False) as idle, target(here.gpu.env) as one:
            moved = await here.suspended(idle, one)
            assert [ref.pid for ref in moved.processes] == [one.pid]
            nothing = await here.suspended(idle)
            assert (nothing.processes, nothing.device_bytes) == ((), {})
            assert idle.pid not in {call.pid for call in here.gpu.calls()}


async def test_an_engine_on_two_gpus_comes_back_to_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, gpus=(64 * MIB, 64 * MIB)) as here:
        with target(here.gpu.env, gpus=2) as one, target(here.gpu.env) as two:
            moved = await here.suspended(one, two)
            first, second = here.gpu.uuids
            assert moved.device_bytes == {first: 24 * MIB, second: 12 * MIB}
            assert here.gpu.sweep() == {first: 0, second: 0}
            await here.resumed(moved, one, two)
            assert await here.running(one, two)


async def test_where_nvml_lists_no_processes_what_became_free_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        monkeypatch.setattr(here.nvml, "used_by", lambda pids: {})
        with target(here.gpu.env) as one:
            moved = await here.suspended(one)
            assert moved.device_bytes == {here.gpu.uuids[0]: 12 * MIB}


async def test_after_criu_the_processes_are_found_by_their_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env, init=False) as idle:
            moved = await here.suspended(one, idle)
            await here.tree(one, idle).resume(None, moved.device_bytes, Phases())
            assert await here.running(one)
            with pytest.raises(CudaError, match="none of its processes") as error:
                await here.tree(idle).resume(None, moved.device_bytes, Phases())
            assert error.value.lost


async def test_of_many_processes_at_most_four_are_moved_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, call_s=0.1) as here:
        with (
            target(here.gpu.env, mib=1) as a,
            target(here.gpu.env, mib=1) as b,
            target(here.gpu.env, mib=1) as c,
            target(here.gpu.env, mib=1) as d,
            target(here.gpu.env, mib=1) as e,
        ):
            await here.suspended(a, b, c, d, e)
            moves = [call for call in here.gpu.calls() if call.op == "checkpoint"]
            most = max(
                sum(other.begun <= call.begun < (other.ended or 0) for other in moves)
                for call in moves
            )
            assert most == 4


async def test_after_one_has_failed_no_further_one_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, call_s=0.2) as here:
        with (
            target(here.gpu.env, mib=1) as a,
            target(here.gpu.env, mib=1) as b,
            target(here.gpu.env, mib=1) as c,
            target(here.gpu.env, mib=1) as d,
            target(here.gpu.env, mib=1) as e,
        ):
            here.gpu.fault("checkpoint", "error")
            assert not (await refused(here, a, b, c, d, e)).lost
            assert len(here.made("checkpoint")) == 4
            assert await here.running(a, b, c, d, e)


# ---------------------------------------------------- finding, and those that come late


async def test_a_process_that_starts_to_use_cuda_while_others_are_locked_is_locked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, keeper=[("cuda_lock_timeout_s", 10.0)]) as here:
        with target(here.gpu.env) as one, target(here.gpu.env, init=False) as late:
            here.gpu.fault("lock", "slow", seconds=1)
            async with asyncio.TaskGroup() as tasks:
                moving = tasks.create_task(here.suspended(one, late))
                await here.under_way("lock")
                assert await asyncio.to_thread(late.told, "init") == "ok"
            assert {ref.pid for ref in moving.result().processes} == {one.pid, late.pid}
            assert here.gpu.used(here.gpu.uuids[0]) == 0


async def test_a_process_that_starts_to_use_cuda_after_that_makes_it_turn_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env, init=False) as late:
            here.gpu.fault("checkpoint", "slow", seconds=1)
            async with asyncio.TaskGroup() as tasks:
                moving = tasks.create_task(refused(here, one, late))
                await here.under_way("checkpoint")
                assert await asyncio.to_thread(late.told, "init") == "ok"
            assert "has just started to use CUDA" in str(moving.result())
            assert not moving.result().lost
            assert await here.running(one, late)


async def test_processes_that_never_come_to_rest_are_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            turns = iter(range(1000))
            tree = CudaTree(
                "a",
                workers=here.workers,
                nvml=here.nvml,
                pids=lambda: [one.pid, two.pid][: 1 + next(turns) % 2],
                keeper=here.keeper,
            )
            with pytest.raises(CudaError, match="keep coming") as error:
                await tree.suspend(Phases())
            assert not error.value.lost
            assert here.made("lock") == []


async def test_a_process_that_ends_before_it_is_locked_is_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env) as brief:
            here.gpu.fault("lock", "slow", seconds=0.5, pid=one.pid)
            async with asyncio.TaskGroup() as tasks:
                moving = tasks.create_task(here.suspended(one, brief))
                await here.under_way("lock")
                brief.kill()
            assert [ref.pid for ref in moving.result().processes] == [one.pid]


async def test_a_process_that_ends_while_it_is_locked_is_none_of_them_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env) as brief:
            here.gpu.fault("lock", "kill_target", pid=brief.pid)
            moved = await here.suspended(one, brief)
            assert [ref.pid for ref in moved.processes] == [one.pid]


# ------------------------------------------------------------------ a lock that fails


@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_a_lock_that_times_out_leaves_all_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    async with bench(tmp_path, monkeypatch, keeper=[("cuda_lock_timeout_s", 0.2)]) as here:
        with target(here.gpu.env) as a, target(here.gpu.env) as b, target(here.gpu.env) as c:
            here.gpu.fault("lock", "timeout", nth=nth)
            error = await refused(here, a, b, c)
            assert (error.phase, error.lost) == ("lock", False)
            assert "keeper.cuda_lock_timeout" in str(error)
            assert len(here.made("lock")) == nth
            assert len(here.made("unlock")) == nth - 1
            assert await here.running(a, b, c)
            await here.suspended(a, b, c)


@pytest.mark.parametrize(
    "kind", ["error", "error_after", "hang_before", "hang_after", "kill_caller"]
)
async def test_a_lock_that_fails_in_any_way_leaves_all_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        hurry(monkeypatch)
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            here.gpu.fault("lock", kind, nth=2)
            error = await refused(here, one, two)
            assert (error.phase, error.lost) == ("lock", False)
            assert await here.running(one, two)
            assert len(here.made("lock")) == 2, "nothing was tried again"


async def test_a_lock_without_the_right_to_it_says_what_right_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one:
            here.gpu.fault("lock", "error", code=304)
            error = await refused(here, one)
            assert "needs root" in str(error)
            assert not error.lost
            here.gpu.fault("thread", "error", code=304)
            error = await refused(here, one)
            assert (error.phase, error.lost) == ("find", False)
            assert "needs root" in str(error)
            assert await here.running(one)


async def test_a_target_that_dies_after_it_was_locked_takes_the_engine_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            here.gpu.fault("checkpoint", "kill_target", pid=two.pid)
            error = await refused(here, one, two)
            assert error.lost
            assert f"process {two.pid} is " in str(error)
            assert await here.states(one) == [AWAY], "suspended before it is killed"
        assert here.gpu.hazards() == []


# ------------------------------------------------------------ a checkpoint that fails


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize(
    "kind", ["error", "error_after", "hang_before", "hang_after", "kill_caller"]
)
async def test_a_checkpoint_that_fails_brings_all_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, kind: str
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        hurry(monkeypatch)
        with target(here.gpu.env) as a, target(here.gpu.env) as b, target(here.gpu.env) as c:
            here.gpu.fault("checkpoint", kind, nth=nth)
            error = await refused(here, a, b, c)
            assert (error.phase, error.lost) == ("checkpoint", False)
            assert await here.running(a, b, c)
            assert len(here.made("checkpoint")) <= 3, "nothing was tried again"
            back = "".join(
                call.op[0] for call in here.gpu.calls() if call.op in {"restore", "unlock"}
            )
            assert back == "r" * back.count("r") + "uuu", (
                "all were restored before one was unlocked"
            )


async def test_a_process_that_the_driver_gave_up_is_lost_and_the_others_leave_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            here.gpu.fault("checkpoint", "failed", pid=one.pid)
            error = await refused(here, one, two)
            assert error.lost
            assert f"process {one.pid} is failed" in str(error)
            assert await here.states(two) == [AWAY]
            assert here.made("unlock") == [], "what will be killed does not run once more"


async def test_a_process_whose_driver_hangs_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        hurry(monkeypatch)
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            here.gpu.fault("checkpoint", "hang", pid=one.pid)
            error = await refused(here, one, two)
            assert error.lost
            assert f"process {one.pid} is unknown" in str(error)
            assert await here.states(two) == [AWAY]
            assert here.made("checkpoint", one) == [one.pid], "nothing was tried again"


@pytest.mark.parametrize(("rate", "enough"), [(4 * MIB, True), (100 * MIB, False)])
async def test_more_bytes_may_take_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int, enough: bool
) -> None:
    """12 MiB: 3 s at the slower rate, 0.12 s at the faster one, and half a second besides."""
    async with bench(tmp_path, monkeypatch, keeper=[("cuda_rate_bytes", rate)]) as here:
        hurry(monkeypatch)
        with target(here.gpu.env) as one:
            here.gpu.fault("checkpoint", "slow", seconds=1)
            if enough:
                moved = await here.suspended(one)
                here.gpu.fault("restore", "slow", seconds=1)
                await here.resumed(moved, one)
            else:
                assert "no answer within 0.62 s" in str(await refused(here, one))


async def test_memory_that_the_driver_cannot_move_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one:
            here.gpu.fault("checkpoint", "error", code=801)
            error = await refused(here, one)
            assert "managed (unified) memory" in str(error)
            assert not error.lost
            assert await here.running(one)


async def test_a_way_back_that_fails_loses_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else took the memory that the first one had just given back."""
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            here.gpu.fault("checkpoint", "slow", pid=two.pid, seconds=0.3)
            here.gpu.fault("checkpoint", "error_after", pid=one.pid)
            here.gpu.fault("restore", "oom")
            error = await refused(here, one, two)
            assert error.lost
            assert set(await here.states(one, two)) == {AWAY}


# -------------------------------------------------------------- what must be verified


async def test_memory_that_stays_on_the_gpu_makes_it_turn_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        hurry(monkeypatch)
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            here.gpu.fault("checkpoint", "linger", pid=two.pid)
            error = await refused(here, one, two)
            assert (error.phase, error.lost) == ("verify", False)
            assert f"NVML still sees {12 * MIB} bytes" in str(error)
            assert await here.running(one, two)


async def test_memory_may_take_a_moment_to_become_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one:
            here.gpu.fault("checkpoint", "linger", seconds=0.4)
            await here.suspended(one)
            assert here.gpu.used(here.gpu.uuids[0]) == 0


@pytest.mark.parametrize("op", ["thread", "state"])
@pytest.mark.parametrize("kind", ["error", "hang_before", "kill_caller"])
async def test_a_look_that_gets_no_answer_is_never_taken_for_a_yes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str, kind: str
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        hurry(monkeypatch)
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            here.gpu.fault(op, kind, nth=2)
            error = await refused(here, one, two)
            assert (error.phase, error.lost) == ("find" if op == "thread" else "verify", False)
            assert await here.running(one, two)


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"mig": True}, "MIG"),
        ({"mps": True}, "MPS"),
    ],
)
async def test_what_the_driver_does_not_support_is_refused_before_anything_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: dict[str, bool], reason: str
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one:
            (uuid,) = here.gpu.uuids
            if "mig" in machine:
                here.gpu.set_config(mig=(uuid,))
            else:
                here.gpu.set_config(mps=((uuid, 1, MIB),))
            error = await refused(here, one)
            assert reason in str(error)
            assert not error.lost
            assert here.made("lock") == []


# ------------------------------------------------------------------------ cancelled


@pytest.mark.parametrize(
    ("op", "nth"), [("thread", 1), ("lock", 1), ("lock", 2), ("checkpoint", 1), ("state", 2)]
)
async def test_a_suspend_that_is_cancelled_leaves_no_lock_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str, nth: int
) -> None:
    async with bench(tmp_path, monkeypatch, keeper=[("cuda_lock_timeout_s", 5.0)]) as here:
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            here.gpu.fault(op, "slow", nth=nth, seconds=0.4)
            after = []

            async def suspend() -> None:
                with pytest.raises(CudaError, match="cancelled") as error:
                    await here.suspended(one, two)
                assert not error.value.lost
                await asyncio.sleep(0)
                after.append("not cancelled")

            async with asyncio.TaskGroup() as tasks:
                moving = tasks.create_task(suspend())
                await here.under_way(op, nth)
                moving.cancel()
                moving.cancel()
            assert moving.cancelled()
            assert after == []
            assert await here.running(one, two)


async def test_a_resume_that_is_cancelled_runs_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            moved = await here.suspended(one, two)
            here.gpu.fault("restore", "slow", seconds=0.4)
            done = []

            async def resume() -> None:
                await here.resumed(moved, one, two)
                done.append("told")
                await asyncio.sleep(0)
                done.append("not cancelled")

            async with asyncio.TaskGroup() as tasks:
                moving = tasks.create_task(resume())
                await here.under_way("restore")
                moving.cancel()
            assert done == ["told"]
            assert await here.running(one, two)


async def test_a_time_limit_of_the_caller_is_still_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one:
            moved = await here.suspended(one)
            here.gpu.fault("restore", "slow", seconds=0.4)

            async def resume() -> None:
                async with asyncio.timeout(0.1):
                    await here.resumed(moved, one)
                    await asyncio.sleep(0)

            with pytest.raises(TimeoutError):
                await resume()
            assert await here.running(one)


# ------------------------------------------------------------------------- admission


async def test_a_restore_waits_for_memory_that_is_just_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one:
            moved = await here.suspended(one)
            (uuid,) = here.gpu.uuids
            here.gpu.set_config(foreign=((uuid, 1, 55 * MIB),))
            async with asyncio.TaskGroup() as tasks:
                waiting = tasks.create_task(here.tree(one).admit(moved.device_bytes, Phases()))
                await asyncio.sleep(0.3)
                assert not waiting.done()
                here.gpu.set_config(foreign=())


async def test_a_gpu_without_room_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        hurry(monkeypatch)
        with target(here.gpu.env) as one:
            moved = await here.suspended(one)
            (uuid,) = here.gpu.uuids
            # Room for the engine, but not for the margin of 1 MiB as well.
            here.gpu.set_config(foreign=((uuid, 1, 64 * MIB - 2 * MIB - 12 * MIB),))
            before = here.made("restore")
            with pytest.raises(DeviceBusy) as busy:
                await here.tree(one).admit(moved.device_bytes, Phases())
            assert busy.value.uuid == uuid
            assert busy.value.needed_bytes == 13 * MIB
            assert busy.value.free_bytes == 12 * MIB
            assert here.made("restore") == before
            here.gpu.set_config(foreign=())
            await here.tree(one).admit(moved.device_bytes, Phases())
            await here.resumed(moved, one)
            assert await here.running(one)


async def test_a_gpu_that_nvml_does_not_know_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, pytest.raises(CudaError, match="GPU-none") as error:
            await here.tree(one).admit({"GPU-none": 1}, Phases())
        assert not error.value.lost


# ------------------------------------------------------------- a restore that fails


async def test_a_restore_that_fails_without_effect_is_tried_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one:
            moved = await here.suspended(one)
            here.gpu.fault("restore", "error")
            await here.resumed(moved, one)
            assert len(here.made("restore")) == 2
            assert await here.running(one)


async def test_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one:
            here.gpu.fault("restore", "error", times=5, code=304)
            error = await lost(here, one)
            assert len(here.made("restore")) == 2
            assert "an earlier restore must have run out of GPU memory" in str(error)


async def test_a_restore_that_fails_after_another_one_did_not_loses_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            here.gpu.fault("restore", "error", pid=two.pid, seconds=0.3)
            error = await lost(here, one, two)
            assert error.phase == "restore"
            assert here.made("restore", two) == [two.pid]
            assert await here.states(one, two) == [AWAY, AWAY]
        assert here.gpu.hazards() == [], "what was live was suspended before it is killed"


async def test_a_restore_without_room_is_final_and_says_that_the_estimate_was_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            here.gpu.fault("restore", "oom", pid=two.pid, seconds=0.3)
            error = await lost(here, one, two)
            assert "the estimate of its footprint was too small" in str(error)
            assert here.made("restore", two) == [two.pid]
            assert await here.states(one, two) == [AWAY, AWAY]


@pytest.mark.parametrize("kind", ["hang_after", "kill_caller"])
@pytest.mark.parametrize("op", ["restore", "unlock"])
async def test_a_call_without_an_answer_that_was_carried_out_is_as_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str, kind: str
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        hurry(monkeypatch)
        with target(here.gpu.env) as one:
            moved = await here.suspended(one)
            here.gpu.fault(op, kind)
            await here.resumed(moved, one)
            assert await here.running(one)
            assert here.made(op) == [one.pid]


@pytest.mark.parametrize("kind", ["hang_before", "hang"])
@pytest.mark.parametrize("op", ["restore", "unlock"])
async def test_a_call_without_an_answer_that_was_not_carried_out_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str, kind: str
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        hurry(monkeypatch)
        with target(here.gpu.env) as one:
            here.gpu.fault(op, kind)
            error = await lost(here, one)
            assert error.phase == op
            assert here.made(op) == [one.pid]


async def test_an_unlock_that_failed_is_judged_by_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one:
            moved = await here.suspended(one)
            here.gpu.fault("unlock", "error_after")
            await here.resumed(moved, one)
            assert await here.running(one)
            here.gpu.fault("unlock", "error")
            error = await lost(here, one)
            assert error.phase == "unlock"
            assert await here.states(one) == [AWAY]


@pytest.mark.parametrize("op", ["restore", "unlock"])
async def test_a_target_that_dies_on_its_way_back_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            here.gpu.fault(op, "kill_target", pid=two.pid)
            error = await lost(here, one, two)
            # Its memory ends before it does: for a moment it is only without CUDA state.
            assert f"process {two.pid} is " in str(error)
            assert await here.states(one) == [AWAY]


async def test_a_process_that_has_ended_meanwhile_is_noticed_before_anything_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            moved = await here.suspended(one, two)
            two.kill()
            with pytest.raises(CudaError, match=f"process {two.pid} is gone") as error:
                await here.resumed(moved, one, two)
            assert error.value.lost
            assert here.made("restore") == []


# ------------------------------------------------------------------------- other GPUs


async def test_state_can_come_back_to_another_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, gpus=(64 * MIB,) * 3) as here:
        with target(here.gpu.env) as one:
            moved = await here.suspended(one)
            first, second, third = here.gpu.uuids
            await here.tree(one).resume(
                moved.processes, moved.device_bytes, Phases(), pairs=[(first, third)]
            )
            assert here.gpu.sweep() == {first: 0, second: 0, third: 12 * MIB}
            assert await here.running(one)


async def test_an_older_driver_cannot_do_that_and_nothing_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(
        tmp_path, monkeypatch, gpus=(64 * MIB,) * 2, driver="570.86.10", cuda=12080
    ) as here:
        with target(here.gpu.env) as one:
            moved = await here.suspended(one)
            tree = here.tree(one)
            first, second = here.gpu.uuids
            with pytest.raises(CudaError, match="580 is the first") as error:
                await tree.resume(
                    moved.processes, moved.device_bytes, Phases(), pairs=[(first, second)]
                )
            assert not error.value.lost
            assert await here.states(one) == [AWAY]
            same = [(uuid, uuid) for uuid in here.gpu.uuids]
            await tree.resume(moved.processes, moved.device_bytes, Phases(), pairs=same)
            assert await here.running(one)


async def test_a_gpu_of_another_kind_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, gpus=(64 * MIB,) * 2) as here:
        here.gpu.set_config(names={here.gpu.uuids[1]: "Another GPU"})
        with target(here.gpu.env) as one:
            moved = await here.suspended(one)
            tree = here.tree(one)
            first, second = here.gpu.uuids
            with pytest.raises(CudaError, match="not of the kind") as error:
                await tree.resume(
                    moved.processes, moved.device_bytes, Phases(), pairs=[(first, second)]
                )
            assert not error.value.lost
            assert await here.states(one) == [AWAY]
            assert here.made("restore") == []


# ----------------------------------------------------------------- settle and quench


async def put(here: Bench, one: Target, state: CudaState) -> None:
    async with here.workers.lease() as worker:
        if state is not RUNNING:
            await worker.lock(one.ref, timeout_s=5)
        if state is AWAY:
            await worker.checkpoint(one.ref, deadline_s=10)


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        (RUNNING, RUNNING, "running"),
        (LOCKED, RUNNING, "running"),
        (LOCKED, LOCKED, "running"),
        (AWAY, LOCKED, "running"),
        (AWAY, RUNNING, "running"),
        (AWAY, AWAY, "suspended"),
    ],
)
async def test_what_a_killed_keeper_left_is_brought_to_one_state(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: CudaState,
    second: CudaState,
    found: str,
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            await put(here, one, first)
            await put(here, two, second)
            settled = await here.tree(one, two).settle({}, Phases())
            assert settled.state == found
            assert {ref.pid for ref in settled.processes} == {one.pid, two.pid}
            if found == "running":
                assert await here.running(one, two)
            else:
                assert await here.states(one, two) == [AWAY, AWAY]


async def test_half_of_it_cannot_come_back_once_somebody_else_has_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            await put(here, one, AWAY)
            settled = await here.tree(one, two).settle({}, Phases(), memory_is_ours=False)
            assert settled.state == "lost"
            assert here.made("restore") == []
            assert await here.states(one, two) == [AWAY, AWAY], "ready to be killed"


async def test_what_is_broken_or_silent_is_lost_and_what_uses_no_cuda_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        hurry(monkeypatch)
        with target(here.gpu.env) as one, target(here.gpu.env, init=False) as idle:
            assert await here.tree(idle).settle({}, Phases()) == Settled(state="none")
            here.gpu.fault("lock", "failed")
            with pytest.raises(CudaError):
                await here.suspended(one)
            assert (await here.tree(one).settle({}, Phases())).state == "lost"
        with target(here.gpu.env) as one:
            here.gpu.fault("lock", "hang")
            assert (await refused(here, one)).lost
            assert (await here.tree(one).settle({}, Phases())).state == "lost"


async def test_a_call_of_a_killed_keeper_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        monkeypatch.setattr("swapserve.keeper.cuda.crew.PROBE_TIMEOUT_S", 0.1)
        with target(here.gpu.env) as one:
            here.gpu.fault("checkpoint", "slow", seconds=1)
            async with asyncio.TaskGroup() as tasks, here.workers.lease() as worker:
                await worker.lock(one.ref, timeout_s=5)
                call = tasks.create_task(worker.checkpoint(one.ref, deadline_s=10))
                await here.under_way("checkpoint")
                call.cancel()
            settled = await here.tree(one).settle({}, Phases())
            assert settled.state == "suspended"


async def test_before_it_is_killed_an_engine_leaves_its_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            await here.resumed(await here.suspended(one, two), one, two)
            assert await here.tree(one, two).quench(Phases())
            assert await here.states(one, two) == [AWAY, AWAY]
        assert here.gpu.hazards() == []


@pytest.mark.parametrize("kind", ["hang", "failed", "error", "timeout"])
async def test_what_will_not_leave_is_said_and_the_rest_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    async with bench(tmp_path, monkeypatch) as here:
        hurry(monkeypatch)
        with target(here.gpu.env) as one, target(here.gpu.env) as two:
            here.gpu.fault("lock", kind, pid=one.pid)
            assert await here.tree(one, two).quench(Phases()) is False
            assert await here.states(two) == [AWAY]


async def test_without_a_driver_nothing_is_touched_and_nothing_raised_but_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, gpus=()) as here:
        with target(here.gpu.env, init=False) as one:
            error = await refused(here, one)
            assert "CUDA_ERROR_NO_DEVICE" in str(error)
            assert not error.lost
            assert await here.tree(one).quench(Phases()) is False
            assert (await here.tree(one).settle({}, Phases())).state == "lost"
