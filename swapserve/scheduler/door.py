"""Who is let in to wait, and who has waited in vain. Pure.

A request is refused early rather than late: when the queue is full, when its engine cannot be
brought up now, or when its first token is predicted to come after its own deadline. While it
waits it is refused once its deadline is certain to pass.
"""

from heapq import heappop, heappush

from swapserve.errors import (
    DeadlineUnmeetable,
    EngineUnavailable,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
    SwapServeError,
)
from swapserve.ids import LeaseId
from swapserve.messages import RefuseLease
from swapserve.scheduler.board import Board
from swapserve.scheduler.demand import AWAY, MOVING, Engine, Lease
from swapserve.scheduler.waits import Place, predicted_wait
from swapserve.states import EngineState, LeaseState

LOOK_AGAIN_S = 1.0
"""A request that may miss its deadline is looked at again so soon."""


class Door:
    """Admission to the queues of one board."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._watched: list[tuple[float, LeaseId]] = []
        """When to look at which waiting lease; those that are gone are skipped."""

    def unwelcome(self, engine: Engine, lease: Lease) -> SwapServeError | None:
        """Return why a new request is refused at once, or None."""
        board = self._board
        if board.shutting_down:
            return ShuttingDown()
        if engine.held:
            return EngineUnavailable(engine.name, f"'{engine.name}' was stopped by an operator.")
        if engine.state is EngineState.READY and engine.has_slot:
            return None
        pause = engine.retry_at - board.now
        if engine.refusing and pause > 0 and engine.state not in MOVING:
            return EngineUnavailable(
                engine.name,
                f"'{engine.name}' could not be brought up and will be tried again in"
                f" {pause:.1f} s. Last error: {engine.last_error}",
                retry_after_s=pause,
            )
        error = self._full(engine)
        if error is None and lease.ask.deadline_s is not None:
            board.enqueue(lease, engine)  # it may make its engine's wish more pressing
            error = self._too_late(engine, lease)
            board.dequeue(lease, engine)
        return error

    def _full(self, engine: Engine) -> SwapServeError | None:
        board = self._board
        limit = engine.spec.queue_limit
        if len(engine.waiting) >= (board.rules.queue_limit if limit is None else limit):
            limit = len(engine.waiting)
            return QueueFull(engine.name, limit, retry_after_s=predicted_wait(board, engine))
        if board.waiting >= board.rules.queue_limit_total:
            wait = predicted_wait(board, engine)
            return QueueFull(engine.name, board.waiting, total=True, retry_after_s=wait)
        return None

    def _too_late(self, engine: Engine, lease: Lease) -> SwapServeError | None:
        """Return the refusal of a request in the queue, if its answer would begin too late."""
        board, ask = self._board, lease.ask
        if ask.deadline_s is None:
            return None
        if board.unseen and board.now < lease.arrived + ask.deadline_s:
            return None  # it may be there already
        wait = predicted_wait(board, engine, Place(ask.priority, lease.since))
        first = wait + board.knowledge.service.first_s(engine.name, ask)
        predicted_s = board.now + first - lease.arrived
        if predicted_s <= ask.deadline_s:
            return None
        return DeadlineUnmeetable(engine.name, ask.deadline_s, predicted_s, retry_after_s=wait)

    # ----------------------------------------------------------------- waiting

    def watch(self, lease: Lease) -> float:
        """Begin to watch how long a request waits; return when to call `expire`."""
        at = lease.arrived + self._board.rules.queue_timeout_s
        if lease.ask.deadline_s is not None:
            engine = self._board.engines[lease.engine]
            latest = lease.arrived + lease.ask.deadline_s - self._least(engine, lease)
            at = min(at, max(self._board.now, latest))
        heappush(self._watched, (at, lease.id))
        return at

    def _least(self, engine: Engine, lease: Lease) -> float:
        """Return the seconds from the start of its bring-in to its first token, at the least."""
        knowledge = self._board.knowledge
        first = knowledge.service.first_s(engine.name, lease.ask)
        if engine.state not in AWAY:
            return first
        return first + knowledge.costs.in_s(engine.name, engine.tier, busy=bool(engine.suspended))

    def expire(self) -> float | None:
        """Refuse who waited too long; return when the next wait becomes too long."""
        board, watched = self._board, self._watched
        while watched:
            at, name = watched[0]
            lease = board.leases.get(name)
            waits = lease is not None and lease.state is LeaseState.WAITING
            if waits and at > board.now:
                return at
            heappop(watched)
            if lease is not None and waits:
                self._look_at(lease)
        return None

    def _look_at(self, lease: Lease) -> None:
        board = self._board
        engine = board.engines[lease.engine]
        waited = board.now - lease.arrived
        error: SwapServeError | None = None
        end = lease.arrived + board.rules.queue_timeout_s
        if end <= board.now:
            wait = predicted_wait(board, engine)
            error = QueueTimeout(engine.name, waited, retry_after_s=wait)
        else:
            error = self._too_late(engine, lease)
        if error is None:
            heappush(self._watched, (min(end, board.now + LOOK_AGAIN_S), lease.id))
            return
        del board.leases[lease.id]
        board.dequeue(lease, engine)
        board.effects.append(RefuseLease(lease=lease.id, error=error))
        board.touch(engine)
