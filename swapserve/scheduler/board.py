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
    Footprint,
    GrantLease,
    LoseLease,
    RefuseLease,
    ResumeLease,
    Rules,
    StopEngine,
    SuspendLease,
    SwapOut,
)
from swapserve.scheduler.demand import BRINGING_IN, MOVING, Engine, Lease, Since
from swapserve.scheduler.groups import groups, uses
from swapserve.scheduler.knowledge import Knowledge
from swapserve.scheduler.ledger import Ledger
from swapserve.scheduler.overhead import Overhead
from swapserve.scheduler.policies.base import Policy, View
from swapserve.states import TRANSITIONS, EngineState, LeaseState, Tier

HOLD_S = 10.0
OVERHEAD_HORIZON = 20.0
"""The share of time that swaps take is averaged over so many times `max_wait`."""


class Board:
    """Engines, leases and ledger, and the effects of the event being handled."""

    def __init__(
        self,
        devices: Iterable[DeviceSpec],
        engines: Iterable[EngineSpec],
        rules: Rules,
        policy: Policy,
        knowledge: Knowledge,
    ) -> None:
        self.rules = rules
        self.policy = policy
        self.knowledge = knowledge
        self.now = 0.0
        self.effects: list[Effect] = []
        self.shutting_down = False
        devices, engines = tuple(devices), tuple(engines)
        self.ledger = Ledger({device.name: device.capacity_bytes for device in devices})
        self.exclusive = frozenset(device.name for device in devices if device.exclusive)
        self.groups = groups(self.ledger.devices, engines)
        self.engines: dict[EngineName, Engine] = {}
        self.by_device: dict[DeviceName, list[Engine]] = {name: [] for name in self.ledger.devices}
        """Who may ever hold bytes of it."""
        self.by_group: list[list[Engine]] = [[] for _ in self.groups]
        self.leases: dict[LeaseId, Lease] = {}
        self.unseen = 0
        """Engines whose place is not known yet; nothing is placed before it is zero."""
        self.dirty: dict[int, None] = {}
        """Groups to plan anew (a dict: the order of planning must be the same every time)."""
        self.waiting = 0
        """Leases that wait for any engine."""
        self.wished_since: dict[DeviceName, float] = {}
        """When the oldest wish began for which victims on the device may not leave yet."""
        self.reach: dict[int, Tier] = {}
        """What `below` has found during the event being handled, by index."""
        self._running_number = 0
        for spec in engines:
            self._add(spec)
        horizon = OVERHEAD_HORIZON * rules.max_wait_s
        self.overhead = {name: Overhead(horizon) for name in self.ledger.devices}
        self.view = View(rules, knowledge, self.engines, self.overhead, below=self.below)

    def _add(self, spec: EngineSpec) -> None:
        group = next(i for i, tied in enumerate(self.groups) if spec.devices[0] in tied)
        engine = Engine(spec, len(self.engines), group, pinned=spec.pin, preload=spec.preload)
        self.engines[spec.name] = engine
        self.by_group[group].append(engine)
        for device in uses(spec):
            self.by_device[device].append(engine)
        self.unseen += 1

    # ------------------------------------------------------------ small things

    @property
    def hold_s(self) -> float:
        """For how long what an operator has just ordered stays as it is, in seconds."""
        return HOLD_S if self.rules.quantum_s is None else self.rules.quantum_s

    def begin(self) -> Since:
        """Return the age of a wish that begins now."""
        self._running_number += 1
        return (self.now, self._running_number)

    def touch(self, engine: Engine) -> None:
        """Ask for a new plan of the engine's devices."""
        self.dirty[engine.group] = None

    def works(self, engine: Engine) -> None:
        """Note that the engine runs or moves."""
        for device in engine.spec.devices:
            self.overhead[device].works(self.now)

    def rests(self, engine: Engine) -> None:
        """Note that the engine neither runs nor moves, and its devices if nobody does there."""
        for device in engine.spec.devices:
            if not any(one.active or one.state in MOVING for one in self.by_device[device]):
                self.overhead[device].rests(self.now)

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
        lease.granted_at = lease.resumed_at = self.now
        lease.promised = self.knowledge.service.forecast(lease.engine, lease.ask)
        if not engine.active:
            self.works(engine)
        engine.active[lease.id] = lease
        engine.granted.append(self.now)
        self.effects.append(GrantLease(lease=lease.id))

    def enqueue(self, lease: Lease, engine: Engine) -> None:
        """Let a new request wait for its engine."""
        engine.waiting.add(lease)
        self.waiting += 1

    def dequeue(self, lease: Lease, engine: Engine) -> None:
        """Take a request out of the queue."""
        engine.waiting.remove(lease)
        self.waiting -= 1

    def refuse_waiting(self, engine: Engine, error: SwapServeError) -> None:
        """Refuse everyone who waits for the engine."""
        for lease in engine.waiting:
            del self.leases[lease.id]
            self.effects.append(RefuseLease(lease=lease.id, error=error))
        self.waiting -= len(engine.waiting)
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
            lease.resumed_at = self.now
            lease.called = called
            engine.active[lease.id] = lease
            self.effects.append(ResumeLease(lease=lease.id))
        engine.callers += len(engine.suspended) if called else 0
        engine.suspended.clear()

    def grant_waiting(self, engine: Engine, *, called: bool) -> None:
        """Grant who waits, as far as the engine has slots; `called`: it was brought in for them."""
        over_age = self.now - self.rules.max_wait_s
        while engine.waiting and engine.has_slot:
            lease = engine.waiting.first(over_age)
            self.dequeue(lease, engine)
            lease.called = called
            engine.callers += called
            self.grant(lease, engine)

    # ------------------------------------------------------------------- bytes

    def held(self, engine: Engine, device: DeviceName) -> int:
        """Return the bytes of the device that are the engine's, in use or promised."""
        return self.ledger.held(device, engine.name)

    def frees(self, engine: Engine, device: DeviceName) -> int:
        """Return the bytes that the engine's transition under way gives back there."""
        if engine.state is EngineState.STOPPING:
            return self.held(engine, device)
        if device == engine.spec.ram:  # kept until it serves again, or goes on to disk
            goes = (engine.state in BRINGING_IN and not engine.promoting) or (
                engine.state is EngineState.SWAPPING_OUT and engine.bound_for is not Tier.HOST
            )
            return self.held(engine, device) if goes else 0
        return self.held(engine, device) if engine.state is EngineState.SWAPPING_OUT else 0

    def tier_below(self, engine: Engine) -> Tier:
        """Return the highest tier that has room now for all that the engine holds."""
        ram = engine.spec.ram
        if ram is None or (engine.parked and engine.out_failures):
            return Tier.DISK  # that way has just freed nothing
        more = self.host_size(engine) - self.held(engine, ram)
        return Tier.HOST if self.ledger.room(ram) >= max(0, more) else Tier.DISK

    def below(self, engine: Engine) -> Tier:
        """Return the highest tier that it could go to if engines nobody wants left RAM first."""
        found = self.reach.get(engine.index)
        if found is None:
            found = self.reach[engine.index] = self._tier_in_reach(engine)
        return found

    def _tier_in_reach(self, engine: Engine) -> Tier:
        ram = engine.spec.ram
        if ram is None or (engine.parked and engine.out_failures):
            return Tier.DISK
        size = max(self.host_size(engine), sum(engine.need(d) or 0 for d in engine.spec.devices))
        more = size - self.held(engine, ram) - self.ledger.room(ram)
        if more > 0:
            idle = (one for one in self.by_device[ram] if one.parked and one is not engine)
            more -= sum(self.held(one, ram) for one in idle if not one.wanted)
        return Tier.HOST if more <= 0 else Tier.DISK

    def survives(self, engine: Engine, *, to_disk: bool = False) -> bool:
        """Return whether its requests in flight would survive a swap out now."""
        kept = engine.can_dump or (not to_disk and self.tier_below(engine) is Tier.HOST)
        return engine.can_preempt and kept

    def host_size(self, engine: Engine) -> int:
        """Return the bytes of RAM to promise it for the host tier."""
        held = sum(self.held(engine, device) for device in uses(engine.spec))
        if not held:  # on disk: what it will hold on its devices comes to RAM first
            held = sum(engine.need(device) or 0 for device in engine.spec.devices)
        return max(held, engine.host_measured)

    # ------------------------------------------------------- exclusive devices

    def touched(self, engine: Engine) -> frozenset[DeviceName]:
        """Return the exclusive devices that a departure of the engine would touch."""
        whole = engine.tier is Tier.DEVICE
        return frozenset(
            device
            for device in engine.spec.devices
            if device in self.exclusive and (whole or self.held(engine, device))
        )

    def in_use(self, devices: Iterable[DeviceName]) -> set[DeviceName]:
        """Return those of the devices on which an exclusive transition is under way."""
        return {
            device
            for device in devices
            for engine in self.by_device[device]
            if engine.state in MOVING and device in engine.moves_on
        }

    def may_depart(self, engine: Engine) -> bool:
        """Return whether nothing is under way that a departure would have to wait for."""
        return not self.in_use(self.touched(engine))

    # ----------------------------------------------------------------- engines

    def bring_in(self, engine: Engine, sizes: Footprint) -> None:
        """Reserve the bytes on all its devices and start to bring the engine onto them."""
        cold = engine.tier is Tier.NONE
        self._become(engine, EngineState.STARTING if cold else EngineState.SWAPPING_IN, "bring in")
        self.ledger.reserve(engine.name, sizes)
        engine.bound_for = Tier.DEVICE
        engine.moves_on = self.exclusive.intersection(engine.spec.devices)
        engine.left_for = None
        for other in self.by_group[engine.group]:
            if other.left_for is engine:
                other.left_for = None
        unasked = "preload" if engine.preload else "ahead"
        cause = unasked if engine.calling() is None else "demand"
        engine.preload = False
        self.effects.append(BringIn(engine=engine.name, cause=cause))

    def promote(self, engine: Engine) -> None:
        """Reserve RAM for an engine whose state is on disk, and start to bring it there."""
        assert engine.spec.ram is not None
        self._become(engine, EngineState.SWAPPING_IN, "promote")
        self.ledger.reserve(engine.name, {engine.spec.ram: self.host_size(engine)})
        engine.bound_for = Tier.HOST
        engine.moves_on = frozenset()
        self.effects.append(BringIn(engine=engine.name, to=Tier.HOST, cause="ahead"))

    def swap_out(self, engine: Engine, cause: str, *, to_disk: bool = False) -> None:
        """Suspend what runs on the engine and move it off its devices, or further down.

        It goes to the highest tier that has room (RAM is reserved before it leaves), or to disk.
        """
        touched = self.touched(engine)
        engine.bound_for = Tier.DISK if to_disk else self.tier_below(engine)
        if engine.bound_for is Tier.HOST and engine.spec.ram is not None:
            self.ledger.reserve(engine.name, {engine.spec.ram: self.host_size(engine)})
        self._become(engine, EngineState.SWAPPING_OUT, cause)
        engine.moves_on = touched
        if engine.active:
            engine.idle_since = self.now
        for lease in engine.active.values():
            lease.ran_s = lease.ran(self.now)
            lease.state = LeaseState.SUSPENDED
            lease.called = False
            lease.since = self.begin()
            engine.suspended[lease.id] = lease
            self.effects.append(SuspendLease(lease=lease.id))
        engine.active.clear()
        engine.callers = 0
        self.effects.append(
            SwapOut(
                engine=engine.name,
                in_flight=len(engine.suspended),
                cause=cause,
                to=engine.bound_for,
                cache_s=self.knowledge.caches.worth_s(engine.name, self.now),
            )
        )

    def stop(self, engine: Engine, cause: str) -> None:
        """End the engine's process; its granted leases must be gone already."""
        touched = self.touched(engine)
        self._become(engine, EngineState.STOPPING, cause)
        engine.moves_on = touched
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

    def _become(self, engine: Engine, new: EngineState, cause: str) -> None:
        if new not in TRANSITIONS[engine.state]:
            raise IllegalTransition(engine.name, engine.state, new, cause)
        engine.state = new
        if new in MOVING:
            engine.moving_since = self.now
            engine.misled = False
            if not engine.promoting:
                self.works(engine)
