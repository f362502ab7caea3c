"""The keeper's verbs for engines with GPU state: suspend, resume, images, ends, its own death."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from swapserve.errors import (
    CudaError,
    DeviceBusy,
    ImageError,
    KeeperError,
    KeeperUnavailable,
)
from swapserve.keeper.protocol import Held, ImageKind
from swapserve.system.process import stopped
from swapserve.testing.cuda_engine import expected_tokens
from tests.support.daemon import needs_criu
from tests.support.gpu_daemon import MIB, GpuSite, gpu_site
from tests.support.keeper import A, B, Caller, caller, start_keeper, text_of
from tests.support.leaks import traces, wait_for
from tests.support.oracle import PROMPT

pytestmark = [pytest.mark.anyio]
EXPECTED = "".join(expected_tokens(PROMPT, None, 20))


@pytest.fixture
def here(tmp_path: Path) -> Iterator[GpuSite]:
    with gpu_site(tmp_path, model={"sandbox": False, "tiers": ["host"]}) as site:
        start_keeper(site.site)
        yield site


@pytest.fixture
def boxed(tmp_path: Path) -> Iterator[GpuSite]:
    """The same in sandboxes, so that images can be made."""
    with gpu_site(tmp_path) as site:
        start_keeper(site.site)
        yield site


def used(here: GpuSite) -> int:
    """Return what engines have of the first GPU."""
    return here.gpus.used(here.gpus.uuids[0])


async def test_a_suspended_engine_takes_no_gpu_memory_and_comes_back_the_same(
    here: GpuSite,
) -> None:
    async with caller(here.site) as keeper:
        address = await keeper.started(A)
        assert await text_of(address) == EXPECTED
        measured = await keeper.measure(A)
        uuid = here.gpus.uuids[0]
        assert measured.device_bytes == {uuid: used(here)}
        report = await keeper.suspend(A)
        assert report.bytes == measured.device_bytes[uuid] > 100 * MIB
        assert {"find", "lock", "checkpoint", "verify", "freeze"} <= {*report.phases}
        assert used(here) == 0
        holding = await keeper.holding(A)
        assert (holding.held, holding.host_bytes) == (Held.SUSPENDED, report.bytes)
        assert all(stopped(one.pid) or _frozen(one.pid) for one in here.record("a").cuda)
        with pytest.raises(KeeperError, match="suspended already"):
            await keeper.suspend(A)
        await keeper.resume(A)
        assert await text_of(address) == EXPECTED
        assert used(here) == report.bytes
        with pytest.raises(KeeperError, match="not suspended"):
            await keeper.resume(A)
        await keeper.stop(A, 5.0)
    here.check()


def _frozen(pid: int) -> bool:
    wchan = Path(f"/proc/{pid}/stat").read_text()
    return wchan.rpartition(")")[2].split()[0] in {"S", "D", "T"}


async def test_what_another_program_took_meanwhile_is_not_fought_over(here: GpuSite) -> None:
    async with caller(here.site) as keeper:
        address = await keeper.started(A)
        await keeper.suspend(A)
        await keeper.started(B)
        with pytest.raises(DeviceBusy) as busy:
            await keeper.resume(A)
        assert busy.value.uuid == here.gpus.uuids[0]
        assert busy.value.needed_bytes > busy.value.free_bytes > 0
        assert (await keeper.holding(A)).held is Held.SUSPENDED
        await keeper.stop(B, 0.0)
        await keeper.resume(A)
        assert await text_of(address) == EXPECTED
    here.check()


@pytest.mark.parametrize("op", ["lock", "checkpoint"])
async def test_an_engine_that_cannot_be_suspended_runs_on(here: GpuSite, op: str) -> None:
    async with caller(here.site) as keeper:
        address = await keeper.started(A)
        here.gpus.fault(op, "error", code=999)
        with pytest.raises(CudaError) as failed:
            await keeper.suspend(A)
        assert not failed.value.lost
        assert (await keeper.holding(A)).held is Held.RUNNING
        assert await text_of(address) == EXPECTED
        await keeper.suspend(A)
        await keeper.resume(A)
        assert await text_of(address) == EXPECTED
    here.check()


@pytest.mark.parametrize("op", ["checkpoint", "restore"])
async def test_an_engine_that_is_neither_here_nor_there_is_ended(here: GpuSite, op: str) -> None:
    async with caller(here.site) as keeper:
        await keeper.started(A)
        if op == "restore":
            await keeper.suspend(A)
            here.gpus.fault(op, "failed", times=-1)
            move = keeper.resume
        else:
            here.gpus.fault(op, "failed")
            move = keeper.suspend
        with pytest.raises(CudaError) as failed:
            await move(A)
        assert failed.value.lost
        assert (await keeper.holding(A)).held is Held.NOTHING
        assert used(here) == 0
        here.gpus.clear_faults()
        assert await text_of(await keeper.started(A)) == EXPECTED
    assert not here.gpus.illegal()


@pytest.mark.parametrize("grace_s", [0.0, 5.0])
@pytest.mark.parametrize("verb", ["stop", "discard"])
async def test_a_revived_engine_is_taken_off_its_gpu_before_it_is_ended(
    here: GpuSite, verb: str, grace_s: float
) -> None:
    async with caller(here.site) as keeper:
        await keeper.started(A)
        await keeper.suspend(A)
        await keeper.resume(A)
        begun = len(here.gpus.calls())
        await (keeper.stop(A, grace_s) if verb == "stop" else keeper.discard(A))
        ops = [call.op for call in here.gpus.calls()[begun:]]
        assert "checkpoint" in ops
        assert (await keeper.holding(A)).held is Held.NOTHING
    here.check()


async def test_the_keeper_s_own_end_takes_revived_engines_off_first(here: GpuSite) -> None:
    async with caller(here.site) as keeper:
        await keeper.started(A)
        await keeper.suspend(A)
        await keeper.resume(A)
        await keeper.shutdown()
        wait_for("the keeper ended", lambda: here.site.keeper_pid() is None)
    here.check()
    assert used(here) == 0


async def test_the_next_keeper_finds_a_suspended_engine_suspended(here: GpuSite) -> None:
    async with caller(here.site) as keeper:
        address = await keeper.started(A)
        moved = (await keeper.suspend(A)).bytes
    kill_keeper(here)
    start_keeper(here.site)
    async with caller(here.site) as keeper:
        holding = await keeper.holding(A, settled=True)
        assert (holding.held, holding.host_bytes) == (Held.SUSPENDED, moved)
        await keeper.resume(A)
        assert await text_of(address) == EXPECTED
        await keeper.stop(A, 0.0)
    here.check()


@pytest.mark.parametrize("op", ["lock", "checkpoint", "restore", "unlock"])
async def test_the_next_keeper_settles_what_a_killed_one_left_half_way(
    here: GpuSite, op: str
) -> None:
    async with caller(here.site) as keeper:
        address = await keeper.started(A)
        if op in {"restore", "unlock"}:
            await keeper.suspend(A)
        here.gpus.fault(op, "slow", seconds=1.0)
        leaving = op in {"lock", "checkpoint"}
        await send(keeper, "suspend" if leaving else "resume")
        wait_for(f"{op} has begun", lambda: begun(here, op))
        kill_keeper(here)
    start_keeper(here.site)
    async with caller(here.site) as keeper:
        holding = await keeper.holding(A, settled=True)
        if holding.held is Held.SUSPENDED:
            assert holding.host_bytes > 100 * MIB, "else it would come back without a check"
            await keeper.resume(A)
        else:
            assert holding.held is Held.RUNNING
        assert await text_of(address) == EXPECTED
        await keeper.stop(A, 0.0)
    here.check()


async def send(keeper: Caller, verb: str) -> None:
    """Ask for a verb without waiting for its end."""
    assert keeper._writer is not None
    line = f'{{"id": 9999, "verb": "{verb}", "engine": "a"}}\n'
    keeper._writer.write(line.encode())
    await keeper._writer.drain()


def begun(here: GpuSite, op: str) -> bool:
    return any(call.op == op and call.ended is None for call in here.gpus.calls())


def kill_keeper(here: GpuSite) -> None:
    pid = here.site.keeper_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for("the keeper is dead", lambda: here.site.keeper_pid() is None)


@pytest.mark.parametrize("op", ["lock", "checkpoint", "restore", "unlock"])
async def test_a_call_that_hangs_costs_one_engine_and_not_the_keeper(
    tmp_path: Path, op: str
) -> None:
    keeper_section = {"cuda_lock_timeout": "1s", "cuda_rate": "1GiB"}
    model = {"sandbox": False, "tiers": ["host"]}
    with gpu_site(tmp_path, share=0.4, model=model, keeper=keeper_section) as here:
        start_keeper(here.site, hasty=True)
        async with caller(here.site) as keeper:
            await keeper.started(A)
            address = await keeper.started(B)
            if op in {"restore", "unlock"}:
                await keeper.suspend(A)
            victim = here.record("a").cuda or None
            here.gpus.fault(op, "hang", pid=victim[0].pid if victim else 0)
            started = time.monotonic()
            with pytest.raises(CudaError) as failed:
                await (keeper.resume(A) if victim else keeper.suspend(A))
            assert failed.value.lost
            assert time.monotonic() - started < 60
            assert (await keeper.holding(A)).held is Held.NOTHING
            here.gpus.clear_faults()
            await keeper.suspend(B)
            await keeper.resume(B)
            assert await text_of(address, "b") == EXPECTED
        assert not here.gpus.illegal()


async def image_and_other_gpu(here: GpuSite, kind: ImageKind) -> None:
    """Make an image of an engine on the first GPU, then give it the second one."""
    start_keeper(here.site)
    async with caller(here.site) as keeper:
        await keeper.started(A)
        await keeper.dump(A, kind)
        if kind == "golden":
            await keeper.discard(A)
    kill_keeper(here)
    content = json.loads(here.site.config.read_text())
    content["models"][0]["device"] = "gpu1"
    here.site.config.write_text(json.dumps(content))


@pytest.mark.criu
@pytest.mark.skipif(bool(needs_criu[-1].args[0]), reason="needs root and CRIU")
class TestImages:
    async def test_gpu_state_goes_to_disk_and_comes_back(self, boxed: GpuSite) -> None:
        async with caller(boxed.site) as keeper:
            address = await keeper.started(A)
            text = await text_of(address)
            assert text == EXPECTED
            report = await keeper.dump(A, "live")
            assert report.bytes > 100 * MIB, "the GPU state is in the image"
            assert {"lock", "checkpoint", "dump"} <= {*report.phases}
            assert used(boxed) == 0
            assert (await keeper.holding(A)).held is Held.LIVE_IMAGE
            await keeper.restore(A, "live")
            assert await text_of(await keeper.healthy(A)) == EXPECTED
            await keeper.stop(A, 0.0)
        boxed.check()

    async def test_a_suspended_engine_goes_further_down(self, boxed: GpuSite) -> None:
        async with caller(boxed.site) as keeper:
            await keeper.started(A)
            await keeper.suspend(A)
            await keeper.dump(A, "live")
            assert (await keeper.holding(A)).held is Held.LIVE_IMAGE
            await keeper.restore(A, "live")
            assert await text_of(await keeper.healthy(A)) == EXPECTED
        boxed.check()

    async def test_a_golden_image_holds_gpu_state_and_can_be_restored_again_and_again(
        self, boxed: GpuSite
    ) -> None:
        async with caller(boxed.site) as keeper:
            address = await keeper.started(A)
            await keeper.dump(A, "golden")
            assert await text_of(address) == EXPECTED, "it runs on"
            for _ in range(2):
                await keeper.discard(A)
                assert used(boxed) == 0
                assert (await keeper.holding(A)).golden
                await keeper.restore(A, "golden")
                assert await text_of(await keeper.healthy(A)) == EXPECTED
        boxed.check()

    async def test_an_image_is_not_used_up_when_the_gpu_has_no_room(self, boxed: GpuSite) -> None:
        async with caller(boxed.site) as keeper:
            await keeper.started(A)
            await keeper.dump(A, "live")
            await keeper.started(B)
            with pytest.raises(DeviceBusy):
                await keeper.restore(A, "live")
            assert (await keeper.holding(A)).held is Held.LIVE_IMAGE
            await keeper.stop(B, 0.0)
            await keeper.restore(A, "live")
            assert await text_of(await keeper.healthy(A)) == EXPECTED
        boxed.check()

    @pytest.mark.parametrize("kind", ["live", "golden"])
    async def test_an_image_comes_back_on_another_gpu_of_the_same_kind(
        self, tmp_path: Path, kind: ImageKind
    ) -> None:
        with gpu_site(tmp_path, "a", gpus=(256 * MIB, 256 * MIB)) as here:
            await image_and_other_gpu(here, kind)
            start_keeper(here.site)
            async with caller(here.site) as keeper:
                holding = await keeper.holding(A)
                assert holding.golden is (kind == "golden")
                await keeper.restore(A, kind)
                assert await text_of(await keeper.healthy(A)) == EXPECTED
                measured = await keeper.measure(A)
                assert list(measured.device_bytes) == [here.gpus.uuids[1]]
                await keeper.suspend(A)
                await keeper.resume(A)
                assert await text_of(await keeper.healthy(A)) == EXPECTED
            here.check()

    async def test_a_driver_that_cannot_bring_state_elsewhere_leaves_the_image_alone(
        self, tmp_path: Path
    ) -> None:
        old = {"driver": "570.1", "cuda": 12080}
        with gpu_site(tmp_path, "a", gpus=(256 * MIB, 256 * MIB), standing=old) as here:
            await image_and_other_gpu(here, "live")
            start_keeper(here.site)
            async with caller(here.site) as keeper:
                with pytest.raises(ImageError, match="cannot bring it elsewhere"):
                    await keeper.restore(A, "live")
                assert (await keeper.holding(A)).held is Held.LIVE_IMAGE
            here.check()

    async def test_a_dump_that_fails_leaves_it_where_it_was(self, boxed: GpuSite) -> None:
        async with caller(boxed.site) as keeper:
            address = await keeper.started(A)
            boxed.gpus.fault("checkpoint", "error", code=999)
            with pytest.raises(CudaError):
                await keeper.dump(A, "live")
            assert await text_of(address) == EXPECTED
            assert (await keeper.holding(A)).live_image_bytes == 0
        boxed.check()


async def test_without_a_driver_an_engine_cannot_be_suspended_and_says_why(tmp_path: Path) -> None:
    model = {"sandbox": False, "tiers": ["host"]}
    with gpu_site(tmp_path, standing={"api": False, "driver": "535.1"}, model=model) as here:
        start_keeper(here.site)
        async with caller(here.site) as keeper:
            address = await keeper.started(A)
            holding = await keeper.holding(A)
            assert not holding.can_suspend
            assert holding.why_not
            with pytest.raises(KeeperError) as refused:
                await keeper.suspend(A)
            assert holding.why_not in str(refused.value)
            async with httpx.AsyncClient() as http:
                assert (await http.get(f"http://{address}/health")).is_success


@pytest.mark.parametrize("stage", ["keeper.sandbox_init", "testing.cuda_engine"])
async def test_an_engine_that_a_killed_keeper_was_just_starting_is_not_left_over(
    stage: str, here: GpuSite
) -> None:
    keeper_pid = here.site.keeper_pid()
    assert keeper_pid is not None
    async with caller(here.site) as keeper, asyncio.TaskGroup() as tasks:
        starting = tasks.create_task(lost(keeper.spawn(A)))
        await asyncio.to_thread(wait_for, "a start", lambda: below(keeper_pid, "sandbox_init"))
        os.kill(keeper_pid, signal.SIGSTOP)  # it does not hear how the start goes on
        try:
            await asyncio.to_thread(wait_for, "the stage", lambda: below(keeper_pid, stage))
        finally:
            os.kill(keeper_pid, signal.SIGKILL)
        await starting
    start_keeper(here.site)
    wait_for("nothing of it is left", lambda: not engines_of(here))
    async with caller(here.site) as keeper:
        assert (await keeper.holding(A)).held is Held.NOTHING
        assert await text_of(await keeper.started(A)) == EXPECTED


async def lost(verb: Awaitable[object]) -> None:
    with pytest.raises(KeeperUnavailable):
        await verb


def below(pid: int, words: str) -> list[int]:
    """Return the descendants of a process whose command line has these words."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            found += [child.pid] if words in " ".join(child.cmdline()) else []
    return found


def engines_of(here: GpuSite) -> list[str]:
    """Return what there is of the site's engines, begun or not."""
    found = traces(here.site.directory).get("processes", ())
    return [line for line in found if "sandbox_init" in line or "testing.cuda_" in line]
