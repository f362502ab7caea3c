"""The bare driver calls: lock, checkpoint, restore, unlock on a process of known content.

Nothing of SwapServe is in between but the keeper's own worker process, which makes the calls. No
state is asked for while a process is frozen, a restore is tried only where the GPU has room for
it, and a process that was restored is suspended before it is ended.
"""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from evaluation.gpu.sheet import Budget, Impossible, Page
from evaluation.gpu.targets import Target, TargetFailed, started
from evaluation.machine import huge_page_setting
from swapserve.config.schema import KeeperConfig
from swapserve.keeper.cuda.calls import CudaCallFailed, CudaOutcomeUnknown, CudaState
from swapserve.keeper.cuda.pool import Worker, Workers
from swapserve.keeper.hugepages import HugePages
from swapserve.system.gpu import Nvml, NvmlUnavailable

LOCK_S = 10.0
BASE_DEADLINE_S = 15.0
SLOWEST_BYTES_PER_S = 800e6
LAPS = {2_000_000_000: 3, 10_000_000_000: 2}
"""How often a process of at most so many bytes is moved; a larger one, once."""
FIRST_GUESS_S_PER_BYTE = 0.8e-9
"""Fill, out, in, verify; replaced by what is measured."""
START_S = 4.0
SETTLE_S = 10.0
"""How long the driver may take to give freed memory back, which it does not do at once."""
POLL_S = 0.05
WORKER_REPEATS = 3
SHARE_FOR_SIZES = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What may be used: `vram` and `ram` bytes, on the GPU `uuid`, with `margin` left over."""

    uuid: str
    vram: int
    ram: int
    margin: int

    def why_not(self, size: int, *, processes: int = 1) -> str | None:
        """Return why so many processes of that size do not fit, None if they do."""
        for what, has, factor in (("GPU memory", self.vram, 1.0), ("RAM", self.ram, 1.15)):
            needed = int(processes * (size + self.margin) * factor)
            if needed > has:
                return f"{needed} bytes of {what} needed, {has} free"
        return None


def part(page: Page, budget: Budget, *, sizes: Sequence[int], room: Room) -> None:
    """Measure all sizes, with and without huge pages, then two processes at once.

    Raises:
        Impossible: this driver has no checkpoints, or the machine refuses them.
        OutOfTime: with what was measured in the page.
    """
    asyncio.run(_part(page, budget, sizes, room))


async def _part(page: Page, budget: Budget, sizes: Sequence[int], room: Room) -> None:
    keeper = KeeperConfig()
    workers = Workers(keeper)
    with tempfile.TemporaryDirectory(prefix="swapserve-target-") as folder:
        bench = Bench(page, budget, workers, room, Path(folder))
        try:
            features = await workers.features()
            if features.api is None:
                raise Impossible(features.why_not)
            await bench.cost_of_a_worker(keeper)
            with huge_pages_on(Path(folder, "huge-pages")) as switched:
                page.note(huge_pages_while_on=switched)
                await bench.all_sizes(sizes, budget.share(SHARE_FOR_SIZES))
                await bench.two_at_once(sizes)
        finally:
            await workers.close()


@contextmanager
def huge_pages_on(journal: Path) -> Iterator[str]:
    """Let processes have huge pages for the time of the block, and put the setting back.

    Yields the setting in force; a machine that refuses keeps its own.
    """
    switch = HugePages(journal, wanted=huge_page_setting() not in {"always", "unknown"})
    with switch.during_restore():
        yield huge_page_setting()


class Bench:
    """Carries out the measurements and keeps the samples."""

    def __init__(
        self, page: Page, budget: Budget, workers: Workers, room: Room, directory: Path
    ) -> None:
        self._page = page
        self._budget = budget
        self._workers = workers
        self._room = room
        self._directory = directory
        self._nvml = Nvml()
        self._s_per_byte = FIRST_GUESS_S_PER_BYTE

    # ------------------------------------------------------------ what is measured

    async def cost_of_a_worker(self, keeper: KeeperConfig) -> None:
        """Time a driver's attaching: the first question to a new worker, and the second."""
        with self._page.attempt("cost of a new worker"), started(self._directory) as target:
            for _ in range(WORKER_REPEATS):
                fresh = Workers(keeper)
                try:
                    first, again = [await self._asked(fresh, target) for _ in range(2)]
                finally:
                    await fresh.close()
                self._page.add("workers", first_call_s=first, next_call_s=again)

    async def _asked(self, workers: Workers, target: Target) -> float:
        begun = time.perf_counter()
        async with workers.lease() as worker:
            if await worker.restore_thread(target.ref) is None:
                raise TargetFailed("the driver does not know the process")
        return time.perf_counter() - begun

    async def all_sizes(self, sizes: Sequence[int], budget: Budget) -> None:
        """Move processes of each size, smallest first, with huge pages and without in turn."""
        for size in sorted(sizes):
            if why := self._room.why_not(size):
                self._page.failed(f"{size} bytes", why)
                continue
            for huge_pages in (True, False):
                with self._page.attempt(f"{size} bytes, huge pages {huge_pages}"):
                    await self._size(size, budget, huge_pages=huge_pages)

    async def _size(self, size: int, budget: Budget, *, huge_pages: bool) -> None:
        budget.need(self._guess(size), "this size")
        begun = time.perf_counter()
        async with self._target(size, huge_pages=huge_pages) as (worker, target):
            for lap in range(next((laps for most, laps in LAPS.items() if size <= most), 1)):
                if lap and not budget.allows(self._guess(size) / 2):
                    return
                labels = {"bytes": size, "huge_pages": huge_pages, "lap": lap}
                await self._lap(worker, target, labels)
                if not lap:
                    spent = time.perf_counter() - begun - START_S
                    self._s_per_byte = max(spent / size, FIRST_GUESS_S_PER_BYTE / 10)

    async def _lap(self, worker: Worker, target: Target, labels: dict[str, Any]) -> None:
        sample = self._page.add("laps", **labels, running=target.memory())
        await self._out(worker, target, sample)
        sample["away"] = target.memory()
        sample["nvml_away_bytes"] = self._seen(target)
        await self._back(worker, target, sample)
        sample["verify_s"] = target.verify()
        sample["content"] = "equal"
        self._page.note()

    async def two_at_once(self, sizes: Sequence[int]) -> None:
        """Restore two processes one after the other, and at the same time."""
        fitting = [size for size in sizes if self._room.why_not(size, processes=2) is None]
        size = sorted(fitting)[len(fitting) // 2] if fitting else 0
        with self._page.attempt("two processes at once"):
            if not fitting:
                raise Impossible("not even two of the smallest size fit")
            self._budget.need(2 * self._guess(size), "two processes")
            async with (
                self._target(size) as (first_worker, first),
                self._target(size) as (second_worker, second),
            ):
                pairs = ((first_worker, first), (second_worker, second))
                for together in (False, True):
                    await self._both(pairs, size, together=together)

    async def _both(
        self, pairs: Sequence[tuple[Worker, Target]], size: int, *, together: bool
    ) -> None:
        sample = self._page.add("pairs", bytes_each=size, together=together, calls=[{}, {}])
        moves = (("out_s", self._out), ("back_s", self._back))
        for what, move in moves:
            begun = time.perf_counter()
            work = [
                partial(move, worker, target, sample["calls"][number])
                for number, (worker, target) in enumerate(pairs)
            ]
            await _carried_out(work, together=together)
            sample[what] = time.perf_counter() - begun
        for _, target in pairs:
            target.verify()
        sample["content"] = "equal"
        self._page.note()

    # ------------------------------------------------------------ one process

    @asynccontextmanager
    async def _target(
        self, size: int, *, huge_pages: bool = True
    ) -> AsyncIterator[tuple[Worker, Target]]:
        with ExitStack() as stack:
            target = stack.enter_context(started(self._directory, huge_pages=huge_pages))
            fill_s = target.fill(size)
            self._page.add("fills", bytes=size, context_s=target.started_s, seconds=fill_s)
            async with self._workers.lease() as worker:
                try:
                    yield worker, target
                finally:
                    await self._put_away(worker, target)

    async def _put_away(self, worker: Worker, target: Target) -> None:
        """Suspend what was restored, so that it can be ended."""
        if target.suspended or target.fresh:
            return
        try:
            target.drop()
            await self._out(worker, target, {})
        except (CudaCallFailed, CudaOutcomeUnknown, TargetFailed) as error:
            self._page.failed(f"putting pid {target.ref.pid} away", f"left to itself: {error}")

    async def _out(self, worker: Worker, target: Target, sample: dict[str, Any]) -> None:
        deadline_s = BASE_DEADLINE_S + target.size / SLOWEST_BYTES_PER_S
        calls: tuple[tuple[str, Callable[[], Awaitable[None]]], ...] = (
            ("lock_s", lambda: worker.lock(target.ref, timeout_s=LOCK_S)),
            ("checkpoint_s", lambda: worker.checkpoint(target.ref, deadline_s=deadline_s)),
        )
        for name, call in calls:
            sample[name] = await _seconds(call)
        target.suspended = await worker.state(target.ref) is CudaState.CHECKPOINTED
        if not target.suspended:
            raise TargetFailed("the driver says that it has checkpointed, and its state is another")

    async def _back(self, worker: Worker, target: Target, sample: dict[str, Any]) -> None:
        deadline_s = BASE_DEADLINE_S + target.size / SLOWEST_BYTES_PER_S
        calls: tuple[tuple[str, Callable[[], Awaitable[None]]], ...] = (
            ("restore_s", lambda: worker.restore(target.ref, deadline_s=deadline_s)),
            ("unlock_s", lambda: worker.unlock(target.ref, deadline_s=BASE_DEADLINE_S)),
        )
        await self._admit(target)
        target.fresh = target.suspended = False
        for name, call in calls:
            sample[name] = await _seconds(call)

    async def _admit(self, target: Target) -> None:
        """Wait until the GPU has room for what is to come back; never just try.

        Raises:
            Impossible: it does not come.
        """
        wanted = target.size + self._room.margin
        deadline = time.monotonic() + SETTLE_S
        free = self._nvml.free(self._room.uuid)
        while free < wanted and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)  # NVML has no event for it
            free = self._nvml.free(self._room.uuid)
        if free < wanted:
            raise Impossible(f"{free} bytes free on the GPU, {wanted} wanted: restore not tried")

    def _seen(self, target: Target) -> int | None:
        try:
            return self._nvml.used_by([target.ref.pid]).get(self._room.uuid, 0)
        except NvmlUnavailable:
            return None

    def _guess(self, size: int) -> float:
        return START_S + size * self._s_per_byte


async def _seconds(call: Callable[[], Awaitable[None]]) -> float:
    begun = time.perf_counter()
    await call()
    return time.perf_counter() - begun


async def _carried_out(
    work: Sequence[Callable[[], Coroutine[Any, Any, None]]], *, together: bool
) -> None:
    if not together:
        for each in work:
            await each()
        return
    async with asyncio.TaskGroup() as tasks:
        for each in work:
            tasks.create_task(each())
