"""Who is worth bringing nearer before anybody asks, and how near. Pure.

First what is configured (`preload`), once after the start. Then, with `look_ahead`, engines of
which it is likely that they are asked for before somebody else wants the room: the seconds that
their requests would save, times that chance, have to outweigh the cost of having moved them in
vain. From disk an engine with a host tier may also come half the way.

Only what is free is used, only while nobody waits, and one move at a time. Who was brought nearer
is not brought there again before it was really asked for: else an engine that is never asked for
would come and be sent away for ever.
"""

from collections.abc import Iterable
from math import expm1

from swapserve.ids import DeviceName
from swapserve.scheduler.board import Board
from swapserve.scheduler.demand import AWAY, MOVING, Engine
from swapserve.scheduler.needs import capacity_error, needed
from swapserve.scheduler.policies.base import View
from swapserve.states import EngineState, Tier

HORIZON_S = 3600.0
"""What comes later than that is not prepared for."""
VAIN = 0.25
"""Weight of a second of moving in vain, by that of a second that a request waits less: it costs
work, and sometimes delays who wants the room a moment later."""
LOOK_SHARE = 0.1
"""Look again after that share of the mean gap between an engine's requests,"""
LOOKS = 0.25
"""or of the time that it would stay,"""
LOOK_MIN_S, LOOK_MAX_S = 1.0, 60.0
"""within these bounds."""

_NEARNESS = {Tier.NONE: 0, Tier.DISK: 1, Tier.HOST: 2, Tier.DEVICE: 3}


def ahead(board: Board, view: View, group: int) -> tuple[list[tuple[Engine, Tier]], float | None]:
    """Return which engines to bring nearer and how near, best first, and when to look again.

    Whether there is room, also beside what others have claimed, is for the caller to see; of what
    is not configured at most one move is to be begun.
    """
    engines = board.by_group[group]
    for engine in engines:
        if engine.state not in AWAY:
            engine.preload = False
    configured = [(engine, Tier.DEVICE) for engine in engines if engine.preload]
    if configured or not (view.rules.look_ahead and board.policy.swaps) or _somebody_moves(engines):
        return configured, None
    found: list[tuple[float, int, Engine, list[Tier]]] = []
    again: float | None = None
    for engine in engines:
        if not _may_come(engine) or not (tiers := _room_for(board, engine)):
            continue
        look = _look_in_s(board, view, engine)
        if look is not None:
            again = look if again is None else min(again, look)
        gains = {tier: _gain(board, view, engine, tier) for tier in tiers}
        better = [tier for tier, gain in gains.items() if gain > 0.0]
        if better and engine.ahead_from <= view.now:
            found.append((-max(gains.values()), engine.index, engine, better))
    found.sort(key=lambda one: one[:2])
    best = [(engine, tier) for _, _, engine, better in found for tier in better]
    return best, None if again is None else view.now + again


def _somebody_moves(engines: list[Engine]) -> bool:
    """Return whether anybody waits, or anything is under way: its end is looked at anyhow."""
    return any(
        engine.state in MOVING
        or engine.state is EngineState.DRAINING
        or engine.calling() is not None
        for engine in engines
    )


def _may_come(engine: Engine) -> bool:
    """Return whether nothing speaks against bringing it nearer, now or before it is asked for."""
    return (
        engine.state in {EngineState.SWAPPED_OUT, EngineState.STOPPED}
        and not (engine.held or engine.unasked or engine.pinned or engine.queued)
        and not (engine.failures or engine.refusals)
        and engine.known
    )


