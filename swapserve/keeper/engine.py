"""One engine in the keeper's hands: the verbs that start, suspend, dump, restore and end it.

One verb at a time; each runs to its end whoever asked for it. `Holding` says what is there now.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from swapserve.config.schema import ModelConfig
from swapserve.errors import KeeperError, SwapServeError
from swapserve.keeper.checkpoint import Checkpoints
from swapserve.keeper.context import Context
from swapserve.keeper.gpu_images import GpuImages
from swapserve.keeper.launch import execute
from swapserve.keeper.launchers import launcher_of
from swapserve.keeper.phases import Phases
from swapserve.keeper.place import Place
from swapserve.keeper.protocol import Exited, Held, Holding, ImageKind, Measured, VerbReport
from swapserve.keeper.record import Record
from swapserve.keeper.suspension import Suspension
from swapserve.keeper.tree import EngineTree
from swapserve.system import process
from swapserve.system.gpu import NvmlUnavailable
from swapserve.system.process import ProcessRef

log = logging.getLogger(__name__)


class HeldEngine:
    """One engine.

    Args:
        model: its configuration.
        context: what all engines share.
        record: what was known of it.
        start_watch: runs a coroutine in the keeper's task group.
        exited: told of an end that nobody asked for.
        held: first process of every engine that runs, by name.
    """

    def __init__(
        self,
        model: ModelConfig,
        context: Context,
        record: Record,
        *,
        start_watch: Callable[[Awaitable[None]], None],
        exited: Callable[[Exited], None],
        held: Callable[[], Mapping[str, ProcessRef]],
    ) -> None:
        self.model = model
        self._context = context
        self._verb: str | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.place = Place(model, context, record)
        self._launcher = launcher_of(
            self.place, context, context.runtimes, port=record.port, held=held
        )
        self._tree = EngineTree(
            record,
            context.record_path(model.name),
            self.place.group,
            start_watch=start_watch,
            exited=exited,
            launcher=self._launcher,
            gpus=model.gpus,
        )
        self._checkpoints = Checkpoints(self.place, self._tree, context, later=start_watch)
        self._gpu: Suspension | None = None
        self._gpu_images: GpuImages | None = None
        if model.gpus:
            self._gpu = gpu = Suspension(self.place, self._tree, context)
            self._gpu_images = GpuImages(model.name, self._tree, gpu, self._checkpoints)
        self._later = start_watch

    # ------------------------------------------------------------ facts

    def holding(self) -> Holding:
        """Say what there is of it now (reads files: call it in a thread)."""
        golden, live = self._checkpoints.golden(), self._checkpoints.live()
        root = self._tree.root
        away = self._gpu is not None and self._gpu.away
        why_not = self._context.cannot_move(self.model.gpus)
        if root is not None:
            held = Held.SUSPENDED if away else Held.RUNNING
        else:
            held = Held.LIVE_IMAGE if live is not None else Held.NOTHING
        return Holding(
            engine=self.model.name,
            held=held,
            verb=self._verb,
            pid=root.pid if root else None,
            address=self.place.address,
            golden=golden is not None,
            live_image_bytes=live.bytes if live else 0,
            golden_image_bytes=golden.bytes if golden else 0,
            restored_from=self._tree.restored_from,
            can_dump=self.place.can_dump and (self._gpu is None or not why_not),
            can_suspend=not why_not,
            why_not=why_not,
            host_bytes=sum(self._tree.device_bytes.values()) if away else 0,
            owned=self.owned,
            canary=golden.canary if golden else None,
            canary_passed=golden.canary_passed if golden else False,
        )

    @property
    def owned(self) -> bool:
        """Whether it is ours to end, not only attached to."""
        return self._launcher is None or self._launcher.owned

    async def log_tail(self, lines: int) -> str:
        """Return the last lines of its own output, as far as anybody keeps them."""
        if self._launcher is not None and (said := await self._launcher.log_tail(lines)):
            return said
        return await asyncio.to_thread(self.place.log_tail, lines)

    @property
    def root(self) -> ProcessRef | None:
        """Its first process, None if it is away."""
        return self._tree.root

    @property
    def serves(self) -> bool:
        """Whether it runs, with all of its state where it belongs."""
        return self._tree.root is not None and not (self._gpu and self._gpu.away)

    async def idle(self) -> None:
        """Wait until no verb is under way."""
        await self._idle.wait()

    # ------------------------------------------------------------ verbs

    async def spawn(self) -> VerbReport:
        """Start the engine cold.

        Raises:
            KeeperError: it is already there.
            StartFailed: it could not be executed, or its port is taken; nothing of it is left.
        """
        async with self._doing("spawn", running=False) as phases:
            if self._launcher is not None:
                self._tree.adopt_launched(await self._launcher.launch(phases))
                return phases.report()
            self.place.claim_port()
            spec = await self.place.prepare(phases)
            await self._checkpoints.drop("live")
            with phases.phase("spawn"):
                ref = await execute(self.model.name, spec, self.place.log_tail)
            self._tree.adopt(ref, restored_from=None)
            return phases.report()

    async def suspend(self) -> VerbReport:
        """Move its GPU state to host memory and freeze it.

        Raises:
            KeeperError: it does not run, is away already, or has no GPU state that can be moved.
            CudaError: `lost`: it was ended; else it runs on.
        """
        async with self._doing("suspend", running=True) as phases:
            gpu = await self._movable("suspend")
            if gpu.away:
                raise KeeperError(f"'{self.model.name}' is suspended already")
            return phases.report(await gpu.suspend(phases))

    async def resume(self) -> VerbReport:
        """Bring its GPU state back and let it run.

        Raises:
            KeeperError: it is not suspended.
            DeviceBusy: a GPU has too little free memory; it stays suspended.
            CudaError: `lost`: it was ended; else nothing was tried, it stays suspended.
        """
        async with self._doing("resume", running=True) as phases:
            if self._gpu is None or not self._gpu.away:
                raise KeeperError(f"'{self.model.name}' cannot resume: it is not suspended")
            return phases.report(await self._gpu.resume(phases))

    async def _movable(self, verb: str) -> Suspension:
        why_not = await asyncio.to_thread(self._context.cannot_move, self.model.gpus)
        if self._gpu is None or why_not:
            raise KeeperError(f"'{self.model.name}' cannot {verb}: {why_not}")
        return self._gpu

    async def dump(self, kind: ImageKind, canary: dict[str, Any] | None) -> VerbReport:
        """Write an image: `live` ends the process, `golden` leaves it running.

        Raises:
            KeeperError: it does not run, or images of it are not possible here.
            ImageError: no room for the image; the engine is as it was.
            CriuError: the engine is as it was unless it says otherwise.
            CudaError: its GPU state could not be moved out of the way; see there.
        """
        async with self._doing("dump", running=True) as phases:
            if self._gpu_images is None:
                return await self._checkpoints.dump(kind, canary, phases)
            await self._movable("dump")
            return await self._gpu_images.dump(kind, canary, phases)

    async def restore(self, kind: ImageKind, *, resume: bool = True) -> VerbReport:
        """Bring the engine back from an image; a live image is used up, also by a failure.

        Args:
            kind: of the image.
            resume: False: leave it suspended, with its GPU state in host memory; its GPUs are
                neither asked for room nor touched.

        Raises:
            KeeperError: it is already there, or has no GPU state that could stay in host memory.
            ImageError: there is no such image, or the golden one no longer fits.
            CriuError: nothing of it runs.
            DeviceBusy: a GPU has too little free memory; nothing was tried, the image is kept.
            CudaError: `lost`: its GPU state did not come back, or it did not come to rest; nothing
                of it runs. Else nothing was tried, the image is kept.
        """
        async with self._doing("restore", running=False) as phases:
            if self._gpu_images is not None:
                return await self._gpu_images.restore(kind, phases, resume=resume)
            if not resume:
                raise KeeperError(f"'{self.model.name}' has no GPU state that could be kept away")
            return await self._checkpoints.restore(kind, phases)

    async def discard(self) -> VerbReport:
        """Kill the engine at once, without a word to it.

        Raises:
            KeeperError: it does not run, or is not ours to end.
        """
        async with self._doing("discard", running=True) as phases:
            if not self.owned:
                raise KeeperError(f"'{self.model.name}' was started by others; it is not ended")
            await self._quench(phases)
            with phases.phase("kill"):
                await self._tree.kill()
            return phases.report()

    async def _quench(self, phases: Phases) -> None:
        if self._gpu is not None:
            await self._gpu.quench(phases)

    async def stop(self, grace_s: float) -> VerbReport:
        """End the engine if it runs (TERM, then KILL) and drop its live image.

        One that others have started is let go: as it was found, with its GPU state on its GPUs.

        Raises:
            DeviceBusy, CudaError: there is no room for that state; it stays with us, suspended.
        """
        async with self._doing("stop", running=None) as phases:
            if self._tree.root is not None:
                if self.owned:
                    await self._quench(phases)
                elif self._gpu is not None and self._gpu.away:
                    await self._gpu.resume(phases)
                with phases.phase("terminate"):
                    await self._tree.terminate(grace_s)
            await self._checkpoints.drop("live")
            return phases.report()

    async def drop_image(self, kind: ImageKind) -> VerbReport:
        """Delete an image."""
        async with self._doing("drop_image", running=None) as phases:
            with phases.phase("delete"):
                await self._checkpoints.drop(kind)
            return phases.report()

    async def mark_canary_passed(self) -> None:
        """Note that a restore of the present golden image answered as it should."""
        await self._checkpoints.mark_canary_passed()

    async def measure(self) -> Measured:
        """Measure the memory of the whole tree, on the host and on its GPUs.

        Raises:
            KeeperError: it does not run.
        """
        if self._tree.root is None:
            raise KeeperError(f"'{self.model.name}' does not run")
        try:
            return await asyncio.to_thread(self._measure, self._tree.root.pid)
        except ProcessLookupError as error:
            raise KeeperError(f"'{self.model.name}' has just ended") from error

    def _measure(self, root: int) -> Measured:
        memory = process.memory(root)
        device: dict[str, int] = {}
        if self.model.gpus and not (self._gpu and self._gpu.away):
            try:
                device = self._context.nvml.used_by(self._tree.pids())
            except NvmlUnavailable as error:
                raise KeeperError(f"'{self.model.name}' cannot be measured: {error}") from error
        return Measured(host_bytes=memory.pss, device_bytes=device, dump_bytes=memory.dump)

    def recover(self) -> None:
        """Take over what an earlier keeper left: adopt a process that still runs.

        Where it left GPU state half way is found out in the background, as a verb of its own.
        """
        self._tree.recover()
        unsure = self._gpu is not None or self._launcher is not None or self._tree.frozen
        if self._tree.root is not None and unsure:
            self._begin("recover")
            self._later(self._recover())

    async def _recover(self) -> None:
        try:
            await self._find_launched()
            if self._gpu is not None:
                await self._gpu.recover()
            elif self._tree.frozen:
                await self._tree.freeze(False)
        except (SwapServeError, OSError):
            log.exception("event=not_recovered engine=%s", self.model.name)
            if self.owned:  # else it is let go, as it is
                await self._quench(Phases())
            await self._tree.kill()
        finally:
            self._end()

    async def _find_launched(self) -> None:
        try:
            await self._tree.find_launched()
        except KeeperError as error:
            # Its runtime is silent. Its first process is there, so what the record says holds.
            log.warning("event=runtime_silent engine=%s error=%s", self.model.name, error)

    async def forget(self) -> None:
        """End everything and remove namespace, group and record; images stay."""
        await self.stop(self._grace_s())
        if network := self.place.network:
            await network.remove()
        if self.place.group is not None:
            self.place.group.remove()
        self._context.record_path(self.model.name).unlink(missing_ok=True)

    # ---------------------------------------------------------- the work

    @asynccontextmanager
    async def _doing(self, verb: str, *, running: bool | None) -> AsyncIterator[Phases]:
        name = self.model.name
        if self._verb is not None:
            raise KeeperError(f"'{name}' cannot {verb} while it is in {self._verb}")
        if running is True and self._tree.root is None:
            raise KeeperError(f"'{name}' cannot {verb}: it does not run")
        if running is False and self._tree.root is not None:
            raise KeeperError(f"'{name}' cannot {verb}: it already runs")
        self._begin(verb)
        used = self._tree.root is not None
        try:
            yield Phases()
        finally:
            if used or self._tree.root is not None:
                self._context.images.used(self.place.slug)
            self._end()

    def _begin(self, verb: str) -> None:
        self._verb = verb
        self._idle.clear()

    def _end(self) -> None:
        self._verb = None
        self._idle.set()

    def _grace_s(self) -> float:
        own = self.model.stop_grace_s
        return self.model.recipe.stop_grace_s if own is None else own
