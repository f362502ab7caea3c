"""What failed moves cost an engine: a pause before the next try, which grows. Pure."""

from swapserve.errors import EngineUnavailable, SwapServeError
from swapserve.scheduler.board import Board
from swapserve.scheduler.demand import Engine

MAX_BACKOFF_S = 60.0
REFUSALS_MAX = 5
"""So many bring-ins refused in a row end the patience of those who wait for the engine."""


def fail_in(board: Board, engine: Engine, error: SwapServeError, *, refusing: bool) -> None:
    """Count a failed start or a crash and pause before the next try."""
    engine.failures += 1
    engine.retry_at = board.now + _backoff(board, engine.failures)
    engine.refusing = refusing
    engine.last_error = error


def refuse_in(board: Board, engine: Engine, error: SwapServeError) -> None:
    """Count a bring-in that ended before anything was done, and pause before the next try.

    Who waits goes on waiting, until it has been refused too often.
    """
    engine.refusals += 1
    engine.retry_at = board.now + _backoff(board, engine.refusals)
    engine.refusing = False
    engine.last_error = error
    if engine.refusals >= REFUSALS_MAX:
        reason = (
            f"'{engine.name}' could not be brought in, {engine.refusals} times in a row."
            f" Last error: {error}"
        )
        board.refuse_waiting(engine, EngineUnavailable(engine.name, reason))


def fail_out(board: Board, engine: Engine) -> None:
    """Count a failed departure; until the pause is over it is nobody's victim."""
    engine.out_failures += 1
    engine.out_retry_at = board.now + _backoff(board, engine.out_failures)


def forgive(engine: Engine) -> None:
    """Forget failures to bring it in."""
    engine.failures = engine.refusals = 0
    engine.retry_at = 0.0
    engine.refusing = False
    engine.last_error = None


def _backoff(board: Board, failures: int) -> float:
    """Return the pause after so many failures in a row, in seconds."""
    return min(MAX_BACKOFF_S, board.rules.retry_backoff_s * 2.0 ** min(failures - 1, 30))
