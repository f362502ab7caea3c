"""What an actor says when its keeper or its engine fails it: nothing must end the daemon."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from swapserve.config.recipes import Mechanism
from swapserve.config.schema import ModelConfig
from swapserve.engines.base import Canary
from swapserve.errors import CudaError, DeviceBusy, KeeperError, QuiesceFailed, StartFailed
from swapserve.events import Bus
from swapserve.keeper.protocol import Exited, Held, Holding, Measured
from swapserve.lifecycle.actor import EngineActor
from swapserve.lifecycle.figures import Figures
from swapserve.lifecycle.journal import Journal
from swapserve.lifecycle.orders import Callbacks, Order
from swapserve.lifecycle.standing import Standing
from swapserve.messages import EngineExited, EngineLeft, EngineReady, EngineSeen, TransitionFailed
from swapserve.states import EngineState, Tier
from swapserve.swap import moves
from tests.support.scripted import (
    GPU,
    MIB,
    NOTHING,
    ON_GPU,
    RUNNING,
    SUSPENDED,
    UUID,
    Stage,
)

pytestmark = pytest.mark.anyio

KEPT = CudaError("a", "lock", "busy", lost=False)
LOST = CudaError("a", "restore", "broken", lost=True)
BUSY = DeviceBusy("a", UUID, 2, 1)
UNMEASURED = KeeperError("'a' cannot be measured: NVML tells no bytes by process")
STUCK = KeeperError("the processes of 'a' did not end")
SLEEPS = replace(ON_GPU, mechanism="sleep")
OUT = Order(what="swap_out", to=Tier.HOST)
IN = Order(what="bring_in")


class Acting:
    """An actor, and what it said."""

    def __init__(self, stage: Stage, model: ModelConfig, journal: Journal) -> None:
        self.stage = stage
        self.said: asyncio.Queue[object] = asyncio.Queue()
        self.figures = Figures(model, journal, stage.engine.mechanisms)
        self.standing = Standing(model.name, Bus())
        nothing = Callbacks(
            post=self.said.put_nowait, engine_back=lambda: None, engine_gone=lambda: None
        )
        self.actor = EngineActor(model, stage.mover, self.figures, self.standing, nothing)

    async def hears(self) -> object:
        async with asyncio.timeout(10):
            return await self.said.get()

    async def does(self, order: Order) -> object:
        """Give an order; return what is said when it has been carried out."""
        self.actor.order(order)
        return await self.hears()

    @property
    def where(self) -> tuple[EngineState, Tier]:
        return self.standing.state, self.standing.tier


@asynccontextmanager
async def acting(
    tmp_path: Path,
    *mechanisms: str,
    held: Holding = RUNNING,
    model: ModelConfig = ON_GPU,
    asleep: bool = False,
    **fails: Exception,
) -> AsyncIterator[Acting]:
    stage = Stage(*mechanisms, held=held, model=model)  # type: ignore[arg-type]
    stage.engine.asleep = asleep
    stage.script.does |= fails
    journal = Journal(tmp_path / "journal.json")
    journal.open()
    here = Acting(stage, model, journal)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(here.actor.run())
        yield here
        assert not running.done(), "the daemon has ended"
        running.cancel()


@asynccontextmanager
async def serving(tmp_path: Path, *mechanisms: str, **more: ModelConfig) -> AsyncIterator[Acting]:
    """An engine that an earlier daemon has left, and that serves."""
    async with acting(tmp_path, *mechanisms, **more) as here:  # type: ignore[arg-type]
        assert isinstance(await here.hears(), EngineSeen)
        assert isinstance(await here.hears(), EngineReady)
        yield here


@asynccontextmanager
async def away(tmp_path: Path) -> AsyncIterator[Acting]:
    """An engine whose state is in host memory."""
    async with serving(tmp_path, "checkpoint") as here:
        left = await here.does(OUT)
        assert isinstance(left, EngineLeft)
        assert (left.tier, left.host_bytes) == (Tier.HOST, 100 * MIB)
        yield here


def failed(said: object) -> tuple[EngineState, Tier, bool]:
    assert isinstance(said, TransitionFailed), said
    return said.state, said.tier, said.leases_lost


async def test_one_that_cannot_be_measured_serves_and_is_charged_what_it_was_promised(
    tmp_path: Path,
) -> None:
    async with acting(tmp_path, "checkpoint", measure=UNMEASURED) as here:
        assert isinstance(await here.hears(), EngineSeen)
        ready = await here.hears()
        assert isinstance(ready, EngineReady)
        assert ready.footprint == {}


async def test_one_that_nvml_does_not_list_is_not_said_to_take_nothing(tmp_path: Path) -> None:
    async with acting(tmp_path, "checkpoint", held=NOTHING) as here:
        assert isinstance(await here.hears(), EngineSeen)
        here.stage.keeper.measured = Measured(host_bytes=5, device_bytes={}, dump_bytes=0)
        ready = await here.does(IN)
        assert isinstance(ready, EngineReady)
        assert ready.footprint == {}


async def test_one_whose_residue_nobody_can_tell_is_woken(tmp_path: Path) -> None:
    async with serving(tmp_path, "sleep", model=SLEEPS) as here:
        here.stage.script.does["measure"] = UNMEASURED
        assert failed(await here.does(OUT)) == (EngineState.READY, Tier.DEVICE, False)
        assert "wake" in here.stage.did


async def test_one_found_asleep_whose_residue_nobody_can_tell_is_woken(tmp_path: Path) -> None:
    async with acting(tmp_path, "sleep", model=SLEEPS, asleep=True, measure=UNMEASURED) as here:
        assert isinstance(await here.hears(), EngineSeen)
        assert isinstance(await here.hears(), EngineReady)
        assert "wake" in here.stage.did


async def test_one_found_asleep_holds_what_it_has_kept(tmp_path: Path) -> None:
    async with serving(tmp_path, "sleep", model=SLEEPS):
        pass
    async with acting(tmp_path, "sleep", model=SLEEPS, asleep=True) as here:
        here.stage.keeper.measured = Measured(
            host_bytes=5, device_bytes={UUID: 10 * MIB}, dump_bytes=0
        )
        seen = await here.hears()
        assert isinstance(seen, EngineSeen)
        assert (seen.state, seen.tier) == (EngineState.SWAPPED_OUT, Tier.HOST)
        assert (seen.residue, seen.host_bytes) == ({GPU: 10 * MIB}, 90 * MIB)


async def test_one_that_neither_serves_nor_ends_still_holds_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "STILL_TIMEOUT_S", 0.05)
    async with serving(tmp_path, "checkpoint") as here:
        here.stage.engine.sick = 10**6
        here.stage.script.does |= {"suspend": KEPT, "stop": STUCK}
        assert failed(await here.does(OUT)) == (EngineState.FAILED, Tier.DEVICE, True)


async def test_one_that_did_not_come_and_does_not_end_still_holds_its_memory(
    tmp_path: Path,
) -> None:
    async with acting(tmp_path, "checkpoint", held=NOTHING, stop=STUCK) as here:
        assert isinstance(await here.hears(), EngineSeen)
        here.stage.script.does["warm_up"] = StartFailed("a", "no answer", "")
        assert failed(await here.does(IN)) == (EngineState.FAILED, Tier.DEVICE, True)


async def test_one_that_has_no_room_rests_as_before(tmp_path: Path) -> None:
    async with away(tmp_path) as here:
        here.stage.script.does["resume"] = BUSY
        assert failed(await here.does(IN)) == (EngineState.SWAPPED_OUT, Tier.HOST, False)
        here.stage.script.does.clear()
        assert isinstance(await here.does(IN), EngineReady)


async def test_one_that_was_lost_on_the_way_does_not_rest_where_it_was(tmp_path: Path) -> None:
    """Its golden image finds no room: then it is on disk, and takes no RAM any more."""
    async with away(tmp_path) as here:
        golden = replace(SUSPENDED, golden=True)
        here.stage.keeper.held = here.actor._kit.holding = golden

        async def ends() -> None:
            here.stage.keeper.held = replace(NOTHING, golden=True)
            raise LOST

        here.stage.script.does |= {"resume": ends, "restore golden": BUSY}
        assert isinstance(await here.does(IN), EngineExited)
        assert failed(await here.hears()) == (EngineState.SWAPPED_OUT, Tier.DISK, False)
        assert here.where == (EngineState.SWAPPED_OUT, Tier.DISK)
        del here.stage.script.does["restore golden"]
        assert isinstance(await here.does(IN), EngineReady)
        assert "restore golden" in here.stage.did


async def test_a_start_after_a_lost_state_is_not_what_the_mechanism_costs(tmp_path: Path) -> None:
    async with away(tmp_path) as here:
        here.stage.script.does["resume"] = LOST
        assert isinstance(await here.does(IN), EngineExited)
        assert isinstance(await here.hears(), EngineReady)
        records = Journal(tmp_path / "journal.json")
        records.open()
        found = records.costs("a")["records"]["checkpoint"]
        assert (found["in"], found["failures"]) == ([], 1)


async def test_one_that_cannot_be_woken_starts_anew(tmp_path: Path) -> None:
    async with serving(tmp_path, "sleep", model=SLEEPS) as here:
        left = await here.does(OUT)
        assert isinstance(left, EngineLeft)
        here.stage.script.does["wake"] = QuiesceFailed("a", "wake", "no memory", left_awake=False)
        assert isinstance(await here.does(IN), EngineExited)
        assert isinstance(await here.hears(), EngineReady)
        assert "spawn" in here.stage.did


async def test_an_order_to_leave_that_crosses_the_engine_s_end_is_answered(tmp_path: Path) -> None:
    async with serving(tmp_path, "checkpoint") as here:
        here.stage.keeper.held = NOTHING
        here.actor.exited(Exited(engine="a", pid=1, status="signal SIGKILL"))
        here.actor.order(OUT)  # decided before the core heard of the end
        assert isinstance(await here.hears(), EngineExited)
        assert failed(await here.hears()) == (EngineState.FAILED, Tier.NONE, True)
        assert "SIGKILL" in str(here.standing.error)
        assert isinstance(await here.does(IN), EngineReady)


# ------------------------------------------------------------ to host memory

BOTH_TIERS = replace(ON_GPU, tiers=(Tier.HOST, Tier.DISK))
GOLDEN = replace(NOTHING, golden=True, can_dump=True)
LIVE = replace(NOTHING, held=Held.LIVE_IMAGE, can_dump=True)
AHEAD = Order(what="bring_in", to=Tier.HOST)
OFF_HOST = (EngineState.SWAPPED_OUT, Tier.HOST)
ON_DISK = (EngineState.SWAPPED_OUT, Tier.DISK)


@asynccontextmanager
async def imaged(
    tmp_path: Path, held: Holding = GOLDEN, **fails: Exception
) -> AsyncIterator[Acting]:
    """An engine of which there is an image."""
    async with acting(tmp_path, "checkpoint", held=held, model=BOTH_TIERS) as here:
        seen = await here.hears()
        assert isinstance(seen, EngineSeen)
        assert (seen.state, seen.tier) == ON_DISK
        here.stage.script.does |= fails
        yield here


@pytest.mark.parametrize(("held", "kind"), [(GOLDEN, "golden"), (LIVE, "live")])
async def test_an_image_goes_to_host_memory_and_the_engine_serves_from_there(
    tmp_path: Path, held: Holding, kind: str
) -> None:
    async with imaged(tmp_path, held) as here:
        left = await here.does(AHEAD)
        assert isinstance(left, EngineLeft)
        assert (left.tier, left.host_bytes) == (Tier.HOST, 100 * MIB)
        assert left.cache_kept is (kind == "live"), "a golden image is of an engine without any"
        assert not left.leases_lost
        assert here.where == OFF_HOST
        assert here.actor.host_bytes == 100 * MIB
        last = here.standing.last_swap
        assert last is not None
        assert (last.kind, last.mechanism) == ("promote", kind)
        assert (last.from_tier, last.to_tier) == (Tier.DISK, Tier.HOST)
        assert here.stage.did == ["settled", f"promote {kind}", "settled"]
        ready = await here.does(IN)
        assert isinstance(ready, EngineReady)
        assert "resume" in here.stage.did
        holding = here.actor.holding
        assert holding is not None
        assert holding.restored_from == kind, "its next random numbers are those of the image"


@pytest.mark.parametrize("to", [Tier.HOST, Tier.DISK])
async def test_what_was_brought_to_host_memory_leaves_like_others(tmp_path: Path, to: Tier) -> None:
    async with imaged(tmp_path) as here:
        await here.does(AHEAD)
        if to is Tier.HOST:
            assert isinstance(await here.does(IN), EngineReady)
        left = await here.does(Order(what="swap_out", to=to))
        assert isinstance(left, EngineLeft)
        assert left.tier is to


@pytest.mark.parametrize("error", [KEPT, BUSY])
@pytest.mark.parametrize("held", [GOLDEN, LIVE])
async def test_a_promotion_that_was_not_tried_leaves_all_as_it_was(
    tmp_path: Path, held: Holding, error: Exception
) -> None:
    fails = {f"promote {kind}": error for kind in ("golden", "live")}
    async with imaged(tmp_path, held, **fails) as here:
        assert failed(await here.does(AHEAD)) == (*ON_DISK, False)
        assert here.where == ON_DISK
        assert not {"stop", "drop golden"} & {*here.stage.did}
        here.stage.script.does.clear()
        assert isinstance(await here.does(IN), EngineReady)


async def test_a_golden_image_that_is_not_promoted_is_dropped_and_nobody_is_hurt(
    tmp_path: Path,
) -> None:
    async with imaged(tmp_path) as here:

        async def drops() -> None:
            here.stage.keeper.held = NOTHING

        here.stage.script.does |= {"promote golden": LOST, "drop golden": drops}
        assert failed(await here.does(AHEAD)) == (EngineState.SWAPPED_OUT, Tier.NONE, False)
        assert here.standing.error is not None
        here.stage.script.does.clear()
        assert isinstance(await here.does(IN), EngineReady)
        assert "spawn" in here.stage.did


async def test_requests_in_a_live_image_that_is_used_up_in_vain_are_lost(tmp_path: Path) -> None:
    async with imaged(tmp_path, replace(LIVE, golden=True), **{"promote live": LOST}) as here:
        gone = []
        here.actor._kit.tell = replace(here.actor._tell, engine_gone=lambda: gone.append(1))

        async def clears() -> None:
            here.stage.keeper.held = GOLDEN

        here.stage.script.does["settled"] = clears
        assert failed(await here.does(AHEAD)) == (*ON_DISK, True)
        assert gone, "the front door closes its connections"


async def test_an_image_that_was_collected_meanwhile_is_told_of(tmp_path: Path) -> None:
    async with imaged(tmp_path) as here:
        here.stage.keeper.held = here.actor._kit.holding = NOTHING
        assert failed(await here.does(AHEAD)) == (EngineState.SWAPPED_OUT, Tier.NONE, False)
        assert "promote golden" not in here.stage.did


async def test_one_that_ends_on_its_way_to_host_memory_has_not_come(tmp_path: Path) -> None:
    async with imaged(tmp_path) as here:
        ends = here.stage.keeper.restore

        async def ended(*args: object, **more: object) -> object:
            report = await ends(*args, **more)  # type: ignore[arg-type]
            here.stage.keeper.held = GOLDEN
            return report

        here.stage.keeper.restore = ended  # type: ignore[assignment,method-assign]
        state, _, lost = failed(await here.does(AHEAD))
        assert (state, lost) == (EngineState.SWAPPED_OUT, False)


async def test_what_neither_comes_to_host_memory_nor_ends_still_holds_its_memory(
    tmp_path: Path,
) -> None:
    async with imaged(tmp_path, GOLDEN, **{"promote golden": LOST, "stop": STUCK}) as here:

        async def stays() -> None:
            here.stage.keeper.held = SUSPENDED

        here.stage.script.does["settled"] = stays
        assert failed(await here.does(AHEAD)) == (EngineState.FAILED, Tier.DEVICE, True)


async def test_one_that_dies_in_host_memory_has_failed(tmp_path: Path) -> None:
    async with imaged(tmp_path) as here:
        await here.does(AHEAD)
        here.stage.keeper.held = GOLDEN
        here.actor.exited(Exited(engine="a", pid=1, status="signal SIGKILL"))
        assert isinstance(await here.hears(), EngineExited)
        assert here.where == (EngineState.FAILED, Tier.NONE)
        assert isinstance(await here.does(IN), EngineReady)
        assert "restore golden" in here.stage.did


async def test_one_that_answers_wrongly_after_host_memory_starts_anew(tmp_path: Path) -> None:
    canary = Canary(("a",), ()).as_json()
    async with imaged(tmp_path, replace(GOLDEN, canary=canary)) as here:
        await here.does(AHEAD)
        here.stage.engine.says = Canary(("b",), ())

        async def drops() -> None:
            here.stage.keeper.held = NOTHING

        here.stage.script.does["drop golden"] = drops
        assert isinstance(await here.does(IN), EngineExited)
        assert isinstance(await here.hears(), EngineReady)
        did = here.stage.did
        assert "spawn" in did
        assert "restore golden" not in did, "that image has just been dropped"


# --------------------------------------------------------------------- cache


@pytest.mark.parametrize(
    ("mechanism", "to", "cache_kept"),
    [
        ("checkpoint", Tier.HOST, True),
        ("lean", Tier.HOST, False),
        ("sleep", Tier.HOST, False),
        ("deep_sleep", Tier.HOST, False),
        ("restart", Tier.HOST, False),
        ("checkpoint", Tier.DISK, False),
    ],
)
async def test_the_scheduler_is_told_whether_the_cache_is_still_there(
    tmp_path: Path, mechanism: Mechanism, to: Tier, cache_kept: bool
) -> None:
    model = replace(ON_GPU, mechanism=mechanism)
    async with serving(tmp_path, mechanism, model=model) as here:
        left = await here.does(replace(OUT, to=to))
        assert isinstance(left, EngineLeft)
        assert left.cache_kept is cache_kept


@pytest.mark.parametrize(("cache_s", "mechanism"), [(100.0, "live"), (0.0, "discard")])
async def test_what_the_scheduler_says_of_the_cache_decides_about_an_image(
    tmp_path: Path, cache_s: float, mechanism: str
) -> None:
    held = replace(RUNNING, golden=True, can_dump=True)
    async with serving(tmp_path, "checkpoint", held=held, model=BOTH_TIERS) as here:  # type: ignore[arg-type]
        left = await here.does(Order(what="swap_out", to=Tier.DISK, cache_s=cache_s))
        assert isinstance(left, EngineLeft)
        assert here.standing.last_swap is not None
        assert here.standing.last_swap.mechanism == mechanism
        assert left.cache_kept is (mechanism == "live")
