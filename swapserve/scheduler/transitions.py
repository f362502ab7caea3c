"""What the outcome of a transition, a crash or a measurement changes. Pure.

Bytes are given back only when they were seen free: by `EngineLeft`, by `EngineExited` of an engine
at rest, or by a `TransitionFailed` that ends on another tier than the device. RAM that keeps the
state in the host tier is given back when the engine serves again: until then the state is in both
places, and a bring-in that was refused leaves it where it was. An engine that exits in the middle
of a transition loses its leases at once; its bytes follow with the transition's own answer, which
always comes.
"""

from swapserve.errors import CudaError, DeviceBusy, EngineUnavailable, IllegalTransition
from swapserve.ids import DeviceName
from swapserve.messages import (
    EngineExited,
    EngineLeft,
    EngineReady,
    EngineSeen,
    Footprint,
    FootprintMeasured,
    TransitionFailed,
)
from swapserve.scheduler import commands
from swapserve.scheduler.board import Board
from swapserve.scheduler.demand import BRINGING_IN, LEAVING, MOVING, SERVING, Engine
from swapserve.scheduler.failures import fail_in, fail_out, forgive, refuse_in
from swapserve.scheduler.groups import uses
from swapserve.states import EngineState, Tier

RESTING = frozenset(
    {EngineState.STOPPED, EngineState.READY, EngineState.SWAPPED_OUT, EngineState.FAILED}
)


def seen(board: Board, event: EngineSeen) -> None:
    """Take in where an engine is as the daemon starts."""
    engine = board.engines[event.engine]
    draining = event.state is EngineState.DRAINING
    engine.state = EngineState.READY if draining else event.state
    engine.tier = event.tier
    engine.can_preempt = event.can_preempt
    engine.can_dump = event.can_dump
    engine.ready_since = engine.idle_since = board.now
    engine.moves_on = board.exclusive.intersection(engine.spec.devices)
    _measure(board, engine, event.footprint or {})
    if engine.parked:
        _park(board, engine, event.residue, event.host_bytes)
    if not engine.seen:
        engine.seen = True
        board.unseen -= 1
    if engine.state is EngineState.READY:
        board.grant_waiting(engine, called=False)
    if board.unseen:
        return
    # Known footprints first: an unknown one then takes what is left, no more.
    for one in sorted(board.engines.values(), key=lambda e: (not e.known, e.index)):
        _adopt(board, one)


def _adopt(board: Board, engine: Engine) -> None:
    resident = engine.state in SERVING | MOVING or engine.tier is Tier.DEVICE
    for device in engine.spec.devices if resident else ():
        if not board.held(engine, device):
            need = engine.need(device)
            left = max(0, board.ledger.room(device))
            board.ledger.commit(engine.name, {device: left if need is None else need})
    commands.run_queued(board, engine)
    board.touch(engine)


def ready(board: Board, event: EngineReady) -> None:
    """Take in that a bring-in succeeded, or that a swap-out was given up."""
    engine = board.engines[event.engine]
    # One that was on its way from the host tier further down has no room on its devices.
    comes = engine.state in BRINGING_IN and not engine.promoting
    if not (comes or engine.state is EngineState.SWAPPING_OUT) or engine.parked:
        raise IllegalTransition(engine.name, engine.state, EngineState.READY, "engine ready")
    _measure(board, engine, event.footprint)
    board.ledger.commit(
        engine.name, {device: _use(board, engine, device) for device in engine.spec.devices}
    )
    _leave_ram(board, engine)
    brought = comes
    if brought:
        _came(board, engine, event.seconds)
        forgive(engine)
        engine.ready_since = board.now
        engine.out_failures = 0
        engine.out_retry_at = 0.0
    else:
        fail_out(board, engine)
        board.answer(engine.outs, EngineUnavailable(engine.name, "The swap-out was given up."))
    _serve_again(board, engine, brought=brought)


def _came(board: Board, engine: Engine, seconds: float) -> None:
    """Learn what a bring-in has cost."""
    if engine.misled:  # its state was lost on the way, and it came from somewhere else
        board.knowledge.caches.emptied(engine.name)
        return
    if engine.tier is not Tier.DEVICE:  # else it was only adopted
        busy = bool(engine.suspended)
        board.knowledge.costs.came(engine.name, engine.tier, seconds, busy=busy)
    if engine.tier is Tier.NONE:
        board.knowledge.caches.emptied(engine.name)


