"""When a victim may go, which victims go, how long to pause after a failure. Pure.

The quantum runs from when an engine became ready, so a busy engine makes progress each time it
is brought in. An over-age waiter (older than `max_wait_s`) overrides it only once those who
called for the engine are done: otherwise two engines whose swaps take longer than `max_wait_s`
would evict each other for ever without one token in between. It also turns a drain into a
preemption.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from swapserve.messages import PolicySpec
from swapserve.scheduler.demand import Engine, Since
from swapserve.states import EngineState

MAX_BACKOFF_S = 60.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine that could leave, what that would free, and from when it may."""

    engine: Engine
    size: int
    from_time: float
    rank: tuple[int, float, int]
    """Lower leaves first."""


def backoff(policy: PolicySpec, failures: int) -> float:
    """Return the pause after the given number of failures in a row, in seconds."""
    return min(MAX_BACKOFF_S, policy.retry_backoff_s * 2.0 ** min(failures - 1, 30))


def over_age_at(policy: PolicySpec, since: Since) -> float:
    """Return when a wish of that age becomes over-age."""
    return since[0] + policy.max_wait_s


def victim_from(policy: PolicySpec, victim: Engine, since: Since) -> float:
    """Return from when the engine may leave for a wish of that age."""
    if victim.state is EngineState.FAILED:
        earliest = 0.0
    elif victim.idle:
        earliest = min(victim.guard_until, over_age_at(policy, since))
    else:
        earliest = victim.ready_since + policy.quantum_s
        if not victim.callers:
            earliest = min(earliest, over_age_at(policy, since))
    return max(earliest, victim.out_retry_at)


def victim_rank(victim: Engine) -> tuple[int, float, int]:
    """Order victims: dead weight, idle by least recent use, draining already, busy longest."""
    if victim.state is EngineState.FAILED:
        return (0, 0.0, victim.index)
    if victim.idle:
        return (1, victim.idle_since, victim.index)
    if victim.state is EngineState.DRAINING:
        return (2, victim.ready_since, victim.index)
    return (3, victim.ready_since, victim.index)


def choose(candidates: Sequence[Candidate], missing: int, now: float) -> list[Candidate]:
    """Return who leaves to free `missing` bytes, best victims first; empty if not possible now.

    Nobody leaves who is not needed: an early victim is dropped when a later one frees enough.
    """
    chosen: list[Candidate] = []
    total = 0
    for candidate in sorted(candidates, key=lambda one: one.rank):
        if total >= missing:
            break
        if candidate.from_time <= now:
            chosen.append(candidate)
            total += candidate.size
    if total < missing:
        return []
    for candidate in reversed(tuple(chosen)):
        if total - candidate.size >= missing:
            chosen.remove(candidate)
            total -= candidate.size
    return chosen


def preempts(policy: PolicySpec, victim: Engine, since: Since, now: float) -> bool:
    """Return whether a busy victim is swapped out in mid-request rather than waited for."""
    if not victim.can_preempt:
        return False
    return policy.busy == "preempt" or now >= over_age_at(policy, since)
