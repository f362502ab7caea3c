"""One worker process and the calls that are under way in it.

Everything here happens in callbacks of the event loop, so a call goes on, and its deadline holds,
whatever becomes of the task that asked for it.
"""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swapserve.keeper.cuda.calls import (
    CudaCallFailed,
    CudaOutcomeUnknown,
    CudaTargetGone,
    result_name,
)
from swapserve.system.helper import Helper, start_helper
from swapserve.system.process import ProcessRef

KILL_WAIT_S = 5.0
"""How long a killed worker may take to end; the kernel does not end one inside a stuck driver."""
CLOSE_TIMEOUT_S = 2.0
"""How long an idle worker may take to end by itself before it is killed."""
READ_BYTES = 1 << 16
BY_ITSELF = "the worker ended by itself"
KEPT_LD = "LD_LIBRARY_PATH"
DROPPED = ("LD_", "CUDA_", "NVIDIA_")

log = logging.getLogger(__name__)


def worker_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """Return a worker's environment: ours, without what changes what a driver does or prints.

    A preloaded library once made CRIU read thread 0 out of cuda-checkpoint's output (NVIDIA/nvcf,
    cuda-checkpoint-wrapper.sh); CUDA_VISIBLE_DEVICES would hide the engines' GPUs.
    """
    return {
        name: value
        for name, value in ours.items()
        if name == KEPT_LD or not name.startswith(DROPPED)
    }


@dataclass(slots=True)
class _Call:
    op: str
    pid: int
    answer: asyncio.Future[Any]
    timer: asyncio.TimerHandle


class Link:
    """A running worker.

    Args:
        binary: NVIDIA's `cuda-checkpoint`, None if there is none.
        idle: told when the last call under way has been answered.
        ended: told when the process is gone.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self,
        binary: Path | None,
        *,
        idle: Callable[["Link"], None],
        ended: Callable[["Link"], None],
    ) -> None:
        argv = [sys.executable, "-m", "swapserve.keeper.cuda.worker"]
        if binary is not None:
            argv += ["--binary", str(binary)]
        self._helper: Helper = start_helper(argv, env=worker_environment(os.environ))
        self._idle = idle
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, _Call] = {}
        self._last_id = 0
        self._unread = b""
        self._ending = ""
        self.over = asyncio.Event()
        self._loop.add_reader(self._helper.pidfd, self._collect)
        self._loop.add_reader(self._helper.channel, self._read)

    @property
    def pid(self) -> int:
        """The worker's process."""
        return self._helper.pid

    @property
    def usable(self) -> bool:
        """Whether calls may be made: it runs, and nobody ends it."""
        return not self._ending and self._helper.alive()

    @property
    def busy(self) -> bool:
        """Whether a call is under way, also one for which nobody waits any more."""
        return bool(self._calls)

    async def call(
        self, op: str, ref: ProcessRef | None, *, deadline_s: float, **arguments: object
    ) -> Any:  # noqa: ANN401
        """Make one call.

        Raises:
            CudaCallFailed: the driver said no.
            CudaTargetGone: the process is not there any more.
            CudaOutcomeUnknown: there was no answer in time, or the worker ended. It is gone.

        Cancellation: the call goes on until it is answered or its deadline is over.
        """
        pid = ref.pid if ref else 0
        if not self.usable:
            raise CudaOutcomeUnknown(op, pid, self._ending or "the worker has ended")
        self._last_id += 1
        number = self._last_id
        request: dict[str, object] = {"id": number, "op": op, **arguments}
        if ref is not None:
            request |= {"pid": ref.pid, "start": ref.start_ticks}
        late = f"no answer within {deadline_s:g} s"
        call = _Call(
            op, pid, self._loop.create_future(), self._loop.call_later(deadline_s, self.kill, late)
        )
        self._calls[number] = call
        self._send(request)
        return await call.answer

    def kill(self, reason: str) -> None:
        """Kill its process group; calls under way then have no known outcome."""
        if self.over.is_set():
            return
        if not self._ending:
            self._ending = reason
            self._loop.call_later(KILL_WAIT_S, self._give_up)
        self._helper.kill()

    def close(self) -> None:
        """Let it end by itself, since nothing is under way; soon it is killed."""
        self._ending = self._ending or "the worker was ended"
        if not self.over.is_set():
            self._stop_reading()
            self._helper.channel.close()
            self._loop.call_later(CLOSE_TIMEOUT_S, self.kill, self._ending)

    def _send(self, request: dict[str, object]) -> None:
        line = json.dumps(request).encode() + b"\n"
        try:
            sent = self._helper.channel.send(line)
        except OSError as error:
            self.kill(f"the worker takes no calls: {error}")
            return
        if sent != len(line):
            self.kill("the worker takes no calls: its socket is full")

    def _read(self) -> None:
        try:
            data = self._helper.channel.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            data = b""
            log.debug("event=cuda_worker_socket pid=%d error=%s", self.pid, error)
        if not data:
            self._stop_reading()
            self.kill(BY_ITSELF)
            return
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def _take(self, answer: dict[str, Any]) -> None:
        call = self._calls.pop(answer["id"], None)
        if call is None:
            return
        call.timer.cancel()
        if not call.answer.done():
            if "value" in answer:
                call.answer.set_result(answer["value"])
            elif answer.get("gone"):
                call.answer.set_exception(CudaTargetGone(call.op, call.pid))
            else:
                code = answer["code"]
                name = answer.get("name") or result_name(code)
                failed = CudaCallFailed(call.op, call.pid, code, name, answer.get("detail", ""))
                call.answer.set_exception(failed)
        if not self._calls:
            self._idle(self)

    def _stop_reading(self) -> None:
        if self._helper.channel.fileno() >= 0:
            self._loop.remove_reader(self._helper.channel)

    def _collect(self) -> None:
        """The process has ended: take the answers that it still gave, then account for the rest."""
        self._loop.remove_reader(self._helper.pidfd)
        while self._helper.channel.fileno() >= 0 and self._calls:
            waiting = len(self._calls)
            self._read()
            if len(self._calls) == waiting:
                break
        self._stop_reading()
        said = " ".join(self._helper.said().split())
        status = self._helper.reap()
        reason = self._ending or BY_ITSELF
        if reason == BY_ITSELF:
            reason += f" ({status})"
        self.over.set()
        if self._calls:
            log.warning("event=cuda_worker_lost pid=%d reason=%s output=%s", self.pid, reason, said)
        self._lose_calls(f"{reason}. {said}".strip())
        self._ended(self)

    def _give_up(self) -> None:
        """It does not even end: nobody should wait for it. It is collected whenever it does."""
        if not self.over.is_set():
            log.error("event=cuda_worker_stuck pid=%d reason=%s", self.pid, self._ending)
            self._lose_calls(f"{self._ending}; it cannot even be killed")

    def _lose_calls(self, reason: str) -> None:
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.timer.cancel()
            if not call.answer.done():
                call.answer.set_exception(CudaOutcomeUnknown(call.op, call.pid, reason))
