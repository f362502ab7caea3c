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
    for engine, wish in wishes:
        waits.discard(engine.index)
        before = engine.left_for
        (held if before and before.index in waits else ordered).append((engine, wish))
        for one in tuple(held):
            if one[0].left_for is engine:
                held.remove(one)
                ordered.append(one)
    return ordered + held
