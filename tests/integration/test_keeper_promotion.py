"""The keeper's way from disk to host memory: an image is restored and left suspended."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from swapserve.errors import CriuError, CudaError, DeviceBusy, ImageError, KeeperError
from swapserve.ids import EngineName
from swapserve.keeper import record as records
from swapserve.keeper.protocol import Held, ImageKind
from swapserve.keeper.record import Record
from swapserve.system import process
from swapserve.system.cgroup import group_of
from swapserve.testing.cuda_engine import expected_tokens
from tests.support.criu import Restores
from tests.support.daemon import needs_criu
from tests.support.gpu_daemon import MIB, GpuSite, gpu_site
from tests.support.keeper import A, B, Caller, caller, start_keeper, text_of
from tests.support.leaks import wait_for
from tests.support.oracle import PROMPT

pytestmark = [*needs_criu, pytest.mark.anyio]
C = EngineName("c")
EXPECTED = "".join(expected_tokens(PROMPT, None, 20))


@dataclass(slots=True)
class Promoting(GpuSite):
    """A site whose restores do as they are told."""

    restores: Restores


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Promoting]:
    """Two engines of which one fits the GPU."""
    restores = Restores(tmp_path / "criu")
    with gpu_site(tmp_path / "site", keeper={"criu": str(restores.program)}) as site:
        start_keeper(site.site)
        yield Promoting(site.site, site.gpus, restores)


async def imaged(keeper: Caller, kind: ImageKind) -> None:
    """Leave nothing of an engine but its image."""
    await keeper.started(A)
    await keeper.dump(A, kind)
    if kind == "golden":
        await keeper.discard(A)


def used(here: GpuSite) -> int:
    return here.gpus.used(here.gpus.uuids[0])


def at_rest(record: Record) -> bool:
    """Whether all of an engine is frozen, with its GPU state in host memory."""
    assert record.process is not None
    noted = record.gpu == "in_host_memory" and record.frozen
    return noted and all(map(_frozen, process.tree(record.process.pid)))


def _frozen(pid: int) -> bool:
    group = group_of(pid)
    return group.frozen() if group is not None else bool(process.stopped(pid))


@pytest.mark.parametrize("kind", ["golden", "live"])
async def test_an_image_is_brought_to_host_memory_beside_an_engine_that_fills_the_gpu(
    here: Promoting, kind: ImageKind
) -> None:
    async with caller(here.site) as keeper:
        await imaged(keeper, kind)
        await keeper.started(B)
        taken, calls = used(here), len(here.gpus.calls())
        report = await keeper.restore(A, kind, resume=False)
        assert report.bytes > 100 * MIB, "what was read from disk"
        assert {"restore", "verify", "freeze"} <= {*report.phases}
        assert (used(here), len(here.gpus.calls())) == (taken, calls), "no GPU was touched"
        holding = await keeper.holding(A)
        assert holding.held is Held.SUSPENDED
        assert holding.host_bytes == taken
        assert (holding.golden, holding.live_image_bytes) == (kind == "golden", 0)
        assert holding.restored_from == kind
        assert at_rest(here.record("a"))
        with pytest.raises(DeviceBusy):
            await keeper.resume(A)
        assert at_rest(here.record("a"))
        await keeper.stop(B, 0.0)
        await keeper.resume(A)
        assert await text_of(await keeper.healthy(A)) == EXPECTED
        assert used(here) == taken
        await keeper.suspend(A)
        await keeper.resume(A)
        assert await text_of(await keeper.healthy(A)) == EXPECTED
        await keeper.stop(A, 5.0)
    here.check()


async def test_what_was_brought_to_host_memory_goes_down_again(here: Promoting) -> None:
    async with caller(here.site) as keeper:
        await imaged(keeper, "golden")
        await keeper.restore(A, "golden", resume=False)
        begun = len(here.gpus.calls())
        await keeper.discard(A)
        assert len(here.gpus.calls()) == begun, "its GPU state was never back"
        holding = await keeper.holding(A)
        assert (holding.held, holding.golden, holding.host_bytes) == (Held.NOTHING, True, 0)
        await keeper.restore(A, "golden", resume=False)
        await keeper.dump(A, "live")
        assert (await keeper.holding(A)).held is Held.LIVE_IMAGE
        await keeper.restore(A, "live", resume=False)
        await keeper.resume(A)
        assert await text_of(await keeper.healthy(A)) == EXPECTED
    here.check()


async def test_an_image_whose_gpu_state_has_no_size_stays_where_it_is(here: Promoting) -> None:
    """Nobody could promise it the host memory."""
    manifest = here.site.directory / "images" / "a" / "live" / "manifest.json"
    async with caller(here.site) as keeper:
        await imaged(keeper, "live")
        said = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**said, "device_bytes": {}}))
        with pytest.raises(CudaError, match="how much host memory") as refused:
            await keeper.restore(A, "live", resume=False)
        assert not refused.value.lost
        assert (await keeper.holding(A)).held is Held.LIVE_IMAGE
        await keeper.restore(A, "live")
        assert await text_of(await keeper.healthy(A)) == EXPECTED
    here.check()


async def test_state_that_could_not_come_back_from_host_memory_is_not_brought_there(
    tmp_path: Path,
) -> None:
    old = {"driver": "570.1", "cuda": 12080}
    with gpu_site(tmp_path, "a", gpus=(256 * MIB, 256 * MIB), standing=old) as here:
        first = start_keeper(here.site)
        async with caller(here.site) as keeper:
            await imaged(keeper, "live")
        first.kill()
        first.wait()
        content = json.loads(here.site.config.read_text())
        content["models"][0]["device"] = "gpu1"
        here.site.config.write_text(json.dumps(content))
        start_keeper(here.site)
        async with caller(here.site) as keeper:
            with pytest.raises(ImageError, match="cannot bring it elsewhere"):
                await keeper.restore(A, "live", resume=False)
            assert (await keeper.holding(A)).held is Held.LIVE_IMAGE
        here.check()


async def test_one_without_gpu_state_has_nothing_to_keep_in_host_memory(tmp_path: Path) -> None:
    plain = {
        "name": "plain",
        "recipe": "generic",
        "device": "host",
        "params": {"binary": "sleep"},
        "args": ["300"],
        "memory": "1MiB",
    }
    with gpu_site(tmp_path, "a", more=[plain]) as here:
        start_keeper(here.site)
        async with caller(here.site) as keeper:
            with pytest.raises(KeeperError, match="no GPU state"):
                await keeper.restore(EngineName("plain"), "golden", resume=False)


@pytest.mark.parametrize("kind", ["golden", "live"])
async def test_a_restore_that_fails_leaves_nothing_in_host_memory(
    here: Promoting, kind: ImageKind
) -> None:
    async with caller(here.site) as keeper:
        await imaged(keeper, kind)
        here.restores.go("fails")
        with pytest.raises(CriuError):
            await keeper.restore(A, kind, resume=False)
        here.restores.go("whole")
        holding = await keeper.holding(A)
        assert (holding.held, holding.golden) == (Held.NOTHING, kind == "golden")
        assert await text_of(await keeper.started(A)) == EXPECTED
    here.check()


async def test_the_next_keeper_finds_it_at_rest(here: Promoting) -> None:
    async with caller(here.site) as keeper:
        await imaged(keeper, "golden")
        await keeper.restore(A, "golden", resume=False)
        before = await keeper.holding(A)
    kill_keeper(here)
    start_keeper(here.site)
    async with caller(here.site) as keeper:
        assert await keeper.holding(A, settled=True) == before
        await keeper.resume(A)
        assert await text_of(await keeper.healthy(A)) == EXPECTED
        await keeper.stop(A, 0.0)
    here.check()


async def test_one_that_a_killed_keeper_had_not_frozen_yet_is_put_to_rest(here: Promoting) -> None:
    async with caller(here.site) as keeper:
        await imaged(keeper, "golden")
        await keeper.restore(A, "golden", resume=False)
        before = await keeper.holding(A)
    kill_keeper(here)
    record = here.record("a")
    assert record.process is not None
    path = here.site.directory / "state" / "keeper" / "a.json"
    records.save(path, replace(record, frozen=False))
    await thaw(record.process.pid)
    start_keeper(here.site)
    async with caller(here.site) as keeper:
        assert await keeper.holding(A, settled=True) == before
        assert at_rest(here.record("a"))
        await keeper.resume(A)
        assert await text_of(await keeper.healthy(A)) == EXPECTED
    here.check()


async def test_a_keeper_that_is_killed_in_the_middle_of_it_does_no_lasting_harm(
    here: Promoting,
) -> None:
    async with caller(here.site) as keeper:
        await imaged(keeper, "golden")
        here.restores.go("waits")
        async with asyncio.TaskGroup() as tasks:
            lost = tasks.create_task(_fails(keeper))
            await asyncio.to_thread(wait_for, "the restore has begun", here.restores.waiting)
            kill_keeper(here)
        assert isinstance(lost.result(), KeeperError)
    start_keeper(here.site)
    here.restores.go("whole")
    async with caller(here.site) as keeper:
        holding = await keeper.holding(A, settled=True)
        assert (holding.held, holding.golden) == (Held.NOTHING, True)
        await keeper.restore(A, "golden", resume=False)
        await keeper.resume(A)
        assert await text_of(await keeper.healthy(A)) == EXPECTED
    here.check()


async def _fails(keeper: Caller) -> KeeperError:
    with pytest.raises(KeeperError) as failed:
        await keeper.restore(A, "golden", resume=False)
    return failed.value


async def test_one_that_dies_at_rest_is_told_of(here: Promoting) -> None:
    async with caller(here.site) as keeper:
        await imaged(keeper, "golden")
        await keeper.restore(A, "golden", resume=False)
        os.kill(await keeper.pid_of(A), signal.SIGKILL)
        await asyncio.to_thread(wait_for, "the end is told", lambda: keeper.exits)
        holding = await keeper.holding(A)
        assert (holding.held, holding.golden, holding.host_bytes) == (Held.NOTHING, True, 0)
    here.check()


async def thaw(root: int) -> None:
    """Let what a keeper has frozen run, as if it had not come to that."""
    group = group_of(root)
    if group is not None:
        await group.freeze(False, timeout_s=10)
    else:
        await process.stop_tree(root, False, timeout_s=10)


def kill_keeper(here: GpuSite) -> None:
    pid = here.site.keeper_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for("the keeper is dead", lambda: here.site.keeper_pid() is None)


# ------------------------------------------------------------- what makes room


async def test_under_disk_pressure_the_image_of_an_engine_in_use_stays(tmp_path: Path) -> None:
    """However long ago it was restored; going to host memory and back is use as well."""
    with gpu_site(tmp_path, "abc", share=0.3) as here:
        keeper_process = start_keeper(here.site)
        async with caller(here.site) as keeper:
            await keeper.started(A)
            size = (await keeper.dump(A, "golden")).bytes
            await keeper.stop(A, 5.0)
        keeper_process.terminate()
        keeper_process.wait()
        content = json.loads(here.site.config.read_text())
        content["images"] = {"budget": size * 5 // 2, "min_free": 0}
        here.site.config.write_text(json.dumps(content))
        start_keeper(here.site)
        manifest = here.site.directory / "images" / "a" / "golden" / "manifest.json"
        async with caller(here.site) as keeper:
            await keeper.restore(A, "golden")
            await keeper.started(B)
            await keeper.dump(B, "golden")
            await keeper.discard(B)
            os.utime(manifest, (1000, 1000))
            await keeper.started(C)
            await keeper.dump(C, "golden")
            held = [(await keeper.holding(one)).golden for one in (A, B, C)]
            assert held == [True, False, True], "it runs now"
            os.utime(manifest, (1000, 1000))
            await keeper.suspend(A)
            assert manifest.stat().st_mtime > 1000
