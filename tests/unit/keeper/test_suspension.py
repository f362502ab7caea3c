"""What becomes of an engine when a step of its suspension fails: every branch, on real processes.

The driver's operations are scripted; those of `CudaTree` itself are tested on the stand-in.
"""

import asyncio
import os
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from swapserve.config.recipes import Recipe
from swapserve.config.schema import Config, KeeperConfig, ModelConfig
from swapserve.errors import CudaError, DeviceBusy
from swapserve.ids import DeviceName, EngineName
from swapserve.keeper import tree as trees
from swapserve.keeper.checkpoint import Checkpoints
from swapserve.keeper.context import Context
from swapserve.keeper.cuda.calls import Pairs
from swapserve.keeper.cuda.pool import Workers
from swapserve.keeper.cuda.suspend import Suspended
from swapserve.keeper.cuda.tree import CudaTree, Settled, Where
from swapserve.keeper.gpu_images import GpuImages
from swapserve.keeper.phases import Phases
from swapserve.keeper.place import Place
from swapserve.keeper.protocol import ImageKind, VerbReport
from swapserve.keeper.suspension import Suspension
from swapserve.system import process
from swapserve.system.gpu import Nvml
from swapserve.system.process import ProcessRef
from tests.support.engine_tree import Here, engine

pytestmark = pytest.mark.anyio

GPU = "GPU-0"
BYTES = {GPU: 100}
MODEL = ModelConfig(
    name=EngineName("a"),
    recipe=Recipe(name="generic", adapter="generic", argv=("a",)),
    devices=(DeviceName("gpu0"),),
    gpus=(GPU,),
)


class Seen(Nvml):
    """NVML that says what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.used: list[dict[str, int]] = []

    def used_by(self, pids: Collection[int]) -> dict[str, int]:
        assert pids
        return self.used.pop(0) if self.used else {}


class Shared(Context):
    """What engines share, without a machine."""

    def __init__(self) -> None:
        self.config = cast("Config", _Config())
        self.workers = Workers(_Config.keeper)
        self.nvml = self.seen = Seen()
        self._gpus = defaultdict(asyncio.Lock)


Step = Callable[[], Awaitable[None]]


class Script(CudaTree):
    """The driver's operations: each does what it is told to, and is noted."""

    def __init__(self, here: Here) -> None:
        self.here = here
        self.calls: list[str] = []
        self.does: dict[str, Exception | Step] = {}
        self.found: Where = "running"
        self.clean = True

    async def _do(self, name: str) -> None:
        self.calls.append(name)
        does = self.does.get(name)
        if isinstance(does, Exception):
            raise does
        if does is not None:
            await does()

    async def suspend(self, phases: Phases) -> Suspended:
        assert self.here.noted().gpu == "moving", "a later keeper has to know"
        await self._do("suspend")
        return Suspended(processes=(ProcessRef.of(os.getpid()),), device_bytes=BYTES)

    async def admit(self, needs: Mapping[str, int], phases: Phases) -> None:
        await self._do("admit")

    async def resume(
        self,
        processes: Sequence[ProcessRef] | None,
        needs: Mapping[str, int],
        phases: Phases,
        *,
        pairs: Pairs = (),
    ) -> None:
        if self.here.tree.root is not None:
            stopped = map(process.stopped, process.tree(self.here.root.pid))
            assert not any(stopped), "a frozen process does not answer the driver"
        await self._do("resume")

    async def settle(
        self, needs: Mapping[str, int], phases: Phases, *, memory_is_ours: bool = True
    ) -> Settled:
        await self._do("settle")
        return Settled(state=self.found)

    async def quench(self, phases: Phases) -> bool:
        await self._do("quench")
        return self.clean


