"""How long a resident engine stays, and in which order several leave: what policies share. Pure.

Nothing here is binding; a policy takes what it wants.
"""

from swapserve.scheduler.demand import Engine
from swapserve.scheduler.policies.base import View, Wish
from swapserve.states import EngineState

QUANTUM_S = 10.0
"""Where `Rules.quantum_s` says nothing and a policy does not derive it from costs."""


def over_age_at(view: View, wish: Wish) -> float:
    """Return when the wish will have waited for `max_wait`."""
    return wish.since[0] + view.rules.max_wait_s


def quantum_ends(view: View, victim: Engine, wish: Wish, quantum_s: float) -> float:
    """Return from when a busy victim may be cut off that runs for so many seconds at a time.

    A wish that has waited for `max_wait` ends the quantum, but only once those for whom the
    engine was brought in are done: otherwise two engines whose swaps take longer than `max_wait`
    would evict each other for ever without one token in between.
    """
    ends = victim.ready_since + quantum_s
    return ends if victim.callers else min(ends, over_age_at(view, wish))


def usual_rank(victim: Engine, idle_order: float) -> tuple[float, ...]:
    """Order victims: idle ones by the given figure, then draining ones, then busy since longest.

    One that drains already comes before others that are busy, so a drain does not move on from
    engine to engine.
    """
    if victim.idle:
        return (0.0, idle_order, victim.index)
    if victim.state is EngineState.DRAINING:
        return (1.0, victim.ready_since, victim.index)
    return (2.0, victim.ready_since, victim.index)
