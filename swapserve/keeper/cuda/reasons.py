"""What a failed CUDA call means for whoever runs the engine: cause first, then what to do."""

from swapserve.keeper.cuda import calls
from swapserve.keeper.cuda.calls import CudaCallFailed, CudaOutcomeUnknown

Failure = CudaCallFailed | CudaOutcomeUnknown

NO_RIGHTS = (
    "the driver was refused access to it; the keeper needs root (or CAP_SYS_PTRACE over the engine)"
    " and to see the engine in its own /proc (NVIDIA/cuda-checkpoint issue 6)"
)
NOT_POSSIBLE = (
    "the driver cannot move this kind of GPU state: managed (unified) memory, CUDA IPC between"
    " processes, MIG and MPS are not supported; switch them off in the engine's settings, or set"
    " mechanism: sleep"
)
TOO_SMALL = (
    "GPU memory ran out in the middle of a restore, so the estimate of its footprint was too small;"
    " its state cannot be brought back any more (NVIDIA/cuda-checkpoint issue 44). Raise"
    " keeper.gpu_margin, and see `nvidia-smi` for programs that SwapServe does not manage"
)
POISONED = (
    "its state cannot be brought back any more: an earlier restore must have run out of GPU memory"
    " (NVIDIA/cuda-checkpoint issue 44)"
)
STILL_BUSY = (
    "its GPU work did not come to rest in time; it runs on. A longer keeper.cuda_lock_timeout may"
    " help, and engines on several GPUs need NCCL's P2P and SHM off"
)

MEANINGS = {
    ("lock", calls.NOT_READY): STILL_BUSY,
    ("restore", calls.OUT_OF_MEMORY): TOO_SMALL,
    ("restore", calls.OPERATING_SYSTEM): POISONED,
    ("any", calls.NOT_PERMITTED): NO_RIGHTS,
    ("any", calls.NOT_SUPPORTED): NOT_POSSIBLE,
}


def explain(failure: Failure, *, first: bool = False) -> str:
    """Return a sentence about a failure.

    Args:
        failure: what was raised.
        first: whether nothing had been done to any process before.
    """
    meaning = None
    if isinstance(failure, CudaCallFailed):
        meaning = _meaning(failure, first=first)
    return f"{failure}: {meaning}" if meaning else str(failure)


def _meaning(failure: CudaCallFailed, *, first: bool) -> str | None:
    op, code = failure.op, failure.code
    if code == calls.OPERATING_SYSTEM and op != "restore":
        early = first or op in {"state", "restore_thread"}
        return NO_RIGHTS if early else None
    return MEANINGS.get((op, code)) or MEANINGS.get(("any", code))
