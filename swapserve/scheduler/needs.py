"""How many bytes an engine needs on each of its devices, and whether it can ever get them. Pure."""

from swapserve.errors import CapacityError
from swapserve.ids import DeviceName
from swapserve.messages import Footprint
from swapserve.scheduler.board import Board
from swapserve.scheduler.demand import BRINGING_IN, LEAVING, Engine
from swapserve.states import EngineState

_ELSEWHERE = LEAVING | {EngineState.SWAPPED_OUT}
"""A pin keeps an engine on its devices; what it holds when it is off them can be moved."""


def available(board: Board, engine: Engine, device: DeviceName) -> int:
    """Return how many bytes the device could offer it if every unpinned engine left."""
    pinned = sum(
        board.held(other, device) - board.frees(other, device)
        for other in board.by_device[device]
        if other.pinned
        and other is not engine
        and other.state not in _ELSEWHERE
        # A placeholder for bytes that nobody knows yet must not make others fail.
        and not (other.need(device) is None and other.state in BRINGING_IN)
    )
    return max(0, board.ledger.capacity(device) - pinned)


def needed(board: Board, engine: Engine) -> Footprint:
    """Return the bytes to promise it: an unknown footprint takes all that is not pinned."""
    return {device: _needed(board, engine, device) for device in engine.spec.devices}


def _needed(board: Board, engine: Engine, device: DeviceName) -> int:
    need = engine.need(device)
    if need is None:
        return max(1, available(board, engine, device))
    if engine.suspended:
        # It ran here before, so it gets another chance with the device to itself.
        return min(need, board.ledger.capacity(device))
    return need


def capacity_error(board: Board, engine: Engine) -> CapacityError | None:
    """Return why the engine cannot fit whatever leaves, or None."""
    for device in engine.spec.devices:
        offered = available(board, engine, device)
        need = engine.need(device)
        wanted = max(1, offered) if need is None else need
        if wanted > offered:
            return CapacityError(engine.name, device, wanted, offered)
    return None
