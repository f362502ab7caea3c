"""Choose the way an engine comes in or leaves. Pure."""

from collections.abc import Sequence
from typing import Literal

from swapserve.config.recipes import Mechanism
from swapserve.config.schema import ModelConfig
from swapserve.keeper.protocol import Held, Holding, ImageKind
from swapserve.states import Tier

WayIn = Literal["adopt", "resume", "wake", "live", "golden", "cold"]
WayOut = Literal["checkpoint", "lean", "sleep", "deep_sleep", "live", "discard", "kill"]

RESTING_WAYS: frozenset[WayOut] = frozenset({"sleep", "deep_sleep"})
"""Ways after which the engine's process runs on, and keeps a little of its devices."""
KEEPS_CACHE: frozenset[WayOut] = frozenset({"checkpoint", "live"})
"""Ways after which what it has computed of prompts is still there when it comes back."""


def ways_in(model: ModelConfig, holding: Holding, *, resting: bool = False) -> Sequence[WayIn]:
    """Return the ways in, the best first; each later one is for when those before it failed.

    `adopt`: its process is there. `resume`: so it is, with its GPU state in host memory. `wake`: so
    it is, asleep by itself. `live`: the image of a running engine, used once. `golden`: the image
    of a warmed, idle engine. `cold`: a start from nothing.
    """
    ways: list[WayIn] = []
    match holding.held:
        case Held.RUNNING if not resting:
            # Without its golden image: an engine that a new daemon finds broken may have been
            # broken by what is in that image.
            return ("adopt", "cold")
        case Held.RUNNING:
            ways.append("wake")
        case Held.SUSPENDED:
            ways.append("resume")
        case Held.LIVE_IMAGE:
            ways.append("live")
        case Held.NOTHING:
            pass
    if holding.golden and model.golden:
        ways.append("golden")
    return (*ways, "cold")


def way_up(model: ModelConfig, holding: Holding) -> ImageKind | None:
    """Return the image that brings its GPU state to host memory; None if there is none."""
    if not model.gpus:
        return None
    if holding.held is Held.LIVE_IMAGE:
        return "live"
    usable = holding.held is Held.NOTHING and holding.golden and model.golden
    return "golden" if usable else None


def ways_out(
    model: ModelConfig,
    holding: Holding,
    *,
    to: Tier,
    mechanism: Mechanism | None,
    in_flight: int,
    keep_cache: bool,
) -> Sequence[WayOut]:
    """Return the ways out, the best first; a later one is for when there is no room for an image.

    `checkpoint`: its GPU state goes to host memory; `lean`: without its cache; `sleep`,
    `deep_sleep`: by its own means. `live`: dump everything, requests in flight and cache included.
    `discard`: kill it, because its golden image is as good. `kill`: nothing of it can be kept, it
    will start cold. Neither of the two for an engine that still owes answers and could keep them.

    Args:
        model: its configuration.
        holding: what there is of it.
        to: the highest tier it may go to: HOST only if host memory was reserved for it.
        mechanism: how an engine on a GPU goes to the host tier; None without GPU.
        in_flight: requests that its state has to outlive.
        keep_cache: whether its cache is worth a copy.

    Returns:
        Empty if it cannot leave now without losing what is in flight.
    """
    disk = to_disk(model, holding)
    if to is Tier.HOST and mechanism is not None and mechanism != "restart":
        return (mechanism,)
    if not holding.owned:
        return ()
    if in_flight:
        return ("live",) if disk else () if _could_wait(model, holding) else ("kill",)
    if not disk:
        return ("kill",)
    golden = holding.golden and model.golden
    last: WayOut = "discard" if golden else "kill"
    if golden and not keep_cache:
        return ("discard",)
    return ("live", last)


def _could_wait(model: ModelConfig, holding: Holding) -> bool:
    """Whether it could leave with its requests if there only were room in host memory."""
    return holding.can_suspend and Tier.HOST in model.tiers


def tier_after(way: WayOut) -> Tier:
    """Return where the engine's state rests after leaving that way."""
    match way:
        case "checkpoint" | "lean" | "sleep" | "deep_sleep":
            return Tier.HOST
        case "live" | "discard":
            return Tier.DISK
        case "kill":
            return Tier.NONE


def tier_failed(holding: Holding) -> Tier:
    """Return the tier of an engine that has failed: what still is there holds its memory."""
    return Tier.DEVICE if holding.held in {Held.RUNNING, Held.SUSPENDED} else Tier.NONE


def tier_of_images(model: ModelConfig, holding: Holding) -> Tier:
    """Return the tier of an engine that has no process."""
    golden = holding.golden and model.golden
    return Tier.DISK if golden or holding.held is Held.LIVE_IMAGE else Tier.NONE


def survives(model: ModelConfig, holding: Holding) -> bool:
    """Whether it can leave with requests in flight and go on with them later."""
    return to_disk(model, holding) or _could_wait(model, holding)


def to_disk(model: ModelConfig, holding: Holding) -> bool:
    """Whether images of it are possible and wanted."""
    return holding.can_dump and Tier.DISK in model.tiers


def makes_golden(model: ModelConfig, holding: Holding) -> bool:
    """Whether a cold start shall end with a golden image."""
    return model.golden and to_disk(model, holding) and not holding.golden