class Moved:
    """An engine, its suspension and what both stand on."""

    def __init__(self, here: Here, context: Shared) -> None:
        self.here = here
        self.tree = here.tree
        self.gpu = Suspension(cast("Place", _Place()), here.tree, context)
        self.cuda = self.gpu._cuda = Script(here)
        self.nvml = context.seen

    def facts(self) -> tuple[str, bool, bool]:
        """Return where its GPU state is, whether it is frozen, and whether all of it is stopped."""
        noted = self.here.noted()
        assert (noted.gpu, noted.frozen) == (self.tree.gpu, self.tree.frozen)
        pids = process.tree(self.here.root.pid)
        return noted.gpu, noted.frozen, all(map(process.stopped, pids))

    async def suspended(self) -> None:
        assert await self.gpu.suspend(Phases()) == 100
        assert self.facts() == ("in_host_memory", True, True)
        self.cuda.calls.clear()

    async def dies(self) -> None:
        """End by itself."""
        os.kill(self.here.root.pid, signal.SIGKILL)
        await self.tree.gone()


class _Place:
    model = MODEL


class _Config:
    keeper = KeeperConfig()


@asynccontextmanager
async def moved(tmp_path: Path) -> AsyncIterator[Moved]:
    async with engine(tmp_path) as here:
        yield Moved(here, Shared())


def kept() -> CudaError:
    return CudaError("a", "lock", "busy", lost=False)


def lost() -> CudaError:
    return CudaError("a", "checkpoint", "broken", lost=True)


RUNS = ("on_device", False, False)
AWAY = ("in_host_memory", True, True)


async def fails(work: Awaitable[object]) -> CudaError:
    with pytest.raises(CudaError) as failed:
        await work
    return failed.value


# ------------------------------------------------------------------- suspend


async def test_it_is_frozen_only_after_its_state_has_gone_and_thawed_before_it_comes(
    tmp_path: Path,
) -> None:
    async with moved(tmp_path) as here:
        here.nvml.used = [{GPU: 90}]
        await here.suspended()
        assert here.gpu.away
        assert here.here.noted().device_bytes == BYTES, "what was measured when all were locked"
        assert await here.gpu.resume(Phases()) == 100
        assert here.cuda.calls == ["admit", "resume"]
        assert here.facts() == RUNS
        assert here.tree.revived


