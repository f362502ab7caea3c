"""The same calls by NVIDIA's `cuda-checkpoint`, for drivers without the API (555 to 565).

Source: NVIDIA/cuda-checkpoint, README at 6ec728a (`--help` of 570.86.10, "570 Features"). Its
errors are the driver's texts (`cuGetErrorString`) in quotation marks. The program starts the
driver anew each time, so a call takes seconds where there are many GPUs.
"""

import re
from pathlib import Path

from swapserve.errors import CommandError
from swapserve.keeper.cuda.calls import (
    ILLEGAL_STATE,
    INVALID_VALUE,
    NO_CUDA,
    NOT_INITIALIZED,
    NOT_PERMITTED,
    NOT_READY,
    NOT_SUPPORTED,
    OPERATING_SYSTEM,
    OUT_OF_MEMORY,
    CudaCallFailed,
    CudaState,
    Op,
    Pairs,
)
from swapserve.system.command import run_sync

FIRST_BRANCH = 555
"""First driver branch with separate actions; 550 only toggles (CRIU, plugins/cuda/README.md)."""
HELP_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 24 * 3600.0
"""The worker's owner ends it, and the program with it, long before."""
TEXTS = {
    "invalid argument": INVALID_VALUE,
    "out of memory": OUT_OF_MEMORY,
    "initialization error": NOT_INITIALIZED,
    "os call failed or operation not supported on this os": OPERATING_SYSTEM,
    "the operation cannot be performed in the present state": ILLEGAL_STATE,
    "device not ready": NOT_READY,
    "operation not permitted": NOT_PERMITTED,
    "operation not supported": NOT_SUPPORTED,
}
UNKNOWN = 999


class BinaryUnusable(Exception):
    """This `cuda-checkpoint`, or this driver with it, will not do; the text says why."""


class Binary:
    """NVIDIA's program; each call is a process in the caller's own process group.

    Raises:
        BinaryUnusable: it cannot be run, or it and the driver can only toggle.
    """

    def __init__(self, path: Path, driver: str | None) -> None:
        self._path = str(path)
        branch = (driver or "").partition(".")[0]
        if branch.isdigit() and int(branch) < FIRST_BRANCH:
            raise BinaryUnusable(
                f"driver {driver} can only toggle a process, without a timeout and without a way"
                f" back from half way; {FIRST_BRANCH} is the first that will do, 570 the first"
                " with its own API"
            )
        try:
            said = run_sync([self._path, "--help"], timeout_s=HELP_TIMEOUT_S, own_session=False)
        except CommandError as error:
            raise BinaryUnusable(f"{path} cannot be used: {error.output_tail}") from error
        if "--action" not in said.stdout + said.stderr:
            raise BinaryUnusable(f"{path} is too old: it has no --action, it can only toggle")

    def state(self, pid: int) -> CudaState | None:
        """Return a process's state, None if it has no CUDA state."""
        text = self._asked("state", pid, "--get-state")
        if text is None:
            return None
        try:
            return CudaState(text.lower())
        except ValueError:
            raise CudaCallFailed("state", pid, UNKNOWN, "unknown state", text) from None

    def restore_thread(self, pid: int) -> int | None:
        """Return the thread that does the driver's work in the process, None if there is none."""
        text = self._asked("restore_thread", pid, "--get-restore-tid")
        if text is None:
            return None
        # Whatever else was printed must not be taken for a thread.
        if not text.isdigit() or int(text) == 0:
            raise CudaCallFailed("restore_thread", pid, UNKNOWN, "no thread id", text)
        return int(text)

    def lock(self, pid: int, timeout_s: float) -> None:
        """Hold up its CUDA calls and wait for its GPU work."""
        self._act("lock", pid, "--timeout", str(max(1, round(timeout_s * 1000))))

    def checkpoint(self, pid: int) -> None:
        """Copy its GPU state to its own host memory and release its GPUs."""
        self._act("checkpoint", pid)

    def restore(self, pid: int, pairs: Pairs) -> None:
        """Take GPUs again and copy the state back; it stays locked.

        Raises:
            CudaCallFailed: also for `pairs`: drivers that need this program cannot remap.
        """
        if pairs:
            raise CudaCallFailed("restore", pid, NOT_SUPPORTED)
        self._act("restore", pid)

    def unlock(self, pid: int) -> None:
        """Let its CUDA calls go on."""
        self._act("unlock", pid)

    def _asked(self, op: Op, pid: int, option: str) -> str | None:
        try:
            return self._run(op, pid, option)
        except CudaCallFailed as error:
            if error.code in NO_CUDA:
                return None
            raise

    def _act(self, op: Op, pid: int, *further: str) -> None:
        self._run(op, pid, "--action", op, *further)

    def _run(self, op: Op, pid: int, *options: str) -> str:
        argv = [self._path, *options, "--pid", str(pid)]
        try:
            done = run_sync(argv, timeout_s=CALL_TIMEOUT_S, own_session=False, check=False)
        except CommandError as error:
            raise CudaCallFailed(op, pid, UNKNOWN, "cuda-checkpoint", error.output_tail) from error
        if done.status != 0:
            raise CudaCallFailed(op, pid, _code(done.tail), detail=done.tail)
        return done.stdout.strip()


def _code(text: str) -> int:
    quoted = re.findall(r'"([^"]*)"', text)
    return next((code for said in quoted if (code := TEXTS.get(said.lower()))), UNKNOWN)
