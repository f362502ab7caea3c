"""Whatever can go wrong with a driver can be made to go wrong with the stand-in."""

import json
import os
import signal
from pathlib import Path

import httpx
import pytest

from tests.support.cuda import (
    CHECKPOINTED,
    FAILED,
    FORWARD,
    ILLEGAL_STATE,
    LOCKED,
    NOT_INITIALIZED,
    NOT_READY,
    OK,
    OPERATING_SYSTEM,
    OUT_OF_MEMORY,
    RUNNING,
    SOON_S,
    UNKNOWN,
    Caller,
    EngineOnGpu,
    bring_to,
    caller,
    cuda_engine,
)
from tests.support.gpu import MIB, StandIn, standin
from tests.support.leaks import wait_for


@pytest.mark.parametrize("code", [OPERATING_SYSTEM, UNKNOWN])
@pytest.mark.parametrize("op", ["state", *FORWARD])
def test_any_call_can_be_refused_and_nothing_has_changed(
    gpu: StandIn, call: Caller, engine: EngineOnGpu, op: str, code: int
) -> None:
    gpu.fault(op, "error", code=code)
    bring = {"checkpoint": LOCKED, "restore": CHECKPOINTED, "unlock": LOCKED}.get(op, RUNNING)
    for earlier in FORWARD[: {RUNNING: 0, LOCKED: 1, CHECKPOINTED: 2}[bring]]:
        assert call(earlier, engine.rank) == OK
    assert call(op, engine.rank) == code
    assert call.state(engine.rank) == bring
    assert call(op, engine.rank) == OK
    assert not gpu.illegal()


@pytest.mark.parametrize(("op", "state"), [("checkpoint", LOCKED), ("restore", CHECKPOINTED)])
def test_a_call_that_breaks_half_way_leaves_the_process_failed(
    gpu: StandIn, call: Caller, engine: EngineOnGpu, op: str, state: int
) -> None:
    bring_to(state, call, engine.rank)
    gpu.fault(op, "failed")
    assert call(op, engine.rank) == UNKNOWN
    assert call.state(engine.rank) == FAILED
    assert gpu.used(gpu.uuids[0]) > 0
    for other in FORWARD:
        assert call(other, engine.rank) == ILLEGAL_STATE
    with pytest.raises(httpx.HTTPError):
        engine.is_whole()


def test_a_lock_can_be_made_to_time_out(gpu: StandIn, call: Caller, engine: EngineOnGpu) -> None:
    gpu.fault("lock", "timeout", nth=2, times=2)
    codes = []
    for _ in range(4):
        codes.append(call("lock", engine.rank, 50))
        if codes[-1] == OK:
            assert call("unlock", engine.rank) == OK
    assert codes == [OK, NOT_READY, NOT_READY, OK]
    assert gpu.pending_faults() == []


def test_an_answer_can_be_an_error_though_it_is_done(
    gpu: StandIn, call: Caller, engine: EngineOnGpu
) -> None:
    bring_to(LOCKED, call, engine.rank)
    gpu.fault("unlock", "error_after")
    assert call("unlock", engine.rank) == UNKNOWN
    assert call.state(engine.rank) == RUNNING


def test_a_restore_can_run_out_of_memory_though_there_is_room(
    gpu: StandIn, call: Caller, engine: EngineOnGpu
) -> None:
    bring_to(CHECKPOINTED, call, engine.rank)
    gpu.fault("restore", "oom")
    assert call("restore", engine.rank) == OUT_OF_MEMORY
    assert call("restore", engine.rank) == OPERATING_SYSTEM
    assert gpu.hazards() == []


@pytest.mark.parametrize(
    ("kind", "after"), [("hang_before", RUNNING), ("hang_after", LOCKED), ("hang", None)]
)
def test_a_call_can_hang_before_in_or_after_what_it_does(
    gpu: StandIn, call: Caller, engine: EngineOnGpu, kind: str, after: int | None
) -> None:
    gpu.fault("lock", kind)
    call.begin("lock", engine.rank)
    assert not call.comes(SOON_S)
    with caller(gpu) as other:
        if after is not None:
            assert other.state(engine.rank) == after
        else:
            other.begin("state", engine.rank)
            assert not other.comes(SOON_S)