def _went(board: Board, engine: Engine, event: EngineLeft) -> None:
    """Learn what a departure has cost."""
    busy, costs = bool(engine.suspended), board.knowledge.costs
    costs.left(engine.name, event.tier, event.seconds, busy=busy)
    if not event.cache_kept:
        board.knowledge.caches.emptied(engine.name)
    # Who leaves has to come back; an engine's first way in takes nothing from others.
    there_and_back = event.seconds + costs.in_s(engine.name, event.tier, busy=busy)
    for device in engine.spec.devices:
        board.overhead[device].add(there_and_back, board.now)


def _use(board: Board, engine: Engine, device: DeviceName) -> int:
    """Return what to charge a resident engine: what it needs, else what it was promised."""
    need = engine.need(device)
    return board.held(engine, device) if need is None else need


def _leave_ram(board: Board, engine: Engine) -> None:
    if engine.spec.ram is not None:
        board.ledger.release(engine.name, (engine.spec.ram,))


def _park(board: Board, engine: Engine, residue: Footprint, host_bytes: int) -> None:
    """Charge an engine that is off its devices what it still holds, and nothing else."""
    board.ledger.commit(
        engine.name, {device: residue.get(device, 0) for device in engine.spec.devices}
    )
    if engine.spec.ram is not None:
        in_ram = host_bytes if engine.tier is Tier.HOST else 0
        engine.host_measured = max(engine.host_measured, in_ram)
        board.ledger.commit(engine.name, {engine.spec.ram: in_ram})


def _serve_again(board: Board, engine: Engine, *, brought: bool) -> None:
    """Make an engine that is on its device ready, and grant what waits for it."""
    engine.state = EngineState.READY
    engine.tier = Tier.DEVICE
    engine.idle_since = board.now
    engine.hold_after = False
    board.resume_all(engine, called=brought)
    commanded = bool(engine.ins)
    board.answer(engine.ins)
    commands.run_queued(board, engine)
    if engine.state is EngineState.READY:
        board.grant_waiting(engine, called=brought)
        guarded = brought and commanded and engine.idle
        engine.guard_until = board.now + board.hold_s if guarded else 0.0
    board.rests(engine)
    board.touch(engine)


def left(board: Board, event: EngineLeft) -> None:
    """Take in that an engine is off its device."""
    engine = board.engines[event.engine]
    if engine.promoting:
        _promoted(board, engine, event)
        return
    if engine.state not in LEAVING:
        raise IllegalTransition(engine.name, engine.state, EngineState.SWAPPED_OUT, "engine left")
    engine.dumped = event.cache_kept and event.tier is Tier.DISK
    before = _held(board, engine) if engine.parked else None
    if before is None and engine.state is EngineState.SWAPPING_OUT:
        _went(board, engine, event)
    stopped = engine.state is EngineState.STOPPING
    engine.state = EngineState.STOPPED if stopped else EngineState.SWAPPED_OUT
    engine.tier = event.tier
    if stopped:
        board.ledger.release(engine.name, uses(engine.spec))
    else:
        _park(board, engine, event.residue, event.host_bytes)
    if before is not None and _held(board, engine) >= before:
        fail_out(board, engine)  # further down, and nobody gained by it
    else:
        engine.out_failures = 0
        engine.out_retry_at = 0.0
    if event.leases_lost:
        board.lose_suspended(engine, _mid_answer(engine))
    if engine.hold_after:
        engine.hold_after = False
        engine.hold_until = board.now + board.hold_s
    board.answer(engine.outs)
    board.answer(engine.stops)
    commands.run_queued(board, engine)
    board.rests(engine)
    board.touch(engine)


def _promoted(board: Board, engine: Engine, event: EngineLeft) -> None:
    """Take in that an engine's state has come from disk to host memory."""
    engine.state = EngineState.SWAPPED_OUT
    engine.tier = event.tier
    _park(board, engine, event.residue, event.host_bytes)
    if event.leases_lost:
        board.lose_suspended(engine, _mid_answer(engine))
    commands.run_queued(board, engine)
    board.rests(engine)
    board.touch(engine)


def _measure(board: Board, engine: Engine, reading: Footprint) -> None:
    """Take in a reading of what an engine holds."""
    engine.measure(reading)
    needs = [engine.need(device) or 0 for device in engine.spec.devices]
    board.knowledge.costs.size(engine.name, sum(needs))


def _mid_answer(engine: Engine) -> EngineUnavailable:
    return EngineUnavailable(engine.name, f"'{engine.name}' ended in mid-answer.")


def _held(board: Board, engine: Engine) -> int:
    return sum(board.ledger.committed(device, engine.name) for device in uses(engine.spec))


