"""Which way an engine comes in and leaves."""

from dataclasses import replace

import pytest

from swapserve.config.recipes import Mechanism, Recipe
from swapserve.config.schema import ModelConfig
from swapserve.ids import DeviceName, EngineName
from swapserve.keeper.protocol import Held, Holding
from swapserve.states import Tier
from swapserve.swap.plan import (
    KEEPS_CACHE,
    makes_golden,
    survives,
    tier_after,
    tier_of_images,
    way_up,
    ways_in,
    ways_out,
)

MODEL = ModelConfig(
    name=EngineName("a"),
    recipe=Recipe(name="generic", adapter="generic", argv=("a",)),
    devices=(DeviceName("host"),),
)
ON_GPU = replace(
    MODEL,
    devices=(DeviceName("gpu0"),),
    gpus=("GPU-0",),
    ram=DeviceName("host"),
    tiers=(Tier.HOST, Tier.DISK),
)
NOTHING = Holding(
    engine="a",
    held=Held.NOTHING,
    verb=None,
    pid=None,
    address="127.0.0.1:1",
    golden=False,
    live_image_bytes=0,
    golden_image_bytes=0,
    restored_from=None,
    can_dump=True,
)


@pytest.mark.parametrize(
    ("holding", "ways"),
    [
        (NOTHING, ("cold",)),
        (replace(NOTHING, golden=True), ("golden", "cold")),
        (replace(NOTHING, held=Held.LIVE_IMAGE), ("live", "cold")),
        (replace(NOTHING, held=Held.LIVE_IMAGE, golden=True), ("live", "golden", "cold")),
        (replace(NOTHING, held=Held.RUNNING, golden=True), ("adopt", "cold")),
        (replace(NOTHING, held=Held.SUSPENDED), ("resume", "cold")),
        (replace(NOTHING, held=Held.SUSPENDED, golden=True), ("resume", "golden", "cold")),
    ],
)
def test_the_best_way_in_comes_first_and_a_cold_start_last(
    holding: Holding, ways: tuple[str, ...]
) -> None:
    assert tuple(ways_in(MODEL, holding)) == ways


def test_an_engine_that_sleeps_by_itself_is_woken() -> None:
    asleep = replace(NOTHING, held=Held.RUNNING, golden=True)
    assert tuple(ways_in(MODEL, asleep, resting=True)) == ("wake", "golden", "cold")


def test_a_golden_image_is_not_used_when_it_is_not_wanted() -> None:
    model = replace(MODEL, golden=False)
    assert tuple(ways_in(model, replace(NOTHING, golden=True))) == ("cold",)


@pytest.mark.parametrize(
    ("holding", "image"),
    [
        (NOTHING, None),
        (replace(NOTHING, golden=True), "golden"),
        (replace(NOTHING, held=Held.LIVE_IMAGE), "live"),
        (replace(NOTHING, held=Held.LIVE_IMAGE, golden=True), "live"),
        (replace(NOTHING, held=Held.SUSPENDED, golden=True), None),
        (replace(NOTHING, held=Held.RUNNING, golden=True), None),
    ],
)
def test_an_image_brings_gpu_state_to_host_memory(holding: Holding, image: str | None) -> None:
    assert way_up(ON_GPU, holding) == image
    assert way_up(MODEL, holding) is None, "it has no state to rest there"
    assert (way_up(replace(ON_GPU, golden=False), holding) == "live") is (image == "live")


@pytest.mark.parametrize(
    ("holding", "tier"),
    [
        (NOTHING, Tier.NONE),
        (replace(NOTHING, golden=True), Tier.DISK),
        (replace(NOTHING, held=Held.LIVE_IMAGE), Tier.DISK),
    ],
)
def test_without_process_its_images_say_where_it_is(holding: Holding, tier: Tier) -> None:
    assert tier_of_images(ON_GPU, holding) is tier
    unused = tier_of_images(replace(ON_GPU, golden=False), replace(NOTHING, golden=True))
    assert unused is Tier.NONE


def test_the_cache_survives_where_the_process_or_all_of_its_memory_does() -> None:
    assert {"checkpoint", "live"} == KEEPS_CACHE


