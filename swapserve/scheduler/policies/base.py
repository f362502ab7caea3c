"""What a policy is: the part of scheduling that is a matter of taste. Pure.

A policy is asked two questions, and answers them from what it is shown; it writes nothing:

- In which order are engines served that somebody wants and that are away? (`urgency`)
- From when may a resident engine be asked to leave for a wish, from when is it cut off in
  mid-request, and who goes first? (`leave`)

Everything else is the core's: bytes, turns on a GPU, who fits, whether requests survive, that a
drain is taken back when nobody needs it any more. So no policy can overcommit a device or lose a
request; the worst it can do is to let somebody wait. Both questions are asked anew whenever
something happens, so an answer needs no memory. A policy that needs some may keep its own, but
must stay deterministic: the same questions in the same order, the same answers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from swapserve.ids import DeviceName, EngineName
from swapserve.messages import Rules
from swapserve.scheduler.demand import Engine, Since
from swapserve.scheduler.knowledge import Knowledge
from swapserve.scheduler.overhead import Overhead
from swapserve.states import Tier

NEVER = float("inf")
LEAST_SHARE = 0.01
"""A smaller `overhead_share` counts as this: some overhead there must be."""


@dataclass(slots=True)
class View:
    """What a policy may look at; `now` is the monotonic time of the question."""

    rules: Rules
    knowledge: Knowledge
    engines: Mapping[EngineName, Engine]
    overhead: Mapping[DeviceName, Overhead]
    """The share of each device's time that swaps have taken lately."""
    round_s: Mapping[DeviceName, float] = field(default_factory=dict)
    """Of each device: what it takes to swap every engine in and out once that is wanted or busy."""
    below: Callable[[Engine], Tier] = field(default=lambda _: Tier.DISK)
    """The highest tier that has room now for all that an engine holds."""
    now: float = 0.0


@dataclass(frozen=True, slots=True)
class Wish:
    """Somebody wants bytes: an engine that is away and asked for, or a device in debt."""

    since: Since
    engine: Engine | None = None
    """Who is to come; None: measured use is beyond a device's size, and somebody has to leave."""


@dataclass(frozen=True, slots=True)
class Leave:
    """On which terms an engine leaves its devices for a wish."""

    at: float
    """From then on it may be asked: an idle one leaves, of a busy one nothing new is begun."""
    cut_at: float
    """From then on a busy one is swapped out in mid-request; `NEVER`: it is waited for."""
    rank: tuple[float, ...]
    """Lower leaves first."""


def share(view: View) -> float:
    """Return the share of a device's time that swaps may take; never none at all."""
    return max(view.rules.overhead_share, LEAST_SHARE)


def comes_in_s(view: View, engine: Engine) -> float:
    """Return the seconds that bringing an engine in from where it is now takes."""
    return view.knowledge.costs.in_s(engine.name, engine.tier, busy=bool(engine.suspended))


def swap_s(view: View, engine: Engine) -> float:
    """Return what it takes that somebody leaves for an engine that is away, and it comes."""
    # Who leaves is not known yet; its own departure is as good a guess as any.
    goes = view.knowledge.costs.out_s(engine.name, view.below(engine), busy=True)
    return goes + comes_in_s(view, engine)


def limit(view: View, wish: Wish) -> float:
    """Return by when the wish should be served whatever else is wanted.

    That is `max_wait` after it began. What only batch work waits for is not brought back more
    often than its swaps may take of the device, or they would take all of it.
    """
    patience = view.rules.max_wait_s
    if wish.engine is not None and not wish.engine.pressing:
        patience = max(patience, swap_s(view, wish.engine) / share(view))
    return wish.since[0] + patience


def last_call(view: View, wish: Wish) -> float:
    """Return until when the wish can wait and still be served by its limit."""
    swap = 0.0 if wish.engine is None else swap_s(view, wish.engine)
    return limit(view, wish) - swap


class Policy(Protocol):
    """The interface. Implementations are made without arguments, one for each core."""

    name: ClassVar[str]
    """What an operator writes in `scheduling.policy`."""
    swaps: ClassVar[bool]
    """Whether engines leave for others at all."""
    bounded: ClassVar[bool]
    """Whether nobody waits beyond `Rules.max_wait_s` where the swaps' own time allows it."""

    def urgency(self, view: View, wish: Wish) -> tuple[float, ...]:
        """Return where the wish comes in the order; lower is served first, ties by age."""

    def leave(self, view: View, victim: Engine, wish: Wish) -> Leave:
        """Return on which terms the victim, resident and unpinned, leaves for the wish."""
