"""Victims by least recent or least frequent use; who waits is served oldest first. Pure."""

from typing import ClassVar

from swapserve.scheduler.demand import Engine
from swapserve.scheduler.policies.base import NEVER, Leave, View, Wish
from swapserve.scheduler.policies.tenure import QUANTUM_S, quantum_ends, usual_rank


class Lru:
    """Idle engines leave by least recent use; busy ones run for a quantum, then are cut off.

    The quantum is `Rules.quantum_s`, or ten seconds.
    """

    name: ClassVar[str] = "lru"
    swaps: ClassVar[bool] = True
    bounded: ClassVar[bool] = True

    def urgency(self, view: View, wish: Wish) -> tuple[float, ...]:
        """Return nothing: ties go by age, so the oldest wish comes first."""
        del view, wish
        return ()

    def leave(self, view: View, victim: Engine, wish: Wish) -> Leave:
        """Return: an idle one at once, a busy one after its quantum, in mid-request."""
        at = _leaves_at(view, victim, wish)
        return Leave(at, cut_at=at, rank=usual_rank(victim, victim.idle_since))


class Lfu:
    """As `Lru`, but idle engines leave by least frequent use.

    The frequency is the rate of arrivals as `knowledge` has it: from the last few arrivals and
    the gap since, so what was popular long ago does not stay for ever.
    """

    name: ClassVar[str] = "lfu"
    swaps: ClassVar[bool] = True
    bounded: ClassVar[bool] = True

    def urgency(self, view: View, wish: Wish) -> tuple[float, ...]:
        """Return nothing: ties go by age, so the oldest wish comes first."""
        del view, wish
        return ()

    def leave(self, view: View, victim: Engine, wish: Wish) -> Leave:
        """Return: an idle one at once, a busy one after its quantum, in mid-request."""
        at = _leaves_at(view, victim, wish)
        rate = view.knowledge.arrivals.rate(victim.name, view.now)
        return Leave(at, cut_at=at, rank=usual_rank(victim, rate))


class LruDrain:
    """Victims by least recent use; a busy one is waited for, from the first wish on."""

    name: ClassVar[str] = "lru-drain"
    swaps: ClassVar[bool] = True
    bounded: ClassVar[bool] = False

    def urgency(self, view: View, wish: Wish) -> tuple[float, ...]:
        """Return nothing: ties go by age, so the oldest wish comes first."""
        del view, wish
        return ()

    def leave(self, view: View, victim: Engine, wish: Wish) -> Leave:
        """Return: each drains at once, and none is ever cut off."""
        del view, wish
        return Leave(0.0, cut_at=NEVER, rank=usual_rank(victim, victim.idle_since))


def _leaves_at(view: View, victim: Engine, wish: Wish) -> float:
    if victim.idle:
        return 0.0
    quantum_s = QUANTUM_S if view.rules.quantum_s is None else view.rules.quantum_s
    return quantum_ends(view, victim, wish, quantum_s)