def failed(board: Board, event: TransitionFailed) -> None:
    """Take in that a transition ended badly."""
    engine = board.engines[event.engine]
    serves = event.state is EngineState.READY
    if engine.state not in MOVING or (serves and engine.parked):
        raise IllegalTransition(engine.name, engine.state, event.state, str(event.error))
    was, promoted = engine.state, engine.promoting
    _balance_failed(board, engine, event)
    engine.state = event.state if event.state in RESTING else EngineState.FAILED
    engine.tier = event.tier
    if event.leases_lost:
        board.lose_granted(engine, event.error)
    if promoted:  # nobody has asked for it, so nobody has to wait after that
        if engine.state is EngineState.FAILED:
            fail_in(board, engine, event.error, refusing=False)
    elif was in BRINGING_IN:
        if _refused(event):
            refuse_in(board, engine, event.error)
        else:
            fail_in(board, engine, event.error, refusing=True)
            board.refuse_waiting(engine, event.error)
        board.answer(engine.ins, event.error)
    else:
        fail_out(board, engine)
        if engine.state is EngineState.FAILED:
            fail_in(board, engine, event.error, refusing=False)
        board.answer(engine.outs, event.error)
        board.answer(engine.stops, event.error)
    _settle(board, engine)


def _refused(event: TransitionFailed) -> bool:
    """Return whether nothing was done, so that its requests lose nothing by another try."""
    error = event.error
    harmless = isinstance(error, DeviceBusy) or (isinstance(error, CudaError) and not error.lost)
    return harmless and event.tier is not Tier.DEVICE and not event.leases_lost


def _balance_failed(board: Board, engine: Engine, event: TransitionFailed) -> None:
    """Bring the books in line with where a failed transition left the engine."""
    name, devices, ram = engine.name, engine.spec.devices, engine.spec.ram
    if event.state is EngineState.READY or event.tier is Tier.DEVICE:
        sizes = {d: board.held(engine, d) or engine.need(d) or 0 for d in devices}
        board.ledger.commit(name, sizes)
        if event.state is EngineState.READY:
            _leave_ram(board, engine)
        elif ram is not None:  # nobody knows how much of its state is there
            board.ledger.commit(name, {ram: board.held(engine, ram)})
    elif event.tier is engine.tier and (
        event.tier is not Tier.NONE or event.state is EngineState.SWAPPED_OUT
    ):
        board.ledger.cancel(name, uses(engine.spec))  # it is where it was
    else:
        board.ledger.release(name, devices)
        if ram is not None and event.tier is not Tier.HOST:
            board.ledger.release(name, (ram,))
        elif ram is not None:
            board.ledger.commit(name, {ram: board.held(engine, ram)})


def _settle(board: Board, engine: Engine) -> None:
    """Go on after a failed transition from where the engine is now."""
    if engine.state is EngineState.READY:
        engine.held = False
        _serve_again(board, engine, brought=False)
    else:
        engine.hold_after = False
        commands.run_queued(board, engine)
        board.rests(engine)
        board.touch(engine)


def exited(board: Board, event: EngineExited) -> None:
    """Take in that a process ended on its own."""
    engine = board.engines[event.engine]
    lives = engine.tier is Tier.HOST or _held(board, engine)
    processless = engine.state is EngineState.SWAPPED_OUT and not lives
    if engine.state is EngineState.STOPPED or processless:
        return  # a late report of a process that was ended on purpose
    board.lose_granted(engine, event.error)
    board.rests(engine)
    board.touch(engine)
    if engine.state in MOVING:
        engine.misled = True
        return  # the transition's own answer says what is left
    board.ledger.release(engine.name, uses(engine.spec))
    if engine.state is not EngineState.FAILED:  # else it has been counted already
        fail_in(board, engine, event.error, refusing=False)
    engine.state = EngineState.FAILED
    engine.tier = Tier.NONE
    engine.hold_after = False
    board.answer(engine.outs, event.error)
    commands.run_queued(board, engine)


def measured(board: Board, event: FootprintMeasured) -> None:
    """Take in a reading of a resident engine."""
    engine = board.engines[event.engine]
    if engine.state not in SERVING or board.unseen:
        return
    before = {device: engine.need(device) for device in engine.spec.devices}
    _measure(board, engine, event.footprint)
    grown = {
        device: need
        for device, old in before.items()
        if (need := engine.need(device)) is not None and need != old
    }
    if grown:
        board.ledger.commit(engine.name, grown)
        board.touch(engine)
