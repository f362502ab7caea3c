"""The stand-in driver is strict about who calls what when, as NVIDIA's is."""

import json
import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from swapserve.system.cgroup import Cgroup, mount_point
from tests.support.cuda import (
    CHECKPOINTED,
    FAILED,
    FORWARD,
    ILLEGAL_STATE,
    INVALID_VALUE,
    LOCKED,
    NOT_INITIALIZED,
    NOT_READY,
    OK,
    OPERATING_SYSTEM,
    OUT_OF_MEMORY,
    PATIENCE_S,
    RUNNING,
    SOON_S,
    Caller,
    EngineOnGpu,
    bring_to,
    caller,
    cuda_engine,
    stranger,
)
from tests.support.gpu import MIB, StandIn, two_gpus
from tests.support.leaks import wait_for

NEXT = {RUNNING: "lock", LOCKED: "checkpoint unlock", CHECKPOINTED: "restore", FAILED: ""}


def test_memory_goes_to_the_process_and_comes_back_as_it_was(
    gpu: StandIn, call: Caller, engine: EngineOnGpu
) -> None:
    text = engine.text(40)
    used = gpu.used(gpu.uuids[0])
    assert used == 16 * MIB + gpu.config.context_bytes
    for _ in range(3):
        resident = host_bytes(engine.rank)
        assert call("lock", engine.rank) == OK
        assert call("checkpoint", engine.rank) == OK
        assert gpu.used(gpu.uuids[0]) == 0
        assert host_bytes(engine.rank) >= resident + 15 * MIB
        assert call("restore", engine.rank) == OK
        assert call.state(engine.rank) == LOCKED
        assert call("unlock", engine.rank) == OK
        assert gpu.used(gpu.uuids[0]) == used
        assert host_bytes(engine.rank) < resident + 8 * MIB
        assert engine.is_whole()
        assert engine.text(40) == text
    assert not gpu.illegal()


def host_bytes(pid: int) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("state", [RUNNING, LOCKED, CHECKPOINTED])
def test_what_the_state_does_not_allow_is_refused_and_noted(
    gpu: StandIn, call: Caller, engine: EngineOnGpu, state: int
) -> None:
    bring_to(state, call, engine.rank)
    wrong = [op for op in FORWARD if op not in NEXT[state].split()]
    for op in wrong:
        assert call(op, engine.rank) == ILLEGAL_STATE
        assert call.state(engine.rank) == state
    assert [(one.op, one.illegal) for one in gpu.illegal()] == [(op, "wrong state") for op in wrong]


def test_a_process_without_cuda_is_refused_and_left_alone(gpu: StandIn, call: Caller) -> None:
    with stranger() as other:
        for op in ("state", "thread", *FORWARD):
            assert call(op, other.pid) == NOT_INITIALIZED
        assert other.poll() is None
    assert [one.op for one in gpu.illegal()] == list(FORWARD)
    assert call("state", other.pid) == NOT_INITIALIZED


def test_a_process_that_only_initialised_has_no_cuda_state(gpu: StandIn, call: Caller) -> None:
    with caller(gpu) as other:
        assert call("state", other.pid) == NOT_INITIALIZED
        assert call("thread", other.pid) == NOT_INITIALIZED


@pytest.mark.parametrize(
    ("op", "words"),
    [
        ("lock", (1000, 1)),
        ("lock", (0, 0, 7)),
        ("checkpoint", (1,)),
        ("unlock", (0,) * 15 + (1,)),
        ("restore", (0, 0, 0, 1)),
        ("restore", (0, 0, 1)),
    ],
)
def test_reserved_bytes_must_be_zero(
    gpu: StandIn, call: Caller, engine: EngineOnGpu, op: str, words: tuple[int, ...]
) -> None:
    bring_to(CHECKPOINTED if op == "restore" else RUNNING, call, engine.rank)
    before = call.state(engine.rank)
    assert call(op, engine.rank, *words) == INVALID_VALUE
    assert call.state(engine.rank) == before
    assert len(gpu.illegal()) == 1


def test_a_restore_needs_an_initialised_caller_or_persistence(
    gpu: StandIn, call: Caller, engine: EngineOnGpu
) -> None:
    bring_to(CHECKPOINTED, call, engine.rank)
    with caller(gpu, "no-init") as fresh:
        assert fresh("restore", engine.rank) == NOT_INITIALIZED
        assert [one.illegal for one in gpu.illegal()] == ["restore without cuInit"]
        gpu.set_config(persistence=True)
        assert fresh("restore", engine.rank) == OK
        assert fresh("unlock", engine.rank) == OK


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_who_may_not_trace_the_target_is_refused(gpu: StandIn, engine: EngineOnGpu) -> None:
    with caller(gpu, "drop") as weak:
        for op in ("state", *FORWARD):
            assert weak(op, engine.rank) == OPERATING_SYSTEM
    assert engine.is_whole()


