"""What an actor is told, and whom it tells."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from swapserve.messages import Event
from swapserve.states import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the scheduler wants of the engine."""

    what: Literal["bring_in", "swap_out", "stop"]
    in_flight: int = 0
    to: Tier = Tier.DISK
    """For a swap out: the highest tier it may go to."""
    cause: str = "demand"


@dataclass(frozen=True, slots=True)
class Measure:
    """Time to look how much memory a resident engine takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """What the actor tells the front door and the scheduler; all synchronous."""

    post: Callable[[Event], None]
    engine_back: Callable[[], None]
    engine_gone: Callable[[], None]
