"""GPU state of an engine to its own host memory: find, lock all, checkpoint all, verify.

Whatever fails, every process is brought back to running; the engine is lost only where that is not
possible. It is not frozen before all are checkpointed: the driver does its work in a thread of the
process itself (CRIU issue 2470).
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from swapserve.errors import CudaError
from swapserve.keeper.cuda.calls import (
    CudaCallFailed,
    CudaOutcomeUnknown,
    CudaState,
    CudaTargetGone,
)
from swapserve.keeper.cuda.crew import Crew, Seen, describe
from swapserve.keeper.cuda.finding import KEEPS_CHANGING, Finder, Unstable
from swapserve.keeper.cuda.readings import Readings
from swapserve.keeper.cuda.reasons import explain
from swapserve.keeper.phases import Phases
from swapserve.system.gpu import NvmlUnavailable
from swapserve.system.process import ProcessRef

FREED_TIMEOUT_S = 10.0
"""How long GPU memory may take to become free after its process was checkpointed."""
UNTOLD_TIMEOUT_S = 2.0
"""The same where NVML does not list the processes, and it is only measured."""
LATE_PASSES = 5
"""How often processes that start to use CUDA meanwhile are locked as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspended:
    """An engine without state on any GPU.

    Attributes:
        processes: those that have their GPU state in host memory; empty if none uses CUDA.
        device_bytes: what they held of each GPU, by UUID.
    """

    processes: tuple[ProcessRef, ...] = ()
    device_bytes: dict[str, int] = field(default_factory=dict)


class _Refused(Exception):
    """A step that may not be taken, or whose result is not as it must be."""


class Suspension:
    """One attempt. `stop` makes it turn back at its next step."""

    def __init__(
        self, engine: str, crew: Crew, finder: Finder, readings: Readings, phases: Phases
    ) -> None:
        self._engine = engine
        self._crew = crew
        self._finder = finder
        self._readings = readings
        self._phases = phases
        self._stopped = False
        self._step = "find"
        self._touched: list[ProcessRef] = []
        self._locked: list[ProcessRef] = []

    def stop(self) -> None:
        """Ask it to bring everything back; what is under way is awaited first."""
        self._stopped = True

    async def run(self) -> Suspended:
        """Do it.

        Raises:
            CudaError: it was brought back, or is `lost`.
        """
        try:
            return await self._forward()
        except (CudaCallFailed, CudaOutcomeUnknown) as failure:
            raise await self._back(explain(failure, first=not self._locked)) from failure
        except (_Refused, Unstable, NvmlUnavailable) as failure:
            raise await self._back(str(failure)) from failure

    async def _forward(self) -> Suspended:
        with self._at("find"):
            first = await self._finder.find(self._crew)
            if not first:
                return Suspended()
            await self._check_gpus()
        with self._at("lock"):
            await self._lock_all(first)
        with self._at("measure"):
            used, free = await self._measure()
        with self._at("checkpoint"):
            await self._checkpoint_all()
        with self._at("verify"):
            await self._verify()
            if used:
                await self._verify_freed()
            else:  # NVML does not list them
                used = await self._readings.freed(free, timeout_s=UNTOLD_TIMEOUT_S)
            self._go_on()
        return Suspended(processes=tuple(self._locked), device_bytes=used)

    def _at(self, step: str) -> AbstractContextManager[None]:
        self._step = step
        return self._phases.phase(step)

    def _go_on(self) -> None:
        if self._stopped:
            raise _Refused("it was cancelled")

    async def _check_gpus(self) -> None:
        if await self._readings.mps():
            raise _Refused("MPS serves the GPUs; the driver cannot move the state of its clients")
        used = await self._readings.used_if_told(self._finder.pids())
        for gpu in await self._readings.gpus():
            if gpu.mig and used.keys() & {gpu.uuid, *gpu.instances}:
                raise _Refused(f"GPU {gpu.uuid} is split by MIG; the driver cannot move its state")

    async def _lock_all(self, refs: list[ProcessRef]) -> None:
        """Lock them one after the other, and those that start to use CUDA meanwhile."""
        for _ in range(LATE_PASSES):
            for ref in refs:
                self._go_on()
                await self._lock(ref)
            found = await self._finder.find(self._crew, self._locked)
            refs = [ref for ref in found if ref not in self._locked]
            if not refs:
                return
        raise Unstable(KEEPS_CHANGING)

    async def _lock(self, ref: ProcessRef) -> None:
        self._touched.append(ref)
        try:
            await self._crew.lock(ref)
        except CudaTargetGone:  # it was none of the engine's lasting ones
            self._touched.remove(ref)
        else:
            self._locked.append(ref)

    async def _measure(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return the bytes to be moved and those free, by GPU; exact, since all are locked."""
        gpus = await self._readings.gpus()
        used = await self._readings.used_if_told(self._finder.pids())
        total = sum(used.values()) or sum(gpu.used_bytes for gpu in gpus)
        self._crew.moved_bytes = total
        return used, await self._readings.free([gpu.uuid for gpu in gpus if not gpu.mig])

    async def _checkpoint_all(self) -> None:
        failures = await self._crew.each(
            self._locked, self._crew.checkpoint, stop=lambda: self._stopped
        )
        for failure in failures.values():
            raise failure
        self._go_on()

    async def _verify(self) -> None:
        seen = await self._crew.look(self._locked)
        if wrong := {ref: s for ref, s in seen.items() if s is not CudaState.CHECKPOINTED}:
            raise _Refused(describe(wrong))
        found = await self._finder.find(self._crew, self._locked)
        if late := [ref for ref in found if ref not in self._locked]:
            raise _Refused(f"process {late[0].pid} has just started to use CUDA")

    async def _verify_freed(self) -> None:
        left = await self._readings.still_used(self._finder.pids, timeout_s=FREED_TIMEOUT_S)
        if left:
            raise _Refused(f"NVML still sees {left} bytes of its processes")

    async def _back(self, reason: str) -> CudaError:
        """Bring all back to running; return what is to be raised."""
        wrong: dict[ProcessRef, Seen] = {}
        if self._touched:
            with self._phases.phase("rollback"):
                seen = await self._crew.bring_back(self._touched)
                wrong = {ref: s for ref, s in seen.items() if s is not CudaState.RUNNING}
                if wrong:
                    await self._crew.quench(self._touched)
        if wrong:
            reason = f"{reason}; it could not be brought back: {describe(wrong)}"
        return CudaError(self._engine, self._step, reason, lost=bool(wrong))
