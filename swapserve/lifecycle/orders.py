"""What an actor is told, and whom it tells."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from swapserve.messages import BringIn, Event, SwapOut
from swapserve.states import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the scheduler wants of the engine."""

    what: Literal["bring_in", "swap_out", "stop"]
    in_flight: int = 0
    to: Tier = Tier.DEVICE
    """Bring in: DEVICE, or HOST to leave it suspended. Swap out: the highest tier it may go to."""
    cache_s: float = 0.0
    """For a swap out: seconds of prefill that its cache is expected to save, if it is kept."""
    cause: str = "demand"


def coming(effect: BringIn) -> Order:
    """Return the order to bring an engine in, as the scheduler has worded it."""
    return Order(what="bring_in", to=effect.to, cause=effect.cause)


def leaving(effect: SwapOut) -> Order:
    """Return the order of a swap out, as the scheduler has worded it."""
    return Order(
        what="swap_out",
        in_flight=effect.in_flight,
        to=effect.to,
        cache_s=effect.cache_s,
        cause=effect.cause,
    )


@dataclass(frozen=True, slots=True)
class Measure:
    """Time to look how much memory a resident engine takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """What the actor tells the front door and the scheduler; all synchronous."""

    post: Callable[[Event], None]
    engine_back: Callable[[], None]
    engine_gone: Callable[[], None]
