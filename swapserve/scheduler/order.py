"""The order in which wishes are served, whatever the policy says of it. Pure."""

from swapserve.scheduler.demand import Engine
from swapserve.scheduler.policies.base import Wish


def hand_over(wishes: list[tuple[Engine, Wish]]) -> list[tuple[Engine, Wish]]:
    """Return the wishes with nobody before the one for whom it has left.

    A policy may find that who has just been sent away is the more urgent of the two: it would
    come and go for ever, and the other one never come.
    """
    waits = {engine.index for engine, _ in wishes}
    ordered: list[tuple[Engine, Wish]] = []
    held: list[tuple[Engine, Wish]] = []
    for one in wishes:
        before = one[0].left_for
        if before is not None and before.index in waits:
            held.append(one)
            continue
        free = [one]
        while free:
            now = free.pop(0)
            ordered.append(now)
            waits.discard(now[0].index)
            free += [other for other in held if other[0].left_for is now[0]]
            held = [other for other in held if other[0].left_for is not now[0]]
    return ordered + held