async def test_for_an_image_it_is_not_frozen(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        await here.gpu.suspend(Phases(), freeze=False)
        assert here.facts() == ("in_host_memory", False, False)


async def test_what_it_holds_is_noted_before_the_first_call(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        here.nvml.used = [{GPU: 90}]
        here.cuda.does["suspend"] = kept()
        await fails(here.gpu.suspend(Phases()))
        assert here.here.noted().device_bytes == {GPU: 90}


async def test_one_that_was_brought_back_runs_on(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        here.cuda.does["suspend"] = kept()
        assert not (await fails(here.gpu.suspend(Phases()))).lost
        assert here.facts() == RUNS
        assert here.tree.revived, "some of its state may have been away"


async def test_one_that_is_neither_here_nor_there_is_ended(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        here.cuda.does["suspend"] = lost()
        assert (await fails(here.gpu.suspend(Phases()))).lost
        assert here.tree.root is None
        assert here.here.exits == []


async def test_one_that_ends_meanwhile_is_lost_and_not_away(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        here.cuda.does["suspend"] = here.dies
        assert (await fails(here.gpu.suspend(Phases()))).lost
        assert not here.gpu.away
        assert [exited.status for exited in here.here.exits] == ["signal SIGKILL"]


async def test_one_that_ends_while_it_is_frozen_is_lost_and_not_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with moved(tmp_path) as here, asyncio.TaskGroup() as tasks:
        monkeypatch.setattr(process, "stopped", _restless)
        failing = tasks.create_task(fails(here.gpu.suspend(Phases())))
        await asyncio.sleep(0.05)
        await here.dies()
        assert (await failing).lost
        assert not here.gpu.away


async def test_one_that_does_not_come_to_rest_is_brought_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with moved(tmp_path) as here:
        with monkeypatch.context() as patch:
            patch.setattr(trees, "FREEZE_TIMEOUT_S", 0.05)
            patch.setattr(process, "stop_tree", _never)
            failed = await fails(here.gpu.suspend(Phases()))
        assert "come to rest" in str(failed)
        assert not failed.lost
        assert here.cuda.calls == ["suspend", "resume"]
        assert here.facts() == RUNS


async def _never(root: int, on: bool, *, timeout_s: float) -> None:
    assert root > 0
    assert timeout_s > 0
    if on:
        raise TimeoutError


def _restless(pid: int, real: Callable[[int], bool | None] = process.stopped) -> bool | None:
    """Say of what has not ended that it runs."""
    return None if real(pid) is None else False


async def test_gpu_memory_that_appears_at_the_last_moment_brings_it_back(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        here.nvml.used = [BYTES, {GPU: 5}]
        failed = await fails(here.gpu.suspend(Phases()))
        assert "took 5 bytes" in str(failed)
        assert not failed.lost
        assert here.cuda.calls == ["suspend", "resume"]
        assert here.facts() == RUNS


async def test_where_bringing_it_back_fails_it_is_ended(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        here.nvml.used = [BYTES, {GPU: 5}]
        here.cuda.does["resume"] = lost()
        assert (await fails(here.gpu.suspend(Phases()))).lost
        assert here.tree.root is None


async def test_without_a_note_nothing_is_tried(tmp_path: Path) -> None:
    directory = tmp_path / "records"
    directory.mkdir()
    async with moved(directory) as here:
        directory.rename(tmp_path / "gone")
        failed = await fails(here.gpu.suspend(Phases()))
        assert not failed.lost
        assert here.cuda.calls == []
        assert (here.tree.gpu, here.tree.frozen) == ("on_device", False)


async def test_a_note_that_cannot_be_written_does_not_keep_it_away(tmp_path: Path) -> None:
    directory = tmp_path / "records"
    directory.mkdir()
    async with moved(directory) as here:
        await here.suspended()
        directory.rename(tmp_path / "gone")
        await here.gpu.resume(Phases())
        assert (here.tree.gpu, here.tree.frozen) == ("on_device", False)


# -------------------------------------------------------------------- resume


@pytest.mark.parametrize("error", [DeviceBusy("a", GPU, 100, 50), kept()])
async def test_one_that_has_no_room_stays_as_it_is(tmp_path: Path, error: Exception) -> None:
    async with moved(tmp_path) as here:
        await here.suspended()
        here.cuda.does["admit"] = error
        with pytest.raises(type(error)):
            await here.gpu.resume(Phases())
        assert here.cuda.calls == ["admit"]
        assert here.facts() == AWAY


async def test_where_nothing_was_tried_it_is_suspended_as_before(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        await here.suspended()
        here.cuda.does["resume"] = kept()
        assert not (await fails(here.gpu.resume(Phases()))).lost
        assert here.facts() == AWAY
        assert here.here.noted().cuda
        assert here.here.noted().device_bytes == BYTES
        here.cuda.does.clear()
        await here.gpu.resume(Phases())
        assert here.facts() == RUNS


async def test_where_it_cannot_even_be_frozen_again_it_still_is_suspended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with moved(tmp_path) as here:
        await here.suspended()
        here.cuda.does["resume"] = kept()
        monkeypatch.setattr(process, "stop_tree", _never)
        monkeypatch.setattr(process, "stopped", lambda _: False)
        failed = await fails(here.gpu.resume(Phases()))
        assert (failed.phase, failed.lost) == ("lock", False)
        assert here.gpu.away


async def test_a_restore_that_fails_ends_it(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        await here.suspended()
        here.cuda.does["resume"] = lost()
        assert (await fails(here.gpu.resume(Phases()))).lost
        assert here.tree.root is None
        assert here.here.exits == []


async def test_one_that_cannot_be_thawed_stays_suspended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with moved(tmp_path) as here:
        await here.suspended()
        monkeypatch.setattr(trees, "FREEZE_TIMEOUT_S", 0.05)
        with monkeypatch.context() as patch:
            patch.setattr(process, "stopped", lambda _: True)
            failed = await fails(here.gpu.resume(Phases()))
        assert (failed.phase, failed.lost) == ("thaw", False)
        assert here.cuda.calls == ["admit"]
        assert here.gpu.away


@pytest.mark.parametrize("step", ["admit", "resume"])
async def test_one_that_ended_meanwhile_is_lost(tmp_path: Path, step: str) -> None:
    async with moved(tmp_path) as here:
        await here.suspended()
        here.cuda.does[step] = here.dies
        assert (await fails(here.gpu.resume(Phases()))).lost


async def test_two_engines_do_not_move_on_one_gpu_at_the_same_time(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    async with moved(tmp_path) as one, engine(tmp_path / "b") as tree:
        context = Shared()
        context._gpus = one.gpu._context._gpus
        two = Moved(tree, context)
        inside = 0

        async def alone() -> None:
            nonlocal inside
            inside += 1
            assert inside == 1
            await asyncio.sleep(0.02)
            inside -= 1

        for each in (one, two):
            each.cuda.does = {"suspend": alone, "admit": alone, "resume": alone}
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_there_and_back(one))
            tasks.create_task(_there_and_back(two))


async def _there_and_back(one: Moved) -> None:
    await one.gpu.suspend(Phases())
    await one.gpu.resume(Phases())


# ---------------------------------------------------------------------- rest


class Imaged(Checkpoints):
    """Images whose restore finds the engine there, with its GPU state in host memory."""

    def __init__(self, here: Moved, device_bytes: dict[str, int]) -> None:
        self.here = here
        self.device_bytes = device_bytes
        self.restored: list[ImageKind] = []

    def gpu_state(self, kind: ImageKind) -> tuple[tuple[str, ...], dict[str, int]]:
        return ((GPU,), self.device_bytes)

    async def restore(self, kind: ImageKind, phases: Phases) -> VerbReport:
        self.restored.append(kind)
        self.here.tree.gpu_in_host_memory((), BYTES)
        return phases.report(7)


def images(here: Moved, device_bytes: dict[str, int] = BYTES) -> tuple[Imaged, GpuImages]:
    made = Imaged(here, device_bytes)
    return made, GpuImages("a", here.tree, here.gpu, made)


async def test_what_an_image_has_brought_rests_without_a_call_of_the_driver(
    tmp_path: Path,
) -> None:
    async with moved(tmp_path) as here:
        made, gpu_images = images(here)
        report = await gpu_images.restore("golden", Phases(), resume=False)
        assert (report.bytes, made.restored) == (7, ["golden"])
        assert here.cuda.calls == []
        assert here.facts() == AWAY
        await here.gpu.resume(Phases())
        assert here.facts() == RUNS


async def test_what_an_image_has_brought_and_does_not_come_to_rest_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with moved(tmp_path) as here:
        monkeypatch.setattr(trees, "FREEZE_TIMEOUT_S", 0.05)
        monkeypatch.setattr(process, "stop_tree", _never)
        failed = await fails(images(here)[1].restore("golden", Phases(), resume=False))
        assert (failed.phase, failed.lost) == ("rest", True)
        assert here.tree.root is None
        assert here.here.exits == []


async def test_what_has_ended_before_it_was_at_rest_has_not_come(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        gpu_images = images(here)[1]
        await here.dies()
        failed = await fails(gpu_images.restore("golden", Phases(), resume=False))
        assert (failed.phase, failed.lost) == ("rest", True)


@pytest.mark.parametrize("device_bytes", [{}, {GPU: 0}])
async def test_an_image_of_unknown_size_is_not_used_up(
    tmp_path: Path, device_bytes: dict[str, int]
) -> None:
    async with moved(tmp_path) as here:
        made, gpu_images = images(here, device_bytes)
        failed = await fails(gpu_images.restore("live", Phases(), resume=False))
        assert not failed.lost
        assert made.restored == []
        assert here.facts() == RUNS, "what there was is as it was"


# -------------------------------------------------------------------- quench


async def test_what_was_never_brought_back_may_be_killed_as_it_is(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        await here.gpu.quench(Phases())
        await here.suspended()
        await here.gpu.quench(Phases())
        assert here.cuda.calls == [], "neither one that began here nor one that is away"


@pytest.mark.parametrize("clean", [True, False])
async def test_what_was_brought_back_leaves_its_gpu_before_it_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, clean: bool
) -> None:
    async with moved(tmp_path) as here:
        await here.suspended()
        await here.gpu.resume(Phases())
        here.cuda.calls.clear()
        here.cuda.clean = clean
        await here.gpu.quench(Phases())
        assert here.cuda.calls == ["quench"]
        assert here.here.noted().gpu == "moving"
        assert ("killed_with_gpu_state" in caplog.text) is not clean


async def test_the_tree_knows_whom_to_ask_when_its_root_has_ended(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        await here.suspended()
        await here.gpu.resume(Phases())
        here.cuda.calls.clear()
        assert here.tree.leave_gpus is not None
        await here.tree.leave_gpus()
        assert here.cuda.calls == ["quench"]


async def test_so_does_what_nobody_knows_the_state_of(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        here.tree.gpu_moves(BYTES)
        await here.gpu.quench(Phases())
        assert here.cuda.calls == ["quench"]


# ------------------------------------------------------------------- recover


async def recovered(here: Moved, found: Where) -> None:
    here.cuda.found = found
    here.cuda.calls.clear()
    await here.gpu.recover()


async def test_what_the_record_is_sure_of_is_not_asked(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        await recovered(here, "lost")
        assert here.cuda.calls == []
        await here.suspended()
        await recovered(here, "lost")
        assert here.cuda.calls == []
        assert here.facts() == AWAY


@pytest.mark.parametrize("found", ["running", "none"])
async def test_what_is_found_on_its_gpu_runs_on(tmp_path: Path, found: Where) -> None:
    async with moved(tmp_path) as here:
        here.tree.gpu_moves(BYTES)
        await recovered(here, found)
        assert here.cuda.calls == ["settle"]
        assert here.facts() == RUNS
        assert here.tree.revived


async def test_what_is_found_suspended_is_frozen_and_known_to_take_its_bytes(
    tmp_path: Path,
) -> None:
    async with moved(tmp_path) as here:
        here.tree.gpu_moves(BYTES)
        await recovered(here, "suspended")
        assert here.facts() == AWAY
        assert here.here.noted().device_bytes == BYTES


async def test_what_is_found_suspended_without_figures_is_brought_back(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        here.tree.gpu_moves({})
        await recovered(here, "suspended")
        assert here.cuda.calls == ["settle", "resume"], "else it would be restored without a check"
        assert here.facts() == RUNS


async def test_what_is_found_suspended_and_grows_runs_on_and_is_not_killed(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        here.tree.gpu_moves(BYTES)
        here.nvml.used = [{GPU: 5}]
        await recovered(here, "suspended")
        assert here.facts() == RUNS
        assert here.here.exits == []


async def test_what_a_killed_keeper_was_thawing_is_asked_for(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        await here.suspended()
        await here.tree.freeze(False)
        await recovered(here, "suspended")
        assert here.cuda.calls == ["settle"]
        assert here.facts() == AWAY


async def test_what_is_lost_is_ended(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        here.tree.gpu_moves(BYTES)
        await recovered(here, "lost")
        assert here.tree.root is None


async def test_what_ends_meanwhile_is_left_alone(tmp_path: Path) -> None:
    async with moved(tmp_path) as here:
        here.tree.gpu_moves(BYTES)
        here.cuda.does["settle"] = here.dies
        await recovered(here, "suspended")
        assert not here.gpu.away
