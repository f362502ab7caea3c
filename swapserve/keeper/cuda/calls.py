"""What is said about the driver's checkpoint calls: states, results, errors, features.

Source: cuda.h of CUDA 12.8 to 13.5 (`CUprocessState`, `CUresult`), section "CUDA Checkpointing" of
the driver API.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

Op = Literal["state", "restore_thread", "lock", "checkpoint", "restore", "unlock"]
Api = Literal["driver", "binary"]
Pairs = Sequence[tuple[str, str]]
"""Pairs of GPU UUIDs: where state was, where it comes back to."""

INVALID_VALUE = 1
OUT_OF_MEMORY = 2
NOT_INITIALIZED = 3
OPERATING_SYSTEM = 304
ILLEGAL_STATE = 401
NOT_READY = 600
NOT_PERMITTED = 800
NOT_SUPPORTED = 801

RESULT_NAMES: Mapping[int, str] = {
    INVALID_VALUE: "CUDA_ERROR_INVALID_VALUE",
    OUT_OF_MEMORY: "CUDA_ERROR_OUT_OF_MEMORY",
    NOT_INITIALIZED: "CUDA_ERROR_NOT_INITIALIZED",
    4: "CUDA_ERROR_DEINITIALIZED",
    34: "CUDA_ERROR_STUB_LIBRARY",
    46: "CUDA_ERROR_DEVICE_UNAVAILABLE",
    100: "CUDA_ERROR_NO_DEVICE",
    101: "CUDA_ERROR_INVALID_DEVICE",
    201: "CUDA_ERROR_INVALID_CONTEXT",
    OPERATING_SYSTEM: "CUDA_ERROR_OPERATING_SYSTEM",
    ILLEGAL_STATE: "CUDA_ERROR_ILLEGAL_STATE",
    NOT_READY: "CUDA_ERROR_NOT_READY",
    700: "CUDA_ERROR_ILLEGAL_ADDRESS",
    719: "CUDA_ERROR_LAUNCH_FAILED",
    NOT_PERMITTED: "CUDA_ERROR_NOT_PERMITTED",
    NOT_SUPPORTED: "CUDA_ERROR_NOT_SUPPORTED",
    802: "CUDA_ERROR_SYSTEM_NOT_READY",
    803: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
    804: "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
    900: "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
    999: "CUDA_ERROR_UNKNOWN",
}
NO_CUDA = frozenset({INVALID_VALUE, NOT_INITIALIZED})
"""What the driver answers about a process without CUDA state (NVIDIA/cuda-checkpoint issue 10)."""


def result_name(code: int) -> str:
    """Return the driver's name of a result, for one not known here its number."""
    return RESULT_NAMES.get(code, f"CUresult {code}")


class CudaState(StrEnum):
    """What the driver says of a process; the last two exist from CUDA 13.4 on."""

    RUNNING = "running"
    LOCKED = "locked"
    CHECKPOINTED = "checkpointed"
    FAILED = "failed"
    CHECKPOINTING = "checkpointing"
    RESTORING = "restoring"


STATE_NUMBERS = tuple(CudaState)
"""States in the order of their numbers in `CUprocessState`."""


class CudaCallFailed(Exception):
    """The driver carried out a call and said no.

    Attributes:
        op: which call.
        pid: the process it was about.
        code: the driver's `CUresult`.
        name: the same as NVIDIA writes it.
        detail: what else was said; may be empty.
    """

    def __init__(self, op: str, pid: int, code: int, name: str = "", detail: str = "") -> None:
        self.op = op
        self.pid = pid
        self.code = code
        self.name = name or result_name(code)
        self.detail = detail
        tail = f": {detail}" if detail else ""
        super().__init__(f"{op} of process {pid}: {self.name} ({code}){tail}")


class CudaTargetGone(CudaCallFailed):
    """The process has ended, or its pid is another's now. Nothing was done to the other."""

    def __init__(self, op: str, pid: int) -> None:
        super().__init__(op, pid, NOT_INITIALIZED, "gone", "the process has ended")


class CudaOutcomeUnknown(Exception):
    """Nobody knows what a call did: its deadline was over, or the worker died in it.

    Attributes:
        op: which call.
        pid: the process it was about; 0 for the worker's own start.
        reason: what was seen.
    """

    def __init__(self, op: str, pid: int, reason: str) -> None:
        self.op = op
        self.pid = pid
        self.reason = reason
        super().__init__(f"{op} of process {pid} has no known outcome: {reason}")


class CudaUnavailable(Exception):
    """No CUDA call is possible on this machine; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What can be done here.

    Attributes:
        api: the driver's own calls, or NVIDIA's `cuda-checkpoint`; None: GPU state stays put.
        driver: version of the driver, such as `580.95.05`; None if it was not told.
        cuda: `cuDriverGetVersion`, such as 13000; None without a driver.
        remaps: whether state can come back to another GPU than it was on.
        why_not: why `api` is None; else empty.
    """

    api: Api | None = None
    driver: str | None = None
    cuda: int | None = None
    remaps: bool = False
    why_not: str = ""


class Backend(Protocol):
    """Carries out calls in the worker; each blocks and raises `CudaCallFailed`."""

    def state(self, pid: int) -> CudaState | None:
        """Return a process's state, None if it has no CUDA state."""

    def restore_thread(self, pid: int) -> int | None:
        """Return the thread that does the driver's work in the process, None if there is none."""

    def lock(self, pid: int, timeout_s: float) -> None:
        """Hold up its CUDA calls and wait for its GPU work."""

    def checkpoint(self, pid: int) -> None:
        """Copy its GPU state to its own host memory and release its GPUs."""

    def restore(self, pid: int, pairs: Pairs) -> None:
        """Take GPUs again and copy the state back; it stays locked."""

    def unlock(self, pid: int) -> None:
        """Let its CUDA calls go on."""
