"""The driver's checkpoint calls through ctypes on `libcuda.so.1`. Loaded in the worker alone.

The six functions have the same symbols and 64-byte argument structures from CUDA 12.8 to 13.5;
reserved bytes must be zero, so one layout serves all (cuda.h of those versions).
"""

import ctypes
import uuid

from swapserve.keeper.cuda.calls import (
    NO_CUDA,
    STATE_NUMBERS,
    CudaCallFailed,
    CudaState,
    Op,
    Pairs,
    result_name,
)

LIBRARY = "libcuda.so.1"
REMAP_CUDA = 13000
"""First `cuDriverGetVersion` whose restore reads `gpuPairs` (cuda.h 13.0)."""
FUNCTIONS = {
    "state": "cuCheckpointProcessGetState",
    "restore_thread": "cuCheckpointProcessGetRestoreThreadId",
    "lock": "cuCheckpointProcessLock",
    "checkpoint": "cuCheckpointProcessCheckpoint",
    "restore": "cuCheckpointProcessRestore",
    "unlock": "cuCheckpointProcessUnlock",
}


class LockArgs(ctypes.Structure):
    """`CUcheckpointLockArgs`."""

    _fields_ = (
        ("timeout_ms", ctypes.c_uint),
        ("reserved0", ctypes.c_uint),
        ("reserved1", ctypes.c_uint64 * 7),
    )


class PlainArgs(ctypes.Structure):
    """`CUcheckpointCheckpointArgs` and `CUcheckpointUnlockArgs`: nothing of it is used."""

    _fields_ = (("reserved", ctypes.c_uint64 * 8),)


class GpuPair(ctypes.Structure):
    """`CUcheckpointGpuPair`."""

    _fields_ = (("old", ctypes.c_ubyte * 16), ("new", ctypes.c_ubyte * 16))


class RestoreArgs(ctypes.Structure):
    """`CUcheckpointRestoreArgs`; a driver before CUDA 13.0 wants zeros in all of it."""

    _fields_ = (
        ("pairs", ctypes.POINTER(GpuPair)),
        ("pairs_count", ctypes.c_uint),
        ("padding0", ctypes.c_uint),
        ("custom_storage", ctypes.c_void_p),
        ("reserved", ctypes.c_char * 40),
    )


class DriverMissing(Exception):
    """The driver's library cannot be loaded, or it finds no GPU to drive."""


class Driver:
    """The loaded and initialised driver. Every call blocks without holding Python's lock.

    Raises:
        DriverMissing: with a sentence that says what is missing.
    """

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL(LIBRARY)
            init, version = self._cuda.cuInit, self._cuda.cuDriverGetVersion
        except (OSError, AttributeError) as error:
            raise DriverMissing(
                f"NVIDIA's CUDA driver ({LIBRARY}) cannot be loaded: {error}"
            ) from error
        # A restore needs persistence mode or an initialised caller (cuda.h, cuCheckpointProcess-
        # Restore). It takes seconds where there are many GPUs, hence once for each worker.
        code = init(0)
        if code:
            raise DriverMissing(
                f"the CUDA driver does not start: cuInit says {result_name(code)} ({code})"
            )
        number = ctypes.c_int()
        version(ctypes.byref(number))
        self.version: int = number.value

    @property
    def can_checkpoint(self) -> bool:
        """Whether it has all six calls (driver 570 and later)."""
        return all(hasattr(self._cuda, name) for name in FUNCTIONS.values())

    @property
    def remaps(self) -> bool:
        """Whether state can come back to another GPU."""
        return self.version >= REMAP_CUDA

    def state(self, pid: int) -> CudaState | None:
        """Return a process's state, None if it has no CUDA state."""
        number = ctypes.c_int(-1)
        if not self._asked("state", pid, number):
            return None
        if not 0 <= number.value < len(STATE_NUMBERS):
            raise CudaCallFailed("state", pid, 0, "unknown state", str(number.value))
        return STATE_NUMBERS[number.value]

    def restore_thread(self, pid: int) -> int | None:
        """Return the thread that does the driver's work in the process, None if there is none."""
        number = ctypes.c_int()
        return number.value if self._asked("restore_thread", pid, number) else None

    def lock(self, pid: int, timeout_s: float) -> None:
        """Hold up its CUDA calls and wait for its GPU work."""
        self._call("lock", pid, LockArgs(timeout_ms=max(1, round(timeout_s * 1000))))

    def checkpoint(self, pid: int) -> None:
        """Copy its GPU state to its own host memory and release its GPUs."""
        self._call("checkpoint", pid, PlainArgs())

    def restore(self, pid: int, pairs: Pairs) -> None:
        """Take GPUs again and copy the state back; it stays locked."""
        array = (GpuPair * len(pairs))(*(GpuPair(_bytes(old), _bytes(new)) for old, new in pairs))
        self._call(
            "restore", pid, RestoreArgs(pairs=array if pairs else None, pairs_count=len(array))
        )

    def unlock(self, pid: int) -> None:
        """Let its CUDA calls go on."""
        self._call("unlock", pid, PlainArgs())

    def _asked(self, op: Op, pid: int, answer: ctypes.c_int) -> bool:
        code = getattr(self._cuda, FUNCTIONS[op])(ctypes.c_int(pid), ctypes.byref(answer))
        if code and code not in NO_CUDA:
            raise CudaCallFailed(op, pid, code)
        return not code

    def _call(self, op: Op, pid: int, args: ctypes.Structure) -> None:
        code = getattr(self._cuda, FUNCTIONS[op])(ctypes.c_int(pid), ctypes.byref(args))
        if code:
            raise CudaCallFailed(op, pid, code)


def _bytes(gpu: str) -> "ctypes.Array[ctypes.c_ubyte]":
    """Return the 16 bytes of `GPU-xxxxxxxx-xxxx-...` in the order in which they are written."""
    return (ctypes.c_ubyte * 16)(*uuid.UUID(gpu.removeprefix("GPU-")).bytes)
