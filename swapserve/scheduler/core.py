"""The scheduler: events in, effects out. Pure, deterministic, without a clock of its own.

`handle` changes what the event says has happened, plans the group of devices concerned anew
(`placement`), and asks for the timer that the next deadline needs. The common case, a request
for a ready engine, costs a few dictionary operations and no plan.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from swapserve.errors import (
    EngineUnavailable,
    ModelNotFound,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
    SwapServeError,
)
from swapserve.ids import DeviceName, EngineName
from swapserve.messages import (
    CommandGiven,
    DeviceSpec,
    Effect,
    EngineExited,
    EngineLeft,
    EngineReady,
    EngineSeen,
    EngineSpec,
    Event,
    FootprintMeasured,
    LeaseEnded,
    LeaseRequested,
    PolicySpec,
    RefuseLease,
    SetTimer,
    ShutdownAsked,
    Tick,
    TransitionFailed,
)
from swapserve.scheduler import commands, transitions
from swapserve.scheduler.board import Board
from swapserve.scheduler.demand import MOVING, Engine, Lease
from swapserve.scheduler.ledger import Account
from swapserve.scheduler.placement import place
from swapserve.states import EngineState, LeaseState


class Core:
    """Every decision about leases and engines.

    Nothing is placed before each configured engine was reported by an `EngineSeen`. An
    `EngineReady`, `EngineLeft` or `TransitionFailed` that answers no transition raises
    IllegalTransition. A timer may ring too early, never too late.
    """

    def __init__(
        self, devices: Iterable[DeviceSpec], engines: Iterable[EngineSpec], policy: PolicySpec
    ) -> None:
        self._board = Board(devices, engines, policy)
        self._policy = policy
        self._timer: float | None = None
        self._wakes: dict[int, float | None] = {}
        self._contended: set[int] = set()
        self._handlers: dict[type[Event], Callable[[Any], None]] = {
            EngineSeen: partial(transitions.seen, self._board),
            LeaseRequested: self._lease_requested,
            LeaseEnded: self._lease_ended,
            EngineReady: partial(transitions.ready, self._board),
            EngineLeft: partial(transitions.left, self._board),
            TransitionFailed: partial(transitions.failed, self._board),
            EngineExited: partial(transitions.exited, self._board),
            FootprintMeasured: partial(transitions.measured, self._board),
            CommandGiven: self._command_given,
            Tick: self._tick,
            ShutdownAsked: self._shutdown_asked,
        }

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Return what to do about the event, in the order in which to do it.

        Args:
            event: what has happened.
            now: monotonic seconds; never less than in the call before.
        """
        board = self._board
        board.now = now
        board.effects = []
        self._handlers[type(event)](event)
        if board.dirty:
            self._plan()
        return board.effects

    # ------------------------------------------------------------------ status

    def counts(self, engine: EngineName) -> tuple[int, int, int]:
        """Return how many leases are active, waiting and suspended."""
        found = self._board.engines[engine]
        return len(found.active), len(found.waiting), len(found.suspended)

    def pinned(self, engine: EngineName) -> bool:
        """Return whether the engine is never a victim."""
        return self._board.engines[engine].pinned

    def state(self, engine: EngineName) -> EngineState:
        """Return the engine's state as the core sees it."""
        return self._board.engines[engine].state

    def footprint(self, engine: EngineName) -> dict[DeviceName, int]:
        """Return the bytes it is counted with on each of its devices (missing: unknown as yet)."""
        found = self._board.engines[engine]
        needs = {device: found.need(device) for device in found.spec.devices}
        return {device: need for device, need in needs.items() if need is not None}

    def devices(self) -> dict[DeviceName, Account]:
        """Return capacity, reserved, committed and excess bytes of each device."""
        ledger = self._board.ledger
        return {name: ledger.account(name) for name in ledger.devices}

    # ------------------------------------------------------------------ leases

    def _lease_requested(self, event: LeaseRequested) -> None:
        board = self._board
        engine = board.engines.get(event.engine)
        if event.lease in board.leases:
            raise ValueError(f"lease {event.lease} exists already")
        if engine is None:
            self._refuse(event, ModelNotFound(event.engine))
            return
        error = self._unwelcome(engine)
        if error is not None:
            self._refuse(event, error)
            return
        lease = Lease(event.lease, engine.name, board.begin())
        board.leases[lease.id] = lease
        if engine.state is EngineState.READY:
            board.grant(lease, engine)
            return
        if not engine.waiting:
            board.touch(engine)
        engine.waiting[lease.id] = lease

    def _refuse(self, event: LeaseRequested, error: SwapServeError) -> None:
        self._board.effects.append(RefuseLease(lease=event.lease, error=error))

    def _unwelcome(self, engine: Engine) -> SwapServeError | None:
        """Return why a new request is refused at once, or None."""
        if self._board.shutting_down:
            return ShuttingDown()
        if engine.held:
            return EngineUnavailable(engine.name, f"'{engine.name}' was stopped by an operator.")
        if engine.state is EngineState.READY:
            return None
        pause = engine.retry_at - self._board.now
        if engine.refusing and pause > 0 and engine.state not in MOVING:
            return EngineUnavailable(
                engine.name,
                f"'{engine.name}' could not be brought up and will be tried again in"
                f" {pause:.1f} s. Last error: {engine.last_error}",
            )
        if len(engine.waiting) >= self._policy.queue_limit:
            return QueueFull(engine.name, self._policy.queue_limit)
        return None

    def _lease_ended(self, event: LeaseEnded) -> None:
        lease = self._board.leases.pop(event.lease, None)
        if lease is None:  # it crossed with our own refusal or loss
            return
        engine = self._board.engines[lease.engine]
        match lease.state:
            case LeaseState.WAITING:
                oldest = next(iter(engine.waiting)) == lease.id
                del engine.waiting[lease.id]
                if oldest:
                    self._board.touch(engine)
            case LeaseState.SUSPENDED:
                del engine.suspended[lease.id]
                self._board.touch(engine)
            case _:
                del engine.active[lease.id]
                self._active_ended(engine, lease)

    def _active_ended(self, engine: Engine, lease: Lease) -> None:
        engine.callers -= lease.called
        if engine.idle:
            engine.idle_since = self._board.now
            engine.guard_until = 0.0
        if engine.state is EngineState.DRAINING or engine.group in self._contended:
            if engine.idle or (lease.called and not engine.callers):
                self._board.touch(engine)
        elif engine.idle and engine.spec.ttl_s is not None and not engine.pinned:
            self._ring_by(engine, self._board.now + engine.spec.ttl_s)

    def _ring_by(self, engine: Engine, time: float) -> None:
        wake = self._wakes.get(engine.group)
        self._wakes[engine.group] = time if wake is None else min(wake, time)
        if self._timer is None or time < self._timer:
            self._set_timer(time)

    # ------------------------------------------------------------------- other

    def _command_given(self, event: CommandGiven) -> None:
        commands.give(self._board, event)
        engine = self._board.engines.get(event.engine)
        if engine is not None:
            self._board.touch(engine)

    def _tick(self, event: Tick) -> None:
        del event
        self._timer = None
        self._board.dirty.update(dict.fromkeys(range(len(self._board.groups))))

    def _shutdown_asked(self, event: ShutdownAsked) -> None:
        del event
        board = self._board
        board.shutting_down = True
        for engine in board.engines.values():
            board.refuse_waiting(engine, ShuttingDown())
            commands.refuse_starts(board, engine)
            board.touch(engine)

    # ---------------------------------------------------------------- planning

    def _plan(self) -> None:
        board = self._board
        heads = self._expire_waiting()
        if not board.unseen:
            for group in tuple(board.dirty):
                self._wakes[group], pending = place(board, group)
                (self._contended.add if pending else self._contended.discard)(group)
        board.dirty.clear()
        deadlines = [wake for wake in (heads, *self._wakes.values()) if wake is not None]
        self._set_timer(min(deadlines, default=None))

    def _expire_waiting(self) -> float | None:
        """Refuse who waited too long; return when the next wait becomes too long."""
        board = self._board
        limit = self._policy.queue_timeout_s
        heads: list[float] = []
        for engine in board.engines.values():
            while engine.waiting:
                lease = next(iter(engine.waiting.values()))
                if lease.since[0] + limit > board.now:
                    heads.append(lease.since[0] + limit)
                    break
                del engine.waiting[lease.id], board.leases[lease.id]
                waited = board.now - lease.since[0]
                board.effects.append(
                    RefuseLease(lease=lease.id, error=QueueTimeout(engine.name, waited))
                )
                board.touch(engine)
        return min(heads, default=None)

    def _set_timer(self, at: float | None) -> None:
        if at != self._timer:
            self._timer = at
            self._board.effects.append(SetTimer(at=at))
