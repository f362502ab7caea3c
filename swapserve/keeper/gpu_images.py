"""Images of an engine with GPU state: what has to happen before and after CRIU.

CRIU finds a process without a GPU: its state is moved to host memory before a dump, and stays
there after a restore until it is brought back, or for as long as nobody wants the engine.
"""

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any

from swapserve.errors import CudaError, SwapServeError
from swapserve.keeper.checkpoint import Checkpoints
from swapserve.keeper.phases import Phases
from swapserve.keeper.protocol import ImageKind, VerbReport
from swapserve.keeper.suspension import Suspension
from swapserve.keeper.tree import EngineTree

log = logging.getLogger(__name__)


class GpuImages:
    """The images of one engine on GPUs."""

    def __init__(
        self, engine: str, tree: EngineTree, gpu: Suspension, checkpoints: Checkpoints
    ) -> None:
        self._name = engine
        self._tree = tree
        self._gpu = gpu
        self._checkpoints = checkpoints

    async def dump(
        self, kind: ImageKind, canary: dict[str, Any] | None, phases: Phases
    ) -> VerbReport:
        """Dump while the GPU state is in host memory (see `HeldEngine.dump`)."""
        was_away = self._gpu.away
        if not was_away:
            await self._gpu.suspend(phases, freeze=False)
        try:
            report = await self._checkpoints.dump(kind, canary, phases)
        except (SwapServeError, OSError):  # a full disk, too
            if self._tree.root is not None:
                await self._back_after_failed_dump(phases, was_away=was_away)
            raise
        if kind == "golden" and was_away:
            await self._tree.freeze(True)
        elif kind == "golden":
            await self._or_end("resume", self._gpu.resume(phases))
        return phases.report(report.bytes)

    async def _back_after_failed_dump(self, phases: Phases, *, was_away: bool) -> None:
        try:
            if was_away:
                await self._tree.freeze(True)  # CRIU has thawed it
            else:
                await self._gpu.resume(phases)
        except (SwapServeError, TimeoutError):
            # Half way is nowhere: it would neither serve nor give its memory back.
            log.exception("event=not_taken_back engine=%s", self._name)
            await self._tree.kill()

    async def restore(self, kind: ImageKind, phases: Phases, *, resume: bool) -> VerbReport:
        """Restore, then bring the GPU state back or rest with it (see `HeldEngine.restore`)."""
        gpus, held = await asyncio.to_thread(self._checkpoints.gpu_state, kind)
        if resume:
            await self._gpu.admit(gpus, held, phases)
        else:
            self._gpu.check_rest(gpus, held)
        report = await self._checkpoints.restore(kind, phases)
        if resume and self._gpu.away:
            await self._or_end("resume", self._gpu.resume(phases))
        elif not resume:
            await self._or_end("rest", self._gpu.rest(phases))
        return phases.report(report.bytes)

    async def _or_end(self, step: str, work: Awaitable[object]) -> None:
        """Finish with the engine on its GPUs, or at rest; one that is in between is ended.

        It cannot stay as it is: it costs CPU, or nobody has promised it the host memory.
        """
        try:
            await work
        except SwapServeError as error:
            await self._tree.kill()
            raise CudaError(self._name, step, str(error), lost=True) from error
