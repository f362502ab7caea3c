"""Calls over all CUDA processes of one engine, by one worker, or the next if that one is lost.

What is called here states, looks and outcomes is per process; what they mean for the engine is
decided in `suspend` and `resume`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from enum import StrEnum
from types import TracebackType
from typing import TypeVar

from swapserve.config.schema import KeeperConfig
from swapserve.keeper.cuda.calls import (
    CudaCallFailed,
    CudaOutcomeUnknown,
    CudaState,
    CudaTargetGone,
    CudaUnavailable,
    Pairs,
)
from swapserve.keeper.cuda.pool import PROBE_TIMEOUT_S, Worker, Workers
from swapserve.keeper.cuda.reasons import Failure
from swapserve.system.process import ProcessRef

PARALLEL = 4
"""Processes whose state is moved at once. NVIDIA's nvsnap takes 8; one after the other took six
minutes for 38 processes (NVIDIA/nvcf, nvsnap, internal/agent/checkpoint.go)."""
MOVE_FIXED_S = 10.0
"""What moving GPU state may take beyond the time that its bytes explain."""
UNLOCK_TIMEOUT_S = 30.0
ROUNDS = 2
"""How often states are read anew while processes are brought back."""

_T = TypeVar("_T")


class Odd(StrEnum):
    """What a look at a process finds instead of a state."""

    NONE = "without CUDA state"
    GONE = "gone"
    UNKNOWN = "unknown"


Seen = CudaState | Odd
HOPELESS = frozenset(set(CudaState) - {"running", "locked", "checkpointed"}) | {Odd.NONE, Odd.GONE}
OFF_DEVICE = frozenset({CudaState.CHECKPOINTED, Odd.NONE, Odd.GONE})


class Crew:
    """One engine's calls during one operation: an async context manager, which may lease a worker.

    Args:
        workers: where workers come from.
        keeper: timeouts and rates.

    Raises:
        CudaUnavailable: on entering, if no CUDA call is possible here.
    """

    def __init__(self, workers: Workers, keeper: KeeperConfig) -> None:
        self.moved_bytes = 0
        self.look_timeout_s = PROBE_TIMEOUT_S
        self._workers = workers
        self._keeper = keeper
        self._leases = AsyncExitStack()
        self._worker: Worker | None = None
        self._replacing = asyncio.Lock()

    async def __aenter__(self) -> "Crew":
        self._worker = await self._leases.enter_async_context(self._workers.lease())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._leases.aclose()

    @property
    def move_deadline_s(self) -> float:
        """Longest move of one process's state: moves of one engine share the way."""
        return MOVE_FIXED_S + self.moved_bytes / self._keeper.cuda_rate_bytes

    # ------------------------------------------------------------ calls

    async def ask(self, call: Callable[[Worker], Awaitable[_T]]) -> _T:
        """Make one call with a worker that lives.

        Raises:
            CudaCallFailed: the driver said no.
            CudaOutcomeUnknown: there was no answer, or no worker can be had.
        """
        async with self._replacing:
            if self._worker is None or not self._worker.usable:
                await self._leases.aclose()
                self._worker = None
                try:
                    self._worker = await self._leases.enter_async_context(self._workers.lease())
                except CudaUnavailable as error:
                    raise CudaOutcomeUnknown("start of a worker", 0, str(error)) from error
            worker = self._worker
        return await call(worker)

    async def lock(self, ref: ProcessRef) -> None:
        """Lock one process; raises like `ask`."""
        timeout_s = self._keeper.cuda_lock_timeout_s
        await self.ask(lambda worker: worker.lock(ref, timeout_s=timeout_s))

    async def checkpoint(self, ref: ProcessRef) -> None:
        """Checkpoint one process; raises like `ask`."""
        deadline_s = self.move_deadline_s
        await self.ask(lambda worker: worker.checkpoint(ref, deadline_s=deadline_s))

    async def restore(self, ref: ProcessRef, pairs: Pairs = ()) -> None:
        """Restore one process; raises like `ask`."""
        deadline_s = self.move_deadline_s
        await self.ask(lambda worker: worker.restore(ref, deadline_s=deadline_s, pairs=pairs))

    async def unlock(self, ref: ProcessRef) -> None:
        """Unlock one process; raises like `ask`."""
        await self.ask(lambda worker: worker.unlock(ref, deadline_s=UNLOCK_TIMEOUT_S))

    async def has_context(self, ref: ProcessRef) -> bool:
        """Whether a process uses CUDA; raises like `ask`, but one that ended does not use it."""
        try:
            return (
                await self.ask(
                    lambda worker: worker.restore_thread(ref, deadline_s=self.look_timeout_s)
                )
                is not None
            )
        except CudaTargetGone:
            return False

    # ------------------------------------------------------- over many

    async def each(
        self,
        refs: Iterable[ProcessRef],
        call: Callable[[ProcessRef], Awaitable[None]],
        *,
        at_once: int = PARALLEL,
        all_of_them: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[ProcessRef, Failure]:
        """Make a call for each; after a failure, or `stop`, begin no further one.

        Returns:
            What failed. With `all_of_them` a failure keeps none of the others from being called.
        """
        failures: dict[ProcessRef, Failure] = {}
        room = asyncio.Semaphore(at_once)

        async def one(ref: ProcessRef) -> None:
            async with room:
                if stop() or (failures and not all_of_them):
                    return
                try:
                    await call(ref)
                except (CudaCallFailed, CudaOutcomeUnknown) as failure:
                    failures[ref] = failure

        async with asyncio.TaskGroup() as tasks:
            for ref in refs:
                tasks.create_task(one(ref))
        return failures

    async def look(self, refs: Iterable[ProcessRef]) -> dict[ProcessRef, Seen]:
        """Read the states; one after the other, so that one that hangs hides only itself."""
        return {ref: await self._look(ref) for ref in refs}

    async def _look(self, ref: ProcessRef) -> Seen:
        try:
            state = await self.ask(lambda worker: worker.state(ref, deadline_s=self.look_timeout_s))
        except CudaTargetGone:
            return Odd.GONE
        except (CudaCallFailed, CudaOutcomeUnknown):
            return Odd.UNKNOWN
        return Odd.NONE if state is None else state

    async def bring_back(self, refs: Sequence[ProcessRef]) -> dict[ProcessRef, Seen]:
        """Bring processes back to running from wherever they are; return where that ended.

        Restores all before it unlocks any. Decides by what it sees, not by what was called, so it
        is right after an outcome that nobody knows; no call is made twice for one process. Ends at
        once where the engine is lost anyway.
        """
        done: set[ProcessRef] = set()
        for _ in range(ROUNDS):
            seen = await self.look(refs)
            if HOPELESS & set(seen.values()) or _all(seen, CudaState.RUNNING):
                return seen
            if not await self._advance(seen, done) and Odd.UNKNOWN not in seen.values():
                return seen
        return await self.look(refs)

    async def _advance(self, seen: Mapping[ProcessRef, Seen], done: set[ProcessRef]) -> bool:
        """Restore and unlock what is not `done`; return whether there was anything."""
        away = [ref for ref in _those(seen, CudaState.CHECKPOINTED) if ref not in done]
        locked = [ref for ref in _those(seen, CudaState.LOCKED) if ref not in done]
        done.update(away, locked)
        if await self.each(away, self.restore):
            return False
        # One at a time: one that hangs takes the worker, and so what is known of the others.
        await self.each(away + locked, self.unlock, at_once=1, all_of_them=True)
        return bool(away or locked)

    async def quench(self, refs: Sequence[ProcessRef]) -> bool:
        """Take all state off the GPUs, as far as it goes; return whether none is left there.

        Killing a live restored process has hung whole machines (NVIDIA/cuda-checkpoint issue 53).
        """
        seen = await self.look(refs)
        known = [ref for ref, found in seen.items() if found is not Odd.UNKNOWN]
        await self.each(_those(seen, CudaState.RUNNING), self.lock, at_once=1, all_of_them=True)
        seen |= await self.look(known)
        await self.each(_those(seen, CudaState.LOCKED), self.checkpoint, all_of_them=True)
        seen |= await self.look(known)
        return set(seen.values()) <= OFF_DEVICE


def _those(seen: Mapping[ProcessRef, Seen], state: CudaState) -> list[ProcessRef]:
    return [ref for ref, found in seen.items() if found is state]


def _all(seen: Mapping[ProcessRef, Seen], state: CudaState) -> bool:
    return all(found is state for found in seen.values())


def describe(seen: Mapping[ProcessRef, Seen]) -> str:
    """Say which process is in which state."""
    return ", ".join(f"process {ref.pid} is {found}" for ref, found in seen.items())
