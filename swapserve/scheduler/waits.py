"""How long a new request would wait for its engine, as expected now. Pure.

An estimate for people and clients (`Retry-After`, deadlines), made when it is asked for: nothing
is decided by it but whether a request is let in.
"""

from itertools import islice

from swapserve.ids import DeviceName
from swapserve.scheduler.board import Board
from swapserve.scheduler.demand import AWAY, BRINGING_IN, LEAVING, SERVING, Engine
from swapserve.scheduler.needs import needed
from swapserve.scheduler.policies.base import Wish
from swapserve.states import EngineState, Tier

LOOKED_AT = 16
"""Running requests of an engine that are looked at; more would not change the estimate much."""


def predicted_wait(board: Board, engine: Engine) -> float:
    """Return the seconds until a request that comes now would be granted."""
    return _until_there(board, engine) + _for_slot(board, engine)


def _for_slot(board: Board, engine: Engine) -> float:
    """Return how long it waits for one of the engine's slots once the engine is there."""
    slots = engine.spec.slots
    inside = len(engine.active) + len(engine.suspended) + len(engine.waiting)
    if slots is None or inside < slots:
        return 0.0
    service, now = board.knowledge.service, board.now
    running = [
        service.remaining(engine.name, lease.ask, lease.ran(now)).p50_s
        for lease in islice((*engine.active.values(), *engine.suspended.values()), LOOKED_AT)
    ]
    waiting = [
        service.forecast(engine.name, lease.ask).p50_s
        for lease in islice(engine.waiting, LOOKED_AT)
    ]
    work = _mean(running) * (inside - len(engine.waiting)) + _mean(waiting) * len(engine.waiting)
    return work / slots


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
        if other is not engine and other.state in SERVING | LEAVING and not other.pinned
    )
    missing = size - board.ledger.room(device) - board.held(engine, device)
    wait = 0.0
    for seconds, freed in releases:
        if missing <= 0:
            break
        wait = max(wait, seconds)
        missing -= freed
    return wait + ahead


def _ahead_of(board: Board, engine: Engine, device: DeviceName) -> float:
    """Return the seconds that older wishes take on the device before this one's turn."""
    costs, mine = board.knowledge.costs, engine.calling()
    total = 0.0
    for other in board.by_device[device]:
        since = other.calling()
        older = since is not None and (mine is None or since < mine)
        if other is engine or not older or other.state not in AWAY:
            continue
        busy = bool(other.suspended)
        total += costs.in_s(other.name, other.tier, busy=busy)
        total += costs.out_s(other.name, _below(other), busy=False)
    return total


def _released_in(board: Board, engine: Engine, victim: Engine) -> float:
    """Return the seconds until the victim is off its devices, if this wish asks for them."""
    costs, now = board.knowledge.costs, board.now
    if victim.state in LEAVING:
        cost = costs.out_s(victim.name, victim.bound_for, busy=bool(victim.suspended))
        return max(0.0, cost - (now - victim.moving_since))
    if victim.idle:
        return costs.out_s(victim.name, _below(victim), busy=False)
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
