"""GPU state of an engine back to its GPUs: restore all, unlock all, verify.

Room was made sure of before: a restore that runs out of GPU memory cannot be repeated nor undone
(NVIDIA/cuda-checkpoint issue 44).
"""

from collections.abc import Mapping, Sequence

from swapserve.errors import CudaError
from swapserve.keeper.cuda.calls import (
    OUT_OF_MEMORY,
    CudaCallFailed,
    CudaOutcomeUnknown,
    CudaState,
    Pairs,
)
from swapserve.keeper.cuda.crew import Crew, describe
from swapserve.keeper.cuda.reasons import Failure, explain
from swapserve.keeper.phases import Phases
from swapserve.system.process import ProcessRef

BACK = frozenset({CudaState.LOCKED, CudaState.RUNNING})
"""Where a process is whose state is on its GPU."""


class Resumption:
    """One attempt. It cannot turn back: it ends with the engine running, or lost."""

    def __init__(self, engine: str, crew: Crew, phases: Phases, *, pairs: Pairs = ()) -> None:
        self._engine = engine
        self._crew = crew
        self._phases = phases
        self._pairs = pairs

    async def run(self, refs: Sequence[ProcessRef]) -> None:
        """Bring these processes back.

        Raises:
            CudaError: always `lost`: what was live has been taken off its GPU again, since it will
                have to be killed.
        """
        with self._phases.phase("gpu_restore"):  # a verb of that name is CRIU's
            seen = await self._crew.look(refs)
            odd = {
                ref: found
                for ref, found in seen.items()
                if found not in BACK | {CudaState.CHECKPOINTED}
            }
            if odd:
                await self._give_up(refs, "restore", describe(odd), None)
            away = [ref for ref, found in seen.items() if found is CudaState.CHECKPOINTED]
            if failures := await self._crew.each(away, self._restore):
                await self._mend(refs, away, failures)
        with self._phases.phase("unlock"):
            locked = [ref for ref in refs if seen[ref] is not CudaState.RUNNING]
            failures = await self._crew.each(locked, self._crew.unlock, at_once=1, all_of_them=True)
            seen = await self._crew.look(refs)
            # The states decide: one that was unlocked twice, or whose answer was lost, runs.
            wrong = {ref: s for ref, s in seen.items() if s is not CudaState.RUNNING}
            if wrong:
                cause = next(iter(failures.values()), None)
                await self._give_up(refs, "unlock", describe(wrong), cause)

    async def _restore(self, ref: ProcessRef) -> None:
        await self._crew.restore(ref, self._pairs)

    async def _mend(
        self,
        refs: Sequence[ProcessRef],
        away: Sequence[ProcessRef],
        failures: Mapping[ProcessRef, Failure],
    ) -> None:
        """Decide after a failed restore whether it may go on; try once more where nothing was done.

        Raises:
            CudaError: it may not go on.
        """
        seen = await self._crew.look(refs)
        untouched = all(seen[ref] is CudaState.CHECKPOINTED for ref in away)
        if untouched and not any(map(_final, failures.values())):
            failures = await self._crew.each(away, self._restore)
            seen = await self._crew.look(refs)
        if not all(found in BACK for found in seen.values()):
            worst = max(failures.values(), key=_out_of_memory)
            await self._give_up(refs, "restore", describe(seen), worst)

    async def _give_up(
        self, refs: Sequence[ProcessRef], step: str, reason: str, cause: Failure | None
    ) -> None:
        with self._phases.phase("rollback"):
            await self._crew.quench(refs)
        message = f"{reason}; {explain(cause)}" if cause else reason
        raise CudaError(self._engine, step, message, lost=True) from cause


def _out_of_memory(failure: Failure) -> bool:
    return isinstance(failure, CudaCallFailed) and failure.code == OUT_OF_MEMORY


def _final(failure: Failure) -> bool:
    """Whether the call may not be repeated: it has spoilt the process, or may have had effect."""
    return isinstance(failure, CudaOutcomeUnknown) or _out_of_memory(failure)