def _room_for(board: Board, engine: Engine) -> list[Tier]:
    """Return where it could come that it has not come to in vain, the nearest first."""
    least = max(_NEARNESS[engine.tier], _NEARNESS[engine.ahead_to])
    room, found = board.ledger.room, []
    if least < _NEARNESS[Tier.DEVICE] and capacity_error(board, engine) is None:
        sizes = needed(board, engine)
        if all(room(device) + board.held(engine, device) >= sizes[device] for device in sizes):
            found.append(Tier.DEVICE)
    half_way = engine.tier is Tier.DISK and not engine.dumped and least < _NEARNESS[Tier.HOST]
    ram = engine.spec.ram if half_way else None
    if ram is not None:
        leaving = sum(
            board.host_size(one) for one in board.by_device[ram] if _may_leave_to(ram, one)
        )
        if room(ram) >= board.host_size(engine) + leaving:
            found.append(Tier.HOST)
    return found


def _may_leave_to(ram: DeviceName, engine: Engine) -> bool:
    """Return whether it is on its devices and rests there when it leaves: its place stays free.

    Else it would have to go to disk, in the middle of its requests, for one that nobody wants.
    """
    return engine.spec.ram == ram and engine.state is EngineState.READY


def _look_in_s(board: Board, view: View, engine: Engine) -> float | None:
    """Return in how many seconds to look at it again; None if nobody has ever asked for it."""
    rate = view.knowledge.arrivals.rate(engine.name, view.now)
    if not rate:
        return None
    most = min(
        LOOK_MAX_S, LOOK_SHARE / rate, LOOKS * _stays_s(engine, _rivals(board, view, engine)[1])
    )
    return max(LOOK_MIN_S, most, engine.ahead_from - view.now)


def _gain(board: Board, view: View, engine: Engine, tier: Tier) -> float:
    """Return the seconds that requests are expected to wait less, all in all."""
    knowledge, name = view.knowledge, engine.name
    saved_s = knowledge.costs.in_s(name, engine.tier, busy=False)
    if tier is Tier.HOST:
        saved_s -= knowledge.costs.in_s(name, Tier.HOST, busy=False)
        # What rests there gives way to everybody at once, and its move is in nobody's way.
        chance = knowledge.arrivals.chance(name, view.now, HORIZON_S)
        return chance * saved_s - (1.0 - chance) * VAIN * saved_s
    waiting, pushing = _rivals(board, view, engine)
    stays_s = _stays_s(engine, pushing)
    if stays_s <= saved_s:
        return 0.0  # it would hardly be there before somebody wants the room
    chance = knowledge.arrivals.chance(name, view.now, stays_s)
    to = Tier.NONE if engine.spec.ram is None else Tier.HOST
    back_s = knowledge.costs.out_s(name, to, busy=False) if pushing else 0.0
    held_up_s = -expm1(-waiting * saved_s) * saved_s / 2
    return chance * saved_s - (1.0 - chance) * (VAIN * saved_s + back_s) - held_up_s


def _rivals(board: Board, view: View, engine: Engine) -> tuple[float, float]:
    """Return requests per second that would wait for its move, or for it to leave again."""
    waiting = pushing = 0.0
    for other in board.by_group[engine.group]:
        if other is engine or other.state not in AWAY:
            continue
        shared = set(other.spec.devices).intersection(engine.spec.devices)
        if not shared:
            continue
        rate = view.knowledge.arrivals.rate(other.name, view.now)
        if not board.exclusive.isdisjoint(shared):
            waiting += rate
        if not _fit_both(board, engine, other, shared):
            pushing += rate
    return waiting, pushing


def _stays_s(engine: Engine, pushing: float) -> float:
    """Return for how long it is expected to be left there."""
    stays_s = HORIZON_S if engine.spec.ttl_s is None else min(HORIZON_S, engine.spec.ttl_s)
    return min(stays_s, 1.0 / pushing) if pushing else stays_s


def _fit_both(board: Board, engine: Engine, other: Engine, shared: Iterable[DeviceName]) -> bool:
    """Return whether the other one would find room beside it."""
    for device in shared:
        ours, theirs = engine.need(device) or 0, other.need(device)
        if theirs is None or board.ledger.room(device) < ours + theirs:
            return False
    return True
