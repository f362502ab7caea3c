"""What is resident stays: the upper bound for comparisons, where everything fits. Pure."""

from typing import ClassVar

from swapserve.scheduler.demand import Engine
from swapserve.scheduler.policies.base import NEVER, Leave, View, Wish


class Static:
    """Nobody leaves for another; engines come in oldest wish first while there is room.

    An operator's commands work as always.
    """

    name: ClassVar[str] = "static"
    swaps: ClassVar[bool] = False
    bounded: ClassVar[bool] = False

    def urgency(self, view: View, wish: Wish) -> tuple[float, ...]:
        """Return nothing: ties go by age, so the oldest wish comes first."""
        del view, wish
        return ()

    def leave(self, view: View, victim: Engine, wish: Wish) -> Leave:
        """Return: never."""
        del view, wish
        return Leave(NEVER, cut_at=NEVER, rank=(victim.index,))
