"""GPU state of one engine: to host memory and back, with its CPU side frozen in between.

The order is the driver's: a process is locked before it is checkpointed, and frozen only after
that, since the driver does its work in a thread of the process itself (CRIU issue 2470). What is
known is written to the engine's record before the first call and after the last one, so a later
keeper knows whether it must look.
"""

import asyncio
import logging

from swapserve.errors import CudaError, ImageError, KeeperError
from swapserve.keeper.context import Context
from swapserve.keeper.cuda.readings import Readings
from swapserve.keeper.cuda.tree import CudaTree
from swapserve.keeper.phases import Phases
from swapserve.keeper.place import Place
from swapserve.keeper.tree import EngineTree

log = logging.getLogger(__name__)


class Suspension:
    """The GPU state of one engine that runs on GPUs.

    Every method holds the engine's GPUs: one engine at a time moves on each.
    """

    def __init__(self, place: Place, tree: EngineTree, context: Context) -> None:
        self._name = place.model.name
        self._uuids = place.model.gpus
        self._tree = tree
        self._context = context
        self._readings = Readings(context.nvml)
        self._cuda = CudaTree(
            place.model.name,
            workers=context.workers,
            nvml=context.nvml,
            pids=tree.pids,
            keeper=context.config.keeper,
        )
        tree.leave_gpus = self._leave_gpus

    @property
    def away(self) -> bool:
        """Whether its GPU state is in host memory."""
        return self._tree.root is not None and self._tree.gpu == "in_host_memory"

    def _ended(self) -> bool:
        return self._tree.root is None

    def _check_there(self, step: str) -> None:
        if self._ended():
            raise CudaError(self._name, step, "it has ended meanwhile", lost=True)

    async def suspend(self, phases: Phases, *, freeze: bool = True) -> int:
        """Move its GPU state to host memory, then freeze it; return the bytes moved.

        Args:
            phases: accounts of the verb.
            freeze: False if CRIU is to dump it at once.

        Raises:
            CudaError: `lost`: it was ended, or has ended; else it runs on.
        """
        async with self._context.gpus(self._uuids, phases):
            await self._note_move(phases)
            try:
                moved = await self._cuda.suspend(phases)
            except CudaError as error:
                if error.lost:
                    await self._end(error)
                else:  # brought back, as far as it had been moved
                    self._tree.gpu_on_device(revived=True)
                raise
            self._check_there("verify")
            self._tree.gpu_in_host_memory(moved.processes, moved.device_bytes)
            if freeze:
                await self._freeze(phases)
            return sum(moved.device_bytes.values())

    async def _note_move(self, phases: Phases) -> None:
        """Write down that it moves, and what: a later keeper may have to bring that back."""
        with phases.phase("measure"):
            pids = await asyncio.to_thread(self._tree.pids)
            held = await self._readings.used_if_told(pids)
        try:
            self._tree.gpu_moves(held)
        except OSError as error:
            message = f"it could not be written down, so nothing was tried: {error}"
            raise CudaError(self._name, "record", message, lost=False) from error

    async def _freeze(self, phases: Phases) -> None:
        try:
            with phases.phase("freeze"):
                await self._tree.freeze(True)
        except TimeoutError:
            await self._bring_back(phases)
            message = "its processes did not come to rest; it runs on"
            raise CudaError(self._name, "freeze", message, lost=False) from None
        except KeeperError as error:
            raise CudaError(self._name, "freeze", str(error), lost=True) from error
        # Once frozen nothing of it can come any more.
        pids = await asyncio.to_thread(self._tree.pids)
        if left := sum((await self._readings.used_if_told(pids)).values()):
            await self._thaw(phases)
            await self._bring_back(phases)
            message = f"a process took {left} bytes of GPU memory at the last moment; it runs on"
            raise CudaError(self._name, "freeze", message, lost=False)

    async def resume(self, phases: Phases) -> int:
        """Bring its GPU state back and let it run; return the bytes moved.

        Raises:
            DeviceBusy: a GPU has too little free memory; nothing was tried.
            CudaError: `lost`: it was ended; else nothing was tried, and it is suspended as before.
        """
        async with self._context.gpus(self._uuids, phases):
            needs = self._needs(self._tree.gpus, self._tree.device_bytes)
            await self._cuda.admit(needs, phases)
            await self._thaw(phases)
            self._check_there("thaw")
            await self._bring_back(phases)
            self._check_there("unlock")
            return sum(self._tree.device_bytes.values())

    async def _thaw(self, phases: Phases) -> None:
        if not self._tree.frozen:
            return
        try:
            with phases.phase("thaw"):
                await self._tree.freeze(False)
        except TimeoutError:
            message = "its processes could not be thawed"
            raise CudaError(self._name, "thaw", message, lost=False) from None
        except KeeperError as error:
            raise CudaError(self._name, "thaw", str(error), lost=True) from error

    async def admit(
        self, gpus: tuple[str, ...], device_bytes: dict[str, int], phases: Phases
    ) -> None:
        """Check that its GPUs can take what an image will bring.

        Args:
            gpus: those that the image's state is of.
            device_bytes: what it takes of each of them.
            phases: accounts of the verb.

        Raises:
            ImageError: it is of other GPUs, and the driver cannot bring it to these.
            DeviceBusy: one has no room.
        """
        self._check_gpus(gpus)
        await self._cuda.admit(self._needs(gpus, device_bytes), phases)

    def check_rest(self, gpus: tuple[str, ...], device_bytes: dict[str, int]) -> None:
        """Check that what an image will bring can rest in host memory, and come back from there.

        Raises:
            ImageError: see `admit`.
            CudaError: the image does not say how much it is; nothing was tried.
        """
        self._check_gpus(gpus)
        if not any(device_bytes.values()):
            message = "its image does not say how much host memory its GPU state takes"
            raise CudaError(self._name, "admission", message, lost=False)

    def _check_gpus(self, gpus: tuple[str, ...]) -> None:
        if not (pairs := self._pairs(gpus)):
            return
        cuda = self._context.cuda
        if len(gpus) != len(self._uuids) or cuda is None or not cuda.remaps:
            where = ", ".join(old for old, _ in pairs)
            message = f"its GPU state is of {where}, and this driver cannot bring it elsewhere"
            raise ImageError(self._name, "restore", message)

    async def rest(self, phases: Phases) -> None:
        """Freeze what an image has brought, with its GPU state in host memory.

        Nothing is done on its GPUs, so they are not held.

        Raises:
            KeeperError: it has ended.
            CudaError: its processes do not come to rest.
        """
        try:
            with phases.phase("freeze"):
                await self._tree.freeze(True)
        except TimeoutError:
            message = "its processes did not come to rest"
            raise CudaError(self._name, "freeze", message, lost=False) from None

    def _pairs(self, gpus: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
        """Return from which GPU to which its state has to go; empty if it stays where it was."""
        return () if gpus in {(), self._uuids} else tuple(zip(gpus, self._uuids, strict=False))

    def _needs(self, gpus: tuple[str, ...], device_bytes: dict[str, int]) -> dict[str, int]:
        """Return what it will take, by the GPUs that it has now."""
        moves = dict(self._pairs(gpus))
        return {moves.get(uuid, uuid): size for uuid, size in device_bytes.items()}

    async def _bring_back(self, phases: Phases) -> None:
        # After a restore by CRIU the pids are new: then the processes are found by their state.
        processes, needs = self._tree.cuda, self._tree.device_bytes
        pairs = self._pairs(self._tree.gpus)
        try:
            self._tree.gpu_moves(needs)
        except OSError as error:  # whoever waits for it is worth more than a record
            log.warning("event=record_not_written engine=%s error=%s", self._name, error)
        try:
            await self._cuda.resume(processes or None, needs, phases, pairs=pairs)
        except CudaError as error:
            if error.lost:
                await self._end(error)
            else:
                self._tree.gpu_in_host_memory(processes, needs)
                await self._freeze_again()
            raise
        self._tree.gpu_moved(self._uuids, self._needs(self._tree.gpus, needs))
        self._tree.gpu_on_device(revived=True)

    async def _freeze_again(self) -> None:
        """Let an engine whose state stays in host memory rest; one that cannot only costs CPU."""
        try:
            await self._tree.freeze(True)
        except (TimeoutError, KeeperError) as error:
            log.warning("event=not_frozen engine=%s error=%s", self._name, error)

    async def _end(self, error: CudaError) -> None:
        """End an engine whose state is neither here nor there."""
        log.warning("event=gpu_state_lost engine=%s error=%s", self._name, error)
        await self._tree.kill()

    async def quench(self, phases: Phases) -> None:
        """Take its state off its GPUs before it is ended, if it was ever brought back.

        Killing a process with restored GPU state has hung whole machines (NVIDIA/cuda-checkpoint
        issue 53). Where it cannot be had the engine is ended nevertheless: its memory is needed.
        """
        if self._ended() or self.away:
            return
        if not self._tree.revived and self._tree.gpu == "on_device":
            return
        async with self._context.gpus(self._uuids, phases):
            try:
                self._tree.gpu_moves(self._tree.device_bytes)
            except OSError as error:
                log.warning("event=record_not_written engine=%s error=%s", self._name, error)
            if not await self._cuda.quench(phases):
                log.warning("event=killed_with_gpu_state engine=%s", self._name)

    async def _leave_gpus(self) -> None:
        await self.quench(Phases())

    async def recover(self) -> None:
        """Find out where a killed keeper left its GPU state, and finish or undo the move.

        Raises:
            TimeoutError: it could not be thawed, so nobody can ask the driver.
        """
        if self._ended() or self._tree.gpu == "on_device":
            return
        if self._tree.gpu == "in_host_memory" and self._tree.frozen:
            return
        phases = Phases()
        async with self._context.gpus(self._uuids, phases):
            # Frozen or not: a frozen process does not answer the driver.
            await self._tree.freeze(False)
            found = await self._cuda.settle(self._tree.device_bytes, phases)
            log.info("event=gpu_state_settled engine=%s found=%s", self._name, found.state)
            if self._ended():
                return
            if found.state == "lost":
                await self._tree.kill()
            elif found.state == "suspended":
                self._tree.gpu_in_host_memory(found.processes, self._tree.device_bytes)
                await self._stay(phases)
            else:
                self._tree.gpu_on_device(revived=True)

    async def _stay(self, phases: Phases) -> None:
        """Leave what was found suspended so, if it is known what it needs to come back."""
        try:
            if self._tree.device_bytes:
                await self._freeze(phases)
            else:  # nobody was told that it had left, so its room is still there
                await self._bring_back(phases)
        except CudaError as error:  # which says what it did about it
            log.warning("event=not_left_suspended engine=%s error=%s", self._name, error)
