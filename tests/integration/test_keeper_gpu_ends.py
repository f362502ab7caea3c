"""The keeper's verbs for engines with GPU state where something is missing, or ends too early."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swapserve.errors import CudaError, KeeperError
from swapserve.keeper.protocol import Held, ImageKind
from swapserve.testing.cuda_engine import expected_tokens
from tests.support.daemon import needs_criu
from tests.support.gpu_daemon import GpuSite, gpu_site
from tests.support.keeper import A, Caller, caller, start_keeper, text_of
from tests.support.leaks import wait_for
from tests.support.oracle import PROMPT

pytestmark = [pytest.mark.anyio]
EXPECTED = "".join(expected_tokens(PROMPT, None, 20))
HOST_ONLY = {"sandbox": False, "tiers": ["host"]}


@pytest.fixture
def here(tmp_path: Path) -> Iterator[GpuSite]:
    with gpu_site(tmp_path, model=HOST_ONLY) as site:
        start_keeper(site.site)
        yield site


@pytest.fixture
def boxed(tmp_path: Path) -> Iterator[GpuSite]:
    """The same in sandboxes, so that images can be made."""
    with gpu_site(tmp_path) as site:
        start_keeper(site.site)
        yield site


def begun(here: GpuSite, op: str) -> bool:
    return any(call.op == op and call.ended is None for call in here.gpus.calls())


async def test_an_engine_that_has_no_gpu_state_at_all_is_frozen_and_thawed(tmp_path: Path) -> None:
    argv = [
        *(sys.executable, "-m", "swapserve.testing.engine"),
        *("--host", "{host}", "--port", "{port}", "--name", "{name}"),
    ]
    model = {**HOST_ONLY, "args": []}
    with gpu_site(tmp_path, recipe_changes={"argv": argv}, model=model) as here:
        start_keeper(here.site)
        async with caller(here.site) as keeper:
            address = await keeper.started(A)
            assert (await keeper.suspend(A)).bytes == 0
            holding = await keeper.holding(A)
            assert (holding.held, holding.host_bytes) == (Held.SUSPENDED, 0)
            await keeper.resume(A)
            assert await text_of(address)
            await keeper.stop(A, 5.0)
        here.check()


async def test_an_engine_that_ends_in_the_middle_of_a_suspend_does_not_end_the_keeper(
    here: GpuSite,
) -> None:
    async with caller(here.site) as keeper:
        await keeper.started(A)
        here.gpus.fault("checkpoint", "slow", seconds=0.5)
        async with asyncio.TaskGroup() as tasks:
            failing = tasks.create_task(_fails(keeper))
            await asyncio.to_thread(wait_for, "it has begun", lambda: begun(here, "checkpoint"))
            os.kill(await keeper.pid_of(A), signal.SIGKILL)
        assert failing.result().engine == "a"
        await asyncio.to_thread(wait_for, "the end is told", lambda: keeper.exits)
        holding = await keeper.holding(A)
        assert (holding.held, holding.host_bytes) == (Held.NOTHING, 0)
        assert await text_of(await keeper.started(A)) == EXPECTED
    assert not here.gpus.illegal()


async def _fails(keeper: Caller) -> CudaError:
    with pytest.raises(CudaError) as failed:
        await keeper.suspend(A)
    return failed.value


async def test_no_move_begins_that_cannot_be_written_down(here: GpuSite) -> None:
    """A keeper that came later would take what is frozen for what runs."""
    records = here.site.directory / "state" / "keeper"
    async with caller(here.site) as keeper:
        address = await keeper.started(A)
        records.rename(records.with_name("gone"))
        failed = await _fails(keeper)
        assert (failed.phase, failed.lost) == ("record", False)
        assert await text_of(address) == EXPECTED
        records.with_name("gone").rename(records)
        await keeper.suspend(A)
        records.rename(records.with_name("gone"))
        await keeper.resume(A)
        assert await text_of(address) == EXPECTED
        await keeper.stop(A, 5.0)
        assert (await keeper.holding(A)).held is Held.NOTHING
        records.with_name("gone").rename(records)
    here.check()


@pytest.mark.criu
@pytest.mark.skipif(bool(needs_criu[-1].args[0]), reason="needs root and CRIU")
class TestImages:
    async def test_an_image_without_figures_comes_back_all_the_same(self, boxed: GpuSite) -> None:
        """Where NVML did not list its processes, nobody knows what its GPU state takes."""
        manifest = boxed.site.directory / "images" / "a" / "live" / "manifest.json"
        async with caller(boxed.site) as keeper:
            await keeper.started(A)
            await keeper.dump(A, "live")
            said = json.loads(manifest.read_text())
            manifest.write_text(json.dumps({**said, "device_bytes": {}}))
            await keeper.restore(A, "live")
            assert await text_of(await keeper.healthy(A)) == EXPECTED
            await keeper.stop(A, 5.0)
        boxed.check()

    async def test_a_golden_image_of_a_suspended_engine_leaves_it_suspended(
        self, boxed: GpuSite
    ) -> None:
        async with caller(boxed.site) as keeper:
            address = await keeper.started(A)
            await keeper.suspend(A)
            await keeper.dump(A, "golden")
            assert (await keeper.holding(A)).held is Held.SUSPENDED
            assert boxed.gpus.used(boxed.gpus.uuids[0]) == 0
            await keeper.resume(A)
            assert await text_of(address) == EXPECTED
        boxed.check()

    @pytest.mark.parametrize("kind", ["live", "golden"])
    async def test_an_image_that_cannot_be_written_harms_nobody(
        self, boxed: GpuSite, kind: ImageKind
    ) -> None:
        images = boxed.site.directory / "images" / "a"
        async with caller(boxed.site) as keeper:
            address = await keeper.started(A)
            images.write_text("no directory")
            with pytest.raises(KeeperError):
                await keeper.dump(A, kind)
            assert (await keeper.holding(A)).held is Held.RUNNING
            assert await text_of(address) == EXPECTED
            images.unlink()
            await keeper.dump(A, kind)
        boxed.check()
