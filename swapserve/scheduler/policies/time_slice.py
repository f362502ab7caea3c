"""Exhaustive service, deepest queue next, with an age limit: few swaps, long waits. Pure."""

from typing import ClassVar

from swapserve.scheduler.demand import Engine
from swapserve.scheduler.policies.base import NEVER, Leave, View, Wish
from swapserve.scheduler.policies.tenure import over_age_at, usual_rank


class TimeSliceDrain:
    """An engine leaves when it has nothing left to do; then the deepest queue comes in.

    A wish that has waited for `max_wait` goes before all others, and what is in its way drains.
    Nobody is ever cut off in mid-request.
    """

    name: ClassVar[str] = "time-slice-drain"
    swaps: ClassVar[bool] = True
    bounded: ClassVar[bool] = False

    def urgency(self, view: View, wish: Wish) -> tuple[float, ...]:
        """Return: over-age wishes by age, then the others by the length of their queues."""
        if wish.engine is None or over_age_at(view, wish) <= view.now:
            return (0.0, wish.since[0])
        return (1.0, -float(len(wish.engine.waiting) + len(wish.engine.suspended)))

    def leave(self, view: View, victim: Engine, wish: Wish) -> Leave:
        """Return: at once without work, else when the wish is over-age; never in mid-request."""
        # One that is idle has no queue either. A device in debt cannot wait for that: its next
        # allocation would fail.
        at_once = victim.idle or wish.engine is None
        at = 0.0 if at_once else over_age_at(view, wish)
        return Leave(at, cut_at=NEVER, rank=usual_rank(victim, victim.idle_since))