def leaving(
    model: ModelConfig,
    holding: Holding,
    *,
    to: Tier = Tier.DISK,
    mechanism: Mechanism | None = None,
    in_flight: int = 0,
    keep_cache: bool = False,
) -> tuple[str, ...]:
    return tuple(
        ways_out(
            model,
            holding,
            to=to,
            mechanism=mechanism,
            in_flight=in_flight,
            keep_cache=keep_cache,
        )
    )


RUNNING = replace(NOTHING, held=Held.RUNNING)
MOVABLE = replace(RUNNING, can_suspend=True)


@pytest.mark.parametrize(
    ("golden", "in_flight", "keep_cache", "ways"),
    [
        (True, 0, False, ("discard",)),
        (True, 0, True, ("live", "discard")),
        (False, 0, False, ("live", "kill")),
        (True, 2, False, ("live",)),
        (False, 1, True, ("live",)),
    ],
)
@pytest.mark.parametrize("model", [MODEL, ON_GPU], ids=["host", "gpu"])
def test_requests_in_flight_are_always_kept_and_an_idle_engine_may_do_without_an_image(
    model: ModelConfig, golden: bool, in_flight: int, keep_cache: bool, ways: tuple[str, ...]
) -> None:
    holding = replace(MOVABLE, golden=golden)
    assert leaving(model, holding, in_flight=in_flight, keep_cache=keep_cache) == ways


@pytest.mark.parametrize("reason", ["no CRIU", "no disk tier"])
def test_without_images_an_engine_is_killed(reason: str) -> None:
    model = replace(MODEL, tiers=(Tier.NONE,)) if reason == "no disk tier" else MODEL
    holding = replace(RUNNING, can_dump=reason != "no CRIU")
    assert leaving(model, holding, keep_cache=True) == ("kill",)
    assert tier_after("kill") is Tier.NONE
    assert not makes_golden(model, holding)
    assert not survives(model, holding)


@pytest.mark.parametrize("mechanism", ["checkpoint", "lean", "sleep", "deep_sleep"])
def test_with_room_in_host_memory_the_chosen_mechanism_takes_it_there(
    mechanism: Mechanism,
) -> None:
    assert leaving(ON_GPU, MOVABLE, to=Tier.HOST, mechanism=mechanism) == (mechanism,)
    assert tier_after(mechanism) is Tier.HOST  # type: ignore[arg-type]


def test_without_room_in_host_memory_no_mechanism_takes_it_there() -> None:
    assert leaving(ON_GPU, MOVABLE, to=Tier.DISK, mechanism="checkpoint") == ("live", "kill")


def test_a_restart_that_is_cheapest_uses_the_golden_image() -> None:
    golden = replace(MOVABLE, golden=True)
    assert leaving(ON_GPU, golden, to=Tier.HOST, mechanism="restart") == ("discard",)


def test_requests_in_flight_wait_for_host_memory_rather_than_be_lost() -> None:
    only_host = replace(ON_GPU, tiers=(Tier.HOST,))
    busy = replace(MOVABLE, can_dump=False)
    assert leaving(only_host, busy, to=Tier.DISK, mechanism="checkpoint", in_flight=1) == ()
    assert survives(only_host, busy)
    assert not survives(only_host, replace(busy, can_suspend=False))


def test_a_suspended_engine_goes_further_down_with_its_requests() -> None:
    parked = replace(MOVABLE, held=Held.SUSPENDED, golden=True)
    assert leaving(ON_GPU, parked, in_flight=1) == ("live",)
    assert leaving(ON_GPU, parked, in_flight=0) == ("discard",)


@pytest.mark.parametrize("in_flight", [0, 1])
def test_an_engine_that_was_attached_to_is_never_ended(in_flight: int) -> None:
    attached = replace(MOVABLE, owned=False, can_dump=False)
    assert leaving(ON_GPU, attached, to=Tier.DISK, in_flight=in_flight) == ()
    ways = leaving(ON_GPU, attached, to=Tier.HOST, mechanism="checkpoint", in_flight=in_flight)
    assert ways == ("checkpoint",)


def test_a_golden_image_is_made_once() -> None:
    assert makes_golden(MODEL, NOTHING)
    assert not makes_golden(MODEL, replace(NOTHING, golden=True))
    assert tier_after("live") is tier_after("discard") is Tier.DISK
