"""The steps of each way in and out of a GPU, and what a failed step leaves."""

import asyncio
from dataclasses import replace

import pytest

from swapserve.engines.base import Canary
from swapserve.errors import (
    CanaryFailed,
    CriuError,
    CudaError,
    DeviceBusy,
    ImageError,
    KeeperError,
    KeeperUnavailable,
    QuiesceFailed,
    StartFailed,
    SwapServeError,
)
from swapserve.keeper.protocol import Exited, Held, Holding, ImageKind
from swapserve.swap import moves
from swapserve.swap.moves import nothing_tried
from swapserve.swap.plan import WayIn, WayOut
from swapserve.swap.trace import Trace
from tests.support.scripted import MIB, NOTHING, RUNNING, SUSPENDED, UUID, Stage

pytestmark = pytest.mark.anyio

KEPT = CudaError("a", "lock", "busy", lost=False)
LOST = CudaError("a", "restore", "broken", lost=True)
BUSY = DeviceBusy("a", UUID, 2, 1)
LATE = KeeperError("the keeper did not answer resume within 1 s")


def tired(phase: str = "sleep") -> QuiesceFailed:
    return QuiesceFailed("a", phase, "no", left_awake=None)


async def fails(stage: Stage, way: WayIn, error: SwapServeError) -> list[str]:
    """Enter, which must fail like that; return what was done."""
    with pytest.raises(type(error)) as failed:
        await stage.mover.enter(way, stage.keeper.held, Trace())
    assert failed.value is error
    return stage.did


# ---------------------------------------------------------------------- out


@pytest.mark.parametrize(
    ("way", "steps"),
    [
        ("checkpoint", ["close_idle", "suspend"]),
        ("lean", ["close_idle", "settled", "release", "suspend"]),
        ("sleep", ["close_idle", "settled", "sleep"]),
        ("deep_sleep", ["close_idle", "settled", "deep_sleep"]),
    ],
)
async def test_the_steps_of_each_way_out(way: WayOut, steps: list[str]) -> None:
    stage = Stage("checkpoint", "lean", "sleep", "deep_sleep")
    trace = Trace()
    await stage.mover.leave(way, trace)
    assert stage.did == steps
    assert trace.bytes == (100 * MIB if "suspend" in steps else 0)


async def test_one_that_gave_up_its_cache_in_vain_is_woken() -> None:
    stage = Stage("lean")
    stage.script.does["suspend"] = KEPT
    with pytest.raises(CudaError):
        await stage.mover.leave("lean", Trace())
    assert stage.did == ["close_idle", "settled", "release", "suspend", "settled", "wake"]
    assert await stage.mover.still_serves()
    assert "wake" not in stage.did, "once is enough"


async def test_one_that_was_lost_after_giving_up_its_cache_is_not_woken() -> None:
    stage = Stage("lean")
    stage.script.does["suspend"] = LOST
    with pytest.raises(CudaError):
        await stage.mover.leave("lean", Trace())
    assert "wake" not in stage.did


async def test_one_whose_sleep_failed_is_asked_and_woken_before_it_serves() -> None:
    stage = Stage("sleep")
    stage.script.does["sleep"] = tired()
    with pytest.raises(QuiesceFailed):
        await stage.mover.leave("sleep", Trace())
    stage.engine.asleep = None  # it does not tell
    assert await stage.mover.still_serves()
    assert stage.did[-3:] == ["resting", "wake", "healthy"]


async def test_one_that_cannot_be_woken_does_not_serve() -> None:
    stage = Stage("sleep")
    stage.script.does |= {"sleep": tired(), "wake": tired("wake")}
    stage.engine.asleep = True
    with pytest.raises(QuiesceFailed):
        await stage.mover.leave("sleep", Trace())
    assert not await stage.mover.still_serves()


async def test_one_that_is_only_busy_still_serves() -> None:
    stage = Stage("checkpoint")
    stage.engine.sick = 3
    assert await stage.mover.still_serves(), "a killed engine takes its requests with it"


async def test_one_that_never_answers_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "STILL_TIMEOUT_S", 0.05)
    stage = Stage("checkpoint")
    stage.engine.sick = 10**6
    assert not await stage.mover.still_serves()