def test_a_lock_waits_for_kernels_and_gives_up_in_time(
    gpu: StandIn, call: Caller, engine: EngineOnGpu
) -> None:
    def is_busy() -> bool:
        code = call("lock", engine.rank, 20)
        if code == OK:
            assert call("unlock", engine.rank) == OK
        return code == NOT_READY

    busy = threading.Thread(target=lambda: engine.http.post("/kernel?seconds=1.2"))
    busy.start()
    wait_for("the kernel runs", is_busy)
    assert call.state(engine.rank) == RUNNING
    assert call("lock", engine.rank, 20_000) == OK
    assert call("unlock", engine.rank) == OK
    busy.join(PATIENCE_S)
    assert not busy.is_alive()
    assert not gpu.illegal()


def test_cuda_calls_of_a_locked_process_wait(call: Caller, engine: EngineOnGpu) -> None:
    for state in (LOCKED, CHECKPOINTED):
        bring_to(state, call, engine.rank)
        with pytest.raises(httpx.ReadTimeout):
            engine.http.get("/weights", timeout=SOON_S)
        assert engine.get("/stats")["pid"] == engine.process.pid
        for op in ("restore", "unlock")[CHECKPOINTED - state :]:
            assert call(op, engine.rank) == OK
        assert engine.is_whole()


def test_a_restore_without_room_bricks_the_process(
    gpu: StandIn, call: Caller, engine: EngineOnGpu
) -> None:
    bring_to(CHECKPOINTED, call, engine.rank)
    gpu.set_config(foreign=((gpu.uuids[0], 1, 80 * MIB),))
    assert call("restore", engine.rank) == OUT_OF_MEMORY
    assert call.state(engine.rank) == CHECKPOINTED
    gpu.set_config(foreign=())
    assert call("restore", engine.rank) == OPERATING_SYSTEM
    assert call("unlock", engine.rank) == ILLEGAL_STATE
    assert call.state(engine.rank) == CHECKPOINTED
    assert gpu.used(gpu.uuids[0]) == 0
    assert [json.loads(line)["hazard"] for line in gpu.hazards()] == ["restore without room"]
    assert [one.illegal for one in gpu.illegal()] == [
        "restore after an out-of-memory restore",
        "wrong state",
    ]


def test_memory_is_finite_and_comes_back_from_the_dead(gpu: StandIn) -> None:
    with cuda_engine(gpu, "--vram-mb=60") as first:
        with pytest.raises(AssertionError, match="did not start"), cuda_engine(gpu, "--vram-mb=40"):
            pass
        os.kill(first.rank, signal.SIGKILL)
        wait_for("the engine ended with its rank", lambda: first.process.poll() is not None)
    with cuda_engine(gpu, "--vram-mb=60") as second:
        assert second.is_whole()


@pytest.mark.parametrize("by", ["uuid", "index"])
def test_an_engine_sees_only_the_gpus_it_is_given(tmp_path: Path, by: str) -> None:
    with two_gpus(tmp_path / "gpu") as gpu:
        given = gpu.uuids[1] if by == "uuid" else "1"
        with cuda_engine(gpu, "--vram-mb=16", CUDA_VISIBLE_DEVICES=given) as engine:
            assert engine.get("/weights")["devices"] == [gpu.uuids[1]]
            assert gpu.used(gpu.uuids[0]) == 0


def test_state_comes_back_on_another_gpu_where_the_driver_can(tmp_path: Path) -> None:
    with two_gpus(tmp_path / "gpu") as gpu, caller(gpu) as call:
        first, second = gpu.uuids
        with cuda_engine(gpu, "--vram-mb=16", CUDA_VISIBLE_DEVICES=first) as engine:
            text = engine.text(30)
            bring_to(CHECKPOINTED, call, engine.rank)
            for wrong in ([(first, second)], [(first, second), (second, second)]):
                assert call("restore", engine.rank, pairs=tuple(wrong)) == INVALID_VALUE
            swapped = ((first, second), (second, first))
            gpu.set_config(names={second: "Another chip"})
            assert call("restore", engine.rank, pairs=swapped) == INVALID_VALUE
            gpu.set_config(names={})
            assert call("restore", engine.rank, pairs=swapped) == OK
            assert call("unlock", engine.rank) == OK
            assert (gpu.used(first), gpu.used(second)) == (0, 20 * MIB)
            assert engine.get("/weights") == {"whole": True, "devices": [second]}
            assert engine.text(30) == text


