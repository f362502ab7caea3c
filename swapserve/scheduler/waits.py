"""How long a new request would wait for its engine, as expected now. Pure.

An estimate for people and clients (`Retry-After`, deadlines), made when it is asked for: nothing
is decided by it but whether a request is let in.
"""

from dataclasses import dataclass
from itertools import islice
from math import inf

from swapserve.ids import DeviceName
from swapserve.scheduler.board import Board
from swapserve.scheduler.demand import AWAY, BRINGING_IN, LEAVING, SERVING, Engine, Since
from swapserve.scheduler.needs import needed
from swapserve.scheduler.policies.base import Wish
from swapserve.states import EngineState, Priority, Tier

LOOKED_AT = 16
"""Running requests of an engine that are looked at; more would not change the estimate much."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request stands, or would stand, among those that wait."""

    priority: Priority = Priority.BATCH
    since: Since = (inf, 0)


LAST = Place()
"""Behind everybody."""


def predicted_wait(board: Board, engine: Engine, place: Place = LAST) -> float:
    """Return the seconds until a request at that place would be granted."""
    return _until_there(board, engine) + _for_slot(board, engine, place)


def _for_slot(board: Board, engine: Engine, place: Place) -> float:
    """Return how long it waits for one of the engine's slots once the engine is there."""
    slots = engine.spec.slots
    if slots is None:
        return 0.0
    mine = (place.priority, place.since)
    before = [lease for lease in engine.waiting if (lease.ask.priority, lease.since) < mine]
    inside = len(engine.active) + len(engine.suspended)
    if inside + len(before) < slots:
        return 0.0
    service, now = board.knowledge.service, board.now
    running = [
        service.remaining(engine.name, lease.ask, lease.ran(now)).p50_s
        for lease in islice((*engine.active.values(), *engine.suspended.values()), LOOKED_AT)
    ]
    waiting = [
        service.forecast(engine.name, lease.ask).p50_s for lease in islice(before, LOOKED_AT)
    ]
    return (_mean(running) * inside + _mean(waiting) * len(before)) / slots


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _until_there(board: Board, engine: Engine) -> float:
    """Return the seconds until the engine serves, brought in for a wish that begins now."""
    costs = board.knowledge.costs
    busy = bool(engine.suspended)
    if engine.state is EngineState.READY:
        return 0.0
    if engine.state is EngineState.DRAINING:  # it leaves for another one, and has to come back
        leaves = _drained_in(board, engine)
        leaves += costs.out_s(engine.name, _below(engine), busy=False)
        return leaves + costs.in_s(engine.name, _below(engine), busy=False)
    passed = board.now - engine.moving_since
    if engine.state in BRINGING_IN and not engine.promoting:
        return max(0.0, costs.in_s(engine.name, engine.tier, busy=busy) - passed)
    if engine.state in LEAVING:
        leaves = max(0.0, costs.out_s(engine.name, engine.bound_for, busy=busy) - passed)
        return leaves + costs.in_s(engine.name, engine.bound_for, busy=busy)
    pause = max(0.0, engine.retry_at - board.now, engine.hold_until - board.now)
    comes = costs.in_s(engine.name, engine.tier, busy=busy)
    sizes = needed(board, engine)
    room = max(_room_in(board, engine, device, size) for device, size in sizes.items())
    return pause + room + comes


def _room_in(board: Board, engine: Engine, device: DeviceName, size: int) -> float:
    """Return the seconds until the device has room for the engine."""
    ahead = _ahead_of(board, engine, device)
    if board.ledger.room(device) + board.held(engine, device) >= size and not ahead:
        return 0.0
    releases = sorted(
        (_released_in(board, engine, other), board.held(other, device))
        for other in board.by_device[device]
        if other is not engine and _leaves(board, other)
    )
    missing = size - board.ledger.room(device) - board.held(engine, device)
    wait = 0.0
    for seconds, freed in releases:
        if missing <= 0:
            break
        wait = max(wait, seconds)
        missing -= freed
    if missing > 0:  # nobody leaves who could make room
        wait = board.rules.queue_timeout_s
    return wait + ahead


def _ahead_of(board: Board, engine: Engine, device: DeviceName) -> float:
    """Return the seconds that wishes take on the device that are served before this one."""
    costs, mine = board.knowledge.costs, _turn(board, engine)
    total = 0.0
    for other in board.by_device[device]:
        if other is engine or other.state not in AWAY:
            continue
        theirs = _turn(board, other)
        if theirs is None or (mine is not None and mine < theirs):
            continue
        busy = bool(other.suspended)
        total += costs.in_s(other.name, other.tier, busy=busy)
        total += costs.out_s(other.name, _below(other), busy=False)
    return total


def _turn(board: Board, engine: Engine) -> tuple[tuple[float, ...], Since] | None:
    """Return where the engine's wish comes in the order; None if nobody wants it as yet."""
    since = engine.calling()
    if since is None:
        return None
    return board.policy.urgency(board.view, Wish(since, engine)), since


def _leaves(board: Board, other: Engine) -> bool:
    """Return whether the engine is on its devices and gives them up, sooner or later."""
    if other.state in LEAVING | {EngineState.SWAPPED_OUT, EngineState.FAILED}:
        return True  # what it still holds, here or in RAM, can go further down
    return board.policy.swaps and not other.pinned and other.state in SERVING | BRINGING_IN


def _released_in(board: Board, engine: Engine, victim: Engine) -> float:
    """Return the seconds until the victim is off its devices, if this wish asks for them."""
    costs, now = board.knowledge.costs, board.now
    if victim.state in LEAVING:
        cost = costs.out_s(victim.name, victim.bound_for, busy=bool(victim.suspended))
        return max(0.0, cost - (now - victim.moving_since))
    if victim.state in AWAY:
        return costs.out_s(victim.name, Tier.DISK, busy=bool(victim.suspended))
    if victim.idle:
        comes = 0.0
        if victim.state in BRINGING_IN:  # for others, who have their turn first
            comes = costs.in_s(victim.name, victim.tier, busy=bool(victim.suspended))
        return comes + costs.out_s(victim.name, _below(victim), busy=False)
    terms = board.policy.leave(board.view, victim, Wish(engine.calling() or (now, 0), engine))
    drained = _drained_in(board, victim)
    cut = max(0.0, terms.cut_at - now)
    waits, cut_off = (drained, False) if drained <= cut else (cut, True)
    return waits + costs.out_s(victim.name, _below(victim), busy=cut_off)


def _drained_in(board: Board, engine: Engine) -> float:
    """Return the seconds until its running requests are done, if no other is begun."""
    service, now = board.knowledge.service, board.now
    leases = islice(engine.active.values(), LOOKED_AT)
    return max(
        (service.remaining(engine.name, lease.ask, lease.ran(now)).p50_s for lease in leases),
        default=0.0,
    )


def _below(engine: Engine) -> Tier:
    return Tier.DISK if engine.spec.ram is None else Tier.HOST
