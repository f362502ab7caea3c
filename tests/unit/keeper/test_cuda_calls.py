"""Words and layouts of the driver path: no driver is needed for them."""

import ctypes
import uuid

import pytest

from swapserve.keeper.cuda import driver
from swapserve.keeper.cuda.calls import (
    STATE_NUMBERS,
    CudaCallFailed,
    CudaOutcomeUnknown,
    CudaState,
    CudaTargetGone,
    result_name,
)
from swapserve.keeper.cuda.link import worker_environment
from swapserve.keeper.cuda.reasons import explain
from swapserve.keeper.cuda.remap import NoMapping, whole_mapping
from swapserve.system.gpu import Gpu


@pytest.mark.parametrize("layout", [driver.LockArgs, driver.PlainArgs, driver.RestoreArgs])
def test_every_argument_structure_has_64_bytes(layout: type[ctypes.Structure]) -> None:
    assert ctypes.sizeof(layout) == 64


def test_the_pairs_are_where_cuda_13_reads_them() -> None:
    assert driver.RestoreArgs.pairs.offset == 0
    assert driver.RestoreArgs.pairs_count.offset == 8
    assert driver.RestoreArgs.custom_storage.offset == 16
    assert ctypes.sizeof(driver.GpuPair) == 32
    number = uuid.UUID("5747a11d-6e76-4000-8000-000000000001")
    assert bytes(driver._bytes(f"GPU-{number}")) == number.bytes


def test_states_have_the_drivers_numbers() -> None:
    assert STATE_NUMBERS.index(CudaState.RUNNING) == 0
    assert STATE_NUMBERS.index(CudaState.CHECKPOINTED) == 2
    assert STATE_NUMBERS.index(CudaState.RESTORING) == 5


def test_a_result_that_is_not_known_keeps_its_number() -> None:
    assert result_name(600) == "CUDA_ERROR_NOT_READY"
    assert result_name(12345) == "CUresult 12345"
    failed = CudaCallFailed("lock", 7, 600)
    assert str(failed) == "lock of process 7: CUDA_ERROR_NOT_READY (600)"


@pytest.mark.parametrize(
    ("failure", "first", "says"),
    [
        (CudaCallFailed("lock", 7, 304), True, "needs root"),
        (CudaCallFailed("state", 7, 304), False, "needs root"),
        (CudaCallFailed("lock", 7, 800), False, "needs root"),
        (CudaCallFailed("checkpoint", 7, 801), False, "managed (unified) memory"),
        (CudaCallFailed("restore", 7, 2), False, "keeper.gpu_margin"),
        (CudaCallFailed("restore", 7, 304), True, "earlier restore"),
        (CudaCallFailed("lock", 7, 600), False, "keeper.cuda_lock_timeout"),
    ],
)
def test_a_failure_says_what_it_means(failure: CudaCallFailed, first: bool, says: str) -> None:
    assert says in explain(failure, first=first)
    assert failure.name in explain(failure, first=first)


@pytest.mark.parametrize(
    "failure",
    [
        CudaCallFailed("unlock", 7, 304),
        CudaCallFailed("checkpoint", 7, 600),
        CudaTargetGone("lock", 7),
        CudaOutcomeUnknown("lock", 7, "no answer"),
    ],
)
def test_and_nothing_where_it_means_nothing_known(
    failure: CudaCallFailed | CudaOutcomeUnknown,
) -> None:
    assert explain(failure) == str(failure)


def test_a_worker_gets_our_environment_without_what_changes_a_driver() -> None:
    ours = {
        "PATH": "/bin",
        "LD_PRELOAD": "/x.so",
        "LD_LIBRARY_PATH": "/lib",
        "CUDA_VISIBLE_DEVICES": "",
        "NVIDIA_VISIBLE_DEVICES": "none",
        "HOME": "/root",
    }
    assert set(worker_environment(ours)) == {"PATH", "LD_LIBRARY_PATH", "HOME"}


def gpus(**kinds: str) -> list[Gpu]:
    return [Gpu(uuid=uuid, name=kind, memory_bytes=1, used_bytes=0) for uuid, kind in kinds.items()]


@pytest.mark.parametrize(
    ("moves", "whole"),
    [
        ({"a": "a", "b": "b"}, {}),
        ({"a": "b"}, {"a": "b", "b": "a", "c": "c"}),
        ({"a": "c"}, {"a": "c", "b": "b", "c": "a"}),
        ({"a": "b", "b": "c"}, {"a": "b", "b": "c", "c": "a"}),
        ({"a": "b", "b": "a"}, {"a": "b", "b": "a", "c": "c"}),
        ({"a": "a", "b": "c"}, {"a": "a", "b": "c", "c": "b"}),
        ({"gone": "a"}, {"gone": "a", "b": "b", "c": "c"}),
    ],
)
def test_a_mapping_of_some_gpus_becomes_one_of_all(
    moves: dict[str, str], whole: dict[str, str]
) -> None:
    assert dict(whole_mapping(list(moves.items()), gpus(a="X", b="X", c="X"))) == whole


@pytest.mark.parametrize(
    ("moves", "reason"),
    [
        ({"a": "a", "b": "a"}, "two GPUs"),
        ({"a": "none"}, "there is no GPU none"),
        ({"a": "b"}, "not of the kind"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(moves: dict[str, str], reason: str) -> None:
    with pytest.raises(NoMapping, match=reason):
        whole_mapping(list(moves.items()), gpus(a="X", b="Y"))