def test_a_driver_before_cuda_13_takes_no_pairs(tmp_path: Path) -> None:
    with two_gpus(tmp_path / "gpu", driver="570.86.10", cuda=12080) as gpu:
        first, second = gpu.uuids
        with caller(gpu) as call, cuda_engine(gpu, "--vram-mb=16") as engine:
            bring_to(CHECKPOINTED, call, engine.rank)
            pairs = ((first, second), (second, first))
            assert call("restore", engine.rank, pairs=pairs) == INVALID_VALUE
            assert call("restore", engine.rank) == OK


def test_a_call_on_a_stopped_process_hangs_until_it_goes_on(
    gpu: StandIn, call: Caller, engine: EngineOnGpu
) -> None:
    for op in ("state", "lock"):
        os.kill(engine.rank, signal.SIGSTOP)
        wait_for("it is stopped", lambda: "\nState:\tT" in status(engine.rank))
        call.begin(op, engine.rank)
        assert not call.comes(SOON_S)
        os.kill(engine.rank, signal.SIGCONT)
        assert call.end()[0] == OK
    assert [(one.op, one.illegal) for one in gpu.illegal()] == [
        ("state", "the target is stopped"),
        ("lock", "the target is stopped"),
    ]


def test_a_process_that_is_stopped_in_the_middle_of_a_call_is_noted(
    gpu: StandIn, call: Caller, engine: EngineOnGpu
) -> None:
    gpu.fault("lock", "slow", seconds=0.5)
    call.begin("lock", engine.rank)
    wait_for("it began", lambda: len(gpu.calls()) == 1)
    os.kill(engine.rank, signal.SIGSTOP)
    assert not call.comes(1)
    os.kill(engine.rank, signal.SIGCONT)
    assert call.end()[0] == OK
    assert [one.illegal for one in gpu.illegal()] == ["the target is stopped"]


def status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


@pytest.mark.skipif(os.geteuid() != 0 or mount_point() is None, reason="needs root and cgroup v2")
@pytest.mark.anyio
async def test_a_call_on_a_frozen_process_hangs_until_it_is_thawed(
    gpu: StandIn, call: Caller, engine: EngineOnGpu
) -> None:
    root = mount_point()
    assert root is not None
    group = Cgroup(root / f"standin-test-{os.getpid()}")
    group.make()
    home = Path(f"/proc/{engine.rank}/cgroup").read_text().rpartition("0::")[2].strip()
    try:
        group.add(engine.rank)
        await group.freeze(True, timeout_s=PATIENCE_S)
        call.begin("lock", engine.rank)
        assert not call.comes(SOON_S)
        assert [one.illegal for one in gpu.illegal()] == ["the target is frozen"]
        await group.freeze(False, timeout_s=PATIENCE_S)
        assert call.end()[0] == OK
    finally:
        await group.freeze(False, timeout_s=PATIENCE_S)
        Cgroup(root / home.lstrip("/")).add(engine.rank)
        group.remove()


def test_only_one_operation_at_a_time(gpu: StandIn, call: Caller, engine: EngineOnGpu) -> None:
    gpu.fault("lock", "slow", seconds=1)
    with caller(gpu) as other:
        call.begin("lock", engine.rank)
        wait_for("it began", lambda: len(gpu.calls()) == 1)
        assert other("lock", engine.rank) == ILLEGAL_STATE
        other.begin("state", engine.rank)
        assert call.end()[0] == OK
        assert other.end() == (OK, LOCKED)
    illegal = [one.illegal for one in gpu.illegal()]
    assert illegal == ["another operation on the target has not ended"]


def test_an_operation_goes_on_when_its_caller_dies(
    gpu: StandIn, call: Caller, engine: EngineOnGpu
) -> None:
    gpu.fault("lock", "kill_caller", seconds=1)
    with caller(gpu) as doomed:
        doomed.begin("lock", engine.rank)
        assert doomed.process.wait(PATIENCE_S) == -signal.SIGKILL
    assert call("lock", engine.rank) == ILLEGAL_STATE
    assert call.state(engine.rank) == LOCKED
    assert [one.result for one in gpu.calls() if one.caller == doomed.pid] == [None]
    assert [one.illegal for one in gpu.illegal()] == [
        "the outcome of an earlier operation is not known yet"
    ]
