"""What an operator's commands mean. Pure.

Each command is answered exactly once. One that conflicts with a transition under way, of its
engine or on an exclusive device of it, waits for its end; one that agrees with it is answered by
its outcome; one that contradicts an older command which has not begun yet (waiting for room,
draining) takes its place.

An operator may swap out a busy or pinned engine. Requests that this suspends, and those that
arrive later, bring it back like any others, but not before it was out for a quantum.
"""

from typing import assert_never

from swapserve.errors import EngineUnavailable, ModelNotFound, ShuttingDown
from swapserve.ids import CommandId
from swapserve.messages import CommandGiven, Verb
from swapserve.scheduler.board import Board
from swapserve.scheduler.demand import BRINGING_IN, MOVING, SERVING, Engine
from swapserve.scheduler.failures import forgive
from swapserve.states import EngineState, Tier


def give(board: Board, event: CommandGiven) -> None:
    """Carry a new command out, or keep it for the end of the transition under way."""
    engine = board.engines.get(event.engine)
    if engine is None:
        board.done(event.command, ModelNotFound(event.engine))
    elif event.verb in {"pin", "unpin"}:
        engine.pinned = event.verb == "pin"
        board.done(event.command)
    elif engine.queued or not engine.seen:
        engine.queued.append((event.command, event.verb))
    else:
        act = _join if engine.state in MOVING else _execute
        if not act(board, engine, event.command, event.verb):
            engine.queued.append((event.command, event.verb))


def run_queued(board: Board, engine: Engine) -> None:
    """Carry out what waited for the end of a transition, until one begins another."""
    while engine.queued and engine.state not in MOVING:
        command, verb = engine.queued[0]
        if not _execute(board, engine, command, verb):
            return
        engine.queued.popleft()


def refuse_starts(board: Board, engine: Engine) -> None:
    """Answer commands that would start something: the daemon is going down."""
    board.answer(engine.ins, ShuttingDown())
    kept = [(command, verb) for command, verb in engine.queued if verb in {"swap_out", "stop"}]
    for command, verb in engine.queued:
        if verb not in {"swap_out", "stop"}:
            board.done(command, ShuttingDown())
    engine.queued.clear()
    engine.queued.extend(kept)


def _join(board: Board, engine: Engine, command: CommandId, verb: Verb) -> bool:
    """Let the transition under way answer the command, if that is what it asks for."""
    if verb in {"swap_in", "start"} and engine.state in BRINGING_IN and not engine.promoting:
        engine.ins.append(command)
    elif verb == "swap_out" and engine.state is EngineState.SWAPPING_OUT:
        engine.outs.append(command)
    elif verb == "stop" and engine.state is EngineState.STOPPING:
        engine.stops.append(command)
        _hold(board, engine)
    else:
        return False
    return True


def _execute(board: Board, engine: Engine, command: CommandId, verb: Verb) -> bool:
    """Carry a command out; False if it has to wait until nothing else moves on a device."""
    match verb:
        case "swap_in" | "start":
            _bring_in(board, engine, command)
        case "swap_out":
            return _swap_out(board, engine, command)
        case "stop":
            return _stop(board, engine, command)
        case "pin" | "unpin":
            pass  # never queued
        case _:
            assert_never(verb)
    return True


def _bring_in(board: Board, engine: Engine, command: CommandId) -> None:
    if board.shutting_down:
        board.done(command, ShuttingDown())
        return
    _supersede_outs(board, engine, "start")
    engine.held = False
    engine.hold_after = False
    engine.hold_until = 0.0
    engine.asked()
    forgive(engine)
    if engine.state is EngineState.READY:
        board.done(command)
        return
    if not engine.ins:
        engine.ins_since = board.begin()
    engine.ins.append(command)


def _swap_out(board: Board, engine: Engine, command: CommandId) -> bool:
    broken = engine.state is EngineState.FAILED and engine.tier is Tier.DEVICE
    if broken and not board.may_depart(engine):
        return False
    _supersede_ins(board, engine, "swap-out")
    engine.unasked = True
    engine.preload = False
    if engine.state in SERVING:
        engine.outs.append(command)
        leave(board, engine)
    elif broken:
        board.lose_granted(engine, _stopped(engine))
        engine.outs.append(command)
        board.stop(engine, "operator")
    else:
        board.done(command)
    return True


def leave(board: Board, engine: Engine) -> None:
    """Swap out an engine that an operator wants out, drain it, or leave it until its turn."""
    engine.hold_after = engine.hold_after or not engine.idle
    if engine.idle or board.survives(engine):
        if board.may_depart(engine):
            board.swap_out(engine, "operator")
    elif engine.state is EngineState.READY:
        board.drain(engine)


def _stop(board: Board, engine: Engine, command: CommandId) -> bool:
    stopped = engine.state is EngineState.STOPPED
    if not stopped and not board.may_depart(engine):
        return False
    _supersede_ins(board, engine, "stop")
    _hold(board, engine)
    if stopped:
        board.done(command)
        return True
    engine.stops.append(command)
    board.lose_granted(engine, _stopped(engine))
    board.stop(engine, "operator")
    return True


def _hold(board: Board, engine: Engine) -> None:
    engine.held = True
    engine.preload = False
    board.refuse_waiting(engine, _stopped(engine))


def _supersede_ins(board: Board, engine: Engine, by: str) -> None:
    board.answer(engine.ins, _superseded(engine, by))


def _supersede_outs(board: Board, engine: Engine, by: str) -> None:
    board.answer(engine.outs, _superseded(engine, by))


def _superseded(engine: Engine, by: str) -> EngineUnavailable:
    return EngineUnavailable(
        engine.name, f"A later {by} of '{engine.name}' took the place of this command."
    )


def _stopped(engine: Engine) -> EngineUnavailable:
    return EngineUnavailable(
        engine.name, f"'{engine.name}' was stopped by an operator. Start it to use it again."
    )
