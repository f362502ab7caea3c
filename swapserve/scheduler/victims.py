"""Who could leave to make room, what that would free, and whether waiting would help. Pure."""

from collections.abc import Container, Sequence

from swapserve.ids import DeviceName
from swapserve.messages import Footprint
from swapserve.scheduler.board import Board
from swapserve.scheduler.demand import BRINGING_IN, SERVING, Engine, Since
from swapserve.scheduler.groups import uses
from swapserve.scheduler.policy import Candidate, victim_from, victim_rank
from swapserve.states import EngineState, Tier


def candidates(
    board: Board, taken: Container[int], short: Footprint, since: Since, engine: Engine | None
) -> list[Candidate]:
    """Return who holds bytes of what is short and may be asked to leave, in no special order.

    Args:
        board: all that is known.
        taken: engines that are victims of an older wish already, by index.
        short: bytes missing on each device.
        since: age of the wish.
        engine: who is to come; never its own victim.
    """
    found: dict[int, Candidate] = {}
    for device in short:
        for victim in board.by_device[device]:
            known = victim.index in taken or victim.index in found
            if known or victim is engine or not _may_be_asked(victim):
                continue
            candidate = _candidate(board, victim, short, since)
            if candidate is not None:
                found[victim.index] = candidate
    return list(found.values())


def _may_be_asked(victim: Engine) -> bool:
    if victim.outs:
        return False
    if victim.state is EngineState.SWAPPED_OUT:
        return True
    if victim.pinned:
        return False
    if victim.state is EngineState.FAILED:
        # Dead weight: a broken engine that may still hold bytes, and nothing worth keeping.
        return not victim.suspended
    return victim.state in SERVING


def _candidate(board: Board, victim: Engine, short: Footprint, since: Since) -> Candidate | None:
    """Return what the departure would free; None if nothing that is short, or at a price."""
    ram = victim.spec.ram
    to_disk = victim.parked and ram in short
    if victim.parked and victim.suspended and not board.survives(victim, to_disk=to_disk):
        return None  # its requests would be lost
    stays = victim.parked and not to_disk and board.tier_below(victim) is Tier.HOST
    sizes = {
        device: board.held(victim, device)
        for device in uses(victim.spec)
        if device != ram or not stays
    }
    if not any(sizes.get(device, 0) > 0 for device in short):
        return None
    earliest = victim_from(board.policy, victim, since)
    return Candidate(victim, sizes, earliest, victim_rank(victim), to_disk)


def hopeful(board: Board, those: Sequence[Candidate], short: Footprint) -> bool:
    """Return whether time alone will let enough engines leave."""
    able = [one for one in those if one.engine.out_retry_at <= board.now]
    return all(
        sum(one.sizes.get(device, 0) for one in able) + _coming(board, device) >= size
        for device, size in short.items()
    )


def _coming(board: Board, device: DeviceName) -> int:
    """Return bytes of engines that cannot be asked yet, but will serve or go on by themselves."""
    return sum(_later(board, other, device) for other in board.by_device[device])


def _later(board: Board, other: Engine, device: DeviceName) -> int:
    if device == other.spec.ram:  # its requests cannot go on to disk, so they will go back
        stuck = other.state is EngineState.SWAPPED_OUT and other.suspended and not other.can_dump
        return board.held(other, device) if stuck else 0
    comes = other.state in BRINGING_IN and not other.pinned
    return board.held(other, device) if comes else 0
