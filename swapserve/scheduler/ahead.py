"""Who is worth bringing nearer before anybody asks, and how near. Pure.

First what is configured (`preload`), once after the start. Then, with `look_ahead`, engines of
which it is likely that they are asked for before somebody else wants the room: the seconds that
their requests would save, times that chance, have to outweigh the cost of having moved them in
vain. From disk an engine with a host tier may also come half the way.

Only what is free is used, only while nobody waits, and one move at a time. Who was brought nearer
is not brought there again before it was really asked for: else an engine that is never asked for
would come and be sent away for ever.
"""

import math
from dataclasses import dataclass

from swapserve.ids import DeviceName
from swapserve.scheduler.board import Board
from swapserve.scheduler.demand import AWAY, MOVING, Engine
from swapserve.scheduler.policies.base import View
from swapserve.states import EngineState, Tier

HORIZON_S = 3600.0
"""What comes later than that is not prepared for."""
VAIN = 0.25
"""Weight of a second of moving in vain, by that of a second that a request waits less: it takes
processor, bus and disk from others. What somebody has to wait for it counts in full."""
MARGIN = 2.0
"""What is gained has to be so many times what it costs: chances and rates are guesses."""
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
    again = math.inf
    for engine in filter(_may_come, engines):
        tiers = _room_for(board, engine)
        rate = view.knowledge.arrivals.rate(engine.name, view.now) if tiers else 0.0
        if not rate:
            continue  # nobody has ever asked for it
        rivals = _rivals(board, view, engine)
        gains = {tier: _gain(view, engine, tier, rivals) for tier in tiers}
        better = [tier for tier, gain in gains.items() if gain > 0.0]
        if better and engine.ahead_from <= view.now:
            found.append((-max(gains.values()), engine.index, engine, better))
        look_s = min(LOOK_MAX_S, LOOK_SHARE / rate, LOOKS * _stays_s(engine, rivals))
        again = min(again, max(view.now + max(look_s, LOOK_MIN_S), engine.ahead_from))
    found.sort(key=lambda one: one[:2])
    best = [(engine, tier) for _, _, engine, better in found for tier in better]
    return best, None if again == math.inf else again


def _somebody_moves(engines: list[Engine]) -> bool:
    """Return whether anybody waits, or anything is under way: its end is looked at anyhow."""
    return any(
        engine.state in MOVING
        or engine.state is EngineState.DRAINING
        or (engine.state in AWAY and engine.calling() is not None)
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
    found = []
    if least < _NEARNESS[Tier.DEVICE] and _fits(board, engine):
        found.append(Tier.DEVICE)
    if least < _NEARNESS[Tier.HOST] and engine.tier is Tier.DISK and not engine.dumped:
        ram = engine.spec.ram
        left = -1 if ram is None else board.ledger.room(ram) - board.host_size(engine)
        if ram is not None and left >= 0:
            those = (one for one in board.by_device[ram] if _may_leave_to(ram, one))
            if left >= sum(map(board.host_size, those)):
                found.append(Tier.HOST)
    return found


def _fits(board: Board, engine: Engine, other: Engine | None = None) -> bool:
    """Return whether its devices have room for it, beside another one if that is given."""
    for device in engine.spec.devices:
        need = engine.need(device)
        if need is None:
            return False
        if other is not None and device in other.spec.devices:
            need += other.need(device) or 0
        if board.ledger.room(device) + board.held(engine, device) < need:
            return False
    return True


def _may_leave_to(ram: DeviceName, engine: Engine) -> bool:
    """Return whether it is on its devices and rests there when it leaves: its place stays free.

    Else it would have to go to disk, in the middle of its requests, for one that nobody wants.
    """
    return engine.spec.ram == ram and engine.state is EngineState.READY


@dataclass(frozen=True, slots=True)
class _Rivals:
    """Requests per second for other engines that are away."""

    waiting: float
    """They would have to wait for its move."""
    pushing: float
    """They would have to make it leave."""


def _rivals(board: Board, view: View, engine: Engine) -> _Rivals:
    waiting = pushing = 0.0
    seen = {engine.index}
    for device in engine.spec.devices:
        for other in board.by_device[device]:
            if other.index in seen or other.state not in AWAY or device not in other.spec.devices:
                continue
            seen.add(other.index)
            rate = view.knowledge.arrivals.rate(other.name, view.now)
            if device in board.exclusive:
                waiting += rate
            if not _fits(board, other, engine):
                pushing += rate
    return _Rivals(waiting, pushing)


def _stays_s(engine: Engine, rivals: _Rivals) -> float:
    """Return for how long it is expected to be left on its devices."""
    stays_s = HORIZON_S if engine.spec.ttl_s is None else min(HORIZON_S, engine.spec.ttl_s)
    return min(stays_s, 1.0 / rivals.pushing) if rivals.pushing else stays_s


def _gain(view: View, engine: Engine, tier: Tier, rivals: _Rivals) -> float:
    """Return the seconds that requests are expected to wait less, all in all, with a margin."""
    costs, name = view.knowledge.costs, engine.name
    saved_s = costs.in_s(name, engine.tier, busy=False)
    if tier is Tier.HOST:
        saved_s -= costs.in_s(name, Tier.HOST, busy=False)
        # What rests there gives way to everybody at once, and its move is in nobody's way.
        stays_s, back_s, held_up_s = HORIZON_S, 0.0, 0.0
    else:
        stays_s = _stays_s(engine, rivals)
        to = Tier.NONE if engine.spec.ram is None else Tier.HOST
        back_s = costs.out_s(name, to, busy=False) if rivals.pushing else 0.0
        held_up_s = -math.expm1(-rivals.waiting * saved_s) * saved_s / 2
    if stays_s <= saved_s:
        return 0.0  # it would hardly be there before somebody wants the room
    chance = view.knowledge.arrivals.chance(name, view.now, stays_s)
    vain_s = (1.0 - chance) * (VAIN * saved_s + back_s)
    return chance * saved_s - MARGIN * (vain_s + held_up_s)
