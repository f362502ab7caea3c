"""Who is worth bringing nearer before anybody asks. Pure."""

from swapserve.scheduler.board import Board
from swapserve.scheduler.demand import AWAY, Engine
from swapserve.scheduler.policies.base import View
from swapserve.states import Tier


def ahead(board: Board, view: View, group: int) -> tuple[list[tuple[Engine, Tier]], float | None]:
    """Return which engines to bring nearer and how near, best first, and when to look again."""
    del view
    for engine in board.by_group[group]:
        if engine.state not in AWAY:
            engine.preload = False
    return [(e, Tier.DEVICE) for e in board.by_group[group] if e.preload], None