@pytest.mark.parametrize("op", FORWARD)
def test_the_target_can_die_in_the_middle_of_a_call(
    gpu: StandIn, call: Caller, engine: EngineOnGpu, op: str
) -> None:
    bring_to({"lock": RUNNING, "restore": CHECKPOINTED}.get(op, LOCKED), call, engine.rank)
    gpu.fault(op, "kill_target", pid=engine.rank)
    assert call(op, engine.rank) == OPERATING_SYSTEM
    wait_for("its memory is free", lambda: gpu.used(gpu.uuids[0]) == 0)
    assert call("state", engine.rank) == NOT_INITIALIZED


@pytest.mark.parametrize("seconds", [0.5, 0])
def test_nvml_can_show_memory_of_a_checkpointed_process(
    gpu: StandIn, call: Caller, engine: EngineOnGpu, seconds: float
) -> None:
    gpu.fault("checkpoint", "linger", seconds=seconds)
    bring_to(CHECKPOINTED, call, engine.rank)
    assert gpu.used(gpu.uuids[0]) == 20 * MIB
    if seconds:
        wait_for("it is gone", lambda: gpu.used(gpu.uuids[0]) == 0)
    assert call("restore", engine.rank) == OK
    assert call("unlock", engine.rank) == OK
    assert engine.is_whole()
    assert gpu.used(gpu.uuids[0]) == 20 * MIB


def test_faults_can_be_for_one_process_and_be_forgotten(
    gpu: StandIn, call: Caller, engine: EngineOnGpu
) -> None:
    gpu.fault("lock", "error", pid=engine.rank + 1)
    bring_to(LOCKED, call, engine.rank)
    gpu.fault("any", "error", times=-1)
    assert [call("unlock", engine.rank) for _ in range(2)] == [UNKNOWN, UNKNOWN]
    gpu.clear_faults()
    assert call("unlock", engine.rank) == OK


@pytest.mark.parametrize("state", [RUNNING, LOCKED, CHECKPOINTED])
def test_the_death_of_a_live_restored_process_is_noted(
    gpu: StandIn, call: Caller, engine: EngineOnGpu, state: int
) -> None:
    for op in FORWARD:
        assert call(op, engine.rank) == OK
    bring_to(state, call, engine.rank)
    assert gpu.hazards() == []
    os.kill(engine.rank, signal.SIGKILL)
    wait_for("its memory is free", lambda: gpu.used(gpu.uuids[0]) == 0)
    found = [json.loads(line) for line in gpu.hazards()]
    assert [(one["pid"], one["hazard"]) for one in found] == (
        [] if state == CHECKPOINTED else [(engine.rank, "killed live after restore")]
    )


def test_the_death_of_a_process_that_was_never_restored_is_harmless(
    gpu: StandIn, call: Caller, engine: EngineOnGpu
) -> None:
    bring_to(LOCKED, call, engine.rank)
    os.kill(engine.rank, signal.SIGKILL)
    wait_for("its memory is free", lambda: gpu.used(gpu.uuids[0]) == 0)
    assert gpu.hazards() == []


def test_copies_take_time_by_their_bytes(tmp_path: Path) -> None:
    with standin(
        tmp_path / "gpu", checkpoint_ns_per_byte=20, restore_ns_per_byte=10, call_s=0.05
    ) as gpu:
        with caller(gpu) as call, cuda_engine(gpu, "--vram-mb=16") as engine:
            for op in FORWARD:
                assert call(op, engine.rank) == OK
        seconds = {one.op: (one.ended or 0) - one.begun for one in gpu.calls()}
    per_byte = 20 * MIB * 1e-9
    assert seconds["checkpoint"] >= 20 * per_byte
    assert seconds["restore"] >= 10 * per_byte
    assert 0.05 <= seconds["lock"] < 10 * per_byte
