"""When a victim may go, which victims go, how long to pause after a failure. Pure.

The quantum runs from when an engine became ready, so a busy engine makes progress each time it
is brought in. An over-age waiter (older than `max_wait_s`) overrides it only once those who
called for the engine are done: otherwise two engines whose swaps take longer than `max_wait_s`
would evict each other for ever without one token in between. It also turns a drain into a
preemption.

An engine in the host tier is a victim like an idle one: what it parks makes room for others when
it goes on to disk. One that is wanted back, or pinned, is asked only if nobody else can help.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from swapserve.messages import Footprint, PolicySpec
from swapserve.scheduler.demand import Engine, Since
from swapserve.states import EngineState

MAX_BACKOFF_S = 60.0
REFUSALS_MAX = 5
"""So many bring-ins refused in a row end the patience of those who wait for the engine."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine that could leave, what that would free on each device, and from when it may."""

    engine: Engine
    sizes: Footprint
    from_time: float
    rank: tuple[int, float, int]
    """Lower leaves first."""
    to_disk: bool = False
    """It is off its devices already, and it is its place in RAM that is wanted."""


def backoff(policy: PolicySpec, failures: int) -> float:
    """Return the pause after the given number of failures in a row, in seconds."""
    return min(MAX_BACKOFF_S, policy.retry_backoff_s * 2.0 ** min(failures - 1, 30))


def over_age_at(policy: PolicySpec, since: Since) -> float:
    """Return when a wish of that age becomes over-age."""
    return since[0] + policy.max_wait_s


def victim_from(policy: PolicySpec, victim: Engine, since: Since) -> float:
    """Return from when the engine may leave for a wish of that age."""
    if victim.state is EngineState.FAILED or victim.parked:
        earliest = 0.0
    elif victim.idle:
        earliest = min(victim.guard_until, over_age_at(policy, since))
    else:
        earliest = victim.ready_since + policy.quantum_s
        if not victim.callers:
            earliest = min(earliest, over_age_at(policy, since))
    return max(earliest, victim.out_retry_at)


def victim_rank(victim: Engine) -> tuple[int, float, int]:
    """Order victims: dead weight, idle by least recent use, draining, busy longest, wanted."""
    if victim.state is EngineState.FAILED:
        return (0, 0.0, victim.index)
    if spared(victim):
        return (4, victim.idle_since, victim.index)
    if victim.idle:
        return (1, victim.idle_since, victim.index)
    if victim.state is EngineState.DRAINING:
        return (2, victim.ready_since, victim.index)
    return (3, victim.ready_since, victim.index)


def spared(victim: Engine) -> bool:
    """Return whether the engine leaves its place only if nothing else can make room."""
    return victim.parked and (victim.pinned or victim.calling() is not None)


def choose(candidates: Sequence[Candidate], short: Footprint, now: float) -> list[Candidate]:
    """Return who leaves to free so many bytes on each device; empty if not possible now.

    Best victims come first. Nobody leaves who is not needed: an early victim is dropped when
    later ones free enough.
    """
    chosen: list[Candidate] = []
    left = dict(short)
    for candidate in sorted(candidates, key=lambda one: one.rank):
        if max(left.values()) <= 0:
            break
        if candidate.from_time <= now:
            chosen.append(candidate)
            left = {device: size - candidate.sizes.get(device, 0) for device, size in left.items()}
    if max(left.values()) > 0:
        return []
    for candidate in reversed(tuple(chosen)):
        without = {device: size + candidate.sizes.get(device, 0) for device, size in left.items()}
        if max(without.values()) <= 0:
            chosen.remove(candidate)
            left = without
    return chosen


def preempts(policy: PolicySpec, since: Since, now: float) -> bool:
    """Return whether a busy victim that can be is swapped out in mid-request for such a wish."""
    return policy.busy == "preempt" or now >= over_age_at(policy, since)
