"""What the outcome of a transition, a crash or a measurement changes. Pure.

Bytes are given back only when they were seen free: by `EngineLeft`, by `EngineExited` of an engine
at rest, or by a `TransitionFailed` that ends on another tier than the device. An engine that exits
in the middle of a transition loses its leases at once; its bytes follow with the transition's
own answer, which always comes.
"""

from swapserve.errors import EngineUnavailable, IllegalTransition
from swapserve.messages import (
    EngineExited,
    EngineLeft,
    EngineReady,
    EngineSeen,
    FootprintMeasured,
    TransitionFailed,
)
from swapserve.scheduler import commands
from swapserve.scheduler.board import Board
from swapserve.scheduler.demand import BRINGING_IN, LEAVING, MOVING, SERVING, Engine
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
    engine.ready_since = engine.idle_since = board.now
    if event.footprint_bytes is not None:
        engine.measure(event.footprint_bytes)
    if not engine.seen:
        engine.seen = True
        board.unseen -= 1
    if engine.state is EngineState.READY:
        board.grant_waiting(engine, called=False)
    if board.unseen:
        return
    # Known footprints first: an unknown one then takes what is left, no more.
    for one in sorted(board.engines.values(), key=lambda e: (e.need is None, e.index)):
        _adopt(board, one)


def _adopt(board: Board, engine: Engine) -> None:
    device = engine.spec.device
    resident = engine.state in SERVING | MOVING or engine.tier is Tier.DEVICE
    if resident and not board.held(engine):
        left = max(0, board.ledger.room(device))
        board.ledger.commit(device, engine.name, left if engine.need is None else engine.need)
    commands.run_queued(board, engine)
    board.touch(engine)


def ready(board: Board, event: EngineReady) -> None:
    """Take in that a bring-in succeeded, or that a swap-out was given up."""
    engine = board.engines[event.engine]
    if engine.state not in BRINGING_IN | {EngineState.SWAPPING_OUT}:
        raise IllegalTransition(engine.name, engine.state, EngineState.READY, "engine ready")
    charge = max(event.footprint_bytes, engine.need or 0)
    engine.measure(event.footprint_bytes)
    board.ledger.commit(engine.spec.device, engine.name, charge)
    brought = engine.state in BRINGING_IN
    if brought:
        board.forgive(engine)
        engine.ready_since = board.now
        engine.out_failures = 0
        engine.out_retry_at = 0.0
    else:
        board.fail_out(engine)
        board.answer(engine.outs, EngineUnavailable(engine.name, "The swap-out was given up."))
    _serve_again(board, engine, brought=brought)


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
        engine.guard_until = board.now + board.policy.quantum_s if guarded else 0.0
    board.touch(engine)


def left(board: Board, event: EngineLeft) -> None:
    """Take in that an engine is off its device."""
    engine = board.engines[event.engine]
    if engine.state not in LEAVING:
        raise IllegalTransition(engine.name, engine.state, EngineState.SWAPPED_OUT, "engine left")
    stopped = engine.state is EngineState.STOPPING
    engine.state = EngineState.STOPPED if stopped else EngineState.SWAPPED_OUT
    engine.tier = event.tier
    engine.out_failures = 0
    engine.out_retry_at = 0.0
    board.ledger.release(engine.spec.device, engine.name)
    if event.leases_lost:
        board.lose_suspended(
            engine, EngineUnavailable(engine.name, f"'{engine.name}' ended in mid-answer.")
        )
    if engine.hold_after:
        engine.hold_after = False
        engine.hold_until = board.now + board.policy.quantum_s
    board.answer(engine.outs)
    board.answer(engine.stops)
    commands.run_queued(board, engine)
    board.touch(engine)


def failed(board: Board, event: TransitionFailed) -> None:
    """Take in that a transition ended badly."""
    engine = board.engines[event.engine]
    if engine.state not in MOVING:
        raise IllegalTransition(engine.name, engine.state, event.state, str(event.error))
    was = engine.state
    engine.state = event.state if event.state in RESTING else EngineState.FAILED
    engine.tier = event.tier
    if engine.state is EngineState.READY or event.tier is Tier.DEVICE:
        size = board.held(engine) or engine.need or 0
        board.ledger.commit(engine.spec.device, engine.name, size)
    else:
        board.ledger.release(engine.spec.device, engine.name)
    if event.leases_lost:
        board.lose_granted(engine, event.error)
    if was in BRINGING_IN:
        board.fail_in(engine, event.error, refusing=True)
        board.refuse_waiting(engine, event.error)
        board.answer(engine.ins, event.error)
    else:
        board.fail_out(engine)
        if engine.state is EngineState.FAILED:
            board.fail_in(engine, event.error, refusing=False)
        board.answer(engine.outs, event.error)
        board.answer(engine.stops, event.error)
    _settle(board, engine)


def _settle(board: Board, engine: Engine) -> None:
    """Go on after a failed transition from where the engine is now."""
    if engine.state is EngineState.READY:
        engine.held = False
        _serve_again(board, engine, brought=False)
    else:
        engine.hold_after = False
        commands.run_queued(board, engine)
        board.touch(engine)


def exited(board: Board, event: EngineExited) -> None:
    """Take in that a process ended on its own."""
    engine = board.engines[event.engine]
    processless = engine.state is EngineState.SWAPPED_OUT and engine.tier is not Tier.HOST
    if engine.state is EngineState.STOPPED or processless:
        return  # a late report of a process that was ended on purpose
    board.lose_granted(engine, event.error)
    board.touch(engine)
    if engine.state in MOVING:
        return  # the transition's own answer says what is left
    board.ledger.release(engine.spec.device, engine.name)
    if engine.state is not EngineState.FAILED:  # else it has been counted already
        board.fail_in(engine, event.error, refusing=False)
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
    before = engine.need
    engine.measure(event.footprint_bytes)
    if engine.need is not None and engine.need != before:
        board.ledger.commit(engine.spec.device, engine.name, engine.need)
        board.touch(engine)