@pytest.mark.parametrize("held", [SUSPENDED, NOTHING, replace(RUNNING, address=None)])
async def test_what_does_not_run_does_not_serve(held: Holding) -> None:
    stage = Stage("checkpoint", held=held)
    assert not await stage.mover.still_serves()


async def test_a_keeper_that_is_gone_is_no_sick_engine() -> None:
    stage = Stage("checkpoint")
    stage.script.does["healthy"] = KeeperUnavailable("gone")
    with pytest.raises(KeeperUnavailable):
        await stage.mover.still_serves()


# ----------------------------------------------------------------------- in


async def test_a_suspended_engine_is_resumed_and_probed() -> None:
    stage = Stage("checkpoint", held=SUSPENDED)
    await stage.mover.enter("resume", SUSPENDED, Trace())
    assert stage.did == ["resume", "healthy"]


async def test_a_lean_one_is_woken_as_well_also_by_a_daemon_that_does_not_know() -> None:
    stage = Stage("lean", held=SUSPENDED)
    stage.engine.asleep = True
    await stage.mover.enter("resume", SUSPENDED, Trace())
    assert stage.did == ["resume", "resting", "wake", "healthy"]
    await stage.mover.leave("lean", Trace())
    assert stage.did
    await stage.mover.enter("resume", SUSPENDED, Trace())
    assert stage.did == ["resume", "wake", "healthy"]


async def test_one_that_sleeps_by_itself_is_woken() -> None:
    stage = Stage("sleep")
    await stage.mover.leave("sleep", Trace())
    assert stage.did
    await stage.mover.enter("wake", RUNNING, Trace())
    assert stage.did == ["wake", "healthy"]


async def test_one_that_does_not_tell_whether_it_sleeps_is_woken_when_it_is_adopted() -> None:
    stage = Stage("sleep")
    stage.engine.asleep = None
    assert not await stage.mover.resting(RUNNING)
    assert stage.did == ["resting"]
    await stage.mover.enter("adopt", RUNNING, Trace())
    assert stage.did == ["healthy", "resting", "wake"]


@pytest.mark.parametrize("error", [BUSY, KEPT])
async def test_where_nothing_was_tried_nothing_is_ended(error: SwapServeError) -> None:
    stage = Stage("checkpoint", held=SUSPENDED)
    stage.script.does["resume"] = error
    assert await fails(stage, "resume", error) == ["resume"]
    assert nothing_tried(error)


async def test_what_is_lost_is_cleared_away() -> None:
    stage = Stage("checkpoint", held=SUSPENDED)
    stage.script.does["resume"] = LOST
    assert (await fails(stage, "resume", LOST))[-1] == "stop"
    assert not nothing_tried(LOST)


async def test_a_verb_that_outlasts_our_patience_ends_before_it_is_cleared_away() -> None:
    """Else the keeper refuses to stop what is still being resumed, and it stays there."""
    stage = Stage("checkpoint", held=SUSPENDED)
    stage.script.does["resume"] = LATE
    assert (await fails(stage, "resume", LATE)) == ["resume", "settled", "stop"]


async def test_what_cannot_be_woken_is_cleared_away() -> None:
    stage = Stage("sleep")
    await stage.mover.leave("sleep", Trace())
    error = stage.script.does["wake"] = tired("wake")
    assert (await fails(stage, "wake", error))[-1] == "stop"


async def test_what_cannot_be_cleared_away_hides_no_error() -> None:
    stage = Stage("checkpoint", held=SUSPENDED)
    stage.script.does |= {"resume": LOST, "stop": KeeperError("it did not end")}
    await fails(stage, "resume", LOST)


async def test_a_keeper_that_is_gone_is_not_asked_to_clear_away() -> None:
    stage = Stage("checkpoint", held=SUSPENDED)
    gone = stage.script.does["resume"] = KeeperUnavailable("gone")
    assert await fails(stage, "resume", gone) == ["resume"]


# ----------------------------------------------------------------------- up


GOOD = Canary(("a", "b"), ())
IMAGED = replace(NOTHING, golden=True, canary=GOOD.as_json())


