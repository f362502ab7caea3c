"""The scheduler: events in, effects out. Pure, deterministic, without a clock of its own.

`handle` changes what the event says has happened, plans the group of devices concerned anew
(`placement`), and asks for the timer that the next deadline needs. The common case, a request
for a ready engine, costs a few dictionary operations and no plan.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from swapserve.errors import (
    ModelNotFound,
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
    LeaseBegan,
    LeaseEnded,
    LeaseRequested,
    RefuseLease,
    Rules,
    SetTimer,
    ShutdownAsked,
    Tick,
    TransitionFailed,
    Used,
)
from swapserve.scheduler import commands, transitions
from swapserve.scheduler.board import Board
from swapserve.scheduler.demand import GROUP_MAX, Engine, Lease, owes_first
from swapserve.scheduler.door import Door
from swapserve.scheduler.knowledge import Knowledge
from swapserve.scheduler.ledger import Account
from swapserve.scheduler.placement import place
from swapserve.scheduler.policies.adaptive import Adaptive
from swapserve.scheduler.policies.base import NEVER, Policy
from swapserve.scheduler.waits import predicted_wait
from swapserve.states import EngineState, LeaseState, Priority


class Core:
    """Every decision about leases and engines.

    Nothing is placed before each configured engine was reported by an `EngineSeen`. An
    `EngineReady`, `EngineLeft` or `TransitionFailed` that answers no transition raises
    IllegalTransition. A timer may ring too early, never too late.
    """

    def __init__(
        self,
        devices: Iterable[DeviceSpec],
        engines: Iterable[EngineSpec],
        rules: Rules,
        policy: Policy | None = None,
        knowledge: Knowledge | None = None,
    ) -> None:
        self.knowledge = knowledge or Knowledge(rules.wall_offset_s)
        self._board = Board(devices, engines, rules, policy or Adaptive(), self.knowledge)
        self._door = Door(self._board)
        self._timer: float | None = None
        self._wakes: dict[int, float | None] = {}
        self._contended: set[int] = set()
        self._handlers: dict[type[Event], Callable[[Any], None]] = {
            EngineSeen: partial(transitions.seen, self._board),
            LeaseRequested: self._lease_requested,
            LeaseBegan: self._lease_began,
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
        board.now = board.view.now = now
        board.effects = []
        if board.reach:
            board.reach.clear()
        self._handlers[type(event)](event)
        if board.dirty:
            self._plan()
        return board.effects

    # ------------------------------------------------------------------ status

    def counts(self, engine: EngineName) -> tuple[int, int, int]:
        """Return how many leases are active, waiting and suspended."""
        found = self._board.engines[engine]
        return len(found.active), len(found.waiting), len(found.suspended)

    def predicted_wait(self, engine: EngineName) -> float:
        """Return the seconds that a new request would wait for it, as expected now."""
        return predicted_wait(self._board, self._board.engines[engine])

    def queued(self, engine: EngineName) -> dict[Priority, int]:
        """Return how many leases of each priority wait for it."""
        waiting = self._board.engines[engine].waiting
        return {priority: waiting.size(priority) for priority in Priority}

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
        lease = Lease(event.lease, engine.name, board.begin(), event.ask, board.now)
        error = self._door.unwelcome(engine, lease)
        if error is not None:
            self._refuse(event, error)
            return
        self.knowledge.arrivals.arrived(engine.name, board.now)
        engine.asked()
        board.leases[lease.id] = lease
        if engine.state is EngineState.READY and engine.has_slot:
            if board.wished_since and self._overtakes(engine):
                board.touch(engine)
            board.grant(lease, engine)
            return
        # Another one in the same line changes nothing; a more urgent one may.
        if event.ask.deadline_s is not None or not engine.waiting.size(event.ask.priority):
            board.touch(engine)
        board.enqueue(lease, engine)
        self._ring_by(self._door.watch(lease))

    def _overtakes(self, engine: Engine) -> bool:
        """Return whether with this one a whole group of its requests overtakes a wish."""
        granted, since = engine.granted, self._board.wished_since
        if len(granted) < GROUP_MAX - 1:
            return False
        before = granted[0] if len(granted) == GROUP_MAX else NEVER
        after = granted[-GROUP_MAX + 1]
        return any(
            since[device] < after and not since[device] < before < NEVER
            for device in engine.spec.devices
            if device in since
        )

    def _refuse(self, event: LeaseRequested, error: SwapServeError) -> None:
        self._board.effects.append(RefuseLease(lease=event.lease, error=error))

    def _lease_began(self, event: LeaseBegan) -> None:
        lease = self._board.leases.get(event.lease)
        if lease is None:
            return
        lease.began_at = self._board.now
        engine = self._board.engines[lease.engine]
        if engine.group in self._contended and not any(map(owes_first, engine.active.values())):
            self._board.touch(engine)  # a policy may have waited for that

    def _lease_ended(self, event: LeaseEnded) -> None:
        board = self._board
        lease = board.leases.pop(event.lease, None)
        if lease is None:  # it crossed with our own refusal or loss
            return
        engine = board.engines[lease.engine]
        match lease.state:
            case LeaseState.WAITING:
                was = engine.calling()
                board.dequeue(lease, engine)
                if engine.calling() != was or not engine.waiting.size(lease.ask.priority):
                    board.touch(engine)
            case LeaseState.SUSPENDED:
                del engine.suspended[lease.id]
                board.touch(engine)
            case _:
                if event.used is not None:
                    self._learn(lease, event.used)
                del engine.active[lease.id]
                self._active_ended(engine, lease)

    def _learn(self, lease: Lease, used: Used) -> None:
        now = self._board.now
        service = self.knowledge.service
        service.ended(lease.engine, lease.ask, used, lease.ran(now), promised=lease.promised)
        self.knowledge.caches.served(lease.engine, lease.ask, used, now)

    def _active_ended(self, engine: Engine, lease: Lease) -> None:
        engine.callers -= lease.called
        if engine.state is EngineState.READY and engine.waiting:
            self._board.grant_waiting(engine, called=False)
        if engine.idle:
            engine.idle_since = self._board.now
            engine.guard_until = 0.0
            self._board.rests(engine)
        if engine.state is EngineState.DRAINING or engine.group in self._contended:
            # One that had not begun may have been what its engine was spared for.
            if engine.idle or lease.began_at is None or (lease.called and not engine.callers):
                self._board.touch(engine)
        elif engine.idle and engine.spec.ttl_s is not None and not engine.pinned:
            due = self._board.now + engine.spec.ttl_s
            wake = self._wakes.get(engine.group)
            self._wakes[engine.group] = due if wake is None else min(wake, due)
            self._ring_by(due)

    def _ring_by(self, time: float) -> None:
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
        next_refusal = self._door.expire()
        if not board.unseen:
            for group in tuple(board.dirty):
                self._wakes[group], pending = place(board, group)
                (self._contended.add if pending else self._contended.discard)(group)
        board.dirty.clear()
        deadlines = [wake for wake in (next_refusal, *self._wakes.values()) if wake is not None]
        self._set_timer(min(deadlines, default=None))

    def _set_timer(self, at: float | None) -> None:
        if at != self._timer:
            self._timer = at
            self._board.effects.append(SetTimer(at=at))
