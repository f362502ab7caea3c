"""The ordered CUDA operations over all processes of one engine."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from swapserve.config.schema import KeeperConfig
from swapserve.errors import CudaError, DeviceBusy
from swapserve.keeper.cuda.calls import CudaState, CudaUnavailable, Pairs
from swapserve.keeper.cuda.crew import Crew, Odd, Seen, describe
from swapserve.keeper.cuda.finding import Finder, Unstable
from swapserve.keeper.cuda.pool import Workers
from swapserve.keeper.cuda.readings import Readings
from swapserve.keeper.cuda.remap import NoMapping, whole_mapping
from swapserve.keeper.cuda.resume import Resumption
from swapserve.keeper.cuda.shelter import sheltered
from swapserve.keeper.cuda.suspend import Suspended, Suspension
from swapserve.keeper.phases import Phases
from swapserve.system.gpu import Nvml, NvmlUnavailable
from swapserve.system.process import ProcessRef

ADMIT_TIMEOUT_S = 10.0
"""How long a restore waits for memory that an engine before it has just given back."""

log = logging.getLogger(__name__)

Where = Literal["running", "suspended", "lost", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """Where an engine's GPU state was found, or brought to.

    Attributes:
        state: all on GPUs; all in host memory; neither, so it has to be ended; it uses no CUDA.
        processes: those that use CUDA.
    """

    state: Where
    processes: tuple[ProcessRef, ...] = ()


class CudaTree:
    """Moves the GPU state of one engine. The caller holds its GPUs: one engine moves at a time.

    Args:
        engine: its name, for errors.
        workers: where CUDA calls are made.
        nvml: readings of the GPUs.
        pids: all its processes at this moment, as the keeper sees them.
        keeper: timeouts, rate, margin.
    """

    def __init__(
        self,
        engine: str,
        *,
        workers: Workers,
        nvml: Nvml,
        pids: Callable[[], Sequence[int]],
        keeper: KeeperConfig,
    ) -> None:
        self._engine = engine
        self._workers = workers
        self._readings = Readings(nvml)
        self._finder = Finder(pids)
        self._keeper = keeper

    async def suspend(self, phases: Phases) -> Suspended:
        """Move its GPU state to host memory; the caller then freezes it.

        Raises:
            CudaError: `lost`: it has to be ended, and what could be is off its GPUs; else all of
                it runs as before.

        Cancellation: all is brought back first; then the caller is cancelled at its next await.
        """
        try:
            async with self._crew() as crew:
                work = Suspension(self._engine, crew, self._finder, self._readings, phases)
                return await sheltered(work.run(), cancelled=work.stop)
        except CudaUnavailable as error:
            raise CudaError(self._engine, "find", str(error), lost=False) from error

    async def admit(self, needs: Mapping[str, int], phases: Phases) -> None:
        """Make sure that its GPUs have room for it, `keeper.gpu_margin` included.

        Args:
            needs: bytes by UUID of the GPU.
            phases: accounts of the verb.

        Raises:
            DeviceBusy: one has not, also after waiting a while; nothing was touched.
            CudaError: NVML does not tell; nothing was touched.
        """
        margin = self._keeper.gpu_margin_bytes
        wanted = {uuid: needed + margin for uuid, needed in needs.items()}
        with phases.phase("admission"):
            try:
                short = await self._readings.shortage(wanted, timeout_s=ADMIT_TIMEOUT_S)
            except NvmlUnavailable as error:
                raise CudaError(self._engine, "admission", str(error), lost=False) from error
        if short is not None:
            raise DeviceBusy(self._engine, *short)

    async def resume(
        self,
        processes: Sequence[ProcessRef] | None,
        needs: Mapping[str, int],
        phases: Phases,
        *,
        pairs: Pairs = (),
    ) -> None:
        """Bring its GPU state back and let it run; admitted and thawed before by the caller.

        Args:
            processes: those that were suspended; None: find them (after CRIU their pids are new).
            needs: bytes by UUID, for deadlines.
            phases: accounts of the verb.
            pairs: UUIDs of GPUs that it was on and that it comes to, where those differ.

        Raises:
            CudaError: `lost`: it has to be ended; else nothing was tried and it still is suspended.

        Cancellation: it runs to its end; then the caller is cancelled at its next await.
        """
        try:
            all_pairs = await self._all_pairs(pairs)
            async with self._crew() as crew:
                crew.moved_bytes = sum(needs.values())
                if processes is None:
                    with phases.phase("find"):
                        seen = await self._see(crew)
                    processes = self._found(seen, needs)
                work = Resumption(self._engine, crew, phases, pairs=all_pairs)
                await sheltered(work.run(processes))
        except (CudaUnavailable, NvmlUnavailable, Unstable, NoMapping) as error:
            raise CudaError(self._engine, "restore", str(error), lost=False) from error

    def _found(
        self, seen: Mapping[ProcessRef, Seen], needs: Mapping[str, int]
    ) -> tuple[ProcessRef, ...]:
        if not seen and any(needs.values()):
            message = "none of its processes has the GPU state that it was suspended with"
            raise CudaError(self._engine, "find", message, lost=True)
        return tuple(seen)

    async def _all_pairs(self, pairs: Pairs) -> Pairs:
        if all(old == new for old, new in pairs):
            return ()
        if not (await self._workers.features()).remaps:
            raise NoMapping(
                "the driver cannot bring GPU state back to another GPU (580 is the first)"
            )
        return whole_mapping(pairs, await self._readings.gpus())

    async def settle(
        self, needs: Mapping[str, int], phases: Phases, *, memory_is_ours: bool = True
    ) -> Settled:
        """Find out where its GPU state is, and finish what is half done. It must not be frozen.

        After a killed keeper, or an outcome that nobody knows: half of it on the GPUs is brought
        to all of it on the GPUs. Never raises: what cannot be told or mended is `lost`.

        Args:
            needs: bytes by UUID, for deadlines.
            phases: accounts of the verb.
            memory_is_ours: whether nobody else was given its GPU memory meanwhile; if somebody
                was, what is in host memory cannot be restored.

        Cancellation: it runs to its end; then the caller is cancelled at its next await.
        """
        return await sheltered(self._settle(sum(needs.values()), phases, memory_is_ours))

    async def _settle(self, moved_bytes: int, phases: Phases, memory_is_ours: bool) -> Settled:
        with phases.phase("settle"):
            try:
                async with self._crew() as crew:
                    crew.moved_bytes = moved_bytes
                    # A killed keeper's call may still be carried out: a look waits for its end.
                    crew.look_timeout_s = max(crew.look_timeout_s, crew.move_deadline_s)
                    seen = await self._see(crew)
                    if seen and set(seen.values()) != {CudaState.CHECKPOINTED}:
                        if memory_is_ours or CudaState.CHECKPOINTED not in seen.values():
                            seen = await crew.bring_back(tuple(seen))
                        if _where(seen) == "lost":
                            log.warning(
                                "event=gpu_state_lost engine=%s %s", self._engine, describe(seen)
                            )
                            await crew.quench(tuple(seen))
                    return Settled(state=_where(seen), processes=tuple(seen))
            except (CudaUnavailable, Unstable) as error:
                log.warning("event=gpu_state_unknown engine=%s error=%s", self._engine, error)
                return Settled(state="lost")

    async def quench(self, phases: Phases) -> bool:
        """Take its state off its GPUs before it is killed, as far as it goes; never raises.

        Returns:
            False if some of it may still be there.

        Cancellation: it runs to its end; then the caller is cancelled at its next await.
        """
        return await sheltered(self._quench(phases))

    async def _quench(self, phases: Phases) -> bool:
        with phases.phase("quench"):
            try:
                async with self._crew() as crew:
                    seen = await self._see(crew)
                    crew.moved_bytes = await self._held_bytes()
                    return await crew.quench(tuple(seen))
            except (CudaUnavailable, Unstable) as error:
                log.warning("event=not_quenched engine=%s error=%s", self._engine, error)
                return False

    async def _held_bytes(self) -> int:
        """Return what it has on GPUs; where NVML does not tell, what all programs have."""
        used = await self._readings.used_if_told(self._finder.pids())
        try:
            return sum(used.values()) or sum(gpu.used_bytes for gpu in await self._readings.gpus())
        except NvmlUnavailable:
            return 0

    def _crew(self) -> Crew:
        return Crew(self._workers, self._keeper)

    async def _see(self, crew: Crew) -> dict[ProcessRef, Seen]:
        """Look at every process that has CUDA state, wherever that is.

        Raises:
            Unstable: /proc did not answer.
        """
        seen = await crew.look(await self._finder.candidates())
        return {ref: found for ref, found in seen.items() if found not in {Odd.NONE, Odd.GONE}}


def _where(seen: Mapping[ProcessRef, Seen]) -> Where:
    states = set(seen.values())
    if not states:
        return "none"
    if states == {CudaState.RUNNING}:
        return "running"
    return "suspended" if states == {CudaState.CHECKPOINTED} else "lost"
