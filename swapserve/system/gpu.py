"""What NVIDIA's management library (NVML) says of the GPUs. It only reads.

The library is loaded when it is first asked, so a machine without a GPU pays nothing, and whatever
is wrong with library or driver is one sentence in `NvmlUnavailable`.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from typing import Any, TypeVar

from swapserve.system import nvml as nvmls
from swapserve.system.nvml import CHECKPOINT_DRIVER, Gpu, Gpus, NvmlUnavailable

__all__ = ["CHECKPOINT_DRIVER", "Gpu", "Gpus", "Nvml", "NvmlUnavailable", "look"]

BUSY_TIMEOUT_S = 10.0
"""How long a question waits for an earlier one of another thread to be answered."""
ANSWER_TIMEOUT_S = 15.0
"""How long an answer may take, the wait for an earlier one included. A hung driver gives none."""
LOOK_TIMEOUT_S = 20.0
"""How long `look` waits for a driver that does not answer at all."""

_T = TypeVar("_T")


class Nvml:
    """NVML, opened when it is first asked and kept open.

    May be used from several threads; calls block (milliseconds on a healthy driver), so a
    coroutine asks in a thread. A driver that hangs costs a thread of its own and `ANSWER_TIMEOUT_S`
    once; until it answers, who asks is told at once. After an answer that says that driver or GPU
    were lost the library is opened anew, and a reading that failed so is tried once more: reading
    has no effect.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._library: Any = None
        self._handles: dict[str, Any] = {}
        self._unanswered: Future[Any] | None = None

    def free(self, uuid: str) -> int:
        """Return the bytes that a new allocation on a GPU (or MIG instance) could get.

        Raises:
            NvmlUnavailable: it cannot be told, or there is no such GPU.
        """
        return int(self._ask(lambda nvml: nvmls.memory(nvml, self._handle(nvml, uuid)).free))

    def used_by(self, pids: Collection[int]) -> dict[str, int]:
        """Return the bytes that processes have, by GPU (or MIG instance).

        A GPU on which none of them is listed is left out. A process that has contexts of several
        kinds (compute, graphics, client of MPS) counts once: NVML gives its total in each list.
        Process ids are the host's: from inside a container NVML may list others, so a caller that
        knows a process to use a GPU must not take its absence here for zero.

        Raises:
            NvmlUnavailable: it cannot be told, also for just one of these processes: the driver
                has a value for "not available" (nvmlProcessInfo_t), which is not zero.
        """
        wanted = frozenset(pids)
        return self._ask(lambda nvml: nvmls.used_by(nvml, wanted))

    def gpus(self) -> tuple[Gpu, ...]:
        """Return every GPU that answers.

        Raises:
            NvmlUnavailable: the library or the driver does not.
        """
        return self._ask(lambda nvml: nvmls.inventory(nvml)[0])

    def mps(self) -> bool:
        """Return whether MPS serves GPUs of this machine: its daemon runs, or it has clients.

        Raises:
            NvmlUnavailable: no daemon is seen and NVML cannot say whether there are clients.
        """
        return nvmls.mps_daemon() or self._ask(nvmls.mps_clients)

    def look(self) -> Gpus:
        """Return all of it, or why it cannot be told; never raises."""
        try:
            seen = self._ask(nvmls.read)
        except NvmlUnavailable as error:
            return Gpus(unavailable=error.reason)
        try:
            return replace(seen, mps=self.mps())
        except NvmlUnavailable:
            return seen

    def close(self) -> None:
        """Let go of the library; the next question opens it again."""
        with self._alone():
            self._shut()

    def _ask(self, question: Callable[[Any], _T]) -> _T:
        if self._unanswered is not None and not self._unanswered.done():
            raise NvmlUnavailable("NVIDIA's driver hangs: an earlier question has no answer yet")
        answer: Future[_T] = Future()

        def ask() -> None:
            try:
                answer.set_result(self._again_if_lost(question))
            except BaseException as error:  # noqa: BLE001 - it belongs to who has asked
                answer.set_exception(error)

        threading.Thread(target=ask, name="nvml", daemon=True).start()
        try:
            return answer.result(ANSWER_TIMEOUT_S)
        except FutureTimeout:
            self._unanswered = answer
            silent = f"NVIDIA's driver has not answered for {ANSWER_TIMEOUT_S:g} s"
            raise NvmlUnavailable(silent) from None

    def _again_if_lost(self, question: Callable[[Any], _T]) -> _T:
        with self._alone():
            try:
                return self._once(question)
            except _LostError:
                self._shut()
            try:
                return self._once(question)
            except _LostError as lost:
                self._shut()
                raise NvmlUnavailable(str(lost)) from lost

    def _once(self, question: Callable[[Any], _T]) -> _T:
        nvml = self._opened()
        try:
            return question(nvml)
        except nvml.NVMLError as error:
            reason = nvmls.reason(nvml, error)
            if error.value in nvmls.lost_codes(nvml):
                raise _LostError(reason) from error
            raise NvmlUnavailable(reason) from error

    def _opened(self) -> Any:  # noqa: ANN401
        if self._library is None:
            nvml = nvmls.package()
            try:
                nvml.nvmlInit()
            except nvml.NVMLError as error:
                raise NvmlUnavailable(nvmls.reason(nvml, error)) from error
            self._library = nvml
        return self._library

    def _shut(self) -> None:
        nvml, self._library = self._library, None
        self._handles.clear()
        if nvml is not None:
            # What is lost cannot be closed in order.
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlShutdown()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=BUSY_TIMEOUT_S):
            raise NvmlUnavailable(
                f"NVIDIA's driver has not answered an earlier question for {BUSY_TIMEOUT_S:g} s"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _handle(self, nvml: Any, uuid: str) -> Any:  # noqa: ANN401
        if uuid not in self._handles:
            try:
                self._handles[uuid] = nvml.nvmlDeviceGetHandleByUUID(uuid)
            except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument) as error:
                raise NvmlUnavailable(
                    f"NVML knows no GPU {uuid} (`nvidia-smi -L` lists them)"
                ) from error
        return self._handles[uuid]


class _LostError(Exception):
    """What was opened is of no use any more."""


def look() -> Gpus:
    """Ask once for driver and GPUs; never raises, and never waits for ever.

    A thread that a hung driver does not let go of stays behind; it does not keep the program from
    ending.
    """
    answers: queue.SimpleQueue[Gpus] = queue.SimpleQueue()

    def ask() -> None:
        nvml = Nvml()
        answers.put(nvml.look())
        nvml.close()

    thread = threading.Thread(target=ask, name="nvml-look", daemon=True)
    thread.start()
    try:
        seen = answers.get(timeout=LOOK_TIMEOUT_S)
    except queue.Empty:
        silent = f"NVIDIA's driver has not answered for {LOOK_TIMEOUT_S:g} s"
        return Gpus(unavailable=silent)
    thread.join(timeout=LOOK_TIMEOUT_S)
    return seen
