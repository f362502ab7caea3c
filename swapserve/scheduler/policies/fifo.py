"""First come, first served, never in mid-request: what most model swappers do. Pure."""

from typing import ClassVar

from swapserve.scheduler.demand import Engine
from swapserve.scheduler.policies.base import NEVER, Leave, View, Wish


class FifoDrain:
    """Wishes in order of arrival; the engine that came in first drains at once, and leaves.

    Used or not makes no difference to who leaves. Where several engines fit they stay together.
    """

    name: ClassVar[str] = "fifo-drain"
    swaps: ClassVar[bool] = True
    bounded: ClassVar[bool] = False

    def urgency(self, view: View, wish: Wish) -> tuple[float, ...]:
        """Return nothing: ties go by age, so the oldest wish comes first."""
        del view, wish
        return ()

    def leave(self, view: View, victim: Engine, wish: Wish) -> Leave:
        """Return: each drains at once, and none is ever cut off; resident longest goes first."""
        del view, wish
        return Leave(0.0, cut_at=NEVER, rank=(victim.ready_since, victim.index))
