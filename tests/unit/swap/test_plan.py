"""Which way an engine comes in and leaves."""

from dataclasses import replace

import pytest

from swapserve.config.recipes import Recipe
from swapserve.config.schema import ModelConfig
from swapserve.ids import DeviceName, EngineName
from swapserve.keeper.protocol import Held, Holding
from swapserve.states import Tier
from swapserve.swap.plan import makes_golden, tier_after, ways_in, ways_out

MODEL = ModelConfig(
    name=EngineName("a"),
    recipe=Recipe(name="generic", adapter="generic", argv=("a",)),
    device=DeviceName("host"),
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
        (replace(NOTHING, held=Held.FROZEN), ("adopt", "cold")),
    ],
)
def test_the_best_way_in_comes_first_and_a_cold_start_last(
    holding: Holding, ways: tuple[str, ...]
) -> None:
    assert tuple(ways_in(MODEL, holding)) == ways


def test_a_golden_image_is_not_used_when_it_is_not_wanted() -> None:
    model = replace(MODEL, golden=False)
    assert tuple(ways_in(model, replace(NOTHING, golden=True))) == ("cold",)


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
def test_requests_in_flight_are_always_kept_and_an_idle_engine_may_do_without_an_image(
    golden: bool, in_flight: int, keep_cache: bool, ways: tuple[str, ...]
) -> None:
    holding = replace(NOTHING, held=Held.RUNNING, golden=golden)
    assert tuple(ways_out(MODEL, holding, in_flight=in_flight, keep_cache=keep_cache)) == ways


@pytest.mark.parametrize("reason", ["no CRIU", "no disk tier"])
def test_without_images_an_engine_is_killed(reason: str) -> None:
    model = replace(MODEL, tiers=(Tier.NONE,)) if reason == "no disk tier" else MODEL
    holding = replace(NOTHING, held=Held.RUNNING, can_dump=reason != "no CRIU")
    assert tuple(ways_out(model, holding, in_flight=0, keep_cache=True)) == ("kill",)
    assert tier_after("kill") is Tier.NONE
    assert not makes_golden(model, holding)


def test_a_golden_image_is_made_once() -> None:
    assert makes_golden(MODEL, NOTHING)
    assert not makes_golden(MODEL, replace(NOTHING, golden=True))
    assert tier_after("live") is tier_after("discard") is Tier.DISK
