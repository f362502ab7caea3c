"""The core's state, and the moves that change it: each keeps it legal and emits its effect. Pure.

Nothing here decides. `core`, `placement` and `commands` decide and call these moves; a move that
the state table does not allow raises IllegalTransition.
"""

from collections.abc import Iterable

from swapserve.errors import IllegalTransition, SwapServeError
from swapserve.ids import CommandId, DeviceName, EngineName, LeaseId
from swapserve.messages import (
    BringIn,
    CommandDone,
    DeviceSpec,
    Drain,
    Effect,
    EngineSpec,
    GrantLease,
    LoseLease,
    PolicySpec,
    RefuseLease,
    ResumeLease,
    StopEngine,
    SuspendLease,
    SwapOut,
)
from swapserve.scheduler.demand import Engine, Lease, Since
from swapserve.scheduler.ledger import Ledger
from swapserve.scheduler.policy import backoff
from swapserve.states import TRANSITIONS, EngineState, LeaseState, Tier


class Board:
    """Engines, leases and ledger, and the effects of the event being handled."""

    def __init__(
        self, devices: Iterable[DeviceSpec], engines: Iterable[EngineSpec], policy: PolicySpec
    ) -> None:
        self.policy = policy
        self.now = 0.0
        self.effects: list[Effect] = []
        self.shutting_down = False
        self.ledger = Ledger({device.name: device.capacity_bytes for device in devices})
        self.engines: dict[EngineName, Engine] = {}
        self.by_device: dict[DeviceName, list[Engine]] = {}
        self.leases: dict[LeaseId, Lease] = {}
        self.unseen = 0
        """Engines whose place is not known yet; nothing is placed before it is zero."""
        self.dirty: dict[DeviceName, None] = {}
        """Devices to plan anew (a dict: the order of planning must be the same every time)."""
        self._running_number = 0
        for spec in engines:
            engine = Engine(spec, len(self.engines), pinned=spec.pin, preload=spec.preload)
            self.engines[spec.name] = engine
            self.by_device.setdefault(spec.device, []).append(engine)
            self.unseen += 1

    # ------------------------------------------------------------ small things

    def begin(self) -> Since:
        """Return the age of a wish that begins now."""
        self._running_number += 1
        return (self.now, self._running_number)

    def touch(self, engine: Engine) -> None:
        """Ask for a new plan of the engine's device."""
        self.dirty[engine.spec.device] = None

    def held(self, engine: Engine) -> int:
        """Return the bytes that its departure would free."""
        return self.ledger.held(engine.spec.device, engine.name)

    def done(self, command: CommandId, error: SwapServeError | None = None) -> None:
        """Answer an operator's command."""
        self.effects.append(CommandDone(command=command, error=error))

    def answer(self, commands: list[CommandId], error: SwapServeError | None = None) -> None:
        """Answer all of these commands and forget them."""
        for command in commands:
            self.done(command, error)
        commands.clear()

    # ------------------------------------------------------------------ leases

    def grant(self, lease: Lease, engine: Engine) -> None:
        """Let a new or waiting request go to its engine."""
        lease.state = LeaseState.ACTIVE
        engine.active[lease.id] = lease
        self.effects.append(GrantLease(lease=lease.id))

    def refuse_waiting(self, engine: Engine, error: SwapServeError) -> None:
        """Refuse everyone who waits for the engine."""
        for lease in engine.waiting.values():
            del self.leases[lease.id]
            self.effects.append(RefuseLease(lease=lease.id, error=error))
        engine.waiting.clear()

    def lose_granted(self, engine: Engine, error: SwapServeError) -> None:
        """End every active and suspended lease of the engine: they cannot continue."""
        for lease in engine.leases():
            del self.leases[lease.id]
            self.effects.append(LoseLease(lease=lease.id, error=error))
        engine.active.clear()
        engine.suspended.clear()
        engine.callers = 0

    def lose_suspended(self, engine: Engine, error: SwapServeError) -> None:
        """End the suspended leases of an engine whose process is gone."""
        for lease in engine.suspended.values():
            del self.leases[lease.id]
            self.effects.append(LoseLease(lease=lease.id, error=error))
        engine.suspended.clear()

    def resume_all(self, engine: Engine, *, called: bool) -> None:
        """Let suspended requests go on; `called`: the engine was brought in for them."""
        for lease in engine.suspended.values():
            lease.state = LeaseState.ACTIVE
            lease.called = called
            engine.active[lease.id] = lease
            self.effects.append(ResumeLease(lease=lease.id))
        engine.callers += len(engine.suspended) if called else 0
        engine.suspended.clear()

    def grant_waiting(self, engine: Engine, *, called: bool) -> None:
        """Grant everyone who waits, in order; `called`: it was brought in for them."""
        for lease in engine.waiting.values():
            lease.called = called
            self.grant(lease, engine)
        engine.callers += len(engine.waiting) if called else 0
        engine.waiting.clear()

    # ----------------------------------------------------------------- engines

    def bring_in(self, engine: Engine, size: int) -> None:
        """Reserve the bytes and start to bring the engine onto its device."""
        cold = engine.tier is Tier.NONE
        self._become(engine, EngineState.STARTING if cold else EngineState.SWAPPING_IN, "bring in")
        self.ledger.reserve(engine.spec.device, engine.name, size)
        engine.preload = False
        self.effects.append(BringIn(engine=engine.name))

    def swap_out(self, engine: Engine, cause: str) -> None:
        """Suspend what runs on the engine and move it off its device."""
        in_flight = len(engine.active)
        self._become(engine, EngineState.SWAPPING_OUT, cause)
        for lease in engine.active.values():
            lease.state = LeaseState.SUSPENDED
            lease.called = False
            lease.since = self.begin()
            engine.suspended[lease.id] = lease
            self.effects.append(SuspendLease(lease=lease.id))
        engine.active.clear()
        engine.callers = 0
        self.effects.append(SwapOut(engine=engine.name, in_flight=in_flight, cause=cause))

    def stop(self, engine: Engine, cause: str) -> None:
        """End the engine's process; its granted leases must be gone already."""
        self._become(engine, EngineState.STOPPING, cause)
        self.effects.append(StopEngine(engine=engine.name))

    def drain(self, engine: Engine) -> None:
        """Grant nothing more on the engine, so that it becomes idle."""
        self._become(engine, EngineState.DRAINING, "drain")
        self.effects.append(Drain(engine=engine.name, on=True))

    def open_again(self, engine: Engine) -> None:
        """Take a drain back: nobody needs its bytes any more."""
        self._become(engine, EngineState.READY, "drain given up")
        self.effects.append(Drain(engine=engine.name, on=False))
        self.answer(engine.ins)
        self.grant_waiting(engine, called=False)

    # ---------------------------------------------------------------- failures

    def fail_in(self, engine: Engine, error: SwapServeError, *, refusing: bool) -> None:
        """Count a failed start or a crash and pause before the next try."""
        engine.failures += 1
        engine.retry_at = self.now + backoff(self.policy, engine.failures)
        engine.refusing = refusing
        engine.last_error = error

    def fail_out(self, engine: Engine) -> None:
        """Count a failed departure; until the pause is over it is nobody's victim."""
        engine.out_failures += 1
        engine.out_retry_at = self.now + backoff(self.policy, engine.out_failures)

    def forgive(self, engine: Engine) -> None:
        """Forget failures to bring it in."""
        engine.failures = 0
        engine.retry_at = 0.0
        engine.refusing = False
        engine.last_error = None

    def _become(self, engine: Engine, new: EngineState, cause: str) -> None:
        if new not in TRANSITIONS[engine.state]:
            raise IllegalTransition(engine.name, engine.state, new, cause)
        engine.state = new