async def promoted(stage: Stage, kind: ImageKind = "golden") -> Holding:
    """Bring an image to host memory; return what there is of it then."""
    trace = Trace()
    await stage.mover.promote(kind, trace)
    assert stage.did == [f"promote {kind}"], "a frozen engine answers nobody"
    assert trace.bytes == 100 * MIB
    return stage.keeper.held


async def test_what_came_to_host_memory_from_its_golden_image_is_proved_when_it_first_serves() -> (
    None
):
    stage = Stage("checkpoint", held=IMAGED)
    held = await promoted(stage)
    stage.script.does["resume"] = BUSY
    await fails(stage, "resume", BUSY)
    del stage.script.does["resume"]
    stage.engine.says = GOOD
    await stage.mover.enter("resume", held, Trace())
    assert stage.did == ["resume", "healthy", "warm_up", "canary_passed"]
    await stage.mover.leave("checkpoint", Trace())
    assert stage.did
    await stage.mover.enter("resume", held, Trace())
    assert stage.did == ["resume", "healthy"], "it has served since"


async def test_what_came_from_a_live_image_has_served_before() -> None:
    stage = Stage("checkpoint", held=replace(IMAGED, held=Held.LIVE_IMAGE))
    held = await promoted(stage, "live")
    await stage.mover.enter("resume", held, Trace())
    assert stage.did == ["resume", "healthy"]


async def test_one_that_answers_wrongly_after_host_memory_is_ended_and_its_image_dropped() -> None:
    stage = Stage("checkpoint", held=IMAGED)
    held = await promoted(stage)
    stage.engine.says = Canary(("a", "c"), ())
    with pytest.raises(CanaryFailed) as failed:
        await stage.mover.enter("resume", held, Trace())
    assert stage.did[-1] == "stop"
    await stage.mover.quarantine("resume", failed.value)
    assert stage.did == ["drop golden"]


@pytest.mark.parametrize("error", [KEPT, ImageError("a", "restore", "none"), KeeperUnavailable("")])
async def test_where_no_promotion_was_tried_nothing_is_ended(error: SwapServeError) -> None:
    stage = Stage("checkpoint", held=NOTHING)
    stage.script.does["promote golden"] = error
    with pytest.raises(type(error)):
        await stage.mover.promote("golden", Trace())
    assert stage.did == ["promote golden"]


@pytest.mark.parametrize("error", [LOST, LATE, CriuError("a", "restore", "broken")])
async def test_what_a_failed_promotion_has_left_is_cleared_away(error: SwapServeError) -> None:
    stage = Stage("checkpoint", held=NOTHING)
    stage.script.does["promote golden"] = error
    with pytest.raises(type(error)):
        await stage.mover.promote("golden", Trace())
    assert stage.did == ["promote golden", "settled", "stop"]


async def test_one_that_ends_while_it_is_probed_has_not_come() -> None:
    stage = Stage("checkpoint", held=SUSPENDED)
    stage.engine.sick = 10**6
    async with asyncio.TaskGroup() as tasks:
        entering = tasks.create_task(_refused(stage))
        await asyncio.sleep(0.02)
        assert "healthy" in stage.script.calls
        stage.mover.exited(Exited(engine="a", pid=1, status="signal SIGKILL"))
    failed = entering.result()
    assert "signal SIGKILL" in str(failed)
    assert stage.did[-1] == "stop"


async def _refused(stage: Stage) -> StartFailed:
    with pytest.raises(StartFailed) as failed:
        await stage.mover.enter("resume", SUSPENDED, Trace())
    return failed.value


async def test_an_image_that_cannot_be_dropped_is_told_and_no_more() -> None:
    stage = Stage("checkpoint")
    stage.script.does["drop golden"] = KeeperError("'a' cannot drop_image while it is in restore")
    await stage.mover.quarantine("golden", LOST)
    assert any("cannot drop_image" in notice for notice in stage.notices)
    await stage.mover.quarantine("golden", KeeperError("'a' cannot restore: it already runs"))
    assert stage.did == ["drop golden"], "that says nothing about the image"
    stage.script.does["drop golden"] = KeeperUnavailable("gone")
    with pytest.raises(KeeperUnavailable):
        await stage.mover.quarantine("golden", LOST)
