"""Who could leave to make room, on which terms, and whether waiting would help. Pure.

The policy says on which terms a resident engine leaves. That a broken one goes first, that a
departure which has just failed is not tried again at once, and everything about engines that are
off their devices already, is the same for every policy.

An engine in the host tier is a victim, too: what it parks makes room for others when it goes on
to disk. One that is wanted back, or pinned, is asked only if nobody else can help.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from swapserve.ids import DeviceName
from swapserve.messages import Footprint
from swapserve.scheduler.board import Board
from swapserve.scheduler.demand import BRINGING_IN, SERVING, Engine
from swapserve.scheduler.groups import uses
from swapserve.scheduler.policies.base import Leave, Wish
from swapserve.states import EngineState, Tier

_BROKEN, _SPARE, _RESIDENT, _WANTED = range(4)
"""Classes of victims; those of a lower one leave first."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine that could leave, what that would free on each device, and on which terms."""

    engine: Engine
    sizes: Footprint
    at: float
    cut_at: float
    rank: tuple[float, ...]
    to_disk: bool = False
    """It is off its devices already, and it is its place in RAM that is wanted."""


def candidates(
    board: Board, taken: Container[int], short: Footprint, wish: Wish
) -> list[Candidate]:
    """Return who holds bytes of what is short and may be asked to leave, in no special order.

    Args:
        board: all that is known.
        taken: engines that are victims of an earlier wish already, by index.
        short: bytes missing on each device.
        wish: for whom; who is to come is never its own victim.
    """
    found: dict[int, Candidate] = {}
    for device in short:
        for victim in board.by_device[device]:
            known = victim.index in taken or victim.index in found
            if known or victim is wish.engine or not _may_be_asked(board, victim):
                continue
            candidate = _candidate(board, victim, short, wish)
            if candidate is not None:
                found[victim.index] = candidate
    return list(found.values())


def spared(victim: Engine) -> bool:
    """Return whether the engine leaves its place only if nothing else can make room."""
    return victim.parked and victim.wanted


def choose(found: Sequence[Candidate], short: Footprint, now: float) -> list[Candidate]:
    """Return who leaves to free so many bytes on each device; empty if not possible now.

    Best victims come first. Nobody leaves who is not needed: an early victim is dropped when
    later ones free enough.
    """
    chosen: list[Candidate] = []
    left = dict(short)
    for candidate in sorted(found, key=lambda one: one.rank):
        if max(left.values()) <= 0:
            break
        if candidate.at <= now:
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


def _may_be_asked(board: Board, victim: Engine) -> bool:
    if victim.outs:
        return False
    if victim.state is EngineState.SWAPPED_OUT:
        return True
    if victim.pinned:
        return False
    if victim.state is EngineState.FAILED:
        # Dead weight: a broken engine that may still hold bytes, and nothing worth keeping.
        return not victim.suspended
    return board.policy.swaps and victim.state in SERVING


def _candidate(board: Board, victim: Engine, short: Footprint, wish: Wish) -> Candidate | None:
    """Return what the departure would free; None if nothing that is short, or at a price."""
    if not any(board.held(victim, device) > 0 for device in short):
        return None
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
    terms = _terms(board, victim, wish)
    at = max(terms.at, victim.out_retry_at)
    return Candidate(victim, sizes, at, terms.cut_at, terms.rank, to_disk)


def _terms(board: Board, victim: Engine, wish: Wish) -> Leave:
    """Return from when the engine may leave for the wish, and in which order."""
    if victim.state is EngineState.FAILED:
        return Leave(0.0, 0.0, (_BROKEN,))
    if victim.parked:
        rank = _WANTED if spared(victim) else _SPARE
        return Leave(0.0, 0.0, (rank, _loss(board, victim), victim.idle_since, victim.index))
    if victim.ahead_to is Tier.DEVICE and victim.idle:
        return Leave(0.0, 0.0, (_SPARE, victim.ready_since, victim.index))
    terms = board.policy.leave(board.view, victim, wish)
    kept = victim.ready_since + victim.spec.min_resident_s
    if victim.idle:
        kept = max(kept, victim.guard_until)
    at = max(terms.at, min(kept, wish.since[0] + board.rules.max_wait_s))
    return Leave(at, max(at, terms.cut_at), (_RESIDENT, *terms.rank))


def _loss(board: Board, victim: Engine) -> float:
    """Return the seconds per second that its place in RAM is expected to save."""
    if victim.tier is not Tier.HOST:
        return 0.0
    costs, name = board.knowledge.costs, victim.name
    saved = costs.in_s(name, Tier.DISK, busy=False) - costs.in_s(name, Tier.HOST, busy=False)
    return max(0.0, saved) * board.knowledge.arrivals.rate(name, board.now)


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
