"""Choose the way an engine comes in or leaves. Pure."""

from collections.abc import Sequence
from typing import Literal

from swapserve.config.schema import ModelConfig
from swapserve.keeper.protocol import Held, Holding
from swapserve.states import Tier

WayIn = Literal["adopt", "live", "golden", "cold"]
WayOut = Literal["live", "discard", "kill"]


def ways_in(model: ModelConfig, holding: Holding) -> Sequence[WayIn]:
    """Return the ways in, the best first; each later one is for when those before it failed.

    `adopt`: its process is there. `live`: the image of a running engine, used once. `golden`: the
    image of a warmed, idle engine. `cold`: a start from nothing.
    """
    if holding.held in {Held.RUNNING, Held.FROZEN}:
        return ("adopt", "cold")
    ways: list[WayIn] = []
    if holding.held is Held.LIVE_IMAGE:
        ways.append("live")
    if holding.golden and model.golden:
        ways.append("golden")
    return (*ways, "cold")


def ways_out(
    model: ModelConfig, holding: Holding, *, in_flight: int, keep_cache: bool
) -> Sequence[WayOut]:
    """Return the ways out, the best first; a later one is for when there is no room for an image.

    `live`: dump everything, requests in flight and cache included. `discard`: kill it, because
    its golden image is as good. `kill`: nothing of it can be kept, it will start cold; never for
    an engine that still owes answers and could be dumped.
    """
    disk = holding.can_dump and Tier.DISK in model.tiers
    if not disk:
        return ("kill",)
    if in_flight:
        return ("live",)
    golden = holding.golden and model.golden
    last: WayOut = "discard" if golden else "kill"
    if golden and not keep_cache:
        return ("discard",)
    return ("live", last)


def tier_after(way: WayOut) -> Tier:
    """Return where the engine's state rests after leaving that way."""
    return Tier.NONE if way == "kill" else Tier.DISK


def makes_golden(model: ModelConfig, holding: Holding) -> bool:
    """Whether a cold start shall end with a golden image."""
    return model.golden and holding.can_dump and Tier.DISK in model.tiers and not holding.golden
